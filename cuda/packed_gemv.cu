// Products of few rows with 2-bit weights in tiles (quant/packed_tiles.h), on the integer tensor
// cores:
//
//   packed_gemv      y = S x ((q - z) e)^T (+ addend)                     x bf16
//   quantized_gemv   the same, x = (a - b) scale                          a, b codes of an operand
//   .._normed        the same, x = rms_norm(x', w)                        x' bf16, w FP32
//   .._gated         the same, x = silu(gate) up                          gate, up bf16
//
// A launch takes up to three products of the same x, such as those of q, k and v.
//
// Each octet of lanes makes a sub-group of 32 positions of a row of x into integers and one unit:
// x = unit v, |v| < 2^15. For bf16, unit is the power of two for which the largest |v| is at least
// 2^14 (1 - 2^-8): values from about 2^-7 of the largest on are exact, the rest are off by at most
// unit / 2. For codes v = a - b, exact. v = 256 high + low, two signed bytes. The product of 16
// rows and 32 positions by bytes (mma) gives
//
//   I = sum (q - z) v = 256 sum q high + sum q low - z sum v         exact; y = S sum_g e unit I
//
// q comes from the tile by a mask and is 4^i too large in sub-group i, as z is; unit is made 4^i
// smaller. A product has eight columns. For one row of x, column 2i is `high` and 2i + 1 `low` of
// sub-group i alone; the four products of a tile add up, and a lane gets both sums of one sub-group
// for two output rows. For up to four rows of x, columns 2i and 2i + 1 are row i's, and a lane
// scales each product by itself. More rows take more launches.
//
// A block takes up to eight row tiles of one of the matrices. Its warps take slices of 128
// positions in turn, each for all of these row tiles, and copy them to rings of their own: a slot
// holds up to four tiles of a slice. The warps' sums are added in shared memory in a fixed order.
// Where that leaves the warps less to do, a cluster of two blocks takes twice the row tiles and
// each block half of the slices: then fewer warps make the same integers of x.
//
// Two blocks fit on a multiprocessor. So the next product's copies start while this one still runs.
// Bytes moved: those of the tiles; x comes from the L2 cache, once a block or cluster.
#include <algorithm>
#include <numeric>

#include "cuda/cuda_backend.h"
#include "cuda/early_start.h"
#include "cuda/hopper.h"
#include "cuda/packed_gemv.h"
#include "cuda/tile_product.h"
#include "quant/packed_tiles.h"

namespace bbb::cuda {

namespace {

using quant::kTileBytes;
using quant::kTileColumns;
using quant::kTileRows;

constexpr int kMaxWarps = 16;      // of a block
constexpr int kMaxSplitTiles = 4;  // row tiles of a cluster of two blocks
constexpr int kMaxTiles = 8;       // row tiles of a block
constexpr int kTokens = 4;         // rows of x of a launch
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// Positions of a lane of an octet: 2t, 2t + 1, 2t + 8 and 2t + 9, in the upper four lanes 16 more.
__device__ __forceinline__ int first_position(int lane) { return lane % 4 * 2 + lane % 8 / 4 * 16; }
constexpr int kSecondPair = 8;  // positions behind the first

// A lane's positions of x as integers, v + 128 in 16 bits each, and the unit of the octet.
struct Levels {
  uint32_t first_pair, second_pair;
  float unit;
};

__device__ __forceinline__ float2 floats_of(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u));
}

// Rows of bf16.
struct PlainRows {
  using Raw = uint2;
  const bf16* x;  // (M, K)
  int k;

