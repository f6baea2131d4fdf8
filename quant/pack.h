// The bit stream of a row: code k is bits [k b, k b + b), bit 0 of a byte first (format.md).
#pragma once

#include <cstdint>

#include "quant/hd.h"

namespace bbb::quant {

constexpr bool is_packed_width(int bits) {
  return bits == 2 || bits == 3 || bits == 4 || bits == 8;
}

BBB_HD constexpr int64_t packed_bytes(int64_t count, int bits) { return (count * bits + 7) / 8; }
// Bytes of a row of K codes, and of its K / G zero points.
BBB_HD constexpr int64_t code_row_bytes(int64_t k, int bits) { return packed_bytes(k, bits); }
BBB_HD constexpr int64_t zero_row_bytes(int64_t k, int group, int bits) {
  return packed_bytes(k / group, bits);
}

// 32 codes fill exactly `bits` 32-bit words, so a group never shares a byte with its neighbour.
static_assert(code_row_bytes(32, 2) == 8 && code_row_bytes(32, 3) == 12);
static_assert(code_row_bytes(32, 4) == 16 && code_row_bytes(32, 8) == 32);
static_assert(zero_row_bytes(576, 32, 2) == 5 && zero_row_bytes(576, 32, 3) == 7);

// Code `index` of the stream; reads only the bytes that hold the code.
BBB_HD uint8_t packed_code(const uint8_t* stream, int64_t index, int bits) {
  const int64_t bit = index * bits;
  const int shift = static_cast<int>(bit & 7);
  uint32_t word = stream[bit >> 3];
  if (shift + bits > 8) word |= static_cast<uint32_t>(stream[(bit >> 3) + 1]) << 8;
  return static_cast<uint8_t>(word >> shift & ((1u << bits) - 1));
}

// stream: packed_bytes(count, bits), overwritten; the bits after the last code are 0.
BBB_HD void pack_codes(uint8_t* stream, const uint8_t* codes, int64_t count, int bits) {
  uint32_t pending = 0;
  int filled = 0;
  for (int64_t i = 0; i < count; ++i) {
    pending |= static_cast<uint32_t>(codes[i]) << filled;
    for (filled += bits; filled >= 8; filled -= 8, pending >>= 8)
      *stream++ = static_cast<uint8_t>(pending);
  }
  if (filled > 0) *stream = static_cast<uint8_t>(pending);
}

BBB_HD void unpack_codes(uint8_t* codes, const uint8_t* stream, int64_t count, int bits) {
  for (int64_t i = 0; i < count; ++i) codes[i] = packed_code(stream, i, bits);
}

}  // namespace bbb::quant
