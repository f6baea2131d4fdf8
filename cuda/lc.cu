// LC on the GPU: the weight of latents and its gradients, and what surrounds a product with codes.
// The formulas are in quant/lc.h; host_lc.cpp has the same order of sums, so a weight is the host's
// to the bit before it is rounded to bf16.
//
//   lc_weight           w from latents                     4 B read an element, 2 B written
//   lc_weight_backward  dlatent, parts of dv and dmap      8 or 10 B read, 2 or 4 B written
//   lc_operand          A^T H (u o x), c . sum             2 B read, 2 B written
//   lc_output           v o H (product + constant)         4 B read (6 with an addend), 2 B written
//
// Thread mapping. A block of the first two takes one block of W, (128, 128) or smaller, which no
// other block of W depends on. Rows: a lane has a vector of 4 neighbours; butterflies of strides 1
// and 2 are in its registers, those of 4 and more between lanes. Columns: a lane has 16 rows of one
// column, then 2 to 8 rows that are 16 apart; the block of W is in shared memory between these
// steps. The last two take a row of x at a time; a warp has 128 neighbours of it.
// Sums over blocks of W are written as parts, which a second kernel adds in order.
#include "cuda/cuda_backend.h"
#include "cuda/reduce.h"
#include "cuda/vector.h"
#include "quant/lc.h"

namespace bbb::cuda {
namespace {

using quant::kLcMapSize;
using quant::kLcVector;
using quant::LcMap;
using quant::LcRule;

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kRadix = 16;  // rows of a column that a thread transforms at once
constexpr int kWarpFeatures = 32 * kLcVector;
constexpr int kMaxRowThreads = 1024;
constexpr int kMapThreads = kLcMapSize * 32;  // a warp for each number of a map

// The matrix of a weight, and its Hadamard blocks.
struct Matrix {
  int64_t n, k;
  int block_n, block_k;
  float norm;

