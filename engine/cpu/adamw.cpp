// The optimizer step. step_control decides the learning rate, the gradient factor and whether the
// step is skipped; it adds the squares of g in double, in a fixed order. adamw applies the step.
// With g' = kScale g, 0 where the quantizer clipped, and t = kApplied (Loshchilov & Hutter, 2019):
//
//     m = b1 m + (1 - b1) g';  v = b2 v + (1 - b2) g'^2
//     w -= lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay w)
//
// Moments of 8 bits (quant/moments.h) are packed after the step has used them.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numbers>

#include "engine/cpu/cpu_backend.h"
#include "engine/cpu/vector_math.h"
#include "quant/moments.h"

namespace bbb::engine {

static bool bit_of(const uint8_t* bits, int64_t i) { return bits[i / 8] >> (i % 8) & 1; }

template <typename T>
void CpuBackend<T>::do_step_control(const Tensor& control, const Tensor& loss, const Tensor& g,
                                    const Tensor& clipped, const Schedule& schedule,
                                    const Tensor&) {
  const T* gradient = data(g);
  const auto* mask = clipped.data<uint8_t>();
  const double squared = ordered_sum(g.numel(), [=](int64_t begin, int64_t end) {
    return lane_sum<double>(end - begin, [=](int64_t i) {
      const auto value = static_cast<double>(gradient[begin + i]);
      return mask != nullptr && bit_of(mask, begin + i) ? 0.0 : value * value;
    });
  });
  T* slot = data(control);
  const auto t = static_cast<double>(slot[kStep]);
  const auto total = static_cast<double>(schedule.total_steps);
  const double warmup = schedule.warmup_steps > 0
                            ? std::min(1.0, (t + 1) / static_cast<double>(schedule.warmup_steps))
                            : 1.0;
  const double cosine = (1 + std::cos(std::numbers::pi * std::min(t, total) / total)) / 2;
  const double decay = schedule.final_ratio + (1 - schedule.final_ratio) * cosine;
  const double norm = std::sqrt(static_cast<double>(static_cast<T>(squared)));
  const bool skip = !std::isfinite(*data(loss)) || !std::isfinite(norm);
  const bool clips = schedule.clip_norm > 0 && norm > schedule.clip_norm;

  slot[kStep] += 1;
  slot[skip ? kSkipped : kApplied] += 1;
  slot[kLr] = static_cast<T>(schedule.peak_lr * warmup * decay);
  slot[kScale] = static_cast<T>(skip ? 0.0 : clips ? schedule.clip_norm / norm : 1.0);
  slot[kSkip] = skip ? T{1} : T{0};
  slot[kGradNorm] = static_cast<T>(norm);
  slot[kLoss] = *data(loss);
}

template <typename T>
void CpuBackend<T>::do_muon_momentum(const Tensor& x, const Tensor& m, const Tensor& g,
                                     const Tensor& clipped, const Tensor& control, double decay,
                                     const Tensor&) {
  T *const out = data(x), *const moment = data(m);
  const T *const gradient = data(g), *const slot = data(control);
  const auto* mask = clipped.data<uint8_t>();
  const T scale = slot[kScale], keep = static_cast<T>(decay);
  if (slot[kSkip] != 0) return do_zero(x);
  const double squared = ordered_sum(x.numel(), [=](int64_t begin, int64_t end) {
    double sum = 0;
    for (int64_t i = begin; i < end; ++i) {
      const T d = mask != nullptr && bit_of(mask, i) ? T{0} : scale * gradient[i];
      moment[i] = keep * moment[i] + d;
      out[i] = d + keep * moment[i];
      sum += static_cast<double>(out[i]) * static_cast<double>(out[i]);
    }
    return sum;
  });
  const T factor = squared > 0 ? static_cast<T>(1 / std::sqrt(squared)) : T{0};
  parallel_for(x.numel(), kElementGrain, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) out[i] *= factor;
  });
}

namespace {

// Moments of 8 bits of one block, unpacked: its new ones are packed behind it.
template <typename T>
struct MomentBlock {
  uint8_t *first_codes, *second_codes;
  T first[quant::kTileAlign], second[quant::kTileAlign];

