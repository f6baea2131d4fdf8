// loss[m] = sum_v p (log p - log q), p = softmax(teacher[m]), q = softmax(logits[m]);
// dlogits = scale (q - p).   loss F32 (M); dlogits bf16 (M, V) or undefined; logits, teacher bf16
// or F32 (M, V), both of one dtype; targets I32 (M). A negative target gives loss 0 and gradient 0.
//
// One block a row, one block an SM at a time. The first pass reads both inputs for their maxima and
// sums, the second computes loss and gradient. Few rows are in flight, so the second pass reads
// them from the L2 cache. The loss is summed after both log sums are known: its terms are small
// where the two agree. dlogits may be the buffer of bf16 logits. 6 bytes moved a pair of bf16
// logits.
//
// Over chunks of the vocabulary the two passes are two kernels (4 and 6 bytes a pair), with a state
// of every row between them. The loss then has to come from the first:
//     loss = E_p[t - s] - (lse(t) - lse(s)),   of teacher t and student s.
// Where the two agree this cancels no more than the terms above. lse(t) - lse(s) is computed as the
// difference of maxima and log(sum / sum): no large logarithm is rounded, so its error is an
// epsilon of 1 + |t - s|. The mean has the same error; t - s itself has the error of its logits.
#include "cuda/divergence_row.h"

namespace bbb::cuda {
namespace {

constexpr int kThreads = kDivergenceThreads;
constexpr int kWide = kDivergenceWide;

// Returns this thread's part of a row's loss; writes drow = scale (q - p) unless drow is null.
template <int kWidth, typename T>
__device__ float loss_and_gradient_row(bf16* drow, const T* srow, const T* __restrict__ trow,
                                       int64_t v, ExpSum es, ExpSum et, float scale) {
  const LogSoftmax student(es), teacher(et);
  float sum = 0.0f;
  for_logits<kWidth>(srow, trow, v, [&](int64_t i, auto& s, const auto& t) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const float log_q = student(s[j]), log_p = teacher(t[j]);
      const float p = expf(log_p);
      sum += p == 0.0f ? 0.0f : p * (log_p - log_q);  // 0 log 0 = 0, and NaN stays NaN
      s[j] = scale * (expf(log_q) - p);
    }
    if (drow != nullptr) store(drow + i, s, kWidth);
  });
  return sum;
}

// Converts a sum of terms e^(t - from) (t - s) to one of terms e^(t - to) (t - s). Words whose
// probability underflows add nothing, even where the student's logit is -Inf.
__device__ float rescaled(float weighted, float from, float to) {
  if (from == to) return weighted;  // where both are -Inf, too
  const float factor = expf(from - to);
  return factor == 0.0f ? 0.0f : weighted * factor;
}

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
  const KlRow sums = row_sums<kWidth>(srow, trow, v);
  const float sum = block_sum(
      loss_and_gradient_row<kWidth>(drow, srow, trow, v, sums.student, sums.teacher, scale),
      shared);
  if (threadIdx.x == 0) loss[m] = sum;
}

template <int kWidth, typename T>
__global__ __launch_bounds__(kThreads, 1) void kl_divergence_chunk_kernel(
    float* __restrict__ loss, KlRow* __restrict__ state, const T* __restrict__ logits,
    const T* __restrict__ teacher, const int32_t* __restrict__ targets, int64_t c, Write mode) {
  __shared__ float shared[32];
  const int64_t m = blockIdx.x;
  if (targets[m] < 0) {
    if (threadIdx.x == 0) loss[m] = 0.0f;
    return;
  }
  KlRow own;
  for_logits<kWidth>(
      logits + m * c, teacher + m * c, c, [&](int64_t, const auto& s, const auto& t) {
        own.student.add(s);
        const float before = own.teacher.max;
        float part = 0.0f;
        const float top = own.teacher.add(t, [&](int j, float weight) {
          part += weight == 0.0f ? 0.0f : weight * (t[j] - s[j]);
        });
        own.weighted =
            rescaled(own.weighted, before, own.teacher.max) + rescaled(part, top, own.teacher.max);
      });
  const ExpSum es = block_exp_sum(own.student), et = block_exp_sum(own.teacher);
  const float weighted = block_sum(rescaled(own.weighted, own.teacher.max, et.max), shared);
  if (threadIdx.x != 0) return;
  KlRow row = mode == Write::Add ? state[m] : KlRow{};
  const float before = row.teacher.max;
  row.student.merge(es.max, es.sum);
  row.teacher.merge(et.max, et.sum);
  row.weighted =
      rescaled(row.weighted, before, row.teacher.max) + rescaled(weighted, et.max, row.teacher.max);
  state[m] = row;
  loss[m] = row.loss();
}

