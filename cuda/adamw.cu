// The optimizer on the device: the gradient norm and the schedule, then the decoupled update.
//
// The gradient g is bf16 or F32. The first moment m is bf16, rounded after the update.
//
// step_control takes two launches. The first adds the squares of the gradients that were not
// clipped, in the fixed order of reduce.h; it reads 2.1 bytes an element if g is bf16. The second,
// one block, adds the partial sums and writes the slots. With t = control[kStep]:
//     lr = peak min(1, (t + 1) / warmup) (f + (1 - f) (1 + cos(pi t / total)) / 2)
//     factor = min(1, clip / |g|)
// A loss or norm that is not finite sets kSkip; adamw then changes no weight and no moment. A
// square that overflows FP32 makes the norm infinite.
// adamw (Loshchilov & Hutter, "Decoupled weight decay regularization", 2019), with t =
// control[kApplied]:
//     g' = factor g, 0 where clipped;  m = b1 m + (1 - b1) g';  v = b2 v + (1 - b2) g'^2
//     w -= lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay w)
// Each block walks a run of tiles (quant/tiles.h), four consecutive elements a thread at a time.
// While the new weights are in registers, the block finds their maximum group range, for the next
// S, and prequantizes them with the current S. The next S is almost always the same; if so, the
// next step does not read its masters to quantize them. Traffic: 24.3 bytes an element if g is
// bf16, and one byte a group if ranges have ratios. Memory limits the time only if there are few
// instructions, so the root and the quotient are the hardware's approximations (ptx.h). The rest of
// this file is compiled as written, without contraction, like the quantizer's files.
// Moments of 8 bits (quant/moments.h): a warp takes one block of them at a time and finds the new
// scales by shuffles. Traffic: 16.4 bytes an element.
// A parameter whose rule is `direct` takes w -= lr (g + decay w) instead: Muon makes its g. The
// momentum for it, muon_momentum, takes two launches: 6 bytes an element if g is bf16, then 4 to
// divide by the norm, whose partial sums every block adds in the same order.
#include <algorithm>
#include <bit>
#include <cmath>
#include <type_traits>

#include "cuda/cuda_backend.h"
#include "cuda/ptx.h"
#include "cuda/reduce.h"
#include "cuda/vector.h"
#include "quant/group_range.h"
#include "quant/moments.h"

