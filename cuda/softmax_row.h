// The running maximum and sum of exponentials of one row, shared by the losses over logits.
//
// (max, sum) represents sum_i e^(x_i - max). Two of them combine exactly in any grouping; here the
// grouping is always the same. A row of only -Inf has sum 0; a NaN anywhere makes the sum NaN.
#pragma once

#ifdef __CUDACC__
#include <cstdint>

#include "cuda/vector.h"

namespace bbb::cuda {

struct ExpSum {
  float max = -INFINITY;
  float sum = 0.0f;

  __device__ float log() const { return max + logf(sum); }

  __device__ void merge(float other_max, float other_sum) {
    const float top = fmaxf(max, other_max);
    // Equal maxima need no factor. It would be NaN where both are -Inf.
    sum = (max == top ? sum : sum * expf(max - top)) +
          (other_max == top ? other_sum : other_sum * expf(other_max - top));
    max = top;
  }

  // Calls each(i, e^(x[i] - top)) for every i; returns top, the maximum of x.
  template <int kWidth, typename Each>
  __device__ float add(const float (&x)[kWidth], const Each& each) {
    float top = x[0];
#pragma unroll
    for (int i = 1; i < kWidth; ++i) top = fmaxf(top, x[i]);
    const float shift = top == -INFINITY ? 0.0f : top;
    float part = 0.0f;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float term = expf(x[i] - shift);
      part += term;
      each(i, term);
    }
    merge(top, part);
    return top;
  }

  template <int kWidth>
  __device__ void add(const float (&x)[kWidth]) {
    add(x, [](int, float) {});
  }
};

// The ExpSum of the whole block, in every thread.
__device__ inline ExpSum block_exp_sum(ExpSum x) {
  __shared__ ExpSum shared[32];
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto across_lanes = [](ExpSum& e) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      const float max = __shfl_xor_sync(0xffffffffu, e.max, offset);
      const float sum = __shfl_xor_sync(0xffffffffu, e.sum, offset);
      e.merge(max, sum);
    }
  };
  across_lanes(x);
  if (lane == 0) shared[warp] = x;
  __syncthreads();
  x = lane < blockDim.x / 32 ? shared[lane] : ExpSum{};
  across_lanes(x);
  __syncthreads();
  return x;
}

// The ExpSum of row[0, v), by the whole block. v is a multiple of kWidth.
template <int kWidth, typename T>
__device__ ExpSum row_exp_sum(const T* row, int64_t v) {
  ExpSum e;
  for (int64_t i = int64_t{threadIdx.x} * kWidth; i < v; i += int64_t{blockDim.x} * kWidth) {
    float x[kWidth];
    load(x, row + i, kWidth);
    e.add(x);
  }
  return block_exp_sum(e);
}

// row[0, v) = 0, by the whole block.
template <int kWidth, typename T>
__device__ void zero_row(T* row, int64_t v) {
  const float zeros[kWidth] = {};
  for (int64_t i = int64_t{threadIdx.x} * kWidth; i < v; i += int64_t{blockDim.x} * kWidth)
    store(row + i, zeros, kWidth);
}

}  // namespace bbb::cuda
#endif
