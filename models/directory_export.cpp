// Exports that are a directory of safetensors: every tensor of every shard is planned, then written
// layer by layer, then read back.
//
// Packed          the tensors of each linear's format (quant/format.h)
// HuggingFace     P.weight BF16 = S e (q - z), exact for b <= 4
// Gptq            the tensors of gptq.h
// In all, norms are F32; embedding and head are BF16.
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <utility>

#include "data/files.h"
#include "data/json.h"
#include "data/safetensors.h"
#include "models/export_files.h"
#include "models/gptq.h"
#include "models/table.h"

namespace bbb::models {

using data::FileDType;
using data::SafeTensorsWriter;
using engine::Shape;
using nlohmann::ordered_json;

namespace {

// Writes a fixed list of tensors, in order, into as few files as the size limit allows.
class ShardedWriter {
 public:
  ShardedWriter(std::string directory, std::string stem,
                std::vector<SafeTensorsWriter::Entry> entries, int64_t max_bytes)
      : directory_(std::move(directory)), stem_(std::move(stem)) {
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

  int64_t total_bytes() const { return total_bytes_; }

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
    data::write_file_atomic(directory_ + "/" + stem_ + ".safetensors.index.json",
                            index.dump(2) + "\n");
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
    if (shards_.size() == 1) return stem_ + ".safetensors";
    char name[64];
    std::snprintf(name, sizeof name, "-%05zu-of-%05zu.safetensors", shard + 1, shards_.size());
    return stem_ + name;
  }

