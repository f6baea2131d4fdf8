// Products of many rows with 2-bit weights in tiles (quant/packed_tiles.h) and with weights of 3, 4
// and 8 bits as in the file, on warpgroup products in bf16 (sm_90a):
//
//   y = S x ((q - z) e)^T (+ addend)        x (M, K) bf16, y (M, N) bf16 or FP32
//
// Weights are the operand A, made in registers; rows of x are columns of B, kTokens of them, a tile
// in shared memory. Up to 4 bits, (q - z) e is exact in bf16 (cuda/packed_sums.h), so a product
// differs from one in F64 only by the FP32 sums. Of 8 bits it is rounded to bf16
// (cuda/packed_codes.h).
//
// A stage of a block's ring holds a slice of 128 positions: the block's row tiles and kTokens rows
// of x. Tiles are consecutive in memory. Rows of codes are copied in boxes of 64; their scales and
// zero points are consecutive (quant/slice_pairs.h). Up to 32 rows of x, a block has 64 or 128
// output rows, and its warpgroups take slices in turn; their sums are added in shared memory. For
// more rows of x, each warpgroup has its own 64 output rows, and takes all slices. Each warp makes
// the fragments of its own one or two row tiles, those of half a slice, A(i), while the half before
// is multiplied:
//
//     wait full | make A(0) | issue A(0) | wait for the half before, leave its stage | make A(1)
//     | issue A(1) | wait for A(0)
//
// With 32 rows of x and two row tiles a warp, registers hold one fragment: it is waited for first.
//
// The first thread of those that share a stage refills it once all their warps have left it.
//
// A launch takes up to three products of the same x. Each is divided into shares. A cluster of up
// to eight blocks takes a share and kTokens rows of x, and each block a part of the slices. They
// add up their sums as cuda/packed_sums.h describes. Bytes moved: tiles once for each kTokens rows
// of x, from memory once; x once for each share, from the L2 cache.
#include <algorithm>
#include <array>
#include <map>
#include <numeric>
#include <type_traits>

#include "cuda/cuda_backend.h"
#include "cuda/packed_codes.h"
#include "cuda/packed_gemv.h"
#include "cuda/packed_sums.h"
#include "quant/packed_tiles.h"

