// Export as one GGUF that llama.cpp reads. A linear is stored losslessly where ggml has a type for
// its codes, else in BF16:
//
//   2, 3 bits   Q4_0   blocks of 32: s in F16, codes q - z + 8      weight s (c - 8)
//   symmetric          2 or 3 bits: s / 2 and 2 q - (2^b - 1) + 8
//   4 bits      Q4_1   blocks of 32: s and -z s in F16, codes q     weight s q + (-z s)
//   otherwise   BF16   8 bits, 4 symmetric ones, a channel order, a rotation, a scale that F16 does
//                      not hold
//
// s = S e of the block's group. Norms are F32, embedding and head BF16 or Q8_0.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <optional>

#include "data/files.h"
#include "data/gguf_tokenizer.h"
#include "data/gguf_writer.h"
#include "data/half.h"
#include "models/export_files.h"

namespace bbb::models {

using data::GgmlType;
using data::GgufMetadata;
using data::kGgmlBlock;

namespace {

bool half_holds(float value) { return data::half_to_float(data::float_to_half(value)) == value; }

// The type that holds the codes of a linear without loss, if its scales fit too.
std::optional<GgmlType> code_type(const quant::LinearFormat& format) {
  if (!format.plain_positions() || format.k % kGgmlBlock != 0) return std::nullopt;
  switch (format.weight.bits) {
    case 2:
    case 3:
      return GgmlType::Q4_0;
    case 4:
      if (format.is_symmetric()) return std::nullopt;
      return GgmlType::Q4_1;
    default:
      return std::nullopt;
  }
}

struct Encoded {
  GgmlType type;
  std::vector<uint8_t> bytes;
};

template <typename T>
std::vector<uint8_t> bytes_of(const std::vector<T>& values) {
  std::vector<uint8_t> bytes(values.size() * sizeof(T));
  std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

// The blocks of a linear's codes; nothing where F16 does not hold a scale or a minimum.
std::optional<Encoded> encode_codes(const LinearResult& linear) {
  const std::optional<GgmlType> type = code_type(linear.format);
  if (!type) return std::nullopt;
  const LinearCodes from = linear_codes(linear);
  const int64_t block_bytes = *type == GgmlType::Q4_0 ? data::kQ4_0Bytes : data::kQ4_1Bytes;
  Encoded out = {
      *type, std::vector<uint8_t>(static_cast<size_t>(from.n * from.k / kGgmlBlock * block_bytes))};
  uint8_t* block = out.bytes.data();
  for (int64_t row = 0; row < from.n; ++row)
    for (int64_t k = 0; k < from.k; k += kGgmlBlock, block += block_bytes) {
      const auto at = static_cast<size_t>(row * from.groups + k / from.group);
      const float scale = from.scales[at], minimum = -scale * static_cast<float>(from.zeros[at]);
      const uint8_t* codes = from.codes.data() + row * from.k + k;
      if (!half_holds(scale)) return std::nullopt;
      if (*type == GgmlType::Q4_1) {
        if (!half_holds(minimum)) return std::nullopt;
        data::pack_q4_1(block, scale, minimum, codes);
        continue;
      }
      uint8_t shifted[kGgmlBlock];
      for (int64_t i = 0; i < kGgmlBlock; ++i)
        shifted[i] = static_cast<uint8_t>(codes[i] - from.zeros[at] + 8);
      data::pack_q4_0(block, scale, shifted);
    }
  return out;
}

Encoded encode(const LinearResult& linear) {
  if (std::optional<Encoded> codes = encode_codes(linear)) return std::move(*codes);
  return {GgmlType::BF16, bytes_of(to_bf16(linear.dequantize()))};
}

// Puts rows where llama.cpp wants them.
void permute_rows(std::vector<uint8_t>& bytes, int64_t rows, int64_t head_dim) {
  const std::vector<uint8_t> from = bytes;
  const auto row_bytes = static_cast<int64_t>(bytes.size()) / rows;
  for (int64_t row = 0; row < rows; ++row)
    std::copy_n(from.begin() + row * row_bytes, row_bytes,
                bytes.begin() + gguf_row(row, head_dim) * row_bytes);
}

constexpr const char* kRopeDivisors = "rope_freqs.weight";

// Throws if llama.cpp computes something else than this configuration says; a sliding window that
// it ignores makes a line on stderr, since shorter texts come out the same. Source: llama.cpp,
// llama-model.cpp (the tensors of each architecture) and ggml's rope_yarn().
void check_architecture(const LlamaConfig& c) {
  const std::string architecture = gguf_architecture(c);
  const bool llama = architecture == "llama";
  const auto refuse_if = [&](bool differs, const std::string& what) {
    BBB_CHECK(!differs, "--format gguf: llama.cpp's ", architecture, " has no ", what);
  };
  refuse_if(architecture == "qwen3" && c.qkv_bias, "biases");
  refuse_if(!llama && c.sliding_window > 0, "sliding window");
  refuse_if(!llama && !rope_divisors(c).empty(), "rope factors (rope_type llama3)");
  if (c.sliding_window > 0 && c.sliding_window < c.max_position)
    std::fprintf(stderr,
                 "--format gguf: llama.cpp's llama has no sliding window: beyond %lld tokens it "
                 "computes otherwise\n",
                 static_cast<long long>(c.sliding_window));
  if (!c.rope_scaling) return;
  const RopeScaling& s = *c.rope_scaling;
  refuse_if(s.kind == RopeKind::Dynamic, "rope scaling dynamic");
  if (s.kind != RopeKind::Yarn) return;
  refuse_if(!s.truncate, "yarn with 'truncate' false");
  refuse_if(s.factor <= 1, "yarn with a factor of 1 or less");
  refuse_if(std::fabs(s.attention_factor - (1 + 0.1 * std::log(s.factor))) > 1e-6,
            "yarn with an attention_factor other than 1 + 0.1 ln(factor)");
}

// What llama.cpp needs to know of the model.
GgufMetadata model_entries(const LlamaConfig& c) {
  const std::string architecture = gguf_architecture(c);
  GgufMetadata out = {{"general.architecture", architecture},
                      {"general.quantization_version", uint32_t{2}}};
  const auto add = [&](const char* key, auto value) {
    out.emplace_back(architecture + "." + key, std::move(value));
  };
  const auto add_count = [&](const char* key, int64_t value) {
    add(key, static_cast<uint32_t>(value));
  };
  const auto add_real = [&](const char* key, double value) { add(key, static_cast<float>(value)); };
  add_count("vocab_size", c.vocab);
  add_count("context_length", c.max_position);
  add_count("embedding_length", c.d_model);
  add_count("block_count", c.layers);
  add_count("feed_forward_length", c.hidden);
  add_count("attention.head_count", c.heads);
  add_count("attention.head_count_kv", c.kv_heads);
  add_count("attention.key_length", c.head_dim);
  add_count("attention.value_length", c.head_dim);
  add_real("attention.layer_norm_rms_epsilon", c.rms_eps);
  add_count("rope.dimension_count", c.head_dim);
  add_real("rope.freq_base", c.rope_theta);
  if (c.sliding_window > 0) add_count("attention.sliding_window", c.sliding_window);
  if (!c.rope_scaling || c.rope_scaling->kind == RopeKind::Llama3) return out;
  const RopeScaling& s = *c.rope_scaling;
  add("rope.scaling.type", std::string(name_of(s.kind)));
  add_real("rope.scaling.factor", s.factor);
  if (s.kind != RopeKind::Yarn) return out;
  add_count("rope.scaling.original_context_length", s.original_max_position);
  add_real("rope.scaling.yarn_beta_fast", s.beta_fast);
  add_real("rope.scaling.yarn_beta_slow", s.beta_slow);
  return out;
}

GgufMetadata tokenizer_entries(const ExportSource& source) {
  const Checkpoint& model = source.model;
  if (model.kind() == CheckpointKind::Gguf) return data::gguf_tokenizer(data::Gguf(model.path()));
  return data::gguf_tokenizer(source.tokenizer, model.path(), model.config().vocab,
                              model.stop_ids());
}

class GgufExport final : public ExportFiles {
 public:
  GgufExport(const std::string& path, const ExportSource& source, GgufTables tables)
      : path_(path), config_(source.model.config()), tables_(tables) {
    std::error_code error;
    BBB_CHECK(!std::filesystem::exists(path, error), path,
              ": exists; --format gguf makes a file of this name");
    BBB_CHECK(tables == GgufTables::BF16 || config_.d_model % kGgmlBlock == 0,
              "--gguf-head q8_0 takes rows of whole blocks of ", kGgmlBlock,
              ", and the model's have ", config_.d_model);
    check_architecture(config_);
    GgufMetadata metadata = model_entries(config_);
    for (auto& entry : tokenizer_entries(source)) metadata.push_back(std::move(entry));
    data::check_disk(path, expected_bytes(source.formats));
    parents_.emplace(path);
    metadata.emplace_back("bbb.json", source.bbb_json);
    writer_.emplace(path, std::move(metadata), plan());
  }

  void add_outer(const OuterWeight& weight, const std::vector<float>& values) override {
    // The divisors are part of the configuration, so they are written with the first weight.
    if (weight.name == kEmbedding)
      if (const std::vector<float> divisors = rope_divisors(config_); !divisors.empty())
        writer_->add(kRopeDivisors, GgmlType::F32, bytes_of(divisors));
    if (!is_table(weight))
      writer_->add(gguf_name(weight.name), GgmlType::F32, bytes_of(values));
    else if (tables_ == GgufTables::Q8_0)
      writer_->add(gguf_name(weight.name), GgmlType::Q8_0, data::round_q8_0(rounded_bf16(values)));
    else
      writer_->add(gguf_name(weight.name), GgmlType::BF16, bytes_of(to_bf16(values)));
  }

  void add_layer(int64_t index, const LayerResult& layer) override {
    const std::vector<NormShape> norms = block_norms(config_);
    for (size_t i = 0; i < norms.size(); ++i)
      writer_->add(gguf_name(layer_name(index, norms[i].name)), GgmlType::F32,
                   bytes_of(layer.norm(i)));
    const std::vector<LinearShape> shapes = block_linears(config_);
    for (size_t j = 0; j < shapes.size(); ++j) {
      const auto add = [&](const std::string& name, Encoded encoded) {
        if (has_gguf_rows(config_, name))
          permute_rows(encoded.bytes, shapes[j].n, config_.head_dim);
        writer_->add(gguf_name(name), encoded.type, encoded.bytes);
      };
      const std::string name = layer_name(index, shapes[j].name);
      add(name + ".weight", encode(layer.linears[j]));
      if (shapes[j].bias) add(name + ".bias", {GgmlType::F32, bytes_of(layer.linears[j].bias)});
    }
  }

  void finish() override {
    writer_->finish();
    written_ = open_checkpoint(writer_->temporary());
    check(rope_inv_freq(written_->config()) == rope_inv_freq(config_), "the rope's frequencies");
  }

  void check_outer(const OuterWeight& weight, const std::vector<float>& values) override {
    const std::vector<float> read = written_->load(weight.name, weight.shape);
    if (!is_table(weight)) return check(read == values, weight.name);
    const std::vector<float> packed = rounded_bf16(values);
    check(read == (tables_ == GgufTables::Q8_0 ? rounded_q8_0(packed) : packed), weight.name);
    add_rounding(weight.name, packed, read);
  }

  void check_layer(int64_t index, const LayerResult& layer) override {
    const auto check_vector = [&](const std::string& name, const std::vector<float>& values) {
      check(written_->load(name, {static_cast<int64_t>(values.size())}) == values, name);
    };
    const std::vector<NormShape> norms = block_norms(config_);
    for (size_t i = 0; i < norms.size(); ++i)
      check_vector(layer_name(index, norms[i].name), layer.norm(i));
    const std::vector<LinearShape> shapes = block_linears(config_);
    for (size_t j = 0; j < shapes.size(); ++j) {
      const std::string name = layer_name(index, shapes[j].name) + ".weight";
      const std::vector<float> weight = layer.linears[j].dequantize(),
                               read = written_->load(name, {shapes[j].n, shapes[j].k});
      const bool lossless = encode_codes(layer.linears[j]).has_value();
      check(read == (lossless ? weight : rounded_bf16(weight)), name);
      add_rounding(name, weight, read);
      if (shapes[j].bias)
        check_vector(layer_name(index, shapes[j].name) + ".bias", layer.linears[j].bias);
    }
  }

  double bits_per_weight() const override { return written_->bits_per_weight(); }

  void commit() override {
    written_.reset();
    writer_->commit();
    parents_->keep();
  }

 private:
  std::vector<data::GgufWriter::Entry> plan() const {
    std::vector<data::GgufWriter::Entry> entries;
    const auto declare = [&](const std::string& name, const engine::Shape& shape) {
      entries.push_back({gguf_name(name), shape});
    };
    const std::vector<OuterWeight> outer = outer_weights(config_);
    if (!rope_divisors(config_).empty()) entries.push_back({kRopeDivisors, {config_.head_dim / 2}});
    declare(outer[0].name, outer[0].shape);
    for (int64_t i = 0; i < config_.layers; ++i) {
      for (const NormShape& norm : block_norms(config_))
        declare(layer_name(i, norm.name), {norm.size});
      for (const LinearShape& l : block_linears(config_)) {
        declare(layer_name(i, l.name) + ".weight", {l.n, l.k});
        if (l.bias) declare(layer_name(i, l.name) + ".bias", {l.n});
      }
    }
    for (size_t i = 1; i < outer.size(); ++i) declare(outer[i].name, outer[i].shape);
    return entries;
  }

  // Of all tensors, if F16 holds the scales.
  int64_t expected_bytes(const Formats& formats) const {
    int64_t bytes = 0;
    const auto add = [&](GgmlType type, int64_t numel) {
      bytes += data::gguf_type_bytes(static_cast<uint32_t>(type), numel);
    };
    const GgmlType table = tables_ == GgufTables::Q8_0 ? GgmlType::Q8_0 : GgmlType::BF16;
    for (const OuterWeight& weight : outer_weights(config_))
      add(is_table(weight) ? table : GgmlType::F32, engine::numel_of(weight.shape));
    for (int64_t i = 0; i < config_.layers; ++i)
      for (const quant::LinearFormat& format : formats(i))
        add(code_type(format).value_or(GgmlType::BF16), format.n * format.k);
    return bytes;
  }

  static std::vector<float> rounded_q8_0(const std::vector<float>& values) {
    const std::vector<uint8_t> blocks = data::round_q8_0(values);
    std::vector<float> out(values.size());
    const auto count = static_cast<int64_t>(values.size());
    data::gguf_dequantize(out.data(),
                          {static_cast<uint32_t>(GgmlType::Q8_0),
                           {count},
                           blocks.data(),
                           static_cast<int64_t>(blocks.size())},
                          "");
    return out;
  }

  void check(bool equal, const std::string& name) const {
    BBB_CHECK(equal, path_, ": ", name, " read back differs from what was trained");
  }

  std::string path_;
  const LlamaConfig& config_;
  GgufTables tables_;
  std::optional<data::Parents> parents_;
  std::optional<data::GgufWriter> writer_;
  std::unique_ptr<Checkpoint> written_;  // read back
};

}  // namespace

std::unique_ptr<ExportFiles> make_gguf_export(const std::string& path, const ExportSource& source,
                                              GgufTables tables) {
  return std::make_unique<GgufExport>(path, source, tables);
}

}  // namespace bbb::models
