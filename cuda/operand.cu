// The operand of the linears of an input site, and its gradient (numerics.md section 2).
//
//   row of K channels        x, or x r w (RMSNorm), or silu(gate) up (SwiGLU); rounded to bf16
//   -> gathered (K')         f[p] row[channel[p]]: f is pair_factor for pairs, else 1; padding is 0
//   -> rotated               2^-i H of every group in [rotated_begin, rotated_end)
//   -> quantized             S from the row's groups, S8 from its outlier groups; e, z, codes
//   -> x^ = (q - z) e S      bf16 (M, K'), with a clipped bit for each position
//
// Backward: the gradient of x^ passes straight through where it was not clipped; H is its own
// transpose; a channel sums the gradients of its copies, times f. All sums are FP32, rounded once.
//
// Thread mapping. A block takes one row at a time, row after row; the threads of a block are as many
// as a row needs. A thread takes kPieces pieces of a row, each of eight consecutive positions, so a
// group is G / 8 lanes of one warp. It loads the next row before it computes the current one.
//
//   forward    registers -> [shared memory -> gather] -> ranges -> maximum over the block -> levels
//   backward   registers -> mask, rotate -> [shared memory -> gather] -> gradients
//
// The step in brackets only where there is a channel order. A word of padding in every 32 words of
// shared memory keeps lanes eight elements apart in different banks. Rows of more than kMaxColumns
// positions do not fit into registers: such a row stays in shared memory and is gathered twice.
// Everything that quantizes is compiled without contraction, so that it gives the bits of
// quant/host.cpp. Bytes moved a position: 2 read (4 for SwiGLU), 2.1 written; the reverse backward.
#include <algorithm>

#include "cuda/cuda_backend.h"
#include "cuda/ptx.h"
#include "cuda/reduce.h"
#include "cuda/swiglu.h"
#include "cuda/vector.h"
#include "quant/group_range.h"

namespace bbb::cuda {
namespace {

using quant::GroupQuantizer;
using quant::kFullWarp;
using quant::OperandView;
using quant::QuantizedGroup;
using quant::Range;

constexpr int kWide = 8;  // positions of a piece
constexpr int kWarpColumns = 32 * kWide;
constexpr int kMaxThreads = 512;
constexpr int kMaxWarps = kMaxThreads / 32;
constexpr int64_t kMaxColumns = 4 * kWide * kMaxThreads;

using Piece = uint4;  // kWide bf16, kept packed: half the registers
static_assert(sizeof(Piece) == kWide * sizeof(bf16));

__device__ __forceinline__ void unpack(float (&x)[kWide], const Piece& piece) {
  const unsigned pairs[kWide / 2] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
  for (int i = 0; i < kWide / 2; ++i) {
    x[2 * i] = __uint_as_float(pairs[i] << 16);
    x[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
  }
}

__device__ __forceinline__ Piece pack(const float (&x)[kWide]) {
  return {pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]),
          pack_bf16(x[6], x[7])};
}

// Rows of K elements. `wide`: every row and vector of K starts on a multiple of 16 bytes, and K is
// a multiple of kWide.
struct RowLayout {
  int k;
  bool wide;

  // Elements [column, column + kWide) of a row; 0 from K on.
  __device__ Piece load(const bf16* row, int column) const {
    if (column >= k) return {0, 0, 0, 0};
    if (wide) return *reinterpret_cast<const Piece*>(row + column);
    float x[kWide];
#pragma unroll
    for (int j = 0; j < kWide; ++j) x[j] = column + j < k ? to_float(row[column + j]) : 0.0f;
    return pack(x);
  }
  template <typename T>
  __device__ void load(T (&x)[kWide], const T* row, int column) const {
    static_assert(sizeof(T) == 4);
    if (wide && column < k) {
#pragma unroll
      for (int j = 0; j < kWide; j += 4) {
        const Vector<T, 4> quad = *reinterpret_cast<const Vector<T, 4>*>(row + column + j);
#pragma unroll
        for (int i = 0; i < 4; ++i) x[j + i] = quad.v[i];
      }
    } else {
#pragma unroll
      for (int j = 0; j < kWide; ++j) x[j] = column + j < k ? row[column + j] : T(0);
    }
  }
  __device__ void store(bf16* row, int column, const float (&x)[kWide]) const {
    if (column >= k) return;
    if (wide) {
      *reinterpret_cast<Piece*>(row + column) = pack(x);
    } else {
#pragma unroll
      for (int j = 0; j < kWide; ++j)
        if (column + j < k) row[column + j] = __float2bfloat16_rn(x[j]);
    }
  }
};

// Where the rows come from. load() reads a piece; values() makes the bf16 values of it, 0 from K
// on.

struct PlainRows {
  static constexpr bool kNormalizes = false;
  struct Raw {
    Piece x;
  };
  RowLayout layout;
  const bf16* x;

