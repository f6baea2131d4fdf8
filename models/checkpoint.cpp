#include "models/checkpoint.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>

#include "data/files.h"
#include "data/half.h"
#include "data/json.h"
#include "data/tokenizer.h"
#include "models/synthetic_checkpoint.h"
#include "quant/check.h"

namespace bbb::models {
namespace {

namespace fs = std::filesystem;
using data::FileDType;
using data::printable;
using data::SafeTensor;
using engine::Shape;
using nlohmann::json;

struct Expected {
  std::string name;
  Shape shape;
};

struct Linear {
  std::string name;  // without ".weight"
  int64_t n;
  int64_t k;
};

std::vector<Linear> all_linears(const LlamaConfig& config) {
  std::vector<Linear> out;
  for (int64_t layer = 0; layer < config.layers; ++layer)
    for (const LinearShape& l : block_linears(config))
      out.push_back({layer_name(layer, l.name), l.n, l.k});
  return out;
}

std::vector<Expected> expected_norms(const LlamaConfig& config) {
  std::vector<Expected> out;
  for (int64_t layer = 0; layer < config.layers; ++layer)
    for (const char* norm : {kInputNorm, kPostNorm})
      out.push_back({layer_name(layer, norm), {config.d_model}});
  out.push_back({kFinalNorm, {config.d_model}});
  return out;
}

// The embedding and, unless tied, the head.
std::vector<Expected> expected_tables(const LlamaConfig& config) {
  std::vector<Expected> out = {{kEmbedding, {config.vocab, config.d_model}}};
  if (!config.tied_head) out.push_back({kHead, {config.vocab, config.d_model}});
  return out;
}

// Every full-precision tensor of a model.
std::vector<Expected> expected_all(const LlamaConfig& config) {
  std::vector<Expected> out = expected_tables(config);
  for (Expected& e : expected_norms(config)) out.push_back(std::move(e));
  for (const Linear& l : all_linears(config)) out.push_back({l.name + ".weight", {l.n, l.k}});
  return out;
}

bool is_float(FileDType d) {
  return d == FileDType::F64 || d == FileDType::F32 || d == FileDType::F16 || d == FileDType::BF16;
}

std::string join(const std::string& directory, const char* name) {
  return (fs::path(directory) / name).string();
}

void check_shape(const Shape& found, const Shape& wanted, const std::string& name,
                 const std::string& path) {
  BBB_CHECK(found == wanted, path, ": tensor '", printable(name), "' has shape ",
            engine::to_string(found), ", the model needs ", engine::to_string(wanted));
}

// Do two tensors of one shape, perhaps of different types, hold the same values?
bool equal_weights(const SafeTensor& a, const SafeTensor& b) {
  if (a.dtype == b.dtype && std::memcmp(a.data, b.data, static_cast<size_t>(a.bytes)) == 0)
    return true;
  const int64_t rows = a.shape[0];
  const auto row_of = [&](const SafeTensor& t, int64_t row) {
    const SafeTensor one = {t.dtype, {t.shape[1]}, t.data + row * (t.bytes / rows), t.bytes / rows};
    std::vector<float> values(static_cast<size_t>(one.numel()));
    data::to_float(values.data(), one, "");
    return values;
  };
  for (int64_t row = 0; row < rows; ++row)
    if (row_of(a, row) != row_of(b, row)) return false;
  return true;
}

// The bytes of a tensor in a mapped file.
template <typename T>
data::Bytes bytes_of(const T& tensor) {
  return {tensor.data, static_cast<size_t>(tensor.bytes)};
}

// The base of both kinds of directory.
class DirectoryCheckpoint : public Checkpoint {
 public:
  DirectoryCheckpoint(const std::string& path, std::string config_text)
      : tensors_(path), config_text_(std::move(config_text)) {
    path_ = path;
    config_ = config_from_json(config_text_, join(path, "config.json"));
    if (config_.tied_head && tensors_.contains(kHead)) untie_head();
  }

