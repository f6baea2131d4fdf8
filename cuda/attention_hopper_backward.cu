// Causal attention on Hopper (sm_90a), backward, on warpgroup products fed by the copy engine. Five
// products: items of keys compute ds for dk and dv and write it once, in bf16; items of queries
// read it for dq.
//
// An item is 128 rows of keys or of queries, 64 a warpgroup. The rows of the other side come in
// tiles through a ring in shared memory:
//     Keys     k, v stay; q, dout pass  s = k q^T  dp = v dout^T  dk += ds^T q  dv += p^T dout
//     Queries  nothing stays; k, ds pass                            dq += ds k
// with p = 2^(s scale log2(e) - lse2) and ds = p (dp - delta). Scores have the resident rows x down
// and the passing rows y across. So p and ds, rounded to bf16 in their registers, are the A
// operands of the sums. While one warpgroup computes ds from scores, the products of the other run.
// If ds does not fit into ds_bytes, items of queries compute it again, seven products:
//     Queries  q, dout stay; k, v pass  s = q k^T  dp = dout v^T  dq += ds k
//
// ds is stored in a ring in global memory: for every head, tiles of 64 keys x 64 queries from the
// diagonal on. A tile has the swizzled layout of shared memory, for an A operand with k, the keys,
// along its rows.
//
// Each SM runs one block. Its copying thread, the first of the first warpgroup, takes items from a
// queue, the next one while the loads of the current one are in flight. Heads form sets, and sets
// form groups (BackwardOrder). keys(g) writes ds of group g, queries(g) reads it:
//     keys(0) .. keys(lag)  queries(0)  keys(lag + 1)  queries(1)  ..
// The lag is long enough that keys(g) has usually finished, and short enough that ds is still in
// the L2 cache. No deadlock: an item waits only for earlier items, which running blocks have taken
// and process in queue order. So the first unfinished item never waits, however few blocks run.
// Each set counts its finished warpgroups, for each side.
//
// Gradients of rotated q and k are rotated back in the registers that summed them, where columns c
// and c + d/2 belong to one lane. An item reads its rows of the table once, from the L2 cache.
// Deterministic: no item is split, and an item's sums run over its tiles in order.
//
// Order of the accesses. First: a write, then its reads. Below: these reads, then the next write.
// full, empty: mbarriers; an arrival releases, a wait acquires. sync(): a named barrier of one
// warpgroup. Shared memory:
//   item index     copying thread writes, arrives at x_full; lane 0 of each warp waits, reads
//                  that lane, after its last read, arrives at x_empty; copying thread waits, writes
//   x              copy engine writes, completes the bytes of x_full; threads wait, wgmma reads
//                  wgmma_wait returns, sync(); threads write results over their warpgroup's rows
//   results        threads write, async_proxy_fence, sync(); thread 0 stores, engine reads
//                  store_wait_read returns in thread 0, which arrives at x_empty; copying thread
//                  waits, copies
//   y, ds, terms   copy engine writes, completes the bytes of y_full; threads wait, read
//                  wgmma_wait and loads return, __syncwarp, each warp's lane 0 arrives at y_empty;
//                  copying thread waits, copies (racecheck reports this pair for the terms: it does
//                  not follow the order from the other lanes to lane 0 through __syncwarp)
// Global memory, between blocks:
//   ds             threads write, publish_writes, sync(); thread 0 counts keys_done; a copying
//                  thread waits for the count, engine reads
//                  engine completes the bytes of y_full; threads wait, sync(); thread 0 counts
//                  queries_done; the copying thread of the keys that overwrite it waits for the
//                  count, copies x; threads wait for x_full, write
#include "cuda/attention.h"
#include "cuda/hopper.h"
#include "cuda/mma.h"
#include "cuda/rotation.h"
#include "quant/launch.h"

