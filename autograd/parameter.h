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
  // No step moves it. If set before allocate(), it has no moments; if later, they and its gradient
  // are 0.
  bool frozen = false;
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
  // Flat, each parameter padded to kTileAlign; those without moments are the last ones.
  const Tensor& masters() const { return masters_; }
  const Tensor& grads() const { return grads_; }
  // What a step moves: the first elements of masters and gradients, as many as there are moments,
  // and their tiles.
  Tensor moved(const Tensor& flat) const { return flat.slice(0, v_.numel()); }
  engine::ParameterTable moved_table() const;
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
  int64_t moved_tiles_ = 0;
  engine::ParameterTable table_;
};

}  // namespace bbb::autograd
