// r = 1 / sqrt(mean(x^2) + eps);  y = x r w.   x, y bf16 (M, D); r F32 (M), saved; w F32 (D).
// Backward: dx (+)= r (dy w - x r^2 mean(dy w x));  dw (+)= sum_m dy x r.
//
// Rows: a warp each up to kWarpColumns columns, else a block each; two passes over the row, the
// second out of the cache. dw: a block sums 32 lanes x kWidth columns over one chunk of rows, eight
// rows at a time, and writes a partial row; a second kernel adds the partials in order.
// 4 bytes moved an element forward; 6 backward, and 4 more for dw.
#include "cuda/cuda_backend.h"
#include "cuda/reduce.h"
#include "cuda/vector.h"

namespace bbb::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWide = 8;
constexpr int64_t kWarpColumns = 2048;
constexpr int kRowLanes = kThreads / 32;  // rows a dw block reads at once
constexpr int64_t kMinChunkRows = 64;
constexpr int64_t kMaxChunks = 128;

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

// dx may be the buffer of dy: a thread reads its elements before it writes them.
template <int kRowThreads, int kWidth>
__global__ void rms_norm_dx_kernel(bf16* dx, const bf16* dy, const bf16* __restrict__ x,
                                   const float* __restrict__ inv_rms, const float* __restrict__ w,
                                   int64_t rows, int64_t d, bool add) {
  const int64_t m = int64_t{blockIdx.x} * (kThreads / kRowThreads) + threadIdx.x / kRowThreads;
  if (m >= rows) return;
  const int64_t begin = threadIdx.x % kRowThreads * kWidth;
  const int64_t base = m * d;
  float v[kWidth], u[kWidth], g[kWidth];
  float sum = 0.0f;
  for (int64_t i = begin; i < d; i += kRowThreads * kWidth) {
    load(v, x + base + i, d - i);
    load(u, dy + base + i, d - i);
    load(g, w + i, d - i);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sum += u[j] * g[j] * v[j];
  }
  const float r = inv_rms[m];
  const float pull = r * r * (row_sum<kRowThreads>(sum) / static_cast<float>(d));
  for (int64_t i = begin; i < d; i += kRowThreads * kWidth) {
    load(v, x + base + i, d - i);
    load(u, dy + base + i, d - i);
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

// partials (chunks, D): the sum over rows [chunk * chunk_rows, ...) of dy x r.
template <int kWidth>
__global__ void rms_norm_dw_kernel(float* __restrict__ partials, const bf16* __restrict__ dy,
                                   const bf16* __restrict__ x, const float* __restrict__ inv_rms,
                                   int64_t rows, int64_t d, int64_t chunk_rows) {
  __shared__ float tile[kRowLanes][32 * kWidth];
  const int lane = threadIdx.x % 32, row_lane = threadIdx.x / 32;
  const int64_t column = int64_t{blockIdx.x} * 32 * kWidth + lane * kWidth;
  const int64_t chunk = blockIdx.y;
  const int64_t end = min(rows, (chunk + 1) * chunk_rows);
  float sum[kWidth] = {};
  if (column < d) {
    for (int64_t m = chunk * chunk_rows + row_lane; m < end; m += kRowLanes) {
      float v[kWidth], u[kWidth];
      load(v, x + m * d + column, d - column);
      load(u, dy + m * d + column, d - column);
      const float r = inv_rms[m];
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sum[j] += u[j] * v[j] * r;
    }
  }
#pragma unroll
  for (int j = 0; j < kWidth; ++j) tile[row_lane][lane * kWidth + j] = sum[j];
  __syncthreads();
  for (int i = threadIdx.x; i < 32 * kWidth; i += kThreads) {
    float total = 0.0f;
#pragma unroll
    for (int k = 0; k < kRowLanes; ++k) total += tile[k][i];
    const int64_t c = int64_t{blockIdx.x} * 32 * kWidth + i;
    if (c < d) partials[chunk * d + c] = total;
  }
}

__global__ void rms_norm_dw_finish_kernel(float* __restrict__ dw,
                                          const float* __restrict__ partials, int64_t chunks,
                                          int64_t d, bool add) {
  const int64_t c = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (c >= d) return;
  float sum = 0.0f;
  for (int64_t k = 0; k < chunks; ++k) sum += partials[k * d + c];
  dw[c] = add ? dw[c] + sum : sum;
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
  if (dw.defined()) {  // before dx, which may overwrite dy
    const int64_t chunk_rows = std::max(kMinChunkRows, (rows + kMaxChunks - 1) / kMaxChunks);
    const int64_t chunks = (rows + chunk_rows - 1) / chunk_rows;
    const Tensor partials = scratch(chunks * d * int64_t{sizeof(float)});
    dim3 grid = blocks_for(d, 32, wide ? kWide : 1);
    grid.y = static_cast<unsigned>(chunks);
    launch(stream_, {grid, dim3(kThreads)},
           wide ? rms_norm_dw_kernel<kWide> : rms_norm_dw_kernel<1>,
           static_cast<float*>(partials.raw()), bf16_of(dy), bf16_of(x), inv_rms.data<float>(),
           rows, d, chunk_rows);
    launch(stream_, {blocks_for(d, kThreads, 1), dim3(kThreads)}, rms_norm_dw_finish_kernel,
           dw.data<float>(), static_cast<const float*>(partials.raw()), chunks, d,
           dw_mode == Write::Add);
  }
  const auto kernel = pick(block_per_row, wide, rms_norm_dx_kernel<kThreads, kWide>,
                           rms_norm_dx_kernel<kThreads, 1>, rms_norm_dx_kernel<32, kWide>,
                           rms_norm_dx_kernel<32, 1>);
  launch(stream_, {blocks_for(rows, block_per_row ? 1 : kThreads / 32, 1), dim3(kThreads)}, kernel,
         bf16_of(dx), bf16_of(dy), bf16_of(x), inv_rms.data<float>(), w.data<float>(), rows, d,
         dx_mode == Write::Add);
}

}  // namespace bbb::cuda
