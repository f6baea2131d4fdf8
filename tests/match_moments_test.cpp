// match_moments against its formula in F64, and the losses that anchor activations against
// differences.
#include <catch2/catch.hpp>
#include <cmath>

#include "autograd/ops.h"
#include "tests/op_test.h"

namespace bbb::tests {
namespace {

using autograd::Anchor;
using autograd::Tape;
using autograd::TapeMode;
using autograd::Var;

constexpr double kWeight = 0.3;

struct Expected {
  double loss = 0;
  std::vector<double> dx;
};

// Two passes over each channel.
Expected formula(const std::vector<double>& x, const std::vector<double>& y, int64_t rows,
                 int64_t d) {
  Expected expected;
  expected.dx.resize(x.size());
  const auto m = static_cast<double>(rows), channels = static_cast<double>(d);
  for (int64_t c = 0; c < d; ++c) {
    const auto spread = [&](const std::vector<double>& of) {
      double mean = 0, square = 0;
      for (int64_t i = 0; i < rows; ++i) mean += of[static_cast<size_t>(i * d + c)] / m;
      for (int64_t i = 0; i < rows; ++i)
        square += std::pow(of[static_cast<size_t>(i * d + c)] - mean, 2) / m;
      return std::pair(mean, std::sqrt(square));
    };
    const auto [mean, sigma] = spread(x);
    const auto [target_mean, target_sigma] = spread(y);
    const double off = mean - target_mean, wide = sigma - target_sigma;
    expected.loss += kWeight * (off * off + wide * wide) / channels;
    for (int64_t i = 0; i < rows; ++i) {
      const auto at = static_cast<size_t>(i * d + c);
      const double slope = sigma > 1e-12 ? wide * (x[at] - mean) / sigma : 0;
      expected.dx[at] = 2 * kWeight / (m * channels) * (off + slope);
    }
  }
  return expected;
}

Tensor moments_of(Backend& b, const Tensor& x) {
  const Tensor moments = b.zeros({Backend::kMoments, x.dim(1)}, DType::F64);
  b.channel_moments(moments, x);
  return moments;
}

}  // namespace

TEST_CASE("match_moments: the distance of means and deviations, and its gradient", "[lora]") {
  Backend& b = backend();
  for (const auto& [rows, d] : {std::pair<int64_t, int64_t>{1, 1}, {31, 33}, {64, 256}, {130, 600}})
    for (const bool constant : {false, true}) {
      CAPTURE(rows, d, constant);
      engine::Rng rng(4);
      std::vector<double> x = activations(rng, rows * d), y = activations(rng, rows * d, 2.0);
      if (constant)  // a channel without a deviation
        for (int64_t i = 0; i < rows; ++i) x[static_cast<size_t>(i * d)] = 0.5;
      const Expected want = formula(x, y, rows, d);
      const Tensor a = make(b, {rows, d}, b.act(), x);
      const Tensor of_x = moments_of(b, a), of_y = moments_of(b, make(b, {rows, d}, b.act(), y));
      const Guarded loss(b, {1}, b.real()), dx(b, {rows, d}, b.act());
      b.match_moments(loss.tensor(), dx.tensor(), a, of_x, of_y, kWeight);
      CHECK((loss.untouched() && dx.untouched()));
      CHECK(values_of(b, loss.tensor())[0] == Approx(want.loss).epsilon(1e-5));
      // x, the mean and the product are rounded to F32, then dx to act.
      CHECK(relative_error(values_of(b, dx.tensor()), want.dx) <=
            8 * real_epsilon() + act_epsilon());
      const Tensor alone = b.empty({1}, b.real());
      b.match_moments(alone, Tensor(), a, of_x, of_y, kWeight);
      CHECK(bytes_of(b, alone) == bytes_of(b, loss.tensor()));
    }
}

TEST_CASE("anchor: gradients of both kinds, beside another loss", "[lora]") {
  Backend& b = oracle_f64();
  const Shape shape{2, 9, 24};
  engine::Rng rng(6);
  const std::vector<double> x = normal(rng, 2 * 9 * 24), along = normal(rng, 2 * 9 * 24);
  const Tensor y = make(b, shape, DType::F64, normal(rng, 2 * 9 * 24));
  for (const Anchor kind : {Anchor::Moments, Anchor::Kl}) {
    CAPTURE(kind == Anchor::Kl);
    const auto value = [&](double step) {
      std::vector<double> at = x;
      for (size_t i = 0; i < at.size(); ++i) at[i] += step * along[i];
      Tape tape(b, TapeMode::Inference);
      const Var input(make(b, shape, DType::F64, at));
      return values_of(b, autograd::mse(tape, input, y).value())[0] +
             values_of(b, autograd::anchor(tape, kind, input, y, kWeight).value())[0];
    };
    Tape tape(b, TapeMode::Training);
    const Var input = Var::input(make(b, shape, DType::F64, x));
    const Var loss = autograd::mse(tape, input, y);
    const Var beside = autograd::anchor(tape, kind, input, y, kWeight);
    CHECK(values_of(b, beside.value())[0] > 0);
    tape.backward(loss);
    const std::vector<double> gradient = values_of(b, input.grad());
    double want = 0, norm = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      want += gradient[i] * along[i];
      norm += gradient[i] * gradient[i];
    }
    constexpr double kStep = 1e-5;
    CHECK(std::abs((value(kStep) - value(-kStep)) / (2 * kStep) - want) <= 1e-7 * std::sqrt(norm));

    // Activations that are y already.
    Tape same(b, TapeMode::Inference);
    CHECK(values_of(b, autograd::anchor(same, kind, Var(y), y, kWeight).value())[0] ==
          Approx(0.0).margin(1e-15));
  }
}

TEST_CASE("anchor: the device's value and gradient against F64", "[lora]") {
  const Shape shape{2, 33, 100};
  engine::Rng rng(8);
  const std::vector<double> x = activations(rng, 6600), y = activations(rng, 6600);
  for (const Anchor kind : {Anchor::Moments, Anchor::Kl}) {
    CAPTURE(kind == Anchor::Kl);
    const auto run = [&](Backend& b) {
      Tape tape(b, TapeMode::Training);
      const Var input = Var::input(make(b, shape, b.act(), x));
      const Var loss = autograd::anchor(tape, kind, input, make(b, shape, b.act(), y), kWeight);
      tape.backward(loss);
      return std::pair(values_of(b, loss.value())[0], values_of(b, input.grad()));
    };
    const auto [loss, dx] = run(backend());
    const auto [want_loss, want_dx] = run(oracle_f64());
    CHECK(loss == Approx(want_loss).epsilon(1e-4));
    CHECK(relative_error(dx, want_dx) <= 2 * act_epsilon() + 32 * real_epsilon());
  }
}

}  // namespace bbb::tests
