#include "models/config.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numbers>

#include "data/files.h"
#include "data/json.h"
#include "quant/check.h"

namespace bbb::models {
namespace {

using data::printable;
using nlohmann::json;

// An object of config.json; null counts as absent, as it does for Hugging Face.
class Object {
 public:
  Object(const json& value, std::string where) : value_(value), where_(std::move(where)) {
    BBB_CHECK(value.is_object(), where_, ": not a JSON object");
  }

  const std::string& where() const { return where_; }

  const json* find(const char* key) const {
    const auto found = value_.find(key);
    return found == value_.end() || found->is_null() ? nullptr : &*found;
  }
  const json& need(const char* key) const {
    const json* found = find(key);
    BBB_CHECK(found, where_, ": '", key, "' is missing");
    return *found;
  }
  Object object(const char* key) const { return Object(need(key), cat(where_, ": '", key, "'")); }

  int64_t integer(const char* key, int64_t least, int64_t most) const {
    const json& v = need(key);
    BBB_CHECK(v.is_number_integer(), where_, ": '", key, "' is not an integer");
    const bool fits = !v.is_number_unsigned() || v.get<uint64_t>() <= INT64_MAX;
    BBB_CHECK(fits && v.get<int64_t>() >= least && v.get<int64_t>() <= most, where_, ": '", key,
              "' is ", v.dump(), ", outside ", least, " to ", most);
    return v.get<int64_t>();
  }
  int64_t integer_or(const char* key, int64_t fallback, int64_t most) const {
    return find(key) ? integer(key, 1, most) : fallback;
  }
  double positive(const char* key) const {
    const json& v = need(key);
    BBB_CHECK(v.is_number(), where_, ": '", key, "' is not a number");
    BBB_CHECK(std::isfinite(v.get<double>()) && v.get<double>() > 0, where_, ": '", key,
              "' is not positive");
    return v.get<double>();
  }
  bool boolean(const char* key, bool fallback) const {
    const json* v = find(key);
    BBB_CHECK(!v || v->is_boolean(), where_, ": '", key, "' is not true or false");
    return v ? v->get<bool>() : fallback;
  }
  const std::string& string(const char* key) const {
    const json& v = need(key);
    BBB_CHECK(v.is_string(), where_, ": '", key, "' is not a string");
    return v.get_ref<const std::string&>();
  }
  // A token id or an array of them; an id below 0 stands for none.
  std::vector<int64_t> tokens(const char* key) const {
    std::vector<int64_t> ids;
    const json* v = find(key);
    for (const json& id : !v ? json::array() : v->is_array() ? *v : json::array({*v})) {
      BBB_CHECK(id.is_number_integer(), where_, ": '", key, "' is not a token id");
      if (id.get<int64_t>() >= 0) ids.push_back(id.get<int64_t>());
    }
    return ids;
  }