  std::vector<TensorInfo> list() const override {
    std::vector<TensorInfo> out;
    for (const auto& [name, t] : tensors_.tensors())
      out.push_back({name, name_of(t.dtype), t.shape, t.bytes, bytes_of(t)});
    return out;
  }

  std::vector<float> load(const std::string& name, const Shape& shape) const override {
    const SafeTensor& t = tensors_.at(name);
    check_shape(t.shape, shape, name, path_);
    std::vector<float> out(static_cast<size_t>(t.numel()));
    data::to_float(out.data(), t, name);
    return out;
  }

  std::string config_json() const override { return config_text_; }
  std::string generation_config_json() const override {
    const std::string file = join(path_, "generation_config.json");
    std::error_code error;
    return fs::exists(file, error) ? data::read_file(file) : "";
  }

 protected:
  const SafeTensor& check_float(const std::string& name, const Shape& shape) const {
    const SafeTensor& t = tensors_.at(name);
    check_shape(t.shape, shape, name, path_);
    BBB_CHECK(is_float(t.dtype), path_, ": tensor '", printable(name), "' is ", name_of(t.dtype),
              ", not a floating-point weight");
    return t;
  }
  const SafeTensor& check_exact(const std::string& name, const Shape& shape,
                                FileDType dtype) const {
    const SafeTensor& t = tensors_.at(name);
    check_shape(t.shape, shape, name, path_);
    BBB_CHECK(t.dtype == dtype, path_, ": tensor '", printable(name), "' is ", name_of(t.dtype),
              ", not ", name_of(dtype));
    return t;
  }

  // Checks the tensors with these names.
  void check_finite(const std::vector<std::string>& names) const {
    std::vector<data::RawWeight> weights;
    for (const std::string& name : names) weights.push_back(raw_weight(tensors_.at(name), name));
    data::check_finite(weights, path_);
  }

  data::SafeTensors tensors_;
  std::string config_text_;

 private:
  // As in transformers 5: a head in the file that differs from the embedding is used.
  void untie_head() {
    const Shape shape = {config_.vocab, config_.d_model};
    const SafeTensor &head = check_float(kHead, shape), &table = check_float(kEmbedding, shape);
    if (equal_weights(head, table)) return;
    config_.tied_head = false;
    std::fprintf(stderr,
                 "%s: config.json ties the head to the embedding, but the file's %s differs from "
                 "it and is used\n",
                 path_.c_str(), kHead);
  }
};

class HuggingFaceCheckpoint final : public DirectoryCheckpoint {
 public:
  HuggingFaceCheckpoint(const std::string& path, std::string config_text)
      : DirectoryCheckpoint(path, std::move(config_text)) {
    std::set<std::string> known;
    for (const Expected& e : expected_all(config_)) {
      check_float(e.name, e.shape);
      known.insert(e.name);
    }
    for (const auto& [name, t] : tensors_.tensors()) {
      // The file may hold a tied head; old checkpoints hold the rope's table.
      const bool ignored = name == kHead || name.ends_with(".rotary_emb.inv_freq");
      BBB_CHECK(known.count(name) || ignored, path_, ": tensor '", printable(name),
                "' is no part of a ", config_.model_type, " model");
    }
  }

  CheckpointKind kind() const override { return CheckpointKind::HuggingFace; }
  void check_finite() const override {
    std::vector<std::string> names;
    for (const Expected& e : expected_all(config_)) names.push_back(e.name);
    DirectoryCheckpoint::check_finite(names);
  }

