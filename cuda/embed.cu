// out[m] = table[ids[m]].   out bf16 (M, D); ids I32 (M), each in [0, V); table bf16 (V, D).
//
// One warp a row, eight neighbouring elements a lane and step; 4 D + 4 bytes a row.
#include "cuda/cuda_backend.h"
#include "cuda/vector.h"

namespace bbb::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsPerBlock = kThreads / 32;
constexpr int kWide = 8;

template <int kWidth>
__global__ void embed_kernel(bf16* __restrict__ out, const int32_t* __restrict__ ids,
                             const bf16* __restrict__ table, int64_t rows, int64_t d) {
  using Chunk = Vector<bf16, kWidth>;
  const int64_t m = int64_t{blockIdx.x} * kRowsPerBlock + threadIdx.x / 32;
  if (m >= rows) return;
  const bf16* const from = table + ids[m] * d;
  bf16* const to = out + m * d;
  for (int64_t i = threadIdx.x % 32 * kWidth; i < d; i += 32 * kWidth)
    *reinterpret_cast<Chunk*>(to + i) = *reinterpret_cast<const Chunk*>(from + i);
}

}  // namespace

void CudaBackend::do_embed(const Tensor& out, const Tensor& ids, const Tensor& table) {
  const int64_t rows = ids.numel(), d = table.dim(1);
  const bool wide = d % kWide == 0 && aligned(out, table);
  launch(stream_, {blocks_for(rows, kRowsPerBlock, 1), dim3(kThreads)},
         wide ? embed_kernel<kWide> : embed_kernel<1>, bf16_of(out), ids.data<int32_t>(),
         bf16_of(table), rows, d);
}

}  // namespace bbb::cuda
