// Causal attention on Hopper (sm_90a), forward: o = softmax(q k^T / sqrt(d)) v and lse, by the
// online softmax of FlashAttention-2 (Dao, 2023) on warpgroup products fed by the copy engine. The
// two products and the softmax overlap as in FlashAttention-3 (Shah et al., 2024).
//
// Shapes: q, o (B, T, H, d); k, v (B, T, K, d), or caches (B, Tmax, K, d), of which query t of
// sequence b is at position start[b] + t; lse (B, H, T).
// Thread mapping: one resident block per SM takes items from a queue. An item is 128 queries of one
// head (192 for head size 64). The first thread of the first warpgroup copies the queries, and keys
// and values in tiles of 128 through a ring. Each other warpgroup computes 64 queries. Its n-th
// step, where s(n) = q k(n)^T of its n-th tile:
//     take turn | issue s(n) | issue o += p(n-1) v(n-1) | pass turn | wait for s(n) |
//     p(n) = softmax of s(n), o's product still running | wait for o, rescale o
// The warpgroups take turns at issuing products, so that the softmax of one overlaps the products
// of another. The copies for the next item overlap the end of this one. Tiles run from the diagonal
// down to the window's edge, or to the first key of the item's first query; only tiles that cross
// one of them are masked.
// A cache may hold anything past its last key. p = 0 would not hide a NaN there, so the warpgroups
// first overwrite those values with zeros in shared memory.
// Bytes: q, o, lse once; k, v once for each query tile, mostly from the L2 cache (BlockOrder).
// Saves lse for the backward pass; no T x T memory.
//
// Order of the accesses to shared memory. Line one: a write, then its reads. Line two: these reads,
// then the next write. full, empty: mbarriers; an arrival releases, a wait acquires.
//   item index     copying thread writes, arrives at q_full; lane 0 of each warp waits, reads
//                  that lane arrives at q_empty; copying thread waits, writes
//   q, k, v        copy engine writes, completes the bytes of full; all threads wait, wgmma reads
//                  wgmma_wait returns; each warp arrives at empty; copying thread waits, copies
//   cleared v      after that wait: threads write, async_proxy_fence, barrier kOwn; wgmma reads
//   output         threads write, async_proxy_fence, barrier kOwn; thread 0 stores, engine reads
//                  store_wait_read returns in thread 0, barrier kOwn; threads write
#include "cuda/attention.h"
#include "cuda/hopper.h"
#include "cuda/mma.h"
#include "quant/launch.h"

