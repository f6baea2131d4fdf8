// Groups in registers, for the quantizer's and the optimizer's kernels: their ranges, the maximum
// of these over a block, and their levels. A group occupies consecutive lanes of one warp,
// kPerThread consecutive elements in each.
#pragma once

#include <type_traits>

#include "quant/check.h"
#include "quant/grid.h"
#include "quant/tiles.h"

namespace bbb::quant {

// Calls fn with the group size as a compile-time constant.
template <typename Fn>
void with_group(int group, const Fn& fn) {
  switch (group) {
    case 32:
      return fn(std::integral_constant<int, 32>());
    case 64:
      return fn(std::integral_constant<int, 64>());
    default:
      BBB_ASSERT(group == 128);
      return fn(std::integral_constant<int, 128>());
  }
}

#ifdef __CUDACC__
constexpr unsigned kFullWarp = 0xFFFFFFFFu;

// The two halves of Range::include, one instruction each: NaN if either is NaN.
__device__ __forceinline__ float min_nan(float a, float b) {
  float least;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(least) : "f"(a), "f"(b));
  return least;
}
__device__ __forceinline__ float max_nan(float a, float b) {
  float most;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(a), "f"(b));
  return most;
}

// Calls exchange(lanes) for the strides 1, 2, 4 .. of a butterfly over the lanes of a group.
template <int kPerThread, typename Exchange>
__device__ __forceinline__ void each_stride(int group, const Exchange& exchange) {
#pragma unroll
  for (int lanes = 1; lanes < 32 / kPerThread; lanes *= 2) exchange(lanes);
  if (group > 32) exchange(32 / kPerThread);
  if (group > 64) exchange(64 / kPerThread);
}

// The range of this lane's group; the whole warp takes part.
template <int kPerThread>
__device__ __forceinline__ Range<float> group_range(const float (&x)[kPerThread], int group) {
  Range<float> range;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    range.mn = min_nan(range.mn, x[i]);
    range.mx = max_nan(range.mx, x[i]);
  }
  each_stride<kPerThread>(group, [&](int lanes) {
    range.mn = min_nan(range.mn, __shfl_xor_sync(kFullWarp, range.mn, lanes));
    range.mx = max_nan(range.mx, __shfl_xor_sync(kFullWarp, range.mx, lanes));
  });
  return range;
}

// Replaces each x by its level; bit i of the result: x[i] takes no gradient.
template <int kPerThread, typename Rule>
__device__ __forceinline__ unsigned replace_by_levels(float (&x)[kPerThread],
                                                      const GroupLevels& group, const Rule& rule) {
  unsigned masked = 0;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) masked |= group.replace(x[i], rule) ? 1u << i : 0u;
  return masked;
}

// slot = max(slot, value) over the values of a warp, none negative. As unsigned integers, the bits
// of such floats are in order; infinity and every NaN come after the finite ones. The atomic is
// deterministic, because a maximum does not depend on the order of its operands.
__device__ __forceinline__ void warp_max(float* slot, float value) {
  const unsigned bits = __reduce_max_sync(kFullWarp, __float_as_uint(value));
  if (threadIdx.x % 32 == 0) atomicMax(reinterpret_cast<unsigned*>(slot), bits);
}

// The same over a block of kThreads.
template <int kThreads>
__device__ __forceinline__ void block_max(float* slot, float value) {
  const unsigned bits = __reduce_max_sync(kFullWarp, __float_as_uint(value));
  __shared__ unsigned warps[kThreads / 32];
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = bits;
  __syncthreads();
  if (threadIdx.x < 32)
    warp_max(slot, __uint_as_float(threadIdx.x < kThreads / 32 ? warps[threadIdx.x] : 0u));
}
#endif

}  // namespace bbb::quant
