// The ops of LC (quant/lc.h) on host memory, for float and double: the loops of CpuBackend, and the
// reference for the CUDA kernels.
//
// w, dw, latent (N, K); u (K); v (N); map (4, 5). Pointers are to row 0.
#pragma once

#include "quant/host.h"
#include "quant/lc.h"

namespace bbb::quant::host {

// Rows of `features` values: H of every block, scaled.
template <typename Real>
void lc_hadamard_rows(Real* x, int64_t rows, int64_t features);
// The same along the columns of x (N, K).
template <typename Real>
void lc_hadamard_columns(Real* x, int64_t n, int64_t k);

// Where a matrix's weights come from.
template <typename Real>
struct LcMatrix {
  const Real* latent;    // or null,
  const uint8_t* codes;  // and the codes, one a byte
  const Real *u, *v, *map;
  int64_t n, k;
  LcRule rule;
};
// w of the row blocks [begin, end), lc_block(n) rows each; as all below.
template <typename Real>
void lc_weight(Real* w, const LcMatrix<Real>& from, Rows blocks);

// From dw, the gradient of w: latent (N, K), which may be dw; v (N); map (blocks, 20), to be added
// in order, or null. The gradient of u is a sum of w dw (Backend::input_scale_gradient).
template <typename Real>
struct LcGradients {
  Real *latent, *v, *map;
};
template <typename Real>
void lc_weight_backward(const LcGradients<Real>& out, const Real* dw, const Real* w,
                        const LcMatrix<Real>& from, Rows blocks);

// The operand of a packed product: x' = H_K(u o x); out = A^T of every vector of x'; constant[m] =
// c . (the sum of them). x, out (M, K); u is F16 already.
template <typename Real>
void lc_operand(Real* out, Real* constant, const Real* x, const Real* u, const Real* map, Rows rows,
                int64_t k);
// What follows the product: y = v o H_N(product + constant) (+ addend). (M, N); y may be product.
template <typename Real>
void lc_output(Real* y, const Real* product, const Real* constant, const Real* v,
               const Real* addend, Rows rows, int64_t n);

}  // namespace bbb::quant::host
