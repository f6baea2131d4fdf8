// Times of block training: medians and extrapolation of known numbers, and the times that a run
// reports.
#include "train/block_times.h"

#include <catch2/catch.hpp>

#include "tests/support.h"
#include "tests/tiny_run.h"

namespace bbb::tests {
namespace {

using train::BlockTime;

BlockTime block_of(double train_s, double validation_s, double streams_s, double weights_s) {
  return {{{train_s, validation_s}, {2 * train_s, validation_s}}, streams_s, weights_s};
}

train::TrainConfig two_stages() {
  train::TrainConfig config;
  config.stages = train::parse_stages("w4a16,w2a16");
  config.samples = 64;
  config.val_samples = 16;
  config.batch = 8;
  config.epochs = 2;
  return config;
}

}  // namespace

TEST_CASE("block times: each part has its own median", "[times]") {
  const BlockTime middle =
      train::median({block_of(9, 1, 5, 2), block_of(1, 3, 7, 1), block_of(2, 2, 6, 9)});
  CHECK(middle.stages[0].train_s == 2);
  CHECK(middle.stages[1].train_s == 4);
  CHECK(middle.validation_s() == 2 + 2);
  CHECK(middle.streams_s == 6);
  CHECK(middle.weights_s == 2);
  CHECK(middle.total_s() == 6 + 4 + 6 + 2);
}

TEST_CASE("block times: a longer run has more steps and windows, but the same weights", "[times]") {
  // 64 samples in batches of 8, 2 epochs: 16 steps and 3 validations per stage, 80 windows.
  const BlockTime longer = train::extrapolate(block_of(16, 3, 80, 5), two_stages(), {4096, 6});
  CHECK(longer.stages[0].train_s == Approx(512 * 6));
  CHECK(longer.stages[1].train_s == Approx(2 * 512 * 6));
  CHECK(longer.stages[1].validation_s == Approx(7));
  CHECK(longer.streams_s == Approx(4096 + 16));
  CHECK(longer.weights_s == 5);
  CHECK(train::to_string(block_of(1, 0.25, 3, 4), two_stages()) ==
        "10.5 s a block: w4a16 1 s, w2a16 2 s, validation 0.5 s, streams 3 s, weights 4 s");
}

TEST_CASE("block times: samples and epochs are read, or refused", "[times]") {
  train::TrainConfig config;
  set_option(config, "extrapolate", "4096x6");
  CHECK(config.extrapolate == train::RunLength{4096, 6});
  for (const char* text : {"4096", "x6", "4096x", "4096x6x", "0x6", "64x-1", " ", "1e3x2"})
    CHECK_THROWS_AS(set_option(config, "extrapolate", text), UsageError);
}

TEST_CASE("block times: the log has them for every block but the last", "[train][times]") {
  const Fixture fixture;
  train::TrainConfig config = fixture.both_phases("run");
  config.e2e_steps = 0;
  fixture.run(config);
  const std::vector<train::Json> lines = log_lines(config.out, "time");
  REQUIRE(lines.size() == 1);
  CHECK(lines[0]["block"] == 0);
  REQUIRE(lines[0]["stages"].size() == 2);
  CHECK(lines[0]["stages"][1]["stage"] == "w2a16");
  for (const train::Json& stage : lines[0]["stages"]) {
    CHECK(stage["train_s"].get<double>() > 0);
    CHECK(stage["validation_s"].get<double>() > 0);
  }
  CHECK(lines[0]["streams_s"].get<double>() > 0);
  CHECK(lines[0]["weights_s"].get<double>() > 0);
}

}  // namespace bbb::tests
