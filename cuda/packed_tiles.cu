// Tiles of 2-bit codes (quant/packed_tiles.h), to and from.
//
//   repack_tiles   the tiles of a stored matrix: a thread makes four bytes
//   slice_pairs    scales and zero points once more (quant/slice_pairs.h): a thread makes an entry
//   unpack_tiles   wq = (q - z) e: a thread makes eight consecutive weights, one 16-byte store
#include "cuda/packed_gemv.h"
#include "cuda/ptx.h"
#include "quant/grid.h"
#include "quant/packed_tiles.h"
#include "quant/slice_pairs.h"

namespace bbb::cuda {

namespace {

using quant::kTileBytes;

constexpr int kThreads = 256;
constexpr int kTileWords = kTileBytes / 4;

unsigned blocks_of(int64_t threads) {
  return static_cast<unsigned>((threads + kThreads - 1) / kThreads);
}

__global__ void __launch_bounds__(kThreads)
    repack_tiles_kernel(uint32_t* __restrict__ tiles, quant::PackedView w) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x, tile = i / kTileWords;
  const int64_t rows = quant::row_tiles(w.n);
  if (tile >= rows * quant::column_slices(w.k)) return;
  uint32_t word = 0;
  for (int b = 0; b < 4; ++b)
    word |= uint32_t{quant::tile_byte(w, tile / rows, tile % rows,
                                      static_cast<int>(i % kTileWords) * 4 + b)}
            << (8 * b);
  tiles[i] = word;
}

__global__ void __launch_bounds__(kThreads)
    slice_pairs_kernel(uint2* __restrict__ pairs, quant::PackedView w) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t rows = quant::slice_pair_rows(w.n);
  if (i >= rows * quant::column_slices(w.k)) return;
  uint32_t words[2] = {};
  for (int byte = 0; byte < quant::kSlicePairBytes; ++byte)
    words[byte / 4] |= uint32_t{quant::slice_pair_byte(w, i / rows, i % rows, byte)}
                       << (byte % 4 * 8);
  pairs[i] = {words[0], words[1]};
}

__global__ void __launch_bounds__(kThreads)
    unpack_tiles_kernel(uint4* __restrict__ wq, const uint8_t* __restrict__ tiles, int64_t n,
                        int64_t k) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= n * (k / 8)) return;
  const int64_t row = i / (k / 8), column = i % (k / 8) * 8;
  const float e = quant::e4m3_decode(quant::tiled_scale(tiles, n, row, column));
  const uint8_t z = quant::tiled_zero(tiles, n, row, column);
  const auto level = [&](int j) {
    return quant::level_of(float(quant::tiled_code(tiles, n, row, column + j)), z, e);
  };
  wq[i] = {pack_bf16(level(0), level(1)), pack_bf16(level(2), level(3)),
           pack_bf16(level(4), level(5)), pack_bf16(level(6), level(7))};
}

}  // namespace

void launch_repack_tiles(cudaStream_t stream, uint8_t* tiles, const quant::PackedView& w) {
  launch(stream, {dim3(blocks_of(quant::tiled_bytes(w.n, w.k) / 4)), dim3(kThreads)},
         repack_tiles_kernel, reinterpret_cast<uint32_t*>(tiles), w);
}

void launch_slice_pairs(cudaStream_t stream, uint8_t* pairs, const quant::PackedView& w) {
  const int64_t entries = quant::slice_pairs_bytes(w.n, w.k) / quant::kSlicePairBytes;
  launch(stream, {dim3(blocks_of(entries)), dim3(kThreads)}, slice_pairs_kernel,
         reinterpret_cast<uint2*>(pairs), w);
}

void launch_unpack_tiles(cudaStream_t stream, bf16* wq, const TiledView& w) {
  launch(stream, {dim3(blocks_of(w.n * (w.k / 8))), dim3(kThreads)}, unpack_tiles_kernel,
         reinterpret_cast<uint4*>(wq), w.tiles, w.n, w.k);
}

}  // namespace bbb::cuda
