// The rotation of groups of activations (numerics.md section 2), for every kernel that makes
// operands.
#pragma once

#include "quant/grid.h"

#ifdef __CUDACC__
namespace bbb::cuda {

constexpr int kPieceWidth = 8;  // consecutive positions of a lane

// x = 2^-i H x for the group of this lane, by butterflies of strides 1, 2, 4 .. G / 2: the lower
// index gets u + v, the upper one u - v. The whole warp takes part.
template <int kGroup>
__device__ __forceinline__ void rotate(float (&x)[kPieceWidth]) {
#pragma unroll
  for (int stride = 1; stride < kPieceWidth; stride *= 2)
#pragma unroll
    for (int i = 0; i < kPieceWidth; ++i) {
      if ((i & stride) != 0) continue;
      const float u = x[i], w = x[i + stride];
      x[i] = u + w;
      x[i + stride] = u - w;
    }
#pragma unroll
  for (int lanes = 1; lanes < kGroup / kPieceWidth; lanes *= 2) {
    const bool upper = (threadIdx.x & lanes) != 0;
#pragma unroll
    for (int i = 0; i < kPieceWidth; ++i) {
      const float other = __shfl_xor_sync(0xffffffffu, x[i], lanes);
      x[i] = upper ? other - x[i] : x[i] + other;
    }
  }
  constexpr float kScale = 1.0f / float(1 << quant::activation_rotation_shift(kGroup));
#pragma unroll
  for (int i = 0; i < kPieceWidth; ++i) x[i] *= kScale;
}

}  // namespace bbb::cuda
#endif
