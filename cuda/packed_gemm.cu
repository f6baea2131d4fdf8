// Products of many rows with 2-bit weights in tiles (quant/packed_tiles.h), on warpgroup products
// in bf16 (sm_90a):
//
//   y = S x ((q - z) e)^T (+ addend)        x (M, K) bf16, y (M, N) bf16 or FP32
//
// Weights are the operand A, 64 output rows a warpgroup, made in registers; rows of x are columns
// of B, kTokens of them, a tile in shared memory. (q - z) e is exact in bf16 (cuda/packed_sums.h),
// so a product differs from one in F64 only by the FP32 sums.
//
// A block has up to four warpgroups. A stage of its ring holds a slice of 128 positions: the row
// tiles of all its warpgroups, consecutive in memory, and kTokens rows of x. Each warp makes the
// fragments of its own row tile, those of half a slice, A(i), while the half before is multiplied:
//
//     wait full | make A(0) | issue A(0) | wait for the half before, leave its stage | make A(1)
//     | issue A(1) | wait for A(0)
//
// Thread 0 refills a stage once all warps have left it.
//
// A launch takes up to three products of the same x. Each is divided into shares of whole
// warpgroups. A cluster of up to eight blocks takes a share and kTokens rows of x, and each block a
// part of the slices. They add up their sums as cuda/packed_sums.h describes. Bytes moved: tiles
// once for each kTokens rows of x, from memory once; x once for each share, from the L2 cache.
#include <algorithm>
#include <array>
#include <numeric>

#include "cuda/cuda_backend.h"
#include "cuda/packed_gemv.h"
#include "cuda/packed_sums.h"
#include "quant/packed_tiles.h"

namespace bbb::cuda {

namespace {

using quant::kTileBytes;
using quant::kTileColumns;
using quant::kTileRows;

constexpr int kGroupTiles = 4;  // row tiles of a warpgroup, one a warp
constexpr int kGroupRows = kGroupTiles * kTileRows;
constexpr int kMaxSplit = 8;  // blocks of a cluster
constexpr int kMaxStages = 8;

// Blocks that fit on a multiprocessor. With two, the next product's copies start while this one
// still runs.
constexpr int blocks_of(int tokens) { return tokens <= 64 ? 2 : 1; }
// The most warpgroups of a block: four on a multiprocessor, whose registers they fill.
constexpr int groups_of(int tokens) { return 4 / blocks_of(tokens); }

// Bytes of a stage's slice of x. The stages' slices come first, aligned as swizzled tiles are.
constexpr int x_bytes(int tokens) { return tokens * kTileColumns * 2; }

struct GemmShape {
  int64_t k;
  int m, stages;
  int received_at, barriers_at;  // bytes of shared memory
};

// Block (share and rank, token tile). Shared memory from a multiple of 1024 on: the stages' slices
// of x and their tiles, at the end the block's own sums (kTokens, pitch); the others' sums of this
// block's tokens (split - 1, tokens, pitch); two barriers a stage and one for those sums.
template <int kTokens>
__global__ void __launch_bounds__(groups_of(kTokens) * kWarpgroup, blocks_of(kTokens))
    packed_gemm_kernel(const __grid_constant__ CUtensorMap x_map,
                       const __grid_constant__ ProductList products, GemmShape shape) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Rows = Operand<kTileColumns, kTokens>;
  unsigned char* const smem = swizzled_smem();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int most_groups = static_cast<int>(blockDim.x) / kWarpgroup;
  const int group = thread / kWarpgroup, warp = thread / 32;  // row tile `warp` of the block
  const int split = cluster_blocks(), rank = cluster_rank();
  const int all_slices = static_cast<int>(quant::column_slices(shape.k));
  const int first_slice = rank * all_slices / split;
  const int slices = (rank + 1) * all_slices / split - first_slice;
  const int first_token = static_cast<int>(blockIdx.y) * kTokens;