namespace bbb::cuda {

namespace {

using quant::kTileBytes;
using quant::kTileColumns;
using quant::kTileRows;

constexpr int kMaxSplit = 8;  // blocks of a cluster
constexpr int kMaxStages = 16;
constexpr int kMaxBlocks = 3;  // on a multiprocessor

// Whether the warpgroups of a block take slices in turn, each for all output rows of the block.
// Otherwise each takes 64 output rows, and all slices: then they share the rows of x, which are the
// larger part of a stage.
constexpr bool by_slices(int tokens) { return tokens <= 32; }
// Warpgroups of a multiprocessor: they fill its registers.
constexpr int most_groups(int tokens, int tiles) { return tokens <= 32 && tiles == 1 ? 6 : 4; }
// Row tiles that a warp multiplies by a slice.
constexpr int most_tiles(int tokens) { return tokens <= 32 ? 2 : 1; }
// Fragments of A, of half a slice each: with two, one is made while the other is multiplied.
constexpr int buffers_of(int tokens, int tiles) { return tokens == 32 && tiles == 2 ? 1 : 2; }

// Bytes of a stage's slice of x. The stages' slices come first, aligned as swizzled tiles are.
constexpr int x_bytes(int tokens) { return tokens * kTileColumns * 2; }
// Of a row tile, and of the codes of 64 rows where those are as in the file.
constexpr int kEntryBytes = kTileRows * quant::kSlicePairBytes;
constexpr int four_codes_bytes(int bits) { return 4 * kTileRows * kTileColumns * bits / 8; }
constexpr int tile_bytes(int bits) {
  return bits == 2 ? kTileBytes : four_codes_bytes(bits) / 4 + kEntryBytes;
}

// Of each product: boxes of 64 rows of a slice of its codes.
template <int kBits>
struct CodeMaps {
  CUtensorMap items[kMaxProducts];
};
template <>
struct CodeMaps<2> {};

struct GemmShape {
  int slices;  // of K
  int m, stages;
  int received_at, barriers_at;  // bytes of shared memory
};

// Block (share and rank, token tile).
// Shared memory from a multiple of 1024 on: the stages' slices of x, and their tiles; or their
// codes, and their scales and zero points. At the end the block's own sums (kTokens, pitch), if the
// warpgroups take slices those of each; the others' sums of this block's tokens (split - 1, tokens,
// pitch); two barriers a stage and one for those sums.
template <int kTokens, int kTiles, int kBits>
__global__ void __launch_bounds__(most_groups(kTokens, kTiles) * kWarpgroup, 1)
    packed_gemm_kernel(const __grid_constant__ CUtensorMap x_map,
                       const __grid_constant__ CodeMaps<kBits> code_maps,
                       const __grid_constant__ ProductList products, GemmShape shape) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Rows = Operand<kTileColumns, kTokens>;
  constexpr bool kBySlices = by_slices(kTokens);
  constexpr int kGroupTiles = kTiles * 4;  // row tiles of a warpgroup
  constexpr int kBuffers = buffers_of(kTokens, kTiles);
  // Lanes of a warp that arrive when it leaves a stage. One stands for all: they have converged,
  // and none reads the stage any more. But where warpgroups share stages, compute-sanitizer's
  // racecheck reports the reads of lanes that do not arrive themselves.
  constexpr int kArriving = kBySlices ? 1 : 32;
  unsigned char* const smem = swizzled_smem();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int groups = static_cast<int>(blockDim.x) / kWarpgroup;
  // From lane 0: then the compiler knows that all lanes have the same.
  const int warp = __shfl_sync(0xFFFFFFFFu, thread / 32, 0), group = warp / 4;
  const int split = cluster_blocks(), rank = cluster_rank();
  const int first_slice = rank * shape.slices / split;
  const int slices = (rank + 1) * shape.slices / split - first_slice;
  const int first_token = static_cast<int>(blockIdx.y) * kTokens;

  int64_t share = static_cast<int>(blockIdx.x) / split;
  const int p = find_product(products, share);
  const TiledProduct& product = products.items[p].of;
  const int64_t n = product.w.n, all_tiles = quant::row_tiles(n);
  // Row tiles are divided among the shares by fours, at most block_tiles each.
  const int block_tiles = kGroupTiles * (kBySlices ? 1 : groups);
  const auto fours = static_cast<unsigned>((all_tiles + 3) / 4);
  const auto shares = static_cast<unsigned>(products.items[p].shares);
  const unsigned first_four = static_cast<unsigned>(share) * fours / shares;
  const unsigned end_four = (static_cast<unsigned>(share) + 1) * fours / shares;
  const int64_t first_tile = int64_t{first_four} * 4;
  const int row_tiles = static_cast<int>(min(int64_t{end_four} * 4, all_tiles) - first_tile);

