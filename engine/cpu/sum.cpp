// out (+)= scale * sum(x), added in double, in a fixed order.
#include "engine/cpu/cpu_backend.h"
#include "engine/cpu/vector_math.h"

namespace bbb::engine {

template <typename T>
void CpuBackend<T>::do_sum(const Tensor& out, const Tensor& x, double scale, Write mode,
                           const Tensor&) {
  const T* in = data(x);
  const double total = scale * ordered_sum(x.numel(), [=](int64_t begin, int64_t end) {
                         return lane_sum<double>(end - begin, [=](int64_t i) {
                           return static_cast<double>(in[begin + i]);
                         });
                       });
  T& to = *data(out);
  to = static_cast<T>(mode == Write::Add ? static_cast<double>(to) + total : total);
}

BBB_CPU_INSTANTIATE(sum);

}  // namespace bbb::engine
