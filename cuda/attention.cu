// Causal attention, forward: o = softmax(q k^T / sqrt(d)) v and lse = log sum exp of the scores,
// by the online softmax of FlashAttention-2 (Dao, 2023).
//
// Shapes: q, o (B, T, H, d); k, v (B, Tmax, K, d); lse (B, H, T). Query t is at position start + t.
// Thread mapping: one block of 4 warps computes 128 queries of one head, 32 a warp. Keys and values
// come in tiles of 64, double-buffered by cp.async. Where d is over 128, all three numbers are
// halved. A warp keeps its scores, row maximum, row sum and output in registers. Only tiles that
// cross the diagonal, the window's edge or a first key are masked; a block and a warp skip tiles
// that they do not see. First keys do not fall: those of a block's first and last row bound all.
// Bytes: q, o, lse once; k, v once for each query tile, mostly from the L2 cache (BlockOrder).
// Saves lse for the backward pass; no T x T memory.
#include "cuda/attention.h"
#include "cuda/cuda_backend.h"
#include "cuda/mma.h"
#include "cuda/vector.h"

namespace bbb::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;

// Registers limit the queries of a warp; the 99 KB of sm_86 and sm_89 limit those of a block.
template <int D>
struct ForwardShape {
  static constexpr int kBlocks = D <= 128 ? 2 : 1;  // of 16 queries, a warp
  static constexpr int kWarpRows = 16 * kBlocks;
  static constexpr int kRows = kWarpRows * kWarps;   // queries of a block
  static constexpr int kKeys = D <= 128 ? 64 : 32;   // keys of a tile
  static constexpr int kSub = D == 64 ? kKeys : 32;  // keys whose scores a warp holds at a time
  static constexpr int64_t kSmemBytes = (kRows + 4 * kKeys) * D * 2;
};