  double bits_per_weight() const override {
    int64_t bytes = 0;
    for (const Linear& l : all_linears(config_)) bytes += tensors_.at(l.name + ".weight").bytes;
    return 8.0 * static_cast<double>(bytes) / static_cast<double>(config_.linear_parameters());
  }
};

class PackedCheckpoint final : public DirectoryCheckpoint {
 public:
  PackedCheckpoint(const std::string& path, std::string config_text, const json& quantization)
      : DirectoryCheckpoint(path, std::move(config_text)) {
    read_quantization(quantization);
    std::set<std::string> known;
    if (config_.tied_head && tensors_.contains(kHead)) known.insert(kHead);
    for (const Expected& e : expected_norms(config_)) {
      check_exact(e.name, e.shape, FileDType::F32);
      known.insert(e.name);
    }
    for (const Expected& e : expected_tables(config_)) {
      check_exact(e.name, e.shape, FileDType::BF16);
      known.insert(e.name);
    }
    for (const Linear& l : all_linears(config_)) {
      const auto format = packed_format(l.name, l.n, l.k);
      if (!format) {
        linear_bytes_ += check_float(l.name + ".weight", {l.n, l.k}).bytes;
        known.insert(l.name + ".weight");
        continue;
      }
      linear_bytes_ += format->bytes();
      for (const quant::StoredTensor& t : format->tensors()) known.insert(l.name + t.suffix);
    }
    for (const auto& [name, t] : tensors_.tensors()) {
      BBB_CHECK(!name.ends_with(".split_channels") && !name.ends_with(".outlier_channels"), path_,
                ": tensor '", printable(name), "': split and outlier channels are not supported");
      BBB_CHECK(known.count(name), path_, ": tensor '", printable(name), "' is one too many");
    }
  }

  CheckpointKind kind() const override { return CheckpointKind::Packed; }
  void check_finite() const override {
    std::vector<std::string> names;
    for (const Expected& e : expected_tables(config_)) names.push_back(e.name);
    for (const Expected& e : expected_norms(config_)) names.push_back(e.name);
    for (const Linear& l : all_linears(config_)) {
      const auto format = packed_format(l.name, l.n, l.k);
      if (!format) names.push_back(l.name + ".weight");
      for (const quant::StoredTensor& t :
           format ? format->tensors() : std::vector<quant::StoredTensor>())
        if (t.dtype != FileDType::U8) names.push_back(l.name + t.suffix);
    }
    DirectoryCheckpoint::check_finite(names);
  }
  std::optional<quant::LinearFormat> packed_format(const std::string& linear, int64_t n,
                                                   int64_t k) const override {
    const quant::LinearFormat format{.n = n, .k = k, .weight = grid_};
    const std::vector<quant::StoredTensor> tensors = format.tensors();
    if (unconverted_.count(linear) && !tensors_.contains(linear + tensors[0].suffix))
      return std::nullopt;
    for (const quant::StoredTensor& t : tensors) {
      const std::string name = linear + t.suffix;
      const SafeTensor& found = check_exact(name, t.shape, t.dtype);
      if (t.part != quant::StoredPart::MasterScale) continue;
      const float s = data::load_as<float>(found.data);
      int exponent;
      BBB_CHECK(std::isfinite(s) && std::frexp(s, &exponent) == 0.5f, path_, ": tensor '", name,
                "' holds ", s, ", not a power of two");
    }
    return format;
  }
  const uint8_t* stored(const std::string& name) const override { return tensors_.at(name).data; }

  double bits_per_weight() const override {
    return 8.0 * static_cast<double>(linear_bytes_) /
           static_cast<double>(config_.linear_parameters());
  }

