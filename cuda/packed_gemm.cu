// Products of many rows with 2-bit weights in tiles (quant/packed_tiles.h), on warpgroup products
// in bf16 (sm_90a):
//
//   y = S x ((q - z) e)^T (+ addend)        x (M, K) bf16, y (M, N) bf16 or FP32
//
// Weights are the operand A, 64 output rows a warpgroup, made in registers; rows of x are columns
// of B, kTokens of them, a tile in shared memory. (q - z) e is exact in bf16, so a product differs
// from one in F64 only by the FP32 sums. The eight low bits of a bf16, the lowest bit of the
// exponent among them, are an integer in units of 2^-133. So the code q of sub-group i in its place
// is 2^(2i - 133) q, and a register of A takes one mask and one fused multiply-add:
//
//   2^(2i - 133) q  *  2^(118 - 2i) e  -  2^-15 z e       both factors and the offset are exact
//
// S 2^15 is applied at the end. The E4M3 code shifted into the bits of a bf16 is 2^-120 e,
// subnormal codes included. Of NaN it is 480; a sum of the codes' top bits finds it.
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
// part of the slices. Each block adds up the sums of some of the tokens: the others copy theirs to
// its shared memory. They are added in the order of blocks, so runs repeat bit for bit. Bytes
// moved: tiles once for each kTokens rows of x, from memory once; x once for each share, from the
// L2 cache.
#include <algorithm>
#include <array>
#include <numeric>

#include "cuda/cuda_backend.h"
#include "cuda/early_start.h"
#include "cuda/hopper.h"
#include "cuda/packed_gemv.h"
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
// Rows of sums in shared memory, FP32, one a token: four longer than a block has output rows. Then
// the lanes of a fragment's store use distinct banks.
BBB_HD constexpr int sums_pitch(int groups) { return groups * kGroupRows + 4; }
constexpr int kWidth = 4;  // output rows of a thread

constexpr int kShiftedDown = 15;  // A is 2^-15 (q - z) e

BBB_HD constexpr uint32_t power_of_two(int exponent) {  // as bf16
  return static_cast<uint32_t>(exponent + 127) << 7;
}

// A lane's part of its warp's row tile: words; scales of rows r and r + 8, two sub-groups a word;
// zero points of rows r and r + 8, in the halves.
struct LaneTile {
  uint32_t words[4];
  uint2 scales;
  uint32_t zeros;

  __device__ __forceinline__ void load(const unsigned char* tile, unsigned lane) {
    const uint4 all = *reinterpret_cast<const uint4*>(tile + lane * 16);
    scales = *reinterpret_cast<const uint2*>(tile + quant::kTileScales + lane / 4 * 8);
    zeros = __byte_perm(*reinterpret_cast<const uint16_t*>(tile + quant::kTileZeros + lane / 4 * 2),
                        0, 0x4140);
    words[0] = all.x, words[1] = all.y, words[2] = all.z, words[3] = all.w;
  }

