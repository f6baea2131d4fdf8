// rope against the F64 oracle, and against its own inverse.
#include <catch2/catch.hpp>

#include "tests/op_test.h"

namespace bbb::tests {
namespace {

using engine::Rotation;

struct RopeCase {
  int64_t b, t, h, d;
};

// Narrow (d/2 not a multiple of 8), wide, tokens that do not fill a block, a large head.
const RopeCase kCases[] = {{1, 1, 1, 2},   {1, 1, 9, 64},  {2, 31, 3, 6},
                           {1, 33, 4, 64}, {3, 5, 2, 256}, {1, 130, 1, 16}};

// Sequence b starts at `start` + 100 b. A negative `start` means: no start tensor.
std::vector<double> run(Backend& b, const RopeCase& c, const std::vector<double>& values, int start,
                        Rotation direction, double factor = 1) {
  const Guarded x(b, {c.b, c.t, c.h, c.d}, b.act());
  b.copy(x.tensor(), make(b, {c.b, c.t, c.h, c.d}, b.act(), values));
  std::vector<int32_t> starts;
  for (int i = 0; i < c.b; ++i) starts.push_back(start + 100 * i);
  b.rope(x.tensor(), frequencies(b, c.d), start < 0 ? Tensor() : make_ids(b, {c.b}, starts),
         direction, factor);
  CHECK(x.untouched());
  return values_of(b, x.tensor());
}

// The rounding of the output, and of the angle: an FP32 product with an error of an epsilon of the
// position.
double tolerance(const RopeCase& c, int start) {
  return act_epsilon() +
         real_epsilon() * (4.0 + static_cast<double>(std::max(start, 0) + 100 * (c.b - 1) + c.t));
}

}  // namespace

TEST_CASE("rope rotates by position", "[rope]") {
  for (const RopeCase& c : kCases)
    for (const int start : {-1, 0, 17, 4096, 131000})
      for (const Rotation direction : {Rotation::Forward, Rotation::Inverse}) {
        CAPTURE(c.b, c.t, c.h, c.d, start, direction == Rotation::Forward);
        engine::Rng rng(13);
        const auto x = activations(rng, c.b * c.t * c.h * c.d);
        const auto got = run(backend(), c, x, start, direction);
        CHECK(relative_error(got, run(oracle_f64(), c, x, start, direction)) <=
              tolerance(c, start));
        // Without a start, positions count from 0.
        if (start < 0 && c.b == 1) CHECK(got == run(backend(), c, x, 0, direction));
      }
}

TEST_CASE("rope's first position and first pair equal the formula", "[rope]") {
  const RopeCase c{1, 3, 1, 4};
  const std::vector<double> x{1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4};
  const auto y = run(backend(), c, x, -1, Rotation::Forward);
  for (size_t i = 0; i < 4; ++i) CHECK(y[i] == x[i]);
  for (size_t t = 1; t < 3; ++t) {
    const double angle = static_cast<double>(t);
    CHECK(y[4 * t] == Approx(std::cos(angle) - 3 * std::sin(angle)).epsilon(act_epsilon() * 2));
    CHECK(y[4 * t + 2] == Approx(3 * std::cos(angle) + std::sin(angle)).epsilon(act_epsilon() * 2));
  }
}

TEST_CASE("rope multiplies by its factor, forward and back", "[rope]") {
  for (const RopeCase& c : kCases)
    for (const Rotation direction : {Rotation::Forward, Rotation::Inverse}) {
      CAPTURE(c.b, c.t, c.h, c.d, direction == Rotation::Forward);
      engine::Rng rng(19);
      const auto x = activations(rng, c.b * c.t * c.h * c.d);
      std::vector<double> want = run(oracle_f64(), c, x, 17, direction);
      for (double& value : want) value *= 1.25;
      CHECK(relative_error(run(backend(), c, x, 17, direction, 1.25), want) <= tolerance(c, 17));
    }
}

TEST_CASE("rope rotated back gives the input", "[rope]") {
  const RopeCase c{2, 33, 3, 64};
  engine::Rng rng(17);
  const auto x = activations(rng, c.b * c.t * c.h * c.d);
  const auto there = run(backend(), c, x, 1000, Rotation::Forward);
  const auto back = run(backend(), c, there, 1000, Rotation::Inverse);
  CHECK(relative_error(back, x) <= 2 * (act_epsilon() + 4 * real_epsilon()));  // two roundings
}

}  // namespace bbb::tests
