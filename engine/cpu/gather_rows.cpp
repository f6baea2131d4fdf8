// What a step reads and writes at a place that only the device knows: the batch under the cursor,
// and the log of the steps.
#include <algorithm>
#include <cstring>

#include "engine/cpu/cpu_backend.h"

namespace bbb::engine {

template <typename T>
void CpuBackend<T>::do_gather_rows(const Tensor& out, const Tensor& src, const Tensor& order,
                                   const Tensor& cursor) {
  const int64_t count = out.dim(0), row_bytes = out.bytes() / count;
  const int64_t first = *cursor.data<int32_t>() * count;
  BBB_CHECK(first >= 0 && first + count <= order.numel(), "gather_rows: rows ", first, " to ",
            first + count, " of an order of ", order.numel());
  const int32_t* row = order.data<int32_t>() + first;
  auto* to = static_cast<uint8_t*>(out.raw());
  const auto* from = static_cast<const uint8_t*>(src.raw());
  for (int64_t i = 0; i < count; ++i) {
    BBB_CHECK(row[i] >= 0 && row[i] < src.dim(0), "gather_rows: row ", row[i], " of src ",
              to_string(src.shape()));
    std::memcpy(to + i * row_bytes, from + row[i] * row_bytes, static_cast<size_t>(row_bytes));
  }
}

template <typename T>
void CpuBackend<T>::do_advance(const Tensor& cursor) {
  ++*cursor.data<int32_t>();
}

template <typename T>
void CpuBackend<T>::do_log_control(const Tensor& log, const Tensor& control, const Tensor& cursor) {
  const int64_t row = *cursor.data<int32_t>();
  BBB_CHECK(row >= 0 && row < log.dim(0), "log_control: row ", row, " of log ",
            to_string(log.shape()));
  std::copy_n(data(control), kControlSize, data(log) + row * kControlSize);
}

BBB_CPU_INSTANTIATE(do_gather_rows, const Tensor&, const Tensor&, const Tensor&, const Tensor&);
BBB_CPU_INSTANTIATE(do_advance, const Tensor&);
BBB_CPU_INSTANTIATE(do_log_control, const Tensor&, const Tensor&, const Tensor&);

}  // namespace bbb::engine
