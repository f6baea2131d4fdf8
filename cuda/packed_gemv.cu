// Products of few rows with 2-bit weights in tiles (quant/packed_tiles.h), on the integer tensor
// cores:
//
//   packed_gemv      y = S x ((q - z) e)^T (+ addend)                     x bf16
//   quantized_gemv   the same, x = (a - b) scale                          a, b codes of an operand
//   .._normed        the same, x = rms_norm(x', w)                        x' bf16, w FP32
//   .._gated         the same, x = silu(gate) up                          gate, up bf16
//
// x in bf16 may also be a row that is gathered by a channel order, rotated inside of groups, or
// both (cuda/lane_operand.h), and quantized (cuda/row_grid.h).
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
// A block takes up to kMaxTiles row tiles of one of the matrices. Its warps take slices of 128
// positions in turn, each for all of these row tiles. A slot of the block's ring holds a slice's
// tiles. The warps' sums are added in shared memory in a fixed order. Where that leaves the warps
// less to do, a cluster of two blocks takes twice the row tiles and each block half of the slices:
// then fewer warps make the same integers of x.
//
// Two blocks fit on a multiprocessor: the next product's tiles are copied while this one runs. Its
// warps start the first copies, 16 or 24 KiB; one more warp starts another as each lands, so that
// x and the tiles of the product in front do not wait behind them. Once x is complete, each warp
// reads its slices of it, and refills the slots that it has read. The one more warp then makes r of
// the norm from the other warps' sums of squares.
//
// A row that is gathered is made in shared memory first: x, the norm's x w, or silu(gate) up, in
// bf16. The blocks of a cluster each make half of it, for both. Then a lane reads its positions of
// a slice by their offsets in the row, which are on their way to L2 while the kernel in front runs.
// Groups are rotated in registers: the lanes of a warp hold all of each.
//
// A row that is quantized is made in shared memory too. That of a norm each block makes for itself,
// because its values need r. Lanes then keep the operand of their slices in FP32 in shared memory.
// The block finds the largest range of a group, and exchanges it with the cluster's other block.
// A lane quantizes its positions when it multiplies their slice. As cuda/operand.cu, this file is
// compiled without contraction. A code may still differ from its, where x lies on a threshold: r is
// a sum in another order, and silu an approximation.
//
// Scales and zero points of codes are copied to shared memory first, by the whole block. They are
// a few lines of the L2 cache, which answers one request for a line after another: a request of
// each warp and slice of every block would take longer than the product.
//
// Bytes moved: those of the tiles; x comes from the L2 cache, once a block.
#include <algorithm>
#include <bit>
#include <numeric>
#include <utility>

#include "cuda/cuda_backend.h"
#include "cuda/early_start.h"
#include "cuda/hopper.h"
#include "cuda/lane_operand.h"
#include "cuda/packed_gemv.h"
#include "cuda/reduce.h"
#include "cuda/row_grid.h"
#include "cuda/tile_product.h"
#include "quant/packed_tiles.h"

namespace bbb::cuda {

namespace {

using quant::kTileBytes;
using quant::kTileColumns;
using quant::kTileRows;

constexpr int kMaxWarps = 12;                  // of a block
constexpr int kMaxTiles = 8;                   // row tiles of a block
constexpr int64_t kBytesInFlight = 24 * 1024;  // of a block's first copies
constexpr int64_t kSplitInFlight = 16 * 1024;  // the same in a cluster
constexpr int kTokens = 4;                     // rows of x of a launch
constexpr int kBlocks = 2;                     // that fit on a multiprocessor
constexpr int kSubgroups = kTileColumns / quant::kSubgroup;
// Of a slice that is quantized in the product: its values in FP32, and the ranges of its groups.
constexpr int kHeldBytes = 4 * kTileColumns + 8 * kSubgroups;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// Four positions of x as integers, v + 128 in 16 bits each, and the unit of the octet.
struct Levels {
  uint32_t first_pair, second_pair;
  float unit;
};

// What a lane does when x is made into operands.
struct LaneRole {
  int first_source, second_source;  // lanes, of exchange_positions
  int unit_source;                  // the first lane of octet t
  int power;                        // the bits of 4^-t

  __device__ __forceinline__ explicit LaneRole(int lane) {
    const int first = lane & ~3, t = lane & 3;
    first_source = kept(first + (0x78 >> (2 * t) & 3));   // 0, 2, 3, 1
    second_source = kept(first + (0xD2 >> (2 * t) & 3));  // 2, 0, 1, 3
    unit_source = kept(8 * t);
    power = kept((127 - 2 * t) << 23);
  }
};

// A lane of an octet reads positions 4l to 4l + 3. It gets 2t, 2t + 1, 2t + 8 and 2t + 9, in the
// upper four lanes 16 more.
__device__ __forceinline__ void exchange_positions(Levels& levels, int lane, const LaneRole& role) {
  // Four lanes have pairs 2t and 2t + 1; they get pairs t and t + 4. Each sends one at a time.
  const int t = lane & 3;
  const bool middle = t == 1 || t == 2;
  const uint32_t a = middle ? levels.second_pair : levels.first_pair;
  const uint32_t b = middle ? levels.first_pair : levels.second_pair;
  const uint32_t from_a = __shfl_sync(kAllLanes, a, role.first_source);
  const uint32_t from_b = __shfl_sync(kAllLanes, b, role.second_source);
  levels.first_pair = middle ? from_b : from_a;
  levels.second_pair = middle ? from_a : from_b;
}

// Of four bf16 values.
__device__ __forceinline__ Levels levels_of(uint2 pairs) {
  uint32_t most = __vmaxu2(pairs.x & 0x7FFF7FFFu, pairs.y & 0x7FFF7FFFu);
#pragma unroll
  for (int lanes = 1; lanes < 8; lanes *= 2)
    most = __vmaxu2(most, __shfl_xor_sync(kAllLanes, most, lanes));
  const uint32_t largest = max(most & 0xFFFFu, most >> 16);
  const IntegerUnit integers(largest);
  const auto shifted = [&](uint32_t bits) { return integers.shifted(__uint_as_float(bits)); };
  return {__byte_perm(shifted(pairs.x << 16), shifted(pairs.x & 0xFFFF0000u), 0x5410),
          __byte_perm(shifted(pairs.y << 16), shifted(pairs.y & 0xFFFF0000u), 0x5410),
          integers.unit};
}

// Where rows of x come from. A lane reads Raw, four positions: load_fixed() what no kernel writes,
// load() the rest. levels() makes them integers; the whole warp takes part. A row that is gathered
// is read in pieces of eight channels, kPieces of a thread at a time.

// What levels() needs to know of the whole row.
struct NoGrid {};

// Rows of bf16.
struct PlainRows {
  static constexpr bool kNormed = false, kHasGrids = false, kGathered = false, kManyRows = true,
                        kQuantized = false;
  using Grid = NoGrid;
  static constexpr int kPieces = 2;
  using Raw = uint2;
  using Piece = uint4;
  const bf16* x;  // (M, K)
  int k;