  __device__ Raw load(int row, int at) const {
    const bf16* const from = x + int64_t{row} * k + at;
    return {load_past_l1(reinterpret_cast<const uint32_t*>(from)),
            load_past_l1(reinterpret_cast<const uint32_t*>(from + kSecondPair))};
  }
  __device__ static Raw zero() { return {0, 0}; }
  __device__ static Levels levels(const Raw& raw) {
    uint32_t most = __vmaxu2(raw.x & 0x7FFF7FFFu, raw.y & 0x7FFF7FFFu);
#pragma unroll
    for (int lanes = 1; lanes < 8; lanes *= 2)
      most = __vmaxu2(most, __shfl_xor_sync(kAllLanes, most, lanes));
    const uint32_t largest = max(most & 0xFFFFu, most >> 16);
    const IntegerUnit integers(largest);
    const auto shifted = [&](uint32_t bits) { return integers.shifted(__uint_as_float(bits)); };
    return {__byte_perm(shifted(raw.x << 16), shifted(raw.x & 0xFFFF0000u), 0x5410),
            __byte_perm(shifted(raw.y << 16), shifted(raw.y & 0xFFFF0000u), 0x5410), integers.unit};
  }
};

// The same from four floats. The largest is cut to bf16, which is less than one of its last places
// below it.
__device__ __forceinline__ Levels levels_of(float2 first, float2 second) {
  const auto magnitude = [](float x) { return __float_as_uint(x) & 0x7FFFFFFFu; };
  uint32_t most = max(max(magnitude(first.x), magnitude(first.y)),
                      max(magnitude(second.x), magnitude(second.y)));
#pragma unroll
  for (int lanes = 1; lanes < 8; lanes *= 2)
    most = max(most, __shfl_xor_sync(kAllLanes, most, lanes));
  const IntegerUnit integers((most >> 16) + 1);
  return {__byte_perm(integers.shifted(first.x), integers.shifted(first.y), 0x5410),
          __byte_perm(integers.shifted(second.x), integers.shifted(second.y), 0x5410),
          integers.unit};
}

// Rows of x w r, r = 1 / sqrt(mean(x^2) + eps): rms_norm(x, w) before it is rounded. The integers
// are those of x w; the sums are multiplied by r.
struct NormedRows {
  struct Raw {
    uint2 x;
    float2 first, second;  // w of both pairs
  };
  const bf16* x;   // (M, K)
  const float* w;  // (K)
  int k;
  float eps;

  __device__ Raw load(int row, int at) const {
    return {PlainRows{x, k}.load(row, at), *reinterpret_cast<const float2*>(w + at),
            *reinterpret_cast<const float2*>(w + at + kSecondPair)};
  }
  __device__ static Raw zero() { return {}; }
};

// Rows of silu(gate) up: swiglu(gate, up) before it is rounded.
struct GatedRows {
  struct Raw {
    uint2 gate, up;
  };
  const bf16 *gate, *up;  // (M, K)
  int k;

  __device__ Raw load(int row, int at) const {
    return {PlainRows{gate, k}.load(row, at), PlainRows{up, k}.load(row, at)};
  }
  __device__ static Raw zero() { return {}; }
  __device__ static Levels levels(const Raw& raw) {
    return levels_of(gated(raw.gate.x, raw.up.x), gated(raw.gate.y, raw.up.y));
  }

 private:
  __device__ static float2 gated(uint32_t gate, uint32_t up) {
    const float2 g = floats_of(gate), u = floats_of(up);
    return make_float2(silu(g.x) * u.x, silu(g.y) * u.y);
  }
  // Within 2^-21 relative.
  __device__ static float silu(float x) {
    return x * reciprocal_approx(1.0f + exp2_approx(x * -1.44269504f));
  }
};

// Rows of an operand's codes.
struct CodedRows {
  struct Raw {
    uint32_t codes;
    uint32_t zero;
    float scale;
  };
  const uint8_t* codes;  // (M, K)
  const uint8_t* zeros;  // (M, K / G)
  const float* scales;   // (M, K / G)
  int k, group;

