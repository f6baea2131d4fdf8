// rms_norm and its backward against the F64 oracle, for every way to share rows among threads.
#include <catch2/catch.hpp>
#include <limits>

#include "tests/op_test.h"

namespace bbb::tests {
namespace {

using engine::Write;

constexpr double kEps = 1e-5;

struct NormCase {
  int64_t m, d;
};

// A row stays in registers if its width is a multiple of 8, up to 8192. Up to 768 columns, a thread
// holds one piece, and six, three or two rows are done at once; above, two pieces, and four, two or
// one rows, in up to 16 warps. Other rows are read twice. The last turn of a chunk is not full;
// with 12388 rows a chunk has several turns forward, and more rows than its minimum backward.
const NormCase kCases[] = {{1, 1},     {3, 31},    {33, 33},  {130, 100},  {3, 2049},
                           {3, 8200},  {12388, 8}, {200, 64}, {9000, 128}, {9, 264},
                           {31, 576},  {7, 768},   {13, 776}, {11, 1280},  {21, 2048},
                           {10, 2056}, {9, 4096},  {1, 4104}, {10, 8192}};

struct Inputs {
  explicit Inputs(const NormCase& c) {
    engine::Rng rng(11);
    x = activations(rng, c.m * c.d, 2.0);
    dy = activations(rng, c.m * c.d);
    dx = activations(rng, c.m * c.d);
    w = activations(rng, c.d);
    dw = activations(rng, c.d);
  }
  std::vector<double> x, dy, dx, w, dw;
};

// The values at an address that is not aligned for wide loads.
Tensor unaligned(Backend& b, const NormCase& c, std::vector<double> values) {
  values.insert(values.begin(), 0.0);
  return make(b, {c.m * c.d + 1}, b.act(), values).slice(1, c.m * c.d).view({c.m, c.d});
}

struct Forward {
  std::vector<double> y, inv_rms;
};

Forward run(Backend& b, const NormCase& c, const Inputs& in) {
  const Guarded y(b, {c.m, c.d}, b.act()), inv_rms(b, {c.m}, b.real());
  b.rms_norm(y.tensor(), inv_rms.tensor(), make(b, {c.m, c.d}, b.act(), in.x),
             make(b, {c.d}, b.real(), in.w), kEps);
  CHECK(y.untouched());
  CHECK(inv_rms.untouched());
  return {values_of(b, y.tensor()), values_of(b, inv_rms.tensor())};
}

struct Backward {
  std::vector<double> dx, dw;
};

Backward run_backward(Backend& b, const NormCase& c, const Inputs& in, bool want_dw, DType dw_dtype,
                      Write dx_mode, Write dw_mode) {
  const Guarded dx(b, {c.m, c.d}, b.act()), dw(b, {c.d}, dw_dtype);
  b.copy(dx.tensor(), make(b, {c.m, c.d}, b.act(), in.dx));
  b.copy(dw.tensor(), make(b, {c.d}, dw_dtype, in.dw));
  const Tensor x = make(b, {c.m, c.d}, b.act(), in.x), w = make(b, {c.d}, b.real(), in.w);
  const Tensor y = b.empty({c.m, c.d}, b.act()), inv_rms = b.empty({c.m}, b.real());
  b.rms_norm(y, inv_rms, x, w, kEps);
  b.rms_norm_backward(dx.tensor(), want_dw ? dw.tensor() : Tensor(),
                      make(b, {c.m, c.d}, b.act(), in.dy), x, inv_rms, w, dx_mode, dw_mode);
  CHECK(dx.untouched());
  CHECK(dw.untouched());
  return {values_of(b, dx.tensor()), values_of(b, dw.tensor())};
}

}  // namespace

TEST_CASE("rms_norm", "[rms_norm]") {
  for (const NormCase& c : kCases) {
    CAPTURE(c.m, c.d);
    const Inputs in(c);
    const Forward got = run(backend(), c, in), want = run(oracle_f64(), c, in);
    // y: its own rounding and three FP32 factors. inv_rms: the root halves the error of the sum.
    CHECK(relative_error(got.y, want.y) <= act_epsilon() + 8 * real_epsilon());
    CHECK(relative_error(got.inv_rms, want.inv_rms) <= 8 * real_epsilon());
  }
}

TEST_CASE("rms_norm backward", "[rms_norm]") {
  for (const NormCase& c : kCases) {
    const Inputs in(c);
    for (const DType dw_dtype : gradient_dtypes())
      for (const Write dx_mode : {Write::Overwrite, Write::Add})
        for (const Write dw_mode : {Write::Overwrite, Write::Add}) {
          if (dw_mode == Write::Add && dw_dtype != backend().real()) continue;
          CAPTURE(c.m, c.d, dw_dtype == backend().real(), dx_mode == Write::Add,
                  dw_mode == Write::Add);
          const Backward got = run_backward(backend(), c, in, true, dw_dtype, dx_mode, dw_mode);
          const Backward want =
              run_backward(oracle_f64(), c, in, true, DType::F64, dx_mode, dw_mode);
          // dx loses digits where its two terms cancel: completely at d = 1, up to eps / x^2.
          const double cancelled =
              c.d == 1 && dx_mode == Write::Overwrite ? 64 / kEps * real_epsilon() : 0.0;
          CHECK(relative_error(got.dx, want.dx) <= act_epsilon() + 16 * real_epsilon() + cancelled);
          // A sum over the rows, rounded.
          const double rounding = dw_dtype == backend().real() ? 0.0 : act_epsilon();
          CHECK(relative_error(got.dw, want.dw) <= 32 * real_epsilon() + rounding);
          const Backward again = run_backward(backend(), c, in, true, dw_dtype, dx_mode, dw_mode);
          CHECK(again.dx == got.dx);
          CHECK(again.dw == got.dw);
        }
  }
}

TEST_CASE("rms_norm of more rows than thread blocks", "[rms_norm]") {
  const NormCase c{2100, 2056};
  const Inputs in(c);
  const Forward got = run(backend(), c, in), want = run(oracle_f64(), c, in);
  CHECK(relative_error(got.y, want.y) <= act_epsilon() + 8 * real_epsilon());
  CHECK(relative_error(got.inv_rms, want.inv_rms) <= 8 * real_epsilon());
}

TEST_CASE("rms_norm backward may overwrite the gradient that it reads", "[rms_norm]") {
  Backend& b = backend();
  for (const NormCase& c : kCases) {
    CAPTURE(c.m, c.d);
    const Inputs in(c);
    const Backward want =
        run_backward(b, c, in, true, b.real(), Write::Overwrite, Write::Overwrite);
    const Tensor x = make(b, {c.m, c.d}, b.act(), in.x), w = make(b, {c.d}, b.real(), in.w);
    const Tensor y = b.empty({c.m, c.d}, b.act()), inv_rms = b.empty({c.m}, b.real());
    const Tensor dy = make(b, {c.m, c.d}, b.act(), in.dy), dw = b.empty({c.d}, b.real());
    b.rms_norm(y, inv_rms, x, w, kEps);
    b.rms_norm_backward(dy, dw, dy, x, inv_rms, w, Write::Overwrite, Write::Overwrite);
    CHECK(values_of(b, dy) == want.dx);
    CHECK(values_of(b, dw) == want.dw);
  }
}

TEST_CASE("rms_norm of unaligned rows", "[rms_norm]") {
  const NormCase c{11, 576};
  const Inputs in(c);
  Backend& b = backend();
  const Forward want = run(oracle_f64(), c, in);
  const Backward want_backward =
      run_backward(oracle_f64(), c, in, true, DType::F64, Write::Overwrite, Write::Overwrite);
  const Tensor x = unaligned(b, c, in.x), dy = unaligned(b, c, in.dy);
  const Tensor w = make(b, {c.d}, b.real(), in.w), dw = b.empty({c.d}, b.real());
  const Guarded y(b, {c.m, c.d}, b.act()), dx(b, {c.m, c.d}, b.act());
  const Tensor inv_rms = b.empty({c.m}, b.real());
  b.rms_norm(y.tensor(), inv_rms, x, w, kEps);
  b.rms_norm_backward(dx.tensor(), dw, dy, x, inv_rms, w, Write::Overwrite, Write::Overwrite);
  CHECK(y.untouched());
  CHECK(dx.untouched());
  CHECK(relative_error(values_of(b, y.tensor()), want.y) <= act_epsilon() + 8 * real_epsilon());
  CHECK(relative_error(values_of(b, dx.tensor()), want_backward.dx) <=
        act_epsilon() + 16 * real_epsilon());
  CHECK(relative_error(values_of(b, dw), want_backward.dw) <= 32 * real_epsilon());
}

TEST_CASE("rms_norm backward without the weight's gradient", "[rms_norm]") {
  const NormCase c{33, 64};
  const Inputs in(c);
  const DType real = backend().real();
  const Backward with =
      run_backward(backend(), c, in, true, real, Write::Overwrite, Write::Overwrite);
  const Backward without =
      run_backward(backend(), c, in, false, real, Write::Overwrite, Write::Overwrite);
  CHECK(with.dx == without.dx);
  CHECK(relative_error(without.dw, in.dw) <= real_epsilon());
}

TEST_CASE("rms_norm backward with only the weight's gradient", "[rms_norm]") {
  for (const NormCase& c : kCases) {
    const Inputs in(c);
    Backend& b = backend();
    const Guarded dw(b, {c.d}, b.real());
    const Tensor x = make(b, {c.m, c.d}, b.act(), in.x), w = make(b, {c.d}, b.real(), in.w);
    const Tensor y = b.empty({c.m, c.d}, b.act()), inv_rms = b.empty({c.m}, b.real());
    b.rms_norm(y, inv_rms, x, w, kEps);
    b.rms_norm_backward(Tensor(), dw.tensor(), make(b, {c.m, c.d}, b.act(), in.dy), x, inv_rms, w,
                        Write::Overwrite, Write::Overwrite);
    CHECK(dw.untouched());
    const Backward both =
        run_backward(b, c, in, true, b.real(), Write::Overwrite, Write::Overwrite);
    CHECK(values_of(b, dw.tensor()) == both.dw);
  }
}

TEST_CASE("rms_norm keeps a NaN in its row, and a zero row finite", "[rms_norm]") {
  const NormCase c{3, 40};
  Inputs in(c);
  in.x[41] = std::numeric_limits<double>::quiet_NaN();
  std::fill(in.x.begin() + 80, in.x.end(), 0.0);
  const Forward got = run(backend(), c, in);
  for (size_t i = 0; i < got.y.size(); ++i) {
    CAPTURE(i);
    CHECK(std::isnan(got.y[i]) == (i / 40 == 1));
    if (i / 40 == 2) CHECK(got.y[i] == 0.0);
  }
  CHECK(got.inv_rms[2] == Approx(1 / std::sqrt(kEps)).epsilon(1e-6));
}

}  // namespace bbb::tests
