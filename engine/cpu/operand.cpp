// The operands of linears and the statistics of their channels: quant/host.cpp, a range of rows per
// task.
#include <algorithm>
#include <cmath>

#include "engine/cpu/cpu_backend.h"
#include "quant/host.h"

namespace bbb::engine {

namespace host = quant::host;

template <typename T>
static host::QuantizedRows<T> quantized(const OperandRows& rows) {
  return {rows.codes.data<uint8_t>(), rows.zeros.data<uint8_t>(), rows.scales.data<T>()};
}

static int64_t row_grain(int64_t k) { return std::max<int64_t>(1, kElementGrain / k); }

template <typename T>
void CpuBackend<T>::do_operand(const OperandRows& out, const Tensor& x, const OperandSpec& spec) {
  parallel_for(x.dim(0), row_grain(spec.view.stored_k), [&](int64_t begin, int64_t end) {
    host::operand(out.x.data<T>(), out.clipped.data<uint8_t>(), quantized<T>(out), x.data<T>(),
                  {begin, end}, spec.view, spec.rounding);
  });
}

template <typename T>
void CpuBackend<T>::do_rms_norm_operand(const OperandRows& out, const Tensor& inv_rms,
                                        const Tensor& x, const Tensor& w, double eps,
                                        const OperandSpec& spec) {
  const Tensor normed = empty(x.shape(), act());
  do_rms_norm(normed, inv_rms, x, w, eps);
  do_operand(out, normed, spec);
}

template <typename T>
void CpuBackend<T>::do_swiglu_operand(const OperandRows& out, const Tensor& gate, const Tensor& up,
                                      const OperandSpec& spec) {
  const Tensor h = empty(gate.shape(), act());
  do_swiglu(h, gate, up);
  do_operand(out, h, spec);
}

template <typename T>
void CpuBackend<T>::do_operand_backward(const Tensor& dx, const Tensor& dout, const Tensor& clipped,
                                        const OperandSpec& spec) {
  parallel_for(dx.dim(0), row_grain(spec.view.stored_k), [&](int64_t begin, int64_t end) {
    host::operand_backward(dx.data<T>(), dout.data<T>(), clipped.data<uint8_t>(), {begin, end},
                           spec.view);
  });
}

template <typename T>
void CpuBackend<T>::do_swiglu_operand_backward(const Tensor& dgate, const Tensor& dup,
                                               const Tensor& dout, const Tensor& clipped,
                                               const Tensor& gate, const Tensor& up,
                                               const OperandSpec& spec) {
  const Tensor dh = empty(gate.shape(), act());
  do_operand_backward(dh, dout, clipped, spec);
  do_swiglu_backward(dgate, dup, dh, gate, up);
}

// A thread takes a range of channels and walks the rows in order.
template <typename T>
void CpuBackend<T>::do_channel_moments(const Tensor& moments, const Tensor& x, const Tensor&) {
  const int64_t rows = x.dim(0), k = x.dim(1);
  auto* const sums = moments.data<double>();
  const T* const values = x.data<T>();
  parallel_for(k, 64, [=](int64_t begin, int64_t end) {
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t c = begin; c < end; ++c) {
        const auto v = static_cast<double>(values[row * k + c]);
        sums[c] += v;
        sums[k + c] += v * v;
        sums[2 * k + c] += v * v * v;
        sums[3 * k + c] += v * v * (v * v);
        sums[4 * k + c] = std::max(sums[4 * k + c], std::abs(v));
      }
  });
}

template <typename T>
void CpuBackend<T>::do_quantized_gemv(const Tensor& y, const OperandRows& x, const PackedWeight& w,
                                      const Tensor& addend) {
  const quant::PackedView packed = w.view();
  parallel_for(packed.n, row_grain(packed.k), [&](int64_t begin, int64_t end) {
    host::packed_gemv(y.data<T>(), quantized<T>(x), packed, addend.data<T>(), {begin, end},
                      x.codes.dim(0));
  });
}

BBB_CPU_INSTANTIATE(operand);
BBB_CPU_INSTANTIATE(rms_norm_operand);
BBB_CPU_INSTANTIATE(swiglu_operand);
BBB_CPU_INSTANTIATE(operand_backward);
BBB_CPU_INSTANTIATE(swiglu_operand_backward);
BBB_CPU_INSTANTIATE(channel_moments);
BBB_CPU_INSTANTIATE(quantized_gemv);

}  // namespace bbb::engine