  int64_t share = blockIdx.x / static_cast<unsigned>(split);
  const int p = find_product(products, share);
  const TiledProduct& product = products.items[p].of;
  const int64_t n = product.w.n, all_tiles = quant::row_tiles(n);
  const int64_t all_groups = (all_tiles + kGroupTiles - 1) / kGroupTiles;
  const int64_t shares = products.items[p].shares;
  const int64_t first_group = share * all_groups / shares;
  const int groups = static_cast<int>((share + 1) * all_groups / shares - first_group);

  const int tile_stage = most_groups * kGroupTiles * kTileBytes;
  unsigned char* const tiles = smem + shape.stages * Rows::kBytes;
  const uint32_t full = shared_address(smem + shape.barriers_at);
  const uint32_t empty = full + shape.stages * 8;
  const ClusterSums<kTokens> sums{reinterpret_cast<float*>(smem),
                                  reinterpret_cast<float*>(smem + shape.received_at),
                                  empty + shape.stages * 8,
                                  sums_pitch(most_groups * kGroupRows),
                                  split,
                                  rank};
  // Thread 0 copies.
  const int64_t first_tile = first_group * kGroupTiles;
  const int tile_bytes =
      static_cast<int>(min(int64_t{groups} * kGroupTiles, all_tiles - first_tile)) * kTileBytes;
  const uint8_t* source =  // the next slice's tiles
      product.w.tiles + quant::tile_index(n, first_slice, first_tile) * kTileBytes;
  const auto copy_tiles = [&](int stage) {
    mbarrier_expect(full + stage * 8, tile_bytes + Rows::kBytes);
    copy_bytes(shared_address(tiles + stage * tile_stage), source, tile_bytes, full + stage * 8);
    source += all_tiles * kTileBytes;
  };
  const auto copy_x = [&](int i, int stage) {
#pragma unroll
    for (int panel = 0; panel < Rows::Panel::kPanels; ++panel)
      copy_box(shared_address(smem + stage * Rows::kBytes + panel * Rows::kPanelBytes), x_map,
               full + stage * 8, (first_slice + i) * kTileColumns + panel * Rows::Panel::kColumns,
               first_token);
  };
  const int ahead = min(slices, shape.stages);
  if (thread == 0) {
#pragma unroll 1
    for (int i = 0; i < shape.stages; ++i) {
      mbarrier_init(full + i * 8, 1);
      mbarrier_init(empty + i * 8, groups * kGroupTiles);
    }
    sums.init();
    mbarrier_init_fence();
    async_proxy_fence();
    prefetch_map(x_map);
#pragma unroll 1
    for (int i = 0; i < ahead; ++i) copy_tiles(i);
  }
  __syncthreads();
  if (split > 1) cluster_arrive();
  if (thread == 0) prefetch_to_l2(product.w.master_scale);
  start_next_kernel();
  wait_for_previous_kernel();
  const float s = load_past_l1(product.w.master_scale) * (1 << kShiftedDown);
  if (thread == 0) {
#pragma unroll 1
    for (int i = 0; i < ahead; ++i) copy_x(i, i);
  }
  __syncwarp();

