// One row, or one run of elements, of ops that the operands' ops contain, and scratch for it.
#pragma once

#include <cmath>
#include <vector>

#include "engine/backend.h"
#include "engine/cpu/vector_math.h"
#include "quant/host.h"

namespace bbb::engine {

// The first `size` elements of a buffer that a thread keeps between tasks, and that only grows.
template <typename T>
T* scratch(std::vector<T>& buffer, int64_t size) {
  if (buffer.size() < static_cast<size_t>(size)) buffer.resize(static_cast<size_t>(size));
  return buffer.data();
}

// out = in r weight with r = 1 / sqrt(mean(in^2) + eps), which is returned.
template <typename T>
T rms_norm_row(T* out, const T* in, const T* weight, int64_t d, T eps) {
  const T mean = lane_sum<T>(d, [=](int64_t i) { return in[i] * in[i]; }) / static_cast<T>(d);
  const T r = T{1} / std::sqrt(mean + eps);
  for (int64_t i = 0; i < d; ++i) out[i] = in[i] * r * weight[i];
  return r;
}

// Cosines and sines (d/2) of a position's angles, times `factor`. The angle is a product in T, as
// on the GPU; its sine and cosine are computed in double.
template <typename T>
void rope_angles(T* cosine, T* sine, int64_t position, const float* inv_freq, int64_t half,
                 double factor, double sign) {
  for (int64_t i = 0; i < half; ++i) {
    const double angle = static_cast<T>(position) * static_cast<T>(inv_freq[i]);
    cosine[i] = static_cast<T>(factor * std::cos(angle));
    sine[i] = static_cast<T>(sign * factor * std::sin(angle));
  }
}

// Rotates x (heads, d) by the angles of one position.
template <typename T>
void rotate_row(T* x, const T* cosine, const T* sine, int64_t heads, int64_t half) {
  for (int64_t h = 0; h < heads; ++h) {
    T *low = x + 2 * h * half, *high = low + half;
    for (int64_t i = 0; i < half; ++i) {
      const T a = low[i], b = high[i];
      low[i] = a * cosine[i] - b * sine[i];
      high[i] = b * cosine[i] + a * sine[i];
    }
  }
}

template <typename T>
quant::host::QuantizedRows<T> quantized_rows(const OperandRows& rows) {
  return {rows.codes.data<uint8_t>(), rows.zeros.data<uint8_t>(), rows.scales.data<T>()};
}

template <typename T>
void swiglu_run(T* out, const T* gate, const T* up, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const T s = T{1} / (T{1} + vector_exp(-gate[i]));
    out[i] = gate[i] * s * up[i];
  }
}

template <typename T>
void swiglu_backward_run(T* dgate, T* dup, const T* dh, const T* gate, const T* up, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const T grad = dh[i], x = gate[i], s = T{1} / (T{1} + vector_exp(-x));
    const T upward = up[i];
    dup[i] = grad * x * s;
    dgate[i] = grad * upward * s * (T{1} + x * (T{1} - s));
  }
}

}  // namespace bbb::engine
