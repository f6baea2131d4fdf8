// AdamW over a ParameterSet: two passes over flat buffers, nothing waits for the host.
#include "autograd/parameter.h"

namespace bbb::autograd {

AdamW::AdamW(ParameterSet& parameters, engine::AdamWSpec spec, engine::Schedule schedule)
    : parameters_(parameters),
      spec_(spec),
      schedule_(schedule),
      control_(parameters.backend().zeros({engine::kControlSize}, parameters.backend().real())) {}

void AdamW::restart() {
  parameters_.reset_moments();
  parameters_.backend().zero(control_);
}

void AdamW::step(const Tensor& loss) {
  Backend& backend = parameters_.backend();
  const engine::FakeQuantWeights& quantized = parameters_.quantized();
  backend.step_control(control_, loss, parameters_.grads(), quantized.clipped, schedule_);
  backend.adamw(parameters_.masters(), parameters_.m(), parameters_.v(), parameters_.grads(),
                control_, quantized, spec_);
}

}  // namespace bbb::autograd
