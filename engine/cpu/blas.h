// cblas with one name for float and double. Row-major: C (m, n) = alpha op(A) op(B) + beta C.
#pragma once

#include <cblas.h>

#include <cstdint>

namespace bbb::engine {

inline void blas_gemm(CBLAS_TRANSPOSE ta, CBLAS_TRANSPOSE tb, int64_t m, int64_t n, int64_t k,
                      float alpha, const float* a, int64_t lda, const float* b, int64_t ldb,
                      float beta, float* c, int64_t ldc) {
  cblas_sgemm(CblasRowMajor, ta, tb, static_cast<int>(m), static_cast<int>(n), static_cast<int>(k),
              alpha, a, static_cast<int>(lda), b, static_cast<int>(ldb), beta, c,
              static_cast<int>(ldc));
}

inline void blas_gemm(CBLAS_TRANSPOSE ta, CBLAS_TRANSPOSE tb, int64_t m, int64_t n, int64_t k,
                      double alpha, const double* a, int64_t lda, const double* b, int64_t ldb,
                      double beta, double* c, int64_t ldc) {
  cblas_dgemm(CblasRowMajor, ta, tb, static_cast<int>(m), static_cast<int>(n), static_cast<int>(k),
              alpha, a, static_cast<int>(lda), b, static_cast<int>(ldb), beta, c,
              static_cast<int>(ldc));
}

// y (m) = alpha A x + beta y, A (m, n).
inline void blas_gemv(int64_t m, int64_t n, float alpha, const float* a, const float* x, float beta,
                      float* y) {
  cblas_sgemv(CblasRowMajor, CblasNoTrans, static_cast<int>(m), static_cast<int>(n), alpha, a,
              static_cast<int>(n), x, 1, beta, y, 1);
}

inline void blas_gemv(int64_t m, int64_t n, double alpha, const double* a, const double* x,
                      double beta, double* y) {
  cblas_dgemv(CblasRowMajor, CblasNoTrans, static_cast<int>(m), static_cast<int>(n), alpha, a,
              static_cast<int>(n), x, 1, beta, y, 1);
}

}  // namespace bbb::engine
