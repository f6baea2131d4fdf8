// Parameters and the optimizer over them.
//
// A ParameterSet lays masters, gradients and both moments of all its parameters in four flat
// buffers, and what the quantizer makes of those that stand behind it beside them, so that
// quantizing, the norm and AdamW are one pass each, whatever the model's shape.
//
// S of a weight comes from the range of its widest group. Whoever writes masters calls prepare(),
// which measures the ranges and quantizes; AdamW alone keeps them up to date by itself, so that a
// training step can start with quantize(). On a GPU it quantizes too, by the S that it finds, and
// quantize() reads masters only where S has changed.
#pragma once

#include <memory>
#include <span>
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
  // Same shape, dtype by the set's GradientPasses; of a quantized parameter dL/dW^, before the
  // clipped ones go.
  Tensor grad;
  int64_t slot = 0;  // its number in the set
};

// What the quantizer makes of one parameter (N, K): W^ = S wq.
struct QuantizedParameter {
  Tensor wq;    // act (N, K)
  Tensor e, z;  // U8 (N, K/G)
  Tensor s;     // real (1)
};

// The backward passes that make the gradients of one optimizer step. One writes them as act: a
// rounding of a sum of products of act, half the bytes. Several are added to each other, where act
// would lose the digits of the smaller one: real.
enum class GradientPasses { One, Several };

class ParameterSet {
 public:
  ParameterSet(Backend& backend, GradientPasses passes) : backend_(backend), passes_(passes) {}

  // Declare every parameter, then allocate() once. The reference stays valid.
  Parameter& add(std::string name, Shape shape);
  void allocate();

  // Puts a parameter (N, K) of this set behind the quantizer, after allocate(); prepare() then
  // fills what this returns. All of a set share group and rounding; bits may be kNoQuantizer.
  QuantizedParameter add_quantizer(const Parameter& parameter, engine::WeightGrid spec,
                                   engine::Rounding rounding);
  void set_bits(const Parameter& parameter, int bits);  // from the next quantize() or prepare() on
  // Quantizes masters that anything may have written.
  void prepare();
  // The same where nothing but AdamW has written them since prepare(): the start of a step.
  void quantize();

  Backend& backend() const { return backend_; }
  std::vector<std::unique_ptr<Parameter>>& parameters() { return parameters_; }
  const Tensor& masters() const { return masters_; }  // flat, each parameter padded to kTileAlign
  const Tensor& grads() const { return grads_; }
  // Act: about ten steps' mean, which each moves by a tenth, so that it never stands still, and
  // what rounding takes from it is less than a gradient's own noise.
  const Tensor& m() const { return m_; }
  const Tensor& v() const { return v_; }  // real: a step moves it by less than act's half ulp
  const engine::FakeQuantWeights& quantized() const { return quantized_; }
  void reset_moments();

 private:
  std::span<quant::WeightTile> tiles_of(const Parameter& parameter);

  Backend& backend_;
  GradientPasses passes_;
  std::vector<std::unique_ptr<Parameter>> parameters_;
  std::vector<Shape> shapes_;
  Tensor masters_, grads_, m_, v_;
  std::vector<quant::WeightTile> tiles_;
  engine::FakeQuantWeights quantized_;
};

// One optimizer step, all on the device: gradient norm, schedule, clip, guard, AdamW. Gradients of
// weights that the last quantize() clipped count as 0.
class AdamW {
 public:
  AdamW(ParameterSet& parameters, engine::AdamWSpec spec, engine::Schedule schedule);
  void restart();  // zero moments, step 0; the schedule stays, for recorded steps hold a copy of it
  void step(const Tensor& loss);                      // loss real (1), for the guard and the log
  const Tensor& control() const { return control_; }  // engine::ControlSlot

 private:
  ParameterSet& parameters_;
  const engine::AdamWSpec spec_;
  const engine::Schedule schedule_;
  Tensor control_;
};

}  // namespace bbb::autograd
