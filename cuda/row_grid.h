// The grid of a quantized row of activations (numerics.md section 2): the master scales of the row,
// and a group's levels, its range searched if asked.
//
// Lanes hold kWidth consecutive positions each, a warp consecutive ones, so a group is G / kWidth
// lanes. The whole warp takes part. Files that include this are compiled without contraction, so
// that it gives the bits of quant/host.cpp.
#pragma once

#include "quant/group_range.h"

#ifdef __CUDACC__
namespace bbb::cuda {

// The levels of a group, x^ = (q - z) step.
struct ScaledGroup {
  quant::GroupLevels levels;
  float step;  // e S
};

// How the errors of a range search round x / s. Nearest: as a code is. Near: with a quotient that
// is not corrected, which costs a third less. Then x within 2^-21 of the middle of two levels may
// get the other one, and its error a different last bit.
enum class Quotient { Nearest, Near };

class RowGrid {
 public:
  RowGrid() = default;
  // From the largest group ranges of the row, of its plain and of its outlier groups. Even lanes
  // compute S, odd ones S8.
  __device__ __forceinline__ RowGrid(float most, float most_outlier, quant::InputGrid grid)
      : searches_(quant::is_searched(grid.range, grid.bits)), bits_(grid.bits) {
    const bool odd = threadIdx.x % 2 != 0;
    const float raw =
        quant::raw_scale(odd ? most_outlier : most, odd ? quant::kOutlierBits : grid.bits);
    const float scale = quant::power_of_two_over(raw, odd ? 0u : quant::kMasterMantissa);
    s_ = __shfl_sync(quant::kFullWarp, scale, 0);
    s8_ = __shfl_sync(quant::kFullWarp, scale, 1);
    quantizer_ = quant::GroupQuantizer(s_, grid.bits);
  }

  // Of this lane's group and its range. Each lane makes the levels of one ratio or two; those of
  // the best one are then fetched.
  template <Quotient kQuotient, int kWidth>
  __device__ __forceinline__ ScaledGroup group(const float (&x)[kWidth],
                                               const quant::Range<float>& range, bool outlier,
                                               int group) const {
    constexpr int kLanes = 32 / kWidth, kOwn = (quant::kRangeRatios + kLanes - 1) / kLanes;
    quant::GroupLevels levels;
    float least = 0.0f;
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
      const int ratio = own * kLanes + static_cast<int>(threadIdx.x) % kLanes;
      const float factor =
          searches_ ? quant::range_ratio<float>(min(ratio, quant::kRangeRatios - 1)) : 1.0f;
      const quant::GroupLevels made = quantizer_(range.scaled(factor)).levels;
      if (!searches_) {
        levels = made;
        break;
      }
      const auto of_lane = [&](int lane) {
        return made.fetched(
            bits_, [&](float value) { return __shfl_sync(quant::kFullWarp, value, lane, kLanes); });
      };
      int best = -1;
#pragma unroll 1  // fewer registers: other warps hide the latency
      for (int lane = 0; lane < min(kLanes, quant::kRangeRatios - own * kLanes); ++lane) {
        const float error = error_of<kQuotient>(x, of_lane(lane), group);
        if (own + lane == 0 || error < least) {  // of equal errors the larger ratio
          least = error;
          best = lane;
        }
      }
      const quant::GroupLevels found = of_lane(max(best, 0));
      if (best >= 0) levels = found;
    }
    float s = s_;
    if (outlier) {
      const quant::GroupParams params = quant::outlier_params(range, s8_);
      levels = quant::GroupLevels(params.e, quant::inverse_master_scale(s8_));
      levels.set_zero_point(float(params.z), float(quant::max_code(quant::kOutlierBits)));
      s = s8_;
    }
    return {levels, levels.scale() * s};
  }

 private:
  // The squared error of a group. The terms are added as a binary tree over positions: in the
  // thread, then over lanes.
  template <Quotient kQuotient, int kWidth>
  __device__ __forceinline__ float error_of(const float (&x)[kWidth],
                                            const quant::GroupLevels& levels, int group) const {
    const float step = levels.scale() * s_;  // exact
    float terms[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      constexpr float kInteger = 0x1.8p23f;  // a sum with it has no digits behind the point
      float steps;
      if constexpr (kQuotient == Quotient::Near)
        steps = levels.near_quotient_plus(x[i], kInteger) - kInteger;
      else  // floor(x / s + 1/2), by rounding down: exact below 2^22
        steps = __fadd_rd(levels.quotient(x[i]) + 0.5f, kInteger) - kInteger;
      // (q - z) s is exact, so this equals the difference of x^ and x.
      const float d = fmaf(levels.clamped(steps), step, -x[i]);
      terms[i] = d * d;
    }
#pragma unroll
    for (int stride = 1; stride < kWidth; stride *= 2)
#pragma unroll
      for (int i = 0; i < kWidth; i += 2 * stride) terms[i] = terms[i] + terms[i + stride];
    float error = terms[0];
    quant::each_stride<kWidth>(
        group, [&](int lanes) { error = error + __shfl_xor_sync(quant::kFullWarp, error, lanes); });
    return error;
  }

  quant::GroupQuantizer quantizer_;
  float s_ = 1, s8_ = 1;
  bool searches_ = false;
  int bits_ = 1;
};

}  // namespace bbb::cuda
#endif
