#include "models/synthetic_checkpoint.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <thread>
#include <utility>

#include "engine/rng.h"
#include "quant/check.h"

namespace bbb::models {
namespace {

using engine::Shape;

constexpr int64_t kChunk = int64_t{1} << 20;  // values per task; each task has its own seed

// An integer hash whose every output bit depends on every input bit ("lowbias32", C. Wellons,
// "Prospecting for Hash Functions", 2018).
uint32_t hash32(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

// Sums of four 16-bit uniforms: close enough to normal. A value depends only on its index, so that
// the loop vectorizes.
void fill_chunk(float* values, int64_t count, uint64_t seed, float scale) {
  const uint64_t key = engine::Rng(seed).next();
  const auto low = static_cast<uint32_t>(key), high = static_cast<uint32_t>(key >> 32);
  constexpr int32_t kMean = 2 * 65535;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t u = hash32(static_cast<uint32_t>(i) + low),
                   v = hash32(static_cast<uint32_t>(i) ^ high);
    const auto sum = static_cast<int32_t>((u & 0xFFFF) + (u >> 16) + (v & 0xFFFF) + (v >> 16));
    const float drawn = scale * static_cast<float>(sum - kMean);
    values[i] = std::bit_cast<float>(std::bit_cast<uint32_t>(drawn) & 0xFFFF0000u);
  }
}

void fill_random(std::vector<float>& values, uint64_t seed, double deviation) {
  // A uniform of 2^16 steps has the variance 2^32 / 12; four of them 2^32 / 3.
  const float scale = static_cast<float>(deviation * std::sqrt(3.0) / 65536.0);
  const auto size = static_cast<int64_t>(values.size());
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t begin; (begin = next.fetch_add(kChunk)) < size;)
      fill_chunk(values.data() + begin, std::min(kChunk, size - begin),
                 seed + static_cast<uint64_t>(begin), scale);
  };
  std::vector<std::jthread> helpers;
  const int64_t cores = std::max(1u, std::thread::hardware_concurrency());
  for (int64_t i = 1; i < std::min(cores, (size + kChunk - 1) / kChunk); ++i)
    helpers.emplace_back(work);
  work();
}

class SyntheticCheckpoint final : public Checkpoint {
 public:
  SyntheticCheckpoint(LlamaConfig config, std::string path, uint64_t seed) {
    config_ = std::move(config);
    path_ = std::move(path);
    const Shape table{config_.vocab, config_.d_model}, norm{config_.d_model};
    shapes_["model.embed_tokens.weight"] = table;
    if (!config_.tied_head) shapes_["lm_head.weight"] = table;
    shapes_["model.norm.weight"] = norm;
    for (int64_t layer = 0; layer < config_.layers; ++layer) {
      for (const NormShape& shape : block_norms(config_))
        shapes_[layer_name(layer, shape.name)] = {shape.size};
      for (const LinearShape& l : block_linears(config_)) {
        shapes_[layer_name(layer, l.name) + ".weight"] = {l.n, l.k};
        if (l.bias) shapes_[layer_name(layer, l.name) + ".bias"] = {l.n};
      }
    }
    for (const auto& [name, shape] : shapes_)
      seeds_[name] = engine::seed_from(name.data(), name.size()) ^ seed;
  }

  CheckpointKind kind() const override { return CheckpointKind::HuggingFace; }
  void check_finite() const override {}  // drawn values are finite
  double bits_per_weight() const override { return 16; }
  int64_t table_bytes() const override { return 2 * table_weights(); }
  std::string config_json() const override { return config_to_json(config_); }

  std::vector<TensorInfo> list() const override {
    std::vector<TensorInfo> out;
    for (const auto& [name, shape] : shapes_)
      out.push_back(
          {name, "BF16", shape, 2 * engine::numel_of(shape),
           data::Bytes(reinterpret_cast<const uint8_t*>(&seeds_.at(name)), sizeof(uint64_t))});
    return out;
  }

  std::vector<float> load(const std::string& name, const Shape& shape) const override {
    const auto found = shapes_.find(name);
    BBB_CHECK(found != shapes_.end() && found->second == shape, path_, ": holds no tensor '", name,
              "' of shape ", engine::to_string(shape));
    const float constant = name.ends_with(".bias") ? 0.0f : 1.0f;  // of a norm
    std::vector<float> values(static_cast<size_t>(engine::numel_of(shape)), constant);
    if (shape.size() == 1) return values;
    fill_random(values, seeds_.at(name), 1 / std::sqrt(static_cast<double>(shape.back())));
    return values;
  }

 private:
  std::map<std::string, Shape> shapes_;
  std::map<std::string, uint64_t> seeds_;
};

class WeightlessCheckpoint final : public Checkpoint {
 public:
  explicit WeightlessCheckpoint(LlamaConfig config) { config_ = std::move(config); }

  CheckpointKind kind() const override { return CheckpointKind::HuggingFace; }
  void check_finite() const override {}
  double bits_per_weight() const override { return 16; }
  int64_t table_bytes() const override { return 2 * table_weights(); }
  std::string config_json() const override { return config_to_json(config_); }
  std::vector<TensorInfo> list() const override { return {}; }
  std::vector<float> load(const std::string&, const Shape&) const override { return {}; }
};

}  // namespace

std::unique_ptr<Checkpoint> make_synthetic_checkpoint(LlamaConfig config, std::string path,
                                                      uint64_t seed) {
  return std::make_unique<SyntheticCheckpoint>(std::move(config), std::move(path), seed);
}

std::unique_ptr<Checkpoint> make_weightless_checkpoint(LlamaConfig config) {
  return std::make_unique<WeightlessCheckpoint>(std::move(config));
}

}  // namespace bbb::models
