// Defaults that shrink to short texts and to models of few positions.
#include "train/fit.h"

#include <catch2/catch.hpp>
#include <set>

#include "tests/support.h"

namespace bbb::tests {

using train::TrainConfig;

namespace {

TrainConfig asked(bool blocks) {
  TrainConfig config;
  if (blocks)
    config.stages = {train::Stage{}};
  else
    config.e2e_steps = TrainConfig::kAutoSteps;
  return config;
}

TrainConfig fitted(const TrainConfig& config, int64_t positions, int64_t tokens,
                   const std::set<std::string>& typed = {}) {
  return train::fit_to_data(
      config, [&](const char* option) { return typed.count(option) > 0; }, positions, tokens);
}

}  // namespace

TEST_CASE("fit: enough text and positions change nothing", "[fit]") {
  for (const bool blocks : {false, true}) {
    const TrainConfig config = asked(blocks);
    const int64_t tokens = 2048 * (1024 + 64);
    CHECK(train::describe_fit(config, fitted(config, 2048, tokens), 2048, tokens).empty());
  }
  // Without blocks the samples come first.
  CHECK(fitted(asked(false), 2048, 2048 * 1024).samples == 1024);
  CHECK(fitted(asked(false), 2048, 2048 * 1024).val_samples == 0);
  CHECK(fitted(asked(false), 2048, 2048 * 1030).val_samples == 6);
}

TEST_CASE("fit: whatever is not typed suits the text", "[fit]") {
  for (const bool blocks : {false, true})
    for (const int64_t tokens : {2, 3, 5, 8, 40, 171, 3000, 40000, 1000000})
      for (const int64_t positions : {4, 100, 2048})
        for (const std::set<std::string>& typed :
             {std::set<std::string>{}, {"samples"}, {"batch", "e2e-batch"}}) {
          CAPTURE(blocks, tokens, positions);
          TrainConfig config = asked(blocks);
          if (typed.count("samples")) config.samples = 3;
          if (typed.count("batch")) config.batch = config.e2e_batch = 1;
          const TrainConfig c = fitted(config, positions, tokens, typed);
          CHECK(c.seq_len <= positions);
          CHECK(c.seq_len >= 2);
          CHECK(c.samples >= 1);
          CHECK(c.batch <= c.samples);
          CHECK(c.e2e_batch <= c.samples);
          CHECK(c.val_samples >= (blocks ? 1 : 0));
          if (tokens >= 8) CHECK((c.samples + (blocks ? c.val_samples : 0)) * c.seq_len <= tokens);
          if (typed.count("samples")) CHECK(c.samples == 3);
        }
}

TEST_CASE("fit: what was typed stays, and the line names the rest", "[fit]") {
  TrainConfig config = asked(false);
  config.e2e_micro_batch = 4;
  const TrainConfig c = fitted(config, 512, 3000);
  CHECK(c.seq_len == 375);
  CHECK(c.samples == 7);
  CHECK(c.val_samples == 1);
  CHECK(c.e2e_batch == 4);  // a multiple of the micro-batch
  CHECK(
      train::describe_fit(config, c, 512, 3000) ==
      "to fit the text (3000 tokens): --seq-len 375 instead of 2048, --samples 7 instead of 1024, "
      "--e2e-batch 4 instead of 16");
  const TrainConfig far = fitted(config, 512, 1000000);
  CHECK(train::describe_fit(config, far, 512, 1000000) ==
        "to fit the text (1000000 tokens) and the model (512 positions): --seq-len 512 instead of "
        "2048");
  config.samples = 3;
  const TrainConfig few = fitted(config, 512, 1000000, {"samples", "seq-len"});
  CHECK(train::describe_fit(config, few, 512, 1000000) ==
        "to fit 3 samples: --e2e-batch 3 instead of 16");
  config.seq_len = 4096;
  config.samples = 2000;
  const TrainConfig typed =
      fitted(config, 512, 3000, {"seq-len", "samples", "val-samples", "batch", "e2e-batch"});
  CHECK(train::describe_fit(config, typed, 512, 3000).empty());
}

}  // namespace bbb::tests
