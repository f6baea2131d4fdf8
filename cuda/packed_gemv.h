// Launch functions of the products with 2-bit weights in tiles (cuda/packed_gemv.cu), sm_90a only,
// and of the tiles themselves (cuda/packed_tiles.cu).
#pragma once

#include <vector>

#include "cuda/cuda_backend.h"
#include "quant/format.h"

namespace bbb::cuda {

struct TiledView {
  const uint8_t* tiles;  // quant/packed_tiles.h; aligned to 16 bytes
  const float* master_scale;
  int64_t n, k;
  int group;
};

// tiles: quant::tiled_bytes(w.n, w.k).
void launch_repack_tiles(cudaStream_t stream, uint8_t* tiles, const quant::PackedView& w);
// wq = (q - z) e, (N, K).
void launch_unpack_tiles(cudaStream_t stream, bf16* wq, const TiledView& w);

// y = S x ((q - z) e)^T (+ addend), y (m, N), bf16 or FP32: the one that is not null is written.
struct TiledProduct {
  bf16* y_bf16;
  float* y_f32;
  TiledView w;
  const bf16* addend;  // (m, N) or null
};

struct GemvLaunch {
  cudaStream_t stream;
  int processors;
  int64_t smem_bytes;  // a block may use this much, so that two fit on a multiprocessor
};

// The kernels read the tiles before the kernel in front of them in the stream has ended: no kernel
// that writes tiles may be in flight.
//
// Products of m rows x with weights of the same K and group. x is aligned to 8 bytes.
void launch_packed_gemv(const GemvLaunch& at, const std::vector<TiledProduct>& products,
                        const bf16* x, int64_t m);
// The same from the codes of an operand: codes (m, K), zeros and scales (m, K/G). x is then (codes
// - zeros) scales.
void launch_quantized_gemv(const GemvLaunch& at, const std::vector<TiledProduct>& products,
                           const uint8_t* codes, const uint8_t* zeros, const float* scales,
                           int64_t m);

}  // namespace bbb::cuda
