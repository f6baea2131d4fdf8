// Appending keys and values to a cache, with rotary positions and quantizing (numerics.md section
// 9).
//
// Shapes: q (B, T, H, d), rotated in place; k, v (B, T, K, d); caches (B, Tmax, K, d), or quantized
// as in quant::KvFormat; start I32 (B) on the device.
// Thread mapping: a block takes up to kThreads items of one token. Without quantizing, an item is
// up to eight neighbouring pairs (i, i + d/2) of a head of q, k or v. A quantized head of k or v is
// items of eight consecutive values, of which four neighbouring lanes hold a group; such an item
// also reads the other halves of its pairs.
// A rotated key is rounded to bf16 before it is quantized, as one that is not fused. Compiled
// without contraction, so that the codes are those of the CPU.
// Positions outside of the cache are not written: the backend throws when the host next waits for
// the device (CacheFault). Bytes: q twice, k and v once (quantized: k twice), the new rows once.
#include "cuda/attention.h"
#include "cuda/cuda_backend.h"
#include "cuda/early_start.h"
#include "cuda/kv_cache.h"
#include "cuda/ptx.h"
#include "cuda/rotation.h"
#include "cuda/vector.h"
#include "quant/grid.h"

namespace bbb::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWide = 8;  // pairs or values of an item
constexpr int kGroupLanes = KvFormat::kGroup / kWide;

struct AppendArgs {
  bf16* q;
  void *k_cache, *v_cache;
  const bf16 *k, *v;
  const float* inv_freq;  // null: nothing is rotated, q has no items
  const int* start;
  CacheFault* fault;
  int t, t_max, heads, kv_heads, half;
  float rope_factor;
};

// The first position of this block's sequence, or -1: a fault.
__device__ inline int first_position(const AppendArgs& args, int64_t b) {
  const int first = load_past_l1(args.start + b);
  if (in_cache(first, args.t, args.t_max)) return first;
  if (threadIdx.x == 0) *args.fault = {first, args.t, args.t_max};
  return -1;
}

// (d/2), in shared memory.
__device__ inline const float2* find_rotations(const AppendArgs& args, int64_t position) {
  float2* const rotations = reinterpret_cast<float2*>(dynamic_smem());
  for (int i = threadIdx.x; i < args.half; i += kThreads)
    rotations[i] = rotation(position, args.inv_freq[i], 1.0f, args.rope_factor);
  __syncthreads();
  return rotations;
}

// Pairs i .. i + kWidth - 1 of a head; rotations null: they are copied.
template <int kWidth>
__device__ inline void append_pairs(bf16* to, const bf16* from, int i, int half,
                                    const float2* rotations) {
  float low[kWidth], high[kWidth];
  load_past_l1(low, from + i, kWidth);
  load_past_l1(high, from + half + i, kWidth);
  if (rotations != nullptr) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) rotate(low[j], high[j], rotations[i + j]);
  }
  store(to + i, low, kWidth);
  store(to + half + i, high, kWidth);
}

// grid (B T, items / kThreads)
template <int kWidth>
__global__ void __launch_bounds__(kThreads) append_kernel(const AppendArgs args, int items) {
  start_next_kernel();
  wait_for_previous_kernel();
  const int64_t token = blockIdx.x, b = token / args.t;
  const int first = first_position(args, b);
  if (first < 0) return;
  const int64_t position = first + token % args.t;
  const float2* const rotations = find_rotations(args, position);

  const int item = blockIdx.y * kThreads + threadIdx.x;
  if (item >= items) return;
  const int chunks = args.half / kWidth, i = item % chunks * kWidth;
  const int row = item / chunks;  // a head of q, then of k, then of v
  const int64_t d = 2 * args.half;
  if (row < args.heads) {
    bf16* const head = args.q + (token * args.heads + row) * d;
    return append_pairs<kWidth>(head, head, i, args.half, rotations);
  }
  const bool is_v = row - args.heads >= args.kv_heads;
  const int head = row - args.heads - (is_v ? args.kv_heads : 0);
  append_pairs<kWidth>(static_cast<bf16*>(is_v ? args.v_cache : args.k_cache) +
                           ((b * args.t_max + position) * args.kv_heads + head) * d,
                       (is_v ? args.v : args.k) + (token * args.kv_heads + head) * d, i, args.half,
                       is_v ? nullptr : rotations);
}

// Eight values x of a group that four lanes share: their codes, packed, and the group's e and z.
template <int kBits>
__device__ inline void quantize(uint32_t (&codes)[kBits / 4], uint16_t& pair,
                                const float (&x)[kWide]) {
  quant::Range<float> range;
#pragma unroll
  for (int j = 0; j < kWide; ++j) range.include(x[j]);
#pragma unroll
  for (int lanes = 1; lanes < kGroupLanes; lanes *= 2)
    range.include({__shfl_xor_sync(0xffffffffu, range.mn, lanes),
                   __shfl_xor_sync(0xffffffffu, range.mx, lanes)});
  const quant::QuantizedGroup group = quant::GroupQuantizer(1.0f, kBits)(range);
#pragma unroll
  for (int word = 0; word < kBits / 4; ++word) {
    constexpr int kCodes = 32 / kBits;
    codes[word] = 0;
#pragma unroll
    for (int j = 0; j < kCodes; ++j)
      codes[word] |=
          static_cast<uint32_t>(group.levels.code(group.levels.steps(x[word * kCodes + j])))
          << j * kBits;
  }
  pair = static_cast<uint16_t>(group.params.e | group.params.z << 8);
}

