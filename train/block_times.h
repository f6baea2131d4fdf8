// Where the time of block training goes, and what a longer run of the same steps would take.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

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

// Of every part by itself. At least one block.
BlockTime median(const std::vector<BlockTime>& blocks);

// The same block with other samples and epochs: steps by their number, validation by its passes,
// streams by their windows, weights as they are.
BlockTime extrapolate(const BlockTime& measured, const TrainConfig& config, const RunLength& to);

// "1.88 s a block: w2a16 1.02 s, validation 0.10 s, streams 0.31 s, weights 0.45 s"
std::string to_string(const BlockTime& time, const TrainConfig& config);

}  // namespace bbb::train