 private:
  const json& value_;
  std::string where_;
};

// Bounds far above any model, below which no product of sizes overflows.
constexpr int64_t kMostVocab = 1 << 24, kMostWidth = 1 << 20, kMostLayers = 1000,
                  kMostHeads = 1 << 12, kMostPosition = int64_t{1} << 32;

// The checks for sizes from any file.
void check_sizes(const LlamaConfig& c, const std::string& where) {
  const auto in_range = [&](const char* what, int64_t value, int64_t most) {
    BBB_CHECK(value >= 1 && value <= most, where, ": ", what, " is ", value, ", outside 1 to ",
              most);
  };
  in_range("the vocabulary's size", c.vocab, kMostVocab);
  in_range("the hidden size", c.d_model, kMostWidth);
  in_range("the intermediate size", c.hidden, kMostWidth);
  in_range("the number of layers", c.layers, kMostLayers);
  in_range("the number of heads", c.heads, kMostHeads);
  in_range("the number of key-value heads", c.kv_heads, c.heads);
  in_range("head_dim", c.head_dim, kMostHeads);
  in_range("the number of positions", c.max_position, kMostPosition);
  BBB_CHECK(c.heads % c.kv_heads == 0, where, ": ", c.heads, " heads are not a multiple of ",
            c.kv_heads, " key-value heads");
  BBB_CHECK(c.head_dim % 2 == 0, where, ": head_dim ", c.head_dim, " is odd");
  BBB_CHECK(c.sliding_window >= 0, where, ": sliding_window is negative");
  BBB_CHECK(std::isfinite(c.rms_eps) && c.rms_eps > 0 && c.rms_eps < 1, where,
            ": rms_norm_eps is outside 0 to 1");
  BBB_CHECK(std::isfinite(c.rope_theta) && c.rope_theta >= 1, where, ": rope_theta is below 1");
  BBB_CHECK(c.rope_theta > 1 || !c.rope_scaling || c.rope_scaling->kind != RopeKind::Yarn, where,
            ": rope_theta is 1, with which yarn is not defined");
  BBB_CHECK(!c.rope_scaling || c.rope_scaling->original_max_position >= 1, where,
            ": the original positions of the rope scaling are below 1");
  BBB_CHECK(c.rope_factors.empty() || static_cast<int64_t>(c.rope_factors.size()) == c.head_dim / 2,
            where, ": ", c.rope_factors.size(), " rope factors for head_dim ", c.head_dim);
  for (const float f : c.rope_factors)
    BBB_CHECK(std::isfinite(f) && f > 0, where, ": a rope factor is not positive");
}

// The families that are read. `gguf`: the name of their GGUF architecture; Mistral has llama's.
struct Family {
  const char *model_type, *architecture, *gguf;
};
constexpr Family kFamilies[] = {{"llama", "LlamaForCausalLM", "llama"},
                                {"mistral", "MistralForCausalLM", nullptr},
                                {"qwen2", "Qwen2ForCausalLM", "qwen2"},
                                {"qwen3", "Qwen3ForCausalLM", "qwen3"}};

// The family whose `field` is this; throws, listing what is read.
const Family& family_of(const char* Family::*field, const char* what, const std::string& name,
                        const std::string& where) {
  std::string read;
  for (const Family& family : kFamilies) {
    if (family.*field == nullptr) continue;
    if (name == family.*field) return family;
    read += cat(read.empty() ? "" : ", ", family.*field);
  }
  throw Error(cat(where, ": unsupported ", what, " '", printable(name), "'; ", read, " are read"));
}

bool is_qwen(const LlamaConfig& c) { return c.model_type == "qwen2" || c.model_type == "qwen3"; }

// A list of one known name or more, or an empty one.
void check_architectures(const Object& in) {
  const json& names = in.need("architectures");
  bool known = names.is_array() && names.empty();
  std::string text;
  for (const json& name : names) {
    for (const Family& family : kFamilies) known = known || name == family.architecture;
    text += cat(text.empty() ? "" : ", ", name.dump(-1, ' ', true));
  }
  BBB_CHECK(
      known, in.where(), ": unsupported architecture ", printable(text),
      "; LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM and Qwen3ForCausalLM are read");
}

[[noreturn]] void refuse_mixture(const std::string& where, const std::string& name) {
  throw Error(
      cat(where, ": '", printable(name), "' is a mixture of experts, which is not supported"));
}

bool names_mixture(const std::string& name) {
  return name.find("moe") != std::string::npos || name == "mixtral";
}

void check_no_mixture(const Object& in) {
  const std::string& type = in.string("model_type");
  bool experts = names_mixture(type);
  for (const char* key : {"num_experts", "num_local_experts", "n_routed_experts"})
    experts = experts || (in.find(key) && in.integer(key, 0, INT64_MAX) > 0);
  if (experts) refuse_mixture(in.where(), type);
}

// Qwen's window, as transformers applies it: `layer_types`, or all layers from max_window_layers
// on.
int64_t qwen_window(const Object& in, int64_t layers) {
  if (!in.boolean("use_sliding_window", false)) return 0;
  const int64_t window = in.integer("sliding_window", 1, kMostPosition);
  int64_t sliding = 0;  // layers
  if (const json* types = in.find("layer_types"))
    sliding = std::count(types->begin(), types->end(), "sliding_attention");
  else
    sliding = layers - std::min(layers, in.integer("max_window_layers", 0, kMostPosition));
  BBB_CHECK(sliding == 0 || sliding == layers, in.where(), ": a sliding window in ", sliding,
            " of the ", layers, " layers ('max_window_layers') is not supported");
  return sliding == 0 ? 0 : window;
}

int64_t derived_head_dim(const LlamaConfig& c, const std::string& where) {
  BBB_CHECK(c.heads > 0 && c.d_model % c.heads == 0, where, ": hidden size ", c.d_model,
            " is not a multiple of ", c.heads, " heads, and head_dim is missing");
  return c.d_model / c.heads;
}

// Applies to the model's object and to its rope object.
void check_partial_rotary(const Object& in) {
  BBB_CHECK(!in.find("partial_rotary_factor") || in.positive("partial_rotary_factor") == 1,
            in.where(), ": a partial_rotary_factor other than 1 is not supported");
}

constexpr RopeKind kRopeKinds[] = {RopeKind::Linear, RopeKind::Dynamic, RopeKind::Yarn,
                                   RopeKind::Llama3};

// Yarn's factor on queries and keys for a context `scale` times as long.
double yarn_attention(double scale, double mscale = 1) {
  return scale <= 1 ? 1 : 0.1 * mscale * std::log(scale) + 1;
}

void read_yarn(const Object& rope, RopeScaling& s) {
  const auto positive_or = [&](const char* key, double fallback) {
    return rope.find(key) ? rope.positive(key) : fallback;
  };
  s.beta_fast = positive_or("beta_fast", s.beta_fast);
  s.beta_slow = positive_or("beta_slow", s.beta_slow);
  s.truncate = rope.boolean("truncate", true);
  const bool mscales = rope.find("mscale") && rope.find("mscale_all_dim");
  const double by_factor = mscales ? yarn_attention(s.factor, rope.positive("mscale")) /
                                         yarn_attention(s.factor, rope.positive("mscale_all_dim"))
                                   : yarn_attention(s.factor);
  s.attention_factor = positive_or("attention_factor", by_factor);
}

// `rope`: rope_scaling, or rope_parameters of newer transformers, which also holds rope_theta.
// `original_positions`: the default of original_max_position_embeddings.
std::optional<RopeScaling> read_rope_scaling(const Object& rope, int64_t original_positions) {
  check_partial_rotary(rope);
  const bool unscaled = !rope.find("factor") || rope.positive("factor") == 1;
  const char* key = rope.find("rope_type") ? "rope_type" : "type";
  if (!rope.find(key)) {
    BBB_CHECK(unscaled, rope.where(), ": 'rope_type' is missing");
    return std::nullopt;
  }
  const std::string& type = rope.string(key);
  if (type == "default") return std::nullopt;
  RopeScaling s;
  const auto is_type = [&](RopeKind kind) { return type == name_of(kind); };
  const auto kind = std::find_if(std::begin(kRopeKinds), std::end(kRopeKinds), is_type);
  BBB_CHECK(kind != std::end(kRopeKinds), rope.where(), ": unsupported rope scaling '",
            printable(type), "'; default, linear, dynamic, yarn and llama3 are read");
  s.kind = *kind;
  s.factor = rope.positive("factor");
  if (s.kind == RopeKind::Linear && s.factor == 1) return std::nullopt;
  if (s.kind == RopeKind::Linear || s.kind == RopeKind::Dynamic) return s;
  s.original_max_position =
      rope.integer_or("original_max_position_embeddings", original_positions, kMostPosition);
  if (s.kind == RopeKind::Yarn) {
    read_yarn(rope, s);
    return s;
  }
  s.low_freq_factor = rope.positive("low_freq_factor");
  s.high_freq_factor = rope.positive("high_freq_factor");
  BBB_CHECK(s.high_freq_factor > s.low_freq_factor, rope.where(),
            ": high_freq_factor is not above low_freq_factor");
  return s;
}

// The divisor of a pair's frequency: 1 for short wavelengths, `factor` for long ones, interpolated
// in between. Source: Meta's Llama 3.1 reference model, apply_scaling().
double llama3_divisor(const RopeScaling& s, double frequency) {
  const double turns =
      static_cast<double>(s.original_max_position) * frequency / (2 * std::numbers::pi);
  if (turns > s.high_freq_factor) return 1;
  if (turns < s.low_freq_factor) return s.factor;
  const double smooth = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor);
  return 1 / ((1 - smooth) / s.factor + smooth);
}

double rope_frequency(double theta, int64_t head_dim, int64_t pair) {
  return std::pow(theta, -2.0 * static_cast<double>(pair) / static_cast<double>(head_dim));
}

// The same for Yarn. The pair that rotates `turns` times over the original positions is the
// (real-valued) pair_of(turns). Above beta_fast turns a frequency stays, below beta_slow it is
// divided by the factor; in between the two are mixed by a ramp over the pairs.
double yarn_frequency(const LlamaConfig& c, int64_t pair) {
  const RopeScaling& s = *c.rope_scaling;
  const double d = static_cast<double>(c.head_dim);
  const auto pair_of = [&](double turns) {
    const double positions = static_cast<double>(s.original_max_position);
    return d * std::log(positions / (turns * 2 * std::numbers::pi)) / (2 * std::log(c.rope_theta));
  };
  double low = pair_of(s.beta_fast), high = pair_of(s.beta_slow);
  if (s.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, d - 1);
  if (low == high) high += 0.001;
  const double ramp = std::clamp((static_cast<double>(pair) - low) / (high - low), 0.0, 1.0);
  return rope_frequency(c.rope_theta, c.head_dim, pair) * (ramp / s.factor + 1 - ramp);
}

// Dynamic: the plain frequencies of a larger theta.
double dynamic_theta(const LlamaConfig& c, int64_t tokens) {
  const double d = static_cast<double>(c.head_dim), factor = c.rope_scaling->factor;
  const double length =
      static_cast<double>(std::max(tokens, c.max_position)) / static_cast<double>(c.max_position);
  return c.rope_theta * std::pow(factor * length - (factor - 1), d / (d - 2));
}

// A GGUF holds only the divisors. The divisors of the released Llama 3.1 and 3.2 are recognized and
// become a scaling again.
std::optional<RopeScaling> known_scaling(const LlamaConfig& c) {
  for (const double factor : {8.0, 32.0}) {
    const RopeScaling scaling{.factor = factor};
    bool same = true;
    for (size_t i = 0; i < c.rope_factors.size(); ++i) {
      const double frequency = rope_frequency(c.rope_theta, c.head_dim, static_cast<int64_t>(i));
      const double divisor = llama3_divisor(scaling, frequency);
      same = same && std::abs(c.rope_factors[i] / divisor - 1) < 1e-4;
    }
    if (same) return scaling;
  }
  return std::nullopt;
}

// The shortest decimal of a value that was FP32: 1e-05, not 9.999999747378752e-06.
double shortest(double value) {
  char text[32];
  const auto [end, error] = std::to_chars(text, text + sizeof text, static_cast<float>(value));
  BBB_ASSERT(error == std::errc());
  double out = value;
  std::from_chars(text, end, out);
  return out;
}

}  // namespace

