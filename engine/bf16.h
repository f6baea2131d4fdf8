// bf16 on the host: the upper half of an F32, rounded to nearest even; NaN stays NaN.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace bbb::engine {

inline uint16_t to_bf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40;
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? quiet : nearest);
}

// Rounds to F32 by round-to-odd first, so that the second rounding sees an inexact first one.
inline uint16_t to_bf16(double x) {
  const float near = static_cast<float>(x);
  if (std::isnan(x) || static_cast<double>(near) == x) return to_bf16(near);
  uint32_t bits = std::bit_cast<uint32_t>(near);
  if (std::fabs(static_cast<double>(near)) > std::fabs(x)) --bits;
  return to_bf16(std::bit_cast<float>(bits | 1));
}

inline float from_bf16(uint16_t x) { return std::bit_cast<float>(static_cast<uint32_t>(x) << 16); }

}  // namespace bbb::engine
