// Causal attention, backward, deterministic: no atomics, every sum in a fixed order.
//
//     p  = exp(q k^T / sqrt(d) - lse)          dp = dout v^T          delta = rowsum(dout o)
//     ds = p (dp - delta)                      dv = p^T dout
//     dq = ds k / sqrt(d)                      dk = ds^T q / sqrt(d)
//
// If q and k were rotated, dq and dk are rotated back in FP32, before they are rounded: the pair
// (a, b) = (x[i], x[i + d/2]) becomes a cos + b sin, b cos - a sin with the angles of cuda/rope.cu.
// A kernel writes their sines and cosines to a table first.
//
// Shapes: q, o, dout, dq (B, T, H, d); k, v, dk, dv (B, T, K, d); lse, delta F32 (B, H, T).
// On Hopper, head sizes 64, 96 and 128 run attention_hopper_backward.cu. Elsewhere scores are
// computed twice, once for dq and once for dk and dv: seven products instead of five, but no
// partial dq in memory. All passes are one kernel, compiled for each side. A block holds rows x of
// one side, of two tensors (x1, x2); rows y of the other side stream through shared memory in
// tiles:
//     side      x1  x2    y1  y2    s = x1 y1^T   t = x2 y2^T   sums
//     Queries   q   dout  k   v     q k^T         dout v^T      dq += ds y1
//     Keys      k   v     q   dout  k q^T         v dout^T      dk += ds^T y1, dv += p^T y2
//     OnlyKeys, OnlyValues: Keys with one of its two sums
// d up to 128: 128 rows x, in registers as fragments; tiles of 64 rows y; Keys, then Queries.
// Larger d: the sums alone fill the registers. 64 rows x, in shared memory; smaller tiles; OnlyKeys
// and OnlyValues in place of Keys, which makes eight products.
// The scores of a warp are C fragments with x down and y across. Rounded to bf16, they are the A
// fragments of the sums: p and ds never leave the registers.
// Grouped queries: a block of the Keys side walks the query heads of its kv head. If that leaves
// too few blocks to fill the GPU, each query head gets its own blocks, and one more kernel adds
// their F32 sums in order.
#include "cuda/attention.h"
#include "cuda/cuda_backend.h"
#include "cuda/mma.h"
#include "cuda/rotation.h"
#include "cuda/vector.h"

