// dst = src between F32 and bf16, rounded to nearest even (Inf stays Inf, NaN stays NaN).
//
// A flat launch, eight neighbouring elements a thread; 6 bytes an element. Between equal dtypes it
// is a copy.
#include "cuda/cuda_backend.h"
#include "cuda/vector.h"

namespace bbb::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWide = 8;

template <int kWidth, typename To, typename From>
__global__ void cast_kernel(To* __restrict__ dst, const From* __restrict__ src, int64_t n) {
  const int64_t i = first_element<kWidth>();
  if (i >= n) return;
  float x[kWidth];
  load(x, src + i, n - i);
  store(dst + i, x, n - i);
}

template <typename To, typename From>
void cast_as(cudaStream_t stream, const Tensor& dst, const Tensor& src) {
  const int64_t n = dst.numel();
  const bool wide = aligned(dst, src);
  launch(stream, {blocks_for(n, kThreads, wide ? kWide : 1), dim3(kThreads)},
         wide ? cast_kernel<kWide, To, From> : cast_kernel<1, To, From>,
         static_cast<To*>(dst.raw()), static_cast<const From*>(src.raw()), n);
}

}  // namespace

void CudaBackend::do_cast(const Tensor& dst, const Tensor& src) {
  if (dst.dtype() == src.dtype()) return do_copy(dst, src);
  if (dst.dtype() == DType::BF16 && src.dtype() == DType::F32)
    return cast_as<bf16, float>(stream_, dst, src);
  BBB_ASSERT(dst.dtype() == DType::F32 && src.dtype() == DType::BF16);
  cast_as<float, bf16>(stream_, dst, src);
}

}  // namespace bbb::cuda
