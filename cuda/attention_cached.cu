// Attention against a cache of keys and values, in bf16 or quantized (quant::KvFormat).
//
// Shapes: q, o (B, T, H, d); caches (B, Tmax, K, d); start I32 (B) on the device. Nothing on the
// host depends on start, so a captured graph serves every position.
//
// Several queries (prefill): the forward kernels, with their queries at start. A quantized cache is
// first dequantized to bf16, up to the last visible key.
//
// One query (decode): the visible keys are cut into tiles of 16 and the tiles into splits, about
// two blocks for each multiprocessor, whatever the context. A block takes one split for up to 16
// query heads of one kv-head, which are the rows of its mma fragments:
//
//     split 0                            | split 1 ..
//     tile 0 1 2 3 | 4 5 6 7 | ..        |               tile t belongs to warp t % 4
//
// A warp keeps its next kStages tiles in flight (cp.async) and runs the online softmax of
// FlashAttention-2 (Dao, 2023) over its tiles. The warps' results, then those of the splits (max,
// sum, unnormalized o in F32, a second kernel), are combined in a fixed order.
//
// Codes become bf16 integers q - z in registers, exact at 8 bits too. The scale e of a group is
// applied outside of the products: to the scores of its 32 columns, and to p before it is rounded.
// The sums over columns and keys have any order, so a lane's fragments are codes that are
// neighbours in memory:
//     scores  columns 32 G + 8 t + {i, i + 4} are k = 2t, 2t + 1 of .., in the queries too
//     output  column 32 G + 4 c + i is column c of mma tile 4 G + i
//
// Positions outside of the cache are not read: the backend throws when the host next waits for the
// device (CacheFault). Bytes: the visible keys and values once.
#include "cuda/attention.h"
#include "cuda/cuda_backend.h"
#include "cuda/early_start.h"
#include "cuda/kv_cache.h"
#include "cuda/mma.h"
#include "cuda/online_softmax.h"
#include "cuda/vector.h"
#include "quant/e4m3.h"

namespace bbb::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kQueryRows = 16;  // query heads of a block
constexpr int kTileKeys = 16;
constexpr int kBlocksPerProcessor = 2;
constexpr int kMaxStages = 4;
constexpr int kWarpSmemBytes = 24 * 1024;  // of its tiles in flight, unless one tile is larger
constexpr int kGroup = KvFormat::kGroup;

struct DecodeArgs {
  float* partial_o;      // (B, H, splits, d)
  float2* partial_stat;  // (B, H, splits): maximum of the raw scores, sum
  const bf16* q;
  const void *k, *v;
  const int* start;
  CacheFault* fault;
  QuantizedLayout layout;  // of a quantized cache
  int t_max, heads, kv_heads, d, splits, window;
};

// The keys that a sequence's query sees, as tiles in splits.
struct Span {
  int first_key, length;    // keys first_key .. length - 1
  int first_tile, tiles;    // that hold them
  int split_tiles, splits;  // tiles of a split; splits that have any

  __device__ Span(const DecodeArgs& args, int start) {
    length = start + 1;
    first_key = max(0, length - args.window);
    first_tile = first_key / kTileKeys;
    tiles = start / kTileKeys + 1 - first_tile;
    const int rounds = (tiles + args.splits * kWarps - 1) / (args.splits * kWarps);
    split_tiles = rounds * kWarps;
    splits = (tiles + split_tiles - 1) / split_tiles;
  }
};

__global__ void check_positions_kernel(CacheFault* fault, const int* __restrict__ start, int batch,
                                       int t, int t_max) {
  const int b = blockIdx.x * blockDim.x + threadIdx.x;
  if (b < batch && !in_cache(start[b], t, t_max)) *fault = {start[b], t, t_max};
}

// Tiles of one warp: how they are loaded, and their products. `tile`: where one is in shared
// memory.
template <int D, int kBits>
class CacheTiles;