namespace bbb::cuda {
namespace {

// The side whose rows x stay; rows y of the other side stream past them.
enum class Side { Keys, Queries, OnlyKeys, OnlyValues };

// Registers limit the rows of a warp: two blocks of 16 for small heads, else one. The 99 KB of
// sm_86 and sm_89 limit shared memory:
//     d up to 128   y1 y2 (stage 0)  y1 y2 (stage 1)  terms    x1 x2 pass through the stages first
//     larger d      x1 x2  y1 y2 (stage 0)  y1 y2 (stage 1)  terms
// At the end it holds the results, in F32, dx1 and dx2 one after the other.
template <int D>
struct BackwardShape {
  static constexpr bool kWide = D > 128;
  static constexpr int kBlocks = D == 64 ? 2 : 1;
  static constexpr int kWarpRows = 16 * kBlocks;
  static constexpr int kRows = kWide ? 64 : 128;  // rows x of a block
  static constexpr int kThreads = 32 * (kRows / kWarpRows);
  static constexpr int kTile = D <= 128 ? 64 : D <= 192 ? 32 : 16;  // rows y of a tile
  static constexpr int kSub = D == 96 ? 32 : 16;  // y whose scores a warp holds at a time
  static constexpr int kHeldBytes = kWide ? 2 * kRows * D * 2 : 0;
  static constexpr int kTileBytes = kHeldBytes + 4 * kTile * D * 2;
  static constexpr int64_t kSmemBytes = kTileBytes + 4 * kTile * sizeof(float);
  static_assert(kTermRows % kRows == 0);                   // whole blocks of rotations, too
  static_assert(kRows * D * sizeof(float) <= kTileBytes);  // of the results
  static_assert(kWide || 2 * kRows * D * 2 <= kTileBytes);
};

// lse2 = lse log2(e), delta = sum over d of dout o; padding rows up to t_pad hold infinity and 0.
// 16 lanes a row, 16 bytes a lane at a time.
__global__ void attention_terms_kernel(float* __restrict__ lse2, float* __restrict__ delta,
                                       const float* __restrict__ lse, const bf16* __restrict__ dout,
                                       const bf16* __restrict__ o, int rows, int t, int t_pad,
                                       int heads, int d) {
  const int lane = threadIdx.x % 16;
  const int row = blockIdx.x * (blockDim.x / 16) + threadIdx.x / 16;  // (b, padded t, h)
  const int h = row % heads;
  const int position = row / heads % t_pad;
  const int b = row / heads / t_pad;
  const bool inside = row < rows && position < t;
  float sum = 0.0f;
  if (inside) {
    const int64_t offset = ((int64_t{b} * t + position) * heads + h) * d;
    for (int column = lane * 8; column < d; column += 16 * 8) {
      float left[8], right[8];
      load(left, dout + offset + column, 8);
      load(right, o + offset + column, 8);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum += left[i] * right[i];
    }
  }
#pragma unroll
  for (int distance = 8; distance > 0; distance /= 2)
    sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  if (row < rows && lane == 0) {
    const int64_t at = (int64_t{b} * heads + h) * t_pad + position;
    lse2[at] = inside ? lse[(int64_t{b} * heads + h) * t + position] * kLog2E : INFINITY;
    delta[at] = sum;
  }
}

// rotations (count / half, half): the inverse rotations of every position.
__global__ void rotations_kernel(float2* __restrict__ rotations, const float* __restrict__ inv_freq,
                                 int64_t count, int64_t half, float factor) {
  const int64_t i = first_element<1>();
  if (i < count) rotations[i] = rotation(i / half, inv_freq[i % half], -1.0f, factor);
}

// Writes a warp's 16 kBlocks rows of one gradient, x scale, to `target`: F32 if T is float, else
// rounded to bf16. They are rotated back if `rotations`, those of the first row, is not null. Rows
// from `rows` on are not written. The rows pass through the warp's own kWarpRows x D floats of
// shared memory, because the two columns of a pair may belong to two lanes. Groups of 8 columns are
// xor-ed with bits of the row, so that the four rows of a half warp's store use distinct banks. d
// is a multiple of 8, so 4 neighbouring columns have 4 neighbouring partners.
template <int D, typename T>
__device__ void write_rows(T* target, int64_t stride, int rows, int d, float* smem,
                           const float (&x)[BackwardShape<D>::kBlocks][D / 8][4], float scale,
                           const float2* rotations, int lane) {
  using Shape = BackwardShape<D>;
  const auto at = [smem](int row, int column) {
    return smem + row * D + (((column / 8) ^ (row & 3)) * 8 + column % 8);
  };
#pragma unroll
  for (int m = 0; m < Shape::kBlocks; ++m)
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<float2*>(at(m * 16 + lane / 4 + 8 * half, n * 8 + lane % 4 * 2)) =
            make_float2(x[m][n][2 * half] * scale, x[m][n][2 * half + 1] * scale);
  __syncwarp();
  const int half_d = d / 2, quads = d / 8;  // quads of pairs, in a row
  for (int item = lane; item < Shape::kWarpRows * quads; item += 32) {
    const int row = item / quads;
    if (row >= rows) break;
    const int column = item % quads * 4;
    float low[4], high[4];
    load(low, at(row, column), 4);
    load(high, at(row, column + half_d), 4);
    if (rotations != nullptr) {
      const float2* const r = rotations + row * half_d + column;
#pragma unroll
      for (int i = 0; i < 4; ++i) rotate(low[i], high[i], r[i]);
    }
    store(target + row * stride + column, low, 4);
    store(target + row * stride + column + half_d, high, 4);
  }
  __syncwarp();
}

// BackwardArgs::ends (2, B, t_pad) of first_key (B, T); count: B t_pad. First keys do not fall, so
// a search by halves finds the last query that sees a key.
__global__ void ends_kernel(int* __restrict__ ends, const int* __restrict__ first_key,
                            int64_t count, int t, int t_pad) {
  const int64_t i = first_element<1>();
  if (i >= count) return;
  const int row = min(static_cast<int>(i % t_pad), t - 1);
  const int* const first = first_key + i / t_pad * t;
  int low = row, high = t - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (first[middle] <= row)
      low = middle;
    else
      high = middle - 1;
  }
  ends[i] = first[row];
  ends[count + i] = low;
}

template <int D, Side kSide, Mask kMask>
__global__ __launch_bounds__(BackwardShape<D>::kThreads,
                             D == 64 ? 2
                                     : 1) void attention_backward_kernel(const BackwardArgs args,
                                                                         const BlockOrder order) {
  using Config = BackwardShape<D>;
  constexpr int kBlocks = Config::kBlocks, kThreads = Config::kThreads, kSub = Config::kSub;
  constexpr int kWarpRows = Config::kWarpRows, kRows = Config::kRows, kTile = Config::kTile;
  constexpr bool kWide = Config::kWide, kDocuments = kMask == Mask::Documents;
  constexpr bool kKeys = kSide != Side::Queries;
  constexpr bool kFirst = kSide != Side::OnlyValues;                          // sums dx1
  constexpr bool kSecond = kSide == Side::Keys || kSide == Side::OnlyValues;  // sums dx2
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int g = lane / 4;
  const int pair = lane % 4 * 2;

  // Longest blocks first: early keys are seen by more queries, late queries see more keys.
  int rank, order_head;
  order.find(blockIdx.x, rank, order_head);
  const int x0 = (kKeys ? rank : order.tiles - 1 - rank) * kRows;
  const int head_sets = kKeys ? args.heads / args.heads_per_item : args.heads;
  const int b = order_head / head_sets;
  const int head0 = order_head % head_sets * (kKeys ? args.heads_per_item : 1);
  const int group = args.heads / args.kv_heads;
  const int kv_head = head0 / group;

  // Offset of row r of head h of n: ((b T + r) n + h) d.
  const int d = args.d;
  const int x_heads = kKeys ? args.kv_heads : args.heads;
  const int y_heads = kKeys ? args.heads : args.kv_heads;
  const int x_head = kKeys ? kv_head : head0;
  const int y_head0 = kKeys ? head0 : kv_head;
  const int64_t x_stride = int64_t{x_heads} * d;
  const int64_t x_offset = int64_t{b} * args.t * x_stride + x_head * d;

  unsigned char* smem = reinterpret_cast<unsigned char*>(dynamic_smem());
  float* row_terms =
      reinterpret_cast<float*>(smem + Config::kTileBytes);  // (stage, lse2 | delta, y)
  const uint32_t base = shared_address(smem);
  const auto y_tile = [&](int stage, int which) {
    return SmemTile<D>{base + Config::kHeldBytes + (2 * stage + which) * kTile * D * 2};
  };
  const auto load_rows = [&](int head, int tile, int stage) {
    const int y0 = recomputed(tile * kTile);
    const int thread = recomputed(threadIdx.x);
    const int batch = recomputed(b);
    const int64_t y_stride = int64_t{y_heads} * d;
    const int64_t y_offset = int64_t{batch} * args.t * y_stride + (y_head0 + head) * d;
    load_tile_async<D, kTile, kThreads>(y_tile(stage, 0), (kKeys ? args.q : args.k) + y_offset,
                                        y_stride, y0, args.t, d, thread);
    load_tile_async<D, kTile, kThreads>(y_tile(stage, 1), (kKeys ? args.dout : args.v) + y_offset,
                                        y_stride, y0, args.t, d, thread);
    if (kKeys && thread < 2 * kTile) {
      const float* from = (thread < kTile ? args.lse2 : args.delta) +
                          (int64_t{batch} * args.heads + head0 + head) * args.t_pad + y0 +
                          thread % kTile;
      cp_async_4(shared_address(row_terms + stage * 2 * kTile + thread), from, true);
    }
    cp_async_commit();
  };

  uint32_t x1[kBlocks][kWide ? 1 : D / 16][4], x2[kBlocks][kWide ? 1 : D / 16][4];
  const int warp_row = warp * kWarpRows;
  const SmemTile<D> x1_tile{base}, x2_tile{base + kRows * D * 2};
  load_tile_async<D, kRows, kThreads>(x1_tile, (kKeys ? args.k : args.q) + x_offset, x_stride, x0,
                                      args.t, d, threadIdx.x);
  if constexpr (kFirst)
    load_tile_async<D, kRows, kThreads>(x2_tile, (kKeys ? args.v : args.dout) + x_offset, x_stride,
                                        x0, args.t, d, threadIdx.x);
  cp_async_commit();
  if constexpr (!kWide) {
    cp_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int m = 0; m < kBlocks; ++m)
#pragma unroll
      for (int kk = 0; kk < D / 16; ++kk) {
        load_a(x1[m][kk], x1_tile, warp_row + m * 16, kk * 16, lane);
        load_a(x2[m][kk], x2_tile, warp_row + m * 16, kk * 16, lane);
      }
    __syncthreads();
  }

