// Tiles of bf16 in shared memory, and the fragments that mma takes from them.
//
// A tile is rows of D values, a multiple of 32, in 16-byte chunks. The chunk index is xor-ed with
// bits of the row, so that each of these uses distinct banks: the eight rows that one ldmatrix
// phase reads, the eight chunks of a row that cp.async writes, and the eight rows that the store of
// a C fragment writes. Rows of a multiple of 128 bytes all start at bank 0 and need three bits.
// Other rows alternate between banks 0 and 16 and need two bits, those above the row's lowest.
#pragma once

#include "cuda/ptx.h"

#ifdef __CUDACC__
namespace bbb::cuda {

template <int D>
struct SmemTile {
  static_assert(D % 32 == 0);
  static constexpr int kChunks = D / 8;
  uint32_t base;  // address in the shared window

  __device__ static uint32_t offset_bytes(int row, int chunk) {
    const int key = D % 64 == 0 ? row & 7 : (row >> 1) & 3;
    return static_cast<uint32_t>(row * D * 2 + (chunk ^ key) * 16);
  }
  __device__ uint32_t at(int row, int chunk) const { return base + offset_bytes(row, chunk); }
};

// Loads rows row0 .. row0 + kRows - 1 of a matrix whose rows are `stride` values apart, the first
// at `source`. Rows from `rows` on, and columns from d, a multiple of 8, become zeros. All kThreads
// threads take part; the caller commits.
template <int D, int kRows, int kThreads>
__device__ inline void load_tile_async(SmemTile<D> tile, const __nv_bfloat16* source,
                                       int64_t stride, int row0, int rows, int d, int thread) {
  constexpr int kChunks = D / 8;
  static_assert(kRows * kChunks % kThreads == 0);
#pragma unroll
  for (int i = 0; i < kRows * kChunks / kThreads; ++i) {
    const int item = thread + i * kThreads;
    const int row = item / kChunks;
    const int chunk = item % kChunks;
    const bool valid = row0 + row < rows && chunk * 8 < d;
    const __nv_bfloat16* from = source + (valid ? (row0 + row) * stride + chunk * 8 : 0);
    cp_async_16(tile.at(row, chunk), from, valid);
  }
}

// A = tile[row0 .. +15][k0 .. +15].
template <int D>
__device__ inline void load_a(uint32_t (&a)[4], SmemTile<D> tile, int row0, int k0, int lane) {
  ldmatrix(a, tile.at(row0 + (lane & 15), k0 / 8 + (lane >> 4)));
}

// A[m][k] = tile[k0 + k][m0 + m].
template <int D>
__device__ inline void load_a_rows(uint32_t (&a)[4], SmemTile<D> tile, int k0, int m0, int lane) {
  ldmatrix_trans(a, tile.at(k0 + (lane & 7) + ((lane >> 4) << 3), m0 / 8 + ((lane >> 3) & 1)));
}

// B[k][n] = tile[n0 + n][k0 + k], 16 x 16: b[0], b[1] for n < 8, b[2], b[3] for the rest.
template <int D>
__device__ inline void load_b(uint32_t (&b)[4], SmemTile<D> tile, int n0, int k0, int lane) {
  ldmatrix(b, tile.at(n0 + (lane & 7) + ((lane >> 4) << 3), k0 / 8 + ((lane >> 3) & 1)));
}

// B[k][n] = tile[k0 + k][n0 + n], the same registers.
template <int D>
__device__ inline void load_b_rows(uint32_t (&b)[4], SmemTile<D> tile, int k0, int n0, int lane) {
  ldmatrix_trans(b, tile.at(k0 + (lane & 15), n0 / 8 + (lane >> 4)));
}

// The A fragment made of two neighbouring C fragments, rounded to bf16: columns 0-7 and 8-15.
__device__ inline void pack_a(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = pack_bf16(left[0], left[1]);
  a[1] = pack_bf16(left[2], left[3]);
  a[2] = pack_bf16(right[0], right[1]);
  a[3] = pack_bf16(right[2], right[3]);
}

// Writes one warp's 16 x D accumulator as bf16 to rows row0 .. row0 + 15 of a tile in shared
// memory, whose base is `smem`. A lane's rows g and g + 8 are scaled by factor[0] and factor[1].
template <int D>
__device__ inline void store_accumulator(unsigned char* smem, const float (&c)[D / 8][4],
                                         const float (&factor)[2], int row0, int lane) {
  const int row = row0 + (lane >> 2);
#pragma unroll
  for (int n = 0; n < D / 8; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t offset = SmemTile<D>::offset_bytes(row + 8 * half, n) + (lane & 3) * 4;
      *reinterpret_cast<uint32_t*>(smem + offset) =
          pack_bf16(c[n][2 * half] * factor[half], c[n][2 * half + 1] * factor[half]);
    }
  }
}

// One warp copies kRows rows of a tile, from tile row row0 on, to rows global_row0 .. of a matrix.
// Rows from `rows` on and columns from d, a multiple of 8, are not written.
template <int D, int kRows>
__device__ inline void store_tile(__nv_bfloat16* target, int64_t stride, int global_row0, int rows,
                                  int d, const unsigned char* smem, int row0, int lane) {
  constexpr int kChunks = D / 8;
#pragma unroll 4
  for (int item = lane; item < kRows * kChunks; item += 32) {
    const int row = item / kChunks;
    const int chunk = item % kChunks;
    if (global_row0 + row < rows && chunk * 8 < d)
      *reinterpret_cast<uint4*>(target + (global_row0 + row) * stride + chunk * 8) =
          *reinterpret_cast<const uint4*>(smem + SmemTile<D>::offset_bytes(row0 + row, chunk));
  }
}

// B[k][n] = tile[n][k0 + k], 32 x 8: b[0], b[1] for k < 16, b[2], b[3] for the rest.
template <int D>
__device__ inline void load_b_32(uint32_t (&b)[4], SmemTile<D> tile, int k0, int lane) {
  ldmatrix(b, tile.at(lane & 7, k0 / 8 + (lane >> 3)));
}

// Sum and maximum over the four lanes that share a row of a C fragment.
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

}  // namespace bbb::cuda
#endif