int64_t LlamaConfig::linear_parameters() const {
  int64_t per_layer = 0;
  for (const LinearShape& l : block_linears(*this)) per_layer += l.n * l.k;
  return layers * per_layer;
}

std::vector<int64_t> eos_ids_from_json(const std::string& text, const std::string& where) {
  const json parsed = data::parse_json(text, where);
  return Object(parsed, where).tokens("eos_token_id");
}

LlamaConfig config_from_json(const std::string& text, const std::string& where) {
  const json parsed = data::parse_json(text, where);
  const Object in(parsed, where);
  LlamaConfig c;
  check_no_mixture(in);
  c.model_type = in.string("model_type");
  family_of(&Family::model_type, "model_type", c.model_type, where);
  const bool mistral = c.model_type == "mistral", qwen = is_qwen(c);
  if (in.find("architectures")) check_architectures(in);
  c.vocab = in.integer("vocab_size", 1, kMostVocab);
  c.d_model = in.integer("hidden_size", 1, kMostWidth);
  c.hidden = in.integer("intermediate_size", 1, kMostWidth);
  c.layers = in.integer("num_hidden_layers", 1, kMostLayers);
  c.heads = in.integer("num_attention_heads", 1, kMostHeads);
  // Mistral and Qwen: without the key transformers' default; with null one kv-head for each head.
  const int64_t kv_heads = parsed.contains("num_key_value_heads") ? c.heads
                           : mistral                              ? 8
                           : qwen                                 ? 32
                                                                  : c.heads;
  c.kv_heads = in.integer_or("num_key_value_heads", kv_heads, kMostHeads);
  if (in.find("head_dim"))
    c.head_dim = in.integer("head_dim", 1, kMostHeads);
  else
    c.head_dim = c.model_type == "qwen3" ? 128 : derived_head_dim(c, where);
  c.max_position = in.integer_or("max_position_embeddings",
                                 mistral ? 131072
                                 : qwen  ? 32768
                                         : 2048,
                                 kMostPosition);
  c.rms_eps = in.find("rms_norm_eps") ? in.positive("rms_norm_eps") : 1e-6;
  c.tied_head = in.boolean("tie_word_embeddings", false);
  if (const std::vector<int64_t> bos = in.tokens("bos_token_id"); !bos.empty()) c.bos_id = bos[0];
  c.eos_ids = in.tokens("eos_token_id");
  // Llama ignores the key. Mistral: without the key transformers' default, 4096; with null none.
  if (mistral)
    c.sliding_window = !parsed.contains("sliding_window")
                           ? 4096
                           : in.integer_or("sliding_window", 0, kMostPosition);
  if (qwen) c.sliding_window = qwen_window(in, c.layers);

  // Qwen2 has biases of q, k and v, whatever the file says.
  const bool attention_bias = in.boolean("attention_bias", false);
  c.qkv_bias = attention_bias || c.model_type == "qwen2";
  c.output_bias = attention_bias && c.model_type != "qwen2";
  c.mlp_bias = in.boolean("mlp_bias", false);
  c.qk_norm = c.model_type == "qwen3";
  BBB_CHECK(!mistral || !attention_bias, where, ": 'attention_bias' is true, but mistral has none");
  BBB_CHECK(c.model_type == "llama" || !c.mlp_bias, where, ": 'mlp_bias' is true, but ",
            c.model_type, " has none");
  if (in.find("hidden_act"))
    BBB_CHECK(in.string("hidden_act") == "silu", where, ": unsupported hidden_act '",
              printable(in.string("hidden_act")), "'");
  check_partial_rotary(in);

  if (in.find("rope_theta")) c.rope_theta = in.positive("rope_theta");
  const int64_t original =
      in.integer_or("original_max_position_embeddings", c.max_position, kMostPosition);
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    if (!in.find(key)) continue;
    const Object rope = in.object(key);
    if (rope.find("rope_theta")) c.rope_theta = rope.positive("rope_theta");
    if (const auto scaling = read_rope_scaling(rope, original)) c.rope_scaling = scaling;
  }
  if (const json* factors = in.find("rope_factors")) {
    BBB_CHECK(factors->is_array(), where, ": 'rope_factors' is not an array");
    for (const json& f : *factors) {
      BBB_CHECK(f.is_number(), where, ": 'rope_factors' holds something other than numbers");
      c.rope_factors.push_back(f.get<float>());
    }
    BBB_CHECK(!c.rope_scaling, where, ": both rope_factors and a rope scaling are given");
  }
  check_sizes(c, where);
  return c;
}

