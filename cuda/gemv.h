// Launch function of the product of one row with a matrix in bf16 (cuda/gemv.cu), sm_90.
#pragma once

#include "cuda/cuda_backend.h"

namespace bbb::cuda {

constexpr int64_t kMaxRowBytes = 64 * 1024;  // of x, in shared memory

bool takes_gemv(int64_t m, int64_t k);
// One of y_bf16 and y_f32 is null. x and w are aligned to 16 bytes.
void launch_gemv(cudaStream_t stream, int processors, bf16* y_bf16, float* y_f32, const bf16* x,
                 const bf16* w, int64_t n, int64_t k);

}  // namespace bbb::cuda