  __device__ Raw load(int row, int at) const {
    const int g = row * (k / group) + at / group;
    const uint8_t* const from = codes + int64_t{row} * k + at;
    return {load_past_l1(reinterpret_cast<const uint16_t*>(from)) |
                uint32_t{load_past_l1(reinterpret_cast<const uint16_t*>(from + kSecondPair))} << 16,
            load_past_l1(zeros + g),
            __uint_as_float(load_past_l1(reinterpret_cast<const uint32_t*>(scales + g)))};
  }
  __device__ static Raw zero() { return {0, 0, 0.0f}; }
  __device__ static Levels levels(const Raw& raw) {
    const uint32_t shift = ((128 - raw.zero) & 0xFFFFu) * 0x00010001u;
    return {__vadd2(__byte_perm(raw.codes, 0, 0x4140), shift),
            __vadd2(__byte_perm(raw.codes, 0, 0x4342), shift), raw.scale};
  }
};

// B's registers of an octet: the lower four lanes have positions 0 .. 15 of the sub-group and
// column `high`, the upper four 16 .. 31 and column `low`. They exchange halves.
__device__ __forceinline__ void make_columns(uint32_t (&b)[2], const Levels& levels, int lane) {
  const uint32_t low = __byte_perm(levels.first_pair, levels.second_pair, 0x6240) ^ 0x80808080u;
  const uint32_t high = __byte_perm(levels.first_pair, levels.second_pair, 0x7351);
  const bool upper = lane & 4;
  const uint32_t kept = upper ? low : high;
  const uint32_t received = __shfl_xor_sync(kAllLanes, upper ? high : low, 4);
  b[0] = upper ? received : kept;
  b[1] = upper ? kept : received;
}

// The factor of a row of x that is known only at its end: r of NormedRows. Each lane adds up the
// squares of its values; the block's warps leave their sums in shared memory.
template <typename Input>
struct RowFactor {
  static constexpr int kSmemBytes = 0;
  __device__ Levels levels(const typename Input::Raw& raw) { return Input::levels(raw); }
  template <bool kManyRows>
  __device__ void leave(int, int) const {}
  __device__ void send() const {}
  __device__ float of_row(const Input&, int, bool) const { return 1.0f; }
};
template <>
struct RowFactor<NormedRows> {
  // By warp and row; then those of the second block of a cluster.
  static constexpr int kSmemBytes = (kMaxWarps + 1) * kTokens * 4;
  using Squares = float[kTokens];
  float squares = 0.0f;

  __device__ static Squares* shared() {
    __shared__ Squares sums[kMaxWarps + 1];
    return sums;
  }
  __device__ Levels levels(const NormedRows::Raw& raw) {
    const float2 a = floats_of(raw.x.x), b = floats_of(raw.x.y);
    squares = fmaf(a.x, a.x, fmaf(a.y, a.y, fmaf(b.x, b.x, fmaf(b.y, b.y, squares))));
    return levels_of(make_float2(a.x * raw.first.x, a.y * raw.first.y),
                     make_float2(b.x * raw.second.x, b.y * raw.second.y));
  }
  // Before the block's barrier. An octet has a row, or all lanes have one.
  template <bool kManyRows>
  __device__ void leave(int warp, int lane) const {
    float sum = squares;
#pragma unroll
    for (int lanes = 1; lanes < (kManyRows ? 8 : 32); lanes *= 2)
      sum += __shfl_xor_sync(kAllLanes, sum, lanes);
    if (lane % 8 == 0) shared()[warp][lane / 8] = sum;
  }
  __device__ static float sum_of(int row) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kMaxWarps; ++w)
      if (w < static_cast<int>(blockDim.x) / 32) sum += shared()[w][row];
    return sum;
  }
  // From the second block to the first.
  __device__ void send() const {
    if (threadIdx.x < kTokens)
      store_to_block(shared_address(&shared()[kMaxWarps][threadIdx.x]), 0, sum_of(threadIdx.x));
  }
  __device__ float of_row(const NormedRows& x, int row, bool split) const {
    const float sum = sum_of(row) + (split ? shared()[kMaxWarps][row] : 0.0f);
    return 1.0f / sqrtf(sum / static_cast<float>(x.k) + x.eps);
  }
};

// Makes a slice of x.
template <typename Input, bool kManyRows>
struct OperandMaker : SliceOperand<kManyRows> {
  static constexpr int kLoads = SliceOperand<kManyRows>::kUnits;
  using Raw = typename Input::Raw;