template <int kWidth, typename T>
__global__ __launch_bounds__(kThreads, 1) void kl_divergence_chunk_backward_kernel(
    bf16* dlogits, const T* logits, const T* __restrict__ teacher, const KlRow* __restrict__ state,
    const int32_t* __restrict__ targets, int64_t c, float scale) {
  const int64_t m = blockIdx.x;
  bf16* const drow = dlogits + m * c;
  if (targets[m] < 0) return zero_row<kWidth>(drow, c);
  loss_and_gradient_row<kWidth>(drow, logits + m * c, teacher + m * c, c, state[m].student,
                                state[m].teacher, scale);
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

template <typename T>
void kl_divergence_chunk_as(cudaStream_t stream, const Tensor& loss, const Tensor& state,
                            const Tensor& logits, const Tensor& teacher, const Tensor& targets,
                            Write mode) {
  const int64_t rows = logits.dim(0), c = logits.dim(1);
  const bool wide = c % kWide == 0 && aligned(logits, teacher);
  launch(stream, {blocks_for(rows, 1, 1), dim3(kThreads)},
         wide ? kl_divergence_chunk_kernel<kWide, T> : kl_divergence_chunk_kernel<1, T>,
         loss.data<float>(), kl_rows(state), static_cast<const T*>(logits.raw()),
         static_cast<const T*>(teacher.raw()), targets.data<int32_t>(), c, mode);
}

template <typename T>
void kl_divergence_chunk_backward_as(cudaStream_t stream, const Tensor& dlogits,
                                     const Tensor& logits, const Tensor& teacher,
                                     const Tensor& state, const Tensor& targets, double scale) {
  const int64_t rows = logits.dim(0), c = logits.dim(1);
  const bool wide = c % kWide == 0 && aligned(dlogits, logits, teacher);
  launch(stream, {blocks_for(rows, 1, 1), dim3(kThreads)},
         wide ? kl_divergence_chunk_backward_kernel<kWide, T>
              : kl_divergence_chunk_backward_kernel<1, T>,
         bf16_of(dlogits), static_cast<const T*>(logits.raw()),
         static_cast<const T*>(teacher.raw()), kl_rows(state), targets.data<int32_t>(), c, scale);
}

}  // namespace

void CudaBackend::do_kl_divergence(const Tensor& loss, const Tensor& dlogits, const Tensor& logits,
                                   const Tensor& teacher, const Tensor& targets, double scale) {
  with_elements(logits, [&]<typename T>(const T*) {
    kl_divergence_as<T>(stream_, loss, dlogits, logits, teacher, targets, scale);
  });
}

void CudaBackend::do_kl_divergence_chunk(const Tensor& loss, const Tensor& state,
                                         const Tensor& logits, const Tensor& teacher,
                                         const Tensor& targets, Write mode) {
  with_elements(logits, [&]<typename T>(const T*) {
    kl_divergence_chunk_as<T>(stream_, loss, state, logits, teacher, targets, mode);
  });
}

void CudaBackend::do_kl_divergence_chunk_backward(const Tensor& dlogits, const Tensor& logits,
                                                  const Tensor& teacher, const Tensor& state,
                                                  const Tensor& targets, double scale) {
  with_elements(logits, [&]<typename T>(const T*) {
    kl_divergence_chunk_backward_as<T>(stream_, dlogits, logits, teacher, state, targets, scale);
  });
}

}  // namespace bbb::cuda
