// The arithmetic of rotary positions, shared by rope and the backward of attention, which rotates
// its gradients back before it rounds them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#ifdef __CUDACC__
namespace bbb::cuda {

// factor (cos, sign sin) of the angle position * inv_freq. The angle is one FP32 product; sincosf
// reduces it fully, so that long contexts keep their phase.
__device__ inline float2 rotation(int64_t position, float inv_freq, float sign, float factor) {
  float sine, cosine;
  sincosf(static_cast<float>(position) * inv_freq, &sine, &cosine);
  return make_float2(factor * cosine, factor * sign * sine);
}

// Rotates the pair (a, b) by r.
__device__ inline void rotate(float& a, float& b, float2 r) {
  const float rotated = a * r.x - b * r.y;
  b = b * r.x + a * r.y;
  a = rotated;
}

// Rotates one lane's part of a 16 x D accumulator of C fragments. Its rows are positions `row` and
// row + apart; its columns are 8 n + pair and the one after it. rotations (rows, D / 2) is 16-byte
// aligned.
template <int D>
__device__ inline void rotate_accumulator(float (&x)[D / 8][4], const float2* rotations, int row,
                                          int apart, int pair) {
  constexpr int kHalf = D / 2;
  static_assert(kHalf % 8 == 0, "columns c and c + D / 2 are to be of one lane");
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float2* from = rotations + int64_t{row + apart * half} * kHalf + pair;
#pragma unroll
    for (int n = 0; n < kHalf / 8; ++n) {
      const float4 r = __ldg(reinterpret_cast<const float4*>(from + n * 8));
      rotate(x[n][2 * half], x[n + kHalf / 8][2 * half], make_float2(r.x, r.y));
      rotate(x[n][2 * half + 1], x[n + kHalf / 8][2 * half + 1], make_float2(r.z, r.w));
    }
  }
}

}  // namespace bbb::cuda
#endif
