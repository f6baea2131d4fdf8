// OCP FP8 E4M3 ("fn"): 1 sign, 4 exponent bits of bias 7, 3 mantissa bits; no infinities.
//
// Largest 448, smallest normal 2^-6, smallest subnormal 2^-9; 0x7F and 0xFF are NaN.
// Source: OCP 8-bit Floating Point Specification, revision 1.0.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_fp8.h>
#endif

#include "quant/hd.h"

namespace bbb::quant {

constexpr float kE4m3Max = 448.0f;
constexpr float kE4m3Smallest = 0x1p-9f;
constexpr uint8_t kE4m3SmallestCode = 0x01;
constexpr uint8_t kE4m3Nan = 0x7F;

enum class ScaleRounding { NearestEven, Up };  // Up: away from zero

// The value of a code, exact.
BBB_HD float e4m3_decode(uint8_t code) {
  const uint32_t magnitude = code & 0x7Fu;
  const uint32_t sign = (code & 0x80u) << 24;
  if (magnitude == kE4m3Nan) return std::bit_cast<float>(0x7FC00000u | sign);
  // The seven bits, placed at the top of an FP32's mantissa and bottom of its exponent, are the
  // value times 2^-120, also for subnormals.
  return std::bit_cast<float>(magnitude << 20 | sign) * 0x1p120f;
}

// The code of a value: rounded, saturated at 448; NaN stays NaN.
template <typename Real>
BBB_HD uint8_t e4m3_encode(Real value, ScaleRounding rounding = ScaleRounding::NearestEven) {
  using Bits = std::conditional_t<sizeof(Real) == 4, uint32_t, uint64_t>;
  constexpr int kMantissa = sizeof(Real) == 4 ? 23 : 52;
  constexpr int kBias = sizeof(Real) == 4 ? 127 : 1023;
  constexpr Bits kSign = Bits{1} << (8 * sizeof(Real) - 1);

  const Bits bits = std::bit_cast<Bits>(value);
  const uint8_t sign = (bits & kSign) ? 0x80 : 0x00;
  const Real magnitude = std::bit_cast<Real>(bits & ~kSign);
  if (magnitude != magnitude) return sign | kE4m3Nan;
  if (magnitude >= Real(kE4m3Max)) return sign | 0x7E;
  // Count units of the last place: 2^(exponent - 3); below 2^-6 the unit of the subnormals.
  int exponent = static_cast<int>((bits & ~kSign) >> kMantissa) - kBias;
  if (exponent < -6) exponent = -6;
  const Real units = magnitude * std::bit_cast<Real>(Bits(kBias + 3 - exponent) << kMantissa);
  int n = static_cast<int>(units);
  const Real rest = units - Real(n);  // exact
  if (rounding == ScaleRounding::Up)
    n += rest > Real(0);
  else
    n += rest > Real(0.5) || (rest == Real(0.5) && (n & 1));
  // n is in [8, 16] for a normal number: the sum carries into the exponent by itself.
  return static_cast<uint8_t>(sign | (((exponent + 6) << 3) + n));
}

// The same to nearest, except that a NaN may lose its sign. One instruction from sm_89 on.
template <typename Real>
BBB_HD uint8_t e4m3_encode_nearest(Real value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  if constexpr (std::is_same_v<Real, float>)
    return __nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3);
#endif
  return e4m3_encode(value);
}

// One Newton step from an estimate of 1 / value.
BBB_HD float e4m3_refine_reciprocal(float value, float estimate) {
  return std::fma(std::fma(-value, estimate, 1.0f), estimate, estimate);
}

// 1 / value to nearest, if `value` is that of a positive code or NaN. One Newton step from an
// estimate within four units in the last place gives it for each of the 126 values (tested).
BBB_HD float e4m3_reciprocal(float value) {
#ifdef __CUDA_ARCH__
  float estimate;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(estimate) : "f"(value));
  return e4m3_refine_reciprocal(value, estimate);
#else
  return 1.0f / value;
#endif
}

}  // namespace bbb::quant
