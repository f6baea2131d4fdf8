// Where the time of block training goes, and how long a longer run would take.
#pragma once

#include <chrono>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "engine/backend.h"
#include "train/config.h"

namespace bbb::train {

// Seconds of one block, including all work that it queued.
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

// Adds the seconds that `work` takes, including all work that it queues.
template <typename Work>
void timed(engine::Backend& backend, double& seconds, const Work& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  backend.synchronize();
  seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// The median of every part, each by itself. `blocks` must not be empty.
BlockTime median(const std::vector<BlockTime>& blocks);

// The times of the same block in a run of length `to`. Training scales with the number of steps,
// validation with the number of passes, streams with the number of windows; weights stay.
BlockTime extrapolate(const BlockTime& measured, const TrainConfig& config, const RunLength& to);

// The times of a block as a line of the log. The last block gets no line.
nlohmann::ordered_json log_line(const BlockTime& time, int64_t block, const TrainConfig& config);
// Prints the median times of a block and, with config.extrapolate, how long that run would take.
void report(const std::vector<BlockTime>& times, const TrainConfig& config, int64_t layers);

// "1.88 s a block: w2a16 1.02 s, validation 0.10 s, streams 0.31 s, weights 0.45 s"
std::string to_string(const BlockTime& time, const TrainConfig& config);

}  // namespace bbb::train
