// Rotary positions, in place, on x (B, T, H, d): the pair (x[i], x[i + d/2]) of every head is
// rotated by the angle (start + t) * inv_freq[i], or by its negative for Rotation::Inverse, which
// is the gradient.
//
// The angle is a product in T, as on the GPU. Its sine and cosine are computed in double, once per
// position, for all batch rows and heads.
#include <algorithm>
#include <cmath>
#include <vector>

#include "engine/cpu/cpu_backend.h"

namespace bbb::engine {

template <typename T>
void CpuBackend<T>::do_rope(const Tensor& x, const Tensor& inv_freq, const Tensor& start,
                            Rotation direction) {
  const int64_t batch = x.dim(0), time = x.dim(1), heads = x.dim(2), d = x.dim(3), half = d / 2;
  const int64_t first = start.defined() ? *start.data<int32_t>() : 0;
  const double sign = direction == Rotation::Forward ? 1.0 : -1.0;
  const float* freq = inv_freq.data<float>();
  std::vector<T> cosine(static_cast<size_t>(time * half)), sine(cosine.size());
  const int64_t angle_grain = std::max<int64_t>(1, 512 / std::max<int64_t>(1, half));
  parallel_for(time, angle_grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t i = 0; i < half; ++i) {
        const double angle = static_cast<T>(first + t) * static_cast<T>(freq[i]);
        const auto at = static_cast<size_t>(t * half + i);
        cosine[at] = static_cast<T>(std::cos(angle));
        sine[at] = static_cast<T>(sign * std::sin(angle));
      }
  });
  const int64_t grain = std::max<int64_t>(1, kElementGrain / std::max<int64_t>(1, heads * d));
  parallel_for(batch * time, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T *c = cosine.data() + row % time * half, *s = sine.data() + row % time * half;
      for (int64_t h = 0; h < heads; ++h) {
        T *low = data(x) + (row * heads + h) * d, *high = low + half;
        for (int64_t i = 0; i < half; ++i) {
          const T a = low[i], b = high[i];
          low[i] = a * c[i] - b * s[i];
          high[i] = b * c[i] + a * s[i];
        }
      }
    }
  });
}

BBB_CPU_INSTANTIATE(rope);

}  // namespace bbb::engine
