// step_control and adamw against their formulas, written out here in double, and what adamw leaves
// for the quantizer.
#include <catch2/catch.hpp>
#include <limits>

#include "tests/flat_weights.h"
#include "tests/op_test.h"

namespace bbb::tests {
namespace {

using engine::AdamWSpec;
using engine::Schedule;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

Tensor bits(Backend& b, const std::vector<uint8_t>& clipped) {
  return make_bytes(b, {static_cast<int64_t>(clipped.size())}, clipped);
}

// Runs step_control once on `control` and returns its slots.
std::vector<double> control_step(Backend& b, const Tensor& control, double loss, const Tensor& g,
                                 const std::vector<uint8_t>& clipped, const Schedule& schedule) {
  b.step_control(control, make(b, {1}, b.real(), {loss}), g, bits(b, clipped), schedule);
  return values_of(b, control);
}

// With a gradient of this norm.
std::vector<double> control_step(Backend& b, const Tensor& control, double loss, double norm,
                                 const Schedule& schedule) {
  std::vector<double> g(quant::kTileAlign, 0.0);
  g[77] = norm;
  return control_step(b, control, loss, make(b, {quant::kTileAlign}, b.real(), g),
                      std::vector<uint8_t>(quant::kTileAlign / 8), schedule);
}

double learning_rate(const Schedule& s, double t) {
  const double pi = std::acos(-1.0);
  const double ramp =
      s.warmup_steps > 0 ? std::min(1.0, (t + 1) / static_cast<double>(s.warmup_steps)) : 1.0;
  const double wave = (1 + std::cos(pi * t / static_cast<double>(s.total_steps))) / 2;
  return s.peak_lr * ramp * (s.final_ratio + (1 - s.final_ratio) * wave);
}

struct Moments {
  std::vector<double> w, m, v;
};

// The published update, one parameter at a time.
void adamw_by_hand(Moments& s, const std::vector<double>& g, double lr, double factor, int t,
                   const AdamWSpec& spec) {
  for (size_t i = 0; i < g.size(); ++i) {
    const double d = factor * g[i];
    s.m[i] = spec.beta1 * s.m[i] + (1 - spec.beta1) * d;
    s.v[i] = spec.beta2 * s.v[i] + (1 - spec.beta2) * d * d;
    const double m_hat = s.m[i] / (1 - std::pow(spec.beta1, t));
    const double v_hat = s.v[i] / (1 - std::pow(spec.beta2, t));
    s.w[i] -= lr * (m_hat / (std::sqrt(v_hat) + spec.epsilon) + spec.weight_decay * s.w[i]);
  }
}

// Steps of which the third is skipped, through parameters of these sizes.
void check_adamw(const std::vector<FlatParameter>& parameters, int group, DType dtype, int steps) {
  Backend& b = backend();
  CAPTURE(parameters.size(), group, dtype == b.real());
  AdamWSpec spec;
  spec.weight_decay = 0.1;
  Schedule schedule;
  schedule.peak_lr = 1e-2;
  schedule.total_steps = 20;
  const FlatWeights flat(b, parameters, group);
  engine::Rng rng(53);
  const int64_t n = flat.total;
  const auto size = static_cast<size_t>(n);
  Moments want{std::vector<double>(size), std::vector<double>(size), std::vector<double>(size)};
  // Padding is 0 and has no gradient, so it stays.
  const auto draw = [&](double scale) {
    std::vector<double> x(size, 0.0);
    for (size_t p = 0; p < flat.parameters.size(); ++p)
      for (int64_t i = 0; i < flat.parameters[p].count; ++i)
        x[static_cast<size_t>(flat.begins[p] + i)] = scale * rng.normal();
    return x;
  };
  want.w = draw(1.0);
  const Guarded m(b, {n}, b.real()), v(b, {n}, b.real());
  b.copy(flat.w.tensor(), make(b, {n}, b.real(), want.w));
  b.zero(m.tensor());
  b.zero(v.tensor());
  b.widest_groups(flat.q, flat.w.tensor());
  const Tensor control = b.zeros({engine::kControlSize}, b.real());
  int applied = 0;
  for (int t = 0; t < steps; ++t) {
    CAPTURE(t);
    auto g = draw(1e-2);
    if (dtype == DType::BF16) g = round_bf16(g);
    std::vector<uint8_t> clipped(size / 8);
    for (uint8_t& byte : clipped) byte = static_cast<uint8_t>(rng.below(256) & rng.below(256));
    b.copy(flat.clipped.tensor(), bits(b, clipped));
    const bool skip = t == 2;
    control_step(b, control, skip ? kNan : 1.0, 4.0,
                 schedule);  // clipped: a factor of a quarter
    const auto before = bytes_of(b, flat.w.tensor()), before_m = bytes_of(b, m.tensor()),
               before_v = bytes_of(b, v.tensor());
    for (size_t i = 0; i < size; ++i)
      if (bit_of(clipped, i)) g[i] = kNan;
    b.adamw(flat.w.tensor(), m.tensor(), v.tensor(), make(b, {n}, dtype, g), control, flat.q, spec);
    if (skip) {
      CHECK(bytes_of(b, flat.w.tensor()) == before);
      CHECK(bytes_of(b, m.tensor()) == before_m);
      CHECK(bytes_of(b, v.tensor()) == before_v);
    } else {
      for (size_t i = 0; i < size; ++i)
        if (bit_of(clipped, i)) g[i] = 0;
      adamw_by_hand(want, g, learning_rate(schedule, t), 0.25, ++applied, spec);
    }
    // The weight moves by lr a step; the moments take a few roundings each.
    CHECK(relative_error(values_of(b, flat.w.tensor()), want.w) <= 16 * real_epsilon());
    CHECK(relative_error(values_of(b, m.tensor()), want.m) <= 32 * real_epsilon());
    CHECK(relative_error(values_of(b, v.tensor()), want.v) <= 32 * real_epsilon());
    // What it leaves for the next S is what the masters give.
    const auto left = bytes_of(b, flat.widest.tensor());
    b.widest_groups(flat.q, flat.w.tensor());
    CHECK(left == bytes_of(b, flat.widest.tensor()));
  }
  CHECK((flat.untouched() && m.untouched() && v.untouched()));
}

}  // namespace

TEST_CASE("the gradient norm leaves out what was clipped", "[step_control]") {
  Backend& b = backend();
  Schedule schedule;
  for (const DType dtype : gradient_dtypes())
    for (const int64_t n : {128, 384, 4224, 1500032}) {
      CAPTURE(n, dtype == b.real());
      engine::Rng rng(47);
      auto g = normal(rng, n, 1e-3);
      std::vector<uint8_t> clipped(static_cast<size_t>(n / 8));
      for (uint8_t& byte : clipped) byte = static_cast<uint8_t>(rng.below(256) & rng.below(256));
      if (dtype == DType::BF16) g = round_bf16(g);  // the norm is that of what adamw applies
      double want = 0.0;
      for (size_t i = 0; i < g.size(); ++i)
        if (bit_of(clipped, i))
          g[i] = i % 3 == 0 ? kNan : kInf;  // is not even looked at
        else
          want += g[i] * g[i];
      const Guarded control(b, {engine::kControlSize}, b.real());
      std::vector<double> norms;
      for (int repeat = 0; repeat < 2; ++repeat) {
        b.zero(control.tensor());
        const auto slots =
            control_step(b, control.tensor(), 1.0, make(b, {n}, dtype, g), clipped, schedule);
        CHECK(slots[engine::kSkip] == 0);
        norms.push_back(slots[engine::kGradNorm]);
      }
      CHECK(norms[0] == Approx(std::sqrt(want)).epsilon(64 * real_epsilon()));
      CHECK(norms[0] == norms[1]);
      CHECK(control.untouched());
    }
}

TEST_CASE("step_control follows warm-up and cosine, and clips", "[step_control]") {
  Backend& b = backend();
  for (const int64_t warmup : {0, 4}) {
    Schedule schedule;
    schedule.peak_lr = 3e-3;
    schedule.final_ratio = 0.1;
    schedule.warmup_steps = warmup;
    schedule.total_steps = 12;
    schedule.clip_norm = 2.0;
    const Tensor control = b.zeros({engine::kControlSize}, b.real());
    for (int t = 0; t < 12; ++t) {
      CAPTURE(warmup, t);
      const double norm = t % 2 == 0 ? 0.5 : 8.0;
      const auto slots = control_step(b, control, 1.5, norm, schedule);
      CHECK(slots[engine::kStep] == t + 1);
      CHECK(slots[engine::kApplied] == t + 1);
      CHECK(slots[engine::kLr] == Approx(learning_rate(schedule, t)).epsilon(16 * real_epsilon()));
      CHECK(slots[engine::kScale] == Approx(t % 2 == 0 ? 1.0 : 0.25).epsilon(4 * real_epsilon()));
      CHECK(slots[engine::kSkip] == 0.0);
      CHECK(slots[engine::kGradNorm] == Approx(norm).epsilon(4 * real_epsilon()));
      CHECK(slots[engine::kLoss] == 1.5);
    }
    schedule.clip_norm = 0;
    CHECK(control_step(b, control, 1.5, 1e3, schedule)[engine::kScale] == 1.0);
    schedule.clip_norm = 1;
    CHECK(control_step(b, control, 1.5, 0.0, schedule)[engine::kScale] == 1.0);
  }
}

TEST_CASE("step_control counts a step that is not finite, and applies nothing", "[step_control]") {
  Backend& b = backend();
  Schedule schedule;
  schedule.total_steps = 10;
  const Tensor control = b.zeros({engine::kControlSize}, b.real());
  const double losses[] = {1.0, kNan, kInf, 1.0, 1.0, 1.0};
  const double norms[] = {1.0, 1.0, 1.0, kNan, 1e30, 1.0};  // 1e30: its square is infinite
  int applied = 0;
  for (int t = 0; t < 6; ++t) {
    CAPTURE(t);
    const bool skip = t > 0 && t < 5;
    applied += skip ? 0 : 1;
    const auto slots = control_step(b, control, losses[t], norms[t], schedule);
    CHECK(slots[engine::kStep] == t + 1);
    CHECK(slots[engine::kApplied] == applied);
    CHECK(slots[engine::kSkip] == (skip ? 1.0 : 0.0));
    CHECK(slots[engine::kSkipped] == t + 1 - applied);
    CHECK(slots[engine::kScale] == (skip ? 0.0 : 1.0));
  }
}

TEST_CASE("adamw is the published update", "[adamw]") {
  for (const DType dtype : gradient_dtypes())
    for (const int group : {32, 64, 128})
      // A weight within a warp, one of several tiles with a tail, norms between, no quantizer.
      check_adamw({{5, quant::kNotQuantized},
                   {3 * group, 2},
                   {131, quant::kNotQuantized},
                   {77 * group, 4},
                   {9 * group, quant::kNoQuantizer}},
                  group, dtype, 6);
}

// More tiles than a GPU runs blocks at once, so that a block takes several.
TEST_CASE("adamw on many small parameters, and on large ones", "[adamw]") {
  std::vector<FlatParameter> small;
  for (int i = 0; i < 2000; ++i)
    small.push_back({32 * (1 + i * 7 % 19), i % 3 == 1 ? quant::kNotQuantized : 2});
  for (const DType dtype : gradient_dtypes()) {
    check_adamw(small, 32, dtype, 3);
    check_adamw({{1300000, 2}, {77, quant::kNotQuantized}, {1500032, 4}, {4096, 8}}, 32, dtype, 3);
  }
}

TEST_CASE("a skipped step lets no NaN gradient through", "[adamw]") {
  Backend& b = backend();
  for (const DType dtype : gradient_dtypes()) {
    const FlatWeights flat(b, {{96, 2}, {37, quant::kNotQuantized}}, 32);
    const int64_t n = flat.total;
    engine::Rng rng(59);
    const auto values = normal(rng, n);
    const Tensor w = make(b, {n}, b.real(), values), m = make(b, {n}, b.real(), values);
    const Tensor v = b.zeros({n}, b.real());
    const auto before_w = values_of(b, w), before_m = values_of(b, m), before_v = values_of(b, v);
    const Tensor g = make(b, {n}, dtype, std::vector<double>(static_cast<size_t>(n), kNan));
    const Tensor control = b.zeros({engine::kControlSize}, b.real());
    b.step_control(control, make(b, {1}, b.real(), {1.0}), g, flat.q.clipped, Schedule{});
    b.adamw(w, m, v, g, control, flat.q, AdamWSpec{});
    CHECK(values_of(b, w) == before_w);
    CHECK(values_of(b, m) == before_m);
    CHECK(values_of(b, v) == before_v);
  }
}

TEST_CASE("a weight that is not finite shows in the widest group that adamw leaves", "[adamw]") {
  Backend& b = backend();
  engine::Rng rng(61);
  for (const double bad : {kNan, -kNan, kInf, -kInf}) {
    const FlatWeights flat(b, {{64 * 131, 2}, {96, 2}}, 32);
    const int64_t n = flat.total;
    auto values = normal(rng, n);
    values[64 * 100 + 3] = bad;
    const Tensor w = make(b, {n}, b.real(), values), zeros = b.zeros({n}, b.real());
    const Tensor m = b.zeros({n}, b.real()), v = b.zeros({n}, b.real());
    const Tensor control = b.zeros({engine::kControlSize}, b.real());
    control_step(b, control, 1.0, 1.0, Schedule{});
    b.adamw(w, m, v, zeros, control, flat.q, AdamWSpec{});
    const auto widest = values_of(b, flat.widest.tensor());
    CHECK_FALSE(std::isfinite(widest[0]));
    CHECK(std::isfinite(widest[1]));
    b.fake_quant(flat.q, w);
    CHECK(std::isnan(values_of(b, flat.s.tensor())[0]));
    CHECK(std::isfinite(values_of(b, flat.s.tensor())[1]));
  }
}

}  // namespace bbb::tests
