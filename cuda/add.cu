// out = a + b, summed in FP32 and rounded once.   bf16 or F32, same shape; out may be a or b.
// y (M, N) += bias F32 (N), row by row, summed in FP32 and rounded once.
// x *= factor, one F32 on the device.   bf16 or F32.
//
// A flat launch, eight neighbouring elements a thread; 6 (F32: 12), 4 and 4 (F32: 8) bytes an
// element.
#include "cuda/cuda_backend.h"
#include "cuda/vector.h"

namespace bbb::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWide = 8;

template <typename T, int kWidth>
__global__ void add_kernel(T* out, const T* a, const T* b, int64_t n) {
  const int64_t i = first_element<kWidth>();
  if (i >= n) return;
  float x[kWidth], y[kWidth];
  load(x, a + i, n - i);
  load(y, b + i, n - i);
#pragma unroll
  for (int j = 0; j < kWidth; ++j) x[j] += y[j];
  store(out + i, x, n - i);
}

// n: elements of y, `columns` a row, a multiple of kWidth.
template <int kWidth>
__global__ void add_bias_kernel(bf16* y, const float* __restrict__ bias, int64_t n,
                                int64_t columns) {
  const int64_t i = first_element<kWidth>();
  if (i >= n) return;
  float v[kWidth], b[kWidth];
  load(v, y + i, kWidth);
  load(b, bias + i % columns, kWidth);
#pragma unroll
  for (int j = 0; j < kWidth; ++j) v[j] += b[j];
  store(y + i, v, kWidth);
}

template <typename T, int kWidth>
__global__ void scale_kernel(T* x, const float* factor, int64_t n) {
  const int64_t i = first_element<kWidth>();
  if (i >= n) return;
  float v[kWidth];
  load(v, x + i, n - i);
#pragma unroll
  for (int j = 0; j < kWidth; ++j) v[j] *= *factor;
  store(x + i, v, n - i);
}

}  // namespace

void CudaBackend::do_scale(const Tensor& x, const Tensor& factor) {
  const int64_t n = x.numel();
  const bool wide = aligned(x);
  const auto run = [&]<typename T>(T* values) {
    launch(stream_, {blocks_for(n, kThreads, wide ? kWide : 1), dim3(kThreads)},
           wide ? scale_kernel<T, kWide> : scale_kernel<T, 1>, values, factor.data<float>(), n);
  };
  if (x.dtype() == DType::F32)
    run(x.data<float>());
  else
    run(bf16_of(x));
}

void CudaBackend::do_add_bias(const Tensor& y, const Tensor& bias) {
  const int64_t n = y.numel(), columns = y.dim(1);
  const bool wide = columns % kWide == 0 && aligned(y, bias);
  launch(stream_, {blocks_for(n, kThreads, wide ? kWide : 1), dim3(kThreads)},
         wide ? add_bias_kernel<kWide> : add_bias_kernel<1>, bf16_of(y), bias.data<float>(), n,
         columns);
}

void CudaBackend::do_add(const Tensor& out, const Tensor& a, const Tensor& b) {
  const int64_t n = out.numel();
  const bool wide = aligned(out, a, b);
  with_elements(a, [&]<typename T>(const T* x) {
    launch(stream_, {blocks_for(n, kThreads, wide ? kWide : 1), dim3(kThreads)},
           wide ? add_kernel<T, kWide> : add_kernel<T, 1>, static_cast<T*>(out.raw()), x,
           static_cast<const T*>(b.raw()), n);
  });
}

}  // namespace bbb::cuda
