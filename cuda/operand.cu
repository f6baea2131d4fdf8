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
// Thread mapping. A block takes one row at a time, row after row. Its threads take the row in
// pieces of eight consecutive positions, so a group is G / 8 lanes of one warp. Few rows, as in a
// decoding step, leave multiprocessors free. Then the blocks of a cluster share a row: each writes
// every so-many-th piece of its threads, and the blocks exchange their maxima. A row that is staged
// is staged by all of them.
//
//   forward    row -> values -> [staged -> gathered] -> ranges -> maximum over the block -> levels
//   backward   gradients -> masked, rotated -> [staged -> gathered] -> gradients
//
// The step in brackets only where there is a channel order. Shared memory holds the staged row, and
// slots: a thread's own pieces, which no other thread reads. There it keeps its gathered pieces and
// their ranges; and while it computes a row, the next one is copied to other slots of its own. So
// registers hold one piece at a time, and many warps fit. In the staged row, a word of padding in
// every 32 keeps lanes eight elements apart in different banks.
// Everything that quantizes is compiled without contraction, so that it gives the bits of
// quant/host.cpp. Bytes moved a position: 2 read (4 for SwiGLU), 2.1 written; the reverse backward.
#include <algorithm>

#include "cuda/cuda_backend.h"
#include "cuda/early_start.h"
#include "cuda/ptx.h"
#include "cuda/reduce.h"
#include "cuda/row_grid.h"
#include "cuda/swiglu.h"
#include "cuda/vector.h"

namespace bbb::cuda {
namespace {

using quant::kFullWarp;
using quant::OperandView;
using quant::Range;

constexpr int kWide = 8;  // positions of a piece
constexpr int kWarpColumns = 32 * kWide;
constexpr int kMaxThreads = 512;
constexpr int kMaxWarps = kMaxThreads / 32;
constexpr int kBlocksPerProcessor = 2;   // that must fit into the registers
constexpr int64_t kNarrowPieces = 1024;  // up to here kNarrowThreads: more blocks, shorter waits
constexpr int kNarrowThreads = 256;
constexpr int64_t kMaxSmemBytes = 224 * 1024;
constexpr int64_t kStaticSmemBytes = 1024;  // more than the kernels declare
constexpr int kMaxCluster = 8;              // blocks that share a row, as many as every GPU takes

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
    if (wide) return load_past_l1(reinterpret_cast<const Piece*>(row + column));
    float x[kWide];
#pragma unroll
    for (int j = 0; j < kWide; ++j)
      x[j] = column + j < k ? to_float(load_past_l1(row + column + j)) : 0.0f;
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

// Where the rows come from: kInputs matrices (M, K). values() makes the bf16 values of a piece, 0
// from K on, of the same piece of every input.

struct PlainRows {
  static constexpr int kInputs = 1;
  static constexpr bool kNormalizes = false;
  RowLayout layout;
  const bf16* x;

  __device__ const bf16* input(int) const { return x; }
  __device__ Piece values(const Piece (&raw)[kInputs], int, float) const { return raw[0]; }
};

struct NormRows {
  static constexpr int kInputs = 1;
  static constexpr bool kNormalizes = true;
  RowLayout layout;
  const bf16* x;
  const float* w;
  float* inv_rms;
  float eps;

  __device__ const bf16* input(int) const { return x; }
  // sum + the squares of a piece
  __device__ float add_squares(float sum, const Piece& raw) const {
    float v[kWide];
    unpack(v, raw);
#pragma unroll
    for (int j = 0; j < kWide; ++j) sum = fmaf(v[j], v[j], sum);
    return sum;
  }
  __device__ float inverse_rms(float sum) const {
    return 1.0f / sqrtf(sum / static_cast<float>(layout.k) + eps);
  }
  __device__ Piece values(const Piece (&raw)[kInputs], int column, float r) const {
    if (column >= layout.k) return raw[0];
    float v[kWide], g[kWide];
    unpack(v, raw[0]);
    layout.load(g, w, column);
#pragma unroll
    for (int j = 0; j < kWide; ++j) v[j] = column + j < layout.k ? v[j] * r * g[j] : 0.0f;
    return pack(v);
  }
};

struct SwigluRows {
  static constexpr int kInputs = 2;
  static constexpr bool kNormalizes = false;
  RowLayout layout;
  const bf16 *gate, *up;

