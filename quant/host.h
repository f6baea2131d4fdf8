// The quantizer's ops on host memory, on rows [begin, end) of a matrix, for float and double: the
// loops of CpuBackend, and the reference for the CUDA kernels.
//
// w, wq, dw (N, K); e, z, sigma (N, K/G); codes (N, K), one a byte; clipped one bit an element, bit
// i % 8 of byte i / 8; pointers are to row 0.
#pragma once

#include <cstdint>

#include "quant/format.h"
#include "quant/grid.h"
#include "quant/spec.h"

namespace bbb::quant::host {

struct Rows {
  int64_t begin, end;
};

// The maximum group range of the rows; NaN if any element is NaN. max_or_nan joins the parts of a
// matrix; raw_scale and then master_scale_of give S of the whole.
template <typename Real>
Real group_range_max(const Real* w, Rows rows, int64_t k, int group);
// The largest of count values, at least 0; NaN if any is NaN.
template <typename Real>
Real largest(const Real* x, int64_t count);

template <typename Real>
void fake_quant(Real* wq, uint8_t* e, uint8_t* z, uint8_t* clipped, const Real* w, Rows rows,
                int64_t k, Real master_scale, WeightGrid spec, Rounding rounding);
// Moves weights to the middle of their bins, S e (q - z), and keeps the grid: quantized again, they
// give the same S, e, z and codes. Where the middles alone would narrow a group's range too far,
// the ends of the range stay in place and bound the other weights.
template <typename Real>
void snap(Real* w, Rows rows, int64_t k, Real master_scale, WeightGrid spec);
template <typename Real>
void quantize_codes(uint8_t* codes, const Real* w, const uint8_t* e, const uint8_t* z, Rows rows,
                    int64_t k, Real master_scale, WeightGrid spec);
template <typename Real>
void scale_codes(Real* wq, uint8_t* e, const uint8_t* codes, const uint8_t* z, const Real* sigma,
                 Rows rows, int64_t k, Real master_scale, WeightGrid spec);
// dsigma = or += sum over the group of dw (codes - z).
template <typename Real>
void scale_codes_backward(Real* dsigma, const Real* dw, const uint8_t* codes, const uint8_t* z,
                          Rows rows, int64_t k, WeightGrid spec, bool accumulate);

// wq = (q - z) e of the rows.
template <typename Real>
void unpack(Real* wq, const PackedView& w, Rows rows);
// y[m, n] = S * sum_k x[m, k] wq[n, k] (+ addend[m, n]) for output features n in `rows`.
// y, addend (M, N); x (M, K); addend may be null.
template <typename Real>
void packed_gemv(Real* y, const Real* x, const PackedView& w, const Real* addend, Rows rows,
                 int64_t m_total);

}  // namespace bbb::quant::host
