// The product of a tile of 2-bit weights (quant/packed_tiles.h) and a slice of one or more rows of
// x, as cuda/packed_gemv.cu describes it: integers by mma, one scale for each sub-group of 32.
#pragma once

#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "cuda/ptx.h"
#include "quant/packed_tiles.h"

#ifdef __CUDACC__
namespace bbb::cuda {

constexpr unsigned kOnes = 0x01010101u;
// 1.5 2^23 + 128: the low 16 bits of a sum with it are those of the integer and 128.
constexpr float kShiftedInteger = 12583040.0f;

// bf16 values as integers, x = unit v with |v| < 2^15.
struct IntegerUnit {
  float unit, inverse;

  // For values of which `largest` holds the bits of the largest |x|.
  __device__ __forceinline__ explicit IntegerUnit(uint32_t largest) {
    // One more in the last place: then v rounds to less than 2^15 - 128, and `high` fits a byte.
    const uint32_t exponent = max((largest + 1) >> 7, 21u);  // unit / 4^3 is a normal number
    unit = __uint_as_float(largest < 0x7F80u ? (exponent - 14) << 23 : 0x7FC00000u);
    inverse = __uint_as_float((268 - exponent) << 23);
  }
  // In its low 16 bits, v + 128.
  __device__ __forceinline__ uint32_t shifted(float x) const {
    return __float_as_uint(fmaf(x, inverse, kShiftedInteger));
  }
};

// A slice of x as the products take it: B of each sub-group, and a lane's sum of v and unit times
// 4^-i. They are those of sub-group t of one row of x, or of each sub-group i of row t.
template <bool kManyRows>
struct SliceOperand {
  static constexpr int kUnits = kManyRows ? 4 : 1;
  uint32_t b[4][2];
  int sum[kUnits];
  float unit[kUnits];

  // One row: B from the columns of this lane's octet.
  __device__ __forceinline__ void set_columns(uint32_t b0, uint32_t b1, int lane) {
    static_assert(!kManyRows);
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      b[g][0] = lane / 8 == g ? b0 : 0;
      b[g][1] = lane / 8 == g ? b1 : 0;
    }
  }
};

// x, in a register: a loop would compute it again.
__device__ __forceinline__ int kept(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Where a lane reads in a tile, and which zero points.
struct TileLane {
  int codes, scales, zeros;  // bytes from the tile's start
  int zero_mask;             // one row: of sub-group t

  __device__ __forceinline__ explicit TileLane(int lane)
      : codes(kept(lane * 16)),
        scales(kept(quant::kTileScales + lane * 2)),
        zeros(kept(quant::kTileZeros + lane / 4 * 2)),
        zero_mask(kept(3 << (lane % 4 * 2))) {}
};

// 256 high + low of a lane's two columns and its row r.
__device__ __forceinline__ int joined(int high, int low) { return high * 256 + low; }

// The values of two E4M3 codes.
__device__ __forceinline__ float2 decode_pair(uint32_t codes) {
  const __half2_raw halves =
      __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(codes), __NV_E4M3);
  return __half22float2(__half2(halves));
}

// sum[h] += e unit I of a lane's rows r and r + 8.
__device__ __forceinline__ void add_group(float (&sum)[2], const int (&c)[4], uint32_t zeros,
                                          uint32_t zero_mask, float2 e, int sum_v, float unit) {
  const int first = joined(c[0], c[1]) - static_cast<int>(zeros & zero_mask) * sum_v;
  const int second = joined(c[2], c[3]) - static_cast<int>(zeros >> 8 & zero_mask) * sum_v;
  sum[0] = fmaf(static_cast<float>(first), e.x * unit, sum[0]);
  sum[1] = fmaf(static_cast<float>(second), e.y * unit, sum[1]);
}

template <bool kManyRows>
__device__ __forceinline__ void multiply_tile(float (&sum)[2], const unsigned char* tile,
                                              const SliceOperand<kManyRows>& x,
                                              const TileLane& at) {
  const uint4 words = *reinterpret_cast<const uint4*>(tile + at.codes);
  const uint32_t zeros = *reinterpret_cast<const uint16_t*>(tile + at.zeros);
  int c[4] = {0, 0, 0, 0};
  const auto multiply = [&](int i) {
    const uint32_t mask = 3 * kOnes << (2 * i);
    const uint32_t a[4] = {words.x & mask, words.y & mask, words.z & mask, words.w & mask};
    mma_u8_s8(c, a, x.b[i][0], x.b[i][1]);
  };
  if constexpr (kManyRows) {
    const uint2 scales = *reinterpret_cast<const uint2*>(tile + quant::kTileScales +
                                                         (at.zeros - quant::kTileZeros) * 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      c[0] = c[1] = c[2] = c[3] = 0;
      multiply(i);
      const float2 e = decode_pair((i < 2 ? scales.x : scales.y) >> (i % 2 * 16) & 0xFFFFu);
      add_group(sum, c, zeros, 3u << (2 * i), e, x.sum[i], x.unit[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) multiply(i);
    const uint32_t scales = *reinterpret_cast<const uint16_t*>(tile + at.scales);
    add_group(sum, c, zeros, at.zero_mask, decode_pair(scales), x.sum[0], x.unit[0]);
  }
}

}  // namespace bbb::cuda
#endif
