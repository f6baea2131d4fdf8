// The quantizer on FP32 masters. The formulas are in quant/grid.h; this file calls them.
//
//   max_group_range       maximum group range of a parameter   4 B read an element
//   fake_quant            wq, e, z, clipped bits, S            4 B read, 2.2 B written; nothing if
//                                                              prequantized
//                         both: 1 B read a group if ranges have ratios
//   quantize_codes        codes                                4 B read, 1 B written
//   scale_codes           S, e, wq from sigma                  1 B read, 2 B written
//   scale_codes_backward  dsigma                               3 or 5 B read, 2 or 4 B a group
//                                                              written
//   learned_quant           S, e, z, wq from w, sigma, zeta    4 B read, 2 B written
//   learned_quant_backward  dw, dsigma, dzeta                  6 or 8 B read, 2 or 4 B written
//   ratio_quant             S, e, z, wq from w, ratio          8 B read, 2 B written
//   ratio_quant_backward    dw, dratio                         6 or 8 B read, 2 or 4 B written
//
// Thread mapping. The first two take all matrices of a model in one launch. A block takes one tile
// (quant/tiles.h), or several one after another. It walks a tile in rounds and loads all rounds at
// once: eight consecutive elements a thread, G / 8 lanes a group. The others take one matrix: four
// elements a thread, G / 4 lanes a group. A group is inside one warp; shuffles join its elements.
// The number of elements is a multiple of the group, so a group is entirely inside the matrix or
// entirely outside.
#include <cuda_bf16.h>

#include <algorithm>

#include "quant/cuda_kernels.h"
#include "quant/grid.h"
#include "quant/group_range.h"
#include "quant/launch.h"

namespace bbb::quant {

namespace {

constexpr int kThreads = 128;
constexpr int kPerThread = 4;
constexpr int kWide = 8;  // consecutive elements of a tile that a thread takes in a round
constexpr int64_t kMaxReduceBlocks = 1024;

int64_t blocks_for(int64_t count) {
  return (count + kThreads * kPerThread - 1) / (kThreads * kPerThread);
}

__device__ __forceinline__ int64_t thread_index() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

// x = w[0, kWide), by 16-byte loads; zeros if the thread is past the end of the tile.
__device__ __forceinline__ void load_wide(float (&x)[kWide], const float* w, bool inside) {
#pragma unroll
  for (int i = 0; i < kWide; i += 4) {
    const float4 quad =
        inside ? *reinterpret_cast<const float4*>(w + i) : float4{0.0f, 0.0f, 0.0f, 0.0f};
    x[i] = quad.x, x[i + 1] = quad.y, x[i + 2] = quad.z, x[i + 3] = quad.w;
  }
}

constexpr int kRounds = kTileElements / (kThreads * kWide);  // of a block over its tile

// The first element of this thread in a round, within the tile.
__device__ __forceinline__ int wide_offset(int round) {
  return (round * kThreads + static_cast<int>(threadIdx.x)) * kWide;
}

// The index of the range ratio of the group at `offset` within the tile.
template <int kGroup>
__device__ __forceinline__ int ratio_index(const uint8_t* ratios, int offset,
                                           const WeightTile& tile) {
  return ratios != nullptr && offset < tile.count ? ratios[offset / kGroup] : 0;
}

template <int kGroup>
__global__ void __launch_bounds__(kThreads)
    max_group_range_kernel(float* __restrict__ max_range, const float* __restrict__ w,
                           const uint8_t* __restrict__ ratios, const WeightTile* __restrict__ tiles,
                           const int32_t* __restrict__ bits, Levels levels) {
  const WeightTile tile = tiles[blockIdx.x];
  if (bits[tile.slot] == kNotQuantized) return;
  w += tile.begin * kTileAlign;
  if (ratios != nullptr) ratios += tile.begin * kTileAlign / kGroup;
  float x[kRounds][kWide];
  int ratio[kRounds];
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    load_wide(x[r], w + wide_offset(r), wide_offset(r) < tile.count);
    ratio[r] = ratio_index<kGroup>(ratios, wide_offset(r), tile);
  }
  float most = 0.0f;
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    Range<float> range = group_range(x[r], kGroup).of(levels);
    if (ratios != nullptr) range = range.scaled(range_ratio<float>(ratio[r]));
    most = max_nan(most, range.width());
  }
  block_max<kThreads>(max_range + tile.slot, most);
}

