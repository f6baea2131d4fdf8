// Muon: the step of a matrix is its momentum with all singular values near 1 (Jordan et al., "Muon:
// an optimizer for hidden layers in neural networks", 2024).
//
//   X  momentum G + decay momentum, Frobenius norm 1           Backend::muon_momentum
//   5 x  X = a X + (b A + c A^2) X,  A = X X^T                  Newton-Schulz, in act
//   w -= lr (0.2 sqrt(max(N, K)) X + decay w)                  Backend::adamw, a direct rule
//
// The polynomial raises singular values quickly and leaves them between 0.7 and 1.2. For N > K, A
// is X^T X and multiplies from the right. The last factor gives a step the size of AdamW's, so that
// rates carry over (Liu et al., "Muon is scalable for LLM training", 2025).
//
// The products of this library add what they make to a matrix, but do not scale that matrix. So the
// iterations keep Z = X / a^i:  Z += b a^(2i - 1) B Z,  B = A + (c / b) a^(2i) A^2,  A = Z Z^T. The
// rule's rate holds the a^5 that is left.
#pragma once

#include "autograd/parameter.h"

namespace bbb::autograd {

enum class UpdateRule { AdamW, Muon };
// Of a matrix (N, K), for ParameterSet::add().
quant::SlotRule<double> slot_rule(UpdateRule rule, const Shape& shape);

class Muon {
 public:
  // Takes the parameters whose rule is direct; there may be none. `parameters` must be allocated
  // and must outlive this.
  explicit Muon(ParameterSet& parameters);
  // Updates the momenta, in m, and writes the steps over the gradients. Recorded. `control` as
  // step_control wrote it; `clipped`: of the set's quantizer, or undefined.
  void replace_gradients(const Tensor& control, const Tensor& clipped) const;

 private:
  void make_orthogonal(const Tensor& z) const;

  ParameterSet& parameters_;
  std::vector<Tensor> square_factors_, step_factors_;  // real (1), one an iteration
};

}  // namespace bbb::autograd
