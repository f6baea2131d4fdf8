// Packed weights on the GPU: passes tensors to kernels. On Hopper, 2-bit codes that are not nested
// are in tiles (quant/packed_tiles.h; cuda/packed_gemv.cu, packed_gemm.cu). All others keep the
// file's layout (quant/packed.cu, quant/quantized_gemv.cu); on Hopper, most of them have their
// scales and zero points once more behind it, for products of many rows (quant/slice_pairs.h).
#include <algorithm>
#include <array>
#include <optional>

#include "cuda/cuda_backend.h"
#include "cuda/packed_gemv.h"
#include "quant/cuda_kernels.h"
#include "quant/packed_tiles.h"
#include "quant/slice_pairs.h"

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

static int64_t slice_pairs_offset(const quant::LinearFormat& format) {
  return (quant::joined_parts(format).bytes + 15) / 16 * 16;
}

// Of a weight in tiles, or as in the file with slice pairs.
static TiledView tiles_of(const PackedWeight& w) {
  check_aligned(w.layout, "layout");
  const auto* const layout = w.layout.data<uint8_t>();
  const bool in_tiles = quant::has_tiles(w.format.weight);
  return {in_tiles ? layout : layout + slice_pairs_offset(w.format),
          w[quant::StoredPart::MasterScale].data<float>(),
          w.format.n,
          w.format.stored_k(),
          w.format.weight.group,
          w.format.weight.bits,
          in_tiles ? nullptr : layout};
}

static ProductLaunch product_launch(cudaStream_t stream, const cudaDeviceProp& properties) {
  return {stream, properties.multiProcessorCount,
          static_cast<int64_t>(properties.sharedMemPerMultiprocessor),
          static_cast<int64_t>(properties.reservedSharedMemPerBlock)};
}

bool CudaBackend::takes_tiles(const quant::LinearFormat& format) const {
  return has_warpgroup_products() && quant::has_tiles(format.weight);
}

bool CudaBackend::takes_slice_pairs(const quant::LinearFormat& format) const {
  return has_warpgroup_products() && quant::has_slice_pairs(format);
}

int64_t CudaBackend::max_packed_rows(const quant::LinearFormat& format) const {
  return takes_tiles(format)         ? kAnyRows
         : takes_slice_pairs(format) ? kMostCodeRows
                                     : kMaxPackedRows;
}

int64_t CudaBackend::repacked_bytes(const quant::LinearFormat& format) const {
  const int64_t n = format.n, k = format.stored_k();
  return takes_tiles(format)         ? quant::tiled_bytes(n, k)
         : takes_slice_pairs(format) ? slice_pairs_offset(format) + quant::slice_pairs_bytes(n, k)
                                     : quant::joined_parts(format).bytes;
}

void CudaBackend::do_repack(const Tensor& layout, const PackedWeight& file) {
  const quant::LinearFormat& format = file.format;
  if (takes_tiles(format)) {
    launch_repack_tiles(stream_, layout.data<uint8_t>(), file.view());
  } else {
    engine::join_parts(*this, layout, file);
    if (!takes_slice_pairs(format)) return;
    launch_slice_pairs(stream_, layout.data<uint8_t>() + slice_pairs_offset(format), file.view());
  }
  // Products read tiles before the kernel in front of them has ended (cuda/packed_gemv.h).
  BBB_CUDA(cudaStreamSynchronize(stream_));
}

void CudaBackend::do_unpack(const Tensor& wq, const PackedWeight& w) {
  check_aligned(wq, "wq");
  if (takes_tiles(w.format)) return launch_unpack_tiles(stream_, bf16_of(wq), tiles_of(w));
  quant::launch_unpack(stream_, bf16_of(wq), view_of(w));
}

void CudaBackend::do_embed_packed(const Tensor& out, const Tensor& ids, const PackedWeight& w) {
  check_aligned(out, "out");
  BBB_ASSERT(!takes_tiles(w.format));
  quant::launch_unpack_rows(stream_, bf16_of(out), ids.data<int32_t>(), view_of(w), out.dim(0));
}

