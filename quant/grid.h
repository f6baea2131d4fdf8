// The group quantizer, min-max and asymmetric, or symmetric (SEQ): one definition for training,
// export, the packed kernels and the CPU reference.
//
// For one group x[0..G), b bits, L = 2^b - 1, master scale S (a power of two):
//     mn = min(min x, 0)    mx = max(max x, 0)    s_raw = (mx - mn) / L
//     e  = max(E4M3(s_raw / S), 2^-9)             to nearest for b <= 4, up for b = 8
//     s  = S e      z = clamp(round(-mn / s), 0, L)
//     q  = clamp(round(x / s) + z, 0, L)          x^ = S (q - z) e
//     round(x) = floor(x + 1/2)
// SEQ (numerics.md section 6): the range is -m .. m with m = max |x|, and has 2^b steps; with the
// same zero point in every group it is the same grid otherwise:
//     s_raw = 2 m / 2^b      z = L / 2      q = clamp(floor(x / s) + 1/2 + z, 0, L)
// A NaN or infinity anywhere makes S NaN, every e NaN and every x^ NaN, so that a loss shows it.
//
// Every function is IEEE arithmetic in `Real` (float, or double for gradient checks), compiled
// without contraction. So host and device give the same bits.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "quant/e4m3.h"
#include "quant/hd.h"
#include "quant/spec.h"

namespace bbb::quant {

BBB_HD constexpr int max_code(int bits) { return (1 << bits) - 1; }

BBB_HD ScaleRounding scale_rounding(int bits) {
  return bits <= 4 ? ScaleRounding::NearestEven : ScaleRounding::Up;
}

template <typename Real>
BBB_HD Real round_half_up(Real x) {
  return std::floor(x + Real(0.5));
}

// Clamps to [0, hi]; NaN becomes 0, so that the conversion to an integer is defined.
template <typename Real>
BBB_HD Real clamp_code(Real x, Real hi) {
  return x > Real(0) ? (x < hi ? x : hi) : Real(0);
}

// The larger; NaN if either is NaN. Of two zeros the first: from 0 on it is never -0.
template <typename Real>
BBB_HD Real max_or_nan(Real a, Real b) {
  return b > a || b != b ? b : a;
}

// The range of a group, widened to hold 0. A NaN, once included, stays.
template <typename Real>
struct Range {
  Real mn = 0;
  Real mx = 0;