  __host__ __device__ int columns() const { return k; }
  template <typename T>
  __device__ void load_fixed(T&, int) const {}
  template <typename T>
  __device__ void load(T& raw, int row, int at) const {
    raw = load_from<T>(x, row, at);
  }
  template <typename T>
  __device__ T load_from(const bf16* from, int row, int at) const {
    return load_past_l1(reinterpret_cast<const T*>(from + row * k + at));
  }
  template <typename T>
  __device__ static T values(const T& raw) {
    return raw;
  }
  __device__ static Levels levels(const Raw& raw, int, int, NoGrid) { return levels_of(raw); }
};

// Rows of silu(gate) up.
struct GatedRows : PlainRows {
  static constexpr int kPieces = 3;
  template <typename T>
  struct Both {
    T gate, up;
  };
  using Raw = Both<uint2>;
  using Piece = Both<uint4>;
  const bf16* up;  // (M, K); x: gate

  template <typename T>
  __device__ void load(Both<T>& raw, int row, int at) const {
    raw = {load_from<T>(x, row, at), load_from<T>(up, row, at)};
  }
  __device__ static uint2 values(const Raw& raw) {
    return {gated(raw.gate.x, raw.up.x), gated(raw.gate.y, raw.up.y)};
  }
  __device__ static uint4 values(const Piece& raw) {
    return {gated(raw.gate.x, raw.up.x), gated(raw.gate.y, raw.up.y), gated(raw.gate.z, raw.up.z),
            gated(raw.gate.w, raw.up.w)};
  }
  __device__ static Levels levels(const Raw& raw, int, int, NoGrid) {
    return levels_of(values(raw));
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
  static constexpr bool kNormed = true;
  static constexpr int kPieces = 2;
  struct Raw {
    uint2 x;
    float4 w;
  };
  struct Piece {
    uint4 x;
    float4 w, w_behind;
  };
  const float* w;  // (K)
  float eps;

  __device__ void load_fixed(Raw& raw, int at) const {
    raw.w = *reinterpret_cast<const float4*>(w + at);
  }
  __device__ void load_fixed(Piece& raw, int at) const {
    raw.w = *reinterpret_cast<const float4*>(w + at);
    raw.w_behind = *reinterpret_cast<const float4*>(w + at + 4);
  }
  __device__ void load(Raw& raw, int row, int at) const { raw.x = load_from<uint2>(x, row, at); }
  __device__ void load(Piece& raw, int row, int at) const { raw.x = load_from<uint4>(x, row, at); }
  __device__ static uint2 values(const Raw& raw) {
    return {weighted(raw.x.x, raw.w.x, raw.w.y), weighted(raw.x.y, raw.w.z, raw.w.w)};
  }
  // Of x r w, r of the norm or 1.
  __device__ static uint4 values(const Piece& raw, float r = 1.0f) {
    return {weighted(raw.x.x, raw.w.x, raw.w.y, r), weighted(raw.x.y, raw.w.z, raw.w.w, r),
            weighted(raw.x.z, raw.w_behind.x, raw.w_behind.y, r),
            weighted(raw.x.w, raw.w_behind.z, raw.w_behind.w, r)};
  }
  __device__ static Levels levels(const Raw& raw, int, int, NoGrid) {
    return levels_of(values(raw));
  }
  // Of the values of x.
  __device__ static float squares(const Raw& raw) { return square(raw.x.x) + square(raw.x.y); }
  __device__ static float squares(const Piece& raw) {
    return square(raw.x.x) + square(raw.x.y) + (square(raw.x.z) + square(raw.x.w));
  }
  __device__ float factor(float squares) const {
    return 1.0f / sqrtf(squares / static_cast<float>(k) + eps);
  }

 private:
  __device__ static uint32_t weighted(uint32_t pair, float first, float second, float r = 1.0f) {
    const float2 v = unpack_bf16(pair);
    return pack_bf16(v.x * r * first, v.y * r * second);
  }
  __device__ static float square(uint32_t pair) {
    const float2 v = unpack_bf16(pair);
    return fmaf(v.x, v.x, v.y * v.y);
  }
};

// A row of another source, all groups of it rotated.
template <typename Source>
struct RotatedRow : Source {
  static constexpr bool kManyRows = false;
  LaneOperand operand;

  __device__ Levels levels(const typename Source::Raw& raw, int, int lane, NoGrid) const {
    return levels_of(rotate(Source::values(raw), operand, lane));
  }
};

// A row of another source, gathered from shared memory, which it is the first part of.
template <typename Source>
struct GatheredRow : Source {
  static constexpr bool kGathered = true, kManyRows = false;
  using Of = Source;
  LaneOperand operand;
  using Raw = uint2;  // offsets in the row

