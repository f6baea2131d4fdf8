#include "autograd/parameter.h"

#include <algorithm>
#include <utility>

#include "quant/moments.h"

namespace bbb::autograd {

using engine::DType;
using quant::padded_elements;

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
  std::vector<int64_t> whole_offsets;  // by the slots of the declaration
  for (const Shape& shape : shapes_) {
    whole_offsets.push_back(whole_elements_);
    whole_elements_ += padded_elements(engine::numel_of(shape));
  }
  std::ranges::stable_partition(parameters_, [](const auto& p) { return p->sharded; });
  std::ranges::stable_partition(parameters_, [](const auto& p) { return !p->frozen; });
  std::vector<Shape> shapes;
  std::vector<int64_t> counts;  // in a flat buffer, without padding between parameters
  int64_t total = 0, largest = 0;
  for (const auto& parameter : parameters_) {
    BBB_ASSERT(!parameter->sharded || (comm_ != nullptr && !parameter->frozen));
    const auto declared = static_cast<size_t>(parameter->slot);
    shapes.push_back(shapes_[declared]);
    whole_offsets_.push_back(whole_offsets[declared]);
    parameter->slot = static_cast<int64_t>(counts.size());
    offsets_.push_back(total);
    counts.push_back(engine::numel_of(shapes.back()));
    if (parameter->sharded) {
      const int64_t ranks = comm_->size();
      counts.back() = padded_elements((counts.back() + ranks - 1) / ranks);
      largest = std::max(largest, ranks * counts.back());
      sharded_elements_ = total + counts.back();
    }
    total += padded_elements(counts.back());
    if (!parameter->frozen) moved_elements_ = total;
  }
  BBB_ASSERT(sharded_elements_ == 0 || moved_elements_ == total);  // entries() relies on it
  shapes_ = std::move(shapes);
  const bool one = passes_ == GradientPasses::One, wide = moments_ == Moments::Wide;
  const int64_t stored = quant::moment_bytes(moved_elements_);
  // Zeros: then the padding is 0 and stays 0 in every pass over the whole buffer.
  masters_ = backend_.zeros({total}, backend_.real());
  v_ = wide ? backend_.zeros({moved_elements_}, backend_.real())
            : backend_.zeros({stored}, DType::U8);
  m_ = wide ? backend_.zeros({moved_elements_}, backend_.act())
            : backend_.zeros({stored}, DType::U8);
  grads_ = backend_.zeros({total}, one ? backend_.act() : backend_.real());
  if (largest > 0)
    for (Tensor& buffer : gradient_buffers_) buffer = backend_.zeros({largest}, backend_.real());
  for (size_t i = 0; i < shapes_.size(); ++i) {
    Parameter& parameter = *parameters_[i];
    const int64_t count = engine::numel_of(shapes_[i]);
    if (parameter.sharded) {
      parameter.grad = gradient_buffers_[i % 2].slice(0, count).view(shapes_[i]);
      continue;
    }
    parameter.master = masters_.slice(offsets_[i], count).view(shapes_[i]);
    parameter.grad = grads_.slice(offsets_[i], count).view(shapes_[i]);
  }
  allocate_sections(counts);
}