  __device__ const bf16* input(int i) const { return i == 0 ? gate : up; }
  __device__ Piece values(const Piece (&raw)[kInputs], int, float) const {
    float g[kWide], u[kWide];
    unpack(g, raw[0]);
    unpack(u, raw[1]);
#pragma unroll
    for (int j = 0; j < kWide; ++j) g[j] = swiglu_of(g[j], u[j]);
    return pack(g);
  }
};

// Where the gradient d of a piece of a row goes.

struct PlainGradient {
  RowLayout layout;
  bf16* dx;

  __device__ void store(int64_t row, int column, float (&d)[kWide]) const {
    layout.store(dx + row * layout.k, column, d);
  }
};

// dgate and dup may be the buffers of gate and up: a thread reads a piece before it writes it.
struct SwigluGradient {
  RowLayout layout;
  bf16 *dgate, *dup;
  const bf16 *gate, *up;

  __device__ void store(int64_t row, int column, float (&d)[kWide]) const {
    float g[kWide], u[kWide];
    unpack(g, layout.load(gate + row * layout.k, column));
    unpack(u, layout.load(up + row * layout.k, column));
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

struct OperandOutputs {
  bf16* x;                 // (M, K')
  uint8_t* clipped;        // (M, K' / 8)
  uint8_t *codes, *zeros;  // (M, K'), (M, K' / G)
  float* scales;           // (M, K' / G)

  // at: of the piece in (M, K')
  __device__ void store(int64_t at, const float (&values)[kWide], unsigned mask) const {
    if (x != nullptr) *reinterpret_cast<Piece*>(x + at) = pack(values);
    if (clipped != nullptr) clipped[at / kWide] = static_cast<uint8_t>(mask);
  }
};

// Quantizes and stores one piece. The whole warp takes part.
template <int kGroup>
__device__ __forceinline__ void quantize_piece(const OperandOutputs& out, const float (&x)[kWide],
                                               const Range<float>& range, const OperandView& v,
                                               const RowGrid& grid, int64_t row, int position) {
  const ScaledGroup group = grid.group<Quotient::Nearest>(x, range, position < v.outliers, kGroup);
  const quant::GroupLevels& levels = group.levels;
  if (position >= v.stored_k) return;
  const int64_t at = row * v.stored_k + position;
  float values[kWide];
  unsigned mask = 0;
#pragma unroll
  for (int j = 0; j < kWide; ++j) {
    const float steps = levels.steps(x[j]);
    mask |= levels.is_clipped(steps) ? 1u << j : 0u;
    values[j] = levels.clamped(steps) * group.step;
  }
  out.store(at, values, mask);
  if (out.codes == nullptr) return;
  unsigned codes[2] = {};
#pragma unroll
  for (int j = 0; j < kWide; ++j)
    codes[j / 4] |= static_cast<unsigned>(levels.code(levels.steps(x[j]))) << (j % 4 * 8);
  *reinterpret_cast<uint2*>(out.codes + at) = {codes[0], codes[1]};
  if (position % kGroup != 0) return;
  out.zeros[at / kGroup] = static_cast<uint8_t>(levels.zero_point());
  out.scales[at / kGroup] = group.step;
}

// The words of shared memory of a staged row of K channels: whole pieces.
__host__ __device__ constexpr int64_t staged_words(int64_t k) {
  return (padded((k + kWide - 1) / kWide * (kWide / 2)) + 4) / 4 * 4;
}

// How a block takes rows, and which parts of the work there are.
struct OperandShape {
  int pieces;    // of each thread
  bool gathers;  // there is a channel order
  bool copies;   // the next row is copied to slots
  bool quantizes;
};

// The blocks that share a row: each takes every `blocks`-th piece of a thread from `rank` on.
struct RowCluster {
  int rank = 0, blocks = 1;

  __device__ __forceinline__ RowCluster() {
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
#endif
  }
  // By all threads. Writes before arrive() are visible behind the wait() of every block.
  __device__ __forceinline__ void arrive() const {
#if __CUDA_ARCH__ >= 900
    if (blocks > 1) asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
  }
  __device__ __forceinline__ void wait() const {
#if __CUDA_ARCH__ >= 900
    if (blocks > 1) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
  }
  // Writes to the shared memory of block `to`, which has arrived once. `p` is the address of the
  // same object in this block.
  __device__ __forceinline__ void store(unsigned* p, int to, unsigned value) const {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n"
        ".reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "st.shared::cluster.u32 [remote], %2;\n"
        "}" ::"r"(shared_address(p)),
        "r"(to), "r"(value)
        : "memory");
#endif
  }
};

// Shared memory: the staged row if the block gathers; then `pieces` slots a thread for its gathered
// pieces, as many for their ranges if it quantizes, and as many for each input if it copies.
template <typename Rows, int kGroup>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerProcessor)
    operand_kernel(OperandOutputs out, Rows from, OperandView v, int64_t rows, OperandShape shape) {
  __shared__ unsigned maxima[2][2][kMaxWarps];  // of alternate rows
  __shared__ unsigned cluster_maxima[kMaxCluster][2];
  __shared__ float sums[32];
  start_next_kernel();
  const RowCluster cluster;
  if (shape.quantizes) cluster.arrive();  // every arrival has its wait() below
  constexpr int kInputs = Rows::kInputs;
  const int threads = static_cast<int>(blockDim.x), pieces = shape.pieces;
  const int columns = static_cast<int>(v.stored_k), k = from.layout.k;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  uint32_t* const staged = reinterpret_cast<uint32_t*>(dynamic_smem());
  Piece* const held = dynamic_smem() + (shape.gathers ? staged_words(k) / 4 : 0) + threadIdx.x;
  Piece* const copied = held + pieces * threads;  // slot p of input i at (i pieces + p) threads
  Range<float>* const ranges =
      reinterpret_cast<Range<float>*>(copied - threadIdx.x +
                                      (shape.copies ? kInputs * pieces * threads : 0)) +
      threadIdx.x;
  const auto column = [&](int p) { return (p * threads + static_cast<int>(threadIdx.x)) * kWide; };

  if (shape.gathers)
    for (int p = cluster.rank; p < pieces; p += cluster.blocks)
      if (column(p) < columns) prefetch_to_l2(v.channels + column(p));
  if constexpr (Rows::kNormalizes)
    for (int p = 0; p < pieces; ++p)
      if (column(p) < k) prefetch_to_l2(from.w + column(p));
  wait_for_previous_kernel();

  const auto start_copy = [&](int64_t row) {
    if (!shape.copies || row >= rows) return;
    for (int i = 0; i < kInputs; ++i)
      for (int p = 0; p < pieces; ++p) {
        const bf16* const in = from.input(i) + row * k;
        const bool inside = column(p) < k;
        cp_async_16(shared_address(copied + (i * pieces + p) * threads),
                    inside ? in + column(p) : in, inside);
      }
    cp_async_commit();
  };
  const auto load_piece = [&](Piece(&raw)[kInputs], int64_t row, int p) {
#pragma unroll
    for (int i = 0; i < kInputs; ++i)
      raw[i] = shape.copies ? copied[(i * pieces + p) * threads]
                            : from.layout.load(from.input(i) + row * k, column(p));
  };

  const int64_t row_step = gridDim.x / cluster.blocks;
  start_copy(blockIdx.x / cluster.blocks);
  int parity = 0;
  for (int64_t row = blockIdx.x / cluster.blocks; row < rows; row += row_step, parity ^= 1) {
    if (shape.copies) cp_async_wait<0>();
    Piece raw[kInputs];
    float r = 0.0f;
    if constexpr (Rows::kNormalizes) {
      float sum = 0.0f;
#pragma unroll 1
      for (int p = 0; p < pieces; ++p) {
        load_piece(raw, row, p);
        sum = from.add_squares(sum, raw[0]);
      }
      r = from.inverse_rms(block_sum(sum, sums));
      if (threadIdx.x == 0 && cluster.rank == 0) from.inv_rms[row] = r;
    }
    // All of the row where it is staged, else the block's part.
    const int first = shape.gathers ? 0 : cluster.rank, step = shape.gathers ? 1 : cluster.blocks;
#pragma unroll 1
    for (int p = first; p < pieces; p += step) {
      load_piece(raw, row, p);
      const Piece values = from.values(raw, column(p), r);
      if (shape.gathers)
        stage(staged, values, column(p), k);
      else
        held[p * threads] = values;
    }
    start_copy(row + row_step);
    if (shape.gathers) __syncthreads();
    const auto first_look = [&](float(&x)[kWide], int p) {
      Piece values;
      if (shape.gathers)
        values = gather(staged, v, column(p));
      else
        values = held[p * threads];
      if (shape.gathers && shape.quantizes) held[p * threads] = values;
      finish_piece<kGroup>(x, values, v, column(p));
    };

    if (!shape.quantizes) {
#pragma unroll 1
      for (int p = cluster.rank; p < pieces; p += cluster.blocks) {
        float x[kWide];
        first_look(x, p);
        if (column(p) < columns) out.store(row * columns + column(p), x, 0u);
      }
      if (shape.gathers) __syncthreads();  // before the next row is staged
      continue;
    }

    float most = 0.0f, most_outlier = 0.0f;
#pragma unroll 1
    for (int p = cluster.rank; p < pieces; p += cluster.blocks) {
      float x[kWide];
      first_look(x, p);
      const Range<float> range = quant::group_range(x, kGroup);
      ranges[p * threads] = range;
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
      return __uint_as_float(
          __reduce_max_sync(kFullWarp, lane < threads / 32 ? maxima[parity][kind][lane] : 0u));
    };
    float row_most = block_most(0), row_most_outlier = block_most(1);
    if (cluster.blocks > 1) {  // they take this row alone
      cluster.wait();          // the other blocks run
      if (threadIdx.x < cluster.blocks) {
        cluster.store(&cluster_maxima[cluster.rank][0], lane, __float_as_uint(row_most));
        cluster.store(&cluster_maxima[cluster.rank][1], lane, __float_as_uint(row_most_outlier));
      }
      cluster.arrive();
      cluster.wait();
      const auto cluster_most = [&](int kind) {
        return __uint_as_float(
            __reduce_max_sync(kFullWarp, lane < cluster.blocks ? cluster_maxima[lane][kind] : 0u));
      };
      row_most = cluster_most(0), row_most_outlier = cluster_most(1);
    }
    const RowGrid grid(row_most, row_most_outlier, v.grid);
#pragma unroll 1
    for (int p = cluster.rank; p < pieces; p += cluster.blocks) {
      if (column(p) - lane * kWide >= columns) break;  // the whole warp
      float x[kWide];
      finish_piece<kGroup>(x, held[p * threads], v, column(p));
      quantize_piece<kGroup>(out, x, ranges[p * threads], v, grid, row, column(p));
    }
    // The next row is staged only now, and every gather was before the barrier above.
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

template <typename Gradient, int kGroup>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerProcessor)
    operand_backward_kernel(Gradient to, const bf16* __restrict__ dout,
                            const uint8_t* __restrict__ clipped, OperandView v, int64_t rows,
                            int pieces) {
  float* const staged = reinterpret_cast<float*>(dynamic_smem());
  const int threads = static_cast<int>(blockDim.x), columns = static_cast<int>(v.stored_k);
  const int k = to.layout.k;
  const bool gathers = v.positions != nullptr;
  const auto column = [&](int p) { return (p * threads + static_cast<int>(threadIdx.x)) * kWide; };
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
#pragma unroll
    for (int p = 0; p < pieces; ++p) {
      const int64_t at = row * columns + column(p);
      Piece gradient{0, 0, 0, 0};
      unsigned mask = 0;
      if (column(p) < columns) {
        gradient = *reinterpret_cast<const Piece*>(dout + at);
        if (clipped != nullptr) mask = clipped[at / kWide];
      }
      float d[kWide];
      unpack(d, gradient);
#pragma unroll
      for (int j = 0; j < kWide; ++j)
        if (mask >> j & 1u) d[j] = 0.0f;
      rotate_where_asked<kGroup>(d, v, column(p));
      if (gathers)
        stage(staged, d, column(p), columns);
      else if (column(p) < k)
        to.store(row, column(p), d);
    }
    if (!gathers) continue;
    __syncthreads();
#pragma unroll
    for (int p = 0; p < pieces; ++p) {
      if (column(p) >= k) continue;
      float d[kWide];
      gather(d, staged, v, to.layout, column(p));
      to.store(row, column(p), d);
    }
    __syncthreads();  // before the next row replaces this one
  }
}

// How a block takes a row of K' positions.
struct RowShape {
  explicit RowShape(int64_t columns) {
    const int64_t total = columns / kWide;
    const int64_t most = total <= kNarrowPieces ? kNarrowThreads : kMaxThreads;
    pieces = static_cast<int>((total + most - 1) / most);
    threads = static_cast<int>((total + 32 * pieces - 1) / (32 * pieces) * 32);
  }

