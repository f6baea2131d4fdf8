#include "models/checkpoint.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "data/files.h"
#include "data/half.h"
#include "data/json.h"
#include "data/model_path.h"
#include "data/tokenizer.h"
#include "models/synthetic_checkpoint.h"
#include "quant/check.h"
#include "quant/e4m3.h"
#include "quant/lc.h"

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
  bool bias;
};

std::vector<Linear> all_linears(const LlamaConfig& config) {
  std::vector<Linear> out;
  for (int64_t layer = 0; layer < config.layers; ++layer)
    for (const LinearShape& l : block_linears(config))
      out.push_back({layer_name(layer, l.name), l.n, l.k, l.bias});
  return out;
}

std::vector<Expected> expected_norms(const LlamaConfig& config) {
  std::vector<Expected> out;
  for (int64_t layer = 0; layer < config.layers; ++layer)
    for (const NormShape& norm : block_norms(config))
      out.push_back({layer_name(layer, norm.name), {norm.size}});
  out.push_back({kFinalNorm, {config.d_model}});
  return out;
}

std::vector<Expected> expected_biases(const LlamaConfig& config) {
  std::vector<Expected> out;
  for (const Linear& l : all_linears(config))
    if (l.bias) out.push_back({l.name + ".bias", {l.n}});
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
  for (Expected& e : expected_biases(config)) out.push_back(std::move(e));
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
    if (!fs::exists(file, error)) return "";
    const std::string text = data::read_file(file);
    BBB_CHECK(!text.empty(), file, ": is empty");
    return text;
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
  int64_t table_bytes() const override {
    int64_t bytes = 0;
    for (const Expected& e : expected_tables(config_)) bytes += tensors_.at(e.name).bytes;
    return bytes;
  }
};

// The settings of quantization_config that a linear may have of its own.
struct LinearSettings {
  int bits = 2;
  quant::InputGrid input;
  quant::SplitSide side = quant::SplitSide::Weight;
};

class PackedCheckpoint final : public DirectoryCheckpoint {
 public:
  PackedCheckpoint(const std::string& path, std::string config_text, const json& quantization,
                   int load_bits)
      : DirectoryCheckpoint(path, std::move(config_text)) {
    read_quantization(quantization, load_bits);
    std::set<std::string> known;
    if (config_.tied_head && tensors_.contains(kHead)) known.insert(kHead);
    for (const Expected& e : expected_norms(config_)) {
      check_exact(e.name, e.shape, FileDType::F32);
      known.insert(e.name);
    }
    for (const Expected& e : expected_tables(config_)) {
      const std::string module = table_module(e.name);
      const std::optional<quant::LinearFormat> format = read_table_format(module);
      formats_[module] = format;
      if (!format) {
        table_bytes_ += check_exact(e.name, e.shape, FileDType::BF16).bytes;
        known.insert(e.name);
        continue;
      }
      table_bytes_ += format->bytes();
      for (const quant::StoredTensor& t : format->tensors()) known.insert(module + t.suffix);
    }
    for (const Expected& e : expected_biases(config_)) {
      check_float(e.name, e.shape);
      known.insert(e.name);
    }
    for (const Linear& l : all_linears(config_)) {
      const std::optional<quant::LinearFormat> format = read_format(l);
      formats_[l.name] = format;
      if (!format) {
        linear_bytes_ += check_float(l.name + ".weight", {l.n, l.k}).bytes;
        known.insert(l.name + ".weight");
        continue;
      }
      for (const quant::StoredTensor& t : format->loaded_tensors()) linear_bytes_ += t.bytes();
      for (const quant::StoredTensor& t : format->tensors()) known.insert(l.name + t.suffix);
    }
    check_sites();
    for (const auto& [name, t] : tensors_.tensors())
      BBB_CHECK(known.count(name), path_, ": tensor '", printable(name), "' is one too many");
  }