  BBB_HD void include(Real x) {
    mn = x < mn || x != x ? x : mn;
    mx = x > mx || x != x ? x : mx;
  }
  BBB_HD void include(const Range& other) {
    include(other.mn);
    include(other.mx);
  }
  BBB_HD Real width() const { return mx - mn; }
  // Both ends times a range ratio.
  BBB_HD Range scaled(Real ratio) const { return {ratio * mn, ratio * mx}; }
  // The range of these levels: of SEQ the smallest with 0 in the middle.
  BBB_HD Range of(Levels levels) const {
    if (levels != Levels::Seq) return *this;
    const Real most = max_or_nan(mx, -mn);
    return {-most, most};
  }
};

// The ratios of a range search, 1, 0.9 .. 0.5, largest first; a group holds the index of its own.
constexpr int kRangeRatios = 6;
// The FP32 nearest to 1 - index / 10. As integers, the bits of floats from 0.5 to 1 are equally
// spaced. A table would be in a GPU thread's stack.
template <typename Real>
BBB_HD Real range_ratio(int index) {
  const uint32_t below_one = (static_cast<uint32_t>(index) * 0x333333u + 1) >> 1;
  return Real(std::bit_cast<float>(0x3F800000u - below_one));
}
// A learned ratio within its bounds; NaN stays.
template <typename Real>
BBB_HD Real learned_ratio(Real ratio) {
  return ratio < Real(1.0 / 64) ? Real(1.0 / 64) : ratio > Real(1.25) ? Real(1.25) : ratio;
}
// Whether groups of these bits are searched: at 8 bits a smaller range only clips.
BBB_HD constexpr bool is_searched(RangeRule rule, int bits) {
  return rule == RangeRule::Search && bits < 8;
}

// Steps of a group's range.
BBB_HD constexpr int range_steps(int bits, Levels levels = Levels::MinMax) {
  return max_code(bits) + (levels == Levels::Seq ? 1 : 0);
}

template <typename Real>
BBB_HD Real raw_scale(Real width, int bits, Levels levels = Levels::MinMax) {
  return width / Real(range_steps(bits, levels));
}

template <typename Real>
struct FloatFormat {
  using Bits = std::conditional_t<sizeof(Real) == 4, uint32_t, uint64_t>;
  static constexpr int kMantissa = sizeof(Real) == 4 ? 23 : 52;
  static constexpr int kBias = sizeof(Real) == 4 ? 127 : 1023;
  static constexpr Bits kMantissaMask = (Bits{1} << kMantissa) - 1;
};

// The smallest power of two P with 256 m P >= largest, for m = 1 + mantissa / 2^23. 1 for 0; NaN
// for NaN and infinity. Not below 2^-126, so that P and its products with E4M3 are exact in FP32.
template <typename Real>
BBB_HD Real power_of_two_over(Real largest, uint32_t mantissa) {
  using Format = FloatFormat<Real>;
  using Bits = typename Format::Bits;
  const Bits bits = std::bit_cast<Bits>(largest);  // not negative
  int exponent = static_cast<int>(bits >> Format::kMantissa) - Format::kBias;
  if (exponent > Format::kBias) return std::bit_cast<float>(0x7FC00000u);
  if (bits == 0) return Real(1);
  exponent -= (bits & Format::kMantissaMask) > Bits{mantissa} << (Format::kMantissa - 23) ? 7 : 8;
  if (exponent < -126) exponent = -126;
  return static_cast<Real>(std::bit_cast<float>(static_cast<uint32_t>(exponent + 127) << 23));
}

// S = 2^ceil(log2(largest / 448)), 448 = 1.75 * 2^8.
constexpr uint32_t kMasterMantissa = 0x600000u;
template <typename Real>
BBB_HD Real master_scale_of(Real largest) {
  return power_of_two_over(largest, kMasterMantissa);
}

// 1 / S, exact: S is a power of two from 2^-126 on, or NaN.
BBB_HD float inverse_master_scale(float s) {
  const uint32_t bits = std::bit_cast<uint32_t>(s);
  return s == s ? std::bit_cast<float>(0x7F000000u - bits) : s;
}

// S8 = 2^ceil(log2(largest / 256)), of the outlier groups of a row of activations.
template <typename Real>
BBB_HD Real outlier_master_scale_of(Real largest) {
  return power_of_two_over(largest, 0);
}

// E4M3(ratio), at least 2^-9.
template <typename Real>
BBB_HD uint8_t encode_ratio(Real ratio, int bits) {
  const uint8_t e = scale_rounding(bits) == ScaleRounding::NearestEven
                        ? e4m3_encode_nearest(ratio)
                        : e4m3_encode(ratio, ScaleRounding::Up);
  return e == 0 || (e > 0x7F && e != 0xFF) ? kE4m3SmallestCode : e & 0x7F;
}

template <typename Real>
BBB_HD uint8_t encode_scale(Real scale, Real master_scale, int bits) {
  return encode_ratio(scale / master_scale, bits);
}

template <typename Real>
BBB_HD Real step_of(uint8_t e, Real master_scale) {
  return master_scale * Real(e4m3_decode(e));
}

// The stored parameters of a group. SEQ stores no z; here it is 0.
struct GroupParams {
  uint8_t e;
  uint8_t z;
};

// From the range of these levels.
template <typename Real>
BBB_HD GroupParams group_params(const Range<Real>& range, Real master_scale, int bits,
                                Levels levels = Levels::MinMax) {
  // Divide by S first, a power of two: then the quotient is never subnormal where e depends on it.
  const uint8_t e = encode_ratio(raw_scale(range.width() / master_scale, bits, levels), bits);
  if (levels == Levels::Seq) return {e, 0};
  const Real z = round_half_up(-range.mn / step_of(e, master_scale));
  return {e, static_cast<uint8_t>(clamp_code(z, Real(max_code(bits))))};
}

// The parameters of an outlier group: 8 bits, e the power of two 2^ceil(log2(s_raw / S8)) within
// [2^-9, 2^8], so that (q - z) e has 8 significant bits.
template <typename Real>
BBB_HD GroupParams outlier_params(const Range<Real>& range, Real master_scale) {
  using Format = FloatFormat<Real>;
  const auto bits = std::bit_cast<typename Format::Bits>(
      raw_scale(range.width() / master_scale, kOutlierBits));  // not negative
  int exponent = static_cast<int>(bits >> Format::kMantissa) - Format::kBias;
  const bool finite = exponent <= Format::kBias;
  exponent += (bits & Format::kMantissaMask) != 0;
  exponent = exponent < -9 ? -9 : exponent > 8 ? 8 : exponent;
  // 2^-9 .. 2^-7 are subnormal codes 1, 2, 4; from 2^-6 on the mantissa is 0.
  const uint8_t e = !finite         ? kE4m3Nan
                    : exponent < -6 ? static_cast<uint8_t>(1 << (exponent + 9))
                                    : static_cast<uint8_t>((exponent + 7) << 3);
  const Real z = round_half_up(-range.mn / step_of(e, master_scale));
  return {e, static_cast<uint8_t>(clamp_code(z, Real(max_code(kOutlierBits))))};
}

// The zero point of a group whose stored one is z.
template <typename Real>
BBB_HD Real zero_point(uint8_t z, int bits, Levels levels) {
  return levels == Levels::Seq ? Real(max_code(bits)) / 2 : Real(z);
}

// x / s, rounded to where levels lie: the integers, of SEQ the middles between them.
template <typename Real>
BBB_HD Real rounded_steps(Real quotient, Levels levels) {
  return levels == Levels::Seq ? std::floor(quotient) + Real(0.5) : round_half_up(quotient);
}

// A zero point: an integer, or zero_point() of SEQ.
template <typename Real>
using ZeroPoint = std::type_identity_t<Real>;

// round(x / s) + z, before the clamp: the straight-through gradient is 0 outside [0, 2^b - 1].
template <typename Real>
BBB_HD Real unclamped_code(Real x, Real step, ZeroPoint<Real> z, Levels levels = Levels::MinMax) {
  return rounded_steps(x / step, levels) + z;
}

// Whether the clamp moves this code: its weight then takes no gradient. It never moves a NaN.
template <typename Real>
BBB_HD bool is_clipped(Real unclamped, int bits) {
  return unclamped < Real(0) || unclamped > Real(max_code(bits));
}

// Whether a weight takes no gradient: `quotient` is x / s, `steps` rounded_steps() of it and
// `clamped` its level in steps, q - z. Never where x is NaN.
template <typename Real, typename Rule>
BBB_HD bool is_masked(Real quotient, Real steps, Real clamped, const Rule& rule) {
  switch (rule.ste) {
    case Ste::Clip:
      return steps < clamped || steps > clamped;
    case Ste::Trust:
      return std::fabs(quotient - clamped) > Real(rule.trust) / 2;
    default:
      return false;
  }
}

template <typename Real>
BBB_HD Real code_of(Real x, Real step, ZeroPoint<Real> z, int bits,
                    Levels levels = Levels::MinMax) {
  return clamp_code(unclamped_code(x, step, z, levels), Real(max_code(bits)));
}

// The zero point of a learned grid.
template <typename Real>
BBB_HD uint8_t zero_of(Real zeta, int bits) {
  return static_cast<uint8_t>(clamp_code(round_half_up(zeta), Real(max_code(bits))));
}

// A group's sums of the gradients of a learned grid (Backend::learned_quant_backward).
template <typename Real>
struct GridGradient {
  Real scale = 0, zero = 0;

