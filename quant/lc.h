// LC, the affine vector grid (numerics.md section 8): one definition for training, export and both
// devices.
//
//   W = diag(v) H_N W^ H_K diag(u)          u (K), v (N), rounded to F16; W^ (N, K)
//   w = A q + c                             each vector of 4 along K of W^; q in {0 .. 3}^4
//   q = clamp(round(a), 0, 3)               a = t l + 3/2, l the latent; t = sqrt(K + N) / 2
//
// H is a Hadamard transform over blocks of 128 features, 64 or 32 where 128 does not divide, times
// 1 / sqrt(block): symmetric and orthonormal. Its butterflies (x, y) -> (x + y, x - y), x the lower
// index, have strides 1, 2, 4 .. block / 2. A map is (4, 5): row i is A[i, 0..4), c[i].
//
// Backward: d q = A^T dW^; dl = t slope(a) dq. The slope of `Dge` is that of a smooth step between
// two codes, capped; that of `Straight` is 1 where the clamp does not move the code.
//
// A block of W (128 x 128 or smaller) depends on the same block of W^ alone.
#pragma once

#include "quant/grid.h"

namespace bbb::quant {

// The gradient through the rounding of a latent.
enum class LcGradient { Dge, Straight };

constexpr int kLcVector = 4;                              // weights that share one affine map
constexpr int kLcBits = 2;                                // of a code
constexpr int kLcMapSize = kLcVector * (kLcVector + 1);   // A and c
constexpr int kLcLargestBlock = 128, kLcLeastBlock = 32;  // features of a Hadamard transform
constexpr float kLcCenter = 1.5f;                         // the mean of the codes
constexpr float kLcVariance = 1.25f;                      // of uniform codes

// How the latents of one matrix become codes.
struct LcRule {
  float spread = 1;  // t
  LcGradient gradient = LcGradient::Dge;
  Rounding rounding = Rounding::Nearest;  // Identity: q = a, u and v unrounded, slope 1
};

// Features of one Hadamard block; 0 if 32 does not divide.
BBB_HD constexpr int lc_block(int64_t features) {
  for (int block = kLcLargestBlock; block >= kLcLeastBlock; block /= 2)
    if (features % block == 0) return block;
  return 0;
}

inline float lc_spread(int64_t n, int64_t k) {
  return static_cast<float>(std::sqrt(static_cast<double>(n + k)) / 2);
}

// The factor of a Hadamard transform over `block` values, or over the product of two blocks.
template <typename Real>
BBB_HD Real lc_norm(int values) {
  return Real(1) / std::sqrt(Real(values));
}

// Rounds to F16, to nearest even, but never to 0: then a quotient by u or v exists. Beyond F16's
// range: infinite.
BBB_HD float lc_half(float x) {
  const float magnitude = std::fabs(x);
  if (x != x) return x;
  float rounded;
  if (magnitude < 0x1p-14f) {  // F16's subnormals, multiples of 2^-24: the ulp of [1/2, 1)
    rounded = (magnitude + 0.5f) - 0.5f;
    if (rounded == 0.0f) rounded = 0x1p-24f;
  } else {
    uint32_t bits = std::bit_cast<uint32_t>(magnitude);
    bits = (bits + 0xFFFu + (bits >> 13 & 1u)) & ~0x1FFFu;
    rounded =
        magnitude >= 65520.0f ? std::bit_cast<float>(0x7F800000u) : std::bit_cast<float>(bits);
  }
  return std::copysign(rounded, x);
}

// u or v as the forward uses it.
template <typename Real>
BBB_HD Real lc_scale(Real x, Rounding rounding) {
  return rounding == Rounding::Identity ? x : Real(lc_half(static_cast<float>(x)));
}

template <typename Real>
BBB_HD Real lc_position(Real latent, const LcRule& rule) {
  return Real(rule.spread) * latent + Real(kLcCenter);
}

template <typename Real>
BBB_HD Real lc_code(Real position, const LcRule& rule) {
  if (rule.rounding == Rounding::Identity) return position;
  return clamp_code(round_half_up(position), Real(max_code(kLcBits)));
}

// The latent in the middle of a code's bin.
template <typename Real>
BBB_HD Real lc_latent(Real code, const LcRule& rule) {
  return (code - Real(kLcCenter)) / Real(rule.spread);
}

// dq / da.
template <typename Real>
BBB_HD Real lc_slope(Real position, const LcRule& rule) {
  if (rule.rounding == Rounding::Identity) return Real(1);
  if (rule.gradient == LcGradient::Straight)
    return is_clipped(round_half_up(position), kLcBits) ? Real(0) : Real(1);
  const Real step = std::floor(position);  // between thresholds 1/2, 3/2 and 5/2
  const Real low = step > Real(0) ? (step < Real(2) ? step : Real(2)) : Real(0);
  const Real off = std::fabs(Real(2) * (position - low) - Real(1));
  const Real slope = std::pow(off, Real(-0.8)) / Real(5);
  return slope < Real(3) ? slope : Real(3);
}

template <typename Real>
struct LcMap {
  Real a[kLcVector][kLcVector];
  Real c[kLcVector];

  BBB_HD explicit LcMap(const Real* map) {
    for (int i = 0; i < kLcVector; ++i) {
      for (int j = 0; j < kLcVector; ++j) a[i][j] = map[i * (kLcVector + 1) + j];
      c[i] = map[i * (kLcVector + 1) + kLcVector];
    }
  }
  // x = A x + c.
  BBB_HD void apply(Real (&x)[kLcVector]) const {
    Real out[kLcVector];
    for (int i = 0; i < kLcVector; ++i) {
      out[i] = c[i];
      for (int j = 0; j < kLcVector; ++j) out[i] = out[i] + a[i][j] * x[j];
    }
    for (int i = 0; i < kLcVector; ++i) x[i] = out[i];
  }
  // x = A^T x.
  BBB_HD void transpose(Real (&x)[kLcVector]) const {
    Real out[kLcVector];
    for (int j = 0; j < kLcVector; ++j) {
      out[j] = a[0][j] * x[0];
      for (int i = 1; i < kLcVector; ++i) out[j] = out[j] + a[i][j] * x[i];
    }
    for (int j = 0; j < kLcVector; ++j) x[j] = out[j];
  }
  // c . x.
  BBB_HD Real constant(const Real (&x)[kLcVector]) const {
    Real sum = c[0] * x[0];
    for (int i = 1; i < kLcVector; ++i) sum = sum + c[i] * x[i];
    return sum;
  }
};

}  // namespace bbb::quant
