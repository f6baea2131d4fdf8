// step_control and adamw against their formulas, written out here in double, and the ranges and
// prequantized weights that adamw leaves for the quantizer.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
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

// The same with a gradient whose norm is `norm`.
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

// The published update, parameter by parameter.
void adamw_by_hand(Moments& s, const FlatWeights& flat, const std::vector<double>& g,
                   double schedule_lr, double factor, int t, const AdamWSpec& spec) {
  size_t p = 0;
  for (size_t i = 0; i < g.size(); ++i) {
    while (p + 1 < flat.begins.size() && static_cast<int64_t>(i) >= flat.begins[p + 1]) ++p;
    const quant::SlotRule<double> rule = flat.parameters[p].rule;
    const double lr = schedule_lr * rule.lr_factor;
    const double d = factor * g[i];
    s.m[i] = spec.beta1 * s.m[i] + (1 - spec.beta1) * d;
    s.v[i] = spec.beta2 * s.v[i] + (1 - spec.beta2) * d * d;
    const double m_hat = s.m[i] / (1 - std::pow(spec.beta1, t));
    const double v_hat = s.v[i] / (1 - std::pow(spec.beta2, t));
    s.w[i] -= lr * (m_hat / (std::sqrt(v_hat) + spec.epsilon) + rule.decay * s.w[i]);
  }
}

// Checks `steps` updates of parameters of these sizes. The third step is skipped.
void check_adamw(std::vector<FlatParameter> parameters, int group, DType dtype, int steps) {
  Backend& b = backend();
  for (size_t p = 0; p < parameters.size(); ++p)  // 1, 2, 0.5 times the rate; decay 0, 0.1, 0.2
    parameters[p].rule = {.lr_factor = p % 3 == 2 ? 0.5 : 1.0 + static_cast<double>(p % 3),
                          .decay = 0.1 * static_cast<double>(p % 3)};
  CAPTURE(parameters.size(), group, dtype == b.real());
  const AdamWSpec spec;
  Schedule schedule;
  schedule.peak_lr = 1e-2;
  schedule.total_steps = 20;
  const FlatWeights flat(b, parameters, group);
  engine::Rng rng(53);
  const int64_t n = flat.total;
  const auto size = static_cast<size_t>(n);
  Moments want{std::vector<double>(size), std::vector<double>(size), std::vector<double>(size)};
  // Padding is 0 and has no gradient, so it stays 0.
  const auto draw = [&](double scale) {
    std::vector<double> x(size, 0.0);
    for (size_t p = 0; p < flat.parameters.size(); ++p)
      for (int64_t i = 0; i < flat.parameters[p].count; ++i)
        x[static_cast<size_t>(flat.begins[p] + i)] = scale * rng.normal();
    return x;
  };
  want.w = draw(1.0);
  const Guarded m(b, {n}, b.act()), v(b, {n}, b.real());
  b.copy(flat.w.tensor(), make(b, {n}, b.real(), want.w));
  b.zero(m.tensor());
  b.zero(v.tensor());
  b.max_group_range(flat.q, flat.w.tensor());
  b.fake_quant(flat.q, flat.w.tensor());
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
                 schedule);  // the norm is clipped: a factor of 1/4
    const auto before = bytes_of(b, flat.w.tensor()), before_m = bytes_of(b, m.tensor()),
               before_v = bytes_of(b, v.tensor());
    want.m = values_of(b, m.tensor());  // as rounded by the last step
    for (size_t i = 0; i < size; ++i)
      if (bit_of(clipped, i)) g[i] = kNan;
    b.adamw(flat.w.tensor(), m.tensor(), v.tensor(), make(b, {n}, dtype, g), control, flat.table,
            flat.q, spec);
    if (skip) {
      CHECK(bytes_of(b, flat.w.tensor()) == before);
      CHECK(bytes_of(b, m.tensor()) == before_m);
      CHECK(bytes_of(b, v.tensor()) == before_v);
    } else {
      for (size_t i = 0; i < size; ++i)
        if (bit_of(clipped, i)) g[i] = 0;
      adamw_by_hand(want, flat, g, learning_rate(schedule, t), 0.25, ++applied, spec);
    }
    // A weight moves by about lr a step; the moments take a few roundings each. The first moment is
    // finally rounded to act: the few values near a tie may round the other way, by one epsilon
    // each.
    if (b.act() == DType::BF16) want.m = round_bf16(want.m);
    CHECK(relative_error(values_of(b, flat.w.tensor()), want.w) <= 16 * real_epsilon());
    CHECK(relative_error(values_of(b, m.tensor()), want.m) <=
          (b.act() == b.real() ? 32 * real_epsilon() : act_epsilon() / 4));
    CHECK(relative_error(values_of(b, v.tensor()), want.v) <= 32 * real_epsilon());
    // The ranges that adamw leaves for the next S equal those measured from the masters.
    const auto left = bytes_of(b, flat.max_range.tensor());
    b.max_group_range(flat.q, flat.w.tensor());
    CHECK(left == bytes_of(b, flat.max_range.tensor()));
  }
  CHECK((flat.untouched() && m.untouched() && v.untouched()));
}

