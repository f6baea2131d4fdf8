// Recomputation: the predicted memory of every mode against what a run then uses, and the mode that
// a budget selects.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cstring>
#include <filesystem>
#include <set>

#include "tests/support.h"
#include "tests/tiny_model.h"
#include "tests/tiny_run.h"
#include "train/allocation.h"
#include "train/end_to_end.h"
#include "train/memory_plan.h"
#include "train/statistics.h"
#include "train/teacher.h"

namespace bbb::tests {
namespace {

using Catch::Matchers::Contains;
using models::Recompute;

constexpr Recompute kModes[] = {Recompute::None, Recompute::Attention, Recompute::Block};

// A model and windows large enough that activations need as much memory as parameters.
struct WideRun {
  models::LlamaConfig model;
  TempDir dir;
  std::unique_ptr<models::Checkpoint> source;
  data::Windows windows;
  train::TrainConfig config;

  WideRun() {
    model = tiny_config();
    model.vocab = 320;
    model.d_model = 192;
    model.hidden = 512;
    model.heads = 3;
    model.kv_heads = 1;
    model.layers = 3;
    model.max_position = 128;
    std::filesystem::create_directory(dir / "model");
    write_tiny_model(dir / "model", model, 7);
    source = models::open_checkpoint(dir / "model");
    windows.count = 12;
    windows.seq_len = 128;
    windows.ids = random_tokens(11, windows.count * windows.seq_len, model.vocab);
    config.model = dir / "model";
    config.data = "tokens";
    config.samples = 8;
    config.val_samples = 4;
    config.seq_len = 128;
    config.batch = 8;
    config.epochs = 1;
    config.threads = 1;
    config.e2e_batch = 8;
    config.e2e_micro_batch = 8;
  }

  train::TrainConfig resolved() const { return train::resolve(config, model, backend().device()); }
  train::BlockMemory plan_blocks() const {
    return train::plan_block_memory(backend(), model, resolved());
  }

