// Shared by the losses between two rows of logits, s of the student and t of the teacher: their
// launch shape, the sums of both rows, and the state of a row over chunks of the vocabulary.
//
// One block a row, one block an SM at a time. Few rows are in flight, so a second pass over a row
// reads it from the L2 cache.
#pragma once

#include "cuda/cuda_backend.h"
#ifdef __CUDACC__
#include "cuda/reduce.h"
#include "cuda/softmax_row.h"

namespace bbb::cuda {

inline constexpr int kDivergenceThreads = 1024;
inline constexpr int kDivergenceWide = 8;

// The logarithm of a softmax whose sum is known.
struct LogSoftmax {
  float max, log_sum;

  __device__ explicit LogSoftmax(const ExpSum& e) : max(e.max), log_sum(logf(e.sum)) {}
  __device__ float operator()(float x) const { return x - max - log_sum; }
};

// What kl_divergence_chunk stores of a row.
struct KlRow {
  ExpSum student, teacher;
  float weighted = 0.0f;  // sum e^(t - teacher.max) (t - s)

  __device__ float loss() const {
    const float lse_difference = (teacher.max - student.max) + logf(teacher.sum / student.sum);
    return weighted / teacher.sum - lse_difference;
  }
};
static_assert(sizeof(KlRow) == engine::Backend::kKlState * sizeof(float));

inline KlRow* kl_rows(const Tensor& state) { return reinterpret_cast<KlRow*>(state.data<float>()); }

// Calls each(i, s, t) for every kWidth neighbouring logits of a row from i on, by the whole block.
template <int kWidth, typename T, typename Each>
__device__ void for_logits(const T* srow, const T* __restrict__ trow, int64_t v, const Each& each) {
#pragma unroll 2
  for (int64_t i = int64_t{threadIdx.x} * kWidth; i < v;
       i += int64_t{kDivergenceThreads} * kWidth) {
    float s[kWidth], t[kWidth];
    load(s, srow + i, kWidth);
    load(t, trow + i, kWidth);
    each(i, s, t);
  }
}

// The sums of both rows, without `weighted`.
template <int kWidth, typename T>
__device__ KlRow row_sums(const T* srow, const T* __restrict__ trow, int64_t v) {
  KlRow row;
  for_logits<kWidth>(srow, trow, v, [&](int64_t, const auto& s, const auto& t) {
    row.student.add(s);
    row.teacher.add(t);
  });
  row.student = block_exp_sum(row.student);
  row.teacher = block_exp_sum(row.teacher);
  return row;
}

}  // namespace bbb::cuda
#endif
