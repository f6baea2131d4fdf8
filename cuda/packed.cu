// Packed weights on the GPU: passes tensors to kernels. On Hopper, 2-bit codes that are not nested
// are in tiles (quant/packed_tiles.h; cuda/packed_gemv.cu). All others keep the file's layout
// (quant/packed.cu, quant/quantized_gemv.cu).
#include "cuda/cuda_backend.h"
#include "cuda/packed_gemv.h"
#include "quant/cuda_kernels.h"
#include "quant/packed_tiles.h"

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

static TiledView tiles_of(const PackedWeight& w) {
  check_aligned(w.layout, "layout");
  return {w.layout.data<uint8_t>(), w[quant::StoredPart::MasterScale].data<float>(), w.format.n,
          w.format.stored_k(), w.format.weight.group};
}

// Half of a multiprocessor's shared memory.
static GemvLaunch gemv_launch(cudaStream_t stream, const cudaDeviceProp& properties) {
  return {stream, properties.multiProcessorCount,
          static_cast<int64_t>(properties.sharedMemPerMultiprocessor / 2 -
                               properties.reservedSharedMemPerBlock)};
}

bool CudaBackend::takes_tiles(const quant::LinearFormat& format) const {
  return has_warpgroup_products() && quant::has_tiles(format.weight);
}

int64_t CudaBackend::repacked_bytes(const quant::LinearFormat& format) const {
  return takes_tiles(format) ? quant::tiled_bytes(format.n, format.stored_k())
                             : quant::joined_parts(format).bytes;
}

void CudaBackend::do_repack(const Tensor& layout, const PackedWeight& file) {
  if (!takes_tiles(file.format)) return engine::join_parts(*this, layout, file);
  launch_repack_tiles(stream_, layout.data<uint8_t>(), file.view());
  // Products read tiles before the kernel in front of them has ended (cuda/packed_gemv.h).
  BBB_CUDA(cudaStreamSynchronize(stream_));
}

void CudaBackend::do_unpack(const Tensor& wq, const PackedWeight& w) {
  check_aligned(wq, "wq");
  if (takes_tiles(w.format)) return launch_unpack_tiles(stream_, bf16_of(wq), tiles_of(w));
  quant::launch_unpack(stream_, bf16_of(wq), view_of(w));
}

void CudaBackend::do_packed_gemv(const Tensor& y, const Tensor& x, const PackedWeight& w,
                                 const Tensor& addend) {
  check_aligned(x, "x");
  const bool narrow = y.dtype() == DType::BF16;
  bf16* const y_bf16 = narrow ? bf16_of(y) : nullptr;
  float* const y_f32 = narrow ? nullptr : y.data<float>();
  if (takes_tiles(w.format))
    launch_packed_gemv(gemv_launch(stream_, properties_), y_bf16, y_f32, bf16_of(x), tiles_of(w),
                       bf16_of(addend), x.dim(0));
  else
    quant::launch_packed_gemv(stream_, y_bf16, y_f32, bf16_of(x), view_of(w), bf16_of(addend),
                              x.dim(0));
}

void CudaBackend::do_quantized_gemv(const Tensor& y, const OperandRows& x, const PackedWeight& w,
                                    const Tensor& addend) {
  check_aligned(x.codes, "codes of activations");
  const bool narrow = y.dtype() == DType::BF16;
  bf16* const y_bf16 = narrow ? bf16_of(y) : nullptr;
  float* const y_f32 = narrow ? nullptr : y.data<float>();
  const auto *codes = x.codes.data<uint8_t>(), *zeros = x.zeros.data<uint8_t>();
  const float* const scales = x.scales.data<float>();
  if (takes_tiles(w.format))
    launch_quantized_gemv(gemv_launch(stream_, properties_), y_bf16, y_f32, codes, zeros, scales,
                          tiles_of(w), bf16_of(addend), x.codes.dim(0));
  else
    quant::launch_quantized_gemv(stream_, y_bf16, y_f32, codes, zeros, scales, view_of(w),
                                 bf16_of(addend), x.codes.dim(0));
}

}  // namespace bbb::cuda
