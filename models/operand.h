// Operand: the input that the linears of one site of a block share:
//
//   q, k, v  <- RMSNorm      o <- attention      gate, up <- RMSNorm      down <- SwiGLU
//
// This operand is the site's input, unchanged. It includes the RMSNorm or SwiGLU in front, so that
// whatever an operand does to its input can be fused with them.
#pragma once

#include "autograd/ops.h"

namespace bbb::models {

class Operand {
 public:
  using Tape = autograd::Tape;
  using Var = autograd::Var;

  // x (..., K), w real (K).
  Var rms_norm(Tape& tape, const Var& x, const Var& w, double eps) const {
    return autograd::rms_norm(tape, x, w, eps);
  }
  // gate, up (..., K).
  Var swiglu(Tape& tape, const Var& gate, const Var& up) const {
    return autograd::swiglu(tape, gate, up);
  }
  Var identity(const Var& x) const { return x; }

  // Is the operand the unchanged input? Only then is the weight of a norm in front a scale on the
  // input features (Backend::input_scale_gradient).
  bool exact() const { return true; }
};

}  // namespace bbb::models
