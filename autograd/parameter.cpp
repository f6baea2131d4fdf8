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
  backend_.upload(quantized_.tiles, tiles_.data());
}

QuantizedParameter ParameterSet::add_quantizer(const Parameter& parameter, engine::WeightGrid spec,
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

  const int64_t begin = tiles_of(parameter).front().begin * quant::kTileAlign;
  const int64_t count = parameter.master.numel();
  const Shape groups{shape[0], shape[1] / spec.group};
  return {quantized_.wq.slice(begin, count).view(shape),
          quantized_.e.slice(begin / spec.group, count / spec.group).view(groups),
          quantized_.z.slice(begin / spec.group, count / spec.group).view(groups),
          quantized_.s.slice(parameter.slot, 1)};
}

std::span<quant::WeightTile> ParameterSet::tiles_of(const Parameter& parameter) {
  const auto found =
      std::equal_range(tiles_.begin(), tiles_.end(),
                       quant::WeightTile{0, 0, static_cast<int32_t>(parameter.slot), 0},
                       [](const auto& a, const auto& b) { return a.slot < b.slot; });
  return {found.first, found.second};
}

void ParameterSet::set_bits(const Parameter& parameter, int bits) {
  const std::span<quant::WeightTile> tiles = tiles_of(parameter);
  for (quant::WeightTile& tile : tiles) tile.bits = bits;
  const int64_t first = tiles.data() - tiles_.data(), count = static_cast<int64_t>(tiles.size());
  backend_.upload(quantized_.tiles.rows(first, count), tiles.data());
  // What AdamW has quantized ahead has the old width.
  backend_.zero(quantized_.ahead.slice(parameter.slot, 1));
}

void ParameterSet::prepare() {
  if (!quantized_.wq.defined()) return;
  backend_.widest_groups(quantized_, masters_);
  quantize();
}

void ParameterSet::quantize() {
  if (!quantized_.wq.defined()) return;
  backend_.fake_quant(quantized_, masters_);
}

void ParameterSet::reset_moments() {
  backend_.zero(m_);
  backend_.zero(v_);
}

}  // namespace bbb::autograd
