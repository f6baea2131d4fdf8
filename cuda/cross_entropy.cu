// loss[m] = log sum_v e^logits[m, v] - logits[m, target];  dlogits = scale (softmax - onehot).
// loss F32 (M); dlogits bf16 (M, V) or undefined; logits bf16 or F32 (M, V); targets I32 (M). A
// negative target gives loss 0 and gradient 0.
//
// One block a row: the first pass takes the running maximum and sum, the second the gradient,
// element by element, so that dlogits may be the buffer of bf16 logits. 6 bytes moved a bf16 logit.
//
// Over chunks of the vocabulary the two passes are two kernels. Between them a state holds every
// row's maximum, sum and target logit so far. 2 bytes moved a bf16 logit, then 4.
#include "cuda/cuda_backend.h"
#include "cuda/softmax_row.h"

namespace bbb::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWide = 8;

// The state of a row.
struct RunningRow {
  ExpSum e;
  float target_logit = -INFINITY;  // until the target's chunk
};
static_assert(sizeof(RunningRow) == engine::Backend::kCrossEntropyState * sizeof(float));

__device__ float loss_of(const ExpSum& e, float target_logit) {
  return e.max - target_logit + logf(e.sum);
}

// drow = scale (softmax - onehot) of row[0, v), by the whole block. `target` is relative to row[0]
// and may be outside of the row.
template <int kWidth, typename T>
__device__ void gradient_row(bf16* drow, const T* row, int64_t v, ExpSum e, int64_t target,
                             float scale) {
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
  if (threadIdx.x == 0) loss[m] = loss_of(e, target_logit);
  if (drow != nullptr) gradient_row<kWidth>(drow, row, v, e, target, scale);
}

template <int kWidth, typename T>
__global__ void cross_entropy_chunk_kernel(float* __restrict__ loss, RunningRow* __restrict__ state,
                                           const T* __restrict__ logits,
                                           const int32_t* __restrict__ targets, int64_t c,
                                           int64_t first_word, Write mode) {
  const int64_t m = blockIdx.x, target = targets[m];
  if (target < 0) {
    if (threadIdx.x == 0) loss[m] = 0.0f;
    return;
  }
  const T* const row = logits + m * c;
  const ExpSum e = row_exp_sum<kWidth>(row, c);
  if (threadIdx.x != 0) return;
  RunningRow running = mode == Write::Add ? state[m] : RunningRow{};
  running.e.merge(e.max, e.sum);
  const int64_t column = target - first_word;
  if (column >= 0 && column < c) running.target_logit = to_float(row[column]);
  state[m] = running;
  loss[m] = loss_of(running.e, running.target_logit);
}

template <int kWidth, typename T>
__global__ void cross_entropy_chunk_backward_kernel(bf16* dlogits, const T* logits,
                                                    const RunningRow* __restrict__ state,
                                                    const int32_t* __restrict__ targets, int64_t c,
                                                    int64_t first_word, float scale) {
  const int64_t m = blockIdx.x, target = targets[m];
  bf16* const drow = dlogits + m * c;
  if (target < 0) return zero_row<kWidth>(drow, c);
  gradient_row<kWidth>(drow, logits + m * c, c, state[m].e, target - first_word, scale);
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

RunningRow* running_rows(const Tensor& state) {
  return reinterpret_cast<RunningRow*>(state.data<float>());
}

template <typename T>
void cross_entropy_chunk_as(cudaStream_t stream, const Tensor& loss, const Tensor& state,
                            const Tensor& logits, const Tensor& targets, int64_t first_word,
                            Write mode) {
  const int64_t rows = logits.dim(0), c = logits.dim(1);
  const bool wide = c % kWide == 0 && aligned(logits);
  launch(stream, {blocks_for(rows, 1, 1), dim3(kThreads)},
         wide ? cross_entropy_chunk_kernel<kWide, T> : cross_entropy_chunk_kernel<1, T>,
         loss.data<float>(), running_rows(state), static_cast<const T*>(logits.raw()),
         targets.data<int32_t>(), c, first_word, mode);
}

template <typename T>
void cross_entropy_chunk_backward_as(cudaStream_t stream, const Tensor& dlogits,
                                     const Tensor& logits, const Tensor& state,
                                     const Tensor& targets, int64_t first_word, double scale) {
  const int64_t rows = logits.dim(0), c = logits.dim(1);
  const bool wide = c % kWide == 0 && aligned(dlogits, logits);
  launch(stream, {blocks_for(rows, 1, 1), dim3(kThreads)},
         wide ? cross_entropy_chunk_backward_kernel<kWide, T>
              : cross_entropy_chunk_backward_kernel<1, T>,
         bf16_of(dlogits), static_cast<const T*>(logits.raw()), running_rows(state),
         targets.data<int32_t>(), c, first_word, scale);
}

}  // namespace

void CudaBackend::do_cross_entropy(const Tensor& loss, const Tensor& dlogits, const Tensor& logits,
                                   const Tensor& targets, double scale) {
  with_elements(logits, [&]<typename T>(const T*) {
    cross_entropy_as<T>(stream_, loss, dlogits, logits, targets, scale);
  });
}

void CudaBackend::do_cross_entropy_chunk(const Tensor& loss, const Tensor& state,
                                         const Tensor& logits, const Tensor& targets,
                                         int64_t first_word, Write mode) {
  with_elements(logits, [&]<typename T>(const T*) {
    cross_entropy_chunk_as<T>(stream_, loss, state, logits, targets, first_word, mode);
  });
}

void CudaBackend::do_cross_entropy_chunk_backward(const Tensor& dlogits, const Tensor& logits,
                                                  const Tensor& state, const Tensor& targets,
                                                  int64_t first_word, double scale) {
  with_elements(logits, [&]<typename T>(const T*) {
    cross_entropy_chunk_backward_as<T>(stream_, dlogits, logits, state, targets, first_word, scale);
  });
}

}  // namespace bbb::cuda
