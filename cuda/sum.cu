// out (+)= scale * sum(x).   x F32, any shape; out F32 (1).
//
// The two stages of reduce.h, FP32 sums; x is read once.
#include "cuda/cuda_backend.h"
#include "cuda/reduce.h"
#include "cuda/vector.h"

namespace bbb::cuda {
namespace {

constexpr int kWide = 4;
constexpr int kInFlight = 4;  // loads of a thread, so that one kernel reads as fast as memory can
constexpr int kFinishThreads = 1024;

// One partial a block.
template <int kWidth>
__global__ void sum_kernel(float* __restrict__ partials, const float* __restrict__ x, int64_t n) {
  __shared__ float shared[32];
  const int64_t stride = int64_t{gridDim.x} * blockDim.x * kWidth;
  float sum = 0.0f;
  int64_t i = first_element<kWidth>();
  for (; i + (kInFlight - 1) * stride + kWidth <= n; i += kInFlight * stride) {
    float v[kInFlight][kWidth];
#pragma unroll
    for (int l = 0; l < kInFlight; ++l) load(v[l], x + i + l * stride, kWidth);
#pragma unroll
    for (int l = 0; l < kInFlight; ++l)
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sum += v[l][j];
  }
  for (; i < n; i += stride) {
    float v[kWidth];
    load(v, x + i, n - i);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sum += v[j];
  }
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// One block; thread t adds partials t, t + 1024, ...
__global__ void finish_sum_kernel(float* __restrict__ out, const float* __restrict__ partials,
                                  int64_t count, float scale, bool add) {
  __shared__ float shared[32];
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) sum += partials[i];
  sum = block_sum(sum, shared) * scale;
  if (threadIdx.x == 0) out[0] = add ? out[0] + sum : sum;
}

}  // namespace

void finish_sum(cudaStream_t stream, float* out, const float* partials, int64_t count, double scale,
                Write mode) {
  launch(stream, {dim3(1), dim3(kFinishThreads)}, finish_sum_kernel, out, partials, count, scale,
         mode == Write::Add);
}

void CudaBackend::do_sum(const Tensor& out, const Tensor& x, double scale, Write mode,
                         const Tensor& scratch) {
  float* const partials = static_cast<float*>(scratch.raw());
  const int64_t n = x.numel();
  const bool wide = aligned(x);
  const int64_t count = partials_for(n, wide ? kWide : 1);
  launch(stream_, {dim3(static_cast<unsigned>(count)), dim3(kSumThreads)},
         wide ? sum_kernel<kWide> : sum_kernel<1>, partials, x.data<float>(), n);
  finish_sum(stream_, out.data<float>(), partials, count, scale, mode);
}

}  // namespace bbb::cuda
