// input_scale_gradient against the F64 oracle, and against the gradient of rms_norm_backward.
#include <catch2/catch.hpp>
#include <limits>

#include "tests/op_test.h"

namespace bbb::tests {
namespace {

using engine::Write;

struct ScaleCase {
  int64_t n, k;
};

// One row and one column; ragged and narrow widths; several stripes; several chunks of rows.
const ScaleCase kCases[] = {{1, 1}, {3, 31}, {33, 100}, {576, 576}, {2000, 264}, {70, 2056}};

struct Inputs {
  explicit Inputs(const ScaleCase& c) {
    engine::Rng rng(5);
    ds = activations(rng, c.k);
    s = activations(rng, c.k);
    w = activations(rng, c.n * c.k);
    dw = activations(rng, c.n * c.k);
    if (c.k > 2) s[1] = 0;
  }
  std::vector<double> ds, s, w, dw;
};

std::vector<double> run(Backend& b, const ScaleCase& c, const Inputs& in, DType dw, bool with_alpha,
                        Write mode) {
  const Guarded ds(b, {c.k}, b.real());
  b.copy(ds.tensor(), make(b, {c.k}, b.real(), in.ds));
  b.input_scale_gradient(
      ds.tensor(), make(b, {c.k}, b.real(), in.s), make(b, {c.n, c.k}, b.act(), in.w),
      with_alpha ? make(b, {1}, b.real(), {0.25}) : Tensor(), make(b, {c.n, c.k}, dw, in.dw), mode);
  CHECK(ds.untouched());
  return values_of(b, ds.tensor());
}

}  // namespace

TEST_CASE("input_scale_gradient", "[input_scale_gradient]") {
  for (const ScaleCase& c : kCases) {
    const Inputs in(c);
    for (const DType dw : gradient_dtypes())
      for (const Write mode : {Write::Overwrite, Write::Add})
        for (const bool with_alpha : {false, true}) {
          CAPTURE(c.n, c.k, dw == backend().real(), mode == Write::Add, with_alpha);
          const std::vector<double> got = run(backend(), c, in, dw, with_alpha, mode);
          // A sum over the rows in another order.
          CHECK(relative_error(got, run(oracle_f64(), c, in, DType::F64, with_alpha, mode)) <=
                32 * real_epsilon());
          if (c.k > 2) CHECK(got[1] == (mode == Write::Add ? Approx(in.ds[1]) : Approx(0.0)));
          CHECK(got == run(backend(), c, in, dw, with_alpha, mode));
        }
  }
}

TEST_CASE("input_scale_gradient is the gradient of a norm's weight", "[input_scale_gradient]") {
  Backend& b = oracle_f64();
  const int64_t m = 20, n = 7, k = 11;
  engine::Rng rng(9);
  const auto random = [&](const Shape& shape) {
    return make(b, shape, b.act(), normal(rng, engine::numel_of(shape)));
  };
  const Tensor x = random({m, k}), w = random({n, k}), dy = random({m, n}), norm = random({k});
  const Tensor h = b.empty({m, k}, b.act()), inv_rms = b.empty({m}, b.real());
  b.rms_norm(h, inv_rms, x, norm, 1e-5);
  const Tensor dh = b.empty({m, k}, b.act()), want = b.empty({k}, b.real());
  b.gemm_nn(dh, dy, w, Tensor(), Write::Overwrite);
  b.rms_norm_backward(Tensor(), want, dh, x, inv_rms, norm, Write::Overwrite, Write::Overwrite);

  const Tensor dw = b.empty({n, k}, b.real()), got = b.empty({k}, b.real());
  b.gemm_tn(dw, dy, h, Write::Overwrite);
  b.input_scale_gradient(got, norm, w, Tensor(), dw, Write::Overwrite);
  CHECK(relative_error(values_of(b, got), values_of(b, want)) <= 1e-13);
}

TEST_CASE("input_scale_gradient keeps a NaN in its column", "[input_scale_gradient]") {
  const ScaleCase c{40, 40};
  Inputs in(c);
  in.dw[3 * 40 + 7] = std::numeric_limits<double>::quiet_NaN();
  const std::vector<double> got = run(backend(), c, in, backend().real(), true, Write::Overwrite);
  for (size_t i = 0; i < got.size(); ++i) CHECK(std::isnan(got[i]) == (i == 7));
}

}  // namespace bbb::tests