  __device__ Raw load(int64_t row, int column) const {
    return {layout.load(x + row * layout.k, column)};
  }
  __device__ Piece values(const Raw& raw, int, float) const { return raw.x; }
};

struct NormRows {
  static constexpr bool kNormalizes = true;
  struct Raw {
    Piece x;
  };
  RowLayout layout;
  const bf16* x;
  const float* w;
  float* inv_rms;
  float eps;

  __device__ Raw load(int64_t row, int column) const {
    return {layout.load(x + row * layout.k, column)};
  }
  // sum + the squares of a piece
  __device__ float add_squares(float sum, const Raw& raw) const {
    float v[kWide];
    unpack(v, raw.x);
#pragma unroll
    for (int j = 0; j < kWide; ++j) sum = fmaf(v[j], v[j], sum);
    return sum;
  }
  __device__ float inverse_rms(float sum) const {
    return 1.0f / sqrtf(sum / static_cast<float>(layout.k) + eps);
  }
  __device__ Piece values(const Raw& raw, int column, float r) const {
    if (column >= layout.k) return raw.x;
    float v[kWide], g[kWide];
    unpack(v, raw.x);
    layout.load(g, w, column);
#pragma unroll
    for (int j = 0; j < kWide; ++j) v[j] = column + j < layout.k ? v[j] * r * g[j] : 0.0f;
    return pack(v);
  }
};

struct SwigluRows {
  static constexpr bool kNormalizes = false;
  struct Raw {
    Piece gate, up;
  };
  RowLayout layout;
  const bf16 *gate, *up;

  __device__ Raw load(int64_t row, int column) const {
    return {layout.load(gate + row * layout.k, column), layout.load(up + row * layout.k, column)};
  }
  __device__ Piece values(const Raw& raw, int, float) const {
    float g[kWide], u[kWide];
    unpack(g, raw.gate);
    unpack(u, raw.up);
#pragma unroll
    for (int j = 0; j < kWide; ++j) g[j] = swiglu_of(g[j], u[j]);
    return pack(g);
  }
};

// Where the gradient of a row goes. load() reads what store() needs of the same piece.

struct PlainGradient {
  struct Raw {};
  RowLayout layout;
  bf16* dx;

  __device__ Raw load(int64_t, int) const { return {}; }
  __device__ void store(int64_t row, int column, float (&d)[kWide], const Raw&) const {
    layout.store(dx + row * layout.k, column, d);
  }
};

// dgate and dup may be the buffers of gate and up: a thread reads a piece before it writes it.
struct SwigluGradient {
  struct Raw {
    Piece gate, up;
  };
  RowLayout layout;
  bf16 *dgate, *dup;
  const bf16 *gate, *up;

