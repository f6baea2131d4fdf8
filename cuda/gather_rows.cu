// out[i] = src[order[cursor * count + i]], cursor += 1, log[cursor] = control.
//
// The cursor is on the device, so that a recorded step can walk its batches. Rows have equal bytes
// and any dtype; they are copied in the largest unit that divides them. blockIdx.y walks the rows,
// blockIdx.x and the threads the units of a row. 2 bytes moved a byte.
#include "cuda/cuda_backend.h"
#include "cuda/vector.h"

namespace bbb::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kUnitsPerThread = 4;
constexpr int64_t kMaxGridY = 65535;

template <typename Unit>
__global__ void gather_rows_kernel(Unit* __restrict__ out, const Unit* __restrict__ src,
                                   const int32_t* __restrict__ order,
                                   const int32_t* __restrict__ cursor, int64_t count,
                                   int64_t units) {
  const int32_t* const batch = order + cursor[0] * count;
  const int64_t begin = int64_t{blockIdx.x} * kThreads * kUnitsPerThread + threadIdx.x;
  for (int64_t row = blockIdx.y; row < count; row += gridDim.y) {
    const Unit* const from = src + batch[row] * units;
    Unit* const to = out + row * units;
#pragma unroll
    for (int j = 0; j < kUnitsPerThread; ++j) {
      const int64_t i = begin + j * kThreads;
      if (i < units) to[i] = from[i];
    }
  }
}

__global__ void advance_kernel(int32_t* cursor, int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < count) cursor[i] += 1;
}

__global__ void log_control_kernel(float* __restrict__ log, const float* __restrict__ control,
                                   const int32_t* __restrict__ cursor, int64_t rows) {
  if (cursor[0] < rows)
    log[int64_t{cursor[0]} * engine::kControlSize + threadIdx.x] = control[threadIdx.x];
}

template <typename Unit>
void gather_as(cudaStream_t stream, const Tensor& out, const Rows& batch) {
  const int64_t count = out.dim(0);
  const int64_t units = out.bytes() / count / int64_t{sizeof(Unit)};
  dim3 grid = blocks_for(units, kThreads, kUnitsPerThread);
  grid.y = static_cast<unsigned>(std::min(count, kMaxGridY));
  launch(stream, {grid, dim3(kThreads)}, gather_rows_kernel<Unit>, static_cast<Unit*>(out.raw()),
         static_cast<const Unit*>(batch.src.raw()), batch.order.data<int32_t>(),
         batch.cursor.data<int32_t>(), count, units);
}

}  // namespace

void CudaBackend::do_gather_rows(const Tensor& out, const Rows& batch) {
  if (out.numel() == 0) return;
  const int64_t row_bytes = out.bytes() / out.dim(0);
  const auto divides = [&](int64_t unit) {
    return row_bytes % unit == 0 && reinterpret_cast<uintptr_t>(out.raw()) % unit == 0 &&
           reinterpret_cast<uintptr_t>(batch.src.raw()) % unit == 0;
  };
  if (divides(sizeof(uint4))) return gather_as<uint4>(stream_, out, batch);
  if (divides(sizeof(uint32_t))) return gather_as<uint32_t>(stream_, out, batch);
  gather_as<uint8_t>(stream_, out, batch);
}

void CudaBackend::do_advance(const Tensor& cursor) {
  launch(stream_, {blocks_for(cursor.numel(), kThreads, 1), dim3(kThreads)}, advance_kernel,
         cursor.data<int32_t>(), cursor.numel());
}

void CudaBackend::do_log_control(const Tensor& log, const Tensor& control, const Tensor& cursor) {
  launch(stream_, {dim3(1), dim3(engine::kControlSize)}, log_control_kernel, log.data<float>(),
         control.data<float>(), cursor.data<int32_t>(), log.dim(0));
}

}  // namespace bbb::cuda
