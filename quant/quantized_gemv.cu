// Products of quantized weights with quantized activations, from the codes of both:
//
//   y[m, n] = S sum_g (e scale)[g] I[g] (+ addend[m, n])     I[g] = sum over g of (q - z) (a - b)
//
// q, z, e, S: the stored weight (quant/format.h); a, b, scale: codes, zero points and scales of the
// rows of an operand: one byte, one byte and FP32 each. I is an exact integer below 2^24, and
// e scale is exact. So a group costs one rounding of its product and one of the sum.
//
// A lane takes chunks of 32 positions of kRows output rows; a group is one, two or four
// neighbouring lanes. Levels of nested codes are at half steps, so the kernel counts them twice:
//     2 (q - z) = alpha q + beta        2 I = alpha (sum q a - b sum q) + beta (sum a - 32 b)
// The sums over a chunk are dp4a, four products of bytes each. Weight codes are spread to bytes;
// for 2 and 4 bits that leaves them interleaved, and the activations are put into the same order.
// A block's warps share K or take more rows, as in packed.cu; their sums are added in a fixed
// order. Bytes moved: those of the packed weight; the activations come from the caches.
#include <cuda_bf16.h>

#include <type_traits>

#include "quant/cuda_kernels.h"
#include "quant/grid.h"
#include "quant/launch.h"
#include "quant/pack.h"

namespace bbb::quant {

namespace {

constexpr int kChunk = 32;          // positions a lane takes at a time
constexpr int kWords = kChunk / 4;  // words of four codes
constexpr int kRows = 2;            // output rows of a warp
constexpr int kMaxWarps = 8;        // of a block
constexpr int kFillingBlocks = 2 * 132;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr unsigned kOnes = 0x01010101u;

// Bits i of the low four become the lowest bit of byte i.
__device__ __forceinline__ unsigned spread_bits(unsigned nibble) {
  return (nibble & 0xFu) * 0x00204081u & kOnes;
}

// The 32 codes of a chunk as bytes. `row` is the output row, `at` the first position.
template <int kBits, bool kNested>
__device__ __forceinline__ void load_weights(unsigned (&codes)[kWords], const PackedView& w,
                                             int64_t row, int64_t at) {
  if constexpr (kNested) {
    unsigned planes[kBits];
#pragma unroll
    for (int p = 0; p < kBits; ++p)
      planes[p] = __ldg(
          reinterpret_cast<const unsigned*>(w.qweight + (p * w.n + row) * (w.k / 8) + at / 8));
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      codes[i] = 0;
#pragma unroll
      for (int p = 0; p < kBits; ++p)  // the highest bit first
        codes[i] |= spread_bits(planes[p] >> (4 * i)) << (kBits - 1 - p);
    }
  } else {
    const auto* const words = reinterpret_cast<const unsigned*>(
        w.qweight + row * code_row_bytes(w.k, kBits) + at / 8 * kBits);
    unsigned stream[kBits];
#pragma unroll
    for (int i = 0; i < kBits; ++i) stream[i] = __ldg(words + i);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if constexpr (kBits == 8) {
        codes[i] = stream[i];
      } else if constexpr (kBits == 4) {  // even codes of eight, then odd ones
        codes[i] = stream[i / 2] >> (i % 2 * 4) & 0x0F0F0F0Fu;
      } else if constexpr (kBits == 2) {  // codes i % 4, i % 4 + 4, .. of sixteen
        codes[i] = stream[i / 4] >> (i % 4 * 2) & 0x03030303u;
      } else {
        const int bit = i * 4 * kBits, word = bit / 32, shift = bit % 32;
        unsigned four = stream[word] >> shift;
        if (shift + 4 * kBits > 32)
          four |= stream[word + 1 < kBits ? word + 1 : word] << (32 - shift);
        codes[i] =
            (four & 7u) | (four & 0x38u) << 5 | (four & 0x1C0u) << 10 | (four & 0xE00u) << 15;
      }
    }
  }
}

