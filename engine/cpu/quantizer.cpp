// The quantizer's ops (numerics.md sections 1 and 2): quant/host.cpp over threads, a range of rows
// each.
#include <algorithm>
#include <vector>

#include "engine/cpu/cpu_backend.h"
#include "quant/host.h"

namespace bbb::engine {

namespace host = quant::host;

static int64_t row_grain(int64_t k) { return std::max<int64_t>(1, kElementGrain / k); }

template <typename T>
void CpuBackend<T>::do_master_scale(const Tensor& s, const Tensor& w, const GridSpec& spec) {
  const int64_t n = w.dim(0), k = w.dim(1), grain = row_grain(k);
  std::vector<T> parts(static_cast<size_t>((n + grain - 1) / grain), T(0));
  parallel_for(n, grain, [&](int64_t begin, int64_t end) {
    parts[static_cast<size_t>(begin / grain)] =
        host::largest_raw_scale(w.data<T>(), {begin, end}, k, spec);
  });
  T largest = 0;
  for (const T part : parts) largest = quant::max_or_nan(largest, part);
  *s.data<T>() = quant::master_scale_of(largest);
}

template <typename T>
void CpuBackend<T>::do_fake_quant(const Tensor& wq, const Tensor& e, const Tensor& z,
                                  const Tensor& w, const Tensor& s, const GridSpec& spec,
                                  Rounding rounding) {
  const int64_t k = w.dim(1);
  parallel_for(w.dim(0), row_grain(k), [&](int64_t begin, int64_t end) {
    host::fake_quant(wq.data<T>(), e.data<uint8_t>(), z.data<uint8_t>(), w.data<T>(), {begin, end},
                     k, *s.data<T>(), spec, rounding);
  });
}

template <typename T>
void CpuBackend<T>::do_ste_backward(const Tensor& dw, const Tensor& w, const Tensor& e,
                                    const Tensor& z, const Tensor& s, const GridSpec& spec) {
  const int64_t k = w.dim(1);
  parallel_for(w.dim(0), row_grain(k), [&](int64_t begin, int64_t end) {
    host::ste_backward(dw.data<T>(), w.data<T>(), e.data<uint8_t>(), z.data<uint8_t>(),
                       {begin, end}, k, *s.data<T>(), spec);
  });
}

template <typename T>
void CpuBackend<T>::do_quantize_codes(const Tensor& codes, const Tensor& w, const Tensor& e,
                                      const Tensor& z, const Tensor& s, const GridSpec& spec) {
  const int64_t k = w.dim(1);
  parallel_for(w.dim(0), row_grain(k), [&](int64_t begin, int64_t end) {
    host::quantize_codes(codes.data<uint8_t>(), w.data<T>(), e.data<uint8_t>(), z.data<uint8_t>(),
                         {begin, end}, k, *s.data<T>(), spec);
  });
}

template <typename T>
void CpuBackend<T>::do_scale_codes(const Tensor& wq, const Tensor& e, const Tensor& s,
                                   const Tensor& codes, const Tensor& z, const Tensor& sigma,
                                   const GridSpec& spec) {
  const int64_t k = codes.dim(1);
  *s.data<T>() = quant::master_scale_of(host::largest(sigma.data<T>(), sigma.numel()));
  parallel_for(codes.dim(0), row_grain(k), [&](int64_t begin, int64_t end) {
    host::scale_codes(wq.data<T>(), e.data<uint8_t>(), codes.data<uint8_t>(), z.data<uint8_t>(),
                      sigma.data<T>(), {begin, end}, k, *s.data<T>(), spec);
  });
}

template <typename T>
void CpuBackend<T>::do_scale_codes_backward(const Tensor& dsigma, const Tensor& dw,
                                            const Tensor& codes, const Tensor& z,
                                            const GridSpec& spec, Write mode) {
  const int64_t k = codes.dim(1);
  parallel_for(codes.dim(0), row_grain(k), [&](int64_t begin, int64_t end) {
    host::scale_codes_backward(dsigma.data<T>(), dw.data<T>(), codes.data<uint8_t>(),
                               z.data<uint8_t>(), {begin, end}, k, spec, mode == Write::Add);
  });
}

BBB_CPU_INSTANTIATE(do_master_scale, const Tensor&, const Tensor&, const GridSpec&);
BBB_CPU_INSTANTIATE(do_fake_quant, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                    const Tensor&, const GridSpec&, Rounding);
BBB_CPU_INSTANTIATE(do_ste_backward, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                    const Tensor&, const GridSpec&);
BBB_CPU_INSTANTIATE(do_quantize_codes, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                    const Tensor&, const GridSpec&);
BBB_CPU_INSTANTIATE(do_scale_codes, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                    const Tensor&, const Tensor&, const GridSpec&);
BBB_CPU_INSTANTIATE(do_scale_codes_backward, const Tensor&, const Tensor&, const Tensor&,
                    const Tensor&, const GridSpec&, Write);

}  // namespace bbb::engine
