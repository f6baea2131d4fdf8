#include "models/synthetic_checkpoint.h"

#include <bit>
#include <cmath>
#include <utility>

#include "data/files.h"
#include "engine/rng.h"
#include "quant/check.h"

namespace bbb::models {
namespace {

using engine::Shape;

// Sums of four 16-bit uniforms: near enough to normal, and one draw a value.
void fill_random(std::vector<float>& values, uint64_t seed, double deviation) {
  // A uniform of 2^16 steps has the variance 2^32 / 12; four of them 2^32 / 3.
  const float scale = static_cast<float>(deviation * std::sqrt(3.0) / 65536.0);
  constexpr int32_t kMean = 2 * 65535;
  engine::Rng rng(seed);
  for (float& value : values) {
    const uint64_t bits = rng.next();
    const int32_t sum = static_cast<int32_t>((bits & 0xFFFF) + (bits >> 16 & 0xFFFF) +
                                             (bits >> 32 & 0xFFFF) + (bits >> 48));
    const float drawn = scale * static_cast<float>(sum - kMean);
    value = std::bit_cast<float>(std::bit_cast<uint32_t>(drawn) & 0xFFFF0000u);
  }
}

class SyntheticCheckpoint final : public Checkpoint {
 public:
  SyntheticCheckpoint(LlamaConfig config, std::string path, uint64_t seed) : seed_(seed) {
    config_ = std::move(config);
    path_ = std::move(path);
    const Shape table{config_.vocab, config_.d_model}, norm{config_.d_model};
    shapes_["model.embed_tokens.weight"] = table;
    if (!config_.tied_head) shapes_["lm_head.weight"] = table;
    shapes_["model.norm.weight"] = norm;
    for (int64_t layer = 0; layer < config_.layers; ++layer) {
      shapes_[layer_name(layer, "input_layernorm.weight")] = norm;
      shapes_[layer_name(layer, "post_attention_layernorm.weight")] = norm;
      for (const LinearShape& l : block_linears(config_))
        shapes_[layer_name(layer, l.name) + ".weight"] = {l.n, l.k};
    }
  }

  CheckpointKind kind() const override { return CheckpointKind::HuggingFace; }
  bool contains(const std::string& name) const override { return shapes_.count(name) > 0; }
  double bits_per_weight() const override { return 16; }
  std::string config_json() const override { return config_to_json(config_); }

  std::vector<TensorInfo> list() const override {
    std::vector<TensorInfo> out;
    for (const auto& [name, shape] : shapes_)
      out.push_back({name, "BF16", shape, 2 * engine::numel_of(shape)});
    return out;
  }

  std::vector<float> load(const std::string& name, const Shape& shape) const override {
    const auto found = shapes_.find(name);
    BBB_CHECK(found != shapes_.end() && found->second == shape, path_, ": holds no tensor '", name,
              "' of shape ", engine::to_string(shape));
    std::vector<float> values(static_cast<size_t>(engine::numel_of(shape)), 1.0f);
    if (shape.size() == 1) return values;  // a norm
    const uint64_t name_seed =
        data::checksum64(name.data(), static_cast<int64_t>(name.size())) ^ seed_;
    fill_random(values, name_seed, 1 / std::sqrt(static_cast<double>(shape.back())));
    return values;
  }

 private:
  uint64_t seed_;
  std::map<std::string, Shape> shapes_;
};

}  // namespace

std::unique_ptr<Checkpoint> make_synthetic_checkpoint(LlamaConfig config, std::string path,
                                                      uint64_t seed) {
  return std::make_unique<SyntheticCheckpoint>(std::move(config), std::move(path), seed);
}

}  // namespace bbb::models
