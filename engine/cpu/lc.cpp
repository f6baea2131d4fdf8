// LC (quant/lc.h): quant/host_lc.cpp, a few row blocks or rows per task.
#include <algorithm>
#include <vector>

#include "engine/cpu/cpu_backend.h"
#include "quant/host_lc.h"

namespace bbb::engine {

namespace host = quant::host;

template <typename T>
static host::LcMatrix<T> matrix_of(const LcWeight& from) {
  return {from.latent.data<T>(), nullptr,
          from.u.data<T>(),      from.v.data<T>(),
          from.map.data<T>(),    from.latent.dim(0),
          from.latent.dim(1),    from.rule};
}

template <typename T>
void CpuBackend<T>::do_lc_weight(const Tensor& w, const LcWeight& from) {
  const host::LcMatrix<T> matrix = matrix_of<T>(from);
  parallel_for(matrix.n / quant::lc_block(matrix.n), 1, [&](int64_t begin, int64_t end) {
    host::lc_weight(data(w), matrix, {begin, end});
  });
}

template <typename T>
void CpuBackend<T>::do_lc_weight_backward(const Tensor& dlatent, const Tensor& dv,
                                          const Tensor& dmap, const Tensor& dw, const Tensor& w,
                                          const LcWeight& from, Write dmap_mode, const Tensor&) {
  const host::LcMatrix<T> matrix = matrix_of<T>(from);
  const int64_t blocks = matrix.n / quant::lc_block(matrix.n);
  std::vector<T> maps(dmap.defined() ? static_cast<size_t>(blocks * quant::kLcMapSize) : 0);
  const host::LcGradients<T> out{data(dlatent), data(dv), maps.empty() ? nullptr : maps.data()};
  parallel_for(blocks, 1, [&](int64_t begin, int64_t end) {
    host::lc_weight_backward(out, static_cast<const T*>(data(dw)), static_cast<const T*>(data(w)),
                             matrix, {begin, end});
  });
  if (!dmap.defined()) return;
  T* const sums = data(dmap);
  if (dmap_mode == Write::Overwrite) std::fill_n(sums, quant::kLcMapSize, T(0));
  for (size_t i = 0; i < maps.size(); ++i) sums[i % quant::kLcMapSize] += maps[i];
}

template <typename T>
void CpuBackend<T>::do_lc_operand(const Tensor& out, const Tensor& constant, const Tensor& x,
                                  const Tensor& u, const Tensor& map) {
  const int64_t k = x.dim(1);
  parallel_for(x.dim(0), row_grain(k), [&](int64_t begin, int64_t end) {
    host::lc_operand(data(out), data(constant), data(x), data(u), data(map), {begin, end}, k);
  });
}

template <typename T>
void CpuBackend<T>::do_lc_output(const Tensor& y, const Tensor& product, const Tensor& constant,
                                 const Tensor& v, const Tensor& addend) {
  const int64_t n = product.dim(1);
  parallel_for(product.dim(0), row_grain(n), [&](int64_t begin, int64_t end) {
    host::lc_output(data(y), data(product), data(constant), data(v), data(addend), {begin, end}, n);
  });
}

BBB_CPU_INSTANTIATE(lc_weight);
BBB_CPU_INSTANTIATE(lc_weight_backward);
BBB_CPU_INSTANTIATE(lc_operand);
BBB_CPU_INSTANTIATE(lc_output);

}  // namespace bbb::engine
