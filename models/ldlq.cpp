#include "models/ldlq.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "quant/grid.h"

namespace bbb::models {

namespace {

constexpr int64_t kPanel = 64;  // columns of L that are finished together
constexpr int64_t kTile = 64;   // rows and columns of one task of the factorization
constexpr int64_t kRows = 64;   // rows of weights of one task of the rounding

// Two vectors of 32 bytes: the columns of a tile, whose sums stay in registers.
template <typename Real>
struct Lanes {
  static constexpr int64_t kCount = 32 / static_cast<int64_t>(sizeof(Real)), kWide = 2 * kCount;
  typedef Real Vector __attribute__((vector_size(32)));
};

// add_product of kHigh rows and Lanes::kWide columns.
template <int64_t kHigh, typename Real>
void add_tile(Real* c, int64_t ldc, const Real* a, int64_t lda, const Real* b, int64_t ldb,
              int64_t k, Real factor) {
  constexpr int64_t kCount = Lanes<Real>::kCount;
  typename Lanes<Real>::Vector low[kHigh] = {}, high[kHigh] = {}, left, right;
  for (int64_t p = 0; p < k; ++p) {
    std::memcpy(&left, b + p * ldb, sizeof left);
    std::memcpy(&right, b + p * ldb + kCount, sizeof right);
#pragma GCC unroll 8
    for (int64_t y = 0; y < kHigh; ++y) {
      low[y] += a[y * lda + p] * left;
      high[y] += a[y * lda + p] * right;
    }
  }
#pragma GCC unroll 8
  for (int64_t y = 0; y < kHigh; ++y)
    for (int64_t l = 0; l < kCount; ++l) {
      c[y * ldc + l] += factor * low[y][l];
      c[y * ldc + kCount + l] += factor * high[y][l];
    }
}

// c (m, n) += factor a (m, k) b (k, n), rows `ldc`, `lda` and `ldb` apart. The terms of an element
// are added in order of k.
template <typename Real>
void add_product(Real* c, int64_t ldc, const Real* a, int64_t lda, const Real* b, int64_t ldb,
                 int64_t m, int64_t n, int64_t k, Real factor) {
  constexpr int64_t kHigh = 4, kWide = Lanes<Real>::kWide;
  const int64_t wide = n / kWide * kWide;
  for (int64_t j = 0; j < wide; j += kWide) {
    int64_t i = 0;
    for (; i + kHigh <= m; i += kHigh)
      add_tile<kHigh>(c + i * ldc + j, ldc, a + i * lda, lda, b + j, ldb, k, factor);
    for (; i < m; ++i) add_tile<1>(c + i * ldc + j, ldc, a + i * lda, lda, b + j, ldb, k, factor);
  }
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = wide; j < n; ++j) {
      Real sum = 0;
      for (int64_t p = 0; p < k; ++p) sum += a[i * lda + p] * b[p * ldb + j];
      c[i * ldc + j] += factor * sum;
    }
}

// The Cholesky factor of a (k, k) in its lower triangle, a panel of columns at a time:
//   diagonal block | rows below it | a[below, below] -= panel panel^T
void cholesky(std::vector<double>& a, int64_t k, engine::ThreadPool& pool) {
  const auto at = [&](int64_t row, int64_t column) { return a.data() + row * k + column; };
  std::vector<double> transposed(static_cast<size_t>(kPanel * k));  // the panel's columns as rows
  for (int64_t begin = 0; begin < k; begin += kPanel) {
    const int64_t end = std::min(begin + kPanel, k), width = end - begin;
    // Row i of the panel, from the rows above it within [begin, end).
    const auto solve = [&](int64_t i) {
      for (int64_t j = begin; j < std::min(i + 1, end); ++j) {
        double sum = *at(i, j);
        for (int64_t p = begin; p < j; ++p) sum = std::fma(-*at(i, p), *at(j, p), sum);
        *at(i, j) = i == j ? std::sqrt(sum) : sum / *at(j, j);
      }
    };
    for (int64_t i = begin; i < end; ++i) solve(i);
    const int64_t below = k - end, tiles = (below + kTile - 1) / kTile;
    pool.parallel_for(below, kTile, [&](int64_t first, int64_t last) {
      for (int64_t i = end + first; i < end + last; ++i) {
        solve(i);
        for (int64_t p = 0; p < width; ++p) transposed[p * k + i] = *at(i, begin + p);
      }
    });
    pool.parallel_for(tiles * (tiles + 1) / 2, 1, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        auto y = static_cast<int64_t>((std::sqrt(8.0 * static_cast<double>(t) + 1) - 1) / 2);
        while (y * (y + 1) / 2 > t) --y;
        while ((y + 1) * (y + 2) / 2 <= t) ++y;
        const int64_t row = end + y * kTile, column = end + (t - y * (y + 1) / 2) * kTile;
        add_product(at(row, column), k, at(row, begin), k, transposed.data() + column, k,
                    std::min(kTile, k - row), std::min(kTile, k - column), width, -1.0);
      }
    });
  }
}

}  // namespace