namespace bbb::cuda {
namespace {

using quant::WeightTile;

constexpr int kWide = 4;
constexpr int kMaskedWide = 8;  // elements of one byte of the mask
constexpr int kDepth = 4;       // loads that a thread of the norm has in flight
constexpr int kControlThreads = 1024;
constexpr int kAdamWThreads = 256, kAdamWBlocksPerProcessor = 4;

// kWide loaded elements, kept packed: unpacking them here would stall on the load.
template <typename T>
using Words = std::conditional_t<sizeof(T) == 4, uint4, uint2>;

// Streaming access: the data leaves the cache before any kernel reads it again.
template <typename T>
__device__ Words<T> load_streaming(const T* p) {
  return __ldcs(reinterpret_cast<const Words<T>*>(p));
}
template <typename T>
__device__ void store_streaming(T* p, const float (&x)[kWide]) {
  Vector<T, kWide> packed;
#pragma unroll
  for (int j = 0; j < kWide; ++j) from_float(packed.v[j], x[j]);
  __stcs(reinterpret_cast<Words<T>*>(p), std::bit_cast<Words<T>>(packed));
}

// Returns sum + the squares of kCount vectors of kMaskedWide elements at i, i + stride, ..., added
// in that order. Skips clipped elements. All loads come before the first addition.
template <int kCount, typename T>
__device__ float add_squares(float sum, const T* g, const uint8_t* clipped, int64_t i,
                             int64_t stride) {
  Vector<T, kMaskedWide> d[kCount];
  unsigned mask[kCount];
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    d[k] = *reinterpret_cast<const Vector<T, kMaskedWide>*>(g + i + k * stride);
    mask[k] = clipped != nullptr ? clipped[(i + k * stride) / 8] : 0;
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k)
#pragma unroll
    for (int j = 0; j < kMaskedWide; ++j) {
      const float x = to_float(d[k].v[j]);
      sum = mask[k] >> j & 1u ? sum : fmaf(x, x, sum);
    }
  return sum;
}

// Each block writes one partial sum. n is a multiple of kMaskedWide.
template <typename T>
__global__ void __launch_bounds__(kSumThreads)
    masked_squares_kernel(float* __restrict__ partials, const T* __restrict__ g,
                          const uint8_t* __restrict__ clipped, int64_t n) {
  __shared__ float shared[32];
  const int64_t stride = int64_t{gridDim.x} * blockDim.x * kMaskedWide;
  int64_t i = first_element<kMaskedWide>();
  float sum = 0.0f;
  for (; i + (kDepth - 1) * stride < n; i += kDepth * stride)
    sum = add_squares<kDepth>(sum, g, clipped, i, stride);
  for (; i < n; i += stride) sum = add_squares<1>(sum, g, clipped, i, stride);
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kControlThreads)
    step_control_kernel(float* __restrict__ control, const float* __restrict__ loss,
                        const float* __restrict__ partials, int count, Schedule schedule) {
  __shared__ float shared[32];
  float norm_squared = 0.0f;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kControlThreads)
    norm_squared += partials[i];
  norm_squared = block_sum(norm_squared, shared);
  if (threadIdx.x != 0) return;
  using namespace engine;  // kStep and the other slots
  const double t = control[kStep];
  const double warmup = static_cast<double>(schedule.warmup_steps);
  const double ramp = warmup > 0 ? fmin(1.0, (t + 1) / warmup) : 1.0;
  const double wave = (1 + cospi(t / static_cast<double>(schedule.total_steps))) / 2;
  const double f = schedule.final_ratio;
  const double norm = sqrt(static_cast<double>(norm_squared));
  const bool skip = !isfinite(loss[0]) || !isfinite(norm);
  const double factor = schedule.clip_norm > 0 ? fmin(1.0, schedule.clip_norm / norm) : 1.0;
  control[kStep] = static_cast<float>(t + 1);
  control[kLr] = static_cast<float>(schedule.peak_lr * ramp * (f + (1 - f) * wave));
  control[kScale] = skip ? 0.0f : static_cast<float>(factor);
  control[kSkip] = skip ? 1.0f : 0.0f;
  control[skip ? kSkipped : kApplied] += 1.0f;
  control[kGradNorm] = static_cast<float>(norm);
  control[kLoss] = loss[0];
}

struct AdamWConstants {
  float beta1, one_minus_beta1, log_beta1;
  float beta2, one_minus_beta2, log_beta2;
  float epsilon;
};

template <typename T>
__device__ Vector<T, kWide> elements(const Words<T>& words) {
  return std::bit_cast<Vector<T, kWide>>(words);
}

// The moments of a block of threads, from its first element on. A thread's next four are loaded
// while the current ones are in use.
struct WideMoments {
  bf16* m;
  float* v;

  struct Loaded {
    Words<bf16> m;
    Words<float> v;
  };
  __device__ WideMoments from(int64_t begin) const { return {m + begin, v + begin}; }
  __device__ Loaded load(uint32_t i) const {
    return {load_streaming(m + i), load_streaming(v + i)};
  }
  __device__ static void unpack(float (&first)[kWide], float (&second)[kWide],
                                const Loaded& loaded) {
    const auto of_m = elements<bf16>(loaded.m);
    const auto of_v = elements<float>(loaded.v);
#pragma unroll
    for (int j = 0; j < kWide; ++j) first[j] = to_float(of_m.v[j]), second[j] = of_v.v[j];
  }
  __device__ void store(const float (&first)[kWide], const float (&second)[kWide], const Loaded&,
                        uint32_t i, uint32_t /*step*/) const {
    store_streaming(m + i, first);
    store_streaming(v + i, second);
  }
};

