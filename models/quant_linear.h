// QuantLinear: y = x W^T (+ residual) (+ bias), x the operand (..., K') of a site, the bias frozen,
// W (N, K') in its stored positions (quant/format.h), which holds one of
//
//   FloatWeight    an act weight, no gradient: the teacher, a full-precision model, or a weight
//                  that a method without gradients rounds
//   TrainedWeight  a master, or a frozen one with low-rank adapters, behind the quantizer; at
//                  kNoQuantizer bits the master itself
//   LearnedGrid    a master behind a grid whose scales, and perhaps zero points, train with it, or
//                  the ratios of its ranges
//   TrainedLc      latents behind LC (quant/lc.h); W is made of them once a step
//   FrozenCodes    frozen codes and zero points with learned group scales sigma
//   PackedLinear   the stored weight as Backend::repack made it; where a backend's kernels do not
//                  take many rows, one buffer, shared by all layers, holds an unpacked weight
//
// One optimizer step:
//
//                  prepare              passes, 1 or more         finish_backward()
//   TrainedWeight  WeightQuantizer      dW^ is parameter->grad    dW^ -> the gradients of adapters,
//                                                                 if they train
//   LearnedGrid    prepare_scales()     dW^ is parameter->grad    dW^ -> the gradients of all three
//   TrainedLc      WeightQuantizer      dW is parameter->grad     dW -> gradients of latents, v,
//                                                                 and (LcSite) of u and the map
//   FrozenCodes    prepare_scales()     dW^ is a scratch          dW^ -> sigma's gradient
//
// The optimizer drops the gradients of clipped weights. finish_backward() zeroes a gradient that no
// pass wrote. All buffers are allocated once, so that a recorded step keeps its addresses.
//
// A TrainedWeight may be a sharded parameter. Then parameter->grad holds dW^ of one pass, until
// on_gradient() has taken it, and finish_backward() does nothing. set_master(), master() and snap()
// are called on every rank, with the whole weight.
#pragma once

#include <functional>
#include <string>
#include <variant>
#include <vector>

#include "autograd/ops.h"
#include "autograd/weight_quantizer.h"
#include "engine/rng.h"
#include "models/layer_result.h"
#include "models/operand.h"

namespace bbb::models {

using autograd::Parameter;
using autograd::ParameterSet;
using autograd::Tape;
using autograd::Var;
using autograd::WeightQuantizer;
using engine::Backend;
using engine::PackedWeight;
using engine::Rounding;
using engine::Tensor;
using engine::WeightGrid;
using engine::Write;
using quant::kNoQuantizer;

// Host values to a tensor of a floating-point dtype (round to nearest even), and back. A backend
// that does not compute (Backend::computes) does not read the values.
Tensor upload_as(Backend& backend, const std::vector<float>& values, engine::Shape shape,
                 engine::DType dtype);
void upload_into(Backend& backend, const Tensor& dst, const std::vector<float>& values);
std::vector<float> download_floats(Backend& backend, const Tensor& tensor);
// Host integers, such as token ids, to an I32 tensor.
Tensor upload_ints(Backend& backend, const std::vector<int32_t>& values, engine::Shape shape);

struct FloatWeight {};
struct TrainedWeight {
  WeightQuantizer* quantizer;
  Parameter* master;
  autograd::Adapters adapters = {};  // a is null: none
};
// What trains with the masters of a learned grid.
enum class LearnedParts { Scales, ScalesZeros, Ratios };
struct LearnedGrid {
  Parameter* master;           // (N, K')
  Parameter* sigma = nullptr;  // (N, K'/G); null: ratios train
  Parameter* zeta = nullptr;   // (N, K'/G); null: zero points stay as they start
  Parameter* ratio = nullptr;  // (N, K'/G), without sigma and zeta
};
// What the linears of a site behind LC share, and the sums of its gradients over them.
struct LcSite {
  Parameter *u, *map;
  bool learns_map;
  Tensor du, dmap;                // real (K), (4, 5)
  Write mode = Write::Overwrite;  // of the next linear's part

