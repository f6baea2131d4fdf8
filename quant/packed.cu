// Products with packed weights, directly from the file's layout (format.md).
//
//   unpack        wq = (q - z) e                          the GEMM's operand for many rows
//   unpack_rows   out[m] = S (q - z) e of row ids[m]      rows of a table
//   packed_gemv   y = S x ((q - z) e)^T (+ addend)        M <= 8 rows of x
//
// unpack and packed_gemv read nested codes too, whose levels are u e / 2, u = 2 (q' - z)
// (quant/grid.h): a thread reads a byte of each plane for eight weights. In nested_gemv a warp
// takes an output row.
//
// unpack, unpack_rows: a thread makes eight consecutive weights, one 16-byte store; b bits read and
// 16 written a weight.
//
// packed_gemv: a lane takes chunks of 32 codes, b 32-bit words, which never straddle a group and
// are aligned at every K that the format allows. A warp takes kRows output rows, and of its share
// of K every 32 lanes x 32 codes. A block's warps are `row_warps` sets of rows times `k_warps`
// shares of K, whose sums are added in shared memory in a fixed order. x is staged in shared memory
// as bf16, kTileElements at a time over all rows of x. It is padded by a 16-byte piece in every
// eight, so that lanes 32 elements apart read from different banks.
//
// A code becomes FP32 without a conversion: placed at the top of a mantissa it reads 1 + q / 2^b,
// and fmaf(1 + q / 2^b, 2^b e, -(2^b + z) e) is exactly (q - z) e. For b <= 4 every product with a
// bf16 x is then exact in FP32. The sums are FP32, as in the GEMM over the unpacked weight, up to
// the order of addition. Bytes moved: N K b / 8, 1 B and b / 8 B a group.
#include <cuda_bf16.h>

#include <algorithm>
#include <type_traits>

#include "quant/cuda_kernels.h"
#include "quant/grid.h"
#include "quant/launch.h"
#include "quant/pack.h"

