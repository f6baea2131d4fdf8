// Exports that other programs read: GPTQ, GGUF, and the packed directory as scripts/read_packed.py
// and transformers see it.
#include <catch2/catch.hpp>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <nlohmann/json.hpp>

#include "data/half.h"
#include "models/gptq.h"
#include "models/llama.h"
#include "models/packed_checkpoint.h"
#include "models/table.h"
#include "quant/pack.h"
#include "tests/formats.h"
#include "tests/support.h"
#include "tests/tiny_model.h"
#include "tests/trained_model.h"

using namespace bbb;
using namespace bbb::tests;
using Catch::Matchers::Contains;
using models::ExportFormat;
using models::ExportOptions;
using models::LayerResult;
using quant::LinearFormat;
using quant::StoredPart;

namespace fs = std::filesystem;

namespace {

// A tiny model with the vocabulary of bytes, rounded to nearest in given formats.
struct Rounded {
  TempDir directory;
  models::LlamaConfig config;
  std::unique_ptr<models::Checkpoint> source;
  std::unique_ptr<data::Tokenizer> tokenizer = data::load_tokenizer("synthetic:tiny");
  std::optional<TrainedModel> model;
  std::vector<LinearFormat> formats;
  float scale_factor = 1;  // of all master scales

  explicit Rounded(std::vector<LinearFormat> of, models::LlamaConfig with = byte_config())
      : config(with), formats(std::move(of)) {
    fs::create_directory(directory / "source");
    write_tiny_model(directory / "source", config, 1);
    source = models::open_checkpoint(directory / "source");
    model.emplace(
        oracle(), *source, [&](int64_t) { return formats; },
        [&](int64_t layer) {
          return models::start_stage(config, models::full_precision(*source, layer), formats, {},
                                     quant::RangeRule::MinMax, 0);
        });
  }

  static models::LlamaConfig byte_config() {
    models::LlamaConfig config = tiny_config();
    config.vocab = 264;
    return config;
  }
  static std::vector<LinearFormat> plain(int bits, int group = 32) {
    return block_formats(byte_config(), bits, group);
  }
  static std::vector<LinearFormat> symmetric(int bits) {
    std::vector<LinearFormat> formats = plain(bits);
    for (LinearFormat& format : formats) format.weight.levels = quant::Levels::Seq;
    return formats;
  }
  static std::vector<LinearFormat> laid_out(const Layout& layout, int bits) {
    std::vector<LinearFormat> formats = plain(bits);
    for (LinearFormat& format : formats) lay_out(format, layout);
    return formats;
  }

  LayerResult layer(int64_t i) {
    LayerResult result = model->layer(i);
    for (models::LinearResult& linear : result.linears) {
      std::vector<uint8_t>& bytes = linear.part(StoredPart::MasterScale);
      const float scale = scale_factor * data::load_as<float>(bytes.data());
      std::memcpy(bytes.data(), &scale, sizeof scale);
    }
    return result;
  }
  // The weight of every linear of a layer.
  std::vector<std::vector<float>> weights(int64_t i) {
    std::vector<std::vector<float>> out;
    for (const auto& linear : layer(i).linears) out.push_back(linear.dequantize());
    return out;
  }

  models::ExportSummary write(const std::string& name, const ExportOptions& options) {
    return models::export_model(
        directory / name, *source, *tokenizer, [this](int64_t) { return formats; }, options,
        models::outer_of(*source), [this](int64_t i) { return layer(i); }, "{\"seed\": 1}\n",
        nullptr);
  }
  std::string refusal(const ExportOptions& options) {
    try {
      write("refused", options);
    } catch (const Error& error) {
      // Nothing is left behind.
      CHECK(std::distance(fs::directory_iterator(directory.path()), {}) == 1);
      return error.what();
    }
    return "no error";
  }
};

const Layout kRotated = {"rotated", 32, 0, 0, quant::SplitSide::Weight, true};
const Layout kSplit = {"split", 32, 0, 0.2, quant::SplitSide::Weight, false};
const Layout kPadded = {"padded", 64, 0, 0, quant::SplitSide::Weight, false};  // hidden is 96

// Whether Python runs with these modules; if not, prints that the test is skipped. Packages that
// scripts/setup.sh installed are found.
const std::string kPython = "PYTHONPATH=" BBB_SOURCE_DIR "/third_party/python:$PYTHONPATH python3 ";
bool has_python(const std::string& modules) {
  if (std::system((kPython + "-c 'import " + modules + "' 2>/dev/null").c_str()) == 0) return true;
  std::cout << "SKIPPED: no Python with " << modules << "\n";
  return false;
}

}  // namespace

