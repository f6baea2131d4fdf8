// Products of 5 to 16 rows with 2-bit weights in tiles (quant/packed_tiles.h), on mma.sync in bf16
// (sm_90a):
//
//   y = S x ((q - z) e)^T (+ addend)        x (M, K) bf16, y (M, N) bf16 or FP32
//
// Weights are the operand A, a tile's 16 output rows, made in registers (cuda/packed_sums.h); rows
// of x are columns of B, kTokens of them.
//
// A block has eight warps: row groups times parts. A warp takes up to four row tiles; slices of 128
// positions go to the parts in turn. A warp copies its tiles to a ring of its own. The row groups
// of a part share a ring of slices of x, which the warp of the first one fills. A warp reads a
// slice of x from shared memory once for all its tiles.
//
// A launch takes up to three products of the same x, each divided into shares of row tiles. A
// cluster of two blocks takes a share, and each block half of the slices. Two blocks fit on a
// multiprocessor, so the next product's copies start while this one still runs. Bytes moved: those
// of the tiles; x comes from the L2 cache, once a cluster.
#include <numeric>

#include "cuda/cuda_backend.h"
#include "cuda/packed_gemv.h"
#include "cuda/packed_sums.h"

namespace bbb::cuda {

namespace {

using quant::kTileBytes;
using quant::kTileColumns;
using quant::kTileRows;

constexpr int kWarps = 8;      // of a block
constexpr int kMaxGroups = 8;  // row groups of a block
constexpr int kMaxTiles = 4;   // row tiles of a warp
constexpr int kMaxStages = 8;
constexpr int kBlocks = 2;  // on a multiprocessor

struct MmaShape {
  int64_t k;
  int m, row_groups, stages;
  int received_at, barriers_at;  // bytes of shared memory
};

// Shared memory from a multiple of 1024 on: slices of x (stage, part), tiles (warp, stage), at the
// end the block's own sums; the other block's; barriers: of tiles (warp, stage), of x (part, stage)
// full and empty, of the other's sums. kTiles: the most row tiles of a warp.
template <int kTokens, int kTiles>
__global__ void __launch_bounds__(kWarps * 32, kBlocks)
    packed_mma_kernel(const __grid_constant__ CUtensorMap x_map,
                      const __grid_constant__ ProductList products, MmaShape shape) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Rows = Operand<kTileColumns, kTokens>;
  constexpr int kSlotBytes = kTiles * kTileBytes;
  unsigned char* const smem = swizzled_smem();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int split = cluster_blocks(), rank = cluster_rank();
  const int all_slices = static_cast<int>(quant::column_slices(shape.k));
  const int first_slice = rank * all_slices / split;
  const int slices = (rank + 1) * all_slices / split - first_slice;
  const int first_token = static_cast<int>(blockIdx.y) * kTokens;
  // The second four warps take the row groups in another order: the first groups may have fewer
  // tiles, and a multiprocessor's quarter runs every fourth warp.
  const int parts = kWarps / shape.row_groups, part = warp / shape.row_groups;
  const int row_group = (warp / 4 * 4 + (warp + warp / 4) % 4) % shape.row_groups;
  const bool leads = row_group == 0;
  const int items = max(slices - part + parts - 1, 0) / parts;  // slices of this warp

  int64_t share = blockIdx.x / static_cast<unsigned>(split);
  const int p = find_product(products, share);
  const TiledProduct& product = products.items[p].of;
  const int64_t n = product.w.n, all_tiles = quant::row_tiles(n);
  const int64_t shares = products.items[p].shares;
  const int64_t first_tile = share * all_tiles / shares;
  const int block_tiles = static_cast<int>((share + 1) * all_tiles / shares - first_tile);
  const int first_own = row_group * block_tiles / shape.row_groups;
  const int tiles = (row_group + 1) * block_tiles / shape.row_groups - first_own;

  unsigned char* const ring = smem + shape.stages * (parts * Rows::kBytes + warp * kSlotBytes);
  const uint32_t tiles_full = shared_address(smem + shape.barriers_at) + warp * shape.stages * 8;
  const uint32_t x_full = tiles_full + ((kWarps - warp) + part) * shape.stages * 8;
  const uint32_t x_empty = x_full + parts * shape.stages * 8;
  const ClusterSums<kTokens> sums{
      reinterpret_cast<float*>(smem),
      reinterpret_cast<float*>(smem + shape.received_at),
      shared_address(smem + shape.barriers_at) + (kWarps + 2 * parts) * shape.stages * 8,
      parts,
      sums_pitch(shape.row_groups * kTiles * kTileRows),
      split,
      rank};