  // The tiles of y that some row x of the block sees (Keys: that see one).
  const int x_last = min(x0 + kRows, args.t) - 1;
  int y_first = kKeys ? x0 : max(0, x0 - args.window + 1);
  int y_last = kKeys ? min(args.t - 1, x_last + args.window - 1) : x_last;
  // Documents: the end of what row x sees: the last query that sees a key, a query's first key.
  const auto end_of = [&](int x) {
    return args.ends[int64_t{kKeys ? args.batch + b : b} * args.t_pad + x];
  };
  if constexpr (kDocuments && kKeys) y_last = min(y_last, end_of(x_last));
  if constexpr (kDocuments && !kKeys) y_first = max(y_first, end_of(x0));
  const int first_tile = y_first / kTile;
  const int tiles = y_last / kTile + 1 - first_tile;
  const int steps = tiles * (kKeys ? args.heads_per_item : 1);

  const float scale = score_scale(d);
  const float scale_log2 = scale * kLog2E;
  float x_lse2[kBlocks][2], x_delta[kBlocks][2];  // Queries: of this lane's rows
  if constexpr (!kKeys) {
#pragma unroll
    for (int m = 0; m < kBlocks; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t at =
            (int64_t{b} * args.heads + head0) * args.t_pad + x0 + warp_row + m * 16 + g + 8 * half;
        x_lse2[m][half] = args.lse2[at];
        x_delta[m][half] = args.delta[at];
      }
  }