template <int D>
class CacheTiles<D, 16> {
 public:
  static constexpr int kBytes = 2 * kTileKeys * D * 2;

  __device__ CacheTiles(const DecodeArgs& args, int b, int kv_head)
      : stride_(int64_t{args.kv_heads} * args.d), d_(args.d) {
    const int64_t offset = int64_t{b} * args.t_max * stride_ + kv_head * args.d;
    k_ = static_cast<const bf16*>(args.k) + offset;
    v_ = static_cast<const bf16*>(args.v) + offset;
  }

  __device__ void load(unsigned char* tile, int key0, int length, int lane) const {
    load_tile_async<D, kTileKeys, 32>(keys(tile), k_, stride_, key0, length, d_, lane);
    load_tile_async<D, kTileKeys, 32>(values(tile), v_, stride_, key0, length, d_, lane);
  }

  // Query fragments straight from memory: rows g and g + 8, columns 2t and 2t + 8 of each 16.
  __device__ void load_queries(uint32_t (&queries)[D / 16][4], const bf16* q, int rows,
                               int lane) const {
#pragma unroll
    for (int kk = 0; kk < D / 16; ++kk)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i % 2 * 8;
        const int column = kk * 16 + lane % 4 * 2 + i / 2 * 8;
        queries[kk][i] =
            row < rows && column < d_
                ? load_past_l1(reinterpret_cast<const uint32_t*>(q + int64_t{row} * d_ + column))
                : 0u;
      }
  }

  // s += q k^T
  __device__ void add_scores(float (&s)[2][4], const uint32_t (&queries)[D / 16][4],
                             const unsigned char* tile, int lane) const {
#pragma unroll
    for (int kk = 0; kk < D / 16; ++kk) {
      uint32_t b[4];
      load_b(b, keys(tile), 0, kk * 16, lane);
      mma_bf16(s[0], queries[kk], b[0], b[1]);
      mma_bf16(s[1], queries[kk], b[2], b[3]);
    }
  }

  // acc += p v
  __device__ void add_output(float (&acc)[D / 8][4], const float (&p)[2][4],
                             const unsigned char* tile, int lane) const {
    uint32_t a[4];
    pack_a(a, p[0], p[1]);
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      uint32_t b[4];
      load_b_rows(b, values(tile), 0, n * 16, lane);
      mma_bf16(acc[2 * n], a, b[0], b[1]);
      mma_bf16(acc[2 * n + 1], a, b[2], b[3]);
    }
  }

  // The head's column that is column c of mma tile n of the output.
  __device__ static constexpr int output_column(int n, int c) { return n * 8 + c; }

 private:
  __device__ static SmemTile<D> keys(const unsigned char* tile) { return {shared_address(tile)}; }
  __device__ static SmemTile<D> values(const unsigned char* tile) {
    return {shared_address(tile) + kBytes / 2};
  }

  const bf16 *k_, *v_;
  int64_t stride_;
  int d_;
};

// A tile of quantized keys, then values: the codes of its rows, then their pairs of e and z.
template <int D, int kBits>
class CacheTiles {
  static constexpr int kGroups = D / kGroup;
  static constexpr int kGroupBytes = kGroup * kBits / 8;
  static constexpr int kRowBytes = kGroups * kGroupBytes;
  static constexpr int kPairBytes = (kGroups + 1) / 2 * 4;
  static constexpr int kPairsAt = kTileKeys * kRowBytes;

 public:
  static constexpr int kBytes = 2 * kTileKeys * (kRowBytes + kPairBytes);

  __device__ CacheTiles(const DecodeArgs& args, int b, int kv_head)
      : k_(static_cast<const uint8_t*>(args.k)),
        v_(static_cast<const uint8_t*>(args.v)),
        layout_(args.layout),
        codes_at_(args.layout.codes(b, 0, kv_head)),
        pairs_at_(args.layout.pairs(b, 0, kv_head)) {}