  const auto slice_of = [&](int item) { return first_slice + part + item * parts; };
  const auto tile_at = [&](int item) {
    return product.w.tiles +
           quant::tile_index(n, slice_of(item), first_tile + first_own) * kTileBytes;
  };
  const auto copy_tiles = [&](int item, int stage) {
    mbarrier_expect(tiles_full + stage * 8, tiles * kTileBytes);
    if (tiles > 0)
      copy_bytes(shared_address(ring + stage * kSlotBytes), tile_at(item), tiles * kTileBytes,
                 tiles_full + stage * 8);
  };
  const auto x_of = [&](int stage) {
    return shared_address(smem) + (stage * parts + part) * Rows::kBytes;
  };
  const auto copy_x = [&](int item, int stage) {
    mbarrier_expect(x_full + stage * 8, Rows::kBytes);
#pragma unroll
    for (int panel = 0; panel < Rows::Panel::kPanels; ++panel)
      copy_box(x_of(stage) + panel * Rows::kPanelBytes, x_map, x_full + stage * 8,
               slice_of(item) * kTileColumns + panel * Rows::Panel::kColumns, first_token);
  };
  const int ahead = min(items, shape.stages);
  if (lane == 0) {
#pragma unroll 1
    for (int i = 0; i < shape.stages; ++i) {
      mbarrier_init(tiles_full + i * 8, 1);
      if (leads) {
        mbarrier_init(x_full + i * 8, 1);
        mbarrier_init(x_empty + i * 8, shape.row_groups);
      }
    }
    if (warp == 0) sums.init();
    mbarrier_init_fence();
    async_proxy_fence();
#pragma unroll 1
    for (int i = 0; i < ahead; ++i) copy_tiles(i, i);
  }
  if (thread == 0) {
    prefetch_map(x_map);
    prefetch_to_l2(product.w.master_scale);
  }
  __syncthreads();
  if (split > 1) cluster_arrive();
  start_next_kernel();
  wait_for_previous_kernel();
  const float s = load_past_l1(product.w.master_scale) * (1 << kShiftedDown);
  if (leads && lane == 0) {
#pragma unroll 1
    for (int i = 0; i < ahead; ++i) copy_x(i, i);
  }
  __syncwarp();

  // This lane's row of x and 16-byte chunk for ldmatrix. Of 16 tokens a load has one k16 slice; of
  // eight, two.
  const int x_row = kTokens == 8 ? lane % 8 : lane % 8 + lane / 16 * 8;
  const int x_chunk = kTokens == 8 ? lane / 8 : lane / 8 % 2;
  constexpr int kLoads = kTokens == 8 ? 4 : 8;

  float d[kTiles][kTokens / 8][4] = {};
  uint32_t nan_bits = 0;
  int stage = 0, parity = 0;
#pragma unroll 1
  for (int item = 0; item < items; ++item) {
    mbarrier_wait(x_full + stage * 8, parity);
    uint32_t b[kLoads][4];  // b0, b1 of the first product and of the second
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      ldmatrix(b[i], x_of(stage) + Rows::chunk_offset(x_row, i * (16 / kLoads) + x_chunk));
    mbarrier_wait(tiles_full + stage * 8, parity);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      // All warps have kTiles or one less, except where the block has fewer tiles than row groups.
      if (kTiles > 1 && t == kTiles - 1 && tiles < kTiles) break;
      LaneTile tile;
      tile.load(ring + stage * kSlotBytes + t * kTileBytes, lane);
      nan_bits |= tile.nan_bits();
      const auto multiply = [&]<int kHalf>() {
        uint32_t a[4][4];
        tile.make<kHalf>(a);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if constexpr (kTokens == 8) {
            const uint32_t* const pair = b[kHalf * 2 + i / 2] + i % 2 * 2;
            mma_bf16(d[t][0], a[i], pair[0], pair[1]);
          } else {
            mma_bf16(d[t][0], a[i], b[kHalf * 4 + i][0], b[kHalf * 4 + i][1]);
            mma_bf16(d[t][1], a[i], b[kHalf * 4 + i][2], b[kHalf * 4 + i][3]);
          }
      };
      multiply.template operator()<0>();
      multiply.template operator()<1>();
    }
    __syncwarp();
    if (lane == 0) {
      mbarrier_arrive(x_empty + stage * 8);
      if (item + shape.stages < items) copy_tiles(item + shape.stages, stage);
      // The stage before, which the part's other warps have probably left.
      if (leads && item > 0 && item - 1 + shape.stages < items) {
        const int last = stage == 0 ? shape.stages - 1 : stage - 1;
        mbarrier_wait(x_empty + last * 8, stage == 0 ? parity ^ 1 : parity);
        copy_x(item - 1 + shape.stages, last);
      }
    }
    __syncwarp();
    if (++stage == shape.stages) stage = 0, parity ^= 1;
  }

  // A NaN among the scales, which is rare: their rows are found by another pass.
  if (__any_sync(0xFFFFFFFFu, nan_bits & (kNanRow | kNanRow << 8))) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      if (t >= tiles) break;
      uint32_t bits = 0;
#pragma unroll 1
      for (int item = 0; item < items; ++item) {
        LaneTile tile;
        tile.load(tile_at(item) + t * kTileBytes, lane);
        bits |= tile.nan_bits();
      }
#pragma unroll
      for (int c = 0; c < kTokens / 8; ++c)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (bits & kNanRow << (j / 2 * 8)) d[t][c][j] = __uint_as_float(0x7FC00000u);
    }
  }

  __syncthreads();  // all copies have landed and all warps have read them
  float* const to =
      sums.own + (part * kTokens + lane % 4 * 2) * sums.pitch + first_own * kTileRows + lane / 4;
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
    if (t < tiles)
