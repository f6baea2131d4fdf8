// Products with packed weights on the GPU: passes tensors to the kernels of quant/packed.cu
// and quant/quantized_gemv.cu.
#include "cuda/cuda_backend.h"
#include "quant/cuda_kernels.h"

namespace bbb::cuda {

// The kernels read 16 bytes at a time; a view may begin at any address.
static void check_aligned(const Tensor& t, const char* what) {
  BBB_CHECK(reinterpret_cast<uintptr_t>(t.raw()) % 16 == 0, "packed weights: ", what,
            " is not aligned to 16 bytes");
}

static quant::PackedView view_of(const PackedWeight& w) {
  check_aligned(w.layout, "layout");
  return engine::joined_view(w);
}

void CudaBackend::do_repack(const Tensor& layout, const PackedWeight& file) {
  engine::join_parts(*this, layout, file);
}

void CudaBackend::do_unpack(const Tensor& wq, const PackedWeight& w) {
  check_aligned(wq, "wq");
  quant::launch_unpack(stream_, bf16_of(wq), view_of(w));
}

void CudaBackend::do_packed_gemv(const Tensor& y, const Tensor& x, const PackedWeight& w,
                                 const Tensor& addend) {
  check_aligned(x, "x");
  const bool narrow = y.dtype() == DType::BF16;
  quant::launch_packed_gemv(stream_, narrow ? bf16_of(y) : nullptr,
                            narrow ? nullptr : y.data<float>(), bf16_of(x), view_of(w),
                            bf16_of(addend), x.dim(0));
}

void CudaBackend::do_quantized_gemv(const Tensor& y, const OperandRows& x, const PackedWeight& w,
                                    const Tensor& addend) {
  check_aligned(x.codes, "codes of activations");
  const bool narrow = y.dtype() == DType::BF16;
  quant::launch_quantized_gemv(stream_, narrow ? bf16_of(y) : nullptr,
                               narrow ? nullptr : y.data<float>(), x.codes.data<uint8_t>(),
                               x.zeros.data<uint8_t>(), x.scales.data<float>(), view_of(w),
                               bf16_of(addend), x.codes.dim(0));
}

}  // namespace bbb::cuda
