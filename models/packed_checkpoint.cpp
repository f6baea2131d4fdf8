// Export: every layer is made twice. The first time it is written, the second time compared with
// what is read back.
#include "models/packed_checkpoint.h"

#include <algorithm>

#include "engine/bf16.h"
#include "models/export_files.h"

namespace bbb::models {

std::vector<uint16_t> to_bf16(const std::vector<float>& values) {
  std::vector<uint16_t> out(values.size());
  std::transform(values.begin(), values.end(), out.begin(),
                 [](float v) { return engine::to_bf16(v); });
  return out;
}

std::vector<float> rounded_bf16(std::vector<float> values) {
  for (float& value : values) value = engine::from_bf16(engine::to_bf16(value));
  return values;
}

static bool quantizes_activations(const Formats& formats, int64_t layers) {
  for (int64_t i = 0; i < layers; ++i)
    for (const quant::LinearFormat& linear : formats(i))
      if (linear.input.bits < 16) return true;
  return false;
}

ExportSummary export_model(const std::string& path, const Checkpoint& source,
                           const data::Tokenizer& tokenizer, const Formats& formats,
                           const ExportOptions& options, const LoadOuter& outer,
                           const std::function<LayerResult(int64_t)>& layer,
                           const std::string& bbb_json,
                           const std::function<void(int64_t done)>& progress,
                           int64_t max_shard_bytes) {
  const int64_t layers = source.config().layers;
  const ExportSource from = {source, tokenizer, formats, bbb_json, max_shard_bytes};
  const std::unique_ptr<ExportFiles> files = options.format == ExportFormat::Gguf
                                                 ? make_gguf_export(path, from, options.gguf_tables)
                                                 : make_directory_export(path, from, options);

  const std::vector<OuterWeight> weights = outer_weights(source.config());
  files->add_outer(weights[0], outer(weights[0]));
  for (int64_t i = 0; i < layers; ++i) {
    files->add_layer(i, layer(i));
    if (progress) progress(i + 1);
  }
  for (size_t i = 1; i < weights.size(); ++i) files->add_outer(weights[i], outer(weights[i]));
  files->finish();

  for (const OuterWeight& weight : weights) files->check_outer(weight, outer(weight));
  for (int64_t i = 0; i < layers; ++i) {
    files->check_layer(i, layer(i));
    if (progress) progress(layers + i + 1);
  }
  const ExportSummary summary = {
      files->bits_per_weight(), files->rounding(),
      options.format != ExportFormat::Packed && quantizes_activations(formats, layers)};
  files->commit();
  return summary;
}

}  // namespace bbb::models