  // A of the four k16 products of sub-groups 2 kHalf and 2 kHalf + 1.
  template <int kHalf>
  __device__ __forceinline__ void make(uint32_t (&a)[4][4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // 8 bits further down, bytes 1 and 3 are in the place of bytes 0 and 2.
      const uint32_t pairs[2] = {words[i], shifted_down<8>(words[i])};
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        a[i / 2][odd * 2 + i % 2] = pairs[odd];
        a[2 + i / 2][odd * 2 + i % 2] = pairs[odd];
      }
    }
    multiply<2 * kHalf>(a[0], a[1]);
    multiply<2 * kHalf + 1>(a[2], a[3]);
  }

 private:
  // Turns words into A of the two products of a sub-group.
  template <int kSubgroup>
  __device__ __forceinline__ void multiply(uint32_t (&a0)[4], uint32_t (&a1)[4]) const {
    constexpr uint32_t kCode = 0x00030003u << (2 * kSubgroup), kSign = 0x80008000u;
    constexpr uint32_t kTwice = 0x00010001u;
    constexpr int kTop = 133 + 120 - 119 - kShiftedDown;
    const uint32_t scale =  // 2^-120 e
        __byte_perm(kSubgroup < 2 ? scales.x : scales.y, 0, kSubgroup % 2 == 0 ? 0x4140 : 0x4342)
        << 4;
    const uint32_t e = mul_bf16x2(mul_bf16x2(scale, power_of_two(119) * kTwice),
                                  power_of_two(kTop - 2 * kSubgroup) * kTwice);
    const uint32_t offset = mul_bf16x2(mask_or<kCode, kSign>(zeros), e);
    const uint32_t e_row[2] = {lower_twice(e), upper_twice(e)};
    const uint32_t offset_row[2] = {lower_twice(offset), upper_twice(offset)};
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // registers 0 and 2 are of row r, 1 and 3 of row r + 8
      a0[i] = fma_bf16x2(a0[i] & kCode, e_row[i % 2], offset_row[i % 2]);
      a1[i] = fma_bf16x2(a1[i] & kCode, e_row[i % 2], offset_row[i % 2]);
    }
  }
};

// kWidth consecutive values of a row of y and of the addend, of which `count` are in the matrix.
struct Outputs {
  const TiledProduct& product;
  int64_t count;
  bool wide;  // one access for all of them

  __device__ __forceinline__ Outputs(const TiledProduct& product, int64_t count)
      : product(product), count(count) {
    const auto is_wide = [](const auto* p) {
      return reinterpret_cast<uintptr_t>(p) % (kWidth * sizeof(*p)) == 0;
    };
    wide = product.w.n % kWidth == 0 && is_wide(product.y_bf16) && is_wide(product.y_f32) &&
           is_wide(product.addend);
  }
  __device__ __forceinline__ void load(float (&x)[kWidth], int64_t at) const {
    if (wide) return load_past_l1(x, product.addend + at, kWidth);
#pragma unroll
    for (int i = 0; i < kWidth; ++i)
      if (i < count) x[i] = to_float(load_past_l1(product.addend + at + i));
  }
  __device__ __forceinline__ void store(const float (&x)[kWidth], int64_t at) const {
    if (product.y_f32 != nullptr)
      store(product.y_f32 + at, x);
    else
      store(product.y_bf16 + at, x);
  }
  template <typename T>
  __device__ __forceinline__ void store(T* y, const float (&x)[kWidth]) const {
    if (wide) return cuda::store(y, x, kWidth);
#pragma unroll
    for (int i = 0; i < kWidth; ++i)
      if (i < count) from_float(y[i], x[i]);
  }
};

struct GemmShape {
  int64_t k;
  int m, stages;
  int received_at, barriers_at;  // bytes of shared memory
};

