// Loads and stores of kWidth neighbouring elements as FP32, 16 bytes at a time where kWidth allows.
//
// Kernels are compiled for a width of 8 (4 for FP32 alone) and of 1. The launcher takes the wide
// one if aligned() and the row pitch permit it. All element offsets are 64-bit.
#pragma once

#include <cuda_bf16.h>

#include <algorithm>
#include <cstdint>

#include "engine/tensor.h"

namespace bbb::cuda {

inline constexpr int64_t kWideBytes = 16;

// Whether every defined tensor starts on a multiple of 16 bytes.
template <typename... Tensors>
bool aligned(const Tensors&... tensors) {
  return ((reinterpret_cast<uintptr_t>(tensors.raw()) % kWideBytes == 0) && ...);
}

// Enough blocks of `threads` to give each thread `per_thread` of n elements.
inline dim3 blocks_for(int64_t n, int threads, int per_thread) {
  const int64_t chunk = int64_t{threads} * per_thread;
  return dim3(static_cast<unsigned>((n + chunk - 1) / chunk));
}

#ifdef __CUDACC__
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth < 16 ? sizeof(T) * kWidth : 16) Vector {
  T v[kWidth];
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void from_float(float& out, float x) { out = x; }
__device__ inline void from_float(__nv_bfloat16& out, float x) { out = __float2bfloat16_rn(x); }

// x = p[0, kWidth), with 0 from `count` on: the ragged end of a tensor.
template <int kWidth, typename T>
__device__ inline void load(float (&x)[kWidth], const T* p, int64_t count) {
  if (count >= kWidth) {
    const Vector<T, kWidth> packed = *reinterpret_cast<const Vector<T, kWidth>*>(p);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x[i] = to_float(packed.v[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x[i] = i < count ? to_float(p[i]) : 0.0f;
  }
}

template <int kWidth, typename T>
__device__ inline void store(T* p, const float (&x)[kWidth], int64_t count) {
  if (count >= kWidth) {
    Vector<T, kWidth> packed;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) from_float(packed.v[i], x[i]);
    *reinterpret_cast<Vector<T, kWidth>*>(p) = packed;
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i)
      if (i < count) from_float(p[i], x[i]);
  }
}

// The index of this thread's first element in a flat launch of blocks_for().
template <int kWidth>
__device__ inline int64_t first_element() {
  return (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kWidth;
}
#endif

}  // namespace bbb::cuda