template <int D, Mask kMask>
__global__ __launch_bounds__(kThreads, 2) void attention_forward_kernel(const ForwardArgs args,
                                                                        const BlockOrder order) {
  // Larger heads have no registers left for the queries: each tile loads their fragments again.
  constexpr bool kQueriesInRegisters = D == 64;
  constexpr bool kDocuments = kMask == Mask::Documents;
  using Shape = ForwardShape<D>;
  constexpr int kBlocks = Shape::kBlocks, kWarpRows = Shape::kWarpRows, kRows = Shape::kRows;
  constexpr int kKeys = Shape::kKeys, kSub = Shape::kSub;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int g = lane / 4;
  const int pair = lane % 4 * 2;  // column of a C fragment's first value

  int rank, head_index;
  order.find(blockIdx.x, rank, head_index);
  const int row0 = (order.tiles - 1 - rank) * kRows;  // later queries see more keys
  const int b = head_index / args.heads;
  const int h = head_index % args.heads;
  const int start = args.start == nullptr ? 0 : args.start[b];
  const int key_count = min(start + args.t, args.t_max);

  const int d = args.d;
  const int64_t q_stride = int64_t{args.heads} * d;
  const int64_t kv_stride = int64_t{args.kv_heads} * d;
  const int64_t q_offset = b * args.t * q_stride + h * d;
  const int64_t kv_offset = b * args.t_max * kv_stride + h / (args.heads / args.kv_heads) * d;
  const __nv_bfloat16* k = args.k + kv_offset;
  const __nv_bfloat16* v = args.v + kv_offset;

  unsigned char* smem = reinterpret_cast<unsigned char*>(dynamic_smem());
  const SmemTile<D> q_tile{shared_address(smem)};
  const auto k_tile = [&](int stage) {
    return SmemTile<D>{q_tile.base + (kRows + 2 * stage * kKeys) * D * 2};
  };
  const auto v_tile = [&](int stage) {
    return SmemTile<D>{q_tile.base + (kRows + (2 * stage + 1) * kKeys) * D * 2};
  };
  const auto load_keys = [&](int tile, int stage) {
    const int key0 = recomputed(tile * kKeys);
    const int thread = recomputed(threadIdx.x);
    load_tile_async<D, kKeys, kThreads>(k_tile(stage), k, kv_stride, key0, key_count, d, thread);
    load_tile_async<D, kKeys, kThreads>(v_tile(stage), v, kv_stride, key0, key_count, d, thread);
    cp_async_commit();
  };

  const int last_row = min(row0 + kRows, args.t) - 1;
  const auto first_key = [&](int row) {
    return args.first_key[int64_t{b} * args.t + min(row, args.t - 1)];
  };
  int first = max(0, start + row0 - args.window + 1);
  if constexpr (kDocuments) first = max(first, first_key(row0));
  const int first_tile = first / kKeys;
  const int tile_end = (start + last_row) / kKeys + 1;
  load_tile_async<D, kRows, kThreads>(q_tile, args.q + q_offset, q_stride, row0, args.t, d,
                                      threadIdx.x);
  load_keys(first_tile, 0);

  const int warp_row = warp * kWarpRows;
  const int first_position = start + row0 + warp_row;
  const int last_position = first_position + kWarpRows - 1;
  // Documents: the first keys of the warp's first and last row, and of this lane's.
  int warp_first = 0, warp_last = 0, lane_first[kBlocks][2];
  if constexpr (kDocuments) {
    warp_first = first_key(row0 + warp_row);
    warp_last = first_key(row0 + warp_row + kWarpRows - 1);
#pragma unroll
    for (int m = 0; m < kBlocks; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        lane_first[m][half] = first_key(row0 + warp_row + m * 16 + g + 8 * half);
  }
  const float scale = score_scale(d);
  const float scale_log2 = scale * kLog2E;

  float acc[kBlocks][D / 8][4] = {};
  float row_max[kBlocks][2], row_sum[kBlocks][2];  // of raw scores; of this lane's terms
#pragma unroll
  for (int m = 0; m < kBlocks; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      row_max[m][half] = -INFINITY;
      row_sum[m][half] = 0.0f;
    }
  uint32_t queries[kQueriesInRegisters ? kBlocks : 1][D / 16][4];

  for (int tile = first_tile; tile < tile_end; ++tile) {
    // After the barrier every warp sees this tile, and none reads the previous one, whose buffer
    // the next tile overwrites.
    cp_async_wait<0>();
    __syncthreads();
    const int stage = (tile - first_tile) & 1;
    if (tile + 1 < tile_end) load_keys(tile + 1, stage ^ 1);
    if constexpr (kQueriesInRegisters) {
      if (tile == first_tile) {
#pragma unroll
        for (int m = 0; m < kBlocks; ++m)
#pragma unroll
          for (int kk = 0; kk < D / 16; ++kk)
            load_a(queries[m][kk], q_tile, warp_row + m * 16, kk * 16, lane);
      }
    }
#pragma unroll 1
    for (int sub = 0; sub < kKeys; sub += kSub) {
      const int key0 = tile * kKeys + sub;
      if (row0 + warp_row >= args.t || key0 > last_position ||
          first_position - (key0 + kSub - 1) >= args.window)
        continue;
      if (kDocuments && key0 + kSub - 1 < warp_first) continue;

      // s = q k^T
      float s[kBlocks][kSub / 8][4] = {};
#pragma unroll
      for (int kk = 0; kk < D / 16; ++kk) {
        uint32_t a[kBlocks][4];
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) {
          if constexpr (kQueriesInRegisters) {
#pragma unroll
            for (int i = 0; i < 4; ++i) a[m][i] = queries[m][kk][i];
          } else {
            load_a(a[m], q_tile, warp_row + m * 16, kk * 16, lane);
          }
        }
#pragma unroll
        for (int n = 0; n < kSub / 16; ++n) {
          uint32_t keys[4];
          load_b(keys, k_tile(stage), sub + n * 16, kk * 16, lane);
#pragma unroll
          for (int m = 0; m < kBlocks; ++m) {
            mma_bf16(s[m][2 * n], a[m], keys[0], keys[1]);
            mma_bf16(s[m][2 * n + 1], a[m], keys[2], keys[3]);
          }
        }
      }

      if (key0 + kSub - 1 > first_position || last_position - key0 >= args.window ||
          (kDocuments && key0 < warp_last)) {
#pragma unroll
        for (int m = 0; m < kBlocks; ++m)
#pragma unroll
          for (int n = 0; n < kSub / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int position = first_position + m * 16 + g + i / 2 * 8;
              const int key = key0 + n * 8 + pair + i % 2;
              if (static_cast<unsigned>(position - key) >= static_cast<unsigned>(args.window) ||
                  (kDocuments && key < lane_first[m][i / 2]))
                s[m][n][i] = -INFINITY;
            }
      }

      // p = exp(s - max); earlier sums are rescaled to the new maximum.
#pragma unroll
      for (int m = 0; m < kBlocks; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float maximum = row_max[m][half];
#pragma unroll
          for (int n = 0; n < kSub / 8; ++n)
            maximum = fmaxf(maximum, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
          maximum = quad_max(maximum);
          // A row without a visible key so far: any finite base makes its terms 0.
          const float base = maximum == -INFINITY ? 0.0f : maximum * scale_log2;
          const float correction = exp2_approx(row_max[m][half] * scale_log2 - base);
          row_max[m][half] = maximum;
          float sum = row_sum[m][half] * correction;
#pragma unroll
          for (int n = 0; n < kSub / 8; ++n)
#pragma unroll
            for (int i = 2 * half; i < 2 * half + 2; ++i) {
              s[m][n][i] = exp2_approx(s[m][n][i] * scale_log2 - base);
              sum += s[m][n][i];
            }
          row_sum[m][half] = sum;
          if (__any_sync(0xffffffffu, correction != 1.0f)) {
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
              acc[m][n][2 * half] *= correction;
              acc[m][n][2 * half + 1] *= correction;
            }
          }
        }

        // o += p v
#pragma unroll
      for (int kk = 0; kk < kSub / 16; ++kk) {
        uint32_t p[kBlocks][4];
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) pack_a(p[m], s[m][2 * kk], s[m][2 * kk + 1]);
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {
          uint32_t values[4];
          load_b_rows(values, v_tile(stage), sub + kk * 16, n * 16, lane);
#pragma unroll
          for (int m = 0; m < kBlocks; ++m) {
            mma_bf16(acc[m][2 * n], p[m], values[0], values[1]);
            mma_bf16(acc[m][2 * n + 1], p[m], values[2], values[3]);
          }
        }
      }
    }
  }

  // A warp reads and writes only its own rows of the query tile: no block barrier is needed.
  __syncwarp();
