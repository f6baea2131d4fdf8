// Pieces of the products of many rows with 2-bit weights in tiles (cuda/packed_gemm.cu): operand A
// of bf16 products, made in registers; the sums of a cluster of blocks.
//
// (q - z) e is exact in bf16. The eight low bits of a bf16, the lowest bit of the exponent among
// them, are an integer in units of 2^-133. So the code q of sub-group i in its place is
// 2^(2i - 133) q, and a register of A takes one mask and one fused multiply-add:
//
//   2^(2i - 133) q  *  2^(118 - 2i) e  -  2^-15 z e       both factors and the offset are exact
//
// S 2^15 is applied at the end. The E4M3 code shifted into the bits of a bf16 is 2^-120 e,
// subnormal codes included. Of NaN it is 480; a sum of the codes' top bits finds it.
//
// The blocks of a cluster share output rows and tokens (rows of x), each with a part of K. Each
// adds up the sums of some of the tokens: the others copy theirs to its shared memory. They are
// added in the order of blocks, so runs repeat bit for bit.
#pragma once

#include <algorithm>

#include "cuda/early_start.h"
#include "cuda/hopper.h"
#include "cuda/packed_gemv.h"
#include "quant/packed_tiles.h"

namespace bbb::cuda {

// Floats from a token's sums to the next one's: four more than there are output rows. Then the
// lanes of a fragment's store use distinct banks.
BBB_HD constexpr int sums_pitch(int rows) { return rows + 4; }

#ifdef __CUDACC__

constexpr int kShiftedDown = 15;  // A is 2^-15 (q - z) e
constexpr int kWidth = 4;         // output rows of a thread

constexpr uint32_t power_of_two(int exponent) {  // as bf16
  return static_cast<uint32_t>(exponent + 127) << 7;
}

// A lane's part of its warp's row tile: words; scales of rows r and r + 8, two sub-groups a word;
// zero points of rows r and r + 8, in the halves.
struct LaneTile {
  uint32_t words[4];
  uint2 scales;
  uint32_t zeros;

  __device__ __forceinline__ void load(const unsigned char* tile, int lane) {
    const uint4 all = *reinterpret_cast<const uint4*>(tile + lane * 16);
    scales = *reinterpret_cast<const uint2*>(tile + quant::kTileScales + lane / 4 * 8);
    zeros = __byte_perm(*reinterpret_cast<const uint16_t*>(tile + quant::kTileZeros + lane / 4 * 2),
                        0, 0x4140);
    words[0] = all.x, words[1] = all.y, words[2] = all.z, words[3] = all.w;
  }

  // Bits 7, 23: row r has a NaN among its scales; bits 15, 31: row r + 8.
  __device__ __forceinline__ uint32_t nan_bits() const {
    return (scales.x + 0x01010101u) | (scales.y + 0x01010101u);
  }

  // A of the four k16 products of sub-groups 2 kHalf and 2 kHalf + 1.
  template <int kHalf>
  __device__ __forceinline__ void make(uint32_t (&a)[4][4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // 8 bits further down, bytes 1 and 3 are in the place of bytes 0 and 2.
      const uint32_t pairs[2] = {words[i], shifted_down<8>(words[i])};
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        a[i / 2][odd * 2 + i % 2] = pairs[odd];
        a[2 + i / 2][odd * 2 + i % 2] = pairs[odd];
      }
    }
    multiply<2 * kHalf>(a[0], a[1]);
    multiply<2 * kHalf + 1>(a[2], a[3]);
  }

 private:
  // Turns words into A of the two products of a sub-group.
  template <int kSubgroup>
  __device__ __forceinline__ void multiply(uint32_t (&a0)[4], uint32_t (&a1)[4]) const {
    constexpr uint32_t kCode = 0x00030003u << (2 * kSubgroup), kSign = 0x80008000u;
    constexpr uint32_t kTwice = 0x00010001u;
    constexpr int kTop = 133 + 120 - 119 - kShiftedDown;
    const uint32_t scale =  // 2^-120 e
        __byte_perm(kSubgroup < 2 ? scales.x : scales.y, 0, kSubgroup % 2 == 0 ? 0x4140 : 0x4342)
        << 4;
    const uint32_t e = mul_bf16x2(mul_bf16x2(scale, power_of_two(119) * kTwice),
                                  power_of_two(kTop - 2 * kSubgroup) * kTwice);
    const uint32_t offset = mul_bf16x2(mask_or<kCode, kSign>(zeros), e);
    const uint32_t e_row[2] = {lower_twice(e), upper_twice(e)};
    const uint32_t offset_row[2] = {lower_twice(offset), upper_twice(offset)};
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // registers 0 and 2 are of row r, 1 and 3 of row r + 8
      a0[i] = fma_bf16x2(a0[i] & kCode, e_row[i % 2], offset_row[i % 2]);
      a1[i] = fma_bf16x2(a1[i] & kCode, e_row[i % 2], offset_row[i % 2]);
    }
  }
};

// kWidth consecutive values of a row of y and of the addend, of which `count` are in the matrix.
struct Outputs {
  const TiledProduct& product;
  int64_t count;
  bool wide;  // one access for all of them

