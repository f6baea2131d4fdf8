// Causal attention on Hopper (sm_90a), backward: cuda/attention_backward.cu's two passes on
// warpgroup products fed by the copy engine.
//
// An item is 128 rows x of one side, 64 a warpgroup, whose two tensors stay in shared memory; the
// rows y of the other side come in tiles through a ring:
//     side      x1  x2    y1  y2    s = x1 y1^T   t = x2 y2^T   sums
//     Queries   q   dout  k   v     q k^T         dout v^T      dq += ds y1
//     Keys      k   v     q   dout  k q^T         v dout^T      dk += ds^T y1, dv += p^T y2
// with p = 2^(s scale log2(e) - lse2) and ds = p (t - delta). Scores have x down and y across, so
// that p and ds rounded to bf16 are, in the registers where they are, the A operands of the sums.
// One resident block an SM takes items from a queue; the first warpgroup's first thread copies.
// While one warpgroup turns scores into ds the other's products run.
// Where gradients turn back by rotary positions, dx1 does so in its registers, in which columns c
// and c + d/2 are of one lane; an item reads its rows of the table from the L2 cache once.
// Deterministic: no item is split, and an item's sums run over its tiles in order.
#include "cuda/attention.h"
#include "cuda/hopper.h"
#include "cuda/mma.h"
#include "cuda/rotation.h"
#include "quant/launch.h"

namespace bbb::cuda {
namespace {

using quant::launch;

template <int D, Side kSide>
struct BackwardShape {
  static constexpr bool kKeys = kSide == Side::Keys;
  static constexpr int kWarpgroups = 2;  // that compute
  static constexpr int kThreads = kWarpgroup * (1 + kWarpgroups);
  static constexpr int kProducerRegisters = 40;
  static constexpr int kRegisters = 232;
  static constexpr int kRows = 64 * kWarpgroups;  // x of an item
  // y of a tile: two accumulators beside the scores leave room for no more.
  static constexpr int kTile = kKeys && D != 64 ? 64 : 128;
  static constexpr int kStages = kKeys ? 3 : 2;
  using X = Operand<D, kRows>;
  using Y = Operand<D, kTile>;
  static constexpr int kTermBytes = kKeys ? kTile * 4 : 0;  // lse2 or delta of a tile
  static constexpr int kYAt = 2 * X::kBytes;
  static constexpr int kTermsAt = kYAt + kStages * 2 * Y::kBytes;
  static constexpr int kBarriersAt = kTermsAt + kStages * 2 * kTermBytes;
  static constexpr int kItemAt = kBarriersAt + 8 * (2 + 2 * kStages);
  static constexpr int64_t kSmemBytes = 1024 + kItemAt + 8;
  static_assert(kSmemBytes <= 227 * 1024);
  static_assert(kTermRows % kRows == 0);  // whole items of rotations, too