__global__ void __launch_bounds__(kThreads)
    largest_kernel(float* __restrict__ slot, const float* __restrict__ x, int64_t count) {
  float largest = 0.0f;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = thread_index(); i < count; i += stride) largest = max_or_nan(largest, x[i]);
  block_max<kThreads>(slot, largest);
}

// Replaces *s, the largest of the scales, by S.
__global__ void finish_master_scale_kernel(float* s) { *s = master_scale_of(*s); }

__device__ __forceinline__ unsigned bf16_pair(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const unsigned&>(pair);
}

__device__ __forceinline__ void store_bf16(__nv_bfloat16* out, int64_t quad, const float4& x) {
  reinterpret_cast<uint2*>(out)[quad] = {bf16_pair(x.x, x.y), bf16_pair(x.z, x.w)};
}

__device__ __forceinline__ void store_bf16(__nv_bfloat16* out, const float (&x)[kWide]) {
  *reinterpret_cast<uint4*>(out) = {bf16_pair(x[0], x[1]), bf16_pair(x[2], x[3]),
                                    bf16_pair(x[4], x[5]), bf16_pair(x[6], x[7])};
}

// Quantizes one tile with the S of its parameter; all threads of the block take part.
template <int kGroup, Rounding kRounding, typename Rule>
__device__ __forceinline__ void quantize_tile(
    __nv_bfloat16* __restrict__ wq, uint8_t* __restrict__ e, uint8_t* __restrict__ z,
    uint8_t* __restrict__ clipped, const float* __restrict__ w, const uint8_t* __restrict__ ratios,
    const WeightTile& tile, int bits, float master_scale, const Rule& rule) {
  const int64_t begin = tile.begin * kTileAlign;
  w += begin, wq += begin, clipped += begin / 8, e += begin / kGroup, z += begin / kGroup;
  if (ratios != nullptr) ratios += begin / kGroup;
  float x[kRounds][kWide];
#pragma unroll
  for (int r = 0; r < kRounds; ++r)
    load_wide(x[r], w + wide_offset(r), wide_offset(r) < tile.count);

  // In each round a thread has elements of one group. Lane l of a group computes the parameters of
  // round l % kRounds only, so that no lane computes those of every round.
  constexpr int kLanes = kGroup / kWide;
  static_assert(kLanes % kRounds == 0);
  const int lane = static_cast<int>(threadIdx.x) % kLanes, own_round = lane % kRounds;
  const int ratio = ratio_index<kGroup>(ratios, wide_offset(own_round), tile);
  Range<float> range;
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const Range<float> joined = group_range(x[r], kGroup);
    if (r == own_round) range = joined;
  }
  range = range.of(rule.levels);
  if (ratios != nullptr) range = range.scaled(range_ratio<float>(ratio));
  const QuantizedGroup own = GroupQuantizer(master_scale, bits)(range, rule.levels);
  if (lane < kRounds && wide_offset(own_round) < tile.count && bits != kNoQuantizer) {
    e[wide_offset(own_round) / kGroup] = own.params.e;
    z[wide_offset(own_round) / kGroup] = own.params.z;
  }

#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const GroupLevels group = own.levels.fetched(
        bits, [&](float number) { return __shfl_sync(kFullWarp, number, r, kLanes); });
    const int at = wide_offset(r);
    if (at >= tile.count) continue;
    unsigned mask = 0;
    if (bits != kNoQuantizer) {
      if constexpr (kRounding == Rounding::Identity) {
#pragma unroll
        for (int i = 0; i < kWide; ++i) x[r][i] /= master_scale;
      } else {
        mask = replace_by_levels(x[r], group, rule);
      }
    }
    store_bf16(wq + at, x[r]);
    clipped[at / 8] = static_cast<uint8_t>(mask);
  }
}

