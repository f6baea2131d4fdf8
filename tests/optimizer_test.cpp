// sum_squares, step_control and adamw against their formulas, written out here in double.
#include <catch2/catch.hpp>
#include <limits>

#include "tests/op_test.h"

namespace bbb::tests {
namespace {

using engine::AdamWSpec;
using engine::Schedule;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

double sum_squares(Backend& b, const std::vector<double>& x) {
  const Guarded out(b, {1}, b.real());
  b.sum_squares(out.tensor(), make(b, {static_cast<int64_t>(x.size())}, b.real(), x));
  CHECK(out.untouched());
  return values_of(b, out.tensor())[0];
}

// Runs step_control once on `control` and returns its slots.
std::vector<double> control_step(Backend& b, const Tensor& control, double loss,
                                 double norm_squared, const Schedule& schedule) {
  b.step_control(control, make(b, {1}, b.real(), {loss}), make(b, {1}, b.real(), {norm_squared}),
                 schedule);
  return values_of(b, control);
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

}  // namespace

TEST_CASE("sum_squares", "[sum_squares]") {
  for (const int64_t n : {1, 31, 33, 4097, 1500000}) {
    CAPTURE(n);
    engine::Rng rng(47);
    const auto x = normal(rng, n, 1e-3);
    double want = 0.0;
    for (const double v : x) want += v * v;
    CHECK(sum_squares(backend(), x) == Approx(want).epsilon(64 * real_epsilon()));
    CHECK(sum_squares(backend(), x) == sum_squares(backend(), x));
  }
  CHECK(sum_squares(backend(), {1, kInf, 2}) == kInf);
  CHECK(std::isnan(sum_squares(backend(), {1, kNan, 2})));
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
      const auto slots = control_step(b, control, 1.5, norm * norm, schedule);
      CHECK(slots[engine::kStep] == t + 1);
      CHECK(slots[engine::kApplied] == t + 1);
      CHECK(slots[engine::kLr] == Approx(learning_rate(schedule, t)).epsilon(16 * real_epsilon()));
      CHECK(slots[engine::kScale] == Approx(t % 2 == 0 ? 1.0 : 0.25).epsilon(4 * real_epsilon()));
      CHECK(slots[engine::kSkip] == 0.0);
      CHECK(slots[engine::kGradNorm] == Approx(norm).epsilon(4 * real_epsilon()));
      CHECK(slots[engine::kLoss] == 1.5);
    }
    schedule.clip_norm = 0;
    CHECK(control_step(b, control, 1.5, 1e6, schedule)[engine::kScale] == 1.0);
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
  const double squares[] = {1.0, 1.0, 1.0, kNan, kInf, 1.0};
  int applied = 0;
  for (int t = 0; t < 6; ++t) {
    CAPTURE(t);
    const bool skip = t > 0 && t < 5;
    applied += skip ? 0 : 1;
    const auto slots = control_step(b, control, losses[t], squares[t], schedule);
    CHECK(slots[engine::kStep] == t + 1);
    CHECK(slots[engine::kApplied] == applied);
    CHECK(slots[engine::kSkip] == (skip ? 1.0 : 0.0));
    CHECK(slots[engine::kSkipped] == t + 1 - applied);
    CHECK(slots[engine::kScale] == (skip ? 0.0 : 1.0));
  }
}

TEST_CASE("adamw is the published update", "[adamw]") {
  Backend& b = backend();
  AdamWSpec spec;
  spec.weight_decay = 0.1;
  Schedule schedule;
  schedule.peak_lr = 1e-2;
  schedule.total_steps = 20;
  for (const int64_t n : {1, 31, 33, 5000}) {
    CAPTURE(n);
    engine::Rng rng(53);
    Moments want{normal(rng, n), std::vector<double>(static_cast<size_t>(n)),
                 std::vector<double>(static_cast<size_t>(n))};
    const Guarded w(b, {n}, b.real()), m(b, {n}, b.real()), v(b, {n}, b.real());
    b.copy(w.tensor(), make(b, {n}, b.real(), want.w));
    b.zero(m.tensor());
    b.zero(v.tensor());
    const Tensor control = b.zeros({engine::kControlSize}, b.real());
    int applied = 0;
    for (int t = 0; t < 6; ++t) {
      const auto g = normal(rng, n, 1e-2);
      const bool skip = t == 2;
      const double norm = 4.0;  // clipped to 1: a factor of a quarter
      control_step(b, control, skip ? kNan : 1.0, norm * norm, schedule);
      const auto before = values_of(b, w.tensor());
      b.adamw(w.tensor(), m.tensor(), v.tensor(), make(b, {n}, b.real(), g), control, spec);
      if (skip) {
        CHECK(values_of(b, w.tensor()) == before);
      } else {
        adamw_by_hand(want, g, learning_rate(schedule, t), 0.25, ++applied, spec);
      }
      CAPTURE(t);
      // The weight moves by lr a step; the moments take a few roundings each.
      CHECK(relative_error(values_of(b, w.tensor()), want.w) <= 16 * real_epsilon());
      CHECK(relative_error(values_of(b, m.tensor()), want.m) <= 32 * real_epsilon());
      CHECK(relative_error(values_of(b, v.tensor()), want.v) <= 32 * real_epsilon());
    }
    CHECK(w.untouched());
    CHECK(m.untouched());
    CHECK(v.untouched());
  }
}

TEST_CASE("a skipped step lets no NaN gradient through", "[adamw]") {
  Backend& b = backend();
  const int64_t n = 37;
  engine::Rng rng(59);
  const auto values = normal(rng, n);
  const Tensor w = make(b, {n}, b.real(), values), m = make(b, {n}, b.real(), values);
  const Tensor v = b.zeros({n}, b.real());
  const auto before_w = values_of(b, w), before_m = values_of(b, m), before_v = values_of(b, v);
  const Tensor g = make(b, {n}, b.real(), std::vector<double>(static_cast<size_t>(n), kNan));
  const Tensor norm_squared = b.empty({1}, b.real());
  b.sum_squares(norm_squared, g);
  const Tensor control = b.zeros({engine::kControlSize}, b.real());
  b.step_control(control, make(b, {1}, b.real(), {1.0}), norm_squared, Schedule{});
  b.adamw(w, m, v, g, control, AdamWSpec{});
  CHECK(values_of(b, w) == before_w);
  CHECK(values_of(b, m) == before_m);
  CHECK(values_of(b, v) == before_v);
}

}  // namespace bbb::tests
