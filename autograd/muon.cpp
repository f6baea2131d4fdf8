#include "autograd/muon.h"

#include <algorithm>
#include <cmath>

namespace bbb::autograd {

using engine::Write;

namespace {

constexpr int kIterations = 5;
constexpr double kA = 3.4445, kB = -4.7750, kC = 2.0315;
constexpr double kMomentum = 0.95;
constexpr double kStepSize = 0.2;  // the root mean square of AdamW's steps

Tensor constant(Backend& backend, double value) {
  const Tensor tensor = backend.empty({1}, backend.real());
  const auto rounded = static_cast<float>(value);
  if (backend.real() == engine::DType::F64)
    backend.upload(tensor, &value);
  else
    backend.upload(tensor, &rounded);
  return tensor;
}

}  // namespace

quant::SlotRule<double> slot_rule(UpdateRule rule, const Shape& shape) {
  if (rule == UpdateRule::AdamW) return {};
  BBB_ASSERT(shape.size() == 2);
  const auto longest = static_cast<double>(std::max(shape[0], shape[1]));
  return {.lr_factor = kStepSize * std::sqrt(longest) * std::pow(kA, kIterations), .direct = 1};
}

Muon::Muon(ParameterSet& parameters) : parameters_(parameters) {
  if (std::ranges::none_of(parameters.parameters(),
                           [](const auto& p) { return p->rule.direct != 0; }))
    return;
  for (int i = 0; i < kIterations; ++i) {
    const double scale = std::pow(kA, 2 * i);  // of A
    square_factors_.push_back(constant(parameters.backend(), kC / kB * scale));
    step_factors_.push_back(constant(parameters.backend(), kB * scale / kA));
  }
}

void Muon::replace_gradients(const Tensor& control, const Tensor& clipped) const {
  if (square_factors_.empty()) return;
  Backend& backend = parameters_.backend();
  for (const auto& parameter : parameters_.parameters()) {
    if (parameter->rule.direct == 0 || parameter->frozen) continue;
    const int64_t begin = parameters_.offset(*parameter), count = parameter->master.numel();
    const int64_t padded = quant::padded_elements(count);
    const Tensor z = backend.empty({padded}, backend.act());
    backend.muon_momentum(
        z, parameters_.m().slice(begin, padded), parameters_.grads().slice(begin, padded),
        clipped.defined() ? clipped.slice(begin / 8, padded / 8) : Tensor(), control, kMomentum);
    const Tensor matrix = z.slice(0, count).view(parameter->master.shape());
    make_orthogonal(matrix);
    if (parameter->grad.dtype() == matrix.dtype())
      backend.copy(parameter->grad, matrix);
    else
      backend.cast(parameter->grad, matrix);
  }
}

void Muon::make_orthogonal(const Tensor& z) const {
  Backend& backend = parameters_.backend();
  const bool wide = z.dim(0) <= z.dim(1);
  const int64_t side = std::min(z.dim(0), z.dim(1));
  const Tensor a = backend.empty({side, side}, z.dtype()), b = backend.empty(a.shape(), z.dtype()),
               before = backend.empty(z.shape(), z.dtype());
  for (int i = 0; i < kIterations; ++i) {
    const auto at = static_cast<size_t>(i);
    backend.copy(before, z);
    if (wide)
      backend.gemm_nt(a, z, z, Tensor(), Tensor());
    else
      backend.gemm_tn(a, z, z, Write::Overwrite);
    backend.gemm_nt(b, a, a, square_factors_[at], a);  // A and B are symmetric
    if (wide)
      backend.gemm_nn(z, b, before, step_factors_[at], Write::Add);
    else
      backend.gemm_nn(z, before, b, step_factors_[at], Write::Add);
  }
}

}  // namespace bbb::autograd
