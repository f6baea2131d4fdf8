// WeightQuantizer: quantizes the weights of a ParameterSet, all at once.
//
//   masters --prepare()--> maximum group range, S --> wq, e, z, clipped bits
//           --quantize()-> the same, if only the optimizer has written masters since
//
// S of a weight follows from its maximum group range. After any other write to the masters call
// prepare(), which measures the ranges and quantizes. The optimizer's epilogue keeps the ranges up
// to date, so that a training step starts with quantize(). On a GPU the epilogue also prequantizes
// with the last S, and quantize() reads only masters whose S has changed.
#pragma once

#include "autograd/parameter.h"

namespace bbb::autograd {

// One quantized parameter (N, K), views of the quantizer's buffers: W^ = S wq.
struct QuantizedParameter {
  Tensor wq;                   // act (N, K)
  Tensor e, z;                 // U8 (N, K/G)
  Tensor s;                    // real (1)
  Tensor ratios;               // U8 (N, K/G), if ranges are searched
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
  // Takes effect at the next quantize() or prepare(), in recorded steps too.
  void set_bits(const Parameter& parameter, int bits);
  void prepare();
  void quantize();

  int group() const { return weights_.group; }
  const engine::QuantizedWeights& weights() const { return weights_; }

 private:
  ParameterSet& parameters_;
  engine::QuantizedWeights weights_;
  const NestedPrecisions nested_;
  const LcTraining lc_;
  std::vector<LcParameter> lc_weights_;
  std::vector<Tensor> nested_wq_;  // act (P), for each of nested_.bits
};

}  // namespace bbb::autograd