  CheckpointKind kind() const override { return CheckpointKind::Packed; }
  void check_finite() const override {
    std::vector<std::string> names;
    for (const Expected& e : expected_norms(config_)) names.push_back(e.name);
    for (const Expected& e : expected_biases(config_)) names.push_back(e.name);
    for (const auto& [linear, format] : formats_) {
      if (!format) names.push_back(linear + ".weight");
      for (const quant::StoredTensor& t :
           format ? format->tensors() : std::vector<quant::StoredTensor>())
        if (t.dtype != FileDType::U8 && t.dtype != FileDType::I32)
          names.push_back(linear + t.suffix);
    }
    DirectoryCheckpoint::check_finite(names);
    for (const auto& [linear, format] : formats_)
      if (format && !format->is_lc()) check_signs(linear + ".scales");
  }
  std::optional<quant::LinearFormat> packed_format(const std::string& linear, int64_t,
                                                   int64_t) const override {
    return formats_.at(linear);
  }
  int64_t table_bytes() const override { return table_bytes_; }
  const uint8_t* stored(const std::string& name) const override { return tensors_.at(name).data; }

  double bits_per_weight() const override {
    return 8.0 * static_cast<double>(linear_bytes_) /
           static_cast<double>(config_.linear_parameters());
  }

 private:
  // The scales of groups have no sign.
  void check_signs(const std::string& name) const {
    const SafeTensor& t = tensors_.at(name);
    const int64_t groups = t.shape[1];
    for (int64_t row = 0; row < t.shape[0]; ++row) {
      const uint8_t* const codes = t.data + row * groups;
      uint8_t any = 0;
      for (int64_t g = 0; g < groups; ++g) any |= codes[g];
      if (any < 0x80) continue;
      const int64_t g =
          std::find_if(codes, codes + groups, [](int c) { return c >= 0x80; }) - codes;
      throw Error(cat(path_, ": ", printable(name), "[", row, ", ", g, "] is ",
                      quant::e4m3_decode(codes[g]), ": a scale has no sign"));
    }
  }

  std::vector<int32_t> channels(const std::string& name) const {
    if (!tensors_.contains(name)) return {};
    const SafeTensor& t = tensors_.at(name);
    BBB_CHECK(t.dtype == FileDType::I32 && t.shape.size() == 1, path_, ": tensor '", name, "' is ",
              name_of(t.dtype), " ", engine::to_string(t.shape), ", not a list of I32 channels");
    std::vector<int32_t> list(static_cast<size_t>(t.numel()));
    std::memcpy(list.data(), t.data, static_cast<size_t>(t.bytes));
    return list;
  }

  // The format of a linear, after checking its tensors; nullopt if it is stored in full precision.
  std::optional<quant::LinearFormat> read_format(const Linear& l) const {
    if (unconverted_.count(l.name) && !tensors_.contains(l.name + quant::kCodesSuffix))
      return std::nullopt;
    const auto own = overrides_.find(l.name);
    const LinearSettings& settings = own == overrides_.end() ? settings_ : own->second;
    quant::LinearFormat format{.n = l.n, .k = l.k, .weight = grid_, .input = settings.input};
    if (grid_.levels == quant::Levels::Lc) {
      BBB_CHECK(quant::lc_block(l.n) > 0 && quant::lc_block(l.k) > 0, path_, ": linear '", l.name,
                "' of ", l.n, " x ", l.k, " features, which LC does not transform");
      check_tensors(l.name, format);
      return format;
    }
    if (!grid_.nested) format.weight.bits = settings.bits;
    BBB_CHECK(!format.is_symmetric() || format.weight.bits <= 4, path_, ": linear '", l.name,
              "' has symmetric codes of ", format.weight.bits, " bits, not 2, 3 or 4");
    if (format.input.bits == 16) format.input.range = quant::RangeRule::MinMax;  // has none
    const std::vector<int32_t> outliers = channels(l.name + ".outlier_channels"),
                               split = channels(l.name + ".split_channels");
    format.input.outliers = static_cast<int>(outliers.size());
    try {
      if (!outliers.empty() || !split.empty() || l.k % grid_.group != 0)
        format.order =
            std::make_shared<quant::ChannelOrder>(l.k, grid_.group, outliers, split, settings.side);
    } catch (const Error& error) {
      throw Error(cat(path_, ": linear '", l.name, "': ", error.what()));
    }
    check_tensors(l.name, format);
    return format;
  }

