// r = 1 / sqrt(mean(x^2) + eps);  y = x r w.   x, y bf16 (M, D); r F32 (M), saved; w F32 (D).
// Backward: dx (+)= r (dy w - x r^2 mean(dy w x));  dw (+)= sum_m dy x r.   dw bf16 or F32 (D).
//
// Rows: a warp each up to kWarpColumns columns, else a block each; two passes over the row, the
// second out of the cache. Backward, a block walks through a chunk of rows and keeps its share of
// dw in shared memory, a sum for every warp that has rows of its own; a second kernel adds the
// blocks' partial sums in order. Chunks depend on the shape alone, so that runs repeat on any GPU.
// 4 bytes moved an element forward, 6 backward.
#include "cuda/cuda_backend.h"
#include "cuda/reduce.h"
#include "cuda/vector.h"

namespace bbb::cuda {
namespace {

constexpr int kThreads = kSumThreads;
constexpr int kWide = 8;
constexpr int64_t kWarpColumns = 2048;
constexpr int64_t kMinChunkRows = 8;
constexpr int64_t kMaxChunks = 512;  // enough blocks to fill a GPU

// Sum over the threads that share a row: a warp, or the whole block.
template <int kRowThreads>
__device__ float row_sum(float x) {
  if constexpr (kRowThreads == 32) return warp_sum(x);
  __shared__ float shared[32];
  return block_sum(x, shared);
}

template <int kRowThreads, int kWidth>
__global__ void rms_norm_kernel(bf16* __restrict__ y, float* __restrict__ inv_rms,
                                const bf16* __restrict__ x, const float* __restrict__ w,
                                int64_t rows, int64_t d, float eps) {
  const int64_t m = int64_t{blockIdx.x} * (kThreads / kRowThreads) + threadIdx.x / kRowThreads;
  if (m >= rows) return;  // whole warps leave, whole blocks never do
  const int64_t begin = threadIdx.x % kRowThreads * kWidth;
  const bf16* const row = x + m * d;
  float v[kWidth], g[kWidth];
  float sum = 0.0f;
  for (int64_t i = begin; i < d; i += kRowThreads * kWidth) {
    load(v, row + i, d - i);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sum += v[j] * v[j];
  }
  const float r = 1.0f / sqrtf(row_sum<kRowThreads>(sum) / static_cast<float>(d) + eps);
  for (int64_t i = begin; i < d; i += kRowThreads * kWidth) {
    load(v, row + i, d - i);
    load(g, w + i, d - i);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) v[j] = v[j] * r * g[j];
    store(y + m * d + i, v, d - i);
  }
  if (begin == 0) inv_rms[m] = r;
}

// dx may be the buffer of dy: a thread reads its elements before it writes them. Null: not wanted.
// partials (chunks, D): the sum over rows [chunk * chunk_rows, ...) of dy x r; null: not wanted.
template <int kRowThreads, int kWidth>
__global__ void rms_norm_backward_kernel(bf16* dx, float* __restrict__ partials, const bf16* dy,
                                         const bf16* __restrict__ x,
                                         const float* __restrict__ inv_rms,
                                         const float* __restrict__ w, int64_t rows, int64_t d,
                                         int64_t chunk_rows, bool add) {
  constexpr int kLanes = kThreads / kRowThreads;  // rows at once
  extern __shared__ float4 dynamic[];
  float* const sums =
      reinterpret_cast<float*>(dynamic);  // (kLanes, D), each thread its own columns
  const int row_lane = threadIdx.x / kRowThreads;
  float* const own = sums + row_lane * d;
  const int64_t begin = threadIdx.x % kRowThreads * kWidth;
  const int64_t end = min(rows, (int64_t{blockIdx.x} + 1) * chunk_rows);
  float v[kWidth], u[kWidth], g[kWidth];
  if (partials != nullptr) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) v[j] = 0.0f;
    for (int64_t i = begin; i < d; i += kRowThreads * kWidth) store(own + i, v, d - i);
  }
  for (int64_t m = int64_t{blockIdx.x} * chunk_rows + row_lane; m < end; m += kLanes) {
    const int64_t base = m * d;
    const float r = inv_rms[m];
    float pull = 0.0f;
    if (dx != nullptr) {
      float sum = 0.0f;
      for (int64_t i = begin; i < d; i += kRowThreads * kWidth) {
        load(v, x + base + i, d - i);
        load(u, dy + base + i, d - i);
        load(g, w + i, d - i);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) sum += u[j] * g[j] * v[j];
      }
      pull = r * r * (row_sum<kRowThreads>(sum) / static_cast<float>(d));
    }
    for (int64_t i = begin; i < d; i += kRowThreads * kWidth) {
      load(v, x + base + i, d - i);
      load(u, dy + base + i, d - i);
      if (partials != nullptr) {
        load(g, own + i, d - i);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) g[j] += u[j] * v[j] * r;
        store(own + i, g, d - i);
      }
      if (dx == nullptr) continue;
      load(g, w + i, d - i);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) u[j] = r * (u[j] * g[j] - v[j] * pull);
      if (add) {
        load(v, dx + base + i, d - i);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) u[j] += v[j];
      }
      store(dx + base + i, u, d - i);
    }
  }
  if (partials == nullptr) return;
  __syncthreads();
  for (int64_t c = threadIdx.x; c < d; c += kThreads) {
    float total = 0.0f;
#pragma unroll
    for (int k = 0; k < kLanes; ++k) total += sums[k * d + c];
    partials[blockIdx.x * d + c] = total;
  }
}

