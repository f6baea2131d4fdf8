// ds_k (+)= alpha / s_k sum_n w[n, k] dw[n, k], 0 where s_k is 0.   w bf16, dw bf16 or F32 (N, K);
// ds, s F32 (K); alpha F32 (1) or null (1).
//
// A block takes a chunk of rows of as many columns as a warp loads at once, a row a warp at a time,
// and writes one sum a column. A second kernel adds the chunks in order. Chunks depend on the shape
// alone, so the sums are the same on every GPU. 4 or 6 bytes moved an element.
#include "cuda/cuda_backend.h"
#include "cuda/reduce.h"
#include "cuda/vector.h"

namespace bbb::cuda {
namespace {

constexpr int kWarps = kSumThreads / 32;
constexpr int kWide = 8;
constexpr int64_t kBlocks = 1024;  // enough to fill a GPU

template <int kWidth, typename T>
__global__ void __launch_bounds__(kSumThreads)
    column_products_kernel(float* __restrict__ partials, const bf16* __restrict__ w,
                           const T* __restrict__ dw, int64_t rows, int64_t columns,
                           int64_t chunk_rows) {
  __shared__ float shared[kWarps][32 * kWidth];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = (int64_t{blockIdx.x} * 32 + lane) * kWidth;
  const int64_t begin = int64_t{blockIdx.y} * chunk_rows, end = min(rows, begin + chunk_rows);
  float sums[kWidth] = {};
  if (column < columns) {
#pragma unroll 4
    for (int64_t n = begin + warp; n < end; n += kWarps) {
      float weight[kWidth], gradient[kWidth];
      load(weight, w + n * columns + column, columns - column);
      load(gradient, dw + n * columns + column, columns - column);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sums[j] += weight[j] * gradient[j];
    }
  }
#pragma unroll
  for (int j = 0; j < kWidth; ++j) shared[warp][lane * kWidth + j] = sums[j];
  __syncthreads();
  for (int i = threadIdx.x; i < 32 * kWidth; i += kSumThreads) {
    const int64_t c = int64_t{blockIdx.x} * 32 * kWidth + i;
    if (c >= columns) return;
    float total = 0.0f;
#pragma unroll
    for (int k = 0; k < kWarps; ++k) total += shared[k][i];
    partials[blockIdx.y * columns + c] = total;
  }
}

__global__ void __launch_bounds__(kSumThreads)
    input_scale_gradient_kernel(float* __restrict__ ds, const float* __restrict__ s,
                                const float* __restrict__ alpha, const float* __restrict__ partials,
                                int64_t chunks, int64_t columns, bool add) {
  const float sum = chunk_sum(partials, chunks, columns);
  const int64_t c = int64_t{blockIdx.x} * 32 + threadIdx.x;
  if (threadIdx.x >= 32 || c >= columns) return;
  const float factor = alpha == nullptr ? 1.0f : *alpha;
  const float value = s[c] == 0.0f ? 0.0f : factor * sum / s[c];
  ds[c] = add ? ds[c] + value : value;
}

}  // namespace

// A block takes a stripe of 32 or 32 kWide columns, of a chunk of rows.
static int64_t stripes_of(int64_t columns, bool wide) {
  const int64_t width = 32 * (wide ? kWide : 1);
  return (columns + width - 1) / width;
}
static int64_t rows_of_chunk(int64_t rows, int64_t stripes) {
  return std::max<int64_t>(kWarps, (rows * stripes + kBlocks - 1) / kBlocks);
}

// Of partial sums, a row for each chunk; wide stripes make the most chunks.
int64_t input_scale_gradient_scratch_bytes(int64_t rows, int64_t columns) {
  const int64_t chunk_rows = rows_of_chunk(rows, stripes_of(columns, columns % kWide == 0));
  return (rows + chunk_rows - 1) / chunk_rows * columns * int64_t{sizeof(float)};
}

void CudaBackend::do_input_scale_gradient(const Tensor& ds, const Tensor& s, const Tensor& w,
                                          const Tensor& alpha, const Tensor& dw, Write mode,
                                          const Tensor& scratch) {
  const int64_t rows = w.dim(0), columns = w.dim(1);
  const bool wide = columns % kWide == 0 && aligned(w, dw);
  const int64_t stripes = stripes_of(columns, wide), chunk_rows = rows_of_chunk(rows, stripes);
  const int64_t chunks = (rows + chunk_rows - 1) / chunk_rows;
  with_elements(dw, [&]<typename T>(const T* gradient) {
    launch(stream_,
           {dim3(static_cast<unsigned>(stripes), static_cast<unsigned>(chunks)), dim3(kSumThreads)},
           wide ? column_products_kernel<kWide, T> : column_products_kernel<1, T>,
           static_cast<float*>(scratch.raw()), bf16_of(w), gradient, rows, columns, chunk_rows);
  });
  launch(stream_, {blocks_for(columns, 32, 1), dim3(kSumThreads)}, input_scale_gradient_kernel,
         ds.data<float>(), s.data<float>(), alpha.defined() ? alpha.data<float>() : nullptr,
         static_cast<const float*>(scratch.raw()), chunks, columns, mode == Write::Add);
}

}  // namespace bbb::cuda