  __device__ Raw load(int64_t row, int column) const {
    return {layout.load(gate + row * layout.k, column), layout.load(up + row * layout.k, column)};
  }
  __device__ void store(int64_t row, int column, float (&d)[kWide], const Raw& raw) const {
    float g[kWide], u[kWide];
    unpack(g, raw.gate);
    unpack(u, raw.up);
#pragma unroll
    for (int j = 0; j < kWide; ++j) swiglu_gradients(g[j], u[j], d[j]);
    layout.store(dgate + row * layout.k, column, g);
    layout.store(dup + row * layout.k, column, u);
  }
};

// The index of word w of a staged row in shared memory: one word of padding in every 32.
__host__ __device__ constexpr int64_t padded(int64_t word) { return word + word / 32; }
__device__ __forceinline__ int padded_word(int word) { return word + word / 32; }

// A staged row of bf16: word c / 2 holds the channels c and c + 1, c even.
__device__ __forceinline__ void stage(uint32_t* staged, const Piece& piece, int column, int k) {
  if (column >= k) return;
  uint32_t* const to = staged + padded_word(column / 2);  // no padding inside of a piece
  to[0] = piece.x, to[1] = piece.y, to[2] = piece.z, to[3] = piece.w;
}

// The positions [position, position + kWide) of a staged row, not yet multiplied by pair_factor.
__device__ __forceinline__ Piece gather(const uint32_t* staged, const OperandView& v,
                                        int position) {
  if (position >= v.stored_k) return {0, 0, 0, 0};
  int channel[kWide];
  if (v.channels != nullptr) {
    const int4* const quads = reinterpret_cast<const int4*>(v.channels + position);
    const int4 low = __ldg(quads), high = __ldg(quads + 1);
    channel[0] = low.x, channel[1] = low.y, channel[2] = low.z, channel[3] = low.w;
    channel[4] = high.x, channel[5] = high.y, channel[6] = high.z, channel[7] = high.w;
  } else {
#pragma unroll
    for (int j = 0; j < kWide; ++j) channel[j] = position + j < v.k ? position + j : -1;
  }
  const auto* const halves = reinterpret_cast<const unsigned short*>(staged);
  uint32_t pairs[kWide / 2];
#pragma unroll
  for (int j = 0; j < kWide; j += 2) {
    const auto value = [&](int c) -> uint32_t {  // 2 padded_word(c / 2) + c % 2
      return c < 0 ? 0u : halves[c + c / 64 * 2];
    };
    pairs[j / 2] = value(channel[j]) | value(channel[j + 1]) << 16;
  }
  return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

// x = 2^-i H x for the group of this lane, by butterflies of strides 1, 2, 4 .. G / 2: the lower
// index gets u + v, the upper one u - v. The whole warp takes part.
template <int kGroup>
__device__ __forceinline__ void rotate(float (&x)[kWide]) {
#pragma unroll
  for (int stride = 1; stride < kWide; stride *= 2)
#pragma unroll
    for (int i = 0; i < kWide; ++i) {
      if ((i & stride) != 0) continue;
      const float u = x[i], w = x[i + stride];
      x[i] = u + w;
      x[i + stride] = u - w;
    }
#pragma unroll
  for (int lanes = 1; lanes < kGroup / kWide; lanes *= 2) {
    const bool upper = (threadIdx.x & lanes) != 0;
#pragma unroll
    for (int i = 0; i < kWide; ++i) {
      const float other = __shfl_xor_sync(kFullWarp, x[i], lanes);
      x[i] = upper ? other - x[i] : x[i] + other;
    }
  }
  constexpr float kScale = 1.0f / float(1 << quant::activation_rotation_shift(kGroup));
#pragma unroll
  for (int i = 0; i < kWide; ++i) x[i] *= kScale;
}

// Rotates the pieces of a warp that are in rotated groups; the whole warp takes part. A warp's
// pieces are consecutive.
template <int kGroup>
__device__ __forceinline__ void rotate_where_asked(float (&x)[kWide], const OperandView& v,
                                                   int position) {
  const int first = position - static_cast<int>(threadIdx.x) % 32 * kWide;
  if (first >= v.rotated_end || first + kWarpColumns <= v.rotated_begin) return;
  float rotated[kWide];
#pragma unroll
  for (int j = 0; j < kWide; ++j) rotated[j] = x[j];
  rotate<kGroup>(rotated);
  if (position < v.rotated_begin || position >= v.rotated_end) return;
#pragma unroll
  for (int j = 0; j < kWide; ++j) x[j] = rotated[j];
}

// The unquantized values of a gathered piece. The whole warp takes part.
template <int kGroup>
__device__ __forceinline__ void finish_piece(float (&x)[kWide], const Piece& piece,
                                             const OperandView& v, int position) {
  unpack(x, piece);
  if (v.pair_factor != 1.0f) {
#pragma unroll
    for (int j = 0; j < kWide; ++j)
      if (position + j >= v.outliers && position + j < v.pairs_end) x[j] *= v.pair_factor;
  }
  rotate_where_asked<kGroup>(x, v, position);
}

// The index of the ratio of least squared error; of equal errors the larger ratio. The terms are
// added as a binary tree over positions: in the thread, then over lanes. The whole warp takes part.
template <int kGroup>
__device__ __forceinline__ int best_ratio(const float (&x)[kWide], const Range<float>& range,
                                          const GroupQuantizer& quantizer, float master_scale) {
  int best = 0;
  float least = 0.0f;
#pragma unroll
  for (int c = 0; c < quant::kRangeRatios; ++c) {
    const QuantizedGroup group = quantizer(range.scaled(quant::range_ratio<float>(c)));
    const float step = group.levels.scale() * master_scale;  // exact
    float terms[kWide];
#pragma unroll
    for (int i = 0; i < kWide; ++i) {
      // floor(x / s + 1/2), by rounding down a sum whose last bit is 1: exact below 2^22.
      constexpr float kInteger = 0x1.8p23f;
      const float steps =
          __fadd_rd(group.levels.quotient(x[i]) + 0.5f, kInteger) - kInteger;
      // (q - z) s is exact, so this equals the difference of x^ and x.
      const float d = fmaf(group.levels.clamped(steps), step, -x[i]);
      terms[i] = d * d;
    }
#pragma unroll
    for (int stride = 1; stride < kWide; stride *= 2)
#pragma unroll
      for (int i = 0; i < kWide; i += 2 * stride) terms[i] = terms[i] + terms[i + stride];
    float error = terms[0];
#pragma unroll
    for (int lanes = 1; lanes < kGroup / kWide; lanes *= 2)
      error = error + __shfl_xor_sync(kFullWarp, error, lanes);
    if (c == 0 || error < least) {
      least = error;
      best = c;
    }
  }
  return best;
}

// The master scales of a row.
struct RowScales {
  float s, s8;
};

// From the maximum group ranges of the block's row, of plain and of outlier groups. Even lanes
// compute S, odd ones S8.
__device__ __forceinline__ RowScales row_scales(float most, float most_outlier, int bits) {
  const bool odd = threadIdx.x % 2 != 0;
  const float raw =
      quant::raw_scale(odd ? most_outlier : most, odd ? quant::kOutlierBits : bits);
  const float scale =
      odd ? quant::outlier_master_scale_of(raw) : quant::master_scale_of(raw);
  return {__shfl_sync(kFullWarp, scale, 0), __shfl_sync(kFullWarp, scale, 1)};
}

struct OperandOutputs {
  bf16* x;                  // (M, K')
  uint8_t* clipped;         // (M, K' / 8)
  uint8_t *codes, *zeros;   // (M, K'), (M, K' / G)
  float* scales;            // (M, K' / G)

  template <int kGroup>
  __device__ void store(int64_t row, int position, int columns, const float (&values)[kWide],
                        unsigned mask, const float (&code)[kWide], unsigned zero,
                        float scale) const {
    const int64_t at = row * columns + position;
    if (x != nullptr) *reinterpret_cast<Piece*>(x + at) = pack(values);
    if (clipped != nullptr) clipped[at / kWide] = static_cast<uint8_t>(mask);
    if (codes == nullptr) return;
    uint2 bytes{0, 0};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      bytes.x |= static_cast<unsigned>(code[j]) << (8 * j);
      bytes.y |= static_cast<unsigned>(code[j + 4]) << (8 * j);
    }
    *reinterpret_cast<uint2*>(codes + at) = bytes;
    if (position % kGroup != 0) return;
    zeros[at / kGroup] = static_cast<uint8_t>(zero);
    scales[at / kGroup] = scale;
  }
};

// Quantizes and stores one piece. The whole warp takes part.
template <int kGroup>
__device__ __forceinline__ void quantize_piece(const OperandOutputs& out, const float (&x)[kWide],
                                               Range<float> range, const OperandView& v,
                                               const RowScales& scales,
                                               const GroupQuantizer& quantizer, int64_t row,
                                               int position) {
  const bool outlier = position < v.outliers;
  if (quant::is_searched(v.grid.range, v.grid.bits)) {
    const int ratio = best_ratio<kGroup>(x, range, quantizer, scales.s);
    if (!outlier) range = range.scaled(quant::range_ratio<float>(ratio));
  }
  QuantizedGroup group = quantizer(range);
  if (outlier) {
    group.params = quant::outlier_params(range, scales.s8);
    group.levels = quant::GroupLevels(group.params.e, 1.0f / scales.s8);
    group.levels.set_zero_point(float(group.params.z), float(quant::max_code(quant::kOutlierBits)));
  }
  const float step = group.levels.scale() * (outlier ? scales.s8 : scales.s);
  float values[kWide], codes[kWide];
  unsigned mask = 0;
#pragma unroll
  for (int j = 0; j < kWide; ++j) {
    const float steps = group.levels.steps(x[j]);
    mask |= group.levels.is_clipped(steps) ? 1u << j : 0u;
    values[j] = group.levels.clamped(steps) * step;
    codes[j] = group.levels.code(steps);
  }
  if (position < v.stored_k)
    out.store<kGroup>(row, position, static_cast<int>(v.stored_k), values, mask, codes,
                      group.params.z, step);
}

// The largest threads of a block and the blocks that a multiprocessor must hold.
template <int kPieces>
constexpr int kThreadLimit = kPieces == 1 ? 256 : kMaxThreads;
template <int kPieces>
constexpr int kMinBlocks = kPieces == 1 ? 4 : kPieces == 2 ? 2 : 1;

// kPieces 0: the row stays in shared memory.
template <typename Rows, int kGroup, int kPieces>
__global__ void __launch_bounds__(kThreadLimit<kPieces>, kMinBlocks<kPieces>)
    operand_kernel(OperandOutputs out, Rows from, OperandView v, int64_t rows, bool quantizes) {
  extern __shared__ uint32_t staged[];
  __shared__ unsigned maxima[2][2][kMaxWarps];  // of alternate rows
  __shared__ float sums[32];
  constexpr int kHeld = kPieces > 0 ? kPieces : 1;
  using Raw = typename Rows::Raw;
  const int threads = static_cast<int>(blockDim.x), columns = static_cast<int>(v.stored_k);
  const int k = from.layout.k;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int pieces = kPieces > 0 ? kPieces : (columns + threads * kWide - 1) / (threads * kWide);
  const bool gathers = v.channels != nullptr;
  const auto column = [&](int p) { return (p * threads + static_cast<int>(threadIdx.x)) * kWide; };

  [[maybe_unused]] Raw next[kHeld];
  const auto load_next = [&]([[maybe_unused]] int64_t row) {
    if constexpr (kPieces > 0) {
      if (row >= rows) return;
#pragma unroll
      for (int p = 0; p < kPieces; ++p) next[p] = from.load(row, column(p));
    }
  };
  load_next(blockIdx.x);
  int parity = 0;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x, parity ^= 1) {
    // The values of the row: in `held` as gathered pieces, or all in shared memory.
    [[maybe_unused]] Raw raw[kHeld];
    [[maybe_unused]] Piece held[kHeld];
    if constexpr (kPieces > 0) {
#pragma unroll
      for (int p = 0; p < kPieces; ++p) raw[p] = next[p];
      load_next(row + gridDim.x);
    }
    float r = 0.0f;
    if constexpr (Rows::kNormalizes) {
      float sum = 0.0f;
      if constexpr (kPieces > 0) {
#pragma unroll
        for (int p = 0; p < kPieces; ++p) sum = from.add_squares(sum, raw[p]);
      } else {
        for (int p = 0; p < pieces; ++p) sum = from.add_squares(sum, from.load(row, column(p)));
      }
      r = from.inverse_rms(block_sum(sum, sums));
      if (threadIdx.x == 0) from.inv_rms[row] = r;
    }
    if constexpr (kPieces > 0) {
#pragma unroll
      for (int p = 0; p < kPieces; ++p) held[p] = from.values(raw[p], column(p), r);
      if (gathers) {
#pragma unroll
        for (int p = 0; p < kPieces; ++p) stage(staged, held[p], column(p), k);
        __syncthreads();
#pragma unroll
        for (int p = 0; p < kPieces; ++p) held[p] = gather(staged, v, column(p));
      }
    } else {
      for (int p = 0; p < pieces; ++p)
        stage(staged, from.values(from.load(row, column(p)), column(p), r), column(p), k);
      __syncthreads();
    }
    const auto values_of = [&](float (&x)[kWide], int p) {
      if constexpr (kPieces > 0)
        finish_piece<kGroup>(x, held[p], v, column(p));
      else
        finish_piece<kGroup>(x, gather(staged, v, column(p)), v, column(p));
    };

    if (!quantizes) {
      const float no_codes[kWide] = {};
#pragma unroll
      for (int p = 0; p < pieces; ++p) {
        float x[kWide];
        values_of(x, p);
        if (column(p) < columns)
          out.store<kGroup>(row, column(p), columns, x, 0u, no_codes, 0u, 0.0f);
      }
      // Before the next row replaces this one in shared memory.
      if (kPieces == 0 || gathers) __syncthreads();
      continue;
    }

    float most = 0.0f, most_outlier = 0.0f;
    [[maybe_unused]] Range<float> ranges[kHeld];
#pragma unroll
    for (int p = 0; p < pieces; ++p) {
      float x[kWide];
      values_of(x, p);
      const Range<float> range = quant::group_range<kGroup>(x);
      if constexpr (kPieces > 0) ranges[p] = range;
      if (column(p) < v.outliers)
        most_outlier = quant::max_nan(most_outlier, range.width());
      else
        most = quant::max_nan(most, range.width());
    }
    // As unsigned integers, the bits of such floats are in order, NaN last.
    const unsigned warp_most = __reduce_max_sync(kFullWarp, __float_as_uint(most));
    const unsigned warp_most_outlier = __reduce_max_sync(kFullWarp, __float_as_uint(most_outlier));
    if (lane == 0) {
      maxima[parity][0][warp] = warp_most;
      maxima[parity][1][warp] = warp_most_outlier;
    }
    __syncthreads();
    const auto block_most = [&](int kind) {
      return __uint_as_float(__reduce_max_sync(
          kFullWarp, lane < threads / 32 ? maxima[parity][kind][lane] : 0u));
    };
    const RowScales scales = row_scales(block_most(0), block_most(1), v.grid.bits);
    const GroupQuantizer quantizer(scales.s, v.grid.bits);
#pragma unroll
    for (int p = 0; p < pieces; ++p) {
      if (column(p) - lane * kWide >= columns) continue;  // the whole warp
      float x[kWide];
      values_of(x, p);
      Range<float> range;
      if constexpr (kPieces > 0)
        range = ranges[p];
      else
        range = quant::group_range<kGroup>(x);
      quantize_piece<kGroup>(out, x, range, v, scales, quantizer, row, column(p));
    }
    // Pieces in registers were gathered before the barrier above.
    if (kPieces == 0) __syncthreads();
  }
}