  float dx1[kFirst ? kBlocks : 1][D / 8][4] = {};
  float dx2[kSecond ? kBlocks : 1][D / 8][4] = {};
  const int warp_x0 = x0 + warp_row;
  const int warp_x1 = warp_x0 + kWarpRows - 1;
  // Documents: the farthest and the nearest end of the warp's rows, and those of this lane's rows.
  int farthest = 0, nearest = 0, ends[kBlocks][2];
  if constexpr (kDocuments) {
    farthest = end_of(kKeys ? warp_x1 : warp_x0);
    nearest = end_of(kKeys ? warp_x0 : warp_x1);
#pragma unroll
    for (int m = 0; m < kBlocks; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) ends[m][half] = end_of(warp_x0 + m * 16 + g + 8 * half);
  }

  load_rows(0, first_tile, 0);
  int head = 0, tile = first_tile;
  for (int step = 0; step < steps; ++step) {
    // After the barrier every warp sees this step's rows, and none reads the stage that the next
    // rows overwrite.
    cp_async_wait<0>();
    __syncthreads();
    const int stage = step & 1;
    const int y0 = tile * kTile;
    if (++tile == first_tile + tiles) {
      tile = first_tile;
      ++head;
    }
    if (step + 1 < steps) load_rows(head, tile, stage ^ 1);
    if (warp_x0 >= args.t) continue;
    const SmemTile<D> y1_tile = y_tile(stage, 0), y2_tile = y_tile(stage, 1);

#pragma unroll 1
    for (int sub = 0; sub < kTile; sub += kSub) {
      // The least and greatest distance i - j from key j to query i within the warp's scores.
      const int sub_y0 = y0 + sub, sub_y1 = sub_y0 + kSub - 1;
      const int least = kKeys ? sub_y0 - warp_x1 : warp_x0 - sub_y1;
      const int greatest = kKeys ? sub_y1 - warp_x0 : warp_x1 - sub_y0;
      if (greatest < 0 || least >= args.window) continue;
      if (kDocuments && (kKeys ? sub_y0 > farthest : sub_y1 < farthest)) continue;

      float s[kBlocks][kSub / 8][4] = {}, ds[kBlocks][kSub / 8][4] = {};
#pragma unroll
      for (int kk = 0; kk < D / 16; ++kk) {
        const int at = kWide ? 0 : kk;
        if constexpr (kWide) {
#pragma unroll
          for (int m = 0; m < kBlocks; ++m) {
            load_a(x1[m][0], x1_tile, warp_row + m * 16, kk * 16, lane);
            if constexpr (kFirst) load_a(x2[m][0], x2_tile, warp_row + m * 16, kk * 16, lane);
          }
        }
#pragma unroll
        for (int n = 0; n < kSub / 16; ++n) {
          uint32_t rows[4];
          load_b(rows, y1_tile, sub + n * 16, kk * 16, lane);
#pragma unroll
          for (int m = 0; m < kBlocks; ++m) {
            mma_bf16(s[m][2 * n], x1[m][at], rows[0], rows[1]);
            mma_bf16(s[m][2 * n + 1], x1[m][at], rows[2], rows[3]);
          }
          if constexpr (kFirst) {  // for ds; dx2 = p^T y2 needs none
            load_b(rows, y2_tile, sub + n * 16, kk * 16, lane);
#pragma unroll
            for (int m = 0; m < kBlocks; ++m) {
              mma_bf16(ds[m][2 * n], x2[m][at], rows[0], rows[1]);
              mma_bf16(ds[m][2 * n + 1], x2[m][at], rows[2], rows[3]);
            }
          }
        }
      }

      // s = p. ds held dp: ds = p (dp - delta).
      const bool masked = least < 0 || greatest >= args.window ||
                          (kDocuments && (kKeys ? sub_y1 > nearest : sub_y0 < nearest));
      const int corner = sub_y0 + pair - (warp_x0 + g);
#pragma unroll
      for (int n = 0; n < kSub / 8; ++n) {
        float y_lse2[2], y_delta[2];
        if constexpr (kKeys) {
          const float* terms = row_terms + stage * 2 * kTile + sub + n * 8 + pair;
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            y_lse2[j] = terms[j];
            y_delta[j] = terms[kTile + j];
          }
        }
#pragma unroll
        for (int m = 0; m < kBlocks; ++m)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float lse2 = kKeys ? y_lse2[i % 2] : x_lse2[m][i / 2];
            const float delta = kKeys ? y_delta[i % 2] : x_delta[m][i / 2];
            float p = exp2_approx(s[m][n][i] * scale_log2 - lse2);
            const int across = corner + n * 8 + i % 2 - (m * 16 + i / 2 * 8);
            const int distance = kKeys ? across : -across;
            if (masked && static_cast<unsigned>(distance) >= static_cast<unsigned>(args.window))
              p = 0.0f;
            if constexpr (kDocuments) {
              const int y = sub_y0 + pair + n * 8 + i % 2;
              if (kKeys ? y > ends[m][i / 2] : y < ends[m][i / 2]) p = 0.0f;
            }
            s[m][n][i] = p;
            ds[m][n][i] = p * (ds[m][n][i] - delta);
          }
      }

#pragma unroll
      for (int kk = 0; kk < kSub / 16; ++kk) {
        uint32_t p_a[kBlocks][4], ds_a[kBlocks][4];
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) {
          if constexpr (kSecond) pack_a(p_a[m], s[m][2 * kk], s[m][2 * kk + 1]);
          if constexpr (kFirst) pack_a(ds_a[m], ds[m][2 * kk], ds[m][2 * kk + 1]);
        }
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {
          uint32_t rows[4];
          if constexpr (kFirst) {
            load_b_rows(rows, y1_tile, sub + kk * 16, n * 16, lane);
#pragma unroll
            for (int m = 0; m < kBlocks; ++m) {
              mma_bf16(dx1[m][2 * n], ds_a[m], rows[0], rows[1]);
              mma_bf16(dx1[m][2 * n + 1], ds_a[m], rows[2], rows[3]);
            }
          }
          if constexpr (kSecond) {
            load_b_rows(rows, y2_tile, sub + kk * 16, n * 16, lane);
#pragma unroll
            for (int m = 0; m < kBlocks; ++m) {
              mma_bf16(dx2[m][2 * n], p_a[m], rows[0], rows[1]);
              mma_bf16(dx2[m][2 * n + 1], p_a[m], rows[2], rows[3]);
            }
          }
        }
      }
    }
  }

  // After the barrier no warp reads the last stage: its memory takes the results.
  __syncthreads();
  const int rows = args.t - warp_x0;
  float* const warp_smem = reinterpret_cast<float*>(smem) + warp_row * D;
  const auto write = [&](auto* first, auto* second) {
    const int64_t offset = x_offset + warp_x0 * x_stride;
    if constexpr (kFirst) {
      const float2* const rotations =
          args.rotations == nullptr ? nullptr : args.rotations + int64_t{warp_x0} * (d / 2);
      write_rows<D>(first + offset, x_stride, rows, d, warp_smem, dx1, scale, rotations, lane);
    }
    if constexpr (kSecond)
      write_rows<D>(second + offset, x_stride, rows, d, warp_smem, dx2, 1.0f, nullptr, lane);
  };
  if (kKeys && args.partial != nullptr) {
    const int64_t size = int64_t{order.heads} / head_sets * args.t * x_stride;
    float* const target = args.partial + head0 % group * 2 * size;
    write(target, target + size);
  } else {
    write(kKeys ? args.dk : args.dq, args.dv);
  }
}

