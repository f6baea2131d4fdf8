// Attention against a cache of keys and values, and appending to it.
//
// Shapes: q, o (B, T, H, d); caches (B, Tmax, K, d); start I32 (B) on the device. Nothing on the
// host depends on start, so a captured graph serves every position.
// Several queries (prefill): the forward kernel, with its queries at start. One query (decode): the
// cache is cut into splits of 128 keys, or 64 where d is over 128, as many as Tmax holds; blocks
// outside the visible keys return at once. A block takes one split for up to 16 query heads of one
// kv head, which are the rows of its mma fragments. Each of its 4 warps takes a quarter of the keys
// and issues all its loads before it waits. A block writes (max, sum, unnormalized o) in F32; a
// second kernel combines the splits in a fixed order.
// Appending with rotation: a block takes up to kAppendThreads items of one token; an item is up to
// eight neighbouring pairs of a head of q, k or v.
// Positions outside of the cache are neither written nor read: the backend throws when the host
// next waits for the device (CacheFault). Bytes: the visible keys and values once.
#include "cuda/attention.h"
#include "cuda/cuda_backend.h"
#include "cuda/early_start.h"
#include "cuda/mma.h"
#include "cuda/rotation.h"
#include "cuda/vector.h"

namespace bbb::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kQueryRows = 16;  // query heads of a block

constexpr int warp_keys(int64_t d) { return d <= 128 ? 32 : 16; }
constexpr int split_keys(int64_t d) { return kWarps * warp_keys(d); }
// Groups of splits that are merged in parallel.
constexpr int combine_groups(int64_t d) { return d <= 128 ? 8 : 4; }

struct DecodeArgs {
  float* partial_o;      // (B, H, splits, d)
  float2* partial_stat;  // (B, H, splits): maximum of the raw scores, sum
  const bf16 *q, *k, *v;
  const int* start;
  CacheFault* fault;
  int t_max, heads, kv_heads, d, splits, window;
};

// Whether the cache has positions start .. start + t - 1.
__device__ inline bool in_cache(int start, int t, int t_max) {
  return start >= 0 && start <= t_max - t;
}

__global__ void check_positions_kernel(CacheFault* fault, const int* __restrict__ start, int batch,
                                       int t, int t_max) {
  const int b = blockIdx.x * blockDim.x + threadIdx.x;
  if (b < batch && !in_cache(start[b], t, t_max)) *fault = {start[b], t, t_max};
}

template <int D>
constexpr int64_t kDecodeSmemBytes = 2 * split_keys(D) * D * 2 + kWarps* kQueryRows *
                                                                     sizeof(float2);

