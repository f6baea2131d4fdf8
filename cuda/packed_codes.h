// Operand A of bf16 products from the file's codes of 3, 4 or 8 bits (cuda/packed_gemm.cu), made in
// registers as cuda/packed_sums.h makes it from tiles of 2-bit codes: A is 2^-15 (q - z) e.
//
// In shared memory are rows of 128 codes as they are stored, 16 kBits bytes each, their 16-byte
// chunks swizzled where a row is 64 or 128 bytes, and their entries of quant/slice_pairs.h. Lane
// 4 r + t makes A of rows r and r + 8, of positions 2t, 2t + 1 (a pair) and 2t + 8, 2t + 9 of every
// 16. A pair of codes, moved to the low bits of both halves of a register, is an integer in units
// of 2^-133 (packed_sums.h):
//
//     3, 4 bits   both codes are in one byte, which goes to both halves; a mask keeps one code in
//                 each, the upper one kBits further up. One fused multiply-add makes (q - z) e,
//                 exactly.
//     8 bits      two bytes. (q - z) is exact, and one more product, with e, is rounded to bf16: as
//                 an unpacked weight is.
#pragma once

#include "cuda/packed_sums.h"
#include "quant/slice_pairs.h"

namespace bbb::cuda {

#ifdef __CUDACC__

template <int kBits>
struct LaneCodes {
  static constexpr int kRowBytes = 16 * kBits;           // of 128 codes
  static constexpr int kChunks = kRowBytes / 16;         // of a row
  static constexpr int kShift = kBits == 8 ? 0 : kBits;  // of the upper code of a pair

  const unsigned char* row;  // row r; row r + 8 is 8 rows behind
  int lane;
  uint2 pairs[2];  // entries of both rows

  // codes, entries: of the warp's 16 rows.
  __device__ __forceinline__ void load(const unsigned char* codes, const unsigned char* entries,
                                       int in_lane) {
    lane = in_lane;
    row = codes + lane / 4 * kRowBytes;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      pairs[i] =
          *reinterpret_cast<const uint2*>(entries + (lane / 4 + 8 * i) * quant::kSlicePairBytes);
  }

  // As LaneTile::nan_bits().
  __device__ __forceinline__ uint32_t nan_bits() const {
    const uint32_t r = pairs[0].x + 0x01010101u, r8 = pairs[1].x + 0x01010101u;
    return ((r | r >> 8) & kNanRow) | ((r8 | r8 << 8) & kNanRow << 8);
  }

  // A of the four k16 products of sub-groups 2 kHalf and 2 kHalf + 1.
  template <int kHalf>
  __device__ __forceinline__ void make(uint32_t (&a)[4][4]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      load_pairs<kHalf>(a, i);
      multiply<2 * kHalf>(a[0], a[1], i);
      multiply<2 * kHalf + 1>(a[2], a[3], i);
    }
  }

 private:
  // The 16-byte chunk of a row where it is in memory.
  __device__ __forceinline__ const unsigned char* chunk(int number, int i) const {
    constexpr bool kSwizzled = kChunks % 4 == 0;
    const int key = kChunks == 8 ? lane / 4 : lane / 8;
    return row + i * 8 * kRowBytes + (kSwizzled ? number ^ key : number) * 16;
  }