  Matrix(int64_t rows, int64_t columns)
      : n(rows),
        k(columns),
        block_n(quant::lc_block(rows)),
        block_k(quant::lc_block(columns)),
        norm(quant::lc_norm<float>(block_n * block_k)) {}
  dim3 blocks() const {
    return dim3(static_cast<unsigned>(k / block_k), static_cast<unsigned>(n / block_n));
  }
  int64_t count() const { return k / block_k * (n / block_n); }
  int64_t smem_bytes() const { return int64_t{block_n} * block_k * int64_t{sizeof(float)}; }
};

template <typename T>
__device__ __forceinline__ void load_vector(float (&x)[kLcVector], const T* p) {
  const Vector<T, kLcVector> packed = *reinterpret_cast<const Vector<T, kLcVector>*>(p);
#pragma unroll
  for (int i = 0; i < kLcVector; ++i) x[i] = to_float(packed.v[i]);
}
template <typename T>
__device__ __forceinline__ void store_vector(T* p, const float (&x)[kLcVector]) {
  Vector<T, kLcVector> packed;
#pragma unroll
  for (int i = 0; i < kLcVector; ++i) from_float(packed.v[i], x[i]);
  *reinterpret_cast<Vector<T, kLcVector>*>(p) = packed;
}

__device__ __forceinline__ void butterfly(float& low, float& high) {
  const float sum = low + high;
  high = low - high;
  low = sum;
}

// H of the blocks of 4 `lanes` features, of which this lane has 4; the whole warp takes part.
__device__ __forceinline__ void transform_lanes(float (&x)[kLcVector], int lanes) {
  butterfly(x[0], x[1]);
  butterfly(x[2], x[3]);
  butterfly(x[0], x[2]);
  butterfly(x[1], x[3]);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int apart = 1; apart < lanes; apart *= 2)
#pragma unroll
    for (int i = 0; i < kLcVector; ++i) {
      const float other = __shfl_xor_sync(0xFFFFFFFFu, x[i], apart);
      x[i] = (lane & apart) == 0 ? x[i] + other : other - x[i];
    }
}

// Butterflies of strides stride .. stride kCount / 2 along the columns of a tile.
template <int kCount>
__device__ __forceinline__ void transform_columns(float* tile, const Matrix& of, int stride) {
  for (int item = static_cast<int>(threadIdx.x); item < of.block_n / kCount * of.block_k;
       item += kThreads) {
    const int column = item % of.block_k, set = item / of.block_k;
    const int row = set / stride * (stride * kCount) + set % stride;
    float* const first = tile + row * of.block_k + column;
    float x[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = first[i * stride * of.block_k];
#pragma unroll
    for (int half = 1; half < kCount; half *= 2)
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        if ((i & half) == 0) butterfly(x[i], x[i + half]);
#pragma unroll
    for (int i = 0; i < kCount; ++i) first[i * stride * of.block_k] = x[i];
  }
  __syncthreads();
}

__device__ __forceinline__ void transform_columns(float* tile, const Matrix& of) {
  transform_columns<kRadix>(tile, of, 1);
  if (of.block_n == 128)
    transform_columns<8>(tile, of, kRadix);
  else if (of.block_n == 64)
    transform_columns<4>(tile, of, kRadix);
  else
    transform_columns<2>(tile, of, kRadix);
}

// Calls fn(row, column) of a tile for each vector of 4 of this lane; rows of the same warp call
// together, block_k / 4 lanes a row.
template <typename Fn>
__device__ __forceinline__ void each_vector(const Matrix& of, const Fn& fn) {
  const int lanes = of.block_k / kLcVector, lane = static_cast<int>(threadIdx.x) % 32;
  const int warp_rows = 32 / lanes;
  const int first = static_cast<int>(threadIdx.x) / 32 * warp_rows + lane / lanes;
  for (int row = first; row < of.block_n; row += kWarps * warp_rows)
    fn(row, lane % lanes * kLcVector);
}

__global__ void __launch_bounds__(kThreads)
    lc_weight_kernel(bf16* __restrict__ w, const float* __restrict__ latent,
                     const float* __restrict__ u, const float* __restrict__ v,
                     const float* __restrict__ map, Matrix of, LcRule rule) {
  extern __shared__ __align__(16) float tile[];
  const int64_t row0 = int64_t{blockIdx.y} * of.block_n, column0 = int64_t{blockIdx.x} * of.block_k;
  const LcMap<float> affine(map);
  each_vector(of, [&](int row, int column) {
    float x[kLcVector];
    load_vector(x, latent + (row0 + row) * of.k + column0 + column);
#pragma unroll
    for (int i = 0; i < kLcVector; ++i) x[i] = quant::lc_code(quant::lc_position(x[i], rule), rule);
    affine.apply(x);
    transform_lanes(x, of.block_k / kLcVector);
    store_vector(tile + row * of.block_k + column, x);
  });
  __syncthreads();
  transform_columns(tile, of);
  each_vector(of, [&](int row, int column) {
    float x[kLcVector], scale[kLcVector];
    load_vector(x, tile + row * of.block_k + column);
    load_vector(scale, u + column0 + column);
    const float of_row = quant::lc_scale(v[row0 + row], rule.rounding);
#pragma unroll
    for (int i = 0; i < kLcVector; ++i)
      x[i] = x[i] * of.norm * quant::lc_scale(scale[i], rule.rounding) * of_row;
    store_vector(w + (row0 + row) * of.k + column0 + column, x);
  });
}

// parts_v (K / block_k, N): sums of dw w over the columns of a block. parts_map (blocks, 20) or
// null. dlatent may be dw: a block reads its part of dw before it writes.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    lc_weight_backward_kernel(T* dlatent, float* __restrict__ parts_v,
                              float* __restrict__ parts_map, const T* dw,
                              const bf16* __restrict__ w, const float* __restrict__ latent,
                              const float* __restrict__ u, const float* __restrict__ v,
                              const float* __restrict__ map, Matrix of, LcRule rule) {
  extern __shared__ __align__(16) float tile[];
  __shared__ float sums[kWarps][kLcMapSize];
  const int64_t row0 = int64_t{blockIdx.y} * of.block_n, column0 = int64_t{blockIdx.x} * of.block_k;
  const int lanes = of.block_k / kLcVector, lane = static_cast<int>(threadIdx.x) % 32;
  each_vector(of, [&](int row, int column) {
    const int64_t at = (row0 + row) * of.k + column0 + column;
    float x[kLcVector], weight[kLcVector], scale[kLcVector];
    load_vector(x, dw + at);
    load_vector(weight, w + at);
    load_vector(scale, u + column0 + column);
    const float of_row = quant::lc_scale(v[row0 + row], rule.rounding);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kLcVector; ++i) {
      sum += x[i] * weight[i];
      x[i] = x[i] * quant::lc_scale(scale[i], rule.rounding) * of_row * of.norm;
    }
    for (int apart = 1; apart < lanes; apart *= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, apart);
    if (lane % lanes == 0) parts_v[int64_t{blockIdx.x} * of.n + row0 + row] = sum;
    transform_lanes(x, lanes);
    store_vector(tile + row * of.block_k + column, x);
  });
  __syncthreads();
  transform_columns(tile, of);
  const LcMap<float> affine(map);
  float of_map[kLcMapSize] = {};
  each_vector(of, [&](int row, int column) {
    const int64_t at = (row0 + row) * of.k + column0 + column;
    float d[kLcVector], a[kLcVector];
    load_vector(d, tile + row * of.block_k + column);
    load_vector(a, latent + at);
#pragma unroll
    for (int i = 0; i < kLcVector; ++i) a[i] = quant::lc_position(a[i], rule);
    if (parts_map != nullptr) {
#pragma unroll
      for (int i = 0; i < kLcVector; ++i) {
#pragma unroll
        for (int j = 0; j < kLcVector; ++j)
          of_map[i * (kLcVector + 1) + j] += d[i] * quant::lc_code(a[j], rule);
        of_map[i * (kLcVector + 1) + kLcVector] += d[i];
      }
    }
    affine.transpose(d);
#pragma unroll
    for (int i = 0; i < kLcVector; ++i) d[i] = rule.spread * quant::lc_slope(a[i], rule) * d[i];
    store_vector(dlatent + at, d);
  });
  if (parts_map == nullptr) return;
#pragma unroll
  for (int i = 0; i < kLcMapSize; ++i) {
    const float sum = warp_sum(of_map[i]);
    if (lane == 0) sums[threadIdx.x / 32][i] = sum;
  }
  __syncthreads();
  if (threadIdx.x >= kLcMapSize) return;
  float total = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) total += sums[warp][threadIdx.x];
  parts_map[(int64_t{blockIdx.y} * gridDim.x + blockIdx.x) * kLcMapSize + threadIdx.x] = total;
}