  __host__ __device__ int columns() const { return operand.stored_k; }
  __device__ void load_fixed(Raw& raw, int at) const {
    raw = *reinterpret_cast<const uint2*>(operand.offsets + at);
  }
  __device__ void load(Raw&, int, int) const {}
  __device__ Levels levels(const Raw& raw, int at, int lane, NoGrid) const {
    const uint2 pairs = gather(reinterpret_cast<const unsigned char*>(dynamic_smem()), raw);
    return levels_of(finish_positions<uint2>(pairs, operand, at, lane));
  }
  // Each thread of the launch prefetches one line of offsets.
  __device__ void prefetch_offsets() const {
    constexpr int kLine = 128 / sizeof(uint16_t);
    const int first = static_cast<int>(threadIdx.x * gridDim.x + blockIdx.x) * kLine;
    if (first < columns()) prefetch_to_l2(operand.offsets + first);
  }
};

// A row of another source, gathered where there is a channel order, rotated where asked, and
// quantized. Each value is held in FP32 before the first product.
template <typename Source>
struct QuantizedRow : Source {
  static constexpr bool kNormed = false, kGathered = true, kManyRows = false, kQuantized = true;
  using Of = Source;
  LaneOperand operand;
  using Grid = RowGrid;
  struct Raw {
    float4 values;
    float2 range;  // of their group
  };

  __host__ __device__ int columns() const { return operand.stored_k; }
  __device__ void load_fixed(Raw&, int) const {}
  __device__ void load(Raw&, int, int) const {}
  __device__ void prefetch_offsets() const {}
  // Starts the copy of the offsets of four positions to shared memory, where the lane finds them.
  __device__ void start_offsets(float4* to, int at) const {
    if (operand.offsets != nullptr)
      cp_async_8(shared_address(to), operand.offsets + at, at < columns());
  }
  // The values of these positions from the row in shared memory, 0 behind its end.
  __device__ float4 finish(const float4* held, int at, int lane) const {
    uint2 pairs{};
    const auto* const row = reinterpret_cast<const unsigned char*>(dynamic_smem());
    if (at < columns()) {
      if (operand.offsets != nullptr)
        pairs = gather(row, *reinterpret_cast<const uint2*>(held));
      else if (at < this->k)
        pairs = *reinterpret_cast<const uint2*>(row + 2 * at);
    }
    return finish_positions<float4>(pairs, operand, at, lane);
  }
  __device__ Levels levels(const Raw& raw, int at, int, const Grid& grid) const {
    const float x[4] = {raw.values.x, raw.values.y, raw.values.z, raw.values.w};
    // The kernel then has no code for scales that are rounded up, as those of 8 bits are.
    __builtin_assume(operand.grid.bits <= kMostQuantizedBits);
    const ScaledGroup group = grid.group<Quotient::Near>(x, {raw.range.x, raw.range.y},
                                                         at < operand.pairs_begin, operand.group);
    const auto shifted = [&](float value) {
      return __float_as_uint(group.levels.clamped(group.levels.steps(value)) + kShiftedInteger);
    };
    return {__byte_perm(shifted(x[0]), shifted(x[1]), 0x5410),
            __byte_perm(shifted(x[2]), shifted(x[3]), 0x5410), group.step};
  }
};

constexpr int kPieceChannels = 8;  // 16 bytes

// Where part `rank` of the pieces of a row begins, of `split` parts, one or two.
__device__ __forceinline__ int staged_pieces(int k, int rank, int split) {
  return k / kPieceChannels * rank >> (split - 1);
}

// Calls use(piece, number) for a thread's pieces of a row: `from`, and so on by `threads`.
template <typename Piece, int kPieces, typename Use>
__device__ __forceinline__ void each_piece(Piece (&pieces)[kPieces], int from, int threads,
                                           int last, const Use& use) {
#pragma unroll
  for (int i = 0; i < kPieces; ++i)
    if (from + i * threads < last) use(pieces[i], from + i * threads);
}

// Makes part `rank` of a row in shared memory, once the kernel in front has ended, and in a cluster
// of two in that of the other block too, where its bytes count towards `barrier`. Returns this
// thread's sum of squares, if the row has a norm.
template <typename Source>
__device__ __forceinline__ float make_row(const Source& x, int thread, int threads, int rank,
                                          int split, uint32_t barrier) {
  const int first = staged_pieces(x.k, rank, split), last = staged_pieces(x.k, rank + 1, split);
  const uint32_t row = shared_address(dynamic_smem());
  typename Source::Piece pieces[Source::kPieces];
  const auto each = [&](int from, const auto& use) {
    each_piece(pieces, from, threads, last, use);
  };
  const auto load_fixed = [&](auto& piece, int at) { x.load_fixed(piece, at * kPieceChannels); };
  int from = first + thread;
  each(from, load_fixed);
  wait_for_previous_kernel();
  __syncwarp();
  if (split > 1) cluster_wait();  // the other block runs
  float squares = 0.0f;
#pragma unroll 1
  while (from < last) {
    each(from, [&](auto& piece, int at) { x.load(piece, 0, at * kPieceChannels); });
    each(from, [&](const auto& piece, int at) {
      const uint4 values = Source::values(piece);
      dynamic_smem()[at] = values;
      if (split > 1) store_to_block(row + at * 16, rank ^ 1, values, barrier);
      if constexpr (Source::kNormed) squares += Source::squares(piece);
    });
    from += Source::kPieces * threads;
    each(from, load_fixed);
  }
  if (thread == 0) dynamic_smem()[x.k / kPieceChannels] = {};
  return squares;
}

// Makes the row of a norm in shared memory, x r w in bf16, once the kernel in front has ended.
// `sums`: a float for each warp.
template <typename Source>
__device__ __forceinline__ void make_normed_row(const Source& x, int thread, int threads, int split,
                                                float* sums) {
  const int last = x.k / kPieceChannels, lane = thread % 32;
  uint4* const row = dynamic_smem();
  typename Source::Piece pieces[Source::kPieces];
  const auto each = [&](int from, const auto& use) {
    each_piece(pieces, from, threads, last, use);
  };
  const auto load_fixed = [&](auto& piece, int at) { x.load_fixed(piece, at * kPieceChannels); };
  each(thread, load_fixed);
  wait_for_previous_kernel();
  __syncwarp();
  if (split > 1) cluster_wait();  // the other block runs
  float squares = 0.0f;
#pragma unroll 1
  for (int from = thread; from < last; from += Source::kPieces * threads) {
    each(from, [&](auto& piece, int at) { x.load(piece, 0, at * kPieceChannels); });
    each(from, [&](const auto& piece, int at) {
      row[at] = piece.x;
      squares += Source::squares(piece);
    });
  }
  squares = warp_sum(squares);
  if (lane == 0) sums[thread / 32] = squares;
  named_sync(3, threads);
  const float r = x.factor(warp_sum(lane < threads / 32 ? sums[lane] : 0.0f));
#pragma unroll 1
  for (int from = thread; from < last; from += Source::kPieces * threads) {
    if (from > thread) each(from, load_fixed);
    each(from, [&](auto& piece, int at) {
      piece.x = row[at];
      row[at] = Source::values(piece, r);
    });
  }
  if (thread == 0) row[last] = {};
}

// Makes the operand of a block's slices, held (slices, 32 lanes), from the row in shared memory,
// and the ranges of its groups (slices, 4). Returns the grid of the whole row. `maxima`: two words
// for each warp, and two from the other block of a cluster, whose bytes count towards `barrier`.
template <typename Input>
__device__ __forceinline__ RowGrid hold_operand(const Input& x, float4* held, float2* ranges,
                                                uint2* maxima, int first_slice, int slices,
                                                int warp, int lane, int warps, int rank, int split,
                                                uint32_t barrier) {
  float most = 0.0f, most_outlier = 0.0f;
#pragma unroll 1
  for (int i = warp; i < slices; i += warps) {
    const int at = (first_slice + i) * kTileColumns + lane * 4;
    float4* const own = held + i * 32 + lane;
    const float4 values = x.finish(own, at, lane);
    *own = values;
    const float four[4] = {values.x, values.y, values.z, values.w};
    const quant::Range<float> range = quant::group_range(four, x.operand.group);
    if (lane % 8 == 0) ranges[i * kSubgroups + lane / 8] = {range.mn, range.mx};
    if (at < x.operand.pairs_begin)
      most_outlier = quant::max_nan(most_outlier, range.width());
    else
      most = quant::max_nan(most, range.width());
  }
  // As unsigned integers, the bits of such floats are in order, NaN last.
  const auto largest = [](uint2 of) {
    return uint2{__reduce_max_sync(kAllLanes, of.x), __reduce_max_sync(kAllLanes, of.y)};
  };
  uint2 all = largest({__float_as_uint(most), __float_as_uint(most_outlier)});
  if (lane == 0) maxima[warp] = all;
  named_sync(3, warps * 32);
  all = largest(lane < warps ? maxima[lane] : uint2{});
  if (split > 1) {
    uint2* const other = maxima + kMaxWarps;
    if (warp == 0 && lane == 0)
      store_to_block(shared_address(other), rank ^ 1,
                     make_float2(__uint_as_float(all.x), __uint_as_float(all.y)), barrier);
    __syncwarp();
    mbarrier_wait(barrier, 0);
    __syncwarp();
    all = {max(all.x, other->x), max(all.y, other->y)};
  }
  return RowGrid(__uint_as_float(all.x), __uint_as_float(all.y), x.operand.grid);
}

// Rows of an operand's codes.
struct CodedRows {
  static constexpr bool kNormed = false, kHasGrids = true, kGathered = false, kManyRows = true,
                        kQuantized = false;
  using Grid = NoGrid;
  struct Raw {
    uint32_t codes;
    uint2 grid;  // from shared memory
  };
  const uint8_t* codes;  // (M, K)
  const uint8_t* zeros;  // (M, K / G)
  const float* scales;   // (M, K / G)
  int k, group_log2;

