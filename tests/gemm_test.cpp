// gemm_nt, gemm_nn, gemm_tn against the F64 oracle, over shapes with and without ragged edges.
#include <catch2/catch.hpp>
#include <functional>
#include <iostream>
#include <limits>
#include <set>

#ifdef BBB_HAS_CUDA
#include "cuda/cuda_backend.h"
#include "cuda/gemm.h"
#endif
#include "tests/op_test.h"

namespace bbb::tests {
namespace {

using engine::Write;

struct GemmCase {
  int64_t m, n, k;
};

// One row, a few rows, all sizes odd, multiples of 8 that fill no tile, and many tiles.
// A GPU has its own kernel for one row; its last cases are more rows of w than warps at once, steps
// of several rounds with a rest, and a row that is too long for it.
const GemmCase kCases[] = {{1, 33, 31},    {1, 64, 96},   {4, 64, 96},     {31, 33, 65},
                           {33, 31, 7},    {257, 72, 40}, {128, 576, 192}, {8, 192, 1536},
                           {1, 4300, 264}, {1, 40, 2056}, {1, 3, 33000}};

// The output's rounding, and the accumulator's error: a few epsilons for random sums in FP32, but
// tensor cores truncate once every 16 products.
double tolerance(DType out, int64_t length) {
  return epsilon_of(out) + epsilon_of(DType::F32) * (8.0 + static_cast<double>(length) / 16.0);
}

struct Inputs {
  explicit Inputs(const GemmCase& c, uint64_t seed = 7) {
    engine::Rng rng(seed);
    x = activations(rng, c.m * c.k);
    w = activations(rng, c.n * c.k, 0.5);
    dy = activations(rng, c.m * c.n);
    addend = activations(rng, c.m * c.n, 3.0);
    dx = activations(rng, c.m * c.k, 3.0);
    dw = activations(rng, c.n * c.k, 3.0);
  }
  std::vector<double> x, w, dy, addend, dx, dw;
};

Tensor alpha_of(Backend& b, bool given) {
  return given ? make(b, {1}, b.real(), {0.25}) : Tensor();
}

std::vector<double> run_nt(Backend& b, const GemmCase& c, const Inputs& in, DType out,
                           bool with_alpha, bool with_addend, bool bf16_weight = false) {
  const Guarded y(b, {c.m, c.n}, out);
  b.gemm_nt(y.tensor(), make(b, {c.m, c.k}, b.act(), in.x),
            make(b, {c.n, c.k}, bf16_weight ? DType::BF16 : b.act(), in.w), alpha_of(b, with_alpha),
            with_addend ? make(b, {c.m, c.n}, b.act(), in.addend) : Tensor());
  CHECK(y.untouched());
  return values_of(b, y.tensor());
}

std::vector<double> run_nn(Backend& b, const GemmCase& c, const Inputs& in, DType out,
                           bool with_alpha, Write mode) {
  const Guarded dx(b, {c.m, c.k}, out);
  b.copy(dx.tensor(), make(b, {c.m, c.k}, out, in.dx));
  b.gemm_nn(dx.tensor(), make(b, {c.m, c.n}, b.act(), in.dy), make(b, {c.n, c.k}, b.act(), in.w),
            alpha_of(b, with_alpha), mode);
  CHECK(dx.untouched());
  return values_of(b, dx.tensor());
}

std::vector<double> run_tn(Backend& b, const GemmCase& c, const Inputs& in, DType out, Write mode) {
  const Guarded dw(b, {c.n, c.k}, out);
  b.copy(dw.tensor(), make(b, {c.n, c.k}, out, in.dw));
  b.gemm_tn(dw.tensor(), make(b, {c.m, c.n}, b.act(), in.dy), make(b, {c.m, c.k}, b.act(), in.x),
            mode);
  CHECK(dw.untouched());
  return values_of(b, dw.tensor());
}

}  // namespace

TEST_CASE("gemm_nt is alpha x w^T + addend", "[gemm]") {
  for (const GemmCase& c : kCases) {
    const Inputs in(c);
    for (const bool wide_out : {false, true})
      for (const bool with_alpha : {false, true})
        for (const bool with_addend : {false, true}) {
          CAPTURE(c.m, c.n, c.k, wide_out, with_alpha, with_addend);
          const DType out = wide_out ? backend().real() : backend().act();
          const auto got = run_nt(backend(), c, in, out, with_alpha, with_addend);
          const auto want = run_nt(oracle_f64(), c, in, DType::F64, with_alpha, with_addend);
          CHECK(relative_error(got, want) <= tolerance(out, c.k));
        }
  }
}

TEST_CASE("gemm_nt takes a bf16 weight on every backend", "[gemm]") {
  for (const GemmCase& c : kCases) {
    Inputs in(c);
    in.w = round_bf16(in.w);
    for (const bool with_alpha : {false, true})
      for (const bool with_addend : {false, true}) {
        CAPTURE(c.m, c.n, c.k, with_alpha, with_addend);
        const auto want = run_nt(oracle_f64(), c, in, DType::F64, with_alpha, with_addend);
        const auto got = run_nt(backend(), c, in, backend().act(), with_alpha, with_addend, true);
        CHECK(relative_error(got, want) <= tolerance(backend().act(), c.k));
        const auto f64 = run_nt(oracle_f64(), c, in, DType::F64, with_alpha, with_addend, true);
        // Each of the two sums rounds K partial sums, the product with alpha and the addition of
        // the addend, by at most half an epsilon of values that in RMS are no larger than y.
        CHECK(relative_error(f64, want) <= (static_cast<double>(c.k) + 2) * epsilon_of(DType::F64));
      }
  }
}

TEST_CASE("gemm_nn is alpha dy w, written or added", "[gemm]") {
  for (const GemmCase& c : kCases) {
    const Inputs in(c);
    for (const bool with_alpha : {false, true})
      for (const Write mode : {Write::Overwrite, Write::Add})
        for (const bool wide_out : {false, true}) {
          CAPTURE(c.m, c.n, c.k, wide_out, with_alpha, mode == Write::Add);
          const DType out = wide_out ? backend().real() : backend().act();
          const auto got = run_nn(backend(), c, in, out, with_alpha, mode);
          const auto want = run_nn(oracle_f64(), c, in, DType::F64, with_alpha, mode);
          CHECK(relative_error(got, want) <= tolerance(out, c.n));
        }
  }
}

TEST_CASE("gemm_tn is dy^T x, written or added", "[gemm]") {
  for (const GemmCase& c : kCases) {
    const Inputs in(c);
    for (const Write mode : {Write::Overwrite, Write::Add})
      for (const DType out : gradient_dtypes()) {
        if (mode == Write::Add && out != backend().real()) continue;
        CAPTURE(c.m, c.n, c.k, mode == Write::Add, out == backend().real());
        const auto got = run_tn(backend(), c, in, out, mode);
        const auto want = run_tn(oracle_f64(), c, in, DType::F64, mode);
        CHECK(relative_error(got, want) <= tolerance(out, c.m));
      }
  }
}

TEST_CASE("a product that overwrites does not read the old output", "[gemm]") {
  const GemmCase c{33, 64, 96};
  Inputs in(c);
  const auto dx = run_nn(backend(), c, in, backend().act(), true, Write::Overwrite);
  std::vector<std::vector<double>> dw;
  for (const DType out : gradient_dtypes())
    dw.push_back(run_tn(backend(), c, in, out, Write::Overwrite));
  for (auto* old : {&in.dx, &in.dw})
    std::fill(old->begin(), old->end(), std::numeric_limits<double>::quiet_NaN());
  CHECK(run_nn(backend(), c, in, backend().act(), true, Write::Overwrite) == dx);
  for (size_t i = 0; i < dw.size(); ++i)
    CHECK(run_tn(backend(), c, in, gradient_dtypes()[i], Write::Overwrite) == dw[i]);
}

TEST_CASE("a NaN or Inf reaches its own row of the product and no other", "[gemm]") {
  const GemmCase c{5, 40, 64};
  Inputs in(c);
  in.x[static_cast<size_t>(1 * c.k + 3)] = std::numeric_limits<double>::quiet_NaN();
  in.x[static_cast<size_t>(3 * c.k)] = std::numeric_limits<double>::infinity();
  const auto y = run_nt(backend(), c, in, backend().act(), false, false);
  for (int64_t i = 0; i < c.m * c.n; ++i) {
    const double v = y[static_cast<size_t>(i)];
    const int64_t row = i / c.n;
    CAPTURE(i, v);
    CHECK(std::isnan(v) == (row == 1));
    CHECK(std::isinf(v) == (row == 3));
  }
}

TEST_CASE("products on rows inside a larger tensor, at any alignment", "[gemm]") {
  Backend& b = backend();
  const GemmCase c{3, 9, 5};
  const Inputs in(c);
  std::vector<double> shifted = in.x;
  shifted.insert(shifted.begin(), 5, 1.0);
  const Tensor x = make(b, {c.m + 1, c.k}, b.act(), shifted).rows(1, c.m);
  const Tensor w = make(b, {c.n, c.k}, b.act(), in.w);
  const Tensor y = b.empty({c.m, c.n}, b.act());
  b.gemm_nt(y, x, w, Tensor(), Tensor());
  const auto want = run_nt(oracle_f64(), c, in, DType::F64, false, false);
  CHECK(relative_error(values_of(b, y), want) <= tolerance(b.act(), c.k));
}

TEST_CASE("the same product gives the same bytes", "[gemm]") {
  const GemmCase c{64, 96, 512};
  const Inputs in(c);
  for (const DType out : gradient_dtypes()) {
    const auto once = run_tn(backend(), c, in, out, Write::Overwrite);
    for (int i = 0; i < 3; ++i) CHECK(run_tn(backend(), c, in, out, Write::Overwrite) == once);
  }
}

#ifdef BBB_HAS_CUDA
namespace {

constexpr size_t kSuggested = 8;  // the library suggests at most this many

// Runs `product` under the algorithms that tuning may choose for it: those that the library
// suggests, and every second one of the others. Returns how many of the others ran.
int64_t under_many_algorithms(const cuda::GemmShape& shape, const std::function<void()>& product) {
  const auto pool =
      std::make_shared<engine::MemoryPool>(cuda::device_memory(), engine::Reclaim::OnPressure);
  const cuda::StreamHandle stream = cuda::make_stream();
  const std::vector<std::string> all = cuda::GemmPlanner(stream.get(), pool).candidates(shape);
  int64_t explored = 0;
  for (size_t i = 0; i < all.size(); i += i < kSuggested ? 1 : 2) {
    const std::string& algorithm = all[i];
    CAPTURE(cuda::to_string(shape), algorithm);
    engine::GemmTuning tuning;
    tuning.known.made_by = backend().gemm_library();
    tuning.known.algorithms[cuda::to_string(shape)] = algorithm;
    tuning.where = "the test";
    tuning.least_flops = 0;
    tuning.memory_bytes = 64 << 20;
    tuning.keep = [](const engine::GemmChoices&) { FAIL("another product ran"); };
    const engine::GemmTuningScope scope(backend(), std::move(tuning));
    product();
    explored += i >= kSuggested ? 1 : 0;
  }
  return explored;
}

cuda::GemmShape shape_of(cublasOperation_t op_a, cublasOperation_t op_b, int64_t m, int64_t n,
                         int64_t k, DType out, bool with_alpha, bool accumulate) {
  return {op_a,       op_b,       m,  n,  k,  out == DType::BF16 ? CUDA_R_16BF : CUDA_R_32F,
          with_alpha, accumulate, 16, 16, 16, 16};
}

bool on_hopper() {
  int major = 0;
  if (on_cuda()) BBB_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
  return major == 9;
}

}  // namespace

TEST_CASE("on Hopper, there are more candidates than the library suggests", "[gemm]") {
  if (!on_hopper()) {
    std::cout << "SKIPPED: no Hopper GPU\n";
    return;
  }
  const auto pool =
      std::make_shared<engine::MemoryPool>(cuda::device_memory(), engine::Reclaim::OnPressure);
  const cuda::StreamHandle stream = cuda::make_stream();
  const cuda::GemmPlanner planner(stream.get(), pool);
  cuda::GemmShape shape =
      shape_of(CUBLAS_OP_T, CUBLAS_OP_N, 4096, 16384, 4096, DType::BF16, true, false);
  const std::vector<std::string> all = planner.candidates(shape);
  CHECK(all.size() > 2 * kSuggested);
  CHECK(std::set<std::string>(all.begin(), all.end()).size() > 2 * kSuggested);
  shape.align_b = 8;  // such operands get only the library's suggestions
  CHECK(planner.candidates(shape).size() <= kSuggested);
}

TEST_CASE("every algorithm of a product gives the right result", "[gemm]") {
  if (!on_cuda()) {
    std::cout << "SKIPPED: this device has one algorithm a product\n";
    return;
  }
  // A few rows, ragged tiles, and sums long enough to be split.
  const GemmCase cases[] = {{8, 192, 1536}, {257, 72, 40}, {2048, 96, 192}, {128, 576, 4096}};
  int64_t explored = 0, products = 0;
  for (const GemmCase& c : cases) {
    const Inputs in(c);
    for (const bool with_alpha : {false, true})
      for (const bool added : {false, true}) {
        CAPTURE(c.m, c.n, c.k, with_alpha, added);
        const Write mode = added ? Write::Add : Write::Overwrite;
        const auto y = run_nt(oracle_f64(), c, in, DType::F64, with_alpha, added);
        const auto dx = run_nn(oracle_f64(), c, in, DType::F64, with_alpha, mode);
        for (const DType out : {DType::BF16, DType::F32}) {
          explored += under_many_algorithms(
              shape_of(CUBLAS_OP_T, CUBLAS_OP_N, c.n, c.m, c.k, out, with_alpha, added), [&] {
                const auto got = run_nt(backend(), c, in, out, with_alpha, added);
                CHECK(relative_error(got, y) <= tolerance(out, c.k));
              });
          explored += under_many_algorithms(
              shape_of(CUBLAS_OP_N, CUBLAS_OP_N, c.k, c.m, c.n, out, with_alpha, added), [&] {
                const auto got = run_nn(backend(), c, in, out, with_alpha, mode);
                CHECK(relative_error(got, dx) <= tolerance(out, c.n));
              });
          products += 2;
        }
        if (with_alpha) continue;
        const auto dw = run_tn(oracle_f64(), c, in, DType::F64, mode);
        for (const DType out : {DType::BF16, DType::F32}) {
          if (added && out == DType::BF16) continue;
          explored += under_many_algorithms(
              shape_of(CUBLAS_OP_N, CUBLAS_OP_T, c.k, c.n, c.m, out, false, added), [&] {
                const auto got = run_tn(backend(), c, in, out, mode);
                CHECK(relative_error(got, dw) <= tolerance(out, c.m));
              });
          ++products;
        }
      }
  }
  CHECK((explored > products) == on_hopper());
}
#endif

}  // namespace bbb::tests
