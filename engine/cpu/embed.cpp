// out[m] = table[ids[m]]: a copy of rows.
#include <cstring>

#include "engine/cpu/cpu_backend.h"

namespace bbb::engine {

template <typename T>
void CpuBackend<T>::do_embed(const Tensor& out, const Tensor& ids, const Tensor& table) {
  const int64_t width = out.dim(1), vocabulary = table.dim(0);
  const int32_t* id = ids.data<int32_t>();
  for (int64_t m = 0; m < out.dim(0); ++m) {
    BBB_CHECK(id[m] >= 0 && id[m] < vocabulary, "embed: id ", id[m], " is not in [0, ", vocabulary,
              ")");
    std::memcpy(data(out) + m * width, data(table) + id[m] * width,
                static_cast<size_t>(width) * sizeof(T));
  }
}

BBB_CPU_INSTANTIATE(embed);

}  // namespace bbb::engine
