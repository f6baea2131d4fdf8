// The quantizer on FP32 masters: the formulas are in quant/grid.h, one function call each here.
//
//   master_scale          S                       reads 4 B an element
//   fake_quant            wq, e, z                4 B read, 2 B written (+ 2 B a group)
//   ste_backward          dw, in place            4 B read; a float4 of dw only if it is clipped
//   quantize_codes        codes                   4 B read, 1 B written
//   scale_codes           e, wq from sigma        1 B read, 2 B written
//   scale_codes_backward  dsigma                  5 B read, 4 B a group written
//
// Thread mapping of all: four consecutive elements a thread, 16-byte accesses to FP32, and G / 4
// consecutive lanes to a group, joined by shuffles. A group lies inside one warp; the number of
// elements is a multiple of the group, so that a group is inside the matrix as a whole or not at
// all.
#include <cuda_bf16.h>

#include <algorithm>
#include <type_traits>

#include "quant/cuda_kernels.h"
#include "quant/grid.h"
#include "quant/launch.h"

namespace bbb::quant {

namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = 4;
constexpr int kMaxReduceBlocks = 1024;
constexpr unsigned kFullWarp = 0xFFFFFFFFu;

int64_t blocks_for(int64_t count) {
  return (count + kThreads * kPerThread - 1) / (kThreads * kPerThread);
}

__device__ __forceinline__ int64_t thread_index() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

// The range of the group that this lane belongs to; the whole warp takes part.
template <int kGroup>
__device__ __forceinline__ Range<float> group_range(const float4& x) {
  Range<float> range;
  range.include(x.x);
  range.include(x.y);
  range.include(x.z);
  range.include(x.w);
#pragma unroll
  for (int lanes = 1; lanes < kGroup / kPerThread; lanes *= 2) {
    const float mn = __shfl_xor_sync(kFullWarp, range.mn, lanes);
    const float mx = __shfl_xor_sync(kFullWarp, range.mx, lanes);
    range.include(mn);
    range.include(mx);
  }
  return range;
}

// slot = max(slot, value) over the block's values. As unsigned integers, the bits of non-negative
// floats are in order, and infinity and every NaN come after the finite ones; a maximum does not
// depend on the order of its operands, so the atomic is deterministic.
__device__ __forceinline__ void block_max(unsigned* slot, float value) {
  unsigned bits = __reduce_max_sync(kFullWarp, __float_as_uint(value));
  __shared__ unsigned warps[kThreads / 32];
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = bits;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  bits = threadIdx.x < kThreads / 32 ? warps[threadIdx.x] : 0u;
  bits = __reduce_max_sync(kFullWarp, bits);
  if (threadIdx.x == 0) atomicMax(slot, bits);
}

template <int kGroup>
__global__ void __launch_bounds__(kThreads)
    widest_group_kernel(unsigned* __restrict__ slot, const float4* __restrict__ w, int64_t quads) {
  float widest = 0.0f;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t last = (quads + 31) / 32 * 32;  // whole warps enter the shuffles
#pragma unroll 4
  for (int64_t i = thread_index(); i < last; i += stride) {
    const float4 x = i < quads ? w[i] : float4{0, 0, 0, 0};
    widest = max_or_nan(widest, group_range<kGroup>(x).width());
  }
  block_max(slot, widest);
}

__global__ void __launch_bounds__(kThreads)
    largest_kernel(unsigned* __restrict__ slot, const float* __restrict__ x, int64_t count) {
  float largest = 0.0f;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = thread_index(); i < count; i += stride) largest = max_or_nan(largest, x[i]);
  block_max(slot, largest);
}

// s holds the largest of something; leaves S. bits 0: of the scales themselves, else of the widths.
__global__ void finish_master_scale_kernel(float* s, int bits) {
  *s = master_scale_of(bits == 0 ? *s : raw_scale(*s, bits));
}

__device__ __forceinline__ unsigned bf16_pair(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const unsigned&>(pair);
}

__device__ __forceinline__ void store_bf16(__nv_bfloat16* out, int64_t quad, const float4& x) {
  reinterpret_cast<uint2*>(out)[quad] = {bf16_pair(x.x, x.y), bf16_pair(x.z, x.w)};
}

