// Rotary positions, in place, on x (B, T, H, d): the pair (x[i], x[i + d/2]) of every head is
// rotated by the angle (start[b] + t) * inv_freq[i], or by its negative for Rotation::Inverse, and
// multiplied by `factor`.
//
// The angle is a product in T, as on the GPU. Its sine and cosine are computed in double, once for
// all heads of a token, and where all sequences start at 0, once for all sequences too.
#include <algorithm>
#include <cmath>
#include <vector>

#include "engine/cpu/cpu_backend.h"

namespace bbb::engine {

template <typename T>
void CpuBackend<T>::do_rope(const Tensor& x, const Tensor& inv_freq, const Tensor& start,
                            Rotation direction, double factor) {
  const int64_t batch = x.dim(0), time = x.dim(1), heads = x.dim(2), d = x.dim(3), half = d / 2;
  const int32_t* first = start.data<int32_t>();
  const int64_t tokens = first != nullptr ? batch * time : time;  // with their own angles
  const double sign = direction == Rotation::Forward ? 1.0 : -1.0;
  const float* freq = inv_freq.data<float>();
  std::vector<T> cosine(static_cast<size_t>(tokens * half)), sine(cosine.size());
  const int64_t angle_grain = std::max<int64_t>(1, 512 / std::max<int64_t>(1, half));
  parallel_for(tokens, angle_grain, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t position = token % time + (first != nullptr ? first[token / time] : 0);
      for (int64_t i = 0; i < half; ++i) {
        const double angle = static_cast<T>(position) * static_cast<T>(freq[i]);
        const auto at = static_cast<size_t>(token * half + i);
        cosine[at] = static_cast<T>(factor * std::cos(angle));
        sine[at] = static_cast<T>(sign * factor * std::sin(angle));
      }
    }
  });
  parallel_for(batch * time, row_grain(heads * d), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T *c = cosine.data() + row % tokens * half, *s = sine.data() + row % tokens * half;
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