namespace {

// As in llama.cpp: the default type is linear, and a factor of 0 scales nothing. `prefix`: of the
// keys, with its dot.
std::optional<RopeScaling> gguf_rope_scaling(const data::Gguf& gguf, const std::string& prefix,
                                             int64_t max_position) {
  const std::string keys = prefix + "rope.scaling.";
  const auto real_or = [&](const std::string& key, double fallback) {
    return gguf.has(key) ? shortest(gguf.real(key)) : fallback;
  };
  const std::string type = gguf.has(keys + "type") ? gguf.string(keys + "type") : "linear";
  BBB_CHECK(type == "none" || type == "linear" || type == "yarn", gguf.path(),
            ": unsupported rope scaling '", printable(type), "'; none, linear and yarn are read");
  RopeScaling s{.kind = type == "yarn" ? RopeKind::Yarn : RopeKind::Linear};
  s.factor = real_or(keys + "factor", 0);
  if (s.factor == 0) s.factor = real_or(prefix + "rope.scale_linear", 0);
  if (s.factor == 0) s.factor = 1;
  BBB_CHECK(std::isfinite(s.factor) && s.factor > 0, gguf.path(), ": ", keys, "factor is ",
            s.factor);
  for (const char* key : {"attn_factor", "yarn_ext_factor", "yarn_attn_factor"}) {
    const double value = real_or(keys + key, 1);
    BBB_CHECK(value == 1, gguf.path(), ": ", keys, key, " is ", value, ", which is not supported");
  }
  if (type == "none" || s.factor == 1) return std::nullopt;
  if (s.kind == RopeKind::Linear) return s;
  s.original_max_position = gguf.has(keys + "original_context_length")
                                ? gguf.integer(keys + "original_context_length")
                                : max_position;
  s.beta_fast = real_or(keys + "yarn_beta_fast", s.beta_fast);
  s.beta_slow = real_or(keys + "yarn_beta_slow", s.beta_slow);
  s.attention_factor = yarn_attention(s.factor);
  return s;
}

}  // namespace

