// Training runs of a random two-layer Llama: they learn, they repeat byte for byte, and a killed
// run ends like an uninterrupted one.
#include "train/train.h"

#include <catch2/catch.hpp>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <limits>
#include <map>

#include "data/checksum.h"
#include "data/files.h"
#include "models/synthetic_checkpoint.h"
#include "tests/support.h"
#include "tests/tiny_run.h"
#include "tests/trained_model.h"
#include "train/memory_plan.h"
#include "train/run_directory.h"
#include "train/saved_state.h"

namespace bbb::tests {
namespace {

namespace fs = std::filesystem;
using Catch::Matchers::Contains;
using models::ExportFormat;
using train::Json;
using train::TrainConfig;

constexpr int64_t kSeqLen = Fixture::kSeqLen;
const int32_t kPoisoned = Fixture::kPoisoned;

}  // namespace

TEST_CASE("every stage of every block lowers its validation loss, with every input stream",
          "[train]") {
  const Fixture fixture;
  for (const char* stream : {"same", "higher", "mix"}) {
    TrainConfig config = fixture.config;
    config.out = fixture.dir / stream;
    config.stages = train::parse_stages("w4a16,w2a16");
    config.lr = {1e-3, 3e-3};
    set_option(config, "input-stream", stream);
    config.epochs = 3;
    fixture.run(config);

    std::map<std::string, std::pair<double, double>> first_and_best;
    for (const Json& line : log_lines(config.out, "validation")) {
      const std::string key = line["block"].dump() + line["stage"].get<std::string>();
      const double loss = line["loss"];
      if (line["epoch"] == 0)
        first_and_best[key] = {loss, std::numeric_limits<double>::infinity()};
      else
        first_and_best[key].second = std::min(first_and_best[key].second, loss);
    }
    REQUIRE(first_and_best.size() == 4);
    for (const auto& [key, losses] : first_and_best) {
      INFO(stream << " block and stage " << key);
      CHECK(losses.second < losses.first);
    }
    CHECK(log_lines(config.out, "block").size() == 2 * 2 * 3 * 4);
    CHECK(fs::exists(config.out + "/blocks/block_001_stage_1.safetensors"));
  }
}

TEST_CASE("end-to-end training from round to nearest lowers the loss", "[train]") {
  const Fixture fixture;
  for (const char* loss : {"kl", "ce", "jsd"})
    for (const char* what : {"all", "scales"}) {
      TrainConfig config = fixture.config;
      config.out = fixture.dir / (std::string(loss) + what);
      set_option(config, "e2e-loss", loss);
      set_option(config, "e2e-train", what);
      config.e2e_steps = 40;
      config.e2e_lr = {3e-3};
      fixture.run(config);

      const std::vector<Json> lines = log_lines(config.out, "e2e");
      REQUIRE(lines.size() == 40);
      double first = 0, last = 0;  // sums over one epoch each: the same windows
      for (size_t i = 0; i < 4; ++i) {
        first += lines[i]["loss"].get<double>();
        last += lines[36 + i]["loss"].get<double>();
      }
      INFO(loss << " " << what << ": " << first / 4 << " -> " << last / 4);
      CHECK(last < 0.97 * first);
      CHECK(fs::exists(config.out + "/e2e/final.safetensors"));
      CHECK_FALSE(fs::exists(config.out + "/e2e/state.safetensors"));
    }
}

TEST_CASE("a run repeats byte for byte, and a killed one ends with the same bytes", "[train]") {
  const Fixture fixture;
  for (const char* stream : {"same", "mix"})
    for (const char* what : {"all", "scales"}) {
      const std::string name = std::string(stream) + what;
      TrainConfig config = fixture.both_phases(name);
      set_option(config, "input-stream", stream);
      set_option(config, "e2e-train", what);
      fixture.run(config);
      const auto expected = results(config.out);
      REQUIRE(expected.size() == 6);  // run.json, two stages of two blocks, the final file

      TrainConfig again = config;
      again.out = fixture.dir / (name + "_again");
      fixture.run(again);
      CHECK(results(again.out) == expected);

      // Killed after the first block, then after end-to-end steps 1 (nothing saved yet) and 3.
      TrainConfig killed = config;
      killed.out = fixture.dir / (name + "_killed");
      train::Observer observer;
      observer.after_block = [](int64_t block) {
        if (block == 0) throw Killed();
      };
      CHECK_THROWS_AS(fixture.run(killed, observer), Killed);
      CHECK(results(killed.out).size() == 3);
      for (int64_t last : {1, 3}) {
        train::Observer at_step;
        at_step.after_e2e_step = [last](int64_t step) {
          if (step == last) throw Killed();
        };
        CHECK_THROWS_AS(fixture.run(killed, at_step), Killed);
      }
      CHECK(fs::exists(killed.out + "/e2e/state.safetensors"));
      data::write_file_atomic(killed.out + "/e2e/state.safetensors.tmp-1-0", "half a state");
      fixture.run(killed);
      CHECK(results(killed.out) == expected);
      CHECK(log_lines(killed.out, "") == log_lines(config.out, ""));
    }
}

TEST_CASE("a run killed inside a block continues from its newest state", "[train]") {
  const Fixture fixture;
  constexpr int64_t kSteps = 8;  // of a stage: 2 epochs of 16 windows, 4 a step
  struct Kill {
    int64_t save_every, block, stage, step;  // killed after this step
    int64_t goes_on_stage, goes_on_step;     // continues with this step
  };
  const Kill kills[] = {
      {2, 0, 0, 1, 0, 1},  // nothing is saved yet
      {3, 0, 0, 5, 0, 4},  // in the middle of the first epoch
      {4, 0, 1, 4, 1, 1},  // an epoch's state waits for its validation
      {4, 0, 1, 5, 1, 5},
      {1, 1, 0, kSteps, 0, kSteps},      // the last step writes a result, not a state
      {kSteps + 1, 1, 1, kSteps, 1, 1},  // the stage before is finished
      {2, 1, 1, 7, 1, 7},
  };
  struct Case {
    const char* stream;
    double lr;  // of the last stage; 1: training gets worse, so the start stays the best
  };
  for (const Case& c : {Case{"same", 3e-3}, {"higher", 1}, {"mix", 1}}) {
    TrainConfig config = fixture.both_phases(std::string(c.stream));
    set_option(config, "input-stream", c.stream);
    config.lr = {1e-3, c.lr};
    fixture.run(config);
    const auto expected = results(config.out);

    TrainConfig killed = config;
    killed.out = config.out + "_killed";
    std::vector<int64_t> goes_on{0, 0, 1};
    for (const Kill& kill : kills) {
      INFO(c.stream << ": block " << kill.block << ", stage " << kill.stage << ", step "
                    << kill.step << ", saved every " << kill.save_every);
      killed.save_every = kill.save_every;
      std::vector<int64_t> first;
      train::Observer observer;
      observer.after_block_step = [&](int64_t block, int64_t stage, int64_t step) {
        if (first.empty()) first = {block, stage, step};
        if (block == kill.block && stage == kill.stage && step == kill.step) throw Killed();
      };
      CHECK_THROWS_AS(fixture.run(killed, observer), Killed);
      CHECK(first == goes_on);
      goes_on = {kill.block, kill.goes_on_stage, kill.goes_on_step};
    }
    fixture.run(killed);
    CHECK(results(killed.out) == expected);
    CHECK(log_lines(killed.out, "") == log_lines(config.out, ""));
  }
}

TEST_CASE("a state of another run or a damaged one is refused; an obsolete one is removed",
          "[train]") {
  const Fixture fixture;
  const auto kill_at = [&](const TrainConfig& config, int64_t at_block, int64_t at_step) {
    train::Observer observer;
    observer.after_block_step = [=](int64_t block, int64_t, int64_t step) {
      if (block == at_block && step == at_step) throw Killed();
    };
    CHECK_THROWS_AS(fixture.run(config, observer), Killed);
  };
  const TrainConfig config = fixture.both_phases("run");
  TrainConfig other = fixture.both_phases("other");
  other.seed = 1;
  const std::string state = "/blocks/state.safetensors";
  kill_at(other, 0, 3);
  kill_at(config, 0, 3);
  const std::string early = data::read_file(config.out + state);

  data::write_file_atomic(config.out + state, data::read_file(other.out + state));
  CHECK_THROWS_WITH(fixture.run(config), Contains("state.safetensors: is of another run"));
  data::write_file_atomic(config.out + state, early.substr(0, early.size() / 2));
  CHECK_THROWS_WITH(fixture.run(config), Contains("state.safetensors"));
  data::write_file_atomic(config.out + state, early);

  // A result is missing: training does not continue without it.
  kill_at(config, 1, 3);
  const std::string lost = config.out + "/blocks/block_000_stage_1.safetensors";
  fs::rename(lost, fixture.dir / "lost");
  CHECK_THROWS_WITH(fixture.run(config), Contains("block_000_stage_1.safetensors is missing"));
  fs::rename(fixture.dir / "lost", lost);

  // Killed between a stage's file and the removal of its state.
  data::write_file_atomic(config.out + state, early);
  fixture.run(config);
  const auto expected = results(config.out);
  CHECK(expected.size() == 6);
  data::write_file_atomic(config.out + state, early);
  data::write_file_atomic(config.out + "/e2e/state.safetensors", early);
  fixture.run(config);
  CHECK(results(config.out) == expected);
}

TEST_CASE("a state holds tensors of both dtypes, and loads only into equal dtypes and sizes",
          "[train]") {
  const TempDir dir;
  const std::string path = dir / "state.safetensors";
  Backend& b = backend();
  engine::Rng rng(31);
  const std::vector<double> values = round_bf16(normal(rng, 96));
  const Tensor wide = make(b, {96}, DType::F32, values),
               narrow = make(b, {96}, DType::BF16, values);
  train::save_state(path, 7, {}, b, {{"v", wide}, {"m", narrow}});
  const train::SavedState saved(path, 7);
  const Tensor v = b.zeros({96}, DType::F32), m = b.zeros({96}, DType::BF16);
  saved.load(b, {{"v", v}, {"m", m}});
  CHECK(bytes_of(b, v) == bytes_of(b, wide));
  CHECK(bytes_of(b, m) == bytes_of(b, narrow));
  CHECK_THROWS_WITH(saved.load(b, {{"m", v}}),
                    path + ": m is a BF16, but must be F32; delete it to go on without it");
  CHECK_THROWS_WITH(saved.load(b, {{"v", m}}), Contains("v is a F32, but must be BF16"));
  CHECK_THROWS_WITH(saved.load(b, {{"v", b.zeros({95}, DType::F32)}}),
                    path + ": v is of another model");
}

TEST_CASE("one process at a time trains in a directory; others may read it", "[train]") {
  const Fixture fixture;
  const TrainConfig config = fixture.both_phases("run");
  train::Observer observer;
  observer.after_block = [&](int64_t) {
    CHECK_THROWS_WITH(fixture.run(config),
                      Contains("run/lock: another process is training in this directory"));
    throw Killed();
  };
  CHECK_THROWS_AS(fixture.run(config, observer), Killed);
  fixture.run(config);

  train::RunDirectory run(config.out);
  run.lock();
  train::export_run(backend(), *fixture.source, FileTokenizer(), config.out, config.out + "_out",
                    ExportFormat::Packed);
  CHECK(fs::exists(config.out + "_out"));
}

TEST_CASE("states are saved every N steps, or by the clock in at most a twentieth of the time",
          "[train]") {
  using namespace std::chrono_literals;
  train::SaveTimer steps(3);
  CHECK(steps.due(3));
  CHECK_FALSE(steps.due(4));

  train::SaveTimer clock(0);
  const train::SaveTimer::Clock::time_point start{};
  clock.restart(start);
  CHECK_FALSE(clock.due(7, start + 29s));
  CHECK(clock.due(7, start + 30s));
  clock.saved(start + 30s, start + 31s);  // saving took 1 s: the next is due 30 s later
  CHECK_FALSE(clock.due(8, start + 60s));
  CHECK(clock.due(8, start + 61s));
  clock.saved(start + 70s, start + 75s);
  CHECK_FALSE(clock.due(9, start + 174s));
  CHECK(clock.due(9, start + 175s));
}

TEST_CASE("another seed trains other weights", "[train]") {
  const Fixture fixture;
  TrainConfig config = fixture.both_phases("first");
  TrainConfig other = fixture.both_phases("other");
  other.seed = 1;
  fixture.run(config);
  fixture.run(other);
  CHECK(results(config.out).at("blocks/block_000_stage_1.safetensors") !=
        results(other.out).at("blocks/block_000_stage_1.safetensors"));
}

TEST_CASE("a finished run is left as it is", "[train]") {
  const Fixture fixture;
  const TrainConfig config = fixture.both_phases("run");
  fixture.run(config);
  const auto before = results(config.out);
  train::Observer observer;
  observer.after_block = [](int64_t) { FAIL("trained again"); };
  observer.after_e2e_step = [](int64_t) { FAIL("trained again"); };
  const std::string lock = train::RunDirectory(config.out).lock_file();
  fs::remove(lock);
  fixture.run(config, observer);
  CHECK(results(config.out) == before);
  CHECK_FALSE(fs::exists(lock));  // a finished run may be in a read-only directory
  TrainConfig other = config;
  other.seed = 1;
  CHECK_THROWS_WITH(fixture.run(other, observer), Contains("holds a run with another config"));
  // A kill left a state next to the result: the run takes the lock and removes the state.
  data::write_file_atomic(train::RunDirectory(config.out).e2e_state_file(), "spent");
  fixture.run(config, observer);
  CHECK(results(config.out) == before);
  CHECK(fs::exists(lock));
}

TEST_CASE("steps that are not finite are skipped and counted", "[train]") {
  Fixture fixture;
  fixture.poison_last_token();
  fixture.windows.ids[3 * kSeqLen + 5] = kPoisoned;  // in one training window
  TrainConfig config = fixture.both_phases("run");
  config.e2e_steps = 0;  // a tied head would make every window's logits NaN
  fixture.run(config);
  const std::vector<Json> lines = log_lines(config.out, "block");
  int64_t skipped = 0;
  for (const Json& line : lines) skipped += line["skipped"].get<bool>() ? 1 : 0;
  CHECK(skipped == 2 * 2 * 2);  // once an epoch of every stage of every block
  for (const Json& line : log_lines(config.out, "validation")) CHECK(line["loss"].is_number());
}

TEST_CASE("a run that skips every step fails and says so", "[train]") {
  Fixture fixture;
  fixture.poison_last_token();
  for (int64_t i = 0; i < fixture.windows.count; ++i) fixture.windows.ids[i * kSeqLen] = kPoisoned;
  CHECK_THROWS_WITH(fixture.run(fixture.both_phases("run")), Contains("every step was skipped"));
}

TEST_CASE("snapping starts from the model that block training produced", "[train]") {
  const Fixture fixture;
  for (const char* range : {"minmax", "search"}) {
    CAPTURE(range);
    TrainConfig blocks = fixture.both_phases(cat("blocks_", range));
    blocks.e2e_steps = 0;
    TrainConfig snapped = fixture.both_phases(cat("snapped_", range));
    snapped.e2e_snap = train::Snap::On;
    snapped.e2e_steps = 1;
    snapped.e2e_lr = {1e-30};  // moves nothing
    std::vector<std::string> weights;
    for (TrainConfig config : {blocks, snapped}) {
      set_option(config, "range", range);
      fixture.run(config);
      train::export_run(backend(), *fixture.source, FileTokenizer(), config.out,
                        config.out + "_out", ExportFormat::Packed);
      weights.push_back(data::read_file(config.out + "_out/bbb.safetensors"));
    }
    CHECK((weights[0] == weights[1]));
  }
}

TEST_CASE("a finished run exports to a checkpoint of the trained model", "[train]") {
  const Fixture fixture;
  for (const char* what : {"all", "scales"}) {
    TrainConfig config = fixture.both_phases(what);
    set_option(config, "e2e-train", what);
    fixture.run(config);
    const std::string packed = config.out + "_packed", plain = config.out + "_plain";
    const double bits = train::export_run(backend(), *fixture.source, FileTokenizer(), config.out,
                                          packed, ExportFormat::Packed)
                            .bits_per_weight;
    train::export_run(backend(), *fixture.source, FileTokenizer(), config.out, plain,
                      ExportFormat::HuggingFace);
    CHECK(bits == Approx(2.3125).margin(0.1));  // rows of zero points are padded to whole bytes

    const std::vector<int32_t> text(fixture.windows.ids.begin(),
                                    fixture.windows.ids.begin() + 16 * kSeqLen);
    double nll[2];
    for (int i : {0, 1}) {
      const auto checkpoint = models::open_checkpoint(i == 0 ? packed : plain);
      models::Llama model(backend(), *checkpoint, models::HeadRounding::BFloat16);
      model.load_blocks(*checkpoint);
      nll[i] = models::perplexity(model, text, 16, kSeqLen, [](int64_t) {}).nll;
    }
    // The plain file stores (q - z) e S rounded to bf16, which is exact at 2 bits.
    CHECK(nll[0] == Approx(nll[1]).epsilon(on_cuda() ? 2e-3 : 1e-5));
  }

  const std::string rounded = fixture.dir / "rounded";
  TrainConfig grid;
  grid.bits = 2;
  CHECK(train::export_rtn(backend(), *fixture.source, FileTokenizer(), grid, rounded,
                          ExportFormat::Packed)
            .bits_per_weight == Approx(2.3125).margin(0.1));
  CHECK(models::open_checkpoint(rounded)->kind() == models::CheckpointKind::Packed);
}

TEST_CASE("an unfinished run, or another model's, is not exported", "[train]") {
  const Fixture fixture;
  const TrainConfig config = fixture.both_phases("run");
  train::Observer observer;
  observer.after_block = [](int64_t) { throw Killed(); };
  CHECK_THROWS_AS(fixture.run(config, observer), Killed);
  const auto export_it = [&](const models::Checkpoint& source) {
    train::export_run(backend(), source, FileTokenizer(), config.out, config.out + "_out",
                      ExportFormat::Packed);
  };
  CHECK_THROWS_WITH(export_it(*fixture.source), Contains("not finished"));
  fixture.run(config);
  fs::create_directory(fixture.dir / "other");
  write_tiny_model(fixture.dir / "other", tiny_config(), 8);
  CHECK_THROWS_WITH(export_it(*models::open_checkpoint(fixture.dir / "other")),
                    Contains("is not the model"));
  CHECK_FALSE(fs::exists(config.out + "_out"));
}

TEST_CASE("a model that differs from the run's is refused, and the differing part is named",
          "[train]") {
  const Fixture fixture;
  const TrainConfig config = fixture.both_phases("run");
  const FileTokenizer tokenizer;
  const auto run_with = [&](const models::Checkpoint& source, const data::Tokenizer& made_by) {
    train::Observer quiet;
    quiet.quiet = true;
    train::train_windows(backend(), source, fixture.windows, config, quiet, &made_by);
  };
  const auto export_with = [&](const models::Checkpoint& source, const data::Tokenizer& made_by) {
    train::export_run(backend(), source, made_by, config.out, config.out + "_out",
                      ExportFormat::Packed);
  };
  run_with(*fixture.source, tokenizer);

  const std::string other = fixture.dir / "other", weights = other + "/model.safetensors";
  fs::copy(fixture.dir / "model", other);
  const auto check = [&](const std::string& part, const data::Tokenizer& made_by) {
    const auto source = models::open_checkpoint(other);
    CHECK_THROWS_WITH(run_with(*source, made_by),
                      Contains("holds a run of another model: " + part + " differs"));
    CHECK_THROWS_WITH(export_with(*source, made_by),
                      Contains(other + ": is not the model") && Contains(": " + part + " differs"));
  };
  const std::string bytes = data::read_file(weights);
  for (const models::TensorInfo& tensor : models::open_checkpoint(other)->list()) {
    std::string changed = bytes;
    const uint8_t* begin = reinterpret_cast<const uint8_t*>(bytes.data());
    const auto tensors =
        data::parse_safetensors(begin, static_cast<int64_t>(bytes.size()), weights);
    const int64_t at = tensors.at(tensor.name).data - begin + tensor.bytes / 8 * 4 + 2;
    changed[static_cast<size_t>(at)] ^= 1;
    data::write_file_atomic(weights, changed);
    check(tensor.name, tokenizer);
  }
  data::write_file_atomic(weights, bytes);

  models::LlamaConfig settings = tiny_config();
  settings.rms_eps *= 2;
  const std::string same_settings = data::read_file(other + "/config.json");
  data::write_file_atomic(other + "/config.json", models::config_to_json(settings));
  check("config.json", tokenizer);
  data::write_file_atomic(other + "/config.json", same_settings);

  data::write_file_atomic(other + "/generation_config.json", "{}");
  check("generation_config.json", tokenizer);
  fs::remove(other + "/generation_config.json");

  class OtherTokenizer final : public FileTokenizer {
    std::vector<std::pair<std::string, std::string>> export_files() const override {
      return {{"tokenizer.json", "{\"model\": {}}"}};
    }
  };
  check("tokenizer.json", OtherTokenizer());
  CHECK_FALSE(fs::exists(config.out + "_out"));
  export_with(*models::open_checkpoint(other), tokenizer);  // equal to the run's model again
}

TEST_CASE("a sharded model equals the single file, and another seed makes another model",
          "[train]") {
  const Fixture fixture;
  const std::string sharded = fixture.dir / "sharded";
  fs::create_directory(sharded);
  fs::copy(fixture.dir / "model/config.json", sharded + "/config.json");
  const data::SafeTensors whole(fixture.dir / "model");
  Json index;
  for (const auto& [name, tensor] : whole.tensors()) {
    const std::string file = name + ".safetensors";
    data::SafeTensorsWriter writer(sharded + "/" + file, {{name, tensor.dtype, tensor.shape}});
    writer.add(name, tensor.data, tensor.bytes);
    writer.finish();
    index["weight_map"][name] = file;
  }
  data::write_file_atomic(sharded + "/model.safetensors.index.json", index.dump());
  CHECK(train::model_parts(*models::open_checkpoint(sharded)) ==
        train::model_parts(*fixture.source));

  const auto made = [](uint64_t seed) {
    return train::model_parts(*models::make_synthetic_checkpoint(tiny_config(), "made", seed));
  };
  CHECK(made(1) == made(1));
  CHECK(made(1).at("model.embed_tokens.weight") != made(2).at("model.embed_tokens.weight"));
}

namespace {

// Copies of `bytes` with one bit flipped at evenly spaced bytes, both ends included, and one copy
// cut in half.
std::vector<std::string> damaged(const std::string& bytes) {
  std::vector<std::string> all;
  for (size_t i = 0; i < 8; ++i) {
    std::string one = bytes;
    one[(bytes.size() - 1) * i / 7] ^= 4;
    all.push_back(one);
  }
  all.push_back(bytes.substr(0, bytes.size() / 2));
  return all;
}

}  // namespace

TEST_CASE("export and resume name a damaged file, and deleting it repairs the run", "[train]") {
  const Fixture fixture;
  TrainConfig config = fixture.both_phases("run");
  fixture.run(config);
  TrainConfig blocks = fixture.both_phases("blocks");  // its export reads the stages
  blocks.e2e_steps = 0;
  fixture.run(blocks);
  const auto export_it = [&](const TrainConfig& c) {
    train::export_run(backend(), *fixture.source, FileTokenizer(), c.out, c.out + "_out",
                      ExportFormat::Packed);
  };
  const auto check = [&](const TrainConfig& c, const std::string& name, const std::string& advice,
                         const auto& read) {
    const std::string path = c.out + "/" + name, whole = data::read_file(path);
    for (const std::string& bytes : damaged(whole)) {
      data::write_file_atomic(path, bytes);
      CHECK_THROWS_WITH(read(c), Contains(path + ": damaged") && Contains(advice));
    }
    data::write_file_atomic(path, whole);
  };
  const std::string stage = "blocks/block_001_stage_1.safetensors", final = "e2e/final.safetensors";
  const auto expected = results(config.out);
  const auto run_it = [&](const TrainConfig& c) { fixture.run(c); };
  check(config, "run.json", "delete the run's directory", export_it);
  check(config, "run.json", "delete the run's directory", run_it);
  check(config, final, "delete it, and the run trains end to end again", export_it);
  check(blocks, stage, "delete it, and the run trains from there again", export_it);
  for (const auto& [c, name] : {std::pair{config, final}, {blocks, stage}}) {
    const auto whole = results(c.out);
    fs::remove(c.out + "/" + name);
    CHECK_THROWS_WITH(export_it(c), Contains("not finished"));
    fixture.run(c);
    CHECK(results(c.out) == whole);
  }
  // An undamaged stage of another run.
  TrainConfig other = blocks;
  other.out = fixture.dir / "other";
  other.seed = 1;
  fixture.run(other);
  data::write_file_atomic(blocks.out + "/" + stage, results(other.out).at(stage));
  CHECK_THROWS_WITH(export_it(blocks), Contains(stage + ": is of another run"));
  for (const TrainConfig& c : {config, blocks}) CHECK_FALSE(fs::exists(c.out + "_out"));

  // Files that a continued run reads.
  fs::remove_all(config.out);
  train::Observer observer;
  observer.after_block_step = [](int64_t block, int64_t, int64_t step) {
    if (block == 1 && step == 3) throw Killed();
  };
  CHECK_THROWS_AS(fixture.run(config, observer), Killed);
  check(config, "blocks/block_000_stage_0.safetensors", "delete it", run_it);
  check(config, "blocks/state.safetensors", "delete it to go on without it", run_it);
  fs::remove(config.out + "/blocks/block_000_stage_0.safetensors");
  CHECK_THROWS_WITH(fixture.run(config),
                    Contains("block_000_stage_0.safetensors is missing; delete the state"));
  fs::remove(config.out + "/blocks/state.safetensors");
  train::Observer end_to_end;
  end_to_end.after_e2e_step = [](int64_t step) {
    if (step == 3) throw Killed();
  };
  CHECK_THROWS_AS(fixture.run(config, end_to_end), Killed);
  check(config, "e2e/state.safetensors", "delete it to go on without it", run_it);
  fixture.run(config);
  CHECK(results(config.out) == expected);
}

TEST_CASE("a run without checksums is refused, with the reason", "[train]") {
  const Fixture fixture;
  const TrainConfig config = fixture.both_phases("run");
  fixture.run(config);
  Json record = Json::parse(data::read_file(config.out + "/run.json"));
  record.erase("checksum");
  data::write_file_atomic(config.out + "/run.json", record.dump(2) + "\n");
  CHECK_THROWS_WITH(fixture.run(config), Contains("an earlier bbb began this run"));
}

TEST_CASE("a run of another version of bbb is refused by training and by export", "[train]") {
  const Fixture fixture;
  const TrainConfig config = fixture.both_phases("run");
  fixture.run(config);
  Json record = Json::parse(data::read_file(config.out + "/run.json"));
  record["program"] = "bbb 0.0.1";
  record.erase("checksum");
  record["checksum"] = data::hex(data::checksum64(record.dump()));
  data::write_file_atomic(config.out + "/run.json", record.dump(2) + "\n");
  CHECK_THROWS_WITH(fixture.run(config), Contains("bbb 0.0.1"));
  CHECK_THROWS_WITH(train::export_run(backend(), *fixture.source, FileTokenizer(), config.out,
                                      config.out + "_out", ExportFormat::Packed),
                    Contains("holds a run of bbb 0.0.1"));
}

TEST_CASE("a directory with another run, or with something else, is refused", "[train]") {
  Fixture fixture;
  TrainConfig config = fixture.both_phases("run");
  fixture.run(config);
  const auto before = results(config.out);

  TrainConfig other = config;
  other.lr = {1e-3, 2e-3};
  CHECK_THROWS_WITH(fixture.run(other), Contains("another configuration: lr"));
  other = config;
  other.doc_end = 3;
  CHECK_THROWS_WITH(fixture.run(other), Contains("another configuration: doc_end"));
  fixture.windows.ids[0] ^= 1;
  CHECK_THROWS_WITH(fixture.run(config), Contains("another data_checksum"));
  CHECK(results(config.out) == before);

  fs::create_directory(fixture.dir / "foreign");
  data::write_file_atomic(fixture.dir / "foreign/letter.txt", "dear reader");
  // Killed right after its directory was created: the run simply begins.
  fs::create_directory(fixture.dir / "begun");
  fs::create_directory(fixture.dir / "begun/blocks");
  config.out = fixture.dir / "begun";
  fixture.run(config);

  config.out = fixture.dir / "foreign";
  CHECK_THROWS_WITH(fixture.run(config), Contains("holds no training run"));
  CHECK(results(config.out).size() == 1);
}

TEST_CASE("what cannot be trained is refused before anything is written", "[train]") {
  const Fixture fixture;
  const auto refused = [&](auto change, const char* message) {
    TrainConfig config = fixture.both_phases("run");
    change(config);
    CHECK_THROWS_WITH(fixture.run(config), Contains(message));
    CHECK_FALSE(fs::exists(config.out));
  };
  refused([](TrainConfig& c) { c.samples = 20; }, "24 windows of 32 tokens");
  refused([](TrainConfig& c) { c.stages = {{2, 5}}; }, "--stages: activations of 5 bits");
  refused([](TrainConfig& c) { c.stages = {{5, 16}}; }, "weights of 5 bits");
  refused(
      [](TrainConfig& c) {
        c.stages = {{16, 16}};
        c.lr = {1e-3};
      },
      "cannot have 16 bits");
  refused([](TrainConfig& c) { c.bits = 4; }, "the result has 4 bits");
  refused([](TrainConfig& c) { c.batch = 17; }, "--batch is 17");
  refused([](TrainConfig& c) { c.lr = {1e-3, 1e-3, 1e-3}; }, "3 values for 2 stages");
  refused([](TrainConfig& c) { c.e2e_micro_batch = 3; }, "does not divide --e2e-batch 4");
  refused(
      [](TrainConfig& c) {
        c.stages.clear();
        c.e2e_steps = 0;
      },
      "nothing to train");
  CHECK_THROWS_AS(train::parse_stages("w2a16,"), UsageError);
  CHECK_THROWS_AS(train::parse_stages("2"), UsageError);
  CHECK_THROWS_WITH(
      train::check_memory(backend(), int64_t{1} << 60, {}, "training", "lower --samples"),
      Contains("lower --samples"));
}

TEST_CASE("factors that the host cannot hold are refused", "[train][memory]") {
  models::LlamaConfig wide = tiny_config();
  wide.hidden = int64_t{1} << 20;  // 16 TiB for GPTQ, 12 for LC
  const auto check = [&](auto change) {
    TrainConfig config;
    config.seq_len = 64;
    config.stages = train::parse_stages("w2a16");
    change(config);
    train::check_factor_memory(wide, train::resolve(config, wide, engine::DeviceType::Cpu));
  };
  CHECK_THROWS_WITH(check([](TrainConfig& c) { c.method = train::Method::Gptq; }),
                    Contains("needs about 16777217 MiB of host memory"));
  CHECK_THROWS_WITH(check([](TrainConfig& c) { c.quantizer = train::Quantizer::Lc; }),
                    Contains("needs about 12582913 MiB of host memory"));
  check([](TrainConfig&) {});
}

TEST_CASE("learning rates follow the width, the stage and the start", "[train]") {
  models::LlamaConfig small = tiny_config(), large = tiny_config();
  small.d_model = 576;
  large.d_model = 4096;
  const auto resolved = [](const models::LlamaConfig& model, const char* stages, auto change) {
    TrainConfig config;
    config.seq_len = 64;
    config.stages = train::parse_stages(stages);
    config.e2e_steps = 1;
    change(config);
    return train::resolve(config, model, engine::DeviceType::Cpu);
  };
  const auto keep = [](TrainConfig&) {};
  small.hidden = large.hidden = 1536;
  CHECK(resolved(small, "w2a16", keep).lr == std::vector<double>{1e-3});
  const TrainConfig staged = resolved(small, "w8a16,w4a16,w2a16", keep);
  CHECK(staged.lr == std::vector<double>{1e-4, 1e-4, 1e-3});
  CHECK(staged.e2e_lr.at(0) == Approx(2e-3));
  CHECK(staged.e2e_snap == train::Snap::On);
  CHECK(resolved(small, "", keep).e2e_lr.at(0) == Approx(2e-3));
  CHECK(resolved(small, "", keep).e2e_snap == train::Snap::Off);
  const TrainConfig wide = resolved(large, "w8a16,w2a16", keep);
  CHECK(wide.lr[0] == Approx(1e-5));
  CHECK(wide.lr[1] == Approx(2e-5));
  // Between the two measured widths, a rate falls with the width.
  models::LlamaConfig middle = large;
  middle.d_model = 2048;
  CHECK(resolved(middle, "w2a16", keep).lr[0] < 1e-3);
  CHECK(resolved(middle, "w2a16", keep).lr[0] > 2e-5);
  // Only a high rate after block training needs snapping.
  CHECK(resolved(small, "w2a16", [](TrainConfig& c) { c.e2e_lr = {1e-5}; }).e2e_snap ==
        train::Snap::Off);
  CHECK(train::to_json(train::config_from_json(train::to_json(wide), "test")) ==
        train::to_json(wide));
}

}  // namespace bbb::tests