  __device__ void load(unsigned char* tile, int key0, int length, int lane) const {
#pragma unroll
    for (int of_v = 0; of_v < 2; ++of_v) {
      const uint8_t* const cache = of_v ? v_ : k_;
      const uint32_t to = shared_address(tile) + of_v * (kBytes / 2);
      constexpr int kChunks = kRowBytes / 16, kWords = kPairBytes / 4;
#pragma unroll
      for (int item = lane; item < kTileKeys * kChunks; item += 32) {
        const int row = item / kChunks, chunk = item % kChunks;
        const bool valid = key0 + row < length && chunk * 16 < layout_.code_bytes;
        const int64_t from = codes_at_ + (key0 + row) * layout_.heads * layout_.code_bytes;
        cp_async_16(to + row * kRowBytes + (chunk * 16 ^ swizzle(row)),
                    cache + (valid ? from + chunk * 16 : 0), valid);
      }
#pragma unroll
      for (int item = lane; item < kTileKeys * kWords; item += 32) {
        const int row = item / kWords, word = item % kWords;
        const bool valid = key0 + row < length && word * 4 < layout_.pair_bytes;
        const int64_t from = pairs_at_ + (key0 + row) * layout_.heads * layout_.pair_bytes;
        cp_async_4(to + kPairsAt + item * 4, cache + (valid ? from + word * 4 : 0), valid);
      }
    }
  }

