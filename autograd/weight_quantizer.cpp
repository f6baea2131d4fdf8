#include "autograd/weight_quantizer.h"

#include <utility>

namespace bbb::autograd {

using engine::DType;

WeightQuantizer::WeightQuantizer(ParameterSet& parameters, int group, quant::RangeRule range,
                                 engine::Rounding rounding, NestedPrecisions nested, LcTraining lc,
                                 quant::WeightRule rule)
    : parameters_(parameters), nested_(std::move(nested)), lc_(lc) {
  BBB_ASSERT(parameters.masters().defined());
  Backend& backend = parameters.backend();
  const int64_t total = parameters.masters().numel();
  const int64_t slots = static_cast<int64_t>(parameters.parameters().size());
  weights_ = {.tiles = parameters.table().tiles,
              .bits = backend.zeros({slots}, DType::I32),  // kNotQuantized
              .max_range = backend.zeros({slots}, backend.real()),
              .s = backend.zeros({slots}, backend.real()),
              .prequantized = backend.zeros({slots}, backend.real()),
              .clipped = backend.zeros({total / 8}, DType::U8),
              .wq = backend.empty({total}, backend.act()),
              .e = backend.empty({total / group}, DType::U8),
              .z = backend.empty({total / group}, DType::U8),
              .ratios = range == quant::RangeRule::Search
                            ? backend.zeros({total / group}, DType::U8)
                            : Tensor(),
              .rule = rule,
              .group = group,
              .rounding = rounding};
  for (size_t i = 0; i < nested_.bits.size(); ++i)
    nested_wq_.push_back(backend.empty({total}, backend.act()));
}

QuantizedParameter WeightQuantizer::add(const Parameter& parameter, int bits) {
  const Shape& shape = parameter.master.shape();
  const int64_t group = weights_.group;
  BBB_CHECK(shape.size() == 2 && shape[1] % group == 0, parameter.name, ": ", shape.back(),
            " input features are no multiple of the group ", group);
  set_bits(parameter, bits);
  const int64_t begin = parameters_.offset(parameter), count = parameter.master.numel();
  const Shape groups{shape[0], shape[1] / group};
  const auto of_groups = [&](const Tensor& flat) {
    return flat.defined() ? flat.slice(begin / group, count / group).view(groups) : flat;
  };
  QuantizedParameter views{weights_.wq.slice(begin, count).view(shape),
                           of_groups(weights_.e),
                           of_groups(weights_.z),
                           weights_.s.slice(parameter.slot, 1),
                           of_groups(weights_.ratios),
                           {}};
  for (const Tensor& wq : nested_wq_) views.nested.push_back(wq.slice(begin, count).view(shape));
  return views;
}

LcParameter WeightQuantizer::add_lc(const Parameter& latent, const Parameter& u, const Parameter& v,
                                    const Parameter& map) {
  const Shape& shape = latent.master.shape();
  lc_weights_.push_back(
      {weights_.wq.slice(parameters_.offset(latent), latent.master.numel()).view(shape),
       {latent.master,
        u.master,
        v.master,
        map.master,
        {quant::lc_spread(shape[0], shape[1]), lc_.gradient, weights_.rounding}}});
  return lc_weights_.back();
}

Adapters WeightQuantizer::add_adapters(Parameter& parameter, Parameter& a, Parameter& b,
                                       double alpha) {
  Backend& backend = parameters_.backend();
  const Tensor base = backend.empty(parameter.master.shape(), backend.real());
  adapted_.push_back({&parameter, {&a, &b, base, alpha}});
  a.frozen = b.frozen = true;
  return adapted_.back().adapters;
}

void WeightQuantizer::adapt(bool adapters) {
  adapts_ = adapters;
  for (const Adapted& adapted : adapted_)  // without moments it cannot train
    BBB_ASSERT(adapters || parameters_.offset(*adapted.parameter) < parameters_.m().numel());
  for (const Adapted& adapted : adapted_) {
    const auto& [a, b, base, alpha] = adapted.adapters;
    adapted.parameter->frozen = adapters;
    a->frozen = b->frozen = !adapters;
  }
  if (!adapted_.empty()) parameters_.backend().zero(parameters_.grads());
}

void WeightQuantizer::finish_backward(const Parameter& parameter, const Adapters& adapters) const {
  Backend& backend = parameters_.backend();
  const int64_t begin = parameters_.offset(parameter), count = parameter.master.numel();
  backend.lora_weight_backward(adapters.a->grad, adapters.b->grad, parameter.grad,
                               weights_.clipped.slice(begin / 8, count / 8), adapters.a->master,
                               adapters.b->master, adapters.alpha);
  if (begin < parameters_.m().numel()) backend.zero(parameter.grad);  // a step reads it
}

void WeightQuantizer::set_bits(const Parameter& parameter, int bits) {
  const int32_t value = bits;
  parameters_.backend().upload(weights_.bits.slice(parameter.slot, 1), &value);
  // The optimizer may have prequantized with the old width.
  parameters_.backend().zero(weights_.prequantized.slice(parameter.slot, 1));
}

void WeightQuantizer::prepare() {
  if (adapts_)
    for (const auto& [parameter, adapters] : adapted_)
      parameters_.backend().lora_weight(parameter->master, adapters.base, adapters.a->master,
                                        adapters.b->master, adapters.alpha);
  parameters_.backend().max_group_range(weights_, parameters_.masters());
  fake_quant();
}

void WeightQuantizer::quantize() {
  if (adapts_) return prepare();  // the optimizer has not written W
  fake_quant();
}

void WeightQuantizer::fake_quant() {
  parameters_.backend().fake_quant(weights_, parameters_.masters());
  for (size_t i = 0; i < nested_wq_.size(); ++i)
    parameters_.backend().nested_levels(nested_wq_[i], weights_, parameters_.masters(),
                                        nested_.bits[i], nested_.dequant);
  for (const LcParameter& weight : lc_weights_)
    parameters_.backend().lc_weight(weight.w, weight.from);
}

}  // namespace bbb::autograd
