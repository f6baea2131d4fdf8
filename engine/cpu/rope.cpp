// Rotary positions, in place, on x (B, T, H, d): the pair (x[i], x[i + d/2]) of every head is
// rotated by the angle (start[b] + t) * inv_freq[i], or by its negative for Rotation::Inverse, and
// multiplied by `factor`.
//
// Angles (row_ops.h) are computed once for all heads of a token, and where all sequences start at
// 0, once for all sequences too.
#include <algorithm>
#include <vector>

#include "engine/cpu/cpu_backend.h"
#include "engine/cpu/row_ops.h"

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
      rope_angles(cosine.data() + token * half, sine.data() + token * half, position, freq, half,
                  factor, sign);
    }
  });
  parallel_for(batch * time, row_grain(heads * d), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = row % tokens * half;
      rotate_row(data(x) + row * heads * d, cosine.data() + at, sine.data() + at, heads, half);
    }
  });
}

BBB_CPU_INSTANTIATE(rope);

}  // namespace bbb::engine
