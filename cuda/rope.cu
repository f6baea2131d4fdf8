// Rotary positions, halves layout, in place: for the pair (a, b) = (x[i], x[i + d/2]) of a head at
// position p = start[b] + t, with angle p inv_freq[i],
//     a' = f (a cos - b sin),   b' = f (b cos + a sin)        (backward: the same with -sin).
// x bf16 (B, T, H, d); inv_freq F32 (d/2); start I32 (B) or nullptr for 0.
//
// A block takes kTokens tokens. Its threads first write the rotation of each (token, i) to shared
// memory, then walk the pairs of all heads, up to eight neighbouring pairs a thread and step.
// 4 bytes moved an element.
#include "cuda/cuda_backend.h"
#include "cuda/early_start.h"
#include "cuda/rotation.h"
#include "cuda/vector.h"

namespace bbb::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kTokens = 4;
constexpr int kWide = 8;

template <int kWidth>
__global__ void rope_kernel(bf16* __restrict__ x, const float* __restrict__ inv_freq,
                            const int32_t* __restrict__ start, int64_t tokens, int64_t t_count,
                            int64_t heads, int64_t half, float sign, float factor) {
  extern __shared__ float2 rotations[];  // (kTokens, d/2)
  start_next_kernel();
  wait_for_previous_kernel();
  const int64_t first = int64_t{blockIdx.x} * kTokens;
  const int64_t count = min(kTokens, tokens - first);
  for (int64_t j = threadIdx.x; j < count * half; j += kThreads) {
    const int64_t token = first + j / half;
    const int64_t begin = start == nullptr ? 0 : load_past_l1(start + token / t_count);
    rotations[j] = rotation(begin + token % t_count, inv_freq[j % half], sign, factor);
  }
  __syncthreads();

  const int64_t chunks = half / kWidth;  // of a head
  for (int64_t j = threadIdx.x; j < count * heads * chunks; j += kThreads) {
    const int64_t i = j % chunks * kWidth;
    const int64_t row = j / chunks;  // (token, head)
    bf16* const low = x + (first * heads + row) * 2 * half + i;
    const float2* const r = rotations + row / heads * half + i;
    float a[kWidth], b[kWidth];
    load_past_l1(a, low, kWidth);
    load_past_l1(b, low + half, kWidth);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) rotate(a[k], b[k], r[k]);
    store(low, a, kWidth);
    store(low + half, b, kWidth);
  }
}

}  // namespace

void CudaBackend::do_rope(const Tensor& x, const Tensor& inv_freq, const Tensor& start,
                          Rotation direction, double factor) {
  const int64_t t_count = x.dim(1), heads = x.dim(2), half = x.dim(3) / 2;
  const int64_t tokens = x.dim(0) * t_count;
  const bool wide = half % kWide == 0 && aligned(x);
  const int64_t smem_bytes = kTokens * half * int64_t{sizeof(float2)};
  launch(stream_,
         {blocks_for(tokens, kTokens, 1), dim3(kThreads), smem_bytes, starts_early(tokens)},
         wide ? rope_kernel<kWide> : rope_kernel<1>, bf16_of(x), inv_freq.data<float>(),
         start.defined() ? start.data<int32_t>() : nullptr, tokens, t_count, heads, half,
         direction == Rotation::Forward ? 1.0f : -1.0f, static_cast<float>(factor));
}

}  // namespace bbb::cuda
