// Synthetic models: what they hold, and that one trains, exports and evaluates like any other.
#include <catch2/catch.hpp>
#include <cmath>

#include "data/text.h"
#include "data/tokenizer.h"
#include "models/synthetic_checkpoint.h"
#include "tests/model_files.h"
#include "tests/support.h"
#include "tests/tiny_model.h"
#include "train/train.h"

namespace bbb::tests {
namespace {

using Catch::Matchers::Contains;

TEST_CASE("synthetic: tensors repeat, differ by name and seed, and have the scale of K") {
  const models::LlamaConfig config = tiny_config();
  const auto one = models::make_synthetic_checkpoint(config, "one", 1);
  const auto two = models::make_synthetic_checkpoint(config, "two", 2);
  const std::string q = "model.layers.0.self_attn.q_proj.weight",
                    up = "model.layers.1.mlp.up_proj.weight",
                    gate = "model.layers.1.mlp.gate_proj.weight";
  const engine::Shape shape{config.hidden, config.d_model};
  const std::vector<float> values = one->load(up, shape);
  CHECK(values == one->load(up, shape));
  CHECK(values != one->load(gate, shape));
  CHECK(values != two->load(up, shape));
  double sum = 0, squares = 0;
  for (float v : values) {
    sum += v;
    squares += static_cast<double>(v) * v;
  }
  const double n = static_cast<double>(values.size()), k = static_cast<double>(config.d_model);
  CHECK(std::abs(sum / n) < 4 / std::sqrt(n * k));
  CHECK(std::sqrt(squares / n) == Approx(1 / std::sqrt(k)).epsilon(0.05));
  CHECK(one->load("model.norm.weight", {config.d_model}) ==
        std::vector<float>(static_cast<size_t>(config.d_model), 1.0f));
  CHECK(has_tensor(*one, q));
  CHECK_THROWS_WITH(one->load(q, {1, 1}), Contains("one: holds no tensor"));
  CHECK_THROWS_WITH(one->load("model.layers.2.mlp.up_proj.weight", shape), Contains("no tensor"));
}

TEST_CASE("synthetic: a model path names one, with a vocabulary of bytes") {
  const auto source = models::open_checkpoint("synthetic:smollm2-135m");
  CHECK(source->config().d_model == 576);
  CHECK(source->path() == "synthetic:smollm2-135m");
  CHECK_THROWS_AS(models::open_checkpoint("synthetic:gpt2"), UsageError);

  const auto tokenizer = data::load_tokenizer("synthetic:smollm2-135m");
  std::string text = "Zwölf Boxkämpfer, 12\n\t\xff";
  text.push_back('\0');
  const std::vector<int32_t> ids = tokenizer->encode(text, data::SpecialText::AsText);
  REQUIRE(ids.size() == text.size());
  for (size_t i = 0; i < ids.size(); ++i) CHECK(ids[i] == static_cast<uint8_t>(text[i]));
  CHECK(tokenizer->decode(ids) == text);
  CHECK(tokenizer->vocab_size() == 257);
  CHECK(tokenizer->document_end() == 256);
}

TEST_CASE("synthetic: trains, exports, and the export is evaluated") {
  models::LlamaConfig model = tiny_config();
  model.vocab = 264;
  const TempDir dir;
  const auto source = models::make_synthetic_checkpoint(model, "synthetic:tiny");
  const auto tokenizer = data::load_tokenizer("synthetic:tiny");
  const std::string text(600, 'x');
  const auto windows = data::make_windows(
      data::training_tokens(*tokenizer, {{text}, {text}}, tokenizer->document_end()), 32, "text",
      data::Packing::Stream);
  train::TrainConfig config;
  config.model = "synthetic:tiny";
  config.data = "text";
  config.out = dir / "run";
  config.stages = train::parse_stages("w2a16");
  config.samples = 8;
  config.val_samples = 2;
  config.seq_len = 32;
  config.batch = 4;
  config.epochs = 1;
  config.e2e_steps = 1;
  config.e2e_batch = 2;
  train::Observer quiet;
  quiet.quiet = true;
  train::train_windows(backend(), *source, windows, config, quiet);
  const double bits = train::export_run(backend(), *source, *tokenizer, dir / "run",
                                        dir / "exported", models::ExportFormat::Packed)
                          .bits_per_weight;
  CHECK(bits < 2.5);

  const auto exported = models::open_checkpoint(dir / "exported");
  const auto carried = data::load_tokenizer(dir / "exported");
  std::vector<int32_t> ids = data::evaluation_tokens(*carried, {text});
  CHECK(ids.size() == text.size());
  ids.resize(64);
  models::Llama packed(backend(), *exported, models::HeadRounding::None);
  packed.load_blocks(*exported);
  const auto result = models::perplexity(packed, ids, 2, 32, [](int64_t) {});
  CHECK(std::isfinite(result.perplexity));
  CHECK(result.tokens == 62);
}

}  // namespace
}  // namespace bbb::tests
