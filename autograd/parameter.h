// The parameters that training changes. Masters, gradients and both moments are one flat buffer
// each, over all parameters, so that quantizing, gradient norm and optimizer are one pass each.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "engine/backend.h"

namespace bbb::autograd {

using engine::Backend;
using engine::Shape;
using engine::Tensor;

struct Parameter {
  std::string name;
  Tensor master;  // real
  // master's shape, dtype by the set's GradientPasses. Of a quantized parameter: dL/dW^, clipped
  // elements included.
  Tensor grad;
  int64_t slot = 0;  // its row in every table of the set
  quant::SlotRule<double> rule = {};
  // If set, called in every backward pass as soon as it has added to `grad` what it adds there.
  // Only of weights whose products write `grad`.
  std::function<void()> on_gradient = nullptr;
};

// The backward passes of one optimizer step. One: gradients are act, half the bytes and rounded
// once. Several: gradients are added as real; act would lose the digits of the smaller summand.
enum class GradientPasses { One, Several };

class ParameterSet {
 public:
  ParameterSet(Backend& backend, GradientPasses passes) : backend_(backend), passes_(passes) {}

  // Declare every parameter, then allocate() once. The reference stays valid. The optimizer uses
  // the rate lr = lr_factor times its own, and decays the parameter by lr * decay per step.
  Parameter& add(std::string name, Shape shape, quant::SlotRule<double> rule = {});
  void allocate();

  Backend& backend() const { return backend_; }
  std::vector<std::unique_ptr<Parameter>>& parameters() { return parameters_; }
  const Tensor& masters() const { return masters_; }  // flat, each parameter padded to kTileAlign
  const Tensor& grads() const { return grads_; }
  // act: a mean over about ten steps. A step moves it by a tenth, so rounding cannot freeze it, and
  // the rounding error is below the noise of a gradient.
  const Tensor& m() const { return m_; }
  const Tensor& v() const { return v_; }  // real: a step changes less than half an ulp of act
  const engine::ParameterTable& table() const { return table_; }
  int64_t offset(const Parameter& parameter) const;  // of its first element in a flat buffer
  void reset_moments();

 private:
  Backend& backend_;
  GradientPasses passes_;
  std::vector<std::unique_ptr<Parameter>> parameters_;
  std::vector<Shape> shapes_;
  std::vector<int64_t> offsets_;
  Tensor masters_, grads_, m_, v_;
  engine::ParameterTable table_;
};

}  // namespace bbb::autograd
