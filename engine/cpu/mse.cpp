// loss = mean((x - y)^2); dx = 2 (x - y) / numel.
//
// The ranges of a sum do not depend on the order of y's rows. A range within one row of y is read
// in place; a range that spans rows is first copied together.
#include <algorithm>
#include <array>

#include "engine/cpu/cpu_backend.h"
#include "engine/cpu/vector_math.h"

namespace bbb::engine {
namespace {

// Elements [begin, end) of the ordered rows of src, `row_numel` elements each: in place, or copied
// to `joined`.
template <typename T>
const T* ordered_range(const T* src, const int32_t* order, int64_t row_numel, int64_t begin,
                       int64_t end, T* joined) {
  const auto at = [=](int64_t i) { return src + order[i / row_numel] * row_numel + i % row_numel; };
  if (begin / row_numel == (end - 1) / row_numel) return at(begin);
  T* to = joined;
  for (int64_t i = begin; i < end;) {
    const int64_t count = std::min(end, (i / row_numel + 1) * row_numel) - i;
    to = std::copy_n(at(i), count, to);
    i += count;
  }
  return joined;
}

}  // namespace

template <typename T>
void CpuBackend<T>::do_mse(const Tensor& loss, const Tensor& dx, const Tensor& x, const Rows& y,
                           const Tensor&) {
  const T *a = data(x), *src = data(y.src);
  const int32_t* order = y.order.defined() ? order_of("mse", y, x.dim(0)) : nullptr;
  const int64_t row_numel = order == nullptr ? 0 : x.numel() / x.dim(0);
  T* grad = data(dx);
  const auto n = static_cast<double>(x.numel());
  const T twice = static_cast<T>(2.0 / n);
  const double total = ordered_sum(x.numel(), [=](int64_t begin, int64_t end) {
    std::array<T, kSumGrain> joined;
    const T* b = order == nullptr ? src + begin
                                  : ordered_range(src, order, row_numel, begin, end, joined.data());
    if (grad != nullptr)
      for (int64_t i = begin; i < end; ++i) grad[i] = twice * (a[i] - b[i - begin]);
    return lane_sum<double>(end - begin, [=](int64_t i) {
      const double error = static_cast<double>(a[begin + i]) - static_cast<double>(b[i]);
      return error * error;
    });
  });
  *data(loss) = static_cast<T>(total / n);
}

BBB_CPU_INSTANTIATE(mse);

}  // namespace bbb::engine
