#include "autograd/parameter.h"

#include <algorithm>
#include <utility>

namespace bbb::autograd {

Parameter& ParameterSet::add(std::string name, Shape shape) {
  BBB_ASSERT(!masters_.defined());
  parameters_.push_back(std::make_unique<Parameter>());
  parameters_.back()->name = std::move(name);
  parameters_.back()->slot = static_cast<int64_t>(shapes_.size());
  shapes_.push_back(std::move(shape));
  return *parameters_.back();
}

void ParameterSet::allocate() {
  BBB_ASSERT(!masters_.defined());
  std::vector<int64_t> offsets, counts;
  int64_t total = 0;
  for (const Shape& shape : shapes_) {
    offsets.push_back(total);
    counts.push_back(engine::numel_of(shape));
    total += quant::padded_elements(counts.back());
  }
  // Zeros, so that the padding is and stays 0 under every pass over the whole buffer.
  for (Tensor* buffer : {&masters_, &v_}) *buffer = backend_.zeros({total}, backend_.real());
  m_ = backend_.zeros({total}, backend_.act());
  grads_ =
      backend_.zeros({total}, passes_ == GradientPasses::One ? backend_.act() : backend_.real());
  for (size_t i = 0; i < shapes_.size(); ++i) {
    parameters_[i]->master = masters_.slice(offsets[i], counts[i]).view(shapes_[i]);
    parameters_[i]->grad = grads_.slice(offsets[i], counts[i]).view(shapes_[i]);
  }
  tiles_ = quant::make_tiles(counts);
  const int64_t slots = static_cast<int64_t>(counts.size());
  quantized_.tiles = backend_.empty({static_cast<int64_t>(tiles_.size()), 4}, engine::DType::I32);
  quantized_.widest = backend_.zeros({slots}, backend_.real());
  quantized_.s = backend_.zeros({slots}, backend_.real());
  quantized_.ahead = backend_.zeros({slots}, backend_.real());
  quantized_.clipped = backend_.zeros({total / 8}, engine::DType::U8);
  upload_tiles();
}

QuantizedParameter ParameterSet::add_quantizer(const Parameter& parameter, engine::GridSpec spec,
                                               engine::Rounding rounding) {
  const Shape& shape = parameter.master.shape();
  BBB_ASSERT(parameters_[static_cast<size_t>(parameter.slot)].get() == &parameter);
  BBB_ASSERT(shape.size() == 2 && shape[1] % spec.group == 0);
  const int64_t total = masters_.numel();
  if (!quantized_.wq.defined()) {
    quantized_.group = spec.group;
    quantized_.rounding = rounding;
    quantized_.wq = backend_.empty({total}, backend_.act());
    quantized_.e = backend_.empty({total / spec.group}, engine::DType::U8);
    quantized_.z = backend_.empty({total / spec.group}, engine::DType::U8);
  }
  BBB_ASSERT(quantized_.group == spec.group && quantized_.rounding == rounding);
  set_bits(parameter, spec.bits);

  const auto first = std::find_if(tiles_.begin(), tiles_.end(), [&](const quant::WeightTile& tile) {
    return tile.slot == static_cast<int32_t>(parameter.slot);
  });
  BBB_ASSERT(first != tiles_.end());
  const int64_t begin = first->begin * quant::kTileAlign;
  const int64_t count = parameter.master.numel();
  const Shape groups{shape[0], shape[1] / spec.group};
  return {quantized_.wq.slice(begin, count).view(shape),
          quantized_.e.slice(begin / spec.group, count / spec.group).view(groups),
          quantized_.z.slice(begin / spec.group, count / spec.group).view(groups),
          quantized_.s.slice(parameter.slot, 1)};
}

void ParameterSet::set_bits(const Parameter& parameter, int bits) {
  for (quant::WeightTile& tile : tiles_)
    if (tile.slot == parameter.slot) tile.bits = bits;
  tiles_changed_ = true;
}

void ParameterSet::upload_tiles() {
  backend_.upload(quantized_.tiles, tiles_.data());
  tiles_changed_ = false;
}

void ParameterSet::prepare() {
  if (!quantized_.wq.defined()) return;
  if (tiles_changed_) upload_tiles();
  backend_.widest_groups(quantized_, masters_);
  quantize();
}

void ParameterSet::quantize() {
  if (!quantized_.wq.defined()) return;
  BBB_ASSERT(!tiles_changed_);
  backend_.fake_quant(quantized_, masters_);
}

const engine::FakeQuantWeights& ParameterSet::quantized() const {
  BBB_ASSERT(!tiles_changed_);
  return quantized_;
}

void ParameterSet::reset_moments() {
  backend_.zero(m_);
  backend_.zero(v_);
}

}  // namespace bbb::autograd