  __device__ __forceinline__ static void load(Raw (&raw)[kLoads], const Input& x, int m, int slice,
                                              int lane) {
    const int row = kManyRows ? lane / 8 : 0;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int at = slice * kTileColumns + (kManyRows ? i : lane / 8) * quant::kSubgroup +
                     first_position(lane);
      raw[i] = at < x.k && row < m ? x.load(row, at) : Input::zero();
    }
  }
  __device__ __forceinline__ void make(const Raw (&raw)[kLoads], RowFactor<Input>& factor,
                                       int lane) {
    const int t = lane % 4;
    const uint32_t ones[4] = {kOnes, kOnes, kOnes, kOnes};
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const Levels levels = factor.levels(raw[i]);
      uint32_t columns[2];
      make_columns(columns, levels, lane);
      int c[4] = {0, 0, 0, 0};
      mma_u8_s8(c, ones, columns[0], columns[1]);
      this->sum[i] = joined(c[0], c[1]);
      // Times 4^-i.
      this->unit[i] = __shfl_sync(kAllLanes, levels.unit, 8 * t) *
                      __uint_as_float((127 - 2 * (kManyRows ? i : t)) << 23);
      if constexpr (kManyRows) {
        this->b[i][0] = columns[0];
        this->b[i][1] = columns[1];
      } else {
        this->set_columns(columns[0], columns[1], lane);
      }
    }
  }
};

// A warp takes the row tiles of a slice in one or two parts, each of which fills a slot.
constexpr int parts_of(int tiles) { return tiles > 4 ? 2 : 1; }
constexpr int slot_tiles(int tiles) { return (tiles + parts_of(tiles) - 1) / parts_of(tiles); }

struct GemvShape {
  int64_t k;
  int m;      // rows of x
  int slots;  // of a warp's ring
};

// kTiles: the most row tiles of a block. Shared memory: `slots` slots for each warp, their
// barriers, and in a cluster the second block's sums (kTiles, 2, 32 lanes). At the end the first
// slot of each warp holds its sums in the same order.
template <typename Input, bool kManyRows, int kTiles>
__global__ void __launch_bounds__(kMaxWarps * 32, kManyRows ? 1 : 2)
    packed_gemv_kernel(const __grid_constant__ ProductList products, Input x, GemvShape shape) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Operand = OperandMaker<Input, kManyRows>;
  constexpr int kParts = parts_of(kTiles), kSlotTiles = slot_tiles(kTiles);
  constexpr int kSlotBytes = kSlotTiles * kTileBytes;
  static_assert(kTiles * 64 * 4 <= kSlotBytes, "the sums fit in a slot");
  constexpr bool kCanSplit = kTiles <= kMaxSplitTiles;
  unsigned char* const smem = reinterpret_cast<unsigned char*>(dynamic_smem());
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  const unsigned split = kCanSplit ? cluster_blocks() : 1, rank = kCanSplit ? cluster_rank() : 0;
  const unsigned all_slices = static_cast<unsigned>(quant::column_slices(shape.k));
  const int first_slice = static_cast<int>(rank * all_slices / split) + warp;
  const int slices = static_cast<int>((rank + 1) * all_slices / split);  // the end of this block's
  int64_t share = blockIdx.x / split;
  const int p = find_product(products, share);
  const TiledProduct& product = products.items[p].of;
  const int64_t n = product.w.n, all_tiles = quant::row_tiles(n);
  const int64_t shares = products.items[p].shares;
  const int64_t first_tile = share * all_tiles / shares;
  const int tiles = static_cast<int>((share + 1) * all_tiles / shares - first_tile);
  unsigned char* const ring = smem + warp * shape.slots * kSlotBytes;
  const int ring_bytes = shape.slots * kSlotBytes;
  // The barrier of the slot at an offset of the ring is at barriers + 8 offset / kSlotBytes.
  const uint32_t barriers = shared_address(smem + warps * ring_bytes) + warp * shape.slots * 8;

  // Parts of slices in the order that the warp takes them; the next one to copy.
  int item = 0;
  const auto start_copy = [&](int slot, uint32_t barrier) {
    const int slice = first_slice + item / kParts * warps, part = item % kParts;
    if (slice >= slices) return;
    ++item;
    const int bytes = max(min(kSlotTiles, tiles - part * kSlotTiles), 0) * kTileBytes;
    mbarrier_expect(barrier, bytes);
    if (kParts == 1 || bytes > 0)
      copy_bytes(shared_address(ring + slot),
                 product.w.tiles +
                     quant::tile_index(n, slice, first_tile + part * kSlotTiles) * kTileBytes,
                 bytes, barrier);
  };
  if (lane == 0) {
#pragma unroll 1
    for (int i = 0; i < shape.slots; ++i) mbarrier_init(barriers + i * 8, 1);
    mbarrier_init_fence();
    async_proxy_fence();
#pragma unroll 1
    for (int i = 0; i < shape.slots; ++i) start_copy(i * kSlotBytes, barriers + i * 8);
  }
  __syncwarp();
  if (split > 1) cluster_arrive();
  if (threadIdx.x == 0) prefetch_to_l2(product.w.master_scale);
  start_next_kernel();
  wait_for_previous_kernel();

  float sum[kTiles][2] = {};
  typename Input::Raw raw[Operand::kLoads];
  if (first_slice < slices) Operand::load(raw, x, shape.m, first_slice, lane);
  RowFactor<Input> factor;
  int slot = 0, parity = 0;
  uint32_t barrier = barriers;