  std::string directory_, stem_;
  std::vector<std::vector<SafeTensorsWriter::Entry>> shards_;
  int64_t total_bytes_ = 0;
  size_t shard_ = 0, added_ = 0;
  std::unique_ptr<SafeTensorsWriter> file_;
};

// The format of a table that is quantized: the head, or the embedding that is tied to it.
std::optional<quant::LinearFormat> quantized_table(const OuterWeight& weight,
                                                   const LlamaConfig& config, int head_bits) {
  const bool read_by_steps = weight.name == (config.tied_head ? kEmbedding : kHead);
  if (head_bits == kDenseBits || !read_by_steps) return std::nullopt;
  return table_format(config, head_bits);
}

// quantization_config (format.md). What linears have of their own is stored in `overrides`.
ordered_json quantization_config(const LlamaConfig& config, const Formats& formats, int head_bits) {
  const quant::LinearFormat common = formats(0)[0];
  const auto range_of = [](const quant::LinearFormat& f) {
    return f.input.range == quant::RangeRule::Search ? "search" : "minmax";
  };
  ordered_json q = {{"quant_method", common.is_lc() ? "bbb-lc" : "bbb"},
                    {"format_version", 1},
                    {"bits", common.code_bits()}};
  if (!common.is_lc()) {
    q["group_size"] = common.weight.group;
    q["scale_dtype"] = "float8_e4m3fn";
    q["symmetric"] = common.is_symmetric();
    q["activation_bits"] = common.input.bits;
    q["nested"] = common.weight.nested;
  }
  if (common.weight.nested)
    q["nested_dequant"] =
        common.weight.dequant == quant::NestedDequant::Middle ? "middle" : "floor";
  if (common.input.bits < 16) q["activation_range"] = range_of(common);
  if (common.input.hadamard) q["rotate"] = "group";
  ordered_json overrides = ordered_json::object(), dense = {"lm_head", "model.embed_tokens"};
  for (const OuterWeight& weight : outer_weights(config)) {
    if (!quantized_table(weight, config, head_bits)) continue;
    const std::string module = table_module(weight.name);
    dense.erase(std::find(dense.begin(), dense.end(), module));
    overrides[module] = {{"bits", head_bits}};
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

class DirectoryExport final : public ExportFiles {
 public:
  DirectoryExport(const std::string& directory, const ExportSource& source,
                  const ExportOptions& options)
      : source_(source),
        config_(source.model.config()),
        format_(options.format),
        head_bits_(options.head_bits),
        output_(directory) {
    const char* stem = format_ == ExportFormat::Packed ? data::kPackedStem : data::kModelStem;
    writer_.emplace(output_.temporary(), stem, plan(), source.max_shard_bytes);
    data::check_disk(directory, writer_->total_bytes());
  }

  void add_outer(const OuterWeight& weight, const std::vector<float>& values) override {
    if (const auto format = quantized_table(weight, config_, head_bits_))
      add_packed(table_module(weight.name), quantize_table(rounded_bf16(values), *format));
    else if (is_table(weight))
      writer_->add(weight.name, to_bf16(values));
    else
      add_vector(weight.name, values);
  }

  void add_layer(int64_t index, const LayerResult& layer) override {
    const std::vector<LinearShape> shapes = block_linears(config_);
    BBB_ASSERT(layer.linears.size() == shapes.size());
    const std::vector<NormShape> norms = block_norms(config_);
    for (size_t i = 0; i < norms.size(); ++i)
      add_vector(layer_name(index, norms[i].name), layer.norm(i));
    for (size_t j = 0; j < shapes.size(); ++j) {
      const std::string name = layer_name(index, shapes[j].name);
      const LinearResult& linear = layer.linears[j];
      if (format_ == ExportFormat::HuggingFace) {
        writer_->add(name + ".weight", to_bf16(linear.dequantize()));
      } else if (format_ == ExportFormat::Gptq) {
        const GptqLinear gptq = to_gptq(linear, name);
        const auto entries = gptq_entries(linear.format, name);
        writer_->add(entries[0].name, gptq.qweight);
        writer_->add(entries[1].name, gptq.qzeros);
        writer_->add(entries[2].name, gptq.scales);
        writer_->add(entries[3].name, gptq.g_idx);
      } else {
        add_packed(name, linear);
      }
      if (shapes[j].bias) add_vector(name + ".bias", linear.bias);
    }
  }

  void finish() override {
    const std::string& path = output_.temporary();
    writer_->finish();
    data::write_file_atomic(path + "/config.json", exported_config());
    if (const std::string generation = source_.model.generation_config_json(); !generation.empty())
      data::write_file_atomic(path + "/generation_config.json", generation);
    for (const auto& [name, content] : source_.tokenizer.export_files())
      data::write_file_atomic(path + "/" + name, content);
    data::write_file_atomic(path + "/bbb.json", source_.bbb_json);
    tensors_.emplace(path);
    if (format_ != ExportFormat::Gptq) written_ = open_checkpoint(path);
  }

  void check_outer(const OuterWeight& weight, const std::vector<float>& values) override {
    if (const auto format = quantized_table(weight, config_, head_bits_))
      return check_packed(table_module(weight.name), quantize_table(rounded_bf16(values), *format));
    check(floats(weight.name, weight.shape) == (is_table(weight) ? rounded_bf16(values) : values),
          weight.name);
  }

  void check_layer(int64_t index, const LayerResult& layer) override {
    const std::vector<NormShape> norms = block_norms(config_);
    for (size_t i = 0; i < norms.size(); ++i) {
      const std::string name = layer_name(index, norms[i].name);
      check(floats(name, {norms[i].size}) == layer.norm(i), name);
    }
    const std::vector<LinearShape> shapes = block_linears(config_);
    for (size_t j = 0; j < shapes.size(); ++j) {
      const std::string name = layer_name(index, shapes[j].name);
      check_linear(name, layer.linears[j]);
      if (shapes[j].bias)
        check(floats(name + ".bias", {shapes[j].n}) == layer.linears[j].bias, name + ".bias");
    }
  }

  double bits_per_weight() const override {
    if (written_) return written_->bits_per_weight();
    int64_t bytes = 0;
    for (const auto& [name, tensor] : tensors_->tensors())
      if (tensor.dtype == FileDType::I32 || tensor.dtype == FileDType::F16) bytes += tensor.bytes;
    return 8.0 * static_cast<double>(bytes) / static_cast<double>(config_.linear_parameters());
  }

  void commit() override {
    written_.reset();
    tensors_.reset();
    output_.commit();
  }

 private:
  std::vector<SafeTensorsWriter::Entry> plan() const {
    std::vector<SafeTensorsWriter::Entry> entries;
    const std::vector<LinearShape> shapes = block_linears(config_);
    const auto declare_packed = [&](const std::string& name, const quant::LinearFormat& format) {
      for (const quant::StoredTensor& t : format.tensors())
        entries.push_back({name + t.suffix, t.dtype, t.shape});
    };
    const auto declare = [&](const OuterWeight& weight) {
      if (const auto format = quantized_table(weight, config_, head_bits_))
        declare_packed(table_module(weight.name), *format);
      else
        entries.push_back(
            {weight.name, is_table(weight) ? FileDType::BF16 : FileDType::F32, weight.shape});
    };
    const std::vector<OuterWeight> outer = outer_weights(config_);
    declare(outer[0]);
    for (int64_t i = 0; i < config_.layers; ++i) {
      for (const NormShape& norm : block_norms(config_))
        entries.push_back({layer_name(i, norm.name), FileDType::F32, {norm.size}});
      const std::vector<quant::LinearFormat> linears = source_.formats(i);
      for (size_t j = 0; j < shapes.size(); ++j) {
        const std::string name = layer_name(i, shapes[j].name);
        if (format_ == ExportFormat::HuggingFace) {
          entries.push_back({name + ".weight", FileDType::BF16, {shapes[j].n, shapes[j].k}});
        } else if (format_ == ExportFormat::Gptq) {
          check_gptq(linears[j], name);
          BBB_CHECK(linears[j].weight == source_.formats(0)[0].weight, name,
                    ": --format gptq holds one width and group of codes, and this linear has ",
                    "others than ", layer_name(0, shapes[0].name));
          for (const SafeTensorsWriter::Entry& entry : gptq_entries(linears[j], name))
            entries.push_back(entry);
        } else {
          declare_packed(name, linears[j]);
        }
        if (shapes[j].bias) entries.push_back({name + ".bias", FileDType::F32, {shapes[j].n}});
      }
    }
    std::for_each(outer.begin() + 1, outer.end(), declare);
    return entries;
  }

  // A norm or a bias.
  void add_vector(const std::string& name, const std::vector<float>& values) {
    exact_vectors_ = exact_vectors_ && rounded_bf16(values) == values;
    writer_->add(name, values);
  }

  void add_packed(const std::string& name, const LinearResult& linear) {
    for (const quant::StoredTensor& t : linear.format.tensors())
      writer_->add(name + t.suffix, linear.part(t.part));
  }

  std::string exported_config() const {
    const Checkpoint& model = source_.model;
    ordered_json config = data::parse_ordered_json(model.config_json(), model.path());
    config.erase("quantization_config");
    if (!config_.tied_head && config.contains("tie_word_embeddings"))
      config["tie_word_embeddings"] = false;  // the source may hold a head despite its config
    if (format_ == ExportFormat::Packed)
      config["quantization_config"] = quantization_config(config_, source_.formats, head_bits_);
    if (format_ == ExportFormat::Gptq)
      config["quantization_config"] = gptq_config(source_.formats(0)[0]);
    // The dtype in which transformers loads the model. GPTQ kernels take no F32.
    const char* dtype = format_ == ExportFormat::Gptq                             ? "bfloat16"
                        : format_ == ExportFormat::HuggingFace && !exact_vectors_ ? "float32"
                                                                                  : nullptr;
    if (dtype) {
      config.erase("dtype");
      config["torch_dtype"] = dtype;
    }
    return config.dump(2) + "\n";
  }

  std::vector<float> floats(const std::string& name, const Shape& shape) const {
    const data::SafeTensor& tensor = tensors_->at(name);
    check(tensor.shape == shape, name + "'s shape");
    std::vector<float> values(static_cast<size_t>(tensor.numel()));
    data::to_float(values.data(), tensor, name);
    return values;
  }

  void check(bool equal, const std::string& name) const {
    BBB_CHECK(equal, output_.temporary(), ": ", name, " read back differs from what was trained");
  }

  void check_linear(const std::string& name, const LinearResult& linear) {
    const int64_t n = linear.format.n, k = linear.format.k;
    if (format_ == ExportFormat::HuggingFace) {
      const std::vector<float> weight = linear.dequantize(),
                               read = floats(name + ".weight", {n, k});
      check(read == rounded_bf16(weight), name + ".weight");
      add_rounding(name, weight, read);
      return;
    }
    if (format_ == ExportFormat::Gptq)
      return check(read_gptq(*tensors_, linear.format, name) == linear.dequantize(), name);
    check_packed(name, linear);
  }

  void check_packed(const std::string& name, const LinearResult& linear) const {
    check(written_->packed_format(name, linear.format.n, linear.format.k) == linear.format,
          name + "'s format");
    for (const quant::StoredTensor& t : linear.format.tensors()) {
      const std::vector<uint8_t>& bytes = linear.part(t.part);
      BBB_ASSERT(static_cast<int64_t>(bytes.size()) == t.bytes());
      check(std::equal(bytes.begin(), bytes.end(), written_->stored(name + t.suffix)),
            name + t.suffix);
    }
  }

  ExportSource source_;
  const LlamaConfig& config_;
  ExportFormat format_;
  int head_bits_;
  data::AtomicDirectory output_;
  std::optional<ShardedWriter> writer_;
  bool exact_vectors_ = true;                 // in BF16
  std::optional<data::SafeTensors> tensors_;  // read back
  std::unique_ptr<Checkpoint> written_;       // the same as a model; null: bbb reads none
};

}  // namespace

std::unique_ptr<ExportFiles> make_directory_export(const std::string& directory,
                                                   const ExportSource& source,
                                                   const ExportOptions& options) {
  return std::make_unique<DirectoryExport>(directory, source, options);
}

}  // namespace bbb::models
