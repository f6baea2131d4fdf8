// LlamaConfig: the config.json of every released family, refusals, and the rope frequencies.
#include "models/config.h"

#include <catch2/catch.hpp>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numbers>

#include "data/json.h"
#include "quant/check.h"
#include "tests/support.h"

using namespace bbb;
using namespace bbb::models;
using Catch::Matchers::Contains;
using nlohmann::json;

namespace {

// A minimal config.json with the keys of `changes` set and the keys of `remove` erased.
std::string config_text(const json& changes, const std::vector<std::string>& remove = {}) {
  json c = {{"model_type", "llama"},  {"vocab_size", 100},
            {"hidden_size", 64},      {"intermediate_size", 96},
            {"num_hidden_layers", 2}, {"num_attention_heads", 4},
            {"rms_norm_eps", 1e-6},   {"max_position_embeddings", 128}};
  c.update(changes);
  for (const std::string& key : remove) c.erase(key);
  return c.dump();
}

LlamaConfig read(const json& changes, const std::vector<std::string>& remove = {}) {
  return config_from_json(config_text(changes, remove), "config.json");
}

}  // namespace

TEST_CASE("config: defaults and derived sizes") {
  const LlamaConfig c = read(json::object());
  CHECK(c.kv_heads == 4);
  CHECK(c.head_dim == 16);
  CHECK(c.rope_theta == 1e4);
  CHECK(c.rms_eps == 1e-6);
  CHECK_FALSE(c.tied_head);
  CHECK_FALSE(c.rope_scaling);
  CHECK_FALSE(c.bos_id);
  CHECK(c.linear_parameters() == 2 * (4 * 64 * 64 + 3 * 64 * 96));

  const LlamaConfig d = read({{"num_key_value_heads", 2},
                              {"head_dim", 32},
                              {"rope_theta", 5e5},
                              {"tie_word_embeddings", true},
                              {"bos_token_id", 1},
                              {"eos_token_id", {7, 8}},
                              {"head_dim", 32},
                              {"sliding_window", 64}});
  CHECK(d.kv_heads == 2);
  CHECK(d.head_dim == 32);
  CHECK(d.rope_theta == 5e5);
  CHECK(d.tied_head);
  CHECK(d.bos_id == 1);
  CHECK(d.eos_ids == std::vector<int64_t>{7, 8});
  CHECK(d.sliding_window == 0);  // Llama ignores the file's window
  CHECK(block_linears(d)[0].n == 4 * 32);
  CHECK(block_linears(d)[1].n == 2 * 32);
  CHECK(block_linears(d)[3].k == 4 * 32);
  CHECK(layer_name(3, "mlp.up_proj") == "model.layers.3.mlp.up_proj");
}

TEST_CASE("config: every form that transformers accepts is accepted") {
  struct Case {
    json changes;
    std::vector<std::string> remove;
  };
  const Case same[] = {
      {{{"architectures", {"LlamaForCausalLM", "Other"}}}, {}},
      {{{"architectures", {"Other", "LlamaForCausalLM"}}}, {}},
      {{{"architectures", json::array()}}, {}},
      {{{"eos_token_id", json::array()}}, {}},
      {{{"eos_token_id", nullptr}}, {}},
      {{{"eos_token_id", -1}}, {}},
      {{{"num_key_value_heads", nullptr}, {"head_dim", nullptr}, {"rope_scaling", nullptr}}, {}},
      {{{"tie_word_embeddings", nullptr}, {"attention_bias", nullptr}}, {}},
      {{{"hidden_act", nullptr}, {"rope_theta", nullptr}, {"rope_parameters", nullptr}}, {}},
      {{{"rope_scaling", {{"type", "linear"}, {"factor", 1.0}}}}, {}},
      {{{"rope_parameters", {{"rope_type", "linear"}, {"rope_theta", 1e4}, {"factor", 1}}}}, {}},
      {{{"rope_parameters", {{"rope_theta", 1e4}, {"factor", 1.0}}}}, {}},
      {{{"rope_parameters", {{"rope_type", "default"}, {"partial_rotary_factor", 1.0}}}}, {}},
      {{{"torch_dtype", "float16"}, {"dtype", nullptr}, {"bos_token_id", nullptr}}, {}},
      {json::object(), {"rms_norm_eps"}},
      {{{"rms_norm_eps", nullptr}}, {}},
  };
  const std::string plain = config_to_json(read(json::object()));
  for (const Case& c : same) {
    INFO(c.changes.dump());
    CHECK(config_to_json(read(c.changes, c.remove)) == plain);
  }
  CHECK(read(json::object(), {"max_position_embeddings"}).max_position == 2048);
  const LlamaConfig mistral = read({{"model_type", "mistral"}, {"num_attention_heads", 16}},
                                   {"max_position_embeddings", "rms_norm_eps"});
  CHECK(mistral.max_position == 131072);
  CHECK(mistral.rms_eps == 1e-6);
  CHECK(mistral.kv_heads == 8);
  CHECK(read({{"model_type", "mistral"}, {"num_key_value_heads", nullptr}}).kv_heads == 4);
  const LlamaConfig scaled = read({{"rope_scaling",
                                    {{"rope_type", "llama3"},
                                     {"factor", 8.0},
                                     {"low_freq_factor", 1.0},
                                     {"high_freq_factor", 4.0}}}});
  CHECK(scaled.rope_scaling->original_max_position == 128);
  // A token id beyond the embedding is accepted: it can end no text, but does no harm.
  CHECK(read({{"eos_token_id", {3, 100}}, {"bos_token_id", 101}}).bos_id == 101);
}

