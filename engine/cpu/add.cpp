// out = a + b, elementwise; out may be a or b. y (M, N) += bias (N), row by row. x *= factor.
#include "engine/cpu/cpu_backend.h"

namespace bbb::engine {

template <typename T>
void CpuBackend<T>::do_add(const Tensor& out, const Tensor& a, const Tensor& b) {
  const T *x = data(a), *y = data(b);
  T* to = data(out);
  parallel_for(out.numel(), kElementGrain, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) to[i] = x[i] + y[i];
  });
}

template <typename T>
void CpuBackend<T>::do_add_bias(const Tensor& y, const Tensor& bias) {
  const int64_t n = y.dim(1);
  const T* b = data(bias);
  T* to = data(y);
  parallel_for(y.dim(0), row_grain(n), [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t i = 0; i < n; ++i) to[row * n + i] += b[i];
  });
}

template <typename T>
void CpuBackend<T>::do_scale(const Tensor& x, const Tensor& factor) {
  T* values = data(x);
  const T by = *data(factor);
  parallel_for(x.numel(), kElementGrain, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) values[i] *= by;
  });
}

BBB_CPU_INSTANTIATE(add);
BBB_CPU_INSTANTIATE(add_bias);
BBB_CPU_INSTANTIATE(scale);

}  // namespace bbb::engine
