#include "autograd/optimizer.h"

namespace bbb::autograd {

Optimizer::Optimizer(ParameterSet& parameters, const WeightQuantizer* quantizer,
                     engine::AdamWSpec spec, engine::Schedule schedule)
    : parameters_(parameters),
      quantizer_(quantizer),
      spec_(spec),
      schedule_(schedule),
      control_(parameters.backend().zeros({engine::kControlSize}, parameters.backend().real())),
      muon_(parameters) {
  if (parameters.sharded_elements() == 0) return;
  Backend& backend = parameters.backend();
  own_control_ = backend.zeros({engine::kControlSize}, backend.real());
  norms_ = backend.zeros({quant::padded_elements(parameters.comm()->size())}, backend.real());
}

void Optimizer::restart() {
  parameters_.reset_moments();
  parameters_.backend().zero(control_);
}

void Optimizer::start_step(const Tensor& loss) {
  Backend& backend = parameters_.backend();
  const Tensor clipped =
      quantizer_ != nullptr && !quantizer_->adapts() ? quantizer_->weights().clipped : Tensor();
  const Tensor gradients = parameters_.moved(parameters_.grads());
  const int64_t sharded = parameters_.sharded_elements();
  if (sharded == 0) return backend.step_control(control_, loss, gradients, clipped, schedule_);
  // The first rank also counts what all have alike. A norm of norms is that of all elements.
  engine::Comm& comm = *parameters_.comm();
  const int64_t own = comm.first() ? gradients.numel() : sharded;
  backend.step_control(own_control_, loss, gradients.slice(0, own),
                       clipped.defined() ? clipped.slice(0, own / 8) : clipped, schedule_);
  const Tensor norms = norms_.slice(0, comm.size());
  backend.copy(comm.part_of(norms), own_control_.slice(engine::kGradNorm, 1));
  comm.start_all_gather(norms);
  comm.join();
  backend.step_control(control_, loss, norms_, Tensor(), schedule_);
}

void Optimizer::step(const Tensor& loss) {
  Backend& backend = parameters_.backend();
  start_step(loss);
  // With adapters, no step moves a weight, and their gradients leave clipped ones out already.
  const bool epilogue = quantizer_ != nullptr && !quantizer_->adapts();
  muon_.replace_gradients(control_, epilogue ? quantizer_->weights().clipped : Tensor());
  for (size_t i = 0; i < parameters_.sections().size(); ++i) {
    const auto& [begin, count, table, sharded] = parameters_.sections()[i];
    backend.adamw(parameters_.masters().slice(begin, count),
                  parameters_.moment_slice(parameters_.m(), begin, count),
                  parameters_.moment_slice(parameters_.v(), begin, count),
                  parameters_.grads().slice(begin, count), control_, table,
                  epilogue ? quantizer_->weights_of(i) : engine::QuantizedWeights(), spec_);
  }
}

}  // namespace bbb::autograd