  // The same of embedding or head.
  std::optional<quant::LinearFormat> read_table_format(const std::string& module) const {
    if (!tensors_.contains(module + quant::kCodesSuffix)) return std::nullopt;
    BBB_CHECK(!unconverted_.count(module), path_, ": '", module,
              "' is quantized, but modules_to_not_convert holds it");
    const auto own = overrides_.find(module);
    const int bits = own == overrides_.end() ? settings_.bits : own->second.bits;
    BBB_CHECK(bits == 4 || bits == 8, path_, ": '", module, "' has ", bits, " bits, not 4 or 8");
    const quant::LinearFormat format = table_format(config_, bits);
    check_tensors(module, format);
    return format;
  }

  void check_tensors(const std::string& linear, const quant::LinearFormat& format) const {
    for (const quant::StoredTensor& t : format.tensors()) {
      const std::string name = linear + t.suffix;
      const SafeTensor& found = check_exact(name, t.shape, t.dtype);
      if (t.part != quant::StoredPart::MasterScale) continue;
      const float s = data::load_as<float>(found.data);
      int exponent;
      BBB_CHECK(std::isfinite(s) && std::frexp(s, &exponent) == 0.5f, path_, ": tensor '", name,
                "' holds ", s, ", not a power of two");
    }
  }

  // Do both tensors exist with the same bytes, or neither?
  bool same_content(const std::string& a, const std::string& b) const {
    if (!tensors_.contains(a) || !tensors_.contains(b))
      return tensors_.contains(a) == tensors_.contains(b);
    const SafeTensor &x = tensors_.at(a), &y = tensors_.at(b);
    return x.bytes == y.bytes && std::memcmp(x.data, y.data, static_cast<size_t>(x.bytes)) == 0;
  }

  // Linears of one input site share their operand.
  void check_sites() const {
    for (int64_t layer = 0; layer < config_.layers; ++layer) {
      const std::vector<LinearShape> shapes = block_linears(config_);
      for (size_t i = 1; i < shapes.size(); ++i) {
        if (shapes[i].site != shapes[i - 1].site) continue;
        const std::string name = layer_name(layer, shapes[i].name),
                          before = layer_name(layer, shapes[i - 1].name);
        const auto operand = [&](const std::string& linear) {
          quant::LinearFormat format =
              formats_.at(linear).value_or(quant::LinearFormat{.k = shapes[i].k});
          format.n = 0;
          format.weight = {.group = format.weight.group};
          return format;
        };
        const quant::LinearFormat a = operand(before), b = operand(name);
        BBB_CHECK(a == b || (a.exact_input() && b.exact_input()), path_, ": ", before, " and ",
                  name, " read one input, but their channel orders or activations differ");
        if (grid_.levels == quant::Levels::Lc)
          for (const char* suffix : {".u", ".map"})
            BBB_CHECK(same_content(before + suffix, name + suffix), path_, ": ", before, " and ",
                      name, " read one input, but their ", suffix + 1, " differs");
      }
    }
  }

