// What kernels need that may start early (LaunchShape::early; sm_90 and later, elsewhere nothing).
//
//     kernel 1   |-- start_next_kernel ---------- end|
//     kernel 2        |-- start_next_kernel -- wait  |-- reads, writes -- end|
//     kernel 3             |-- wait                                         |-- reads, writes
//
// Before its wait, a kernel may read only what no kernel in flight writes, and writes nothing; it
// may prefetch anything to L2. After its wait, it reads what earlier kernels wrote past L1: an
// earlier kernel on the same multiprocessor may have filled L1 with older lines since this one
// started. Every block waits, so that a kernel ends after all those before it.
#pragma once

#include <bit>
#include <cstdint>

#include "cuda/vector.h"

#ifdef __CUDACC__
namespace bbb::cuda {

// Lets the kernel behind this one start, once every block has called this.
__device__ inline void start_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the kernel in front has ended and its writes are visible.
__device__ inline void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ inline void prefetch_to_l2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(p)));
}

// *p, aligned to its size: 1, 2, 4, 8 or 16 bytes.
template <typename T>
__device__ inline T load_past_l1(const T* p) {
  const size_t address = __cvta_generic_to_global(p);
  if constexpr (sizeof(T) == 16) {
    uint4 v;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address)
                 : "memory");
    return std::bit_cast<T>(v);
  } else if constexpr (sizeof(T) == 8) {
    uint2 v;
    asm volatile("ld.global.cg.v2.u32 {%0, %1}, [%2];"
                 : "=r"(v.x), "=r"(v.y)
                 : "l"(address)
                 : "memory");
    return std::bit_cast<T>(v);
  } else if constexpr (sizeof(T) == 4) {
    uint32_t v;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(address) : "memory");
    return std::bit_cast<T>(v);
  } else if constexpr (sizeof(T) == 2) {
    uint16_t v;
    asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(v) : "l"(address) : "memory");
    return std::bit_cast<T>(v);
  } else {
    static_assert(sizeof(T) == 1);
    uint32_t v;
    asm volatile("ld.global.cg.u8 %0, [%1];" : "=r"(v) : "l"(address) : "memory");
    return std::bit_cast<T>(static_cast<uint8_t>(v));
  }
}

// As load() of cuda/vector.h.
template <int kWidth, typename T>
__device__ inline void load_past_l1(float (&x)[kWidth], const T* p, int64_t count) {
  if (count >= kWidth) {
    const auto packed = load_past_l1(reinterpret_cast<const Vector<T, kWidth>*>(p));
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x[i] = to_float(packed.v[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x[i] = i < count ? to_float(load_past_l1(p + i)) : 0.0f;
  }
}

}  // namespace bbb::cuda
#endif