namespace bbb::cuda {
namespace {

using quant::launch;

template <int D>
struct ForwardShape {
  static constexpr int kWarpgroups = D == 64 ? 3 : 2;  // that compute
  static constexpr int kThreads = kWarpgroup * (1 + kWarpgroups);
  static constexpr int kProducerRegisters = kWarpgroups == 3 ? 32 : 24;
  static constexpr int kRegisters = kWarpgroups == 3 ? 160 : 240;
  static constexpr int kRows = 64 * kWarpgroups;  // queries of an item
  static constexpr int kKeys = 128;               // keys of a tile
  static constexpr int kStages = 2;
  using Queries = Operand<D, kRows>;
  using Keys = Operand<D, kKeys>;
  using Output = Operand<D, 64>;  // of one warpgroup
  static constexpr int kKeysAt = Queries::kBytes;
  static constexpr int kValuesAt = kKeysAt + kStages * Keys::kBytes;
  static constexpr int kOutputAt = kValuesAt + kStages * Keys::kBytes;
  static constexpr int kBarriersAt = kOutputAt + kWarpgroups * Output::kBytes;
  static constexpr int kItemAt = kBarriersAt + 8 * (2 + 4 * kStages);  // int: the item index
  static constexpr int64_t kSmemBytes = 1024 + kItemAt + 8;
  static_assert(kSmemBytes <= 227 * 1024);
};

// What keys and values are: those of the T queries, or a cache.
enum class Source { Queries, Cache };

// One head's tile of queries, and the tiles of keys that it sees.
struct Item {
  int batch, head, kv_head;
  int row0, position0;  // the first query's row and position
  int key_count;        // of the sequence
  int first_tile, last_tile;
};

template <int D, Source kSource, Mask kMask>
__device__ inline Item find_item(const ForwardArgs& args, const BlockOrder& order, int index) {
  using Shape = ForwardShape<D>;
  int rank, head_index;
  order.find(index, rank, head_index);
  Item item;
  item.row0 = (order.tiles - 1 - rank) * Shape::kRows;  // later queries see more keys
  item.batch = head_index / args.heads;
  item.head = head_index % args.heads;
  item.kv_head = item.head / (args.heads / args.kv_heads);
  // check_positions reports a start outside of the cache; here it must only end.
  const int start =
      kSource == Source::Cache ? max(0, min(args.start[item.batch], args.t_max - args.t)) : 0;
  item.position0 = start + item.row0;
  item.key_count = start + args.t;
  int first = max(0, item.position0 - args.window + 1);
  if constexpr (kMask == Mask::Documents)
    first = max(first, args.first_key[int64_t{item.batch} * args.t + item.row0]);
  item.first_tile = first / Shape::kKeys;
  item.last_tile = (min(item.position0 + Shape::kRows, item.key_count) - 1) / Shape::kKeys;
  return item;
}

template <int D>
struct ForwardBarriers {
  uint32_t base;
  __device__ uint32_t q_full() const { return base; }
  __device__ uint32_t q_empty() const { return base + 8; }
  __device__ uint32_t k_full(int s) const { return base + 16 + 8 * s; }
  __device__ uint32_t k_empty(int s) const { return k_full(s + ForwardShape<D>::kStages); }
  __device__ uint32_t v_full(int s) const { return k_full(s + 2 * ForwardShape<D>::kStages); }
  __device__ uint32_t v_empty(int s) const { return k_full(s + 3 * ForwardShape<D>::kStages); }
};

// The copying thread. For each item it copies the queries, then the tiles from last to first.
template <int D, Source kSource, Mask kMask>
__device__ inline void copy_items(const CUtensorMap& q_map, const CUtensorMap& k_map,
                                  const CUtensorMap& v_map, const ForwardArgs& args,
                                  const BlockOrder& order, unsigned* queue, uint32_t smem) {
  using Shape = ForwardShape<D>;
  const ForwardBarriers<D> barriers{smem + Shape::kBarriersAt};
  RingCursor<Shape::kStages> ring;
  int q_parity = 0;
  for (int index = static_cast<int>(blockIdx.x);; index = next_item(queue)) {
    mbarrier_wait(barriers.q_empty(), q_parity ^ 1);
    const bool more = index < static_cast<int>(order.blocks());
    store_shared(smem + Shape::kItemAt, more ? index : -1);
    if (!more) return mbarrier_arrive(barriers.q_full());
    const Item item = find_item<D, kSource, kMask>(args, order, index);
    mbarrier_expect(barriers.q_full(), Shape::Queries::kBytes);
    copy_tile<D, Shape::kRows>(smem, q_map, barriers.q_full(), item.head, item.row0, item.batch);
    q_parity ^= 1;
    for (int tile = item.last_tile; tile >= item.first_tile; --tile) {
      const int s = ring.stage, key0 = tile * Shape::kKeys;
      mbarrier_wait(barriers.k_empty(s), ring.parity ^ 1);
      mbarrier_expect(barriers.k_full(s), Shape::Keys::kBytes);
      copy_tile<D, Shape::kKeys>(smem + Shape::kKeysAt + s * Shape::Keys::kBytes, k_map,
                                 barriers.k_full(s), item.kv_head, key0, item.batch);
      mbarrier_wait(barriers.v_empty(s), ring.parity ^ 1);
      mbarrier_expect(barriers.v_full(s), Shape::Keys::kBytes);
      copy_tile<D, Shape::kKeys>(smem + Shape::kValuesAt + s * Shape::Keys::kBytes, v_map,
                                 barriers.v_full(s), item.kv_head, key0, item.batch);
      ring.advance();
    }
  }
}

// One computing warpgroup; `own` is its index among them.
template <int D, Source kSource, Mask kMask>
__device__ inline void attend_items(const CUtensorMap& o_map, const ForwardArgs& args,
                                    const BlockOrder& order, unsigned char* memory, uint32_t smem,
                                    int own) {
  using Shape = ForwardShape<D>;
  using Queries = typename Shape::Queries;
  using Keys = typename Shape::Keys;
  using Output = typename Shape::Output;
  constexpr int kKeys = Shape::kKeys;
  constexpr int kTurn = 1, kOwn = kTurn + Shape::kWarpgroups;  // named barriers
  const ForwardBarriers<D> barriers{smem + Shape::kBarriersAt};
  const int thread = threadIdx.x % kWarpgroup;
  const int lane = thread % 32;
  const int g = lane / 4;
  const int pair = lane % 4 * 2;
  const int local_row = thread / 32 * 16 + g;  // this lane's rows: local_row and local_row + 8
  const float scale = rsqrtf(static_cast<float>(D));
  const float scale_log2 = scale * kLog2E;

  const uint64_t q = Queries::template descriptor<Along::Columns>(smem, own * 64);
  const auto keys = [&](int s) {
    return Keys::template descriptor<Along::Columns>(smem + Shape::kKeysAt + s * Keys::kBytes);
  };
  const auto values = [&](int s) {
    return Keys::template descriptor<Along::Rows>(smem + Shape::kValuesAt + s * Keys::kBytes);
  };
  const auto release = [&](uint32_t barrier) { mbarrier_arrive_warp(barrier, lane); };

  RingCursor<Shape::kStages> ring;
  int q_parity = 0;
  if (own == 0) named_arrive(kTurn, 2 * kWarpgroup);  // the first turn
  const auto take_turn = [&] { named_sync(kTurn + own, 2 * kWarpgroup); };
  const auto pass_turn = [&] {
    named_arrive(kTurn + (own + 1 == Shape::kWarpgroups ? 0 : own + 1), 2 * kWarpgroup);
  };

  while (true) {
    mbarrier_wait(barriers.q_full(), q_parity);
    q_parity ^= 1;
    const int index = load_shared_warp(smem + Shape::kItemAt, lane);
    if (index < 0) break;
    const Item item = find_item<D, kSource, kMask>(args, order, index);
    const int first_row = item.row0 + own * 64;  // this warpgroup's first query
    const int position0 = item.position0 + own * 64;
    // Documents: the first key of this warpgroup's n-th query.
    const auto first_key = [&](int n) {
      return args.first_key[int64_t{item.batch} * args.t + min(first_row + n, args.t - 1)];
    };
    int last_first_key = 0;
    if constexpr (kMask == Mask::Documents) last_first_key = first_key(63);

    float s[kKeys / 8][4], acc[D / 8][4];
    uint32_t p[kKeys / 16][4];
    float row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {0.0f, 0.0f};
    float correction[2];
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[n][i] = 0.0f;

    // s = q k^T, left in flight.
    const auto start_scores = [&](int stage) {
      const uint64_t k = keys(stage);
      accumulator_fence(s);
      wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < D / 16; ++kk)
        wgmma<Along::Columns>(s, q + Queries::template slice_offset<Along::Columns>(kk),
                              k + Keys::template slice_offset<Along::Columns>(kk), kk != 0);
      wgmma_commit();
    };
    // acc += p v, left in flight.
    const auto start_output = [&](int stage) {
      const uint64_t v = values(stage);
      accumulator_fence(acc);
      wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < kKeys / 16; ++kk)
        wgmma<Along::Rows>(acc, p[kk], v + Keys::template slice_offset<Along::Rows>(kk), 1);
      wgmma_commit();
    };
    // Zeros for the values of a tile from key_count on. All warpgroups write the same.
    const auto clear_values = [&](int tile, int stage) {
      if (kSource == Source::Queries || (tile + 1) * kKeys <= item.key_count) return;
      constexpr int kChunks = D / 8;
      const int first = (item.key_count - tile * kKeys) * kChunks;
      for (int i = first + thread; i < kKeys * kChunks; i += kWarpgroup)
        *reinterpret_cast<uint4*>(memory + Shape::kValuesAt + stage * Keys::kBytes +
                                  Keys::chunk_offset(i / kChunks, i % kChunks)) = uint4{};
      async_proxy_fence();
      named_sync(kOwn + own, kWarpgroup);
    };
    // s = exp(s - max), unnormalised; correction is the factor for earlier terms.
    const auto softmax = [&](int tile) {
      const int key0 = tile * kKeys;
      if (key0 + kKeys - 1 > position0 || position0 + 63 - key0 >= args.window ||
          (kMask == Mask::Documents && key0 < last_first_key)) {
        const int corner = position0 + local_row - (key0 + pair);
        int first[2];  // of this lane's rows, counted from its first key
        if constexpr (kMask == Mask::Documents) {
          first[0] = first_key(local_row) - (key0 + pair);
          first[1] = first_key(local_row + 8) - (key0 + pair);
        }
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int distance = corner + i / 2 * 8 - (n * 8 + i % 2);
            if (static_cast<unsigned>(distance) >= static_cast<unsigned>(args.window) ||
                (kMask == Mask::Documents && n * 8 + i % 2 < first[i / 2]))
              s[n][i] = -INFINITY;
          }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float maximum = row_max[half];
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
          maximum = fmaxf(maximum, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
        maximum = quad_max(maximum);
        // A row without a visible key so far: any finite base makes its terms 0.
        const float base = maximum == -INFINITY ? 0.0f : maximum * scale_log2;
        correction[half] = exp2_approx(fmaf(row_max[half], scale_log2, -base));
        row_max[half] = maximum;
        float sum = row_sum[half] * correction[half];
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            s[n][i] = exp2_approx(fmaf(s[n][i], scale_log2, -base));
            sum += s[n][i];
          }
        row_sum[half] = sum;
      }
    };
    const auto round_scores = [&] {
#pragma unroll
      for (int kk = 0; kk < kKeys / 16; ++kk) pack_a(p[kk], s[2 * kk], s[2 * kk + 1]);
    };