namespace bbb::cuda {
namespace {

using quant::launch;

constexpr int kItemRows = 128;
constexpr int kWarpgroups = 2;  // that compute
constexpr int kDsRows = 64;     // keys and queries of a tile of ds
using Ds = Operand<kDsRows, kDsRows>;
constexpr int kOwnRows = kItemRows / kWarpgroups;  // of a warpgroup
static_assert(kOwnRows == kDsRows);
static_assert(kTermRows % kItemRows == 0);  // whole items of rotations, too

template <int D>
struct BackwardShape {
  static constexpr int kThreads = kWarpgroup * (1 + kWarpgroups);
  static constexpr int kProducerRegisters = 40;
  static constexpr int kRegisters = 232;
  // Rows of a tile: two accumulators and the scores leave registers for no more.
  static constexpr int kTile = D == 64 ? 128 : 64;
  using X = Operand<D, kItemRows>;  // k or v of an item of keys
  using Y = Operand<D, kTile>;      // q or dout of its tile
  using K = Operand<D, kDsRows>;    // k of a tile of an item of queries; its ds is stored behind it
  static constexpr int kTermBytes = kTile * 4;  // lse2 or delta of a tile
  static constexpr int kStageBytes = std::max(2 * Y::kBytes, K::kBytes + kWarpgroups * Ds::kBytes);
  // Items of queries that read ds need more loads in flight. They use x_at(slot, 0) alone, for
  // results: x_at(slot, 1) is one more stage where a stage fits.
  static constexpr int kKeysStages = D == 128 ? 3 : 4;
  static constexpr int kQueriesStages = kKeysStages + (kStageBytes <= X::kBytes ? 1 : 0);
  static constexpr int kItems = 2;  // in shared memory: the current one and the next one
  static constexpr int kXBytes = 2 * X::kBytes;
  static constexpr int kStagesAt = kItems * kXBytes;
  static constexpr int kTermsAt = kStagesAt + kKeysStages * kStageBytes;
  static constexpr int kBarriersAt = kTermsAt + kKeysStages * 2 * kTermBytes;
  static constexpr int kItemsAt = kBarriersAt + 8 * 2 * (kItems + kQueriesStages);
  static constexpr int64_t kSmemBytes = 1024 + kItemsAt + 4 * kItems;
  static_assert(kSmemBytes <= 227 * 1024);
  static_assert(kStageBytes % 1024 == 0 && K::kBytes % 1024 == 0 && X::kBytes % 1024 == 0);

  __device__ static int x_at(int slot, int which) { return slot * kXBytes + which * X::kBytes; }
  __device__ static int stage_at(int slot, int stage) {
    return stage < kKeysStages ? kStagesAt + stage * kStageBytes : x_at(slot, 1);
  }
  __device__ static int terms_at(int stage, int which) {
    return kTermsAt + (2 * stage + which) * kTermBytes;
  }
  __device__ static int item_at(int slot) { return kItemsAt + 4 * slot; }
  __device__ static uint32_t x_full(uint32_t smem, int slot) {
    return smem + kBarriersAt + 8 * slot;
  }
  __device__ static uint32_t x_empty(uint32_t smem, int slot) {
    return x_full(smem, slot + kItems);
  }
  __device__ static uint32_t y_full(uint32_t smem, int stage) {
    return x_full(smem, 2 * kItems + stage);
  }
  __device__ static uint32_t y_empty(uint32_t smem, int stage) {
    return y_full(smem, stage + kQueriesStages);
  }
};

// A RingCursor over the stages that the item uses: kQueriesStages if it reads ds, else the first
// kKeysStages.
struct StageCursor {
  int stage = 0;
  unsigned parities = 0;  // of each stage's round

  __device__ int parity() const { return parities >> stage & 1; }
  __device__ void start(int stages) {
    if (stage >= stages) stage = 0;
  }
  __device__ void advance(int stages) {
    parities ^= 1u << stage;
    if (++stage == stages) stage = 0;
  }
};

enum class Side { Keys, Queries };

// The queue: the keys of `lag` groups of sets; then the keys of the next group and the queries of
// the oldest, until none are left. A set is the heads_per_set query heads that an item of keys sums
// over.
struct BackwardOrder {
  int tiles;  // of kItemRows, of a head
  int sets, heads_per_set;
  int group;  // sets
  int lag;    // groups
  // Sets whose ds the ring holds: set s overwrites set s - slots. 0: none, and items of queries
  // compute ds again.
  int slots;

  // most_bytes: of ds.
  BackwardOrder(const BackwardArgs& args, int64_t most_bytes, int sms)
      : tiles(ceil_div(args.t, kItemRows)),
        sets(args.batch * (args.heads / args.heads_per_item)),
        heads_per_set(args.heads_per_item) {
    // A wave is one item of keys per SM. Its longest item takes twice the mean. In that time the
    // SMs finish the rest of the wave, queries of older sets, and a part of the next wave. A lag of
    // 4/3 waves, in steps of 1/3, was measured to be enough.
    const int wave = ceil_div(sms, tiles);
    group = ceil_div(wave, 3);
    lag = ceil_div(4 * wave, 3 * group);
    slots = (lag + 2) * group;
    if (sets <= slots) {
      group = slots = sets;
      lag = 1;
    }
    if (ds_bytes() > most_bytes) slots = 0;
  }
  BBB_HD int blocks() const { return sets * tiles * (1 + heads_per_set); }
  // The ds tiles of one head: a row for each tile of keys, from the diagonal on.
  BBB_HD int ds_rows() const { return tiles * (kItemRows / kDsRows); }
  BBB_HD int64_t ds_tiles() const { return int64_t{ds_rows()} * (ds_rows() + 1) / 2; }
  // The tile of keys `row` and queries `column`, column >= row.
  BBB_HD int ds_tile(int row, int column) const {
    return row * ds_rows() - row * (row - 1) / 2 + column - row;
  }
  int64_t ds_bytes() const { return ds_tiles() * slots * heads_per_set * Ds::kBytes; }
};

// Scratch: ds, then the counters, which start at 0.
struct BackwardScratch {
  unsigned char* ds;
  unsigned* queue;
  unsigned *keys_done, *queries_done;  // (sets): warpgroups that are done

