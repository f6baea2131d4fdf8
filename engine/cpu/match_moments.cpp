// loss = weight mean_c ((mu - mu_y)^2 + (sigma - sigma_y)^2) over the channels of x (M, D), and
// dx = 2 weight / (M D) (mu - mu_y + (sigma - sigma_y) (x - mu) / sigma). mu = sum x / M and
// sigma^2 = sum x^2 / M - mu^2, in double, from the moments of both sides.
#include <algorithm>
#include <cmath>
#include <vector>

#include "engine/cpu/cpu_backend.h"

namespace bbb::engine {

template <typename T>
void CpuBackend<T>::do_match_moments(const Tensor& loss, const Tensor& dx, const Tensor& x,
                                     const Tensor& moments, const Tensor& target, double weight) {
  const int64_t rows = x.dim(0), d = x.dim(1);
  const auto m = static_cast<double>(rows);
  // dx = shift + slope (x - mean)
  std::vector<T> shift(static_cast<size_t>(d)), slope(shift), mean(shift);
  const double factor = 2 * weight / (m * static_cast<double>(d));
  const auto *const of_x = moments.data<double>(), *const of_y = target.data<double>();
  const auto deviation = [=](const double* sums, int64_t c) {
    const double mu = sums[c] / m;
    return std::sqrt(std::max(0.0, sums[d + c] / m - mu * mu));
  };
  double total = 0;
  for (int64_t c = 0; c < d; ++c) {
    const auto at = static_cast<size_t>(c);
    const double mu = of_x[c] / m, off = mu - of_y[c] / m;
    const double sigma = deviation(of_x, c), wide = sigma - deviation(of_y, c);
    total += off * off + wide * wide;
    shift[at] = static_cast<T>(factor * off);
    slope[at] = static_cast<T>(sigma > 0 ? factor * wide / sigma : 0.0);
    mean[at] = static_cast<T>(mu);
  }
  *data(loss) = static_cast<T>(weight * total / static_cast<double>(d));
  if (!dx.defined()) return;
  parallel_for(rows, row_grain(d), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t c = 0; c < d; ++c) {
        const auto at = static_cast<size_t>(c);
        data(dx)[i * d + c] = shift[at] + slope[at] * (data(x)[i * d + c] - mean[at]);
      }
  });
}

BBB_CPU_INSTANTIATE(match_moments);

}  // namespace bbb::engine
