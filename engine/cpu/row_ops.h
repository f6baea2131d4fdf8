// One row, or one run of elements, of ops that the operands' ops contain.
#pragma once

#include <cmath>

#include "engine/backend.h"
#include "engine/cpu/vector_math.h"
#include "quant/host.h"

namespace bbb::engine {

// out = in r weight with r = 1 / sqrt(mean(in^2) + eps), which is returned.
template <typename T>
T rms_norm_row(T* out, const T* in, const T* weight, int64_t d, T eps) {
  const T mean = lane_sum<T>(d, [=](int64_t i) { return in[i] * in[i]; }) / static_cast<T>(d);
  const T r = T{1} / std::sqrt(mean + eps);
  for (int64_t i = 0; i < d; ++i) out[i] = in[i] * r * weight[i];
  return r;
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
