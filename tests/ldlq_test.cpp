// LDLQ against GPTQ as its paper writes it, with the inverse of the Hessian, in double.
#include "models/ldlq.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <limits>
#include <numeric>

#include "engine/rng.h"
#include "quant/host.h"
#include "tests/formats.h"

namespace bbb::tests {
namespace {

using Matrix = std::vector<double>;  // (k, k), row-major

constexpr int kBits = 2;

// Weights of N rows, and the Hessian of correlated inputs with channels of unequal size.
struct Problem {
  int64_t n, k;
  models::LinearResult start;
  std::vector<float> hessian;

  Problem(uint64_t seed, int64_t rows, int64_t columns) : n(rows), k(columns) {
    engine::Rng rng(seed);
    start.format = plain_format(n, k, kBits);
    for (int64_t i = 0; i < n * k; ++i) start.master.push_back(static_cast<float>(rng.normal()));
    hessian.resize(static_cast<size_t>(k * k));
    std::vector<double> size, x(static_cast<size_t>(k));
    for (int64_t i = 0; i < k; ++i) size.push_back(std::exp(0.5 * rng.normal()));
    for (int64_t token = 0; token < 3 * k; ++token) {
      const double common = rng.normal();
      for (size_t i = 0; i < x.size(); ++i) x[i] = size[i] * (rng.normal() + 0.7 * common);
      for (size_t i = 0; i < x.size(); ++i)
        for (size_t j = 0; j < x.size(); ++j)
          hessian[i * x.size() + j] += static_cast<float>(x[i] * x[j]);
    }
  }

  double damp() const {
    double trace = 0;
    for (int64_t i = 0; i < k; ++i) trace += hessian[static_cast<size_t>(i * k + i)];
    return models::kHessianDamping * trace / static_cast<double>(k);
  }
  models::LinearResult rounded(engine::ThreadPool& pool, double* error = nullptr) const {
    models::LinearResult result = start;
    const double sum = models::round_with_feedback(
        result, models::factorize_hessian(hessian, k, models::kHessianDamping, pool, "w"), pool);
    if (error != nullptr) *error = sum;
    return result;
  }
  // Rounded to nearest: the same with nothing to feed back.
  models::LinearResult nearest(engine::ThreadPool& pool) const {
    models::LinearResult result = start;
    std::vector<float> identity(hessian.size());
    for (int64_t i = 0; i < k; ++i) identity[static_cast<size_t>(i * k + i)] = 1;
    models::round_with_feedback(result, models::factorize_hessian(identity, k, 0.01, pool, "w"),
                                pool);
    return result;
  }
  // tr (w^ - w) (H + damp I) (w^ - w)^T.
  double error_of(const models::LinearResult& result) const {
    const std::vector<float> levels = result.levels();
    const auto size = static_cast<size_t>(k);
    double sum = 0;
    for (size_t row = 0; row < static_cast<size_t>(n); ++row)
      for (size_t i = 0; i < size; ++i)
        for (size_t j = 0; j < size; ++j) {
          const auto off = [&](size_t c) {
            return double{levels[row * size + c]} - start.master[row * size + c];
          };
          sum += off(i) * (hessian[i * size + j] + (i == j ? damp() : 0)) * off(j);
        }
    return sum;
  }
};

Matrix inverse(Matrix a, size_t k) {
  Matrix b(k * k);
  for (size_t i = 0; i < k; ++i) b[i * k + i] = 1;
  for (size_t p = 0; p < k; ++p) {
    const double pivot = a[p * k + p];
    for (size_t j = 0; j < k; ++j) a[p * k + j] /= pivot, b[p * k + j] /= pivot;
    for (size_t i = 0; i < k; ++i) {
      const double factor = a[i * k + p];
      if (i == p || factor == 0) continue;
      for (size_t j = 0; j < k; ++j) {
        a[i * k + j] -= factor * a[p * k + j];
        b[i * k + j] -= factor * b[p * k + j];
      }
    }
  }
  return b;
}

// U upper triangular with U^T U = a.
Matrix upper_factor(const Matrix& a, size_t k) {
  Matrix u(k * k);
  for (size_t i = 0; i < k; ++i)
    for (size_t j = i; j < k; ++j) {
      double sum = a[i * k + j];
      for (size_t p = 0; p < i; ++p) sum -= u[p * k + i] * u[p * k + j];
      u[i * k + j] = i == j ? std::sqrt(sum) : sum / u[i * k + i];
    }
  return u;
}

// GPTQ's levels: columns in descending order of diag H, the grid of each group that of rounding to
// nearest; after each column every later one moves by -(w - w^) / U_ii U_ij.
std::vector<double> gptq_levels(const Problem& p) {
  const auto k = static_cast<size_t>(p.k);
  const int group = p.start.format.weight.group;
  std::vector<size_t> order(k);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return p.hessian[a * k + a] > p.hessian[b * k + b]; });
  Matrix h(k * k);
  for (size_t i = 0; i < k; ++i)
    for (size_t j = 0; j < k; ++j)
      h[i * k + j] = p.hessian[order[i] * k + order[j]] + (i == j ? p.damp() : 0);
  const Matrix u = upper_factor(inverse(h, k), k);
  const float s = quant::master_scale_of(quant::raw_scale(
      quant::host::group_range_max(p.start.master.data(), nullptr, {0, p.n}, p.k, group), kBits));
  std::vector<double> levels(p.start.master.size());
  for (size_t row = 0; row < static_cast<size_t>(p.n); ++row) {
    const float* w = p.start.master.data() + row * k;
    std::vector<double> moved(w, w + k);
    for (size_t i = 0; i < k; ++i) {
      const size_t at = order[i];
      quant::Range<float> range;
      for (int j = 0; j < group; ++j)
        range.include(w[at / static_cast<size_t>(group) * static_cast<size_t>(group) +
                        static_cast<size_t>(j)]);
      const quant::GroupParams grid = quant::group_params(range, s, kBits);
      const double step = double{quant::step_of(grid.e, s)};
      const double level = (quant::code_of(moved[at], step, grid.z, kBits) - grid.z) * step;
      levels[row * k + at] = level;
      const double off = (moved[at] - level) / u[i * k + i];
      for (size_t j = i + 1; j < k; ++j) moved[order[j]] -= off * u[i * k + j];
    }
  }
  return levels;
}

}  // namespace

