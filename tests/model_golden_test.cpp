// The mean NLL of tiny models of every family and rope scaling, against transformers
// (scripts/make_model_goldens.py): from a Hugging Face directory and, as far as GGUF can hold the
// model, from a GGUF file.
#include <catch2/catch.hpp>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>

#include "data/files.h"
#include "tests/model_files.h"
#include "tests/op_test.h"
#include "tests/trained_model.h"

namespace bbb::tests {
namespace {

using nlohmann::json;

// The tensors of a golden model, from the file that all of them share.
std::vector<FileTensor> tensors_of(const data::SafeTensors& shared, const json& golden) {
  const auto extras = golden.at("extras").get<std::set<std::string>>();
  std::vector<FileTensor> out;
  for (const auto& [name, t] : shared.tensors()) {
    const bool head_norm = name.ends_with("q_norm.weight") || name.ends_with("k_norm.weight");
    const std::string in_layer =
        name.substr(std::min(name.size(), std::string("model.layers.0.").size()));
    if ((name.ends_with(".bias") || head_norm) && extras.count(in_layer) == 0) continue;
    out.push_back(
        {name, t.dtype, t.shape,
         std::string(reinterpret_cast<const char*>(t.data), static_cast<size_t>(t.bytes))});
  }
  return out;
}

// llama.cpp's converter: names, and for the llama architecture the order of the rows of Q and K.
FileTensor to_gguf(FileTensor t, const models::LlamaConfig& c) {
  const std::pair<const char*, const char*> names[] = {{"model.embed_tokens", "token_embd"},
                                                       {"model.norm", "output_norm"},
                                                       {"lm_head", "output"},
                                                       {"model.layers.", "blk."},
                                                       {"self_attn.o_proj", "attn_output"},
                                                       {"self_attn.", "attn_"},
                                                       {"input_layernorm", "attn_norm"},
                                                       {"post_attention_layernorm", "ffn_norm"},
                                                       {"mlp.", "ffn_"},
                                                       {"_proj", ""}};
  const bool q_or_k =
      t.name.find("q_proj") != std::string::npos || t.name.find("k_proj") != std::string::npos;
  for (const auto& [from, to] : names)
    if (const size_t at = t.name.find(from); at != std::string::npos)
      t.name.replace(at, std::string(from).size(), to);
  if (c.model_type != "llama" || !q_or_k) return t;
  const size_t rows = static_cast<size_t>(t.shape[0]), d = static_cast<size_t>(c.head_dim);
  const size_t row_bytes = t.bytes.size() / rows;
  std::string permuted;
  for (size_t row = 0; row < rows; ++row) {
    const size_t in_head = row % d, from = row - in_head + in_head % 2 * d / 2 + in_head / 2;
    permuted += t.bytes.substr(from * row_bytes, row_bytes);
  }
  t.bytes = permuted;
  return t;
}

std::string gguf_of(const models::LlamaConfig& c, const std::vector<FileTensor>& tensors) {
  GgufFile f;
  f.text("general.architecture", c.model_type);
  const auto integer = [&](const char* key, int64_t value) {
    f.integer(c.model_type + "." + key, static_cast<uint32_t>(value));
  };
  const auto real = [&](const char* key, double value) {
    f.real(c.model_type + "." + key, static_cast<float>(value));
  };
  integer("block_count", c.layers);
  integer("context_length", c.max_position);
  integer("embedding_length", c.d_model);
  integer("feed_forward_length", c.hidden);
  integer("attention.head_count", c.heads);
  integer("attention.head_count_kv", c.kv_heads);
  integer("attention.key_length", c.head_dim);
  real("attention.layer_norm_rms_epsilon", c.rms_eps);
  real("rope.freq_base", c.rope_theta);
  if (const auto& s = c.rope_scaling) {
    f.text(c.model_type + ".rope.scaling.type", name_of(s->kind));
    real("rope.scaling.factor", s->factor);
    integer("rope.scaling.original_context_length", s->original_max_position);
  }
  constexpr uint32_t kBf16 = 30;
  for (const FileTensor& t : tensors) {
    const FileTensor stored = to_gguf(t, c);
    f.tensor(stored.name, stored.shape, kBf16, stored.bytes);
  }
  return f.bytes();
}

double nll_of(const models::Checkpoint& source, const json& windows) {
  std::vector<int32_t> ids;
  for (const auto& window : windows.get<std::vector<std::vector<int32_t>>>())
    ids.insert(ids.end(), window.begin(), window.end());
  const auto count = static_cast<int64_t>(windows.size());
  return models::perplexity(*load_model(backend(), source), ids, count,
                            static_cast<int64_t>(ids.size()) / count, nullptr)
      .nll;
}

}  // namespace

TEST_CASE("golden models: nll equals transformers'", "[models]") {
  const std::string folder = golden_folder() + "/models/";
  const json goldens = json::parse(data::read_file(folder + "goldens.json"));
  const data::SafeTensors shared(folder + "weights.safetensors");
  const std::set<std::string> in_gguf = {"llama",    "linear", "yarn", "attention_bias",
                                         "mlp_bias", "qwen2",  "qwen3"};
  // In bf16 every operation rounds by up to half an epsilon; the errors of 94 tokens cancel.
  const double tolerance = backend().act() == DType::BF16 ? 4 * epsilon_of(DType::BF16) : 1e-5;
  for (const auto& [name, golden] : goldens.at("models").items()) {
    CAPTURE(name);
    const TempDir dir;
    const std::vector<FileTensor> tensors = tensors_of(shared, golden);
    data::write_file_atomic(dir / "config.json", golden.at("config").dump());
    data::write_file_atomic(dir / "model.safetensors", safetensors_of(tensors));
    const auto source = models::open_checkpoint(dir.path());
    for (const auto& [length, nll] : golden.at("nll").items()) {
      CAPTURE(length);
      CHECK(nll_of(*source, goldens.at("tokens").at(length)) ==
            Approx(nll.get<double>()).margin(tolerance).epsilon(0));
    }
    if (in_gguf.count(name) == 0) continue;
    data::write_file_atomic(dir / "model.gguf", gguf_of(source->config(), tensors));
    const auto gguf = models::open_checkpoint(dir / "model.gguf");
    CHECK(nll_of(*gguf, goldens.at("tokens").at("48")) ==
          Approx(golden.at("nll").at("48").get<double>()).margin(tolerance).epsilon(0));
    // What an export writes for a GGUF describes the same model.
    const models::LlamaConfig again = models::config_from_json(gguf->config_json(), "config.json");
    CHECK(models::config_to_json(again) == gguf->config_json());
    CHECK(again.model_type == source->config().model_type);
    CHECK(models::rope_inv_freq(again) == models::rope_inv_freq(source->config()));
    CHECK(models::rope_factor(again) == models::rope_factor(source->config()));
  }
}

}  // namespace bbb::tests
