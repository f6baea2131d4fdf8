// The parameters that training changes: masters, gradients and both moments, each of all parameters
// in one flat buffer, so that quantizing, the norm and the optimizer are one pass each.
#pragma once

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
  // Same shape, dtype by the set's GradientPasses; of a quantized parameter dL/dW^, clipped
  // elements included.
  Tensor grad;
  int64_t slot = 0;  // its row in every table of the set
};

// The backward passes that make the gradients of one optimizer step. One writes them as act: a
// rounding of a sum of products of act, half the bytes. Several are added to each other as real:
// act would lose the digits of the smaller one.
enum class GradientPasses { One, Several };

class ParameterSet {
 public:
  ParameterSet(Backend& backend, GradientPasses passes) : backend_(backend), passes_(passes) {}

  // Declare every parameter, then allocate() once. The reference stays valid. The optimizer takes
  // lr_factor times its learning rate, and decays the parameter by `decay` times that rate a step.
  Parameter& add(std::string name, Shape shape, quant::SlotRule<double> rule = {});
  void allocate();

  Backend& backend() const { return backend_; }
  std::vector<std::unique_ptr<Parameter>>& parameters() { return parameters_; }
  const Tensor& masters() const { return masters_; }  // flat, each parameter padded to kTileAlign
  const Tensor& grads() const { return grads_; }
  // Act: a mean over about ten steps. Each step moves it by a tenth, so rounding cannot hold it
  // still, and the rounding error is below the noise of a gradient.
  const Tensor& m() const { return m_; }
  const Tensor& v() const { return v_; }  // real: a step moves it by less than half an ulp of act
  const engine::ParameterTable& table() const { return table_; }
  int64_t offset(const Parameter& parameter) const;  // of its first element in a flat buffer
  void reset_moments();

 private:
  Backend& backend_;
  GradientPasses passes_;
  std::vector<std::unique_ptr<Parameter>> parameters_;
  std::vector<Shape> shapes_;
  std::vector<quant::SlotRule<double>> rules_;
  std::vector<int64_t> offsets_;
  Tensor masters_, grads_, m_, v_;
  engine::ParameterTable table_;
};

}  // namespace bbb::autograd