  // Adds the terms of a weight with gradient dw of its level, and returns its own gradient.
  BBB_HD Real take(Real dw, Real w, Real step, ZeroPoint<Real> z, int bits,
                   Levels levels = Levels::MinMax) {
    const Real quotient = w / step, code = rounded_steps(quotient, levels) + z;
    if (!is_clipped(code, bits)) {
      scale += dw * (code - z - quotient);
      return dw;
    }
    scale += dw * (clamp_code(code, Real(max_code(bits))) - z);
    zero -= dw * step;
    return Real(0);
  }
};

// Of a learned ratio (Backend::ratio_quant_backward): adds dw (q - z) to the group's `sum`, and
// returns the weight's own gradient. `code` is unclamped.
template <typename Real>
BBB_HD Real take_level(Real& sum, Real dw, Real code, Real z, int bits) {
  sum += dw * (clamp_code(code, Real(max_code(bits))) - z);
  return is_clipped(code, bits) ? Real(0) : dw;
}

// (q - z) e, the operand of the product: x^ / S. Exact in bf16 for b <= 4.
template <typename Real>
BBB_HD Real level_of(Real q, ZeroPoint<Real> z, Real e) {
  return (q - z) * e;
}

// 2 (q' - z) of a nested code's top `bits` bits q, with q' the middle or the lower end of the 8-bit
// codes that share them: an integer (numerics.md section 4).
BBB_HD int nested_level_doubled(int q, int z, int bits, NestedDequant dequant) {
  const int shift = kNestedBits - bits;
  const int offset = dequant == NestedDequant::Middle ? (1 << shift) - 1 : 0;
  return 2 * (q << shift) + offset - 2 * z;
}

// The Hadamard transform of a group (numerics.md section 2): x' = 2^-i H x for activations, w' =
// 2^-j H w for weights, i + j = log2 G, so that x' . w' = x . w.
BBB_HD constexpr int activation_rotation_shift(int group) {
  return group == 32 || group == 64 ? 3 : 4;
}
BBB_HD constexpr int weight_rotation_shift(int group) { return group == 32 ? 2 : 3; }

// One group's levels without a division per weight; for float the same bits as
// level_of(code_of(x)).
//
// S is a power of two, so x / S is exact, unless it is so small that its code is z anyway.
// With r = RN(1 / e) and q = RN(r x / S), the quotient to nearest is RN(q + r (x / S - q e))
// (Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor", IBM J.
// Res. Dev. 34, 1990). Requires |x / s| < 2^100. This holds for every x of a group from whose range
// e was computed, with the S of its tensor: |x / s| is at most about 2^b, twice that where the
// range was scaled by a ratio.
class GroupLevels {
 public:
  GroupLevels() = default;
  BBB_HD GroupLevels(uint8_t e, float inverse_master)
      : inverse_master_(inverse_master),
        scale_(e4m3_decode(e)),
        inverse_scale_(e4m3_reciprocal(scale_)) {}