// A cluster's tokens are divided: block `rank` adds up the sums of those from here on.
template <int kTokens>
BBB_HD constexpr int first_token_of(int rank, int split) {
  return rank * kTokens / split;
}

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
  const int pitch = sums_pitch(most_groups);
  const int split = cluster_blocks(), rank = cluster_rank();
  const int all_slices = static_cast<int>(quant::column_slices(shape.k));
  const int first_slice = rank * all_slices / split;
  const int slices = (rank + 1) * all_slices / split - first_slice;
  const int first_token = static_cast<int>(blockIdx.y) * kTokens;
  const int own_token = first_token_of<kTokens>(rank, split);
  const int own_tokens = first_token_of<kTokens>(rank + 1, split) - own_token;

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
  float* const received = reinterpret_cast<float*>(smem + shape.received_at);
  const uint32_t full = shared_address(smem + shape.barriers_at);
  const uint32_t empty = full + shape.stages * 8, all_received = empty + shape.stages * 8;
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
    mbarrier_init(all_received, 1);
    mbarrier_init_fence();
    async_proxy_fence();
    mbarrier_expect(all_received, (split - 1) * own_tokens * pitch * 4);
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
  uint32_t scale_bits = 0;  // bit 7 of a byte: a NaN; bytes 0, 2 are of row r, 1, 3 of row r + 8
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
      tile.load(tiles + stage * tile_stage + warp * kTileBytes, static_cast<unsigned>(lane));
      scale_bits |= (tile.scales.x + 0x01010101u) | (tile.scales.y + 0x01010101u);
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
  float* const sums = reinterpret_cast<float*>(smem);
  if (group < groups) {
    float* const to = sums + lane % 4 * 2 * pitch + warp * kTileRows + lane / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool is_nan = scale_bits & (half == 0 ? 0x00800080u : 0x80008000u);
#pragma unroll
      for (int i = 0; i < kTokens / 8; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j)
          to[(i * 8 + j) * pitch + half * 8] =
              is_nan ? __uint_as_float(0x7FC00000u) : d[i][half * 2 + j];
    }
  }
  if (split > 1) {
    async_proxy_fence();
    cluster_wait();  // the others' barriers are initialised
  }
  __syncthreads();
  if (split > 1) {
    if (thread < split && thread != rank) {  // sends block `thread` the sums of its tokens
      const int first = first_token_of<kTokens>(thread, split);
      const int floats = (first_token_of<kTokens>(thread + 1, split) - first) * pitch;
      copy_to_block(shared_address(received + (rank - (rank > thread)) * floats), all_received,
                    thread, shared_address(sums + first * pitch), floats * 4);
    }
    __syncwarp();
    mbarrier_wait(all_received, 0);
    __syncwarp();
    cluster_arrive();
  }

  // A thread takes kWidth consecutive output rows, and of the block's tokens every warps-th.
  constexpr int kBatch = kTokens <= 32 ? 2 : 4;  // at a time
  const int warps = static_cast<int>(blockDim.x) / 32;
  const int tokens = min(own_tokens, shape.m - first_token - own_token);
#pragma unroll 1
  for (int row = lane * kWidth; row < groups * kGroupRows; row += 32 * kWidth) {
    const int64_t output = first_group * kGroupRows + row;
    if (output >= n) break;
    const int64_t out = int64_t{first_token + own_token} * n + output;
    const Outputs outputs{product, n - output};
#pragma unroll 1
    for (int first = warp; first < tokens; first += kBatch * warps) {
      const auto token = [&](int i) { return first + i * warps; };
      float total[kBatch][kWidth] = {}, addend[kBatch][kWidth] = {};
      if (product.addend != nullptr)
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
          if (token(i) < tokens) outputs.load(addend[i], out + token(i) * n);
#pragma unroll 1
      for (int block = 0; block < split; ++block) {
        const float* const from = block == rank
                                      ? sums + own_token * pitch
                                      : received + (block - (block > rank)) * own_tokens * pitch;
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
          if (token(i) < tokens) {
            const float4 part = *reinterpret_cast<const float4*>(from + token(i) * pitch + row);
            total[i][0] += part.x, total[i][1] += part.y;
            total[i][2] += part.z, total[i][3] += part.w;
          }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (token(i) >= tokens) continue;
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          total[i][j] *= s;
          if (product.addend != nullptr) total[i][j] += addend[i][j];
        }
        outputs.store(total[i], out + token(i) * n);
      }
    }
  }
  __syncwarp();
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
    const int64_t pitch_bytes = sums_pitch(static_cast<int>(by.groups)) * 4;
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
  const auto launch_it = m <= 8    ? launch_tokens<8>
                         : m <= 16 ? launch_tokens<16>
                         : m <= 32 ? launch_tokens<32>
                         : m <= 64 ? launch_tokens<64>
                                   : launch_tokens<128>;
  for (size_t i = 0; i < all.size(); i += kMaxProducts)
    launch_it(at, Products(all).subspan(i, std::min<size_t>(all.size() - i, kMaxProducts)), x, m);
}

}  // namespace bbb::cuda