  // Accepts only values that this reader implements. An unknown key is refused: it may change the
  // meaning of the tensors.
  void read_quantization(const json& q, int load_bits) {
    const std::string where = join(path_, "config.json") + ": quantization_config";
    const auto choose = [&](const json& from, const std::string& in, const char* key,
                            std::initializer_list<json> allowed, bool required) {
      const auto found = from.find(key);
      BBB_CHECK(found != from.end() || !required, in, ": '", key, "' is missing");
      if (found == from.end()) return *allowed.begin();
      for (const json& value : allowed)
        if (*found == value) return value;
      std::string text = found->dump(-1, ' ', true);
      throw Error(cat(in, ": unsupported ", key, " ", printable(text)));
    };
    const bool lc = choose(q, where, "quant_method", {"bbb", "bbb-lc"}, true) == "bbb-lc";
    choose(q, where, "format_version", {1}, true);
    if (lc) {
      static const std::set<std::string> kOfLc = {"quant_method", "format_version", "bits",
                                                  "modules_to_not_convert", "overrides"};
      for (const auto& [key, value] : q.items())
        BBB_CHECK(kOfLc.count(key), where, ": unknown key '", printable(key), "' of bbb-lc");
      choose(q, where, "bits", {quant::kLcBits}, true);
      grid_.levels = quant::Levels::Lc;
    }
    choose(q, where, "scale_dtype", {"float8_e4m3fn"}, !lc);
    if (choose(q, where, "symmetric", {false, true}, false) == true)
      grid_.levels = quant::Levels::Seq;
    grid_.nested = choose(q, where, "nested", {false, true}, false) == true;
    grid_.dequant = choose(q, where, "nested_dequant", {"middle", "floor"}, false) == "middle"
                        ? quant::NestedDequant::Middle
                        : quant::NestedDequant::Floor;
    grid_.group = choose(q, where, "group_size", {32, 64, 128}, !lc).get<int>();
    settings_.bits = choose(q, where, "bits", {2, 3, 4, 8}, true).get<int>();
    grid_.bits = settings_.bits;
    BBB_CHECK(grid_.levels != quant::Levels::Seq || !grid_.nested, where,
              ": codes both nested and symmetric");
    if (grid_.nested)
      BBB_CHECK(settings_.bits == quant::kNestedBits, where, ": nested codes of ", settings_.bits,
                " bits");
    BBB_CHECK(load_bits == 0 || grid_.nested, path_,
              ": --bits reads fewer bits of a nested export (--any-precision), and this is none");
    if (load_bits > 0) grid_.bits = load_bits;
    // The keys of a linear, with the settings of the whole file as their defaults.
    const auto read_linear = [&](const json& from, const std::string& in, LinearSettings settings) {
      if (from.contains("activation_bits"))
        settings.input.bits =
            choose(from, in, "activation_bits", {16, 8, 4, 3, 2}, false).get<int>();
      if (from.contains("activation_range"))
        settings.input.range =
            choose(from, in, "activation_range", {"minmax", "search"}, false) == "search"
                ? quant::RangeRule::Search
                : quant::RangeRule::MinMax;
      if (from.contains("rotate"))
        settings.input.hadamard = choose(from, in, "rotate", {"group", nullptr}, false) == "group";
      return settings;
    };
    settings_ = read_linear(q, where, settings_);

    std::set<std::string> linears, tables;
    for (const Linear& l : all_linears(config_)) linears.insert(l.name);
    for (const Expected& e : expected_tables(config_)) tables.insert(table_module(e.name));
    if (const auto overrides = q.find("overrides"); overrides != q.end() && !overrides->is_null()) {
      BBB_CHECK(overrides->is_object(), where, ": overrides is not an object");
      static const std::set<std::string> kOwn = {"bits", "activation_bits", "activation_range",
                                                 "rotate", "split_side"};
      for (const auto& [name, own] : overrides->items()) {
        const std::string in = cat(where, ": overrides of '", printable(name), "'");
        const bool table = tables.count(name) > 0;
        BBB_CHECK((table || linears.count(name)) && own.is_object(), in,
                  ": no linear of the model");
        for (const auto& [key, value] : own.items())
          BBB_CHECK(table ? key == "bits" : !lc && kOwn.count(key) > 0, in, ": unknown key '",
                    printable(key), "'");
        LinearSettings settings = read_linear(own, in, settings_);
        if (own.contains("bits"))
          settings.bits = choose(own, in, "bits", {2, 3, 4, 8}, false).get<int>();
        BBB_CHECK(table || !grid_.nested || settings.bits == settings_.bits, in,
                  ": nested with own bits");
        settings.side = choose(own, in, "split_side", {"weight", "activation"}, false) == "weight"
                            ? quant::SplitSide::Weight
                            : quant::SplitSide::Activation;
        overrides_[name] = settings;
      }
    }
    std::set<std::string> convertible = {"lm_head", "model.embed_tokens"};
    convertible.insert(linears.begin(), linears.end());
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
        "quant_method",   "format_version",   "scale_dtype",           "symmetric", "nested",
        "nested_dequant", "overrides",        "activation_bits",       "rotate",    "bits",
        "group_size",     "activation_range", "modules_to_not_convert"};
    for (const auto& [key, value] : q.items())
      BBB_CHECK(kKnown.count(key), where, ": unknown key '", printable(key), "'");
  }

  quant::WeightGrid grid_;
  LinearSettings settings_;
  std::map<std::string, LinearSettings> overrides_;
  std::map<std::string, std::optional<quant::LinearFormat>> formats_;
  std::set<std::string> unconverted_;
  int64_t linear_bytes_ = 0, table_bytes_ = 0;
};

}  // namespace