  static constexpr int kStageBytes = 2 * Y::kBytes + 2 * kTermBytes;  // that one stage waits for
  __device__ static uint32_t y_at(uint32_t smem, int stage, int which) {
    return smem + kYAt + (2 * stage + which) * Y::kBytes;
  }
  __device__ static int terms_at(int stage, int which) {
    return kTermsAt + (2 * stage + which) * kTermBytes;
  }
  __device__ static uint32_t x_full(uint32_t smem) { return smem + kBarriersAt; }
  __device__ static uint32_t x_empty(uint32_t smem) { return smem + kBarriersAt + 8; }
  __device__ static uint32_t y_full(uint32_t smem, int s) {
    return smem + kBarriersAt + 16 + 8 * s;
  }
  __device__ static uint32_t y_empty(uint32_t smem, int s) { return y_full(smem, s + kStages); }
};

struct Item {
  int batch, head0;  // first query head
  int x_head, y_head0;
  int x0;
  int first_tile, tiles, steps;  // steps: tiles of every query head
};

template <int D, Side kSide>
__device__ inline Item find_item(const BackwardArgs& args, const BlockOrder& order, int index) {
  using Shape = BackwardShape<D, kSide>;
  constexpr bool kKeys = Shape::kKeys;
  // Early keys are seen by more queries, late queries see more keys.
  int rank, order_head;
  order.find(index, rank, order_head);
  const int head_sets = kKeys ? args.heads / args.heads_per_item : args.heads;
  Item item;
  item.x0 = (kKeys ? rank : order.tiles - 1 - rank) * Shape::kRows;
  item.batch = order_head / head_sets;
  item.head0 = order_head % head_sets * (kKeys ? args.heads_per_item : 1);
  const int kv_head = item.head0 / (args.heads / args.kv_heads);
  item.x_head = kKeys ? kv_head : item.head0;
  item.y_head0 = kKeys ? item.head0 : kv_head;
  const int x_last = min(item.x0 + Shape::kRows, args.t) - 1;
  const int y_first = kKeys ? item.x0 : max(0, item.x0 - args.window + 1);
  const int y_last = kKeys ? min(args.t - 1, x_last + args.window - 1) : x_last;
  item.first_tile = y_first / Shape::kTile;
  item.tiles = y_last / Shape::kTile + 1 - item.first_tile;
  item.steps = item.tiles * (kKeys ? args.heads_per_item : 1);
  return item;
}

// The copying thread.
template <int D, Side kSide>
__device__ inline void copy_items(const CUtensorMap& x1_map, const CUtensorMap& x2_map,
                                  const CUtensorMap& y1_map, const CUtensorMap& y2_map,
                                  const BackwardArgs& args, const BlockOrder& order,
                                  unsigned* queue, uint32_t smem) {
  using Shape = BackwardShape<D, kSide>;
  RingCursor<Shape::kStages> ring;
  int x_parity = 0;
  for (int index = static_cast<int>(blockIdx.x);; index = next_item(queue)) {
    mbarrier_wait(Shape::x_empty(smem), x_parity ^ 1);
    const bool more = index < static_cast<int>(order.blocks());
    store_shared(smem + Shape::kItemAt, more ? index : -1);
    const uint32_t x_full = Shape::x_full(smem);
    if (!more) return mbarrier_arrive(x_full);
    const Item item = find_item<D, kSide>(args, order, index);
    mbarrier_expect(x_full, 2 * Shape::X::kBytes);
    copy_tile<D, Shape::kRows>(smem, x1_map, x_full, item.x_head, item.x0, item.batch);
    copy_tile<D, Shape::kRows>(smem + Shape::X::kBytes, x2_map, x_full, item.x_head, item.x0,
                               item.batch);
    x_parity ^= 1;
    int head = 0, tile = item.first_tile;
    for (int step = 0; step < item.steps; ++step) {
      const int s = ring.stage, y0 = tile * Shape::kTile;
      const uint32_t full = Shape::y_full(smem, s);
      mbarrier_wait(Shape::y_empty(smem, s), ring.parity ^ 1);
      mbarrier_expect(full, Shape::kStageBytes);
      copy_tile<D, Shape::kTile>(Shape::y_at(smem, s, 0), y1_map, full, item.y_head0 + head, y0,
                                 item.batch);
      copy_tile<D, Shape::kTile>(Shape::y_at(smem, s, 1), y2_map, full, item.y_head0 + head, y0,
                                 item.batch);
      if constexpr (Shape::kKeys) {
        const int64_t at = (int64_t{item.batch} * args.heads + item.head0 + head) * args.t_pad + y0;
        copy_bytes(smem + Shape::terms_at(s, 0), args.lse2 + at, Shape::kTermBytes, full);
        copy_bytes(smem + Shape::terms_at(s, 1), args.delta + at, Shape::kTermBytes, full);
      }
      ring.advance();
      if (++tile == item.first_tile + item.tiles) {
        tile = item.first_tile;
        ++head;
      }
    }
  }
}

// One of the computing warpgroups, `own` counted from 0.
template <int D, Side kSide>
__device__ inline void differentiate_items(const CUtensorMap& dx1_map, const CUtensorMap& dx2_map,
                                           const BackwardArgs& args, const BlockOrder& order,
                                           unsigned char* memory, uint32_t smem, int own) {
  using Shape = BackwardShape<D, kSide>;
  using X = typename Shape::X;
  using Y = typename Shape::Y;
  constexpr bool kKeys = Shape::kKeys;
  constexpr int kTile = Shape::kTile;
  constexpr int kOwn = 1;  // named barriers
  const int thread = threadIdx.x % kWarpgroup;
  const int lane = thread % 32;
  const int g = lane / 4;
  const int pair = lane % 4 * 2;
  const int local_row = thread / 32 * 16 + g;  // this lane's rows: local_row and local_row + 8
  const float scale = rsqrtf(static_cast<float>(D));
  const float scale_log2 = scale * kLog2E;
  const uint64_t x1 = X::template descriptor<Along::Columns>(smem, own * 64);
  const uint64_t x2 = X::template descriptor<Along::Columns>(smem + X::kBytes, own * 64);

  RingCursor<Shape::kStages> ring;
  int x_parity = 0;
  while (true) {
    mbarrier_wait(Shape::x_full(smem), x_parity);
    x_parity ^= 1;
    const int index = load_shared(smem + Shape::kItemAt);
    if (index < 0) break;
    const Item item = find_item<D, kSide>(args, order, index);
    const int own_x0 = item.x0 + own * 64;

    float dx1[D / 8][4], dx2[kKeys ? D / 8 : 1][4];
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        dx1[n][i] = 0.0f;
        if constexpr (kKeys) dx2[n][i] = 0.0f;
      }
    float x_lse2[2] = {}, x_delta[2] = {};  // Queries: of this lane's rows
    if constexpr (!kKeys) {
      const int64_t at =
          (int64_t{item.batch} * args.heads + item.head0) * args.t_pad + own_x0 + local_row;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        x_lse2[half] = args.lse2[at + 8 * half];
        x_delta[half] = args.delta[at + 8 * half];
      }
    }