  float d[kTokens / 8][4] = {};
  uint32_t nan_bits = 0;
  if (group < groups) {
    int stage = 0, parity = 0;
    LaneTile tile;
    uint32_t a[2][4][4];  // of both halves: one is made while the other is multiplied
    uint64_t x = 0;
    const auto issue = [&]<int kHalf>() {
      fragment_fence(a[kHalf]);
      wgmma_fence();
#pragma unroll
      for (int j = 0; j < 4; ++j)
        wgmma<Along::Columns>(d, a[kHalf][j],
                              Rows::template slice<Along::Columns>(x, kHalf * 4 + j), 1);
      wgmma_commit();
    };
    // The stage of slice i, the one before the current stage.
    const auto leave_stage = [&](int i) {
      const int last = stage == 0 ? shape.stages - 1 : stage - 1;
      mbarrier_arrive_warp(empty + last * 8, lane);
      if (i + shape.stages >= slices) return;
      if (thread == 0) {
        mbarrier_wait(empty + last * 8, stage == 0 ? parity ^ 1 : parity);
        copy_tiles(last);
        copy_x(i + shape.stages, last);
      }
      __syncwarp();
    };
#pragma unroll 1
    for (int i = 0; i < slices; ++i) {
      mbarrier_wait(full + stage * 8, parity);
      tile.load(tiles + stage * tile_stage + warp * kTileBytes, lane);
      nan_bits |= tile.nan_bits();
      // From lane 0: then the compiler knows that all lanes have the same.
      x = Rows::template descriptor<Along::Columns>(
          __shfl_sync(0xFFFFFFFFu, shared_address(smem + stage * Rows::kBytes), 0));
      tile.make<0>(a[0]);
      issue.template operator()<0>();
      wgmma_wait<1>();
      if (i > 0) leave_stage(i - 1);
      tile.make<1>(a[1]);
      issue.template operator()<1>();
      wgmma_wait<1>();
      if (++stage == shape.stages) stage = 0, parity ^= 1;
    }
    wgmma_wait<0>();
    accumulator_fence(d);
  }

  __syncthreads();  // all copies have landed and all products have read them
  if (group < groups) {
    float* const to = sums.own + lane % 4 * 2 * sums.pitch + warp * kTileRows + lane / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool is_nan = nan_bits & kNanRow << (8 * half);
#pragma unroll
      for (int i = 0; i < kTokens / 8; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j)
          to[(i * 8 + j) * sums.pitch + half * 8] =
              is_nan ? __uint_as_float(0x7FC00000u) : d[i][half * 2 + j];
    }
  }
  sums.exchange(thread);
  sums.write(product, s, first_group * kGroupRows, groups * kGroupRows, first_token, shape.m);
  if (split > 1) cluster_wait();  // the others have received this block's sums
#endif
}

// Clusters of 1 .. kMaxSplit blocks that run at once, a block a multiprocessor. A cluster is within
// a group of multiprocessors, and the groups of a GPU differ in size.
using ClusterLimits = std::array<int64_t, kMaxSplit + 1>;

