// The optimizer's device side: the norm and the step's schedule, then the decoupled update.
//
// The gradient g is bf16 or F32.
//
// step_control, two launches. The first adds the squares of the gradients that were not clipped,
//     in the fixed order of reduce.h: 2.1 bytes an element of bf16. The second, one block, adds the
//     partial sums and writes the slots: with t = control[kStep], lr = peak min(1, (t + 1) /
//     warmup) (f + (1 - f) (1 + cos(pi t / total)) / 2), factor = min(1, clip / |g|). A loss or
//     norm that is not finite, a square that overflows FP32 included, sets kSkip, and the step
//     changes nothing.
// adamw (Loshchilov & Hutter, "Decoupled weight decay regularization", 2019), t =
// control[kApplied]:
//     g' = factor g, 0 where clipped;  m = b1 m + (1 - b1) g';  v = b2 v + (1 - b2) g'^2
//     w -= lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay w)
//     A block for each tile (quant/tiles.h), four neighbouring elements a thread at a time; the new
//     weights' groups are joined while they are in registers. 26.1 bytes an element where g is
//     bf16.
#include <cmath>

#include "cuda/cuda_backend.h"
#include "cuda/reduce.h"
#include "cuda/vector.h"
#include "quant/group_range.h"

namespace bbb::cuda {
namespace {

using quant::kTileThreads;
using quant::WeightTile;

constexpr int kWide = 4;
constexpr int kMaskedWide = 8;  // elements of one byte of the mask
constexpr int kControlThreads = 1024;

// One partial a block. n is a multiple of kMaskedWide.
template <typename T>
__global__ void __launch_bounds__(kSumThreads)
    masked_squares_kernel(float* __restrict__ partials, const T* __restrict__ g,
                          const uint8_t* __restrict__ clipped, int64_t n) {
  __shared__ float shared[32];
  const int64_t stride = int64_t{gridDim.x} * blockDim.x * kMaskedWide;
  float sum = 0.0f;
  for (int64_t i = first_element<kMaskedWide>(); i < n; i += stride) {
    float d[kMaskedWide];
    load(d, g + i, n - i);
    const unsigned mask = clipped[i / 8];
#pragma unroll
    for (int j = 0; j < kMaskedWide; ++j) sum += mask >> j & 1u ? 0.0f : d[j] * d[j];
  }
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kControlThreads)
    step_control_kernel(float* __restrict__ control, const float* __restrict__ loss,
                        const float* __restrict__ partials, int count, Schedule schedule) {
  __shared__ float shared[32];
  float norm_squared = 0.0f;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kControlThreads)
    norm_squared += partials[i];
  norm_squared = block_sum(norm_squared, shared);
  if (threadIdx.x != 0) return;
  using namespace engine;  // the slots
  const double t = control[kStep];
  const double warmup = static_cast<double>(schedule.warmup_steps);
  const double ramp = warmup > 0 ? fmin(1.0, (t + 1) / warmup) : 1.0;
  const double wave = (1 + cospi(t / static_cast<double>(schedule.total_steps))) / 2;
  const double f = schedule.final_ratio;
  const double norm = sqrt(static_cast<double>(norm_squared));
  const bool skip = !isfinite(loss[0]) || !isfinite(norm);
  const double factor = schedule.clip_norm > 0 ? fmin(1.0, schedule.clip_norm / norm) : 1.0;
  control[kStep] = static_cast<float>(t + 1);
  control[kLr] = static_cast<float>(schedule.peak_lr * ramp * (f + (1 - f) * wave));
  control[kScale] = skip ? 0.0f : static_cast<float>(factor);
  control[kSkip] = skip ? 1.0f : 0.0f;
  control[skip ? kSkipped : kApplied] += 1.0f;
  control[kGradNorm] = static_cast<float>(norm);
  control[kLoss] = loss[0];
}

struct AdamWConstants {
  float beta1, one_minus_beta1, log_beta1;
  float beta2, one_minus_beta2, log_beta2;
  float epsilon, weight_decay;
};

template <int kGroup, typename T>
__global__ void __launch_bounds__(kTileThreads)
    adamw_kernel(float* __restrict__ w, float* __restrict__ m, float* __restrict__ v,
                 float* __restrict__ widest, const T* __restrict__ g,
                 const uint8_t* __restrict__ clipped, const float* __restrict__ control,
                 const WeightTile* __restrict__ tiles, AdamWConstants c) {
  const WeightTile tile = tiles[blockIdx.x];
  const bool skip = control[engine::kSkip] != 0.0f;
  const bool quantized = tile.bits != quant::kNotQuantized;
  if (skip && !quantized) return;
  const float lr = control[engine::kLr], factor = control[engine::kScale];
  const float t = control[engine::kApplied];
  // 1 - beta^t without the cancellation of the first steps.
  const float correction1 = -expm1f(t * c.log_beta1), correction2 = -expm1f(t * c.log_beta2);
  float most = 0.0f;
  // A tile is whole stretches of a warp's 128 elements: no warp stands half inside.
  static_assert(quant::kTileAlign == 32 * kWide);
  for (int at = static_cast<int>(threadIdx.x) * kWide; at < tile.count;
       at += kTileThreads * kWide) {
    const int64_t i = tile.begin * quant::kTileAlign + at;
    float weight[kWide];
    load(weight, w + i, kWide);
    if (!skip) {
      float first[kWide], second[kWide], gradient[kWide];
      load(first, m + i, kWide);
      load(second, v + i, kWide);
      load(gradient, g + i, kWide);
      const unsigned mask = clipped[i / 8] >> (i % 8);
#pragma unroll
      for (int j = 0; j < kWide; ++j) {
        const float d = mask >> j & 1u ? 0.0f : factor * gradient[j];
        first[j] = c.beta1 * first[j] + c.one_minus_beta1 * d;
        second[j] = c.beta2 * second[j] + c.one_minus_beta2 * d * d;
        const float update = first[j] / correction1 / (sqrtf(second[j] / correction2) + c.epsilon);
        weight[j] -= lr * (update + c.weight_decay * weight[j]);
      }
      store(w + i, weight, kWide);
      store(m + i, first, kWide);
      store(v + i, second, kWide);
    }
    if (quantized) most = quant::max_nan(most, quant::group_range<kGroup>(weight).width());
  }
  if (quantized) quant::block_max(widest + tile.slot, most);
}

}  // namespace