  BackwardScratch(const BackwardOrder& order, void* scratch)
      : ds(static_cast<unsigned char*>(scratch)),
        queue(reinterpret_cast<unsigned*>(ds + order.ds_bytes())),
        keys_done(queue + 1),
        queries_done(keys_done + order.sets) {}
  static int64_t counter_bytes(const BackwardOrder& order) {
    return (1 + 2 * int64_t{order.sets}) * int64_t{sizeof(unsigned)};
  }
};

struct BackwardMaps {
  CUtensorMap dq, dk, dv;      // boxes of kOwnRows
  CUtensorMap k_stay, v_stay;  // of kItemRows
  CUtensorMap q_stay, dout_stay;
  CUtensorMap q_pass, dout_pass;  // of kTile
  CUtensorMap k_pass, v_pass;
  CUtensorMap k_tile;  // of kDsRows
};

struct Item {
  Side side;
  int set, batch;
  int head0;  // Keys: the first query head of the set; Queries: the head
  int kv_head;
  int x0;
  int first_tile, tiles;
  int ds_tile;  // the first one of head0 in the ring
};

template <int D, Mask kMask>
__device__ inline Item find_item(const BackwardArgs& args, const BackwardOrder& order, int index) {
  Item item;
  const int keys_of_group = order.group * order.tiles;
  const int queries_of_group = keys_of_group * order.heads_per_set;
  const int lead = min(order.lag * order.group, order.sets) * order.tiles;
  const int mixed = max(0, order.sets / order.group - order.lag);  // rounds: keys, then queries
  const int last = max(0, order.sets - (order.lag + mixed) * order.group) * order.tiles;
  int within = index, group = 0;
  if (within < lead) {
    item.side = Side::Keys;
    group = within / keys_of_group;
    within %= keys_of_group;
  } else if ((within -= lead) < mixed * (keys_of_group + queries_of_group)) {
    group = within / (keys_of_group + queries_of_group);
    within %= keys_of_group + queries_of_group;
    item.side = within < keys_of_group ? Side::Keys : Side::Queries;
    if (item.side == Side::Keys)
      group += order.lag;
    else
      within -= keys_of_group;
  } else if ((within -= mixed * (keys_of_group + queries_of_group)) < last) {
    item.side = Side::Keys;
    group = mixed + order.lag;
  } else {
    within -= last;
    item.side = Side::Queries;
    group = mixed + within / queries_of_group;
    within %= queries_of_group;
  }
  // Longest items first: early keys are seen by more queries, late queries see more keys.
  const bool keys = item.side == Side::Keys;
  const int heads = keys ? 1 : order.heads_per_set;
  const int across = min(order.group, order.sets - group * order.group) * heads;
  const int rank = within / across;
  const int head = within % across % heads;
  item.set = group * order.group + within % across / heads;
  item.x0 = (keys ? rank : order.tiles - 1 - rank) * kItemRows;
  const int sets_per_text = args.heads / order.heads_per_set;
  item.batch = item.set / sets_per_text;
  item.head0 = item.set % sets_per_text * order.heads_per_set + head;
  item.kv_head = item.head0 / (args.heads / args.kv_heads);
  item.ds_tile = 0;
  if (order.slots > 0)
    item.ds_tile =
        (item.set % order.slots * order.heads_per_set + head) * static_cast<int>(order.ds_tiles());
  const int x_last = min(item.x0 + kItemRows, args.t) - 1;
  int y_first = keys ? item.x0 : max(0, item.x0 - args.window + 1);
  int y_last = keys ? min(args.t - 1, x_last + args.window - 1) : x_last;
  if constexpr (kMask == Mask::Documents) {
    if (keys)
      y_last = min(y_last, args.ends[int64_t{args.batch + item.batch} * args.t_pad + x_last]);
    else
      y_first = max(y_first, args.ends[int64_t{item.batch} * args.t_pad + item.x0]);
  }
  const int tile = keys || order.slots == 0 ? BackwardShape<D>::kTile : kDsRows;
  item.first_tile = y_first / tile;
  item.tiles = y_last / tile + 1 - item.first_tile;
  return item;
}

// Whether the ds tile at (key0, query0) adds to dq. Other tiles are 0 or were not written. With
// documents the tile's first query sees the earliest keys, and its last key is seen the longest: if
// one sees the other, the items of these keys have gone as far as this tile.
template <Mask kMask>
__device__ inline bool has_ds(const BackwardArgs& args, int batch, int query0, int key0) {
  if (!(query0 < args.t && query0 >= key0 && query0 - (key0 + kDsRows - 1) < args.window))
    return false;
  return kMask == Mask::Window || args.ends[int64_t{batch} * args.t_pad + query0] < key0 + kDsRows;
}

// --- synchronization between blocks -------------------------------------------------------------

// Makes this thread's writes to global memory visible to the copy engines of other SMs. A barrier
// of the warpgroup and count_done() by one of its threads must follow.
__device__ inline void publish_writes() {
  asm volatile("fence.acq_rel.gpu;\nfence.proxy.async.global;" ::: "memory");
}
__device__ inline void count_done(unsigned* counter) {
  stress_pause();
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
// Waits until `count` warpgroups are done. This thread's later copies see their writes.
__device__ inline void wait_done(const unsigned* counter, unsigned count) {
  stress_pause();
  unsigned done;
  while (true) {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(done) : "l"(counter) : "memory");
    if (done >= count) break;
    __nanosleep(100);
  }
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

// --- the copying thread -------------------------------------------------------------------------

template <int D, Mask kMask>
__device__ inline void copy_items(const BackwardMaps& maps, const BackwardArgs& args,
                                  const BackwardOrder& order, const BackwardScratch& scratch,
                                  uint32_t smem) {
  using Shape = BackwardShape<D>;
  StageCursor ring;
  // Waits until the stage is free; returns the barrier that its copies complete.
  const auto claim_stage = [&](int bytes) {
    mbarrier_wait(Shape::y_empty(smem, ring.stage), ring.parity() ^ 1);
    const uint32_t full = Shape::y_full(smem, ring.stage);
    mbarrier_expect(full, bytes);
    return full;
  };
  for (int count = 0;; ++count) {
    stress_pause();
    const int index = static_cast<int>(atomicAdd(scratch.queue, 1u));
    const int slot = count % Shape::kItems;
    mbarrier_wait(Shape::x_empty(smem, slot), count / Shape::kItems % 2 ^ 1);
    const bool more = index < order.blocks();
    store_shared(smem + Shape::item_at(slot), more ? index : -1);
    const uint32_t x_full = Shape::x_full(smem, slot);
    if (!more) return mbarrier_arrive(x_full);
    const Item item = find_item<D, kMask>(args, order, index);

    if (item.side == Side::Queries && order.slots > 0) {
      mbarrier_arrive(x_full);
      wait_done(scratch.keys_done + item.set, order.tiles * kWarpgroups);
      for (int tile = item.first_tile; tile < item.first_tile + item.tiles; ++tile) {
        const int key0 = tile * kDsRows;
        bool wanted[kWarpgroups];
        int bytes = Shape::K::kBytes;
#pragma unroll
        for (int w = 0; w < kWarpgroups; ++w) {
          wanted[w] = has_ds<kMask>(args, item.batch, item.x0 + w * kDsRows, key0);
          if (wanted[w]) bytes += Ds::kBytes;
        }
        const uint32_t full = claim_stage(bytes);
        const uint32_t k_at = smem + Shape::stage_at(slot, ring.stage);
        copy_tile<D, kDsRows>(k_at, maps.k_tile, full, item.kv_head, key0, item.batch);
#pragma unroll
        for (int w = 0; w < kWarpgroups; ++w) {
          if (!wanted[w]) continue;
          const int ds_tile = item.ds_tile + order.ds_tile(tile, item.x0 / kDsRows + w);
          copy_bytes(k_at + Shape::K::kBytes + w * Ds::kBytes,
                     scratch.ds + int64_t{ds_tile} * Ds::kBytes, Ds::kBytes, full);
        }
        ring.advance(Shape::kQueriesStages);
      }
      continue;
    }

    const bool keys = item.side == Side::Keys;
    if (order.slots > 0 && item.set >= order.slots)
      wait_done(scratch.queries_done + item.set - order.slots,
                order.tiles * order.heads_per_set * kWarpgroups);
    const int x_head = keys ? item.kv_head : item.head0;
    mbarrier_expect(x_full, Shape::kXBytes);
    copy_tile<D, kItemRows>(smem + Shape::x_at(slot, 0), keys ? maps.k_stay : maps.q_stay, x_full,
                            x_head, item.x0, item.batch);
    copy_tile<D, kItemRows>(smem + Shape::x_at(slot, 1), keys ? maps.v_stay : maps.dout_stay,
                            x_full, x_head, item.x0, item.batch);
    const CUtensorMap& y1 = keys ? maps.q_pass : maps.k_pass;
    const CUtensorMap& y2 = keys ? maps.dout_pass : maps.v_pass;
    ring.start(Shape::kKeysStages);
    const int first_head = keys ? item.head0 : item.kv_head;
    const int heads = keys ? order.heads_per_set : 1;
    for (int head = first_head; head < first_head + heads; ++head)
      for (int tile = item.first_tile; tile < item.first_tile + item.tiles; ++tile) {
        const uint32_t full =
            claim_stage(2 * Shape::Y::kBytes + (keys ? 2 * Shape::kTermBytes : 0));
        const int s = ring.stage, y0 = tile * Shape::kTile;
        const uint32_t y_at = smem + Shape::stage_at(slot, s);
        copy_tile<D, Shape::kTile>(y_at, y1, full, head, y0, item.batch);
        copy_tile<D, Shape::kTile>(y_at + Shape::Y::kBytes, y2, full, head, y0, item.batch);
        if (keys) {
          const int64_t at = (int64_t{item.batch} * args.heads + head) * args.t_pad + y0;
          copy_bytes(smem + Shape::terms_at(s, 0), args.lse2 + at, Shape::kTermBytes, full);
          copy_bytes(smem + Shape::terms_at(s, 1), args.delta + at, Shape::kTermBytes, full);
        }
        ring.advance(Shape::kKeysStages);
      }
  }
}

// --- the computing warpgroups -------------------------------------------------------------------

template <int D, Mask kMask>
struct Differentiator {
  using Shape = BackwardShape<D>;
  using X = typename Shape::X;
  using Y = typename Shape::Y;
  static constexpr int kTile = Shape::kTile;

  const BackwardMaps& maps;
  const BackwardArgs& args;
  const BackwardOrder& order;
  const BackwardScratch& scratch;
  unsigned char* const memory;
  const uint32_t smem;
  const int own;  // index of this warpgroup
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  const int lane = thread % 32;
  const int pair = lane % 4 * 2;
  const int local_row = thread / 32 * 16 + lane / 4;  // this lane's rows: this one and + 8
  const float scale = rsqrtf(static_cast<float>(D));
  StageCursor ring{};
  int count = 0;  // items before the current one
  int slot = 0;   // of the current one

  __device__ void run() {
    for (;; ++count) {
      slot = count % Shape::kItems;
      mbarrier_wait(Shape::x_full(smem, slot), count / Shape::kItems % 2);
      const int index = load_shared_warp(smem + Shape::item_at(slot), lane);
      if (index < 0) break;
      const Item item = find_item<D, kMask>(args, order, index);
      if (item.side == Side::Keys)
        differentiate<Side::Keys>(item);
      else if (order.slots == 0)
        differentiate<Side::Queries>(item);
      else
        sum_queries(item);
    }
    if (thread == 0) store_wait_read();
  }

 private:
  // Releases the slot of the previous item, once this item's first products are in flight. No
  // thread of the warp reads the slot any more: all have passed that item's last sync(). Thread 0
  // waits until its stores have read the results.
  __device__ void leave_slot_before() const {
    if (lane != 0 || count == 0) return;
    if (thread == 0) store_wait_read();
    mbarrier_arrive(Shape::x_empty(smem, (count - 1) % Shape::kItems));
  }
  __device__ void release(int stage) const {
    mbarrier_arrive_warp(Shape::y_empty(smem, stage), lane);
  }
  __device__ void sync() const { named_sync(1 + own, kWarpgroup); }

  // Writes factor dx, rounded to bf16, over this warpgroup's rows of x, which no product reads any
  // more. This lane's rows are `row`, counted within the warpgroup, and row + apart.
  __device__ void stage_results(const float (&dx)[D / 8][4], float factor, int which, int row,
                                int apart) const {
    const int row0 = recomputed(own * kOwnRows + row), column = recomputed(pair);
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<uint32_t*>(memory + Shape::x_at(slot, which) +
                                     X::chunk_offset(row0 + apart * half, n) + column * 2) =
            pack_bf16(dx[n][2 * half] * factor, dx[n][2 * half + 1] * factor);
  }
  // Called by one thread, after all have staged their results.
  __device__ void store_rows(const CUtensorMap& map, int which, int head, const Item& item) const {
    constexpr int kRowBytes = PanelShape<D>::kRowBytes;
#pragma unroll
    for (int panel = 0; panel < PanelShape<D>::kPanels; ++panel)
      store_box(
          map,
          smem + Shape::x_at(slot, which) + panel * X::kPanelBytes + own * kOwnRows * kRowBytes,
          panel * PanelShape<D>::kColumns, head, item.x0 + own * kOwnRows, item.batch);
  }

  __device__ void sum_queries(const Item& item) {
    const int own_x0 = item.x0 + own * kOwnRows;
    float dq[D / 8][4];
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) dq[n][i] = 0.0f;
    int held = -1;  // the stage that products in flight read
    for (int tile = item.first_tile; tile < item.first_tile + item.tiles; ++tile) {
      const int stage = ring.stage;
      mbarrier_wait(Shape::y_full(smem, stage), ring.parity());
      ring.advance(Shape::kQueriesStages);
      if (has_ds<kMask>(args, item.batch, own_x0, tile * kDsRows)) {
        const uint32_t k_at = smem + Shape::stage_at(slot, stage);
        const uint64_t k = Shape::K::template descriptor<Along::Rows>(k_at);
        const uint64_t ds = Ds::descriptor<Along::Rows>(k_at + Shape::K::kBytes + own * Ds::kBytes);
        accumulator_fence(dq);
        wgmma_fence();
#pragma unroll
        for (int kk = 0; kk < kDsRows / 16; ++kk)
          wgmma<Along::Rows, Along::Rows>(dq, ds + Ds::slice_offset<Along::Rows>(kk),
                                          k + Shape::K::template slice_offset<Along::Rows>(kk), 1);
        wgmma_commit();
        if (held >= 0) {
          wgmma_wait<1>();
          release(held);
        }
        held = stage;
      } else {
        release(stage);
      }
      if (tile == item.first_tile) leave_slot_before();
    }
    wgmma_wait<0>();
    accumulator_fence(dq);
    if (held >= 0) release(held);

    // Row 8 m + e of A is query 32 (m / 4) + 8 (e / 2) + 2 (m % 4) + e % 2 (write_ds).
    const int m = local_row / 8, e = local_row % 8;
    store_queries(dq, m / 4 * 32 + e / 2 * 8 + m % 4 * 2 + e % 2, 2, item);
  }

  // This lane's rows are `row` and row + apart.
  __device__ void store_queries(float (&dq)[D / 8][4], int row, int apart, const Item& item) const {
    const int own_x0 = item.x0 + own * kOwnRows;
    if (args.rotations != nullptr)
      rotate_accumulator<D>(dq, args.rotations, own_x0 + row, apart, pair);
    sync();
    stage_results(dq, scale, 0, row, apart);
    async_proxy_fence();
    sync();
    if (thread != 0) return;
    if (order.slots > 0) count_done(scratch.queries_done + item.set);
    if (own_x0 >= args.t) return;
    store_rows(maps.dq, 0, item.head0, item);
    store_commit();
  }

  // An item whose rows x1, x2 (k and v, or q and dout) stay while y1, y2 pass.
  template <Side kSide>
  __device__ void differentiate(const Item& item) {
    constexpr bool kKeys = kSide == Side::Keys;
    const int own_x0 = item.x0 + own * kOwnRows, own_row = own_x0 / kDsRows;
    const int steps = item.tiles * (kKeys ? order.heads_per_set : 1);
    const float scale_log2 = scale * kLog2E;
    const uint64_t x1 =
        X::template descriptor<Along::Columns>(smem + Shape::x_at(slot, 0), own * kOwnRows);
    const uint64_t x2 =
        X::template descriptor<Along::Columns>(smem + Shape::x_at(slot, 1), own * kOwnRows);
    float dx1[D / 8][4], dx2[kKeys ? D / 8 : 1][4];  // dk and dv, or dq
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

    // Documents: the end of what this warpgroup's n-th row sees: the last query that sees a key, a
    // query's first key.
    const int ends_at = (kKeys ? args.batch + item.batch : item.batch) * args.t_pad + own_x0;
    const auto end_of = [&](int n) { return args.ends[ends_at + n]; };

    // stage and y0 are those of the current tile, step and tile those of the next one.
    float s[kTile / 8][4], ds[kTile / 8][4];
    int step = 0, tile = item.first_tile, stage = 0, y0 = 0;
    // Keys: the index that the ds tile of this warpgroup's keys and query 0 would have, for the
    // head of the next tile and for that of the current one.
    int next_ds = order.slots > 0 ? item.ds_tile + order.ds_tile(own_row, 0) : 0, ds_tile = 0;
    // The least and greatest distance i - j from key j to query i within the warpgroup's scores.
    const auto least = [&] {
      return kKeys ? y0 - (own_x0 + kOwnRows - 1) : own_x0 - (y0 + kTile - 1);
    };
    const auto greatest = [&] {
      return kKeys ? y0 + kTile - 1 - own_x0 : own_x0 + kOwnRows - 1 - y0;
    };
    // Moves stage and y0 to the next tile that this warpgroup sees; releases the tiles that it
    // skips. Between two visible tiles it skips at most one (Keys: at the end of a window or the
    // start of a head), so the ring has a stage for it while the previous tile is still held.
    const auto find_tile = [&] {
      while (step < steps) {
        stage = ring.stage;
        y0 = tile * kTile;
        ds_tile = next_ds;
        mbarrier_wait(Shape::y_full(smem, stage), ring.parity());
        ring.advance(Shape::kKeysStages);
        ++step;
        if (++tile == item.first_tile + item.tiles) {
          tile = item.first_tile;
          next_ds += static_cast<int>(order.ds_tiles());
        }
        if (greatest() >= 0 && least() < args.window) return true;
        // Rows from T on may see no tile. They take the last one, masked.
        if (own_x0 >= args.t && step == steps) return true;
        release(stage);
      }
      return false;
    };
    // scores = x y^T, left in flight.
    const auto start_scores = [&](float(&scores)[kTile / 8][4], uint64_t x, int which) {
      const uint64_t y = Y::template descriptor<Along::Columns>(y_at(stage, which));
      accumulator_fence(scores);
      wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < D / 16; ++kk)
        wgmma<Along::Columns>(scores, x + X::template slice_offset<Along::Columns>(kk),
                              y + Y::template slice_offset<Along::Columns>(kk), kk != 0);
      wgmma_commit();
    };

    ring.start(Shape::kKeysStages);
    find_tile();  // always finds one: the diagonal's, or the last
    start_scores(s, x1, 0);
    leave_slot_before();
    while (true) {
      start_scores(ds, x2, 1);

      // s = p.
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
      bool masked = least() < 0 || greatest() >= args.window;
      if constexpr (kMask == Mask::Documents)
        masked = masked || (kKeys ? y0 + kTile - 1 > end_of(0) : y0 < end_of(kOwnRows - 1));
      if (masked) {
        int ends[2];  // of this lane's rows, counted from its first row y
        if constexpr (kMask == Mask::Documents) {
          ends[0] = end_of(local_row) - (y0 + pair);
          ends[1] = end_of(local_row + 8) - (y0 + pair);
        }
        const int corner = y0 + pair - (own_x0 + local_row);
#pragma unroll
        for (int n = 0; n < kTile / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int ahead = corner + n * 8 + i % 2 - i / 2 * 8;
            const int distance = kKeys ? ahead : -ahead;
            if (static_cast<unsigned>(distance) >= static_cast<unsigned>(args.window))
              s[n][i] = 0.0f;
            if constexpr (kMask == Mask::Documents) {
              const int y = n * 8 + i % 2;
              if (kKeys ? y > ends[i / 2] : y < ends[i / 2]) s[n][i] = 0.0f;
            }
          }
      }

      // ds held dp: ds = p (dp - delta). p and ds are rounded for the sums.
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
      if (kKeys && order.slots > 0) write_ds(ds_a, ds_tile, own_row, y0 / kDsRows);

      const uint64_t y1 = Y::template descriptor<Along::Rows>(y_at(stage, 0));
      const uint64_t y2 = Y::template descriptor<Along::Rows>(y_at(stage, 1));
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

      // The next tile's scores are issued behind the sums.
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

    // Recomputed: the loop has no registers for what only its end needs.
    const Item done =
        find_item<D, kMask>(args, order, load_shared_warp(smem + Shape::item_at(slot), lane));
    if constexpr (kKeys)
      store_keys(dx1, dx2, done);
    else
      store_queries(dx1, local_row, 8, done);
  }

  __device__ void store_keys(float (&dk)[D / 8][4], const float (&dv)[D / 8][4],
                             const Item& item) const {
    const int own_x0 = item.x0 + own * kOwnRows;
    constexpr int kApart = 8;
    if (args.rotations != nullptr)
      rotate_accumulator<D>(dk, args.rotations, own_x0 + local_row, kApart, pair);
    if (order.slots > 0) publish_writes();
    sync();
    if (thread == 0 && order.slots > 0) count_done(scratch.keys_done + item.set);
    if (args.partial != nullptr) return write_partial(dk, dv, item);
    stage_results(dk, scale, 0, local_row, kApart);
    stage_results(dv, 1.0f, 1, local_row, kApart);
    async_proxy_fence();
    sync();
    if (thread != 0 || own_x0 >= args.t) return;
    store_rows(maps.dk, 0, item.kv_head, item);
    store_rows(maps.dv, 1, item.kv_head, item);
    store_commit();
  }

  __device__ uint32_t y_at(int stage, int which) const {
    return smem + Shape::stage_at(slot, stage) + which * Y::kBytes;
  }

  // Writes ds of the tiles of keys `row` and queries from `column` on. `tile` is the index that the
  // tile of query 0 would have. For one key a lane holds queries 16 kk + pair + {0, 1, 8, 9}; two
  // kk fill the 16 bytes of a chunk. So the queries of a stored tile are permuted: chunk 4 j + t
  // holds queries 32 j + 8 i + 2 t + {0, 1}, i = 0 .. 3.
  __device__ void write_ds(const uint32_t (&ds_a)[kTile / 16][4], int tile, int row,
                           int column) const {
#pragma unroll
    for (int part = 0; part < kTile / kDsRows; ++part) {
      if (column + part < row) continue;  // all masked
      unsigned char* const to = scratch.ds + int64_t{tile + column + part} * Ds::kBytes;
      const int to_row = recomputed(local_row), chunk = recomputed(lane) % 4;
#pragma unroll
      for (int j = 0; j < kDsRows / 32; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // keys local_row + 8 half
          const uint32_t(&left)[4] = ds_a[part * (kDsRows / 16) + 2 * j];
          const uint32_t(&right)[4] = ds_a[part * (kDsRows / 16) + 2 * j + 1];
          *reinterpret_cast<uint4*>(to + Ds::chunk_offset(to_row + 8 * half, 4 * j + chunk)) =
              make_uint4(left[half], left[half + 2], right[half], right[half + 2]);
        }
    }
  }

  __device__ void write_partial(const float (&dk)[D / 8][4], const float (&dv)[D / 8][4],
                                const Item& item) const {
    const int64_t stride = int64_t{args.kv_heads} * D;
    const int64_t size = int64_t{args.batch} * args.t * stride;
    float* const target = args.partial + item.head0 % (args.heads / args.kv_heads) * 2 * size +
                          int64_t{item.batch} * args.t * stride + item.kv_head * D;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int x = item.x0 + own * kOwnRows + local_row + 8 * half;
      if (x >= args.t) continue;
      float* const row = target + x * stride + pair;
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        *reinterpret_cast<float2*>(row + n * 8) =
            make_float2(dk[n][2 * half] * scale, dk[n][2 * half + 1] * scale);
        *reinterpret_cast<float2*>(row + size + n * 8) =
            make_float2(dv[n][2 * half], dv[n][2 * half + 1]);
      }
    }
  }
};