// Most tiles are prequantized, so a block checks several of them for those that are not.
constexpr int kTilesPerBlock = 8;

template <int kGroup, Rounding kRounding, typename Rule>
__global__ void __launch_bounds__(kThreads)
    fake_quant_kernel(__nv_bfloat16* __restrict__ wq, uint8_t* __restrict__ e,
                      uint8_t* __restrict__ z, uint8_t* __restrict__ clipped, float* __restrict__ s,
                      const float* __restrict__ w, const uint8_t* __restrict__ ratios,
                      const float* __restrict__ max_range, const float* __restrict__ prequantized,
                      const WeightTile* __restrict__ tiles, int64_t tile_count,
                      const int32_t* __restrict__ bits, Rule rule) {
  const int64_t first = int64_t{blockIdx.x} * kTilesPerBlock;
  __shared__ float scales[kTilesPerBlock];  // S of each tile that is to be quantized; else 0
  __shared__ int widths[kTilesPerBlock];    // their bit widths
  float scale = 0.0f;
  if (threadIdx.x < kTilesPerBlock) {
    if (first + threadIdx.x < tile_count) {
      const int slot = tiles[first + threadIdx.x].slot, width = bits[slot];
      if (width != kNotQuantized) {
        scale = width == kNoQuantizer
                    ? 1.0f
                    : master_scale_of(raw_scale(max_range[slot], width, rule.levels));
        s[slot] = scale;  // all tiles of a parameter write the same
        if (scale == prequantized[slot]) scale = 0.0f;
      }
      widths[threadIdx.x] = width;
    }
    scales[threadIdx.x] = scale;
  }
  if (!__syncthreads_or(scale != 0.0f)) return;
  for (int i = 0; i < kTilesPerBlock; ++i)
    if (scales[i] != 0.0f)  // NaN too
      quantize_tile<kGroup, kRounding>(wq, e, z, clipped, w, ratios, tiles[first + i], widths[i],
                                       scales[i], rule);
}

template <int kGroup>
__global__ void __launch_bounds__(kThreads)
    quantize_codes_kernel(uchar4* __restrict__ codes, const float4* __restrict__ w,
                          const uint8_t* __restrict__ e, const uint8_t* __restrict__ z,
                          const float* __restrict__ s, int64_t quads, int bits, Levels levels) {
  const int64_t i = thread_index();
  if (i >= quads) return;
  const int64_t group = i / (kGroup / kPerThread);
  const float zero = zero_point<float>(z[group], bits, levels), step = step_of(e[group], *s);
  const float4 x = w[i];
  const auto code = [&](float v) {
    return static_cast<uint8_t>(code_of(v, step, zero, bits, levels));
  };
  codes[i] = {code(x.x), code(x.y), code(x.z), code(x.w)};
}

template <int kGroup>
__global__ void __launch_bounds__(kThreads)
    scale_codes_kernel(__nv_bfloat16* __restrict__ wq, uint8_t* __restrict__ e,
                       const float* __restrict__ s, const uchar4* __restrict__ codes,
                       const uint8_t* __restrict__ z, const float* __restrict__ sigma,
                       int64_t quads, int bits, Levels levels) {
  constexpr int kLanes = kGroup / kPerThread;
  const int64_t i = thread_index();
  if (i >= quads) return;
  const int64_t group = i / kLanes;
  const uint8_t code = encode_scale(sigma[group], *s, bits);
  if (i % kLanes == 0) e[group] = code;
  const float scale = e4m3_decode(code), zero = zero_point<float>(z[group], bits, levels);
  const uchar4 q = codes[i];
  store_bf16(wq, i,
             {level_of(float(q.x), zero, scale), level_of(float(q.y), zero, scale),
              level_of(float(q.z), zero, scale), level_of(float(q.w), zero, scale)});
}

__device__ __forceinline__ float4 load_quad(const float* x, int64_t quad) {
  return reinterpret_cast<const float4*>(x)[quad];
}
__device__ __forceinline__ float4 load_quad(const __nv_bfloat16* x, int64_t quad) {
  const __nv_bfloat162* const pair = reinterpret_cast<const __nv_bfloat162*>(x) + 2 * quad;
  const float2 low = __bfloat1622float2(pair[0]), high = __bfloat1622float2(pair[1]);
  return {low.x, low.y, high.x, high.y};
}

