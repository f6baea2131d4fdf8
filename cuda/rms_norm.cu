// r = 1 / sqrt(mean(x^2) + eps);  y = x r w.   x, y bf16 (M, D); r F32 (M), saved; w F32 (D).
// Backward: dx (+)= r (dy w - x r^2 mean(dy w x));  dw (+)= sum_m dy x r.   dw bf16 or F32 (D).
//
// A block walks a chunk of rows. Chunks depend on the shape alone, so the sums are the same on
// every GPU. Up to kMaxColumns columns, a thread keeps its columns of a row in registers; they are
// the same in every row, so it keeps w and its share of dw too. A row takes as many warps as it
// fills; a block of narrow rows takes several at once. The next row is loaded while the current one
// is summed, so that the memory never waits for a sum. Wider rows, and those that do not split into
// 16 bytes, are read twice, the second time from the cache, with dw in shared memory. A block
// writes a partial sum of dw; a second kernel adds them in order. Bytes moved an element: 4
// forward; 6 backward, 8 if it adds to dx. Forward may start early: no kernel that writes w lets
// the next one do so, so w may be read at any time.
#include "cuda/cuda_backend.h"
#include "cuda/early_start.h"
#include "cuda/reduce.h"
#include "cuda/vector.h"

namespace bbb::cuda {
namespace {

constexpr int kThreads = kSumThreads;
constexpr int kWide = 8;
constexpr int64_t kWarpColumns = 32 * kWide;          // one piece a thread
constexpr int64_t kNarrowColumns = 3 * kWarpColumns;  // up to here one piece a thread, then two
constexpr int64_t kMaxColumns = 16 * 2 * kWarpColumns;
constexpr int64_t kForwardChunks = 2048;
constexpr int64_t kBackwardChunks = 512;  // fewer: each writes a row of partial sums
constexpr int64_t kMinChunkRows = 8;      // backward

using Piece = uint4;  // kWide bf16, kept packed: half the registers
static_assert(sizeof(Piece) == kWide * sizeof(bf16));

__device__ void unpack(float (&x)[kWide], const Piece& piece) {
  const unsigned pairs[kWide / 2] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
  for (int i = 0; i < kWide / 2; ++i) {
    x[2 * i] = __uint_as_float(pairs[i] << 16);
    x[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
  }
}

// How a thread walks the rows of its block: in turns of at_once() rows, each row in row_warps
// neighbouring warps.
template <int kPieces>
class Walk {
 public:
  __device__ Walk(int64_t rows, int d, int row_warps, int64_t chunk_rows)
      : d_(d),
        row_warps_(row_warps),
        at_once_(static_cast<int>(blockDim.x) / 32 / row_warps),
        place_(static_cast<int>(threadIdx.x) / 32 / row_warps),
        column_((static_cast<int>(threadIdx.x) - place_ * row_warps * 32) * kWide),
        begin_(int64_t{blockIdx.x} * chunk_rows),
        count_(static_cast<int>(min(chunk_rows, rows - begin_))) {}

  __device__ int at_once() const { return at_once_; }  // rows of a turn
  __device__ int place() const { return place_; }      // of the thread's row in its turn
  __device__ int turns() const { return (count_ + at_once_ - 1) / at_once_; }
  __device__ bool has(int turn) const { return turn * at_once_ + place_ < count_; }
  __device__ int64_t row(int turn) const { return begin_ + turn * at_once_ + place_; }
  __device__ int column(int piece) const { return column_ + piece * row_warps_ * 32 * kWide; }
  __device__ bool holds(int piece) const { return column(piece) < d_; }

  // A thread without a row in this turn, or without this piece of it, loads another one and ignores
  // it. Without conditions, all loads of a turn are in flight together.
  __device__ int64_t row_to_load(int turn) const { return has(turn) ? row(turn) : begin_; }
  __device__ const Piece* piece_to_load(const bf16* from, int turn, int piece) const {
    return reinterpret_cast<const Piece*>(from + row_to_load(turn) * d_ +
                                          (holds(piece) ? column(piece) : 0));
  }
  __device__ void load_row(Piece (&out)[kPieces], const bf16* from, int turn) const {
#pragma unroll
    for (int p = 0; p < kPieces; ++p) out[p] = *piece_to_load(from, turn, p);
  }
  __device__ void load_row_past_l1(Piece (&out)[kPieces], const bf16* from, int turn) const {
#pragma unroll
    for (int p = 0; p < kPieces; ++p) out[p] = load_past_l1(piece_to_load(from, turn, p));
  }
  __device__ void store_row(bf16* to, int turn, int piece, const float (&x)[kWide]) const {
    store(to + row(turn) * d_ + column(piece), x, kWide);
  }
  __device__ void load_weight(float (&out)[kPieces][kWide], const float* w) const {
#pragma unroll
    for (int p = 0; p < kPieces; ++p) load(out[p], w + column(p), holds(p) ? kWide : 0);
  }

  // Sum over the threads that share a row. The whole block calls it, once a turn. Turns alternate
  // between the halves of `shared`, so that one barrier is enough.
  __device__ float row_sum(float x, float (&shared)[2][32], int turn) const {
    x = warp_sum(x);
    if (row_warps_ == 1) return x;
    float* const sums = shared[turn % 2];
    const int lane = threadIdx.x % 32;
    if (lane == 0) sums[threadIdx.x / 32] = x;
    __syncthreads();
    return warp_sum(lane < row_warps_ ? sums[place_ * row_warps_ + lane] : 0.0f);
  }

 private:
  int d_;
  int row_warps_;
  int at_once_;
  int place_;
  int column_;
  int64_t begin_;
  int count_;
};

// The most threads of a block, and the blocks per SM that must fit into the registers: 768 threads
// of one piece or 512 of two, with 30 to 50 KB of loads in flight.
template <int kPieces>
constexpr int kBlockThreads = kPieces == 1 ? 192 : 512;
template <int kPieces>
constexpr int kBlocksPerSm = kPieces == 1 ? 4 : 1;

template <int kPieces>
__global__ void __launch_bounds__(kBlockThreads<kPieces>, kBlocksPerSm<kPieces>)
    rms_norm_kernel(bf16* __restrict__ y, float* __restrict__ inv_rms, const bf16* __restrict__ x,
                    const float* __restrict__ w, int64_t rows, int d, float eps, int row_warps,
                    int64_t chunk_rows) {
  __shared__ float shared[2][32];
  const Walk<kPieces> walk(rows, d, row_warps, chunk_rows);
  start_next_kernel();
#pragma unroll
  for (int p = 0; p < kPieces; ++p)
    if (walk.holds(p)) prefetch_to_l2(w + walk.column(p));
  wait_for_previous_kernel();
  float g[kPieces][kWide];
  walk.load_weight(g, w);
  Piece in[kPieces], next[kPieces];
  walk.load_row_past_l1(next, x, 0);
  for (int turn = 0; turn < walk.turns(); ++turn) {
#pragma unroll
    for (int p = 0; p < kPieces; ++p) in[p] = next[p];
    if (turn + 1 < walk.turns()) walk.load_row_past_l1(next, x, turn + 1);
    float v[kWide], sum = 0.0f;
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      if (!walk.holds(p)) continue;
      unpack(v, in[p]);
#pragma unroll
      for (int j = 0; j < kWide; ++j) sum += v[j] * v[j];
    }
    const float mean = walk.row_sum(sum, shared, turn) / static_cast<float>(d);
    const float r = 1.0f / sqrtf(mean + eps);
    if (!walk.has(turn)) continue;
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      if (!walk.holds(p)) continue;
      unpack(v, in[p]);
#pragma unroll
      for (int j = 0; j < kWide; ++j) v[j] = v[j] * r * g[p][j];
      walk.store_row(y, turn, p, v);
    }
    if (walk.column(0) == 0) inv_rms[walk.row(turn)] = r;
  }
}

// What a thread loads of a row, backward.
template <int kPieces>
struct BackwardRow {
  // dx is read only if `add`.
  __device__ void load(const Walk<kPieces>& walk, const bf16* dx, const bf16* dy, const bf16* x,
                       const float* inv_rms, int turn, bool add) {
    walk.load_row(in, x, turn);
    walk.load_row(gradient, dy, turn);
    if (add) walk.load_row(before, dx, turn);
    r = inv_rms[walk.row_to_load(turn)];
  }

