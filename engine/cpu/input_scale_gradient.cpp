// ds_k (+)= alpha / s_k sum_n w[n, k] dw[n, k], 0 where s_k is 0. Shapes w, dw (N, K); ds, s (K).
//
// With h = s . x and y = h W^^T: dW^[n, k] = sum_m dy[m, n] s_k x[m, k], so that sum_n W^ dW^ is
// s_k sum_m dh[m, k] x[m, k] = s_k ds_k. A task takes 64 columns and adds the rows in order.
#include <algorithm>

#include "engine/cpu/cpu_backend.h"

namespace bbb::engine {

template <typename T>
void CpuBackend<T>::do_input_scale_gradient(const Tensor& ds, const Tensor& s, const Tensor& w,
                                            const Tensor& alpha, const Tensor& dw, Write mode,
                                            const Tensor&) {
  constexpr int64_t kColumns = 64;
  const int64_t rows = w.dim(0), columns = w.dim(1);
  const T factor = alpha.defined() ? *data(alpha) : T{1};
  parallel_for(columns, kColumns, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kColumns) {
      const int64_t count = std::min(kColumns, end - first);
      T sums[kColumns] = {};
      for (int64_t n = 0; n < rows; ++n) {
        const T *weight = data(w) + n * columns + first, *gradient = data(dw) + n * columns + first;
        for (int64_t i = 0; i < count; ++i) sums[i] += weight[i] * gradient[i];
      }
      for (int64_t i = 0; i < count; ++i) {
        const T scale = data(s)[first + i];
        const T value = scale == T{0} ? T{0} : factor * sums[i] / scale;
        T& out = data(ds)[first + i];
        out = mode == Write::Add ? out + value : value;
      }
    }
  });
}

BBB_CPU_INSTANTIATE(input_scale_gradient);

}  // namespace bbb::engine
