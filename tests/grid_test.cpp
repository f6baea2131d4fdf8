// The group quantizer against its formula.
#include "quant/grid.h"

#include <algorithm>
#include <bit>
#include <catch2/catch.hpp>
#include <cmath>
#include <limits>
#include <vector>

#include "engine/rng.h"
#include "quant/host.h"
#include "tests/quantizer_formula.h"
#include "tests/require_quiet.h"

namespace bbb::tests {
namespace {

using Values = std::vector<float>;

struct Quantized {
  float s = 0;
  std::vector<uint8_t> e, z;
  Values wq;
};

Quantized quantize(const Values& w, quant::WeightGrid spec) {
  const auto k = static_cast<int64_t>(w.size());
  const size_t groups = w.size() / static_cast<size_t>(spec.group);
  Quantized out{0, std::vector<uint8_t>(groups), std::vector<uint8_t>(groups), Values(w.size())};
  std::vector<uint8_t> clipped(w.size() / 8);
  const float max_range = quant::host::group_range_max(w.data(), nullptr, {0, 1}, k, spec.group);
  out.s = quant::master_scale_of(quant::raw_scale(max_range, spec.bits));
  quant::host::fake_quant(out.wq.data(), out.e.data(), out.z.data(), clipped.data(), w.data(),
                          nullptr, {0, 1}, k, out.s, spec, quant::Rounding::Nearest);
  return out;
}

void check_formula(const Values& w, quant::WeightGrid spec) {
  const Quantized got = quantize(w, spec);
  const FormulaResult want =
      quantize_by_formula(std::vector<double>(w.begin(), w.end()), spec.bits, spec.group);
  CAPTURE(spec.bits, spec.group);
  REQUIRE(got.s == want.s);
  REQUIRE(got.e == want.e);
  REQUIRE(got.z == want.z);
  REQUIRE(std::vector<double>(got.wq.begin(), got.wq.end()) == want.levels);
}

Values normal(engine::Rng& rng, int64_t n, double scale) {
  Values x(static_cast<size_t>(n));
  for (float& v : x) v = static_cast<float>(rng.normal() * scale);
  return x;
}

TEST_CASE("the quantizer equals the formula", "[grid]") {
  engine::Rng rng(11);
  for (const int bits : {2, 3, 4, 8})
    for (const int group : {32, 64, 128}) {
      for (const double scale : {1.0, 0.02, 1e-6, 3e7})
        check_formula(normal(rng, group * 9, scale), {bits, group});
      // Groups of very different sizes: subnormal scales, and scales clamped at 2^-9.
      Values uneven = normal(rng, group * 16, 1.0);
      for (size_t i = 0; i < uneven.size(); ++i)
        uneven[i] *= std::ldexp(1.0f, -2 * static_cast<int>(i / static_cast<size_t>(group)));
      check_formula(uneven, {bits, group});
      Values positive = normal(rng, group * 4, 0.1);
      for (float& v : positive) v = std::abs(v) + 0.01f;
      check_formula(positive, {bits, group});
      for (float& v : positive) v = -v;
      check_formula(positive, {bits, group});
    }
}

TEST_CASE("S is the smallest power of two that keeps every scale within 448", "[grid]") {
  for (int exponent = -126; exponent < 100; ++exponent)
    for (const double m : {1.0, 1.25, 1.7499999, 1.75, 1.7500001, 1.9999999}) {
      const float largest = static_cast<float>(std::ldexp(m, exponent));
      const float s = quant::master_scale_of(largest);
      CAPTURE(largest, s);
      int unused;
      REQUIRE(std::frexp(s, &unused) == 0.5f);
      REQUIRE(448.0 * s >= largest);
      if (s > std::numeric_limits<float>::min()) REQUIRE(448.0 * (s / 2.0) < largest);
      REQUIRE(quant::master_scale_of(static_cast<double>(largest)) == s);
    }
  CHECK(quant::master_scale_of(0.0f) == 1.0f);
  CHECK(quant::master_scale_of(std::numeric_limits<float>::denorm_min()) ==
        std::numeric_limits<float>::min());
}

TEST_CASE("ties round up, zero and constant groups stay finite", "[grid]") {
  CHECK(quant::round_half_up(0.5f) == 1.0f);
  CHECK(quant::round_half_up(1.5f) == 2.0f);
  CHECK(quant::round_half_up(2.5f) == 3.0f);
  CHECK(quant::round_half_up(-0.5f) == 0.0f);
  CHECK(quant::round_half_up(-1.5f) == -1.0f);

  // The step is exactly 1 (S = 2^-8, e = 256). Ties: -1.5 is out of range, -0.5 and 0.5 round up.
  Values w(32, 0.0f);
  w[0] = -1.0f;
  w[1] = 2.0f;
  w[2] = -0.5f;
  w[3] = 0.5f;
  w[4] = 1.5f;
  const Quantized q = quantize(w, {2, 32});
  CHECK(q.z[0] == 1);
  CHECK(q.s * q.wq[0] == -1.0f);
  CHECK(q.s * q.wq[1] == 2.0f);
  CHECK(q.s * q.wq[2] == 0.0f);
  CHECK(q.s * q.wq[3] == 1.0f);
  CHECK(q.s * q.wq[4] == 2.0f);

  const Quantized zero = quantize(Values(64, 0.0f), {2, 32});
  CHECK(zero.s == 1.0f);
  CHECK(zero.e == std::vector<uint8_t>{1, 1});
  CHECK(zero.z == std::vector<uint8_t>{0, 0});
  CHECK(zero.wq == Values(64, 0.0f));

  for (const float c : {0.7f, -0.7f}) {
    const Quantized constant = quantize(Values(32, c), {2, 32});
    CHECK(constant.z[0] == (c > 0 ? 0 : 3));
    for (const float v : constant.wq) CHECK(constant.s * v == Approx(c).epsilon(0.0625));
  }
  const Quantized tiny = quantize(Values(32, 1e-41f), {2, 32});
  CHECK(tiny.s == std::numeric_limits<float>::min());
  for (const float v : tiny.wq) CHECK(std::isfinite(v));
}

// A group whose scale is exactly S e: one end at 0, the other at L S e.
quant::QuantizedGroup group_of_scale(uint8_t e, float master_scale, int bits) {
  quant::Range<float> range;
  range.include(float(quant::max_code(bits)) * quant::e4m3_decode(e) * master_scale);
  return quant::GroupQuantizer(master_scale, bits)(range);
}

TEST_CASE("a corrected product equals the quotient, for every float and every scale", "[grid]") {
  // A power of two in x or s scales both sides, so only mantissas matter: eight of e, all of x.
  for (int e = 0x38; e < 0x40; ++e) {
    const quant::QuantizedGroup made = group_of_scale(static_cast<uint8_t>(e), 0x1p-9f, 2);
    REQUIRE(made.params.e == e);
    const quant::GroupLevels& group = made.levels;
    const float step = 0x1p-9f * quant::e4m3_decode(static_cast<uint8_t>(e));
    int64_t wrong = 0;
    for (uint32_t mantissa = 0; mantissa < 1u << 23; ++mantissa) {
      const float x = std::bit_cast<float>(0x3C000000u | mantissa);
      wrong += group.quotient(x) != x / step;
      wrong += group.quotient(-x) != -x / step;
    }
    CAPTURE(e);
    CHECK(wrong == 0);
  }
}

TEST_CASE("levels computed without a division have the bits of the formula", "[grid]") {
  engine::Rng rng(12);
  const auto bits_of = [](float x) { return std::bit_cast<uint32_t>(x); };
  for (const int bits : {2, 3, 4, 8})
    for (const float master_scale : {0x1p-126f, 0x1p-100f, 0x1p-12f, 1.0f, 0x1p100f})
      for (int trial = 0; trial < 3000; ++trial) {
        // Ranges from below the smallest scale to the largest, some of them one-sided.
        const double size = std::ldexp(448.0 * master_scale, -static_cast<int>(rng.below(24)));
        quant::Range<float> range;
        if (trial % 5 != 1) range.include(static_cast<float>(-rng.uniform() * size));
        if (trial % 5 != 2) range.include(static_cast<float>(rng.uniform() * size));
        const quant::GroupParams want = quant::group_params(range, master_scale, bits);
        const quant::QuantizedGroup made = quant::GroupQuantizer(master_scale, bits)(range);
        REQUIRE(made.params.e == want.e);
        REQUIRE(made.params.z == want.z);
        const quant::GroupLevels group = made.levels.fetched(bits, [](float x) { return x; });
        const float step = quant::step_of(want.e, master_scale);
        const auto check = [&](float x) {
          const float unclamped = quant::unclamped_code(x, step, want.z);
          const float level = quant::level_of(quant::code_of(x, step, want.z, bits), want.z,
                                              quant::e4m3_decode(want.e));
          const float steps = group.steps(x);
          CAPTURE(bits, master_scale, want.e, want.z, x);
          REQUIRE_QUIET(bits_of(group.level(steps)) == bits_of(level));
          REQUIRE_QUIET(group.is_clipped(steps) == quant::is_clipped(unclamped, bits));
        };
        for (int i = 0; i < 8; ++i)
          check(static_cast<float>(range.mn + rng.uniform() * (range.mx - range.mn)));
        for (int q = -3; q < 4; ++q) {  // ties, and the floats next to them
          const float tie = (static_cast<float>(q) + 0.5f) * step;
          for (const float x : {tie, std::nextafter(tie, 2 * tie), std::nextafter(tie, 0.0f)})
            check(x);
        }
        for (const float x : {0.0f, -0.0f, 1e-45f, -1e-45f, range.mn, range.mx}) check(x);
      }
}

TEST_CASE("NaN or infinity in a master makes every weight NaN", "[grid]") {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float infinity = std::numeric_limits<float>::infinity();
  engine::Rng rng(3);
  for (const float bad : {nan, -nan, infinity, -infinity})
    for (const size_t at : {size_t{0}, size_t{31}, size_t{40}, size_t{95}}) {
      Values w = normal(rng, 96, 1.0);
      w[at] = bad;
      const Quantized q = quantize(w, {2, 32});
      CAPTURE(bad, at);
      CHECK(std::isnan(q.s));
      for (const float v : q.wq) CHECK(std::isnan(v));
      CHECK(q.e == std::vector<uint8_t>(3, quant::kE4m3Nan));
      CHECK(q.z == std::vector<uint8_t>(3, 0));
    }
  CHECK(std::signbit(quant::max_or_nan(0.0f, -0.0f)) == false);
  CHECK(std::isnan(quant::max_or_nan(nan, 1.0f)));
  CHECK(std::isnan(quant::max_or_nan(1.0f, nan)));
}

TEST_CASE("learned scales: negative and zero become the smallest, NaN stays", "[grid]") {
  CHECK(quant::encode_scale(-1.0f, 1.0f, 2) == quant::kE4m3SmallestCode);
  CHECK(quant::encode_scale(0.0f, 1.0f, 2) == quant::kE4m3SmallestCode);
  CHECK(quant::encode_scale(-0.0f, 1.0f, 2) == quant::kE4m3SmallestCode);
  CHECK(quant::encode_scale(std::numeric_limits<float>::quiet_NaN(), 1.0f, 2) == quant::kE4m3Nan);
  CHECK(quant::encode_scale(1.0f, 1.0f, 2) == 0x38);
}

}  // namespace
}  // namespace bbb::tests