    mbarrier_wait(barriers.k_full(ring.stage), ring.parity);
    start_scores(ring.stage);
    wgmma_wait<0>();
    accumulator_fence(s);
    release(barriers.k_empty(ring.stage));
    softmax(item.last_tile);
    round_scores();

    for (int tile = item.last_tile - 1; tile >= item.first_tile; --tile) {
      const RingCursor<Shape::kStages> before = ring;
      ring.advance();
      mbarrier_wait(barriers.k_full(ring.stage), ring.parity);
      take_turn();
      start_scores(ring.stage);
      mbarrier_wait(barriers.v_full(before.stage), before.parity);
      clear_values(tile + 1, before.stage);
      start_output(before.stage);
      pass_turn();
      wgmma_wait<1>();
      accumulator_fence(s);
      release(barriers.k_empty(ring.stage));
      softmax(tile);
      wgmma_wait<0>();
      accumulator_fence(acc);
      release(barriers.v_empty(before.stage));
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[n][i] *= correction[i / 2];
      round_scores();
    }
    release(barriers.q_empty());
    mbarrier_wait(barriers.v_full(ring.stage), ring.parity);
    clear_values(item.first_tile, ring.stage);
    start_output(ring.stage);
    wgmma_wait<0>();
    accumulator_fence(acc);
    release(barriers.v_empty(ring.stage));
    ring.advance();

    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = quad_sum(row_sum[half]);
      inverse[half] = 1.0f / sum;
      const int row = first_row + local_row + 8 * half;
      if (args.lse != nullptr && pair == 0 && row < args.t)
        args.lse[(int64_t{item.batch} * args.heads + item.head) * args.t + row] =
            row_max[half] * scale + logf(sum);
    }
    // The output passes through shared memory, once the previous item's store has read it.
    const uint32_t output_at = Shape::kOutputAt + own * Output::kBytes;
    if (thread == 0) store_wait_read();
    named_sync(kOwn + own, kWarpgroup);
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<uint32_t*>(memory + output_at +
                                     Output::chunk_offset(local_row + 8 * half, n) + pair * 2) =
            pack_bf16(acc[n][2 * half] * inverse[half], acc[n][2 * half + 1] * inverse[half]);
    async_proxy_fence();
    named_sync(kOwn + own, kWarpgroup);
    if (thread == 0 && first_row < args.t) {
#pragma unroll
      for (int panel = 0; panel < PanelShape<D>::kPanels; ++panel)
        store_box(o_map, smem + output_at + panel * Output::kPanelBytes,
                  panel * PanelShape<D>::kColumns, item.head, first_row, item.batch);
      store_commit();
    }
  }
  if (thread == 0) store_wait_read();
}

