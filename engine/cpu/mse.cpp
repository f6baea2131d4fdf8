// loss = mean((x - y)^2); dx = 2 (x - y) / numel.
#include "engine/cpu/cpu_backend.h"
#include "engine/cpu/vector_math.h"

namespace bbb::engine {

template <typename T>
void CpuBackend<T>::do_mse(const Tensor& loss, const Tensor& dx, const Tensor& x, const Tensor& y) {
  const T *a = data(x), *b = data(y);
  T* grad = data(dx);
  const auto n = static_cast<double>(x.numel());
  const T twice = static_cast<T>(2.0 / n);
  const double total = ordered_sum(x.numel(), [=](int64_t begin, int64_t end) {
    if (grad != nullptr)
      for (int64_t i = begin; i < end; ++i) grad[i] = twice * (a[i] - b[i]);
    return lane_sum<double>(end - begin, [=](int64_t i) {
      const double error = static_cast<double>(a[begin + i]) - static_cast<double>(b[begin + i]);
      return error * error;
    });
  });
  *data(loss) = static_cast<T>(total / n);
}

BBB_CPU_INSTANTIATE(do_mse, const Tensor&, const Tensor&, const Tensor&, const Tensor&);

}  // namespace bbb::engine
