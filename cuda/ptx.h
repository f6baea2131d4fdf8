// PTX instructions of the attention kernels and some others (sm_80 and later).
//
// Fragments of mma.m16n8k16, lane = 4 g + t (PTX ISA, "Matrix Fragments for mma.m16n8k16"):
//     A (16 x 16)  a[0] (g, 2t)  a[1] (g + 8, 2t)  a[2] (g, 2t + 8)  a[3] (g + 8, 2t + 8)
//     B (16 x 8)   b0 (2t, g)    b1 (2t + 8, g)                      pairs run along k
//     C (16 x 8)   c[0], c[1] (g, 2t), (g, 2t + 1)   c[2], c[3] (g + 8, 2t), (g + 8, 2t + 1)
// A and B registers hold two bf16, the lower index in the lower half.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#ifdef __CUDACC__
namespace bbb::cuda {

// The block's dynamic shared memory, 16-byte aligned.
__device__ inline uint4* dynamic_smem() {
  extern __shared__ uint4 bbb_dynamic_smem[];
  return bbb_dynamic_smem;
}

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 (or 8, or 4) bytes from global to shared memory. If not valid, writes zeros and does
// not read src. Both addresses are aligned to the size.
__device__ inline void cp_async_16(uint32_t dst, const void* src, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst),
               "l"(__cvta_generic_to_global(src)), "r"(valid ? 16 : 0)
               : "memory");
}

__device__ inline void cp_async_8(uint32_t dst, const void* src, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(dst),
               "l"(__cvta_generic_to_global(src)), "r"(valid ? 8 : 0)
               : "memory");
}

__device__ inline void cp_async_4(uint32_t dst, const void* src, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(dst),
               "l"(__cvta_generic_to_global(src)), "r"(valid ? 4 : 0)
               : "memory");
}

__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's committed groups are in flight.
template <int kPending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Loads four 8 x 8 matrices. Lanes 8 i .. 8 i + 7 give the row addresses of matrix i; r[i] gets its
// elements (g, 2t), (g, 2t + 1).
__device__ inline void ldmatrix(uint32_t (&r)[4], uint32_t row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row_address)
               : "memory");
}

// The same, each matrix transposed: elements (2t, g), (2t + 1, g).
__device__ inline void ldmatrix_trans(uint32_t (&r)[4], uint32_t row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row_address)
               : "memory");
}

// Transposes an 8 x 8 matrix: each lane gives elements (g, 2t), (g, 2t + 1) and gets elements
// (2t, g), (2t + 1, g).
__device__ inline uint32_t transpose(uint32_t pair) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}

// c += a b, FP32 accumulation.
__device__ inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c += a b for bytes, exact in 32 bits: A (16 x 32) unsigned, B (32 x 8) signed. Registers hold
// four neighbours along k. a[0] (g, 4t ..)  a[1] (g + 8, 4t ..)  a[2] (g, 4t + 16 ..)  a[3] (g + 8,
// 4t + 16 ..); b0 (4t .., g)  b1 (4t + 16 .., g); c as above.
__device__ inline void mma_u8_s8(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// x, hidden from the optimizer: a loop computes what depends on it again, instead of keeping it in
// registers.
__device__ inline int recomputed(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// 2^x, accurate to 2 ulp; 0 at -inf.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Square root and reciprocal, accurate to about 2^-22; subnormals count as 0.
__device__ inline float sqrt_approx(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats rounded to bf16, `low` in the lower half.
__device__ inline uint32_t pack_bf16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
// Its inverse: the lower value first.
__device__ __forceinline__ float2 unpack_bf16(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u));
}

// Pairs of bf16: a b + c rounded once, a b, and the lower or upper half twice.
__device__ inline uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
__device__ inline uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
  return fma_bf16x2(a, b, 0x80008000u);  // -0 keeps the sign of a zero
}
__device__ inline uint32_t lower_twice(uint32_t pair) {
  uint32_t twice;
  asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %1;\nmov.b32 %0, {l, l};\n}" : "=r"(twice) : "r"(pair));
  return twice;
}
__device__ inline uint32_t upper_twice(uint32_t pair) {
  uint32_t twice;
  asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %1;\nmov.b32 %0, {h, h};\n}" : "=r"(twice) : "r"(pair));
  return twice;
}

// x >> kBits, which the compiler does not join with further shifts.
template <int kBits>
__device__ inline uint32_t shifted_down(uint32_t x) {
  uint32_t y;
  asm("shr.u32 %0, %1, %2;" : "=r"(y) : "r"(x), "n"(kBits));
  return y;
}

// (x & kMask) | kBits in one instruction: the compiler makes two of two constants.
template <uint32_t kMask, uint32_t kBits>
__device__ inline uint32_t mask_or(uint32_t x) {
  uint32_t y;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(y) : "r"(x), "n"(kMask), "r"(kBits));
  return y;
}

}  // namespace bbb::cuda
#endif