  // Lane t of a row holds columns 32 G + 8 t .. + 7 of each group, as pairs (i, i + 4).
  __device__ void load_queries(uint32_t (&queries)[D / 16][4], const bf16* q, int rows,
                               int lane) const {
    const int d = layout_.code_bytes * 8 / kBits;
#pragma unroll
    for (int group = 0; group < kGroups; ++group)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = lane / 4 + half * 8;
        uint4 x{0, 0, 0, 0};
        if (row < rows && group * kGroup < d)
          x = load_past_l1(
              reinterpret_cast<const uint4*>(q + int64_t{row} * d + group * kGroup + lane % 4 * 8));
        queries[2 * group][half] = __byte_perm(x.x, x.z, 0x5410);
        queries[2 * group][half + 2] = __byte_perm(x.x, x.z, 0x7632);
        queries[2 * group + 1][half] = __byte_perm(x.y, x.w, 0x5410);
        queries[2 * group + 1][half + 2] = __byte_perm(x.y, x.w, 0x7632);
      }
  }

  __device__ void add_scores(float (&s)[2][4], const uint32_t (&queries)[D / 16][4],
                             const unsigned char* tile, int lane) const {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const int row = n * 8 + g, column = n * 8 + 2 * t;
        uint32_t b[4];
        unpack_key(b, codes_of(tile, row, group) + t * kBits, pair_of(tile, row, group), group);
        float part[4] = {};
        mma_bf16(part, queries[2 * group], b[0], b[1]);
        mma_bf16(part, queries[2 * group + 1], b[2], b[3]);
        const float e[2] = {scale_of(pair_of(tile, column, group), group),
                            scale_of(pair_of(tile, column + 1, group), group)};
#pragma unroll
        for (int i = 0; i < 4; ++i) s[n][i] = fmaf(part[i], e[i % 2], s[n][i]);
      }
  }

  __device__ void add_output(float (&acc)[D / 8][4], const float (&p)[2][4],
                             const unsigned char* tile, int lane) const {
    const int g = lane / 4, t = lane % 4;
    const unsigned char* const values = tile + kBytes / 2;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      // Rows 2t, 2t + 1, 2t + 8, 2t + 9: of p's columns, and of this lane's values.
      uint32_t pairs[4], codes[4];
      float scaled[2][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = 2 * t + i % 2 + i / 2 * 8;
        pairs[i] = pair_of(values, row, group);
        const float e = scale_of(pairs[i], group);
        scaled[i / 2][i % 2] = p[i / 2][i % 2] * e;
        scaled[i / 2][i % 2 + 2] = p[i / 2][i % 2 + 2] * e;
        const unsigned char* from = codes_of(values, row, group) + g * (kBits / 2);
        codes[i] = kBits == 8 ? load_as<uint32_t>(from) : load_as<uint16_t>(from);
      }
      uint32_t a[4];
      pack_a(a, scaled[0], scaled[1]);
      uint32_t b[4][2];
      unpack_values(b, 0, codes[0], codes[1], pairs[0], pairs[1], group);
      unpack_values(b, 1, codes[2], codes[3], pairs[2], pairs[3], group);
#pragma unroll
      for (int i = 0; i < 4; ++i) mma_bf16(acc[4 * group + i], a, b[i][0], b[i][1]);
    }
  }

  __device__ static constexpr int output_column(int n, int c) {
    return n / 4 * kGroup + c * 4 + n % 4;
  }

 private:
  // Xor-ed with offsets in a row of codes, in whole groups, so that the rows which lanes read
  // together are in different banks: rows 0 .. 3 or 0 .. 7 of keys, 0, 2, 4, 6 of values.
  __device__ static int swizzle(int row) {
    constexpr int kMask = kGroups % 4 == 0 ? 3 : kGroups % 2 == 0 ? 1 : 0;
    constexpr int kBankRows = kRowBytes < 128 ? 128 / kRowBytes : 1;
    const int key = kBankRows > 1 ? row / kBankRows : row + row / 4;
    return (key & kMask) * kGroupBytes;
  }
  __device__ static const unsigned char* codes_of(const unsigned char* half_tile, int row,
                                                  int group) {
    return half_tile + row * kRowBytes + (group * kGroupBytes ^ swizzle(row));
  }
  // The word with the pair of this group, in its lower half for an even one.
  __device__ static uint32_t pair_of(const unsigned char* half_tile, int row, int group) {
    return load_as<uint32_t>(half_tile + kPairsAt + row * kPairBytes + group / 2 * 4);
  }
  template <typename T>
  __device__ static T load_as(const unsigned char* from) {
    return *reinterpret_cast<const T*>(from);
  }

  __device__ static float scale_of(uint32_t pair, int group) {
    const uint32_t e = pair >> group % 2 * 16 & 0xFFu;
    return __half2float(__half(__nv_cvt_fp8_to_halfraw(static_cast<uint8_t>(e), __NV_E4M3)));
  }

  // Byte `byte` of a word as 2^23 + its value, exact.
  __device__ static float biased_byte(uint32_t word, int byte) {
    return __uint_as_float(__byte_perm(word, 0x4B000000u, 0x7540u | byte));
  }
  // Two integers of at most 8 significant bits as bf16.
  __device__ static uint32_t bf16_pair(float low, float high) {
    return __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x7632u);
  }
  // Nibble i of each half of a word as bf16 128 + its value; zeros: two of -(128 + z).
  __device__ static uint32_t nibbles(uint32_t word, int i, uint32_t zeros) {
    constexpr uint32_t kOnes = 0x3F803F80u;
    return fma_bf16x2((word >> 4 * i & 0x000F000Fu) | 0x43004300u, kOnes, zeros);
  }

  // q - z of the codes at `from`, columns (0, 4), (1, 5), (2, 6), (3, 7).
  __device__ static void unpack_key(uint32_t (&b)[4], const unsigned char* from, uint32_t pair,
                                    int group) {
    const int z_byte = group % 2 * 2 + 1;
    if constexpr (kBits == 8) {
      const float z = biased_byte(pair, z_byte);
      const uint2 codes = load_as<uint2>(from);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        b[i] = bf16_pair(biased_byte(codes.x, i) - z, biased_byte(codes.y, i) - z);
    } else {
      const uint32_t zeros = __byte_perm(pair, 0xC3000000u, 0x7070u | z_byte | z_byte << 8);
      const uint32_t codes = load_as<uint32_t>(from);
#pragma unroll
      for (int i = 0; i < 4; ++i) b[i] = nibbles(codes, i, zeros);
    }
  }

  // b[i][k] = q - z of column i of two neighbouring values.
  __device__ static void unpack_values(uint32_t (&b)[4][2], int k, uint32_t first, uint32_t second,
                                       uint32_t first_pair, uint32_t second_pair, int group) {
    const int z_byte = group % 2 * 2 + 1;
    if constexpr (kBits == 8) {
      const float z[2] = {biased_byte(first_pair, z_byte), biased_byte(second_pair, z_byte)};
#pragma unroll
      for (int i = 0; i < 4; ++i)
        b[i][k] = bf16_pair(biased_byte(first, i) - z[0], biased_byte(second, i) - z[1]);
    } else {
      const uint32_t z = __byte_perm(first_pair, second_pair, z_byte | (4 + z_byte) << 4);
      const uint32_t zeros = __byte_perm(z, 0xC3u, 0x4140u);
      const uint32_t codes = first | second << 16;
#pragma unroll
      for (int i = 0; i < 4; ++i) b[i][k] = nibbles(codes, i, zeros);
    }
  }

  const uint8_t *k_, *v_;
  QuantizedLayout layout_;
  int64_t codes_at_, pairs_at_;
};