#pragma unroll
      for (int c = 0; c < kTokens / 8; ++c)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          to[(c * 8 + j % 2) * sums.pitch + t * kTileRows + j / 2 * 8] = d[t][c][j];
  sums.exchange(thread);
  sums.write(product, s, first_tile * kTileRows, block_tiles * kTileRows, first_token, shape.m);
  if (split > 1) cluster_wait();  // the other has received this block's sums
#endif
}

// How products are divided: each into shares of at most row_groups * tiles row tiles.
struct Division {
  Division(Products products, int processors)
      : split(quant::column_slices(products[0].w.k) > 1 && processors > 1 ? 2 : 1) {
    int64_t all = 0;
    for (const TiledProduct& product : products) all += quant::row_tiles(product.w.n);
    // One cluster for each pair of multiprocessors, or more where a share would have too many
    // tiles.
    const int64_t clusters = processors / split;
    const int64_t most =
        clusters * ceil_div(divide_rows(products, kMaxGroups * kMaxTiles), clusters);
    int64_t share = ceil_div(all, most);
    while (divide_rows(products, share) > most) ++share;
    while (row_groups < kMaxGroups && row_groups * kMaxTiles < share) row_groups *= 2;
    tiles = ceil_div(share, row_groups);
  }
  // Sets the shares of each matrix, of at most `most` row tiles. Returns their sum.
  int64_t divide_rows(Products products, int64_t most) {
    int64_t sum = 0;
    for (size_t i = 0; i < products.size(); ++i)
      sum += shares[i] = ceil_div(quant::row_tiles(products[i].w.n), most);
    return sum;
  }
  int64_t all_shares() const { return std::accumulate(shares, shares + kMaxProducts, int64_t{0}); }

  int64_t split;
  int64_t row_groups = 2, tiles = 0;  // tiles of a warp
  int64_t shares[kMaxProducts] = {};
};

template <int kTokens, int kTiles>
void launch_shape(const ProductLaunch& at, const ProductList& products, const bf16* x, int64_t m,
                  const Division& by) {
  constexpr int64_t kAlignment = 1024;
  const int64_t k = products.items[0].of.w.k, parts = kWarps / by.row_groups;
  const int64_t pitch_bytes = sums_pitch(static_cast<int>(by.row_groups) * kTiles * kTileRows) * 4;
  const int64_t received_bytes = (by.split - 1) * parts * ceil_div(kTokens, by.split) * pitch_bytes;
  const int64_t stage_bytes = parts * kTokens * kTileColumns * 2 + kWarps * kTiles * kTileBytes;
  const int64_t stage_barriers = (kWarps + 2 * parts) * 8;
  const int64_t items = ceil_div(ceil_div(quant::column_slices(k), by.split), parts);
  const int64_t limit_bytes = at.block_bytes(kBlocks);
  const int64_t stages =
      std::min({items, int64_t{kMaxStages},
                (limit_bytes - kAlignment - received_bytes - 8) / (stage_bytes + stage_barriers)});
  const int64_t received_at = std::max(stages * stage_bytes, parts * kTokens * pitch_bytes);
  const int64_t barriers_at = received_at + received_bytes;
  const int64_t smem_bytes = kAlignment + barriers_at + stages * stage_barriers + 8;
  BBB_ASSERT((stages > 1 || items == 1) && smem_bytes <= limit_bytes);
  launch(at.stream,
         {dim3(static_cast<unsigned>(by.all_shares() * by.split),
               static_cast<unsigned>(ceil_div(m, kTokens))),
          dim3(kWarps * 32), smem_bytes, true, static_cast<unsigned>(by.split)},
         packed_mma_kernel<kTokens, kTiles>, matrix_map(x, m, k, kTokens), products,
         MmaShape{k, static_cast<int>(m), static_cast<int>(by.row_groups), static_cast<int>(stages),
                  static_cast<int>(received_at), static_cast<int>(barriers_at)});
}

template <int kTokens>
void launch_tokens(const ProductLaunch& at, Products products, const bf16* x, int64_t m) {
  const Division by(products, at.processors);
  ProductList list{};
  for (size_t i = 0; i < products.size(); ++i) list.items[i] = {products[i], by.shares[i]};
  static_assert(kMaxTiles == 4);
  const auto launch_it = by.tiles == 1   ? launch_shape<kTokens, 1>
                         : by.tiles == 2 ? launch_shape<kTokens, 2>
                         : by.tiles == 3 ? launch_shape<kTokens, 3>
                                         : launch_shape<kTokens, 4>;
  launch_it(at, list, x, m, by);
}

}  // namespace

void launch_packed_mma(const ProductLaunch& at, const std::vector<TiledProduct>& all, const bf16* x,
                       int64_t m) {
  const auto launch_it = m <= 8 ? launch_tokens<8> : launch_tokens<16>;
  for (size_t i = 0; i < all.size(); i += kMaxProducts)
    launch_it(at, Products(all).subspan(i, std::min<size_t>(all.size() - i, kMaxProducts)), x, m);
}

}  // namespace bbb::cuda
