// y = x W^T for one row x: the head of a decoding step, at the speed of memory.
// y (N), bf16 or FP32; x bf16 (K); W bf16 (N, K), K a multiple of 8; FP32 sums in a fixed order.
//
// A block keeps x in shared memory. A warp takes a row of W at a time, eight neighbouring values a
// lane and step, kAhead steps in flight; the rows of all warps are interleaved. The kernel starts
// early. Bytes moved: those of W.
#include "cuda/early_start.h"
#include "cuda/gemv.h"
#include "cuda/ptx.h"
#include "cuda/reduce.h"

namespace bbb::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kBlocksPerProcessor = 2;
constexpr int kWide = 8;
constexpr int kStep = 32 * kWide;  // values of a warp
constexpr int kAhead = 4;

__device__ inline uint4 load_once(const bf16* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(__cvta_generic_to_global(p)));
  return v;
}

// The sum of eight products.
__device__ inline float dot(const uint4& a, const uint4& b, float sum) {
  const uint32_t left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum = fmaf(__uint_as_float(left[i] << 16), __uint_as_float(right[i] << 16), sum);
    sum =
        fmaf(__uint_as_float(left[i] & 0xFFFF0000u), __uint_as_float(right[i] & 0xFFFF0000u), sum);
  }
  return sum;
}

// Shared memory: x (K).
template <typename Y>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    gemv_kernel(Y* __restrict__ y, const bf16* __restrict__ x, const bf16* __restrict__ w,
                int64_t n, int k) {
  start_next_kernel();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int64_t step = int64_t{gridDim.x} * kWarps;
  int64_t row = int64_t{blockIdx.x} * kWarps + thread / 32;
  uint4 ahead[kAhead];
  // Steps of a row from column `from` on. Past the row: zeros.
  const auto load_steps = [&](int64_t of_row, int from) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int column = from + i * kStep + lane * kWide;
      ahead[i] = of_row < n && column < k ? load_once(w + of_row * k + column) : uint4{};
    }
  };
  wait_for_previous_kernel();
  load_steps(row, 0);
  uint4* const staged = dynamic_smem();
  for (int i = thread; i < k / kWide; i += kThreads)
    staged[i] = load_past_l1(reinterpret_cast<const uint4*>(x) + i);
  __syncthreads();
  for (; row < n; row += step) {
    float sum = 0.0f;
    for (int from = 0; from < k; from += kAhead * kStep) {
      uint4 now[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) now[i] = ahead[i];
      const bool same = from + kAhead * kStep < k;
      load_steps(same ? row : row + step, same ? from + kAhead * kStep : 0);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int column = from + i * kStep + lane * kWide;
        if (column < k) sum = dot(now[i], staged[column / kWide], sum);
      }
    }
    sum = warp_sum(sum);
    if (lane == 0) from_float(y[row], sum);
  }
}

}  // namespace

bool takes_gemv(int64_t m, int64_t k) {
  return m == 1 && k % kWide == 0 && k * int64_t{sizeof(bf16)} <= kMaxRowBytes;
}

void launch_gemv(cudaStream_t stream, int processors, bf16* y_bf16, float* y_f32, const bf16* x,
                 const bf16* w, int64_t n, int64_t k) {
  const int64_t blocks =
      std::min<int64_t>(int64_t{kBlocksPerProcessor} * processors, (n + kWarps - 1) / kWarps);
  const LaunchShape shape{static_cast<unsigned>(blocks), kThreads, k * int64_t{sizeof(bf16)}, true};
  if (y_bf16 != nullptr)
    launch(stream, shape, gemv_kernel<bf16>, y_bf16, x, w, n, static_cast<int>(k));
  else
    launch(stream, shape, gemv_kernel<float>, y_f32, x, w, n, static_cast<int>(k));
}

}  // namespace bbb::cuda
