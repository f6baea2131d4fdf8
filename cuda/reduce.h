// Sums in a fixed order: within a warp, a block, and over a whole tensor in two stages.
//
// Stage one: at most kPartials blocks walk the tensor in a grid stride; each writes one partial
// sum. Stage two (finish_sum): one block adds the partial sums. The grid depends on the size alone,
// so the same input gives the same bytes on every GPU.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "engine/backend.h"

namespace bbb::cuda {

inline constexpr int kSumThreads = 256;
inline constexpr int64_t kPartials = 1024;

inline int64_t partials_for(int64_t n, int width) {
  const int64_t chunk = int64_t{kSumThreads} * width;
  return std::clamp<int64_t>((n + chunk - 1) / chunk, 1, kPartials);
}

// out (+)= scale * sum(partials[0, count)).   (sum.cu)
void finish_sum(cudaStream_t stream, float* out, const float* partials, int64_t count, double scale,
                engine::Write mode);

#ifdef __CUDACC__
// Every lane gets x of all lanes combined: the butterfly takes the same pairs in every lane.
template <typename Combine>
__device__ inline float warp_reduce(float x, const Combine& combine) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    x = combine(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}
__device__ inline float warp_sum(float x) {
  return warp_reduce(x, [](float a, float b) { return a + b; });
}

// Every thread gets the sum over a block of whole warps. `shared` holds 32 floats and is reusable
// right after.
__device__ inline float block_sum(float x, float* shared) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  x = warp_sum(x);
  if (lane == 0) shared[warp] = x;
  __syncthreads();
  x = warp_sum(lane < blockDim.x / 32 ? shared[lane] : 0.0f);
  __syncthreads();
  return x;
}
// sum_k partials[k, c] of partials (chunks, D), in a fixed order. A block of kSumThreads sums 32
// columns, c = 32 blockIdx.x + lane; each warp adds every eighth chunk. The first warp returns the
// sums where c < D; all other threads return 0.
__device__ inline float chunk_sum(const float* __restrict__ partials, int64_t chunks, int64_t d) {
  constexpr int kWarps = kSumThreads / 32;
  __shared__ float sums[kWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t c = int64_t{blockIdx.x} * 32 + lane;
  float sum = 0.0f;
  if (c < d) {
#pragma unroll 16
    for (int64_t k = warp; k < chunks; k += kWarps) sum += partials[k * d + c];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0) return 0.0f;
  float total = 0.0f;
#pragma unroll
  for (int k = 0; k < kWarps; ++k) total += sums[k][lane];
  return total;
}
#endif

}  // namespace bbb::cuda
