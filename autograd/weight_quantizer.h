// WeightQuantizer: quantizes the weights of a ParameterSet, all at once.
//
//   masters --prepare()--> maximum group range, S --> wq, e, z, clipped bits
//           --quantize()-> the same, if only the optimizer has written masters since
//
// S of a weight follows from its maximum group range. After any other write to the masters call
// prepare(), which measures the ranges and quantizes. The optimizer's epilogue keeps the ranges up
// to date, so that a training step starts with quantize(). On a GPU the epilogue also prequantizes
// with the last S, and quantize() reads only masters whose S has changed.
//
// Of a sharded parameter each rank quantizes its part, with the S of all parts, and gathers wq.
#pragma once

#include "autograd/parameter.h"

namespace bbb::autograd {

// One quantized parameter (N, K), views of the quantizer's buffers: W^ = S wq.
struct QuantizedParameter {
  Tensor wq;                   // act (N, K)
  Tensor e, z;                 // U8 (N, K/G); if sharded, flat: this rank's part
  Tensor s;                    // real (1)
  Tensor ratios;               // U8, likewise, if ranges are searched
  std::vector<Tensor> nested;  // act (N, K): wq at each of the quantizer's lower precisions
};

// One parameter behind LC.
struct LcParameter {
  Tensor w;  // act (N, K), a view of the quantizer's buffer
  engine::LcWeight from;
};

// Nested codes of 8 bits that train at fewer bits, too (numerics.md section 4).
struct NestedPrecisions {
  std::vector<int> bits;  // below 8
  quant::NestedDequant dequant = quant::NestedDequant::Middle;
};

// How latents behind LC train (quant/lc.h).
struct LcTraining {
  quant::LcGradient gradient = quant::LcGradient::Dge;
  bool learns_map = false;
  double scale_rate = 0.1;  // the learning rate of u, v and the map, as a part of the latents'
};

// How weights get adapters: W = base + alpha A B.
struct LoraTraining {
  int64_t rank = 0;  // 0: none
  double alpha = 1;
  // Whether the weights train in other stages; fixed ones need no moments.
  enum class Masters { Train, Fixed } masters = Masters::Train;
};

// Low-rank adapters of a parameter (N, K): in stages that adapt, W = base + alpha A B, and A and B
// train in W's place.
struct Adapters {
  Parameter* a = nullptr;  // (N, R)
  Parameter* b = nullptr;  // (R, K)
  Tensor base;             // real (N, K)
  double alpha = 1;
};

class WeightQuantizer {
 public:
  // `parameters` must be allocated and must outlive the quantizer. With RangeRule::Search every
  // group has a ratio, 1 at the start, which the owner of the masters sets.
  WeightQuantizer(ParameterSet& parameters, int group,
                  quant::RangeRule range = quant::RangeRule::MinMax,
                  engine::Rounding rounding = engine::Rounding::Nearest,
                  NestedPrecisions nested = {}, LcTraining lc = {}, quant::WeightRule rule = {});

  // Puts a parameter (N, K) behind the quantizer; prepare() then fills the returned tensors. bits
  // may be kNoQuantizer. Throws if the group does not divide K.
  QuantizedParameter add(const Parameter& parameter, int bits);
  // Puts latents (N, K) behind LC instead, with u (K), v (N) and map (4, 5): prepare() and
  // quantize() then write the weight of the returned parts, W itself.
  LcParameter add_lc(const Parameter& latent, const Parameter& u, const Parameter& v,
                     const Parameter& map);
  // Gives adapters to a parameter of add(). While adapt(true) holds, prepare() and quantize() first
  // write W over its master, and finish_backward() turns its gradient into theirs.
  Adapters add_adapters(Parameter& parameter, Parameter& a, Parameter& b, double alpha);
  // Whether adapters train, or the masters themselves: at the start. A recorded step keeps what
  // held at its recording.
  void adapt(bool adapters);
  bool adapts() const { return adapts_; }
  // dW^ in the parameter's gradient -> the gradients of its adapters; its own becomes 0.
  void finish_backward(const Parameter& parameter, const Adapters& adapters) const;
  // Takes effect at the next quantize() or prepare(), in recorded steps too.
  void set_bits(const Parameter& parameter, int bits);
  void prepare();
  void quantize();
  // Call it between quantize() and the first use of wq of sharded parameters.
  void join() const;

  int group() const { return weights_.group; }
  const ParameterSet& parameters() const { return parameters_; }
  // Of all parameters; if they are sharded, without wq.
  const engine::QuantizedWeights& weights() const { return weights_; }
  // Of section i of the set; its wq is undefined if the section has no quantized parameter.
  const engine::QuantizedWeights& weights_of(size_t i) const { return sections_[i]; }

 private:
  void fake_quant();
  void make_sections();
  // Calls visit(i, section) for the sections with quantized parameters.
  void visit_sections(
      const std::function<void(size_t i, const ParameterSet::Section& section)>& visit) const;
  Tensor masters_of(const ParameterSet::Section& section) const;
  engine::Comm& comm() const { return *parameters_.comm(); }
  bool sharded() const { return parameters_.sharded_elements() > 0; }

  ParameterSet& parameters_;
  engine::QuantizedWeights weights_;
  std::vector<engine::QuantizedWeights> sections_;
  std::vector<Tensor> parts_;                      // act: all parts of wq of each sharded parameter
  std::vector<std::vector<Tensor>> nested_parts_;  // the same of nested_wq_
  const NestedPrecisions nested_;
  const LcTraining lc_;
  std::vector<LcParameter> lc_weights_;
  struct Adapted {
    Parameter* parameter;
    Adapters adapters;
  };
  std::vector<Adapted> adapted_;
  bool adapts_ = false;
  std::vector<Tensor> nested_wq_;  // act (P), for each of nested_.bits
};

}  // namespace bbb::autograd