TEST_CASE("config: several end tokens survive config.json") {
  LlamaConfig c = synthetic_config("llama-3.2-1b");
  for (const std::vector<int64_t>& ids : {std::vector<int64_t>{}, {5}, {5, 6}}) {
    c.eos_ids = ids;
    CHECK(config_from_json(config_to_json(c), "f").eos_ids == ids);
    CHECK(eos_ids_from_json(config_to_json(c), "f") == ids);
  }
  CHECK(eos_ids_from_json(R"({"temperature": 0.6})", "f").empty());
  CHECK_THROWS_WITH(eos_ids_from_json(R"({"eos_token_id": [true]})", "f"),
                    Contains("f: 'eos_token_id' is not a token id"));
}

TEST_CASE("config: NaN and Infinity of Python's JSON are parsed") {
  const std::string text = config_text(json::object());
  const auto with = [&](const std::string& key, const std::string& value) {
    return config_from_json("{\"" + key + "\":" + value + "," + text.substr(1), "f");
  };
  for (const char* value : {"NaN", "Infinity", "-Infinity", " NaN ", "[1, NaN,-Infinity, -2]",
                            R"({"a": NaN, "b": "NaN, [Infinity", "c\\": [[Infinity]]})"})
    CHECK(config_to_json(with("other", value)) == config_to_json(with("other", "0")));
  // A field that is used rejects them.
  for (const char* value : {"NaN", "Infinity", "-Infinity"}) {
    CHECK_THROWS_WITH(with("rope_theta", value), Contains("'rope_theta' is not positive"));
    CHECK_THROWS_WITH(with("head_dim", value), Contains("'head_dim' is not an integer"));
  }
  for (const char* value : {"nan", "-NaN", "NaN0", "1NaN", "+Infinity", "Inf", "NaNNaN", "-"})
    CHECK_THROWS_WITH(with("other", value), Contains("f: malformed JSON at byte"));

  const auto values =
      data::parse_json(R"([1, NaN, "NaN", -Infinity, {"NaN": Infinity}, -2.5])", "f");
  CHECK(values[0] == 1);
  CHECK(std::isnan(values[1].get<double>()));
  CHECK(values[2] == "NaN");
  CHECK(values[3] == -INFINITY);
  CHECK(values[4]["NaN"] == INFINITY);
  CHECK(values[5] == -2.5);
}

TEST_CASE("config: Mistral's sliding window") {
  json mistral = {{"model_type", "mistral"}, {"num_key_value_heads", 2}};
  CHECK(read(mistral).sliding_window == 4096);
  mistral["sliding_window"] = nullptr;
  CHECK(read(mistral).sliding_window == 0);
  mistral["sliding_window"] = 512;
  CHECK(read(mistral).sliding_window == 512);
}

TEST_CASE("config: rope scaling under the old key and the new one") {
  const json scaling = {{"rope_type", "llama3"},
                        {"factor", 32.0},
                        {"low_freq_factor", 1.0},
                        {"high_freq_factor", 4.0},
                        {"original_max_position_embeddings", 8192}};
  json parameters = scaling;
  parameters["rope_theta"] = 5e5;
  for (const LlamaConfig& c : {read({{"rope_theta", 5e5}, {"rope_scaling", scaling}}),
                               read({{"rope_parameters", parameters}})}) {
    CHECK(c.rope_theta == 5e5);
    REQUIRE(c.rope_scaling);
    CHECK(c.rope_scaling->factor == 32);
    CHECK(c.rope_scaling->original_max_position == 8192);
  }
  const LlamaConfig plain =
      read({{"rope_parameters", {{"rope_type", "default"}, {"rope_theta", 2e4}}}});
  CHECK(plain.rope_theta == 2e4);
  CHECK_FALSE(plain.rope_scaling);
  CHECK_THROWS_WITH(read({{"rope_scaling", {{"type", "longrope"}, {"factor", 2.0}}}}),
                    Contains("unsupported rope scaling 'longrope'"));
  json incomplete = scaling;
  incomplete.erase("high_freq_factor");
  CHECK_THROWS_WITH(read({{"rope_scaling", incomplete}}),
                    Contains("'high_freq_factor' is missing"));
}

TEST_CASE("config: every rope scaling survives config.json") {
  const json yarn = {{"type", "yarn"},
                     {"factor", 4.0},
                     {"beta_fast", 16},
                     {"beta_slow", 2},
                     {"truncate", false},
                     {"attention_factor", 1.5},
                     {"original_max_position_embeddings", 32}};
  for (const json& scaling : {json{{"type", "linear"}, {"factor", 2.0}},
                              json{{"rope_type", "dynamic"}, {"factor", 2.0}}, yarn}) {
    INFO(scaling.dump());
    const LlamaConfig c = read({{"rope_scaling", scaling}});
    REQUIRE(c.rope_scaling);
    const LlamaConfig again = config_from_json(config_to_json(c), "f");
    CHECK(config_to_json(again) == config_to_json(c));
    CHECK(rope_inv_freq(again, 1000) == rope_inv_freq(c, 1000));
    CHECK(rope_factor(again) == rope_factor(c));
    CHECK(rope_factor(c) == (scaling == yarn ? 1.5 : 1.0));
  }
  // Dynamic scaling begins behind the model's positions.
  const LlamaConfig dynamic = read({{"rope_scaling", {{"type", "dynamic"}, {"factor", 2.0}}}});
  CHECK(rope_inv_freq(dynamic, 128) == rope_inv_freq(read(json::object())));
  CHECK(rope_inv_freq(dynamic, 129)[1] < rope_inv_freq(dynamic, 128)[1]);
  // Yarn: pairs that rotate often stay, those that rotate seldom are divided.
  const LlamaConfig stretched = read({{"head_dim", 64}, {"rope_scaling", yarn}});
  const std::vector<float> plain = rope_inv_freq(read({{"head_dim", 64}}));
  CHECK(rope_inv_freq(stretched).front() == plain.front());
  CHECK(rope_inv_freq(stretched).back() == Approx(plain.back() / 4).epsilon(1e-6));
}

TEST_CASE("config: Qwen2 and Qwen3") {
  const auto qwen = [](const char* type, json changes,
                       const std::vector<std::string>& remove = {}) {
    changes.update({{"model_type", type}, {"num_key_value_heads", 2}});
    return read(changes, remove);
  };
  const LlamaConfig two = qwen("qwen2", {{"sliding_window", 16}, {"use_sliding_window", false}});
  CHECK(two.head_dim == 16);
  CHECK(two.qkv_bias);
  CHECK_FALSE(two.output_bias);
  CHECK_FALSE(two.qk_norm);
  CHECK(two.sliding_window == 0);
  CHECK(block_norms(two).size() == 2);
  const LlamaConfig three = qwen("qwen3", json::object(), {"max_position_embeddings"});
  CHECK(three.head_dim == 128);
  CHECK(three.max_position == 32768);
  CHECK_FALSE(three.qkv_bias);
  CHECK(three.qk_norm);
  REQUIRE(block_norms(three).size() == 4);
  CHECK(block_norms(three)[3].size == 128);
  CHECK(qwen("qwen3", {{"attention_bias", true}}).output_bias);
  CHECK(read({{"model_type", "qwen2"}, {"num_attention_heads", 32}}).kv_heads == 32);

  // A window in all layers or in none.
  json window = {{"use_sliding_window", true}, {"sliding_window", 16}, {"max_window_layers", 0}};
  CHECK(qwen("qwen2", window).sliding_window == 16);
  window["max_window_layers"] = 2;
  CHECK(qwen("qwen2", window).sliding_window == 0);
  window["max_window_layers"] = 1;
  CHECK_THROWS_WITH(qwen("qwen3", window), Contains("a sliding window in 1 of the 2 layers"));
  window["layer_types"] = {"sliding_attention", "sliding_attention"};
  CHECK(qwen("qwen3", window).sliding_window == 16);
  for (const LlamaConfig& c :
       {two, three, qwen("qwen2", window), qwen("qwen3", {{"attention_bias", true}})}) {
    const std::string text = config_to_json(c);
    const LlamaConfig again = config_from_json(text, "f");
    CHECK(config_to_json(again) == text);
    CHECK(again.sliding_window == c.sliding_window);
    CHECK(again.output_bias == c.output_bias);
  }
}

TEST_CASE("config: mixtures of experts are refused by name") {
  for (const char* type : {"mixtral", "qwen2_moe", "qwen3_moe"})
    CHECK_THROWS_WITH(read({{"model_type", type}}),
                      Contains("'" + std::string(type) + "' is a mixture of experts"));
  CHECK_THROWS_WITH(read({{"model_type", "deepseek_v3"}, {"n_routed_experts", 256}}),
                    Contains("'deepseek_v3' is a mixture of experts"));
  CHECK_NOTHROW(read({{"num_experts", 0}, {"num_local_experts", nullptr}}));
}

TEST_CASE("config: a missing key is named") {
  for (const char* key : {"model_type", "vocab_size", "hidden_size", "intermediate_size",
                          "num_hidden_layers", "num_attention_heads"})
    CHECK_THROWS_WITH(read(json::object(), {key}),
                      Contains("config.json: '" + std::string(key) + "' is missing"));
}

TEST_CASE("config: an invalid value is named") {
  struct Case {
    json change;
    const char* message;
  };
  const Case cases[] = {
      {{{"model_type", "gpt2"}}, "unsupported model_type 'gpt2'"},
      {{{"model_type", 3}}, "'model_type' is not a string"},
      {{{"architectures", {"LlamaForSequenceClassification"}}}, "unsupported architecture"},
      {{{"model_type", "mistral"}, {"num_key_value_heads", 2}, {"attention_bias", true}},
       "'attention_bias' is true, but mistral has none"},
      {{{"model_type", "qwen3"}, {"num_key_value_heads", 2}, {"mlp_bias", true}},
       "'mlp_bias' is true, but qwen3 has none"},
      {{{"mlp_bias", 1}}, "'mlp_bias' is not true or false"},
      {{{"hidden_act", "gelu"}}, "unsupported hidden_act 'gelu'"},
      {{{"vocab_size", "100"}}, "'vocab_size' is not an integer"},
      {{{"vocab_size", 100.5}}, "'vocab_size' is not an integer"},
      {{{"vocab_size", -1}}, "'vocab_size' is -1, outside"},
      {{{"vocab_size", ~uint64_t{0}}}, "'vocab_size' is 18446744073709551615, outside"},
      {{{"num_hidden_layers", 1000000}}, "'num_hidden_layers' is 1000000, outside"},
      {{{"num_attention_heads", 5}}, "not a multiple of 5 heads"},
      {{{"num_key_value_heads", 3}}, "not a multiple of 3 key-value heads"},
      {{{"num_key_value_heads", 8}}, "key-value heads is 8, outside 1 to 4"},
      {{{"head_dim", 15}}, "head_dim 15 is odd"},
      {{{"rms_norm_eps", 0}}, "'rms_norm_eps' is not positive"},
      {{{"rope_theta", -1.0}}, "'rope_theta' is not positive"},
      {{{"eos_token_id", "</s>"}}, "'eos_token_id' is not a token id"},
      {{{"eos_token_id", {1, 2.5}}}, "'eos_token_id' is not a token id"},
      {{{"architectures", {"A", "B"}}}, "unsupported architecture \"A\", \"B\""},
      {{{"rope_parameters", {{"partial_rotary_factor", 0.5}}}}, "partial_rotary_factor"},
      {{{"rope_scaling", {{"factor", 2.0}}}}, "'rope_type' is missing"},
      {{{"rope_scaling", {{"type", "linear"}}}}, "'factor' is missing"},
      {{{"partial_rotary_factor", 0.5}}, "partial_rotary_factor"},
      {{{"rope_factors", {1.0}}}, "1 rope factors for head_dim 16"},
  };
  for (const Case& c : cases) {
    INFO(c.message);
    CHECK_THROWS_WITH(read(c.change), Contains(c.message));
  }
  CHECK_THROWS_WITH(config_from_json("{", "f"),
                    Contains("f: malformed JSON") && Contains("cut short"));
  CHECK_THROWS_WITH(config_from_json("{]", "f"),
                    Catch::Matchers::EndsWith("f: malformed JSON at byte 2"));
  CHECK_THROWS_WITH(config_from_json("[]", "f"), Contains("f: not a JSON object"));
}

TEST_CASE("config: synthetic models have the published sizes and survive config.json") {
  struct Case {
    const char* name;
    int64_t linear_parameters;
    bool tied;
  };
  // All parameters except embedding, head and norms.
  for (const Case& c :
       {Case{"smollm2-135m", 106168320, true}, Case{"qwen3-0.6b", 440401920, true},
        Case{"llama-3.2-1b", 973078528, true}, Case{"llama-3-8b", 6979321856, false},
        Case{"llama-2-7b", 6476005376, false}}) {
    INFO(c.name);
    const LlamaConfig config = synthetic_config(c.name);
    CHECK(config.linear_parameters() == c.linear_parameters);
    CHECK(config.tied_head == c.tied);
    const std::string text = config_to_json(config);
    const LlamaConfig again = config_from_json(text, "config.json");
    CHECK(config_to_json(again) == text);
    CHECK(rope_inv_freq(again) == rope_inv_freq(config));
  }
  CHECK_THROWS_AS(synthetic_config("gpt2"), UsageError);
  CHECK_THROWS_WITH(synthetic_config("gpt2"), Contains("llama-3.2-1b"));
}

TEST_CASE("config: rope frequencies, plain and with Llama-3's scaling") {
  LlamaConfig c = synthetic_config("llama-3.2-1b");
  const std::vector<float> scaled = rope_inv_freq(c);
  REQUIRE(scaled.size() == 32);
  c.rope_scaling.reset();
  const std::vector<float> plain = rope_inv_freq(c);
  int64_t kept = 0, divided = 0, between = 0;
  for (size_t i = 0; i < 32; ++i) {
    // By wavelength, as published with Llama 3.1: below 8192 / 4 unchanged, above 8192 divided by
    // 32, interpolated between.
    const double f = std::pow(5e5, -static_cast<double>(i) / 32.0);
    const double wavelength = 2 * std::numbers::pi / f;
    double expected = f;
    if (wavelength > 8192) {
      expected = f / 32;
      ++divided;
    } else if (wavelength >= 2048) {
      const double smooth = (8192 / wavelength - 1) / 3;
      expected = (1 - smooth) * f / 32 + smooth * f;
      ++between;
    } else {
      ++kept;
    }
    CHECK(plain[i] == static_cast<float>(f));
    CHECK(scaled[i] == Approx(expected).epsilon(1e-7));
  }
  CHECK((kept > 0 && divided > 0 && between > 0));

  // A file's factors divide the frequencies. A config.json stores them exactly.
  c.rope_factors.assign(32, 3.1f);
  CHECK(rope_inv_freq(c)[5] == Approx(plain[5] / 3.1f));
  CHECK(rope_inv_freq(config_from_json(config_to_json(c), "f")) == rope_inv_freq(c));
}
