// Matrix products: OpenBLAS on strips of the output.
//
//     gemm_nt  y (M, N)  = alpha x (M, K) w (N, K)^T (+ addend)
//     gemm_nn  dx (M, K) (+)= alpha dy (M, N) w (N, K)
//     gemm_tn  dw (N, K) (+)= dy (M, N)^T x (M, K)
//
// The longer side of the output is cut into strips; each is one single-threaded BLAS call. One row
// of output (decoding) is a matrix-vector product, bound by reading w once.
//
// A bf16 w is read as it is for few rows of x. For more rows a block of it is widened first.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

#include "engine/bf16.h"
#include "engine/cpu/blas.h"
#include "engine/cpu/cpu_backend.h"
#include "engine/cpu/vector_math.h"

namespace bbb::engine {
namespace {

constexpr int64_t kStripAlign = 32;       // a multiple of every BLAS kernel's tile
constexpr int64_t kStripFlops = 1 << 21;  // less work is not worth waking a thread
constexpr int64_t kStripsPerThread = 2;   // evens out threads of unequal speed

// The strip length for `length` rows or columns of `flops` each.
int64_t strip_length(int64_t length, int64_t flops, int threads) {
  const int64_t pieces = threads * kStripsPerThread;
  const int64_t even = (length + pieces - 1) / pieces;
  const int64_t least = kStripFlops / std::max<int64_t>(1, flops);
  const int64_t strip = std::max(even, least);
  return (strip + kStripAlign - 1) / kStripAlign * kStripAlign;
}

template <typename T>
T alpha_of(const Tensor& alpha) {
  return alpha.defined() ? *alpha.data<T>() : T{1};
}

constexpr int64_t kFewRows = 8;
constexpr int64_t kWidenedRows = 128;  // of w at a time: the block stays in the cache

// sum_c x[c] w[c] over `pairs` pairs of elements, x as even and odd elements. Two bf16 are a 32-bit
// word: the upper is an F32 after a mask, the lower after a shift.
template <typename T>
T paired_dot(const T* even, const T* odd, const uint16_t* w, int64_t pairs) {
  constexpr int kLanes = 16;        // of each kind: one cache line of w
  constexpr int64_t kAhead = 2048;  // elements from a prefetch to the use
  T lower[kLanes] = {}, upper[kLanes] = {};
  int64_t c = 0;
  for (; c + kLanes <= pairs; c += kLanes) {
    __builtin_prefetch(w + 2 * c + kAhead);
    for (int l = 0; l < kLanes; ++l) {
      uint32_t pair;
      std::memcpy(&pair, w + 2 * (c + l), sizeof pair);
      lower[l] = std::fma(even[c + l], T{std::bit_cast<float>(pair << 16)}, lower[l]);
      upper[l] = std::fma(odd[c + l], T{std::bit_cast<float>(pair & 0xFFFF0000u)}, upper[l]);
    }
  }
  T total = lane_sum<T>(kLanes, [&](int64_t l) { return lower[l] + upper[l]; });
  for (; c < pairs; ++c)
    total += even[c] * T{from_bf16(w[2 * c])} + odd[c] * T{from_bf16(w[2 * c + 1])};
  return total;
}

// The even and the odd elements of each row of x (m, k): (m, 2, k / 2).
template <typename T>
std::vector<T> split_pairs(const T* x, int64_t m, int64_t k) {
  const int64_t pairs = k / 2;
  std::vector<T> split(static_cast<size_t>(m * 2 * pairs));
  for (int64_t i = 0; i < m; ++i)
    for (int64_t c = 0; c < 2 * pairs; ++c)
      split[static_cast<size_t>((2 * i + c % 2) * pairs + c / 2)] = x[i * k + c];
  return split;
}

// Columns [begin, end) of y (m, n) = scale x w^T + beta y, with bf16 w (n, k) and few rows of x, of
// which `split` are the pairs.
template <typename T>
void gemm_nt_few_rows(T* y, const T* x, const T* split, const uint16_t* w, int64_t m, int64_t n,
                      int64_t k, T scale, T beta, int64_t begin, int64_t end) {
  const int64_t pairs = k / 2;
  for (int64_t j = begin; j < end; ++j)
    for (int64_t i = 0; i < m; ++i) {
      const T* even = split + 2 * i * pairs;
      T sum = paired_dot(even, even + pairs, w + j * k, pairs);
      if (k % 2 == 1) sum += x[i * k + k - 1] * T{from_bf16(w[j * k + k - 1])};
      T& out = y[i * n + j];
      out = beta == T{0} ? scale * sum : scale * sum + beta * out;
    }
}

// The same for any number of rows.
template <typename T>
void gemm_nt_widened(T* y, const T* x, const uint16_t* w, int64_t m, int64_t n, int64_t k, T scale,
                     T beta, int64_t begin, int64_t end) {
  std::vector<T> block(static_cast<size_t>(kWidenedRows * k));
  for (int64_t j = begin; j < end; j += kWidenedRows) {
    const int64_t rows = std::min(kWidenedRows, end - j);
    std::transform(w + j * k, w + (j + rows) * k, block.begin(), from_bf16);
    blas_gemm(CblasNoTrans, CblasTrans, m, rows, k, scale, x, k, block.data(), k, beta, y + j, n);
  }
}

}  // namespace

template <typename T>
void CpuBackend<T>::do_gemm_nt(const Tensor& y, const Tensor& x, const Tensor& w,
                               const Tensor& alpha, const Tensor& addend) {
  const int64_t m = x.dim(0), n = w.dim(0), k = x.dim(1);
  const T scale = alpha_of<T>(alpha), beta = addend.defined() ? T{1} : T{0};
  if (addend.defined()) do_copy(y, addend);
  if (k == 0 && !addend.defined()) do_zero(y);
  if (m == 0 || n == 0 || k == 0) return;
  T* out = data(y);
  const T* a = data(x);
  if (w.dtype() == DType::BF16) {
    const bool few = m <= kFewRows;
    const std::vector<T> split = few ? split_pairs(a, m, k) : std::vector<T>();
    return parallel_for(n, strip_length(n, 2 * m * k, threads()), [&](int64_t begin, int64_t end) {
      const auto* rows = w.data<uint16_t>();
      if (few)
        gemm_nt_few_rows(out, a, split.data(), rows, m, n, k, scale, beta, begin, end);
      else
        gemm_nt_widened(out, a, rows, m, n, k, scale, beta, begin, end);
    });
  }
  const T* b = data(w);
  if (m == 1) {
    parallel_for(n, strip_length(n, 2 * k, threads()), [&](int64_t begin, int64_t end) {
      blas_gemv(end - begin, k, scale, b + begin * k, a, beta, out + begin);
    });
  } else if (m > n) {
    parallel_for(m, strip_length(m, 2 * n * k, threads()), [&](int64_t begin, int64_t end) {
      blas_gemm(CblasNoTrans, CblasTrans, end - begin, n, k, scale, a + begin * k, k, b, k, beta,
                out + begin * n, n);
    });
  } else {
    parallel_for(n, strip_length(n, 2 * m * k, threads()), [&](int64_t begin, int64_t end) {
      blas_gemm(CblasNoTrans, CblasTrans, m, end - begin, k, scale, a, k, b + begin * k, k, beta,
                out + begin, n);
    });
  }
}

template <typename T>
void CpuBackend<T>::do_gemm_nn(const Tensor& dx, const Tensor& dy, const Tensor& w,
                               const Tensor& alpha, Write mode) {
  const int64_t m = dy.dim(0), n = dy.dim(1), k = w.dim(1);
  const T scale = alpha_of<T>(alpha), beta = mode == Write::Add ? T{1} : T{0};
  if (n == 0 && mode == Write::Overwrite) do_zero(dx);
  if (m == 0 || n == 0 || k == 0) return;
  T* out = data(dx);
  const T *a = data(dy), *b = data(w);
  if (m > k) {
    parallel_for(m, strip_length(m, 2 * n * k, threads()), [&](int64_t begin, int64_t end) {
      blas_gemm(CblasNoTrans, CblasNoTrans, end - begin, k, n, scale, a + begin * n, n, b, k, beta,
                out + begin * k, k);
    });
  } else {
    parallel_for(k, strip_length(k, 2 * m * n, threads()), [&](int64_t begin, int64_t end) {
      blas_gemm(CblasNoTrans, CblasNoTrans, m, end - begin, n, scale, a, n, b + begin, k, beta,
                out + begin, k);
    });
  }
}

template <typename T>
void CpuBackend<T>::do_gemm_tn(const Tensor& dw, const Tensor& dy, const Tensor& x, Write mode) {
  const int64_t m = dy.dim(0), n = dy.dim(1), k = x.dim(1);
  const T beta = mode == Write::Add ? T{1} : T{0};
  if (m == 0 && mode == Write::Overwrite) do_zero(dw);
  if (m == 0 || n == 0 || k == 0) return;
  T* out = data(dw);
  const T *a = data(dy), *b = data(x);
  if (n > k) {
    parallel_for(n, strip_length(n, 2 * m * k, threads()), [&](int64_t begin, int64_t end) {
      blas_gemm(CblasTrans, CblasNoTrans, end - begin, k, m, T{1}, a + begin, n, b, k, beta,
                out + begin * k, k);
    });
  } else {
    parallel_for(k, strip_length(k, 2 * m * n, threads()), [&](int64_t begin, int64_t end) {
      blas_gemm(CblasTrans, CblasNoTrans, n, end - begin, m, T{1}, a, n, b + begin, k, beta,
                out + begin, k);
    });
  }
}

BBB_CPU_INSTANTIATE(gemm_nt);
BBB_CPU_INSTANTIATE(gemm_nn);
BBB_CPU_INSTANTIATE(gemm_tn);

}  // namespace bbb::engine
