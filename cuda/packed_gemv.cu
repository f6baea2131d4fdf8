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
// positions in turn, each for all of these row tiles. A slot of the block's ring holds a slice's
// tiles. The warps' sums are added in shared memory in a fixed order. Where that leaves the warps
// less to do, a cluster of two blocks takes twice the row tiles and each block half of the slices:
// then fewer warps make the same integers of x.
//
// Two blocks fit on a multiprocessor: one more warp copies the next product's tiles to its ring
// while this one still runs. It keeps kBytesInFlight on the way; slices that the ring does not hold
// go to the L2 cache. Once x is complete, the warps copy it to shared memory together. A warp
// refills the slots that it has read.
//
// Bytes moved: those of the tiles; x comes from the L2 cache, once a block.
#include <algorithm>
#include <bit>
#include <numeric>

#include "cuda/cuda_backend.h"
#include "cuda/early_start.h"
#include "cuda/hopper.h"
#include "cuda/packed_gemv.h"
#include "cuda/reduce.h"
#include "cuda/tile_product.h"
#include "quant/packed_tiles.h"

namespace bbb::cuda {

namespace {

using quant::kTileBytes;
using quant::kTileColumns;
using quant::kTileRows;

constexpr int kMaxWarps = 16;               // of a block
constexpr int kMaxSplitTiles = 4;           // row tiles of a cluster of two blocks
constexpr int kMaxTiles = 8;                // row tiles of a block
constexpr int kTokens = 4;                  // rows of x of a launch
constexpr int kBlocks = 2;                  // that fit on a multiprocessor
constexpr int kBytesInFlight = 40 * 1024;   // of a block's first copies
constexpr int kMaxStagedBytes = 28 * 1024;  // of x in shared memory
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// Positions of a lane of an octet: 2t, 2t + 1, 2t + 8 and 2t + 9, in the upper four lanes 16 more.
__device__ __forceinline__ int first_position(int lane) { return lane % 4 * 2 + lane % 8 / 4 * 16; }
constexpr int kSecondPair = 8;  // positions behind the first

// A lane's positions of x as integers, v + 128 in 16 bits each, and the unit of the octet.
struct Levels {
  uint32_t first_pair, second_pair;
  float unit;
};

// Rows of bf16. In shared memory a slice of a row is 128 of them.
struct PlainRows {
  using Raw = uint2;
  static constexpr int kSliceBytes = kTileColumns * 2;
  const bf16* x;  // (M, K)
  int k;

  // Copies `slices` slices of a row, the first from position `begin` on, to places `pitch` bytes
  // apart. Positions from K on become zeros. All threads take part.
  __device__ void stage(unsigned char* to, int pitch, int row, int begin, int slices, int thread,
                        int threads) const {
    stage_pieces(to, pitch, begin, slices, thread, threads,
                 [&](int at) { return eight_of(x, row, at); });
  }
  // The same of what eight(position) returns: eight values.
  template <typename Eight>
  __device__ void stage_pieces(unsigned char* to, int pitch, int begin, int slices, int thread,
                               int threads, const Eight& eight) const {
    constexpr int kPieces = kSliceBytes / 16;
    for (int i = thread; i < slices * kPieces; i += threads) {
      const int at = begin + i * 8;
      *reinterpret_cast<uint4*>(to + i / kPieces * pitch + i % kPieces * 16) =
          at < k ? eight(at) : uint4{};
    }
  }
  __device__ uint4 eight_of(const bf16* from, int row, int at) const {
    return load_past_l1(reinterpret_cast<const uint4*>(from + int64_t{row} * k + at));
  }
  // A lane's values from position `at` of a staged slice on.
  __device__ static Raw staged(const unsigned char* slice, int at) {
    const uint32_t* const from = reinterpret_cast<const uint32_t*>(slice + at * 2);
    return {from[0], from[kSecondPair / 2]};
  }
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

// Rows of silu(gate) up.
struct GatedRows : PlainRows {
  const bf16* up;  // (M, K); x: gate