  __device__ __forceinline__ Outputs(const TiledProduct& product, int64_t count)
      : product(product), count(count) {
    const auto is_wide = [](const auto* p) {
      return reinterpret_cast<uintptr_t>(p) % (kWidth * sizeof(*p)) == 0;
    };
    wide = product.w.n % kWidth == 0 && is_wide(product.y_bf16) && is_wide(product.y_f32) &&
           is_wide(product.addend);
  }
  __device__ __forceinline__ void load(float (&x)[kWidth], int64_t at) const {
    if (wide) return load_past_l1(x, product.addend + at, kWidth);
#pragma unroll
    for (int i = 0; i < kWidth; ++i)
      if (i < count) x[i] = to_float(load_past_l1(product.addend + at + i));
  }
  __device__ __forceinline__ void store(const float (&x)[kWidth], int64_t at) const {
    if (product.y_f32 != nullptr)
      store(product.y_f32 + at, x);
    else
      store(product.y_bf16 + at, x);
  }
  template <typename T>
  __device__ __forceinline__ void store(T* y, const float (&x)[kWidth]) const {
    if (wide) return cuda::store(y, x, kWidth);
#pragma unroll
    for (int i = 0; i < kWidth; ++i)
      if (i < count) from_float(y[i], x[i]);
  }
};

constexpr uint32_t kNanRow = 0x00800080u;  // of LaneTile::nan_bits(): row r; 8 bits up, row r + 8

template <int kTokens>
struct ClusterSums {
  float* own;             // (kTokens, pitch): this block's
  float* received;        // (split - 1, tokens of this block, pitch): the others'
  uint32_t all_received;  // barrier
  int pitch, split, rank;

  // Block `block` adds up the tokens from here on.
  __device__ __forceinline__ int first_token(int block) const { return block * kTokens / split; }
  __device__ __forceinline__ int tokens(int block) const {
    return first_token(block + 1) - first_token(block);
  }

  // By one thread, before mbarrier_init_fence() and the cluster's first barrier.
  __device__ __forceinline__ void init() const {
    mbarrier_init(all_received, 1);
    mbarrier_expect(all_received, (split - 1) * tokens(rank) * pitch * 4);
  }

  // Called by all threads. Adds the other warpgroups' sums, which are stored behind `own`, to
  // `own`.
  __device__ __forceinline__ void add_groups(int thread, int groups) const {
    __syncthreads();
    float4* const first = reinterpret_cast<float4*>(own);
    const int count = kTokens * pitch / 4;
    for (int i = thread; i < count; i += groups * kWarpgroup) {
      float4 total = first[i];
      for (int group = 1; group < groups; ++group) {
        const float4 sum = first[group * count + i];
        total.x += sum.x, total.y += sum.y, total.z += sum.z, total.w += sum.w;
      }
      first[i] = total;
    }
  }

  // By all threads, which have written `own` and arrived once at the cluster's barrier. They wait
  // for it once more before they end.
  __device__ __forceinline__ void exchange(int thread) const {
    if (split > 1) {
      async_proxy_fence();
      cluster_wait();  // the others' barriers are initialised
    }
    __syncthreads();
    if (split == 1) return;
    if (thread < split && thread != rank) {  // sends block `thread` the sums of its tokens
      const int floats = tokens(thread) * pitch;
      copy_to_block(shared_address(received + (rank - (rank > thread)) * floats), all_received,
                    thread, shared_address(own + first_token(thread) * pitch), floats * 4);
    }
    __syncwarp();
    mbarrier_wait(all_received, 0);
    __syncwarp();
    cluster_arrive();
  }

  // y for rows [0, rows) from `first_row` on and this block's tokens, of which the first of all is
  // row `first` of x, (m, K). A thread takes kWidth output rows, and every warps-th token.
  __device__ __forceinline__ void write(const TiledProduct& product, float s, int64_t first_row,
                                        int rows, int first, int m) const {
    constexpr int kBatch = kTokens <= 32 ? 2 : 4;  // tokens at a time
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int warp = static_cast<int>(threadIdx.x) / 32, warps = static_cast<int>(blockDim.x) / 32;
    const int begin = first_token(rank), all = tokens(rank), count = min(all, m - first - begin);
    const int64_t n = product.w.n;
#pragma unroll 1
    for (int row = lane * kWidth; row < rows; row += 32 * kWidth) {
      if (first_row + row >= n) break;
      const int64_t out = int64_t{first + begin} * n + first_row + row;
      const Outputs outputs{product, n - first_row - row};
#pragma unroll 1
      for (int next = warp; next < count; next += kBatch * warps) {
        const auto token = [&](int i) { return next + i * warps; };
        float total[kBatch][kWidth] = {}, addend[kBatch][kWidth] = {};
        if (product.addend != nullptr)
#pragma unroll
          for (int i = 0; i < kBatch; ++i)
            if (token(i) < count) outputs.load(addend[i], out + token(i) * n);
#pragma unroll 1
        for (int block = 0; block < split; ++block) {
          const float* const from = block == rank
                                        ? own + begin * pitch
                                        : received + (block - (block > rank)) * all * pitch;
#pragma unroll
          for (int i = 0; i < kBatch; ++i)
            if (token(i) < count) {
              const float4 sum = *reinterpret_cast<const float4*>(from + token(i) * pitch + row);
              total[i][0] += sum.x, total[i][1] += sum.y;
              total[i][2] += sum.z, total[i][3] += sum.w;
            }
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          if (token(i) >= count) continue;
#pragma unroll
          for (int j = 0; j < kWidth; ++j) {
            total[i][j] *= s;
            if (product.addend != nullptr) total[i][j] += addend[i][j];
          }
          outputs.store(total[i], out + token(i) * n);
        }
      }
    }
    __syncwarp();
  }
};

#endif
}  // namespace bbb::cuda