LlamaConfig config_from_gguf(const data::Gguf& gguf) {
  const std::string& where = gguf.path();
  const std::string& architecture = gguf.string("general.architecture");
  const std::string prefix = architecture + ".";
  const auto own = [&](const char* key) { return prefix + key; };
  const auto optional = [&](const std::string& key, int64_t fallback) {
    return gguf.has(key) ? gguf.integer(key) : fallback;
  };
  if (names_mixture(architecture) || optional(own("expert_count"), 0) > 0)
    refuse_mixture(where, architecture);
  LlamaConfig c;
  c.model_type = family_of(&Family::gguf, "architecture", architecture, where).model_type;
  c.layers = gguf.integer(own("block_count"));
  c.max_position = gguf.integer(own("context_length"));
  c.d_model = gguf.integer(own("embedding_length"));
  c.hidden = gguf.integer(own("feed_forward_length"));
  c.heads = gguf.integer(own("attention.head_count"));
  c.kv_heads = optional(own("attention.head_count_kv"), c.heads);
  c.head_dim = gguf.has(own("attention.key_length")) ? gguf.integer(own("attention.key_length"))
                                                     : derived_head_dim(c, where);
  for (const char* key : {"attention.value_length", "rope.dimension_count"})
    BBB_CHECK(optional(own(key), c.head_dim) == c.head_dim, where, ": ", own(key), " is ",
              gguf.integer(own(key)), ", head_dim is ", c.head_dim);
  c.rms_eps = shortest(gguf.real(own("attention.layer_norm_rms_epsilon")));
  if (gguf.has(own("rope.freq_base"))) c.rope_theta = shortest(gguf.real(own("rope.freq_base")));
  c.sliding_window = optional(own("attention.sliding_window"), 0);
  BBB_CHECK(c.sliding_window == 0 || !is_qwen(c), where, ": ", own("attention.sliding_window"),
            " is not supported");
  if (c.sliding_window > 0) c.model_type = "mistral";
  c.rope_scaling = gguf_rope_scaling(gguf, prefix, c.max_position);
  const auto llama_has = [&](const char* tensor) {
    return c.model_type == "llama" && gguf.tensors().count(tensor) > 0;
  };
  c.output_bias = llama_has("blk.0.attn_q.bias");  // transformers' Llama has all four or none
  c.qkv_bias = c.output_bias || c.model_type == "qwen2";
  c.mlp_bias = llama_has("blk.0.ffn_gate.bias");
  c.qk_norm = c.model_type == "qwen3";

  const data::GgufTensor& embedding = gguf.tensor("token_embd.weight");
  c.vocab = embedding.shape.front();
  BBB_CHECK(optional(own("vocab_size"), c.vocab) == c.vocab, where, ": ", own("vocab_size"), " is ",
            gguf.integer(own("vocab_size")), ", token_embd.weight has ", c.vocab, " rows");
  c.tied_head = gguf.tensors().count("output.weight") == 0;
  if (const int64_t bos = optional("tokenizer.ggml.bos_token_id", -1); bos >= 0) c.bos_id = bos;
  for (const char* key : {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id",
                          "tokenizer.ggml.eom_token_id"}) {
    const int64_t id = optional(key, -1);
    if (id >= 0 && std::find(c.eos_ids.begin(), c.eos_ids.end(), id) == c.eos_ids.end())
      c.eos_ids.push_back(id);
  }
  if (gguf.tensors().count("rope_freqs.weight")) {
    const data::GgufTensor& factors = gguf.tensor("rope_freqs.weight");
    BBB_CHECK(factors.shape == engine::Shape{c.head_dim / 2}, where,
              ": tensor 'rope_freqs.weight' has shape ", engine::to_string(factors.shape),
              ", head_dim is ", c.head_dim);
    c.rope_factors.resize(static_cast<size_t>(factors.numel()));
    data::gguf_dequantize(c.rope_factors.data(), factors, "rope_freqs.weight");
  }
  check_sizes(c, where);
  if (c.rope_factors.empty()) return c;
  BBB_CHECK(!c.rope_scaling, where, ": both rope_freqs.weight and a rope scaling are given");
  if ((c.rope_scaling = known_scaling(c))) c.rope_factors.clear();
  return c;
}