  __device__ void stage(unsigned char* to, int pitch, int row, int begin, int slices, int thread,
                        int threads) const {
    stage_pieces(to, pitch, begin, slices, thread, threads, [&](int at) {
      const uint4 g = eight_of(x, row, at), u = eight_of(up, row, at);
      return uint4{gated(g.x, u.x), gated(g.y, u.y), gated(g.z, u.z), gated(g.w, u.w)};
    });
  }
  __device__ Raw load(int row, int at) const {
    const Raw g = PlainRows::load(row, at), u = PlainRows{up, k}.load(row, at);
    return {gated(g.x, u.x), gated(g.y, u.y)};
  }

 private:
  __device__ static uint32_t gated(uint32_t gate, uint32_t up) {
    const float2 g = unpack_bf16(gate), u = unpack_bf16(up);
    return pack_bf16(silu(g.x) * u.x, silu(g.y) * u.y);
  }
  // Within 2^-21 relative.
  __device__ static float silu(float x) {
    return x * reciprocal_approx(1.0f + exp2_approx(x * -1.44269504f));
  }
};

// Rows of x w, whose products are then multiplied by r = 1 / sqrt(mean(x^2) + eps).
struct NormedRows : PlainRows {
  const float* w;  // (K)
  float eps;

  // Adds the squares of what this thread copies.
  __device__ void stage(unsigned char* to, int pitch, int row, int begin, int slices, int thread,
                        int threads, float& squares) const {
    stage_pieces(to, pitch, begin, slices, thread, threads, [&](int at) {
      const uint4 v = eight_of(x, row, at);
      squares += squares_of(v);
      return uint4{weighted(v.x, at), weighted(v.y, at + 2), weighted(v.z, at + 4),
                   weighted(v.w, at + 6)};
    });
  }
  // Adds those of this thread's part of positions [begin, end).
  __device__ void add_squares(float& squares, int row, int begin, int end, int thread,
                              int threads) const {
    for (int at = begin + thread * 8; at < min(end, k); at += threads * 8)
      squares += squares_of(eight_of(x, row, at));
  }
  __device__ Raw load(int row, int at) const {
    const Raw v = PlainRows::load(row, at);
    return {weighted(v.x, at), weighted(v.y, at + kSecondPair)};
  }

 private:
  __device__ uint32_t weighted(uint32_t pair, int at) const {
    const float2 v = unpack_bf16(pair), factor = *reinterpret_cast<const float2*>(w + at);
    return pack_bf16(v.x * factor.x, v.y * factor.y);
  }
  __device__ static float square(uint32_t pair) {
    const float2 v = unpack_bf16(pair);
    return fmaf(v.x, v.x, v.y * v.y);
  }
  __device__ static float squares_of(const uint4& v) {
    return square(v.x) + square(v.y) + (square(v.z) + square(v.w));
  }
};

// Rows of an operand's codes. In shared memory a slice of a row is 128 codes, then scale and zero
// point of each sub-group.
struct CodedRows {
  struct Raw {
    uint32_t codes;
    uint32_t zero;
    float scale;
  };
  static constexpr int kSubgroups = kTileColumns / quant::kSubgroup;
  static constexpr int kSliceBytes = kTileColumns + kSubgroups * 8;
  const uint8_t* codes;  // (M, K)
  const uint8_t* zeros;  // (M, K / G)
  const float* scales;   // (M, K / G)
  int k, group_log2;