  __host__ __device__ int columns() const { return k; }
  __device__ static void load_fixed(Raw&, int) {}
  __device__ void load(Raw& raw, int row, int at) const {
    raw.codes = load_past_l1(reinterpret_cast<const uint32_t*>(codes + row * k + at));
  }
  // The bits of the scale, and the zero point.
  __device__ uint2 grid(int row, int at) const {
    const int group = row * (k >> group_log2) + (at >> group_log2);
    return {load_past_l1(reinterpret_cast<const uint32_t*>(scales + group)),
            load_past_l1(zeros + group)};
  }
  __device__ static Levels levels(const Raw& raw, int, int, NoGrid) {
    const uint32_t shift = ((128 - raw.grid.y) & 0xFFFFu) * 0x00010001u;
    return {__vadd2(__byte_perm(raw.codes, 0, 0x4140), shift),
            __vadd2(__byte_perm(raw.codes, 0, 0x4342), shift), __uint_as_float(raw.grid.x)};
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

// Makes a slice of x.
template <typename Input, bool kManyRows>
struct OperandMaker : SliceOperand<kManyRows> {
  static constexpr int kLoads = SliceOperand<kManyRows>::kUnits;
  // What a lane reads of a slice: of its sub-group, or of each of its row.
  struct Raw {
    typename Input::Raw of[kLoads];
  };

  // The position of a lane's first value of slice 0.
  __device__ __forceinline__ static int first_at(int lane) {
    return (kManyRows ? lane % 8 : lane) * 4;
  }
  // From position `at` of this lane on. Zeros from position `end` on.
  __device__ __forceinline__ static void read_fixed(Raw& raw, const Input& x, int at, int end) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      raw.of[i] = {};
      if (at + i * quant::kSubgroup < end) x.load_fixed(raw.of[i], at + i * quant::kSubgroup);
    }
  }
  __device__ __forceinline__ static void read(Raw& raw, const Input& x, int m, int at, int end,
                                              int lane) {
    const int row = kManyRows ? lane / 8 : 0;
    if (row >= m) return;
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      if (at + i * quant::kSubgroup < end) x.load(raw.of[i], row, at + i * quant::kSubgroup);
  }
  // at: as in read().
  __device__ __forceinline__ void make(const Raw& raw, const Input& x,
                                       const typename Input::Grid& grid, int at, int lane,
                                       const LaneRole& role) {
    const uint32_t ones[4] = {kOnes, kOnes, kOnes, kOnes};
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      Levels levels = x.levels(raw.of[i], at, lane, grid);
      exchange_positions(levels, lane, role);
      uint32_t columns[2];
      make_columns(columns, levels, lane);
      int c[4] = {0, 0, 0, 0};
      mma_u8_s8(c, ones, columns[0], columns[1]);
      this->sum[i] = joined(c[0], c[1]);
      // Times 4^-i.
      this->unit[i] = __shfl_sync(kAllLanes, levels.unit, role.unit_source) *
                      __uint_as_float(kManyRows ? (127 - 2 * i) << 23 : role.power);
      if constexpr (kManyRows) {
        this->b[i][0] = columns[0];
        this->b[i][1] = columns[1];
      } else {
        this->set_columns(columns[0], columns[1], lane);
      }
    }
  }
};

// The products of a launch: blocks, or clusters of two, take the shares of the first, then of the
// next. A share has `tiles` row tiles, each of the first `wider` shares one more.
struct SharedProducts {
  struct Product {
    TiledProduct of;
    int shares, tiles, wider;
  };
  Product items[kMaxProducts];
};

struct GemvShape {
  int slices;
  int split_log2;  // of the blocks of a cluster
  int m;           // rows of x
  int slots;       // of a block's ring, at least one a warp
  int in_flight;   // slices of the first copies, at most slots
};

// Words of a block's shared memory for what its warps exchange: the squares of a norm, or the
// maxima of a grid and, before these, its norm's squares.
template <typename Input, bool kManyRows>
__host__ __device__ constexpr int partial_words() {
  return Input::kQuantized ? 2 * (kMaxWarps + 1)
         : Input::kNormed  ? kMaxWarps * (kManyRows ? kTokens : 1)
                           : 0;
}
// Whether each block of a cluster makes a part of the row.
template <typename Input>
__host__ __device__ constexpr bool shares_row() {
  if constexpr (Input::kQuantized)
    return !Input::Of::kNormed;
  else
    return Input::kGathered;
}

// kTiles: the most row tiles of a block. Shared memory: a row that is gathered; the values that are
// held (slices, 32 lanes, 4) and their ranges (slices, 4, 2); the ring; the master scale and three
// words of padding; r of the norm (rows of x); of the cluster's second block the sums (outputs,
// rows of x), then the squares (rows of x); of NormedRows the squares (warps, rows of x), of
// QuantizedRow the maxima (warps + 1, 2); the barriers of the second block's sums and squares, of
// the other block's part of the row, and one for each slice; of CodedRows scale and zero point of
// each sub-group (rows of x, slices, 4). At the end the last slot that a warp has read holds its
// sums (kTiles, 2, 32 lanes).
template <typename Input, bool kManyRows, int kTiles>
__global__ void __launch_bounds__((kMaxWarps + 1) * 32, kManyRows ? 1 : kBlocks)
    packed_gemv_kernel(const __grid_constant__ SharedProducts products, Input x, GemvShape shape) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Operand = OperandMaker<Input, kManyRows>;
  constexpr bool kShares = shares_row<Input>();
  constexpr int kSlotBytes = kTiles * kTileBytes;
  constexpr int kRows = kManyRows ? kTokens : 1;  // of x, in shared memory
  constexpr int kOutputs = kTiles * kTileRows * kRows;
  constexpr int kPartialWords = partial_words<Input, kManyRows>();
  start_next_kernel();
  unsigned char* smem = reinterpret_cast<unsigned char*>(dynamic_smem());
  if constexpr (Input::kGathered) {
    x.prefetch_offsets();
    smem += staged_bytes(x.k);
  }
  const unsigned thread = threadIdx.x, threads = blockDim.x - 32;  // the last warp copies
  const int lane = thread & 31, warps = threads >> 5;
  const int warp = __shfl_sync(kAllLanes, static_cast<int>(thread >> 5), 0);  // uniform
  const int split = cluster_blocks(), rank = cluster_rank();
  const int first_slice = shape.slices * rank >> shape.split_log2;
  const int slices = (shape.slices * (rank + 1) >> shape.split_log2) - first_slice;
  int share = static_cast<int>(blockIdx.x >> shape.split_log2), p = 0;
#pragma unroll 1
  for (; share >= products.items[p].shares; ++p) share -= products.items[p].shares;
  const TiledProduct& product = products.items[p].of;
  const int wider = products.items[p].wider;
  const int tiles = products.items[p].tiles + (share < wider ? 1 : 0);
  const int first_tile = share * products.items[p].tiles + min(share, wider);
  const int n = static_cast<int>(product.w.n), all_tiles = (n + kTileRows - 1) / kTileRows;

