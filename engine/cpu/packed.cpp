// Products with packed weights (format.md): quant/host.cpp, a range of rows per task.
#include <algorithm>

#include "engine/cpu/cpu_backend.h"
#include "quant/host.h"

namespace bbb::engine {

namespace host = quant::host;

template <typename T>
void CpuBackend<T>::do_repack(const Tensor& layout, const PackedWeight& file) {
  join_parts(*this, layout, file);
}

template <typename T>
void CpuBackend<T>::do_unpack(const Tensor& wq, const PackedWeight& w) {
  const quant::PackedView packed = joined_view(w);
  parallel_for(packed.n, std::max<int64_t>(1, kElementGrain / packed.k),
               [&](int64_t begin, int64_t end) {
                 host::unpack(wq.data<T>(), packed, {begin, end});
               });
}

template <typename T>
void CpuBackend<T>::do_packed_gemv(const Tensor& y, const Tensor& x, const PackedWeight& w,
                                   const Tensor& addend) {
  const quant::PackedView packed = joined_view(w);
  const int64_t m = x.dim(0);
  parallel_for(
      packed.n, std::max<int64_t>(1, kElementGrain / packed.k), [&](int64_t begin, int64_t end) {
        host::packed_gemv(y.data<T>(), x.data<T>(), packed, addend.data<T>(), {begin, end}, m);
      });
}

BBB_CPU_INSTANTIATE(repack);
BBB_CPU_INSTANTIATE(unpack);
BBB_CPU_INSTANTIATE(packed_gemv);

}  // namespace bbb::engine