// grid (splits, K * ceil(H / K / 16), B)
template <int D>
__global__ __launch_bounds__(32 * kWarps) void attention_decode_kernel(const DecodeArgs args) {
  constexpr int kWarpKeys = warp_keys(D), kSplitKeys = split_keys(D);
  // A warp's part of shared memory: its keys and values, later its results.
  constexpr int kWarpBytes = 2 * kWarpKeys * D * 2;
  start_next_kernel();
  wait_for_previous_kernel();
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int g = lane / 4;
  const int pair = lane % 4 * 2;
  const int split = blockIdx.x;
  const int b = blockIdx.z;
  const int start = load_past_l1(args.start + b);
  if (!in_cache(start, 1, args.t_max)) {
    if (split == 0 && threadIdx.x == 0) *args.fault = {start, 1, args.t_max};
    return;
  }
  const int length = start + 1;
  const int first_key = max(0, length - args.window);
  if (split * kSplitKeys >= length || (split + 1) * kSplitKeys <= first_key) return;

  const int group = args.heads / args.kv_heads;
  const int row_blocks = (group + kQueryRows - 1) / kQueryRows;
  const int kv_head = blockIdx.y / row_blocks;
  const int row0 = blockIdx.y % row_blocks * kQueryRows;
  const int rows = min(kQueryRows, group - row0);
  const int64_t head0 = int64_t{b} * args.heads + kv_head * group + row0;
  const int d = args.d;
  const int64_t kv_stride = int64_t{args.kv_heads} * d;
  const int64_t kv_offset = int64_t{b} * args.t_max * kv_stride + kv_head * d;

  unsigned char* smem = reinterpret_cast<unsigned char*>(dynamic_smem());
  unsigned char* warp_smem = smem + warp * kWarpBytes;
  const SmemTile<D> k_tile{shared_address(warp_smem)};
  const SmemTile<D> v_tile{k_tile.base + kWarpBytes / 2};
  const int key0 = split * kSplitKeys + warp * kWarpKeys;
  load_tile_async<D, kWarpKeys, 32>(k_tile, args.k + kv_offset, kv_stride, key0, length, d, lane);
  cp_async_commit();
  load_tile_async<D, kWarpKeys, 32>(v_tile, args.v + kv_offset, kv_stride, key0, length, d, lane);
  cp_async_commit();

  // Query fragments straight from memory: rows g and g + 8, columns 2t and 2t + 8 of each 16.
  uint32_t queries[D / 16][4];
#pragma unroll
  for (int kk = 0; kk < D / 16; ++kk)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = g + i % 2 * 8;
      const int column = kk * 16 + pair + i / 2 * 8;
      queries[kk][i] =
          row < rows && column < d
              ? load_past_l1(reinterpret_cast<const uint32_t*>(args.q + (head0 + row) * d + column))
              : 0u;
    }

  cp_async_wait<1>();
  __syncwarp();
  float s[kWarpKeys / 8][4] = {};
#pragma unroll
  for (int kk = 0; kk < D / 16; ++kk)
#pragma unroll
    for (int n = 0; n < kWarpKeys / 16; ++n) {
      uint32_t keys[4];
      load_b(keys, k_tile, n * 16, kk * 16, lane);
      mma_bf16(s[2 * n], queries[kk], keys[0], keys[1]);
      mma_bf16(s[2 * n + 1], queries[kk], keys[2], keys[3]);
    }

  const float scale_log2 = score_scale(d) * kLog2E;
  float row_max[2], row_sum[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float maximum = -INFINITY;
#pragma unroll
    for (int n = 0; n < kWarpKeys / 8; ++n)
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        const int key = key0 + n * 8 + pair + i % 2;
        if (key < first_key || key >= length) s[n][i] = -INFINITY;
        maximum = fmaxf(maximum, s[n][i]);
      }
    maximum = quad_max(maximum);
    const float base = maximum == -INFINITY ? 0.0f : maximum * scale_log2;
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < kWarpKeys / 8; ++n)
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        s[n][i] = exp2_approx(s[n][i] * scale_log2 - base);
        sum += s[n][i];
      }
    row_max[half] = maximum;
    row_sum[half] = quad_sum(sum);
  }

  cp_async_wait<0>();
  __syncwarp();
  float acc[D / 8][4] = {};
