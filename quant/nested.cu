// Nested codes at fewer bits (numerics.md section 4): wq = (q' - z) e from the masters of 8-bit
// codes.
//
// A block takes one tile (quant/tiles.h), four consecutive elements a thread at a time, which are
// in one group. Bytes moved: 4 read and 2 written an element, 2 read a group.
#include <cuda_bf16.h>

#include "quant/cuda_kernels.h"
#include "quant/grid.h"
#include "quant/launch.h"

namespace bbb::quant {
namespace {

constexpr int kThreads = 128;
constexpr int kWide = 4;

__global__ void __launch_bounds__(kThreads)
    nested_levels_kernel(__nv_bfloat16* __restrict__ wq, const float* __restrict__ w,
                         const uint8_t* __restrict__ e, const uint8_t* __restrict__ z,
                         const float* __restrict__ s, const WeightTile* __restrict__ tiles,
                         const int32_t* __restrict__ widths, int group, int bits,
                         NestedDequant dequant) {
  const WeightTile tile = tiles[blockIdx.x];
  if (widths[tile.slot] != kNestedBits) return;
  const float master_scale = s[tile.slot];
  const int64_t begin = tile.begin * kTileAlign;
  for (int i = threadIdx.x * kWide; i < tile.count; i += kThreads * kWide) {
    const int64_t at = begin + i, g = at / group;
    const float step = step_of(e[g], master_scale), half = e4m3_decode(e[g]) / 2;
    const float4 x = *reinterpret_cast<const float4*>(w + at);
    const auto level = [&](float v) {
      const int code = static_cast<int>(code_of(v, step, z[g], kNestedBits));
      return static_cast<float>(
                 nested_level_doubled(code >> (kNestedBits - bits), z[g], bits, dequant)) *
             half;
    };
    __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(level(x.x), level(x.y)),
                               __floats2bfloat162_rn(level(x.z), level(x.w))};
    *reinterpret_cast<uint2*>(wq + at) = *reinterpret_cast<const uint2*>(pairs);
  }
}

}  // namespace

void launch_nested_levels(cudaStream_t stream, __nv_bfloat16* wq, const float* w, const uint8_t* e,
                          const uint8_t* z, const float* s, const WeightTile* tiles,
                          int64_t tile_count, const int32_t* widths, int group, int bits,
                          NestedDequant dequant) {
  launch(stream, {dim3(static_cast<unsigned>(tile_count)), dim3(kThreads)}, nested_levels_kernel,
         wq, w, e, z, s, tiles, widths, group, bits, dequant);
}

}  // namespace bbb::quant
