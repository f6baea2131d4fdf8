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
// while this one still runs. It keeps kBytesInFlight on the way. More would hide no more latency,
// and this product's last tiles, which queue behind them, would come late. Slices that the ring
// does not hold go to the L2 cache. Once x is complete, the warps copy it to shared memory
// together: were each of its lines read by every warp, all multiprocessors would wait for a few
// banks of L2. A warp refills the slots that it has read.
//
// Bytes moved: those of the tiles; x comes from the L2 cache, once a block.
#include <algorithm>
#include <bit>
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

__device__ __forceinline__ float2 floats_of(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u));
}

// Fills `slices` slices of kBytes, a multiple of 16, that are `pitch` bytes apart, with piece(i):
// 16 bytes each. All threads take part.
template <int kBytes, typename Piece>
__device__ void stage_pieces(unsigned char* to, int pitch, int slices, int thread, int threads,
                             const Piece& piece) {
  constexpr int kPieces = kBytes / 16;
  for (int i = thread; i < slices * kPieces; i += threads)
    *reinterpret_cast<uint4*>(to + i / kPieces * pitch + i % kPieces * 16) = piece(i);
}

// Rows of bf16. In shared memory a slice of a row is 128 of them.
struct PlainRows {
  using Values = uint2;  // a lane's
  struct Ahead {};       // what it loads a slice ahead
  static constexpr int kSliceBytes = kTileColumns * 2;
  const bf16* x;  // (M, K)
  int k;