// All threads of a warp call load() and store() together.
struct PackedMoments {
  uint8_t *m, *v;

  struct Loaded {
    uchar4 m, v;  // codes
    float m_scale, v_scale;
  };
  __device__ PackedMoments from(int64_t begin) const {
    return {m + quant::moment_bytes(begin), v + quant::moment_bytes(begin)};
  }
  // Of the block of moments that holds element i.
  __device__ static int64_t block(uint32_t i) {
    return int64_t{i / uint32_t{quant::kTileAlign}} * quant::kMomentBlockBytes;
  }
  __device__ static uchar4* codes(uint8_t* moments, uint32_t i) {
    return reinterpret_cast<uchar4*>(moments + block(i) + i % uint32_t{quant::kTileAlign});
  }
  __device__ static float* scale(uint8_t* moments, uint32_t i) {
    return reinterpret_cast<float*>(moments + block(i) + quant::kTileAlign);
  }
  __device__ Loaded load(uint32_t i) const {
    return {*codes(m, i), *codes(v, i), *scale(m, i), *scale(v, i)};
  }
  __device__ static void unpack(float (&first)[kWide], float (&second)[kWide],
                                const Loaded& loaded) {
    const uint8_t of_m[kWide] = {loaded.m.x, loaded.m.y, loaded.m.z, loaded.m.w};
    const uint8_t of_v[kWide] = {loaded.v.x, loaded.v.y, loaded.v.z, loaded.v.w};
#pragma unroll
    for (int j = 0; j < kWide; ++j) {
      first[j] = quant::first_moment(of_m[j], loaded.m_scale);
      second[j] = quant::second_moment(of_v[j], loaded.v_scale);
    }
  }
  __device__ void store(const float (&first)[kWide], const float (&second)[kWide],
                        const Loaded& before, uint32_t i, uint32_t step) const {
    float most = 0.0f, most_square = 0.0f;
#pragma unroll
    for (int j = 0; j < kWide; ++j) {
      most = fmaxf(most, fabsf(first[j]));
      most_square = fmaxf(most_square, second[j]);
    }
    const auto larger = [](float a, float b) { return fmaxf(a, b); };
    most = warp_reduce(most, larger), most_square = warp_reduce(most_square, larger);
    const uint8_t of_m[kWide] = {before.m.x, before.m.y, before.m.z, before.m.w};
    const uint8_t of_v[kWide] = {before.v.x, before.v.y, before.v.z, before.v.w};
    quant::MomentCodes made[kWide];
    const int place = static_cast<int>(i % uint32_t{quant::kTileAlign});
#pragma unroll
    for (int j = 0; j < kWide; ++j)
      made[j] = quant::moment_codes(first[j], second[j], most, most_square, step, place + j,
                                    {of_m[j], of_v[j]});
    *codes(m, i) = {made[0].first, made[1].first, made[2].first, made[3].first};
    *codes(v, i) = {made[0].second, made[1].second, made[2].second, made[3].second};
    if (place == 0) *scale(m, i) = most, *scale(v, i) = most_square;
  }
};

// A thread's four elements, and the byte of the mask that holds their bits.
template <typename T, typename Moments>
struct Quad {
  Words<float> w;
  typename Moments::Loaded moments;
  Words<T> g;
  unsigned clipped;
  int ratio;  // the index of the range ratio of their group
};

// The buffers of the step's quantizer (engine::QuantizedWeights).
struct QuantizerBuffers {
  const int32_t* bits;  // null: there is no quantizer
  float *max_range, *prequantized;
  const float* s;  // null: nothing is prequantized
  bf16* wq;
  uint8_t *e, *z, *clipped;
  const uint8_t* ratios;  // null: all are 1

