// The quantizer's ops on host memory, on rows [begin, end) of a matrix, for float and double: the
// loops of CpuBackend, and the reference for the CUDA kernels.
//
// w, wq, dw (N, K); e, z, sigma, ratios (N, K/G); codes (N, K), one a byte; clipped one bit an
// element, bit i % 8 of byte i / 8; pointers are to row 0. ratios: each group's index of
// range_ratio(); null: all ratios are 1. For a linear with a channel order K is K', its stored
// positions.
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
Real group_range_max(const Real* w, const uint8_t* ratios, Rows rows, int64_t k, int group,
                     Levels levels = Levels::MinMax);
// The largest of count values, at least 0; NaN if any is NaN.
template <typename Real>
Real largest(const Real* x, int64_t count);

// Levels are those of `rule`.
template <typename Real>
void fake_quant(Real* wq, uint8_t* e, uint8_t* z, uint8_t* clipped, const Real* w,
                const uint8_t* ratios, Rows rows, int64_t k, Real master_scale, WeightGrid spec,
                Rounding rounding, const WeightRule& rule = {});
// wq at the top `bits` bits of the 8-bit codes of w on the grid e, z (numerics.md section 4).
template <typename Real>
void nested_levels(Real* wq, const Real* w, const uint8_t* e, const uint8_t* z, Rows rows,
                   int64_t k, Real master_scale, int group, int bits, NestedDequant dequant);

// Moves weights to the middle of their bins, S e (q - z), and keeps the grid: quantized again, they
// give the same S, e, z and codes. A group's ratio becomes 1, since its middles span the scaled
// range. Where the middles alone would narrow a group's range too far, the ends of the range stay
// in place and bound the other weights, and the ratio stays.
template <typename Real>
void snap(Real* w, uint8_t* ratios, Rows rows, int64_t k, Real master_scale, WeightGrid spec);
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

// Learned grids (engine/backend.h); zeta, dzeta may be null.
template <typename Real>
void learned_quant(Real* wq, uint8_t* e, uint8_t* z, const Real* w, const Real* sigma,
                   const Real* zeta, Rows rows, int64_t k, Real master_scale, WeightGrid spec);
template <typename Real>
void learned_quant_backward(Real* dw, Real* dsigma, Real* dzeta, const Real* w, const uint8_t* e,
                            const uint8_t* z, Rows rows, int64_t k, Real master_scale,
                            WeightGrid spec);

// Learned ratios (engine/backend.h). First clamp_ratios, which returns the largest s_raw of the
// rows; NaN if any element is NaN.
template <typename Real>
Real clamp_ratios(Real* ratio, const Real* w, Rows rows, int64_t k, WeightGrid spec);
template <typename Real>
void ratio_quant(Real* wq, uint8_t* e, uint8_t* z, const Real* ratio, const Real* w, Rows rows,
                 int64_t k, Real master_scale, WeightGrid spec);
template <typename Real>
void ratio_quant_backward(Real* dw, Real* dratio, const Real* w, const uint8_t* e, const uint8_t* z,
                          Rows rows, int64_t k, Real master_scale, WeightGrid spec);

// The codes of a row, one a byte: of nested codes the bits that the load reads.
void row_codes(uint8_t* codes, const PackedView& w, int64_t row);
// wq = (q - z) e of row `row`, (K).
template <typename Real>
void unpack_row(Real* wq, const PackedView& w, int64_t row);
// The same of all `rows`.
template <typename Real>
void unpack(Real* wq, const PackedView& w, Rows rows);
// y[m, n] = S * sum_k x[m, k] wq[n, k] (+ addend[m, n]) for output features n in `rows`.
// y, addend (M, N); x (M, K); addend may be null.
template <typename Real>
void packed_gemv(Real* y, const Real* x, const PackedView& w, const Real* addend, Rows rows,
                 int64_t m_total);

// Quantized rows of an operand: x^ = (codes - zeros) scales. codes (M, K'), zeros and scales (M,
// K'/G); scales hold e S_row.
template <typename Real>
struct QuantizedRows {
  uint8_t* codes = nullptr;
  uint8_t* zeros = nullptr;
  Real* scales = nullptr;
};
// The same product from integers: y = S sum_g (e scale)[g] sum_k (q - z)[n, k] (codes - zeros)[m,
// k]. A group's sum is an exact integer; the groups are added in Real, in order.
template <typename Real>
void packed_gemv(Real* y, const QuantizedRows<Real>& x, const PackedView& w, const Real* addend,
                 Rows rows, int64_t m_total);

// The operand of input rows x (M, K): gathered by the channel order, rotated, quantized. Null
// outputs are not written. out (M, K'); clipped (M, K'/8). v.grid.bits 16: nothing is quantized,
// and only `out` may be asked for.
template <typename Real>
void operand(Real* out, uint8_t* clipped, const QuantizedRows<Real>& codes, const Real* x,
             Rows rows, const OperandView& v, Rounding rounding);
// dx (M, K) from the gradient dout (M, K') of the operand, straight through where it was not
// clipped; clipped may be null.
template <typename Real>
void operand_backward(Real* dx, const Real* dout, const uint8_t* clipped, Rows rows,
                      const OperandView& v);

// Weights between their plain form (N, K) and the stored positions (N, K') of a format: pairs hold
// two halves, or the weight twice if the activation is halved; padding holds 0; rotated groups are
// w' = 2^-j H w. merge_weight() undoes it: a pair's sum, or mean.
void gather_weight(float* stored, const float* plain, Rows rows, const LinearFormat& format,
                   const ChannelOrder& order);
void merge_weight(float* plain, const float* stored, Rows rows, const LinearFormat& format,
                  const ChannelOrder& order);

// How the weights of a linear start a stage (numerics.md sections 2 and 5).
struct StageStart {
  RangeRule range = RangeRule::MinMax;
  const float* energy = nullptr;  // (K'): E[x_i^2] of the operand; needed for a search
  int lowest_bits = 0;            // of the precisions that train at once; pairs split by its step
};
// From gathered weights `halves`: splits the pairs to w/2 -+ s/4, and finds each group's ratio.
// For each ratio s is the fixed point of {offset by s/4, recompute e}; a pair's error is one term,
// (a^ + b^ - w)^2. Returns the maximum group range, scaled by the ratios. w may be `halves`.
float start_rows(float* w, uint8_t* ratios, const float* halves, Rows rows,
                 const LinearFormat& format, const ChannelOrder& order, float master_scale,
                 const StageStart& start);

}  // namespace bbb::quant::host
