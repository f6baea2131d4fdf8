// loss = mean((x - y)^2), dx = 2 (x - y) / numel.   x, y, dx bf16, any shape; loss F32 (1).
//
// One pass reads x and y and writes dx (6 bytes an element, 4 without dx) and one partial sum a
// block; finish_sum adds the partial sums in order. Eight neighbouring elements a thread and step.
// If y has an order, its rows are read in place; the elements of x, and with them every sum, keep
// their order.
#include "cuda/cuda_backend.h"
#include "cuda/reduce.h"
#include "cuda/vector.h"

namespace bbb::cuda {
namespace {

constexpr int kWide = 8;
constexpr int64_t kMaxRowPieces = int64_t{1} << 30;  // sums of two are an int

// How y is read: in the order of x; in rows of whole, aligned pieces of kWidth; in any rows.
enum class Target { AsItLies, RowsOfPieces, Rows };

// y, and the order and cursor of its rows; y alone if it is in the order of x.
struct Batch {
  const bf16* __restrict__ y;
  const int32_t* __restrict__ order;
  const int32_t* __restrict__ cursor;
  int64_t count;
  int64_t row_numel;
};

// y at the elements i, i + stride, ... of x. step() adds the stride to row and piece: a division by
// row_numel in every step would take longer than the memory.
template <int kWidth, Target kTarget>
class TargetWalk {
 public:
  __device__ TargetWalk(const Batch& batch, int64_t i, int64_t stride) : batch_(batch) {
    if constexpr (kTarget == Target::AsItLies) return;
    order_ = batch.order + batch.cursor[0] * batch.count;
    if constexpr (kTarget == Target::Rows) return;
    row_pieces_ = static_cast<int>(batch.row_numel / kWidth);
    row_ = static_cast<int>(i / batch.row_numel);
    piece_ = static_cast<int>(i % batch.row_numel / kWidth);
    row_step_ = static_cast<int>(stride / batch.row_numel);
    piece_step_ = static_cast<int>(stride % batch.row_numel / kWidth);
  }

  // y at [i, i + kWidth), 0 from `count` on.
  __device__ void load(float (&b)[kWidth], int64_t i, int64_t count) const {
    if constexpr (kTarget == Target::AsItLies) {
      cuda::load(b, batch_.y + i, count);
    } else if constexpr (kTarget == Target::RowsOfPieces) {
      const int64_t piece = int64_t{order_[row_]} * row_pieces_ + piece_;
      cuda::load(b, batch_.y + piece * kWidth, count);
    } else {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        if (j >= count) {
          b[j] = 0.0f;
          continue;
        }
        const int64_t row = (i + j) / batch_.row_numel, column = i + j - row * batch_.row_numel;
        b[j] = to_float(batch_.y[order_[row] * batch_.row_numel + column]);
      }
    }
  }

  __device__ void step() {
    if constexpr (kTarget != Target::RowsOfPieces) return;
    row_ += row_step_;
    piece_ += piece_step_;
    if (piece_ < row_pieces_) return;
    piece_ -= row_pieces_;
    ++row_;
  }

 private:
  const Batch& batch_;
  const int32_t* order_;
  int row_pieces_, row_, piece_, row_step_, piece_step_;
};

template <int kWidth, Target kTarget>
__global__ void mse_kernel(float* __restrict__ partials, bf16* __restrict__ dx,
                           const bf16* __restrict__ x, const Batch batch, int64_t n, float scale) {
  __shared__ float shared[32];
  const int64_t stride = int64_t{gridDim.x} * blockDim.x * kWidth;
  const int64_t first = first_element<kWidth>();
  TargetWalk<kWidth, kTarget> y(batch, first, stride);
  float sum = 0.0f;
  for (int64_t i = first; i < n; i += stride, y.step()) {
    const int64_t left = kTarget == Target::RowsOfPieces ? kWidth : n - i;
    float a[kWidth], b[kWidth];
    y.load(b, i, left);
    load(a, x + i, left);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const float d = a[j] - b[j];
      sum += d * d;
      a[j] = scale * d;
    }
    if (dx != nullptr) store(dx + i, a, left);
  }
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

using Kernel = void (*)(float*, bf16*, const bf16*, const Batch, int64_t, float);

}  // namespace

void CudaBackend::do_mse(const Tensor& loss, const Tensor& dx, const Tensor& x, const Rows& y,
                         const Tensor& scratch) {
  const int64_t n = x.numel();
  const bool ordered = y.order.defined();
  const bool wide = aligned(dx, x) && (ordered || aligned(y.src));
  Batch batch{bf16_of(y.src), nullptr, nullptr, 0, 0};
  Kernel kernel = wide ? mse_kernel<kWide, Target::AsItLies> : mse_kernel<1, Target::AsItLies>;
  if (ordered) {
    batch.order = y.order.data<int32_t>();
    batch.cursor = y.cursor.data<int32_t>();
    batch.count = x.dim(0);
    batch.row_numel = n / batch.count;
    const bool pieces =
        batch.row_numel % kWide == 0 && batch.row_numel / kWide <= kMaxRowPieces && aligned(y.src);
    kernel = !wide    ? mse_kernel<1, Target::Rows>
             : pieces ? mse_kernel<kWide, Target::RowsOfPieces>
                      : mse_kernel<kWide, Target::Rows>;
  }
  const int64_t blocks = partials_for(n, wide ? kWide : 1);
  float* const partials = static_cast<float*>(scratch.raw());
  launch(stream_, {dim3(static_cast<unsigned>(blocks)), dim3(kSumThreads)}, kernel, partials,
         bf16_of(dx), bf16_of(x), batch, n, 2.0 / static_cast<double>(n));
  finish_sum(stream_, loss.data<float>(), partials, blocks, 1.0 / static_cast<double>(n),
             Write::Overwrite);
}

}  // namespace bbb::cuda