  int pieces;  // of a thread
  int threads;
};

// Dynamic shared memory that a block may have.
int64_t most_smem_bytes(const cudaDeviceProp& gpu) {
  return std::min(kMaxSmemBytes,
                  static_cast<int64_t>(gpu.sharedMemPerBlockOptin) - kStaticSmemBytes);
}

void check_smem(int64_t columns, int64_t bytes, const cudaDeviceProp& gpu) {
  BBB_CHECK(bytes <= most_smem_bytes(gpu), "an input of ", columns, " positions needs ", bytes,
            " bytes of shared memory, and a block on ", gpu.name, " has ", most_smem_bytes(gpu));
}

// Launches as many blocks as the GPU holds at once, each for every so many rows; or a cluster for
// each row, of which there are then no more than processors.
template <typename... Params, typename... Args>
void launch_rows(cudaStream_t stream, int processors, int64_t rows, int threads, int64_t smem_bytes,
                 bool early, int cluster, void (*kernel)(Params...), Args&&... args) {
  int64_t blocks = rows * cluster;
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
         {dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), smem_bytes,
          early, static_cast<unsigned>(cluster)},
         kernel, std::forward<Args>(args)...);
}

// The kernels move 16 bytes at a time; a view may begin at any address.
void check_aligned(const char* op, std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* t : tensors)
    BBB_CHECK(aligned(*t), op, ": a tensor ", engine::to_string(t->shape()),
              " is not aligned to 16 bytes");
}

