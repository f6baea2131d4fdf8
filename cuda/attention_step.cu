// One decoding step of attention for every sequence: rotary positions of q and k, the new key and
// value into the cache, and attention to all visible keys, in one kernel (sm_90a). A quantized
// cache, other head sizes and other GPUs take append_kv and attention_cached.
//
// Shapes: o, q (B, 1, H, d); k, v (B, 1, K, d); caches bf16 (B, Tmax, K, d); start I32 (B).
//
// A cluster of R blocks takes up to eight query heads of one kv-head, which are the columns of its
// mma fragments. Tiles of 16 keys are dealt to its warps: tile t to rank t % R, warp t / R %
// kWarps.
//
//     before the wait   the first tiles of every warp; the rotations
//     after             rotate the queries; rotate the new key, put it and its value into the last
//                       tile and into the cache
//     each warp         online softmax over its tiles (cuda/online_softmax.h)
//     each block        combines its warps' results and sends every block of the cluster a share
//     each block        combines the shares of all blocks: its part of o
//
// What is loaded before the wait is older than the kernel that set `start`, and that kernel lets
// none start early (cuda/early_start.h). All sums have a fixed order. Bytes: the visible keys and
// values once for each eight query heads of their kv-head.
#include <cfloat>

#include "cuda/attention.h"
#include "cuda/cuda_backend.h"
#include "cuda/early_start.h"
#include "cuda/hopper.h"
#include "cuda/kv_cache.h"
#include "cuda/mma.h"
#include "cuda/online_softmax.h"
#include "cuda/rotation.h"

namespace bbb::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kQueryRows = 8;  // query heads of a cluster
constexpr int kTileKeys = 16;
constexpr int kMaxCluster = 8;  // blocks, as many as every GPU takes
// A block fits on a multiprocessor beside one of the product in front, which takes half of the
// shared memory, and of the 16384 registers of each of the four partitions up to 8960 (five warps
// of 56 a lane). Two warps of this kernel take 7168.
constexpr int kRegisters = 112;
constexpr int kSlotsBytes = 96 * 1024;

struct StepArgs {
  bf16* o;                  // (B, H, d)
  bf16 *k_cache, *v_cache;  // (B, Tmax, K, d)
  const bf16* q;            // (B, H, d)
  const bf16 *k, *v;        // (B, K, d)
  const int* start;         // (B): the position of the new key
  const float* inv_freq;    // (d/2)
  CacheFault* fault;
  int t_max, heads, kv_heads, window;
  float rope_factor;
};

// Shared memory of a block. Slots of tiles come first: each warp has its own, one or more. At the
// end its first slot takes its result, 8 x D floats.
template <int D>
struct StepMemory {
  static constexpr int kTileBytes = 2 * kTileKeys * D * 2;  // keys, then values
  static constexpr int kSlots = kSlotsBytes / kTileBytes;
  static_assert(kSlots >= kWarps && kSlots <= 3 * kWarps && kTileBytes >= kQueryRows * D * 4);

  unsigned char slots[kSlots][kTileBytes];
  unsigned char queries[kQueryRows * D * 2];    // a tile
  float parts[kQueryRows * D];                  // (rank, own outputs): what the blocks send
  float2 block_stats[kMaxCluster][kQueryRows];  // maximum of the raw scores, sum
  float2 warp_stats[kWarps][kQueryRows];
  float2 rotations[D / 2];
  uint64_t received;  // a barrier that counts what the blocks send

  // A warp's result: rows of D, groups of eight columns swizzled so that what the lanes of a warp
  // write, eight columns of four rows, is in different banks.
  __device__ float* result(int warp, int row, int column) {
    return reinterpret_cast<float*>(slots[warp]) + row * D + (column ^ (row / 2 & 3) * 8);
  }
};

// Rotates pairs of neighbours: columns c, c + 1 with d/2 + c, d/2 + c + 1, rounded to bf16.
__device__ inline void rotate_packed(uint32_t& low, uint32_t& high, const float2* rotations) {
  float2 a = unpack_bf16(low), b = unpack_bf16(high);
  const float4 r = *reinterpret_cast<const float4*>(rotations);
  rotate(a.x, b.x, make_float2(r.x, r.y));
  rotate(a.y, b.y, make_float2(r.z, r.w));
  low = pack_bf16(a.x, a.y);
  high = pack_bf16(b.x, b.y);
}

