// h = silu(gate) up, with silu(x) = x s and s = 1 / (1 + e^-x). Elementwise, any shape.
//
//     dup = dh silu(gate);  dgate = dh up s (1 + gate (1 - s))
#include "engine/cpu/cpu_backend.h"
#include "engine/cpu/row_ops.h"

namespace bbb::engine {

template <typename T>
void CpuBackend<T>::do_swiglu(const Tensor& h, const Tensor& gate, const Tensor& up) {
  const T *g = data(gate), *u = data(up);
  T* out = data(h);
  parallel_for(h.numel(), kElementGrain, [=](int64_t begin, int64_t end) {
    swiglu_run(out + begin, g + begin, u + begin, end - begin);
  });
}

template <typename T>
void CpuBackend<T>::do_swiglu_backward(const Tensor& dgate, const Tensor& dup, const Tensor& dh,
                                       const Tensor& gate, const Tensor& up) {
  const T *d = data(dh), *g = data(gate), *u = data(up);
  T *dg = data(dgate), *du = data(dup);
  parallel_for(dh.numel(), kElementGrain, [=](int64_t begin, int64_t end) {
    swiglu_backward_run(dg + begin, du + begin, d + begin, g + begin, u + begin, end - begin);
  });
}

BBB_CPU_INSTANTIATE(swiglu);
BBB_CPU_INSTANTIATE(swiglu_backward);

}  // namespace bbb::engine
