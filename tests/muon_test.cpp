// Muon: its momentum and its step against formulas written out here in double, and the singular
// values of what it makes.
#include "autograd/muon.h"

#include <catch2/catch.hpp>
#include <cmath>

#include "autograd/optimizer.h"
#include "tests/flat_weights.h"
#include "tests/op_test.h"
#include "tests/tiny_run.h"

namespace bbb::tests {
namespace {

using autograd::UpdateRule;

// Row-major matrices.
struct Matrix {
  int64_t rows, columns;
  std::vector<double> values;
  double& at(int64_t i, int64_t j) { return values[static_cast<size_t>(i * columns + j)]; }
  double at(int64_t i, int64_t j) const { return values[static_cast<size_t>(i * columns + j)]; }
};

// x x^T, or x^T x.
Matrix gram(const Matrix& x, bool of_rows) {
  const int64_t n = of_rows ? x.rows : x.columns, depth = of_rows ? x.columns : x.rows;
  Matrix a{n, n, std::vector<double>(static_cast<size_t>(n * n))};
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j)
      for (int64_t k = 0; k < depth; ++k)
        a.at(i, j) += of_rows ? x.at(i, k) * x.at(j, k) : x.at(k, i) * x.at(k, j);
  return a;
}

// The lengths |x^T u| of random unit vectors u along the shorter side lie between the smallest and
// the largest singular value. Returns the extremes after power iterations on A and on c I - A.
std::pair<double, double> extreme_singular_values(const Matrix& x) {
  const Matrix a = gram(x, x.rows <= x.columns);
  const auto largest = [&](const Matrix& m) {
    std::vector<double> u(static_cast<size_t>(m.rows), 1.0), next(u.size());
    for (size_t i = 0; i < u.size(); ++i) u[i] += 0.3 * std::sin(static_cast<double>(i * i + 1));
    double value = 0;
    for (int repeat = 0; repeat < 400; ++repeat) {
      double norm = 0;
      for (int64_t i = 0; i < m.rows; ++i) {
        double sum = 0;
        for (int64_t j = 0; j < m.rows; ++j) sum += m.at(i, j) * u[static_cast<size_t>(j)];
        next[static_cast<size_t>(i)] = sum;
        norm += sum * sum;
      }
      value = std::sqrt(norm);
      for (size_t i = 0; i < u.size(); ++i) u[i] = next[i] / value;
    }
    return value;
  };
  const double most = largest(a);
  Matrix rest = a;
  for (int64_t i = 0; i < a.rows; ++i)
    for (int64_t j = 0; j < a.rows; ++j) rest.at(i, j) = (i == j ? most : 0.0) - a.at(i, j);
  return {std::sqrt(std::max(0.0, most - largest(rest))), std::sqrt(most)};
}

Tensor control_of(Backend& b, double scale, bool skip) {
  std::vector<double> slots(engine::kControlSize, 0.0);
  slots[engine::kScale] = scale;
  slots[engine::kSkip] = skip ? 1 : 0;
  slots[engine::kLr] = 0.5;
  slots[engine::kApplied] = 1;
  return make(b, {engine::kControlSize}, b.real(), slots);
}

}  // namespace