__device__ __forceinline__ void put(float* out, float x) { *out = x; }
__device__ __forceinline__ void put(__nv_bfloat16* out, float x) { *out = __float2bfloat16_rn(x); }

template <int kGroup, typename T>
__global__ void __launch_bounds__(kThreads)
    scale_codes_backward_kernel(T* __restrict__ dsigma, const T* __restrict__ dw,
                                const uchar4* __restrict__ codes, const uint8_t* __restrict__ z,
                                int64_t quads, bool accumulate, int bits, Levels levels) {
  constexpr int kLanes = kGroup / kPerThread;
  const int64_t i = thread_index();
  float sum = 0.0f;
  if (i < quads) {
    const float zero = zero_point<float>(z[i / kLanes], bits, levels);
    const float4 d = load_quad(dw, i);
    const uchar4 q = codes[i];
    sum = (d.x * (float(q.x) - zero) + d.y * (float(q.y) - zero)) +
          (d.z * (float(q.z) - zero) + d.w * (float(q.w) - zero));
  }
#pragma unroll
  for (int lanes = 1; lanes < kLanes; lanes *= 2) sum += __shfl_xor_sync(kFullWarp, sum, lanes);
  if (i >= quads || i % kLanes != 0) return;
  T* out = dsigma + i / kLanes;
  put(out, accumulate ? float(*out) + sum : sum);
}

template <int kGroup>
__global__ void __launch_bounds__(kThreads)
    learned_quant_kernel(__nv_bfloat16* __restrict__ wq, uint8_t* __restrict__ e,
                         uint8_t* __restrict__ z, const float* __restrict__ s,
                         const float4* __restrict__ w, const float* __restrict__ sigma,
                         const float* __restrict__ zeta, int64_t quads, int bits, Levels levels) {
  constexpr int kLanes = kGroup / kPerThread;
  const int64_t i = thread_index();
  if (i >= quads) return;
  const int64_t group = i / kLanes;
  const uint8_t code = encode_scale(sigma[group], *s, bits);
  const uint8_t stored = zeta != nullptr ? zero_of(zeta[group], bits) : z[group];
  if (i % kLanes == 0) {
    e[group] = code;
    if (zeta != nullptr) z[group] = stored;
  }
  const float step = step_of(code, *s), scale = e4m3_decode(code);
  const float zero = zero_point<float>(stored, bits, levels);
  const float4 x = w[i];
  const auto level = [&](float v) {
    return level_of(code_of(v, step, zero, bits, levels), zero, scale);
  };
  store_bf16(wq, i, {level(x.x), level(x.y), level(x.z), level(x.w)});
}

__device__ __forceinline__ void store_quad(float* out, int64_t quad, const float4& x) {
  reinterpret_cast<float4*>(out)[quad] = x;
}
__device__ __forceinline__ void store_quad(__nv_bfloat16* out, int64_t quad, const float4& x) {
  store_bf16(out, quad, x);
}

template <int kGroup, typename T>
__global__ void __launch_bounds__(kThreads)
    learned_quant_backward_kernel(T* __restrict__ dw, T* __restrict__ dsigma, T* __restrict__ dzeta,
                                  const float4* __restrict__ w, const uint8_t* __restrict__ e,
                                  const uint8_t* __restrict__ z, const float* __restrict__ s,
                                  int64_t quads, int bits, Levels levels) {
  constexpr int kLanes = kGroup / kPerThread;
  const int64_t i = thread_index();
  GridGradient<float> sum;
  if (i < quads) {
    const float zero = zero_point<float>(z[i / kLanes], bits, levels);
    const float step = step_of(e[i / kLanes], *s);
    const float4 d = load_quad(dw, i), x = w[i];
    const auto take = [&](float dv, float v) { return sum.take(dv, v, step, zero, bits, levels); };
    store_quad(dw, i, {take(d.x, x.x), take(d.y, x.y), take(d.z, x.z), take(d.w, x.w)});
  }
#pragma unroll
  for (int lanes = 1; lanes < kLanes; lanes *= 2) {
    sum.scale += __shfl_xor_sync(kFullWarp, sum.scale, lanes);
    sum.zero += __shfl_xor_sync(kFullWarp, sum.zero, lanes);
  }
  if (i >= quads || i % kLanes != 0) return;
  put(dsigma + i / kLanes, sum.scale);
  if (dzeta != nullptr) put(dzeta + i / kLanes, sum.zero);
}