// Everything that fake_quant writes, as bytes. Norms are left out: nothing is written for them.
std::vector<std::vector<uint8_t>> made_by_quantizer(Backend& b, const FlatWeights& flat) {
  std::vector<std::vector<uint8_t>> made{bytes_of(b, flat.s.tensor())};
  for (size_t p = 0; p < flat.parameters.size(); ++p) {
    const auto& [count, bits, rule] = flat.parameters[p];
    if (bits == quant::kNotQuantized) continue;
    made.push_back(bytes_of(b, flat.wq.tensor().slice(flat.begins[p], count)));
    made.push_back(bytes_of(b, flat.clipped.tensor().slice(flat.begins[p] / 8, count / 8)));
    if (bits == quant::kNoQuantizer) continue;
    for (const Guarded* scales : {&flat.e, &flat.z})
      made.push_back(
          bytes_of(b, scales->tensor().slice(flat.begins[p] / flat.q.group, count / flat.q.group)));
  }
  return made;
}

// The same, computed from the masters alone, as if no step had run before.
std::vector<std::vector<uint8_t>> made_afresh(Backend& b, const FlatWeights& flat) {
  FlatWeights fresh(b, flat.parameters, flat.q.group, flat.q.rounding);
  fresh.q.ratios = flat.q.ratios;
  fresh.q.rule = flat.q.rule;
  b.copy(fresh.w.tensor(), flat.w.tensor());
  b.max_group_range(fresh.q, fresh.w.tensor());
  b.fake_quant(fresh.q, fresh.w.tensor());
  return made_by_quantizer(b, fresh);
}

}  // namespace