  unsigned char* const tiles = smem + shape.stages * Rows::kBytes;
  // Where codes are as in the file: scales and zero points, behind the codes of all stages.
  constexpr int kFourCodes = four_codes_bytes(kBits);
  unsigned char* const entries = tiles + shape.stages * (block_tiles / 4) * kFourCodes;
  const uint32_t full = shared_address(smem + shape.barriers_at);
  const uint32_t empty = full + shape.stages * 8;
  const ClusterSums<kTokens> sums{reinterpret_cast<float*>(smem),
                                  reinterpret_cast<float*>(smem + shape.received_at),
                                  empty + shape.stages * 8,
                                  sums_pitch(block_tiles * kTileRows),
                                  split,
                                  rank};
  constexpr int kSourceBytes = kBits == 2 ? kTileBytes : kEntryBytes;  // of a row tile
  const uint8_t* const source =
      product.w.tiles + quant::tile_index(n, first_slice, first_tile) * kSourceBytes;
  const int64_t source_pitch = all_tiles * kSourceBytes;
  const auto copy_tiles = [&](int i, int stage) {
    const int bytes = row_tiles * kSourceBytes, boxes = kBits == 2 ? 0 : (row_tiles + 3) / 4;
    mbarrier_expect(full + stage * 8, bytes + boxes * kFourCodes + Rows::kBytes);
    unsigned char* const to = kBits == 2 ? tiles : entries;
    copy_bytes(shared_address(to + stage * block_tiles * kSourceBytes), source + i * source_pitch,
               bytes, full + stage * 8);
    if constexpr (kBits != 2)
#pragma unroll 1
      for (int box = 0; box < boxes; ++box)
        copy_box(shared_address(tiles + (stage * (block_tiles / 4) + box) * kFourCodes),
                 code_maps.items[p], full + stage * 8, (first_slice + i) * (16 * kBits),
                 static_cast<int>(first_tile + box * 4) * kTileRows);
  };
  const auto copy_x = [&](int i, int stage) {
#pragma unroll
    for (int panel = 0; panel < Rows::Panel::kPanels; ++panel)
      copy_box(shared_address(smem + stage * Rows::kBytes + panel * Rows::kPanelBytes), x_map,
               full + stage * 8, (first_slice + i) * kTileColumns + panel * Rows::Panel::kColumns,
               first_token);
  };
  if (thread < 32) {
    if (lane < shape.stages) {
      mbarrier_init(full + lane * 8, 1);
      mbarrier_init(empty + lane * 8, (kBySlices ? 1 : groups) * 4 * kArriving);
    }
    if (lane == 0) {
      sums.init();
      prefetch_map(x_map);
      if constexpr (kBits != 2) prefetch_map(code_maps.items[p]);
      prefetch_to_l2(product.w.master_scale);
    }
    mbarrier_init_fence();
    async_proxy_fence();
  }
  __syncthreads();
  if (split > 1) cluster_arrive();
  // Each warp starts some of the first copies.
  const auto start_copies = [&](const auto& copy) {
    if (lane == 0) {
#pragma unroll 1
      for (int i = warp; i < min(slices, shape.stages); i += groups * 4) copy(i, i);
    }
    __syncwarp();
  };
  start_copies(copy_tiles);
  start_next_kernel();
  wait_for_previous_kernel();
  start_copies(copy_x);
  const float s = load_past_l1(product.w.master_scale) * (1 << kShiftedDown);

  float d[kTiles][kTokens / 8][4] = {};
  uint32_t nan_bits[kTiles] = {};
  // The warp's first row tile; its others are each four further.
  const int warp_tile = (kBySlices ? 0 : group * kGroupTiles) + warp % 4;
  const int first = kBySlices ? group : 0, step = kBySlices ? groups : 1;
  {
    int stage = first, parity = 0;
    std::conditional_t<kBits == 2, LaneTile, LaneCodes<kBits>> tile[kTiles];
    uint32_t a[kBuffers][kTiles][4][4];
    uint64_t x = 0;
    const auto make_and_issue = [&]<int kHalf>() {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) tile[t].template make<kHalf>(a[kHalf % kBuffers][t]);
#pragma unroll
      for (int t = 0; t < kTiles; ++t) fragment_fence(a[kHalf % kBuffers][t]);
      wgmma_fence();
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int t = 0; t < kTiles; ++t)
          wgmma<Along::Columns>(d[t], a[kHalf % kBuffers][t][j],
                                Rows::template slice<Along::Columns>(x, kHalf * 4 + j), 1);
      wgmma_commit();
      wgmma_wait<kBuffers - 1>();
    };
    // Leaves the stage of slice i - step and starts the copies of the slice that takes its place.
    const auto leave_stage = [&](int i) {
      const bool wraps = stage < step;
      const int left = wraps ? stage - step + shape.stages : stage - step;
      if constexpr (kArriving == 1)
        mbarrier_arrive_warp(empty + left * 8, lane);
      else
        mbarrier_arrive(empty + left * 8);
      const int next = i - step + shape.stages;
      if (next >= slices) return;
      if (thread == (kBySlices ? group * kWarpgroup : 0)) {
        mbarrier_wait(empty + left * 8, wraps ? parity ^ 1 : parity);
        copy_tiles(next, left);
        copy_x(next, left);
      }
      __syncwarp();
    };
#pragma unroll
    for (int t = 0; t < kTiles; ++t) accumulator_fence(d[t]);
#pragma unroll 1
    for (int i = first; i < slices; i += step) {
      mbarrier_wait(full + stage * 8, parity);
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const int number = stage * block_tiles + warp_tile + t * 4;
        if constexpr (kBits == 2)
          tile[t].load(tiles + number * kTileBytes, lane);
        else
          tile[t].load(tiles + number * (kFourCodes / 4), entries + number * kEntryBytes, lane);
        nan_bits[t] |= tile[t].nan_bits();
      }
      // From lane 0: then the compiler knows that all lanes have the same.
      x = Rows::template descriptor<Along::Columns>(
          __shfl_sync(0xFFFFFFFFu, shared_address(smem + stage * Rows::kBytes), 0));
      make_and_issue.template operator()<0>();
      if (i > first) leave_stage(i);
      make_and_issue.template operator()<1>();
      stage += step;
      if (stage >= shape.stages) stage -= shape.stages, parity ^= 1;
    }
    wgmma_wait<0>();