  // The buffers from element `begin` on. Buffers with one entry a parameter stay whole.
  __device__ QuantizerBuffers from(int64_t begin, int group) const {
    QuantizerBuffers q = *this;
    if (bits != nullptr) q.clipped += begin / kMaskedWide;
    if (ratios != nullptr) q.ratios += begin / group;
    if (s != nullptr) q.wq += begin, q.e += begin / group, q.z += begin / group;
    return q;
  }
};

// Prequantizes the parameters that a warp walks through, each with its own S, and finds their
// maximum group ranges. The warp takes 128 consecutive elements at a time.
template <int kGroup, typename Rule>
class Prequantizer {
 public:
  // The buffers start at the first element of `tile`.
  __device__ Prequantizer(const QuantizerBuffers& q, const WeightTile* tile, const Rule& rule)
      : q_(q), next_(tile), begin_(tile->begin), rule_(rule) {}

  // Moves to the warp's next 128 elements; this thread's start at i. Returns true if they belong to
  // another parameter than the previous ones.
  __device__ bool enter(uint32_t i) {
    const int before = slot_;
    if (i >= end_) move_to(i);
    return slot_ != before;
  }
  __device__ int slot() const { return slot_; }
  // Processes the elements of the last enter(i): this thread's are `weight`, of a group with this
  // range ratio.
  __device__ void take(const float (&weight)[kWide], int ratio, uint32_t i) {
    if (bits_ == quant::kNotQuantized) return;
    quant::Range<float> range = quant::group_range(weight, kGroup).of(rule_.levels);
    if (q_.ratios != nullptr) range = range.scaled(quant::range_ratio<float>(ratio));
    most_ = quant::max_nan(most_, range.width());
    if (scale_ != 0.0f) quantize(weight, range, i);
  }
  __device__ void finish() {
    if (bits_ == quant::kNotQuantized) return;
    quant::warp_max(q_.max_range + slot_, most_);
    if (threadIdx.x % 32 == 0) q_.prequantized[slot_] = scale_;  // all warps write the same
  }

 private:
  __device__ void move_to(uint32_t i) {
    WeightTile tile;
    do {
      tile = *next_++;
      end_ = static_cast<uint32_t>((tile.begin - begin_) * quant::kTileAlign + tile.count);
    } while (i >= end_);
    if (tile.slot == slot_) return;
    finish();
    most_ = 0.0f;
    slot_ = tile.slot;
    bits_ = q_.bits != nullptr ? q_.bits[slot_] : quant::kNotQuantized;
    scale_ = 0.0f;
    if (bits_ == quant::kNotQuantized || q_.s == nullptr) return;
    const float s = q_.s[slot_];
    if (s > 0.0f) scale_ = s;  // not NaN
    quantizer_ = quant::GroupQuantizer(s, bits_);
  }

  // All threads of the warp must call this: a byte of the mask holds the bits of two threads.
  __device__ void quantize(const float (&weight)[kWide], const quant::Range<float>& range,
                           uint32_t i) {
    float level[kWide];
#pragma unroll
    for (int j = 0; j < kWide; ++j) level[j] = weight[j];
    unsigned mask = 0;
    if (bits_ != quant::kNoQuantizer) {
      const quant::QuantizedGroup group = quantizer_(range, rule_.levels);
      mask = quant::replace_by_levels(level, group.levels, rule_);
      if (i % kGroup == 0) {
        q_.e[i / kGroup] = group.params.e;
        q_.z[i / kGroup] = group.params.z;
      }
    }
    store(q_.wq + i, level, kWide);
    mask |= __shfl_down_sync(quant::kFullWarp, mask, 1) << kWide;
    if (i % kMaskedWide == 0) q_.clipped[i / kMaskedWide] = static_cast<uint8_t>(mask);
  }

