// Optimizer: AdamW steps over a ParameterSet, all on the device: gradient norm, schedule, clipping,
// a skip where the loss or the norm is not finite, update. Matrices of UpdateRule::Muon take its
// steps. Of sharded parameters each rank updates its part; the norm is that of all parts.
#pragma once

#include "autograd/muon.h"
#include "autograd/weight_quantizer.h"

namespace bbb::autograd {

class Optimizer {
 public:
  // `quantizer`: the quantizer of this set, or null. A weight that its last quantize() clipped has
  // gradient 0. The step ends in the quantizer's epilogue: maximum ranges of the new masters, and
  // perhaps prequantized weights (Backend::adamw). All must outlive the optimizer.
  Optimizer(ParameterSet& parameters, const WeightQuantizer* quantizer, engine::AdamWSpec spec,
            engine::Schedule schedule);
  // Moments and step become 0. The schedule stays: recorded steps hold a copy of it.
  void restart();
  void step(const Tensor& loss);                      // real (1), for the skip and the log
  const Tensor& control() const { return control_; }  // engine::ControlSlot

 private:
  void start_step(const Tensor& loss);  // writes control_

  ParameterSet& parameters_;
  const WeightQuantizer* quantizer_;
  const engine::AdamWSpec spec_;
  const engine::Schedule schedule_;
  Tensor control_;
  Tensor own_control_;  // of sharded parameters: with the norm of this rank's gradients
  Tensor norms_;        // the same of every rank, then zeros
  Muon muon_;
};

}  // namespace bbb::autograd