  Piece in[kPieces];
  Piece gradient[kPieces];
  Piece before[kPieces];
  float r;
};

// dx may be the buffer of dy: a thread loads its elements of a row before it writes them, and the
// rows loaded ahead are not written yet. dx null: not wanted; `add` is false.
// partials (chunks, D): the sum over rows [chunk * chunk_rows, ...) of dy x r; null: not wanted.
template <int kPieces>
__global__ void __launch_bounds__(kBlockThreads<kPieces>, kBlocksPerSm<kPieces>)
    rms_norm_backward_kernel(bf16* dx, float* __restrict__ partials, const bf16* dy,
                             const bf16* __restrict__ x, const float* __restrict__ inv_rms,
                             const float* __restrict__ w, int64_t rows, int d, int row_warps,
                             int64_t chunk_rows, bool add) {
  __shared__ float shared[2][32];
  const Walk<kPieces> walk(rows, d, row_warps, chunk_rows);
  float g[kPieces][kWide], dw[kPieces][kWide] = {};
  walk.load_weight(g, w);
  BackwardRow<kPieces> row, next;
  next.load(walk, dx, dy, x, inv_rms, 0, add);
  for (int turn = 0; turn < walk.turns(); ++turn) {
    row = next;
    if (turn + 1 < walk.turns()) next.load(walk, dx, dy, x, inv_rms, turn + 1, add);
    float u[kWide], v[kWide], sum = 0.0f;
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      if (!walk.holds(p)) continue;
      unpack(u, row.gradient[p]);
      unpack(v, row.in[p]);
#pragma unroll
      for (int j = 0; j < kWide; ++j) sum += u[j] * g[p][j] * v[j];
    }
    const float mean = walk.row_sum(sum, shared, turn) / static_cast<float>(d);
    const float pull = row.r * row.r * mean;
    if (!walk.has(turn)) continue;
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      if (!walk.holds(p)) continue;
      unpack(u, row.gradient[p]);
      unpack(v, row.in[p]);
#pragma unroll
      for (int j = 0; j < kWide; ++j) {
        dw[p][j] += u[j] * v[j] * row.r;
        u[j] = row.r * (u[j] * g[p][j] - v[j] * pull);
      }
      if (dx == nullptr) continue;
      if (add) {
        unpack(v, row.before[p]);
#pragma unroll
        for (int j = 0; j < kWide; ++j) u[j] += v[j];
      }
      walk.store_row(dx, turn, p, u);
    }
  }
  if (partials == nullptr) return;
  extern __shared__ float4 dynamic[];
  float* const sums = reinterpret_cast<float*>(dynamic);  // (rows at once, D)