template <int kGroup, Rounding kRounding>
__global__ void __launch_bounds__(kThreads)
    fake_quant_kernel(__nv_bfloat16* __restrict__ wq, uint8_t* __restrict__ e,
                      uint8_t* __restrict__ z, const float4* __restrict__ w,
                      const float* __restrict__ s, int64_t quads, int bits) {
  constexpr int kLanes = kGroup / kPerThread;
  const int64_t i = thread_index();
  const float master_scale = *s;
  const float4 x = i < quads ? w[i] : float4{0, 0, 0, 0};
  const Range<float> range = group_range<kGroup>(x);
  if (i >= quads) return;
  const GroupParams p = group_params(range, master_scale, bits);
  if (i % kLanes == 0) {
    e[i / kLanes] = p.e;
    z[i / kLanes] = p.z;
  }
  if constexpr (kRounding == Rounding::Identity) {
    store_bf16(wq, i,
               {x.x / master_scale, x.y / master_scale, x.z / master_scale, x.w / master_scale});
  } else {
    const float step = step_of(p.e, master_scale), scale = e4m3_decode(p.e);
    store_bf16(wq, i,
               {level_of(code_of(x.x, step, p.z, bits), p.z, scale),
                level_of(code_of(x.y, step, p.z, bits), p.z, scale),
                level_of(code_of(x.z, step, p.z, bits), p.z, scale),
                level_of(code_of(x.w, step, p.z, bits), p.z, scale)});
  }
}

template <int kGroup>
__global__ void __launch_bounds__(kThreads)
    ste_backward_kernel(float4* __restrict__ dw, const float4* __restrict__ w,
                        const uint8_t* __restrict__ e, const uint8_t* __restrict__ z,
                        const float* __restrict__ s, int64_t quads, int bits) {
  const int64_t i = thread_index();
  if (i >= quads) return;
  const int64_t group = i / (kGroup / kPerThread);
  const uint8_t zero = z[group];
  const float step = step_of(e[group], *s);
  const float4 x = w[i];
  const bool clipped[4] = {is_clipped(x.x, step, zero, bits), is_clipped(x.y, step, zero, bits),
                           is_clipped(x.z, step, zero, bits), is_clipped(x.w, step, zero, bits)};
  if (!(clipped[0] || clipped[1] || clipped[2] || clipped[3])) return;
  float4 d = dw[i];
  if (clipped[0]) d.x = 0.0f;
  if (clipped[1]) d.y = 0.0f;
  if (clipped[2]) d.z = 0.0f;
  if (clipped[3]) d.w = 0.0f;
  dw[i] = d;
}

template <int kGroup>
__global__ void __launch_bounds__(kThreads)
    quantize_codes_kernel(uchar4* __restrict__ codes, const float4* __restrict__ w,
                          const uint8_t* __restrict__ e, const uint8_t* __restrict__ z,
                          const float* __restrict__ s, int64_t quads, int bits) {
  const int64_t i = thread_index();
  if (i >= quads) return;
  const int64_t group = i / (kGroup / kPerThread);
  const uint8_t zero = z[group];
  const float step = step_of(e[group], *s);
  const float4 x = w[i];
  const auto code = [&](float v) { return static_cast<uint8_t>(code_of(v, step, zero, bits)); };
  codes[i] = {code(x.x), code(x.y), code(x.z), code(x.w)};
}

template <int kGroup>
__global__ void __launch_bounds__(kThreads)
    scale_codes_kernel(__nv_bfloat16* __restrict__ wq, uint8_t* __restrict__ e,
                       const float* __restrict__ s, const uchar4* __restrict__ codes,
                       const uint8_t* __restrict__ z, const float* __restrict__ sigma,
                       int64_t quads, int bits) {
  constexpr int kLanes = kGroup / kPerThread;
  const int64_t i = thread_index();
  if (i >= quads) return;
  const int64_t group = i / kLanes;
  const uint8_t code = encode_scale(sigma[group], *s, bits), zero = z[group];
  if (i % kLanes == 0) e[group] = code;
  const float scale = e4m3_decode(code);
  const uchar4 q = codes[i];
  store_bf16(wq, i,
             {level_of(float(q.x), zero, scale), level_of(float(q.y), zero, scale),
              level_of(float(q.z), zero, scale), level_of(float(q.w), zero, scale)});
}

template <int kGroup>
__global__ void __launch_bounds__(kThreads)
    scale_codes_backward_kernel(float* __restrict__ dsigma, const float4* __restrict__ dw,
                                const uchar4* __restrict__ codes, const uint8_t* __restrict__ z,
                                int64_t quads, bool accumulate) {
  constexpr int kLanes = kGroup / kPerThread;
  const int64_t i = thread_index();
  float sum = 0.0f;
  if (i < quads) {
    const float zero = z[i / kLanes];
    const float4 d = dw[i];
    const uchar4 q = codes[i];
    sum = (d.x * (float(q.x) - zero) + d.y * (float(q.y) - zero)) +
          (d.z * (float(q.z) - zero) + d.w * (float(q.w) - zero));
  }
#pragma unroll
  for (int lanes = 1; lanes < kLanes; lanes *= 2) sum += __shfl_xor_sync(kFullWarp, sum, lanes);
  if (i >= quads || i % kLanes != 0) return;
  float* out = dsigma + i / kLanes;
  *out = accumulate ? *out + sum : sum;
}