  // Copies `slices` slices of a row, the first from position `begin` on, to places `pitch` bytes
  // apart. Positions from K on become zeros. All threads take part.
  __device__ void stage(unsigned char* to, int pitch, int row, int begin, int slices, int thread,
                        int threads) const {
    stage_pieces<kSliceBytes>(to, pitch, slices, thread, threads, [&](int piece) {
      const int at = begin + piece * 8;
      return at < k ? load_past_l1(reinterpret_cast<const uint4*>(x + int64_t{row} * k + at))
                    : uint4{};
    });
  }
  // A lane's values from position `at` of a staged slice on.
  __device__ static Values staged(const unsigned char* slice, int at) {
    const uint32_t* const from = reinterpret_cast<const uint32_t*>(slice + at * 2);
    return {from[0], from[kSecondPair / 2]};
  }
  __device__ Values load(int row, int at) const {
    const bf16* const from = x + int64_t{row} * k + at;
    return {load_past_l1(reinterpret_cast<const uint32_t*>(from)),
            load_past_l1(reinterpret_cast<const uint32_t*>(from + kSecondPair))};
  }
  __device__ static Ahead ahead(int) { return {}; }
  __device__ static Levels levels(const Values& raw) {
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
struct NormedRows : PlainRows {
  struct Ahead {
    float2 first, second;  // w of both pairs
  };
  const float* w;  // (K)
  float eps;

  __device__ Ahead ahead(int at) const {
    return {*reinterpret_cast<const float2*>(w + at),
            *reinterpret_cast<const float2*>(w + at + kSecondPair)};
  }
};

// Rows of swiglu(gate, up) = silu(gate) up. In shared memory they are rows of bf16.
struct GatedRows {
  using Values = PlainRows::Values;
  using Ahead = PlainRows::Ahead;
  static constexpr int kSliceBytes = PlainRows::kSliceBytes;
  const bf16 *gate, *up;  // (M, K)
  int k;

  __device__ void stage(unsigned char* to, int pitch, int row, int begin, int slices, int thread,
                        int threads) const {
    stage_pieces<kSliceBytes>(to, pitch, slices, thread, threads, [&](int piece) {
      const int at = begin + piece * 8;
      if (at >= k) return uint4{};
      const uint4 g = load_past_l1(reinterpret_cast<const uint4*>(gate + int64_t{row} * k + at));
      const uint4 u = load_past_l1(reinterpret_cast<const uint4*>(up + int64_t{row} * k + at));
      return uint4{gated(g.x, u.x), gated(g.y, u.y), gated(g.z, u.z), gated(g.w, u.w)};
    });
  }
  __device__ static Values staged(const unsigned char* slice, int at) {
    return PlainRows::staged(slice, at);
  }
  __device__ Values load(int row, int at) const {
    const uint2 g = PlainRows{gate, k}.load(row, at), u = PlainRows{up, k}.load(row, at);
    return {gated(g.x, u.x), gated(g.y, u.y)};
  }
  __device__ static Ahead ahead(int) { return {}; }
  __device__ static Levels levels(const Values& values) { return PlainRows::levels(values); }

 private:
  // Of two values in bf16.
  __device__ static uint32_t gated(uint32_t gate, uint32_t up) {
    const float2 g = floats_of(gate), u = floats_of(up);
    return pack_bf16(silu(g.x) * u.x, silu(g.y) * u.y);
  }
  // Within 2^-21 relative.
  __device__ static float silu(float x) {
    return x * reciprocal_approx(1.0f + exp2_approx(x * -1.44269504f));
  }
};

// Rows of an operand's codes. In shared memory a slice of a row is 128 codes, then scale and zero
// point of each sub-group.
struct CodedRows {
  struct Values {
    uint32_t codes;
    uint32_t zero;
    float scale;
  };
  using Ahead = PlainRows::Ahead;
  static constexpr int kSubgroups = kTileColumns / quant::kSubgroup;
  static constexpr int kSliceBytes = kTileColumns + kSubgroups * 8;
  const uint8_t* codes;  // (M, K)
  const uint8_t* zeros;  // (M, K / G)
  const float* scales;   // (M, K / G)
  int k, group_log2;

  __device__ void stage(unsigned char* to, int pitch, int row, int begin, int slices, int thread,
                        int threads) const {
    stage_pieces<kTileColumns>(to, pitch, slices, thread, threads, [&](int piece) {
      const int at = begin + piece * 16;
      return at < k ? load_past_l1(reinterpret_cast<const uint4*>(codes + int64_t{row} * k + at))
                    : uint4{};
    });
    for (int i = thread; i < slices * kSubgroups; i += threads) {
      const int at = begin + i * quant::kSubgroup;
      uint2 grid{};
      if (at < k) grid = {load_past_l1(scale_bits(row, at)), load_past_l1(zeros + group(row, at))};
      *reinterpret_cast<uint2*>(to + i / kSubgroups * pitch + kTileColumns + i % kSubgroups * 8) =
          grid;
    }
  }
  __device__ static Values staged(const unsigned char* slice, int at) {
    const uint16_t* const from = reinterpret_cast<const uint16_t*>(slice + at);
    const uint2 grid =
        *reinterpret_cast<const uint2*>(slice + kTileColumns + at / quant::kSubgroup * 8);
    return {from[0] | uint32_t{from[kSecondPair / 2]} << 16, grid.y, __uint_as_float(grid.x)};
  }
  __device__ Values load(int row, int at) const {
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
  __device__ static Ahead ahead(int) { return {}; }
  __device__ static Levels levels(const Values& raw) {
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
  static constexpr int kSentBytes = 0;
  __device__ Levels levels(const typename Input::Values& values, const typename Input::Ahead&) {
    return Input::levels(values);
  }
  template <bool kManyRows>
  __device__ void leave(int, int) const {}
  __device__ void send(int, uint32_t) const {}
  __device__ float of_row(const Input&, int, int, bool) const { return 1.0f; }
};
template <>
struct RowFactor<NormedRows> {
  // By warp and row; then those of the second block of a cluster.
  static constexpr int kSmemBytes = (kMaxWarps + 1) * kTokens * 4;
  static constexpr int kSentBytes = kTokens * 4;
  using Squares = float[kTokens];
  float squares = 0.0f;

  __device__ static Squares* shared() {
    __shared__ Squares sums[kMaxWarps + 1];
    return sums;
  }
  __device__ Levels levels(const NormedRows::Values& x, const NormedRows::Ahead& w) {
    const float2 a = floats_of(x.x), b = floats_of(x.y);
    squares = fmaf(a.x, a.x, fmaf(a.y, a.y, fmaf(b.x, b.x, fmaf(b.y, b.y, squares))));
    return levels_of(make_float2(a.x * w.first.x, a.y * w.first.y),
                     make_float2(b.x * w.second.x, b.y * w.second.y));
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
  __device__ static float sum_of(int row, int warps) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kMaxWarps; ++w)
      if (w < warps) sum += shared()[w][row];
    return sum;
  }
  // From the second block to the first: kSentBytes for its barrier.
  __device__ void send(int warps, uint32_t barrier) const {
    if (threadIdx.x < kTokens)
      store_to_block(shared_address(&shared()[kMaxWarps][threadIdx.x]), 0,
                     sum_of(threadIdx.x, warps), barrier);
  }
  __device__ float of_row(const NormedRows& x, int row, int warps, bool split) const {
    const float sum = sum_of(row, warps) + (split ? shared()[kMaxWarps][row] : 0.0f);
    return 1.0f / sqrtf(sum / static_cast<float>(x.k) + x.eps);
  }
};

// Makes a slice of x.
template <typename Input, bool kManyRows>
struct OperandMaker : SliceOperand<kManyRows> {
  static constexpr int kLoads = SliceOperand<kManyRows>::kUnits;
  using Values = typename Input::Values;
  using Ahead = typename Input::Ahead;

  // A lane's first position of load i, inside of a slice.
  __device__ static int position(int i, int lane) {
    return (kManyRows ? i : lane / 8) * quant::kSubgroup + first_position(lane);
  }
  // Reads a slice, from `staged` if that is not null.
  __device__ __forceinline__ static void read(Values (&values)[kLoads], const Input& x, int m,
                                              int slice, const unsigned char* staged, int lane) {
    const int row = kManyRows ? lane / 8 : 0;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int inside = position(i, lane), at = slice * kTileColumns + inside;
      values[i] = at >= x.k || row >= m ? Values{}
                  : staged != nullptr   ? Input::staged(staged + row * Input::kSliceBytes, inside)
                                        : x.load(row, at);
    }
  }
  __device__ __forceinline__ static void look_ahead(Ahead (&ahead)[kLoads], const Input& x,
                                                    int slice, int lane) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int at = slice * kTileColumns + position(i, lane);
      ahead[i] = at < x.k ? x.ahead(at) : Ahead{};
    }
  }
  __device__ __forceinline__ void make(const Values (&values)[kLoads], const Ahead (&ahead)[kLoads],
                                       RowFactor<Input>& factor, int lane) {
    const int t = lane % 4;
    const uint32_t ones[4] = {kOnes, kOnes, kOnes, kOnes};
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const Levels levels = factor.levels(values[i], ahead[i]);
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
    for (int i = warp; i < slices; i += warps) mbarrier_init(barriers + i * 8, 1);
    if (split > 1 && warp == 0) {
      mbarrier_init(second_barrier, 1);
      if (rank == 0) mbarrier_expect(second_barrier, tiles * 64 * 4 + RowFactor<Input>::kSentBytes);
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
  typename Input::Ahead ahead[Operand::kLoads];
  Operand::look_ahead(ahead, x, first_slice + warp, lane);
  wait_for_previous_kernel();

#pragma unroll 1
  for (int row = 0; row < shape.m; ++row)
    x.stage(staged + row * Input::kSliceBytes, x_pitch, row, first_slice * kTileColumns,
            shape.staged, thread, threads);
  named_sync(1, threads);
  const auto read = [&](typename Input::Values(&values)[Operand::kLoads], int slice) {
    Operand::read(values, x, shape.m, first_slice + slice,
                  slice < shape.staged ? staged + slice * x_pitch : nullptr, lane);
  };
  float sum[kTiles][2] = {};
  typename Input::Values values[Operand::kLoads];
  RowFactor<Input> factor;
  if (kManyRows) read(values, warp);
  int slice = warp, slot = warp * kSlotBytes;
#pragma unroll 1
  for (;; slice += warps) {
    Operand operand;
    if (!kManyRows) read(values, slice);
    operand.make(values, ahead, factor, lane);
    if (slice + warps < slices) {
      if (kManyRows) read(values, slice + warps);
      Operand::look_ahead(ahead, x, first_slice + slice + warps, lane);
    }
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

  const auto output_of = [&](int i) { return i % 4 * n + first_tile * kTileRows + i / 4; };
  const auto is_output = [&](int i) {
    return i < tiles * 64 && first_tile * kTileRows + i / 4 < n && i % 4 < shape.m;
  };
  const auto load_addend = [&](int i) {
    const auto* const from = reinterpret_cast<const uint16_t*>(product.addend);
    return from != nullptr && is_output(i) ? load_past_l1(from + output_of(i)) : uint16_t{0};
  };
  uint16_t addend = load_addend(thread);  // there when the sums are
  float* const own = reinterpret_cast<float*>(smem + slot) + lane;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    own[i * 64] = sum[i][0];
    own[i * 64 + 32] = sum[i][1];
  }
  factor.template leave<kManyRows>(warp, lane);
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
    factor.send(warps, second_barrier);
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
    if (!is_output(i)) continue;
    if (i != thread) addend = load_addend(i);
    total = total * (*master_scale * factor.of_row(x, kManyRows ? i % 4 : 0, warps, split > 1)) +
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
  const int64_t other_bytes = staged * x_bytes + (by.split > 1 ? kTiles * 64 * 4 : 0) + 16 +
                              slices * 8 + RowFactor<Input>::kSmemBytes;
  const int64_t slot_bytes = kTiles * kTileBytes;
  const int64_t slots = std::min(slices, (at.block_bytes(kBlocks) - other_bytes) / slot_bytes);
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
NormedRows rows_from(const NormedRows& x, int64_t row) {
  return {{x.x + row * x.k, x.k}, x.w, x.eps};
}
GatedRows rows_from(const GatedRows& x, int64_t row) {
  return {x.gate + row * x.k, x.up + row * x.k, x.k};
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
  launch_all(at, products, GatedRows{gate, up, static_cast<int>(products[0].w.k)}, m);
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