LlamaConfig synthetic_config(const std::string& name) {
  LlamaConfig c;
  const auto sizes = [&](int64_t vocab, int64_t d_model, int64_t hidden, int64_t layers,
                         int64_t heads, int64_t kv_heads, int64_t max_position, double theta) {
    c.vocab = vocab;
    c.d_model = d_model;
    c.hidden = hidden;
    c.layers = layers;
    c.heads = heads;
    c.kv_heads = kv_heads;
    c.head_dim = d_model / heads;
    c.max_position = max_position;
    c.rope_theta = theta;
  };
  if (name == "smollm2-135m") {
    sizes(49152, 576, 1536, 30, 9, 3, 8192, 1e5);
    c.tied_head = true;
    c.bos_id = 1;
    c.eos_ids = {2};
  } else if (name == "llama-3.2-1b") {
    sizes(128256, 2048, 8192, 16, 32, 8, 131072, 5e5);
    c.rope_scaling = RopeScaling{.factor = 32};
    c.tied_head = true;
    c.bos_id = 128000;
    c.eos_ids = {128001};
  } else if (name == "qwen3-0.6b") {
    sizes(151936, 1024, 3072, 28, 16, 8, 40960, 1e6);
    c.model_type = "qwen3";
    c.head_dim = 128;
    c.rms_eps = 1e-6;
    c.qk_norm = true;
    c.tied_head = true;
    c.bos_id = 151643;
    c.eos_ids = {151645};
  } else if (name == "llama-3-8b") {
    sizes(128256, 4096, 14336, 32, 32, 8, 8192, 5e5);
    c.bos_id = 128000;
    c.eos_ids = {128001};
  } else if (name == "llama-2-7b") {
    sizes(32000, 4096, 11008, 32, 32, 32, 4096, 1e4);
    c.bos_id = 1;
    c.eos_ids = {2};
  } else {
    throw UsageError(cat("no synthetic model '", printable(name), "'; it takes ", kSyntheticSizes));
  }
  return c;
}