#pragma unroll 1
  for (int slice = first_slice; slice < slices; slice += warps) {
    Operand operand;
    operand.make(raw, factor, lane);
    if (slice + warps < slices) Operand::load(raw, x, shape.m, slice + warps, lane);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      mbarrier_wait(barrier, parity);
#pragma unroll
      for (int i = 0; i < kSlotTiles && part * kSlotTiles + i < kTiles; ++i)
        // Tiles that the block lacks are computed from whatever is there, and not written.
        multiply_tile<kManyRows>(sum[part * kSlotTiles + i], ring + slot + i * kTileBytes, operand,
                                 lane);
      __syncwarp();
      if (lane == 0) start_copy(slot, barrier);
      slot += kSlotBytes;
      barrier += 8;
      if (slot == ring_bytes) {
        slot = 0;
        barrier = barriers;
        parity ^= 1;
      }
    }
  }

  // Loaded now, these are there when the sums are.
  const float s = *product.w.master_scale;
  const auto output_of = [&](int i) { return i % 4 * n + first_tile * kTileRows + i / 4; };
  const auto is_output = [&](int i) {
    return i < tiles * 64 && first_tile * kTileRows + i / 4 < n && i % 4 < shape.m;
  };
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const auto load_addend = [&](int i) {
    const auto* const from = reinterpret_cast<const uint16_t*>(product.addend);
    return from != nullptr && is_output(i) ? load_past_l1(from + output_of(i)) : uint16_t{0};
  };
  uint16_t addend = load_addend(thread);
  float* const own = reinterpret_cast<float*>(ring) + lane;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    own[i * 64] = sum[i][0];
    own[i * 64 + 32] = sum[i][1];
  }
  factor.template leave<kManyRows>(warp, lane);
  __syncthreads();
  // Sum i of a block: four an output row, of a sub-group of one row of x each, or of a row of x.
  const auto sum_of_warps = [&](int i) {
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kMaxWarps; ++w)
      if (w < warps) total += reinterpret_cast<const float*>(smem + w * ring_bytes)[i];
    return total;
  };
  // The second block's sums, in the shared memory of the first.
  float* const second = reinterpret_cast<float*>(smem + warps * (ring_bytes + shape.slots * 8));
  if (split > 1) {
    cluster_wait();  // both run
    if (rank > 0)
      for (int i = thread; i < tiles * 64; i += threads)
        store_to_block(shared_address(second + i), 0, sum_of_warps(i));
    if (rank > 0) factor.send();
    cluster_arrive();
    if (rank > 0) return;
    cluster_wait();
  }
  for (int i = thread; i < tiles * 64; i += threads) {
    float total = sum_of_warps(i);
    if (split > 1) total += second[i];
    if constexpr (!kManyRows) {
      total += __shfl_xor_sync(kAllLanes, total, 1);
      total += __shfl_xor_sync(kAllLanes, total, 2);
    }
    if (!is_output(i)) continue;
    if (i != thread) addend = load_addend(i);
    total = total * (s * factor.of_row(x, kManyRows ? i % 4 : 0, split > 1)) +
            __uint_as_float(uint32_t{addend} << 16);
    const int64_t out = output_of(i);
    if (product.y_f32 != nullptr)
      product.y_f32[out] = total;
    else
      product.y_bf16[out] = __float2bfloat16_rn(total);
  }
