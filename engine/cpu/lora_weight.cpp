// w = base + alpha a b, and da = alpha dw b^T, db = alpha a^T dw with dw 0 where clipped. Shapes w,
// base, dw (N, K); a, da (N, R); b, db (R, K). A task of w and da takes rows, one of db columns.
#include <algorithm>
#include <vector>

#include "engine/cpu/cpu_backend.h"
#include "engine/cpu/row_ops.h"

namespace bbb::engine {

template <typename T>
void CpuBackend<T>::do_lora_weight(const Tensor& w, const Tensor& base, const Tensor& a,
                                   const Tensor& b, double alpha) {
  const int64_t k = w.dim(1), rank = a.dim(1);
  const T factor = static_cast<T>(alpha);
  parallel_for(w.dim(0), row_grain(k * rank), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      T* const out = data(w) + n * k;
      const T* const from = data(base) + n * k;
      std::fill_n(out, k, T{0});
      for (int64_t r = 0; r < rank; ++r) {
        const T left = data(a)[n * rank + r];
        const T* const right = data(b) + r * k;
        for (int64_t i = 0; i < k; ++i) out[i] += left * right[i];
      }
      for (int64_t i = 0; i < k; ++i) out[i] = from[i] + factor * out[i];
    }
  });
}

template <typename T>
void CpuBackend<T>::do_lora_weight_backward(const Tensor& da, const Tensor& db, const Tensor& dw,
                                            const Tensor& clipped, const Tensor& a, const Tensor& b,
                                            double alpha, const Tensor&) {
  constexpr int64_t kColumns = 64;
  const int64_t rows = dw.dim(0), k = dw.dim(1), rank = a.dim(1);
  const T factor = static_cast<T>(alpha);
  const auto* const mask = clipped.data<uint8_t>();
  const auto gradient = [&](int64_t i) {
    return mask != nullptr && (mask[i / 8] >> (i % 8) & 1) ? T{0} : data(dw)[i];
  };
  parallel_for(rows, row_grain(k * rank), [&](int64_t begin, int64_t end) {
    thread_local std::vector<T> buffer;
    T* const row = scratch(buffer, k);
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t i = 0; i < k; ++i) row[i] = gradient(n * k + i);
      for (int64_t r = 0; r < rank; ++r) {
        const T* const right = data(b) + r * k;
        data(da)[n * rank + r] =
            factor * lane_sum<T>(k, [=](int64_t i) { return row[i] * right[i]; });
      }
    }
  });
  parallel_for(k, kColumns, [&](int64_t begin, int64_t end) {
    std::vector<T> sums(static_cast<size_t>(rank * (end - begin)));
    for (int64_t n = 0; n < rows; ++n)
      for (int64_t i = begin; i < end; ++i) {
        const T g = gradient(n * k + i);
        for (int64_t r = 0; r < rank; ++r)
          sums[static_cast<size_t>(r * (end - begin) + i - begin)] += data(a)[n * rank + r] * g;
      }
    for (int64_t r = 0; r < rank; ++r)
      for (int64_t i = begin; i < end; ++i)
        data(db)[r * k + i] = factor * sums[static_cast<size_t>(r * (end - begin) + i - begin)];
  });
}

BBB_CPU_INSTANTIATE(lora_weight);
BBB_CPU_INSTANTIATE(lora_weight_backward);

}  // namespace bbb::engine