static nlohmann::ordered_json to_json(const RopeScaling& s) {
  nlohmann::ordered_json out = {{"rope_type", name_of(s.kind)}, {"factor", s.factor}};
  if (s.kind == RopeKind::Llama3) {
    out["low_freq_factor"] = s.low_freq_factor;
    out["high_freq_factor"] = s.high_freq_factor;
  }
  if (s.kind == RopeKind::Yarn) {
    out["beta_fast"] = s.beta_fast;
    out["beta_slow"] = s.beta_slow;
    out["truncate"] = s.truncate;
    out["attention_factor"] = s.attention_factor;
  }
  if (s.kind == RopeKind::Llama3 || s.kind == RopeKind::Yarn)
    out["original_max_position_embeddings"] = s.original_max_position;
  return out;
}

std::string gguf_architecture(const LlamaConfig& c) {
  return c.model_type == "mistral" ? "llama" : c.model_type;
}

std::string config_to_json(const LlamaConfig& c) {
  const bool mistral = c.model_type == "mistral";
  nlohmann::ordered_json out;
  out["architectures"] = {
      family_of(&Family::model_type, "model_type", c.model_type, "the model").architecture};
  out["model_type"] = c.model_type;
  out["vocab_size"] = c.vocab;
  out["hidden_size"] = c.d_model;
  out["intermediate_size"] = c.hidden;
  out["num_hidden_layers"] = c.layers;
  out["num_attention_heads"] = c.heads;
  out["num_key_value_heads"] = c.kv_heads;
  out["head_dim"] = c.head_dim;
  out["hidden_act"] = "silu";
  out["max_position_embeddings"] = c.max_position;
  out["rms_norm_eps"] = c.rms_eps;
  out["rope_theta"] = c.rope_theta;
  out["rope_scaling"] = nullptr;
  if (c.rope_scaling) out["rope_scaling"] = to_json(*c.rope_scaling);
  if (!c.rope_factors.empty()) out["rope_factors"] = c.rope_factors;
  if (mistral) {
    out["sliding_window"] = nullptr;
    if (c.sliding_window > 0) out["sliding_window"] = c.sliding_window;
  } else if (is_qwen(c)) {
    out["use_sliding_window"] = c.sliding_window > 0;
    if (c.sliding_window > 0) {
      out["sliding_window"] = c.sliding_window;
      out["max_window_layers"] = 0;
    }
    if (c.qk_norm) out["attention_bias"] = c.qkv_bias;
  } else {
    out["attention_bias"] = c.qkv_bias;
    out["mlp_bias"] = c.mlp_bias;
  }
  out["tie_word_embeddings"] = c.tied_head;
  if (c.bos_id) out["bos_token_id"] = *c.bos_id;
  if (c.eos_ids.size() == 1)
    out["eos_token_id"] = c.eos_ids[0];
  else if (!c.eos_ids.empty())
    out["eos_token_id"] = c.eos_ids;
  out["torch_dtype"] = "bfloat16";
  return out.dump(2) + "\n";
}