template <typename Source>
void launch_operand(cudaStream_t stream, const cudaDeviceProp& gpu, const OperandRows& out,
                    const Source& from, const OperandSpec& spec, int64_t rows, bool few_rows) {
  check_aligned("operand", {&out.x, &out.codes, &spec.channels});
  const OperandView& view = spec.view;
  const OperandOutputs outputs{bf16_of(out.x), out.clipped.data<uint8_t>(),
                               out.codes.data<uint8_t>(), out.zeros.data<uint8_t>(),
                               out.scales.data<float>()};
  const bool quantizes = view.grid.bits != 16 && spec.rounding == Rounding::Nearest;
  const RowShape row(view.stored_k);
  const int64_t slots = int64_t{row.pieces} * row.threads;
  OperandShape shape{row.pieces, view.channels != nullptr, from.layout.wide, quantizes};
  int64_t smem_bytes = slots * int64_t{sizeof(Piece)};
  if (shape.gathers) smem_bytes += staged_words(view.k) * int64_t{sizeof(uint32_t)};
  if (quantizes) smem_bytes += slots * int64_t{sizeof(Range<float>)};
  const int64_t copy_bytes = Source::kInputs * slots * int64_t{sizeof(Piece)};
  shape.copies = shape.copies && smem_bytes + copy_bytes <= most_smem_bytes(gpu);
  if (shape.copies) smem_bytes += copy_bytes;
  check_smem(view.stored_k, smem_bytes, gpu);
  const int cluster = few_rows ? std::min(row.pieces, kMaxCluster) : 1;
  quant::with_group(view.group, [&](auto group) {
    launch_rows(stream, gpu.multiProcessorCount, rows, row.threads, smem_bytes, few_rows, cluster,
                operand_kernel<Source, group>, outputs, from, view, rows, shape);
  });
}