// grid (B T, (q_items + items of k and v) / kThreads). q_items is a multiple of a warp.
template <int kBits>
__global__ void __launch_bounds__(kThreads)
    append_quantized_kernel(const AppendArgs args, const QuantizedLayout layout, int q_items) {
  start_next_kernel();
  wait_for_previous_kernel();
  const int64_t token = blockIdx.x, b = token / args.t;
  const int first = first_position(args, b);
  if (first < 0) return;
  const int64_t position = first + token % args.t;
  const float2* const rotations =
      args.inv_freq == nullptr ? nullptr : find_rotations(args, position);

  const int half = args.half, d = 2 * half;
  const int item = blockIdx.y * kThreads + threadIdx.x;
  if (item < q_items) {
    const int chunks = half / kWide, row = item / chunks;
    if (row >= args.heads) return;
    bf16* const head = args.q + (token * args.heads + row) * d;
    return append_pairs<kWide>(head, head, item % chunks * kWide, half, rotations);
  }
  // Lanes past the last item repeat it, so that whole warps exchange their ranges.
  const int chunks = d / kWide;
  const bool valid = item - q_items < 2 * args.kv_heads * chunks;
  const int chunk = min(item - q_items, 2 * args.kv_heads * chunks - 1);
  const bool is_v = chunk / chunks >= args.kv_heads;
  const int head = chunk / chunks - (is_v ? args.kv_heads : 0), i = chunk % chunks * kWide;
  const bf16* const from = (is_v ? args.v : args.k) + (token * args.kv_heads + head) * d;
  float x[kWide];
  load_past_l1(x, from + i, kWide);
  if (!is_v && rotations != nullptr) {
    const bool is_low = i < half;
    const int at = is_low ? i : i - half;
    float other[kWide];
    load_past_l1(other, from + (is_low ? i + half : at), kWide);
#pragma unroll
    for (int j = 0; j < kWide; ++j) {
      float low = is_low ? x[j] : other[j], high = is_low ? other[j] : x[j];
      rotate(low, high, rotations[at + j]);
      x[j] = __bfloat162float(__float2bfloat16_rn(is_low ? low : high));
    }
  }
  uint32_t codes[kBits / 4];
  uint16_t pair;
  quantize<kBits>(codes, pair, x);
  if (!valid) return;
  uint8_t* const cache = static_cast<uint8_t*>(is_v ? args.v_cache : args.k_cache);
  uint32_t* const to =
      reinterpret_cast<uint32_t*>(cache + layout.codes(b, position, head) + i * kBits / 8);
#pragma unroll
  for (int word = 0; word < kBits / 4; ++word) to[word] = codes[word];
  if (threadIdx.x % kGroupLanes != 0) return;
  uint16_t* const pairs = reinterpret_cast<uint16_t*>(cache + layout.pairs(b, position, head));
  const int group = i / KvFormat::kGroup;
  pairs[group] = pair;
  if (group % 2 == 0 && group + 1 == d / KvFormat::kGroup) pairs[group + 1] = 0;  // padding
}

// A thread copies 16 bytes of k and of v.
__global__ void copy_kernel(uint4* __restrict__ k_cache, uint4* __restrict__ v_cache,
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
                               const Tensor& inv_freq, KvFormat format,
                               double rope_factor) {
  BBB_ASSERT(aligned(k_cache, v_cache, k, v, q));
  const int64_t tokens = k.dim(0) * k.dim(1), d = k.dim(3);
  const int row_values = checked_int(k.dim(2) * d), t_max = checked_int(k_cache.dim(1));
  BBB_CHECK(row_values % kChunk == 0, "append_kv on the GPU takes rows of a multiple of ", kChunk,
            " values, not ", row_values);
  const AppendArgs args{q.defined() ? bf16_of(q) : nullptr,
                        k_cache.raw(),
                        v_cache.raw(),
                        bf16_of(k),
                        bf16_of(v),
                        inv_freq.defined() ? inv_freq.data<float>() : nullptr,
                        start.data<int32_t>(),
                        cache_fault_.get(),
                        checked_int(k.dim(1)),
                        t_max,
                        q.defined() ? checked_int(q.dim(2)) : 0,
                        checked_int(k.dim(2)),
                        checked_int(d / 2),
                        static_cast<float>(rope_factor)};
  const auto grid = [&](int items) {
    return dim3(static_cast<unsigned>(tokens), blocks_for(items, kThreads, 1).x);
  };
  const int64_t smem_bytes = args.half * int64_t{sizeof(float2)};
  if (format.quantized()) {
    const int q_items = ceil_div(args.heads * args.half / kWide, 32) * 32;
    launch(stream_,
           {grid(q_items + 2 * row_values / kWide), kThreads, smem_bytes, starts_early(tokens)},
           format.bits == 8 ? append_quantized_kernel<8> : append_quantized_kernel<4>, args,
           QuantizedLayout(format, t_max, args.kv_heads, d), q_items);
    return;
  }
  if (inv_freq.defined()) {
    const bool wide = args.half % kWide == 0;
    const int items = (args.heads + 2 * args.kv_heads) * (args.half / (wide ? kWide : 1));
    launch(stream_, {grid(items), kThreads, smem_bytes, starts_early(tokens)},
           wide ? append_kernel<kWide> : append_kernel<1>, args, items);
    return;
  }
  const int64_t count = k.numel() / kChunk;
  launch(stream_, {blocks_for(count, kThreads, 1), kThreads, 0, starts_early(tokens)}, copy_kernel,
         static_cast<uint4*>(k_cache.raw()), static_cast<uint4*>(v_cache.raw()), cache_fault_.get(),
         static_cast<const uint4*>(k.raw()), static_cast<const uint4*>(v.raw()),
         start.data<int32_t>(), count, row_values / kChunk, args.t, t_max);
}

}  // namespace bbb::cuda