// The elements of a quad; zeros past the end, so that whole warps can take part.
__device__ __forceinline__ void load_quad(float (&x)[kPerThread], const float4* w, int64_t quad,
                                          int64_t quads) {
  const float4 v = quad < quads ? w[quad] : float4{0.0f, 0.0f, 0.0f, 0.0f};
  x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
}

// Clamps the ratios and finds the largest s_raw.
template <int kGroup>
__global__ void __launch_bounds__(kThreads)
    clamp_ratios_kernel(float* __restrict__ largest, float* __restrict__ ratio,
                        const float4* __restrict__ w, int64_t quads, int bits, Levels levels) {
  constexpr int kLanes = kGroup / kPerThread;
  const int64_t i = thread_index();
  float x[kPerThread];
  load_quad(x, w, i, quads);
  const Range<float> range = group_range(x, kGroup).of(levels);
  float raw = 0.0f;
  if (i < quads && i % kLanes == 0) {
    const float within = learned_ratio(ratio[i / kLanes]);
    ratio[i / kLanes] = within;
    raw = raw_scale(range.scaled(within).width(), bits, levels);
  }
  block_max<kThreads>(largest, raw);
}

template <int kGroup>
__global__ void __launch_bounds__(kThreads)
    ratio_quant_kernel(__nv_bfloat16* __restrict__ wq, uint8_t* __restrict__ e,
                       uint8_t* __restrict__ z, const float* __restrict__ s,
                       const float* __restrict__ ratio, const float4* __restrict__ w, int64_t quads,
                       int bits, Levels levels) {
  constexpr int kLanes = kGroup / kPerThread;
  const int64_t i = thread_index();
  float x[kPerThread];
  load_quad(x, w, i, quads);
  const Range<float> range = group_range(x, kGroup).of(levels);
  if (i >= quads) return;
  const QuantizedGroup group = GroupQuantizer(*s, bits)(range.scaled(ratio[i / kLanes]), levels);
  if (i % kLanes == 0) {
    e[i / kLanes] = group.params.e;
    z[i / kLanes] = group.params.z;
  }
  replace_by_levels(x, group.levels, WeightRule{levels, Ste::All, 1.0f});
  store_bf16(wq, i, {x[0], x[1], x[2], x[3]});
}

template <int kGroup, typename T>
__global__ void __launch_bounds__(kThreads)
    ratio_quant_backward_kernel(T* __restrict__ dw, T* __restrict__ dratio,
                                const float4* __restrict__ w, const uint8_t* __restrict__ e,
                                const uint8_t* __restrict__ z, const float* __restrict__ s,
                                int64_t quads, int bits, Levels levels) {
  constexpr int kLanes = kGroup / kPerThread;
  const int64_t i = thread_index();
  float x[kPerThread];
  load_quad(x, w, i, quads);
  const Range<float> range = group_range(x, kGroup).of(levels);
  float sum = 0.0f;
  if (i < quads) {
    const float zero = zero_point<float>(z[i / kLanes], bits, levels);
    const float step = step_of(e[i / kLanes], *s);
    const float4 d = load_quad(dw, i);
    const auto take = [&](float dv, float v) {
      return take_level(sum, dv, unclamped_code(v, step, zero, levels), zero, bits);
    };
    store_quad(dw, i, {take(d.x, x[0]), take(d.y, x[1]), take(d.z, x[2]), take(d.w, x[3])});
  }
#pragma unroll
  for (int lanes = 1; lanes < kLanes; lanes *= 2) sum += __shfl_xor_sync(kFullWarp, sum, lanes);
  if (i < quads && i % kLanes == 0)
    put(dratio + i / kLanes, sum * raw_scale(range.width(), bits, levels));
}

