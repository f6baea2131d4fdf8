// lora_weight and its gradients against the F64 oracle, and the gradients against differences.
#include <catch2/catch.hpp>
#include <cmath>
#include <limits>

#include "tests/flat_weights.h"
#include "tests/op_test.h"

namespace bbb::tests {
namespace {

struct LoraCase {
  int64_t n, k, rank;
};

// One row; ragged rows and columns; more ranks than a pass takes; several chunks of rows.
const LoraCase kCases[] = {{1, 8, 1},     {3, 32, 2},      {33, 96, 4},   {31, 104, 9},
                           {576, 264, 8}, {2000, 2056, 3}, {70, 1024, 17}};
constexpr double kAlpha = 0.7;

struct Inputs {
  explicit Inputs(const LoraCase& c) {
    engine::Rng rng(5);
    base = normal(rng, c.n * c.k);
    a = normal(rng, c.n * c.rank);
    b = normal(rng, c.rank * c.k);
    dw = activations(rng, c.n * c.k);
    clipped.resize(static_cast<size_t>(c.n * c.k / 8));
    for (uint8_t& byte : clipped) byte = static_cast<uint8_t>(rng.below(256) & rng.below(256));
  }
  std::vector<double> base, a, b, dw;
  std::vector<uint8_t> clipped;
};

Tensor weight(Backend& d, const LoraCase& c, const Inputs& in) {
  const Guarded w(d, {c.n, c.k}, d.real());
  d.lora_weight(w.tensor(), make(d, {c.n, c.k}, d.real(), in.base),
                make(d, {c.n, c.rank}, d.real(), in.a), make(d, {c.rank, c.k}, d.real(), in.b),
                kAlpha);
  CHECK(w.untouched());
  return w.tensor();
}

// da, then db.
std::pair<std::vector<double>, std::vector<double>> gradients(Backend& d, const LoraCase& c,
                                                              const Inputs& in, DType dtype,
                                                              bool masked) {
  const Guarded da(d, {c.n, c.rank}, dtype), db(d, {c.rank, c.k}, dtype);
  d.lora_weight_backward(da.tensor(), db.tensor(), make(d, {c.n, c.k}, dtype, in.dw),
                         masked ? make_bytes(d, {c.n * c.k / 8}, in.clipped) : Tensor(),
                         make(d, {c.n, c.rank}, d.real(), in.a),
                         make(d, {c.rank, c.k}, d.real(), in.b), kAlpha);
  CHECK((da.untouched() && db.untouched()));
  return {values_of(d, da.tensor()), values_of(d, db.tensor())};
}

}  // namespace

TEST_CASE("lora_weight: base + alpha a b, the same bits on every device", "[lora]") {
  for (const LoraCase& c : kCases) {
    CAPTURE(c.n, c.k, c.rank);
    const Inputs in(c);
    const Tensor w = weight(backend(), c, in);
    CHECK(relative_error(values_of(backend(), w),
                         values_of(oracle_f64(), weight(oracle_f64(), c, in))) <=
          4 * real_epsilon());
    CHECK(bytes_of(backend(), w) == bytes_of(oracle(), weight(oracle(), c, in)));
  }
}

TEST_CASE("lora_weight: adapters of 0 leave the base as it is", "[lora]") {
  const LoraCase c{33, 96, 4};
  Inputs in(c);
  std::fill(in.a.begin(), in.a.end(), 0.0);
  CHECK(bytes_of(backend(), weight(backend(), c, in)) ==
        bytes_of(backend(), make(backend(), {c.n, c.k}, backend().real(), in.base)));
}

TEST_CASE("lora_weight_backward", "[lora]") {
  for (const LoraCase& c : kCases)
    for (const DType dtype : gradient_dtypes())
      for (const bool masked : {false, true}) {
        CAPTURE(c.n, c.k, c.rank, dtype == backend().real(), masked);
        Inputs in(c);
        if (masked)  // what is clipped is not read as a number
          for (size_t i = 0; i < in.dw.size(); ++i)
            if (bit_of(in.clipped, i)) in.dw[i] = std::numeric_limits<double>::quiet_NaN();
        const auto [da, db] = gradients(backend(), c, in, dtype, masked);
        const auto [want_a, want_b] = gradients(oracle_f64(), c, in, DType::F64, masked);
        // Sums over a row and a column in another order, rounded to the gradient's type once.
        const double tolerance =
            32 * real_epsilon() + (dtype == backend().act() ? act_epsilon() : 0);
        CHECK(relative_error(da, want_a) <= tolerance);
        CHECK(relative_error(db, want_b) <= tolerance);
        CHECK(gradients(backend(), c, in, dtype, masked) == std::pair(da, db));
      }
}

TEST_CASE("lora_weight_backward is the gradient of lora_weight", "[lora]") {
  const LoraCase c{33, 96, 4};
  const Inputs in(c);
  // Of the sum of w dw over what is not clipped.
  const auto value = [&](const Inputs& at) {
    const std::vector<double> w = values_of(oracle_f64(), weight(oracle_f64(), c, at));
    double sum = 0;
    for (size_t i = 0; i < w.size(); ++i) sum += bit_of(in.clipped, i) ? 0.0 : w[i] * in.dw[i];
    return sum;
  };
  const auto [da, db] = gradients(oracle_f64(), c, in, DType::F64, true);
  engine::Rng rng(3);
  for (const bool of_a : {true, false}) {
    const std::vector<double>& gradient = of_a ? da : db;
    const std::vector<double> along = normal(rng, static_cast<int64_t>(gradient.size()));
    constexpr double kStep = 1e-4;
    double ends[2], want = 0, norm = 0;
    for (const int side : {0, 1}) {
      Inputs at = in;
      for (size_t i = 0; i < along.size(); ++i)
        (of_a ? at.a : at.b)[i] += (side ? kStep : -kStep) * along[i];
      ends[side] = value(at);
    }
    for (size_t i = 0; i < along.size(); ++i) {
      want += gradient[i] * along[i];
      norm += gradient[i] * gradient[i];
    }
    CHECK(std::abs((ends[1] - ends[0]) / (2 * kStep) - want) <= 1e-7 * std::sqrt(norm));
  }
}

}  // namespace bbb::tests
