#include "train/oscillation.h"

namespace bbb::train {

Oscillation::Oscillation(engine::Backend& backend, const TrainConfig& config, Student& student)
    : backend_(backend), config_(config), student_(student) {
  const engine::Tensor& masters = student.parameters().masters();
  if (config.e2e_average > 0) average_ = backend.zeros(masters.shape(), backend.real());
  if (config.e2e_freeze == Freeze::Flips)
    flips_ = backend.zeros(masters.shape(), engine::DType::U8);
}

void Oscillation::start() const {
  if (average_.defined()) backend_.copy(average_, student_.parameters().masters());
}

void Oscillation::change_gradients(const engine::Tensor& control) const {
  if (config_.e2e_damping == 0 && !flips_.defined()) return;
  const autograd::ParameterSet& parameters = student_.parameters();
  for (size_t i = 0; i < parameters.sections().size(); ++i) {
    const engine::QuantizedWeights& weights = student_.quantizer()->weights_of(i);
    if (!weights.wq.defined()) continue;
    const int64_t begin = parameters.sections()[i].begin, count = parameters.sections()[i].count;
    const engine::Tensor gradients = parameters.grads().slice(begin, count);
    if (config_.e2e_damping > 0)
      backend_.dampen(gradients, parameters.masters().slice(begin, count), weights,
                      config_.e2e_damping);
    if (flips_.defined())
      backend_.freeze_flips(flips_.slice(begin, count), gradients,
                            parameters.m().slice(begin, count), weights, control);
  }
}

void Oscillation::average(const engine::Tensor& control) const {
  if (average_.defined())
    backend_.average(average_, student_.parameters().masters(), control, config_.e2e_average);
}

void Oscillation::finish() const {
  if (average_.defined()) backend_.copy(student_.parameters().masters(), average_);
}

void Oscillation::add_state(NamedTensors& state) const {
  if (average_.defined()) state.push_back({"average", average_, &student_.parameters()});
  if (flips_.defined()) state.push_back({"flips", flips_, &student_.parameters()});
}

}  // namespace bbb::train