  // z and the largest code.
  BBB_HD void set_zero_point(float z, float top) {
    lowest_ = 0.0f - z;  // -z would be -0 for z = 0
    highest_ = top - z;
  }
  // The levels of another group of the same tensor, held by another lane: `fetch` maps a number of
  // this group to that group's.
  template <typename Fetch>
  BBB_HD GroupLevels fetched(int bits, const Fetch& fetch) const {
    GroupLevels other = *this;
    other.scale_ = fetch(scale_);
    other.inverse_scale_ = fetch(inverse_scale_);
    other.lowest_ = fetch(lowest_);
    other.highest_ = other.lowest_ + float(max_code(bits));  // halves of integers: exact
    return other;
  }

  // x / s to nearest.
  BBB_HD float quotient(float x) const {
    const float scaled = x * inverse_master_;
    const float q = scaled * inverse_scale_;
    return std::fma(std::fma(-q, scale_, scaled), inverse_scale_, q);
  }
  BBB_HD float steps(float x) const { return round_half_up(quotient(x)); }
  // x / s + addend, within two units in the last place of x / s, rounded once.
  BBB_HD float near_quotient_plus(float x, float addend) const {
    return std::fma(x * inverse_master_, inverse_scale_, addend);
  }
  // Replaces x by its level; returns whether it takes no gradient.
  template <typename Rule>
  BBB_HD bool replace(float& x, const Rule& rule) const {
    const float exact = quotient(x), steps = rounded_steps(exact, rule.levels);
    const float within = clamped(steps);
    x = within * scale_;
    return is_masked(exact, steps, within, rule);
  }
  BBB_HD bool is_clipped(float steps) const { return steps < lowest_ || steps > highest_; }
  // q - z, q the code: NaN becomes the code 0.
  BBB_HD float clamped(float steps) const { return std::fmin(std::fmax(steps, lowest_), highest_); }
  BBB_HD float level(float steps) const { return clamped(steps) * scale_; }
  BBB_HD float code(float steps) const { return clamped(steps) - lowest_; }
  BBB_HD float scale() const { return scale_; }
  BBB_HD float zero_point() const { return 0.0f - lowest_; }

