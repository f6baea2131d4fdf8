// Export: plan every tensor of every shard, stream the layers through, then read it all back.
//
// Packed          P.qweight, P.scales, P.zeros, P.master_scale as in format.md
// HuggingFace     P.weight BF16 = S e (q - z), exact for b <= 4
// Either way norms are F32; embedding and head are BF16.
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
#include "quant/pack.h"

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

// Row by row, each row's stream starting on a byte.
std::vector<uint8_t> pack_rows(const std::vector<uint8_t>& codes, int64_t rows, int bits) {
  const int64_t columns = static_cast<int64_t>(codes.size()) / rows;
  const int64_t row_bytes = quant::packed_bytes(columns, bits);
  std::vector<uint8_t> packed(static_cast<size_t>(rows * row_bytes));
  for (int64_t r = 0; r < rows; ++r)
    quant::pack_codes(packed.data() + r * row_bytes, codes.data() + r * columns, columns, bits);
  return packed;
}

std::vector<uint8_t> unpack_rows(const data::SafeTensor& packed, int64_t rows, int64_t columns,
                                 int bits) {
  const int64_t row_bytes = quant::packed_bytes(columns, bits);
  std::vector<uint8_t> codes(static_cast<size_t>(rows * columns));
  for (int64_t r = 0; r < rows; ++r)
    quant::unpack_codes(codes.data() + r * columns, packed.data + r * row_bytes, columns, bits);
  return codes;
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

std::vector<SafeTensorsWriter::Entry> plan(const LlamaConfig& config, const GridSpec& spec,
                                           ExportFormat format) {
  std::vector<SafeTensorsWriter::Entry> entries;
  const Shape table{config.vocab, config.d_model}, norm{config.d_model};
  entries.push_back({kEmbedding, FileDType::BF16, table});
  for (int64_t i = 0; i < config.layers; ++i) {
    entries.push_back({layer_name(i, kInputNorm), FileDType::F32, norm});
    entries.push_back({layer_name(i, kPostNorm), FileDType::F32, norm});
    for (const LinearShape& linear : block_linears(config)) {
      const std::string name = layer_name(i, linear.name);
      const int64_t n = linear.n, k = linear.k;
      if (format == ExportFormat::HuggingFace) {
        entries.push_back({name + ".weight", FileDType::BF16, {n, k}});
        continue;
      }
      entries.push_back(
          {name + ".qweight", FileDType::U8, {n, quant::code_row_bytes(k, spec.bits)}});
      entries.push_back({name + ".scales", FileDType::F8_E4M3, {n, k / spec.group}});
      entries.push_back(
          {name + ".zeros", FileDType::U8, {n, quant::zero_row_bytes(k, spec.group, spec.bits)}});
      entries.push_back({name + ".master_scale", FileDType::F32, {1}});
    }
  }
  entries.push_back({kFinalNorm, FileDType::F32, norm});
  if (!config.tied_head) entries.push_back({kHead, FileDType::BF16, table});
  return entries;
}

void check_layer(const ExportLayer& layer, const LlamaConfig& config, const GridSpec& spec) {
  const std::vector<LinearShape> shapes = block_linears(config);
  const size_t width = static_cast<size_t>(config.d_model);
  BBB_ASSERT(layer.input_norm.size() == width && layer.post_norm.size() == width);
  BBB_ASSERT(layer.linears.size() == shapes.size());
  for (size_t j = 0; j < shapes.size(); ++j) {
    const QuantizedState& state = layer.linears[j];
    const size_t groups = static_cast<size_t>(shapes[j].n * shapes[j].k / spec.group);
    BBB_ASSERT(state.spec.bits == spec.bits && state.spec.group == spec.group);
    BBB_ASSERT(state.codes.size() == groups * static_cast<size_t>(spec.group));
    BBB_ASSERT(state.scales.size() == groups && state.zeros.size() == groups);
  }
}

void write_layer(ShardedWriter& writer, const ExportLayer& layer, int64_t index,
                 const LlamaConfig& config, ExportFormat format) {
  writer.add(layer_name(index, kInputNorm), layer.input_norm);
  writer.add(layer_name(index, kPostNorm), layer.post_norm);
  const std::vector<LinearShape> shapes = block_linears(config);
  for (size_t j = 0; j < shapes.size(); ++j) {
    const std::string name = layer_name(index, shapes[j].name);
    const QuantizedState& state = layer.linears[j];
    if (format == ExportFormat::HuggingFace) {
      writer.add(name + ".weight", to_bf16(state.dequantize()));
      continue;
    }
    writer.add(name + ".qweight", pack_rows(state.codes, shapes[j].n, state.spec.bits));
    writer.add(name + ".scales", state.scales);
    writer.add(name + ".zeros", pack_rows(state.zeros, shapes[j].n, state.spec.bits));
    writer.add(name + ".master_scale", std::vector<float>{state.master_scale});
  }
}

void compare_linear(const Checkpoint& written, const std::string& name, const LinearShape& shape,
                    const QuantizedState& state, ExportFormat format) {
  const int64_t n = shape.n, k = shape.k;
  const auto check = [&](bool equal, const char* what) {
    BBB_CHECK(equal, written.path(), ": ", name, what, " read back differs from what was trained");
  };
  if (format == ExportFormat::HuggingFace) {
    std::vector<float> expected = state.dequantize();
    for (float& value : expected) value = engine::from_bf16(engine::to_bf16(value));
    check(written.load(name + ".weight", {n, k}) == expected, ".weight");
    return;
  }
  const PackedTensors file = written.packed(name, n, k);
  check(file.spec.bits == state.spec.bits && file.spec.group == state.spec.group, "'s grid");
  check(unpack_rows(*file.qweight, n, k, state.spec.bits) == state.codes, ".qweight");
  check(std::equal(state.scales.begin(), state.scales.end(), file.scales->data), ".scales");
  check(unpack_rows(*file.zeros, n, k / state.spec.group, state.spec.bits) == state.zeros,
        ".zeros");
  const uint8_t* master_scale = reinterpret_cast<const uint8_t*>(&state.master_scale);
  check(std::equal(master_scale, master_scale + sizeof(float), file.master_scale->data),
        ".master_scale");
}

void compare_layer(const Checkpoint& written, const ExportLayer& layer, int64_t index,
                   ExportFormat format) {
  const LlamaConfig& config = written.config();
  const auto check_norm = [&](const std::string& name, const std::vector<float>& given) {
    BBB_CHECK(written.load(name, {config.d_model}) == given, written.path(), ": ", name,
              " read back differs from what was trained");
  };
  check_norm(layer_name(index, kInputNorm), layer.input_norm);
  check_norm(layer_name(index, kPostNorm), layer.post_norm);
  const std::vector<LinearShape> shapes = block_linears(config);
  for (size_t j = 0; j < shapes.size(); ++j)
    compare_linear(written, layer_name(index, shapes[j].name), shapes[j], layer.linears[j], format);
}

std::string exported_config(const Checkpoint& source, const GridSpec& spec, ExportFormat format) {
  ordered_json config = data::parse_ordered_json(source.config_json(), source.path());
  config.erase("quantization_config");
  if (!source.config().tied_head && config.contains("tie_word_embeddings"))
    config["tie_word_embeddings"] = false;  // also where the file has a head that the config denies
  if (format == ExportFormat::Packed)
    config["quantization_config"] = {
        {"quant_method", "bbb"},
        {"format_version", 1},
        {"bits", spec.bits},
        {"group_size", spec.group},
        {"scale_dtype", "float8_e4m3fn"},
        {"symmetric", false},
        {"activation_bits", 16},
        {"nested", false},
        {"modules_to_not_convert", {"lm_head", "model.embed_tokens"}},
    };
  return config.dump(2) + "\n";
}

}  // namespace

