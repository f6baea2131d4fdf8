// Tensor maps. The driver function is looked up at run time: the binary links no libcuda.
#ifdef BBB_HAS_CUDA
#include "cuda/hopper.h"

#include "quant/launch.h"

namespace bbb::cuda {
namespace {

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                 const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                 const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                 CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

EncodeTiled encode_tiled() {
  static const EncodeTiled entry = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    BBB_CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                              cudaEnableDefault, &result));
    BBB_CHECK(result == cudaDriverEntryPointSuccess && found != nullptr,
              "the CUDA driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<EncodeTiled>(found);
  }();
  return entry;
}

// A map of `rank` dimensions, the inner one first.
CUtensorMap encode_map(CUtensorMapDataType type, const void* x, cuuint32_t rank,
                       const cuuint64_t* dims, const cuuint64_t* strides_bytes,
                       const cuuint32_t* box, CUtensorMapSwizzle swizzle) {
  const cuuint32_t element_strides[] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult status =
      encode_tiled()(&map, type, rank, const_cast<void*>(x), dims, strides_bytes, box,
                     element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                     CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  BBB_CHECK(status == CUDA_SUCCESS, "cuTensorMapEncodeTiled: error ", static_cast<int>(status),
            " for ", rank, " dimensions, the inner ones ", dims[0], " and ", dims[1]);
  return map;
}

cuuint64_t size(int64_t n) { return static_cast<cuuint64_t>(n); }

}  // namespace

template <int D>
CUtensorMap panel_map(const __nv_bfloat16* x, int batch, int t, int heads, int rows) {
  using Panel = PanelShape<D>;
  const cuuint64_t dims[] = {size(D), size(heads), size(t), size(batch)};
  const cuuint64_t strides_bytes[] = {size(int64_t{D} * 2), size(int64_t{heads} * D * 2),
                                      size(int64_t{t} * heads * D * 2)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(Panel::kColumns), 1,
                            static_cast<cuuint32_t>(rows), 1};
  return encode_map(
      CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, x, 4, dims, strides_bytes, box,
      Panel::kRowBytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B);
}

CUtensorMap matrix_map(const __nv_bfloat16* x, int64_t rows, int64_t columns, int box_rows) {
  const cuuint64_t dims[] = {size(columns), size(rows)};
  const cuuint64_t stride_bytes = size(columns * 2);
  const cuuint32_t box[] = {static_cast<cuuint32_t>(PanelShape<64>::kColumns),
                            static_cast<cuuint32_t>(box_rows)};
  return encode_map(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, x, 2, dims, &stride_bytes, box,
                    CU_TENSOR_MAP_SWIZZLE_128B);
}

CUtensorMap code_map(const uint8_t* codes, int64_t rows, int64_t row_bytes, int box_bytes,
                     int box_rows) {
  const cuuint64_t dims[] = {size(row_bytes), size(rows)};
  const cuuint64_t stride_bytes = size(row_bytes);
  const cuuint32_t box[] = {static_cast<cuuint32_t>(box_bytes), static_cast<cuuint32_t>(box_rows)};
  return encode_map(CU_TENSOR_MAP_DATA_TYPE_UINT8, codes, 2, dims, &stride_bytes, box,
                    box_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                    : box_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                      : CU_TENSOR_MAP_SWIZZLE_NONE);
}

template CUtensorMap panel_map<64>(const __nv_bfloat16*, int, int, int, int);
template CUtensorMap panel_map<96>(const __nv_bfloat16*, int, int, int, int);
template CUtensorMap panel_map<128>(const __nv_bfloat16*, int, int, int, int);

}  // namespace bbb::cuda
#endif