TEST_CASE("export gptq: words, zero points and scales hold the packed model's weights",
          "[export][gptq]") {
  for (const int bits : {2, 4, 8})
    for (const int group : {32, 64}) {
      CAPTURE(bits, group);
      Rounded rounded(group == 64 ? Rounded::laid_out(kPadded, bits) : Rounded::plain(bits));
      const auto summary = rounded.write("gptq", ExportFormat::Gptq);
      CHECK(summary.rounding.difference == 0);
      CHECK(summary.bits_per_weight > bits + (16.0 + bits) / group);
      const data::SafeTensors file(rounded.directory / "gptq");
      CHECK(fs::exists(rounded.directory / "gptq/model.safetensors"));
      const LayerResult layer = rounded.layer(1);
      const auto shapes = models::block_linears(rounded.config);
      for (size_t j = 0; j < shapes.size(); ++j) {
        const auto name = models::layer_name(1, shapes[j].name);
        const int64_t n = shapes[j].n, k = shapes[j].k;
        const std::vector<float> weight = layer.linears[j].dequantize();
        CHECK(models::read_gptq(file, rounded.formats[j], name) == weight);
        // The last weight, by the definition: one field of three words.
        const int per_word = 32 / bits;
        const auto word = [&](const char* part, int64_t index) {
          return data::load_as<uint32_t>(file.at(name + part).data + 4 * index);
        };
        const int64_t g = (k - 1) / group, columns = (n + per_word - 1) / per_word;
        const auto q =
            word(".qweight", (k - 1) / per_word * n + n - 1) >> (bits * ((k - 1) % per_word)) &
            ((1u << bits) - 1);
        const auto z =
            word(".qzeros", g * columns + (n - 1) / per_word) >> (bits * ((n - 1) % per_word)) &
            ((1u << bits) - 1);
        const float s = data::half_to_float(
            data::load_as<uint16_t>(file.at(name + ".scales").data + 2 * (g * n + n - 1)));
        CHECK(s * (static_cast<float>(q) - static_cast<float>(z)) == weight.back());
        CHECK(word(".g_idx", k - 1) == g);
      }
      const auto config =
          nlohmann::json::parse(data::read_file(rounded.directory / "gptq/config.json"));
      CHECK(config.at("torch_dtype") == "bfloat16");
      const nlohmann::json& q = config.at("quantization_config");
      CHECK(q.at("quant_method") == "gptq");
      CHECK(q.at("checkpoint_format") == "gptq_v2");
      CHECK(q.at("bits") == bits);
      CHECK(q.at("group_size") == group);
      CHECK(q.at("sym") == false);
    }
}