namespace bbb::quant {

namespace {

constexpr int kUnpackThreads = 256;
constexpr int kChunk = 32;               // codes a lane takes at a time
constexpr int kPiece = 8;                // bf16 in 16 bytes
constexpr int kTileElements = 16384;     // of x in shared memory: M times a part of K
constexpr int kMaxWarps = 8;             // of a block of packed_gemv
constexpr int kFillingBlocks = 2 * 132;  // fill an H100 or H200: two a multiprocessor
constexpr unsigned kFullWarp = 0xFFFFFFFFu;

// unpack: codes to bf16 levels, eight a thread.

template <int kBits>
__device__ __forceinline__ void load_eight_codes(uint8_t (&codes)[8], const uint8_t* stream) {
  uint64_t word = 0;
  if constexpr (kBits == 2) {
    word = *reinterpret_cast<const uint16_t*>(stream);
  } else if constexpr (kBits == 4) {
    word = *reinterpret_cast<const uint32_t*>(stream);
  } else if constexpr (kBits == 8) {
    word = *reinterpret_cast<const uint64_t*>(stream);
  } else {
    for (int i = 0; i < kBits; ++i) word |= static_cast<uint64_t>(stream[i]) << (8 * i);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
    codes[i] = static_cast<uint8_t>(word >> (i * kBits) & ((1u << kBits) - 1));
}

__device__ __forceinline__ uint4 to_bf16(const float (&levels)[8]) {
  unsigned pairs[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(levels[2 * j], levels[2 * j + 1]);
    pairs[j] = reinterpret_cast<const unsigned&>(pair);
  }
  return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

// factor (q - z) e of positions [at, at + 8) of a row. `factor` is a power of two.
template <int kBits>
__device__ __forceinline__ uint4 eight_levels(const PackedView& w, int64_t row, int64_t at,
                                              float factor) {
  const int64_t g = at / w.grid.group;
  const float e = e4m3_decode(w.scales[row * (w.k / w.grid.group) + g]) * factor;
  const uint8_t z = packed_code(w.zeros + row * zero_row_bytes(w.k, w.grid.group, kBits), g, kBits);
  uint8_t q[8];
  load_eight_codes<kBits>(q, w.qweight + row * code_row_bytes(w.k, kBits) + at / 8 * kBits);
  float levels[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) levels[i] = level_of(float(q[i]), z, e);
  return to_bf16(levels);
}

template <int kBits>
__global__ void __launch_bounds__(kUnpackThreads)
    unpack_kernel(uint4* __restrict__ wq, PackedView w) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kUnpackThreads + threadIdx.x;
  if (i < w.n * (w.k / 8)) wq[i] = eight_levels<kBits>(w, i / (w.k / 8), i % (w.k / 8) * 8, 1.0f);
}

template <int kBits>
__global__ void __launch_bounds__(kUnpackThreads)
    unpack_rows_kernel(uint4* __restrict__ out, const int32_t* __restrict__ ids, PackedView w,
                       int64_t rows) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kUnpackThreads + threadIdx.x;
  if (i < rows * (w.k / 8))
    out[i] = eight_levels<kBits>(w, ids[i / (w.k / 8)], i % (w.k / 8) * 8, *w.master_scale);
}

// Eight nested codes: bit i of a byte of each plane, the highest bit of a code first.
__device__ __forceinline__ void load_nested_codes(uint8_t (&codes)[8], const PackedView& w,
                                                  int64_t row, int64_t at) {
#pragma unroll
  for (int i = 0; i < 8; ++i) codes[i] = 0;
  for (int plane = 0; plane < w.grid.bits; ++plane) {
    const unsigned byte = w.qweight[(plane * w.n + row) * (w.k / 8) + at / 8];
#pragma unroll
    for (int i = 0; i < 8; ++i) codes[i] = static_cast<uint8_t>(2 * codes[i] | (byte >> i & 1u));
  }
}

// Eight weights u e / 2 of a nested row.
__device__ __forceinline__ void load_nested_levels(float (&levels)[8], const PackedView& w,
                                                   int64_t row, int64_t at) {
  const int64_t g = row * (w.k / w.grid.group) + at / w.grid.group;
  const float half_scale = e4m3_decode(w.scales[g]) * 0.5f;
  const int z = w.zeros[g];
  uint8_t codes[8];
  load_nested_codes(codes, w, row, at);
#pragma unroll
  for (int i = 0; i < 8; ++i)
    levels[i] = float(nested_level_doubled(codes[i], z, w.grid.bits, w.grid.dequant)) * half_scale;
}

__global__ void __launch_bounds__(kUnpackThreads)
    unpack_nested_kernel(uint4* __restrict__ wq, PackedView w) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kUnpackThreads + threadIdx.x;
  if (i >= w.n * (w.k / 8)) return;
  float levels[8];
  load_nested_levels(levels, w, i / (w.k / 8), i % (w.k / 8) * 8);
  wq[i] = to_bf16(levels);
}

// packed_gemv: products directly from the codes.

// 32 codes as words, by the widest loads that their alignment (4 b bytes) allows.
template <int kBits>
__device__ __forceinline__ void load_chunk(uint32_t (&words)[kBits], const uint8_t* stream) {
  if constexpr (kBits % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kBits / 4; ++i) {
      const uint4 v = __ldg(reinterpret_cast<const uint4*>(stream) + i);
      words[4 * i] = v.x;
      words[4 * i + 1] = v.y;
      words[4 * i + 2] = v.z;
      words[4 * i + 3] = v.w;
    }
  } else if constexpr (kBits == 2) {
    const uint2 v = __ldg(reinterpret_cast<const uint2*>(stream));
    words[0] = v.x;
    words[1] = v.y;
  } else {
#pragma unroll
    for (int i = 0; i < kBits; ++i) words[i] = __ldg(reinterpret_cast<const uint32_t*>(stream) + i);
  }
}