    // The tile in work, and the one after it.
    float s[kTile / 8][4], ds[kTile / 8][4];
    int step = 0, tile = item.first_tile, stage = 0, y0 = 0;
    const auto release = [&](int left) {
      if (lane == 0) mbarrier_arrive(Shape::y_empty(smem, left));
    };
    // Distances i - j from key j to query i within the warpgroup's scores.
    const auto least = [&] { return kKeys ? y0 - (own_x0 + 63) : own_x0 - (y0 + kTile - 1); };
    const auto greatest = [&] { return kKeys ? y0 + kTile - 1 - own_x0 : own_x0 + 63 - y0; };
    // Moves stage and y0 to the next tile that this warpgroup sees, past those that it does not.
    // Between two of them lies at most one (at the end of a window or the start of a head, on the
    // side of the keys), so that the ring has a stage for it while the one before is still held.
    const auto find_tile = [&] {
      while (step < item.steps) {
        stage = ring.stage;
        y0 = tile * kTile;
        mbarrier_wait(Shape::y_full(smem, stage), ring.parity);
        ring.advance();
        ++step;
        if (++tile == item.first_tile + item.tiles) tile = item.first_tile;
        if (greatest() >= 0 && least() < args.window) return true;
        // Rows behind the text may see none. They take the last, masked.
        if (own_x0 >= args.t && step == item.steps) return true;
        release(stage);
      }
      return false;
    };
    // a b^T, left in flight.
    const auto start_scores = [&](float(&scores)[kTile / 8][4], uint64_t x, int which) {
      const uint64_t y = Y::template descriptor<Along::Columns>(Shape::y_at(smem, stage, which));
      accumulator_fence(scores);
      wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < D / 16; ++kk)
        wgmma<Along::Columns>(scores, x + X::template slice_offset<Along::Columns>(kk),
                              y + Y::template slice_offset<Along::Columns>(kk), kk != 0);
      wgmma_commit();
    };

    find_tile();  // there is one: the diagonal's, or the last
    start_scores(s, x1, 0);
    while (true) {
      start_scores(ds, x2, 1);

      // s becomes p.
      wgmma_wait<1>();
      accumulator_fence(s);
      const float* lse2 = reinterpret_cast<const float*>(memory + Shape::terms_at(stage, 0));
      const float* delta = reinterpret_cast<const float*>(memory + Shape::terms_at(stage, 1));
#pragma unroll
      for (int n = 0; n < kTile / 8; ++n) {
        float2 across = {};
        if constexpr (kKeys) across = *reinterpret_cast<const float2*>(lse2 + n * 8 + pair);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float base = kKeys ? (i % 2 == 0 ? across.x : across.y) : x_lse2[i / 2];
          s[n][i] = exp2_approx(fmaf(s[n][i], scale_log2, -base));
        }
      }
      if (least() < 0 || greatest() >= args.window) {
        const int corner = y0 + pair - (own_x0 + local_row);
#pragma unroll
        for (int n = 0; n < kTile / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int ahead = corner + n * 8 + i % 2 - i / 2 * 8;
            const int distance = kKeys ? ahead : -ahead;
            if (static_cast<unsigned>(distance) >= static_cast<unsigned>(args.window))
              s[n][i] = 0.0f;
          }
      }

