// Embedding, head and final norm that train with the rest: what is learned, saved, exported, and
// passed on to the next run.
#include <catch2/catch.hpp>
#include <filesystem>

#include "engine/bf16.h"
#include "tests/support.h"
#include "tests/tiny_run.h"
#include "tests/trained_model.h"
#include "train/student.h"

namespace bbb::tests {
namespace {

namespace fs = std::filesystem;
using Options = std::vector<std::pair<const char*, std::string>>;
using Values = std::map<std::string, std::vector<float>>;
using train::TrainConfig;

models::LlamaConfig config_of(bool tied) {
  models::LlamaConfig model = tiny_config();
  model.tied_head = tied;
  return model;
}

TrainConfig make_config(const Fixture& fixture, const std::string& name, const Options& options) {
  TrainConfig config = fixture.config;
  config.out = fixture.dir / name;
  config.e2e_lr = {3e-3};
  config.e2e_steps = TrainConfig::kAutoSteps;
  set_option(config, "e2e-embedding", "train");
  for (const auto& [option, text] : options) set_option(config, option, text);
  return config;
}

// The weights outside of the layers that a file of a run holds; empty if it holds none.
Values outer_in(const Fixture& fixture, const std::string& file) {
  const data::SafeTensors tensors(file);
  const models::LoadOuter load = models::outer_of(tensors);
  Values values;
  for (const models::OuterWeight& weight : models::outer_weights(fixture.source->config()))
    if (load) values[weight.name] = load(weight);
  return values;
}

Values outer_in(const models::Checkpoint& checkpoint) {
  Values values;
  for (const models::OuterWeight& weight : models::outer_weights(checkpoint.config()))
    values[weight.name] = checkpoint.load(weight.name, weight.shape);
  return values;
}

// As an export holds them.
Values rounded(Values values) {
  for (auto& [name, all] : values)
    if (name != models::kFinalNorm)
      for (float& value : all) value = engine::from_bf16(engine::to_bf16(value));
  return values;
}

std::string final_of(const TrainConfig& config) { return config.out + "/e2e/final.safetensors"; }

std::string export_of(const Fixture& fixture, const TrainConfig& config,
                      models::ExportFormat format = models::ExportFormat::Packed) {
  const std::string out =
      config.out + (format == models::ExportFormat::Packed ? "_packed" : "_plain");
  train::export_run(backend(), *fixture.source, FileTokenizer(), config.out, out, format);
  return out;
}

// Kills the run after this step of the end-to-end stage that comes after `stage` finished ones.
void kill_at(const Fixture& fixture, const TrainConfig& config, int64_t stage, int64_t step) {
  train::Observer observer;
  observer.after_e2e_step = [&](int64_t at) {
    const bool first = !fs::exists(config.out + "/e2e/stage_0.safetensors");
    if (first == (stage == 0) && at == step) throw Killed();
  };
  CHECK_THROWS_AS(fixture.run(config, observer), Killed);
}

}  // namespace

TEST_CASE("embedding: it trains, is saved and exported, and a killed run ends with the same bytes",
          "[train][embedding]") {
  const Options cases[] = {
      {},                          // two micro-batches: gradients are added in the set itself
      {{"e2e-micro-batch", "4"}},  // one: they are added beside it
      {{"e2e-average", "0.5"}, {"e2e-damping", "0.01"}, {"e2e-freeze", "flips"}},
      {{"any-precision", "8,4,2"}, {"e2e-stages", "w8a16:1,w8a16:1"}},
  };
  for (const bool tied : {false, true}) {
    const Fixture fixture(config_of(tied));
    for (size_t i = 0; i < std::size(cases); ++i) {
      CAPTURE(tied, i);
      Options options = {{"e2e-stages", "w2a16:1,w2a2:1"}};
      options.insert(options.end(), cases[i].begin(), cases[i].end());
      const TrainConfig config = make_config(fixture, cat("run_", i), options);
      fixture.run(config);

      TrainConfig killed = config;
      killed.out = config.out + "_killed";
      for (const auto& [stage, step] : {std::pair{0, 1}, {0, 3}, {1, 1}, {1, 3}})
        kill_at(fixture, killed, stage, step);
      fixture.run(killed);
      CHECK((results(killed.out) == results(config.out)));

      const Values source = outer_in(*fixture.source),
                   trained = outer_in(fixture, final_of(config)),
                   earlier = outer_in(fixture, config.out + "/e2e/stage_0.safetensors");
      REQUIRE(trained.size() == (tied ? 2 : 3));
      for (const auto& [name, values] : source) {
        CAPTURE(name);
        CHECK((trained.at(name) != values));
        CHECK((earlier.at(name) != values));
        CHECK((trained.at(name) != earlier.at(name)));
      }
      for (const auto format : {models::ExportFormat::Packed, models::ExportFormat::HuggingFace})
        CHECK((outer_in(*models::open_checkpoint(export_of(fixture, config, format))) ==
               rounded(trained)));
    }
  }
}

TEST_CASE("embedding: training it lowers the loss further", "[train][embedding]") {
  const Fixture fixture(config_of(true));
  for (const char* loss : {"kl", "ce", "jsd"}) {
    std::vector<double> last;  // the mean loss of the last epoch
    for (const char* embedding : {"keep", "train"}) {
      const TrainConfig config = make_config(
          fixture, cat(loss, embedding),
          {{"e2e-stages", "w2a16:10"}, {"e2e-loss", loss}, {"e2e-embedding", embedding}});
      fixture.run(config);
      const std::vector<train::Json> lines = log_lines(config.out, "e2e");
      REQUIRE(lines.size() == 40);
      last.push_back(0);
      for (size_t i = 36; i < 40; ++i) last.back() += lines[i]["loss"].get<double>() / 4;
    }
    CAPTURE(loss, last[0], last[1]);
    CHECK(last[1] < last[0]);
    CHECK(outer_in(fixture, final_of(make_config(fixture, cat(loss, "keep"), {}))).empty());
  }
}

TEST_CASE("embedding: the next run starts from it, and keeps it if it does not train",
          "[train][embedding]") {
  for (const bool tied : {false, true}) {
    CAPTURE(tied);
    const Fixture fixture(config_of(tied));
    const TrainConfig first = make_config(fixture, "first", {{"e2e-stages", "w2a16:1"}});
    fixture.run(first);
    const Values trained = outer_in(fixture, final_of(first));
    const std::string exported = data::read_file(export_of(fixture, first) + "/bbb.safetensors");

    // A rate that moves nothing: both see the same rounded tables, so the losses are equal.
    std::vector<train::Json> losses[2];
    for (const int i : {0, 1}) {
      const TrainConfig still = make_config(fixture, cat("still_", i),
                                            {{"from", first.out},
                                             {"e2e-stages", "w2a16:1"},
                                             {"e2e-lr", "1e-30"},
                                             {"e2e-embedding", i == 0 ? "keep" : "train"}});
      fixture.run(still);
      CHECK((data::read_file(export_of(fixture, still) + "/bbb.safetensors") == exported));
      if (i == 0) CHECK((outer_in(fixture, final_of(still)) == trained));
      for (const train::Json& line : log_lines(still.out, "e2e")) losses[i].push_back(line["loss"]);
    }
    CHECK(losses[0] == losses[1]);

    // Kept through two stages, with the first run gone after the first of them.
    const TrainConfig kept = make_config(
        fixture, "kept",
        {{"from", first.out}, {"e2e-stages", "w2a16:1,w2a4:1"}, {"e2e-embedding", "keep"}});
    fixture.run(kept);
    CHECK((outer_in(fixture, final_of(kept)) == trained));
    CHECK((outer_in(*models::open_checkpoint(export_of(fixture, kept))) == rounded(trained)));
    TrainConfig killed = kept;
    killed.out = kept.out + "_killed";
    kill_at(fixture, killed, 0, 3);
    kill_at(fixture, killed, 1, 3);
    fs::rename(first.out, first.out + "_elsewhere");
    fixture.run(killed);
    CHECK((results(killed.out) == results(kept.out)));
    const TrainConfig plan = train::resolve(kept, fixture.source->config(), backend().device());
    int64_t bytes = 0;
    for (const Values& file : {trained, trained})
      for (const auto& [name, values] : file) bytes += static_cast<int64_t>(values.size()) * 4;
    CHECK(train::result_bytes(fixture.source->config(), plan, train::OuterStart::EarlierRun) ==
          train::result_bytes(fixture.source->config(), plan) + bytes);

    // Scales alone, and Algorithm 2, from a run that kept them.
    const Options others[] = {
        {{"e2e-stages", "w2a16:1"}, {"e2e-train", "scales"}},
        {{"stages", "w3a16,w2a16"}, {"block-schedule", "prefix"}, {"e2e-embedding", "keep"}}};
    for (size_t i = 0; i < std::size(others); ++i) {
      Options options = {{"from", kept.out}};
      options.insert(options.end(), others[i].begin(), others[i].end());
      TrainConfig other = make_config(fixture, cat("other_", i), options);
      if (i == 1) other.e2e_steps = 0;
      fixture.run(other);
      CHECK((outer_in(fixture, final_of(other)) == trained));
      CHECK((outer_in(*models::open_checkpoint(export_of(fixture, other))) == rounded(trained)));
    }
  }
}

TEST_CASE("embedding: its rate is a part of the stage's, the final norm's is the whole",
          "[train][embedding]") {
  const Fixture fixture;
  const models::LlamaConfig model = tiny_config();
  const TrainConfig config = train::resolve(
      make_config(fixture, "run", {{"e2e-stages", "w2a16:1"}}), model, backend().device());
  const train::Recipe recipe(config, model);
  train::Student student(backend(), *fixture.source, config, recipe, 0);
  // Masters that BF16 does not hold.
  const auto outer = [&](const models::OuterWeight& weight) {
    std::vector<float> values = fixture.source->load(weight.name, weight.shape);
    for (float& value : values) value *= 1.001f;
    return values;
  };
  student.load(
      {[&](int64_t layer) { return models::full_precision(*fixture.source, layer); }, outer},
      [](int64_t) {});
  const std::vector<double> slots = values_of(backend(), student.parameters().table().slots);
  for (const auto& parameter : student.parameters().parameters()) {
    CAPTURE(parameter->name);
    const bool table = parameter->name == models::kEmbedding || parameter->name == models::kHead;
    CHECK(slots[static_cast<size_t>(3 * parameter->slot)] == (table ? train::kEmbeddingRate : 1));
  }
  // The forward pass reads them rounded to BF16, on the CPU too.
  student.prepare();
  for (const auto& [name, table] : {std::pair{models::kEmbedding, student.model().embedding()},
                                    {models::kHead, student.model().head()}}) {
    const std::vector<float> masters = outer({name, table.shape()});
    CHECK(values_of(backend(), table) ==
          round_bf16(std::vector<double>(masters.begin(), masters.end())));
  }
}

}  // namespace bbb::tests