std::string gguf_name(const std::string& name) {
  if (name == kEmbedding) return "token_embd.weight";
  if (name == kFinalNorm) return "output_norm.weight";
  if (name == kHead) return "output.weight";
  static const std::map<std::string, std::string> kInBlock = {
      {kInputNorm, "attn_norm.weight"},   {kPostNorm, "ffn_norm.weight"},
      {kQueryNorm, "attn_q_norm.weight"}, {kKeyNorm, "attn_k_norm.weight"},
      {"self_attn.q_proj", "attn_q"},     {"self_attn.k_proj", "attn_k"},
      {"self_attn.v_proj", "attn_v"},     {"self_attn.o_proj", "attn_output"},
      {"mlp.gate_proj", "ffn_gate"},      {"mlp.up_proj", "ffn_up"},
      {"mlp.down_proj", "ffn_down"}};
  const std::string prefix = "model.layers.";
  const size_t dot = name.find('.', prefix.size());
  if (!name.starts_with(prefix) || dot == std::string::npos) return "";
  const std::string block = cat("blk.", name.substr(prefix.size(), dot - prefix.size()), ".");
  const std::string suffix = name.substr(dot + 1);
  if (const auto found = kInBlock.find(suffix); found != kInBlock.end())
    return block + found->second;
  const size_t kind = suffix.rfind('.');  // of a linear: ".weight" or ".bias"
  const auto found = kInBlock.find(suffix.substr(0, kind));
  return found == kInBlock.end() ? "" : block + found->second + suffix.substr(kind);
}

bool has_gguf_rows(const LlamaConfig& config, const std::string& name) {
  const bool of_q_or_k =
      name.find(".q_proj.") != std::string::npos || name.find(".k_proj.") != std::string::npos;
  return of_q_or_k && gguf_architecture(config) == "llama";
}

int64_t gguf_row(int64_t row, int64_t head_dim) {
  const int64_t head = row / head_dim, p = row % head_dim / (head_dim / 2),
                j = row % (head_dim / 2);
  return head * head_dim + 2 * j + p;
}

namespace {

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
      BBB_CHECK(known.count(name), path_, ": tensor '", printable(name), "' is no part of a ",
                config_.model_type, " model");
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
    if (has_gguf_rows(config_, name))
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
  int64_t table_bytes() const override {
    int64_t bytes = 0;
    for (const Expected& e : expected_tables(config_))
      bytes += gguf_.tensor(gguf_name(e.name)).bytes;
    return bytes;
  }
  std::string config_json() const override { return config_to_json(config_); }

 private:
  void load_unpermuted(float* out, const data::GgufTensor& t, const std::string& name) const {
    const int64_t rows = t.shape[0], k = t.numel() / rows, row_bytes = t.bytes / rows;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t stored = gguf_row(row, config_.head_dim);
      const data::GgufTensor one = {t.type, {1, k}, t.data + stored * row_bytes, row_bytes};
      data::gguf_dequantize(out + row * k, one, name);
    }
  }

  data::Gguf gguf_;
};

