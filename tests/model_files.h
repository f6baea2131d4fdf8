// Tiny, well-formed model files made in memory. The parsers' tests and the fuzzer start from them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "data/gguf.h"
#include "data/safetensors.h"
#include "engine/rng.h"
#include "models/checkpoint.h"

namespace bbb::tests {

template <typename T>
std::string raw(T value) {
  return std::string(reinterpret_cast<const char*>(&value), sizeof value);
}

inline bool has_tensor(const models::Checkpoint& checkpoint, const std::string& name) {
  const std::vector<models::TensorInfo> tensors = checkpoint.list();
  return std::any_of(tensors.begin(), tensors.end(),
                     [&](const models::TensorInfo& t) { return t.name == name; });
}

inline void write_plain(const std::string& path, const std::string& content) {
  std::ofstream(path, std::ios::binary) << content;
}

inline std::string random_bytes(engine::Rng& rng, int64_t n) {
  std::string out(static_cast<size_t>(n), '\0');
  for (char& c : out) c = static_cast<char>(rng.below(256));
  return out;
}

// A safetensors file with this header text and data.
inline std::string safetensors_file(const std::string& header, const std::string& data) {
  return raw<uint64_t>(header.size()) + header + data;
}

// GGUF, field by field.
inline std::string gguf_string(const std::string& text) {
  return raw<uint64_t>(text.size()) + text;
}

struct GgufFile {
  uint32_t version = 3;
  std::string pairs, infos, data;
  uint64_t pair_count = 0, tensor_count = 0, alignment = 32;

  void pair(const std::string& key, uint32_t type, const std::string& value) {
    pairs += gguf_string(key) + raw(type) + value;
    ++pair_count;
  }
  void integer(const std::string& key, uint32_t value) { pair(key, 4, raw(value)); }
  void real(const std::string& key, float value) { pair(key, 6, raw(value)); }
  void text(const std::string& key, const std::string& value) { pair(key, 8, gguf_string(value)); }

  // dims: fastest first, as stored.
  void info(const std::string& name, const std::vector<uint64_t>& dims, uint32_t type,
            uint64_t offset) {
    infos += gguf_string(name) + raw(static_cast<uint32_t>(dims.size()));
    for (uint64_t d : dims) infos += raw(d);
    infos += raw(type) + raw(offset);
    ++tensor_count;
  }
  void tensor(const std::string& name, const engine::Shape& shape, uint32_t type,
              const std::string& bytes) {
    info(name, std::vector<uint64_t>(shape.rbegin(), shape.rend()), type, data.size());
    data += bytes;
    pad(data);
  }
  std::string bytes() const {
    std::string out = "GGUF" + raw(version) + raw(tensor_count) + raw(pair_count) + pairs + infos;
    pad(out);
    return out + data;
  }

