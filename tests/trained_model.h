// A model whose blocks are quantized for training, in any formats, and a tokenizer for its export.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "models/llama.h"
#include "models/packed_checkpoint.h"
#include "models/site_statistics.h"
#include "tests/support.h"

namespace bbb::tests {

// A tokenizer of which an export uses only the files.
class FileTokenizer : public data::Tokenizer {
 public:
  std::vector<int32_t> encode(std::string_view, data::SpecialText) const override { return {}; }
  std::string piece(int32_t, bool) const override { return ""; }
  std::string decode(const std::vector<int32_t>&) const override { return ""; }
  std::optional<int32_t> find(std::string_view) const override { return std::nullopt; }
  int64_t vocab_size() const override { return 53; }
  std::vector<std::pair<std::string, std::string>> export_files() const override {
    return {{"tokenizer.json", "{\"a\": 1}"}};
  }
};

struct TrainedModel {
  using Formats = std::function<std::vector<quant::LinearFormat>(int64_t layer)>;

  // Quantizes the masters start(layer), which are in formats(layer).
  TrainedModel(Backend& device, const models::Checkpoint& of, const Formats& formats,
               const std::function<models::LayerResult(int64_t layer)>& start,
               quant::RangeRule range = quant::RangeRule::MinMax)
      : source(of),
        model(std::make_unique<models::Llama>(device, of, models::HeadRounding::BFloat16)),
        set(device, autograd::GradientPasses::One) {
    for (auto& block : model->blocks()) block->declare_parameters(set, formats(block->layer()));
    set.allocate();
    const quant::WeightGrid& grid = formats(0)[0].weight;
    quantizer.emplace(set, grid.group, range, engine::Rounding::Nearest,
                      autograd::NestedPrecisions(), autograd::LcTraining(),
                      quant::WeightRule{.levels = grid.levels});
    for (auto& block : model->blocks()) {
      block->bind_parameters(*quantizer, formats(block->layer()));
      block->set_masters(start(block->layer()));
    }
    quantizer->prepare();
  }

  models::LayerResult layer(int64_t i) {
    return model->blocks()[static_cast<size_t>(i)]->result(models::LinearContent::Stored);
  }
  std::vector<quant::LinearFormat> formats(int64_t i) {
    std::vector<quant::LinearFormat> formats;
    for (const auto* linear : model->blocks()[static_cast<size_t>(i)]->linears())
      formats.push_back(linear->format());
    return formats;
  }
  double write(const std::string& path, models::ExportFormat format = models::ExportFormat::Packed,
               int64_t shard_bytes = models::kMaxShardBytes) {
    return models::export_model(
               path, source, FileTokenizer(), [this](int64_t i) { return formats(i); }, format,
               models::outer_of(source), [this](int64_t i) { return layer(i); }, "{\"seed\": 1}\n",
               nullptr, shard_bytes)
        .bits_per_weight;
  }

  const models::Checkpoint& source;
  std::unique_ptr<models::Llama> model;
  autograd::ParameterSet set;
  std::optional<autograd::WeightQuantizer> quantizer;
};

inline std::unique_ptr<models::Llama> load_model(Backend& device,
                                                 const models::Checkpoint& checkpoint) {
  auto model = std::make_unique<models::Llama>(device, checkpoint, models::HeadRounding::None);
  model->load_blocks(checkpoint);
  return model;
}

}  // namespace bbb::tests
