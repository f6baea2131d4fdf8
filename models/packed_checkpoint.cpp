// Export: plan every tensor of every shard, write layer by layer, then read everything back.
//
// Packed          the tensors of each linear's format (quant/format.h)
// HuggingFace     P.weight BF16 = S e (q - z), exact for b <= 4
// In both, norms and biases are F32; embedding and head are BF16. Packed, the head and a tied
// embedding may have 8 or 4 bits.
#include "models/packed_checkpoint.h"

#include <algorithm>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <utility>

#include "data/files.h"
#include "data/json.h"
#include "data/safetensors.h"
#include "engine/bf16.h"
#include "models/table.h"

namespace bbb::models {

using data::FileDType;
using data::SafeTensorsWriter;
using engine::Shape;
using nlohmann::ordered_json;

namespace {

std::vector<uint16_t> to_bf16(const std::vector<float>& values) {
  std::vector<uint16_t> out(values.size());
  std::transform(values.begin(), values.end(), out.begin(),
                 [](float v) { return engine::to_bf16(v); });
  return out;
}

std::vector<float> rounded(std::vector<float> values) {
  for (float& value : values) value = engine::from_bf16(engine::to_bf16(value));
  return values;
}

// Writes a fixed list of tensors, in order, into as few files as the size limit allows.
class ShardedWriter {
 public:
  ShardedWriter(std::string directory, std::vector<SafeTensorsWriter::Entry> entries,
                int64_t max_bytes)
      : directory_(std::move(directory)) {
    int64_t shard_bytes = 0;
    for (SafeTensorsWriter::Entry& entry : entries) {
      const int64_t bytes = engine::numel_of(entry.shape) * data::size_bytes(entry.dtype);
      if (shards_.empty() || shard_bytes + bytes > max_bytes) {
        shards_.emplace_back();
        shard_bytes = 0;
      }
      shard_bytes += bytes;
      total_bytes_ += bytes;
      shards_.back().push_back(std::move(entry));
    }
  }

  template <typename T>
  void add(const std::string& name, const std::vector<T>& values) {
    if (!file_ || added_ == shards_[shard_].size()) open_next();
    BBB_ASSERT(shards_[shard_][added_].name == name);
    file_->add(name, values.data(), static_cast<int64_t>(values.size() * sizeof(T)));
    ++added_;
  }

  void finish() {
    BBB_ASSERT(file_ && shard_ + 1 == shards_.size() && added_ == shards_.back().size());
    file_->finish();
    file_.reset();
    if (shards_.size() == 1) return;
    ordered_json index;
    index["metadata"]["total_size"] = total_bytes_;
    for (size_t i = 0; i < shards_.size(); ++i)
      for (const SafeTensorsWriter::Entry& entry : shards_[i])
        index["weight_map"][entry.name] = file_name(i);
    data::write_file_atomic(directory_ + "/model.safetensors.index.json", index.dump(2) + "\n");
  }

 private:
  void open_next() {
    if (file_) {
      file_->finish();
      ++shard_;
      added_ = 0;
    }
    BBB_ASSERT(shard_ < shards_.size());
    // transformers refuses a file that does not name its framework.
    file_ =
        std::make_unique<SafeTensorsWriter>(directory_ + "/" + file_name(shard_), shards_[shard_],
                                            std::map<std::string, std::string>{{"format", "pt"}});
  }

  std::string file_name(size_t shard) const {
    if (shards_.size() == 1) return "model.safetensors";
    char name[64];
    std::snprintf(name, sizeof name, "model-%05zu-of-%05zu.safetensors", shard + 1, shards_.size());
    return name;
  }

