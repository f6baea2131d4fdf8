// LlamaConfig: the sizes and constants of a Llama-family model, read from config.json or GGUF
// metadata.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "data/gguf.h"

namespace bbb::models {

// How the frequencies of a longer context differ from theta^(-2i/d). Linear divides all of them.
// Llama3 and Yarn divide the low ones and leave the high ones. Dynamic raises theta with the length
// of a sequence beyond the model's positions.
enum class RopeKind { Linear, Dynamic, Yarn, Llama3 };
const char* name_of(RopeKind kind);  // transformers' rope_type

struct RopeScaling {
  RopeKind kind = RopeKind::Llama3;
  double factor = 8;
  int64_t original_max_position = 8192;              // of Llama3 and Yarn
  double low_freq_factor = 1, high_freq_factor = 4;  // of Llama3
  double beta_fast = 32, beta_slow = 1;              // of Yarn: rotations over the positions above
  bool truncate = true;                              // of Yarn: to whole pairs
  double attention_factor = 1;                       // of Yarn: multiplies queries and keys
};

struct LlamaConfig {
  std::string model_type = "llama";  // or "mistral", "qwen2", "qwen3"
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
  std::optional<RopeScaling> rope_scaling;
  std::vector<float>
      rope_factors;  // GGUF's rope_freqs.weight: divides each frequency; empty if none
  bool qkv_bias = false, output_bias = false, mlp_bias = false;  // of a block's linears
  bool qk_norm = false;  // an RMSNorm of each head of queries and keys, before rope
  bool tied_head = false;
  std::optional<int64_t> bos_id;
  std::vector<int64_t> eos_ids;  // the file's eos_token_id; each of them ends a text

  int64_t linear_parameters() const;  // of all quantized linears
};

// Both throw, naming the key, on a missing, mistyped or absurd value, on an architecture other than
// Llama (which SmolLM2 is), Mistral, Qwen2 and Qwen3, and on any other rope scaling. An optional
// key that is missing has the default of transformers (or llama.cpp).
LlamaConfig config_from_json(const std::string& json, const std::string& where);
LlamaConfig config_from_gguf(const data::Gguf& gguf);
// eos_token_id of config.json or generation_config.json: an id, several, or none.
std::vector<int64_t> eos_ids_from_json(const std::string& json, const std::string& where);
inline constexpr const char* kSyntheticSizes =
    "smollm2-135m, qwen3-0.6b, llama-3.2-1b, llama-3-8b or llama-2-7b";
// Sizes by one of these names; throws UsageError, listing them, otherwise.
LlamaConfig synthetic_config(const std::string& name);
// A Hugging Face config.json for this model, without quantization_config.
std::string config_to_json(const LlamaConfig& config);

// general.architecture of the model's GGUF: Mistral has Llama's, the others their own.
std::string gguf_architecture(const LlamaConfig& config);

// Frequencies of the head_dim / 2 pairs: theta^(-2i/d), scaled as the config says (F64, then F32).
// `tokens`: the length of the sequence, on which they depend beyond max_position if the scaling is
// Dynamic. Source of the formulas: transformers, modeling_rope_utils.py.
std::vector<float> rope_inv_freq(const LlamaConfig& config, int64_t tokens = 0);
// What rotated queries and keys are multiplied by: Yarn's attention factor, else 1.
double rope_factor(const LlamaConfig& config);
// The factors of a GGUF's rope_freqs.weight, which divide the frequencies: those of a Llama3
// scaling, or rope_factors; else empty.
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
  bool bias;  // (n), never trained
};
std::vector<LinearShape> block_linears(const LlamaConfig& config);

// The norms of a block: of the attention's and the MLP's input, then, with qk_norm, of a head's
// query and key.
struct NormShape {
  const char* name;  // "input_layernorm.weight"
  int64_t size;
};
std::vector<NormShape> block_norms(const LlamaConfig& config);
std::string layer_name(int64_t layer, const std::string& suffix);  // "model.layers.3.mlp.up_proj"

// Hugging Face's names of the other weights; the norms but the last are suffixes of a layer's.
inline constexpr const char* kInputNorm = "input_layernorm.weight";
inline constexpr const char* kPostNorm = "post_attention_layernorm.weight";
inline constexpr const char* kQueryNorm = "self_attn.q_norm.weight";
inline constexpr const char* kKeyNorm = "self_attn.k_norm.weight";
inline constexpr const char* kEmbedding = "model.embed_tokens.weight";
inline constexpr const char* kFinalNorm = "model.norm.weight";
inline constexpr const char* kHead = "lm_head.weight";

}  // namespace bbb::models