ClusterLimits find_cluster_limits(const ProductLaunch& at) {
  const auto kernel = reinterpret_cast<const void*>(packed_gemm_kernel<128>);
  const auto smem_bytes = static_cast<int>(at.block_bytes(1));
  BBB_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes));
  ClusterLimits limits{0, at.processors};
  for (unsigned split = 2; split <= kMaxSplit; ++split) {
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {split, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(split);
    config.blockDim = dim3(kWarpgroup);
    config.dynamicSmemBytes = static_cast<size_t>(smem_bytes);
    config.attrs = &cluster;
    config.numAttrs = 1;
    int clusters = 0;
    BBB_CUDA(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
    limits[split] = clusters;
  }
  return limits;
}

// How products are divided: each into shares of at most `groups` warpgroups, each taken by a
// cluster of `split` blocks.
struct Division {
  Division(Products products, const ClusterLimits& limits, int tokens, int64_t token_tiles,
           int groups, int64_t split)
      : groups(groups), split(split) {
    int64_t clusters = 0;
    for (size_t i = 0; i < products.size(); ++i)
      clusters += shares[i] = ceil_div(products[i].w.n, int64_t{groups} * kGroupRows);
    clusters *= token_tiles;
    // Blocks that share a multiprocessor.
    const int64_t shared = std::min<int64_t>(ceil_div(clusters, limits[split]), blocks_of(tokens));
    const int64_t waves = ceil_div(clusters, limits[split] * shared);
    const int64_t slices = ceil_div(quant::column_slices(products[0].w.k), split);
    // Cycles of a slice: one step after another for a warpgroup; the instructions that make A and
    // the products of all warpgroups; the copies of x from the L2 cache. Then those of a block's
    // start and end.
    const int64_t slice =
        std::max({int64_t{500} + 2 * tokens, shared * groups * std::max(130, 4 * tokens),
                  shared * 9 * tokens}) +
        60;
    const int64_t ends = 2000 + 6 * tokens * groups * shared / split + (split > 1 ? 1500 : 0);
    cost = waves * (slices * slice + ends);
  }
  int64_t all_shares() const { return std::accumulate(shares, shares + kMaxProducts, int64_t{0}); }

  int64_t groups, split, cost;
  int64_t shares[kMaxProducts] = {};
};

// A block's shared memory.
struct Memory {
  Memory(const ProductLaunch& at, const Division& by, int tokens, int64_t k) {
    constexpr int64_t kAlignment = 1024;
    const int64_t pitch_bytes = sums_pitch(static_cast<int>(by.groups) * kGroupRows) * 4;
    const int64_t received_bytes = (by.split - 1) * ceil_div(tokens, by.split) * pitch_bytes;
    const int64_t stage_bytes = x_bytes(tokens) + by.groups * kGroupTiles * kTileBytes;
    const int64_t slices = ceil_div(quant::column_slices(k), by.split);
    const int64_t limit_bytes = at.block_bytes(blocks_of(tokens));
    stages = std::min({slices, int64_t{kMaxStages},
                       (limit_bytes - kAlignment - received_bytes - 8) / (stage_bytes + 16)});
    received_at = std::max(stages * stage_bytes, tokens * pitch_bytes);
    barriers_at = received_at + received_bytes;
    bytes = kAlignment + barriers_at + stages * 16 + 8;
    fits = (stages > 1 || slices == 1) && bytes <= limit_bytes;
  }

  int64_t stages, received_at, barriers_at, bytes;
  bool fits;
};

Division divide(const ProductLaunch& at, Products products, const ClusterLimits& limits, int tokens,
                int64_t token_tiles) {
  const int64_t k = products[0].w.k;
  Division best(products, limits, tokens, token_tiles, groups_of(tokens), 1);
  for (int groups = 1; groups <= groups_of(tokens); ++groups)
    for (int64_t split = 1; split <= std::min<int64_t>(quant::column_slices(k), kMaxSplit);
         ++split) {
      if (limits[split] == 0) continue;
      const Division other(products, limits, tokens, token_tiles, groups, split);
      if (other.cost < best.cost && Memory(at, other, tokens, k).fits) best = other;
    }
  BBB_ASSERT(Memory(at, best, tokens, k).fits);
  return best;
}

template <int kTokens>
void launch_tokens(const ProductLaunch& at, Products products, const bf16* x, int64_t m) {
  const int64_t k = products[0].w.k, token_tiles = ceil_div(m, kTokens);
  static const ClusterLimits limits = find_cluster_limits(at);
  const Division by = divide(at, products, limits, kTokens, token_tiles);
  const Memory memory(at, by, kTokens, k);
  ProductList list{};
  for (size_t i = 0; i < products.size(); ++i) list.items[i] = {products[i], by.shares[i]};
  launch(
      at.stream,
      {dim3(static_cast<unsigned>(by.all_shares() * by.split), static_cast<unsigned>(token_tiles)),
       dim3(static_cast<unsigned>(by.groups * kWarpgroup)), memory.bytes, true,
       static_cast<unsigned>(by.split)},
      packed_gemm_kernel<kTokens>, matrix_map(x, m, k, kTokens), list,
      GemmShape{k, static_cast<int>(m), static_cast<int>(memory.stages),
                static_cast<int>(memory.received_at), static_cast<int>(memory.barriers_at)});
}

}  // namespace

void launch_packed_gemm(const ProductLaunch& at, const std::vector<TiledProduct>& all,
                        const bf16* x, int64_t m) {
  const auto launch_it = m <= 32   ? launch_tokens<32>
                         : m <= 64 ? launch_tokens<64>
                                   : launch_tokens<128>;
  for (size_t i = 0; i < all.size(); i += kMaxProducts)
    launch_it(at, Products(all).subspan(i, std::min<size_t>(all.size() - i, kMaxProducts)), x, m);
}

}  // namespace bbb::cuda
