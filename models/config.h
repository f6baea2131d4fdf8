// LlamaConfig: the sizes and constants of a Llama-family model, read from config.json or GGUF
// metadata.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "data/gguf.h"

namespace bbb::models {

// Llama-3's frequency scaling (rope_type "llama3").
struct Llama3RopeScaling {
  double factor = 8;
  double low_freq_factor = 1;
  double high_freq_factor = 4;
  int64_t original_max_position = 8192;
};

struct LlamaConfig {
  std::string model_type = "llama";  // or "mistral"
  int64_t vocab = 0;
  int64_t d_model = 0;
  int64_t hidden = 0;
  int64_t layers = 0;
  int64_t heads = 0;
  int64_t kv_heads = 0;
  int64_t head_dim = 0;
  int64_t max_position = 0;
  int64_t sliding_window = 0;  // 0: none
  double rms_eps = 1e-5;
  double rope_theta = 1e4;
  std::optional<Llama3RopeScaling> rope_scaling;
  std::vector<float>
      rope_factors;  // GGUF's rope_freqs.weight: divides each frequency; empty if none
  bool tied_head = false;
  std::optional<int64_t> bos_id;
  std::vector<int64_t> eos_ids;  // the file's eos_token_id; each of them ends a text

  int64_t linear_parameters() const;  // of all quantized linears
};

// Both throw, naming the key, on a missing, mistyped or absurd value, on an architecture other than
// Llama (which SmolLM2 is) and Mistral, on biases, and on a rope scaling other than llama3. An
// optional key that is missing has the default of transformers (or llama.cpp).
LlamaConfig config_from_json(const std::string& json, const std::string& where);
LlamaConfig config_from_gguf(const data::Gguf& gguf);
// eos_token_id of config.json or generation_config.json: an id, several, or none.
std::vector<int64_t> eos_ids_from_json(const std::string& json, const std::string& where);
// smollm2-135m, llama-3.2-1b, llama-3-8b, llama-2-7b; throws UsageError, listing them, otherwise.
LlamaConfig synthetic_config(const std::string& name);
// A Hugging Face config.json for this model, without quantization_config.
std::string config_to_json(const LlamaConfig& config);

// Frequencies of the head_dim / 2 pairs: theta^(-2i/d), scaled as the config says (F64, then F32).
std::vector<float> rope_inv_freq(const LlamaConfig& config);
// What the scaling divides each frequency by (rope_freqs.weight of a GGUF); empty if there is none.
std::vector<float> rope_divisors(const LlamaConfig& config);

// The input sites of a block. Linears of one site share their input.
enum Site { kAttentionSite, kOutputSite, kMlpSite, kDownSite };
inline constexpr int kSites = 4;

// The seven linears of a block, in the order in which they are applied.
struct LinearShape {
  const char* name;  // "self_attn.q_proj"
  int64_t n;
  int64_t k;
  Site site;
};
std::vector<LinearShape> block_linears(const LlamaConfig& config);
std::string layer_name(int64_t layer, const std::string& suffix);  // "model.layers.3.mlp.up_proj"

// Hugging Face's names of the other weights; the first two are suffixes of a layer's.
inline constexpr const char* kInputNorm = "input_layernorm.weight";
inline constexpr const char* kPostNorm = "post_attention_layernorm.weight";
inline constexpr const char* kEmbedding = "model.embed_tokens.weight";
inline constexpr const char* kFinalNorm = "model.norm.weight";
inline constexpr const char* kHead = "lm_head.weight";

}  // namespace bbb::models