#endif
}

// How matrices are divided: each into shares of at most `tiles` row tiles, each taken by a cluster
// of `split` blocks of `warps` warps.
struct Division {
  Division(Products products, int processors, int split) : split(split) {
    int64_t all = 0;
    for (const TiledProduct& product : products) all += quant::row_tiles(product.w.n);
    // One block a multiprocessor, or more where a share would have too many tiles.
    const int64_t clusters = std::max(processors / split, 1);
    const int64_t most = clusters * ceil_div(divide_rows(products, kMaxTiles), clusters);
    tiles = ceil_div(all, most);
    while (divide_rows(products, tiles) > most) ++tiles;
    shares[0] = std::min(quant::row_tiles(products[0].w.n),
                         shares[0] + most - divide_rows(products, tiles));
    const int64_t slices = ceil_div(quant::column_slices(products[0].w.k), split);
    warps = std::min<int64_t>(slices, kMaxWarps);
    rounds_of_warps = ceil_div(slices, warps);
  }
  // Sets the shares of each matrix, of at most `most` row tiles. Returns their sum.
  int64_t divide_rows(Products products, int64_t most) {
    int64_t sum = 0;
    for (size_t i = 0; i < products.size(); ++i)
      sum += shares[i] = ceil_div(quant::row_tiles(products[i].w.n), most);
    return sum;
  }
  int64_t all_shares() const { return std::accumulate(shares, shares + kMaxProducts, int64_t{0}); }
  // Instructions of a warp, as counted in machine code; for a split, the time of its barrier.
  int64_t cost() const { return rounds_of_warps * (100 + 42 * tiles) + (split > 1 ? 70 : 0); }

  int split;
  int64_t shares[kMaxProducts] = {};
  int64_t tiles, warps;
  int64_t rounds_of_warps;  // slices of a warp
};

Division divide(Products products, int processors) {
  const Division whole(products, processors, 1), halves(products, processors, 2);
  const bool can_split =
      processors > 1 && quant::column_slices(products[0].w.k) > 1 && halves.tiles <= kMaxSplitTiles;
  return can_split && halves.cost() < whole.cost() ? halves : whole;
}

template <bool kManyRows, int kTiles, typename Input>
void launch_shape(const ProductLaunch& at, const ProductList& products, const Input& x, int64_t m,
                  const Division& by) {
  const int64_t items = by.rounds_of_warps * parts_of(kTiles);
  const int64_t slot_bytes = by.warps * (slot_tiles(kTiles) * kTileBytes + 8);
  const int64_t second_bytes = by.split > 1 ? kTiles * 64 * 4 : 0;
  const int64_t slots = std::min(
      items, (at.block_bytes(2) - second_bytes - RowFactor<Input>::kSmemBytes) / slot_bytes);
  BBB_ASSERT(slots > 0);
  launch(at.stream,
         {dim3(static_cast<unsigned>(by.all_shares() * by.split)),
          dim3(static_cast<unsigned>(32 * by.warps)), slot_bytes * slots + second_bytes, true,
          static_cast<unsigned>(by.split)},
         packed_gemv_kernel<Input, kManyRows, kTiles>, products, x,
         GemvShape{x.k, static_cast<int>(m), static_cast<int>(slots)});
}