  const int held_slices = (shape.slices + split - 1) >> shape.split_log2;
  float4* const held = reinterpret_cast<float4*>(smem);
  float2* const ranges = reinterpret_cast<float2*>(held + held_slices * 32);
  // In both blocks of a cluster the same bytes, so that addresses agree.
  if constexpr (Input::kQuantized) smem += held_slices * kHeldBytes;
  const int ring_bytes = shape.slots * kSlotBytes;
  float* const master_scale = reinterpret_cast<float*>(smem + ring_bytes);
  float* const factors = master_scale + 4;
  float* const other_sums = factors + kTokens;  // of the cluster's second block
  float* const other_squares = other_sums + (split - 1) * kOutputs;
  float* const partial = other_squares + (split - 1) * kTokens;
  const uint32_t sums_barrier = shared_address(partial + kPartialWords);
  const uint32_t partial_barrier = sums_barrier + 8;
  const uint32_t row_barrier = partial_barrier + 8;
  const uint32_t barriers = row_barrier + 8;  // of slices
  uint2* const grids = reinterpret_cast<uint2*>(partial + kPartialWords) + 3 + slices;

  const unsigned char* const source =
      product.w.tiles + (int64_t{first_slice} * all_tiles + first_tile) * kTileBytes;
  const int64_t source_pitch = int64_t{all_tiles} * kTileBytes;
  const int slice_bytes = tiles * kTileBytes;
  const auto start_copy = [&](int slice, int slot) {
    mbarrier_expect(barriers + slice * 8, slice_bytes);
    copy_bytes_once(shared_address(smem) + slot, source + slice * source_pitch, slice_bytes,
                    barriers + slice * 8);
  };
  if (lane == 0 && warp < warps) {
#pragma unroll 1
    for (int i = warp; i < slices; i += warps) mbarrier_init(barriers + i * 8, 1);
    if (split > 1 && warp == 0) {
      mbarrier_init(sums_barrier, 1);
      mbarrier_init(partial_barrier, 1);
      if (rank == 0) {
        mbarrier_expect(sums_barrier, tiles * kTileRows * kRows * 4);
        if (Input::kNormed) mbarrier_expect(partial_barrier, shape.m * 4);
      }
      if constexpr (Input::kQuantized) mbarrier_expect(partial_barrier, sizeof(uint2));
      if constexpr (kShares) {
        mbarrier_init(row_barrier, 1);
        mbarrier_expect(
            row_barrier,
            (staged_pieces(x.k, (rank ^ 1) + 1, split) - staged_pieces(x.k, rank ^ 1, split)) * 16);
      }
    }
    mbarrier_init_fence();
    async_proxy_fence();
#pragma unroll 1
    for (int i = warp; i < min(slices, shape.in_flight); i += warps) start_copy(i, i * kSlotBytes);
  }
  if (thread == 0) {
    cp_async_4(shared_address(master_scale), product.w.master_scale, true);
    cp_async_commit();
  }
  __syncthreads();
  if (split > 1) cluster_arrive();
  if (warp == warps) {
    if (lane == 0) {
#pragma unroll 1
      for (int i = shape.in_flight; i < min(slices, shape.slots); ++i) {
        mbarrier_wait(barriers + (i - shape.in_flight) * 8, 0);
        start_copy(i, i * kSlotBytes);
      }
    }
    if constexpr (Input::kNormed) {
      __syncwarp();
      named_sync(2, threads + 32);  // all warps have their sums of squares
      float all = 0.0f;             // lane i: of row i % kRows
#pragma unroll 1
      for (int i = lane; i < warps * kRows; i += 32) all += partial[i];
#pragma unroll
      for (int lanes = kRows; lanes < 32; lanes *= 2) all += __shfl_xor_sync(kAllLanes, all, lanes);
      if (rank > 0) {
        cluster_wait();  // the first block runs
        if (lane < shape.m)
          store_to_block(shared_address(other_squares + lane), 0, all, partial_barrier);
      } else if (lane < shape.m) {
        if (split > 1) {
          mbarrier_wait(partial_barrier, 0);
          all += other_squares[lane];
        }
        factors[lane] = x.factor(all);
      }
      __syncwarp();
      named_arrive(1, threads + 32);
    }
    return;
  }