std::unique_ptr<Checkpoint> open_directory(const std::string& path, int bits) {
  const std::string config_path = join(path, "config.json");
  BBB_CHECK(fs::exists(config_path), path, ": no config.json: not a model directory");
  std::string text = data::read_file(config_path);
  const json config = data::parse_json(text, config_path);
  BBB_CHECK(config.is_object(), config_path, ": not a JSON object");
  const auto quantization = config.find("quantization_config");
  if (quantization == config.end() || quantization->is_null())
    return std::make_unique<HuggingFaceCheckpoint>(path, std::move(text));
  BBB_CHECK(quantization->is_object(), config_path, ": 'quantization_config' is not an object");
  return std::make_unique<PackedCheckpoint>(path, std::move(text), *quantization, bits);
}

}  // namespace

const uint8_t* Checkpoint::stored(const std::string& name) const {
  throw Error(cat(path_, ": '", printable(name), "' is not packed"));
}

std::string table_module(const std::string& name) { return name.substr(0, name.rfind('.')); }

quant::LinearFormat table_format(const LlamaConfig& config, int bits) {
  BBB_ASSERT(bits == 4 || bits == 8);
  const quant::LinearFormat format{
      .n = config.vocab, .k = config.d_model, .weight = {.bits = bits}};
  BBB_CHECK(config.d_model % format.weight.group == 0, "a head of ", bits,
            " bits needs a model width of whole groups of ", format.weight.group, ", not ",
            config.d_model);
  return format;
}

int64_t Checkpoint::table_weights() const {
  return (config_.tied_head ? 1 : 2) * config_.vocab * config_.d_model;
}

quant::ActivationBits bits_per_activation(
    const LlamaConfig& config,
    const std::function<std::vector<quant::LinearFormat>(int64_t layer)>& formats) {
  quant::ActivationBits sum;
  double channels = 0;
  const std::vector<LinearShape> shapes = block_linears(config);
  for (int64_t layer = 0; layer < config.layers; ++layer) {
    const std::vector<quant::LinearFormat> linears = formats(layer);
    for (size_t i = 0; i < shapes.size(); ++i) {
      if (i > 0 && shapes[i].site == shapes[i - 1].site) continue;
      const quant::ActivationBits bits = linears[i].activation_bits();
      sum.codes += bits.codes;
      sum.all += bits.all;
      channels += static_cast<double>(shapes[i].k);
    }
  }
  return {sum.codes / channels, sum.all / channels};
}

quant::ActivationBits Checkpoint::bits_per_activation() const {
  return models::bits_per_activation(config_, [this](int64_t layer) {
    std::vector<quant::LinearFormat> formats;
    for (const LinearShape& shape : block_linears(config_))
      formats.push_back(packed_format(layer_name(layer, shape.name), shape.n, shape.k)
                            .value_or(quant::LinearFormat{.n = shape.n, .k = shape.k}));
    return formats;
  });
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

std::unique_ptr<Checkpoint> open_checkpoint(const std::string& path, int bits) {
  data::check_model_path(path);
  std::unique_ptr<Checkpoint> checkpoint;
  std::error_code error;
  if (path.starts_with(data::kSyntheticPrefix)) {
    const std::string name = path.substr(data::kSyntheticPrefix.size());
    checkpoint = make_synthetic_checkpoint(synthetic_config(name), path);
  } else if (fs::is_directory(path, error)) {
    checkpoint = open_directory(path, bits);
  } else {
    checkpoint = std::make_unique<GgufCheckpoint>(path);
  }
  BBB_CHECK(bits == 0 || checkpoint->kind() == CheckpointKind::Packed, path,
            ": --bits reads fewer bits of a nested export (--any-precision), and this is none");
  return checkpoint;
}

}  // namespace bbb::models
