// out[m] = table[ids[m]]: a copy of rows, widened where the table is bf16. Backward:
// dtable[ids[m]] += dx[m], in the order of m.
#include <algorithm>

#include "engine/bf16.h"
#include "engine/cpu/cpu_backend.h"

namespace bbb::engine {

static void check_id(const char* op, int32_t id, int64_t vocabulary) {
  BBB_CHECK(id >= 0 && id < vocabulary, op, ": id ", id, " is not in [0, ", vocabulary, ")");
}

template <typename T>
void CpuBackend<T>::do_embed(const Tensor& out, const Tensor& ids, const Tensor& table) {
  const int64_t width = out.dim(1);
  const int32_t* id = ids.data<int32_t>();
  for (int64_t m = 0; m < out.dim(0); ++m) {
    check_id("embed", id[m], table.dim(0));
    T* const to = data(out) + m * width;
    if (table.dtype() == DType::BF16)
      std::transform(table.data<uint16_t>() + id[m] * width,
                     table.data<uint16_t>() + (id[m] + 1) * width, to, from_bf16);
    else
      std::copy_n(data(table) + id[m] * width, width, to);
  }
}

template <typename T>
void CpuBackend<T>::do_embed_backward(const Tensor& dtable, const Tensor& dx, const Tensor& ids,
                                      Write mode, const Tensor&) {
  const int64_t width = dx.dim(1);
  const int32_t* id = ids.data<int32_t>();
  if (mode == Write::Overwrite) do_zero(dtable);
  for (int64_t m = 0; m < dx.dim(0); ++m) {
    check_id("embed_backward", id[m], dtable.dim(0));
    T* const to = data(dtable) + id[m] * width;
    const T* const from = data(dx) + m * width;
    for (int64_t i = 0; i < width; ++i) to[i] += from[i];
  }
}

BBB_CPU_INSTANTIATE(embed);
BBB_CPU_INSTANTIATE(embed_backward);

}  // namespace bbb::engine
