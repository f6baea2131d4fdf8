// Codes that oscillate: the state byte of a weight (Backend::freeze_flips).
//
//   bit 0 frozen    bits 1-3 changes counted    bits 4-7 the level q - z, rounded down, mod 16
#pragma once

#include <cstdint>

#include "quant/hd.h"
#include "quant/tiles.h"

namespace bbb::quant {

constexpr int kMaxFlips = 7;

// Whether a parameter of these bits has codes.
BBB_HD bool has_codes(int bits) { return bits != kNotQuantized && bits != kNoQuantizer; }

// The state after a step in which the weight has this level. The first step only notes the level.
BBB_HD uint8_t next_flip_state(uint8_t state, int level, bool halve, bool first) {
  const int before = state >> 4, now = level & 15;
  int flips = state >> 1 & kMaxFlips;
  if (halve) flips /= 2;
  if (!first && before != now && flips < kMaxFlips) ++flips;
  const int frozen = (state & 1) | (flips == kMaxFlips ? 1 : 0);
  return static_cast<uint8_t>(now << 4 | flips << 1 | frozen);
}

}  // namespace bbb::quant