  std::string directory_;
  std::vector<std::vector<SafeTensorsWriter::Entry>> shards_;
  int64_t total_bytes_ = 0;
  size_t shard_ = 0, added_ = 0;
  std::unique_ptr<SafeTensorsWriter> file_;
};

using Formats = std::function<std::vector<quant::LinearFormat>(int64_t layer)>;

// Embedding or head, not the norm. The embedding is written before the layers, the others behind.
bool is_table(const OuterWeight& weight) { return weight.shape.size() == 2; }

// The format of a table that is quantized.
std::optional<quant::LinearFormat> format_of(const OuterWeight& weight, const LlamaConfig& config,
                                             const ExportAs& as) {
  const bool read_by_steps = weight.name == (config.tied_head ? kEmbedding : kHead);
  if (as.head_bits == kDenseBits || !read_by_steps) return std::nullopt;
  return table_format(config, as.head_bits);
}

std::vector<SafeTensorsWriter::Entry> plan(const LlamaConfig& config, const Formats& formats,
                                           const ExportAs& as) {
  std::vector<SafeTensorsWriter::Entry> entries;
  const std::vector<LinearShape> shapes = block_linears(config);
  const auto declare_tensors = [&](const std::string& name, const quant::LinearFormat& format) {
    for (const quant::StoredTensor& t : format.tensors())
      entries.push_back({name + t.suffix, t.dtype, t.shape});
  };
  const auto declare = [&](const OuterWeight& weight) {
    if (const auto format = format_of(weight, config, as))
      declare_tensors(table_module(weight.name), *format);
    else
      entries.push_back(
          {weight.name, is_table(weight) ? FileDType::BF16 : FileDType::F32, weight.shape});
  };
  const std::vector<OuterWeight> outer = outer_weights(config);
  declare(outer[0]);
  for (int64_t i = 0; i < config.layers; ++i) {
    for (const NormShape& norm : block_norms(config))
      entries.push_back({layer_name(i, norm.name), FileDType::F32, {norm.size}});
    const std::vector<quant::LinearFormat> linears = formats(i);
    for (size_t j = 0; j < shapes.size(); ++j) {
      const std::string name = layer_name(i, shapes[j].name);
      if (as.format == ExportFormat::HuggingFace)
        entries.push_back({name + ".weight", FileDType::BF16, {shapes[j].n, shapes[j].k}});
      else
        declare_tensors(name, linears[j]);
      if (shapes[j].bias) entries.push_back({name + ".bias", FileDType::F32, {shapes[j].n}});
    }
  }
  std::for_each(outer.begin() + 1, outer.end(), declare);
  return entries;
}

void write_tensors(ShardedWriter& writer, const std::string& name, const LinearResult& linear) {
  for (const quant::StoredTensor& t : linear.format.tensors())
    writer.add(name + t.suffix, linear.part(t.part));
}

void write_layer(ShardedWriter& writer, const LayerResult& layer, int64_t index,
                 const LlamaConfig& config, ExportFormat format) {
  const std::vector<LinearShape> shapes = block_linears(config);
  BBB_ASSERT(layer.linears.size() == shapes.size());
  const std::vector<NormShape> norms = block_norms(config);
  for (size_t i = 0; i < norms.size(); ++i)
    writer.add(layer_name(index, norms[i].name), layer.norm(i));
  for (size_t j = 0; j < shapes.size(); ++j) {
    const std::string name = layer_name(index, shapes[j].name);
    const LinearResult& linear = layer.linears[j];
    if (format == ExportFormat::HuggingFace)
      writer.add(name + ".weight", to_bf16(linear.dequantize()));
    else
      write_tensors(writer, name, linear);
    if (shapes[j].bias) writer.add(name + ".bias", linear.bias);
  }
}

void write_outer(ShardedWriter& writer, const OuterWeight& weight, const LlamaConfig& config,
                 const ExportAs& as, const LoadOuter& outer) {
  if (const auto format = format_of(weight, config, as))
    write_tensors(writer, table_module(weight.name),
                  quantize_table(rounded(outer(weight)), *format));
  else if (is_table(weight))
    writer.add(weight.name, to_bf16(outer(weight)));
  else
    writer.add(weight.name, outer(weight));
}

void check_equal(bool equal, const Checkpoint& written, const std::string& name) {
  BBB_CHECK(equal, written.path(), ": ", name, " read back differs from what was trained");
}

void compare_tensors(const Checkpoint& written, const std::string& name,
                     const LinearResult& linear) {
  check_equal(written.packed_format(name, linear.format.n, linear.format.k) == linear.format,
              written, name + "'s format");
  for (const quant::StoredTensor& t : linear.format.tensors()) {
    const std::vector<uint8_t>& bytes = linear.part(t.part);
    BBB_ASSERT(static_cast<int64_t>(bytes.size()) == t.bytes());
    check_equal(std::equal(bytes.begin(), bytes.end(), written.stored(name + t.suffix)), written,
                name + t.suffix);
  }
}

void compare_outer(const Checkpoint& written, const OuterWeight& weight, const ExportAs& as,
                   const LoadOuter& outer) {
  const std::vector<float> given = outer(weight);
  if (const auto format = format_of(weight, written.config(), as))
    return compare_tensors(written, table_module(weight.name),
                           quantize_table(rounded(given), *format));
  check_equal(
      written.load(weight.name, weight.shape) == (is_table(weight) ? rounded(given) : given),
      written, weight.name);
}

void compare_layer(const Checkpoint& written, const LayerResult& layer, int64_t index,
                   ExportFormat format) {
  const LlamaConfig& config = written.config();
  const auto check_floats = [&](const std::string& name, const Shape& shape,
                                const std::vector<float>& given) {
    check_equal(written.load(name, shape) == given, written, name);
  };
  const std::vector<NormShape> norms = block_norms(config);
  for (size_t i = 0; i < norms.size(); ++i)
    check_floats(layer_name(index, norms[i].name), {norms[i].size}, layer.norm(i));
  const std::vector<LinearShape> shapes = block_linears(config);
  for (size_t j = 0; j < shapes.size(); ++j) {
    const std::string name = layer_name(index, shapes[j].name);
    const LinearResult& linear = layer.linears[j];
    if (shapes[j].bias) check_floats(name + ".bias", {shapes[j].n}, linear.bias);
    if (format == ExportFormat::HuggingFace) {
      check_floats(name + ".weight", {shapes[j].n, shapes[j].k}, rounded(linear.dequantize()));
      continue;
    }
    compare_tensors(written, name, linear);
  }
}

// quantization_config (format.md). What linears have of their own is stored in `overrides`.
ordered_json quantization_config(const LlamaConfig& config, const Formats& formats,
                                 const ExportAs& as) {
  const quant::LinearFormat common = formats(0)[0];
  const auto range_of = [](const quant::LinearFormat& f) {
    return f.input.range == quant::RangeRule::Search ? "search" : "minmax";
  };
  ordered_json q = {{"quant_method", "bbb"},
                    {"format_version", 1},
                    {"bits", common.code_bits()},
                    {"group_size", common.weight.group},
                    {"scale_dtype", "float8_e4m3fn"},
                    {"symmetric", false},
                    {"activation_bits", common.input.bits},
                    {"nested", common.weight.nested}};
  if (common.weight.nested)
    q["nested_dequant"] =
        common.weight.dequant == quant::NestedDequant::Middle ? "middle" : "floor";
  if (common.input.bits < 16) q["activation_range"] = range_of(common);
  if (common.input.hadamard) q["rotate"] = "group";
  ordered_json overrides = ordered_json::object(), dense = {"lm_head", "model.embed_tokens"};
  for (const OuterWeight& weight : outer_weights(config)) {
    if (!format_of(weight, config, as)) continue;
    const std::string module = table_module(weight.name);
    dense.erase(std::find(dense.begin(), dense.end(), module));
    overrides[module] = {{"bits", as.head_bits}};
  }
  q["modules_to_not_convert"] = dense;
  const std::vector<LinearShape> shapes = block_linears(config);
  for (int64_t layer = 0; layer < config.layers; ++layer) {
    const std::vector<quant::LinearFormat> linears = formats(layer);
    for (size_t i = 0; i < shapes.size(); ++i) {
      const quant::LinearFormat& linear = linears[i];
      ordered_json own = ordered_json::object();
      if (linear.code_bits() != common.code_bits()) own["bits"] = linear.code_bits();
      if (linear.input.bits != common.input.bits) own["activation_bits"] = linear.input.bits;
      if (linear.input.bits < 16 &&
          (common.input.bits == 16 || linear.input.range != common.input.range))
        own["activation_range"] = range_of(linear);
      if (linear.order && !linear.order->split().empty() &&
          linear.order->side() == quant::SplitSide::Activation)
        own["split_side"] = "activation";
      if (!own.empty()) overrides[layer_name(layer, shapes[i].name)] = own;
    }
  }
  if (!overrides.empty()) q["overrides"] = overrides;
  return q;
}

std::string exported_config(const Checkpoint& source, const Formats& formats, const ExportAs& as) {
  ordered_json config = data::parse_ordered_json(source.config_json(), source.path());
  config.erase("quantization_config");
  if (!source.config().tied_head && config.contains("tie_word_embeddings"))
    config["tie_word_embeddings"] = false;  // the source may hold a head despite its config
  if (as.format == ExportFormat::Packed)
    config["quantization_config"] = quantization_config(source.config(), formats, as);
  return config.dump(2) + "\n";
}

}  // namespace

double export_model(const std::string& directory, const Checkpoint& source,
                    const data::Tokenizer& tokenizer, const Formats& formats, const ExportAs& as,
                    const LoadOuter& outer, const std::function<LayerResult(int64_t)>& layer,
                    const std::string& bbb_json, const std::function<void(int64_t done)>& progress,
                    int64_t max_shard_bytes) {
  const LlamaConfig& config = source.config();
  data::AtomicDirectory output(directory);
  const std::string& path = output.temporary();

  ShardedWriter writer(path, plan(config, formats, as), max_shard_bytes);
  const std::vector<OuterWeight> weights = outer_weights(config);
  write_outer(writer, weights[0], config, as, outer);
  for (int64_t i = 0; i < config.layers; ++i) {
    const LayerResult given = layer(i);
    write_layer(writer, given, i, config, as.format);
    if (progress) progress(i + 1);
  }
  for (size_t i = 1; i < weights.size(); ++i) write_outer(writer, weights[i], config, as, outer);
  writer.finish();

  data::write_file_atomic(path + "/config.json", exported_config(source, formats, as));
  if (const std::string generation = source.generation_config_json(); !generation.empty())
    data::write_file_atomic(path + "/generation_config.json", generation);
  for (const auto& [name, content] : tokenizer.export_files())
    data::write_file_atomic(path + "/" + name, content);
  data::write_file_atomic(path + "/bbb.json", bbb_json);

  double bits_per_weight = 0;
  {
    const std::unique_ptr<Checkpoint> written = open_checkpoint(path);
    for (const OuterWeight& weight : weights) compare_outer(*written, weight, as, outer);
    for (int64_t i = 0; i < config.layers; ++i) {
      compare_layer(*written, layer(i), i, as.format);
      if (progress) progress(config.layers + i + 1);
    }
    bits_per_weight = written->bits_per_weight();
  }
  output.commit();
  return bits_per_weight;
}

}  // namespace bbb::models
