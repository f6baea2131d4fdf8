// A Llama small enough for tests: its config, a Hugging Face directory of random weights, its
// logits.
#pragma once

#include <algorithm>
#include <bit>
#include <string>
#include <vector>

#include "data/files.h"
#include "data/safetensors.h"
#include "engine/rng.h"
#include "models/llama.h"
#include "tests/support.h"

namespace bbb::tests {

// Every quantized K is a multiple of 32. vocab, d_model, hidden, heads and kv_heads all differ, so
// that none can be mistaken for another.
inline models::LlamaConfig tiny_config() {
  models::LlamaConfig config;
  config.vocab = 53;
  config.d_model = 64;
  config.hidden = 96;
  config.layers = 2;
  config.heads = 4;
  config.kv_heads = 2;
  config.head_dim = 64;  // supported by the attention of every device
  config.max_position = 128;
  return config;
}

// What Llama alone has not: biases of some or all linears, norms of heads, and a scaling of the
// rope that multiplies queries and keys.
inline std::vector<models::LlamaConfig> other_families() {
  models::LlamaConfig biased = tiny_config(), qwen2 = tiny_config(), qwen3 = tiny_config();
  biased.qkv_bias = biased.output_bias = biased.mlp_bias = true;
  biased.rope_scaling = {.kind = models::RopeKind::Yarn,
                         .factor = 4,
                         .original_max_position = 32,
                         .attention_factor = 1.25};
  qwen2.model_type = "qwen2";
  qwen2.qkv_bias = true;
  qwen3.model_type = "qwen3";
  qwen3.qk_norm = true;
  return {biased, qwen2, qwen3};
}

// Writes config.json and model.safetensors. The weights are F32 and exact in bf16.
inline void write_tiny_model(const std::string& directory, const models::LlamaConfig& config,
                             uint64_t seed) {
  using Entry = data::SafeTensorsWriter::Entry;
  std::vector<Entry> entries;
  const auto plan = [&](const std::string& name, const engine::Shape& shape) {
    entries.push_back({name, data::FileDType::F32, shape});
  };
  plan("model.embed_tokens.weight", {config.vocab, config.d_model});
  for (int64_t i = 0; i < config.layers; ++i) {
    for (const models::NormShape& norm : models::block_norms(config))
      plan(models::layer_name(i, norm.name), {norm.size});
    for (const models::LinearShape& linear : models::block_linears(config)) {
      plan(models::layer_name(i, linear.name) + ".weight", {linear.n, linear.k});
      if (linear.bias) plan(models::layer_name(i, linear.name) + ".bias", {linear.n});
    }
  }
  plan("model.norm.weight", {config.d_model});
  if (!config.tied_head) plan("lm_head.weight", {config.vocab, config.d_model});

  engine::Rng rng(seed);
  data::SafeTensorsWriter writer(directory + "/model.safetensors", entries);
  for (const Entry& entry : entries) {
    std::vector<float> values(static_cast<size_t>(engine::numel_of(entry.shape)));
    const bool is_norm = entry.name.ends_with("norm.weight");
    for (float& value : values) {
      const double drawn = is_norm ? 1 + 0.1 * rng.normal() : 0.15 * rng.normal();
      // Truncate to bf16.
      value =
          std::bit_cast<float>(std::bit_cast<uint32_t>(static_cast<float>(drawn)) & 0xFFFF0000u);
    }
    writer.add(entry.name, values.data(), static_cast<int64_t>(values.size() * sizeof(float)));
  }
  writer.finish();
  data::write_file_atomic(directory + "/config.json", models::config_to_json(config));
}

// `count` random token ids below `vocab`.
inline std::vector<int32_t> random_tokens(uint64_t seed, int64_t count, int64_t vocab) {
  engine::Rng rng(seed);
  std::vector<int32_t> ids(static_cast<size_t>(count));
  std::generate(ids.begin(), ids.end(), [&] { return static_cast<int32_t>(rng.below(vocab)); });
  return ids;
}

// Logits (T, V) of one sequence. With `kv`, its tokens start at position kv->start.
inline std::vector<double> logits_of(models::Llama& model, const std::vector<int32_t>& ids,
                                     models::KvCache* kv = nullptr) {
  engine::Backend& device = model.backend();
  const int64_t t = static_cast<int64_t>(ids.size());
  autograd::Tape tape(device, autograd::TapeMode::Inference);
  const autograd::Var h =
      model.forward(tape, make_ids(device, {1, t}, ids), kv, models::Recompute::None);
  return values_of(device, model.logits(h.value().view({t, model.config().d_model})));
}

}  // namespace bbb::tests