LaunchShape one_quad_a_thread(int64_t count) {
  return {dim3(static_cast<unsigned>(blocks_for(count))), dim3(kThreads)};
}

const float4* quads_of(const float* x) { return reinterpret_cast<const float4*>(x); }
const uchar4* quads_of(const uint8_t* x) { return reinterpret_cast<const uchar4*>(x); }

}  // namespace

void launch_max_group_range(cudaStream_t stream, float* max_range, float* prequantized,
                            int64_t slots, const float* w, const uint8_t* ratios,
                            const WeightTile* tiles, int64_t tile_count, const int32_t* bits,
                            int group, Levels levels) {
  for (float* cleared : {max_range, prequantized})
    BBB_CUDA(cudaMemsetAsync(cleared, 0, static_cast<size_t>(slots) * sizeof(float), stream));
  with_group(group, [&](auto size) {
    launch(stream, {dim3(static_cast<unsigned>(tile_count)), dim3(kThreads)},
           max_group_range_kernel<size>, max_range, w, ratios, tiles, bits, levels);
  });
}

void launch_fake_quant(cudaStream_t stream, __nv_bfloat16* wq, uint8_t* e, uint8_t* z,
                       uint8_t* clipped, float* s, const float* w, const uint8_t* ratios,
                       const float* max_range, const float* prequantized, const WeightTile* tiles,
                       int64_t tile_count, const int32_t* bits, int group, const WeightRule& rule,
                       Rounding rounding) {
  const int64_t blocks = (tile_count + kTilesPerBlock - 1) / kTilesPerBlock;
  with_group(group, [&](auto size) {
    with_rule(rule, [&]<typename Rule>(const Rule& of) {
      launch(stream, {dim3(static_cast<unsigned>(blocks)), dim3(kThreads)},
             rounding == Rounding::Identity ? fake_quant_kernel<size, Rounding::Identity, Rule>
                                            : fake_quant_kernel<size, Rounding::Nearest, Rule>,
             wq, e, z, clipped, s, w, ratios, max_range, prequantized, tiles, tile_count, bits, of);
    });
  });
}

void launch_quantize_codes(cudaStream_t stream, uint8_t* codes, const float* w, const uint8_t* e,
                           const uint8_t* z, const float* s, int64_t count, WeightGrid spec) {
  with_group(spec.group, [&](auto group) {
    launch(stream, one_quad_a_thread(count), quantize_codes_kernel<group>,
           reinterpret_cast<uchar4*>(codes), quads_of(w), e, z, s, count / kPerThread, spec.bits,
           spec.levels);
  });
}

// S of these scales.
static void launch_master_scale(cudaStream_t stream, float* s, const float* sigma, int64_t groups) {
  BBB_CUDA(cudaMemsetAsync(s, 0, sizeof(float), stream));
  const int64_t blocks = std::min((groups + kThreads - 1) / kThreads, kMaxReduceBlocks);
  launch(stream, {dim3(static_cast<unsigned>(blocks)), dim3(kThreads)}, largest_kernel, s, sigma,
         groups);
  launch(stream, {dim3(1), dim3(1)}, finish_master_scale_kernel, s);
}

void launch_scale_codes(cudaStream_t stream, __nv_bfloat16* wq, uint8_t* e, float* s,
                        const uint8_t* codes, const uint8_t* z, const float* sigma, int64_t count,
                        WeightGrid spec) {
  launch_master_scale(stream, s, sigma, count / spec.group);
  with_group(spec.group, [&](auto group) {
    launch(stream, one_quad_a_thread(count), scale_codes_kernel<group>, wq, e, s, quads_of(codes),
           z, sigma, count / kPerThread, spec.bits, spec.levels);
  });
}

