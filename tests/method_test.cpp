// The options of the method: grids with channel orders, stages of the whole model, Algorithm 2,
// starting from another run. Runs repeat byte for byte, and killed ones end like uninterrupted
// ones.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <filesystem>

#include "tests/formats.h"
#include "tests/support.h"
#include "tests/tiny_run.h"
#include "tests/trained_model.h"
#include "train/recipe.h"
#include "train/statistics.h"

namespace bbb::tests {
namespace {

namespace fs = std::filesystem;
using Catch::Matchers::Contains;
using quant::LinearFormat;
using train::Json;
using train::Recipe;
using train::Stage;
using train::TrainConfig;
using Options = std::vector<std::pair<const char*, std::string>>;

TrainConfig with(TrainConfig config, const Options& options) {
  for (const auto& [option, text] : options) {
    set_option(config, option, text);
    if (std::string(option) == "e2e-stages") config.e2e_steps = TrainConfig::kAutoSteps;
  }
  return config;
}

TrainConfig make_config(const Fixture& fixture, const std::string& name, const Options& options) {
  TrainConfig config = fixture.config;
  config.out = fixture.dir / name;
  config.e2e_lr = {1e-3};
  return with(std::move(config), options);
}

// Kills the block phase after each of these steps in turn, then lets it end. number() counts the
// steps of the whole phase, from 1.
void run_with_kills(
    const Fixture& fixture, TrainConfig config, const std::vector<int64_t>& kills,
    const std::function<int64_t(int64_t block, int64_t stage, int64_t step)>& number) {
  for (const int64_t kill : kills) {
    train::Observer observer;
    observer.after_block_step = [&](int64_t block, int64_t stage, int64_t step) {
      if (number(block, stage, step) == kill) throw Killed();
    };
    CHECK_THROWS_AS(fixture.run(config, observer), Killed);
  }
  fixture.run(config);
}

// Kills the end-to-end phase after step `step` of whole-model stage `stage`.
void kill_whole(const Fixture& fixture, const TrainConfig& config, int64_t stage, int64_t step) {
  const auto finished = [&] {  // stages
    int64_t done = 0;
    while (fs::exists(config.out + cat("/e2e/stage_", done, ".safetensors"))) ++done;
    return done;
  };
  train::Observer observer;
  observer.after_e2e_step = [&](int64_t at) {
    if (finished() == stage && at == step) throw Killed();
  };
  CHECK_THROWS_AS(fixture.run(config, observer), Killed);
}

void check_same_run(const std::string& actual, const std::string& expected) {
  const auto wanted = results(expected), got = results(actual);
  for (const auto& [name, bytes] : wanted) {
    INFO(name);
    CHECK(got.count(name) == 1);
    if (got.count(name) == 1) CHECK((got.at(name) == bytes));
  }
  CHECK(got.size() == wanted.size());
  CHECK(log_lines(actual, "") == log_lines(expected, ""));
}

std::string export_of(const Fixture& fixture, const TrainConfig& config) {
  const std::string out = config.out + "_packed";
  train::export_run(backend(), *fixture.source, FileTokenizer(), config.out, out,
                    models::ExportFormat::Packed);
  return out;
}

LinearFormat format_of(const models::Checkpoint& checkpoint, int64_t layer, size_t linear) {
  const models::LinearShape shape = models::block_linears(checkpoint.config())[linear];
  return *checkpoint.packed_format(models::layer_name(layer, shape.name), shape.n, shape.k);
}

std::string refusal(const TrainConfig& config, const models::LlamaConfig& model = tiny_config()) {
  try {
    train::resolve(config, model, engine::DeviceType::Cpu);
  } catch (const UsageError& error) {
    return error.what();
  }
  return "";
}

constexpr size_t kDown = 6;

const Options kGrid = {{"ocs-ratio", "0.25"}, {"range", "search"}, {"rotate", "group"}};

Options operator+(Options a, const Options& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

}  // namespace

TEST_CASE("method: blocks with split channels, searched ranges and rotation survive every kill",
          "[method]") {
  const Fixture fixture;
  for (const char* side : {"weight", "activation", "auto"}) {
    CAPTURE(side);
    const Options options =
        kGrid + Options{{"stages", "w4a16,w2a16"}, {"lr", "1e-3,3e-3"}, {"split-side", side}};
    const TrainConfig config = make_config(fixture, cat("whole_", side), options);
    fixture.run(config);
    CHECK(results(config.out).size() == 6);  // run.json, the statistics, two stages of two blocks
    for (const Json& line : log_lines(config.out, "validation"))
      CHECK(std::isfinite(line["loss"].get<double>()));

    // 8 steps a stage, saved every 2 steps. Killed before anything is saved, inside stages, at
    // their ends and between blocks.
    TrainConfig killed = config;
    killed.out = config.out + "_killed";
    run_with_kills(
        fixture, killed, {1, 3, 8, 9, 14, 16, 17, 24, 27, 32},
        [](int64_t block, int64_t stage, int64_t step) { return block * 16 + stage * 8 + step; });
    check_same_run(killed.out, config.out);

    // Killed before the statistics were saved.
    fs::create_directories(config.out + "_early/blocks");
    fs::create_directories(config.out + "_early/e2e");
    fs::copy(config.out + "/run.json", config.out + "_early/run.json");
    TrainConfig early = config;
    early.out = config.out + "_early";
    fixture.run(early);
    check_same_run(early.out, config.out);
  }
}

TEST_CASE("method: searched ranges and splits lower the loss with which a stage starts",
          "[method]") {
  const Fixture fixture;
  const auto first_loss = [&](const char* name, const Options& options) {
    const TrainConfig config =
        make_config(fixture, name, options + Options{{"stages", "w2a16"}, {"epochs", "1"}});
    fixture.run(config);
    return log_lines(config.out, "validation")[0]["loss"].get<double>();  // of the first block
  };
  const double plain = first_loss("plain", {}),
               searched = first_loss("search", {{"range", "search"}}),
               split = first_loss("split", {{"ocs-ratio", "0.25"}});
  CAPTURE(plain, searched, split);
  CHECK(searched < plain);
  CHECK(split < plain);
}

TEST_CASE("method: groups that do not divide an input are padded", "[method]") {
  const Fixture fixture;
  const TrainConfig config =
      make_config(fixture, "run", {{"stages", "w2a16"}, {"lr", "3e-3"}, {"group-size", "128"}});
  fixture.run(config);
  const auto lines = log_lines(config.out, "validation");
  CHECK(lines.back()["loss"].get<double>() < lines[lines.size() - 3]["loss"].get<double>());
  const auto checkpoint = models::open_checkpoint(export_of(fixture, config));
  CHECK(format_of(*checkpoint, 0, 0).stored_k() == 128);
}

TEST_CASE("method: stages of the whole model survive every kill", "[method]") {
  const Fixture fixture;
  const Options grid = kGrid + Options{{"act-outliers", "32"}, {"act-range", "search"}};
  const struct {
    const char* name;
    Options options;
    size_t files;  // run.json, statistics, results
  } cases[] = {
      {"rounding", {{"stages", ""}, {"e2e-stages", "w2a16:1,w2a2:1"}, {"e2e-lr", "1e-3,3e-4"}}, 4},
      {"blocks",
       {{"stages", "w2a16"}, {"epochs", "1"}, {"e2e-stages", "w2a16:1,w2a2:1"}, {"e2e-snap", "on"}},
       6},
  };
  for (const auto& c : cases) {
    CAPTURE(c.name);
    const TrainConfig config = make_config(fixture, c.name, grid + c.options);
    fixture.run(config);
    REQUIRE(results(config.out).size() == c.files);
    CHECK(fs::exists(config.out + "/e2e/stage_0.safetensors"));
    const auto lines = log_lines(config.out, "e2e");
    REQUIRE(lines.size() == 8);
    CHECK(lines[0]["stage"] == "w2a16");
    CHECK(lines[4]["stage"] == "w2a2");

    TrainConfig killed = config;
    killed.out = config.out + "_killed";
    kill_whole(fixture, killed, 0, 1);  // nothing is saved yet
    kill_whole(fixture, killed, 0, 3);
    const std::string state = killed.out + "/e2e/state.safetensors";
    REQUIRE(fs::exists(state));
    const std::string of_stage_0 = data::read_file(state);
    kill_whole(fixture, killed, 0, 4);  // before its result is written
    kill_whole(fixture, killed, 1, 1);  // between the stages
    CHECK_FALSE(fs::exists(state));
    // Killed between a stage's result and the removal of its state.
    data::write_file_atomic(state, of_stage_0);
    kill_whole(fixture, killed, 1, 3);
    fixture.run(killed);
    check_same_run(killed.out, config.out);

    const auto checkpoint = models::open_checkpoint(export_of(fixture, config));
    for (const size_t linear : {size_t{0}, kDown}) {
      const LinearFormat format = format_of(*checkpoint, 1, linear);
      CHECK(format.input.bits == 2);
      CHECK(format.input.outliers == 32);
      CHECK(format.input.hadamard);
      CHECK(format.order->split().size() > 0);
    }
  }
}

TEST_CASE("method: a run starts from another's result", "[method]") {
  const Fixture fixture;
  const TrainConfig first = make_config(
      fixture, "first", kGrid + Options{{"stages", "w4a16,w2a16"}, {"lr", "1e-3,3e-3"}});
  fixture.run(first);
  const Options next = {{"stages", ""}, {"from", first.out}, {"e2e-stages", "w2a16:1"}};

  // The same grid: masters, ratios and channels are those of the run, so a rate that moves nothing
  // gives its export.
  const TrainConfig still =
      make_config(fixture, "still", kGrid + next + Options{{"e2e-lr", "1e-30"}});
  fixture.run(still);
  CHECK((data::read_file(export_of(fixture, still) + "/bbb.safetensors") ==
         data::read_file(export_of(fixture, first) + "/bbb.safetensors")));

  // Another grid: other channels are split, other groups rotated.
  const TrainConfig changed = make_config(
      fixture, "changed",
      next +
          Options{{"ocs-ratio", "0.1"}, {"act-outliers", "32"}, {"e2e-stages", "w2a16:1,w2a4:1"}});
  fixture.run(changed);
  const auto checkpoint = models::open_checkpoint(export_of(fixture, changed));
  const LinearFormat format = format_of(*checkpoint, 0, 0);
  CHECK(format.input.bits == 4);
  CHECK(format.input.outliers == 32);
  CHECK_FALSE(format.input.hadamard);
  CHECK(format.order->split().size() == 4);  // ceil(0.05 * 64)
  TrainConfig killed = changed;
  killed.out = changed.out + "_killed";
  kill_whole(fixture, killed, 0, 3);
  kill_whole(fixture, killed, 1, 3);
  fixture.run(killed);
  check_same_run(killed.out, changed.out);

  // Algorithm 2 starts from it, too; blocks that are not switched yet are merged.
  const TrainConfig scheduled = make_config(fixture, "scheduled",
                                            {{"stages", "w3a16,w2a16"},
                                             {"block-schedule", "prefix"},
                                             {"first-ratio", "0.5"},
                                             {"from", first.out}});
  fixture.run(scheduled);
  CHECK_FALSE(format_of(*models::open_checkpoint(export_of(fixture, scheduled)), 0, 0).order);
}

TEST_CASE("method: what a run cannot start from is refused", "[method]") {
  const Fixture fixture;
  const TrainConfig first = make_config(fixture, "first", {{"stages", "w2a16"}});
  const auto next = [&](const std::string& name, const Options& options = {}) {
    return make_config(
        fixture, name,
        Options{{"stages", ""}, {"from", first.out}, {"e2e-stages", "w2a16:1"}} + options);
  };
  CHECK_THROWS_WITH(fixture.run(next("next")), Contains("first") && Contains("no training run"));
  train::Observer observer;
  observer.after_block = [](int64_t) { throw Killed(); };
  CHECK_THROWS_AS(fixture.run(first, observer), Killed);
  CHECK_THROWS_WITH(fixture.run(next("next")), Contains("first") && Contains("is not finished"));
  fixture.run(first);

  CHECK_THROWS_WITH(fixture.run(next("next", {{"stages", "w2a16"}})),
                    Contains("--from starts the end-to-end phase"));
  // Another model, of the same shapes.
  fs::create_directory(fixture.dir / "other");
  write_tiny_model(fixture.dir / "other", tiny_config(), 8);
  const auto other = models::open_checkpoint(fixture.dir / "other");
  train::Observer quiet;
  quiet.quiet = true;
  CHECK_THROWS_WITH(train::train_windows(backend(), *other, fixture.windows, next("next"), quiet),
                    Contains("first") && Contains("another model"));
  CHECK_FALSE(fs::exists(fixture.dir / "next"));

  // The run has been replaced by another one before this one has ended.
  kill_whole(fixture, next("next"), 0, 3);
  fs::remove_all(first.out);
  fixture.run(with(first, {{"seed", "1"}}));
  CHECK_THROWS_WITH(fixture.run(next("next")), Contains("another from_checksum"));
}

TEST_CASE("method: Algorithm 2 switches floor(r_t B) blocks a stage, and all in the last",
          "[method]") {
  models::LlamaConfig model = tiny_config();
  const auto stages_of = [&](const TrainConfig& config) {
    return Recipe(train::resolve(config, model, engine::DeviceType::Cpu), model).whole_stages();
  };
  const auto count = [](const train::WholeStage& stage, const Stage& widths) {
    return std::count(stage.widths.begin(), stage.widths.end(), widths);
  };
  const Fixture fixture;
  for (const char* schedule : {"prefix", "stochastic"})
    for (const int64_t layers : {2, 10, 30, 100}) {
      for (const char* first : {"0.29", "0.3", "0.5", "1"}) {
        CAPTURE(schedule, layers, first);
        model.layers = layers;
        const TrainConfig config = make_config(fixture, "run",
                                               {{"stages", "w8a16,w4a16,w2a16"},
                                                {"block-schedule", schedule},
                                                {"first-ratio", first}});
        const auto stages = stages_of(config);
        REQUIRE(stages.size() == 3);
        // In whole hundredths, so that the floor is exact.
        const int64_t percent = std::llround(100 * std::atof(first));
        CHECK(count(stages[0], {8, 16}) == percent * layers / 100);
        CHECK(count(stages[0], {16, 16}) == layers - percent * layers / 100);
        CHECK(count(stages[1], {4, 16}) == (percent + 100) * layers / 200);
        CHECK(count(stages[2], {2, 16}) == layers);
        if (std::string(schedule) == "prefix")
          for (const train::WholeStage& stage : stages)
            for (size_t j = 1; j < stage.widths.size(); ++j)
              CHECK(stage.widths[j - 1].weight_bits <= stage.widths[j].weight_bits);
        for (size_t t = 0; t < stages.size(); ++t) {
          CHECK(stages[t].steps == 8);  // two epochs of 16 windows, 4 a step
          CHECK(stages_of(config)[t].widths == stages[t].widths);
        }
      }
      if (std::string(schedule) == "prefix" || layers < 30) continue;
      const auto with_seed = [&](const char* seed) {
        return stages_of(make_config(
            fixture, "run",
            {{"stages", "w4a16,w2a16"}, {"seed", seed}, {"block-schedule", "stochastic"}}))[0]
            .widths;
      };
      CHECK(with_seed("1") == with_seed("1"));
      CHECK(with_seed("1") != with_seed("2"));
    }
  // The bias prefers the first blocks; without it all are alike.
  model.layers = 30;
  for (const char* bias : {"0", "3"}) {
    int64_t in_first_half = 0, drawn = 0;
    for (int seed = 0; seed < 40; ++seed) {
      const auto widths = stages_of(make_config(fixture, "run",
                                                {{"stages", "w4a16,w2a16"},
                                                 {"block-schedule", "stochastic"},
                                                 {"depth-bias", bias},
                                                 {"seed", std::to_string(seed)}}))[0]
                              .widths;
      for (size_t j = 0; j < widths.size(); ++j) {
        drawn += widths[j].weight_bits == 4;
        in_first_half += widths[j].weight_bits == 4 && j < 15;
      }
    }
    const double share = static_cast<double>(in_first_half) / static_cast<double>(drawn);
    CAPTURE(bias, share);
    if (*bias == '0')
      CHECK(share == Approx(0.5).margin(0.1));  // 360 drawn: four deviations
    else
      CHECK(share > 0.75);
  }
}

TEST_CASE("method: Algorithm 2 trains, and survives every kill", "[method]") {
  const Fixture fixture;
  for (const char* schedule : {"prefix", "stochastic"}) {
    CAPTURE(schedule);
    const TrainConfig config = make_config(fixture, schedule,
                                           {{"stages", "w4a16,w2a16"},
                                            {"lr", "1e-4,1e-3"},
                                            {"block-schedule", schedule},
                                            {"first-ratio", "0.5"},
                                            {"ocs-ratio", "0.2"},
                                            {"e2e-stages", "w2a4:1"}});
    fixture.run(config);
    CHECK(results(config.out).size() == 5);  // run.json, statistics, three stages
    const auto lines = log_lines(config.out, "e2e");
    REQUIRE(lines.size() == 8 + 8 + 4);
    const auto epoch_loss = [&](size_t first) {
      double sum = 0;
      for (size_t i = first; i < first + 4; ++i) sum += lines[i]["loss"].get<double>();
      return sum / 4;
    };
    CHECK(epoch_loss(4) < epoch_loss(0));
    CHECK(epoch_loss(12) < epoch_loss(8));

    TrainConfig killed = config;
    killed.out = config.out + "_killed";
    for (const auto& [stage, step] : {std::pair{0, 3}, {1, 1}, {1, 6}, {2, 1}, {2, 3}})
      kill_whole(fixture, killed, stage, step);
    fixture.run(killed);
    check_same_run(killed.out, config.out);
    const auto checkpoint = models::open_checkpoint(export_of(fixture, config));
    for (int64_t layer : {0, 1}) {
      CHECK(format_of(*checkpoint, layer, 0).weight.bits == 2);
      CHECK(format_of(*checkpoint, layer, 0).input.bits == 4);
    }
  }
}

TEST_CASE("method: a block can follow its own input", "[method]") {
  const Fixture fixture;
  const auto config_of = [&](const char* target) {
    return make_config(fixture, target,
                       {{"stages", "w4a16,w2a16"}, {"lr", "1e-3,3e-3"}, {"target", target}});
  };
  fixture.run(config_of("full"));
  const TrainConfig follow = config_of("follow");
  fixture.run(follow);
  const auto full = results(config_of("full").out), followed = results(follow.out);
  // The first block's input is full precision: both targets are equal.
  for (const int stage : {0, 1}) {
    const auto body = [&](const auto& files, int block) {  // without the header and the checksums
      const std::string& file =
          files.at(cat("blocks/block_00", block, "_stage_", stage, ".safetensors"));
      return file.substr(file.size() / 2, file.size() / 4);
    };
    CHECK((body(full, 0) == body(followed, 0)));
    CHECK((body(full, 1) != body(followed, 1)));
  }
  const auto lines = log_lines(follow.out, "validation");
  REQUIRE(lines.size() == 4 * 3);
  for (size_t i = 0; i < lines.size(); i += 3)
    CHECK(std::min(lines[i + 1]["loss"].get<double>(), lines[i + 2]["loss"].get<double>()) <
          lines[i]["loss"].get<double>());
  TrainConfig killed = follow;
  killed.out = follow.out + "_killed";
  run_with_kills(
      fixture, killed, {3, 9, 14, 19, 27},
      [](int64_t block, int64_t stage, int64_t step) { return block * 16 + stage * 8 + step; });
  check_same_run(killed.out, follow.out);

  for (const char* stream : {"higher", "mix"})
    CHECK_THAT(refusal(with(config_of("follow"), {{"input-stream", stream}})),
               Contains("--target follow") && Contains("--input-stream same"));
}

TEST_CASE("method: the paper's schedules", "[method]") {
  const auto stages = [](char schedule, const Stage& to) {
    return train::to_string(train::scheduled_stages(schedule, to));
  };
  CHECK(stages('A', {2, 16}) == "w8a16,w4a16,w2a16");
  CHECK(stages('A', {2, 2}) == "w8a16,w4a16,w2a16,w2a8,w2a4,w2a2");
  CHECK(stages('B', {2, 2}) == "w8a16,w8a8,w4a8,w4a4,w2a4,w2a2");
  CHECK_THROWS_WITH(stages('B', {2, 16}), Contains("--schedule B") && Contains("--to w2a2"));
  CHECK(stages('C', {2, 16}).ends_with("w3a16,w2a16,w3a16,w2a16,w2a16"));
  CHECK(stages('C', {2, 2}) == stages('C', {2, 16}) + ",w2a8,w2a4,w2a2");
}

TEST_CASE("method: down-projections above the kurtosis take 4-bit activations", "[method]") {
  const Fixture fixture;
  const auto config_of = [&](const char* name, const std::string& kurtosis) {
    return make_config(fixture, name, {{"stages", "w2a2"}, {"down-kurtosis", kurtosis}});
  };
  const TrainConfig probe = config_of("probe", "1e9");
  fixture.run(probe);
  const auto statistics = train::RunDirectory(probe.out).statistics(tiny_config());
  std::array<double, 2> kurtosis;
  for (size_t layer : {0, 1}) kurtosis[layer] = statistics[layer][models::kDownSite].kurtosis;
  CAPTURE(kurtosis[0], kurtosis[1]);
  REQUIRE(kurtosis[0] != kurtosis[1]);
  const double between = (kurtosis[0] + kurtosis[1]) / 2;
  for (const double above : {1e9, 1e-3, between}) {
    const TrainConfig config = config_of(cat("above_", above).c_str(), cat(above));
    fixture.run(config);
    const auto checkpoint = models::open_checkpoint(export_of(fixture, config));
    for (size_t layer : {0, 1})
      for (size_t linear = 0; linear <= kDown; ++linear) {
        CAPTURE(above, layer, linear);
        CHECK(format_of(*checkpoint, static_cast<int64_t>(layer), linear).input.bits ==
              (linear == kDown && kurtosis[layer] > above ? 4 : 2));
      }
  }
}

TEST_CASE("method: split side auto takes each site from one of the two sides", "[method]") {
  const Fixture fixture;
  std::map<std::string, std::vector<models::LayerStatistics>> statistics;
  for (const char* side : {"weight", "activation", "auto"}) {
    const TrainConfig config = train::resolve(make_config(fixture, side,
                                                          {{"stages", "w2a2"},
                                                           {"ocs-ratio", "0.25"},
                                                           {"act-outliers", "32"},
                                                           {"rotate", "group"},
                                                           {"range", "search"},
                                                           {"split-side", side}}),
                                              tiny_config(), engine::DeviceType::Cpu);
    statistics[side] = train::collect_statistics(backend(), *fixture.source, fixture.windows,
                                                 config, [](int64_t) {});
  }
  for (size_t layer : {0, 1})
    for (size_t site = 0; site < models::kSites; ++site) {
      const auto of = [&](const char* side) { return statistics[side][layer][site]; };
      const models::SiteStatistics chosen = of("auto");
      const bool weight = chosen.side == quant::SplitSide::Weight;
      const models::SiteStatistics same = of(weight ? "weight" : "activation");
      CAPTURE(layer, site, weight);
      CHECK(chosen.kurtosis == same.kurtosis);
      CHECK(chosen.outliers == same.outliers);
      CHECK(chosen.split == same.split);
      CHECK(chosen.energy == same.energy);  // halving is exact
    }
}

TEST_CASE("method: split side auto takes the side of the smaller error", "[method]") {
  Fixture fixture;
  // Every eighth channel is four times the others, behind both norms. These are the channels that
  // are split, and they share a group with 16 others: halving the activation halves its step.
  for (const char* norm : {"input_layernorm", "post_attention_layernorm"})
    fixture.change(cat("model.layers.0.", norm, ".weight"), [](float* values) {
      for (int channel = 3; channel < 64; channel += 8) values[channel] *= 4;
    });
  Backend& device = backend();
  const models::LlamaConfig model = tiny_config();
  const models::LayerResult original = models::full_precision(*fixture.source, 0);
  for (const char* stage : {"w8a4", "w2a16"}) {
    const TrainConfig config = train::resolve(make_config(fixture, stage,
                                                          {{"stages", stage},
                                                           {"ocs-ratio", "0.25"},
                                                           {"ocs-metric", "act-max"},
                                                           {"split-side", "auto"}}),
                                              model, engine::DeviceType::Cpu);
    const auto statistics =
        train::collect_statistics(device, *fixture.source, fixture.windows, config, [](int64_t) {});
    // The inputs of the sites, act (M, K).
    std::array<Tensor, models::kSites> inputs;
    models::Llama llama(device, *fixture.source, models::HeadRounding::BFloat16);
    llama.load_blocks(*fixture.source);
    models::LlamaBlock& block = *llama.blocks()[0];
    block.set_tap([&](models::Site site, const Tensor& x) {
      inputs[static_cast<size_t>(site)] = x.view({x.numel() / x.dim(-1), x.dim(-1)});
    });
    autograd::Tape tape(device, autograd::TapeMode::Inference);
    const int64_t windows = config.samples;
    const std::vector<int32_t> ids(fixture.windows.ids.begin(),
                                   fixture.windows.ids.begin() + windows * fixture.windows.seq_len);
    const Tensor tokens = make_ids(device, {windows, fixture.windows.seq_len}, ids);
    llama.forward(tape, tokens, nullptr, models::Recompute::None);

    const auto shapes = models::block_linears(model);
    // Of a site's outputs, squared, by the forward of training.
    const auto error = [&](size_t site, quant::SplitSide side) {
      double sum = 0;
      for (size_t i = 0; i < shapes.size(); ++i) {
        if (static_cast<size_t>(shapes[i].site) != site) continue;
        LinearFormat format{.n = shapes[i].n, .k = shapes[i].k};
        format.weight = {.bits = config.bits, .group = config.group};
        format.input.bits = config.act_bits;
        format.order = std::make_shared<quant::ChannelOrder>(
            format.k, config.group, std::vector<int32_t>{}, statistics[0][site].split, side);
        autograd::ParameterSet set(device, autograd::GradientPasses::One);
        models::QuantLinear linear(device, "linear", format.n, format.k);
        autograd::Parameter& master = set.add("w", {format.n, format.stored_k()});
        set.allocate();
        autograd::WeightQuantizer quantizer(set, config.group);
        linear.set_trained(quantizer, master, format);
        linear.set_master(
            models::start_stage(original.linears[i], format, {}, quant::RangeRule::MinMax, 0));
        quantizer.prepare();
        models::Operand operand;
        operand.set(device, format, false);
        const autograd::Var x(inputs[site]);
        const auto y = values_of(
            device, linear.forward(tape, operand.plain(tape, x), autograd::Var()).value());
        const auto exact = values_of(
            device, block.linears()[i]->forward(tape, input_of(x), autograd::Var()).value());
        for (size_t j = 0; j < y.size(); ++j) sum += (y[j] - exact[j]) * (y[j] - exact[j]);
      }
      return sum;
    };
    for (size_t site = 0; site < models::kSites; ++site) {
      const double of_weight = error(site, quant::SplitSide::Weight),
                   of_activation = error(site, quant::SplitSide::Activation);
      const bool activation = statistics[0][site].side == quant::SplitSide::Activation;
      CAPTURE(stage, site, activation, of_weight, of_activation);
      // In bf16 sums of another order decide between errors this close.
      const double margin = device.act() == engine::DType::BF16 ? 1.01 : 1;
      if (activation)
        CHECK(of_activation < margin * of_weight);
      else
        CHECK(of_weight <= margin * of_activation);
      const bool behind_norm = site == models::kAttentionSite || site == models::kMlpSite;
      if (config.act_bits == 16) CHECK_FALSE(activation);
      if (config.act_bits < 16 && behind_norm) CHECK(of_activation < 0.8 * of_weight);
    }
  }
}

TEST_CASE("method: energies are those of the operand, by stored position", "[method]") {
  const Fixture fixture;
  const auto energies = [&](const char* name, const Options& options) {
    const TrainConfig config = train::resolve(
        make_config(fixture, name, Options{{"stages", "w2a16"}, {"range", "search"}} + options),
        tiny_config(), engine::DeviceType::Cpu);
    return train::collect_statistics(backend(), *fixture.source, fixture.windows, config,
                                     [](int64_t) {})[0][models::kAttentionSite];
  };
  // The first site's input is the normed embedding.
  const models::LlamaConfig model = tiny_config();
  const auto d = static_cast<size_t>(model.d_model);
  const auto table =
      fixture.source->load("model.embed_tokens.weight", {model.vocab, model.d_model});
  const auto norm = fixture.source->load("model.layers.0.input_layernorm.weight", {model.d_model});
  std::vector<double> expected(d, 0.0);
  const size_t tokens = static_cast<size_t>(fixture.config.samples * Fixture::kSeqLen);
  for (size_t t = 0; t < tokens; ++t) {
    const float* row = table.data() + static_cast<size_t>(fixture.windows.ids[t]) * d;
    double squares = 0;
    for (size_t i = 0; i < d; ++i) squares += double(row[i]) * row[i];
    const double r2 = 1 / (squares / static_cast<double>(d) + model.rms_eps);
    for (size_t i = 0; i < d; ++i)
      expected[i] += r2 * std::pow(double(row[i]) * norm[i], 2) / static_cast<double>(tokens);
  }
  const auto near = [](double value) { return Approx(value).epsilon(on_cuda() ? 1e-2 : 1e-5); };
  const auto plain = energies("plain", {}).energy;
  REQUIRE(plain.size() == d);
  for (size_t i = 0; i < d; ++i) CHECK(plain[i] == near(expected[i]));

  for (const char* side : {"weight", "activation"}) {
    CAPTURE(side);
    const double factor = *side == 'w' ? 1 : 0.25;
    const models::SiteStatistics site =
        energies(side, {{"ocs-ratio", "0.25"}, {"act-outliers", "32"}, {"split-side", side}});
    const quant::ChannelOrder order(model.d_model, 32, site.outliers, site.split, site.side);
    REQUIRE(site.energy.size() == static_cast<size_t>(order.stored_k()));
    for (int64_t p = 0; p < order.stored_k(); ++p) {
      const int32_t channel = order.channels()[static_cast<size_t>(p)];
      const bool pair = p >= order.pairs_begin() && p < order.pairs_end();
      CHECK(site.energy[static_cast<size_t>(p)] ==
            near(channel < 0 ? 0 : expected[static_cast<size_t>(channel)] * (pair ? factor : 1)));
    }
  }
  // x' = 2^-3 H x keeps half of a group's energy, and spreads it.
  const auto rotated = energies("rotated", {{"rotate", "group"}}).energy;
  for (size_t g = 0; g < d; g += 32) {
    double sum = 0, before = 0;
    for (size_t i = g; i < g + 32; ++i) sum += rotated[i], before += expected[i];
    CHECK(sum == near(before / 2));
  }
}

TEST_CASE("method: all channels of an input may be outliers or split", "[method]") {
  const Fixture fixture;
  const TrainConfig config = make_config(fixture, "run",
                                         {{"stages", "w2a2"},
                                          {"ocs-ratio", "0.6"},
                                          {"epochs", "1"},
                                          {"act-outliers", "32"},
                                          {"rotate", "group"}});
  fixture.run(config);
  const LinearFormat format = format_of(*models::open_checkpoint(export_of(fixture, config)), 1, 0);
  CHECK(format.order->split().size() == 32);
  CHECK(format.order->rotated_begin() == format.order->rotated_end());
}

TEST_CASE("method: damaged or foreign statistics are refused", "[method]") {
  const Fixture fixture;
  const TrainConfig config = make_config(fixture, "run", kGrid + Options{{"stages", "w2a16"}});
  train::Observer observer;
  observer.after_block = [](int64_t) { throw Killed(); };
  CHECK_THROWS_AS(fixture.run(config, observer), Killed);
  const std::string file = config.out + "/statistics.safetensors", good = data::read_file(file);
  for (const size_t at : {size_t{9}, good.size() / 2, good.size() - 1}) {
    std::string bytes = good;
    bytes[at] ^= 4;
    data::write_file_atomic(file, bytes);
    CHECK_THROWS_WITH(fixture.run(config), Contains("statistics.safetensors"));
  }
  const TrainConfig other =
      with(make_config(fixture, "other", kGrid + Options{{"stages", "w2a16"}}), {{"seed", "1"}});
  CHECK_THROWS_AS(fixture.run(other, observer), Killed);
  data::write_file_atomic(file, data::read_file(other.out + "/statistics.safetensors"));
  CHECK_THROWS_WITH(fixture.run(config), Contains("is of another run"));
  data::write_file_atomic(file, good);
  fixture.run(config);
}

TEST_CASE("method: scales train over a channel order", "[method]") {
  const Fixture fixture;
  const TrainConfig config = make_config(fixture, "run",
                                         kGrid + Options{{"stages", "w2a16"},
                                                         {"epochs", "1"},
                                                         {"e2e-stages", "w2a4:10"},
                                                         {"e2e-train", "scales"},
                                                         {"e2e-lr", "3e-3"},
                                                         {"act-outliers", "32"}});
  fixture.run(config);
  const auto lines = log_lines(config.out, "e2e");
  REQUIRE(lines.size() == 40);
  double first = 0, last = 0;
  for (size_t i = 0; i < 4; ++i) {
    first += lines[i]["loss"].get<double>();
    last += lines[36 + i]["loss"].get<double>();
  }
  CHECK(last < first);
  TrainConfig killed = config;
  killed.out = config.out + "_killed";
  kill_whole(fixture, killed, 0, 1);
  kill_whole(fixture, killed, 0, 23);
  fixture.run(killed);
  check_same_run(killed.out, config.out);
  const auto checkpoint = models::open_checkpoint(export_of(fixture, config));
  const LinearFormat format = format_of(*checkpoint, 1, 0);
  CHECK(format.input.bits == 4);
  CHECK(format.order->outliers().size() == 32);
  CHECK(format.order->split().size() == 24);  // 0.375 of 64
}

TEST_CASE("method: GPTQ finds codes, over any channel order, and survives every kill", "[method]") {
  const Fixture fixture;
  const Options gptq = {{"method", "gptq"}, {"stages", "w2a16"}};
  for (const auto& [name, options] :
       {std::pair{"plain", gptq},
        {"grid", kGrid + gptq},
        {"activations", gptq + Options{{"stages", "w3a4"}, {"act-outliers", "32"}}},
        {"padded", gptq + Options{{"group-size", "128"}}},
        {"seq", kGrid + gptq + Options{{"quantizer", "seq"}}}}) {
    CAPTURE(name);
    const TrainConfig config = make_config(fixture, name, options);
    fixture.run(config);
    TrainConfig killed = config;
    killed.out = config.out + "_killed";
    train::Observer observer;
    observer.after_block = [](int64_t) { throw Killed(); };
    CHECK_THROWS_AS(fixture.run(killed, observer), Killed);
    fixture.run(killed);
    check_same_run(killed.out, config.out);
    CHECK(log_lines(config.out, "gptq").size() == 2);

    // The file holds what the export holds.
    const auto checkpoint = models::open_checkpoint(export_of(fixture, config));
    const models::LlamaConfig model = tiny_config();
    const TrainConfig resolved = train::resolve(config, model, backend().device());
    const train::RunDirectory run(config.out);
    const Recipe recipe(resolved, model, run.statistics(model));
    const models::LayerResult result = run.result(1, recipe, model);
    const LinearFormat format = format_of(*checkpoint, 1, kDown);
    CHECK(result.linears[kDown].format == format);
    for (const quant::StoredTensor& tensor : format.tensors()) {
      const auto* stored = static_cast<const uint8_t*>(
          checkpoint->stored(models::layer_name(1, "mlp.down_proj") + tensor.suffix));
      const std::vector<uint8_t>& bytes = result.linears[kDown].part(tensor.part);
      CHECK(std::equal(bytes.begin(), bytes.end(), stored));
    }
  }
}

TEST_CASE("method: GPTQ loses less than rounding to nearest", "[method]") {
  const Fixture fixture;
  const auto logits = [&](const std::string& path) {
    const auto checkpoint = models::open_checkpoint(path);
    const auto model = load_model(backend(), *checkpoint);
    return logits_of(*model, {fixture.windows.ids.begin(), fixture.windows.ids.begin() + 32});
  };
  const std::vector<double> full = logits(fixture.config.model);
  const auto error_of = [&](const std::string& path) {
    const std::vector<double> of = logits(path);
    double sum = 0;
    for (size_t i = 0; i < of.size(); ++i) sum += std::pow(of[i] - full[i], 2);
    return sum;
  };
  const TrainConfig config =
      make_config(fixture, "gptq", {{"method", "gptq"}, {"stages", "w3a16"}});
  fixture.run(config);
  TrainConfig nearest = make_config(fixture, "", {});
  nearest.bits = 3;
  train::export_rtn(backend(), *fixture.source, FileTokenizer(), nearest, fixture.dir / "nearest",
                    models::ExportFormat::Packed);
  CHECK(error_of(export_of(fixture, config)) < 0.9 * error_of(fixture.dir / "nearest"));
}

TEST_CASE("method: scales train behind GPTQ, masters start from its codes", "[method]") {
  const Fixture fixture;
  const Options gptq = {{"method", "gptq"}, {"stages", "w2a16"}};
  const TrainConfig alone = make_config(fixture, "alone", kGrid + gptq);
  fixture.run(alone);
  const auto codes_of = [&](const std::string& packed) {
    const auto checkpoint = models::open_checkpoint(packed);
    const std::string name = models::layer_name(0, "self_attn.q_proj") + quant::kCodesSuffix;
    const LinearFormat format = format_of(*checkpoint, 0, 0);
    const auto* bytes = static_cast<const uint8_t*>(checkpoint->stored(name));
    return std::vector<uint8_t>(bytes, bytes + format.tensors()[0].bytes());
  };
  const std::vector<uint8_t> codes = codes_of(export_of(fixture, alone));

  // By default scales train, and the codes stay.
  const TrainConfig scales = make_config(
      fixture, "scales", kGrid + gptq + Options{{"e2e-stages", "w2a16:10"}, {"e2e-lr", "3e-3"}});
  CHECK(train::resolve(scales, tiny_config(), engine::DeviceType::Cpu).e2e_train ==
        train::EndToEndTrain::Scales);
  fixture.run(scales);
  TrainConfig killed = scales;
  killed.out = scales.out + "_killed";
  kill_whole(fixture, killed, 0, 3);
  fixture.run(killed);
  check_same_run(killed.out, scales.out);
  CHECK(codes_of(export_of(fixture, scales)) == codes);
  const auto lines = log_lines(scales.out, "e2e");
  REQUIRE(lines.size() == 40);
  double first = 0, last = 0;
  for (size_t i = 0; i < 4; ++i) {
    first += lines[i]["loss"].get<double>();
    last += lines[36 + i]["loss"].get<double>();
  }
  CHECK(last < first);

  // So they do if the activations get fewer bits.
  const TrainConfig narrow = make_config(
      fixture, "narrow",
      kGrid + gptq +
          Options{{"e2e-stages", "w2a4:1"}, {"e2e-lr", "1e-3"}, {"e2e-train", "scales"}});
  fixture.run(narrow);
  CHECK(codes_of(export_of(fixture, narrow)) == codes);

  // All weights: the start is that of the scales; so is that of a run from the finished one.
  const TrainConfig all = make_config(
      fixture, "all", kGrid + gptq + Options{{"e2e-stages", "w2a16:1"}, {"e2e-train", "all"}});
  fixture.run(all);
  const TrainConfig from =
      make_config(fixture, "from",
                  kGrid + Options{{"stages", ""}, {"from", alone.out}, {"e2e-stages", "w2a16:1"}});
  fixture.run(from);
  CHECK(log_lines(all.out, "e2e") == log_lines(from.out, "e2e"));
  // A group that does not use its outer codes has another grid, so the start is not exactly GPTQ's.
  CHECK(log_lines(all.out, "e2e")[0]["loss"].get<double>() ==
        Approx(lines[0]["loss"].get<double>()).epsilon(0.2));
}

TEST_CASE("method: learned grids and Block-AP lower the loss, and survive every kill", "[method]") {
  const Fixture fixture;
  const Options stage = {{"stages", "w2a16"}, {"lr", "3e-3"}, {"grid-lr", "1e-3"}};
  for (const auto& [name, options] :
       {std::pair{"scales", stage + Options{{"grid-train", "scales"}}},
        {"both", kGrid + stage + Options{{"grid-train", "scales-zeros"}}},
        {"seq_scales", kGrid + stage + Options{{"grid-train", "scales"}, {"quantizer", "seq"}}},
        {"ratios", kGrid + stage + Options{{"grid-train", "ratios"}}},
        {"block_ap",
         stage + Options{{"method", "block-ap"}, {"e2e-stages", "w2a16:1"}, {"e2e-lr", "1e-3"}}}}) {
    CAPTURE(name);
    const TrainConfig config = make_config(fixture, name, options);
    fixture.run(config);
    const auto lines = log_lines(config.out, "validation");
    REQUIRE(lines.size() == 6);  // before, and after each of two epochs, of two blocks
    for (const size_t block : {0, 3})
      CHECK(lines[block + 2]["loss"].get<double>() < lines[block]["loss"].get<double>());
    TrainConfig killed = config;
    killed.out = config.out + "_killed";
    run_with_kills(fixture, killed, {1, 3, 8, 9, 13, 16},
                   [](int64_t block, int64_t, int64_t step) { return block * 8 + step; });
    check_same_run(killed.out, config.out);
    CHECK(log_lines(config.out, "e2e").size() == (name == std::string("block_ap") ? 4 : 0));
    const auto checkpoint = models::open_checkpoint(export_of(fixture, config));
    const auto model = load_model(backend(), *checkpoint);
    for (const double logit : logits_of(*model, {1, 2, 3, 4})) CHECK(std::isfinite(logit));
  }
}

TEST_CASE("method: learned grids train the whole model, and survive every kill", "[method]") {
  const Fixture fixture;
  for (const auto& [quantizer, parts] : {std::pair{"minmax", "ratios"},
                                         {"seq", "ratios"},
                                         {"minmax", "scales"},
                                         {"minmax", "scales-zeros"}}) {
    CAPTURE(quantizer, parts);
    const TrainConfig config = make_config(fixture, cat(quantizer, "_", parts),
                                           kGrid + Options{{"stages", ""},
                                                           {"quantizer", quantizer},
                                                           {"grid-train", parts},
                                                           {"grid-lr", "1e-3"},
                                                           {"e2e-stages", "w3a16:2,w2a16:4"}});
    fixture.run(config);
    const auto lines = log_lines(config.out, "e2e");
    REQUIRE(lines.size() == 24);  // 4 steps a pass
    double first = 0, last = 0;
    for (size_t i = 0; i < 4; ++i) {
      first += lines[8 + i]["loss"].get<double>();
      last += lines[20 + i]["loss"].get<double>();
    }
    CHECK(last < first);
    // Other than with the grid of the search, from which it starts.
    TrainConfig searched = with(config, {{"grid-train", "none"}});
    searched.out = config.out + "_searched";
    fixture.run(searched);
    CHECK(log_lines(searched.out, "e2e")[0]["loss"] == lines[0]["loss"]);
    CHECK(log_lines(searched.out, "e2e")[5]["loss"] != lines[5]["loss"]);
    TrainConfig killed = config;
    killed.out = config.out + "_killed";
    kill_whole(fixture, killed, 0, 3);
    kill_whole(fixture, killed, 1, 5);
    fixture.run(killed);
    check_same_run(killed.out, config.out);
    const auto checkpoint = models::open_checkpoint(export_of(fixture, config));
    CHECK(format_of(*checkpoint, 0, 0).weight.bits == 2);
    const auto model = load_model(backend(), *checkpoint);
    for (const double logit : logits_of(*model, {1, 2, 3, 4})) CHECK(std::isfinite(logit));
  }
}

TEST_CASE("method: SEQ trains in both phases, survives every kill, and is exported", "[method]") {
  const Fixture fixture;
  const TrainConfig config = make_config(fixture, "seq",
                                         kGrid + Options{{"quantizer", "seq"},
                                                         {"stages", "w8a16,w2a16"},
                                                         {"lr", "1e-3,3e-3"},
                                                         {"e2e-stages", "w2a16:2"},
                                                         {"e2e-snap", "on"}});
  fixture.run(config);
  const auto lines = log_lines(config.out, "validation");
  REQUIRE(lines.size() == 12);  // before, and after each of two epochs, of two stages of two blocks
  for (const size_t stage : {3, 9})  // at 8 bits training may improve nothing
    CHECK(lines[stage + 2]["loss"].get<double>() < lines[stage]["loss"].get<double>());
  TrainConfig killed = config;
  killed.out = config.out + "_killed";
  run_with_kills(fixture, killed, {3, 9, 20}, [](int64_t block, int64_t stage, int64_t step) {
    return block * 16 + stage * 8 + step;
  });
  check_same_run(killed.out, config.out);
  TrainConfig again = config;
  again.out = config.out + "_again";
  kill_whole(fixture, again, 0, 5);
  fixture.run(again);
  check_same_run(again.out, config.out);

  const std::string packed = export_of(fixture, config);
  const auto checkpoint = models::open_checkpoint(packed);
  const LinearFormat format = format_of(*checkpoint, 1, kDown);
  CHECK(format.is_symmetric());
  CHECK(format.input.hadamard);
  CHECK_FALSE(format.order->split().empty());
  for (const models::TensorInfo& t : checkpoint->list()) CHECK_FALSE(t.name.ends_with(".zeros"));
  const train::Json settings =
      train::Json::parse(data::read_file(packed + "/config.json"))["quantization_config"];
  CHECK(settings["symmetric"] == true);
  CHECK(settings["bits"] == 2);
  // Weights in full precision, from the same file.
  const std::string plain = config.out + "_plain";
  train::export_run(backend(), *fixture.source, FileTokenizer(), config.out, plain,
                    models::ExportFormat::HuggingFace);
  const std::vector<int32_t> ids = random_tokens(5, 21, tiny_config().vocab);
  const auto packed_model = load_model(backend(), *checkpoint);
  CHECK(relative_error(logits_of(*load_model(backend(), *models::open_checkpoint(plain)), ids),
                       logits_of(*packed_model, ids)) < 8 * epsilon_of(DType::BF16));

  // Scales alone, behind blocks and behind rounding.
  for (const auto& [name, stages] : {std::pair{"scales", "w2a16"}, {"rounded", ""}}) {
    CAPTURE(name);
    const TrainConfig scales = make_config(fixture, name,
                                           {{"quantizer", "seq"},
                                            {"stages", stages},
                                            {"epochs", "1"},
                                            {"e2e-train", "scales"},
                                            {"e2e-lr", "3e-3"},
                                            {"e2e-stages", "w2a16:10"}});
    fixture.run(scales);
    const auto steps = log_lines(scales.out, "e2e");
    double first = 0, last = 0;
    for (size_t i = 0; i < 4; ++i) {
      first += steps[i]["loss"].get<double>();
      last += steps[36 + i]["loss"].get<double>();
    }
    CHECK(last < first);
    CHECK(format_of(*models::open_checkpoint(export_of(fixture, scales)), 0, 0).is_symmetric());
  }
}

TEST_CASE("method: the estimator decides which weights move", "[method]") {
  const Fixture fixture;
  const auto end = [&](const char* name, const Options& options) {
    const TrainConfig config = make_config(
        fixture, name,
        Options{{"stages", ""}, {"e2e-stages", "w2a16:1"}, {"range", "search"}} + options);
    fixture.run(config);
    return results(config.out).at("e2e/final.safetensors");
  };
  for (const char* quantizer : {"minmax", "seq"}) {
    CAPTURE(quantizer);
    const auto of = [&](const char* name, const Options& ste) {
      return end(cat(quantizer, name).c_str(), ste + Options{{"quantizer", quantizer}});
    };
    const std::string clip = of("clip", {}), all = of("all", {{"ste", "all"}}),
                      half = of("half", {{"ste", "trust"}, {"ste-trust", "0.5"}});
    CHECK((all != clip));
    CHECK((half != clip));
    CHECK((half != all));
  }
}

TEST_CASE("method: one run for several precisions", "[method]") {
  const Fixture fixture;
  for (const char* dequant : {"middle", "floor"}) {
    CAPTURE(dequant);
    const TrainConfig config = make_config(fixture, dequant,
                                           {{"stages", "w8a16"},
                                            {"lr", "3e-4"},
                                            {"any-precision", "8,4,2"},
                                            {"ocs-ratio", "0.2"},
                                            {"nested-dequant", dequant},
                                            {"e2e-stages", "w8a16:2"},
                                            {"e2e-lr", "3e-4"}});
    fixture.run(config);
    TrainConfig killed = config;
    killed.out = config.out + "_killed";
    run_with_kills(fixture, killed, {3, 8, 11},
                   [](int64_t block, int64_t, int64_t step) { return block * 8 + step; });
    check_same_run(killed.out, config.out);
    TrainConfig again = config;
    again.out = config.out + "_again";
    kill_whole(fixture, again, 0, 5);
    fixture.run(again);
    check_same_run(again.out, config.out);

    const std::string path = export_of(fixture, config);
    std::vector<double> distances;  // of the logits from those in full precision
    const std::vector<int32_t> ids = random_tokens(4, 30, tiny_config().vocab);
    const auto exact = logits_of(*load_model(backend(), *fixture.source), ids);
    for (const int bits : {0, 8, 4, 2}) {
      const auto checkpoint = models::open_checkpoint(path, bits);
      CHECK(format_of(*checkpoint, 0, 0).weight.bits == (bits == 0 ? 8 : bits));
      CHECK(format_of(*checkpoint, 0, 0).weight.nested);
      distances.push_back(
          relative_error(logits_of(*load_model(backend(), *checkpoint), ids), exact));
    }
    CAPTURE(distances[1], distances[2], distances[3]);
    CHECK(distances[0] == distances[1]);
    CHECK(distances[1] < distances[2]);
    CHECK(distances[2] < distances[3]);
  }
}

TEST_CASE("method: rounding to nearest takes the grid's options", "[method]") {
  const Fixture fixture;
  const auto rounded = [&](const char* name, const Options& options) {
    TrainConfig config = with(TrainConfig(), options);
    config.bits = 2;
    config.act_bits = 4;
    train::export_rtn(backend(), *fixture.source, FileTokenizer(), config, fixture.dir / name,
                      models::ExportFormat::Packed);
    return format_of(*models::open_checkpoint(fixture.dir / name), 1, kDown);
  };
  const LinearFormat format = rounded("rotated", {{"rotate", "group"}, {"act-range", "search"}});
  CHECK(format.input.bits == 4);
  CHECK(format.input.hadamard);
  CHECK(format.input.range == quant::RangeRule::Search);
  for (const auto& [option, text] : {std::pair{"range", "search"},
                                     {"ocs-ratio", "0.1"},
                                     {"act-outliers", "32"},
                                     {"down-kurtosis", "5"}})
    CHECK_THROWS_WITH(rounded("refused", {{option, text}}),
                      Contains(cat("--", option)) && Contains("need --data FILE"));
  CHECK_FALSE(fs::exists(fixture.dir / "refused"));
}

TEST_CASE("method: options of the grid are completed or refused by name", "[method]") {
  const Fixture fixture;
  const auto made = [&](const Options& options) { return make_config(fixture, "run", options); };
  for (const auto& [asked, given] : {std::pair{"0", 0}, {"1", 32}, {"32", 32}, {"33", 64}}) {
    models::LlamaConfig wide = tiny_config();
    wide.d_model = 128;
    CAPTURE(asked);
    CHECK(train::resolve(made({{"stages", "w2a2"}, {"act-outliers", asked}}), wide,
                         engine::DeviceType::Cpu)
              .act_outliers == given);
  }
  const std::pair<Options, const char*> wrong[] = {
      {{{"stages", "w2a2"}, {"act-outliers", "33"}}, "--act-outliers 64 are all of the 64"},
      {{{"stages", "w2a16"}, {"ocs-ratio", "0.1,0.2,0.3"}}, "--ocs-ratio"},
      {{{"stages", "w2a16"}, {"ocs-ratio", "0.7"}}, "--ocs-ratio 0.7"},
      {{{"stages", "w2a6"}}, "--stages: activations of 6 bits"},
      {{{"stages", "w2a16"}, {"e2e-stages", "w5a16:1"}}, "--e2e-stages: weights of 5 bits"},
      {{{"stages", "w2a16"}, {"e2e-stages", "w2a16:1,w2a2:1"}, {"e2e-lr", "1e-3,1e-3,1e-3"}},
       "--e2e-lr has 3 values for 2 stages"},
      {{{"stages", "w2a16"}, {"e2e-stages", "w2a16:1,w2a2:1"}, {"e2e-train", "scales"}},
       "--e2e-train scales"},
      {{{"stages", "w2a16"}, {"block-schedule", "prefix"}, {"e2e-train", "scales"}},
       "--e2e-train scales"},
      {{{"stages", ""}, {"e2e-stages", "w2a16:1"}, {"block-schedule", "prefix"}},
       "--block-schedule"},
      {{{"stages", "w8a16,w2a16"}, {"block-schedule", "stochastic"}, {"e2e-freeze", "flips"}},
       "at most 4 bits, not for w8a16"},
      {{{"stages", "w8a16,w2a16"}, {"block-schedule", "prefix"}, {"e2e-damping", "0.1"}},
       "at most 4 bits, not for w8a16"},
      {{{"stages", "w4a16,w2a16"}, {"method", "gptq"}}, "one stage"},
      {{{"stages", "w4a16,w2a16"}, {"method", "block-ap"}}, "--method block-ap finds"},
      {{{"stages", "w4a16,w2a16"}, {"grid-train", "scales"}}, "--grid-train finds"},
      {{{"stages", "w2a16"}, {"method", "gptq"}, {"grid-train", "scales"}}, "no --grid-train"},
      {{{"stages", ""}, {"e2e-stages", "w2a16:1"}, {"method", "gptq"}}, "one stage"},
      {{{"stages", "w16a16"}, {"method", "gptq"}}, "one stage"},
      {{{"stages", "w2a16"}, {"method", "gptq"}, {"block-schedule", "prefix"}}, "--block-schedule"},
      {{{"stages", "w8a16"}, {"method", "gptq"}, {"any-precision", "8,2"}}, "--any-precision"},
      {{{"stages", "w8a16"}, {"quantizer", "seq"}}, "--quantizer seq is for results of at most 4"},
      {{{"stages", "w8a16"}, {"quantizer", "seq"}, {"any-precision", "8,2"}}, "--quantizer seq"},
      {{{"stages", "w2a16"}, {"quantizer", "seq"}, {"grid-train", "scales-zeros"}},
       "--quantizer seq has no zero points"},
      {{{"stages", "w2a16"}, {"quantizer", "seq"}, {"method", "block-ap"}}, "no --method block-ap"},
      {{{"stages", "w2a16"}, {"quantizer", "lc"}, {"ste", "all"}}, "no --ste"},
      {{{"stages", "w2a16"}, {"grid-train", "scales"}, {"ste", "trust"}}, "no --ste"},
      {{{"stages", "w2a16"}, {"method", "block-ap"}, {"grid-train", "ratios"}},
       "--method block-ap"},
      {{{"stages", ""}, {"e2e-stages", "w2a16:1"}, {"method", "block-ap"}}, "one stage"},
      {{{"stages", ""}, {"e2e-stages", "w2a16:1"}, {"grid-train", "scales"}, {"e2e-damping", "1"}},
       "--grid-train moves the grid"},
      {{{"stages", "w8a16"}, {"any-precision", "4,2"}}, "--any-precision"},
      {{{"stages", "w2a16"}, {"any-precision", "8,2"}}, "--any-precision"},
      {{{"stages", "w8a16"}, {"any-precision", "8,2"}, {"range", "search"}}, "--range search"},
      {{{"stages", "w8a16"}, {"any-precision", "8,2"}, {"input-stream", "mix"}}, "--input-stream"},
      {{{"stages", "w8a16"}, {"any-precision", "8,2"}, {"e2e-stages", "w4a16:1"}}, "not w4a16"},
  };
  for (const auto& [options, message] : wrong) {
    CAPTURE(message);
    CHECK_THAT(refusal(made(options)), Contains(message));
  }
  // Block by block, masters of 8 bits are none of the end-to-end phase's.
  CHECK(
      refusal(made({{"stages", "w8a16,w2a16"}, {"e2e-stages", "w2a16:1"}, {"e2e-freeze", "flips"}}))
          .empty());
  // Ratios by depth: from half of the mean to one and a half, or from the first to the last.
  models::LlamaConfig deep = tiny_config();
  deep.layers = 5;
  const auto counts = [&](const char* ratio) {
    std::vector<int64_t> split;
    const TrainConfig config = made({{"stages", "w2a16"}, {"ocs-ratio", ratio}});
    for (int64_t layer = 0; layer < deep.layers; ++layer)
      split.push_back(Recipe::split_count(config, deep, layer, 100));
    return split;
  };
  CHECK(counts("0.1") == std::vector<int64_t>{5, 8, 10, 13, 15});  // ceil of 5, 7.5, 10, 12.5, 15
  CHECK(counts("0.2,0.4") == std::vector<int64_t>{20, 25, 30, 35, 40});
  deep.layers = 1;
  CHECK(counts("0.1") == std::vector<int64_t>{10});
}

}  // namespace bbb::tests