  // A lane's positions: of the slice that it multiplies next.
  const int step = warps * kTileColumns;
  const int end = min(x.columns(), (first_slice + slices) * kTileColumns);
  int at = (first_slice + warp) * kTileColumns + Operand::first_at(lane);
  typename Operand::Raw raw;
  Operand::read_fixed(raw, x, at, end);
  // At the end, four threads add the sums of an output row. For each row of x one of them writes.
  const int part = lane & 3, written = kManyRows ? shape.m : 1;
  const auto addend_of = [&](unsigned i) {
    const int row = first_tile * kTileRows + i / 4;
    return product.addend != nullptr && i < tiles * kTileRows * 4u && row < n && part < written
               ? load_past_l1(product.addend + int64_t{part} * n + row)
               : __float2bfloat16_rn(0.0f);
  };
  float own_squares = 0.0f;
  const auto give_squares = [&] {
    // Of all lanes, or of an octet, which has a row of x.
    constexpr int kLanes = kManyRows ? 8 : 32;
#pragma unroll
    for (int lanes = 1; lanes < kLanes; lanes *= 2)
      own_squares += __shfl_xor_sync(kAllLanes, own_squares, lanes);
    if (lane % kLanes == 0) partial[warp * kRows + lane / kLanes] = own_squares;
    named_arrive(2, threads + 32);
  };
  if constexpr (Input::kQuantized) {
#pragma unroll 1
    for (int i = warp; i < slices; i += warps)
      x.start_offsets(held + i * 32 + lane, (first_slice + i) * kTileColumns + lane * 4);
    cp_async_commit();
  }
  if constexpr (kShares)
    own_squares = make_row<typename Input::Of>(x, thread, threads, rank, split, row_barrier);
  else if constexpr (Input::kGathered)
    make_normed_row<typename Input::Of>(x, thread, threads, split, partial);
  const LaneRole role(lane);
  const TileLane tile_lane(lane);
  typename Input::Grid grid;
  if constexpr (Input::kGathered) {
    if constexpr (Input::kQuantized) cp_async_wait<0>();
    named_sync(3, threads);
    if (kShares && split > 1) mbarrier_wait(row_barrier, 0);
    if constexpr (Input::kNormed) give_squares();
    if constexpr (Input::kQuantized)
      grid = hold_operand(x, held, ranges, reinterpret_cast<uint2*>(partial), first_slice, slices,
                          warp, lane, warps, rank, split, partial_barrier);
  } else {
    wait_for_previous_kernel();
  }