// Stages the gradient of positions as FP32, one word each.
__device__ __forceinline__ void stage(float* staged, const float (&d)[kWide], int position,
                                      int columns) {
  if (position >= columns) return;
  float* const to = staged + padded_word(position);
#pragma unroll
  for (int j = 0; j < kWide; ++j) to[j] = d[j];
}

// The gradients of channels [column, column + kWide).
__device__ __forceinline__ void gather(float (&d)[kWide], const float* staged, const OperandView& v,
                                       const RowLayout& layout, int column) {
  int32_t position[kWide];
  layout.load(position, v.positions, column);
#pragma unroll
  for (int j = 0; j < kWide; ++j) {
    d[j] = staged[padded_word(position[j])];
    if (position[j] >= v.outliers && position[j] < v.pairs_end)
      d[j] = (d[j] + staged[padded_word(position[j] + 1)]) * v.pair_factor;
  }
}

template <typename Gradient, int kGroup, int kPieces>
__global__ void __launch_bounds__(kThreadLimit<kPieces>, kMinBlocks<kPieces>)
    operand_backward_kernel(Gradient to, const bf16* __restrict__ dout,
                            const uint8_t* __restrict__ clipped, OperandView v, int64_t rows) {
  extern __shared__ uint32_t staged_words[];
  float* const staged = reinterpret_cast<float*>(staged_words);
  constexpr int kHeld = kPieces > 0 ? kPieces : 1;
  const int threads = static_cast<int>(blockDim.x), columns = static_cast<int>(v.stored_k);
  const int k = to.layout.k;
  const int pieces = kPieces > 0 ? kPieces : (columns + threads * kWide - 1) / (threads * kWide);
  const bool gathers = v.positions != nullptr;
  const auto column = [&](int p) { return (p * threads + static_cast<int>(threadIdx.x)) * kWide; };

  struct Loaded {
    Piece d;
    unsigned mask;
  };
  const auto load = [&](int64_t row, int p) -> Loaded {
    const int64_t at = row * columns + column(p);
    if (column(p) >= columns) return {{0, 0, 0, 0}, 0};
    return {*reinterpret_cast<const Piece*>(dout + at),
            clipped != nullptr ? clipped[at / kWide] : 0u};
  };
  const auto values_of = [&](float (&d)[kWide], const Loaded& loaded, int p) {
    unpack(d, loaded.d);
#pragma unroll
    for (int j = 0; j < kWide; ++j)
      if (loaded.mask >> j & 1u) d[j] = 0.0f;
    rotate_where_asked<kGroup>(d, v, column(p));
  };

  [[maybe_unused]] Loaded next[kHeld];
  const auto load_next = [&]([[maybe_unused]] int64_t row) {
    if constexpr (kPieces > 0) {
      if (row >= rows) return;
#pragma unroll
      for (int p = 0; p < kPieces; ++p) next[p] = load(row, p);
    }
  };
  load_next(blockIdx.x);
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    [[maybe_unused]] Loaded current[kHeld];
    [[maybe_unused]] typename Gradient::Raw raw[kHeld];
    if constexpr (kPieces > 0) {
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        current[p] = next[p];
        raw[p] = to.load(row, column(p));
      }
      load_next(row + gridDim.x);
    }
    const auto put = [&](float (&d)[kWide], int p) {
      if (column(p) >= k) return;
      if constexpr (kPieces > 0)
        to.store(row, column(p), d, raw[p]);
      else
        to.store(row, column(p), d, to.load(row, column(p)));
    };
