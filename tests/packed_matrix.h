// A random packed matrix, as the file stores it, and its levels (q - z) e in F64.
#pragma once

#include <cmath>
#include <vector>

#include "quant/e4m3.h"
#include "quant/pack.h"
#include "tests/op_test.h"

namespace bbb::tests {

using Bytes = std::vector<uint8_t>;

// Each one of `choices` from `first` on.
inline Bytes random_bytes(engine::Rng& rng, int64_t count, int first, int choices) {
  Bytes bytes(static_cast<size_t>(count));
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(first + rng.below(choices));
  return bytes;
}

struct PackedMatrix {
  int64_t n, k;
  engine::WeightGrid grid;
  float master_scale = 0x1p-9f;
  Bytes codes, scales, zeros;
  std::vector<double> levels;

  PackedMatrix(engine::Rng& rng, int64_t n, int64_t k, engine::WeightGrid grid)
      : n(n), k(k), grid(grid) {
    const int stored = grid.nested ? quant::kNestedBits : grid.bits;
    const int64_t row_bytes = quant::code_row_bytes(k, stored),
                  zero_bytes = quant::zero_row_bytes(k, grid.group, stored);
    codes = random_bytes(rng, n * row_bytes, 0, 256);
    scales = random_bytes(rng, n * (k / grid.group), 1, 0x7E);  // all positive: subnormals too
    zeros = random_bytes(rng, n * zero_bytes, 0, 256);
    for (int64_t row = 0; row < n; ++row)
      for (int64_t i = 0; i < k; ++i) {
        const double q = grid.nested
                             ? nested_code(row, i)
                             : quant::packed_code(codes.data() + row * row_bytes, i, stored);
        const int64_t g = i / grid.group;
        const int z = quant::packed_code(zeros.data() + row * zero_bytes, g, stored);
        const uint8_t e = scales[static_cast<size_t>(row * (k / grid.group) + g)];
        levels.push_back((q - z) * quant::e4m3_decode(e));
      }
  }

  quant::PackedView view() const {
    return {codes.data(), scales.data(), zeros.data(), &master_scale, n, k, grid};
  }
  engine::PackedWeight on(Backend& b) const {
    const void* const parts[] = {codes.data(), scales.data(), zeros.data(), &master_scale};
    return engine::upload_packed(
        b, {.n = n, .k = k, .weight = grid},
        [&](const quant::StoredTensor& t) { return parts[static_cast<size_t>(t.part)]; });
  }

 private:
  // From the planes that a load reads.
  double nested_code(int64_t row, int64_t i) const {
    int code = 0;
    for (int plane = 0; plane < grid.bits; ++plane)
      code |= (codes[static_cast<size_t>((plane * n + row) * (k / 8) + i / 8)] >> (i % 8) & 1)
              << (7 - plane);
    const double unread = std::exp2(8 - grid.bits) - 1;  // the largest value of the other planes
    return grid.dequant == quant::NestedDequant::Middle ? code + unread / 2 : code;
  }
};

}  // namespace bbb::tests
