// Losses over a row of V logits; a row is one task. With softmax(x)_v = e^(x_v - lse(x)):
//
//     cross_entropy  loss[m] = lse(logits) - logits[target];  dlogits = scale (softmax - onehot)
//     kl_divergence  loss[m] = sum p (log p - log q), p of the teacher, q of the logits;
//                    dlogits = scale (q - p)
//
// A row without a target (-1) gives loss 0 and gradient 0. dlogits may be the logits themselves.
#include <algorithm>
#include <cmath>

#include "engine/cpu/cpu_backend.h"
#include "engine/cpu/vector_math.h"

namespace bbb::engine {
namespace {

template <typename T>
T log_sum_exp(const T* x, int64_t n) {
  const T most = lane_max(x, n);
  const T shift = std::isfinite(most) ? most : T{0};
  return shift + std::log(lane_sum<T>(n, [=](int64_t i) { return vector_exp(x[i] - shift); }));
}

int64_t row_grain(int64_t vocabulary) {
  return std::max<int64_t>(1, kElementGrain / std::max<int64_t>(1, vocabulary));
}

}  // namespace

template <typename T>
void CpuBackend<T>::do_cross_entropy(const Tensor& loss, const Tensor& dlogits,
                                     const Tensor& logits, const Tensor& targets, double scale) {
  const int64_t rows = logits.dim(0), v = logits.dim(1);
  const T factor = static_cast<T>(scale);
  parallel_for(rows, row_grain(v), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const T* x = data(logits) + m * v;
      T* grad = dlogits.defined() ? data(dlogits) + m * v : nullptr;
      const int32_t target = targets.data<int32_t>()[m];
      BBB_CHECK(target < v, "cross_entropy: target ", target, " is not below ", v);
      if (target < 0) {
        data(loss)[m] = 0;
        if (grad != nullptr) std::fill_n(grad, v, T{0});
        continue;
      }
      const T lse = log_sum_exp(x, v);
      data(loss)[m] = lse - x[target];
      if (grad == nullptr) continue;
      for (int64_t i = 0; i < v; ++i) grad[i] = factor * vector_exp(x[i] - lse);
      grad[target] -= factor;
    }
  });
}

template <typename T>
void CpuBackend<T>::do_kl_divergence(const Tensor& loss, const Tensor& dlogits,
                                     const Tensor& logits, const Tensor& teacher,
                                     const Tensor& targets, double scale) {
  const int64_t rows = logits.dim(0), v = logits.dim(1);
  const T factor = static_cast<T>(scale);
  parallel_for(rows, row_grain(v), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const T *x = data(logits) + m * v, *y = data(teacher) + m * v;
      T* grad = dlogits.defined() ? data(dlogits) + m * v : nullptr;
      if (targets.data<int32_t>()[m] < 0) {
        data(loss)[m] = 0;
        if (grad != nullptr) std::fill_n(grad, v, T{0});
        continue;
      }
      const T lse_q = log_sum_exp(x, v), lse_p = log_sum_exp(y, v);
      data(loss)[m] = lane_sum<T>(v, [=](int64_t i) {
        const T p = vector_exp(y[i] - lse_p);
        const T term = p * ((y[i] - lse_p) - (x[i] - lse_q));
        return p == 0 ? T{0} : term;
      });
      if (grad == nullptr) continue;
      for (int64_t i = 0; i < v; ++i)
        grad[i] = factor * (vector_exp(x[i] - lse_q) - vector_exp(y[i] - lse_p));
    }
  });
}

BBB_CPU_INSTANTIATE(do_cross_entropy, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                    double);
BBB_CPU_INSTANTIATE(do_kl_divergence, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                    const Tensor&, double);

}  // namespace bbb::engine
