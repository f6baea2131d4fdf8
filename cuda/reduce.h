// Sums in a fixed order: within a warp, a block, and over a whole tensor in two stages.
//
// Stage one: at most kPartials blocks walk the tensor in a grid stride and write one partial sum
// each. Stage two (finish_sum) adds the partials in one block. The grid depends on the size alone,
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
// Every lane gets the sum; the butterfly adds the same pairs in every lane.
__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// Every thread gets the sum over a block of whole warps. `shared` holds 32 floats; it may be used
// again right after.
__device__ inline float block_sum(float x, float* shared) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  x = warp_sum(x);
  if (lane == 0) shared[warp] = x;
  __syncthreads();
  x = warp_sum(lane < blockDim.x / 32 ? shared[lane] : 0.0f);
  __syncthreads();
  return x;
}
#endif

}  // namespace bbb::cuda