LaunchShape one_quad_a_thread(int64_t count) {
  return {dim3(static_cast<unsigned>(blocks_for(count))), dim3(kThreads)};
}

const float4* quads_of(const float* x) { return reinterpret_cast<const float4*>(x); }
const uchar4* quads_of(const uint8_t* x) { return reinterpret_cast<const uchar4*>(x); }

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

}  // namespace

void launch_master_scale(cudaStream_t stream, float* s, const float* w, int64_t count,
                         GridSpec spec) {
  BBB_CUDA(cudaMemsetAsync(s, 0, sizeof(float), stream));
  const int64_t blocks = std::min<int64_t>(blocks_for(count), kMaxReduceBlocks);
  with_group(spec.group, [&](auto group) {
    launch(stream, {dim3(static_cast<unsigned>(blocks)), dim3(kThreads)},
           widest_group_kernel<group>, reinterpret_cast<unsigned*>(s), quads_of(w),
           count / kPerThread);
  });
  launch(stream, {dim3(1), dim3(1)}, finish_master_scale_kernel, s, spec.bits);
}

void launch_fake_quant(cudaStream_t stream, __nv_bfloat16* wq, uint8_t* e, uint8_t* z,
                       const float* w, const float* s, int64_t count, GridSpec spec,
                       Rounding rounding) {
  with_group(spec.group, [&](auto group) {
    launch(stream, one_quad_a_thread(count),
           rounding == Rounding::Identity ? fake_quant_kernel<group, Rounding::Identity>
                                          : fake_quant_kernel<group, Rounding::Nearest>,
           wq, e, z, quads_of(w), s, count / kPerThread, spec.bits);
  });
}

void launch_ste_backward(cudaStream_t stream, float* dw, const float* w, const uint8_t* e,
                         const uint8_t* z, const float* s, int64_t count, GridSpec spec) {
  with_group(spec.group, [&](auto group) {
    launch(stream, one_quad_a_thread(count), ste_backward_kernel<group>,
           reinterpret_cast<float4*>(dw), quads_of(w), e, z, s, count / kPerThread, spec.bits);
  });
}

void launch_quantize_codes(cudaStream_t stream, uint8_t* codes, const float* w, const uint8_t* e,
                           const uint8_t* z, const float* s, int64_t count, GridSpec spec) {
  with_group(spec.group, [&](auto group) {
    launch(stream, one_quad_a_thread(count), quantize_codes_kernel<group>,
           reinterpret_cast<uchar4*>(codes), quads_of(w), e, z, s, count / kPerThread, spec.bits);
  });
}

void launch_scale_codes(cudaStream_t stream, __nv_bfloat16* wq, uint8_t* e, float* s,
                        const uint8_t* codes, const uint8_t* z, const float* sigma, int64_t count,
                        GridSpec spec) {
  BBB_CUDA(cudaMemsetAsync(s, 0, sizeof(float), stream));
  const int64_t groups = count / spec.group;
  const int64_t blocks = std::min<int64_t>((groups + kThreads - 1) / kThreads, kMaxReduceBlocks);
  launch(stream, {dim3(static_cast<unsigned>(blocks)), dim3(kThreads)}, largest_kernel,
         reinterpret_cast<unsigned*>(s), sigma, groups);
  launch(stream, {dim3(1), dim3(1)}, finish_master_scale_kernel, s, 0);
  with_group(spec.group, [&](auto group) {
    launch(stream, one_quad_a_thread(count), scale_codes_kernel<group>, wq, e, s, quads_of(codes),
           z, sigma, count / kPerThread, spec.bits);
  });
}

void launch_scale_codes_backward(cudaStream_t stream, float* dsigma, const float* dw,
                                 const uint8_t* codes, const uint8_t* z, int64_t count,
                                 GridSpec spec, bool accumulate) {
  with_group(spec.group, [&](auto group) {
    launch(stream, one_quad_a_thread(count), scale_codes_backward_kernel<group>, dsigma,
           quads_of(dw), quads_of(codes), z, count / kPerThread, accumulate);
  });
}

}  // namespace bbb::quant