#pragma unroll
    for (int p = 0; p < pieces; ++p) {
      float d[kWide];
      if constexpr (kPieces > 0)
        values_of(d, current[p], p);
      else
        values_of(d, load(row, p), p);
      if (gathers)
        stage(staged, d, column(p), columns);
      else
        put(d, p);
    }
    if (!gathers) continue;
    __syncthreads();
#pragma unroll
    for (int p = 0; p < pieces; ++p) {
      if (column(p) >= k) continue;
      float d[kWide];
      gather(d, staged, v, to.layout, column(p));
      put(d, p);
    }
    __syncthreads();
  }
}

// How a block takes a row of K' positions.
struct RowShape {
  explicit RowShape(int64_t columns)
      : pieces(columns <= kWarpColumns * 8    ? 1
               : columns <= kMaxColumns / 2 ? 2
               : columns <= kMaxColumns     ? 4
                                            : 0) {
    const int64_t warp_columns = int64_t{kWarpColumns} * std::max(pieces, 1);
    const int64_t warps = (columns + warp_columns - 1) / warp_columns;
    threads = static_cast<int>(32 * std::min<int64_t>(warps, kMaxWarps));
  }

  int pieces;  // that a thread keeps in registers; 0: the row stays in shared memory
  int threads;
};

// Calls fn with the pieces as a compile-time constant.
template <typename Fn>
void with_pieces(int pieces, const Fn& fn) {
  switch (pieces) {
    case 1:
      return fn(std::integral_constant<int, 1>());
    case 2:
      return fn(std::integral_constant<int, 2>());
    case 4:
      return fn(std::integral_constant<int, 4>());
    default:
      return fn(std::integral_constant<int, 0>());
  }
}