static TiledProduct tiled_product(const PackedProduct& product) {
  const bool narrow = product.y.dtype() == DType::BF16;
  return {narrow ? bf16_of(product.y) : nullptr, narrow ? nullptr : product.y.data<float>(),
          tiles_of(product.weight), bf16_of(product.addend)};
}

// Whether all weights are in tiles, and the products as the kernels of tiles take them.
bool CudaBackend::all_in_tiles(const PackedProducts& products) const {
  return std::ranges::all_of(products,
                             [&](const PackedProduct& p) { return takes_tiles(p.weight.format); });
}
static std::vector<TiledProduct> tiled_products(const PackedProducts& products) {
  std::vector<TiledProduct> tiled;
  for (const PackedProduct& product : products) tiled.push_back(tiled_product(product));
  return tiled;
}

// Calls tiled(products in tiles) once if there are any, and other(product, y_bf16, y_f32) for each
// of the others. Of y_bf16 and y_f32 one is null.
template <typename Tiled, typename Other>
void CudaBackend::packed_products(const PackedProducts& products, const Tiled& tiled,
                                  const Other& other) const {
  std::vector<TiledProduct> in_tiles;
  for (const PackedProduct& product : products) {
    const TiledProduct as_tiles = tiled_product(product);
    if (takes_tiles(product.weight.format))
      in_tiles.push_back(as_tiles);
    else
      other(product, as_tiles.y_bf16, as_tiles.y_f32);
  }
  if (!in_tiles.empty()) tiled(in_tiles);
}

// Whether that is faster for m rows, of weights of 3, 4 or 8 bits.
static bool on_tensor_cores(const quant::LinearFormat& format, int64_t m) {
  const int bits = format.weight.bits;
  return m >= (bits == 8 ? kMinGemmRows : kMinCodeRows) ||
         format.n * format.stored_k() >= (bits == 3 ? 2 * kManyCodes : kManyCodes);
}

static std::optional<LaneOperand> lane_operand(const OperandSpec* spec) {
  if (spec == nullptr) return std::nullopt;
  check_aligned(spec->offsets, "the channel order");
  return LaneOperand(spec->view, reinterpret_cast<const uint16_t*>(spec->offsets.data<uint8_t>()));
}
static const LaneOperand* pointer_to(const std::optional<LaneOperand>& operand) {
  return operand ? &*operand : nullptr;
}

// Whether one kernel makes the rows, or one row's operand, and multiplies them. If not, a kernel in
// front makes them.
bool CudaBackend::makes_rows(const PackedProducts& products, const OperandSpec* spec,
                             int64_t m) const {
  if (!all_in_tiles(products)) return false;
  if (spec == nullptr) return m < kMinGemmRows;
  const quant::OperandView& v = spec->view;
  const bool rotates_all = v.rotated_begin == 0 && v.rotated_end == v.stored_k;
  if (m > 1 || v.k % 8 != 0 || (v.channels != nullptr && !spec->offsets.defined())) return false;
  if (!spec->quantizes()) return v.channels != nullptr || rotates_all;
  return quantizes_in_product(product_launch(stream_, properties_), tiled_products(products),
                              *lane_operand(spec));
}

// Multiplies the operand of m rows that make(rows) writes, by a kernel in front: x, or codes.
template <typename Make>
void CudaBackend::multiply_operand(const PackedProducts& products, int64_t m,
                                   const OperandSpec& spec, const Make& make) {
  const int64_t k = spec.view.stored_k, groups = k / spec.view.group;
  OperandRows rows;
  if (!spec.quantizes()) {
    rows.x = do_empty({m, k}, act());
    make(rows);
    return do_packed_gemv(products, rows.x, nullptr);
  }
  rows.codes = do_empty({m, k}, DType::U8);
  rows.zeros = do_empty({m, groups}, DType::U8);
  rows.scales = do_empty({m, groups}, real());
  make(rows);
  do_quantized_gemv(products, rows);
}