#pragma unroll
  for (int kk = 0; kk < kWarpKeys / 16; ++kk) {
    uint32_t p[4];
    pack_a(p, s[2 * kk], s[2 * kk + 1]);
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      uint32_t values[4];
      load_b_rows(values, v_tile, kk * 16, n * 16, lane);
      mma_bf16(acc[2 * n], p, values[0], values[1]);
      mma_bf16(acc[2 * n + 1], p, values[2], values[3]);
    }
  }

  // The warps' results are combined in shared memory. A warp's 16 x D floats overwrite its keys and
  // values, which all its lanes have read.
  static_assert(kQueryRows * D * sizeof(float) <= kWarpBytes);
  __syncwarp();
  float* warp_o = reinterpret_cast<float*>(warp_smem);
  float2* stats = reinterpret_cast<float2*>(smem + kWarps * kWarpBytes);  // (warp, row)
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = g + 8 * half;
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
      *reinterpret_cast<float2*>(warp_o + row * D + n * 8 + pair) =
          make_float2(acc[n][2 * half], acc[n][2 * half + 1]);
    if (pair == 0) stats[warp * kQueryRows + row] = make_float2(row_max[half], row_sum[half]);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rows * D; i += 32 * kWarps) {
    const int row = i / D;
    const int column = i % D;
    if (column >= d) continue;
    float maximum = -INFINITY;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) maximum = fmaxf(maximum, stats[w * kQueryRows + row].x);
    float sum = 0.0f, value = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float2 stat = stats[w * kQueryRows + row];
      const float weight = exp2_approx((stat.x - maximum) * scale_log2);
      sum += weight * stat.y;
      value += weight * reinterpret_cast<const float*>(smem + w * kWarpBytes)[i];
    }
    const int64_t at = (head0 + row) * args.splits + split;
    args.partial_o[at * d + column] = value;
    if (column == 0) args.partial_stat[at] = make_float2(maximum, sum);
  }
}

// o = sum over splits of weight * o / sum over splits of weight * sum.   block (d, kGroups)
template <int kGroups, int kSplitKeys>
__global__ void attention_combine_kernel(bf16* __restrict__ o, const DecodeArgs args) {
  start_next_kernel();
  wait_for_previous_kernel();
  const int64_t head = blockIdx.x;  // (b, h)
  const int start = load_past_l1(args.start + head / args.heads);
  if (!in_cache(start, 1, args.t_max)) return;
  const int d = args.d;
  float* group_o = reinterpret_cast<float*>(dynamic_smem());              // (groups, d)
  float2* group_stat = reinterpret_cast<float2*>(group_o + kGroups * d);  // (groups)
  const int column = threadIdx.x;
  const int group = threadIdx.y;
  const int length = start + 1;
  const int first = max(0, length - args.window) / kSplitKeys;
  const int end = (length - 1) / kSplitKeys + 1;
  const float scale_log2 = score_scale(d) * kLog2E;

  float maximum = -INFINITY, sum = 0.0f, value = 0.0f;
#pragma unroll 4
  for (int split = first + group; split < end; split += kGroups) {
    const int64_t at = head * args.splits + split;
    const float2 stat = load_past_l1(args.partial_stat + at);
    const float part = load_past_l1(args.partial_o + at * d + column);
    const float larger = fmaxf(maximum, stat.x);
    const float old_weight = exp2_approx((maximum - larger) * scale_log2);
    const float weight = exp2_approx((stat.x - larger) * scale_log2);
    sum = sum * old_weight + stat.y * weight;
    value = value * old_weight + part * weight;
    maximum = larger;
  }
  group_o[group * d + column] = value;
  if (column == 0) group_stat[group] = make_float2(maximum, sum);
  __syncthreads();
  if (group > 0) return;
  for (int other = 1; other < kGroups; ++other) maximum = fmaxf(maximum, group_stat[other].x);
  sum = value = 0.0f;
  for (int other = 0; other < kGroups; ++other) {
    const float2 stat = group_stat[other];
    const float weight = exp2_approx((stat.x - maximum) * scale_log2);
    sum += weight * stat.y;
    value += weight * group_o[other * d + column];
  }
  o[head * d + column] = __float2bfloat16(value / sum);
}

constexpr int kAppendThreads = 128;
constexpr int kPairs = 8;  // of an item, where a head has a multiple of them

struct AppendArgs {
  bf16 *q, *k_cache, *v_cache;
  const bf16 *k, *v;
  const float* inv_freq;
  const int* start;
  CacheFault* fault;
  int t, t_max, heads, kv_heads, half;

  int items(int width) const { return (heads + 2 * kv_heads) * (half / width); }
};