TEST_CASE("muon_momentum: Nesterov's step of norm 1; a skipped step changes nothing", "[muon]") {
  Backend& b = backend();
  constexpr double kDecay = 0.95;
  for (const DType dtype : gradient_dtypes())
    for (const int64_t n : {128, 4224, 700032}) {
      CAPTURE(n, dtype == b.real());
      engine::Rng rng(5);
      std::vector<double> g = activations(rng, n, 1e-2), m = activations(rng, n, 1e-2);
      std::vector<uint8_t> clipped(static_cast<size_t>(n / 8));
      for (uint8_t& byte : clipped) byte = static_cast<uint8_t>(rng.below(256) & rng.below(256));
      const Guarded x(b, {n}, b.act()), moment(b, {n}, b.act());
      b.copy(moment.tensor(), make(b, {n}, b.act(), m));
      std::vector<double> poisoned = g, want(g.size());
      double squared = 0;
      for (size_t i = 0; i < g.size(); ++i) {
        if (bit_of(clipped, i)) poisoned[i] = std::nan("");
        const double d = bit_of(clipped, i) ? 0.0 : 0.25 * g[i];
        m[i] = kDecay * m[i] + d;
        want[i] = d + kDecay * m[i];
        squared += want[i] * want[i];
      }
      for (double& value : want) value /= std::sqrt(squared);
      const Tensor mask = make_bytes(b, {n / 8}, clipped), gradient = make(b, {n}, dtype, poisoned);
      const auto before = bytes_of(b, moment.tensor());
      b.muon_momentum(x.tensor(), moment.tensor(), gradient, mask, control_of(b, 0, true), kDecay);
      CHECK(bytes_of(b, moment.tensor()) == before);
      CHECK(values_of(b, x.tensor()) == std::vector<double>(g.size(), 0.0));
      b.muon_momentum(x.tensor(), moment.tensor(), gradient, mask, control_of(b, 0.25, false),
                      kDecay);
      CHECK(relative_error(values_of(b, moment.tensor()), m) <= act_epsilon());
      CHECK(relative_error(values_of(b, x.tensor()), want) <= 2 * act_epsilon());
      CHECK((x.untouched() && moment.untouched()));
    }
}

TEST_CASE("muon_momentum: a gradient of 0 gives a step of 0", "[muon]") {
  Backend& b = backend();
  const Tensor x = b.empty({128}, b.act()), zero = b.zeros({128}, b.act());
  b.muon_momentum(x, b.zeros({128}, b.act()), zero, Tensor(), control_of(b, 1, false), 0.95);
  CHECK(values_of(b, x) == std::vector<double>(128, 0.0));
}

TEST_CASE("Muon: all singular values of a step are near 1, whichever side is longer", "[muon]") {
  Backend& b = backend();
  for (const auto& [n, k] : {std::pair<int64_t, int64_t>{96, 160}, {160, 96}, {32, 256}}) {
    CAPTURE(n, k);
    autograd::ParameterSet set(b, autograd::GradientPasses::One);
    const autograd::Parameter& norm = set.add("norm", {48});
    const autograd::Parameter& matrix =
        set.add("matrix", {n, k}, slot_rule(UpdateRule::Muon, {n, k}));
    set.allocate();
    engine::Rng rng(9);
    b.copy(norm.grad, make(b, {48}, b.act(), normal(rng, 48)));
    const std::vector<uint8_t> before = bytes_of(b, norm.grad);
    b.copy(matrix.grad, make(b, {n, k}, b.act(), activations(rng, n * k, 1e-3)));
    autograd::Muon(set).replace_gradients(control_of(b, 1, false), Tensor());
    CHECK(bytes_of(b, norm.grad) == before);
    CHECK(bytes_of(b, set.m().slice(0, 128)) ==
          std::vector<uint8_t>(128 * static_cast<size_t>(engine::size_bytes(b.act())), 0));
    const double rms_factor = 0.2 * std::sqrt(static_cast<double>(std::max(n, k)));
    Matrix step{n, k, values_of(b, matrix.grad)};
    for (double& value : step.values) value *= matrix.rule.lr_factor / rms_factor;
    const auto [least, most] = extreme_singular_values(step);
    CHECK(least > 0.6);
    CHECK(most < 1.25);
  }
}