template <int D, int kBits>
struct DecodeShape {
  using Tiles = CacheTiles<D, kBits>;
  static constexpr int kStages = std::clamp(kWarpSmemBytes / Tiles::kBytes, 1, kMaxStages);
  // A warp's part of shared memory: its tiles, later its results, 16 x D floats.
  static constexpr int kWarpBytes =
      std::max<int>(kStages * Tiles::kBytes, kQueryRows* D * sizeof(float));
  static constexpr int64_t kSmemBytes = kWarps * (kWarpBytes + kQueryRows * sizeof(float2));
};

// grid (splits, K * ceil(H / K / 16), B)
template <int D, int kBits>
__global__ __launch_bounds__(32 * kWarps,
                             D <= 128 ? kBlocksPerProcessor
                                      : 1) void attention_decode_kernel(const DecodeArgs args) {
  using Shape = DecodeShape<D, kBits>;
  using Tiles = typename Shape::Tiles;
  constexpr int kStages = Shape::kStages;
  start_next_kernel();
  wait_for_previous_kernel();
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int g = lane / 4;
  const int pair = lane % 4 * 2;
  const int b = blockIdx.z;
  const int start = load_past_l1(args.start + b);
  if (!in_cache(start, 1, args.t_max)) {
    if (blockIdx.x == 0 && threadIdx.x == 0) *args.fault = {start, 1, args.t_max};
    return;
  }
  const Span span(args, start);
  const int split = blockIdx.x;
  if (split >= span.splits) return;
  // This warp's tiles: every fourth of the split's.
  const int tile_end = span.first_tile + min(span.tiles, (split + 1) * span.split_tiles);
  int tile = span.first_tile + split * span.split_tiles + warp;

  const int group = args.heads / args.kv_heads;
  const int row_blocks = (group + kQueryRows - 1) / kQueryRows;
  const int kv_head = blockIdx.y / row_blocks;
  const int row0 = blockIdx.y % row_blocks * kQueryRows;
  const int rows = min(kQueryRows, group - row0);
  const int64_t head0 = int64_t{b} * args.heads + kv_head * group + row0;
  const int d = args.d;

  unsigned char* smem = reinterpret_cast<unsigned char*>(dynamic_smem());
  unsigned char* warp_smem = smem + warp * Shape::kWarpBytes;
  const Tiles tiles(args, b, kv_head);
  const auto load = [&](int which, int stage) {
    if (which < tile_end)
      tiles.load(warp_smem + stage * Tiles::kBytes, which * kTileKeys, span.length, lane);
    cp_async_commit();
  };
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) load(tile + stage * kWarps, stage);

  uint32_t queries[D / 16][4];
  tiles.load_queries(queries, args.q + head0 * d, rows, lane);
  const float scale_log2 = score_scale(d) * kLog2E;
  OnlineSoftmax<D> softmax;
  int stage = 0;
  for (; tile < tile_end; tile += kWarps) {
    cp_async_wait<kStages - 1>();
    __syncwarp();
    const unsigned char* const at = warp_smem + stage * Tiles::kBytes;
    float s[2][4] = {};
    tiles.add_scores(s, queries, at, lane);
    softmax.weigh(s, tile * kTileKeys, span.first_key, span.length, scale_log2, lane);
    tiles.add_output(softmax.acc, s, at, lane);
    __syncwarp();
    load(tile + kStages * kWarps, stage);
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }

  // The warps' results are combined in shared memory. They overwrite the tiles, which all lanes
  // have read; of a warp without tiles they are zeros.
  cp_async_wait<0>();
  __syncwarp();
  float* warp_o = reinterpret_cast<float*>(warp_smem);
  float2* stats = reinterpret_cast<float2*>(smem + kWarps * Shape::kWarpBytes);  // (warp, row)
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = g + 8 * half;
    const float sum = quad_sum(softmax.row_sum[half]);
    if (row >= rows) continue;
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c)
        warp_o[row * D + Tiles::output_column(n, pair + c)] = softmax.acc[n][2 * half + c];
    if (pair == 0) stats[warp * kQueryRows + row] = make_float2(softmax.row_max[half], sum);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rows * D; i += 32 * kWarps) {
    const int row = i / D;
    const int column = i % D;
    if (column >= d) continue;
    float maximum = -INFINITY;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) maximum = fmaxf(maximum, stats[w * kQueryRows + row].x);
    float sum = 0.0f, value = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float2 stat = stats[w * kQueryRows + row];
      const float weight = exp2_approx((stat.x - maximum) * scale_log2);
      sum += weight * stat.y;
      value += weight * reinterpret_cast<const float*>(smem + w * Shape::kWarpBytes)[i];
    }
    const int64_t at = (head0 + row) * args.splits + split;
    args.partial_o[at * d + column] = value;
    if (column == 0) args.partial_stat[at] = make_float2(maximum, sum);
  }
}