// grid (B T, items / kAppendThreads)
template <int kWidth>
__global__ void __launch_bounds__(kAppendThreads)
    append_rotated_kernel(const AppendArgs args, int items) {
  start_next_kernel();
  wait_for_previous_kernel();
  float2* const rotations = reinterpret_cast<float2*>(dynamic_smem());  // (d/2)
  const int64_t token = blockIdx.x, b = token / args.t;
  const int first = load_past_l1(args.start + b);
  if (!in_cache(first, args.t, args.t_max)) {
    if (threadIdx.x == 0) *args.fault = {first, args.t, args.t_max};
    return;
  }
  const int64_t position = first + token % args.t;
  for (int i = threadIdx.x; i < args.half; i += kAppendThreads)
    rotations[i] = rotation(position, args.inv_freq[i], 1.0f);
  __syncthreads();

  const int item = blockIdx.y * kAppendThreads + threadIdx.x;
  if (item >= items) return;
  const int chunks = args.half / kWidth, i = item % chunks * kWidth;
  const int row = item / chunks;  // a head of q, then of k, then of v
  const int64_t d = 2 * args.half;
  bf16* to = args.q + (token * args.heads + row) * d;
  const bf16* from = to;
  if (row >= args.heads) {
    const bool is_v = row - args.heads >= args.kv_heads;
    const int head = row - args.heads - (is_v ? args.kv_heads : 0);
    from = (is_v ? args.v : args.k) + (token * args.kv_heads + head) * d;
    to = (is_v ? args.v_cache : args.k_cache) +
         ((b * args.t_max + position) * args.kv_heads + head) * d;
  }
  float low[kWidth], high[kWidth];
  load_past_l1(low, from + i, kWidth);
  load_past_l1(high, from + args.half + i, kWidth);
  if (row < args.heads + args.kv_heads) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) rotate(low[j], high[j], rotations[i + j]);
  }
  store(to + i, low, kWidth);
  store(to + args.half + i, high, kWidth);
}

// A thread copies 16 bytes of k and of v.
__global__ void append_kv_kernel(uint4* __restrict__ k_cache, uint4* __restrict__ v_cache,
                                 CacheFault* fault, const uint4* __restrict__ k,
                                 const uint4* __restrict__ v, const int* __restrict__ start,
                                 int64_t count, int row_chunks, int t, int t_max) {
  start_next_kernel();
  wait_for_previous_kernel();
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const int64_t row = i / row_chunks;
  const int64_t b = row / t;
  const int first = load_past_l1(start + b);
  if (!in_cache(first, t, t_max)) {
    if (i % row_chunks == 0 && row % t == 0) *fault = {first, t, t_max};
    return;
  }
  const int64_t to = (b * t_max + first + row % t) * row_chunks + i % row_chunks;
  k_cache[to] = load_past_l1(k + i);
  v_cache[to] = load_past_l1(v + i);
}

}  // namespace

void CudaBackend::do_append_kv(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k,
                               const Tensor& v, const Tensor& start, const Tensor& q,
                               const Tensor& inv_freq) {
  constexpr int kThreads = 256;
  BBB_ASSERT(aligned(k_cache, v_cache, k, v, q));
  const int row_values = checked_int(k.dim(2) * k.dim(3));
  BBB_CHECK(row_values % kChunk == 0, "append_kv on the GPU takes rows of a multiple of ", kChunk,
            " values, not ", row_values);
  if (inv_freq.defined()) {
    const AppendArgs args{bf16_of(q),
                          bf16_of(k_cache),
                          bf16_of(v_cache),
                          bf16_of(k),
                          bf16_of(v),
                          inv_freq.data<float>(),
                          start.data<int32_t>(),
                          cache_fault_.get(),
                          checked_int(k.dim(1)),
                          checked_int(k_cache.dim(1)),
                          checked_int(q.dim(2)),
                          checked_int(k.dim(2)),
                          checked_int(k.dim(3) / 2)};
    const bool wide = args.half % kPairs == 0;
    const int items = args.items(wide ? kPairs : 1);
    const int64_t tokens = k.dim(0) * k.dim(1);
    launch(stream_,
           {{static_cast<unsigned>(tokens), blocks_for(items, kAppendThreads, 1).x},
            kAppendThreads,
            args.half * int64_t{sizeof(float2)},
            starts_early(tokens)},
           wide ? append_rotated_kernel<kPairs> : append_rotated_kernel<1>, args, items);
    return;
  }
  const int64_t count = k.numel() / kChunk;
  launch(stream_,
         {static_cast<unsigned>((count + kThreads - 1) / kThreads), kThreads, 0,
          starts_early(k.dim(0) * k.dim(1))},
         append_kv_kernel, static_cast<uint4*>(k_cache.raw()), static_cast<uint4*>(v_cache.raw()),
         cache_fault_.get(), static_cast<const uint4*>(k.raw()), static_cast<const uint4*>(v.raw()),
         start.data<int32_t>(), count, row_values / kChunk, checked_int(k.dim(1)),
         checked_int(k_cache.dim(1)));
}

