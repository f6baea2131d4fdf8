// mse, cross_entropy, kl_divergence and sum against the F64 oracle.
#include <catch2/catch.hpp>
#include <limits>

#include "tests/op_test.h"

namespace bbb::tests {
namespace {

using engine::Write;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

struct LossAndGradient {
  std::vector<double> loss, gradient;
};

LossAndGradient run_mse(Backend& b, const std::vector<double>& x, const std::vector<double>& y,
                        bool with_gradient = true) {
  const Shape shape{static_cast<int64_t>(x.size())};
  const Guarded loss(b, {1}, b.real()), dx(b, shape, b.act());
  b.zero(dx.tensor());
  b.mse(loss.tensor(), with_gradient ? dx.tensor() : Tensor(), make(b, shape, b.act(), x),
        make(b, shape, b.act(), y));
  CHECK(loss.untouched());
  CHECK(dx.untouched());
  return {values_of(b, loss.tensor()), values_of(b, dx.tensor())};
}

struct LogitCase {
  int64_t m, v;
};
// A vocabulary of less than a warp, narrow, wide, and wider than a block's one step.
const LogitCase kLogitCases[] = {{1, 1}, {5, 31}, {4, 33}, {7, 1000}, {2, 49152}, {2, 10001}};

// Every row's target, the second row left out.
std::vector<int32_t> targets_of(const LogitCase& c, engine::Rng& rng) {
  std::vector<int32_t> targets(static_cast<size_t>(c.m));
  for (int32_t& t : targets) t = static_cast<int32_t>(rng.below(c.v));
  targets.front() = static_cast<int32_t>(c.v - 1);
  if (c.m > 1) targets[1] = -1;
  return targets;
}

// The device under test takes logits in `dtype`; the oracle has one dtype only.
LossAndGradient run_cross_entropy(Backend& b, const LogitCase& c, DType dtype,
                                  const std::vector<double>& logits,
                                  const std::vector<int32_t>& targets, double scale,
                                  bool with_gradient = true) {
  const Guarded loss(b, {c.m}, b.real()), dlogits(b, {c.m, c.v}, b.act());
  b.zero(dlogits.tensor());
  b.cross_entropy(loss.tensor(), with_gradient ? dlogits.tensor() : Tensor(),
                  make(b, {c.m, c.v}, dtype, logits), make_ids(b, {c.m}, targets), scale);
  CHECK(loss.untouched());
  CHECK(dlogits.untouched());
  return {values_of(b, loss.tensor()), values_of(b, dlogits.tensor())};
}

LossAndGradient run_kl(Backend& b, const LogitCase& c, DType dtype,
                       const std::vector<double>& logits, const std::vector<double>& teacher,
                       const std::vector<int32_t>& targets, double scale,
                       bool with_gradient = true) {
  const Guarded loss(b, {c.m}, b.real()), dlogits(b, {c.m, c.v}, b.act());
  b.zero(dlogits.tensor());
  b.kl_divergence(loss.tensor(), with_gradient ? dlogits.tensor() : Tensor(),
                  make(b, {c.m, c.v}, dtype, logits), make(b, {c.m, c.v}, dtype, teacher),
                  make_ids(b, {c.m}, targets), scale);
  CHECK(loss.untouched());
  CHECK(dlogits.untouched());
  return {values_of(b, loss.tensor()), values_of(b, dlogits.tensor())};
}

std::vector<DType> logit_types() {
  if (backend().act() == backend().real()) return {backend().act()};
  return {backend().act(), backend().real()};
}

double run_sum(Backend& b, const std::vector<double>& x, double before, double scale, Write mode) {
  const Guarded out(b, {1}, b.real());
  b.copy(out.tensor(), make(b, {1}, b.real(), {before}));
  b.sum(out.tensor(), make(b, {static_cast<int64_t>(x.size())}, b.real(), x), scale, mode);
  CHECK(out.untouched());
  return values_of(b, out.tensor())[0];
}

}  // namespace

TEST_CASE("mse and its gradient", "[mse]") {
  // The largest gives every block of the sum several steps.
  for (const int64_t n : {1, 31, 33, 1000, 300001, 2300000}) {
    CAPTURE(n);
    engine::Rng rng(23);
    const auto x = activations(rng, n), y = activations(rng, n);
    const auto got = run_mse(backend(), x, y), want = run_mse(oracle_f64(), x, y);
    // The loss sums positive terms, a few hundred to an accumulator.
    CHECK(relative_error(got.loss, want.loss) <= 64 * real_epsilon());
    CHECK(relative_error(got.gradient, want.gradient) <= act_epsilon() + 4 * real_epsilon());
    if (n < 1000000) CHECK(run_mse(backend(), x, y, false).loss == got.loss);
  }
}

TEST_CASE("mse of equal tensors is 0, and NaN and Inf show", "[mse]") {
  std::vector<double> x(100, 0.5), y = x;
  CHECK(run_mse(backend(), x, y).loss[0] == 0.0);
  y[70] = kInf;
  CHECK(run_mse(backend(), x, y).loss[0] == kInf);
  y[70] = kNan;
  const auto got = run_mse(backend(), x, y);
  CHECK(std::isnan(got.loss[0]));
  for (size_t i = 0; i < x.size(); ++i) CHECK(std::isnan(got.gradient[i]) == (i == 70));
}

TEST_CASE("cross_entropy and its gradient", "[cross_entropy]") {
  for (const LogitCase& c : kLogitCases)
    for (const DType dtype : logit_types()) {
      CAPTURE(c.m, c.v, engine::name_of(dtype));
      engine::Rng rng(29);
      const auto logits = activations(rng, c.m * c.v, 4.0);
      const auto targets = targets_of(c, rng);
      const auto got = run_cross_entropy(backend(), c, dtype, logits, targets, 0.125);
      const auto want = run_cross_entropy(oracle_f64(), c, DType::F64, logits, targets, 0.125);
      // A difference of numbers up to the largest logit (about 20), with a logarithm's own error.
      for (size_t i = 0; i < want.loss.size(); ++i)
        CHECK(std::abs(got.loss[i] - want.loss[i]) <= 64 * real_epsilon());
      if (c.v > 1)
        CHECK(relative_error(got.gradient, want.gradient) <= act_epsilon() + 64 * real_epsilon());
      CHECK(run_cross_entropy(backend(), c, dtype, logits, targets, 0.125, false).loss == got.loss);
      if (c.m > 1) {
        CHECK(got.loss[1] == 0.0);
        for (int64_t i = c.v; i < 2 * c.v; ++i) CHECK(got.gradient[static_cast<size_t>(i)] == 0.0);
      }
    }
}

TEST_CASE("cross_entropy may write the gradient over the logits", "[cross_entropy]") {
  Backend& b = backend();
  for (const LogitCase c : {LogitCase{3, 33}, LogitCase{3, 4096}}) {
    engine::Rng rng(31);
    const auto values = activations(rng, c.m * c.v, 4.0);
    const auto targets = targets_of(c, rng);
    const auto want = run_cross_entropy(b, c, b.act(), values, targets, 1.0);
    const Tensor logits = make(b, {c.m, c.v}, b.act(), values), loss = b.empty({c.m}, b.real());
    b.cross_entropy(loss, logits, logits, make_ids(b, {c.m}, targets), 1.0);
    CHECK(values_of(b, loss) == want.loss);
    CHECK(values_of(b, logits) == want.gradient);
  }
}

TEST_CASE("cross_entropy of extreme logits", "[cross_entropy]") {
  const LogitCase c{4, 40};
  std::vector<double> logits(static_cast<size_t>(c.m * c.v), 0.0);
  const auto row = [&](int64_t m) { return logits.begin() + m * c.v; };
  std::fill(row(0) + 1, row(1), -kInf);  // one word is possible
  row(1)[3] = 1e4;                       // e^x overflows without the maximum
  row(2)[5] = kNan;
  const auto got = run_cross_entropy(backend(), c, backend().real(), logits, {0, 3, 0, 7}, 1.0);
  CHECK(got.loss[0] == 0.0);
  CHECK(got.loss[1] == 0.0);
  CHECK(std::isnan(got.loss[2]));
  CHECK(got.loss[3] == Approx(std::log(40.0)).epsilon(1e-6));
  for (int64_t i = 0; i < c.m * c.v; ++i)
    if (i / c.v != 2) CHECK(std::isfinite(got.gradient[static_cast<size_t>(i)]));
}

TEST_CASE("kl_divergence and its gradient", "[kl_divergence]") {
  for (const LogitCase& c : kLogitCases)
    for (const DType dtype : logit_types()) {
      CAPTURE(c.m, c.v, engine::name_of(dtype));
      engine::Rng rng(37);
      const auto logits = activations(rng, c.m * c.v, 3.0);
      const auto teacher = activations(rng, c.m * c.v, 3.0);
      const auto targets = targets_of(c, rng);
      const auto got = run_kl(backend(), c, dtype, logits, teacher, targets, 0.5);
      const auto want = run_kl(oracle_f64(), c, DType::F64, logits, teacher, targets, 0.5);
      // Differences of log probabilities up to about 30, averaged with weights that sum to 1.
      for (size_t i = 0; i < want.loss.size(); ++i)
        CHECK(std::abs(got.loss[i] - want.loss[i]) <= 128 * real_epsilon());
      if (c.v > 1)
        CHECK(relative_error(got.gradient, want.gradient) <= act_epsilon() + 128 * real_epsilon());
      CHECK(run_kl(backend(), c, dtype, logits, teacher, targets, 0.5, false).loss == got.loss);
      if (c.m > 1) {
        CHECK(got.loss[1] == 0.0);
        for (int64_t i = c.v; i < 2 * c.v; ++i) CHECK(got.gradient[static_cast<size_t>(i)] == 0.0);
      }
    }
}

TEST_CASE("kl_divergence is 0 where student and teacher agree, and a NaN shows",
          "[kl_divergence]") {
  const LogitCase c{3, 1000};
  engine::Rng rng(41);
  auto logits = activations(rng, c.m * c.v, 3.0);
  const std::vector<int32_t> targets{1, 2, 3};
  const auto same = run_kl(backend(), c, backend().act(), logits, logits, targets, 1.0);
  for (const double loss : same.loss) CHECK(std::abs(loss) <= 128 * real_epsilon());
  for (const double d : same.gradient) CHECK(std::abs(d) <= 64 * real_epsilon());
  const auto teacher = logits;
  logits[1500] = kNan;
  const auto got = run_kl(backend(), c, backend().act(), logits, teacher, targets, 1.0);
  CHECK_FALSE(std::isnan(got.loss[0]));
  CHECK(std::isnan(got.loss[1]));
  CHECK_FALSE(std::isnan(got.loss[2]));
}

TEST_CASE("sum, scaled, written or added", "[sum]") {
  for (const int64_t n : {1, 31, 33, 5000, 1500000}) {
    CAPTURE(n);
    engine::Rng rng(43);
    const auto x = normal(rng, n);
    double magnitude = 0.0;
    for (const double v : x) magnitude += std::abs(v);
    for (const Write mode : {Write::Overwrite, Write::Add}) {
      const double got = run_sum(backend(), x, 2.5, -0.5, mode);
      const double want = run_sum(oracle_f64(), x, 2.5, -0.5, mode);
      // Against the sum of magnitudes: terms of both signs cancel.
      CHECK(std::abs(got - want) <= 16 * real_epsilon() * (2.5 + 0.5 * magnitude));
      CHECK(run_sum(backend(), x, 2.5, -0.5, mode) == got);
    }
  }
  CHECK(run_sum(backend(), {1, 2, 3}, kNan, 1.0, Write::Overwrite) == 6.0);
}

}  // namespace bbb::tests