// 1 + q / 2^b of code `index`, which is a compile-time constant once loops are unrolled.
template <int kBits>
__device__ __forceinline__ float one_plus_code(const uint32_t (&words)[kBits], int index) {
  constexpr uint32_t kMask = (1u << kBits) - 1;
  const int bit = index * kBits, word = bit / 32, shift = bit % 32;
  uint32_t q = words[word] >> shift;
  if (shift + kBits > 32) q |= words[word + 1 < kBits ? word + 1 : word] << (32 - shift);
  return __uint_as_float((q & kMask) << (23 - kBits) | 0x3F800000u);
}

__device__ __forceinline__ void unpack_bf16(float (&out)[kPiece], const uint4& v) {
  const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = __uint_as_float(pairs[i] << 16);
    out[2 * i + 1] = __uint_as_float(pairs[i] & 0xFFFF0000u);
  }
}

__host__ __device__ constexpr int padded(int piece) { return piece + piece / 8; }

// Pieces of one row of x in shared memory.
template <int kM>
__host__ __device__ constexpr int row_pieces(int64_t k) {
  constexpr int kTile = kTileElements / kM;
  return padded(static_cast<int>(k < kTile ? k : kTile) / kPiece);
}

// Blocks that a multiprocessor must hold: two; one where 128 registers a thread would spill.
constexpr int min_blocks(int bits, int m, int rows) {
  return rows * m >= (bits == 8 ? 16 : 32) ? 1 : 2;
}

// A warp takes one output row, a lane eight consecutive positions at a time.
constexpr int kNestedRows = 8;  // of x, at most
__global__ void __launch_bounds__(kUnpackThreads)
    nested_gemv_kernel(__nv_bfloat16* __restrict__ y_bf16, float* __restrict__ y_f32,
                       const __nv_bfloat16* __restrict__ x, PackedView w,
                       const __nv_bfloat16* __restrict__ addend, int rows) {
  const int lane = threadIdx.x % 32;
  const int64_t n = (static_cast<int64_t>(blockIdx.x) * kUnpackThreads + threadIdx.x) / 32;
  if (n >= w.n) return;
  float sum[kNestedRows] = {};
  for (int64_t at = lane * kPiece; at < w.k; at += 32 * kPiece) {
    float weight[kPiece];
    load_nested_levels(weight, w, n, at);
#pragma unroll
    for (int m = 0; m < kNestedRows; ++m) {
      if (m >= rows) break;
      float v[kPiece];
      unpack_bf16(v, __ldg(reinterpret_cast<const uint4*>(x + m * w.k + at)));
#pragma unroll
      for (int i = 0; i < kPiece; ++i) sum[m] = fmaf(weight[i], v[i], sum[m]);
    }
  }
#pragma unroll
  for (int m = 0; m < kNestedRows; ++m) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) sum[m] += __shfl_xor_sync(kFullWarp, sum[m], lanes);
    if (lane != 0 || m >= rows) continue;
    float total = sum[m] * *w.master_scale;
    const int64_t out = m * w.n + n;
    if (addend != nullptr) total += __bfloat162float(addend[out]);
    if (y_f32 != nullptr)
      y_f32[out] = total;
    else
      y_bf16[out] = __float2bfloat16_rn(total);
  }
}

struct GemvShape {
  int64_t n, k;
  int m, group;
  int row_warps, k_warps;
};

