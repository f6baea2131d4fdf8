// The operand of a product (numerics.md section 2) as a warp makes it, four positions a lane:
// gathered by the channel order from a row in shared memory, and rotated inside of groups.
// Roundings are those of cuda/operand.cu: to bf16, or none in front of a quantizer
// (cuda/row_grid.h).
#pragma once

#include <cstdint>
#include <type_traits>

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
        grid(v.grid),
        pair_factor(v.pair_factor),
        rotation_scale(1.0f / float(1 << quant::activation_rotation_shift(v.group))) {}

  const uint16_t* offsets;
  int k, stored_k;
  int pairs_begin, pairs_end, rotated_begin, rotated_end;  // positions
  int group;
  quant::InputGrid grid;
  float pair_factor, rotation_scale;

  bool quantizes() const { return grid.bits < 16; }
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

// x = 2^-i H x for the group of 32, 64 or 128 positions of which a lane has four, by butterflies of
// strides 1, 2, 4 .. G / 2: the lower index gets u + v, the upper one u - v. The whole warp takes
// part; its lanes hold consecutive positions.
__device__ __forceinline__ float4 rotate(const float4& v, const LaneOperand& operand, int lane) {
  const float a = v.x + v.y, b = v.x - v.y, c = v.z + v.w, d = v.z - v.w;
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
  const float scale = operand.rotation_scale;
  return {x[0] * scale, x[1] * scale, x[2] * scale, x[3] * scale};
}

__device__ __forceinline__ float4 unpack_four(uint2 pairs) {
  const float2 low = unpack_bf16(pairs.x), high = unpack_bf16(pairs.y);
  return {low.x, low.y, high.x, high.y};
}
// Rounded to bf16, in pairs.
__device__ __forceinline__ uint2 rotate(uint2 pairs, const LaneOperand& operand, int lane) {
  const float4 x = rotate(unpack_four(pairs), operand, lane);
  return {pack_bf16(x.x, x.y), pack_bf16(x.z, x.w)};
}

// Turns the channels of four positions from `at` on, a multiple of 4, into those of the operand,
// Values float4 or, rounded to bf16, uint2: copies times pair_factor, groups in the rotated range
// rotated. The whole warp takes part; its lanes hold 128 consecutive positions, the first one a
// multiple of 128.
template <typename Values>
__device__ __forceinline__ Values finish_positions(uint2 pairs, const LaneOperand& operand, int at,
                                                   int lane) {
  const bool halves = operand.pair_factor != 1.0f && at >= operand.pairs_begin;
  const bool first_pair = halves && at < operand.pairs_end;
  const bool second_pair = halves && at + 2 < operand.pairs_end;
  Values values;
  if constexpr (std::is_same_v<Values, uint2>) {
    const uint32_t factor = pack_bf16(operand.pair_factor, operand.pair_factor);
    values = pairs;
    if (first_pair) values.x = mul_bf16x2(pairs.x, factor);
    if (second_pair) values.y = mul_bf16x2(pairs.y, factor);
  } else {
    values = unpack_four(pairs);
    const float first = first_pair ? operand.pair_factor : 1.0f;
    const float second = second_pair ? operand.pair_factor : 1.0f;
    values = {values.x * first, values.y * first, values.z * second, values.w * second};
  }
  const int first = at & ~127;
  if (first >= operand.rotated_end || first + 128 <= operand.rotated_begin) return values;
  const Values rotated = rotate(values, operand, lane);
  return at >= operand.rotated_begin && at < operand.rotated_end ? rotated : values;
}

#endif
}  // namespace bbb::cuda