  const QuantizerBuffers q_;
  const WeightTile* next_;
  const int begin_;
  const Rule rule_;
  uint32_t end_ = 0;  // of the warp's current tile
  int slot_ = -1, bits_ = quant::kNotQuantized;
  float scale_ = 0.0f;  // S of the current parameter; 0: it is not prequantized
  quant::GroupQuantizer quantizer_;
  float most_ = 0.0f;
};

// Blocks divide the tiles evenly. A thread requests its next elements before it computes the
// current ones, so that a load is always in flight. A byte of the mask is read and later
// overwritten by the same warp.
template <int kGroup, typename T, typename Moments, typename Rule>
__global__ void __launch_bounds__(kAdamWThreads, kAdamWBlocksPerProcessor)
    adamw_kernel(float* __restrict__ w, Moments moments, QuantizerBuffers q,
                 const T* __restrict__ g, const float* __restrict__ control,
                 const WeightTile* __restrict__ tiles, int64_t tile_count,
                 const quant::SlotRule<float>* __restrict__ slots, AdamWConstants c,
                 Rule weight_rule) {
  // A tile holds a multiple of a warp's 128 elements: no warp is partly outside.
  static_assert(quant::kTileAlign == 32 * kWide);
  constexpr uint32_t kStride = kAdamWThreads * kWide;
  // From here on, pointers and indices start at the block's first element.
  const WeightTile* const first = tiles + tile_count * blockIdx.x / gridDim.x;
  const WeightTile last = tiles[tile_count * (blockIdx.x + 1) / gridDim.x - 1];
  const int64_t begin = first->begin * quant::kTileAlign;
  const auto end = static_cast<uint32_t>(last.begin * quant::kTileAlign + last.count - begin);
  w += begin, g += begin;
  moments = moments.from(begin);
  q = q.from(begin, kGroup);
  uint32_t i = threadIdx.x * kWide;
  Prequantizer<kGroup, Rule> quantizer(q, first, weight_rule);
  if (control[engine::kSkip] != 0.0f) {  // the weights stay; prequantize with the same S
    for (; i < end; i += kStride) {
      float weight[kWide];
      load(weight, w + i, kWide);
      quantizer.enter(i);
      quantizer.take(weight, q.ratios != nullptr ? q.ratios[i / kGroup] : 0, i);
    }
    quantizer.finish();
    return;
  }

  const float lr = control[engine::kLr], factor = control[engine::kScale];
  const float t = control[engine::kApplied];
  // expm1 gives 1 - beta^t without the cancellation of the first steps. The correction of the
  // second moment is factored out of the root, so lr times the update is rate m / (sqrt(v) +
  // epsilon).
  const float root = sqrtf(-expm1f(t * c.log_beta2));
  const float base_rate = lr * root / -expm1f(t * c.log_beta1), epsilon = c.epsilon * root;
  float rate = 0.0f, decay = 0.0f;  // of the current parameter
  bool direct = false;
  Quad<T, Moments> next{};
  const auto request = [&] {
    if (i >= end) return;
    next.w = load_streaming(w + i);
    next.moments = moments.load(i);
    next.g = load_streaming(g + i);
    if (q.bits != nullptr) next.clipped = q.clipped[i / kMaskedWide];
    if (q.ratios != nullptr) next.ratio = q.ratios[i / kGroup];
  };
  request();
  while (i < end) {
    const Quad<T, Moments> now = next;
    const uint32_t at = i;
    i += kStride;
    request();
    if (quantizer.enter(at)) {
      const quant::SlotRule<float> rule = slots[quantizer.slot()];
      direct = rule.direct != 0.0f;
      rate = (direct ? lr : base_rate) * rule.lr_factor;
      decay = lr * rule.lr_factor * rule.decay;
    }
    const auto old_weight = elements<float>(now.w);
    const auto gradient = elements<T>(now.g);
    float weight[kWide], first_moment[kWide], second_moment[kWide];
    Moments::unpack(first_moment, second_moment, now.moments);
    const unsigned mask = now.clipped >> (at % kMaskedWide);
#pragma unroll
    for (int j = 0; j < kWide; ++j) {
      const float d = mask >> j & 1u ? 0.0f : factor * to_float(gradient.v[j]);
      first_moment[j] = fmaf(c.beta1, first_moment[j], c.one_minus_beta1 * d);
      second_moment[j] = fmaf(c.beta2, second_moment[j], c.one_minus_beta2 * d * d);
      const float quotient =
          first_moment[j] * reciprocal_approx(sqrt_approx(second_moment[j]) + epsilon);
      const float step = direct ? to_float(gradient.v[j]) : quotient;
      weight[j] = old_weight.v[j] - fmaf(decay, old_weight.v[j], rate * step);
    }
    store_streaming(w + at, weight);
    if (!direct)
      moments.store(first_moment, second_moment, now.moments, at, static_cast<uint32_t>(t));
    quantizer.take(weight, now.ratio, at);
  }
  quantizer.finish();
}

