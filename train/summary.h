// What `bbb train` says when it has finished.
#pragma once

#include <string>

#include "data/text.h"
#include "train/recipe.h"
#include "train/run_directory.h"
#include "train/train.h"

namespace bbb::train {

// Seconds of the phases that this process ran; 0: it did not run.
struct PhaseTimes {
  double statistics_s = 0, blocks_s = 0, whole_s = 0;
  bool resumed = false;  // an earlier process ran a part
};

// The windows of the text that validate and were not trained on: as many of --val-samples as there
// are behind the samples, and at most a quarter of those or four.
data::Windows validation_windows(const data::Windows& windows, const TrainConfig& config);

// Prints bits per weight, the perplexity of the full-precision model and of the result on the
// validation windows, the time of each phase, and the next commands.
void print_summary(Backend& backend, const Checkpoint& source, const data::Windows& windows,
                   const TrainConfig& config, const Recipe& recipe, const RunDirectory& run,
                   const PhaseTimes& times, const Observer& observer);

// The commands that export a finished run and use the export.
std::string next_commands(const TrainConfig& config);

}  // namespace bbb::train
