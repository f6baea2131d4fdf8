// Rows whose index only the device knows: the batch at the cursor, and the step's row in the log.
#include <algorithm>
#include <cstring>

#include "engine/cpu/cpu_backend.h"

namespace bbb::engine {

template <typename T>
const int32_t* CpuBackend<T>::order_of(const char* op, const Rows& batch, int64_t count) {
  const int64_t first = *batch.cursor.data<int32_t>() * count;
  BBB_CHECK(first >= 0 && first + count <= batch.order.numel(), op, ": rows ", first, " to ",
            first + count, " of an order of ", batch.order.numel());
  const int32_t* row = batch.order.data<int32_t>() + first;
  for (int64_t i = 0; i < count; ++i)
    BBB_CHECK(row[i] >= 0 && row[i] < batch.src.dim(0), op, ": row ", row[i], " of src ",
              to_string(batch.src.shape()));
  return row;
}

template <typename T>
void CpuBackend<T>::do_gather_rows(const Tensor& out, const Rows& batch) {
  const int64_t count = out.dim(0), row_bytes = out.bytes() / count;
  const int32_t* row = order_of("gather_rows", batch, count);
  auto* to = static_cast<uint8_t*>(out.raw());
  const auto* from = static_cast<const uint8_t*>(batch.src.raw());
  for (int64_t i = 0; i < count; ++i)
    std::memcpy(to + i * row_bytes, from + row[i] * row_bytes, static_cast<size_t>(row_bytes));
}

template <typename T>
void CpuBackend<T>::do_advance(const Tensor& cursor) {
  for (int64_t i = 0; i < cursor.numel(); ++i) ++cursor.data<int32_t>()[i];
}

template <typename T>
void CpuBackend<T>::do_log_control(const Tensor& log, const Tensor& control, const Tensor& cursor) {
  const int64_t row = *cursor.data<int32_t>();
  BBB_CHECK(row >= 0 && row < log.dim(0), "log_control: row ", row, " of log ",
            to_string(log.shape()));
  std::copy_n(data(control), kControlSize, data(log) + row * kControlSize);
}

template const int32_t* CpuBackend<float>::order_of(const char*, const Rows&, int64_t);
template const int32_t* CpuBackend<double>::order_of(const char*, const Rows&, int64_t);
BBB_CPU_INSTANTIATE(gather_rows);
BBB_CPU_INSTANTIATE(advance);
BBB_CPU_INSTANTIATE(log_control);

}  // namespace bbb::engine