#pragma unroll
  for (int p = 0; p < kPieces; ++p)
    if (walk.holds(p)) store(sums + walk.place() * d + walk.column(p), dw[p], kWide);
  __syncthreads();
  for (int c = threadIdx.x; c < d; c += blockDim.x) {
    float total = 0.0f;
    for (int k = 0; k < walk.at_once(); ++k) total += sums[k * d + c];
    partials[int64_t{blockIdx.x} * d + c] = total;
  }
}

// One row a block, of any width and at any address.
template <int kWidth>
__global__ void __launch_bounds__(kThreads)
    rms_norm_any_kernel(bf16* __restrict__ y, float* __restrict__ inv_rms,
                        const bf16* __restrict__ x, const float* __restrict__ w, int64_t d,
                        float eps) {
  __shared__ float shared[32];
  start_next_kernel();
  wait_for_previous_kernel();
  const int64_t m = blockIdx.x, begin = threadIdx.x * kWidth;
  const bf16* const row = x + m * d;
  float v[kWidth], g[kWidth];
  float sum = 0.0f;
  for (int64_t i = begin; i < d; i += kThreads * kWidth) {
    load_past_l1(v, row + i, d - i);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sum += v[j] * v[j];
  }
  const float r = 1.0f / sqrtf(block_sum(sum, shared) / static_cast<float>(d) + eps);
  for (int64_t i = begin; i < d; i += kThreads * kWidth) {
    load_past_l1(v, row + i, d - i);
    load(g, w + i, d - i);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) v[j] = v[j] * r * g[j];
    store(y + m * d + i, v, d - i);
  }
  if (begin == 0) inv_rms[m] = r;
}