// grid (cluster, K * ceil(H / K / 8), B)
template <int D>
__global__ void __maxnreg__(kRegisters) attention_step_kernel(const StepArgs args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Memory = StepMemory<D>;
  constexpr int kChunks = D / 8;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int g = lane / 4, pair = lane % 4 * 2;
  const int rank = blockIdx.x, ranks = gridDim.x, b = blockIdx.z;
  start_next_kernel();
  const int start = load_past_l1(args.start + b);
  if (!in_cache(start, 1, args.t_max)) {
    wait_for_previous_kernel();
    if (rank == 0 && thread == 0) *args.fault = {start, 1, args.t_max};
    return;
  }
  auto& memory = *reinterpret_cast<Memory*>(dynamic_smem());
  const uint32_t received = shared_address(&memory.received);
  if (thread == 0) {
    mbarrier_init(received, 1);
    mbarrier_init_fence();
  }
  const int group = args.heads / args.kv_heads;
  const int row_blocks = (group + kQueryRows - 1) / kQueryRows;
  const int kv_head = blockIdx.y / row_blocks;
  const int row0 = blockIdx.y % row_blocks * kQueryRows;
  const int rows = min(kQueryRows, group - row0);
  const int64_t head0 = int64_t{b} * args.heads + kv_head * group + row0;

  const int64_t stride = int64_t{args.kv_heads} * D;
  const int64_t cache_at = int64_t{b} * args.t_max * stride + kv_head * D;
  const int first_key = max(0, start + 1 - args.window);
  const int last_tile = start / kTileKeys;
  const int step = ranks * kWarps;
  int tile = first_key / kTileKeys + warp * ranks + rank;

  // Slots warp, warp + kWarps, ..
  const int slots = (Memory::kSlots - warp + kWarps - 1) / kWarps;
  const auto keys = [&](int slot) {
    return SmemTile<D>{shared_address(memory.slots[warp + slot * kWarps])};
  };
  const auto values = [&](int slot) {
    return SmemTile<D>{shared_address(memory.slots[warp + slot * kWarps]) + Memory::kTileBytes / 2};
  };
  const auto load_tile = [&](int which, int slot) {
    if (which <= last_tile) {
      const int own_lane = recomputed(lane);
      load_tile_async<D, kTileKeys, 32>(keys(slot), args.k_cache + cache_at, stride,
                                        which * kTileKeys, start, D, own_lane);
      load_tile_async<D, kTileKeys, 32>(values(slot), args.v_cache + cache_at, stride,
                                        which * kTileKeys, start, D, own_lane);
    }
    cp_async_commit();
  };
  for (int slot = 0; slot < slots; ++slot) load_tile(tile + slot * step, slot);
  for (int i = thread; i < D / 2; i += kThreads)
    memory.rotations[i] = rotation(start, args.inv_freq[i], 1.0f, args.rope_factor);
  __syncthreads();
  cluster_arrive();
  wait_for_previous_kernel();

  // The new key and value, of the warp that has the last tile: four pairs and eight values a lane.
  const bool has_last = tile <= last_tile && (last_tile - tile) % step == 0 && lane < kChunks;
  uint2 new_low{}, new_high{};
  uint4 new_value{};
  if (has_last) {
    const int64_t from = (int64_t{b} * args.kv_heads + kv_head) * D;
    new_low = load_past_l1(reinterpret_cast<const uint2*>(args.k + from) + lane);
    new_high = load_past_l1(reinterpret_cast<const uint2*>(args.k + from + D / 2) + lane);
    new_value = load_past_l1(reinterpret_cast<const uint4*>(args.v + from) + lane);
  }
  // The rotated queries as a tile; rows that do not exist are zeros. A thread takes eight pairs.
  for (int i = thread; i < kQueryRows * D / 16; i += kThreads) {
    const int row = i / (D / 16), chunk = i % (D / 16);
    uint4 low{}, high{};
    if (row < rows) {
      const uint4* const head = reinterpret_cast<const uint4*>(args.q + (head0 + row) * D);
      low = load_past_l1(head + chunk);
      high = load_past_l1(head + D / 16 + chunk);
      const float2* const rotations = memory.rotations + chunk * 8;
      rotate_packed(low.x, high.x, rotations);
      rotate_packed(low.y, high.y, rotations + 2);
      rotate_packed(low.z, high.z, rotations + 4);
      rotate_packed(low.w, high.w, rotations + 6);
    }
    const auto at = [&](int of) {
      return reinterpret_cast<uint4*>(memory.queries + SmemTile<D>::offset_bytes(row, of));
    };
    *at(chunk) = low;
    *at(D / 16 + chunk) = high;
  }
  if (has_last) {
    rotate_packed(new_low.x, new_high.x, memory.rotations + 4 * lane);
    rotate_packed(new_low.y, new_high.y, memory.rotations + 4 * lane + 2);
    if (row0 == 0) {
      bf16* const key = args.k_cache + cache_at + start * stride;
      reinterpret_cast<uint2*>(key)[lane] = new_low;
      reinterpret_cast<uint2*>(key + D / 2)[lane] = new_high;
      reinterpret_cast<uint4*>(args.v_cache + cache_at + start * stride)[lane] = new_value;
    }
  }
  __syncthreads();
  uint32_t q[D / 32][4];
#pragma unroll
  for (int kk = 0; kk < D / 32; ++kk)
    load_b_32(q[kk], SmemTile<D>{shared_address(memory.queries)}, kk * 32, lane);
  const float scale_log2 = score_scale(D) * kLog2E;
  OnlineSoftmaxOfFew<D> softmax;
  int slot = 0;
  for (; tile <= last_tile; tile += step) {
    // The copies to the warp's other slots stay in flight.
    if (slots > 2)
      cp_async_wait<2>();
    else if (slots > 1)
      cp_async_wait<1>();
    else
      cp_async_wait<0>();
    __syncwarp();
    if (tile == last_tile && lane < kChunks) {
      unsigned char* const at = memory.slots[warp + slot * kWarps];
      const int row = start % kTileKeys;
      const auto chunk_at = [&](int chunk) { return at + SmemTile<D>::offset_bytes(row, chunk); };
      *reinterpret_cast<uint2*>(chunk_at(lane / 2) + lane % 2 * 8) = new_low;
      *reinterpret_cast<uint2*>(chunk_at(D / 16 + lane / 2) + lane % 2 * 8) = new_high;
      *reinterpret_cast<uint4*>(chunk_at(lane) + Memory::kTileBytes / 2) = new_value;
    }
    __syncwarp();
    float s[2][4] = {};
#pragma unroll
    for (int kk = 0; kk < D / 32; ++kk) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t k[4];
        load_a(k, keys(slot), 0, kk * 32 + half * 16, lane);
        mma_bf16(s[half], k, q[kk][2 * half], q[kk][2 * half + 1]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) s[0][i] += s[1][i];
    uint32_t p[2];
    softmax.weigh(p, s[0], tile * kTileKeys, first_key, start + 1, scale_log2, lane);
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      uint32_t v[4];
      load_a_rows(v, values(slot), 0, n * 16, lane);
      mma_bf16(softmax.acc[n], v, p[0], p[1]);
    }
    __syncwarp();
    load_tile(tile + slots * step, slot);
    slot = slot + 1 == slots ? 0 : slot + 1;
  }

  // The warps' results overwrite their tiles, which all lanes have read.
  cp_async_wait<0>();
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = pair + i;
    const float sum = softmax.total(i);
    if (row >= rows) continue;
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      *memory.result(warp, row, n * 16 + g) = softmax.acc[n][i];
      *memory.result(warp, row, n * 16 + 8 + g) = softmax.acc[n][2 + i];
    }
    if (g == 0) memory.warp_stats[warp][row] = make_float2(softmax.row_max[i], sum);
  }
  // Each block combines a share of the outputs, `own` of them. All send it their parts.
  const unsigned own = static_cast<unsigned>(rows * D / ranks);
  if (thread == 0)
    mbarrier_expect(received,
                    ranks * static_cast<int>(own * sizeof(float) + rows * sizeof(float2)));
  __syncthreads();
  cluster_wait();  // the blocks run, their barriers are ready
  // Maxima of nothing are -infinite: starting from the smallest finite value, their weight is 0.
  const auto weight_of = [&](float of, float maximum) {
    return exp2_approx((of - maximum) * scale_log2);
  };
  for (int i = 2 * thread; i < rows * D; i += 2 * kThreads) {
    const int row = i / D;
    float maximum = -FLT_MAX, sum = 0.0f;
    float2 value{};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) maximum = fmaxf(maximum, memory.warp_stats[w][row].x);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float2 stat = memory.warp_stats[w][row];
      const float2 part = *reinterpret_cast<const float2*>(memory.result(w, row, i % D));
      const float weight = weight_of(stat.x, maximum);
      sum += weight * stat.y;
      value.x += weight * part.x;
      value.y += weight * part.y;
    }
    const unsigned owner = static_cast<unsigned>(i) / own;
    store_to_block(shared_address(memory.parts + rank * own + (i - owner * own)), owner, value,
                   received);
    if (i % D / 2 < ranks)  // of each row, to each block
      store_to_block(shared_address(&memory.block_stats[rank][row]), i % D / 2,
                     make_float2(maximum, sum), received);
  }
  mbarrier_wait(received, 0);
  for (unsigned i = thread; i < own; i += kThreads) {
    const unsigned row = (rank * own + i) / D;
    float maximum = -FLT_MAX, sum = 0.0f, value = 0.0f;
#pragma unroll
    for (int r = 0; r < kMaxCluster; ++r)
      if (r < ranks) maximum = fmaxf(maximum, memory.block_stats[r][row].x);
#pragma unroll
    for (int r = 0; r < kMaxCluster; ++r) {
      if (r >= ranks) break;
      const float2 stat = memory.block_stats[r][row];
      const float weight = weight_of(stat.x, maximum);
      sum += weight * stat.y;
      value += weight * memory.parts[r * own + i];
    }
    args.o[head0 * D + rank * own + i] = __float2bfloat16(value / sum);
  }
