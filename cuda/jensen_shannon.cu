// loss[m] = beta KL(p||r) + (1 - beta) KL(q||r), r = beta p + (1 - beta) q;
// dlogits = scale (1 - beta) q (log(q / r) - KL(q||r)).
// p = softmax(teacher[m]), q = softmax(logits[m]). Shapes as kl_divergence. A negative target gives
// loss 0 and gradient 0.
//
// Three passes over a row: the maxima and sums of both inputs; the loss and KL(q||r); the gradient.
// The second and third read the L2 cache. dlogits may be the buffer of bf16 logits. 6 bytes moved a
// pair of bf16 logits.
//
// Over chunks of the vocabulary the passes are three kernels (4, 4 and 6 bytes a pair); the first
// is kl_divergence_chunk, whose state has the maxima and sums.
#include "cuda/divergence_row.h"

namespace bbb::cuda {
namespace {

constexpr int kThreads = kDivergenceThreads;
constexpr int kWide = kDivergenceWide;

// One row, by the whole block.
struct MixtureRow {
  LogSoftmax student, teacher;
  float beta;

  __device__ MixtureRow(const KlRow& row, float beta_)
      : student(row.student), teacher(row.teacher), beta(beta_) {}

  struct Word {
    float q, log_q_r, p, log_p_r;  // log(q / r) and log(p / r), 0 where the probability is 0
  };
  // log_top is log(max(p, q) / r). With d = log q - log p it is -log(beta + (1 - beta) e^d) if
  // d <= 0, and -log(beta e^-d + (1 - beta)) otherwise. No term overflows, and all are 0 if p = q.
  __device__ Word word(float s, float t) const {
    const float log_q = student(s), log_p = teacher(t), d = log_q - log_p;
    const float q = expf(log_q), p = expf(log_p);
    const float log_top = -log1pf((d > 0.0f ? beta : 1.0f - beta) * expm1f(-fabsf(d)));
    return {q, q == 0.0f ? 0.0f : log_top + fminf(d, 0.0f), p,
            p == 0.0f ? 0.0f : log_top - fmaxf(d, 0.0f)};
  }

  struct Sums {
    float loss = 0.0f, student_kl = 0.0f;
  };
  // The sums over the row, in every thread.
  template <int kWidth, typename T>
  __device__ Sums sums(const T* srow, const T* trow, int64_t v) const {
    __shared__ float shared[32];
    float student_kl = 0.0f, teacher_kl = 0.0f;
    for_logits<kWidth>(srow, trow, v, [&](int64_t, const auto& s, const auto& t) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const Word w = word(s[j], t[j]);
        student_kl += w.q * w.log_q_r;
        teacher_kl += w.p * w.log_p_r;
      }
    });
    student_kl = block_sum(student_kl, shared);
    teacher_kl = block_sum(teacher_kl, shared);
    return {beta * teacher_kl + (1.0f - beta) * student_kl, student_kl};
  }

  template <int kWidth, typename T>
  __device__ void gradient(bf16* drow, const T* srow, const T* trow, int64_t v, float student_kl,
                           float scale) const {
    const float factor = scale * (1.0f - beta);
    for_logits<kWidth>(srow, trow, v, [&](int64_t i, auto& s, const auto& t) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const Word w = word(s[j], t[j]);
        s[j] = factor * w.q * (w.log_q_r - student_kl);
      }
      store(drow + i, s, kWidth);
    });
  }
};

template <int kWidth, typename T>
__global__ __launch_bounds__(kThreads, 1) void jensen_shannon_kernel(
    float* __restrict__ loss, bf16* dlogits, const T* logits, const T* __restrict__ teacher,
    const int32_t* __restrict__ targets, int64_t v, float beta, float scale) {
  const int64_t m = blockIdx.x;
  const T* const srow = logits + m * v;
  const T* const trow = teacher + m * v;
  bf16* const drow = dlogits == nullptr ? nullptr : dlogits + m * v;
  if (targets[m] < 0) {
    if (threadIdx.x == 0) loss[m] = 0.0f;
    if (drow != nullptr) zero_row<kWidth>(drow, v);
    return;
  }
  const MixtureRow row(row_sums<kWidth>(srow, trow, v), beta);
  const MixtureRow::Sums sums = row.sums<kWidth>(srow, trow, v);
  if (threadIdx.x == 0) loss[m] = sums.loss;
  if (drow != nullptr) row.gradient<kWidth>(drow, srow, trow, v, sums.student_kl, scale);
}

template <int kWidth, typename T>
__global__ __launch_bounds__(kThreads, 1) void jensen_shannon_chunk_kernel(
    float* __restrict__ loss, float* __restrict__ student_kl, const T* __restrict__ logits,
    const T* __restrict__ teacher, const KlRow* __restrict__ state,
    const int32_t* __restrict__ targets, int64_t c, float beta, Write mode) {
  const int64_t m = blockIdx.x;
  MixtureRow::Sums sums;
  if (targets[m] >= 0)
    sums = MixtureRow(state[m], beta).sums<kWidth>(logits + m * c, teacher + m * c, c);
  if (threadIdx.x != 0) return;
  loss[m] = (mode == Write::Add ? loss[m] : 0.0f) + sums.loss;
  student_kl[m] = (mode == Write::Add ? student_kl[m] : 0.0f) + sums.student_kl;
}