template <int D, Mask kMask>
__global__ __launch_bounds__(BackwardShape<D>::kThreads, 1) void attention_backward_hopper_kernel(
    const __grid_constant__ BackwardMaps maps, const __grid_constant__ BackwardArgs args,
    const __grid_constant__ BackwardOrder order, const __grid_constant__ BackwardScratch scratch) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Shape = BackwardShape<D>;
  unsigned char* memory = swizzled_smem();
  const uint32_t smem = shared_address(memory);
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < Shape::kItems; ++slot) {
      mbarrier_init(Shape::x_full(smem, slot), 1);
      mbarrier_init(Shape::x_empty(smem, slot), 4 * kWarpgroups);
    }
    for (int stage = 0; stage < Shape::kQueriesStages; ++stage) {
      mbarrier_init(Shape::y_full(smem, stage), 1);
      mbarrier_init(Shape::y_empty(smem, stage), 4 * kWarpgroups);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    registers_down<Shape::kProducerRegisters>();
    if (threadIdx.x == 0) copy_items<D, kMask>(maps, args, order, scratch, smem);
  } else {
    registers_up<Shape::kRegisters>();
    Differentiator<D, kMask>{
        maps, args, order, scratch, memory, smem, static_cast<int>(threadIdx.x) / kWarpgroup - 1}
        .run();
  }