#pragma unroll
  for (int m = 0; m < kBlocks; ++m) {
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = quad_sum(row_sum[m][half]);
      inverse[half] = 1.0f / sum;
      const int row = row0 + warp_row + m * 16 + g + 8 * half;
      if (args.lse != nullptr && pair == 0 && row < args.t)
        args.lse[int64_t{head_index} * args.t + row] = row_max[m][half] * scale + logf(sum);
    }
    store_accumulator<D>(smem, acc[m], inverse, warp_row + m * 16, lane);
  }
  __syncwarp();
  store_tile<D, kWarpRows>(args.o + q_offset, q_stride, row0 + warp_row, args.t, d, smem, warp_row,
                           lane);
}

}  // namespace

void attention_forward(cudaStream_t stream, const ForwardArgs& args) {
  with_padded_head_size(args.d, [&](auto size) {
    constexpr int D = size;
    using Shape = ForwardShape<D>;
    const BlockOrder order(ceil_div(args.t, Shape::kRows), args.batch * args.heads,
                           args.start == nullptr ? args.t : args.t_max, args.d);
    launch(stream, {order.blocks(), kThreads, Shape::kSmemBytes},
           args.first_key == nullptr ? attention_forward_kernel<D, Mask::Window>
                                     : attention_forward_kernel<D, Mask::Documents>,
           args, order);
  });
}

void CudaBackend::check_head_size(int64_t d) const {
  BBB_CHECK(has_head_size(d), "attention on the GPU takes head sizes that are multiples of ",
            kChunk, " up to ", kLargestHead, ", not ", d, " (try --device cpu)");
}

void CudaBackend::do_attention(const Tensor& o, const Tensor& lse, const Tensor& q, const Tensor& k,
                               const Tensor& v, const AttentionSpec& spec, const Tensor& scratch) {
  BBB_ASSERT(aligned(o, q, k, v));
  const int t = checked_int(q.dim(1));
  const ForwardArgs args{bf16_of(o),
                         lse.data<float>(),
                         bf16_of(q),
                         bf16_of(k),
                         bf16_of(v),
                         nullptr,
                         checked_int(q.dim(0)),
                         t,
                         t,
                         checked_int(q.dim(2)),
                         checked_int(k.dim(2)),
                         checked_int(q.dim(3)),
                         window_of(spec.window),
                         spec.first_key.defined() ? spec.first_key.data<int>() : nullptr};
  if (has_warpgroup_products() && has_hopper_head_size(args.d)) {
    attention_forward_hopper(stream_, args, args.d, properties_.multiProcessorCount,
                             static_cast<unsigned*>(scratch.raw()));
  } else {
    attention_forward(stream_, args);
  }
}

}  // namespace bbb::cuda