  // Runs the training and returns the peak bytes of tensors.
  int64_t measured_bytes(const std::string& out) {
    config.out = dir / out;
    backend().reset_memory_peak();
    const int64_t before = backend().memory_peak_bytes();
    train::Observer quiet;
    quiet.quiet = true;
    train::train_windows(backend(), *source, windows, config, quiet);
    return backend().memory_peak_bytes() - before;
  }
};

// The prediction is never below the measured bytes, and at most 2 % above.
void check_prediction(int64_t predicted_bytes, int64_t measured_bytes) {
  CAPTURE(predicted_bytes, measured_bytes);
  CHECK(predicted_bytes >= measured_bytes);
  CHECK(static_cast<double>(predicted_bytes) <= 1.02 * static_cast<double>(measured_bytes));
}

// Bytes of a run's tensor file without the header and the run's own two tensors.
int64_t result_bytes_of(const std::string& file) {
  uint64_t header_bytes;
  std::memcpy(&header_bytes, file.data(), sizeof header_bytes);
  constexpr size_t kOwn = 2 * sizeof(uint64_t);  // "run" and "checksum"
  return static_cast<int64_t>(file.size() - sizeof header_bytes - header_bytes - kOwn);
}

}  // namespace

TEST_CASE("recompute: the block phase uses the predicted memory, and gives the same bytes",
          "[train][recompute]") {
  WideRun run;
  std::map<std::string, std::string> expected;
  for (const char* stages : {"w2a16", "w4a16,w2a16"}) {
    run.config.stages = train::parse_stages(stages);
    for (const Recompute recompute : kModes) {
      CAPTURE(stages, models::to_string(recompute));
      run.config.memory.recompute = recompute;
      const train::BlockMemory memory = run.plan_blocks();
      CHECK(memory.recompute == recompute);
      const std::string out = cat(stages, models::to_string(recompute));
      check_prediction(memory.device_bytes, run.measured_bytes(out));
      const auto files = results(run.config.out);
      if (recompute == Recompute::None) expected = files;
      CHECK(files == expected);
      int64_t bytes = 0;
      for (const auto& [name, content] : files)
        if (name.ends_with(".safetensors")) bytes += result_bytes_of(content);
      CHECK(train::result_bytes(run.model, run.resolved()) == bytes);
      for (const train::Json& line : log_lines(run.config.out, "block"))
        CHECK(line["recompute"] == models::to_string(recompute));
    }
  }
}

TEST_CASE("recompute: the end-to-end phase uses the predicted memory, and gives the same bytes",
          "[train][recompute]") {
  WideRun run;
  run.config.stages.clear();
  run.config.e2e_steps = 2;
  for (const char* loss : {"kl", "ce"})
    for (const auto& [what, embedding] :
         {std::pair{"all", "keep"}, {"scales", "keep"}, {"all", "train"}}) {
      set_option(run.config, "e2e-loss", loss);
      set_option(run.config, "e2e-train", what);
      set_option(run.config, "e2e-embedding", embedding);
      std::map<std::string, std::string> expected;
      for (const auto& [recompute, teacher] : {std::pair{Recompute::None, "beside"},
                                               {Recompute::None, "cached"},
                                               {Recompute::Attention, "cached"},
                                               {Recompute::Block, "beside"},
                                               {Recompute::Block, "cached"}}) {
        CAPTURE(loss, what, embedding, models::to_string(recompute), teacher);
        run.config.memory.recompute = recompute;
        set_option(run.config, "teacher", teacher);
        const train::PhaseMemory memory =
            train::plan_end_to_end_memory(backend(), run.model, run.resolved());
        const std::string out = cat(loss, what, embedding, models::to_string(recompute), teacher);
        check_prediction(memory.device_bytes, run.measured_bytes(out));
        const auto files = results(run.config.out);
        if (expected.empty()) expected = files;
        CHECK(files == expected);
        CHECK(train::result_bytes(run.model, run.resolved()) ==
              result_bytes_of(files.at("e2e/final.safetensors")));
      }
    }
}

TEST_CASE("recompute: channel orders, searched ranges and quantized activations are counted, too",
          "[train][recompute]") {
  WideRun run;
  for (const auto& [option, text] :
       std::initializer_list<std::pair<const char*, const char*>>{{"range", "search"},
                                                                  {"rotate", "group"},
                                                                  {"act-outliers", "32"},
                                                                  {"act-range", "search"}})
    set_option(run.config, option, text);
  const auto statistics = [&] {
    return train::count_statistics_memory(backend(), run.model, run.resolved());
  };
  for (const char* ratio : {"0.25", "0.4,0.1"})
    for (const bool blocks : {true, false}) {
      set_option(run.config, "ocs-ratio", ratio);
      std::map<std::string, std::string> expected;
      run.config.stages = train::parse_stages(blocks ? "w4a16,w2a2" : "");
      run.config.e2e_steps = blocks ? 0 : train::TrainConfig::kAutoSteps;
      if (!blocks) set_option(run.config, "e2e-stages", "w2a16:1,w2a2:1");
      for (const Recompute recompute : kModes) {
        if (recompute != Recompute::None && ratio[3] == ',') continue;
        CAPTURE(ratio, blocks, models::to_string(recompute), statistics());
        run.config.memory.recompute = recompute;
        const int64_t predicted =
            blocks
                ? run.plan_blocks().device_bytes
                : train::plan_end_to_end_memory(backend(), run.model, run.resolved()).device_bytes;
        const int64_t measured =
            run.measured_bytes(cat(ratio, blocks, models::to_string(recompute)));
        check_prediction(std::max(predicted, statistics()), measured);
        const auto files = results(run.config.out);
        if (recompute == Recompute::None) expected = files;
        CHECK((files == expected));
        int64_t bytes = 0;
        for (const auto& [name, content] : files)
          if (name.ends_with(".safetensors") && name != "statistics.safetensors")
            bytes += result_bytes_of(content);
        CHECK(train::result_bytes(run.model, run.resolved()) == bytes);
      }
    }
}

TEST_CASE("recompute: latents behind LC, their scales and their start are counted, too",
          "[train][recompute][lc]") {
  WideRun run;
  set_option(run.config, "quantizer", "lc");
  for (const char* map : {"orthonormal", "learned"})
    for (const bool blocks : {true, false}) {
      set_option(run.config, "lc-map", map);
      run.config.stages = train::parse_stages(blocks ? "w2a16" : "");
      run.config.e2e_steps = blocks ? 0 : 2;
      std::map<std::string, std::string> expected;
      for (const Recompute recompute : kModes) {
        CAPTURE(map, blocks, models::to_string(recompute));
        run.config.memory.recompute = recompute;
        const int64_t predicted =
            blocks
                ? run.plan_blocks().device_bytes
                : train::plan_end_to_end_memory(backend(), run.model, run.resolved()).device_bytes;
        const int64_t start = train::count_statistics_memory(backend(), run.model, run.resolved());
        check_prediction(std::max(predicted, start),
                         run.measured_bytes(cat(map, blocks, models::to_string(recompute))));
        const auto files = results(run.config.out);
        if (recompute == Recompute::None) expected = files;
        CHECK((files == expected));
      }
    }
}

TEST_CASE("recompute: several precisions at once use the predicted memory, and give the same bytes",
          "[train][recompute]") {
  WideRun run;
  set_option(run.config, "any-precision", "8,4,2");
  set_option(run.config, "ocs-ratio", "0.2");
  for (const bool blocks : {true, false}) {
    std::map<std::string, std::string> expected;
    run.config.stages = train::parse_stages(blocks ? "w8a16" : "");
    run.config.e2e_steps = blocks ? 0 : 2;
    set_option(run.config, "e2e-embedding", "train");
    for (const Recompute recompute : kModes) {
      CAPTURE(blocks, models::to_string(recompute));
      run.config.memory.recompute = recompute;
      const int64_t predicted =
          blocks ? run.plan_blocks().device_bytes
                 : train::plan_end_to_end_memory(backend(), run.model, run.resolved()).device_bytes;
      check_prediction(predicted, run.measured_bytes(cat(blocks, models::to_string(recompute))));
      const auto files = results(run.config.out);
      if (recompute == Recompute::None) expected = files;
      CHECK((files == expected));
    }
  }
}

TEST_CASE("recompute: what single options of either phase keep is counted, too",
          "[train][recompute]") {
  using Options = std::vector<std::pair<const char*, const char*>>;
  const std::pair<bool, Options> cases[] = {
      {true, {{"target", "follow"}}},
      {true, {{"input-stream", "higher"}}},
      {true, {{"input-stream", "mix"}}},
      {true, {{"method", "block-ap"}, {"stages", "w2a16"}}},
      {true, {{"grid-train", "scales"}, {"stages", "w2a16"}}},
      {false, {{"grid-train", "scales-zeros"}}},
      {true, {{"lora-rank", "2"}, {"lora-match", "both"}}},
      {false, {{"lora-rank", "2"}, {"e2e-stages", "w4a16:1,w2a16:1"}}},
      {true, {{"pack", "documents"}}},
      {false, {{"pack", "documents"}}},
      {false, {{"e2e-average", "0.9"}}},
      {false, {{"e2e-damping", "1e-4"}, {"e2e-freeze", "flips"}}},
      {false, {{"e2e-loss", "jsd"}}},
      {false, {{"stages", "w4a16,w2a4"}, {"block-schedule", "stochastic"}}}};
  for (const auto& [blocks, options] : cases) {
    WideRun run;
    run.config.stages = train::parse_stages(blocks ? "w4a16,w2a16" : "");
    run.config.e2e_steps = blocks ? 0 : 2;
    for (const auto& [option, text] : options) set_option(run.config, option, text);
    if (run.config.pack == train::Packing::Documents) {
      run.windows.first_key.assign(run.windows.ids.size(), 0);
      run.windows.counted.assign(run.windows.ids.size(), 1);
      run.windows.counted[1] = 0;
    }
    CAPTURE(options[0].first, options[0].second);
    const int64_t predicted =
        blocks ? run.plan_blocks().device_bytes
               : train::plan_end_to_end_memory(backend(), run.model, run.resolved()).device_bytes;
    check_prediction(predicted, run.measured_bytes("out"));
  }
}

TEST_CASE("recompute: GPTQ uses the predicted memory, wherever its stream is",
          "[train][recompute]") {
  WideRun run;
  run.windows.count = 40;
  run.windows.ids = random_tokens(11, run.windows.count * run.windows.seq_len, run.model.vocab);
  run.config.samples = 40;
  run.config.batch = 2;  // a stream is larger than the batches in use
  run.config.method = train::Method::Gptq;
  run.config.stages = train::parse_stages("w2a16");
  set_option(run.config, "rotate", "group");
  std::map<std::string, std::string> expected;
  for (const bool on_device : {true, false}) {
    CAPTURE(on_device);
    if (!on_device)
      run.config.memory.device_bytes =
          train::allocated_bytes(backend(), run.plan_blocks().device_bytes - 1);
    const train::BlockMemory plan = run.plan_blocks();
    CHECK(plan.streams.uses(train::Tier::Device) == on_device);
    check_prediction(plan.device_bytes, run.measured_bytes(cat("out", on_device)));
    const auto files = results(run.config.out);
    if (on_device) expected = files;
    CHECK((files == expected));
    int64_t bytes = 0;
    for (const auto& [name, content] : files)
      if (name.ends_with(".safetensors")) bytes += result_bytes_of(content);
    CHECK(train::result_bytes(run.model, run.resolved()) == bytes);
  }
}

TEST_CASE("recompute: the statistics of input sites use the predicted memory",
          "[train][recompute]") {
  WideRun run;
  for (const auto& [side, ratio] : {std::pair{"weight", "0.25"},
                                    {"auto", "0.25"},
                                    {"weight", "0.4,0.1"},
                                    {"auto", "0.4,0.1"}}) {
    CAPTURE(side, ratio);
    set_option(run.config, "ocs-ratio", ratio);
    set_option(run.config, "split-side", side);
    run.config.stages = train::parse_stages("w2a4");
    const train::TrainConfig config = run.resolved();
    backend().reset_memory_peak();
    const int64_t before = backend().memory_peak_bytes();
    train::collect_statistics(backend(), *run.source, run.windows, config, [](int64_t) {});
    check_prediction(train::count_statistics_memory(backend(), run.model, config),
                     backend().memory_peak_bytes() - before);
  }
}

TEST_CASE("recompute: the choice of bits and splits uses the predicted memory",
          "[train][recompute]") {
  WideRun run;
  set_option(run.config, "target-bits", "3");
  run.config.e2e_steps = 1;
  for (const int64_t batch : {1, 8}) {
    CAPTURE(batch);
    run.config.batch = batch;
    const train::TrainConfig config = run.resolved();
    const train::SiteBudget budget = train::size_budget(run.model, config);
    backend().reset_memory_peak();
    const int64_t before = backend().memory_peak_bytes();
    train::allocate_sites(backend(), *run.source, run.windows, config, budget, [](int64_t) {});
    check_prediction(train::count_statistics_memory(backend(), run.model, config),
                     backend().memory_peak_bytes() - before);
  }
}

TEST_CASE("recompute: micro-batches that add gradients use the predicted memory",
          "[train][recompute]") {
  WideRun run;
  run.config.stages.clear();
  run.config.e2e_steps = 2;
  run.config.e2e_micro_batch = 4;
  for (const char* what : {"all", "scales"})
    for (const char* embedding : {"keep", "train"}) {
      CAPTURE(what, embedding);
      set_option(run.config, "e2e-train", what);
      set_option(run.config, "e2e-embedding", embedding);
      const train::PhaseMemory memory =
          train::plan_end_to_end_memory(backend(), run.model, run.resolved());
      check_prediction(memory.device_bytes, run.measured_bytes(cat(what, embedding)));
    }
}

TEST_CASE("recompute: a vocabulary in chunks uses the predicted memory and repeats its bytes",
          "[train][recompute]") {
  WideRun run;
  run.model.vocab = 300032;
  run.model.d_model = 32;
  run.model.hidden = 96;
  run.model.layers = 1;
  run.model.tied_head = true;
  std::filesystem::create_directory(run.dir / "vocabulary");
  write_tiny_model(run.dir / "vocabulary", run.model, 7);
  run.source = models::open_checkpoint(run.dir / "vocabulary");
  run.config.model = run.dir / "vocabulary";
  run.config.stages.clear();
  run.config.e2e_steps = 1;
  run.config.e2e_batch = run.config.e2e_micro_batch = on_cuda() ? 8 : 1;
  run.config.gemm_algorithms = train::GemmAlgorithms::Heuristic;  // the head's products take long
  const int64_t tokens = run.config.e2e_micro_batch * run.config.seq_len;
  const autograd::HeadChunks chunks =
      models::head_chunks(models::head_budget(backend()), tokens, run.model.vocab, backend().act());
  CHECK(chunks.vocab < run.model.vocab);
  for (const auto& [loss, embedding] :
       {std::pair{"kl", "keep"}, {"kl", "train"}, {"ce", "keep"}, {"jsd", "train"}}) {
    CAPTURE(loss, embedding);
    set_option(run.config, "e2e-loss", loss);
    set_option(run.config, "e2e-embedding", embedding);
    const train::PhaseMemory memory =
        train::plan_end_to_end_memory(backend(), run.model, run.resolved());
    check_prediction(memory.device_bytes, run.measured_bytes(cat(loss, embedding, "1")));
    const auto files = results(run.config.out);
    run.measured_bytes(cat(loss, embedding, "2"));
    CHECK(results(run.config.out) == files);
    for (const train::Json& line : log_lines(run.config.out, "e2e"))
      CHECK(std::isfinite(line["loss"].get<double>()));
  }
}

TEST_CASE("recompute: a small budget selects recomputation, one too small for any mode is refused",
          "[train][recompute]") {
  WideRun run;
  run.config.stages = train::parse_stages("w2a16");
  run.config.e2e_steps = 1;
  const auto end_to_end = [&] {
    return train::plan_end_to_end_memory(backend(), run.model, run.resolved());
  };
  CHECK(run.plan_blocks().recompute == Recompute::None);
  CHECK(end_to_end().recompute == Recompute::None);

  const auto bytes_of = [&](Recompute mode) {
    return train::count_end_to_end_memory(backend(), run.model, run.resolved(), mode,
                                          train::TeacherStates::Beside)
        .device_bytes;
  };
  CHECK(bytes_of(Recompute::None) > bytes_of(Recompute::Attention));
  CHECK(bytes_of(Recompute::Attention) > bytes_of(Recompute::Block));
  for (const Recompute mode : kModes) {
    run.config.memory.device_bytes = train::allocated_bytes(backend(), bytes_of(mode));
    CHECK(end_to_end().recompute == mode);
  }
  --run.config.memory.device_bytes;
  CHECK_THROWS_WITH(end_to_end(), Contains("raise --gpu-memory") && Contains("--e2e-steps 0"));

  // Blocks: streams move to host memory first; then the attention half is recomputed.
  run.config.memory.device_bytes = 0;
  run.config.memory.recompute = Recompute::Attention;
  const train::BlockMemory attention = run.plan_blocks();
  run.config.memory.recompute.reset();
  run.config.memory.device_bytes = train::allocated_bytes(backend(), attention.device_bytes);
  CHECK(run.plan_blocks().recompute != Recompute::None);
  run.config.memory.device_bytes = 1 << 20;
  CHECK_THROWS_WITH(run.plan_blocks(), Contains("raise --gpu-memory"));
}

TEST_CASE("teacher: cached where windows come again and its states fit", "[train][recompute]") {
  WideRun run;
  run.config.stages.clear();
  run.config.e2e_stages = {{{2, 16}, 2}};
  run.config.e2e_steps = train::TrainConfig::kAutoSteps;
  const auto plan = [&] {
    return train::plan_end_to_end_memory(backend(), run.model, run.resolved());
  };
  const auto bytes_of = [&](train::TeacherStates teacher) {
    return train::count_end_to_end_memory(backend(), run.model, run.resolved(), Recompute::None,
                                          teacher)
        .device_bytes;
  };
  using train::TeacherStates;
  CHECK(plan().teacher == TeacherStates::Cached);
  CHECK(train::caches_teacher(run.resolved(), 2, TeacherStates::Cached));
  CHECK_FALSE(train::caches_teacher(run.resolved(), 1, TeacherStates::Cached));
  CHECK_FALSE(train::caches_teacher(run.resolved(), 2, TeacherStates::Beside));
  // Here the states of all windows take less than the weights that they replace.
  const int64_t cached = bytes_of(TeacherStates::Cached), beside = bytes_of(TeacherStates::Beside);
  CHECK(cached < beside);
  run.config.memory.device_bytes = train::allocated_bytes(backend(), cached);
  CHECK(plan().recompute == Recompute::None);
  set_option(run.config, "teacher", "beside");
  CHECK(plan().recompute != Recompute::None);
  // With many windows they take more.
  run.config.samples = 400;
  run.config.memory = {};
  CHECK(bytes_of(TeacherStates::Cached) > bytes_of(TeacherStates::Beside));
  run.config.memory.device_bytes =
      train::allocated_bytes(backend(), bytes_of(TeacherStates::Beside));
  CHECK(plan().teacher == TeacherStates::Beside);
  CHECK(plan().recompute == Recompute::None);
  set_option(run.config, "e2e-loss", "ce");
  CHECK_FALSE(train::caches_teacher(run.resolved(), 2, TeacherStates::Cached));
}

TEST_CASE("recompute: a plan never exceeds its budget, whatever streams the budget leaves",
          "[train][recompute]") {
  WideRun run;
  run.config.stages = train::parse_stages("w4a16,w2a16");
  run.config.samples = 120;  // a stream is larger than the batches in use
  run.config.memory.recompute = Recompute::None;
  const auto on_device = [](const train::BlockMemory& memory) {
    return std::count(memory.streams.tiers.begin(), memory.streams.tiers.end(),
                      train::Tier::Device);
  };
  const train::BlockMemory resident = run.plan_blocks();
  const int64_t streams = on_device(resident);
  CHECK(streams == 3);
  const int64_t stream_bytes = 124 * 128 * run.model.d_model * engine::size_bytes(backend().act());
  // One byte less than a plan of k streams, and a little more: the batch that a step gathers
  // counts.
  std::set<int64_t> seen;
  for (int64_t less = 1; less < (streams - 1) * stream_bytes; less += stream_bytes / 7) {
    CAPTURE(less);
    const int64_t room = resident.device_bytes - less;
    run.config.memory.device_bytes = train::allocated_bytes(backend(), room);
    const train::BlockMemory memory = run.plan_blocks();
    CHECK(memory.device_bytes <= room);
    CHECK(on_device(memory) < streams);
    seen.insert(on_device(memory));
  }
  CHECK(seen.size() > 1);
}

TEST_CASE("recompute: an unknown mode is refused", "[recompute]") {
  CHECK_FALSE(train::parse_recompute("auto"));
  for (const Recompute mode : kModes)
    CHECK(train::parse_recompute(models::to_string(mode)) == mode);
  CHECK_THROWS_AS(train::parse_recompute("all"), UsageError);
}

}  // namespace bbb::tests