// Launches as many blocks as the GPU holds at once, each for every so many rows.
template <typename... Params, typename... Args>
void launch_rows(cudaStream_t stream, int processors, int64_t rows, int threads,
                 int64_t smem_bytes, void (*kernel)(Params...), Args&&... args) {
  int64_t blocks = rows;
  if (rows > processors) {
    int resident = 1;
    if (smem_bytes > 48 * 1024)
      BBB_CUDA(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                    cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(smem_bytes)));
    BBB_CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
        &resident, reinterpret_cast<const void*>(kernel), threads,
        static_cast<size_t>(smem_bytes)));
    blocks = std::min(rows, int64_t{processors} * std::max(resident, 1));
  }
  launch(stream,
         {dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), smem_bytes},
         kernel, std::forward<Args>(args)...);
}

// The kernels move 16 bytes at a time; a view may begin at any address.
void check_aligned(const char* op, std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* t : tensors)
    BBB_CHECK(aligned(*t), op, ": a tensor ", engine::to_string(t->shape()),
              " is not aligned to 16 bytes");
}

template <typename Source>
void launch_operand(cudaStream_t stream, int processors, const OperandRows& out,
                    const Source& from, const OperandSpec& spec, int64_t rows) {
  check_aligned("operand", {&out.x, &out.codes, &spec.channels});
  const OperandView& view = spec.view;
  const OperandOutputs outputs{bf16_of(out.x), out.clipped.data<uint8_t>(),
                               out.codes.data<uint8_t>(), out.zeros.data<uint8_t>(),
                               out.scales.data<float>()};
  const bool quantizes = view.grid.bits != 16 && spec.rounding == Rounding::Nearest;
  const RowShape shape(view.stored_k);
  const bool staged = shape.pieces == 0 || view.channels != nullptr;
  const int64_t words = padded((view.k + kWide - 1) / kWide * (kWide / 2)) + 1;
  quant::with_group(view.group, [&](auto group) {
    with_pieces(shape.pieces, [&](auto pieces) {
      launch_rows(stream, processors, rows, shape.threads,
                  staged ? words * int64_t{sizeof(uint32_t)} : 0,
                  operand_kernel<Source, group, pieces>, outputs, from, view, rows, quantizes);
    });
  });
}

