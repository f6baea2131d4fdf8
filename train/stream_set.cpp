#include "train/stream_set.h"

#include <algorithm>
#include <numeric>

#include "models/quant_linear.h"
#include "train/sample_order.h"

namespace bbb::train {

using engine::Backend;
using engine::Tensor;

StreamShape StreamSet::shape(const Backend& backend, const models::LlamaConfig& model,
                             const TrainConfig& config) {
  StreamShape shape;
  shape.rows = rows(config);
  shape.row_numel = config.seq_len * model.d_model;
  shape.row_bytes = shape.row_numel * engine::size_bytes(backend.act());
  shape.batch_rows = own_batch(config);
  return shape;
}

int64_t StreamSet::samples(const TrainConfig& config) { return config.comm->share(config.samples); }

int64_t StreamSet::rows(const TrainConfig& config) {
  return samples(config) + (trains_blocks(config) ? config.comm->share(config.val_samples) : 0);
}

int64_t StreamSet::count(const TrainConfig& config) {
  if (!trains_blocks(config)) return 1;
  const size_t of_stages = config.stages.size() * Recipe::precisions(config);
  return static_cast<int64_t>(of_stages) + (config.input_stream == InputStream::Same ? 1 : 2);
}

int StreamSet::rings(const TrainConfig& config) {
  return config.input_stream == InputStream::Mix ? 3
                                                 : 1 + static_cast<int>(Recipe::precisions(config));
}

StreamSet::StreamSet(Backend& backend, const models::LlamaConfig& model, const TrainConfig& config,
                     const StreamPlan& plan)
    : backend_(backend), model_(model), config_(config), rows_(rows(config)) {
  const StreamShape of_each = shape(backend, model, config);
  for (Tier tier : plan.tiers)
    store_.push_back(std::make_unique<Stream>(backend, of_each, tier, plan.scratch));
  for (int i = 0; i < plan.rings; ++i)
    rings_.push_back(std::make_unique<Ring>(backend, of_each, plan.uses(Tier::File)));
  const size_t of_stages = trains_blocks(config) ? config.stages.size() * precisions() : 0;
  for (size_t i = 0; i <= of_stages; ++i) streams_.push_back(store_[i].get());
  target_ = config.input_stream == InputStream::Same ? streams_[0] : store_.back().get();
}

std::vector<Stream*> StreamSet::inputs(size_t t) const {
  switch (config_.input_stream) {
    case InputStream::Same: {
      std::vector<Stream*> own;
      for (size_t p = 0; p < precisions(); ++p) own.push_back(streams_[1 + t * precisions() + p]);
      return own;
    }
    case InputStream::Higher:
      return {streams_[t]};
    default:
      return {streams_[t + 1], streams_[t]};
  }
}

void StreamSet::embed(const Tensor& table, const data::Windows& windows) {
  const int64_t seq = config_.seq_len;
  const auto own = [&](const std::vector<int32_t>& all) {
    std::vector<int32_t> rows = own_windows(all.data(), config_.samples, seq, *config_.comm);
    if (trains_blocks(config_)) {
      const int64_t first = windows.count - config_.val_samples;
      const std::vector<int32_t> validation =
          own_windows(all.data() + first * seq, config_.val_samples, seq, *config_.comm);
      rows.insert(rows.end(), validation.begin(), validation.end());
    }
    return models::upload_ints(backend_, rows, {rows_, seq});
  };
  const Tensor tokens = own(windows.ids).view({rows_ * seq});
  if (config_.pack == Packing::Documents) first_key_ = own(windows.first_key);
  for (Stream* stream : streams_) {
    Writer writer(backend_, *stream, ring(0));
    for (int64_t row = 0; row < rows_; row += batch()) {
      const int64_t count = std::min(batch(), rows_ - row);
      const Tensor out = backend_.empty({count * seq, model_.d_model}, backend_.act());
      backend_.embed(out, tokens.slice(row * seq, count * seq), table);
      writer.write(row, out);
    }
    writer.finish();
  }
}

Reader StreamSet::in_order(Stream& stream, size_t ring_index, int64_t begin, int64_t end) {
  std::vector<int32_t> rows(static_cast<size_t>(end - begin));
  std::iota(rows.begin(), rows.end(), static_cast<int32_t>(begin));
  return Reader(backend_, stream, ring(ring_index), std::move(rows));
}

Tensor StreamSet::as_windows(const Tensor& rows) const {
  return rows.view({rows.dim(0), config_.seq_len, model_.d_model});
}

Tensor StreamSet::step_input(const Stream& stream, size_t ring_index, const Tensor& order,
                             const Tensor& cursor) {
  if (stream.tier() != Tier::Device) return as_windows(ring(ring_index)->batch());
  const Tensor batch =
      backend_.empty({this->batch(), config_.seq_len, model_.d_model}, backend_.act());
  backend_.gather_rows(batch, {stream.resident(), order, cursor});
  return batch;
}

engine::Rows StreamSet::step_target(size_t ring_index, const Tensor& order, const Tensor& cursor) {
  if (target_->tier() != Tier::Device) return as_windows(ring(ring_index)->batch());
  return {target_->resident(), order, cursor};
}

Tensor StreamSet::first_key(int64_t row, int64_t count) const {
  return first_key_.defined() ? first_key_.rows(row, count) : Tensor();
}

Tensor StreamSet::step_first_key(const Tensor& order, const Tensor& cursor) {
  if (!first_key_.defined()) return {};
  const Tensor batch = backend_.empty({this->batch(), config_.seq_len}, engine::DType::I32);
  backend_.gather_rows(batch, {first_key_, order, cursor});
  return batch;
}

StepFeed::StepFeed(StreamSet& streams, size_t stage, const std::vector<int32_t>& order,
                   int64_t begin, int64_t end) {
  const std::vector<Stream*> inputs = streams.inputs(stage);
  const int64_t batch = streams.batch();
  // A reader of the rows of every step with step % among == which.
  const auto reader = [&](Stream& stream, size_t ring, size_t which, size_t among) {
    if (stream.tier() == Tier::Device) return std::unique_ptr<Reader>();
    std::vector<int32_t> rows;
    for (int64_t step = begin; step < end; ++step)
      if (static_cast<size_t>(step) % among == which)
        rows.insert(rows.end(), order.begin() + step * batch, order.begin() + (step + 1) * batch);
    return std::make_unique<Reader>(streams.backend_, stream, streams.ring(ring), std::move(rows));
  };
  together_ = streams.precisions() > 1;
  for (size_t i = 0; i < inputs.size(); ++i)
    inputs_.push_back(together_ ? reader(*inputs[i], i, 0, 1)
                                : reader(*inputs[i], i, i, inputs.size()));
  target_ = reader(streams.target(), inputs.size(), 0, 1);
}

void StepFeed::next(int64_t step) {
  for (size_t i = 0; i < inputs_.size(); ++i)
    if (inputs_[i] && (together_ || static_cast<size_t>(step) % inputs_.size() == i))
      inputs_[i]->next();
  if (target_) target_->next();
}

}  // namespace bbb::train