TEST_CASE("Muon: an optimizer steps a matrix by it and all else by AdamW", "[muon]") {
  Backend& b = backend();
  for (const auto passes : {autograd::GradientPasses::One, autograd::GradientPasses::Several}) {
    autograd::ParameterSet set(b, passes);
    const autograd::Parameter& matrix =
        set.add("matrix", {32, 64}, slot_rule(UpdateRule::Muon, {32, 64}));
    const autograd::Parameter& norm = set.add("norm", {64});
    set.allocate();
    engine::Rng rng(2);
    const std::vector<double> w = normal(rng, 32 * 64), scale = normal(rng, 64);
    const std::vector<double> g = activations(rng, 32 * 64), dscale = activations(rng, 64);
    b.copy(matrix.master, make(b, {32, 64}, b.real(), w));
    b.copy(norm.master, make(b, {64}, b.real(), scale));
    b.copy(matrix.grad, make(b, {32, 64}, matrix.grad.dtype(), g));
    b.copy(norm.grad, make(b, {64}, norm.grad.dtype(), dscale));
    engine::Schedule schedule;
    schedule.peak_lr = 1e-3;
    schedule.clip_norm = 0;
    schedule.total_steps = 100;
    autograd::Optimizer optimizer(set, nullptr, {}, schedule);
    optimizer.step(make(b, {1}, b.real(), {1.0}));
    // AdamW's first step is the sign of the gradient.
    std::vector<double> want = scale;
    for (size_t i = 0; i < want.size(); ++i) want[i] -= 1e-3 * (dscale[i] > 0 ? 1 : -1);
    CHECK(relative_error(values_of(b, norm.master), want) < 1e-5);
    Matrix moved{32, 64, values_of(b, matrix.master)};
    double along = 0;
    for (size_t i = 0; i < w.size(); ++i) {
      moved.values[i] = (w[i] - moved.values[i]) / (1e-3 * 0.2 * 8);
      along += moved.values[i] * g[i];
    }
    const auto [least, most] = extreme_singular_values(moved);
    CHECK(least > 0.6);
    CHECK(most < 1.25);
    CHECK(along > 0);  // downhill
    CHECK(values_of(b, set.v().slice(set.offset(matrix), 32 * 64)) ==
          std::vector<double>(32 * 64, 0.0));
  }
}

TEST_CASE("Muon: blocks and the whole model train, and a killed run ends with the same bytes",
          "[muon]") {
  const Fixture fixture;
  train::TrainConfig config = fixture.both_phases("whole");
  set_option(config, "optimizer", "muon");
  fixture.run(config);
  train::TrainConfig adamw = config;
  adamw.out = fixture.dir / "adamw";
  set_option(adamw, "optimizer", "adamw");
  fixture.run(adamw);
  CHECK(results(adamw.out).at("e2e/final.safetensors") !=
        results(config.out).at("e2e/final.safetensors"));

  train::TrainConfig killed = config;
  killed.out = fixture.dir / "killed";
  train::Observer in_blocks, whole;
  in_blocks.after_block_step = [](int64_t block, int64_t, int64_t step) {
    if (block == 1 && step == 2) throw Killed();
  };
  whole.after_e2e_step = [](int64_t step) {
    if (step == 3) throw Killed();
  };
  for (const train::Observer& observer : {in_blocks, whole})
    CHECK_THROWS_AS(fixture.run(killed, observer), Killed);
  fixture.run(killed);
  CHECK(results(killed.out) == results(config.out));
}

TEST_CASE("Muon: options that leave it nothing, or that it would undo, are refused",
          "[muon][config]") {
  const Fixture fixture;
  const std::pair<const char*, std::vector<std::pair<const char*, const char*>>> wrong[] = {
      {"this run trains none", {{"stages", ""}, {"e2e-steps", "2"}, {"e2e-train", "scales"}}},
      {"no --method", {{"stages", "w2a16"}, {"method", "gptq"}, {"e2e-steps", "0"}}},
      {"no --method", {{"stages", "w2a16"}, {"grid-train", "scales"}, {"e2e-train", "all"}}},
      {"--e2e-damping", {{"e2e-steps", "2"}, {"e2e-damping", "0.1"}}},
      {"--e2e-freeze", {{"e2e-steps", "2"}, {"e2e-freeze", "flips"}}}};
  for (const auto& [message, options] : wrong) {
    CAPTURE(message);
    train::TrainConfig config = fixture.both_phases("run");
    config.lr.clear(), config.e2e_lr.clear();
    set_option(config, "optimizer", "muon");
    for (const auto& [option, text] : options) set_option(config, option, text);
    CHECK_THROWS_AS(train::resolve(config, tiny_config(), backend().device()), UsageError);
    CHECK_THROWS_WITH(train::resolve(config, tiny_config(), backend().device()),
                      Catch::Contains(message));
  }
}

}  // namespace bbb::tests