TEST_CASE("export gptq: what it cannot hold is refused", "[export][gptq]") {
  const std::string first = "model.layers.0.self_attn.q_proj";
  CHECK_THAT(Rounded(Rounded::plain(3)).refusal(ExportFormat::Gptq),
             Contains(first) && Contains("no 2, 4 or 8 bits"));
  CHECK_THAT(Rounded(Rounded::laid_out(kRotated, 2)).refusal(ExportFormat::Gptq),
             Contains(first) && Contains("rotates") && Contains("--rotate none"));
  CHECK_THAT(Rounded(Rounded::laid_out(kSplit, 2)).refusal(ExportFormat::Gptq),
             Contains(first) && Contains("channels"));
  CHECK_THAT(Rounded(Rounded::symmetric(2)).refusal(ExportFormat::Gptq),
             Contains(first) && Contains("--quantizer seq"));
  std::vector<LinearFormat> formats = Rounded::plain(2);
  for (LinearFormat& format : formats) format.input.bits = 8;
  CHECK_THAT(Rounded(formats).refusal(ExportFormat::Gptq), Contains("quantizes activations"));
  formats = Rounded::plain(2);
  formats[6].weight.bits = 4;
  CHECK_THAT(Rounded(formats).refusal(ExportFormat::Gptq), Contains("mlp.down_proj"));
  Rounded tiny(Rounded::plain(2));
  for (const float factor : {0x1p-24f, 0x1p30f}) {
    tiny.scale_factor = factor;
    CHECK_THAT(tiny.refusal(ExportFormat::Gptq),
               Contains(first + ".scales[") && Contains("not exact in F16"));
  }
}

TEST_CASE("export gguf: a checkpoint of the packed model's weights", "[export][gguf]") {
  struct Case {
    const char* name;
    std::vector<LinearFormat> formats;
    const char* type;
    float scale_factor = 1;
  };
  const Case cases[] = {{"w2", Rounded::plain(2), "Q4_0"},
                        {"w3", Rounded::plain(3), "Q4_0"},
                        {"w4", Rounded::plain(4), "Q4_1"},
                        {"w8", Rounded::plain(8), "BF16"},
                        {"seq2", Rounded::symmetric(2), "Q4_0"},
                        {"seq3", Rounded::symmetric(3), "Q4_0"},
                        {"seq4", Rounded::symmetric(4), "BF16"},
                        {"padded", Rounded::laid_out(kPadded, 2), "Q4_0"},
                        {"rotated", Rounded::laid_out(kRotated, 2), "BF16"},
                        {"split", Rounded::laid_out(kSplit, 2), "BF16"},
                        {"scales below F16's", Rounded::plain(2), "BF16", 0x1p-24f}};
  for (const Case& c : cases) {
    CAPTURE(c.name);
    Rounded rounded(c.formats);
    rounded.scale_factor = c.scale_factor;
    const auto summary = rounded.write("m.gguf", ExportFormat::Gguf);
    CHECK((summary.rounding.difference > 0) ==
          (c.name == std::string("w8") || c.name == std::string("rotated")));
    const std::string path = rounded.directory / "m.gguf";
    const auto written = models::open_checkpoint(path);
    CHECK(written->kind() == models::CheckpointKind::Gguf);
    CHECK(data::gguf_type_name(data::Gguf(path).tensor("blk.1.ffn_up.weight").type) ==
          std::string(c.type));
    const auto shapes = models::block_linears(rounded.config);
    const auto weights = rounded.weights(1);
    for (size_t j = 0; j < shapes.size(); ++j) {
      const auto read = written->load(models::layer_name(1, shapes[j].name) + ".weight",
                                      {shapes[j].n, shapes[j].k});
      if (summary.rounding.difference == 0) CHECK(read == weights[j]);
    }
    const std::vector<int32_t> ids = random_tokens(3, 20, rounded.config.vocab);
    if (c.scale_factor == 1)
      CHECK(relative_error(logits_of(*load_model(oracle(), *written), ids),
                           logits_of(*rounded.model->model, ids)) < 4 * epsilon_of(DType::BF16));
    CHECK_THAT(data::Gguf(path).string("bbb.json"), Contains("seed"));
    CHECK(data::load_tokenizer(path)->encode("ab", data::SpecialText::AsText) ==
          rounded.tokenizer->encode("ab", data::SpecialText::AsText));
  }
}