// As rms_norm_backward_kernel.
template <int kWidth>
__global__ void __launch_bounds__(kThreads)
    rms_norm_any_backward_kernel(bf16* dx, float* __restrict__ partials, const bf16* dy,
                                 const bf16* __restrict__ x, const float* __restrict__ inv_rms,
                                 const float* __restrict__ w, int64_t rows, int64_t d,
                                 int64_t chunk_rows, bool add) {
  __shared__ float shared[32];
  extern __shared__ float4 dynamic[];
  float* const sums = reinterpret_cast<float*>(dynamic);  // (D), each thread its own columns
  const int64_t begin = threadIdx.x * kWidth;
  const int64_t end = min(rows, (int64_t{blockIdx.x} + 1) * chunk_rows);
  float v[kWidth], u[kWidth], g[kWidth];
  if (partials != nullptr) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) v[j] = 0.0f;
    for (int64_t i = begin; i < d; i += kThreads * kWidth) store(sums + i, v, d - i);
  }
  for (int64_t m = int64_t{blockIdx.x} * chunk_rows; m < end; ++m) {
    const int64_t base = m * d;
    const float r = inv_rms[m];
    float pull = 0.0f;
    if (dx != nullptr) {
      float sum = 0.0f;
      for (int64_t i = begin; i < d; i += kThreads * kWidth) {
        load(v, x + base + i, d - i);
        load(u, dy + base + i, d - i);
        load(g, w + i, d - i);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) sum += u[j] * g[j] * v[j];
      }
      pull = r * r * (block_sum(sum, shared) / static_cast<float>(d));
    }
    for (int64_t i = begin; i < d; i += kThreads * kWidth) {
      load(v, x + base + i, d - i);
      load(u, dy + base + i, d - i);
      if (partials != nullptr) {
        load(g, sums + i, d - i);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) g[j] += u[j] * v[j] * r;
        store(sums + i, g, d - i);
      }
      if (dx == nullptr) continue;
      load(g, w + i, d - i);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) u[j] = r * (u[j] * g[j] - v[j] * pull);
      if (add) {
        load(v, dx + base + i, d - i);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) u[j] += v[j];
      }
      store(dx + base + i, u, d - i);
    }
  }
  if (partials == nullptr) return;
  for (int64_t i = begin; i < d; i += kThreads * kWidth) {
    load(v, sums + i, d - i);
    store(partials + blockIdx.x * d + i, v, d - i);
  }
}

// dw (+)= the sum of `chunks` partial rows.
template <typename T>
__global__ void rms_norm_dw_kernel(T* __restrict__ dw, const float* __restrict__ partials,
                                   int64_t chunks, int64_t d, bool add) {
  const float sum = chunk_sum(partials, chunks, d);
  const int64_t c = int64_t{blockIdx.x} * 32 + threadIdx.x;
  if (threadIdx.x < 32 && c < d) from_float(dw[c], add ? to_float(dw[c]) + sum : sum);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How a block takes rows of d columns.
struct RowShape {
  RowShape(int64_t d, bool wide)
      : pieces(!wide || d > kMaxColumns ? 0
               : d <= kNarrowColumns    ? 1
                                        : 2),
        warps(pieces == 0 ? kThreads / 32 : static_cast<int>(ceil_div(d, kWarpColumns * pieces))),
        at_once(std::max(1, (pieces == 1 ? kBlockThreads<1> : kThreads) / 32 / warps)) {}

  dim3 block() const { return dim3(static_cast<unsigned>(32 * warps * at_once)); }
  // Rows of a chunk: at most `chunks` chunks, of whole turns, of `least` rows or more.
  int64_t chunk_rows(int64_t rows, int64_t chunks, int64_t least) const {
    return ceil_div(std::max(least, ceil_div(rows, chunks)), at_once) * at_once;
  }

  int pieces;   // that a thread keeps in registers; 0: not in registers
  int warps;    // that share a row
  int at_once;  // rows of a block
};

}  // namespace

