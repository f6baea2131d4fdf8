// The online softmax of FlashAttention-2 (Dao, 2023) for one warp that attends with up to 16 query
// rows to tiles of 16 keys, in the fragments of mma.m16n8k16 (cuda/ptx.h): acc = sum p v,
// row_sum = sum p, p = exp(scale (s - row_max)). After all tiles, o = acc / row_sum.
#pragma once

#include "cuda/mma.h"

#ifdef __CUDACC__
namespace bbb::cuda {

template <int D>
struct OnlineSoftmax {
  float acc[D / 8][4] = {};                   // C fragments: rows g and g + 8
  float row_max[2] = {-INFINITY, -INFINITY};  // of the raw scores
  float row_sum[2] = {0.0f, 0.0f};            // of this lane's terms

  // Replaces the raw scores of the tile of keys key0 .. key0 + 15 by p, and makes acc and row_sum
  // relative to the new maximum. Keys outside of [first_key, end_key) are invisible; one is
  // visible. scale_log2: the scale of the scores times log2 e.
  __device__ __forceinline__ void weigh(float (&s)[2][4], int key0, int first_key, int end_key,
                                        float scale_log2, int lane) {
    bool rescale = false;
    float correction[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float maximum = row_max[half];
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          const int key = key0 + n * 8 + lane % 4 * 2 + i % 2;
          if (key < first_key || key >= end_key) s[n][i] = -INFINITY;
          maximum = fmaxf(maximum, s[n][i]);
        }
      maximum = quad_max(maximum);
      const float base = maximum * scale_log2;
      correction[half] = exp2_approx(row_max[half] * scale_log2 - base);
      rescale |= maximum != row_max[half];
      row_max[half] = maximum;
      float sum = row_sum[half] * correction[half];
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          s[n][i] = exp2_approx(s[n][i] * scale_log2 - base);
          sum += s[n][i];
        }
      row_sum[half] = sum;
    }
    if (!__any_sync(0xffffffffu, rescale)) return;
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[n][i] *= correction[i / 2];
  }
};

// The same for up to eight query rows, with the keys as rows of the products: scores^T = K q^T and
// acc^T = V^T p^T take half as many products and registers as 16 rows. A lane (g, t) has queries 2t
// and 2t + 1.
template <int D>
struct OnlineSoftmaxOfFew {
  float acc[D / 16][4] = {};  // C fragments of acc^T: columns 16 n + g and 16 n + g + 8
  float row_max[2] = {-INFINITY, -INFINITY};  // of the raw scores
  float row_sum[2] = {0.0f, 0.0f};            // of this lane's terms

  // From the raw scores of a tile, a C fragment of scores^T, p^T as the B fragment. Else as above.
  __device__ __forceinline__ void weigh(uint32_t (&p)[2], float (&s)[4], int key0, int first_key,
                                        int end_key, float scale_log2, int lane) {
    bool rescale = false;
    float correction[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float maximum = row_max[i];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int key = key0 + lane / 4 + 8 * half;
        float& score = s[2 * half + i];
        if (key < first_key || key >= end_key) score = -INFINITY;
        maximum = fmaxf(maximum, score);
      }
#pragma unroll
      for (int apart = 4; apart < 32; apart *= 2)
        maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, apart));
      const float base = maximum * scale_log2;
      correction[i] = exp2_approx(row_max[i] * scale_log2 - base);
      rescale |= maximum != row_max[i];
      row_max[i] = maximum;
#pragma unroll
      for (int half = 0; half < 2; ++half)
        s[2 * half + i] = exp2_approx(s[2 * half + i] * scale_log2 - base);
      row_sum[i] = row_sum[i] * correction[i] + (s[i] + s[2 + i]);
    }
    p[0] = transpose(pack_bf16(s[0], s[1]));
    p[1] = transpose(pack_bf16(s[2], s[3]));
    if (!__any_sync(0xffffffffu, rescale)) return;
#pragma unroll
    for (int n = 0; n < D / 16; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[n][i] *= correction[i % 2];
  }

  // The sum of a query's terms over all lanes.
  __device__ __forceinline__ float total(int i) const {
    float sum = row_sum[i];
#pragma unroll
    for (int apart = 4; apart < 32; apart *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, apart);
    return sum;
  }
};

}  // namespace bbb::cuda
#endif
