// Moments of channels: moments += the sums over rows of x, x^2, x^3, x^4, and the largest |x|.
// x bf16 (M, K); moments F64 (5, K). NaN does not show in the largest |x|.
//
// A block takes kColumns channels of a chunk of rows: two neighbouring channels a lane, and each
// warp every kWarps-th row. The block adds its warps in order and writes a partial result; a second
// kernel adds the chunks in order. Chunks depend on the shape alone, so the sums are the same on
// every GPU. The powers of a bf16 are exact in F64. Bytes moved: 2 an element.
#include <algorithm>

#include "cuda/cuda_backend.h"
#include "cuda/vector.h"

namespace bbb::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kLaneColumns = 2;
constexpr int kColumns = 32 * kLaneColumns;
constexpr int kMoments = static_cast<int>(engine::Backend::kMoments);
constexpr int kMax = kMoments - 1;      // the moment that is a maximum
constexpr int64_t kBlocks = 1024;       // at most about so many; enough for any GPU
constexpr int64_t kMinChunkRows = 128;  // so that partial results are few

struct MomentChunks {
  MomentChunks(int64_t rows, int64_t k) : columns((k + kColumns - 1) / kColumns) {
    const int64_t most = std::max<int64_t>(1, kBlocks / std::max<int64_t>(1, columns));
    rows_each = std::max(kMinChunkRows, (rows + most - 1) / most);
    count = (rows + rows_each - 1) / rows_each;
  }

  int64_t columns;    // blocks along the channels
  int64_t rows_each;  // rows of a chunk
  int64_t count;      // chunks
};

__device__ __forceinline__ void combine(double& into, double value, int moment) {
  into = moment == kMax ? fmax(into, value) : into + value;
}

// partials (chunks, 5, K)
__global__ void __launch_bounds__(kThreads)
    moments_kernel(double* __restrict__ partials, const bf16* __restrict__ x, int64_t rows,
                   int64_t k, int64_t chunk_rows, bool paired) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t column = int64_t{blockIdx.x} * kColumns + lane * kLaneColumns;
  const int64_t begin = int64_t{blockIdx.y} * chunk_rows, end = min(rows, begin + chunk_rows);
  double sums[kMoments][kLaneColumns] = {};
  if (column < k) {
#pragma unroll 4
    for (int64_t row = begin + warp; row < end; row += kWarps) {
      const bf16* const from = x + row * k + column;
      float pair[kLaneColumns];
      load(pair, from, paired ? kLaneColumns : min(int64_t{1}, k - column));
      if (!paired && column + 1 < k) pair[1] = to_float(from[1]);
#pragma unroll
      for (int c = 0; c < kLaneColumns; ++c) {
        const double v = pair[c], square = v * v;
        sums[0][c] += v;
        sums[1][c] += square;
        sums[2][c] += square * v;
        sums[3][c] += square * square;
        sums[4][c] = fmax(sums[4][c], fabs(v));
      }
    }
  }
  __shared__ double parts[kWarps][kMoments][kColumns];
#pragma unroll
  for (int m = 0; m < kMoments; ++m)
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c) parts[warp][m][lane * kLaneColumns + c] = sums[m][c];
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kMoments * kColumns; i += kThreads) {
    const int m = i / kColumns, c = i % kColumns;
    const int64_t at = int64_t{blockIdx.x} * kColumns + c;
    if (at >= k) continue;
    double total = parts[0][m][c];
    for (int w = 1; w < kWarps; ++w) combine(total, parts[w][m][c], m);
    partials[(int64_t{blockIdx.y} * kMoments + m) * k + at] = total;
  }
}

// One thread a moment of a channel.
__global__ void __launch_bounds__(kThreads)
    finish_moments_kernel(double* __restrict__ moments, const double* __restrict__ partials,
                          int64_t k, int64_t chunks) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= kMoments * k) return;
  double total = moments[i];
  const int moment = static_cast<int>(i / k);
#pragma unroll 8
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    combine(total, partials[chunk * kMoments * k + i], moment);
  moments[i] = total;
}

}  // namespace

int64_t channel_moments_scratch_bytes(int64_t rows, int64_t k) {
  return MomentChunks(rows, k).count * kMoments * k * int64_t{sizeof(double)};
}

void CudaBackend::do_channel_moments(const Tensor& moments, const Tensor& x,
                                     const Tensor& scratch) {
  const int64_t rows = x.dim(0), k = x.dim(1);
  const MomentChunks chunks(rows, k);
  double* const partials = static_cast<double*>(scratch.raw());
  const bool paired = k % kLaneColumns == 0 && aligned(x);
  launch(stream_,
         {dim3(static_cast<unsigned>(chunks.columns), static_cast<unsigned>(chunks.count)),
          dim3(kThreads)},
         moments_kernel, partials, bf16_of(x), rows, k, chunks.rows_each, paired);
  launch(stream_, {blocks_for(kMoments * k, kThreads, 1), dim3(kThreads)}, finish_moments_kernel,
         moments.data<double>(), partials, k, chunks.count);
}

}  // namespace bbb::cuda