// dk and dv = the sum over `count` query heads, in their order, of partial (count, 2, size).
__global__ void sum_heads_kernel(bf16* __restrict__ dk, bf16* __restrict__ dv,
                                 const float* __restrict__ partial, int64_t size, int count) {
  const int64_t i = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * 4;  // d is a multiple of 8
  if (i >= 2 * size) return;
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  for (int n = 0; n < count; ++n) {
    const float4 term = *reinterpret_cast<const float4*>(partial + 2 * size * n + i);
    sum.x += term.x;
    sum.y += term.y;
    sum.z += term.z;
    sum.w += term.w;
  }
  *reinterpret_cast<uint2*>(i < size ? dk + i : dv + (i - size)) =
      make_uint2(pack_bf16(sum.x, sum.y), pack_bf16(sum.z, sum.w));
}

// Kernel, sizes and scratch of the backward of q (B, T, H, d) and k (B, T, K, d).
struct BackwardPlan {
  BackwardArgs sizes{};
  bool split;           // each query head has its own sums of dk and dv
  int64_t terms_bytes;  // lse2, and delta
  int64_t partial_bytes;
  int64_t rotations;  // pairs; none without rotary positions
  int64_t ends;       // a side; none without Documents
  bool hopper;
  int64_t hopper_bytes;

