// The operands of linears and the statistics of their channels: quant/host.cpp, a range of rows per
// task.
#include <algorithm>
#include <cmath>

#include "engine/cpu/cpu_backend.h"
#include "engine/cpu/row_ops.h"
#include "quant/host.h"

namespace bbb::engine {

namespace host = quant::host;

// Operands of rows that make_row(T* row, int64_t index) computes, one at a time: a scratch of all
// rows would be memory that a plan does not see.
template <typename T, typename MakeRow>
static void operand_of_rows(const OperandRows& out, host::Rows rows, const OperandSpec& spec,
                            const MakeRow& make_row) {
  const int64_t columns = spec.view.stored_k, groups = columns / spec.view.group;
  const auto from = [](auto* data, int64_t offset) {
    return data == nullptr ? data : data + offset;
  };
  std::vector<T> x(static_cast<size_t>(spec.view.k));
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    make_row(x.data(), row);
    const host::QuantizedRows<T> codes{from(out.codes.data<uint8_t>(), row * columns),
                                       from(out.zeros.data<uint8_t>(), row * groups),
                                       from(out.scales.data<T>(), row * groups)};
    host::operand(from(out.x.data<T>(), row * columns),
                  from(out.clipped.data<uint8_t>(), row * columns / 8), codes, x.data(), {0, 1},
                  spec.view, spec.rounding);
  }
}

template <typename T>
void CpuBackend<T>::do_operand(const OperandRows& out, const Tensor& x, const OperandSpec& spec) {
  parallel_for(x.dim(0), row_grain(spec.view.stored_k), [&](int64_t begin, int64_t end) {
    host::operand(out.x.data<T>(), out.clipped.data<uint8_t>(), quantized_rows<T>(out), x.data<T>(),
                  {begin, end}, spec.view, spec.rounding);
  });
}

template <typename T>
void CpuBackend<T>::do_rms_norm_operand(const OperandRows& out, const Tensor& inv_rms,
                                        const Tensor& x, const Tensor& w, double eps,
                                        const OperandSpec& spec) {
  const int64_t d = x.dim(1);
  parallel_for(x.dim(0), row_grain(d), [&](int64_t begin, int64_t end) {
    operand_of_rows<T>(out, {begin, end}, spec, [&](T* normed, int64_t row) {
      inv_rms.data<T>()[row] =
          rms_norm_row(normed, x.data<T>() + row * d, w.data<T>(), d, static_cast<T>(eps));
    });
  });
}

template <typename T>
void CpuBackend<T>::do_swiglu_operand(const OperandRows& out, const Tensor& gate, const Tensor& up,
                                      const OperandSpec& spec) {
  const int64_t k = gate.dim(1);
  parallel_for(gate.dim(0), row_grain(k), [&](int64_t begin, int64_t end) {
    operand_of_rows<T>(out, {begin, end}, spec, [&](T* h, int64_t row) {
      swiglu_run(h, gate.data<T>() + row * k, up.data<T>() + row * k, k);
    });
  });
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
  const int64_t k = spec.view.k, columns = spec.view.stored_k;
  parallel_for(gate.dim(0), row_grain(columns), [&](int64_t begin, int64_t end) {
    std::vector<T> dh(static_cast<size_t>(k));
    for (int64_t row = begin; row < end; ++row) {
      const uint8_t* bits = clipped.data<uint8_t>();
      host::operand_backward(dh.data(), dout.data<T>() + row * columns,
                             bits == nullptr ? nullptr : bits + row * columns / 8, {0, 1},
                             spec.view);
      const int64_t at = row * k;
      swiglu_backward_run(dgate.data<T>() + at, dup.data<T>() + at, dh.data(), gate.data<T>() + at,
                          up.data<T>() + at, k);
    }
  });
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

BBB_CPU_INSTANTIATE(operand);
BBB_CPU_INSTANTIATE(rms_norm_operand);
BBB_CPU_INSTANTIATE(swiglu_operand);
BBB_CPU_INSTANTIATE(operand_backward);
BBB_CPU_INSTANTIATE(swiglu_operand_backward);
BBB_CPU_INSTANTIATE(channel_moments);

}  // namespace bbb::engine