 private:
  float inverse_master_ = 1, scale_ = 1, inverse_scale_ = 1;
  float lowest_ = 0, highest_ = 0;  // the steps of the codes 0 and 2^b - 1
};

// The rule of most runs, as constants: kernels made for it do without the others' instructions.
struct PlainRule {
  static constexpr Levels levels = Levels::MinMax;
  static constexpr Ste ste = Ste::Clip;
  static constexpr float trust = 1;
};

// Calls fn(rule), with a PlainRule if it says the same.
template <typename Fn>
void with_rule(const WeightRule& rule, const Fn& fn) {
  if (rule == WeightRule())
    fn(PlainRule());
  else
    fn(rule);
}

struct QuantizedGroup {
  GroupParams params;
  GroupLevels levels;
};

// group_params and the levels of one tensor's groups, without divisions. 1 / S is exact, so a
// product with it is the quotient by S. The quotient by L is corrected as in GroupLevels.
class GroupQuantizer {
 public:
  GroupQuantizer() = default;
  BBB_HD GroupQuantizer(float master_scale, int bits)
      : inverse_master_(inverse_master_scale(master_scale)),
        top_(float(max_code(bits))),
        inverse_top_(1.0f / top_),
        bits_(bits) {}

  // From the range of these levels.
  BBB_HD QuantizedGroup operator()(const Range<float>& range, Levels kind = Levels::MinMax) const {
    const float width = range.width() * inverse_master_;
    if (kind == Levels::Seq) {  // the quotient by 2^b is exact
      const uint8_t e = encode_ratio(width / float(range_steps(bits_, kind)), bits_);
      GroupLevels levels(e, inverse_master_);
      levels.set_zero_point(zero_point<float>(0, bits_, kind), top_);
      return {{e, 0}, levels};
    }
    const float near = width * inverse_top_;
    const float ratio = std::fma(std::fma(-near, top_, width), inverse_top_, near);
    const uint8_t e = encode_ratio(ratio, bits_);
    GroupLevels levels(e, inverse_master_);
    const float z = clamp_code(levels.steps(-range.mn), top_);
    levels.set_zero_point(z, top_);
    return {{e, static_cast<uint8_t>(z)}, levels};
  }

 private:
  float inverse_master_ = 1, top_ = 1, inverse_top_ = 1;
  int bits_ = 1;
};

}  // namespace bbb::quant