// Of partial sums of dw, a row for each chunk of rows.
int64_t rms_norm_backward_scratch_bytes(int64_t rows, int64_t d) {
  const int64_t chunk_rows = std::max(kMinChunkRows, ceil_div(rows, kBackwardChunks));
  return ceil_div(rows, chunk_rows) * d * int64_t{sizeof(float)};
}

void CudaBackend::do_rms_norm(const Tensor& y, const Tensor& inv_rms, const Tensor& x,
                              const Tensor& w, double eps) {
  const int64_t d = w.numel(), rows = inv_rms.numel();
  const bool wide = d % kWide == 0 && aligned(y, x, w);
  const RowShape shape(d, wide);
  if (shape.pieces == 0) {
    launch(stream_, {blocks_for(rows, 1, 1), shape.block(), 0, starts_early(rows)},
           wide ? rms_norm_any_kernel<kWide> : rms_norm_any_kernel<1>, bf16_of(y),
           inv_rms.data<float>(), bf16_of(x), w.data<float>(), d, eps);
    return;
  }
  const int64_t chunk_rows = shape.chunk_rows(rows, kForwardChunks, 1);
  launch(stream_,
         {blocks_for(ceil_div(rows, chunk_rows), 1, 1), shape.block(), 0, starts_early(rows)},
         shape.pieces == 1 ? rms_norm_kernel<1> : rms_norm_kernel<2>, bf16_of(y),
         inv_rms.data<float>(), bf16_of(x), w.data<float>(), rows, d, eps, shape.warps, chunk_rows);
}

void CudaBackend::do_rms_norm_backward(const Tensor& dx, const Tensor& dw, const Tensor& dy,
                                       const Tensor& x, const Tensor& inv_rms, const Tensor& w,
                                       Write dx_mode, Write dw_mode, const Tensor& scratch) {
  const int64_t d = w.numel(), rows = inv_rms.numel();
  const bool wide = d % kWide == 0 && aligned(dx, dy, x, w), want_dw = dw.defined();
  const RowShape shape(d, wide);
  const int64_t chunk_rows = shape.chunk_rows(rows, kBackwardChunks, kMinChunkRows);
  const int64_t chunks = ceil_div(rows, chunk_rows), row_bytes = d * int64_t{sizeof(float)};
  float* const sums = static_cast<float*>(scratch.raw());
  const LaunchShape grid{blocks_for(chunks, 1, 1), shape.block(),
                         want_dw ? shape.at_once * row_bytes : 0};
  const bool add = dx.defined() && dx_mode == Write::Add;
  if (shape.pieces == 0)
    launch(stream_, grid,
           wide ? rms_norm_any_backward_kernel<kWide> : rms_norm_any_backward_kernel<1>,
           bf16_of(dx), sums, bf16_of(dy), bf16_of(x), inv_rms.data<float>(), w.data<float>(), rows,
           d, chunk_rows, add);
  else
    launch(stream_, grid,
           shape.pieces == 1 ? rms_norm_backward_kernel<1> : rms_norm_backward_kernel<2>,
           bf16_of(dx), sums, bf16_of(dy), bf16_of(x), inv_rms.data<float>(), w.data<float>(), rows,
           d, shape.warps, chunk_rows, add);
  if (!want_dw) return;
  with_elements(dw, [&]<typename T>(T* gradient) {
    launch(stream_, {blocks_for(d, 32, 1), dim3(kThreads)}, rms_norm_dw_kernel<T>, gradient, sums,
           chunks, d, dw_mode == Write::Add);
  });
}

}  // namespace bbb::cuda
