// loss[m] = log sum_v e^logits[m, v] - logits[m, target];  dlogits = scale (softmax - onehot).
// loss F32 (M); dlogits bf16 (M, V) or undefined; logits bf16 or F32 (M, V); targets I32 (M), where
// a negative one gives loss 0 and gradient 0.
//
// One block a row: one pass for the running maximum and sum, a second for the gradient, element by
// element, so that dlogits may be the buffer of bf16 logits. 6 bytes moved a bf16 logit.
#include "cuda/cuda_backend.h"
#include "cuda/softmax_row.h"

namespace bbb::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWide = 8;

template <int kWidth, typename T>
__global__ void cross_entropy_kernel(float* __restrict__ loss, bf16* dlogits, const T* logits,
                                     const int32_t* __restrict__ targets, int64_t v, float scale) {
  const int64_t m = blockIdx.x;
  const T* const row = logits + m * v;
  bf16* const drow = dlogits == nullptr ? nullptr : dlogits + m * v;
  const int32_t target = targets[m];
  if (target < 0) {
    if (threadIdx.x == 0) loss[m] = 0.0f;
    if (drow != nullptr) zero_row<kWidth>(drow, v);
    return;
  }
  const float target_logit = to_float(row[target]);  // before the gradient may overwrite it
  const ExpSum e = row_exp_sum<kWidth>(row, v);
  if (threadIdx.x == 0) loss[m] = e.max - target_logit + logf(e.sum);
  if (drow == nullptr) return;
  const float inv_sum = 1.0f / e.sum;
  for (int64_t i = int64_t{threadIdx.x} * kWidth; i < v; i += int64_t{kThreads} * kWidth) {
    float x[kWidth];
    load(x, row + i, kWidth);
#pragma unroll
    for (int j = 0; j < kWidth; ++j)
      x[j] = scale * (expf(x[j] - e.max) * inv_sum - (i + j == target ? 1.0f : 0.0f));
    store(drow + i, x, kWidth);
  }
}

template <typename T>
void cross_entropy_as(cudaStream_t stream, const Tensor& loss, const Tensor& dlogits,
                      const Tensor& logits, const Tensor& targets, double scale) {
  const int64_t rows = logits.dim(0), v = logits.dim(1);
  const bool wide = v % kWide == 0 && aligned(dlogits, logits);
  launch(stream, {blocks_for(rows, 1, 1), dim3(kThreads)},
         wide ? cross_entropy_kernel<kWide, T> : cross_entropy_kernel<1, T>, loss.data<float>(),
         bf16_of(dlogits), static_cast<const T*>(logits.raw()), targets.data<int32_t>(), v, scale);
}

}  // namespace

void CudaBackend::do_cross_entropy(const Tensor& loss, const Tensor& dlogits, const Tensor& logits,
                                   const Tensor& targets, double scale) {
  if (logits.dtype() == DType::BF16)
    return cross_entropy_as<bf16>(stream_, loss, dlogits, logits, targets, scale);
  cross_entropy_as<float>(stream_, loss, dlogits, logits, targets, scale);
}

}  // namespace bbb::cuda
