// Causal attention, backward, deterministic: no atomics, every sum in a fixed order.
//
//     p  = exp(q k^T / sqrt(d) - lse)          dp = dout v^T          delta = rowsum(dout o)
//     ds = p (dp - delta)                      dv = p^T dout
//     dq = ds k / sqrt(d)                      dk = ds^T q / sqrt(d)
//
// Where q and k are rotated ones, dq and dk turn back in the registers that summed them, before
// they are rounded: the pair (a, b) = (x[i], x[i + d/2]) becomes a cos + b sin, b cos - a sin with
// the angles of cuda/rope.cu, whose sines and cosines a kernel writes to a table first.
//
// Shapes: q, o, dout, dq (B, T, H, d); k, v, dk, dv (B, T, K, d); lse, delta F32 (B, H, T).
// On Hopper: attention_hopper_backward.cu. Elsewhere scores are computed twice, once for dq and
// once for dk and dv: seven products instead of five, in exchange for no partial dq in memory. Both
// passes are one kernel seen from two sides. A block owns 128 rows x of one side and keeps both of
// their tensors (x1, x2) in registers as fragments; rows y of the other side stream through shared
// memory in tiles of 64:
//     side      x1  x2    y1  y2    s = x1 y1^T   t = x2 y2^T   sums
//     Queries   q   dout  k   v     q k^T         dout v^T      dq += ds y1
//     Keys      k   v     q   dout  k q^T         v dout^T      dk += ds^T y1, dv += p^T y2
// The scores of a warp are C fragments with x down and y across, which rounded to bf16 are the A
// fragments of the sums: p and ds never leave the registers.
// Grouped queries: a block of the Keys side walks through the query heads of its kv head. Where
// that leaves too few blocks to fill the GPU each query head gets its own, and their F32 sums are
// added in order by one more kernel.
#include "cuda/attention.h"
#include "cuda/cuda_backend.h"
#include "cuda/mma.h"
#include "cuda/rotation.h"
#include "cuda/vector.h"