  // After those of its linears.
  void finish_backward(Backend& backend);
};
struct TrainedLc {
  Parameter *latent, *v;
  LcSite* site;
  engine::LcWeight from;
};
struct FrozenCodes {
  Parameter* sigma;  // (N, K'/G)
  Tensor codes;      // U8 (N, K')
};
struct PackedLinear {
  PackedWeight weight;
  Tensor buffer;                    // act
  Tensor u = {}, v = {}, map = {};  // of LC: real (K), (N), (4, 5)
};

class QuantLinear {
 public:
  QuantLinear(Backend& backend, std::string name, int64_t n, int64_t k);

  // Gives the linear a frozen bias (N), whichever state it is in or enters later.
  void set_bias(const std::vector<float>& bias);
  void set_float(Tensor weight);  // act (N, K); its operand is the input
  // The same in the stored positions of a format, act (N, K').
  void set_float(Tensor weight, const quant::LinearFormat& format);
  // `master` (N, K') is a parameter of the quantizer's set. Both must outlive this state.
  void set_trained(WeightQuantizer& quantizer, Parameter& master,
                   const quant::LinearFormat& format);
  // Gives a TrainedWeight adapters (N, R) and (R, K'), parameters of the same set.
  void set_adapters(Parameter& a, Parameter& b, double alpha);
  // Adapters start: A = 0, B normal with variance 1 / K'. So W starts as the master.
  void start_adapters(engine::Rng& rng);
  void discard_adapters();  // A = 0: the next prepare() makes W the frozen master again
  // The same for a learned grid (Backend::learned_quant, ratio_quant) of fewer than 16 bits.
  void set_learned(const LearnedGrid& parameters, const quant::LinearFormat& format);
  // The same behind LC: latents (N, K) and v (N). `site` must outlive this state, too.
  void set_trained_lc(WeightQuantizer& quantizer, Parameter& latent, Parameter& v, LcSite& site,
                      const quant::LinearFormat& format);
  // TrainedWeight, LearnedGrid, TrainedLc or FrozenCodes: another format with the same stored
  // positions. The width of a TrainedWeight takes effect at the next quantize() or prepare(), in
  // recorded steps too.
  void set_format(const quant::LinearFormat& format);
  // TrainedWeight: forward() multiplies by the weight at the quantizer's lower precision `i - 1`,
  // or at its own for 0. The gradients of all precisions add up; a step's first one is 0.
  void select_precision(size_t i) { precision_ = i; }
  // TrainedWeight: the master and the range ratios of a result of this format, and back. Adapters
  // are of that master then, and A becomes 0; the other way they are merged into it.
  // LearnedGrid: its master and, as the start of scales and zero points, the grid of rounding to
  // nearest with its ratios; or the levels and the grid of a quantized result. Learned ratios start
  // as those of the result, or as 1; of a result without a master the weight is held as it is.
  // TrainedLc: the latents, v, and of the site u and the map.
  void set_master(const LinearResult& result);
  LinearResult master() const;
  // Freezes the codes of a quantized result; sigma (N, K'/G) starts as its scales.
  void freeze_codes(const LinearResult& result, Parameter& sigma);
  // `buffer`: act, at least buffer_elements(), shared by all layers; holds the unpacked weight for
  // products of more rows than the backend takes.
  static int64_t buffer_elements(const Backend& backend, const quant::LinearFormat& format);
  void set_packed(PackedWeight weight, Tensor buffer);
  // The same from the content of the format's tensors. Of LC too.
  void set_stored(const quant::LinearFormat& format,
                  const std::function<const void*(const quant::StoredTensor&)>& bytes,
                  Tensor buffer);
  const PackedLinear& packed() const { return get<PackedLinear>(); }

