// out[m] = table[ids[m]]: a copy of rows, widened where the table is bf16.
#include <algorithm>

#include "engine/bf16.h"
#include "engine/cpu/cpu_backend.h"

namespace bbb::engine {

template <typename T>
void CpuBackend<T>::do_embed(const Tensor& out, const Tensor& ids, const Tensor& table) {
  const int64_t width = out.dim(1), vocabulary = table.dim(0);
  const int32_t* id = ids.data<int32_t>();
  for (int64_t m = 0; m < out.dim(0); ++m) {
    BBB_CHECK(id[m] >= 0 && id[m] < vocabulary, "embed: id ", id[m], " is not in [0, ", vocabulary,
              ")");
    T* const to = data(out) + m * width;
    if (table.dtype() == DType::BF16)
      std::transform(table.data<uint16_t>() + id[m] * width,
                     table.data<uint16_t>() + (id[m] + 1) * width, to, from_bf16);
    else
      std::copy_n(data(table) + id[m] * width, width, to);
  }
}

BBB_CPU_INSTANTIATE(embed);

}  // namespace bbb::engine