void ParameterSet::allocate_sections(const std::vector<int64_t>& counts) {
  const auto upload_tiles = [&](const std::vector<quant::WeightTile>& tiles) {
    const Tensor table = backend_.empty({static_cast<int64_t>(tiles.size()), 4}, DType::I32);
    backend_.upload(table, tiles.data());
    return table;
  };
  table_.slots = backend_.empty({static_cast<int64_t>(parameters_.size()), 3}, backend_.real());
  std::vector<quant::SlotRule<double>> rules;
  std::vector<quant::SlotRule<float>> rounded;
  for (const auto& parameter : parameters_) {
    const quant::SlotRule<double>& rule = rules.emplace_back(parameter->rule);
    rounded.push_back({static_cast<float>(rule.lr_factor), static_cast<float>(rule.decay),
                       static_cast<float>(rule.direct)});
  }
  if (backend_.real() == DType::F64)
    backend_.upload(table_.slots, rules.data());
  else
    backend_.upload(table_.slots, rounded.data());

  const int64_t slots = static_cast<int64_t>(counts.size());
  int64_t first = 0;  // parameter of the last section
  for (; first < slots && parameters_[static_cast<size_t>(first)]->sharded; ++first) {
    const auto i = static_cast<size_t>(first);
    sections_.push_back(
        {offsets_[i],
         counts[i],
         {upload_tiles(quant::make_tiles({counts[i]})), table_.slots.rows(first, 1)},
         parameters_[i].get()});
  }
  const std::vector<quant::WeightTile> tiles =
      quant::make_tiles({counts.begin() + first, counts.end()});
  const int64_t begin = sharded_elements_, count = moved_elements_ - begin;
  table_.tiles = upload_tiles(tiles);
  const int64_t moved_tiles = std::ranges::count_if(
      tiles, [&](const auto& tile) { return tile.begin * quant::kTileAlign < count; });
  if (count > 0)
    sections_.push_back(
        {begin,
         count,
         {table_.tiles.rows(0, moved_tiles), table_.slots.rows(first, slots - first)},
         nullptr});
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

Tensor ParameterSet::moment_slice(const Tensor& moments, int64_t begin, int64_t count) const {
  if (moments_ == Moments::Wide) return moments.slice(begin, count);
  return moments.slice(quant::moment_bytes(begin), quant::moment_bytes(count));
}

int64_t ParameterSet::part(const Parameter& parameter) const {
  BBB_ASSERT(parameter.sharded);
  return sections_[static_cast<size_t>(parameter.slot)].count;
}

Tensor ParameterSet::gradient_parts(const Parameter& parameter) const {
  return gradient_buffers_[parameter.slot % 2].slice(0, comm_->size() * part(parameter));
}

void ParameterSet::clear_padding(const Parameter& parameter) const {
  const Tensor parts = gradient_parts(parameter);
  const int64_t count = parameter.grad.numel();
  if (count < parts.numel()) backend_.zero(parts.slice(count, parts.numel() - count));
}

ParameterSet::Range ParameterSet::own_range(const Parameter& parameter) const {
  const int64_t count = parameter.grad.numel();
  if (!parameter.sharded) return {0, count};
  const int64_t part = this->part(parameter);
  return {std::min(count, comm_->rank() * part), std::min(count, (comm_->rank() + 1) * part)};
}

Tensor ParameterSet::gather(const Tensor& part, int64_t count) const {
  const Tensor& buffer = gradient_buffers_[0];
  const int64_t elements = comm_->size() * part.numel();
  const int64_t bytes = elements * engine::size_bytes(part.dtype());
  BBB_ASSERT(bytes <= buffer.bytes());
  // The buffer's memory with another dtype.
  const auto memory = std::make_shared<engine::Storage>(buffer.raw(), bytes, [buffer] {});
  const Tensor whole(memory, 0, {elements}, part.dtype(), part.device());
  backend_.copy(comm_->part_of(whole), part);
  comm_->start_all_gather(whole);
  comm_->join();
  return whole.slice(0, count);
}

// 8-bit moments have more entries than elements.
int64_t ParameterSet::entries(const Tensor& flat, int64_t elements) const {
  const int64_t unit = flat.numel() / (moved_elements_ / quant::kTileAlign);
  return elements / quant::kTileAlign * unit;
}

// In the order of the whole buffer.
void ParameterSet::visit_whole(const Tensor& flat,
                               const std::function<void(const Tensor& piece)>& take) const {
  if (sharded_elements_ == 0) return take(flat);
  std::vector<size_t> order(parameters_.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::ranges::sort(order, {}, [&](size_t i) { return whole_offsets_[i]; });
  for (const size_t i : order) {
    const Parameter& parameter = *parameters_[i];
    const int64_t begin = entries(flat, offsets_[i]);
    const int64_t count = entries(flat, padded_elements(parameter.grad.numel()));
    take(parameter.sharded ? gather(flat.slice(begin, entries(flat, part(parameter))), count)
                           : flat.slice(begin, count));
  }
}

void ParameterSet::upload_whole(const Tensor& flat, const void* whole) const {
  if (sharded_elements_ == 0) return backend_.upload(flat, whole);
  for (size_t i = 0; i < parameters_.size(); ++i) {
    const Parameter& parameter = *parameters_[i];
    const auto [begin, end] = own_range(parameter);
    if (begin == end) continue;
    const int64_t from = entries(flat, whole_offsets_[i] + begin);
    const int64_t count = entries(flat, padded_elements(end) - begin);  // begin is aligned
    backend_.upload(flat.slice(entries(flat, offsets_[i]), count),
                    static_cast<const uint8_t*>(whole) + from * engine::size_bytes(flat.dtype()));
  }
}

}  // namespace bbb::autograd