// o = sum over splits of weight * o / sum over splits of weight * sum.   block (d, kGroups): the
// splits are merged in so many groups in parallel.
template <int kGroups>
__global__ void attention_combine_kernel(bf16* __restrict__ o, const DecodeArgs args) {
  start_next_kernel();
  wait_for_previous_kernel();
  const int64_t head = blockIdx.x;  // (b, h)
  const int start = load_past_l1(args.start + head / args.heads);
  if (!in_cache(start, 1, args.t_max)) return;
  const int d = args.d;
  float* group_o = reinterpret_cast<float*>(dynamic_smem());              // (groups, d)
  float2* group_stat = reinterpret_cast<float2*>(group_o + kGroups * d);  // (groups)
  const int column = threadIdx.x;
  const int group = threadIdx.y;
  const int splits = Span(args, start).splits;
  const float scale_log2 = score_scale(d) * kLog2E;

  float maximum = -INFINITY, sum = 0.0f, value = 0.0f;
#pragma unroll 4
  for (int split = group; split < splits; split += kGroups) {
    const int64_t at = head * args.splits + split;
    const float2 stat = load_past_l1(args.partial_stat + at);
    const float part = load_past_l1(args.partial_o + at * d + column);
    const float larger = fmaxf(maximum, stat.x);
    const float old_weight = exp2_approx((maximum - larger) * scale_log2);
    const float weight = exp2_approx((stat.x - larger) * scale_log2);
    sum = sum * old_weight + stat.y * weight;
    value = value * old_weight + part * weight;
    maximum = larger;
  }
  group_o[group * d + column] = value;
  if (column == 0) group_stat[group] = make_float2(maximum, sum);
  __syncthreads();
  if (group > 0) return;
  for (int other = 1; other < kGroups; ++other) maximum = fmaxf(maximum, group_stat[other].x);
  sum = value = 0.0f;
  for (int other = 0; other < kGroups; ++other) {
    const float2 stat = group_stat[other];
    const float weight = exp2_approx((stat.x - maximum) * scale_log2);
    sum += weight * stat.y;
    value += weight * group_o[other * d + column];
  }
  o[head * d + column] = __float2bfloat16(value / sum);
}

