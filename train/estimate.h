// What a dry run says after the memory plan: how long the run will take, from a few real steps.
#pragma once

#include "train/memory_plan.h"
#include "train/train.h"

namespace bbb::train {

// Runs a few steps of each phase's own code on the first windows, and prints what the whole run
// will take. Stores nothing. blocks: is there a block phase to run? whole: the memory of the other.
// begun: a part of the run is done, which is not subtracted.
void print_dry_run(Backend& backend, const Checkpoint& source, const data::Windows& windows,
                   const TrainConfig& config, bool blocks, const PhaseMemory& whole, bool begun);

}  // namespace bbb::train
