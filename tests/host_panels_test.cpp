// Panels of packed weights on the CPU (quant/host_panels.h) on every instruction set of this
// machine, against the exact loops in F64. Runs on the CPU whatever device is under test.
#include "quant/host_panels.h"

#include <catch2/catch.hpp>
#include <cmath>

#include "tests/packed_matrix.h"

namespace bbb::tests {
namespace {

namespace host = quant::host;
using host::VectorSet;
using quant::WeightGrid;

// A random linear in both layouts.
struct Linear : PackedMatrix {
  Bytes panels;

  Linear(engine::Rng& rng, int64_t n, int64_t k, WeightGrid grid) : PackedMatrix(rng, n, k, grid) {
    repack();
  }
  void repack() {
    panels.assign(static_cast<size_t>(host::panels_bytes(n, k, grid)), 0xEE);
    host::make_panels(panels.data(), PackedMatrix::view(), {0, view().count()});
  }
  host::PanelView view() const { return {panels.data(), &master_scale, n, k, grid}; }
};

const std::vector<WeightGrid>& grids() {
  static const std::vector<WeightGrid> all = [] {
    std::vector<WeightGrid> out;
    for (const int group : {32, 64, 128})
      for (const int bits : {2, 3, 4, 8}) {
        out.push_back({bits, group});
        out.push_back({bits, group, true, quant::NestedDequant::Middle});
        out.push_back({bits, group, true, quant::NestedDequant::Floor});
      }
    return out;
  }();
  return all;
}

std::vector<VectorSet> sets() {
  std::vector<VectorSet> out;
  for (const VectorSet set : {VectorSet::Portable, VectorSet::Avx2, VectorSet::Avx512Vnni})
    if (host::runs(set)) out.push_back(set);
  return out;
}

template <typename Activations>
host::SplitRows split(const Activations& x, int64_t m, int64_t k, int group) {
  host::SplitRows rows;
  rows.resize(m, k, group);
  host::split_rows(rows, x, {0, m * rows.groups});
  return rows;
}

// With a guard element on each side.
std::vector<float> product(const Linear& w, const host::SplitRows& x, const float* addend,
                           VectorSet set) {
  constexpr float kGuard = 12345;
  std::vector<float> y(static_cast<size_t>(x.m * w.n + 2), kGuard);
  host::panel_gemv(y.data() + 1, x, w.view(), addend, {0, w.view().count()}, set);
  REQUIRE((y.front() == kGuard && y.back() == kGuard));
  return {y.begin() + 1, y.end() - 1};
}

std::vector<float> normal_floats(engine::Rng& rng, int64_t count, double scale = 1) {
  const std::vector<double> values = normal(rng, count, scale);
  return {values.begin(), values.end()};
}

TEST_CASE("panels: unpacked weights are exact", "[panels]") {
  engine::Rng rng(71);
  for (const WeightGrid& grid : grids())
    for (const int64_t n : {1, 16, 33}) {
      CAPTURE(grid.bits, grid.group, grid.nested, n);
      const Linear w(rng, n, 5 * grid.group, grid);
      std::vector<float> wq(w.levels.size() + 1, 7);
      host::unpack_panels(wq.data(), w.view(), {0, w.view().count()});
      CHECK(wq.back() == 7);
      wq.pop_back();
      CHECK(std::vector<double>(wq.begin(), wq.end()) == w.levels);
    }
}

TEST_CASE("panels: products within 1e-4 relative RMS, the same bits on every set", "[panels]") {
  engine::Rng rng(72);
  for (const WeightGrid& grid : grids())
    for (const auto& [n, groups] :
         std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {31, 3}, {33, 18}, {96, 12}, {577, 2}})
      for (int64_t m = 1; m <= 8; ++m) {
        if (n == 577 && m > 2) continue;
        const int64_t k = groups * grid.group;
        CAPTURE(grid.bits, grid.group, grid.nested, n, k, m);
        const Linear w(rng, n, k, grid);
        const std::vector<float> x = normal_floats(rng, m * k), addend = normal_floats(rng, m * n);
        const host::SplitRows rows = split(x.data(), m, k, grid.group);
        const std::vector<float> y = product(w, rows, nullptr, VectorSet::Portable);
        double error = 0, size = 0;
        for (int64_t i = 0; i < m; ++i)
          for (int64_t j = 0; j < n; ++j) {
            double want = 0, terms = 0;
            for (int64_t c = 0; c < k; ++c) {
              const double term = double(w.master_scale) * x[static_cast<size_t>(i * k + c)] *
                                  w.levels[static_cast<size_t>(j * k + c)];
              want += term;
              terms += term * term;
            }
            const double d = y[static_cast<size_t>(i * n + j)] - want;
            error += d * d;
            size += terms;  // E[y^2] for terms of random sign: no cancellation in one output
          }
        CHECK(std::sqrt(error / size) < 1e-4);
        const std::vector<float> sum = product(w, rows, addend.data(), VectorSet::Portable);
        for (size_t i = 0; i < y.size(); ++i) REQUIRE(sum[i] == y[i] + addend[i]);
        for (const VectorSet set : sets()) {
          CAPTURE(static_cast<int>(set));
          CHECK(product(w, rows, nullptr, set) == y);
          CHECK(product(w, rows, addend.data(), set) == sum);
        }
      }
}

TEST_CASE("panels: the sums of a group of a quantized operand are exact", "[panels]") {
  engine::Rng rng(73);
  for (const WeightGrid& grid : grids())
    for (const int64_t m : {1, 3, 8}) {
      const int64_t n = 37, k = grid.group;
      CAPTURE(grid.bits, grid.group, grid.nested, m);
      const Linear w(rng, n, k, grid);
      Bytes codes = random_bytes(rng, m * k, 0, 256), zeros = random_bytes(rng, m, 0, 256);
      std::fill_n(codes.begin(), k, uint8_t{255});  // the largest sums
      zeros[0] = 0;
      std::vector<float> scales(static_cast<size_t>(m));
      for (float& s : scales) s = std::ldexp(8.0f + float(rng.below(8)), -5);
      const host::SplitRows rows = split(
          host::QuantizedRows<float>{codes.data(), zeros.data(), scales.data()}, m, k, grid.group);
      for (const VectorSet set : sets()) {
        const std::vector<float> y = product(w, rows, nullptr, set);
        for (int64_t i = 0; i < m; ++i)
          for (int64_t j = 0; j < n; ++j) {
            double sum = 0;
            for (int64_t c = 0; c < k; ++c)
              sum +=
                  w.levels[static_cast<size_t>(j * k + c)] *
                  (double(codes[static_cast<size_t>(i * k + c)]) - zeros[static_cast<size_t>(i)]);
            const double want = w.master_scale * sum * scales[static_cast<size_t>(i)];
            REQUIRE(y[static_cast<size_t>(i * n + j)] == static_cast<float>(want));
          }
      }
    }
}

TEST_CASE("panels: split rows", "[panels]") {
  engine::Rng rng(74);
  const int64_t k = 192;
  std::vector<float> x = normal_floats(rng, 2 * k);
  std::fill_n(x.begin() + 32, 32, 0.0f);
  for (int i = 64; i < 96; ++i) x[static_cast<size_t>(i)] *= 0x1p-100f;
  x[100] = 1e30f;
  // Groups just below the smallest max|x| that is split, and at it.
  for (size_t i = 128; i < 192; ++i) x[i] = i < 160 ? 0x1.FFFFFEp-114f : 0x1p-113f;
  const host::SplitRows rows = split(x.data(), 2, k, 32);
  for (int64_t row = 0; row < 2; ++row)
    for (int64_t g = 0; g < 6; ++g) {
      const bool tiny = row == 0 && g == 4;
      int32_t sum = 0, most = 0;
      for (int64_t i = 32 * g; i < 32 * (g + 1); ++i) {
        const int32_t a = 256 * rows.parts[static_cast<size_t>(2 * row * k + i)] +
                          rows.parts[static_cast<size_t>((2 * row + 1) * k + i)];
        const double scale = rows.scales[static_cast<size_t>(6 * row + g)] / 64;
        // Half a step, and the rounding of the scale and of the quotient.
        CHECK(std::abs(a * scale - x[static_cast<size_t>(row * k + i)]) <=
              (tiny ? 0x1p-113 : 0.51 * scale));
        sum += a;
        most = std::max(most, std::abs(a));
      }
      CHECK(sum == rows.sums[static_cast<size_t>(6 * row + g)]);
      CHECK(most == ((row == 0 && g == 1) || tiny ? 0 : 32639));
    }
}

TEST_CASE("panels: a NaN scale stays in its row, a NaN or infinite activation in its own",
          "[panels]") {
  engine::Rng rng(75);
  const int64_t n = 40, k = 1536, m = 3;
  Linear w(rng, n, k, {2, 32});
  w.scales[5 * 48 + 7] = quant::kE4m3Nan;
  w.scales[6 * 48 + 7] = 0x80 | quant::kE4m3Nan;
  w.repack();
  std::vector<float> x = normal_floats(rng, m * k);
  x[static_cast<size_t>(k + 700)] = NAN;
  x[static_cast<size_t>(2 * k + 700)] = -INFINITY;
  const host::SplitRows rows = split(x.data(), m, k, 32);
  for (const VectorSet set : sets()) {
    const std::vector<float> y = product(w, rows, nullptr, set);
    for (int64_t i = 0; i < m * n; ++i) {
      CAPTURE(i, static_cast<int>(set));
      CHECK(std::isfinite(y[static_cast<size_t>(i)]) == (i < n && i != 5 && i != 6));
    }
  }
}

// Positions of a channel order, with padding, through the operand and both CPU backends.
TEST_CASE("panels: a linear with a channel order and padding", "[panels]") {
  engine::Rng rng(76);
  for (const int bits : {2, 4}) {
    quant::LinearFormat format{.n = 50, .k = 300, .weight = {bits, 32}};
    std::vector<int32_t> outliers, split;
    for (int i = 0; i < 32; ++i) outliers.push_back(2 * i);
    for (int i = 0; i < 21; ++i) split.push_back(100 + 3 * i);
    format.order = std::make_shared<quant::ChannelOrder>(300, 32, outliers, split);
    const Linear w(rng, 50, format.stored_k(), format.weight);
    REQUIRE(format.stored_k() == 352);
    const std::vector<double> x = normal(rng, 300);
    std::vector<double> results[2];
    Backend* const backends[] = {&oracle(), &oracle_f64()};
    for (int i = 0; i < 2; ++i) {
      Backend& b = *backends[i];
      const engine::PackedWeight packed =
          engine::upload_packed(b, format, [&](const quant::StoredTensor& t) -> const void* {
            const void* const parts[] = {w.codes.data(),  w.scales.data(), w.zeros.data(),
                                         &w.master_scale, split.data(),    outliers.data()};
            return parts[static_cast<size_t>(t.part)];
          });
      engine::OperandRows rows;
      rows.x = b.empty({1, format.stored_k()}, b.act());
      b.operand(rows, make(b, {1, 300}, b.act(), x), engine::upload_operand(b, format));
      const Tensor y = b.empty({1, 50}, b.act());
      b.packed_gemv(y, rows.x, packed, Tensor());
      results[i] = values_of(b, y);
    }
    CHECK(relative_error(results[0], results[1]) < 1e-4);
  }
}

}  // namespace
}  // namespace bbb::tests