#endif
}

// Blocks of a cluster: at most one for each multiprocessor, and a tile for half of their warps. Two
// at least: counted stores are for clusters.
unsigned cluster_of(int clusters, int t_max, int sms) {
  const int tiles = ceil_div(t_max, kTileKeys);
  int blocks = kMaxCluster;
  while (blocks > 2 && (clusters * blocks > sms || blocks * kWarps > 2 * tiles)) blocks /= 2;
  return static_cast<unsigned>(blocks);
}

}  // namespace

void CudaBackend::do_attention_step(const Tensor& o, const Tensor& q, const Tensor& k,
                                    const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
                                    const Tensor& start, const Tensor& inv_freq,
                                    const AttentionSpec& spec, KvFormat format,
                                    const Tensor& scratch) {
  const int64_t d = q.dim(3);
  if (!has_warpgroup_products() || format.quantized() || !has_hopper_head_size(d)) {
    do_append_kv(k_cache, v_cache, k, v, start, q, inv_freq, format, spec.rope_factor);
    return do_attention_cached(o, q, k_cache, v_cache, start, spec, format, scratch);
  }
  BBB_ASSERT(aligned(o, q, k, v, k_cache, v_cache));
  const int batch = checked_int(q.dim(0)), heads = checked_int(q.dim(2));
  const int kv_heads = checked_int(k.dim(2)), t_max = checked_int(k_cache.dim(1));
  const StepArgs args{bf16_of(o),
                      bf16_of(k_cache),
                      bf16_of(v_cache),
                      bf16_of(q),
                      bf16_of(k),
                      bf16_of(v),
                      start.data<int32_t>(),
                      inv_freq.data<float>(),
                      cache_fault_.get(),
                      t_max,
                      heads,
                      kv_heads,
                      window_of(spec.window),
                      static_cast<float>(spec.rope_factor)};
  const int row_blocks = kv_heads * ceil_div(heads / kv_heads, kQueryRows);
  const unsigned blocks = cluster_of(row_blocks * batch, t_max, properties_.multiProcessorCount);
  with_head_size(d, [&](auto size) {
    constexpr int D = size;
    launch(stream_,
           {{blocks, static_cast<unsigned>(row_blocks), static_cast<unsigned>(batch)},
            kThreads,
            int64_t{sizeof(StepMemory<D>)},
            true,
            blocks},
           attention_step_kernel<D>, args);
  });
}

}  // namespace bbb::cuda
