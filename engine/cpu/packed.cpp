// Products with packed weights (format.md): quant/host.cpp over threads, a range of rows each.
#include <algorithm>

#include "engine/cpu/cpu_backend.h"
#include "quant/host.h"

namespace bbb::engine {

namespace host = quant::host;

template <typename T>
static host::PackedRows rows_of(const PackedWeight& w) {
  const float master_scale = static_cast<float>(*w.master_scale.data<T>());  // exact
  return {w.qweight.data<uint8_t>(),
          w.scales.data<uint8_t>(),
          w.zeros.data<uint8_t>(),
          master_scale,
          w.k,
          w.spec};
}

template <typename T>
void CpuBackend<T>::do_unpack(const Tensor& wq, const PackedWeight& w) {
  const host::PackedRows packed = rows_of<T>(w);
  parallel_for(w.n, std::max<int64_t>(1, kElementGrain / w.k), [&](int64_t begin, int64_t end) {
    host::unpack(wq.data<T>(), packed, {begin, end});
  });
}

template <typename T>
void CpuBackend<T>::do_packed_gemv(const Tensor& y, const Tensor& x, const PackedWeight& w,
                                   const Tensor& addend) {
  const host::PackedRows packed = rows_of<T>(w);
  const int64_t m = x.dim(0);
  parallel_for(w.n, std::max<int64_t>(1, kElementGrain / w.k), [&](int64_t begin, int64_t end) {
    host::packed_gemv(y.data<T>(), x.data<T>(), packed, addend.data<T>(), {begin, end}, m, w.n);
  });
}

BBB_CPU_INSTANTIATE(do_unpack, const Tensor&, const PackedWeight&);
BBB_CPU_INSTANTIATE(do_packed_gemv, const Tensor&, const Tensor&, const PackedWeight&,
                    const Tensor&);

}  // namespace bbb::engine
