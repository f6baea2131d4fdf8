// w = base + alpha a b, and da = alpha dw b^T, db = alpha a^T dw with dw 0 where clipped.
// w, base F32 (N, K); a F32 (N, R); b F32 (R, K); dw, da, db bf16 or F32.
//
// w: a thread takes one column of kRows rows, so that a value of b is read once for all of them; 8
// bytes moved an element. Compiled without contraction, in the order of the CPU: equal bits.
// da: a block takes a row of dw, kRanks sums a thread. db: a block takes kThreads columns of a
// chunk of rows and writes one sum a column and rank; a second kernel adds the chunks in order.
// Chunks depend on the shape alone, so the sums are the same on every GPU. Each reads dw once for
// every kRanks ranks.
#include <algorithm>

#include "cuda/cuda_backend.h"
#include "cuda/reduce.h"
#include "cuda/vector.h"

namespace bbb::cuda {
namespace {

constexpr int kRows = 8, kRanks = 8;
constexpr int kThreads = kSumThreads;
constexpr int64_t kBlocks = 1024;      // enough to fill a GPU
constexpr int64_t kMinChunkRows = 16;  // so that partial sums are few

__global__ void __launch_bounds__(kThreads)
    lora_weight_kernel(float* __restrict__ w, const float* __restrict__ base,
                       const float* __restrict__ a, const float* __restrict__ b, int64_t n,
                       int64_t k, int64_t rank, float alpha) {
  const int64_t column = int64_t{blockIdx.y} * kThreads + threadIdx.x;
  const int64_t first = int64_t{blockIdx.x} * kRows;
  if (column >= k) return;
  float sums[kRows] = {};
  for (int64_t r = 0; r < rank; ++r) {
    const float right = b[r * k + column];
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      if (first + i < n) sums[i] += a[(first + i) * rank + r] * right;
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int64_t at = (first + i) * k + column;
    if (first + i < n) w[at] = base[at] + alpha * sums[i];
  }
}

template <typename T>
__device__ float gradient_at(const T* dw, const uint8_t* clipped, int64_t i) {
  return clipped != nullptr && (clipped[i / 8] >> (i % 8) & 1) ? 0.0f : to_float(dw[i]);
}

// A block a row.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    lora_rows_kernel(T* __restrict__ da, const T* __restrict__ dw,
                     const uint8_t* __restrict__ clipped, const float* __restrict__ b, int64_t k,
                     int64_t rank, float alpha) {
  __shared__ float shared[32];
  const int64_t row = blockIdx.x;
  for (int64_t first = 0; first < rank; first += kRanks) {
    float sums[kRanks] = {};
    for (int64_t column = threadIdx.x; column < k; column += kThreads) {
      const float g = gradient_at(dw, clipped, row * k + column);
#pragma unroll
      for (int j = 0; j < kRanks; ++j)
        if (first + j < rank) sums[j] = fmaf(g, b[(first + j) * k + column], sums[j]);
    }
#pragma unroll
    for (int j = 0; j < kRanks; ++j) {
      const float total = block_sum(sums[j], shared);
      if (threadIdx.x == 0 && first + j < rank)
        from_float(da[row * rank + first + j], alpha * total);
    }
  }
}

// partials (chunks, R, K)
template <typename T>
__global__ void __launch_bounds__(kThreads)
    lora_columns_kernel(float* __restrict__ partials, const T* __restrict__ dw,
                        const uint8_t* __restrict__ clipped, const float* __restrict__ a,
                        int64_t rows, int64_t k, int64_t rank, int64_t chunk_rows) {
  const int64_t column = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t begin = int64_t{blockIdx.y} * chunk_rows, end = min(rows, begin + chunk_rows);
  if (column >= k) return;
  for (int64_t first = 0; first < rank; first += kRanks) {
    float sums[kRanks] = {};
#pragma unroll 4
    for (int64_t n = begin; n < end; ++n) {
      const float g = gradient_at(dw, clipped, n * k + column);
#pragma unroll
      for (int j = 0; j < kRanks; ++j)
        if (first + j < rank) sums[j] = fmaf(g, a[n * rank + first + j], sums[j]);
    }
#pragma unroll
    for (int j = 0; j < kRanks; ++j)
      if (first + j < rank) partials[(blockIdx.y * rank + first + j) * k + column] = sums[j];
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    finish_columns_kernel(T* __restrict__ db, const float* __restrict__ partials, int64_t chunks,
                          int64_t count, float alpha) {
  const float sum = chunk_sum(partials, chunks, count);
  const int64_t i = int64_t{blockIdx.x} * 32 + threadIdx.x;
  if (threadIdx.x < 32 && i < count) from_float(db[i], alpha * sum);
}

int64_t rows_of_chunk(int64_t rows, int64_t k) {
  const int64_t stripes = (k + kThreads - 1) / kThreads;
  return std::max(kMinChunkRows, (rows * stripes + kBlocks - 1) / kBlocks);
}

}  // namespace

int64_t lora_weight_backward_scratch_bytes(int64_t rows, int64_t k, int64_t rank) {
  const int64_t chunk_rows = rows_of_chunk(rows, k);
  return (rows + chunk_rows - 1) / chunk_rows * rank * k * int64_t{sizeof(float)};
}

void CudaBackend::do_lora_weight(const Tensor& w, const Tensor& base, const Tensor& a,
                                 const Tensor& b, double alpha) {
  const int64_t n = w.dim(0), k = w.dim(1);
  launch(stream_, {dim3(blocks_for(n, 1, kRows).x, blocks_for(k, kThreads, 1).x), dim3(kThreads)},
         lora_weight_kernel, w.data<float>(), base.data<float>(), a.data<float>(), b.data<float>(),
         n, k, a.dim(1), static_cast<float>(alpha));
}

void CudaBackend::do_lora_weight_backward(const Tensor& da, const Tensor& db, const Tensor& dw,
                                          const Tensor& clipped, const Tensor& a, const Tensor& b,
                                          double alpha, const Tensor& scratch) {
  const int64_t rows = dw.dim(0), k = dw.dim(1), rank = a.dim(1);
  const int64_t chunk_rows = rows_of_chunk(rows, k), chunks = (rows + chunk_rows - 1) / chunk_rows;
  const auto* const mask = clipped.data<uint8_t>();
  auto* const partials = static_cast<float*>(scratch.raw());
  with_elements(dw, [&]<typename T>(const T* gradient) {
    launch(stream_, {dim3(static_cast<unsigned>(rows)), dim3(kThreads)}, lora_rows_kernel<T>,
           static_cast<T*>(da.raw()), gradient, mask, b.data<float>(), k, rank,
           static_cast<float>(alpha));
    launch(stream_,
           {dim3(blocks_for(k, kThreads, 1).x, static_cast<unsigned>(chunks)), dim3(kThreads)},
           lora_columns_kernel<T>, partials, gradient, mask, a.data<float>(), rows, k, rank,
           chunk_rows);
    launch(stream_, {blocks_for(rank * k, 32, 1), dim3(kThreads)}, finish_columns_kernel<T>,
           static_cast<T*>(db.raw()), partials, chunks, rank * k, static_cast<float>(alpha));
  });
}

}  // namespace bbb::cuda
