// Optimizer: one AdamW step over a ParameterSet, all on the device: gradient norm, schedule, clip,
// guard against numbers that are not finite, update.
#pragma once

#include "autograd/weight_quantizer.h"

namespace bbb::autograd {

class Optimizer {
 public:
  // `quantizer`: the one behind which parameters are, or null. Gradients of weights that its last
  // quantize() clipped count as 0, and the step ends in its epilogue: ranges of the new masters,
  // and weights prequantized. All must outlive the optimizer.
  Optimizer(ParameterSet& parameters, const WeightQuantizer* quantizer, engine::AdamWSpec spec,
            engine::Schedule schedule);
  // Zero moments, step 0. The schedule stays: recorded steps hold a copy of it.
  void restart();
  void step(const Tensor& loss);                      // real (1), for the guard and the log
  const Tensor& control() const { return control_; }  // engine::ControlSlot

 private:
  ParameterSet& parameters_;
  const WeightQuantizer* quantizer_;
  const engine::AdamWSpec spec_;
  const engine::Schedule schedule_;
  Tensor control_;
};

}  // namespace bbb::autograd
