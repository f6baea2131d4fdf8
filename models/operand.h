// Operand: what an input site of a block hands to its linears, which share it:
//
//   q, k, v  <- RMSNorm      o <- attention      gate, up <- RMSNorm      down <- SwiGLU
//
// Here it is the site's input itself. The norm or SwiGLU in front is part of it, so that whatever
// an operand does to its input is fused with them.
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

  // The operand is still x. Only then is the gradient of a norm in front that of a scale on the
  // input features (Backend::input_scale_gradient).
  bool exact() const { return true; }
};

}  // namespace bbb::models