  __device__ void stage(unsigned char* to, int pitch, int row, int begin, int slices, int thread,
                        int threads) const {
    constexpr int kPieces = kTileColumns / 16;
    for (int i = thread; i < slices * kPieces; i += threads) {
      const int at = begin + i * 16;
      *reinterpret_cast<uint4*>(to + i / kPieces * pitch + i % kPieces * 16) =
          at < k ? load_past_l1(reinterpret_cast<const uint4*>(codes + int64_t{row} * k + at))
                 : uint4{};
    }
    for (int i = thread; i < slices * kSubgroups; i += threads) {
      const int at = begin + i * quant::kSubgroup;
      uint2 grid{};
      if (at < k) grid = {load_past_l1(scale_bits(row, at)), load_past_l1(zeros + group(row, at))};
      *reinterpret_cast<uint2*>(to + i / kSubgroups * pitch + kTileColumns + i % kSubgroups * 8) =
          grid;
    }
  }
  __device__ static Raw staged(const unsigned char* slice, int at) {
    const uint16_t* const from = reinterpret_cast<const uint16_t*>(slice + at);
    const uint2 grid =
        *reinterpret_cast<const uint2*>(slice + kTileColumns + at / quant::kSubgroup * 8);
    return {from[0] | uint32_t{from[kSecondPair / 2]} << 16, grid.y, __uint_as_float(grid.x)};
  }
  __device__ Raw load(int row, int at) const {
    const uint8_t* const from = codes + int64_t{row} * k + at;
    return {load_past_l1(reinterpret_cast<const uint16_t*>(from)) |
                uint32_t{load_past_l1(reinterpret_cast<const uint16_t*>(from + kSecondPair))} << 16,
            load_past_l1(zeros + group(row, at)),
            __uint_as_float(load_past_l1(scale_bits(row, at)))};
  }
  __device__ int group(int row, int at) const {
    return row * (k >> group_log2) + (at >> group_log2);
  }
  __device__ const uint32_t* scale_bits(int row, int at) const {
    return reinterpret_cast<const uint32_t*>(scales + group(row, at));
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

// Stages a row's slices, `staged` of all `slices` from position `begin` on, and knows its factor: r
// of NormedRows, whose warps leave their sums of squares in shared memory.
template <typename Input>
struct RowStager {
  static constexpr bool kHasFactor = false;
  static constexpr int kSmemBytes = 0;
  __device__ static void stage(const Input& x, unsigned char* to, int pitch, int row, int begin,
                               int staged, int, int thread, int threads) {
    x.stage(to, pitch, row, begin, staged, thread, threads);
  }
  __device__ static float factor(const Input&, int, int, bool) { return 1.0f; }
};
template <>
struct RowStager<NormedRows> {
  using Squares = float[kTokens];
  static constexpr bool kHasFactor = true;
  // By warp and row; then those of the second block of a cluster.
  static constexpr int kSmemBytes = (kMaxWarps + 1) * sizeof(Squares);

  __device__ static Squares* shared() {
    __shared__ Squares sums[kMaxWarps + 1];
    return sums;
  }
  __device__ static float* second() { return shared()[kMaxWarps]; }
  __device__ static void stage(const NormedRows& x, unsigned char* to, int pitch, int row,
                               int begin, int staged, int slices, int thread, int threads) {
    float squares = 0.0f;
    x.stage(to, pitch, row, begin, staged, thread, threads, squares);
    x.add_squares(squares, row, begin + staged * kTileColumns, begin + slices * kTileColumns,
                  thread, threads);
    squares = warp_sum(squares);
    if (thread % 32 == 0) shared()[thread / 32][row] = squares;
  }
  __device__ static float sum_of_warps(int row, int warps) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kMaxWarps; ++w)
      if (w < warps) sum += shared()[w][row];
    return sum;
  }
  __device__ static float factor(const NormedRows& x, int row, int warps, bool split) {
    const float sum = sum_of_warps(row, warps) + (split ? second()[row] : 0.0f);
    return 1.0f / sqrtf(sum / static_cast<float>(x.k) + x.eps);
  }
};

// Makes a slice of x.
template <typename Input, bool kManyRows>
struct OperandMaker : SliceOperand<kManyRows> {
  static constexpr int kLoads = SliceOperand<kManyRows>::kUnits;
  using Raw = typename Input::Raw;

