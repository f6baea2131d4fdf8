// loss = mean((x - y)^2), dx = 2 (x - y) / numel.   x, y, dx bf16, any shape; loss F32 (1).
//
// One pass reads x and y and writes dx (6 bytes an element, 4 without dx) with a partial sum a
// block; finish_sum adds those in order. Eight neighbouring elements a thread and step.
#include "cuda/cuda_backend.h"
#include "cuda/reduce.h"
#include "cuda/vector.h"

namespace bbb::cuda {
namespace {

constexpr int kWide = 8;

template <int kWidth>
__global__ void mse_kernel(float* __restrict__ partials, bf16* __restrict__ dx,
                           const bf16* __restrict__ x, const bf16* __restrict__ y, int64_t n,
                           float scale) {
  __shared__ float shared[32];
  const int64_t stride = int64_t{gridDim.x} * blockDim.x * kWidth;
  float sum = 0.0f;
  for (int64_t i = first_element<kWidth>(); i < n; i += stride) {
    float a[kWidth], b[kWidth];
    load(a, x + i, n - i);
    load(b, y + i, n - i);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const float d = a[j] - b[j];
      sum += d * d;
      a[j] = scale * d;
    }
    if (dx != nullptr) store(dx + i, a, n - i);
  }
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

}  // namespace

void CudaBackend::do_mse(const Tensor& loss, const Tensor& dx, const Tensor& x, const Tensor& y) {
  const int64_t n = x.numel();
  const bool wide = aligned(dx, x, y);
  const int64_t count = partials_for(n, wide ? kWide : 1);
  const Tensor scratch_partials = scratch(count * int64_t{sizeof(float)});
  float* const partials = static_cast<float*>(scratch_partials.raw());
  launch(stream_, {dim3(static_cast<unsigned>(count)), dim3(kSumThreads)},
         wide ? mse_kernel<kWide> : mse_kernel<1>, partials, bf16_of(dx), bf16_of(x), bf16_of(y), n,
         2.0 / static_cast<double>(n));
  finish_sum(stream_, loss.data<float>(), partials, count, 1.0 / static_cast<double>(n),
             Write::Overwrite);
}

}  // namespace bbb::cuda
