// Launch functions of the kernels of the quantizer and on packed weights, on device memory.
//
// w, sigma FP32; dw, dsigma FP32 or bf16; wq, x, addend bf16; e, z, codes bytes; clipped one bit an
// element; S one FP32 on the device.
// Matrices are contiguous, with whole groups of 32, 64 or 128 along a row. So the quantizer's own
// kernels see a flat array of `count` elements. Every pointer is aligned to 16 bytes. ratios: each
// group's index of range_ratio(), one byte; null: all ratios are 1.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "quant/format.h"
#include "quant/tiles.h"

namespace bbb::quant {

// Over all parameters in one flat buffer, cut into tiles (tiles.h): writes each parameter's maximum
// group range to its slot, NaN if any element is NaN, 0 if it is not quantized. `bits` has a row
// for each slot. Clears the S that parameters were prequantized with. Two memsets and one kernel.
void launch_max_group_range(cudaStream_t stream, float* max_range, float* prequantized,
                            int64_t slots, const float* w, const uint8_t* ratios,
                            const WeightTile* tiles, int64_t tile_count, const int32_t* bits,
                            int group, Levels levels);
// S from the maximum group range, then wq = (q - z) e, e, z and the clipped bits in one pass over
// the masters. At kNoQuantizer wq = w and S = 1; nothing is clipped, e and z are not written. The
// masters of a parameter that was prequantized with this S are not read.
void launch_fake_quant(cudaStream_t stream, __nv_bfloat16* wq, uint8_t* e, uint8_t* z,
                       uint8_t* clipped, float* s, const float* w, const uint8_t* ratios,
                       const float* max_range, const float* prequantized, const WeightTile* tiles,
                       int64_t tile_count, const int32_t* bits, int group, const WeightRule& rule,
                       Rounding rounding);
// wq at the top `bits` bits of nested codes, after launch_fake_quant; parameters of other widths
// are left alone.
void launch_nested_levels(cudaStream_t stream, __nv_bfloat16* wq, const float* w, const uint8_t* e,
                          const uint8_t* z, const float* s, const WeightTile* tiles,
                          int64_t tile_count, const int32_t* widths, int group, int bits,
                          NestedDequant dequant);
void launch_quantize_codes(cudaStream_t stream, uint8_t* codes, const float* w, const uint8_t* e,
                           const uint8_t* z, const float* s, int64_t count, WeightGrid spec);
// S from the sigmas, then e = E4M3(sigma / S) and wq = (codes - z) e.
void launch_scale_codes(cudaStream_t stream, __nv_bfloat16* wq, uint8_t* e, float* s,
                        const uint8_t* codes, const uint8_t* z, const float* sigma, int64_t count,
                        WeightGrid spec);
// T is float or __nv_bfloat16.
template <typename T>
void launch_scale_codes_backward(cudaStream_t stream, T* dsigma, const T* dw, const uint8_t* codes,
                                 const uint8_t* z, int64_t count, WeightGrid spec, bool accumulate);

// Learned grids (engine/backend.h); zeta, dzeta may be null. T is float or __nv_bfloat16.
void launch_learned_quant(cudaStream_t stream, __nv_bfloat16* wq, uint8_t* e, uint8_t* z, float* s,
                          const float* w, const float* sigma, const float* zeta, int64_t count,
                          WeightGrid spec);
template <typename T>
void launch_learned_quant_backward(cudaStream_t stream, T* dw, T* dsigma, T* dzeta, const float* w,
                                   const uint8_t* e, const uint8_t* z, const float* s,
                                   int64_t count, WeightGrid spec);

// Learned ratios (engine/backend.h); `ratio` is clamped in place.
void launch_ratio_quant(cudaStream_t stream, __nv_bfloat16* wq, uint8_t* e, uint8_t* z, float* s,
                        float* ratio, const float* w, int64_t count, WeightGrid spec);
template <typename T>
void launch_ratio_quant_backward(cudaStream_t stream, T* dw, T* dratio, const float* w,
                                 const uint8_t* e, const uint8_t* z, const float* s, int64_t count,
                                 WeightGrid spec);

// wq = (q - z) e, (N, K).
void launch_unpack(cudaStream_t stream, __nv_bfloat16* wq, const PackedView& w);
// out[m] = S (q - z) e of row ids[m], (m, K), of codes that are not nested.
void launch_unpack_rows(cudaStream_t stream, __nv_bfloat16* out, const int32_t* ids,
                        const PackedView& w, int64_t m);
// y = S x ((q - z) e)^T (+ addend) for m <= 8 rows of x. y (m, N), bf16 or FP32: the one that is
// not null is written. addend (m, N) or null.
void launch_packed_gemv(cudaStream_t stream, __nv_bfloat16* y_bf16, float* y_f32,
                        const __nv_bfloat16* x, const PackedView& w, const __nv_bfloat16* addend,
                        int64_t m);
// The same from the codes of an operand: codes (m, K), zeros and scales (m, K/G). x is then (codes
// - zeros) scales.
void launch_quantized_gemv(cudaStream_t stream, __nv_bfloat16* y_bf16, float* y_f32,
                           const uint8_t* codes, const uint8_t* zeros, const float* scales,
                           const PackedView& w, const __nv_bfloat16* addend, int64_t m);

}  // namespace bbb::quant