  // Reads a slice, from `staged` if that is not null.
  __device__ __forceinline__ static void read(Raw (&raw)[kLoads], const Input& x, int m, int slice,
                                              const unsigned char* staged, int lane) {
    const int row = kManyRows ? lane / 8 : 0;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int inside = (kManyRows ? i : lane / 8) * quant::kSubgroup + first_position(lane);
      const int at = slice * kTileColumns + inside;
      raw[i] = at >= x.k || row >= m ? Input::zero()
               : staged != nullptr   ? Input::staged(staged + row * Input::kSliceBytes, inside)
                                     : x.load(row, at);
    }
  }
  __device__ __forceinline__ void make(const Raw (&raw)[kLoads], int lane) {
    const int t = lane % 4;
    const uint32_t ones[4] = {kOnes, kOnes, kOnes, kOnes};
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const Levels levels = Input::levels(raw[i]);
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

struct GemvShape {
  int64_t k;
  int m;          // rows of x
  int slots;      // of a block's ring, at least one a warp
  int in_flight;  // slices of the first copies
  int staged;     // slices of x in shared memory; the others are read from the L2 cache
};

// kTiles: the most row tiles of a block. Shared memory: the ring; staged slices of x, of all rows
// each; in a cluster the second block's sums (kTiles, 2, 32 lanes) and their barrier; a barrier for
// each slice. At the end the last slot that a warp has read holds its sums in the same order.
template <typename Input, bool kManyRows, int kTiles>
__global__ void __launch_bounds__((kMaxWarps + 1) * 32, kManyRows ? 1 : kBlocks)
    packed_gemv_kernel(const __grid_constant__ ProductList products, Input x, GemvShape shape) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Operand = OperandMaker<Input, kManyRows>;
  constexpr int kSlotBytes = kTiles * kTileBytes;
  constexpr bool kCanSplit = kTiles <= kMaxSplitTiles;
  unsigned char* const smem = reinterpret_cast<unsigned char*>(dynamic_smem());
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int warps = static_cast<int>(blockDim.x) / 32 - 1;  // the last warp copies
  const int threads = warps * 32;
  const unsigned split = kCanSplit ? cluster_blocks() : 1, rank = kCanSplit ? cluster_rank() : 0;
  const unsigned all_slices = static_cast<unsigned>(quant::column_slices(shape.k));
  const int first_slice = static_cast<int>(rank * all_slices / split);
  const int slices = static_cast<int>((rank + 1) * all_slices / split) - first_slice;
  int64_t share = blockIdx.x / split;
  const int p = find_product(products, share);
  const TiledProduct& product = products.items[p].of;
  const int64_t n = product.w.n, all_tiles = quant::row_tiles(n);
  const int64_t shares = products.items[p].shares;
  const int64_t first_tile = share * all_tiles / shares;
  const int tiles = static_cast<int>((share + 1) * all_tiles / shares - first_tile);

  const int ring_bytes = shape.slots * kSlotBytes, x_pitch = shape.m * Input::kSliceBytes;
  unsigned char* const staged = smem + ring_bytes;
  float* const second = reinterpret_cast<float*>(staged + shape.staged * x_pitch);
  const uint32_t second_barrier = shared_address(second + (split > 1 ? kTiles * 64 : 0));
  float* const master_scale = second + (split > 1 ? kTiles * 64 : 0) + 2;
  const uint32_t barriers = second_barrier + 16;  // of slices

  const unsigned char* const source =
      product.w.tiles + quant::tile_index(n, first_slice, first_tile) * kTileBytes;
  const int64_t source_pitch = all_tiles * kTileBytes;
  const int slice_bytes = tiles * kTileBytes;
  const auto start_copy = [&](int slice, int slot) {
    mbarrier_expect(barriers + slice * 8, slice_bytes);
    copy_bytes(shared_address(smem) + slot, source + slice * source_pitch, slice_bytes,
               barriers + slice * 8);
  };
  if (lane == 0) {
#pragma unroll 1
    for (int i = warp; i < slices; i += warps + 1) mbarrier_init(barriers + i * 8, 1);
    if (split > 1 && warp == 0) {
      mbarrier_init(second_barrier, 1);
      const int squares = RowStager<Input>::kHasFactor ? shape.m : 0;
      if (rank == 0) mbarrier_expect(second_barrier, (tiles * 64 + squares) * 4);
    }
    mbarrier_init_fence();
    async_proxy_fence();
  }
  __syncthreads();
  if (split > 1) cluster_arrive();
  start_next_kernel();
  if (warp == warps) {
    if (lane == 0) {
#pragma unroll 1
      for (int i = 0; i < min(slices, shape.slots + warps); ++i) {
        const int landed = i - shape.in_flight;
        if (landed >= 0) mbarrier_wait(barriers + min(landed, shape.slots - 1) * 8, 0);
        if (i < shape.slots)
          start_copy(i, i * kSlotBytes);
        else
          prefetch_bytes_to_l2(source + i * source_pitch, slice_bytes);
      }
    }
    return;
  }
  if (thread == 0) *master_scale = load_past_l1(product.w.master_scale);
  wait_for_previous_kernel();

#pragma unroll 1
  for (int row = 0; row < shape.m; ++row)
    RowStager<Input>::stage(x, staged + row * Input::kSliceBytes, x_pitch, row,
                            first_slice * kTileColumns, min(shape.staged, slices), slices, thread,
                            threads);
  named_sync(1, threads);
  typename Input::Raw raw[Operand::kLoads];
  const auto read = [&](int slice) {
    Operand::read(raw, x, shape.m, first_slice + slice,
                  slice < shape.staged ? staged + slice * x_pitch : nullptr, lane);
  };
  float sum[kTiles][2] = {};
  if (kManyRows) read(warp);
  int slice = warp, slot = warp * kSlotBytes;
#pragma unroll 1
  for (;; slice += warps) {
    Operand operand;
    if (!kManyRows) read(slice);
    operand.make(raw, lane);
    if (kManyRows && slice + warps < slices) read(slice + warps);
    mbarrier_wait(barriers + slice * 8, 0);
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
      // Tiles that the block lacks are computed from whatever is there, and not written.
      multiply_tile<kManyRows>(sum[i], smem + slot + i * kTileBytes, operand, lane);
    __syncwarp();
    if (lane == 0 && slice + shape.slots < slices) start_copy(slice + shape.slots, slot);
    if (slice + warps >= slices) break;
    slot += warps * kSlotBytes;
    if (slot >= ring_bytes) slot -= ring_bytes;
  }

  float* const own = reinterpret_cast<float*>(smem + slot) + lane;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    own[i * 64] = sum[i][0];
    own[i * 64 + 32] = sum[i][1];
  }
  // The last slices, one a warp, are in consecutive slots.
  int first_sums = slot - (slice - (slices - warps)) * kSlotBytes;
  if (first_sums < 0) first_sums += ring_bytes;
  named_sync(1, threads);
  // Sum i of a block: four an output row, of a sub-group of one row of x each, or of a row of x.
  const auto sum_of_warps = [&](int i) {
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kMaxWarps; ++w) {
      const int at = first_sums + w * kSlotBytes;
      if (w < warps)
        total += reinterpret_cast<const float*>(smem + (at < ring_bytes ? at : at - ring_bytes))[i];
    }
    return total;
  };
  if (rank > 0) {
    cluster_wait();  // the first block runs
    for (int i = thread; i < tiles * 64; i += threads)
      store_to_block(shared_address(second + i), 0, sum_of_warps(i), second_barrier);
    if constexpr (RowStager<Input>::kHasFactor) {
      using Stager = RowStager<Input>;
      if (thread < shape.m)
        store_to_block(shared_address(Stager::second() + thread), 0,
                       Stager::sum_of_warps(thread, warps), second_barrier);
    }
    return;
  }
  for (int i = thread; i < tiles * 64; i += threads) {
    float total = sum_of_warps(i);
    if (split > 1) {
      mbarrier_wait(second_barrier, 0);
      total += second[i];
    }
    if constexpr (!kManyRows) {
      total += __shfl_xor_sync(kAllLanes, total, 1);
      total += __shfl_xor_sync(kAllLanes, total, 2);
    }
    const int64_t row = first_tile * kTileRows + i / 4;
    if (row >= n || i % 4 >= shape.m) continue;
    const int64_t out = i % 4 * n + row;
    total *= *master_scale * RowStager<Input>::factor(x, kManyRows ? i % 4 : 0, warps, split > 1);
    if (product.addend != nullptr) total += to_float(load_past_l1(product.addend + out));
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
    const int64_t slices = quant::column_slices(products[0].w.k);
    warps = std::clamp<int64_t>(slices / split, 1, kMaxWarps);
    rounds_of_warps = ceil_div(ceil_div(slices, split), warps);
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
  const int64_t slices = ceil_div(quant::column_slices(x.k), by.split);
  const int64_t x_bytes = m * Input::kSliceBytes;
  const int64_t staged = std::min(slices, kMaxStagedBytes / x_bytes);
  const int64_t other_bytes =
      staged * x_bytes + (by.split > 1 ? kTiles * 64 * 4 : 0) + 16 + slices * 8;
  const int64_t slot_bytes = kTiles * kTileBytes;
  const int64_t ring_bytes = at.block_bytes(kBlocks) - RowStager<Input>::kSmemBytes - other_bytes;
  const int64_t slots = std::min(slices, ring_bytes / slot_bytes);
  BBB_ASSERT(slots >= by.warps);
  launch(at.stream,
         {dim3(static_cast<unsigned>(by.all_shares() * by.split)),
          dim3(static_cast<unsigned>(32 * (by.warps + 1))), slot_bytes * slots + other_bytes, true,
          static_cast<unsigned>(by.split)},
         packed_gemv_kernel<Input, kManyRows, kTiles>, products, x,
         GemvShape{x.k, static_cast<int>(m), static_cast<int>(slots),
                   static_cast<int>(kBytesInFlight / slot_bytes), static_cast<int>(staged)});
}

PlainRows rows_from(const PlainRows& x, int64_t row) { return {x.x + row * x.k, x.k}; }
GatedRows rows_from(const GatedRows& x, int64_t row) {
  return {{x.x + row * x.k, x.k}, x.up + row * x.k};
}
NormedRows rows_from(const NormedRows& x, int64_t row) {
  return {{x.x + row * x.k, x.k}, x.w, x.eps};
}
CodedRows rows_from(const CodedRows& x, int64_t row) {
  const int64_t g = row * (x.k >> x.group_log2);
  return {x.codes + row * x.k, x.zeros + g, x.scales + g, x.k, x.group_log2};
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
  launch_all(at, products, NormedRows{{x, static_cast<int>(products[0].w.k)}, w, eps}, m);
}

void launch_packed_gemv_gated(const ProductLaunch& at, const std::vector<TiledProduct>& products,
                              const bf16* gate, const bf16* up, int64_t m) {
  launch_all(at, products, GatedRows{{gate, static_cast<int>(products[0].w.k)}, up}, m);
}

void launch_quantized_gemv(const ProductLaunch& at, const std::vector<TiledProduct>& products,
                           const uint8_t* codes, const uint8_t* zeros, const float* scales,
                           int64_t m) {
  const TiledView& w = products[0].w;
  launch_all(at, products,
             CodedRows{codes, zeros, scales, static_cast<int>(w.k),
                       std::countr_zero(static_cast<unsigned>(w.group))},
             m);
}

}  // namespace bbb::cuda