// One partial sum of squares a block. n is a multiple of kMaskedWide.
template <typename T>
__global__ void __launch_bounds__(kSumThreads)
    momentum_kernel(bf16* __restrict__ x, bf16* __restrict__ m, float* __restrict__ partials,
                    const T* __restrict__ g, const uint8_t* __restrict__ clipped,
                    const float* __restrict__ control, float keep, int64_t n) {
  __shared__ float shared[32];
  const bool skip = control[engine::kSkip] != 0.0f;
  const float factor = control[engine::kScale];
  const int64_t stride = int64_t{gridDim.x} * blockDim.x * kMaskedWide;
  float sum = 0.0f;
  for (int64_t i = first_element<kMaskedWide>(); i < n; i += stride) {
    float d[kMaskedWide], moment[kMaskedWide], step[kMaskedWide] = {};
    if (!skip) {
      load(d, g + i, kMaskedWide);
      load(moment, m + i, kMaskedWide);
      const unsigned mask = clipped != nullptr ? clipped[i / kMaskedWide] : 0;
#pragma unroll
      for (int j = 0; j < kMaskedWide; ++j) {
        d[j] = mask >> j & 1u ? 0.0f : factor * d[j];
        moment[j] = fmaf(keep, moment[j], d[j]);
        step[j] = fmaf(keep, moment[j], d[j]);
        sum = fmaf(step[j], step[j], sum);
      }
      store(m + i, moment, kMaskedWide);
    }
    store(x + i, step, kMaskedWide);
  }
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// x /= the root of the sum of `count` partial sums, which every block adds in the same order.
__global__ void __launch_bounds__(kSumThreads)
    normalize_kernel(bf16* __restrict__ x, const float* __restrict__ partials, int count,
                     int64_t n) {
  __shared__ float shared[32];
  float squared = 0.0f;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kSumThreads) squared += partials[i];
  squared = block_sum(squared, shared);
  const float factor = squared > 0.0f ? rsqrtf(squared) : 0.0f;
  const int64_t i = first_element<kMaskedWide>();
  if (i >= n) return;
  float value[kMaskedWide];
  load(value, x + i, kMaskedWide);
#pragma unroll
  for (float& each : value) each *= factor;
  store(x + i, value, kMaskedWide);
}

}  // namespace

void CudaBackend::do_step_control(const Tensor& control, const Tensor& loss, const Tensor& g,
                                  const Tensor& clipped, const Schedule& schedule,
                                  const Tensor& scratch) {
  float* const partials = static_cast<float*>(scratch.raw());
  const int64_t count = partials_for(g.numel(), kMaskedWide);
  with_elements(g, [&]<typename T>(const T* gradient) {
    launch(stream_, {dim3(static_cast<unsigned>(count)), dim3(kSumThreads)},
           masked_squares_kernel<T>, partials, gradient, clipped.data<uint8_t>(), g.numel());
  });
  launch(stream_, {dim3(1), dim3(kControlThreads)}, step_control_kernel, control.data<float>(),
         loss.data<float>(), partials, static_cast<int>(count), schedule);
}