 private:
  // Accepts only values that this reader implements. An unknown key is refused: it may change the
  // meaning of the tensors.
  void read_quantization(const json& q) {
    const std::string where = join(path_, "config.json") + ": quantization_config";
    const auto choose = [&](const char* key, std::initializer_list<json> allowed, bool required) {
      const auto found = q.find(key);
      BBB_CHECK(found != q.end() || !required, where, ": '", key, "' is missing");
      if (found == q.end()) return *allowed.begin();
      for (const json& value : allowed)
        if (*found == value) return value;
      std::string text = found->dump(-1, ' ', true);
      throw Error(cat(where, ": unsupported ", key, " ", printable(text)));
    };
    choose("quant_method", {"bbb"}, true);
    choose("format_version", {1}, true);
    choose("scale_dtype", {"float8_e4m3fn"}, true);
    choose("symmetric", {false}, false);
    choose("nested", {false}, false);
    choose("activation_bits", {16}, false);
    choose("overrides", {json::object(), nullptr}, false);
    choose("rotate", {nullptr}, false);
    grid_.bits = choose("bits", {2, 3, 4, 8}, true).get<int>();
    grid_.group = choose("group_size", {32, 64, 128}, true).get<int>();

    std::set<std::string> convertible = {"lm_head", "model.embed_tokens"};
    for (const Linear& l : all_linears(config_)) convertible.insert(l.name);
    if (const auto skipped = q.find("modules_to_not_convert"); skipped != q.end()) {
      BBB_CHECK(skipped->is_array(), where, ": modules_to_not_convert is not an array");
      for (const json& name : *skipped) {
        BBB_CHECK(name.is_string() && convertible.count(name.get<std::string>()), where,
                  ": modules_to_not_convert holds ", printable(name.dump(-1, ' ', true)),
                  ", which the model does not have");
        unconverted_.insert(name.get<std::string>());
      }
    }
    static const std::set<std::string> kKnown = {
        "quant_method",          "format_version", "scale_dtype", "symmetric", "nested",
        "activation_bits",       "overrides",      "rotate",      "bits",      "group_size",
        "modules_to_not_convert"};
    for (const auto& [key, value] : q.items())
      BBB_CHECK(kKnown.count(key), where, ": unknown key '", printable(key), "'");
  }

  quant::WeightGrid grid_;
  std::set<std::string> unconverted_;
  int64_t linear_bytes_ = 0;
};

// The GGUF name of a Hugging Face tensor; "" if it has none.
std::string gguf_name(const std::string& name) {
  if (name == kEmbedding) return "token_embd.weight";
  if (name == kFinalNorm) return "output_norm.weight";
  if (name == kHead) return "output.weight";
  static const std::map<std::string, std::string> kInBlock = {
      {kInputNorm, "attn_norm.weight"},
      {kPostNorm, "ffn_norm.weight"},
      {"self_attn.q_proj.weight", "attn_q.weight"},
      {"self_attn.k_proj.weight", "attn_k.weight"},
      {"self_attn.v_proj.weight", "attn_v.weight"},
      {"self_attn.o_proj.weight", "attn_output.weight"},
      {"mlp.gate_proj.weight", "ffn_gate.weight"},
      {"mlp.up_proj.weight", "ffn_up.weight"},
      {"mlp.down_proj.weight", "ffn_down.weight"}};
  const std::string prefix = "model.layers.";
  const size_t dot = name.find('.', prefix.size());
  if (!name.starts_with(prefix) || dot == std::string::npos) return "";
  const auto found = kInBlock.find(name.substr(dot + 1));
  if (found == kInBlock.end()) return "";
  return cat("blk.", name.substr(prefix.size(), dot - prefix.size()), ".", found->second);
}

class GgufCheckpoint final : public Checkpoint {
 public:
  explicit GgufCheckpoint(const std::string& path) : gguf_(path) {
    path_ = path;
    config_ = config_from_gguf(gguf_);
    std::set<std::string> known = {"rope_freqs.weight"};
    for (int64_t i = 0; i < config_.layers; ++i)  // old files hold the rope's table
      known.insert(cat("blk.", i, ".attn_rot_embd.weight"));
    for (const Expected& e : expected_all(config_)) {
      const std::string name = gguf_name(e.name);
      check_shape(gguf_.tensor(name).shape, e.shape, name, path_);
      known.insert(name);
    }
    for (const auto& [name, t] : gguf_.tensors())
      BBB_CHECK(known.count(name), path_, ": tensor '", printable(name),
                "' is no part of a llama model");
  }

  CheckpointKind kind() const override { return CheckpointKind::Gguf; }
  void check_finite() const override {
    std::vector<data::RawWeight> weights;
    for (const Expected& e : expected_all(config_)) {
      const std::string name = gguf_name(e.name);
      weights.push_back(raw_weight(gguf_.tensor(name), name));
    }
    data::check_finite(weights, path_);
  }

  std::vector<TensorInfo> list() const override {
    std::vector<TensorInfo> out;
    for (const auto& [name, t] : gguf_.tensors())
      out.push_back({name, data::gguf_type_name(t.type), t.shape, t.bytes, bytes_of(t)});
    return out;
  }