TEST_CASE("export gguf: tables in Q8_0, rope scaling, a window, and an existing file",
          "[export][gguf]") {
  models::LlamaConfig config = Rounded::byte_config();
  config.rope_scaling = models::RopeScaling{.factor = 32};
  config.rope_theta = 5e5;
  config.tied_head = true;
  Rounded rounded(Rounded::plain(2), config);
  ExportOptions options = ExportFormat::Gguf;
  options.gguf_tables = models::GgufTables::Q8_0;
  const auto summary = rounded.write("m.gguf", options);
  CHECK(summary.rounding.name == "model.embed_tokens.weight");
  // Half a step of the largest weight, about five deviations of 0.15.
  CHECK(summary.rounding.difference > 0);
  CHECK(summary.rounding.difference < 1.0f / 127 / 2);
  const auto written = models::open_checkpoint(rounded.directory / "m.gguf");
  CHECK(written->config().rope_scaling.has_value());
  CHECK(written->config().tied_head);
  CHECK(models::rope_inv_freq(written->config()) == models::rope_inv_freq(config));
  CHECK_THROWS_WITH(rounded.write("m.gguf", options), Contains("m.gguf: exists"));

  models::LlamaConfig mistral = Rounded::byte_config();
  mistral.model_type = "mistral";
  mistral.sliding_window = 7;
  Rounded windowed(Rounded::plain(2), mistral);
  windowed.write("m.gguf", ExportFormat::Gguf);
  CHECK(models::open_checkpoint(windowed.directory / "m.gguf")->config().sliding_window == 7);
}

TEST_CASE("export gguf: the other families, with biases, norms of heads and yarn",
          "[export][gguf][gptq]") {
  for (models::LlamaConfig config : other_families()) {
    config.vocab = Rounded::byte_config().vocab;
    if (config.rope_scaling) config.rope_scaling->attention_factor = 1 + 0.1 * std::log(4.0);
    CAPTURE(config.model_type);
    Rounded rounded(Rounded::plain(2), config);
    CHECK(rounded.write("m.gguf", ExportFormat::Gguf).rounding.difference == 0);
    const std::string path = rounded.directory / "m.gguf";
    CHECK(data::Gguf(path).string("general.architecture") == config.model_type);
    const auto written = models::open_checkpoint(path);
    CHECK(models::rope_factor(written->config()) ==
          Approx(models::rope_factor(config)).epsilon(1e-7));
    const std::vector<int32_t> ids = random_tokens(3, 20, config.vocab);
    const std::vector<double> logits = logits_of(*rounded.model->model, ids);
    CHECK(relative_error(logits_of(*load_model(oracle(), *written), ids), logits) <
          4 * epsilon_of(DType::BF16));
    // Neither do other formats lose a norm or a bias.
    rounded.write("hf", ExportFormat::HuggingFace);
    const auto hf = models::open_checkpoint(rounded.directory / "hf");
    CHECK(relative_error(logits_of(*load_model(oracle(), *hf), ids), logits) <
          4 * epsilon_of(DType::BF16));
    rounded.write("gptq", ExportFormat::Gptq);
    const data::SafeTensors gptq(rounded.directory / "gptq");
    CHECK(gptq.contains("model.layers.1.self_attn.q_proj.bias") == config.qkv_bias);
    CHECK(gptq.contains("model.layers.1.mlp.down_proj.bias") == config.mlp_bias);
    CHECK(gptq.contains("model.layers.1.self_attn.q_norm.weight") == config.qk_norm);
  }
}

