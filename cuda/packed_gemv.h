// Launch functions of the products with 2-bit weights in tiles (cuda/packed_gemv.cu for few rows of
// x, cuda/packed_gemm.cu for more) and of many rows with weights of 3, 4 and 8 bits
// (cuda/packed_gemm.cu), sm_90a only; of the tiles themselves, and of what those weights need
// beside their codes (cuda/packed_tiles.cu).
#pragma once

#include <span>
#include <vector>

#include "cuda/cuda_backend.h"
#include "cuda/lane_operand.h"
#include "quant/format.h"

namespace bbb::cuda {

struct TiledView {
  // quant/packed_tiles.h; of 3, 4 and 8 bits quant/slice_pairs.h. Aligned to 16 bytes, as codes.
  const uint8_t* tiles;
  const float* master_scale;
  int64_t n, k;
  int group;
  int bits = 2;
  const uint8_t* codes = nullptr;  // of 3, 4 and 8 bits: as in the file
};

// tiles: quant::tiled_bytes(w.n, w.k).
void launch_repack_tiles(cudaStream_t stream, uint8_t* tiles, const quant::PackedView& w);
// pairs: quant::slice_pairs_bytes(w.n, w.k).
void launch_slice_pairs(cudaStream_t stream, uint8_t* pairs, const quant::PackedView& w);
// wq = (q - z) e, (N, K).
void launch_unpack_tiles(cudaStream_t stream, bf16* wq, const TiledView& w);

// y = S x ((q - z) e)^T (+ addend), y (m, N), bf16 or FP32: the one that is not null is written.
struct TiledProduct {
  bf16* y_bf16;
  float* y_f32;
  TiledView w;
  const bf16* addend;  // (m, N) or null
};

using Products = std::span<const TiledProduct>;

constexpr int kMaxProducts = 3;  // of a launch

// The products of a launch: clusters of blocks take the shares of the first, then of the next.
struct ProductList {
  struct Product {
    TiledProduct of;
    int64_t shares;
  };
  Product items[kMaxProducts];
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#ifdef __CUDACC__
// The product of a share of the launch; `share` becomes its number in that product.
__device__ inline int find_product(const ProductList& products, int64_t& share) {
  int p = 0;
#pragma unroll 1
  for (; share >= products.items[p].shares; ++p) share -= products.items[p].shares;
  return p;
}
#endif

struct ProductLaunch {
  cudaStream_t stream;
  int processors;
  int64_t smem_bytes;      // of a multiprocessor
  int64_t reserved_bytes;  // of these, for each block

  // What a block may use so that this many fit on a multiprocessor.
  int64_t block_bytes(int blocks) const { return smem_bytes / blocks - reserved_bytes; }
};

// The kernels read tiles and master scales before the kernel in front of them in the stream has
// ended: no kernel that writes these may be in flight.
//
// Products of m rows x with weights of the same K and group. x and codes are aligned to 16 bytes.
// With an operand, m = 1 and x is a row of operand->k channels, a multiple of 8, of which the
// product makes the operand itself. Without offsets, either all groups of it are rotated, or it is
// quantized, which wants quantizes_in_product(). No kernel that writes the offsets may be in
// flight.
void launch_packed_gemv(const ProductLaunch& at, const std::vector<TiledProduct>& products,
                        const bf16* x, int64_t m, const LaneOperand* operand = nullptr);
// Whether it has at most kMostQuantizedBits, and its row and values in FP32 fit into a block's
// shared memory.
constexpr int kMostQuantizedBits = 4;
bool quantizes_in_product(const ProductLaunch& at, const std::vector<TiledProduct>& products,
                          const LaneOperand& operand);
// The same of the rows of rms_norm(x, w) and of silu(gate) up, where x w and silu(gate) up are
// rounded to bf16. gate, up and w are aligned to 16 bytes; no kernel that writes w may be in
// flight.
void launch_packed_gemv_normed(const ProductLaunch& at, const std::vector<TiledProduct>& products,
                               const bf16* x, const float* w, float eps, int64_t m,
                               const LaneOperand* operand = nullptr);
void launch_packed_gemv_gated(const ProductLaunch& at, const std::vector<TiledProduct>& products,
                              const bf16* gate, const bf16* up, int64_t m,
                              const LaneOperand* operand = nullptr);
// The same from the codes of an operand: codes (m, K), zeros and scales (m, K/G). x is then (codes
// - zeros) scales.
void launch_quantized_gemv(const ProductLaunch& at, const std::vector<TiledProduct>& products,
                           const uint8_t* codes, const uint8_t* zeros, const float* scales,
                           int64_t m);
// For any number of rows, on the bf16 tensor cores: faster from kMinGemmRows on. All weights have
// the same number of bits.
constexpr int64_t kMinGemmRows = 5;
// Weights as in the file: of 3 and 4 bits faster from kMinCodeRows on, of 8 bits, which it rounds
// to bf16, used from kMinGemmRows on. Large matrices for any number of rows: of one row, 14336 x
// 4096 takes 17 to 20 us instead of 28 to 30 on an H200. With more than kMostCodeRows a GEMM of the
// unpacked weight is as fast.
constexpr int64_t kMinCodeRows = 2, kMostCodeRows = 1024;
constexpr int64_t kManyCodes = int64_t{1} << 24;  // of a large matrix; of 3 bits twice as many
void launch_packed_gemm(const ProductLaunch& at, const std::vector<TiledProduct>& products,
                        const bf16* x, int64_t m);

}  // namespace bbb::cuda