// dv = the sum of its parts, over v: w is linear in v.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    lc_v_gradient_kernel(T* __restrict__ dv, const float* __restrict__ parts,
                         const float* __restrict__ v, int64_t count, int64_t n, LcRule rule) {
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (row >= n) return;
  float sum = 0.0f;
  for (int64_t i = 0; i < count; ++i) sum += parts[i * n + row];
  from_float(dv[row], sum / quant::lc_scale(v[row], rule.rounding));
}

__global__ void __launch_bounds__(kMapThreads)
    lc_map_gradient_kernel(float* __restrict__ dmap, const float* __restrict__ parts, int64_t count,
                           bool add) {
  const int number = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  float sum = 0.0f;
  for (int64_t i = lane; i < count; i += 32) sum += parts[i * kLcMapSize + number];
  sum = warp_sum(sum);
  if (lane == 0) dmap[number] = add ? dmap[number] + sum : sum;
}

// The features of a row that this lane has, vector after vector: fn(first feature, inside). Lanes
// past the end take part in shuffles.
template <typename Fn>
__device__ __forceinline__ void each_vector_of_row(int64_t features, const Fn& fn) {
  for (int64_t first = int64_t{threadIdx.x} / 32 * kWarpFeatures; first < features;
       first += int64_t{blockDim.x} * kLcVector) {
    const int64_t at = first + int64_t{threadIdx.x} % 32 * kLcVector;
    fn(at, at < features);
  }
}

__global__ void __launch_bounds__(kMaxRowThreads)
    lc_operand_kernel(bf16* __restrict__ out, float* __restrict__ constant,
                      const bf16* __restrict__ x, const float* __restrict__ u,
                      const float* __restrict__ map, int64_t k, int block, float norm) {
  __shared__ float shared[32];
  const int64_t row = int64_t{blockIdx.x} * k;
  const LcMap<float> affine(map);
  float sum = 0.0f;
  each_vector_of_row(k, [&](int64_t at, bool inside) {
    float values[kLcVector] = {};
    if (inside) {
      float scale[kLcVector];
      load_vector(values, x + row + at);
      load_vector(scale, u + at);
#pragma unroll
      for (int i = 0; i < kLcVector; ++i) values[i] = values[i] * scale[i];
    }
    transform_lanes(values, block / kLcVector);
    if (!inside) return;
#pragma unroll
    for (int i = 0; i < kLcVector; ++i) values[i] = values[i] * norm;
    sum += affine.constant(values);
    affine.transpose(values);
    store_vector(out + row + at, values);
  });
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) constant[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kMaxRowThreads)
    lc_output_kernel(bf16* __restrict__ y, const float* __restrict__ product,
                     const float* __restrict__ constant, const float* __restrict__ v,
                     const bf16* __restrict__ addend, int64_t n, int block, float norm) {
  const int64_t row = int64_t{blockIdx.x} * n;
  const float of_row = constant[blockIdx.x];
  each_vector_of_row(n, [&](int64_t at, bool inside) {
    float values[kLcVector] = {};
    if (inside) {
      load_vector(values, product + row + at);
#pragma unroll
      for (int i = 0; i < kLcVector; ++i) values[i] = values[i] + of_row;
    }
    transform_lanes(values, block / kLcVector);
    if (!inside) return;
    float scale[kLcVector], more[kLcVector] = {};
    load_vector(scale, v + at);
    if (addend != nullptr) load_vector(more, addend + row + at);
#pragma unroll
    for (int i = 0; i < kLcVector; ++i) values[i] = values[i] * norm * scale[i] + more[i];
    store_vector(y + row + at, values);
  });
}