template <typename T>
void launch_scale_codes_backward(cudaStream_t stream, T* dsigma, const T* dw, const uint8_t* codes,
                                 const uint8_t* z, int64_t count, WeightGrid spec,
                                 bool accumulate) {
  with_group(spec.group, [&](auto group) {
    launch(stream, one_quad_a_thread(count), scale_codes_backward_kernel<group, T>, dsigma, dw,
           quads_of(codes), z, count / kPerThread, accumulate, spec.bits, spec.levels);
  });
}

void launch_learned_quant(cudaStream_t stream, __nv_bfloat16* wq, uint8_t* e, uint8_t* z, float* s,
                          const float* w, const float* sigma, const float* zeta, int64_t count,
                          WeightGrid spec) {
  launch_master_scale(stream, s, sigma, count / spec.group);
  with_group(spec.group, [&](auto group) {
    launch(stream, one_quad_a_thread(count), learned_quant_kernel<group>, wq, e, z, s, quads_of(w),
           sigma, zeta, count / kPerThread, spec.bits, spec.levels);
  });
}

template <typename T>
void launch_learned_quant_backward(cudaStream_t stream, T* dw, T* dsigma, T* dzeta, const float* w,
                                   const uint8_t* e, const uint8_t* z, const float* s,
                                   int64_t count, WeightGrid spec) {
  with_group(spec.group, [&](auto group) {
    launch(stream, one_quad_a_thread(count), learned_quant_backward_kernel<group, T>, dw, dsigma,
           dzeta, quads_of(w), e, z, s, count / kPerThread, spec.bits, spec.levels);
  });
}

void launch_ratio_quant(cudaStream_t stream, __nv_bfloat16* wq, uint8_t* e, uint8_t* z, float* s,
                        float* ratio, const float* w, int64_t count, WeightGrid spec) {
  const int64_t quads = count / kPerThread;
  BBB_CUDA(cudaMemsetAsync(s, 0, sizeof(float), stream));
  with_group(spec.group, [&](auto group) {
    launch(stream, one_quad_a_thread(count), clamp_ratios_kernel<group>, s, ratio, quads_of(w),
           quads, spec.bits, spec.levels);
    launch(stream, {dim3(1), dim3(1)}, finish_master_scale_kernel, s);
    launch(stream, one_quad_a_thread(count), ratio_quant_kernel<group>, wq, e, z, s, ratio,
           quads_of(w), quads, spec.bits, spec.levels);
  });
}

template <typename T>
void launch_ratio_quant_backward(cudaStream_t stream, T* dw, T* dratio, const float* w,
                                 const uint8_t* e, const uint8_t* z, const float* s, int64_t count,
                                 WeightGrid spec) {
  with_group(spec.group, [&](auto group) {
    launch(stream, one_quad_a_thread(count), ratio_quant_backward_kernel<group, T>, dw, dratio,
           quads_of(w), e, z, s, count / kPerThread, spec.bits, spec.levels);
  });
}
template void launch_ratio_quant_backward(cudaStream_t, float*, float*, const float*,
                                          const uint8_t*, const uint8_t*, const float*, int64_t,
                                          WeightGrid);
template void launch_ratio_quant_backward(cudaStream_t, __nv_bfloat16*, __nv_bfloat16*,
                                          const float*, const uint8_t*, const uint8_t*,
                                          const float*, int64_t, WeightGrid);
template void launch_learned_quant_backward(cudaStream_t, float*, float*, float*, const float*,
                                            const uint8_t*, const uint8_t*, const float*, int64_t,
                                            WeightGrid);
template void launch_learned_quant_backward(cudaStream_t, __nv_bfloat16*, __nv_bfloat16*,
                                            __nv_bfloat16*, const float*, const uint8_t*,
                                            const uint8_t*, const float*, int64_t, WeightGrid);
template void launch_scale_codes_backward(cudaStream_t, float*, const float*, const uint8_t*,
                                          const uint8_t*, int64_t, WeightGrid, bool);
template void launch_scale_codes_backward(cudaStream_t, __nv_bfloat16*, const __nv_bfloat16*,
                                          const uint8_t*, const uint8_t*, int64_t, WeightGrid,
                                          bool);

}  // namespace bbb::quant
