// Operand: the input that the linears of one site of a block share:
//
//   q, k, v  <- RMSNorm      o <- attention      gate, up <- RMSNorm      down <- SwiGLU
//
// Gathered by the linears' channel order, rotated and quantized, fused with the RMSNorm or SwiGLU
// in front. Where the format asks for none of that, the operand is the input itself. Packed linears
// of LC take A^T H (u o x) (quant/lc.h).
#pragma once

#include <optional>

#include "autograd/ops.h"

namespace bbb::models {

// What a site's linears multiply: x (..., K'). For few rows of packed weights: what the product
// makes it from.
struct LinearInput {
  autograd::Var x;
  engine::Shape shape;           // of what is multiplied, (..., K')
  engine::Tensor constant = {};  // of packed LC: real (rows), which every sum of a row lacks
  // The rows are x, or rms_norm(x, norm, eps) or swiglu(x, up) if `norm` or `up` is defined. With
  // `operand`, the site's, their operand is multiplied.
  autograd::Var norm = {}, up = {};
  double eps = 0;
  const engine::OperandSpec* operand = nullptr;

  // What is multiplied, as a tensor.
  autograd::Var whole(autograd::Tape& tape) const;
};

class Operand {
 public:
  using Tape = autograd::Tape;
  using Var = autograd::Var;

  // `packed`: the site's linears are packed. All of them have this input side. As long as the
  // channel order stays, its device copy keeps its address, so that recorded steps stay valid.
  void set(engine::Backend& backend, const quant::LinearFormat& format, bool packed);

  // Of packed linears of LC: u real (K) and map real (4, 5) of the site.
  void set_lc(engine::Tensor u, engine::Tensor map);

  // x (..., K), w real (K).
  LinearInput rms_norm(Tape& tape, const Var& x, const Var& w, double eps) const;
  // gate, up (..., K).
  LinearInput swiglu(Tape& tape, const Var& gate, const Var& up) const;
  LinearInput plain(Tape& tape, const Var& x) const;

  // Is the operand the unchanged input? Only then is the weight of a norm in front a scale on the
  // input features (Backend::input_scale_gradient).
  bool exact() const { return !spec_ && !u_.defined(); }

 private:
  static LinearInput whole(Var x);
  // Rows of which the product makes what it multiplies: few, of packed weights, in inference.
  LinearInput unmade(Var x) const;
  bool product_makes(const Tape& tape, const engine::Tensor& x) const;
  LinearInput lc(Tape& tape, const Var& x) const;

  std::optional<engine::OperandSpec> spec_;   // none: exact
  std::optional<quant::ChannelOrder> order_;  // of spec_
  engine::Tensor u_, map_;                    // undefined: no LC
  bool packed_ = false;
};

}  // namespace bbb::models