template <typename Gradient>
void launch_operand_backward(cudaStream_t stream, const cudaDeviceProp& gpu, const Gradient& to,
                             const Tensor& dout, const Tensor& clipped, const OperandSpec& spec,
                             int64_t rows) {
  check_aligned("operand_backward", {&dout});
  const OperandView& view = spec.view;
  const RowShape row(view.stored_k);
  const int64_t words = view.positions != nullptr ? padded(view.stored_k) + 1 : 0;
  const int64_t smem_bytes = words * int64_t{sizeof(float)};
  check_smem(view.stored_k, smem_bytes, gpu);
  quant::with_group(view.group, [&](auto group) {
    launch_rows(stream, gpu.multiProcessorCount, rows, row.threads, smem_bytes, false, 1,
                operand_backward_kernel<Gradient, group>, to, bf16_of(dout),
                clipped.data<uint8_t>(), view, rows, row.pieces);
  });
}

template <typename... Tensors>
RowLayout layout_of(const OperandSpec& spec, const Tensors&... tensors) {
  return {static_cast<int>(spec.view.k), spec.view.k % kWide == 0 && aligned(tensors...)};
}

}  // namespace

void CudaBackend::do_operand(const OperandRows& out, const Tensor& x, const OperandSpec& spec) {
  launch_operand(stream_, properties_, out, PlainRows{layout_of(spec, x), bf16_of(x)}, spec,
                 x.dim(0), starts_early(x.dim(0)));
}