HessianFactor factorize_hessian(const std::vector<float>& hessian, int64_t k, double damping,
                                engine::ThreadPool& pool, const std::string& where) {
  BBB_ASSERT(static_cast<int64_t>(hessian.size()) == k * k);
  HessianFactor factor;
  const auto diagonal = [&](int64_t i) { return hessian[static_cast<size_t>(i * k + i)]; };
  double mean = 0;
  for (int64_t i = 0; i < k; ++i) mean += static_cast<double>(diagonal(i)) / static_cast<double>(k);
  BBB_CHECK(std::isfinite(mean), where, ": its calibration inputs are not finite");
  const double damp = mean > 0 ? damping * mean : 1;
  factor.order.resize(static_cast<size_t>(k));
  std::iota(factor.order.begin(), factor.order.end(), 0);
  std::stable_sort(factor.order.begin(), factor.order.end(),
                   [&](int32_t a, int32_t b) { return diagonal(a) < diagonal(b); });

  std::vector<double> a(static_cast<size_t>(k * k));
  pool.parallel_for(k, kTile, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t j = 0; j <= i; ++j)
        a[static_cast<size_t>(i * k + j)] =
            hessian[static_cast<size_t>(factor.order[static_cast<size_t>(i)] * k +
                                        factor.order[static_cast<size_t>(j)])] +
            (i == j ? damp : 0.0);
  });
  cholesky(a, k, pool);
  for (int64_t i = 0; i < k; ++i) {
    const double root = a[static_cast<size_t>(i * k + i)];
    BBB_CHECK(root > 0, where, ": the Hessian of its inputs is not positive definite");
    factor.d.push_back(root * root);
  }
  factor.unit.resize(a.size());
  pool.parallel_for(k, kTile, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t j = 0; j <= i; ++j)
        factor.unit[static_cast<size_t>(i * k + j)] = static_cast<float>(
            a[static_cast<size_t>(i * k + j)] / a[static_cast<size_t>(j * k + j)]);
  });
  return factor;
}

double round_with_feedback(LinearResult& start, const HessianFactor& factor,
                           engine::ThreadPool& pool) {
  const quant::LinearFormat& format = start.format;
  const int64_t n = format.n, k = format.stored_k(), groups = format.groups();
  const quant::WeightGrid grid{
      .bits = format.code_bits(), .group = format.weight.group, .levels = format.weight.levels};
  BBB_ASSERT(static_cast<int64_t>(factor.order.size()) == k);
  const LinearGrid nearest = nearest_grid(start);
  const float s = nearest.master_scale;
  std::vector<uint8_t> codes(static_cast<size_t>(n * k));
  std::vector<double> errors(static_cast<size_t>((n + kRows - 1) / kRows));
  pool.parallel_for(n, kRows, [&](int64_t begin, int64_t end) {
    // Errors of the rows so far, and the feedback to the panel's columns; columns are those of L.
    const int64_t rows = end - begin;
    std::vector<float> error(static_cast<size_t>(rows * k)),
        feedback(static_cast<size_t>(rows * kPanel));
    double& sum = errors[static_cast<size_t>(begin / kRows)];
    for (int64_t last = k; last > 0;) {
      const int64_t first = (last - 1) / kPanel * kPanel, width = last - first;
      std::fill(feedback.begin(), feedback.end(), 0.0f);
      add_product(feedback.data(), kPanel, error.data() + last, k,
                  factor.unit.data() + last * k + first, k, rows, width, k - last, 1.0f);
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t c = last - 1; c >= first; --c) {
          const int64_t position = factor.order[static_cast<size_t>(c)],
                        group = (begin + row) * groups + position / grid.group,
                        at = (begin + row) * k + position;
          float* const fed = feedback.data() + row * kPanel;
          const float step = quant::step_of(nearest.e[static_cast<size_t>(group)], s);
          const float zero = quant::zero_point<float>(nearest.zeros[static_cast<size_t>(group)],
                                                      grid.bits, grid.levels);
          const float w = start.master[static_cast<size_t>(at)], target = w + fed[c - first];
          const float code = quant::code_of(target, step, zero, grid.bits, grid.levels);
          const float rounded = (code - zero) * step;
          codes[static_cast<size_t>(at)] = static_cast<uint8_t>(code);
          const float off = w - rounded;
          error[static_cast<size_t>(row * k + c)] = off;
          const float* const unit = factor.unit.data() + c * k + first;
          for (int64_t j = 0; j < c - first; ++j) fed[j] = std::fma(off, unit[j], fed[j]);
          const double moved = double{target} - rounded;
          sum += factor.d[static_cast<size_t>(c)] * moved * moved;
        }
      last = first;
    }
  });
  start.store(codes, nearest.e, nearest.zeros, s);
  return std::accumulate(errors.begin(), errors.end(), 0.0);
}

}  // namespace bbb::models