void CudaBackend::do_step_control(const Tensor& control, const Tensor& loss, const Tensor& g,
                                  const Tensor& clipped, const Schedule& schedule) {
  const Tensor scratch_sums = scratch(kPartials * int64_t{sizeof(float)});
  float* const partials = static_cast<float*>(scratch_sums.raw());
  const int64_t count = partials_for(g.numel(), kMaskedWide);
  with_elements(g, [&]<typename T>(const T* gradient) {
    launch(stream_, {dim3(static_cast<unsigned>(count)), dim3(kSumThreads)},
           masked_squares_kernel<T>, partials, gradient, clipped.data<uint8_t>(), g.numel());
  });
  launch(stream_, {dim3(1), dim3(kControlThreads)}, step_control_kernel, control.data<float>(),
         loss.data<float>(), partials, static_cast<int>(count), schedule);
}

void CudaBackend::do_adamw(const Tensor& w, const Tensor& m, const Tensor& v, const Tensor& g,
                           const Tensor& control, const FakeQuantWeights& q,
                           const AdamWSpec& spec) {
  const AdamWConstants constants{
      .beta1 = static_cast<float>(spec.beta1),
      .one_minus_beta1 = static_cast<float>(1 - spec.beta1),
      .log_beta1 = static_cast<float>(std::log(spec.beta1)),
      .beta2 = static_cast<float>(spec.beta2),
      .one_minus_beta2 = static_cast<float>(1 - spec.beta2),
      .log_beta2 = static_cast<float>(std::log(spec.beta2)),
      .epsilon = static_cast<float>(spec.epsilon),
      .weight_decay = static_cast<float>(spec.weight_decay),
  };
  // The step's forward has turned the old maxima into S; a skipped step finds them again.
  BBB_CUDA(cudaMemsetAsync(q.widest.raw(), 0, static_cast<size_t>(q.widest.bytes()), stream_));
  with_elements(g, [&]<typename T>(const T* gradient) {
    quant::with_group(q.group, [&](auto size) {
      launch(stream_, {dim3(static_cast<unsigned>(q.tiles.dim(0))), dim3(kTileThreads)},
             adamw_kernel<size, T>, w.data<float>(), m.data<float>(), v.data<float>(),
             q.widest.data<float>(), gradient, q.clipped.data<uint8_t>(), control.data<float>(),
             static_cast<const WeightTile*>(q.tiles.raw()), constants);
    });
  });
}

}  // namespace bbb::cuda