  std::vector<float> load(const std::string& name, const Shape& shape) const override {
    const std::string stored = gguf_name(name);
    BBB_CHECK(!stored.empty(), path_, ": tensor '", printable(name), "' is missing");
    const data::GgufTensor& t = gguf_.tensor(stored);
    check_shape(t.shape, shape, stored, path_);
    std::vector<float> out(static_cast<size_t>(t.numel()));
    if (name.ends_with(".q_proj.weight") || name.ends_with(".k_proj.weight"))
      load_unpermuted(out.data(), t, stored);
    else
      data::gguf_dequantize(out.data(), t, stored);
    return out;
  }

  double bits_per_weight() const override {
    int64_t bytes = 0;
    for (const Linear& l : all_linears(config_))
      bytes += gguf_.tensor(gguf_name(l.name + ".weight")).bytes;
    return 8.0 * static_cast<double>(bytes) / static_cast<double>(config_.linear_parameters());
  }
  std::string config_json() const override { return config_to_json(config_); }

 private:
  // Hugging Face rotates the pair (j, j + d/2) of a head, llama.cpp the neighbours (2j, 2j + 1).
  // llama.cpp stores the rows of Q and K in that order: stored row 2j + p is row p d/2 + j.
  void load_unpermuted(float* out, const data::GgufTensor& t, const std::string& name) const {
    const int64_t rows = t.shape[0], k = t.shape[1], d = config_.head_dim;
    const int64_t row_bytes = t.bytes / rows;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t head = row / d, p = row % d / (d / 2), j = row % (d / 2);
      const int64_t stored = head * d + 2 * j + p;
      const data::GgufTensor one = {t.type, {1, k}, t.data + stored * row_bytes, row_bytes};
      data::gguf_dequantize(out + row * k, one, name);
    }
  }

  data::Gguf gguf_;
};

std::unique_ptr<Checkpoint> open_directory(const std::string& path) {
  const std::string config_path = join(path, "config.json");
  std::error_code error;
  BBB_CHECK(fs::exists(config_path, error), path, ": no config.json: not a model directory");
  std::string text = data::read_file(config_path);
  const json config = data::parse_json(text, config_path);
  BBB_CHECK(config.is_object(), config_path, ": not a JSON object");
  const auto quantization = config.find("quantization_config");
  if (quantization == config.end() || quantization->is_null())
    return std::make_unique<HuggingFaceCheckpoint>(path, std::move(text));
  BBB_CHECK(quantization->is_object(), config_path, ": 'quantization_config' is not an object");
  return std::make_unique<PackedCheckpoint>(path, std::move(text), *quantization);
}

}  // namespace

const uint8_t* Checkpoint::stored(const std::string& name) const {
  throw Error(cat(path_, ": '", printable(name), "' is not packed"));
}

std::vector<int32_t> Checkpoint::stop_ids() const {
  std::vector<int64_t> ids = config_.eos_ids;
  if (const std::string text = generation_config_json(); !text.empty()) {
    const std::string where = join(path_, "generation_config.json");
    for (const int64_t id : eos_ids_from_json(text, where)) ids.push_back(id);
  }
  std::vector<int32_t> out;
  for (const int64_t id : ids)
    if (id < config_.vocab && std::find(out.begin(), out.end(), id) == out.end())
      out.push_back(static_cast<int32_t>(id));
  return out;
}

std::unique_ptr<Checkpoint> open_checkpoint(const std::string& path) {
  if (path.starts_with(data::kSyntheticPrefix)) {
    const std::string name = path.substr(data::kSyntheticPrefix.size());
    return make_synthetic_checkpoint(synthetic_config(name), path);
  }
  std::error_code error;
  BBB_CHECK(fs::exists(path, error), path, ": no such file or directory");
  if (fs::is_directory(path, error)) return open_directory(path);
  return std::make_unique<GgufCheckpoint>(path);
}

}  // namespace bbb::models