// The activations of a chunk, in the order of the weights' bytes.
template <int kBits, bool kNested>
__device__ __forceinline__ void load_activations(unsigned (&codes)[kWords], const uint8_t* from) {
#pragma unroll
  for (int i = 0; i < kWords; i += 4) {
    const uint4 v = __ldg(reinterpret_cast<const uint4*>(from) + i / 4);
    codes[i] = v.x, codes[i + 1] = v.y, codes[i + 2] = v.z, codes[i + 3] = v.w;
  }
  if constexpr (kNested) return;
  if constexpr (kBits == 4) {
#pragma unroll
    for (int i = 0; i < kWords; i += 2) {
      const unsigned low = codes[i], high = codes[i + 1];
      codes[i] = __byte_perm(low, high, 0x6420);
      codes[i + 1] = __byte_perm(low, high, 0x7531);
    }
  } else if constexpr (kBits == 2) {  // four words of four bytes are transposed
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const unsigned a = __byte_perm(codes[i], codes[i + 1], 0x5140);
      const unsigned b = __byte_perm(codes[i], codes[i + 1], 0x7362);
      const unsigned c = __byte_perm(codes[i + 2], codes[i + 3], 0x5140);
      const unsigned d = __byte_perm(codes[i + 2], codes[i + 3], 0x7362);
      codes[i] = __byte_perm(a, c, 0x5410);
      codes[i + 1] = __byte_perm(a, c, 0x7632);
      codes[i + 2] = __byte_perm(b, d, 0x5410);
      codes[i + 3] = __byte_perm(b, d, 0x7632);
    }
  }
}

__device__ __forceinline__ unsigned sum_of_products(const unsigned (&a)[kWords],
                                                    const unsigned (&b)[kWords]) {
  unsigned sum = 0;
#pragma unroll
  for (int i = 0; i < kWords; ++i) sum = __dp4a(a[i], b[i], sum);
  return sum;
}
__device__ __forceinline__ unsigned sum_of(const unsigned (&a)[kWords]) {
  unsigned sum = 0;
#pragma unroll
  for (int i = 0; i < kWords; ++i) sum = __dp4a(a[i], kOnes, sum);
  return sum;
}

struct GemvShape {
  int m;
  int row_warps, k_warps;
};

template <int kBits, bool kNested, int kM>
__global__ void __launch_bounds__(kMaxWarps * 32)
    quantized_gemv_kernel(__nv_bfloat16* __restrict__ y_bf16, float* __restrict__ y_f32,
                          const uint8_t* __restrict__ codes, const uint8_t* __restrict__ zeros,
                          const float* __restrict__ scales, PackedView w,
                          const __nv_bfloat16* __restrict__ addend, GemvShape shape) {
  __shared__ float partial[kMaxWarps][kRows * kM];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int row_warp = warp / shape.k_warps, k_warp = warp % shape.k_warps;
  const int64_t first_row = (int64_t{blockIdx.x} * shape.row_warps + row_warp) * kRows;
  const int64_t groups = w.k / w.grid.group, chunks = w.k / kChunk;
  const int group_lanes = w.grid.group / kChunk;
  constexpr int kShift = kNested ? kNestedBits - kBits : 0;
  constexpr int kAlpha = 2 << kShift;
  const int offset = kNested && w.grid.dequant == NestedDequant::Middle ? (1 << kShift) - 1 : 0;

  float sum[kRows][kM] = {};
  // Whole warps walk together, because the lanes of a group exchange their sums.
  for (int64_t begin = k_warp * 32; begin < chunks; begin += shape.k_warps * 32) {
    const int64_t chunk = begin + lane;
    const bool inside = chunk < chunks;
    const int64_t at = inside ? chunk * kChunk : 0, g = at / w.grid.group;
    unsigned weight[kRows][kWords];
    int weight_sum[kRows], beta[kRows];
    float scale[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = min(first_row + r, w.n - 1);  // past the end: the last row
      load_weights<kBits, kNested>(weight[r], w, row, at);
      weight_sum[r] = static_cast<int>(sum_of(weight[r]));
      const int width = kNested ? kNestedBits : kBits;
      const uint8_t z =
          packed_code(w.zeros + row * zero_row_bytes(w.k, w.grid.group, width), g, width);
      beta[r] = offset - 2 * int{z};
      scale[r] = e4m3_decode(__ldg(w.scales + row * groups + g)) * 0.5f;
    }
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      if (m >= shape.m) break;
      unsigned activation[kWords];
      load_activations<kBits, kNested>(activation, codes + m * w.k + at);
      const int b = zeros[m * groups + g];
      const int rest = static_cast<int>(sum_of(activation)) - kChunk * b;
      const float activation_scale = scales[m * groups + g];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int products = static_cast<int>(sum_of_products(weight[r], activation));
        int total = inside ? kAlpha * (products - b * weight_sum[r]) + beta[r] * rest : 0;
        for (int lanes = 1; lanes < group_lanes; lanes *= 2)
          total += __shfl_xor_sync(kAllLanes, total, lanes);
        // The first lane of a group adds it.
        if (inside && lane % group_lanes == 0)
          sum[r][m] += static_cast<float>(total) * (scale[r] * activation_scale);
      }
    }
  }