template <int kBits, int kM, int kRows>
__global__ void __launch_bounds__(kMaxWarps * 32, min_blocks(kBits, kM, kRows))
    packed_gemv_kernel(__nv_bfloat16* __restrict__ y_bf16, float* __restrict__ y_f32,
                       const __nv_bfloat16* __restrict__ x, const uint8_t* __restrict__ qweight,
                       const uint8_t* __restrict__ scales, const uint8_t* __restrict__ zeros,
                       const float* __restrict__ master_scale,
                       const __nv_bfloat16* __restrict__ addend, GemvShape shape) {
  extern __shared__ uint4 x_pieces[];  // kM rows of row_pieces, then nothing else
  __shared__ float partial[kMaxWarps][kRows * kM];

  constexpr int kTile = kTileElements / kM;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row_warp = warp / shape.k_warps, k_warp = warp % shape.k_warps;
  const int64_t k = shape.k, groups = k / shape.group;
  const int64_t first_row = (static_cast<int64_t>(blockIdx.x) * shape.row_warps + row_warp) * kRows;
  const int64_t code_bytes = code_row_bytes(k, kBits);
  const int64_t zero_bytes = zero_row_bytes(k, shape.group, kBits);
  const int pieces_a_row = row_pieces<kM>(k);

  float sum[kRows][kM] = {};
  for (int64_t begin = 0; begin < k; begin += kTile) {
    const int tile = static_cast<int>(k - begin < kTile ? k - begin : kTile);
    if (begin > 0) __syncthreads();
#pragma unroll
    for (int m = 0; m < kM; ++m)
      for (int p = threadIdx.x; p < tile / kPiece; p += blockDim.x)
        x_pieces[m * pieces_a_row + padded(p)] =
            m < shape.m ? __ldg(reinterpret_cast<const uint4*>(x + m * k + begin) + p)
                        : uint4{0, 0, 0, 0};
    __syncthreads();

    for (int chunk = k_warp * 32 + lane; chunk < tile / kChunk; chunk += shape.k_warps * 32) {
      const int64_t at = begin + chunk * kChunk;
      const int64_t g = at / shape.group;
      uint32_t words[kRows][kBits];
      float scale[kRows], offset[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t row = min(first_row + r, shape.n - 1);  // past the end: the last row
        load_chunk<kBits>(words[r], qweight + row * code_bytes + at / 8 * kBits);
        const float e = e4m3_decode(__ldg(scales + row * groups + g));
        const uint8_t z = packed_code(zeros + row * zero_bytes, g, kBits);
        scale[r] = float(1 << kBits) * e;
        offset[r] = -(float(1 << kBits) + float(z)) * e;
      }
#pragma unroll
      for (int piece = 0; piece < kChunk / kPiece; ++piece) {
        float weight[kRows][kPiece];
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int i = 0; i < kPiece; ++i)
            weight[r][i] =
                fmaf(one_plus_code<kBits>(words[r], piece * kPiece + i), scale[r], offset[r]);
        const int p = padded(chunk * (kChunk / kPiece)) + piece;  // four pieces share their padding
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          float v[kPiece];
          unpack_bf16(v, x_pieces[m * pieces_a_row + p]);
#pragma unroll
          for (int r = 0; r < kRows; ++r)
#pragma unroll
            for (int i = 0; i < kPiece; ++i) sum[r][m] = fmaf(weight[r][i], v[i], sum[r][m]);
        }
      }
    }
  }

#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2)
        sum[r][m] += __shfl_xor_sync(kFullWarp, sum[r][m], lanes);
      if (lane == 0) partial[warp][r * kM + m] = sum[r][m];
    }
  __syncthreads();

  // One thread an output of the block; consecutive threads write consecutive output features.
  const int block_rows = shape.row_warps * kRows;
  for (int i = threadIdx.x; i < block_rows * shape.m; i += blockDim.x) {
    const int m = i / block_rows, local = i % block_rows;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * block_rows + local;
    if (row >= shape.n) continue;
    float total = 0.0f;
    for (int w = 0; w < shape.k_warps; ++w)
      total += partial[local / kRows * shape.k_warps + w][local % kRows * kM + m];
    total *= *master_scale;
    const int64_t out = m * shape.n + row;
    if (addend != nullptr) total += __bfloat162float(addend[out]);
    if (y_f32 != nullptr)
      y_f32[out] = total;
    else
      y_bf16[out] = __float2bfloat16_rn(total);
  }
}

