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
              .wq = sharded() ? Tensor() : backend.empty({total}, backend.act()),
              .e = backend.empty({total / group}, DType::U8),
              .z = backend.empty({total / group}, DType::U8),
              .ratios = range == quant::RangeRule::Search
                            ? backend.zeros({total / group}, DType::U8)
                            : Tensor(),
              .rule = rule,
              .group = group,
              .rounding = rounding};
  for (size_t i = 0; i < nested_.bits.size() && !sharded(); ++i)
    nested_wq_.push_back(backend.empty({total}, backend.act()));
  make_sections();
}

void WeightQuantizer::make_sections() {
  Backend& backend = parameters_.backend();
  nested_parts_.resize(sharded() ? nested_.bits.size() : 0);
  for (const ParameterSet::Section& section : parameters_.sections()) {
    if (!sharded()) {
      sections_.push_back(weights_);
      continue;
    }
    engine::QuantizedWeights& q = sections_.emplace_back();
    if (section.sharded == nullptr) continue;
    const int64_t slot = section.sharded->slot, elements = section.count * comm().size();
    parts_.push_back(backend.zeros({elements}, backend.act()));
    for (std::vector<Tensor>& parts : nested_parts_)
      parts.push_back(backend.zeros({elements}, backend.act()));
    q = weights_;
    q.tiles = section.table.tiles;
    q.wq = comm().part_of(parts_.back());
    q.clipped = weights_.clipped.slice(section.begin / 8, section.count / 8);
    for (Tensor* of_slot : {&q.bits, &q.max_range, &q.s, &q.prequantized})
      *of_slot = of_slot->slice(slot, 1);
    for (Tensor* of_groups : {&q.e, &q.z, &q.ratios})
      if (of_groups->defined())
        *of_groups = of_groups->slice(section.begin / q.group, section.count / q.group);
  }
}

void WeightQuantizer::visit_sections(
    const std::function<void(size_t i, const ParameterSet::Section& section)>& visit) const {
  for (size_t i = 0; i < sections_.size(); ++i)
    if (sections_[i].wq.defined()) visit(i, parameters_.sections()[i]);
}

QuantizedParameter WeightQuantizer::add(const Parameter& parameter, int bits) {
  const Shape& shape = parameter.grad.shape();
  const int64_t group = weights_.group;
  BBB_CHECK(shape.size() == 2 && shape[1] % group == 0, parameter.name, ": ", shape.back(),
            " input features are no multiple of the group ", group);
  set_bits(parameter, bits);
  if (parameter.sharded) {
    const auto slot = static_cast<size_t>(parameter.slot);
    const engine::QuantizedWeights& q = sections_[slot];
    const auto whole = [&](const Tensor& parts) {
      return parts.slice(0, parameter.grad.numel()).view(shape);
    };
    QuantizedParameter views{whole(parts_[slot]), q.e, q.z, q.s, q.ratios, {}};
    for (const std::vector<Tensor>& parts : nested_parts_)
      views.nested.push_back(whole(parts[slot]));
    return views;
  }
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
    BBB_ASSERT(adapters || parameters_.offset(*adapted.parameter) < parameters_.moved_elements());
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
  if (begin < parameters_.moved_elements()) backend.zero(parameter.grad);  // a step reads it
}

void WeightQuantizer::set_bits(const Parameter& parameter, int bits) {
  const int32_t value = bits;
  parameters_.backend().upload(weights_.bits.slice(parameter.slot, 1), &value);
  // The optimizer may have prequantized with the old width.
  parameters_.backend().zero(weights_.prequantized.slice(parameter.slot, 1));
}

Tensor WeightQuantizer::masters_of(const ParameterSet::Section& section) const {
  const Tensor& masters = parameters_.masters();  // without sharding those that do not move, too
  return sharded() ? masters.slice(section.begin, section.count) : masters;
}

void WeightQuantizer::prepare() {
  if (adapts_)
    for (const auto& [parameter, adapters] : adapted_)
      parameters_.backend().lora_weight(parameter->master, adapters.base, adapters.a->master,
                                        adapters.b->master, adapters.alpha);
  visit_sections([&](size_t i, const ParameterSet::Section& of) {
    parameters_.backend().max_group_range(sections_[i], masters_of(of));
  });
  fake_quant();
  join();
}

void WeightQuantizer::quantize() {
  if (adapts_) return prepare();  // the optimizer has not written W
  fake_quant();
}

void WeightQuantizer::join() const {
  if (sharded()) comm().join();
}

void WeightQuantizer::fake_quant() {
  Backend& backend = parameters_.backend();
  if (sharded()) comm().all_reduce(weights_.max_range, engine::Reduce::Max);
  visit_sections([&](size_t i, const ParameterSet::Section& of) {
    const Tensor masters = masters_of(of);
    backend.fake_quant(sections_[i], masters);
    if (sharded()) comm().start_all_gather(parts_[i]);
    for (size_t p = 0; p < nested_.bits.size(); ++p) {
      const Tensor levels = sharded() ? comm().part_of(nested_parts_[p][i]) : nested_wq_[p];
      backend.nested_levels(levels, sections_[i], masters, nested_.bits[p], nested_.dequant);
      if (sharded()) comm().start_all_gather(nested_parts_[p][i]);
    }
  });
  for (const LcParameter& weight : lc_weights_) backend.lc_weight(weight.w, weight.from);
}

}  // namespace bbb::autograd
