// Learned range ratios (Backend::ratio_quant): grid and gradients against the formula.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <vector>

#include "quant/grid.h"
#include "tests/op_test.h"
#include "tests/quantizer_formula.h"

namespace bbb::tests {
namespace {

using engine::WeightGrid;
using quant::Levels;
using Values = std::vector<double>;

struct Result {
  Values s, ratio, wq, dw, dratio, rounded;
  std::vector<uint8_t> e, z;
};

Result run(Backend& b, int64_t n, int64_t k, const WeightGrid& spec, const Values& w,
           const Values& ratios, const Values& dw) {
  const int64_t groups = k / spec.group;
  Guarded wq(b, {n, k}, b.act()), e(b, {n, groups}, DType::U8), z(b, {n, groups}, DType::U8),
      s(b, {1}, b.real()), ratio(b, {n, groups}, b.real()), d(b, {n, k}, b.real()),
      dc(b, {n, groups}, b.real()), dc_act(b, {n, groups}, b.act());
  const Tensor master = make(b, {n, k}, b.real(), w), act = make(b, {n, k}, b.act(), dw);
  b.copy(ratio.tensor(), make(b, {n, groups}, b.real(), ratios));
  b.copy(d.tensor(), make(b, {n, k}, b.real(), dw));
  b.ratio_quant(wq.tensor(), e.tensor(), z.tensor(), s.tensor(), ratio.tensor(), master, spec);
  b.ratio_quant_backward(d.tensor(), dc.tensor(), master, e.tensor(), z.tensor(), s.tensor(), spec);
  b.ratio_quant_backward(act, dc_act.tensor(), master, e.tensor(), z.tensor(), s.tensor(), spec);
  CHECK((wq.untouched() && e.untouched() && z.untouched() && s.untouched() && ratio.untouched() &&
         d.untouched() && dc.untouched() && dc_act.untouched()));
  return {values_of(b, s.tensor()), values_of(b, ratio.tensor()), values_of(b, wq.tensor()),
          values_of(b, d.tensor()), values_of(b, dc.tensor()),    values_of(b, dc_act.tensor()),
          bytes_of(b, e.tensor()),  bytes_of(b, z.tensor())};
}

}  // namespace

TEST_CASE("learned ratios: grid, levels and gradients equal the formula", "[ratio][quantizer]") {
  engine::Rng rng(41);
  for (const Levels levels : {Levels::MinMax, Levels::Seq})
    for (const int bits : {2, 3, 4})
      for (const int group : {32, 64, 128})
        for (const auto& [n, groups] : {std::pair<int64_t, int64_t>{1, 1}, {3, 31}, {7, 129}}) {
          CAPTURE(levels == Levels::Seq, bits, group, n, groups);
          const WeightGrid spec{.bits = bits, .group = group, .levels = levels};
          const int64_t k = groups * group;
          const bool seq = levels == Levels::Seq;
          const float top = static_cast<float>((1 << bits) - 1),
                      steps = static_cast<float>(seq ? 1 << bits : (1 << bits) - 1);
          Values w = normal(rng, n * k, 0.02), dw = round_bf16(normal(rng, n * k)), ratios;
          for (double& v : w) v = static_cast<float>(v);
          for (int64_t g = 0; g < n * groups; ++g)  // some out of bounds
            ratios.push_back(static_cast<float>(-0.1 + 1.5 * rng.uniform()));
          const Result got = run(backend(), n, k, spec, w, ratios, dw);
          CHECK(got.rounded ==
                (backend().act() == DType::BF16 ? round_bf16(got.dratio) : got.dratio));
          // Where the formula rounds, the type is float.
          std::vector<float> low, high, raw;
          Values clamped;
          for (size_t g = 0; g < ratios.size(); ++g) {
            const auto begin = w.begin() + static_cast<std::ptrdiff_t>(g) * group;
            float mn = std::min(0.0f, static_cast<float>(*std::min_element(begin, begin + group))),
                  mx = std::max(0.0f, static_cast<float>(*std::max_element(begin, begin + group)));
            if (seq) mx = std::max(mx, -mn), mn = -mx;
            const float c = std::clamp(static_cast<float>(ratios[g]), 1.0f / 64, 1.25f);
            clamped.push_back(static_cast<double>(c));
            low.push_back(mn), high.push_back(mx);
            raw.push_back((c * mx - c * mn) / steps);
          }
          const double s = formula_master_scale(*std::max_element(raw.begin(), raw.end()));
          CHECK(got.ratio == clamped);
          CHECK(got.s == Values{s});
          Values levels_of, dws;
          for (size_t g = 0; g < ratios.size(); ++g) {
            const float c = static_cast<float>(clamped[g]);
            const uint8_t code = formula_scale(raw[g] / s, bits);
            const float e = quant::e4m3_decode(code), step = static_cast<float>(s) * e;
            const float z =
                seq ? top / 2 : std::clamp(std::floor(-(c * low[g]) / step + 0.5f), 0.0f, top);
            REQUIRE(got.e[g] == code);
            if (!seq) REQUIRE(static_cast<float>(got.z[g]) == z);
            double sum = 0, terms = 0;
            for (size_t i = g * static_cast<size_t>(group); i < (g + 1) * size_t(group); ++i) {
              const float quotient = static_cast<float>(w[i]) / step;
              const float unclamped =
                  (seq ? std::floor(quotient) + 0.5f : std::floor(quotient + 0.5f)) + z;
              const float q = std::clamp(unclamped, 0.0f, top);
              levels_of.push_back(static_cast<double>((q - z) * e));
              dws.push_back(q == unclamped ? dw[i] : 0);
              sum += dw[i] * static_cast<double>(q - z);
              terms += std::abs(dw[i] * static_cast<double>(q - z));
            }
            const double width = static_cast<double>(high[g] - low[g]) / static_cast<double>(steps);
            // A sum of G products, each rounded: at most G roundings of their magnitudes.
            CHECK(std::abs(got.dratio[g] - sum * width) <=
                  2 * group * real_epsilon() * terms * width);
          }
          CHECK(got.wq == (backend().act() == DType::BF16 ? round_bf16(levels_of) : levels_of));
          CHECK(got.dw == dws);
        }
}

TEST_CASE("learned ratios: the device equals the CPU bit for bit", "[ratio][quantizer]") {
  engine::Rng rng(42);
  for (const Levels levels : {Levels::MinMax, Levels::Seq}) {
    const WeightGrid spec{.bits = 2, .group = 32, .levels = levels};
    const int64_t n = 37, k = 96;
    Values w = normal(rng, n * k, 0.02), ratios;
    for (double& v : w) v = static_cast<float>(v);
    for (int64_t g = 0; g < n * k / 32; ++g)
      ratios.push_back(static_cast<float>(0.4 + rng.uniform()));
    const Values dw = round_bf16(normal(rng, n * k));
    const Result got = run(backend(), n, k, spec, w, ratios, dw),
                 want = run(oracle(), n, k, spec, w, ratios, dw);
    CHECK(got.s == want.s);
    CHECK(got.ratio == want.ratio);
    CHECK(got.e == want.e);
    CHECK(got.z == want.z);
    CHECK(got.wq == (backend().act() == DType::BF16 ? round_bf16(want.wq) : want.wq));
    CHECK(got.dw == want.dw);
    CHECK(relative_error(got.dratio, want.dratio) < 16 * real_epsilon());
  }
}

TEST_CASE("learned ratios: the gradient is that of a range whose codes stay",
          "[ratio][quantizer]") {
  // With codes, zero points and the rounding of scales held, w^ = c (mx - mn) / L (q - z). Its
  // derivative by central differences in F64 is what the op gives.
  const auto f64 = engine::make_cpu_f64_backend(1);
  Backend& b = *f64;
  const WeightGrid spec{.bits = 2, .group = 32};
  const int64_t n = 4, k = 64;
  engine::Rng rng(43);
  const Values w = normal(rng, n * k), dw = normal(rng, n * k);
  Values ratios;
  for (int64_t g = 0; g < n * 2; ++g) ratios.push_back(0.5 + 0.7 * rng.uniform());
  const Tensor master = make(b, {n, k}, DType::F64, w), d = make(b, {n, k}, DType::F64, dw),
               ratio = make(b, {n, 2}, DType::F64, ratios), wq = b.empty({n, k}, DType::F64),
               e = b.empty({n, 2}, DType::U8), z = b.empty({n, 2}, DType::U8),
               s = b.empty({1}, DType::F64), dc = b.empty({n, 2}, DType::F64);
  b.ratio_quant(wq, e, z, s, ratio, master, spec);
  b.ratio_quant_backward(d, dc, master, e, z, s, spec);
  const Values levels = values_of(b, wq), gradient = values_of(b, dc), dws = values_of(b, d);
  const auto scales = bytes_of(b, e);
  int clipped = 0;
  for (size_t g = 0; g < ratios.size(); ++g) {
    const auto begin = w.begin() + static_cast<std::ptrdiff_t>(g) * 32;
    const double width = (std::max(0.0, *std::max_element(begin, begin + 32)) -
                          std::min(0.0, *std::min_element(begin, begin + 32))) /
                         3;
    const auto loss = [&](double c) {
      double sum = 0;
      for (size_t i = g * 32; i < (g + 1) * 32; ++i)
        sum += dw[i] * c * width * (levels[i] / quant::e4m3_decode(scales[g]));
      return sum;
    };
    constexpr double kStep = 0x1p-20;
    CHECK(gradient[g] ==
          Approx((loss(ratios[g] + kStep) - loss(ratios[g] - kStep)) / (2 * kStep)).epsilon(1e-7));
    for (size_t i = g * 32; i < (g + 1) * 32; ++i) clipped += dws[i] == 0;
  }
  CHECK(clipped > 5);
}

}  // namespace bbb::tests