const char* name_of(RopeKind kind) {
  constexpr const char* kNames[] = {"linear", "dynamic", "yarn", "llama3"};
  return kNames[static_cast<int>(kind)];
}

static double scaled_frequency(const LlamaConfig& c, int64_t pair, int64_t tokens) {
  const double plain = rope_frequency(c.rope_theta, c.head_dim, pair);
  if (!c.rope_scaling) return plain;
  const RopeScaling& s = *c.rope_scaling;
  if (s.kind == RopeKind::Linear) return plain / s.factor;
  if (s.kind == RopeKind::Yarn) return yarn_frequency(c, pair);
  if (s.kind == RopeKind::Llama3) return plain / llama3_divisor(s, plain);
  return rope_frequency(dynamic_theta(c, tokens), c.head_dim, pair);
}

std::vector<float> rope_inv_freq(const LlamaConfig& c, int64_t tokens) {
  std::vector<float> out;
  for (int64_t i = 0; i < c.head_dim / 2; ++i) {
    double frequency = scaled_frequency(c, i, tokens);
    if (!c.rope_factors.empty()) frequency /= c.rope_factors[static_cast<size_t>(i)];
    out.push_back(static_cast<float>(frequency));
  }
  return out;
}

double rope_factor(const LlamaConfig& c) {
  return c.rope_scaling ? c.rope_scaling->attention_factor : 1;
}

std::vector<float> rope_divisors(const LlamaConfig& c) {
  if (!c.rope_scaling || c.rope_scaling->kind != RopeKind::Llama3) return c.rope_factors;
  std::vector<float> out;
  for (int64_t i = 0; i < c.head_dim / 2; ++i)
    out.push_back(static_cast<float>(
        llama3_divisor(*c.rope_scaling, rope_frequency(c.rope_theta, c.head_dim, i))));
  return out;
}

std::vector<LinearShape> block_linears(const LlamaConfig& c) {
  const int64_t q = c.heads * c.head_dim, kv = c.kv_heads * c.head_dim;
  return {{"self_attn.q_proj", q, c.d_model, kAttentionSite, c.qkv_bias},
          {"self_attn.k_proj", kv, c.d_model, kAttentionSite, c.qkv_bias},
          {"self_attn.v_proj", kv, c.d_model, kAttentionSite, c.qkv_bias},
          {"self_attn.o_proj", c.d_model, q, kOutputSite, c.output_bias},
          {"mlp.gate_proj", c.hidden, c.d_model, kMlpSite, c.mlp_bias},
          {"mlp.up_proj", c.hidden, c.d_model, kMlpSite, c.mlp_bias},
          {"mlp.down_proj", c.d_model, c.hidden, kDownSite, c.mlp_bias}};
}

std::vector<NormShape> block_norms(const LlamaConfig& c) {
  std::vector<NormShape> norms = {{kInputNorm, c.d_model}, {kPostNorm, c.d_model}};
  if (c.qk_norm) norms.insert(norms.end(), {{kQueryNorm, c.head_dim}, {kKeyNorm, c.head_dim}});
  return norms;
}

std::string layer_name(int64_t layer, const std::string& suffix) {
  return cat("model.layers.", layer, ".", suffix);
}

}  // namespace bbb::models