void CudaBackend::do_rms_norm_operand(const OperandRows& out, const Tensor& inv_rms,
                                      const Tensor& x, const Tensor& w, double eps,
                                      const OperandSpec& spec) {
  launch_operand(stream_, properties_, out,
                 NormRows{layout_of(spec, x, w), bf16_of(x), w.data<float>(), inv_rms.data<float>(),
                          static_cast<float>(eps)},
                 spec, x.dim(0), starts_early(x.dim(0)));
}

void CudaBackend::do_swiglu_operand(const OperandRows& out, const Tensor& gate, const Tensor& up,
                                    const OperandSpec& spec) {
  launch_operand(stream_, properties_, out,
                 SwigluRows{layout_of(spec, gate, up), bf16_of(gate), bf16_of(up)}, spec,
                 gate.dim(0), starts_early(gate.dim(0)));
}

void CudaBackend::do_operand_backward(const Tensor& dx, const Tensor& dout, const Tensor& clipped,
                                      const OperandSpec& spec) {
  launch_operand_backward(stream_, properties_,
                          PlainGradient{layout_of(spec, dx, spec.positions), bf16_of(dx)}, dout,
                          clipped, spec, dx.dim(0));
}

void CudaBackend::do_swiglu_operand_backward(const Tensor& dgate, const Tensor& dup,
                                             const Tensor& dout, const Tensor& clipped,
                                             const Tensor& gate, const Tensor& up,
                                             const OperandSpec& spec) {
  launch_operand_backward(stream_, properties_,
                          SwigluGradient{layout_of(spec, dgate, dup, gate, up, spec.positions),
                                         bf16_of(dgate), bf16_of(dup), bf16_of(gate), bf16_of(up)},
                          dout, clipped, spec, gate.dim(0));
}

}  // namespace bbb::cuda