PlainRows rows_from(const PlainRows& x, int64_t row) { return {x.x + row * x.k, x.k}; }
NormedRows rows_from(const NormedRows& x, int64_t row) {
  return {x.x + row * x.k, x.w, x.k, x.eps};
}
GatedRows rows_from(const GatedRows& x, int64_t row) {
  return {x.gate + row * x.k, x.up + row * x.k, x.k};
}
CodedRows rows_from(const CodedRows& x, int64_t row) {
  const int64_t g = row * (x.k / x.group);
  return {x.codes + row * x.k, x.zeros + g, x.scales + g, x.k, x.group};
}

// Up to kMaxProducts products of up to kTokens rows from row `row` of x on.
template <bool kManyRows, typename Input>
void launch_rows(const ProductLaunch& at, Products products, const Input& x, int64_t row,
                 int64_t m) {
  const Division by = divide(products, at.processors);
  ProductList list{};
  for (size_t i = 0; i < products.size(); ++i) {
    TiledProduct product = products[i];
    const auto from_row = [&](auto*& y) { y = y == nullptr ? y : y + row * product.w.n; };
    from_row(product.y_bf16);
    from_row(product.y_f32);
    from_row(product.addend);
    list.items[i] = {product, by.shares[i]};
  }
  const auto run = [&](auto launch_it) { launch_it(at, list, rows_from(x, row), m, by); };
  static_assert(kMaxTiles == 8);
  switch (by.tiles) {
    case 1:
      return run(launch_shape<kManyRows, 1, Input>);
    case 2:
      return run(launch_shape<kManyRows, 2, Input>);
    case 3:
      return run(launch_shape<kManyRows, 3, Input>);
    case 4:
      return run(launch_shape<kManyRows, 4, Input>);
    case 5:
      return run(launch_shape<kManyRows, 5, Input>);
    case 6:
      return run(launch_shape<kManyRows, 6, Input>);
    case 7:
      return run(launch_shape<kManyRows, 7, Input>);
    default:
      return run(launch_shape<kManyRows, 8, Input>);
  }
}

template <typename Input>
void launch_all(const ProductLaunch& at, const std::vector<TiledProduct>& all, const Input& x,
                int64_t m) {
  for (size_t i = 0; i < all.size(); i += kMaxProducts) {
    const Products products =
        Products(all).subspan(i, std::min<size_t>(all.size() - i, kMaxProducts));
    if (m == 1) {
      launch_rows<false>(at, products, x, 0, m);
      continue;
    }
    for (int64_t row = 0; row < m; row += kTokens)
      launch_rows<true>(at, products, x, row, std::min<int64_t>(m - row, kTokens));
  }
}

}  // namespace

void launch_packed_gemv(const ProductLaunch& at, const std::vector<TiledProduct>& products,
                        const bf16* x, int64_t m) {
  launch_all(at, products, PlainRows{x, static_cast<int>(products[0].w.k)}, m);
}

void launch_packed_gemv_normed(const ProductLaunch& at, const std::vector<TiledProduct>& products,
                               const bf16* x, const float* w, float eps, int64_t m) {
  launch_all(at, products, NormedRows{x, w, static_cast<int>(products[0].w.k), eps}, m);
}

void launch_packed_gemv_gated(const ProductLaunch& at, const std::vector<TiledProduct>& products,
                              const bf16* gate, const bf16* up, int64_t m) {
  launch_all(at, products, GatedRows{gate, up, static_cast<int>(products[0].w.k)}, m);
}

void launch_quantized_gemv(const ProductLaunch& at, const std::vector<TiledProduct>& products,
                           const uint8_t* codes, const uint8_t* zeros, const float* scales,
                           int64_t m) {
  const TiledView& w = products[0].w;
  launch_all(at, products, CodedRows{codes, zeros, scales, static_cast<int>(w.k), w.group}, m);
}

}  // namespace bbb::cuda
