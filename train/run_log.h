// RunLog: a run's log.jsonl as series, for those who draw or tabulate them.
//
// A log is read while its run may still train: a last line that was cut short is left out.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "train/block_times.h"
#include "train/run_directory.h"

namespace bbb::train {

// The optimizer steps of one stage, as far as they are logged.
struct LoggedSteps {
  std::string stage;         // "w2a16"
  std::vector<double> loss;  // of each step; NaN: it was not finite
  int64_t skipped = 0;       // steps that changed nothing, because they were not finite
  double seconds = 0;        // of all steps
  double mean_loss(size_t begin, size_t end) const;  // of the finite ones; NaN if there are none
};

// A stage of a block. Its losses are reconstruction errors: mean squared errors of its output.
struct LoggedBlockStage : LoggedSteps {
  int64_t block = 0;
  std::vector<double> validation;  // before training, then after each epoch
  double start() const;            // the error before training
  double result() const;           // the error of the masters that the stage keeps: its lowest
};

struct LoggedTime {
  int64_t block = 0;
  BlockTime time;
};

struct RunLog {
  std::vector<LoggedBlockStage> blocks;  // in the order of training
  std::vector<LoggedSteps> whole;        // stages of the end-to-end phase
  std::vector<LoggedTime> times;         // of the blocks whose time was taken
  int64_t peak_bytes = 0;                // most device memory
  std::string recompute;                 // of the last step
};

// Throws, naming the line, if a line is not of a log. A run without a log has an empty one.
RunLog read_log(const RunDirectory& run, const TrainConfig& config);

}  // namespace bbb::train
