// QuantLinear: y = x W^T (+ residual), W (N, K), in one explicit state.
//
//   Float      an act weight, no gradient: the teacher, or a full-precision model
//   FakeQuant  an FP32 master behind the quantizer; bits 16 means no quantizer
//   Scales     frozen codes and zero points behind learned group scales sigma
//   Packed     the exported bytes; never expanded beyond one shared layer buffer
//
// Training: once per optimizer step the parameter becomes wq, e, z, S: of all FakeQuant linears at
// once by ParameterSet::prepare() or quantize(), of one in Scales by prepare_scales(). Any number
// of forward and backward passes leave dW^ in the parameter's gradient (FakeQuant), where the
// optimizer drops what was clipped, or in a scratch (Scales). finish_backward() turns the scratch
// into the gradient of sigma, and zeroes a gradient where no pass used the parameter. All buffers
// are allocated once, so that a recorded step keeps its addresses.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "autograd/ops.h"
#include "autograd/parameter.h"
#include "models/layer_result.h"

namespace bbb::models {

using autograd::Parameter;
using autograd::ParameterSet;
using autograd::Tape;
using autograd::Var;
using engine::Backend;
using engine::PackedWeight;
using engine::Rounding;
using engine::Tensor;
using engine::WeightGrid;
using engine::Write;
using quant::kNoQuantizer;

enum class LinearState { Float, FakeQuant, Scales, Packed };

// Host values to a new tensor of a real dtype (round to nearest even), and back.
Tensor upload_as(Backend& backend, const std::vector<float>& values, engine::Shape shape,
                 engine::DType dtype);
void upload_into(Backend& backend, const Tensor& dst, const std::vector<float>& values);
std::vector<float> download_floats(Backend& backend, const Tensor& tensor);

class QuantLinear {
 public:
  QuantLinear(Backend& backend, std::string name, int64_t n, int64_t k);

  void set_float(Tensor weight);  // act (N, K)
  // `master` is a parameter of `set`, which must outlive this state.
  void set_fake_quant(ParameterSet& set, Parameter& master, WeightGrid spec,
                      Rounding rounding = Rounding::Nearest);
  // FakeQuant: another width, from the set's next quantize() or prepare() on; steps that are
  // recorded take it, too.
  void set_bits(int bits);
  // From the current FakeQuant codes and scales (after prepare()): sigma is the parameter, (N,
  // K/G), initialised here.
  void set_scales(Parameter& sigma);
  // `buffer`: act, at least N K elements, shared by all layers; used for products of many rows.
  void set_packed(PackedWeight weight, Tensor buffer);

  void prepare_scales();  // Scales only
  // ds (+)= the gradient of a scale s, real (K), on the input features, from what the backward
  // passes since the last finish_backward() left in dW^. False, and ds as it was, where none did.
  bool input_scale_gradient(const Tensor& ds, const Tensor& s, Write mode) const;
  void finish_backward();
  // Masters to the middle of their bins, S e (q - z), as far as that keeps their grid: quantized
  // again, they give the same S, e, z and codes. FakeQuant only, after prepare().
  void snap();
  Var forward(Tape& tape, const Var& x, const Var& residual);
  // What the quantizer holds, as it is stored. FakeQuant (fewer than 16 bits) or Scales, after
  // prepare() with no step in between.
  LinearResult quantized() const;

  LinearState state() const { return state_; }
  const std::string& name() const { return name_; }
  int64_t n() const { return n_; }
  int64_t k() const { return k_; }
  quant::LinearFormat format() const { return {.n = n_, .k = k_, .weight = spec_}; }
  Parameter* parameter() const { return parameter_; }

 private:
  bool quantizes() const { return state_ == LinearState::Scales || spec_.bits < kNoQuantizer; }
  // Of a parameter on the device even where it is 1, so that recorded steps see a width change.
  Tensor multiplier() const { return parameter_ ? master_scale_ : Tensor(); }
  Var forward_packed(Tape& tape, const Var& x, const Var& residual);
  Tensor current_codes() const;  // U8 (N, K)
  void fresh_leaf();             // the weight's Var, whose gradient nothing has written yet

  Backend& backend_;
  std::string name_;
  int64_t n_, k_;
  LinearState state_ = LinearState::Float;
  WeightGrid spec_;
  ParameterSet* set_ = nullptr;  // FakeQuant
  Parameter* parameter_ = nullptr;
  Tensor weight_;  // act: the GEMM's operand (Float: W; else wq)
  Tensor master_scale_, e_, z_, codes_;
  Tensor dweight_;  // dW^: the parameter's gradient (FakeQuant) or a scratch (Scales)
  Var leaf_;        // weight_ and dweight_: one handle for all uses since finish_backward()
  PackedWeight packed_;
  Tensor buffer_;
};

}  // namespace bbb::models
