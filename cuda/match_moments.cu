// loss = weight mean_c ((mu - mu_y)^2 + (sigma - sigma_y)^2) over the channels of x, and
// dx = 2 weight / (M D) (mu - mu_y + (sigma - sigma_y) (x - mu) / sigma).
// x, dx bf16 (M, D); loss F32 (1); the moments of x and y F64 (5, D).
//
// mu = sum x / M and sigma^2 = sum x^2 / M - mu^2, in F64. One block adds the loss, the threads'
// sums in order. Of dx, a thread takes one channel of kRows rows; 4 bytes moved an element.
#include "cuda/cuda_backend.h"
#include "cuda/vector.h"

namespace bbb::cuda {
namespace {

constexpr int kThreads = 256, kRows = 64;

struct Spread {
  double mean, deviation;
};

__device__ Spread spread_of(const double* sums, int64_t c, int64_t d, double rows) {
  const double mean = sums[c] / rows;
  return {mean, sqrt(fmax(0.0, sums[d + c] / rows - mean * mean))};
}

__global__ void __launch_bounds__(kThreads)
    moments_loss_kernel(float* __restrict__ loss, const double* __restrict__ moments,
                        const double* __restrict__ target, int64_t d, double rows, double scale) {
  __shared__ double sums[kThreads];
  double sum = 0;
  for (int64_t c = threadIdx.x; c < d; c += kThreads) {
    const Spread x = spread_of(moments, c, d, rows), y = spread_of(target, c, d, rows);
    const double off = x.mean - y.mean, wide = x.deviation - y.deviation;
    sum += off * off + wide * wide;
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double total = 0;
  for (int i = 0; i < kThreads; ++i) total += sums[i];
  *loss = static_cast<float>(scale * total);
}

__global__ void __launch_bounds__(kThreads)
    match_moments_kernel(bf16* __restrict__ dx, const bf16* __restrict__ x,
                         const double* __restrict__ moments, const double* __restrict__ target,
                         int64_t rows, int64_t d, double factor) {
  const int64_t c = int64_t{blockIdx.y} * kThreads + threadIdx.x;
  if (c >= d) return;
  const auto m = static_cast<double>(rows);
  const Spread of_x = spread_of(moments, c, d, m), of_y = spread_of(target, c, d, m);
  const auto shift = static_cast<float>(factor * (of_x.mean - of_y.mean));
  const auto slope = static_cast<float>(
      of_x.deviation > 0 ? factor * (of_x.deviation - of_y.deviation) / of_x.deviation : 0.0);
  const auto mean = static_cast<float>(of_x.mean);
  const int64_t begin = int64_t{blockIdx.x} * kRows, end = min(rows, begin + kRows);
  for (int64_t i = begin; i < end; ++i)
    from_float(dx[i * d + c], fmaf(slope, to_float(x[i * d + c]) - mean, shift));
}

}  // namespace

void CudaBackend::do_match_moments(const Tensor& loss, const Tensor& dx, const Tensor& x,
                                   const Tensor& moments, const Tensor& target, double weight) {
  const int64_t rows = x.dim(0), d = x.dim(1);
  const auto m = static_cast<double>(rows), channels = static_cast<double>(d);
  const double *const of_x = moments.data<double>(), *const of_y = target.data<double>();
  launch(stream_, {dim3(1), dim3(kThreads)}, moments_loss_kernel, loss.data<float>(), of_x, of_y, d,
         m, weight / channels);
  if (!dx.defined()) return;
  launch(stream_,
         {dim3(blocks_for(rows, 1, kRows).x, blocks_for(d, kThreads, 1).x), dim3(kThreads)},
         match_moments_kernel, bf16_of(dx), bf16_of(x), of_x, of_y, rows, d,
         2 * weight / (m * channels));
}

}  // namespace bbb::cuda