template <int kBits, int kM, int kRows>
void launch_gemv(cudaStream_t stream, __nv_bfloat16* y_bf16, float* y_f32, const __nv_bfloat16* x,
                 const PackedView& w, const __nv_bfloat16* addend, int64_t m) {
  const int64_t chunks = w.k / kChunk;
  GemvShape shape{w.n, w.k, static_cast<int>(m), w.grid.group, 1, 1};
  while (shape.k_warps < kMaxWarps && shape.k_warps * 32 < chunks) shape.k_warps *= 2;
  while (shape.row_warps * shape.k_warps < kMaxWarps &&
         w.n / (kRows * shape.row_warps * 2) >= kFillingBlocks)
    shape.row_warps *= 2;
  const int64_t block_rows = kRows * shape.row_warps;
  const LaunchShape at{dim3(static_cast<unsigned>((w.n + block_rows - 1) / block_rows)),
                       dim3(static_cast<unsigned>(32 * shape.row_warps * shape.k_warps)),
                       int64_t{kM} * row_pieces<kM>(w.k) * int64_t{sizeof(uint4)}};
  launch(stream, at, packed_gemv_kernel<kBits, kM, kRows>, y_bf16, y_f32, x, w.qweight, w.scales,
         w.zeros, w.master_scale, addend, shape);
}

// Calls fn with the bits as a compile-time constant.
template <typename Fn>
void with_bits(int bits, const Fn& fn) {
  switch (bits) {
    case 2:
      return fn(std::integral_constant<int, 2>());
    case 3:
      return fn(std::integral_constant<int, 3>());
    case 4:
      return fn(std::integral_constant<int, 4>());
    default:
      BBB_ASSERT(bits == 8);
      return fn(std::integral_constant<int, 8>());
  }
}

}  // namespace

// One thread for eight of `weights`.
static LaunchShape unpack_shape(int64_t weights) {
  const int64_t threads = weights / 8;
  return {dim3(static_cast<unsigned>((threads + kUnpackThreads - 1) / kUnpackThreads)),
          dim3(kUnpackThreads)};
}

void launch_unpack(cudaStream_t stream, __nv_bfloat16* wq, const PackedView& w) {
  auto* const out = reinterpret_cast<uint4*>(wq);
  if (w.grid.nested) {
    launch(stream, unpack_shape(w.n * w.k), unpack_nested_kernel, out, w);
    return;
  }
  with_bits(w.grid.bits, [&](auto bits) {
    launch(stream, unpack_shape(w.n * w.k), unpack_kernel<bits>, out, w);
  });
}

void launch_unpack_rows(cudaStream_t stream, __nv_bfloat16* out, const int32_t* ids,
                        const PackedView& w, int64_t m) {
  BBB_ASSERT(!w.grid.nested);
  with_bits(w.grid.bits, [&](auto bits) {
    launch(stream, unpack_shape(m * w.k), unpack_rows_kernel<bits>, reinterpret_cast<uint4*>(out),
           ids, w, m);
  });
}

void launch_packed_gemv(cudaStream_t stream, __nv_bfloat16* y_bf16, float* y_f32,
                        const __nv_bfloat16* x, const PackedView& w, const __nv_bfloat16* addend,
                        int64_t m) {
  BBB_ASSERT(m <= 8);
  if (m == 0) return;
  if (w.grid.nested) {
    constexpr int64_t kBlockRows = kUnpackThreads / 32;
    launch(stream,
           {dim3(static_cast<unsigned>((w.n + kBlockRows - 1) / kBlockRows)), dim3(kUnpackThreads)},
           nested_gemv_kernel, y_bf16, y_f32, x, w, addend, static_cast<int>(m));
    return;
  }
  // Four rows a warp share their reads of x; a small matrix takes one row a warp, to fill the GPU.
  const bool wide = w.n >= 4 * kFillingBlocks;
  with_bits(w.grid.bits, [&](auto bits) {
    const auto run = [&](auto gemv) { gemv(stream, y_bf16, y_f32, x, w, addend, m); };
    if (m == 1)
      run(wide ? launch_gemv<bits, 1, 4> : launch_gemv<bits, 1, 1>);
    else if (m <= 4)
      run(wide ? launch_gemv<bits, 4, 4> : launch_gemv<bits, 4, 1>);
    else
      run(wide ? launch_gemv<bits, 8, 4> : launch_gemv<bits, 8, 1>);
  });
}

}  // namespace bbb::quant