// dw (+)= the sum of `chunks` partial rows.
template <typename T>
__global__ void rms_norm_dw_kernel(T* __restrict__ dw, const float* __restrict__ partials,
                                   int64_t chunks, int64_t d, bool add) {
  const float sum = chunk_sum(partials, chunks, d);
  const int64_t c = int64_t{blockIdx.x} * 32 + threadIdx.x;
  if (threadIdx.x < 32 && c < d) from_float(dw[c], add ? to_float(dw[c]) + sum : sum);
}

// The kernel for (whole block or warp a row, wide or not), in that order of tables.
template <typename Kernel>
Kernel pick(bool block_per_row, bool wide, Kernel block_wide, Kernel block_narrow, Kernel warp_wide,
            Kernel warp_narrow) {
  if (block_per_row) return wide ? block_wide : block_narrow;
  return wide ? warp_wide : warp_narrow;
}

}  // namespace

void CudaBackend::do_rms_norm(const Tensor& y, const Tensor& inv_rms, const Tensor& x,
                              const Tensor& w, double eps) {
  const int64_t d = w.numel(), rows = inv_rms.numel();
  const bool block_per_row = d > kWarpColumns;
  const bool wide = d % kWide == 0 && aligned(y, x, w);
  const auto kernel =
      pick(block_per_row, wide, rms_norm_kernel<kThreads, kWide>, rms_norm_kernel<kThreads, 1>,
           rms_norm_kernel<32, kWide>, rms_norm_kernel<32, 1>);
  launch(stream_, {blocks_for(rows, block_per_row ? 1 : kThreads / 32, 1), dim3(kThreads)}, kernel,
         bf16_of(y), inv_rms.data<float>(), bf16_of(x), w.data<float>(), rows, d, eps);
}

void CudaBackend::do_rms_norm_backward(const Tensor& dx, const Tensor& dw, const Tensor& dy,
                                       const Tensor& x, const Tensor& inv_rms, const Tensor& w,
                                       Write dx_mode, Write dw_mode) {
  const int64_t d = w.numel(), rows = inv_rms.numel();
  const bool block_per_row = d > kWarpColumns;
  const bool wide = d % kWide == 0 && aligned(dx, dy, x, w);
  const int64_t chunk_rows = std::max(kMinChunkRows, (rows + kMaxChunks - 1) / kMaxChunks);
  const int64_t chunks = (rows + chunk_rows - 1) / chunk_rows;
  const int64_t lanes = block_per_row ? 1 : kThreads / 32;
  const bool want_dw = dw.defined();
  const Tensor partials = want_dw ? scratch(chunks * d * int64_t{sizeof(float)}) : Tensor();
  const auto kernel = pick(block_per_row, wide, rms_norm_backward_kernel<kThreads, kWide>,
                           rms_norm_backward_kernel<kThreads, 1>,
                           rms_norm_backward_kernel<32, kWide>, rms_norm_backward_kernel<32, 1>);
  launch(
      stream_,
      {blocks_for(chunks, 1, 1), dim3(kThreads), want_dw ? lanes * d * int64_t{sizeof(float)} : 0},
      kernel, bf16_of(dx), static_cast<float*>(partials.raw()), bf16_of(dy), bf16_of(x),
      inv_rms.data<float>(), w.data<float>(), rows, d, chunk_rows, dx_mode == Write::Add);
  if (!want_dw) return;
  with_elements(dw, [&]<typename T>(T* gradient) {
    launch(stream_, {blocks_for(d, 32, 1), dim3(kThreads)}, rms_norm_dw_kernel<T>, gradient,
           static_cast<const float*>(partials.raw()), chunks, d, dw_mode == Write::Add);
  });
}

}  // namespace bbb::cuda