  // Registers 0 and 2 (i = 0) or 1 and 3 (i = 1) of the four products of a half: both codes of a
  // pair, with other bits around them where kBits is 3 or 4.
  template <int kHalf>
  __device__ __forceinline__ void load_pairs(uint32_t (&a)[4][4], int i) const {
    const int t = lane % 4;
    if constexpr (kBits == 8) {
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int upper = 0; upper < 2; ++upper) {
          const uint32_t both =
              *reinterpret_cast<const uint16_t*>(chunk(kHalf * 4 + j, i) + upper * 8 + t * 2);
          a[j][upper * 2 + i] = __byte_perm(both, 0, 0x4140);
        }
    } else if constexpr (kBits == 4) {
#pragma unroll
      for (int group = 0; group < 2; ++group) {
        const uint4 words = *reinterpret_cast<const uint4*>(chunk(kHalf * 2 + group, i));
        const uint32_t byte = t * 0x1111;  // t of a word, everywhere
        a[group * 2][i] = __byte_perm(words.x, 0, byte);
        a[group * 2][2 + i] = __byte_perm(words.y, 0, byte);
        a[group * 2 + 1][i] = __byte_perm(words.z, 0, byte);
        a[group * 2 + 1][2 + i] = __byte_perm(words.w, 0, byte);
      }
    } else {
      uint32_t words[6];
#pragma unroll
      for (int j = 0; j < 3; ++j) {
        const uint2 two =
            *reinterpret_cast<const uint2*>(row + i * 8 * kRowBytes + kHalf * 24 + j * 8);
        words[2 * j] = two.x, words[2 * j + 1] = two.y;
      }
#pragma unroll
      for (int group = 0; group < 2; ++group) {
        // Shifted down by 6 t bits, a sub-group has the lane's pairs at bits 0, 24, 48 and 72.
        const uint32_t low = __funnelshift_r(words[group * 3], words[group * 3 + 1], 6 * t);
        const uint32_t middle = __funnelshift_r(words[group * 3 + 1], words[group * 3 + 2], 6 * t);
        const uint32_t high = words[group * 3 + 2] >> 6 * t;
        a[group * 2][i] = __byte_perm(low, 0, 0x0000);
        a[group * 2][2 + i] = __byte_perm(low, 0, 0x3333);
        a[group * 2 + 1][i] = __byte_perm(middle, 0, 0x2222);
        a[group * 2 + 1][2 + i] = __byte_perm(high, 0, 0x1111);
      }
    }
  }

  // Turns the codes of row r + 8 i into A of the two products of a sub-group.
  template <int kSubgroup>
  __device__ __forceinline__ void multiply(uint32_t (&a0)[4], uint32_t (&a1)[4], int i) const {
    constexpr uint32_t kTwice = 0x00010001u, kSign = 0x80008000u;
    constexpr uint32_t kByte = 0x4040u | kSubgroup | kSubgroup << 8;  // in both halves
    constexpr int kTop = 133 - kShiftedDown;                          // 2^kTop 2^-133 = 2^-15
    const uint32_t scale = __byte_perm(pairs[i].x, 0, kByte) << 4;    // 2^-120 e
    const uint32_t z = __byte_perm(pairs[i].y, 0, kByte) | kSign;     // -2^-133 z
    const uint32_t normal = mul_bf16x2(scale, power_of_two(119) * kTwice);
    if constexpr (kBits == 8) {
      const uint32_t e = mul_bf16x2(normal, power_of_two(1) * kTwice);
      const uint32_t offset = mul_bf16x2(z, power_of_two(kTop) * kTwice);
      const auto level = [&](uint32_t q) {
        return mul_bf16x2(fma_bf16x2(q, power_of_two(kTop) * kTwice, offset), e);
      };
#pragma unroll
      for (int j = i; j < 4; j += 2) a0[j] = level(a0[j]), a1[j] = level(a1[j]);
    } else {
      constexpr uint32_t kCode = (1u << kBits) - 1, kCodes = kCode | kCode << (16 + kShift);
      const uint32_t e =
          mul_bf16x2(normal, power_of_two(kTop + 1) | power_of_two(kTop + 1 - kShift) << 16);
      const uint32_t offset = mul_bf16x2(z, lower_twice(e));
#pragma unroll
      for (int j = i; j < 4; j += 2) {
        a0[j] = fma_bf16x2(a0[j] & kCodes, e, offset);
        a1[j] = fma_bf16x2(a1[j] & kCodes, e, offset);
      }
    }
  }
};

#endif
}  // namespace bbb::cuda