#pragma unroll
    for (int t = 0; t < kTiles; ++t) accumulator_fence(d[t]);
  }

  __syncthreads();  // all copies have landed and all products have read them
  const int group_floats = kTokens * sums.pitch;
  float* const to = sums.own + (kBySlices ? group * group_floats : 0) + lane % 4 * 2 * sums.pitch +
                    warp_tile * kTileRows + lane / 4;
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool is_nan = nan_bits[t] & kNanRow << (8 * half);
#pragma unroll
      for (int i = 0; i < kTokens / 8; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j)
          to[(i * 8 + j) * sums.pitch + t * 4 * kTileRows + half * 8] =
              is_nan ? __uint_as_float(0x7FC00000u) : d[t][i][half * 2 + j];
    }
  if (kBySlices && groups > 1) sums.add_groups(thread, groups);
  sums.exchange(thread);
  sums.write(product, s, first_tile * kTileRows, row_tiles * kTileRows, first_token, shape.m);
  if (split > 1) cluster_wait();  // the others have received this block's sums
#endif
}

// Clusters of 1 .. kMaxSplit blocks that run at once, a block a multiprocessor. A cluster is within
// a group of multiprocessors, and the groups of a GPU differ in size.
using ClusterLimits = std::array<int64_t, kMaxSplit + 1>;