  BackwardPlan(const Shape& q, const Shape& k, const AttentionSpec& spec, bool rotary,
               bool warpgroup_products, int sms) {
    sizes.batch = checked_int(q[0]);
    sizes.t = checked_int(q[1]);
    sizes.heads = checked_int(q[2]);
    sizes.kv_heads = checked_int(k[2]);
    sizes.d = checked_int(q[3]);
    sizes.t_pad = ceil_div(sizes.t, kTermRows) * kTermRows;
    const int group = sizes.heads / sizes.kv_heads;
    // Two waves of blocks are enough to even out their lengths.
    constexpr int kSplitRows = 128;
    split = group > 1 &&
            int64_t{sizes.batch} * sizes.kv_heads * ceil_div(sizes.t, kSplitRows) < 2 * sms;
    sizes.heads_per_item = split ? 1 : group;
    sizes.window = window_of(spec.window);
    terms_bytes = int64_t{sizes.batch} * sizes.heads * sizes.t_pad * int64_t{sizeof(float)};
    partial_bytes = split ? group * 2 * engine::numel_of(k) * int64_t{sizeof(float)} : 0;
    rotations = rotary ? sizes.t_pad * q[3] / 2 : 0;
    ends = spec.first_key.defined() ? int64_t{sizes.batch} * sizes.t_pad : 0;
    hopper = warpgroup_products && has_hopper_head_size(sizes.d);
    hopper_bytes = hopper ? attention_backward_hopper_bytes(sizes, spec.ds_bytes, sms) : 0;
  }
  // One scratch holds lse2, delta, rotations, ends, partial and the work of the Hopper kernels.
  int64_t delta_at() const { return aligned_bytes(terms_bytes); }
  int64_t rotations_at() const { return 2 * delta_at(); }
  int64_t ends_at() const {
    return rotations_at() + aligned_bytes(rotations * int64_t{sizeof(float2)});
  }
  int64_t partial_at() const { return ends_at() + aligned_bytes(2 * ends * int64_t{sizeof(int)}); }
  int64_t hopper_at() const { return partial_at() + aligned_bytes(partial_bytes); }
  int64_t bytes() const { return hopper_at() + hopper_bytes; }

 private:
  static int64_t aligned_bytes(int64_t bytes) { return (bytes + 511) / 512 * 512; }
};

}  // namespace

int64_t CudaBackend::attention_backward_scratch_bytes(const Shape& q, const Shape& k,
                                                      const AttentionSpec& spec) const {
  if (engine::numel_of(q) == 0) return 0;
  return BackwardPlan(q, k, spec, true, has_warpgroup_products(), properties_.multiProcessorCount)
      .bytes();
}