#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2)
        sum[r][m] += __shfl_xor_sync(kAllLanes, sum[r][m], lanes);
      if (lane == 0) partial[warp][r * kM + m] = sum[r][m];
    }
  __syncthreads();

  // One thread an output of the block; consecutive threads write consecutive output features.
  const int block_rows = shape.row_warps * kRows;
  for (int i = static_cast<int>(threadIdx.x); i < block_rows * shape.m;
       i += static_cast<int>(blockDim.x)) {
    const int m = i / block_rows, local = i % block_rows;
    const int64_t row = int64_t{blockIdx.x} * block_rows + local;
    if (row >= w.n) continue;
    float total = 0.0f;
    for (int k = 0; k < shape.k_warps; ++k)
      total += partial[local / kRows * shape.k_warps + k][local % kRows * kM + m];
    total *= *w.master_scale;
    const int64_t out = m * w.n + row;
    if (addend != nullptr) total += __bfloat162float(addend[out]);
    if (y_f32 != nullptr)
      y_f32[out] = total;
    else
      y_bf16[out] = __float2bfloat16_rn(total);
  }
}

// Calls fn with the bits, and whether codes are nested, as compile-time constants.
template <typename Fn>
void with_grid(const WeightGrid& grid, const Fn& fn) {
  const auto with_bits = [&](auto nested) {
    switch (grid.bits) {
      case 2:
        return fn(std::integral_constant<int, 2>(), nested);
      case 3:
        return fn(std::integral_constant<int, 3>(), nested);
      case 4:
        return fn(std::integral_constant<int, 4>(), nested);
      default:
        BBB_ASSERT(grid.bits == 8);
        return fn(std::integral_constant<int, 8>(), nested);
    }
  };
  grid.nested ? with_bits(std::true_type()) : with_bits(std::false_type());
}

}  // namespace

void launch_quantized_gemv(cudaStream_t stream, __nv_bfloat16* y_bf16, float* y_f32,
                           const uint8_t* codes, const uint8_t* zeros, const float* scales,
                           const PackedView& w, const __nv_bfloat16* addend, int64_t m) {
  BBB_ASSERT(m <= 8);
  if (m == 0) return;
  const int64_t chunks = w.k / kChunk;
  GemvShape shape{static_cast<int>(m), 1, 1};
  while (shape.k_warps < kMaxWarps && shape.k_warps * 32 < chunks) shape.k_warps *= 2;
  while (shape.row_warps * shape.k_warps < kMaxWarps &&
         w.n / (kRows * shape.row_warps * 2) >= kFillingBlocks)
    shape.row_warps *= 2;
  const int64_t block_rows = kRows * shape.row_warps;
  const LaunchShape at{dim3(static_cast<unsigned>((w.n + block_rows - 1) / block_rows)),
                       dim3(static_cast<unsigned>(32 * shape.row_warps * shape.k_warps))};
  with_grid(w.grid, [&](auto bits, auto nested) {
    const auto run = [&](auto kernel) {
      launch(stream, at, kernel, y_bf16, y_f32, codes, zeros, scales, w, addend, shape);
    };
    if (m == 1)
      run(quantized_gemv_kernel<bits, nested, 1>);
    else if (m <= 4)
      run(quantized_gemv_kernel<bits, nested, 4>);
    else
      run(quantized_gemv_kernel<bits, nested, 8>);
  });
}

}  // namespace bbb::quant
