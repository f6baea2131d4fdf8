// Where the time of block training goes, and what a longer run of the same steps would take.
#pragma once

#include <chrono>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "engine/backend.h"
#include "train/config.h"

namespace bbb::train {

// Seconds of one block, all queued work included.
struct BlockTime {
  struct Stage {
    double train_s = 0;       // all steps
    double validation_s = 0;  // before training, then after each epoch
  };
  std::vector<Stage> stages;
  double streams_s = 0;  // through the full-precision block and through every trained stage
  double weights_s = 0;  // read, to the device, back, and waiting for files

  double train_s() const;
  double validation_s() const;
  double total_s() const;
};

// Adds the seconds that `work` takes, all that it queues included.
template <typename Work>
void timed(engine::Backend& backend, double& seconds, const Work& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  backend.synchronize();
  seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Of every part by itself. At least one block.
BlockTime median(const std::vector<BlockTime>& blocks);

// The same block with other samples and epochs: steps by their number, validation by its passes,
// streams by their windows, weights as they are.
BlockTime extrapolate(const BlockTime& measured, const TrainConfig& config, const RunLength& to);

// The times of a block, but the last, as a line of the log.
nlohmann::ordered_json log_line(const BlockTime& time, int64_t block, const TrainConfig& config);
// Prints where a block's time went, and with config.extrapolate what a longer run would take.
void report(const std::vector<BlockTime>& times, const TrainConfig& config, int64_t layers);

// "1.88 s a block: w2a16 1.02 s, validation 0.10 s, streams 0.31 s, weights 0.45 s"
std::string to_string(const BlockTime& time, const TrainConfig& config);

}  // namespace bbb::train