namespace bbb::cuda {
namespace {

constexpr int kRows = 128;              // rows x of a block
static_assert(kTermRows % kRows == 0);  // whole blocks of rotations, too
constexpr int kTile = 64;               // rows y of a tile

// Rows x of one side of the pass stay, rows y of the other stream past them.
enum class Side { Keys, Queries };

// Registers bound the rows of a warp: two blocks of 16 where the head is small, else one.
template <int D, Side kSide>
struct BackwardShape {
  static constexpr int kBlocks = D == 64 ? 2 : 1;
  static constexpr int kWarps = kRows / (16 * kBlocks);
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kSub = D == 128 || kBlocks == 2 ? 16 : 32;  // y whose scores a warp holds
  // Two stages of y1, y2; before the first of them x1, x2, and after the last the results.
  static constexpr int kTileBytes = 4 * kTile * D * 2;
  static constexpr int64_t kSmemBytes = kTileBytes + 4 * kTile * sizeof(float);
};

// lse2 = lse log2(e), delta = sum over d of dout o, padded to t_pad rows: infinity and 0 there.
// A row of D values per D / 8 lanes, 16 bytes a lane.
template <int D>
__global__ void attention_terms_kernel(float* __restrict__ lse2, float* __restrict__ delta,
                                       const float* __restrict__ lse, const bf16* __restrict__ dout,
                                       const bf16* __restrict__ o, int rows, int t, int t_pad,
                                       int heads) {
  const int lane = threadIdx.x % 16;
  const int row = blockIdx.x * (blockDim.x / 16) + threadIdx.x / 16;  // (b, padded t, h)
  const int h = row % heads;
  const int position = row / heads % t_pad;
  const int b = row / heads / t_pad;
  const bool inside = row < rows && position < t;
  float sum = 0.0f;
  if (inside && lane < D / 8) {
    const int64_t offset = ((int64_t{b} * t + position) * heads + h) * D + lane * 8;
    float left[8], right[8];
    load(left, dout + offset, 8);
    load(right, o + offset, 8);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += left[i] * right[i];
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

// rotations (count / half, half): by what the gradients of every position turn back.
__global__ void rotations_kernel(float2* __restrict__ rotations, const float* __restrict__ inv_freq,
                                 int64_t count, int64_t half) {
  const int64_t i = first_element<1>();
  if (i < count) rotations[i] = rotation(i / half, inv_freq[i % half], -1.0f);
}

template <int D, Side kSide>
__global__ __launch_bounds__(BackwardShape<D, kSide>::kThreads,
                             D == 64 ? 2
                                     : 1) void attention_backward_kernel(const BackwardArgs args,
                                                                         const BlockOrder order) {
  using Config = BackwardShape<D, kSide>;
  constexpr int kBlocks = Config::kBlocks, kThreads = Config::kThreads, kSub = Config::kSub;
  constexpr int kWarpRows = 16 * kBlocks;
  constexpr bool kKeys = kSide == Side::Keys;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int g = lane / 4;
  const int pair = lane % 4 * 2;

  // Early keys are seen by more queries, late queries see more keys.
  int rank, order_head;
  order.find(blockIdx.x, rank, order_head);
  const int x0 = (kKeys ? rank : order.tiles - 1 - rank) * kRows;
  const int head_sets = kKeys ? args.heads / args.heads_per_item : args.heads;
  const int b = order_head / head_sets;
  const int head0 = order_head % head_sets * (kKeys ? args.heads_per_item : 1);
  const int group = args.heads / args.kv_heads;
  const int kv_head = head0 / group;

  // Head h of n, row r: ((b T + r) n + h) D.
  const int x_heads = kKeys ? args.kv_heads : args.heads;
  const int y_heads = kKeys ? args.heads : args.kv_heads;
  const int x_head = kKeys ? kv_head : head0;
  const int y_head0 = kKeys ? head0 : kv_head;
  const int64_t x_stride = int64_t{x_heads} * D;
  const int64_t x_offset = int64_t{b} * args.t * x_stride + x_head * D;

  unsigned char* smem = reinterpret_cast<unsigned char*>(dynamic_smem());
  float* row_terms =
      reinterpret_cast<float*>(smem + Config::kTileBytes);  // (stage, lse2 | delta, y)
  const uint32_t base = shared_address(smem);
  const auto y_tile = [&](int stage, int which) {
    return SmemTile<D>{base + (2 * stage + which) * kTile * D * 2};
  };
  const auto load_rows = [&](int head, int tile, int stage) {
    const int y0 = recomputed(tile * kTile);
    const int thread = recomputed(threadIdx.x);
    const int batch = recomputed(b);
    const int64_t y_stride = int64_t{y_heads} * D;
    const int64_t y_offset = int64_t{batch} * args.t * y_stride + (y_head0 + head) * D;
    load_tile_async<D, kTile, kThreads>(y_tile(stage, 0), (kKeys ? args.q : args.k) + y_offset,
                                        y_stride, y0, args.t, thread);
    load_tile_async<D, kTile, kThreads>(y_tile(stage, 1), (kKeys ? args.dout : args.v) + y_offset,
                                        y_stride, y0, args.t, thread);
    if (kKeys && thread < 2 * kTile) {
      const float* from = (thread < kTile ? args.lse2 : args.delta) +
                          (int64_t{batch} * args.heads + head0 + head) * args.t_pad + y0 +
                          thread % kTile;
      cp_async_4(shared_address(row_terms + stage * 2 * kTile + thread), from, true);
    }
    cp_async_commit();
  };

  // x1 and x2 pass through the memory of the stages into registers.
  uint32_t x1[kBlocks][D / 16][4], x2[kBlocks][D / 16][4];
  const int warp_row = warp * kWarpRows;
  {
    const SmemTile<D> x1_tile{base}, x2_tile{base + kRows * D * 2};
    load_tile_async<D, kRows, kThreads>(x1_tile, (kKeys ? args.k : args.q) + x_offset, x_stride, x0,
                                        args.t, threadIdx.x);
    load_tile_async<D, kRows, kThreads>(x2_tile, (kKeys ? args.v : args.dout) + x_offset, x_stride,
                                        x0, args.t, threadIdx.x);
    cp_async_commit();
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

  // The tiles of y that some row of the block meets.
  const int x_last = min(x0 + kRows, args.t) - 1;
  const int y_first = kKeys ? x0 : max(0, x0 - args.window + 1);
  const int y_last = kKeys ? min(args.t - 1, x_last + args.window - 1) : x_last;
  const int first_tile = y_first / kTile;
  const int tiles = y_last / kTile + 1 - first_tile;
  const int steps = tiles * (kKeys ? args.heads_per_item : 1);

  const float scale = rsqrtf(static_cast<float>(D));
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

  float dx1[kBlocks][D / 8][4] = {};
  float dx2[kKeys ? kBlocks : 1][D / 8][4] = {};
  const int warp_x0 = x0 + warp_row;
  const int warp_x1 = warp_x0 + kWarpRows - 1;

  load_rows(0, first_tile, 0);
  int head = 0, tile = first_tile;
  for (int step = 0; step < steps; ++step) {
    // Shows this step's rows to every warp; all have left the stage that the next ones take.
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
      // Distances i - j from key j to query i within the warp's scores.
      const int sub_y0 = y0 + sub, sub_y1 = sub_y0 + kSub - 1;
      const int least = kKeys ? sub_y0 - warp_x1 : warp_x0 - sub_y1;
      const int greatest = kKeys ? sub_y1 - warp_x0 : warp_x1 - sub_y0;
      if (greatest < 0 || least >= args.window) continue;

      float s[kBlocks][kSub / 8][4] = {}, ds[kBlocks][kSub / 8][4] = {};
#pragma unroll
      for (int kk = 0; kk < D / 16; ++kk)
#pragma unroll
        for (int n = 0; n < kSub / 16; ++n) {
          uint32_t rows[4];
          load_b(rows, y1_tile, sub + n * 16, kk * 16, lane);
#pragma unroll
          for (int m = 0; m < kBlocks; ++m) {
            mma_bf16(s[m][2 * n], x1[m][kk], rows[0], rows[1]);
            mma_bf16(s[m][2 * n + 1], x1[m][kk], rows[2], rows[3]);
          }
          load_b(rows, y2_tile, sub + n * 16, kk * 16, lane);
#pragma unroll
          for (int m = 0; m < kBlocks; ++m) {
            mma_bf16(ds[m][2 * n], x2[m][kk], rows[0], rows[1]);
            mma_bf16(ds[m][2 * n + 1], x2[m][kk], rows[2], rows[3]);
          }
        }

      // s becomes p, and ds, until now dp, becomes ds.
      const bool masked = least < 0 || greatest >= args.window;
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
            s[m][n][i] = p;
            ds[m][n][i] = p * (ds[m][n][i] - delta);
          }
      }

#pragma unroll
      for (int kk = 0; kk < kSub / 16; ++kk) {
        uint32_t p_a[kBlocks][4], ds_a[kBlocks][4];
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) {
          if constexpr (kKeys) pack_a(p_a[m], s[m][2 * kk], s[m][2 * kk + 1]);
          pack_a(ds_a[m], ds[m][2 * kk], ds[m][2 * kk + 1]);
        }
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {
          uint32_t rows[4];
          load_b_rows(rows, y1_tile, sub + kk * 16, n * 16, lane);
#pragma unroll
          for (int m = 0; m < kBlocks; ++m) {
            mma_bf16(dx1[m][2 * n], ds_a[m], rows[0], rows[1]);
            mma_bf16(dx1[m][2 * n + 1], ds_a[m], rows[2], rows[3]);
          }
          if constexpr (kKeys) {
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

  if (args.rotations != nullptr) {
#pragma unroll
    for (int m = 0; m < kBlocks; ++m)
      turn_accumulator<D>(dx1[m], args.rotations, warp_x0 + m * 16 + g, 8, pair);
  }

  if (kKeys && args.partial != nullptr) {
    const int64_t size = int64_t{order.heads} / head_sets * args.t * x_stride;
    float* target = args.partial + head0 % group * 2 * size + x_offset;
#pragma unroll
    for (int m = 0; m < kBlocks; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int x = warp_x0 + m * 16 + g + 8 * half;
        if (x >= args.t) continue;
        float* row = target + x * x_stride + pair;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
          *reinterpret_cast<float2*>(row + n * 8) =
              make_float2(dx1[m][n][2 * half] * scale, dx1[m][n][2 * half + 1] * scale);
          if constexpr (kKeys)
            *reinterpret_cast<float2*>(row + size + n * 8) =
                make_float2(dx2[m][n][2 * half], dx2[m][n][2 * half + 1]);
        }
      }
    return;
  }

  // Every warp has left the last stage: its memory holds the results on their way out.
  __syncthreads();
  const float scales[2] = {scale, scale}, ones[2] = {1.0f, 1.0f};
  unsigned char* dx2_smem = smem + kRows * D * 2;
#pragma unroll
  for (int m = 0; m < kBlocks; ++m) {
    store_accumulator<D>(smem, dx1[m], scales, warp_row + m * 16, lane);
    if constexpr (kKeys) store_accumulator<D>(dx2_smem, dx2[m], ones, warp_row + m * 16, lane);
  }
  __syncwarp();
  store_tile<D, kWarpRows>((kKeys ? args.dk : args.dq) + x_offset, x_stride, warp_x0, args.t, smem,
                           warp_row, lane);
  if constexpr (kKeys)
    store_tile<D, kWarpRows>(args.dv + x_offset, x_stride, warp_x0, args.t, dx2_smem, warp_row,
                             lane);
}

// dk and dv = the sum over `count` query heads, in their order, of partial (count, 2, size).
__global__ void sum_heads_kernel(bf16* __restrict__ dk, bf16* __restrict__ dv,
                                 const float* __restrict__ partial, int64_t size, int count) {
  const int64_t i = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * 4;  // d is a multiple of 4
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

// What the backward of q (B, T, H, d) and k (B, T, K, d) takes.
struct BackwardPlan {
  BackwardArgs sizes{};
  bool split;           // each query head has its own sums of dk and dv
  int64_t terms_bytes;  // lse2, and delta
  int64_t partial_bytes;
  int64_t rotations;  // pairs; none without rotary positions
  int64_t hopper_bytes;

  BackwardPlan(const Shape& q, const Shape& k, const AttentionSpec& spec, bool rotary, bool hopper,
               int sms) {
    sizes.batch = checked_int(q[0]);
    sizes.t = checked_int(q[1]);
    sizes.heads = checked_int(q[2]);
    sizes.kv_heads = checked_int(k[2]);
    sizes.t_pad = ceil_div(sizes.t, kTermRows) * kTermRows;
    const int group = sizes.heads / sizes.kv_heads;
    // Two waves of blocks are enough to even out their lengths.
    split = group > 1 && int64_t{sizes.batch} * sizes.kv_heads * ceil_div(sizes.t, kRows) < 2 * sms;
    sizes.heads_per_item = split ? 1 : group;
    sizes.window = window_of(spec.window);
    sizes.ds_bytes = spec.ds_bytes;
    terms_bytes = int64_t{sizes.batch} * sizes.heads * sizes.t_pad * int64_t{sizeof(float)};
    partial_bytes = split ? group * 2 * engine::numel_of(k) * int64_t{sizeof(float)} : 0;
    rotations = rotary ? sizes.t_pad * q[3] / 2 : 0;
    hopper_bytes = hopper ? attention_backward_hopper_bytes(sizes, sms) : 0;
  }
  int64_t bytes() const {
    return 2 * terms_bytes + partial_bytes + rotations * int64_t{sizeof(float2)} + hopper_bytes;
  }
};

}  // namespace

int64_t CudaBackend::attention_backward_scratch(const Shape& q, const Shape& k,
                                                const AttentionSpec& spec) const {
  if (engine::numel_of(q) == 0) return 0;
  return BackwardPlan(q, k, spec, true, has_warpgroup_products(), properties_.multiProcessorCount)
      .bytes();
}

void CudaBackend::do_attention_backward(const Tensor& dq, const Tensor& dk, const Tensor& dv,
                                        const Tensor& dout, const Tensor& q, const Tensor& k,
                                        const Tensor& v, const Tensor& o, const Tensor& lse,
                                        const Tensor& inv_freq, const AttentionSpec& spec) {
  if (q.numel() == 0) return;
  BBB_ASSERT(aligned(dq, dk, dv, dout, q, k, v, o));
  const int sms = properties_.multiProcessorCount;
  const bool hopper = has_warpgroup_products();
  const BackwardPlan plan(q.shape(), k.shape(), spec, inv_freq.defined(), hopper, sms);
  const Tensor lse2 = scratch(plan.terms_bytes), delta = scratch(plan.terms_bytes);
  const Tensor rotations =
      plan.rotations > 0 ? scratch(plan.rotations * int64_t{sizeof(float2)}) : Tensor();
  const Tensor partial = plan.split ? scratch(plan.partial_bytes) : Tensor();
  BackwardArgs args = plan.sizes;
  args.dq = bf16_of(dq);
  args.dk = bf16_of(dk);
  args.dv = bf16_of(dv);
  args.partial = static_cast<float*>(partial.raw());
  args.q = bf16_of(q);
  args.k = bf16_of(k);
  args.v = bf16_of(v);
  args.dout = bf16_of(dout);
  args.lse2 = static_cast<const float*>(lse2.raw());
  args.delta = static_cast<const float*>(delta.raw());
  args.rotations = static_cast<const float2*>(rotations.raw());
  if (plan.rotations > 0) {
    constexpr int kRotationThreads = 256;
    launch(stream_, {blocks_for(plan.rotations, kRotationThreads, 1), kRotationThreads},
           rotations_kernel, static_cast<float2*>(rotations.raw()), inv_freq.data<float>(),
           plan.rotations, inv_freq.numel());
  }
  const auto run_side = [&](auto size, auto side) {
    constexpr int D = size;
    constexpr Side kSide = side;
    using Config = BackwardShape<D, kSide>;
    const int heads_per_item = kSide == Side::Keys ? args.heads_per_item : 1;
    const BlockOrder order(ceil_div(args.t, kRows), args.batch * args.heads / heads_per_item,
                           args.t * heads_per_item, D);
    launch(stream_, {order.blocks(), Config::kThreads, Config::kSmemBytes},
           attention_backward_kernel<D, kSide>, args, order);
  };
  with_head_size(q.dim(3), [&](auto size) {
    constexpr int D = size;
    constexpr int kTermThreads = 256;
    const int rows = checked_int(int64_t{args.batch} * args.heads * args.t_pad);
    launch(stream_, {static_cast<unsigned>(ceil_div(rows, kTermThreads / 16)), kTermThreads},
           attention_terms_kernel<D>, static_cast<float*>(lse2.raw()),
           static_cast<float*>(delta.raw()), lse.data<float>(), args.dout, bf16_of(o), rows, args.t,
           args.t_pad, args.heads);

    if (hopper) {
      const Tensor work = scratch(plan.hopper_bytes);
      attention_backward_hopper(stream_, args, D, sms, work.raw());
    } else {
      run_side(size, std::integral_constant<Side, Side::Keys>());
      run_side(size, std::integral_constant<Side, Side::Queries>());
    }
    if (plan.split) {
      constexpr unsigned kSumThreads = 256;
      const int64_t quads = k.numel() / 2;  // of dk and dv together
      launch(stream_, {static_cast<unsigned>((quads + kSumThreads - 1) / kSumThreads), kSumThreads},
             sum_heads_kernel, args.dk, args.dv, args.partial, k.numel(),
             args.heads / args.kv_heads);
    }
  });
}

}  // namespace bbb::cuda