double export_model(const std::string& directory, const Checkpoint& source,
                    const data::Tokenizer& tokenizer, GridSpec spec, ExportFormat format,
                    const std::function<ExportLayer(int64_t)>& layer, const std::string& bbb_json,
                    const std::function<void(int64_t done)>& progress, int64_t max_shard_bytes) {
  const LlamaConfig& config = source.config();
  data::AtomicDirectory output(directory);
  const std::string& path = output.temporary();

  ShardedWriter writer(path, plan(config, spec, format), max_shard_bytes);
  const Shape table{config.vocab, config.d_model};
  writer.add(kEmbedding, to_bf16(source.load(kEmbedding, table)));
  for (int64_t i = 0; i < config.layers; ++i) {
    const ExportLayer given = layer(i);
    check_layer(given, config, spec);
    write_layer(writer, given, i, config, format);
    if (progress) progress(i + 1);
  }
  writer.add(kFinalNorm, source.load(kFinalNorm, {config.d_model}));
  if (!config.tied_head) writer.add(kHead, to_bf16(source.load(kHead, table)));
  writer.finish();

  data::write_file_atomic(path + "/config.json", exported_config(source, spec, format));
  if (const std::string generation = source.generation_config_json(); !generation.empty())
    data::write_file_atomic(path + "/generation_config.json", generation);
  for (const auto& [name, content] : tokenizer.export_files())
    data::write_file_atomic(path + "/" + name, content);
  data::write_file_atomic(path + "/bbb.json", bbb_json);

  double bits_per_weight = 0;
  {
    const std::unique_ptr<Checkpoint> written = open_checkpoint(path);
    for (int64_t i = 0; i < config.layers; ++i) {
      compare_layer(*written, layer(i), i, format);
      if (progress) progress(config.layers + i + 1);
    }
    bits_per_weight = written->bits_per_weight();
  }
  output.commit();
  return bits_per_weight;
}

}  // namespace bbb::models