void CudaBackend::do_muon_momentum(const Tensor& x, const Tensor& m, const Tensor& g,
                                   const Tensor& clipped, const Tensor& control, double decay,
                                   const Tensor& scratch) {
  float* const partials = static_cast<float*>(scratch.raw());
  const int64_t n = x.numel(), count = partials_for(n, kMaskedWide);
  with_elements(g, [&]<typename T>(const T* gradient) {
    launch(stream_, {dim3(static_cast<unsigned>(count)), dim3(kSumThreads)}, momentum_kernel<T>,
           bf16_of(x), bf16_of(m), partials, gradient, clipped.data<uint8_t>(),
           control.data<float>(), static_cast<float>(decay), n);
  });
  launch(stream_, {blocks_for(n, kSumThreads, kMaskedWide), dim3(kSumThreads)}, normalize_kernel,
         bf16_of(x), partials, static_cast<int>(count), n);
}

void CudaBackend::do_adamw(const Tensor& w, const Tensor& m, const Tensor& v, const Tensor& g,
                           const Tensor& control, const ParameterTable& table,
                           const QuantizedWeights& q, const AdamWSpec& spec) {
  const AdamWConstants constants{
      .beta1 = static_cast<float>(spec.beta1),
      .one_minus_beta1 = static_cast<float>(1 - spec.beta1),
      .log_beta1 = static_cast<float>(std::log(spec.beta1)),
      .beta2 = static_cast<float>(spec.beta2),
      .one_minus_beta2 = static_cast<float>(1 - spec.beta2),
      .log_beta2 = static_cast<float>(std::log(spec.beta2)),
      .epsilon = static_cast<float>(spec.epsilon),
  };
  QuantizerBuffers buffers{};
  if (q.wq.defined()) {
    const bool prequantizes = q.rounding == quant::Rounding::Nearest;
    buffers = {.bits = q.bits.data<int32_t>(),
               .max_range = q.max_range.data<float>(),
               .prequantized = q.prequantized.data<float>(),
               .s = prequantizes ? q.s.data<float>() : nullptr,
               .wq = bf16_of(q.wq),
               .e = q.e.data<uint8_t>(),
               .z = q.z.data<uint8_t>(),
               .clipped = q.clipped.data<uint8_t>(),
               .ratios = q.ratios.data<uint8_t>()};
    // The step's forward pass has already computed S from the old maxima. A skipped step measures
    // the ranges again.
    BBB_CUDA(
        cudaMemsetAsync(q.max_range.raw(), 0, static_cast<size_t>(q.max_range.bytes()), stream_));
  }
  const int64_t tiles = table.tiles.dim(0);
  const int64_t blocks =
      std::min<int64_t>(tiles, int64_t{properties_.multiProcessorCount} * kAdamWBlocksPerProcessor);
  const auto run = [&]<typename Moments>(const Moments& moments) {
    with_elements(g, [&]<typename T>(const T* gradient) {
      quant::with_group(q.group, [&](auto size) {
        quant::with_rule(q.rule, [&]<typename Rule>(const Rule& rule) {
          launch(stream_, {dim3(static_cast<unsigned>(blocks)), dim3(kAdamWThreads)},
                 adamw_kernel<size, T, Moments, Rule>, w.data<float>(), moments, buffers, gradient,
                 control.data<float>(), static_cast<const WeightTile*>(table.tiles.raw()), tiles,
                 static_cast<const quant::SlotRule<float>*>(table.slots.raw()), constants, rule);
        });
      });
    });
  };
  if (m.dtype() == DType::U8)
    run(PackedMoments{m.data<uint8_t>(), v.data<uint8_t>()});
  else
    run(WideMoments{bf16_of(m), v.data<float>()});
}

}  // namespace bbb::cuda