      // ds, until now t, becomes ds; both are rounded for the sums.
      wgmma_wait<0>();
      accumulator_fence(ds);
      uint32_t p_a[kKeys ? kTile / 16 : 1][4], ds_a[kTile / 16][4];
#pragma unroll
      for (int n = 0; n < kTile / 8; ++n) {
        float2 across = {};
        if constexpr (kKeys) across = *reinterpret_cast<const float2*>(delta + n * 8 + pair);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float base = kKeys ? (i % 2 == 0 ? across.x : across.y) : x_delta[i / 2];
          ds[n][i] = s[n][i] * (ds[n][i] - base);
        }
        if (n % 2 == 1) {
          if constexpr (kKeys) pack_a(p_a[n / 2], s[n - 1], s[n]);
          pack_a(ds_a[n / 2], ds[n - 1], ds[n]);
        }
      }

      const uint64_t y1 = Y::template descriptor<Along::Rows>(Shape::y_at(smem, stage, 0));
      const uint64_t y2 = Y::template descriptor<Along::Rows>(Shape::y_at(smem, stage, 1));
      accumulator_fence(dx1);
      if constexpr (kKeys) accumulator_fence(dx2);
      wgmma_fence();
      if constexpr (kKeys) {
#pragma unroll
        for (int kk = 0; kk < kTile / 16; ++kk)
          wgmma<Along::Rows>(dx2, p_a[kk], y2 + Y::template slice_offset<Along::Rows>(kk), 1);
      }
#pragma unroll
      for (int kk = 0; kk < kTile / 16; ++kk)
        wgmma<Along::Rows>(dx1, ds_a[kk], y1 + Y::template slice_offset<Along::Rows>(kk), 1);
      wgmma_commit();

      // The next tile's scores queue up behind the sums.
      const int left = stage;
      if (!find_tile()) {
        wgmma_wait<0>();
        accumulator_fence(dx1);
        if constexpr (kKeys) accumulator_fence(dx2);
        release(left);
        break;
      }
      start_scores(s, x1, 0);
      wgmma_wait<1>();
      accumulator_fence(dx1);
      if constexpr (kKeys) accumulator_fence(dx2);
      release(left);
    }

    if (args.rotations != nullptr)
      turn_accumulator<D>(dx1, args.rotations, own_x0 + local_row, pair);

    if (kKeys && args.partial != nullptr) {
      const int64_t x_stride = int64_t{args.kv_heads} * D;
      const int64_t size = int64_t{args.batch} * args.t * x_stride;
      float* target = args.partial + item.head0 % (args.heads / args.kv_heads) * 2 * size +
                      int64_t{item.batch} * args.t * x_stride + item.x_head * D;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int x = own_x0 + local_row + 8 * half;
        if (x >= args.t) continue;
        float* row = target + x * x_stride + pair;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
          *reinterpret_cast<float2*>(row + n * 8) =
              make_float2(dx1[n][2 * half] * scale, dx1[n][2 * half + 1] * scale);
          if constexpr (kKeys)
            *reinterpret_cast<float2*>(row + size + n * 8) =
                make_float2(dx2[n][2 * half], dx2[n][2 * half + 1]);
        }
      }
      named_sync(kOwn + own, kWarpgroup);
      if (thread == 0) mbarrier_arrive(Shape::x_empty(smem));
      continue;
    }

    // The results leave through the rows x of this warpgroup, which no product reads any more.
    named_sync(kOwn + own, kWarpgroup);
    const auto stage_results = [&](const float(&dx)[D / 8][4], float factor, int at) {
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          *reinterpret_cast<uint32_t*>(
              memory + at + X::chunk_offset(own * 64 + local_row + 8 * half, n) + pair * 2) =
              pack_bf16(dx[n][2 * half] * factor, dx[n][2 * half + 1] * factor);
    };
    stage_results(dx1, scale, 0);
    if constexpr (kKeys) stage_results(dx2, 1.0f, X::kBytes);
    async_proxy_fence();
    named_sync(kOwn + own, kWarpgroup);
    if (thread == 0) {
      if (own_x0 < args.t) {
        constexpr int kRowBytes = PanelShape<D>::kRowBytes;
#pragma unroll
        for (int panel = 0; panel < PanelShape<D>::kPanels; ++panel) {
          const uint32_t at = smem + panel * X::kPanelBytes + own * 64 * kRowBytes;
          const int column = panel * PanelShape<D>::kColumns;
          store_box(dx1_map, at, column, item.x_head, own_x0, item.batch);
          if constexpr (kKeys)
            store_box(dx2_map, at + X::kBytes, column, item.x_head, own_x0, item.batch);
        }
        store_commit();
        store_wait_read();
      }
      mbarrier_arrive(Shape::x_empty(smem));
    }
  }
}