template <int D, Source kSource, Mask kMask>
__global__ __launch_bounds__(ForwardShape<D>::kThreads, 1) void attention_forward_hopper_kernel(
    const __grid_constant__ CUtensorMap o_map, const __grid_constant__ CUtensorMap q_map,
    const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map,
    const __grid_constant__ ForwardArgs args, const __grid_constant__ BlockOrder order,
    unsigned* __restrict__ queue) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Shape = ForwardShape<D>;
  unsigned char* memory = swizzled_smem();
  const uint32_t smem = shared_address(memory);
  if (threadIdx.x == 0) {
    constexpr int kWarps = 4 * Shape::kWarpgroups;
    const ForwardBarriers<D> barriers{smem + Shape::kBarriersAt};
    mbarrier_init(barriers.q_full(), 1);
    mbarrier_init(barriers.q_empty(), kWarps);
    for (int s = 0; s < Shape::kStages; ++s) {
      mbarrier_init(barriers.k_full(s), 1);
      mbarrier_init(barriers.k_empty(s), kWarps);
      mbarrier_init(barriers.v_full(s), 1);
      mbarrier_init(barriers.v_empty(s), kWarps);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    registers_down<Shape::kProducerRegisters>();
    if (threadIdx.x == 0)
      copy_items<D, kSource, kMask>(q_map, k_map, v_map, args, order, queue, smem);
  } else {
    registers_up<Shape::kRegisters>();
    attend_items<D, kSource, kMask>(o_map, args, order, memory, smem,
                                    static_cast<int>(threadIdx.x) / kWarpgroup - 1);
  }
#endif
}

}  // namespace