template <typename Gradient>
void launch_operand_backward(cudaStream_t stream, int processors, const Gradient& to,
                             const Tensor& dout, const Tensor& clipped, const OperandSpec& spec,
                             int64_t rows) {
  check_aligned("operand_backward", {&dout});
  const OperandView& view = spec.view;
  const RowShape shape(view.stored_k);
  const int64_t words = padded(view.stored_k) + 1;
  quant::with_group(view.group, [&](auto group) {
    with_pieces(shape.pieces, [&](auto pieces) {
      launch_rows(stream, processors, rows, shape.threads,
                  view.positions != nullptr ? words * int64_t{sizeof(float)} : 0,
                  operand_backward_kernel<Gradient, group, pieces>, to, bf16_of(dout),
                  clipped.data<uint8_t>(), view, rows);
    });
  });
}

template <typename... Tensors>
RowLayout layout_of(const OperandSpec& spec, const Tensors&... tensors) {
  return {static_cast<int>(spec.view.k), spec.view.k % kWide == 0 && aligned(tensors...)};
}

}  // namespace

void CudaBackend::do_operand(const OperandRows& out, const Tensor& x, const OperandSpec& spec) {
  launch_operand(stream_, properties_.multiProcessorCount, out,
                 PlainRows{layout_of(spec, x), bf16_of(x)}, spec, x.dim(0));
}