  Operand::read(raw, x, shape.m, at, end, lane);
  bf16 addend = addend_of(thread);
  if constexpr (Input::kHasGrids) {
    const int groups = slices * kSubgroups;
#pragma unroll 1
    for (int i = static_cast<int>(thread); i < shape.m * groups; i += warps * 32) {
      const int row = kManyRows ? i / groups : 0;
      const int from = first_slice * kTileColumns + (i - row * groups) * quant::kSubgroup;
      grids[i] = from < x.k ? x.grid(row, from) : uint2{};
    }
    named_sync(1, threads);
  }
  float sum[kTiles][2] = {};
  int slice = warp, slot = warp * kSlotBytes;
#pragma unroll 1
  for (;; slice += warps) {
    const bool last = slice + warps >= slices;
    if constexpr (Input::kHasGrids) {
      const int row = kManyRows ? min(lane / 8, shape.m - 1) : 0;
      const uint2* const from =
          grids + (row * slices + slice) * kSubgroups + (kManyRows ? 0 : lane / 8);
#pragma unroll
      for (int i = 0; i < Operand::kLoads; ++i) raw.of[i].grid = from[i];
    }
    if constexpr (Input::kQuantized)
      raw.of[0] = {held[slice * 32 + lane], ranges[slice * kSubgroups + lane / 8]};
    Operand operand;
    operand.make(raw, x, grid, at, lane, role);
    if constexpr (Input::kNormed && !Input::kGathered) {
#pragma unroll
      for (int i = 0; i < Operand::kLoads; ++i) own_squares += Input::squares(raw.of[i]);
      if (last) give_squares();
    }
    at += step;
    Operand::read_fixed(raw, x, at, end);
    Operand::read(raw, x, shape.m, at, end, lane);
    mbarrier_wait(barriers + slice * 8, 0);
    const auto multiply = [&](int i) {
      multiply_tile<kManyRows>(sum[i], smem + slot + i * kTileBytes, operand, tile_lane);
    };
    // The last two of many tiles are behind a branch. Otherwise the compiler has so many tiles in
    // flight that it spills. Tiles that the block lacks are computed from whatever is there, and
    // not written.
    constexpr int kTogether = kTiles > 4 ? kTiles - 2 : kTiles;
#pragma unroll
    for (int i = 0; i < kTogether; ++i) multiply(i);
    if (tiles > kTogether) {
#pragma unroll
      for (int i = kTogether; i < kTiles; ++i) multiply(i);
    }
    __syncwarp();
    if (slice + shape.slots < slices && lane == 0) start_copy(slice + shape.slots, slot);
    if (last) break;
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
  cp_async_wait<0>();
  named_sync(1, Input::kNormed ? threads + 32 : threads);
  if (rank > 0 && !Input::kGathered) cluster_wait();  // the first block runs
#pragma unroll 1
  for (unsigned i = thread; i < tiles * kTileRows * 4u; i += threads) {
    float4 total{};  // of the sub-groups of one row of x, or of four rows of x
#pragma unroll
    for (int w = 0; w < kMaxWarps; w += 4) {
      int from = first_sums + (w + part) * kSlotBytes;
      if (from >= ring_bytes) from -= ring_bytes;
      if (w + part >= warps) continue;
      const float4 sums = reinterpret_cast<const float4*>(smem + from)[i / 4];
      total.x += sums.x;
      total.y += sums.y;
      total.z += sums.z;
      total.w += sums.w;
    }
    const auto all_parts = [](float v) {
      v += __shfl_xor_sync(kAllLanes, v, 1);
      return v + __shfl_xor_sync(kAllLanes, v, 2);
    };
    float value;
    if constexpr (kManyRows) {
      const float of[] = {all_parts(total.x), all_parts(total.y), all_parts(total.z),
                          all_parts(total.w)};
      value = part < 2 ? (part == 0 ? of[0] : of[1]) : part == 2 ? of[2] : of[3];
    } else {
      value = all_parts(total.x + total.y + (total.z + total.w));
    }
    const int shared_row = kManyRows ? part : 0;  // of x
    const int output = i / 4 * kRows + shared_row;
    if (rank > 0) {
      if (part < kRows) store_to_block(shared_address(other_sums + output), 0, value, sums_barrier);
      continue;
    }
    if (split > 1) {
      mbarrier_wait(sums_barrier, 0);
      value += other_sums[output];
    }
    if constexpr (Input::kNormed) value *= factors[shared_row];
    value = fmaf(value, *master_scale, to_float(addend));
    addend = addend_of(i + threads);
    const int row = first_tile * kTileRows + i / 4;
    if (row >= n || part >= written) continue;
    const int64_t out = int64_t{part} * n + row;
    if (product.y_f32 != nullptr)
      product.y_f32[out] = value;
    else
      product.y_bf16[out] = __float2bfloat16_rn(value);
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
    rounds_of_warps = ceil_div(ceil_div(slices, split), kMaxWarps);
    // No more than that takes, but as many for each scheduler of a multiprocessor.
    const int64_t needed = ceil_div(ceil_div(slices, split), rounds_of_warps);
    warps = std::clamp<int64_t>(ceil_div(needed, 4) * 4, 1,
                                std::min<int64_t>(kMaxWarps, std::max<int64_t>(slices / split, 1)));
  }
  // Sets the shares of each matrix, of at most `most` row tiles. Returns their sum.
  int64_t divide_rows(Products products, int64_t most) {
    int64_t sum = 0;
    for (size_t i = 0; i < products.size(); ++i)
      sum += shares[i] = ceil_div(quant::row_tiles(products[i].w.n), most);
    return sum;
  }
  int64_t all_shares() const { return std::accumulate(shares, shares + kMaxProducts, int64_t{0}); }
  // Instructions of a warp: 40 a tile, as counted in machine code. Those of a slice count half more
  // than in machine code, so that the faster division wins (measured on an H200).
  int64_t cost() const { return rounds_of_warps * (160 + 40 * tiles); }

  int split;
  int64_t shares[kMaxProducts] = {};
  int64_t tiles, warps;
  int64_t rounds_of_warps;  // slices of a warp
};

Division divide(Products products, int processors) {
  const Division whole(products, processors, 1), halves(products, processors, 2);
  const bool can_split = processors > 1 && quant::column_slices(products[0].w.k) > 1 &&
                         2 * halves.all_shares() <= processors;
  return can_split && halves.cost() < whole.cost() ? halves : whole;
}

// Bytes of a block's shared memory: about half of a multiprocessor's. Blocks that end leave some
// multiprocessors free before others, and a launch should still put one block on each. Blocks of
// more than half never share one. Then the blocks in front and behind must have less: in a layer of
// a model, every other product has an addend, the residual stream.
int64_t block_bytes(const ProductLaunch& at, bool with_addend) {
  constexpr int64_t kMargin = 1024;
  return at.block_bytes(kBlocks) + (with_addend ? kMargin : -kMargin);
}

// The slots that fit into a block's ring, of kTiles = by.tiles; 0 or less if none does.
template <bool kManyRows, typename Input>
int64_t ring_slots(int64_t bytes, const Input& x, int64_t m, const Division& by) {
  constexpr int64_t kRows = kManyRows ? kTokens : 1;
  const int64_t slices = ceil_div(quant::column_slices(x.columns()), by.split);
  const int64_t other_bytes =
      (4 + kTokens + (by.split - 1) * (by.tiles * kTileRows * kRows + kTokens) +
       partial_words<Input, kManyRows>()) *
          4 +
      (3 + slices) * 8 + (Input::kGathered ? staged_bytes(x.k) : 0) +
      (Input::kQuantized ? slices * kHeldBytes : 0) +
      (Input::kHasGrids ? m * slices * kSubgroups * 8 : 0);
  return std::min(slices, (bytes - other_bytes) / (by.tiles * kTileBytes));
}

template <bool kManyRows, int kTiles, typename Input>
void launch_shape(const ProductLaunch& at, const SharedProducts& products, const Input& x,
                  int64_t m, const Division& by) {
  const int64_t all_slices = quant::column_slices(x.columns());
  const int64_t slot_bytes = kTiles * kTileBytes, blocks = by.all_shares() * by.split;
  const int64_t bytes = block_bytes(at, products.items[0].of.addend != nullptr);
  const int64_t slots = ring_slots<kManyRows>(bytes, x, m, by);
  const int64_t warps = std::min(by.warps, slots);
  BBB_ASSERT(warps > 0);
  launch(at.stream,
         {dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(32 * (warps + 1))), bytes,
          true, static_cast<unsigned>(by.split)},
         packed_gemv_kernel<Input, kManyRows, kTiles>, products, x,
         GemvShape{static_cast<int>(all_slices), std::countr_zero(static_cast<unsigned>(by.split)),
                   static_cast<int>(m), static_cast<int>(slots),
                   static_cast<int>(std::min(
                       slots, (by.split > 1 ? kSplitInFlight : kBytesInFlight) / slot_bytes))});
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

template <typename Input>
Input rows_from(const Input& x, int64_t row) {
  static_assert(!Input::kManyRows);
  BBB_ASSERT(row == 0);
  return x;
}

// Up to kMaxProducts products of up to kTokens rows from row `row` of x on.
template <bool kManyRows, typename Input>
void launch_rows(const ProductLaunch& at, Products products, const Input& x, int64_t row,
                 int64_t m) {
  const Division by = divide(products, at.processors);
  SharedProducts list{};
  for (size_t i = 0; i < products.size(); ++i) {
    TiledProduct product = products[i];
    const auto from_row = [&](auto*& y) { y = y == nullptr ? y : y + row * product.w.n; };
    from_row(product.y_bf16);
    from_row(product.y_f32);
    from_row(product.addend);
    const int64_t tiles = quant::row_tiles(product.w.n);
    list.items[i] = {product, static_cast<int>(by.shares[i]),
                     static_cast<int>(tiles / by.shares[i]),
                     static_cast<int>(tiles % by.shares[i])};
  }
  [&]<int... kLess>(std::integer_sequence<int, kLess...>) {
    ((by.tiles == kLess + 1 &&
      (launch_shape<kManyRows, kLess + 1>(at, list, rows_from(x, row), m, by), true)) ||
     ...);
  }
  (std::make_integer_sequence<int, kMaxTiles>());
}

// Calls fn with the products of each launch.
template <typename Fn>
void each_launch(const std::vector<TiledProduct>& all, const Fn& fn) {
  for (size_t i = 0; i < all.size(); i += kMaxProducts)
    fn(Products(all).subspan(i, std::min<size_t>(all.size() - i, kMaxProducts)));
}

template <typename Input>
void launch_all(const ProductLaunch& at, const std::vector<TiledProduct>& all, const Input& x,
                int64_t m) {
  each_launch(all, [&](Products products) {
    if (m == 1) {
      launch_rows<false>(at, products, x, 0, m);
    } else if constexpr (Input::kManyRows) {
      for (int64_t row = 0; row < m; row += kTokens)
        launch_rows<true>(at, products, x, row, std::min<int64_t>(m - row, kTokens));
    }
  });
}

// The same of an operand of x.
template <typename Source>
void launch_operand(const ProductLaunch& at, const std::vector<TiledProduct>& products,
                    const Source& x, int64_t m, const LaneOperand* operand) {
  if (operand == nullptr)
    launch_all(at, products, x, m);
  else if (operand->quantizes())
    launch_all(at, products, QuantizedRow<Source>{x, *operand}, m);
  else if (operand->offsets != nullptr)
    launch_all(at, products, GatheredRow<Source>{x, *operand}, m);
  else
    launch_all(at, products, RotatedRow<Source>{x, *operand}, m);
}

int row_channels(const std::vector<TiledProduct>& products, const LaneOperand* operand) {
  return operand != nullptr ? operand->k : static_cast<int>(products[0].w.k);
}

}  // namespace

bool quantizes_in_product(const ProductLaunch& at, const std::vector<TiledProduct>& products,
                          const LaneOperand& operand) {
  bool fits = operand.grid.bits <= kMostQuantizedBits;
  each_launch(products, [&](Products of) {
    const Division by = divide(of, at.processors);
    const QuantizedRow<PlainRows> x{{nullptr, operand.k}, operand};
    fits &= ring_slots<false>(block_bytes(at, of[0].addend != nullptr), x, 1, by) >= by.warps;
  });
  return fits;
}

void launch_packed_gemv(const ProductLaunch& at, const std::vector<TiledProduct>& products,
                        const bf16* x, int64_t m, const LaneOperand* operand) {
  launch_operand(at, products, PlainRows{x, row_channels(products, operand)}, m, operand);
}

void launch_packed_gemv_normed(const ProductLaunch& at, const std::vector<TiledProduct>& products,
                               const bf16* x, const float* w, float eps, int64_t m,
                               const LaneOperand* operand) {
  launch_operand(at, products, NormedRows{{x, row_channels(products, operand)}, w, eps}, m,
                 operand);
}

void launch_packed_gemv_gated(const ProductLaunch& at, const std::vector<TiledProduct>& products,
                              const bf16* gate, const bf16* up, int64_t m,
                              const LaneOperand* operand) {
  launch_operand(at, products, GatedRows{{gate, row_channels(products, operand)}, up}, m, operand);
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