TEST_CASE("export gguf: what llama.cpp cannot express is refused", "[export][gguf]") {
  struct Case {
    const char* message;
    std::function<void(models::LlamaConfig&)> change;
  };
  using models::RopeKind;
  const Case cases[] = {
      {"dynamic", [](auto& c) { c.rope_scaling = {.kind = RopeKind::Dynamic, .factor = 2}; }},
      {"attention_factor",
       [](auto& c) {
         c.rope_scaling = {.kind = RopeKind::Yarn, .factor = 4, .attention_factor = 1.25};
       }},
      {"truncate",
       [](auto& c) { c.rope_scaling = {.kind = RopeKind::Yarn, .factor = 4, .truncate = false}; }},
      {"qwen3 has no biases",
       [](auto& c) {
         c.model_type = "qwen3";
         c.qk_norm = c.qkv_bias = c.output_bias = true;
       }},
      {"qwen2 has no sliding window",
       [](auto& c) {
         c.model_type = "qwen2";
         c.qkv_bias = true;
         c.sliding_window = 7;
       }},
      {"qwen2 has no rope factors", [](auto& c) {
         c.model_type = "qwen2";
         c.qkv_bias = true;
         c.rope_scaling = models::RopeScaling{.factor = 32};
       }}};
  for (const Case& c : cases) {
    CAPTURE(c.message);
    models::LlamaConfig config = Rounded::byte_config();
    c.change(config);
    CHECK_THAT(Rounded(Rounded::plain(2), config).refusal(ExportFormat::Gguf), Contains(c.message));
  }
  models::LlamaConfig linear = Rounded::byte_config();
  linear.rope_scaling = models::RopeScaling{.kind = RopeKind::Linear, .factor = 2.5};
  Rounded rounded(Rounded::plain(2), linear);
  rounded.write("m.gguf", ExportFormat::Gguf);
  const auto written = models::open_checkpoint(rounded.directory / "m.gguf");
  REQUIRE(written->config().rope_scaling.has_value());
  CHECK(written->config().rope_scaling->kind == RopeKind::Linear);
  CHECK(models::rope_inv_freq(written->config()) == models::rope_inv_freq(linear));
}

TEST_CASE("export: a format of weights alone says that activations are not quantized", "[export]") {
  std::vector<LinearFormat> formats = Rounded::plain(2);
  for (LinearFormat& format : formats) format.input.bits = 4;
  Rounded rounded(formats);
  CHECK(rounded.write("m.gguf", ExportFormat::Gguf).lost_activations);
  CHECK(rounded.write("hf", ExportFormat::HuggingFace).lost_activations);
  CHECK_FALSE(rounded.write("bbb", ExportFormat::Packed).lost_activations);
  CHECK_FALSE(Rounded(Rounded::plain(2)).write("m.gguf", ExportFormat::Gguf).lost_activations);
}

TEST_CASE("export hf: its dtype holds the norms", "[export]") {
  Rounded rounded(Rounded::plain(2));
  const auto dtype = [&](const std::string& name) {
    return nlohmann::json::parse(data::read_file(rounded.directory / (name + "/config.json")))
        .at("torch_dtype");
  };
  rounded.write("exact", ExportFormat::HuggingFace);
  CHECK(dtype("exact") == "bfloat16");
  models::export_model(
      rounded.directory / "trained", *rounded.source, *rounded.tokenizer,
      [&](int64_t) { return rounded.formats; }, ExportFormat::HuggingFace,
      models::outer_of(*rounded.source),
      [&](int64_t i) {
        LayerResult layer = rounded.layer(i);
        layer.input_norm[0] = 1.0009765625f;
        return layer;
      },
      "{}", nullptr);
  CHECK(dtype("trained") == "float32");
}

