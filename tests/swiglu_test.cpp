// swiglu and its backward against the F64 oracle.
#include <catch2/catch.hpp>
#include <limits>

#include "tests/op_test.h"

namespace bbb::tests {
namespace {

struct Values {
  std::vector<double> h, dgate, dup;
};

Values run(Backend& b, const std::vector<double>& gate, const std::vector<double>& up,
           const std::vector<double>& dh) {
  const Shape shape{static_cast<int64_t>(gate.size())};
  const Tensor g = make(b, shape, b.act(), gate), u = make(b, shape, b.act(), up);
  const Guarded h(b, shape, b.act()), dgate(b, shape, b.act()), dup(b, shape, b.act());
  b.swiglu(h.tensor(), g, u);
  b.swiglu_backward(dgate.tensor(), dup.tensor(), make(b, shape, b.act(), dh), g, u);
  CHECK(h.untouched());
  CHECK(dgate.untouched());
  CHECK(dup.untouched());
  return {values_of(b, h.tensor()), values_of(b, dgate.tensor()), values_of(b, dup.tensor())};
}

}  // namespace

TEST_CASE("swiglu and its gradients", "[swiglu]") {
  for (const int64_t n : {1, 31, 33, 2048, 100003}) {
    CAPTURE(n);
    engine::Rng rng(3);
    const auto gate = activations(rng, n, 3.0), up = activations(rng, n), dh = activations(rng, n);
    const Values got = run(backend(), gate, up, dh), want = run(oracle_f64(), gate, up, dh);
    // One rounding of the output; an exponential within 2 ulp, and a handful of products.
    const double tolerance = act_epsilon() + 16 * real_epsilon();
    CHECK(relative_error(got.h, want.h) <= tolerance);
    CHECK(relative_error(got.dgate, want.dgate) <= tolerance);
    CHECK(relative_error(got.dup, want.dup) <= tolerance);
  }
}

TEST_CASE("swiglu saturates without overflow and propagates NaN", "[swiglu]") {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const std::vector<double> gate{-200, 200, nan, 0, 1}, up{2, 2, 2, 2, nan}, dh(5, 1.0);
  const Values got = run(backend(), gate, up, dh);
  CHECK(got.h[0] == 0.0);
  CHECK(got.h[1] == 400.0);
  CHECK(got.dgate[0] == 0.0);
  CHECK(got.dgate[1] == 2.0);
  CHECK(got.dup[1] == 200.0);
  CHECK(std::isnan(got.h[2]));
  CHECK(got.h[3] == 0.0);
  CHECK(got.dgate[3] == 1.0);
  CHECK(std::isnan(got.h[4]));
  CHECK(std::isnan(got.dgate[4]));
  CHECK_FALSE(std::isnan(got.dup[4]));
}

TEST_CASE("add rounds once, also in place and unaligned", "[add]") {
  Backend& b = backend();
  for (const int64_t n : {1, 31, 33, 4096}) {
    CAPTURE(n);
    engine::Rng rng(5);
    const auto a = activations(rng, n + 1), c = activations(rng, n + 1);
    std::vector<double> want(static_cast<size_t>(n));
    for (size_t i = 0; i < want.size(); ++i) want[i] = a[i + 1] + c[i + 1];
    const Tensor ta = make(b, {n + 1}, b.act(), a).slice(1, n);
    const Tensor tc = make(b, {n + 1}, b.act(), c).slice(1, n);
    const Guarded out(b, {n}, b.act());
    b.add(out.tensor(), ta, tc);
    CHECK(out.untouched());
    CHECK(relative_error(values_of(b, out.tensor()), want) <= act_epsilon() + 2 * real_epsilon());
    b.add(ta, ta, tc);
    CHECK(values_of(b, ta) == values_of(b, out.tensor()));
  }
}

TEST_CASE("scale multiplies in place, also unaligned, and propagates NaN", "[scale]") {
  Backend& b = backend();
  for (const int64_t n : {1, 31, 33, 4096, 5000})
    for (const int64_t offset : {0, 1}) {  // 1: not aligned for wide loads
      CAPTURE(n, offset);
      engine::Rng rng(7);
      constexpr float kFactor = -0.3f;
      const Guarded x(b, {n + 2}, b.act());
      b.copy(x.tensor(), make(b, {n + 2}, b.act(), activations(rng, n + 2)));
      std::vector<double> want = values_of(b, x.tensor());
      for (int64_t i = offset; i < offset + n; ++i) want[static_cast<size_t>(i)] *= kFactor;
      b.scale(x.tensor().slice(offset, n), make(b, {1}, b.real(), {kFactor}));
      const auto got = values_of(b, x.tensor());
      for (size_t i = 0; i < got.size(); ++i)
        REQUIRE(std::abs(got[i] - want[i]) <= (act_epsilon() + real_epsilon()) * std::abs(want[i]));
      const auto behind = static_cast<size_t>(offset + n);
      CHECK(got[behind] == want[behind]);
      CHECK(x.untouched());
    }
  const Tensor x = make(b, {3}, b.act(), {1, std::nan(""), 2});
  b.scale(x, make(b, {1}, b.real(), {0.5}));
  const auto got = values_of(b, x);
  CHECK((got[0] == 0.5 && std::isnan(got[1]) && got[2] == 1));
}

TEST_CASE("add_bias adds to every row, and propagates NaN", "[add]") {
  Backend& b = backend();
  for (const auto& [m, n] :
       {std::pair<int64_t, int64_t>{1, 1}, {3, 31}, {33, 8}, {5, 264}, {7, 4100}})
    for (const int64_t offset : {0, 1}) {  // 1: not aligned for wide loads
      CAPTURE(m, n, offset);
      engine::Rng rng(6);
      const auto y = activations(rng, m * n + 1), bias = normal(rng, n);
      std::vector<double> want(y.begin() + offset, y.begin() + offset + m * n);
      for (size_t i = 0; i < want.size(); ++i) want[i] += bias[i % static_cast<size_t>(n)];
      const Tensor rows = make(b, {m * n + 1}, b.act(), y).slice(offset, m * n).view({m, n});
      b.add_bias(rows, make(b, {n}, b.real(), bias));
      CHECK(relative_error(values_of(b, rows), want) <= act_epsilon() + 2 * real_epsilon());
    }
  const Guarded y(b, {2, 3}, b.act());
  b.copy(y.tensor(), make(b, {2, 3}, b.act(), {0, 1, 2, 3, 4, 5}));
  b.add_bias(y.tensor(), make(b, {3}, b.real(), {0.5, NAN, -1}));
  CHECK(y.untouched());
  const std::vector<double> sums = values_of(b, y.tensor());
  CHECK(sums[0] == 0.5);
  CHECK(std::isnan(sums[1]));
  CHECK(std::isnan(sums[4]));
  CHECK(sums[5] == 4);
}

}  // namespace bbb::tests