template <int kWidth, typename T>
__global__ __launch_bounds__(kThreads, 1) void jensen_shannon_chunk_backward_kernel(
    bf16* dlogits, const T* logits, const T* __restrict__ teacher, const KlRow* __restrict__ state,
    const float* __restrict__ student_kl, const int32_t* __restrict__ targets, int64_t c,
    float beta, float scale) {
  const int64_t m = blockIdx.x;
  bf16* const drow = dlogits + m * c;
  if (targets[m] < 0) return zero_row<kWidth>(drow, c);
  MixtureRow(state[m], beta)
      .gradient<kWidth>(drow, logits + m * c, teacher + m * c, c, student_kl[m], scale);
}

template <typename T>
void jensen_shannon_as(cudaStream_t stream, const Tensor& loss, const Tensor& dlogits,
                       const Tensor& logits, const Tensor& teacher, const Tensor& targets,
                       double beta, double scale) {
  const int64_t rows = logits.dim(0), v = logits.dim(1);
  const bool wide = v % kWide == 0 && aligned(dlogits, logits, teacher);
  launch(stream, {blocks_for(rows, 1, 1), dim3(kThreads)},
         wide ? jensen_shannon_kernel<kWide, T> : jensen_shannon_kernel<1, T>, loss.data<float>(),
         bf16_of(dlogits), static_cast<const T*>(logits.raw()),
         static_cast<const T*>(teacher.raw()), targets.data<int32_t>(), v, beta, scale);
}

template <typename T>
void jensen_shannon_chunk_as(cudaStream_t stream, const Tensor& loss, const Tensor& student_kl,
                             const Tensor& logits, const Tensor& teacher, const Tensor& state,
                             const Tensor& targets, double beta, Write mode) {
  const int64_t rows = logits.dim(0), c = logits.dim(1);
  const bool wide = c % kWide == 0 && aligned(logits, teacher);
  launch(stream, {blocks_for(rows, 1, 1), dim3(kThreads)},
         wide ? jensen_shannon_chunk_kernel<kWide, T> : jensen_shannon_chunk_kernel<1, T>,
         loss.data<float>(), student_kl.data<float>(), static_cast<const T*>(logits.raw()),
         static_cast<const T*>(teacher.raw()), kl_rows(state), targets.data<int32_t>(), c, beta,
         mode);
}

template <typename T>
void jensen_shannon_chunk_backward_as(cudaStream_t stream, const Tensor& dlogits,
                                      const Tensor& logits, const Tensor& teacher,
                                      const Tensor& state, const Tensor& student_kl,
                                      const Tensor& targets, double beta, double scale) {
  const int64_t rows = logits.dim(0), c = logits.dim(1);
  const bool wide = c % kWide == 0 && aligned(dlogits, logits, teacher);
  launch(stream, {blocks_for(rows, 1, 1), dim3(kThreads)},
         wide ? jensen_shannon_chunk_backward_kernel<kWide, T>
              : jensen_shannon_chunk_backward_kernel<1, T>,
         bf16_of(dlogits), static_cast<const T*>(logits.raw()),
         static_cast<const T*>(teacher.raw()), kl_rows(state), student_kl.data<float>(),
         targets.data<int32_t>(), c, beta, scale);
}

}  // namespace

void CudaBackend::do_jensen_shannon(const Tensor& loss, const Tensor& dlogits, const Tensor& logits,
                                    const Tensor& teacher, const Tensor& targets, double beta,
                                    double scale) {
  with_elements(logits, [&]<typename T>(const T*) {
    jensen_shannon_as<T>(stream_, loss, dlogits, logits, teacher, targets, beta, scale);
  });
}

void CudaBackend::do_jensen_shannon_chunk(const Tensor& loss, const Tensor& student_kl,
                                          const Tensor& logits, const Tensor& teacher,
                                          const Tensor& state, const Tensor& targets, double beta,
                                          Write mode) {
  with_elements(logits, [&]<typename T>(const T*) {
    jensen_shannon_chunk_as<T>(stream_, loss, student_kl, logits, teacher, state, targets, beta,
                               mode);
  });
}

void CudaBackend::do_jensen_shannon_chunk_backward(const Tensor& dlogits, const Tensor& logits,
                                                   const Tensor& teacher, const Tensor& state,
                                                   const Tensor& student_kl, const Tensor& targets,
                                                   double beta, double scale) {
  with_elements(logits, [&]<typename T>(const T*) {
    jensen_shannon_chunk_backward_as<T>(stream_, dlogits, logits, teacher, state, student_kl,
                                        targets, beta, scale);
  });
}

}  // namespace bbb::cuda