TEST_CASE("ldlq: gives GPTQ's codes, and the error that it says", "[ldlq]") {
  engine::ThreadPool pool(2);
  // One panel of columns, a part of one, and several.
  for (const int64_t k : {64, 96, 160, 320}) {
    const Problem problem(static_cast<uint64_t>(k), 7, k);
    double error = 0;
    const models::LinearResult result = problem.rounded(pool, &error);
    const std::vector<float> levels = result.levels();
    const std::vector<double> expected = gptq_levels(problem);
    CHECK(std::equal(levels.begin(), levels.end(), expected.begin()));
    const double measured = problem.error_of(result),
                 nearest = problem.error_of(problem.nearest(pool));
    CAPTURE(k, error, measured, nearest);
    CHECK(error == Approx(measured).epsilon(1e-4));
    CHECK(measured < 0.75 * nearest);
  }
}

TEST_CASE("ldlq: the bytes do not depend on the number of threads", "[ldlq]") {
  const Problem problem(5, 150, 224);  // three tasks of rows
  engine::ThreadPool one(1), three(3);
  CHECK(problem.rounded(one).stored == problem.rounded(three).stored);
}

TEST_CASE("ldlq: a channel that is always 0 is rounded to nearest, and leaves the others alone",
          "[ldlq]") {
  Problem problem(9, 4, 96);
  const size_t dead = 40, k = 96;
  for (size_t i = 0; i < k; ++i) problem.hessian[dead * k + i] = problem.hessian[i * k + dead] = 0;
  engine::ThreadPool pool(1);
  const std::vector<float> levels = problem.rounded(pool).levels(),
                           nearest = problem.nearest(pool).levels();
  for (size_t row = 0; row < 4; ++row) CHECK(levels[row * k + dead] == nearest[row * k + dead]);
  CHECK(levels != nearest);
  // All inputs 0: nothing is fed back at all.
  std::fill(problem.hessian.begin(), problem.hessian.end(), 0.0f);
  CHECK(problem.rounded(pool).levels() == nearest);
}

TEST_CASE("ldlq: inputs that are not finite are an error that names the linear", "[ldlq]") {
  engine::ThreadPool pool(1);
  std::vector<float> hessian(32 * 32);
  for (size_t i = 0; i < 32; ++i) hessian[i * 33] = 1;
  for (const float bad :
       {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    for (const size_t at : {size_t{33}, size_t{64}}) {  // on the diagonal, and off it
      std::vector<float> damaged = hessian;
      damaged[at] = bad;
      CHECK_THROWS_WITH(models::factorize_hessian(damaged, 32, 0.01, pool, "o_proj"),
                        Catch::Matchers::Contains("o_proj"));
    }
  }
  CHECK_NOTHROW(models::factorize_hessian(hessian, 32, 0.01, pool, "o_proj"));
}

}  // namespace bbb::tests