TEST_CASE("the gradient norm excludes clipped weights", "[step_control]") {
  Backend& b = backend();
  Schedule schedule;
  for (const DType dtype : gradient_dtypes())
    for (const int64_t n : {128, 384, 4224, 1500032}) {
      CAPTURE(n, dtype == b.real());
      engine::Rng rng(47);
      auto g = normal(rng, n, 1e-3);
      std::vector<uint8_t> clipped(static_cast<size_t>(n / 8));
      for (uint8_t& byte : clipped) byte = static_cast<uint8_t>(rng.below(256) & rng.below(256));
      if (dtype == DType::BF16) g = round_bf16(g);  // the gradient that adamw applies
      double want = 0.0;
      for (size_t i = 0; i < g.size(); ++i)
        if (bit_of(clipped, i))
          g[i] = i % 3 == 0 ? kNan : kInf;  // must not be used
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

TEST_CASE("step_control follows the warm-up and the cosine, and clips the norm", "[step_control]") {
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

TEST_CASE("step_control counts a step that is not finite as skipped", "[step_control]") {
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
      // A weight inside one warp, a weight of several tiles with a tail, norms between, a weight
      // without a quantizer.
      check_adamw({{5, quant::kNotQuantized},
                   {3 * group, 2},
                   {131, quant::kNotQuantized},
                   {77 * group, 4},
                   {9 * group, quant::kNoQuantizer}},
                  group, dtype, 6);
}

// There are more tiles than blocks that a GPU runs at once, so a block takes several tiles.
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
    const Tensor w = make(b, {n}, b.real(), values), m = make(b, {n}, b.act(), values);
    const Tensor v = b.zeros({n}, b.real());
    const auto before_w = values_of(b, w), before_m = values_of(b, m), before_v = values_of(b, v);
    const Tensor g = make(b, {n}, dtype, std::vector<double>(static_cast<size_t>(n), kNan));
    const Tensor control = b.zeros({engine::kControlSize}, b.real());
    b.step_control(control, make(b, {1}, b.real(), {1.0}), g, flat.q.clipped, Schedule{});
    b.adamw(w, m, v, g, control, flat.table, flat.q, AdamWSpec{});
    CHECK(values_of(b, w) == before_w);
    CHECK(values_of(b, m) == before_m);
    CHECK(values_of(b, v) == before_v);
  }
}

TEST_CASE("a weight that is not finite shows in the maximum group range that adamw writes",
          "[adamw]") {
  Backend& b = backend();
  engine::Rng rng(61);
  for (const double bad : {kNan, -kNan, kInf, -kInf}) {
    const FlatWeights flat(b, {{64 * 131, 2}, {96, 2}}, 32);
    const int64_t n = flat.total;
    auto values = normal(rng, n);
    values[64 * 100 + 3] = bad;
    const Tensor w = make(b, {n}, b.real(), values), zeros = b.zeros({n}, b.real());
    const Tensor m = b.zeros({n}, b.act()), v = b.zeros({n}, b.real());
    const Tensor control = b.zeros({engine::kControlSize}, b.real());
    control_step(b, control, 1.0, 1.0, Schedule{});
    b.adamw(w, m, v, zeros, control, flat.table, flat.q, AdamWSpec{});
    const auto ranges = values_of(b, flat.max_range.tensor());
    CHECK_FALSE(std::isfinite(ranges[0]));
    CHECK(std::isfinite(ranges[1]));
    b.fake_quant(flat.q, w);
    CHECK(std::isnan(values_of(b, flat.s.tensor())[0]));
    CHECK(std::isfinite(values_of(b, flat.s.tensor())[1]));
  }
}

// The decay of a step changes all weights: by about half (50 or -50), or hardly (0).
TEST_CASE("adamw and fake_quant together equal the quantizer applied to the new masters",
          "[adamw]") {
  Backend& b = backend();
  const double decays[] = {0, 0, -50, 0, 50, 0, -50, -50, -50, 0, 50, 50, 50, 0, 0, 0};
  const int skipped[] = {3, 7, 13};
  for (const engine::Rounding rounding : {engine::Rounding::Nearest, engine::Rounding::Identity})
    for (const DType dtype : gradient_dtypes())
      for (const int group : {32, 64, 128}) {
        const bool ratios = group != 64;
        const quant::WeightRule rules_of[] = {{},
                                              {quant::Levels::Seq, quant::Ste::Clip, 1},
                                              {quant::Levels::MinMax, quant::Ste::Trust, 0.75f}};
        const quant::WeightRule rule = rules_of[group == 32 ? 0 : group == 64 ? 1 : 2];
        CAPTURE(rounding == engine::Rounding::Nearest, dtype == b.real(), group, ratios);
        // A weight of several tiles with a tail, several weights among the tiles that one block
        // checks, norms between.
        FlatWeights flat(b,
                         {{5, quant::kNotQuantized},
                          {577 * group, 2},
                          {group, 3},
                          {3 * group, 8},
                          {131, quant::kNotQuantized},
                          {77 * group, 4},
                          {9 * group, quant::kNoQuantizer},
                          {200 * group, 2}},
                         group, rounding);
        engine::Rng rng(71);
        if (ratios) flat.draw_ratios(rng);
        flat.q.rule = rule;
        const int64_t n = flat.total;
        for (size_t p = 0; p < flat.parameters.size(); ++p)
          flat.set(flat.w.tensor(), p, normal(rng, flat.parameters[p].count, 0.02));
        const Tensor m = b.zeros({n}, b.act()), v = b.zeros({n}, b.real());
        const Tensor loss = b.zeros({1}, b.real()), gradient = b.zeros({n}, dtype);
        const Tensor control = b.zeros({engine::kControlSize}, b.real());
        Schedule schedule;
        schedule.peak_lr = 1e-2;
        schedule.total_steps = 1000;
        b.max_group_range(flat.q, flat.w.tensor());
        b.fake_quant(flat.q, flat.w.tensor());
        int changed = 0, stood = 0;
        for (int t = 0; t < static_cast<int>(std::size(decays)); ++t) {
          CAPTURE(t);
          const bool skip =
              std::find(std::begin(skipped), std::end(skipped), t) != std::end(skipped);
          b.copy(loss, make(b, {1}, b.real(), {skip ? kNan : 1.0}));
          b.copy(gradient, make(b, {n}, dtype, normal(rng, n, 1e-3)));
          std::vector<double> rules;
          for (int64_t slot = 0; slot < flat.slots; ++slot)
            rules.insert(rules.end(), {1.0, decays[t], slot % 4 == 3 ? 1.0 : 0.0});
          b.copy(flat.table.slots, make(b, {flat.slots, 3}, b.real(), rules));
          const auto s = values_of(b, flat.s.tensor());
          // Recorded, as in training.
          b.record([&] {
             b.step_control(control, loss, gradient, flat.q.clipped, schedule);
             b.adamw(flat.w.tensor(), m, v, gradient, control, flat.table, flat.q, AdamWSpec{});
           })->run();
          CHECK(values_of(b, control)[engine::kSkip] == (skip ? 1 : 0));
          const auto prequantized = values_of(b, flat.prequantized.tensor());
          for (size_t p = 0; p < prequantized.size(); ++p) {
            const bool quantized = flat.parameters[p].bits != quant::kNotQuantized &&
                                   rounding == engine::Rounding::Nearest;
            CHECK(prequantized[p] == (on_cuda() && quantized ? s[p] : 0));
          }
          b.record([&] { b.fake_quant(flat.q, flat.w.tensor()); })->run();
          REQUIRE(made_by_quantizer(b, flat) == made_afresh(b, flat));
          const auto now = values_of(b, flat.s.tensor());
          for (size_t p = 0; p < now.size(); ++p)
            if (flat.parameters[p].bits != quant::kNotQuantized)
              ++(now[p] == s[p] ? stood : changed);
        }
        CHECK(changed > 10);
        CHECK(stood > 10);
        CHECK(flat.untouched());
      }
}

TEST_CASE("adamw without a quantizer moves every element", "[adamw]") {
  Backend& b = backend();
  const FlatWeights flat(b, {{1000, quant::kNotQuantized}, {300, quant::kNotQuantized}}, 32);
  engine::Rng rng(58);
  const int64_t n = flat.total;
  const auto g = normal(rng, n), w = normal(rng, n);
  Moments want{w, std::vector<double>(w.size()), std::vector<double>(w.size())};
  const Tensor m = b.zeros({n}, b.act()), v = b.zeros({n}, b.real());
  const Tensor control = b.zeros({engine::kControlSize}, b.real());
  const Tensor gradient = make(b, {n}, b.real(), g);
  b.copy(flat.w.tensor(), make(b, {n}, b.real(), w));
  Schedule schedule;
  schedule.clip_norm = 0;
  b.step_control(control, make(b, {1}, b.real(), {1.0}), gradient, Tensor(), schedule);
  double squares = 0;
  for (double x : g) squares += x * x;
  CHECK(values_of(b, control)[engine::kGradNorm] ==
        Approx(std::sqrt(squares)).epsilon(64 * real_epsilon()));
  b.adamw(flat.w.tensor(), m, v, gradient, control, flat.table, {}, AdamWSpec{});
  adamw_by_hand(want, flat, g, learning_rate(schedule, 0), 1.0, 1, AdamWSpec{});
  CHECK(relative_error(values_of(b, flat.w.tensor()), want.w) <= 16 * real_epsilon());
  CHECK(flat.untouched());
}

TEST_CASE("fake_quant skips prequantized weights until the ranges are measured again", "[adamw]") {
  Backend& b = backend();
  const FlatWeights flat(b, {{64 * 131, 2}, {96, quant::kNotQuantized}, {64 * 3, 4}}, 64);
  engine::Rng rng(73);
  const int64_t n = flat.total;
  for (const size_t p : {0, 2}) flat.set(flat.w.tensor(), p, normal(rng, flat.parameters[p].count));
  const Tensor m = b.zeros({n}, b.act()), v = b.zeros({n}, b.real()), g = b.zeros({n}, b.real());
  const Tensor control = b.zeros({engine::kControlSize}, b.real());
  b.max_group_range(flat.q, flat.w.tensor());
  b.fake_quant(flat.q, flat.w.tensor());
  control_step(b, control, 1.0, 1.0, Schedule{});
  b.adamw(flat.w.tensor(), m, v, g, control, flat.table, flat.q, AdamWSpec{});
  const auto made = made_by_quantizer(b, flat);
  b.zero(flat.w.tensor());  // without a call of max_group_range
  b.fake_quant(flat.q, flat.w.tensor());
  CHECK((made_by_quantizer(b, flat) == made) == on_cuda());
  b.max_group_range(flat.q, flat.w.tensor());
  b.fake_quant(flat.q, flat.w.tensor());
  CHECK(made_by_quantizer(b, flat) == made_afresh(b, flat));
}

TEST_CASE("prequantized weights do not hide a weight that stops being finite", "[adamw]") {
  Backend& b = backend();
  engine::Rng rng(79);
  for (const double bad : {kNan, kInf}) {
    const FlatWeights flat(b, {{64 * 131, 2}, {96, quant::kNoQuantizer}, {96, 2}}, 32);
    const int64_t n = flat.total;
    auto values = normal(rng, n);
    b.copy(flat.w.tensor(), make(b, {n}, b.real(), values));
    b.max_group_range(flat.q, flat.w.tensor());
    b.fake_quant(flat.q, flat.w.tensor());
    for (const int64_t at : {64 * 100 + 3, 64 * 131 + 5}) values[static_cast<size_t>(at)] = bad;
    b.copy(flat.w.tensor(), make(b, {n}, b.real(), values));
    const Tensor m = b.zeros({n}, b.act()), v = b.zeros({n}, b.real()), g = b.zeros({n}, b.real());
    const Tensor control = b.zeros({engine::kControlSize}, b.real());
    for (int step = 0; step < 2; ++step) {  // the second step starts from an S that is NaN
      control_step(b, control, 1.0, 1.0, Schedule{});
      b.adamw(flat.w.tensor(), m, v, g, control, flat.table, flat.q, AdamWSpec{});
      b.fake_quant(flat.q, flat.w.tensor());
      CHECK(std::isnan(values_of(b, flat.s.tensor())[0]));
      CHECK(made_by_quantizer(b, flat) == made_afresh(b, flat));
    }
  }
}

}  // namespace bbb::tests
