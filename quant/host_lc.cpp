#include "quant/host_lc.h"

#include <algorithm>
#include <vector>

namespace bbb::quant::host {

// Both unscaled. Of `block` consecutive values, and of every column of a matrix (rows, columns).
template <typename Real>
static void hadamard(Real* x, int block) {
  for (int half = 1; half < block; half *= 2)
    for (Real* low = x; low < x + block; low += 2 * half)
      for (int i = 0; i < half; ++i) {
        const Real a = low[i], b = low[i + half];
        low[i] = a + b;
        low[i + half] = a - b;
      }
}
template <typename Real>
static void hadamard_columns(Real* x, int rows, int64_t columns) {
  for (int half = 1; half < rows; half *= 2)
    for (int row = 0; row < rows; ++row) {
      if (row & half) continue;
      Real *low = x + row * columns, *high = low + half * columns;
      for (int64_t i = 0; i < columns; ++i) {
        const Real a = low[i], b = high[i];
        low[i] = a + b;
        high[i] = a - b;
      }
    }
}

template <typename Real>
static void scale(Real* x, int64_t count, Real factor) {
  for (int64_t i = 0; i < count; ++i) x[i] *= factor;
}

template <typename Real>
void lc_hadamard_rows(Real* x, int64_t rows, int64_t features) {
  const int block = lc_block(features);
  for (int64_t at = 0; at < rows * features; at += block) hadamard(x + at, block);
  scale(x, rows * features, lc_norm<Real>(block));
}

template <typename Real>
void lc_hadamard_columns(Real* x, int64_t n, int64_t k) {
  const int block = lc_block(n);
  for (int64_t row = 0; row < n; row += block) hadamard_columns(x + row * k, block, k);
  scale(x, n * k, lc_norm<Real>(block));
}

// Both transforms of a row block (rows, K), unscaled: along K, then along the rows.
template <typename Real>
static void transform_block(Real* x, int rows, int64_t k) {
  const int block = lc_block(k);
  for (int64_t at = 0; at < rows * k; at += block) hadamard(x + at, block);
  hadamard_columns(x, rows, k);
}

template <typename Real>
static Real block_norm(int64_t n, int64_t k) {
  return lc_norm<Real>(lc_block(n) * lc_block(k));
}

template <typename Real>
void lc_weight(Real* w, const LcMatrix<Real>& from, Rows blocks) {
  const int rows = lc_block(from.n);
  const int64_t k = from.k;
  const LcMap<Real> map(from.map);
  const Real norm = block_norm<Real>(from.n, k);
  std::vector<Real> u(from.u, from.u + k);
  for (Real& value : u) value = lc_scale(value, from.rule.rounding);
  for (int64_t first = blocks.begin * rows; first < blocks.end * rows; first += rows) {
    Real* const out = w + first * k;
    for (int64_t i = 0; i < rows * k; i += kLcVector) {
      Real x[kLcVector];
      for (int j = 0; j < kLcVector; ++j)
        x[j] = from.codes != nullptr
                   ? Real(from.codes[first * k + i + j])
                   : lc_code(lc_position(from.latent[first * k + i + j], from.rule), from.rule);
      map.apply(x);
      std::copy_n(x, kLcVector, out + i);
    }
    transform_block(out, rows, k);
    for (int row = 0; row < rows; ++row) {
      const Real v = lc_scale(from.v[first + row], from.rule.rounding);
      for (int64_t i = 0; i < k; ++i) {
        Real& value = out[row * k + i];
        value = value * norm * u[static_cast<size_t>(i)] * v;
      }
    }
  }
}

template <typename Real>
void lc_weight_backward(const LcGradients<Real>& out, const Real* dw, const Real* w,
                        const LcMatrix<Real>& from, Rows blocks) {
  const int rows = lc_block(from.n);
  const int64_t k = from.k;
  const LcMap<Real> map(from.map);
  const Real norm = block_norm<Real>(from.n, k);
  std::vector<Real> u(from.u, from.u + k), gradient(static_cast<size_t>(rows * k));
  for (Real& value : u) value = lc_scale(value, from.rule.rounding);
  for (int64_t block = blocks.begin; block < blocks.end; ++block) {
    const int64_t first = block * rows;
    for (int row = 0; row < rows; ++row) {
      const Real v = lc_scale(from.v[first + row], from.rule.rounding);
      const Real *d = dw + (first + row) * k, *value = w + (first + row) * k;
      Real dv = 0;
      for (int64_t i = 0; i < k; ++i) {
        dv += d[i] * value[i];
        gradient[static_cast<size_t>(row * k + i)] = d[i] * u[static_cast<size_t>(i)] * v * norm;
      }
      out.v[first + row] = dv / v;  // w is linear in v
    }
    transform_block(gradient.data(), rows, k);
    Real sums[kLcMapSize] = {};
    for (int64_t i = 0; i < rows * k; i += kLcVector) {
      Real d[kLcVector], a[kLcVector];
      for (int j = 0; j < kLcVector; ++j) {
        d[j] = gradient[static_cast<size_t>(i + j)];
        a[j] = lc_position(from.latent[first * k + i + j], from.rule);
      }
      if (out.map != nullptr)
        for (int row = 0; row < kLcVector; ++row) {
          Real* const sum = sums + row * (kLcVector + 1);
          for (int j = 0; j < kLcVector; ++j) sum[j] += d[row] * lc_code(a[j], from.rule);
          sum[kLcVector] += d[row];
        }
      map.transpose(d);
      for (int j = 0; j < kLcVector; ++j)
        out.latent[first * k + i + j] = Real(from.rule.spread) * lc_slope(a[j], from.rule) * d[j];
    }
    if (out.map != nullptr) std::copy_n(sums, kLcMapSize, out.map + block * kLcMapSize);
  }
}

template <typename Real>
void lc_operand(Real* out, Real* constant, const Real* x, const Real* u, const Real* map, Rows rows,
                int64_t k) {
  const LcMap<Real> affine(map);
  for (int64_t m = rows.begin; m < rows.end; ++m) {
    Real* const row = out + m * k;
    for (int64_t i = 0; i < k; ++i) row[i] = x[m * k + i] * u[i];
    lc_hadamard_rows(row, 1, k);
    Real sum = 0;
    for (int64_t i = 0; i < k; i += kLcVector) {
      Real vector[kLcVector];
      std::copy_n(row + i, kLcVector, vector);
      sum += affine.constant(vector);
      affine.transpose(vector);
      std::copy_n(vector, kLcVector, row + i);
    }
    constant[m] = sum;
  }
}

template <typename Real>
void lc_output(Real* y, const Real* product, const Real* constant, const Real* v,
               const Real* addend, Rows rows, int64_t n) {
  for (int64_t m = rows.begin; m < rows.end; ++m) {
    Real* const row = y + m * n;
    std::vector<Real> sums(product + m * n, product + (m + 1) * n);
    for (Real& sum : sums) sum += constant[m];
    lc_hadamard_rows(sums.data(), 1, n);
    for (int64_t i = 0; i < n; ++i) {
      const Real value = sums[static_cast<size_t>(i)] * v[i];
      row[i] = addend != nullptr ? value + addend[m * n + i] : value;
    }
  }
}

#define BBB_HOST_LC(Real)                                                                       \
  template void lc_hadamard_rows(Real*, int64_t, int64_t);                                      \
  template void lc_hadamard_columns(Real*, int64_t, int64_t);                                   \
  template void lc_weight(Real*, const LcMatrix<Real>&, Rows);                                  \
  template void lc_weight_backward(const LcGradients<Real>&, const Real*, const Real*,          \
                                   const LcMatrix<Real>&, Rows);                                \
  template void lc_operand(Real*, Real*, const Real*, const Real*, const Real*, Rows, int64_t); \
  template void lc_output(Real*, const Real*, const Real*, const Real*, const Real*, Rows, int64_t)
BBB_HOST_LC(float);
BBB_HOST_LC(double);
#undef BBB_HOST_LC

}  // namespace bbb::quant::host