  void prepare_scales();  // LearnedGrid and FrozenCodes
  // ds (+)= the gradient of a scale s, real (K), on the input features (Backend's op of that name),
  // from the dW^ since the last finish_backward(). If no pass wrote dW^, returns false and leaves
  // ds unchanged.
  bool input_scale_gradient(const Tensor& ds, const Tensor& s, Write mode) const;
  void finish_backward();
  // Moves masters to the middle of their bins, S e (q - z), as far as the grid stays: quantized
  // again, they give the same S, e, z and codes. TrainedWeight or TrainedLc, after prepare().
  void snap();
  Var forward(Tape& tape, const LinearInput& x, const Var& residual);
  // The outputs of all linears of a site. Few rows of packed weights are one op.
  static std::vector<Var> forward(Tape& tape, const std::vector<QuantLinear*>& site,
                                  const LinearInput& x);
  // The quantized weight, as it is stored. TrainedWeight (fewer than 16 bits), LearnedGrid,
  // TrainedLc or FrozenCodes, after prepare() or prepare_scales() and before the next optimizer
  // step.
  LinearResult quantized() const;

  template <typename State>
  bool holds() const {
    return std::holds_alternative<State>(state_);
  }
  const std::string& name() const { return name_; }
  int64_t n() const { return n_; }
  int64_t k() const { return k_; }
  const quant::LinearFormat& format() const { return format_; }
  Parameter* parameter() const;  // master, latent or sigma; null if nothing is trained

 private:
  template <typename State>
  const State& get() const {
    BBB_ASSERT(holds<State>());
    return std::get<State>(state_);
  }
  // S, on the device even if it is 1, so that recorded steps see a change of width. Undefined if
  // nothing is trained, and of LC, whose S is 1.
  Tensor multiplier() const { return parameter() != nullptr ? quantized_.s : Tensor(); }
  bool multiplies_codes(const LinearInput& x) const;  // a packed weight, straight
  static std::vector<Var> forward_packed(Tape& tape, const std::vector<QuantLinear*>& site,
                                         const LinearInput& x, const Var& residual);
  static std::vector<Var> forward_lc(Tape& tape, const std::vector<QuantLinear*>& site,
                                     const LinearInput& x, const Var& residual);
  bool packed_lc() const { return holds<PackedLinear>() && format_.is_lc(); }
  int64_t columns() const { return format_.stored_k(); }  // K'
  WeightGrid code_grid() const {                          // of all bits of a code
    return {.bits = format_.code_bits(),
            .group = format_.weight.group,
            .levels = format_.weight.levels};
  }
  void set_part(const LinearResult& result);  // set_master() of a sharded parameter
  Tensor current_codes() const;               // U8 (N, K')
  bool sharded() const { return holds<TrainedWeight>() && parameter()->sharded; }
  const ParameterSet& set() const { return get<TrainedWeight>().quantizer->parameters(); }
  void own_buffers(const quant::LinearFormat& format);  // quantized_, of this linear alone
  std::vector<float> bias() const;                      // empty: none
  void fresh_leaf();  // leaf_ becomes a Var without a written gradient

  Backend& backend_;
  std::string name_;
  int64_t n_, k_;
  std::variant<FloatWeight, TrainedWeight, LearnedGrid, TrainedLc, FrozenCodes, PackedLinear>
      state_;
  quant::LinearFormat format_;
  autograd::QuantizedParameter quantized_;  // FloatWeight: wq is W; PackedLinear: s alone
  Tensor bias_;                             // real (N); undefined: none
  Tensor bias_rows_;  // act (kMaxPackedRows, N): it in every row, an addend of packed products
  Tensor dweight_;    // dW^: the parameter's gradient (TrainedWeight) or a scratch (FrozenCodes)
  Var leaf_;          // wq and dweight_, shared by all uses since finish_backward()
  std::vector<Var> nested_leaves_;  // the same for the lower precisions
  size_t precision_ = 0;
  bool holds_codes_ = false;  // LearnedGrid: the weight is a result's, not made of the master
};

}  // namespace bbb::models