// A block of whole warps for a row: each warp has 128 features at a time.
LaunchShape one_row_a_block(int64_t rows, int64_t features) {
  const int64_t warps = (features + kWarpFeatures - 1) / kWarpFeatures;
  return {dim3(static_cast<unsigned>(rows)),
          dim3(static_cast<unsigned>(std::min<int64_t>(32 * warps, kMaxRowThreads)))};
}

void check_aligned(bool aligned) { BBB_CHECK(aligned, "LC: a tensor is not aligned to 16 bytes"); }

}  // namespace

// The parts of dv, then of dmap.
int64_t lc_weight_backward_scratch_bytes(int64_t n, int64_t k) {
  const Matrix of(n, k);
  return (k / of.block_k * n + of.count() * kLcMapSize) * int64_t{sizeof(float)};
}

void CudaBackend::do_lc_weight(const Tensor& w, const LcWeight& from) {
  check_aligned(aligned(w, from.latent, from.u, from.v, from.map));
  const Matrix of(w.dim(0), w.dim(1));
  launch(stream_, {of.blocks(), dim3(kThreads), of.smem_bytes()}, lc_weight_kernel, bf16_of(w),
         from.latent.data<float>(), from.u.data<float>(), from.v.data<float>(),
         from.map.data<float>(), of, from.rule);
}

void CudaBackend::do_lc_weight_backward(const Tensor& dlatent, const Tensor& dv, const Tensor& dmap,
                                        const Tensor& dw, const Tensor& w, const LcWeight& from,
                                        Write dmap_mode, const Tensor& scratch) {
  check_aligned(aligned(dlatent, dw, w, from.latent, from.u, from.v, from.map));
  const Matrix of(w.dim(0), w.dim(1));
  float* const parts_v = static_cast<float*>(scratch.raw());
  const int64_t parts = of.k / of.block_k;
  float* const parts_map = dmap.defined() ? parts_v + parts * of.n : nullptr;
  with_elements(dw, [&]<typename T>(const T* gradient) {
    launch(stream_, {of.blocks(), dim3(kThreads), of.smem_bytes()}, lc_weight_backward_kernel<T>,
           static_cast<T*>(dlatent.raw()), parts_v, parts_map, gradient, bf16_of(w),
           from.latent.data<float>(), from.u.data<float>(), from.v.data<float>(),
           from.map.data<float>(), of, from.rule);
    launch(stream_, {blocks_for(of.n, kThreads, 1), dim3(kThreads)}, lc_v_gradient_kernel<T>,
           static_cast<T*>(dv.raw()), parts_v, from.v.data<float>(), parts, of.n, from.rule);
  });
  if (dmap.defined())
    launch(stream_, {dim3(1), dim3(kMapThreads)}, lc_map_gradient_kernel, dmap.data<float>(),
           parts_map, of.count(), dmap_mode == Write::Add);
}

void CudaBackend::do_lc_operand(const Tensor& out, const Tensor& constant, const Tensor& x,
                                const Tensor& u, const Tensor& map) {
  check_aligned(aligned(out, x, u));
  const int64_t k = x.dim(1);
  const int block = quant::lc_block(k);
  launch(stream_, one_row_a_block(x.dim(0), k), lc_operand_kernel, bf16_of(out),
         constant.data<float>(), bf16_of(x), u.data<float>(), map.data<float>(), k, block,
         quant::lc_norm<float>(block));
}

void CudaBackend::do_lc_output(const Tensor& y, const Tensor& product, const Tensor& constant,
                               const Tensor& v, const Tensor& addend) {
  check_aligned(aligned(y, product, v, addend));
  const int64_t n = product.dim(1);
  const int block = quant::lc_block(n);
  launch(stream_, one_row_a_block(product.dim(0), n), lc_output_kernel, bf16_of(y),
         product.data<float>(), constant.data<float>(), v.data<float>(), bf16_of(addend), n, block,
         quant::lc_norm<float>(block));
}

}  // namespace bbb::cuda