void CudaBackend::do_rms_norm_operand(const OperandRows& out, const Tensor& inv_rms,
                                      const Tensor& x, const Tensor& w, double eps,
                                      const OperandSpec& spec) {
  launch_operand(stream_, properties_.multiProcessorCount, out,
                 NormRows{layout_of(spec, x, w), bf16_of(x), w.data<float>(),
                          inv_rms.data<float>(), static_cast<float>(eps)},
                 spec, x.dim(0));
}

void CudaBackend::do_swiglu_operand(const OperandRows& out, const Tensor& gate, const Tensor& up,
                                    const OperandSpec& spec) {
  launch_operand(stream_, properties_.multiProcessorCount, out,
                 SwigluRows{layout_of(spec, gate, up), bf16_of(gate), bf16_of(up)}, spec,
                 gate.dim(0));
}

void CudaBackend::do_operand_backward(const Tensor& dx, const Tensor& dout, const Tensor& clipped,
                                      const OperandSpec& spec) {
  launch_operand_backward(stream_, properties_.multiProcessorCount,
                          PlainGradient{layout_of(spec, dx, spec.positions), bf16_of(dx)}, dout,
                          clipped, spec, dx.dim(0));
}

void CudaBackend::do_swiglu_operand_backward(const Tensor& dgate, const Tensor& dup,
                                             const Tensor& dout, const Tensor& clipped,
                                             const Tensor& gate, const Tensor& up,
                                             const OperandSpec& spec) {
  launch_operand_backward(
      stream_, properties_.multiProcessorCount,
      SwigluGradient{layout_of(spec, dgate, dup, gate, up, spec.positions), bf16_of(dgate),
                     bf16_of(dup), bf16_of(gate), bf16_of(up)},
      dout, clipped, spec, gate.dim(0));
}

}  // namespace bbb::cuda