template <int D, Side kSide>
__global__ __launch_bounds__(
    BackwardShape<D, kSide>::kThreads,
    1) void attention_backward_hopper_kernel(const __grid_constant__ CUtensorMap dx1_map,
                                             const __grid_constant__ CUtensorMap dx2_map,
                                             const __grid_constant__ CUtensorMap x1_map,
                                             const __grid_constant__ CUtensorMap x2_map,
                                             const __grid_constant__ CUtensorMap y1_map,
                                             const __grid_constant__ CUtensorMap y2_map,
                                             const __grid_constant__ BackwardArgs args,
                                             const __grid_constant__ BlockOrder order,
                                             unsigned* __restrict__ queue) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Shape = BackwardShape<D, kSide>;
  unsigned char* memory = swizzled_smem();
  const uint32_t smem = shared_address(memory);
  if (threadIdx.x == 0) {
    mbarrier_init(Shape::x_full(smem), 1);
    mbarrier_init(Shape::x_empty(smem), Shape::kWarpgroups);
    for (int s = 0; s < Shape::kStages; ++s) {
      mbarrier_init(Shape::y_full(smem, s), 1);
      mbarrier_init(Shape::y_empty(smem, s), 4 * Shape::kWarpgroups);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    registers_down<Shape::kProducerRegisters>();
    if (threadIdx.x == 0)
      copy_items<D, kSide>(x1_map, x2_map, y1_map, y2_map, args, order, queue, smem);
  } else {
    registers_up<Shape::kRegisters>();
    differentiate_items<D, kSide>(dx1_map, dx2_map, args, order, memory, smem,
                                  static_cast<int>(threadIdx.x) / kWarpgroup - 1);
  }
#endif
}

template <int D, Side kSide>
void launch_side(cudaStream_t stream, const BackwardArgs& args, int sms, unsigned* queue) {
  using Shape = BackwardShape<D, kSide>;
  constexpr bool kKeys = Shape::kKeys;
  const int tiles = ceil_div(args.t, Shape::kRows);
  const int heads_per_item = kKeys ? args.heads_per_item : 1;
  const BlockOrder order(tiles, args.batch * args.heads / heads_per_item, args.t * heads_per_item,
                         D);
  const auto queries = [&](const __nv_bfloat16* x, int rows) {
    return panel_map<D>(x, args.batch, args.t, args.heads, rows);
  };
  const auto keys = [&](const __nv_bfloat16* x, int rows) {
    return panel_map<D>(x, args.batch, args.t, args.kv_heads, rows);
  };
  constexpr int kRows = Shape::kRows, kTile = Shape::kTile;
  const CUtensorMap dx1 = kKeys ? keys(args.dx1, 64) : queries(args.dx1, 64);
  const CUtensorMap dx2 = kKeys ? keys(args.dx2, 64) : dx1;
  const CUtensorMap x1 = kKeys ? keys(args.k, kRows) : queries(args.q, kRows);
  const CUtensorMap x2 = kKeys ? keys(args.v, kRows) : queries(args.dout, kRows);
  const CUtensorMap y1 = kKeys ? queries(args.q, kTile) : keys(args.k, kTile);
  const CUtensorMap y2 = kKeys ? queries(args.dout, kTile) : keys(args.v, kTile);
  BBB_CUDA(cudaMemsetAsync(queue, 0, sizeof *queue, stream));
  launch(stream,
         {std::min(order.blocks(), static_cast<unsigned>(sms)), Shape::kThreads, Shape::kSmemBytes},
         attention_backward_hopper_kernel<D, kSide>, dx1, dx2, x1, x2, y1, y2, args, order, queue);
}

}  // namespace

void attention_backward_hopper(cudaStream_t stream, const BackwardArgs& args, Side side, int64_t d,
                               int sms, unsigned* queue) {
  with_head_size(d, [&](auto size) {
    if (side == Side::Keys)
      launch_side<size, Side::Keys>(stream, args, sms, queue);
    else
      launch_side<size, Side::Queries>(stream, args, sms, queue);
  });
}

}  // namespace bbb::cuda