// A thread dequantizes half a group, of k or v: x = (q - z) e, rounded to bf16, for the positions
// 0 .. start + t - 1.   grid (.., B, 2)
template <int kBits>
__global__ void dequantize_kernel(bf16* __restrict__ k, bf16* __restrict__ v,
                                  const uint8_t* __restrict__ k_cache,
                                  const uint8_t* __restrict__ v_cache,
                                  const int* __restrict__ start, const QuantizedLayout layout,
                                  int t, int d) {
  constexpr int kValues = kGroup / 2, kBytes = kValues * kBits / 8;
  const int b = blockIdx.y;
  const int64_t item = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int pieces = d / kValues;
  const int64_t row = item / pieces;  // (position, head)
  const int piece = static_cast<int>(item % pieces);
  const int64_t position = row / layout.heads, head = row % layout.heads;
  if (position >= min(layout.t_max, int64_t{start[b]} + t)) return;
  const uint8_t* const cache = blockIdx.z ? v_cache : k_cache;
  const uint8_t* const codes = cache + layout.codes(b, position, head) + piece * kBytes;
  const uint8_t* const pair = cache + layout.pairs(b, position, head) + piece / 2 * 2;
  const float e = quant::e4m3_decode(pair[0]), z = pair[1];
  const Vector<uint8_t, kBytes> packed = *reinterpret_cast<const Vector<uint8_t, kBytes>*>(codes);
  float x[kValues];
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const int q = kBits == 8 ? packed.v[i] : packed.v[i / 2] >> i % 2 * 4 & 15;
    x[i] = (static_cast<float>(q) - z) * e;
  }
  bf16* const to =
      (blockIdx.z ? v : k) + (b * layout.t_max * layout.heads + row) * d + piece * kValues;
  store(to, x, kValues);
}

// How many splits fill the multiprocessors. A split has at least a tile a warp.
int decode_splits(int64_t batch, int64_t heads, int64_t kv_heads, int64_t t_max, int sms) {
  const int64_t blocks = batch * kv_heads * ceil_div(checked_int(heads / kv_heads), kQueryRows);
  const int64_t most = ceil_div(checked_int(t_max), kTileKeys * kWarps);
  return checked_int(std::clamp<int64_t>(kBlocksPerProcessor * sms / std::max<int64_t>(1, blocks),
                                         1, std::max<int64_t>(1, most)));
}

constexpr int64_t kQueueBytes = 16;

}  // namespace

// One query: of each split a partial output, then its maximum and sum. Several: the dequantized
// cache, then the queue of the Hopper kernel.
int64_t attention_cached_scratch_bytes(const Shape& shape, int sms) {
  const int64_t batch = shape[0], t = shape[1], heads = shape[2], d = shape[3], t_max = shape[4];
  const int64_t kv_heads = shape[5], bits = shape[6];
  if (t > 1)
    return (bits < 16 ? 2 * batch * t_max * kv_heads * d * int64_t{sizeof(bf16)} : 0) + kQueueBytes;
  const int64_t parts = batch * heads * decode_splits(batch, heads, kv_heads, t_max, sms);
  return parts * (d * int64_t{sizeof(float)} + int64_t{sizeof(float2)});
}