  // The block that holds element `begin`.
  MomentBlock(uint8_t* m, uint8_t* v, int64_t begin)
      : first_codes(m + quant::moment_bytes(begin)), second_codes(v + quant::moment_bytes(begin)) {
    const float first_scale = scale_of(first_codes), second_scale = scale_of(second_codes);
    for (int64_t i = 0; i < quant::kTileAlign; ++i) {
      first[i] = static_cast<T>(quant::first_moment(first_codes[i], first_scale));
      second[i] = static_cast<T>(quant::second_moment(second_codes[i], second_scale));
    }
  }
  void pack(uint32_t step) {
    float first_scale = 0, second_scale = 0;
    for (int64_t i = 0; i < quant::kTileAlign; ++i) {
      first_scale = std::max(first_scale, std::abs(static_cast<float>(first[i])));
      second_scale = std::max(second_scale, static_cast<float>(second[i]));
    }
    for (int i = 0; i < quant::kTileAlign; ++i) {
      const quant::MomentCodes codes = quant::moment_codes(
          static_cast<float>(first[i]), static_cast<float>(second[i]), first_scale, second_scale,
          step, i, {first_codes[i], second_codes[i]});
      first_codes[i] = codes.first;
      second_codes[i] = codes.second;
    }
    std::memcpy(first_codes + quant::kTileAlign, &first_scale, sizeof first_scale);
    std::memcpy(second_codes + quant::kTileAlign, &second_scale, sizeof second_scale);
  }
  static float scale_of(const uint8_t* codes) {
    float scale;
    std::memcpy(&scale, codes + quant::kTileAlign, sizeof scale);
    return scale;
  }
};

}  // namespace

template <typename T>
void CpuBackend<T>::do_adamw(const Tensor& w, const Tensor& m, const Tensor& v, const Tensor& g,
                             const Tensor& control, const ParameterTable& table,
                             const QuantizedWeights& q, const AdamWSpec& spec) {
  const T* slot = data(control);
  if (slot[kSkip] != 0) return;
  const auto t = static_cast<double>(slot[kApplied]);
  const T scale = slot[kScale], base_lr = slot[kLr];
  const T b1 = static_cast<T>(spec.beta1), b2 = static_cast<T>(spec.beta2);
  const T rest1 = static_cast<T>(1 - spec.beta1), rest2 = static_cast<T>(1 - spec.beta2);
  const T unbias1 = static_cast<T>(1 / (1 - std::pow(spec.beta1, t)));
  const T unbias2 = static_cast<T>(1 / (1 - std::pow(spec.beta2, t)));
  const T eps = static_cast<T>(spec.epsilon);
  const bool packed = m.dtype() == DType::U8;
  T *weight = data(w), *first = packed ? nullptr : data(m), *second = packed ? nullptr : data(v);
  auto *const first_codes = static_cast<uint8_t*>(m.raw()), *const second_codes =
                                                                static_cast<uint8_t*>(v.raw());
  const T* gradient = data(g);
  const auto* clipped = q.clipped.data<uint8_t>();
  const auto* tiles = static_cast<const quant::WeightTile*>(table.tiles.raw());
  const auto* rules = static_cast<const quant::SlotRule<T>*>(table.slots.raw());
  constexpr int64_t kTileGrain = kElementGrain / quant::kTileElements;
  parallel_for(table.tiles.dim(0), kTileGrain, [=](int64_t first_tile, int64_t last_tile) {
    for (int64_t tile = first_tile; tile < last_tile; ++tile) {
      const quant::SlotRule<T> rule = rules[tiles[tile].slot];
      const T lr = base_lr * rule.lr_factor, decay = rule.decay;
      const int64_t begin = tiles[tile].begin * quant::kTileAlign;
      if (rule.direct != 0) {
        for (int64_t i = begin; i < begin + tiles[tile].count; ++i)
          weight[i] -= lr * (gradient[i] + decay * weight[i]);
        continue;
      }
      if (packed) {
        for (int64_t at = begin; at < begin + tiles[tile].count; at += quant::kTileAlign) {
          MomentBlock<T> block(first_codes, second_codes, at);
          for (int64_t j = 0; j < quant::kTileAlign; ++j) {
            const int64_t i = at + j;
            const T grad = clipped != nullptr && bit_of(clipped, i) ? T{0} : scale * gradient[i];
            // Fused like the GPU's, so that codes are equal.
            const T mean = block.first[j] = std::fma(b1, block.first[j], rest1 * grad);
            const T square = block.second[j] = std::fma(b2, block.second[j], rest2 * grad * grad);
            weight[i] -=
                lr * (mean * unbias1 / (std::sqrt(square * unbias2) + eps) + decay * weight[i]);
          }
          block.pack(static_cast<uint32_t>(t));
        }
        continue;
      }
      for (int64_t i = begin; i < begin + tiles[tile].count; ++i) {
        const T grad = clipped != nullptr && bit_of(clipped, i) ? T{0} : scale * gradient[i];
        const T mean = b1 * first[i] + rest1 * grad;
        const T square = b2 * second[i] + rest2 * (grad * grad);
        const T old = weight[i];
        first[i] = mean;
        second[i] = square;
        weight[i] = old - lr * (mean * unbias1 / (std::sqrt(square * unbias2) + eps) + decay * old);
      }
    }
  });
  if (q.wq.defined()) do_max_group_range(q, w);
}

BBB_CPU_INSTANTIATE(step_control);
BBB_CPU_INSTANTIATE(muon_momentum);
BBB_CPU_INSTANTIATE(adamw);

}  // namespace bbb::engine