TEST_CASE("export packed: a reader of another author finds the same weights", "[export]") {
  if (!has_python("numpy, safetensors")) return;
  struct Case {
    std::string name;
    std::vector<LinearFormat> formats;
    int load_bits = 0;
    int head_bits = models::kDenseBits;
  };
  std::vector<Case> cases;
  for (const int bits : {2, 3, 4, 8})
    cases.push_back({"w" + std::to_string(bits), Rounded::plain(bits)});
  for (const int bits : {2, 3, 4})
    cases.push_back({"seq" + std::to_string(bits), Rounded::symmetric(bits)});
  for (const Layout& layout : kLayouts)
    cases.push_back({layout.name, Rounded::laid_out(layout, 2)});
  for (const auto dequant : {quant::NestedDequant::Middle, quant::NestedDequant::Floor})
    for (const int bits : {8, 4, 3, 2}) {
      std::vector<LinearFormat> formats = Rounded::plain(8);
      for (LinearFormat& format : formats)
        format.weight = {.bits = 8, .nested = true, .dequant = dequant};
      cases.push_back({"nested", formats, bits});
    }
  cases.push_back({"head, rotated", Rounded::laid_out(kRotated, 2), 0, 4});
  cases.push_back({"head, groups of 64", Rounded::laid_out(kPadded, 2), 0, 8});
  for (const Case& c : cases) {
    CAPTURE(c.name, c.load_bits);
    Rounded rounded(c.formats);
    rounded.write("packed", ExportOptions(ExportFormat::Packed, c.head_bits));
    CHECK(fs::exists(rounded.directory / "packed/bbb.safetensors"));
    CHECK_FALSE(fs::exists(rounded.directory / "packed/model.safetensors"));
    std::vector<std::pair<std::string, std::vector<float>>> expected;
    std::vector<data::SafeTensorsWriter::Entry> entries;
    const auto add = [&](const std::string& name, const engine::Shape& shape,
                         const std::vector<float>& values) {
      entries.push_back({name, data::FileDType::F32, shape});
      expected.emplace_back(name, values);
    };
    for (const auto& weight : models::outer_weights(rounded.config)) {
      std::vector<float> values = rounded.source->load(weight.name, weight.shape);
      if (weight.name == models::kHead && c.head_bits != models::kDenseBits)
        values = models::quantize_table(values, models::table_format(rounded.config, c.head_bits))
                     .dequantize();
      add(weight.name, weight.shape, values);
    }
    for (int64_t i = 0; i < rounded.config.layers; ++i) {
      LayerResult layer = rounded.layer(i);
      add(models::layer_name(i, models::kInputNorm), {rounded.config.d_model}, layer.input_norm);
      add(models::layer_name(i, models::kPostNorm), {rounded.config.d_model}, layer.post_norm);
      const auto shapes = models::block_linears(rounded.config);
      for (size_t j = 0; j < shapes.size(); ++j) {
        if (c.load_bits > 0) layer.linears[j].format.weight.bits = c.load_bits;
        add(models::layer_name(i, shapes[j].name) + ".weight", {shapes[j].n, shapes[j].k},
            layer.linears[j].dequantize());
      }
    }
    data::SafeTensorsWriter writer(rounded.directory / "expected.safetensors", entries);
    for (const auto& [name, values] : expected)
      writer.add(name, values.data(), static_cast<int64_t>(4 * values.size()));
    writer.finish();
    std::string command = kPython + BBB_SOURCE_DIR "/scripts/read_packed.py " +
                          (rounded.directory / "packed") + " --compare " +
                          (rounded.directory / "expected.safetensors");
    if (c.load_bits > 0) command += " --bits " + std::to_string(c.load_bits);
    CHECK(std::system((command + " >" + (rounded.directory / "log")).c_str()) == 0);
    CHECK_THAT(data::read_file(rounded.directory / "log"), Contains("tensors are equal"));
    // A weight that differs is found.
    if (c.name != "w2") continue;
    std::string bytes = data::read_file(rounded.directory / "expected.safetensors");
    bytes[bytes.size() - 10] ^= 1;
    data::write_file_atomic(rounded.directory / "expected.safetensors", bytes);
    CHECK(std::system((command + " >/dev/null 2>&1").c_str()) != 0);
  }
}

TEST_CASE("export packed: transformers refuses it, instead of loading random weights", "[export]") {
  if (!has_python("torch, transformers")) return;
  Rounded rounded(Rounded::plain(2));
  rounded.write("packed", ExportFormat::Packed);
  rounded.write("hf", ExportFormat::HuggingFace);
  const auto load = [&](const std::string& name) {
    const std::string log = rounded.directory / (name + ".log");
    const int code = std::system((kPython +
                                  "-c 'import sys, transformers as t; "
                                  "t.AutoModelForCausalLM.from_pretrained(sys.argv[1])' " +
                                  (rounded.directory / name) + " >" + log + " 2>&1")
                                     .c_str());
    return std::pair(code == 0, data::read_file(log));
  };
  CHECK(load("hf").first);
  const auto [loaded, log] = load("packed");
  CHECK_FALSE(loaded);
  CHECK_THAT(log, Contains("model.safetensors"));
}