 private:
  void pad(std::string& s) const { s.resize((s.size() + alignment - 1) / alignment * alignment); }
};

inline models::LlamaConfig file_model_config() {
  models::LlamaConfig c;
  c.vocab = 40;
  c.d_model = 64;
  c.hidden = 96;
  c.layers = 2;
  c.heads = 4;
  c.kv_heads = 2;
  c.head_dim = 16;
  c.max_position = 128;
  return c;
}

// A GGUF of the llama architecture: norms F32, tables F16, linears Q4_0 with scale 1; without the
// tensor `left_out`.
inline GgufFile tiny_gguf(const models::LlamaConfig& c, engine::Rng& rng,
                          const std::string& left_out = "") {
  GgufFile f;
  const auto size = [](int64_t n) { return static_cast<uint32_t>(n); };
  f.text("general.architecture", "llama");
  f.integer("llama.block_count", size(c.layers));
  f.integer("llama.context_length", size(c.max_position));
  f.integer("llama.embedding_length", size(c.d_model));
  f.integer("llama.feed_forward_length", size(c.hidden));
  f.integer("llama.attention.head_count", size(c.heads));
  f.integer("llama.attention.head_count_kv", size(c.kv_heads));
  f.real("llama.attention.layer_norm_rms_epsilon", static_cast<float>(c.rms_eps));
  f.real("llama.rope.freq_base", static_cast<float>(c.rope_theta));
  const auto norm = [&](const std::string& name) {
    f.tensor(name, {c.d_model}, 0, std::string(static_cast<size_t>(4 * c.d_model), '\0'));
  };
  const auto linear = [&](const std::string& name, int64_t n, int64_t k) {
    if (name == left_out) return;
    std::string blocks;
    for (int64_t i = 0; i < n * k / 32; ++i)
      blocks += raw<uint16_t>(0x3c00) + random_bytes(rng, 16);
    f.tensor(name, {n, k}, 2, blocks);
  };
  const auto table = [&](const std::string& name) {
    f.tensor(name, {c.vocab, c.d_model}, 1,
             std::string(static_cast<size_t>(2 * c.vocab * c.d_model), '\0'));
  };
  const int64_t q = c.heads * c.head_dim, kv = c.kv_heads * c.head_dim;
  table("token_embd.weight");
  norm("output_norm.weight");
  if (!c.tied_head) table("output.weight");
  for (int64_t i = 0; i < c.layers; ++i) {
    const std::string b = "blk." + std::to_string(i) + ".";
    norm(b + "attn_norm.weight");
    norm(b + "ffn_norm.weight");
    linear(b + "attn_q.weight", q, c.d_model);
    linear(b + "attn_k.weight", kv, c.d_model);
    linear(b + "attn_v.weight", kv, c.d_model);
    linear(b + "attn_output.weight", c.d_model, q);
    linear(b + "ffn_gate.weight", c.hidden, c.d_model);
    linear(b + "ffn_up.weight", c.hidden, c.d_model);
    linear(b + "ffn_down.weight", c.d_model, c.hidden);
  }
  return f;
}

// The tensors of a model directory. A test may change some before it writes them.
struct FileTensor {
  std::string name;
  data::FileDType dtype;
  engine::Shape shape;
  std::string bytes;
};

inline FileTensor file_tensor(const std::string& name, data::FileDType dtype,
                              const engine::Shape& shape, engine::Rng& rng) {
  return {name, dtype, shape, random_bytes(rng, engine::numel_of(shape) * data::size_bytes(dtype))};
}

inline std::vector<FileTensor> tiny_common(const models::LlamaConfig& c, engine::Rng& rng) {
  using data::FileDType;
  std::vector<FileTensor> out;
  const engine::Shape table = {c.vocab, c.d_model}, norm = {c.d_model};
  out.push_back(file_tensor("model.embed_tokens.weight", FileDType::BF16, table, rng));
  if (!c.tied_head) out.push_back(file_tensor("lm_head.weight", FileDType::BF16, table, rng));
  out.push_back(file_tensor("model.norm.weight", FileDType::F32, norm, rng));
  for (int64_t i = 0; i < c.layers; ++i)
    for (const char* name : {"input_layernorm.weight", "post_attention_layernorm.weight"})
      out.push_back(file_tensor(models::layer_name(i, name), FileDType::F32, norm, rng));
  return out;
}

inline std::vector<FileTensor> tiny_hf(const models::LlamaConfig& c, engine::Rng& rng) {
  std::vector<FileTensor> out = tiny_common(c, rng);
  for (int64_t i = 0; i < c.layers; ++i)
    for (const models::LinearShape& l : models::block_linears(c))
      out.push_back(file_tensor(models::layer_name(i, l.name) + ".weight", data::FileDType::BF16,
                                {l.n, l.k}, rng));
  return out;
}

inline std::vector<FileTensor> tiny_packed(const models::LlamaConfig& c, int bits, int64_t group,
                                           engine::Rng& rng) {
  using data::FileDType;
  std::vector<FileTensor> out = tiny_common(c, rng);
  for (int64_t i = 0; i < c.layers; ++i)
    for (const models::LinearShape& l : models::block_linears(c)) {
      const std::string p = models::layer_name(i, l.name);
      const int64_t groups = (l.k + group - 1) / group;
      out.push_back(
          file_tensor(p + ".qweight", FileDType::U8, {l.n, groups * group * bits / 8}, rng));
      out.push_back(file_tensor(p + ".scales", FileDType::F8_E4M3, {l.n, groups}, rng));
      out.push_back(file_tensor(p + ".zeros", FileDType::U8, {l.n, (groups * bits + 7) / 8}, rng));
      out.push_back({p + ".master_scale", FileDType::F32, {1}, raw(0.25f)});
    }
  return out;
}

// config.json with quantization_config; `replace` swaps one piece of it.
inline std::string packed_config(const models::LlamaConfig& c, const std::string& from = "",
                                 const std::string& to = "") {
  std::string q =
      R"("quantization_config": {"quant_method": "bbb", "format_version": 1, "bits": 2,
 "group_size": 32, "scale_dtype": "float8_e4m3fn", "symmetric": false, "activation_bits": 16,
 "nested": false, "modules_to_not_convert": ["lm_head", "model.embed_tokens"]},
)";
  if (!from.empty()) q.replace(q.find(from), from.size(), to);
  return models::config_to_json(c).insert(1, q);
}

// The bytes of a safetensors file with these tensors.
inline std::string safetensors_of(const std::vector<FileTensor>& tensors) {
  std::string header = "{", bytes;
  for (const FileTensor& t : tensors) {
    std::string shape;
    for (int64_t d : t.shape) shape += (shape.empty() ? "" : ",") + std::to_string(d);
    header += (header.size() > 1 ? ",\"" : "\"") + t.name + "\":{\"dtype\":\"" +
              data::name_of(t.dtype) + "\",\"shape\":[" + shape + "],\"data_offsets\":[" +
              std::to_string(bytes.size()) + "," + std::to_string(bytes.size() + t.bytes.size()) +
              "]}";
    bytes += t.bytes;
  }
  return safetensors_file(header + "}", bytes);
}

}  // namespace bbb::tests