void CudaBackend::do_attention_backward(const Tensor& dq, const Tensor& dk, const Tensor& dv,
                                        const Tensor& dout, const Tensor& q, const Tensor& k,
                                        const Tensor& v, const Tensor& o, const Tensor& lse,
                                        const Tensor& inv_freq, const AttentionSpec& spec,
                                        const Tensor& scratch) {
  if (q.numel() == 0) return;
  BBB_ASSERT(aligned(dq, dk, dv, dout, q, k, v, o));
  const int sms = properties_.multiProcessorCount;
  const BackwardPlan plan(q.shape(), k.shape(), spec, inv_freq.defined(), has_warpgroup_products(),
                          sms);
  char* const work = static_cast<char*>(scratch.raw());
  float* const lse2 = reinterpret_cast<float*>(work);
  float* const delta = reinterpret_cast<float*>(work + plan.delta_at());
  float2* const rotations = reinterpret_cast<float2*>(work + plan.rotations_at());
  BackwardArgs args = plan.sizes;
  args.dq = bf16_of(dq);
  args.dk = bf16_of(dk);
  args.dv = bf16_of(dv);
  args.partial = plan.split ? reinterpret_cast<float*>(work + plan.partial_at()) : nullptr;
  args.q = bf16_of(q);
  args.k = bf16_of(k);
  args.v = bf16_of(v);
  args.dout = bf16_of(dout);
  args.lse2 = lse2;
  args.delta = delta;
  args.rotations = plan.rotations > 0 ? rotations : nullptr;
  if (plan.rotations > 0) {
    constexpr int kRotationThreads = 256;
    launch(stream_, {blocks_for(plan.rotations, kRotationThreads, 1), kRotationThreads},
           rotations_kernel, rotations, inv_freq.data<float>(), plan.rotations, inv_freq.numel(),
           static_cast<float>(spec.rope_factor));
  }
  if (plan.ends > 0) {
    constexpr int kEndThreads = 256;
    int* const ends = reinterpret_cast<int*>(work + plan.ends_at());
    args.ends = ends;
    launch(stream_, {blocks_for(plan.ends, kEndThreads, 1), kEndThreads}, ends_kernel, ends,
           spec.first_key.data<int>(), plan.ends, args.t, args.t_pad);
  }
  constexpr int kTermThreads = 256;
  const int rows = checked_int(int64_t{args.batch} * args.heads * args.t_pad);
  launch(stream_, {static_cast<unsigned>(ceil_div(rows, kTermThreads / 16)), kTermThreads},
         attention_terms_kernel, lse2, delta, lse.data<float>(), args.dout, bf16_of(o), rows,
         args.t, args.t_pad, args.heads, args.d);

  if (plan.hopper) {
    attention_backward_hopper(stream_, args, args.d, spec.ds_bytes, sms, work + plan.hopper_at());
  } else {
    with_padded_head_size(args.d, [&](auto size) {
      constexpr int D = size;
      using Config = BackwardShape<D>;
      const auto run_side = [&]<Side kSide>() {
        const int heads_per_item = kSide == Side::Queries ? 1 : args.heads_per_item;
        const BlockOrder order(ceil_div(args.t, Config::kRows),
                               args.batch * args.heads / heads_per_item, args.t * heads_per_item,
                               args.d);
        launch(stream_, {order.blocks(), Config::kThreads, Config::kSmemBytes},
               args.ends == nullptr ? attention_backward_kernel<D, kSide, Mask::Window>
                                    : attention_backward_kernel<D, kSide, Mask::Documents>,
               args, order);
      };
      if constexpr (Config::kWide) {
        run_side.template operator()<Side::OnlyKeys>();
        run_side.template operator()<Side::OnlyValues>();
      } else {
        run_side.template operator()<Side::Keys>();
      }
      run_side.template operator()<Side::Queries>();
    });
  }
  if (plan.split) {
    constexpr unsigned kSumThreads = 256;
    const int64_t quads = k.numel() / 2;  // of dk and dv together
    launch(stream_, {static_cast<unsigned>((quads + kSumThreads - 1) / kSumThreads), kSumThreads},
           sum_heads_kernel, args.dk, args.dv, args.partial, k.numel(), args.heads / args.kv_heads);
  }
}

}  // namespace bbb::cuda
