// r = 1 / sqrt(mean(x^2) + eps); y = x r w. Shapes (M, D), w (D).
//
//     dx (+)= r (dy w - x r^2 mean(dy w x));  dw (+)= sum_m dy x r
//
// A task takes a range of rows. dw is summed over blocks of rows, then over the blocks, in an order
// that does not depend on the number of threads.
#include <algorithm>
#include <cmath>

#include "engine/cpu/cpu_backend.h"
#include "engine/cpu/row_ops.h"

namespace bbb::engine {
namespace {
constexpr int64_t kMaxBlocks = 32;
}

template <typename T>
void CpuBackend<T>::do_rms_norm(const Tensor& y, const Tensor& inv_rms, const Tensor& x,
                                const Tensor& w, double eps) {
  const int64_t rows = x.dim(0), d = x.dim(1);
  const T* weight = data(w);
  parallel_for(rows, row_grain(d), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m)
      data(inv_rms)[m] =
          rms_norm_row(data(y) + m * d, data(x) + m * d, weight, d, static_cast<T>(eps));
  });
}

template <typename T>
void CpuBackend<T>::do_rms_norm_backward(const Tensor& dx, const Tensor& dw, const Tensor& dy,
                                         const Tensor& x, const Tensor& inv_rms, const Tensor& w,
                                         Write dx_mode, Write dw_mode, const Tensor&) {
  const int64_t rows = x.dim(0), d = x.dim(1);
  const int64_t block = std::max<int64_t>(16, (rows + kMaxBlocks - 1) / kMaxBlocks);
  const int64_t blocks = (rows + block - 1) / block;
  const T* weight = data(w);
  Tensor parts = dw.defined() ? do_empty({blocks, d}, kDType) : Tensor();
  parallel_for(rows, block, [&](int64_t begin, int64_t end) {
    T* part = dw.defined() ? data(parts) + begin / block * d : nullptr;
    if (part != nullptr) std::fill_n(part, d, T{0});
    for (int64_t m = begin; m < end; ++m) {
      const T *g = data(dy) + m * d, *in = data(x) + m * d;
      const T r = data(inv_rms)[m];
      if (part != nullptr)  // before dx, which may be dy's buffer
        for (int64_t i = 0; i < d; ++i) part[i] += g[i] * in[i] * r;
      if (!dx.defined()) continue;
      T* out = data(dx) + m * d;
      const T dot = lane_sum<T>(d, [=](int64_t i) { return g[i] * weight[i] * in[i]; });
      const T pull = r * r * dot / static_cast<T>(d);
      if (dx_mode == Write::Add) {
        for (int64_t i = 0; i < d; ++i) out[i] += r * (g[i] * weight[i] - in[i] * pull);
      } else {
        for (int64_t i = 0; i < d; ++i) out[i] = r * (g[i] * weight[i] - in[i] * pull);
      }
    }
  });
  if (!dw.defined()) return;
  T* total = data(dw);
  if (dw_mode == Write::Overwrite) std::fill_n(total, d, T{0});
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t i = 0; i < d; ++i) total[i] += data(parts)[b * d + i];
}

BBB_CPU_INSTANTIATE(rms_norm);
BBB_CPU_INSTANTIATE(rms_norm_backward);

}  // namespace bbb::engine
