// An independent implementation of the group quantizer of quant/grid.h. It uses library calls
// (log2, a search over all scales, divisions) instead of bit tricks. Where the formula rounds, the
// type is float.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "quant/e4m3.h"

namespace bbb::tests {

struct FormulaResult {
  double max_range = 0, s = 1;   // the maximum group range mx - mn; the master scale
  std::vector<uint8_t> e, z;     // per group
  std::vector<uint8_t> codes;    // per element
  std::vector<double> levels;    // (q - z) e
  std::vector<uint8_t> clipped;  // bit i % 8 of byte i / 8
};

// The smallest power of two S with 448 S >= largest; 1 for 0.
inline double formula_master_scale(double largest) {
  return largest == 0 ? 1.0 : std::exp2(std::ceil(std::log2(largest / 448.0)));
}

// The code of the nearest positive E4M3 value, ties to the even code. For 8 bits: the code of the
// smallest value that is at least `value`.
inline uint8_t formula_scale(double value, int bits) {
  int best = 1;
  for (int code = 1; code <= 0x7E; ++code) {
    const double v = quant::e4m3_decode(static_cast<uint8_t>(code));
    const double b = quant::e4m3_decode(static_cast<uint8_t>(best));
    if (bits == 8) {
      if (b < value) best = code;
    } else if (std::abs(v - value) < std::abs(b - value) ||
               (std::abs(v - value) == std::abs(b - value) && code % 2 == 0)) {
      best = code;
    }
  }
  return static_cast<uint8_t>(best);
}

// Quantizes one tensor of whole groups: `group` finite F32 values each.
inline FormulaResult quantize_by_formula(const std::vector<double>& values, int bits, int group) {
  const std::vector<float> w(values.begin(), values.end());
  const auto size = static_cast<size_t>(group);
  const float top = static_cast<float>((1 << bits) - 1);
  FormulaResult out;
  std::vector<float> raw, lowest;
  for (size_t begin = 0; begin < w.size(); begin += size) {
    const auto from = w.begin() + static_cast<std::ptrdiff_t>(begin);
    const auto [mn, mx] = std::minmax_element(from, from + group);
    lowest.push_back(std::min(*mn, 0.0f));
    const float width = std::max(*mx, 0.0f) - lowest.back();
    out.max_range = std::max<double>(out.max_range, width);
    raw.push_back(width / top);
  }
  out.s = formula_master_scale(*std::max_element(raw.begin(), raw.end()));
  out.clipped.resize(w.size() / 8);
  for (size_t g = 0; g < raw.size(); ++g) {
    out.e.push_back(formula_scale(raw[g] / out.s, bits));
    const float e = quant::e4m3_decode(out.e[g]), step = static_cast<float>(out.s) * e;
    const float z = std::clamp(std::floor(-lowest[g] / step + 0.5f), 0.0f, top);
    out.z.push_back(static_cast<uint8_t>(z));
    for (size_t i = g * size; i < (g + 1) * size; ++i) {
      const float code = std::floor(w[i] / step + 0.5f) + z, q = std::clamp(code, 0.0f, top);
      out.codes.push_back(static_cast<uint8_t>(q));
      out.levels.push_back(static_cast<double>((q - z) * e));
      if (code != q) out.clipped[i / 8] |= static_cast<uint8_t>(1 << i % 8);
    }
  }
  return out;
}

}  // namespace bbb::tests
