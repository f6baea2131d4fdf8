// The operand of a product (numerics.md section 2) as a warp makes it, four positions a lane:
// gathered by the channel order from a row in shared memory, and rotated inside of groups. For
// activations that are not quantized; cuda/operand.cu makes all others. Roundings are the same.
#pragma once

#include <cstdint>

#include "cuda/ptx.h"
#include "quant/format.h"
#include "quant/grid.h"

namespace bbb::cuda {

// What a lane needs to know of an operand.
struct LaneOperand {
  // offsets (K'): OperandSpec's, aligned to 8 bytes. Null: position p holds channel p.
  LaneOperand(const quant::OperandView& v, const uint16_t* offsets)
      : offsets(offsets),
        k(static_cast<int>(v.k)),
        stored_k(static_cast<int>(v.stored_k)),
        pairs_begin(static_cast<int>(v.outliers)),
        pairs_end(static_cast<int>(v.pairs_end)),
        rotated_begin(static_cast<int>(v.rotated_begin)),
        rotated_end(static_cast<int>(v.rotated_end)),
        group(v.group),
        pair_factor(v.pair_factor),
        rotation_scale(1.0f / float(1 << quant::activation_rotation_shift(v.group))) {}

  const uint16_t* offsets;
  int k, stored_k;
  int pairs_begin, pairs_end, rotated_begin, rotated_end;  // positions
  int group;
  float pair_factor, rotation_scale;
};

// The bytes of a row of K channels in shared memory, K a multiple of 8: bf16, then zeros.
constexpr int64_t staged_bytes(int64_t k) { return 2 * k + 16; }

#ifdef __CUDACC__

// The values at four positions, in pairs of bf16, from a row in shared memory and their offsets in
// it.
__device__ __forceinline__ uint2 gather(const unsigned char* row, uint2 offsets) {
  const auto value = [&](uint32_t offset) -> uint32_t {
    return *reinterpret_cast<const uint16_t*>(row + offset);
  };
  const auto pair = [&](uint32_t both) {
    return __byte_perm(value(both & 0xFFFFu), value(both >> 16), 0x5410);
  };
  return {pair(offsets.x), pair(offsets.y)};
}

// x = 2^-i H x for the group of 32, 64 or 128 positions of which a lane has four, in pairs of bf16,
// by butterflies of strides 1, 2, 4 .. G / 2: the lower index gets u + v, the upper one u - v. The
// whole warp takes part; its lanes hold consecutive positions.
__device__ __forceinline__ uint2 rotate(uint2 pairs, const LaneOperand& operand, int lane) {
  const float2 low = unpack_bf16(pairs.x), high = unpack_bf16(pairs.y);
  const float a = low.x + low.y, b = low.x - low.y, c = high.x + high.y, d = high.x - high.y;
  float x[4] = {a + c, b + d, a - c, b - d};
  const auto exchange = [&](int lanes) {
    const float sign = (lane & lanes) != 0 ? -1.0f : 1.0f;
#pragma unroll
    for (float& value : x)
      value = fmaf(value, sign, __shfl_xor_sync(0xFFFFFFFFu, value, lanes));  // an exact product
  };
  exchange(1), exchange(2), exchange(4);
  if (operand.group > 32) exchange(8);
  if (operand.group > 64) exchange(16);
#pragma unroll
  for (float& value : x) value *= operand.rotation_scale;
  return {pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3])};
}

// Turns the channels of four positions from `at` on, a multiple of 4, into those of the operand:
// copies times pair_factor, groups in the rotated range rotated. The whole warp takes part; its
// lanes hold 128 consecutive positions, the first one a multiple of 128.
__device__ __forceinline__ uint2 finish_positions(uint2 pairs, const LaneOperand& operand, int at,
                                                  int lane) {
  if (operand.pair_factor != 1.0f && at >= operand.pairs_begin) {
    const uint32_t factor = pack_bf16(operand.pair_factor, operand.pair_factor);
    if (at < operand.pairs_end) pairs.x = mul_bf16x2(pairs.x, factor);
    if (at + 2 < operand.pairs_end) pairs.y = mul_bf16x2(pairs.y, factor);
  }
  const int first = at & ~127;
  if (first >= operand.rotated_end || first + 128 <= operand.rotated_begin) return pairs;
  const uint2 rotated = rotate(pairs, operand, lane);
  return at >= operand.rotated_begin && at < operand.rotated_end ? rotated : pairs;
}

#endif
}  // namespace bbb::cuda
