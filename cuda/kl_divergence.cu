// loss[m] = sum_v p (log p - log q), p = softmax(teacher[m]), q = softmax(logits[m]);
// dlogits = scale (q - p).   loss F32 (M); dlogits bf16 (M, V) or undefined; logits, teacher bf16
// or F32 (M, V), both alike; targets I32 (M), where a negative one gives loss 0 and gradient 0.
//
// One block a row and an SM: a pass over both inputs for their maxima and sums, then one for the
// loss and the gradient. So few rows are under way at a time that the second pass reads them from
// the L2 cache. The loss is summed after both log sums are known: its terms are small where the two
// agree. dlogits may be the buffer of bf16 logits. 6 bytes moved a pair of bf16 logits.
#include "cuda/cuda_backend.h"
#include "cuda/reduce.h"
#include "cuda/softmax_row.h"

namespace bbb::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWide = 8;

template <int kWidth, typename T>
__global__ __launch_bounds__(kThreads, 1) void kl_divergence_kernel(
    float* __restrict__ loss, bf16* dlogits, const T* logits, const T* __restrict__ teacher,
    const int32_t* __restrict__ targets, int64_t v, float scale) {
  __shared__ float shared[32];
  const int64_t m = blockIdx.x;
  const T* const srow = logits + m * v;
  const T* const trow = teacher + m * v;
  bf16* const drow = dlogits == nullptr ? nullptr : dlogits + m * v;
  if (targets[m] < 0) {
    if (threadIdx.x == 0) loss[m] = 0.0f;
    if (drow != nullptr) zero_row<kWidth>(drow, v);
    return;
  }
  ExpSum es, et;
#pragma unroll 2
  for (int64_t i = int64_t{threadIdx.x} * kWidth; i < v; i += int64_t{kThreads} * kWidth) {
    float s[kWidth], t[kWidth];
    load(s, srow + i, kWidth);
    load(t, trow + i, kWidth);
    es.add(s);
    et.add(t);
  }
  es = block_exp_sum(es);
  et = block_exp_sum(et);
  const float log_sum_s = logf(es.sum), log_sum_t = logf(et.sum);
  float sum = 0.0f;
#pragma unroll 2
  for (int64_t i = int64_t{threadIdx.x} * kWidth; i < v; i += int64_t{kThreads} * kWidth) {
    float s[kWidth], t[kWidth];
    load(s, srow + i, kWidth);
    load(t, trow + i, kWidth);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const float log_q = s[j] - es.max - log_sum_s;
      const float log_p = t[j] - et.max - log_sum_t;
      const float p = expf(log_p);
      sum += p == 0.0f ? 0.0f : p * (log_p - log_q);  // 0 log 0 = 0, and NaN stays NaN
      s[j] = scale * (expf(log_q) - p);
    }
    if (drow != nullptr) store(drow + i, s, kWidth);
  }
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) loss[m] = sum;
}

template <typename T>
void kl_divergence_as(cudaStream_t stream, const Tensor& loss, const Tensor& dlogits,
                      const Tensor& logits, const Tensor& teacher, const Tensor& targets,
                      double scale) {
  const int64_t rows = logits.dim(0), v = logits.dim(1);
  const bool wide = v % kWide == 0 && aligned(dlogits, logits, teacher);
  launch(stream, {blocks_for(rows, 1, 1), dim3(kThreads)},
         wide ? kl_divergence_kernel<kWide, T> : kl_divergence_kernel<1, T>, loss.data<float>(),
         bf16_of(dlogits), static_cast<const T*>(logits.raw()),
         static_cast<const T*>(teacher.raw()), targets.data<int32_t>(), v, scale);
}

}  // namespace

void CudaBackend::do_kl_divergence(const Tensor& loss, const Tensor& dlogits, const Tensor& logits,
                                   const Tensor& teacher, const Tensor& targets, double scale) {
  if (logits.dtype() == DType::BF16)
    return kl_divergence_as<bf16>(stream_, loss, dlogits, logits, teacher, targets, scale);
  kl_divergence_as<float>(stream_, loss, dlogits, logits, teacher, targets, scale);
}

}  // namespace bbb::cuda
