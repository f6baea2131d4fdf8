// The optimizer's device side: the step's schedule, then the decoupled update.
//
// step_control, one thread: with t = control[kStep], lr = peak min(1, (t + 1) / warmup)
//     (f + (1 - f) (1 + cos(pi t / total)) / 2), factor = min(1, clip / |g|); a loss or norm that
//     is not finite sets kSkip, and the step changes nothing.
// adamw (Loshchilov & Hutter, "Decoupled weight decay regularization", 2019), t =
// control[kApplied]:
//     g' = factor g;  m = b1 m + (1 - b1) g';  v = b2 v + (1 - b2) g'^2
//     w -= lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay w)
// w, m, v, g F32, same numel. A flat launch, four neighbouring elements a thread; 28 bytes each.
#include <cmath>

#include "cuda/cuda_backend.h"
#include "cuda/vector.h"

namespace bbb::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWide = 4;

__global__ void step_control_kernel(float* __restrict__ control, const float* __restrict__ loss,
                                    const float* __restrict__ norm_squared, Schedule schedule) {
  using namespace engine;  // the slots
  const double t = control[kStep];
  const double warmup = static_cast<double>(schedule.warmup_steps);
  const double ramp = warmup > 0 ? fmin(1.0, (t + 1) / warmup) : 1.0;
  const double wave = (1 + cospi(t / static_cast<double>(schedule.total_steps))) / 2;
  const double f = schedule.final_ratio;
  const double norm = sqrt(static_cast<double>(norm_squared[0]));
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

template <int kWidth>
__global__ void adamw_kernel(float* __restrict__ w, float* __restrict__ m, float* __restrict__ v,
                             const float* __restrict__ g, const float* __restrict__ control,
                             int64_t n, AdamWConstants c) {
  const int64_t i = first_element<kWidth>();
  if (i >= n || control[engine::kSkip] != 0.0f) return;
  const float lr = control[engine::kLr], factor = control[engine::kScale];
  const float t = control[engine::kApplied];
  // 1 - beta^t without the cancellation of the first steps.
  const float correction1 = -expm1f(t * c.log_beta1), correction2 = -expm1f(t * c.log_beta2);
  float weight[kWidth], first[kWidth], second[kWidth], gradient[kWidth];
  load(weight, w + i, n - i);
  load(first, m + i, n - i);
  load(second, v + i, n - i);
  load(gradient, g + i, n - i);
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    const float d = factor * gradient[j];
    first[j] = c.beta1 * first[j] + c.one_minus_beta1 * d;
    second[j] = c.beta2 * second[j] + c.one_minus_beta2 * d * d;
    const float update = first[j] / correction1 / (sqrtf(second[j] / correction2) + c.epsilon);
    weight[j] -= lr * (update + c.weight_decay * weight[j]);
  }
  store(w + i, weight, n - i);
  store(m + i, first, n - i);
  store(v + i, second, n - i);
}

}  // namespace

void CudaBackend::do_step_control(const Tensor& control, const Tensor& loss,
                                  const Tensor& norm_squared, const Schedule& schedule) {
  launch(stream_, {dim3(1), dim3(1)}, step_control_kernel, control.data<float>(),
         loss.data<float>(), norm_squared.data<float>(), schedule);
}

void CudaBackend::do_adamw(const Tensor& w, const Tensor& m, const Tensor& v, const Tensor& g,
                           const Tensor& control, const AdamWSpec& spec) {
  const int64_t n = w.numel();
  const bool wide = aligned(w, m, v, g);
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
  launch(stream_, {blocks_for(n, kThreads, wide ? kWide : 1), dim3(kThreads)},
         wide ? adamw_kernel<kWide> : adamw_kernel<1>, w.data<float>(), m.data<float>(),
         v.data<float>(), g.data<float>(), control.data<float>(), n, constants);
}

}  // namespace bbb::cuda