ClusterLimits find_cluster_limits(const ProductLaunch& at) {
  const auto kernel = reinterpret_cast<const void*>(packed_gemm_kernel<128, 1, 2>);
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

// How products are divided: each into shares of at most block_tiles() row tiles, each taken by a
// cluster of `split` blocks of `groups` warpgroups, of which `blocks` fit on a multiprocessor.
struct Division {
  int tokens;  // of a block
  int bits;    // of a weight
  int tiles;   // of a warp
  int blocks, groups, split;
  int64_t cost = 0;

  int64_t block_tiles() const { return int64_t{tiles} * 4 * (by_slices(tokens) ? 1 : groups); }
  // Shares of each product, into which its row tiles are divided by fours. One product alone gets
  // a share for each multiprocessor if it can: where all have a block of a product, all have room
  // for one of the next.
  std::array<int64_t, kMaxProducts> shares(Products products, const ClusterLimits& limits,
                                           int64_t token_tiles) const {
    std::array<int64_t, kMaxProducts> all{};
    const auto most = [&](size_t i) { return ceil_div(quant::row_tiles(products[i].w.n), 4); };
    for (size_t i = 0; i < products.size(); ++i) all[i] = ceil_div(most(i), block_tiles() / 4);
    if (products.size() == 1)
      all[0] = std::max(all[0], std::min(most(0), limits[split] / token_tiles));
    return all;
  }
  // Slices of a block, and of a warpgroup of these.
  int64_t block_slices(int64_t k) const { return ceil_div(quant::column_slices(k), split); }
  int64_t group_slices(int64_t k) const {
    return ceil_div(block_slices(k), by_slices(tokens) ? groups : 1);
  }

  // Cycles on an H200.
  void estimate(Products products, const ClusterLimits& limits, int64_t token_tiles) {
    const int64_t k = products[0].w.k;
    const auto all = shares(products, limits, token_tiles);
    const int64_t clusters = std::accumulate(all.begin(), all.end(), int64_t{0}) * token_tiles;
    // Blocks that share a multiprocessor.
    const int64_t shared = std::min<int64_t>(ceil_div(clusters, limits[split]), blocks);
    const int64_t waves = ceil_div(clusters, limits[split] * shared);
    // Blocks of clusters may share one while others are idle.
    const int64_t crowded = split > 1 ? blocks : shared;
    // Of a slice: one step after another for a warpgroup; the instructions that make A and the
    // products of all warpgroups; the copies of x from the L2 cache.
    const int64_t step = (tiles == 1 ? std::min(560 + 5 * tokens, 790) : 820 + 4 * tokens) +
                         (bits == 2 ? 0 : 200 * tiles);
    const int make = (tiles == 1 ? 160 : 130) + (bits == 2 ? 0 : tiles == 1 ? 120 : 110);
    const int64_t multiprocessor = crowded * groups * tiles * std::max(make, tokens * 19 / 4);
    const int64_t copies = crowded * 5 * tokens;
    // Of a block's start and end: a block that fills a multiprocessor starts late.
    const int64_t sums = tokens * tiles * groups * shared;
    const int64_t ends = 3900 + 6 * sums / split + (split > 1 ? 450 + 12 * tokens : 0);
    cost = waves * (std::max(group_slices(k) * std::max(step, multiprocessor),
                             block_slices(k) * copies) +
                    ends) +
           (blocks == 1 ? 1500 : 0);
  }
};

// A block's shared memory.
struct Memory {
  Memory(const ProductLaunch& at, const Division& by, int64_t k) {
    constexpr int64_t kAlignment = 1024;
    const int64_t pitch_bytes = sums_pitch(static_cast<int>(by.block_tiles()) * kTileRows) * 4;
    const int64_t received_bytes = (by.split - 1) * ceil_div(by.tokens, by.split) * pitch_bytes;
    const int64_t stage_bytes = x_bytes(by.tokens) + by.block_tiles() * tile_bytes(by.bits);
    const int64_t slices = by.block_slices(k), step = by_slices(by.tokens) ? by.groups : 1;
    const int64_t limit_bytes = at.block_bytes(by.blocks);
    stages = std::min({slices, int64_t{kMaxStages},
                       (limit_bytes - kAlignment - received_bytes - 8) / (stage_bytes + 16)});
    // Each warpgroup has its own stages. A wait names only a parity: a warpgroup that skipped a
    // phase would take the one before for the one after.
    if (stages < slices) stages -= stages % step;
    received_at = std::max(stages * stage_bytes, step * by.tokens * pitch_bytes);
    barriers_at = received_at + received_bytes;
    bytes = kAlignment + barriers_at + stages * 16 + 8;
    // A warpgroup leaves a stage once the slice of its next step is there. With two stages it then
    // waits for the latency of the other one's copies.
    fits = (stages > std::max<int64_t>(step, 2) || stages == slices) && bytes <= limit_bytes;
  }

  int64_t stages, received_at, barriers_at, bytes;
  bool fits;
};

Division divide(const ProductLaunch& at, Products products, const ClusterLimits& limits, int tokens,
                int64_t token_tiles) {
  const int64_t k = products[0].w.k;
  const int bits = products[0].w.bits;
  Division best{};
  for (int tiles = 1; tiles <= most_tiles(tokens); ++tiles)
    for (int blocks = 1; blocks <= kMaxBlocks; ++blocks)
      for (int groups = 1; groups <= most_groups(tokens, tiles) / blocks; ++groups)
        for (int split = 1; split <= std::min<int64_t>(quant::column_slices(k), kMaxSplit);
             ++split) {
          if (limits[static_cast<size_t>(split)] == 0) continue;
          Division other{tokens, bits, tiles, blocks, groups, split};
          if (!Memory(at, other, k).fits) continue;
          other.estimate(products, limits, token_tiles);
          if (best.cost == 0 || other.cost < best.cost) best = other;
        }
  BBB_ASSERT(best.cost > 0);
  return best;
}

// The same, searched once for each shape: that takes a few microseconds.
const Division& known_division(const ProductLaunch& at, Products products,
                               const ClusterLimits& limits, int tokens, int64_t token_tiles) {
  using Key = std::array<int64_t, 4 + kMaxProducts>;
  thread_local std::map<Key, Division> known;
  Key key{products[0].w.bits, tokens, token_tiles, products[0].w.k};
  for (size_t i = 0; i < products.size(); ++i) key[4 + i] = products[i].w.n;
  auto found = known.find(key);
  if (found == known.end())
    found = known.emplace(key, divide(at, products, limits, tokens, token_tiles)).first;
  return found->second;
}

template <int kTokens, int kTiles, int kBits>
void launch_division(const ProductLaunch& at, Products products, const bf16* x, int64_t m,
                     const Division& by, const std::array<int64_t, kMaxProducts>& shares) {
  const int64_t k = products[0].w.k;
  const Memory memory(at, by, k);
  ProductList list{};
  CodeMaps<kBits> code_maps;
  for (size_t i = 0; i < products.size(); ++i) {
    list.items[i] = {products[i], shares[i]};
    if constexpr (kBits != 2)
      code_maps.items[i] = code_map(products[i].w.codes, products[i].w.n,
                                    quant::code_row_bytes(k, kBits), 16 * kBits, 4 * kTileRows);
  }
  launch(at.stream,
         {dim3(static_cast<unsigned>(std::accumulate(shares.begin(), shares.end(), int64_t{0}) *
                                     by.split),
               static_cast<unsigned>(ceil_div(m, kTokens))),
          dim3(static_cast<unsigned>(by.groups * kWarpgroup)), memory.bytes, true,
          static_cast<unsigned>(by.split)},
         packed_gemm_kernel<kTokens, kTiles, kBits>, matrix_map(x, m, k, kTokens), code_maps, list,
         GemmShape{static_cast<int>(quant::column_slices(k)), static_cast<int>(m),
                   static_cast<int>(memory.stages), static_cast<int>(memory.received_at),
                   static_cast<int>(memory.barriers_at)});
}

template <int kTokens, int kBits>
void launch_tokens(const ProductLaunch& at, Products products, const bf16* x, int64_t m) {
  static const ClusterLimits limits = find_cluster_limits(at);
  const int64_t token_tiles = ceil_div(m, kTokens);
  const Division& by = known_division(at, products, limits, kTokens, token_tiles);
  const auto shares = by.shares(products, limits, token_tiles);
  if constexpr (most_tiles(kTokens) == 2)
    if (by.tiles == 2) return launch_division<kTokens, 2, kBits>(at, products, x, m, by, shares);
  launch_division<kTokens, 1, kBits>(at, products, x, m, by, shares);
}

template <int kBits>
void launch_bits(const ProductLaunch& at, Products products, const bf16* x, int64_t m) {
  const auto launch_it = m <= 16   ? launch_tokens<16, kBits>
                         : m <= 32 ? launch_tokens<32, kBits>
                         : m <= 64 ? launch_tokens<64, kBits>
                                   : launch_tokens<128, kBits>;
  launch_it(at, products, x, m);
}

}  // namespace

void launch_packed_gemm(const ProductLaunch& at, const std::vector<TiledProduct>& all,
                        const bf16* x, int64_t m) {
  const int bits = all[0].w.bits;
  const auto launch_it = bits == 2   ? launch_bits<2>
                         : bits == 3 ? launch_bits<3>
                         : bits == 4 ? launch_bits<4>
                                     : launch_bits<8>;
  for (size_t i = 0; i < all.size(); i += kMaxProducts)
    launch_it(at, Products(all).subspan(i, std::min<size_t>(all.size() - i, kMaxProducts)), x, m);
}

}  // namespace bbb::cuda
