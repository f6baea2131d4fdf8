#include "autograd/parameter.h"

#include <algorithm>
#include <utility>

namespace bbb::autograd {

Parameter& ParameterSet::add(std::string name, Shape shape, quant::SlotRule<double> rule) {
  BBB_ASSERT(!masters_.defined());
  parameters_.push_back(std::make_unique<Parameter>());
  parameters_.back()->name = std::move(name);
  parameters_.back()->slot = static_cast<int64_t>(shapes_.size());
  parameters_.back()->rule = rule;
  shapes_.push_back(std::move(shape));
  return *parameters_.back();
}

void ParameterSet::allocate() {
  BBB_ASSERT(!masters_.defined());
  std::ranges::stable_partition(parameters_, [](const auto& p) { return !p->frozen; });
  std::vector<Shape> shapes;
  std::vector<int64_t> counts;
  int64_t total = 0, moved = 0;
  for (const auto& parameter : parameters_) {
    shapes.push_back(shapes_[static_cast<size_t>(parameter->slot)]);
    parameter->slot = static_cast<int64_t>(counts.size());
    offsets_.push_back(total);
    counts.push_back(engine::numel_of(shapes.back()));
    total += quant::padded_elements(counts.back());
    if (!parameter->frozen) moved = total;
  }
  shapes_ = std::move(shapes);
  // Zeros: then the padding is 0 and stays 0 in every pass over the whole buffer.
  masters_ = backend_.zeros({total}, backend_.real());
  v_ = backend_.zeros({moved}, backend_.real());
  m_ = backend_.zeros({moved}, backend_.act());
  grads_ =
      backend_.zeros({total}, passes_ == GradientPasses::One ? backend_.act() : backend_.real());
  for (size_t i = 0; i < shapes_.size(); ++i) {
    parameters_[i]->master = masters_.slice(offsets_[i], counts[i]).view(shapes_[i]);
    parameters_[i]->grad = grads_.slice(offsets_[i], counts[i]).view(shapes_[i]);
  }
  const std::vector<quant::WeightTile> tiles = quant::make_tiles(counts);
  table_.tiles = backend_.empty({static_cast<int64_t>(tiles.size()), 4}, engine::DType::I32);
  backend_.upload(table_.tiles, tiles.data());
  moved_tiles_ = std::ranges::count_if(
      tiles, [&](const auto& tile) { return tile.begin * quant::kTileAlign < moved; });
  table_.slots = backend_.empty({static_cast<int64_t>(parameters_.size()), 3}, backend_.real());
  std::vector<quant::SlotRule<double>> rules;
  std::vector<quant::SlotRule<float>> rounded;
  for (const auto& parameter : parameters_) {
    const quant::SlotRule<double>& rule = rules.emplace_back(parameter->rule);
    rounded.push_back({static_cast<float>(rule.lr_factor), static_cast<float>(rule.decay),
                       static_cast<float>(rule.direct)});
  }
  if (backend_.real() == engine::DType::F64) return backend_.upload(table_.slots, rules.data());
  backend_.upload(table_.slots, rounded.data());
}

engine::ParameterTable ParameterSet::moved_table() const {
  return {.tiles = table_.tiles.rows(0, moved_tiles_), .slots = table_.slots};
}

int64_t ParameterSet::offset(const Parameter& parameter) const {
  const auto slot = static_cast<size_t>(parameter.slot);
  BBB_ASSERT(slot < parameters_.size() && parameters_[slot].get() == &parameter);
  return offsets_[slot];
}

void ParameterSet::reset_moments() {
  backend_.zero(m_);
  backend_.zero(v_);
}

}  // namespace bbb::autograd