void CudaBackend::do_packed_gemv(const PackedProducts& products, const Tensor& x,
                                 const OperandSpec* spec) {
  check_aligned(x, "x");
  const int64_t m = x.dim(0);
  if (spec != nullptr) {
    if (makes_rows(products, spec, m))
      return launch_packed_gemv(product_launch(stream_, properties_), tiled_products(products),
                                bf16_of(x), m, pointer_to(lane_operand(spec)));
    return multiply_operand(products, m, *spec,
                            [&](const OperandRows& rows) { do_operand(rows, x, *spec); });
  }
  std::array<std::vector<TiledProduct>, 9> with_pairs;  // of each number of bits
  packed_products(
      products,
      [&](const std::vector<TiledProduct>& tiled) {
        const ProductLaunch at = product_launch(stream_, properties_);
        if (m < kMinGemmRows)
          launch_packed_gemv(at, tiled, bf16_of(x), m, nullptr);
        else
          launch_packed_gemm(at, tiled, bf16_of(x), m);
      },
      [&](const PackedProduct& product, bf16* y_bf16, float* y_f32) {
        const quant::LinearFormat& format = product.weight.format;
        if (takes_slice_pairs(format) && on_tensor_cores(format, m))
          return with_pairs[static_cast<size_t>(format.weight.bits)].push_back(
              tiled_product(product));
        quant::launch_packed_gemv(stream_, y_bf16, y_f32, bf16_of(x), view_of(product.weight),
                                  bf16_of(product.addend), m);
      });
  for (const std::vector<TiledProduct>& all : with_pairs)
    if (!all.empty()) launch_packed_gemm(product_launch(stream_, properties_), all, bf16_of(x), m);
}

void CudaBackend::do_packed_gemv_normed(const PackedProducts& products, const Tensor& x,
                                        const Tensor& w, double eps, const OperandSpec* spec) {
  check_aligned(x, "x");
  check_aligned(w, "the norm's weight");
  const int64_t m = x.dim(0);
  if (makes_rows(products, spec, m))
    return launch_packed_gemv_normed(product_launch(stream_, properties_), tiled_products(products),
                                     bf16_of(x), w.data<float>(), static_cast<float>(eps), m,
                                     pointer_to(lane_operand(spec)));
  const Tensor inv_rms = do_empty({m}, real());
  if (spec != nullptr)
    return multiply_operand(products, m, *spec, [&](const OperandRows& rows) {
      do_rms_norm_operand(rows, inv_rms, x, w, eps, *spec);
    });
  const Tensor normed = do_empty({m, x.dim(1)}, act());
  do_rms_norm(normed, inv_rms, x, w, eps);
  do_packed_gemv(products, normed, nullptr);
}

void CudaBackend::do_packed_gemv_gated(const PackedProducts& products, const Tensor& gate,
                                       const Tensor& up, const OperandSpec* spec) {
  check_aligned(gate, "gate");
  check_aligned(up, "up");
  const int64_t m = gate.dim(0);
  if (makes_rows(products, spec, m))
    return launch_packed_gemv_gated(product_launch(stream_, properties_), tiled_products(products),
                                    bf16_of(gate), bf16_of(up), m, pointer_to(lane_operand(spec)));
  if (spec != nullptr)
    return multiply_operand(products, m, *spec, [&](const OperandRows& rows) {
      do_swiglu_operand(rows, gate, up, *spec);
    });
  const Tensor h = do_empty({m, gate.dim(1)}, act());
  do_swiglu(h, gate, up);
  do_packed_gemv(products, h, nullptr);
}

void CudaBackend::do_quantized_gemv(const PackedProducts& products, const OperandRows& x) {
  check_aligned(x.codes, "codes of activations");
  const int64_t m = x.codes.dim(0);
  const auto *codes = x.codes.data<uint8_t>(), *zeros = x.zeros.data<uint8_t>();
  const float* const scales = x.scales.data<float>();
  packed_products(
      products,
      [&](const std::vector<TiledProduct>& tiled) {
        launch_quantized_gemv(product_launch(stream_, properties_), tiled, codes, zeros, scales, m);
      },
      [&](const PackedProduct& product, bf16* y_bf16, float* y_f32) {
        quant::launch_quantized_gemv(stream_, y_bf16, y_f32, codes, zeros, scales,
                                     view_of(product.weight), bf16_of(product.addend), m);
      });
}

}  // namespace bbb::cuda
