#include "autograd/optimizer.h"

namespace bbb::autograd {

Optimizer::Optimizer(ParameterSet& parameters, const WeightQuantizer* quantizer,
                     engine::AdamWSpec spec, engine::Schedule schedule)
    : parameters_(parameters),
      quantizer_(quantizer),
      spec_(spec),
      schedule_(schedule),
      control_(parameters.backend().zeros({engine::kControlSize}, parameters.backend().real())),
      muon_(parameters) {}

void Optimizer::restart() {
  parameters_.reset_moments();
  parameters_.backend().zero(control_);
}

void Optimizer::step(const Tensor& loss) {
  Backend& backend = parameters_.backend();
  // With adapters, no step moves a weight, and their gradients leave clipped ones out already.
  const engine::QuantizedWeights epilogue = quantizer_ != nullptr && !quantizer_->adapts()
                                                ? quantizer_->weights()
                                                : engine::QuantizedWeights();
  const Tensor gradients = parameters_.moved(parameters_.grads());
  backend.step_control(control_, loss, gradients, epilogue.clipped, schedule_);
  muon_.replace_gradients(control_, epilogue.clipped);
  backend.adamw(parameters_.moved(parameters_.masters()), parameters_.m(), parameters_.v(),
                gradients, control_, parameters_.moved_table(), epilogue, spec_);
}

}  // namespace bbb::autograd