// Of each part of the keys: a partial output, then its maximum and sum.
int64_t attention_cached_scratch_bytes(int64_t batch, int64_t heads, int64_t d, int64_t t_max) {
  const int64_t parts = batch * heads * ceil_div(checked_int(t_max), split_keys(checked_int(d)));
  return parts * (d * int64_t{sizeof(float)} + int64_t{sizeof(float2)});
}

void CudaBackend::do_attention_cached(const Tensor& o, const Tensor& q, const Tensor& k_cache,
                                      const Tensor& v_cache, const Tensor& start,
                                      const AttentionSpec& spec, const Tensor& scratch) {
  const int batch = checked_int(q.dim(0)), t = checked_int(q.dim(1));
  const int heads = checked_int(q.dim(2)), kv_heads = checked_int(k_cache.dim(2));
  const int t_max = checked_int(k_cache.dim(1));
  const int d = checked_int(q.dim(3)), window = window_of(spec.window);
  BBB_ASSERT(aligned(o, q, k_cache, v_cache));
  if (t > 1) {
    launch(stream_, {blocks_for(batch, 128, 1), 128}, check_positions_kernel, cache_fault_.get(),
           start.data<int32_t>(), batch, t, t_max);
    attention_forward(stream_,
                      {bf16_of(o), nullptr, bf16_of(q), bf16_of(k_cache), bf16_of(v_cache),
                       start.data<int32_t>(), batch, t, t_max, heads, kv_heads, d, window});
    return;
  }
  if (q.numel() == 0) return;
  const int splits = ceil_div(t_max, split_keys(d));
  float* const partial_o = static_cast<float*>(scratch.raw());
  const int64_t parts = int64_t{batch} * heads * splits;
  const DecodeArgs args{partial_o,
                        reinterpret_cast<float2*>(partial_o + parts * d),  // d is even
                        bf16_of(q),
                        bf16_of(k_cache),
                        bf16_of(v_cache),
                        start.data<int32_t>(),
                        cache_fault_.get(),
                        t_max,
                        heads,
                        kv_heads,
                        d,
                        splits,
                        window};
  with_padded_head_size(d, [&](auto size) {
    constexpr int D = size;
    constexpr int kGroups = combine_groups(D);
    const unsigned row_blocks =
        static_cast<unsigned>(kv_heads * ceil_div(heads / kv_heads, kQueryRows));
    launch(stream_,
           {{static_cast<unsigned>(splits), row_blocks, static_cast<unsigned>(batch)},
            32 * kWarps,
            kDecodeSmemBytes<D>,
            starts_early(batch)},
           attention_decode_kernel<D>, args);
    launch(stream_,
           {static_cast<unsigned>(batch * heads),
            {static_cast<unsigned>(d), kGroups},
            kGroups * (d * int64_t{sizeof(float)} + int64_t{sizeof(float2)}),
            starts_early(batch)},
           attention_combine_kernel<kGroups, split_keys(D)>, bf16_of(o), args);
  });
}

}  // namespace bbb::cuda
