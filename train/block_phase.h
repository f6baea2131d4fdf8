// Block-wise progressive training: every block learns, stage by stage, to reproduce the output of
// its full-precision original, on the inputs that its quantized predecessors produce.
//
//   y = block_fp(stream_0);  for each stage t = 1, 2, ..: minimise mean (block_t(x) - y)^2
//
// With Target::Follow y = block_fp(stream_t), and stream_0 is only the place where it is stored. x
// is stream_t (same), stream_{t-1} (higher) or both in rotation (mix). Streams are act (N, T, D):
// stream_0 in full precision and one per stage (stream_set.h). With `same`, y replaces stream_0.
#pragma once

#include "engine/counting_backend.h"
#include "train/memory_plan.h"
#include "train/run_directory.h"
#include "train/train.h"

namespace bbb::train {

// Trains the stages that `run` lacks, the first of them from its saved state if there is one. The
// streams after finished blocks are computed again, by the code that computed them first. Throws if
// the saved state is of another run or ahead of the results.
void train_blocks(Backend& backend, const Checkpoint& source, const data::Windows& windows,
                  const TrainConfig& config, const Recipe& recipe, const BlockMemory& memory,
                  const RunDirectory& run, const Observer& observer);

// Allocates on `backend` what the phase will hold, without training.
Rehearsal rehearse_blocks(engine::CountingBackend& backend, const Checkpoint& source,
                          const TrainConfig& config, models::Recompute recompute,
                          const StreamPlan& streams);

}  // namespace bbb::train
