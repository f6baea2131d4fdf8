// Moments of Adam in 8 bits: blocks of kTileAlign elements, each with its own scale.
//
//   block          kTileAlign codes, one a byte | scale, F32: the largest magnitude in the block
//   value          scale * level(code)
//   second moment  code c = 1 .. 255: floats from 2^-32 to 1 with 3 bits of mantissa; 0: 0
//   first moment   7 bits of the same from 2^-16 to 1, and a sign in the highest bit
//
// A moment changes by less in a step than the distance of two levels, so rounding to the nearest
// would freeze it. Rounding is stochastic instead: up with the probability that makes the mean
// right. The draw is a hash of the step, the place in the block and the codes before, and repeats.
// A second moment above 0 never becomes 0: its root divides the step.
#pragma once

#include <bit>
#include <cstdint>

#include "quant/hd.h"
#include "quant/tiles.h"

namespace bbb::quant {

constexpr int64_t kMomentBlockBytes = kTileAlign + 4;

// Of the blocks that hold so many elements, a multiple of kTileAlign.
constexpr int64_t moment_bytes(int64_t elements) {
  return elements / kTileAlign * kMomentBlockBytes;
}

constexpr int kMomentShift = 20;  // of a float's bits: what is left of its mantissa are 3 bits
constexpr int kFirstLevels = 127, kSecondLevels = 255;
constexpr int32_t kBitsOfOne = 0x3F800000;

// Level `code` of 0 .. levels; the highest is 1.
BBB_HD float moment_level(int code, int levels) {
  return code == 0 ? 0.0f : std::bit_cast<float>(kBitsOfOne - ((levels - code) << kMomentShift));
}

// Rounds x, 0 <= x <= 1, to the level below or above it. draw: uniform in [0, 2^kMomentShift).
// `least`: the lowest code of an x above 0.
BBB_HD int moment_code(float x, int levels, int least, uint32_t draw) {
  const int32_t lowest = kBitsOfOne - ((levels - 1) << kMomentShift),
                bits = std::bit_cast<int32_t>(x);
  if (x == 0.0f) return 0;
  if (bits >= lowest) return 1 + ((bits - lowest + static_cast<int32_t>(draw)) >> kMomentShift);
  const float part = x / std::bit_cast<float>(lowest) * static_cast<float>(1 << kMomentShift);
  return part > static_cast<float>(draw) || least == 1 ? 1 : 0;
}

struct MomentCodes {
  uint8_t first, second;
};

// An integer hash whose every output bit depends on every input bit ("lowbias32", C. Wellons,
// "Prospecting for Hash Functions", 2018).
BBB_HD uint32_t moment_hash(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

// Of an element: its moments by the scales of its block. step: of the optimizer; place: in the
// block; before: its codes so far.
BBB_HD MomentCodes moment_codes(float first, float second, float first_scale, float second_scale,
                                uint32_t step, int place, MomentCodes before) {
  const uint32_t draw =
      moment_hash(moment_hash(step) ^ (static_cast<uint32_t>(place) | uint32_t{before.first} << 8 |
                                       uint32_t{before.second} << 16));
  const uint32_t mask = (1u << kMomentShift) - 1;
  const bool negative = first < 0.0f;
  const float magnitude = negative ? -first : first;
  const int code =
      first_scale > 0.0f ? moment_code(magnitude / first_scale, kFirstLevels, 0, draw & mask) : 0;
  const int square = second_scale > 0.0f ? moment_code(second / second_scale, kSecondLevels, 1,
                                                       moment_hash(draw) & mask)
                                         : 0;
  return {static_cast<uint8_t>(negative ? code | 128 : code), static_cast<uint8_t>(square)};
}

BBB_HD float first_moment(uint8_t code, float scale) {
  const float magnitude = scale * moment_level(code & 127, kFirstLevels);
  return code >= 128 ? -magnitude : magnitude;
}
BBB_HD float second_moment(uint8_t code, float scale) {
  return scale * moment_level(code, kSecondLevels);
}

}  // namespace bbb::quant