void attention_forward_hopper(cudaStream_t stream, const ForwardArgs& args, int64_t d, int sms,
                              unsigned* queue) {
  BBB_ASSERT(args.start != nullptr || args.t == args.t_max);
  BBB_ASSERT(args.start == nullptr || args.first_key == nullptr);
  with_head_size(d, [&](auto size) {
    constexpr int D = size;
    using Shape = ForwardShape<D>;
    const BlockOrder order(ceil_div(args.t, Shape::kRows), args.batch * args.heads, args.t_max, D);
    const auto map = [&](const __nv_bfloat16* x, int t, int heads, int rows) {
      return panel_map<D>(x, args.batch, t, heads, rows);
    };
    if (order.blocks() == 0) return;
    BBB_CUDA(cudaMemsetAsync(queue, 0, sizeof *queue, stream));
    launch(
        stream,
        {std::min(order.blocks(), static_cast<unsigned>(sms)), Shape::kThreads, Shape::kSmemBytes},
        args.start != nullptr ? attention_forward_hopper_kernel<D, Source::Cache, Mask::Window>
        : args.first_key == nullptr
            ? attention_forward_hopper_kernel<D, Source::Queries, Mask::Window>
            : attention_forward_hopper_kernel<D, Source::Queries, Mask::Documents>,
        map(args.o, args.t, args.heads, 64), map(args.q, args.t, args.heads, Shape::kRows),
        map(args.k, args.t_max, args.kv_heads, Shape::kKeys),
        map(args.v, args.t_max, args.kv_heads, Shape::kKeys), args, order, queue);
  });
}

}  // namespace bbb::cuda