#endif
}

}  // namespace

int64_t attention_backward_hopper_bytes(const BackwardArgs& args, int64_t ds_bytes, int sms) {
  const BackwardOrder order(args, ds_bytes, sms);
  return order.ds_bytes() + BackwardScratch::counter_bytes(order);
}

void attention_backward_hopper(cudaStream_t stream, const BackwardArgs& args, int64_t d,
                               int64_t ds_bytes, int sms, void* scratch_memory) {
  const BackwardOrder order(args, ds_bytes, sms);
  const BackwardScratch scratch(order, scratch_memory);
  BBB_CUDA(cudaMemsetAsync(scratch.queue, 0,
                           static_cast<size_t>(BackwardScratch::counter_bytes(order)), stream));
  with_head_size(d, [&](auto size) {
    constexpr int kD = size;
    using Shape = BackwardShape<kD>;
    const auto queries = [&](const __nv_bfloat16* x, int rows) {
      return panel_map<kD>(x, args.batch, args.t, args.heads, rows);
    };
    const auto keys = [&](const __nv_bfloat16* x, int rows) {
      return panel_map<kD>(x, args.batch, args.t, args.kv_heads, rows);
    };
    const BackwardMaps maps{.dq = queries(args.dq, kOwnRows),
                            .dk = keys(args.dk, kOwnRows),
                            .dv = keys(args.dv, kOwnRows),
                            .k_stay = keys(args.k, kItemRows),
                            .v_stay = keys(args.v, kItemRows),
                            .q_stay = queries(args.q, kItemRows),
                            .dout_stay = queries(args.dout, kItemRows),
                            .q_pass = queries(args.q, Shape::kTile),
                            .dout_pass = queries(args.dout, Shape::kTile),
                            .k_pass = keys(args.k, Shape::kTile),
                            .v_pass = keys(args.v, Shape::kTile),
                            .k_tile = keys(args.k, kDsRows)};
    launch(
        stream,
        {static_cast<unsigned>(std::min(order.blocks(), sms)), Shape::kThreads, Shape::kSmemBytes},
        args.ends == nullptr ? attention_backward_hopper_kernel<kD, Mask::Window>
                             : attention_backward_hopper_kernel<kD, Mask::Documents>,
        maps, args, order, scratch);
  });
}

}  // namespace bbb::cuda
