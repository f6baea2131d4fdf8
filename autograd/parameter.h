// Parameters and the optimizer over them.
//
// A ParameterSet lays masters, gradients and both moments of all its parameters in four flat
// buffers, so that the norm, AdamW and zeroing are one pass each, whatever the model's shape.
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
  Tensor grad;    // real, same shape
};

class ParameterSet {
 public:
  explicit ParameterSet(Backend& backend) : backend_(backend) {}

  // Declare every parameter, then allocate() once. The reference stays valid.
  Parameter& add(std::string name, Shape shape);
  void allocate();

  Backend& backend() const { return backend_; }
  std::vector<std::unique_ptr<Parameter>>& parameters() { return parameters_; }
  const Tensor& masters() const { return masters_; }  // flat, each parameter padded to 64 elements
  const Tensor& grads() const { return grads_; }
  const Tensor& m() const { return m_; }
  const Tensor& v() const { return v_; }
  void reset_moments();

 private:
  Backend& backend_;
  std::vector<std::unique_ptr<Parameter>> parameters_;
  std::vector<Shape> shapes_;
  Tensor masters_, grads_, m_, v_;
};

// One optimizer step, all on the device: gradient norm, schedule, clip, guard, AdamW.
class AdamW {
 public:
  AdamW(ParameterSet& parameters, engine::AdamWSpec spec, engine::Schedule schedule);
  void restart(engine::Schedule schedule);            // zero moments, step 0
  void step(const Tensor& loss);                      // loss real (1), for the guard and the log
  const Tensor& control() const { return control_; }  // engine::ControlSlot

 private:
  ParameterSet& parameters_;
  engine::AdamWSpec spec_;
  engine::Schedule schedule_;
  Tensor control_;
  Tensor norm_squared_;
};

}  // namespace bbb::autograd