void CudaBackend::do_attention_cached(const Tensor& o, const Tensor& q, const Tensor& k_cache,
                                      const Tensor& v_cache, const Tensor& start,
                                      const AttentionSpec& spec, KvFormat format,
                                      const Tensor& scratch) {
  if (q.numel() == 0) return;
  const int batch = checked_int(q.dim(0)), t = checked_int(q.dim(1));
  const int heads = checked_int(q.dim(2)), kv_heads = checked_int(k_cache.dim(2));
  const int t_max = checked_int(k_cache.dim(1));
  const int d = checked_int(q.dim(3)), window = window_of(spec.window);
  const int sms = properties_.multiProcessorCount;
  const QuantizedLayout layout(format, t_max, kv_heads, d);
  BBB_ASSERT(aligned(o, q, k_cache, v_cache));
  if (t > 1) {
    launch(stream_, {blocks_for(batch, 128, 1), 128}, check_positions_kernel, cache_fault_.get(),
           start.data<int32_t>(), batch, t, t_max);
    bf16 *k = static_cast<bf16*>(k_cache.raw()), *v = static_cast<bf16*>(v_cache.raw());
    char* queue = static_cast<char*>(scratch.raw());
    if (format.quantized()) {
      const int64_t values = int64_t{t_max} * kv_heads * d;
      k = static_cast<bf16*>(scratch.raw());
      v = k + batch * values;
      queue = reinterpret_cast<char*>(v + batch * values);
      launch(stream_,
             {{blocks_for(values / (kGroup / 2), 128, 1).x, static_cast<unsigned>(batch), 2}, 128},
             format.bits == 8 ? dequantize_kernel<8> : dequantize_kernel<4>, k, v,
             static_cast<const uint8_t*>(k_cache.raw()), static_cast<const uint8_t*>(v_cache.raw()),
             start.data<int32_t>(), layout, t, d);
    }
    const ForwardArgs args{bf16_of(o), nullptr, bf16_of(q), k,     v,        start.data<int32_t>(),
                           batch,      t,       t_max,      heads, kv_heads, d,
                           window};
    if (has_warpgroup_products() && has_hopper_head_size(d))
      attention_forward_hopper(stream_, args, d, sms, reinterpret_cast<unsigned*>(queue));
    else
      attention_forward(stream_, args);
    return;
  }
  const int splits = decode_splits(batch, heads, kv_heads, t_max, sms);
  float* const partial_o = static_cast<float*>(scratch.raw());
  const int64_t parts = int64_t{batch} * heads * splits;
  const DecodeArgs args{partial_o,
                        reinterpret_cast<float2*>(partial_o + parts * d),  // d is even
                        bf16_of(q),
                        k_cache.raw(),
                        v_cache.raw(),
                        start.data<int32_t>(),
                        cache_fault_.get(),
                        layout,
                        t_max,
                        heads,
                        kv_heads,
                        d,
                        splits,
                        window};
  with_padded_head_size(d, [&](auto size) {
    constexpr int D = size;
    constexpr int kGroups = D <= 128 ? 8 : 4;
    const unsigned row_blocks =
        static_cast<unsigned>(kv_heads * ceil_div(heads / kv_heads, kQueryRows));
    const auto decode = [&](auto bits) {
      constexpr int kBits = bits;
      launch(stream_,
             {{static_cast<unsigned>(splits), row_blocks, static_cast<unsigned>(batch)},
              32 * kWarps,
              DecodeShape<D, kBits>::kSmemBytes,
              starts_early(batch)},
             attention_decode_kernel<D, kBits>, args);
    };
    if (format.bits == 16) decode(std::integral_constant<int, 16>{});
    if (format.bits == 8) decode(std::integral_constant<int, 8>{});
    if (format.bits == 4) decode(std::integral_constant<int, 4>{});
    launch(stream_,
           {static_cast<unsigned>(batch * heads),
            {static_cast<unsigned>(d), kGroups},
            kGroups * (d * int64_t{sizeof(float)} + int64_t{sizeof(float2)}),
            starts_early(batch)},
           attention_combine_kernel<kGroups>, bf16_of(o), args);
  });
}

}  // namespace bbb::cuda
