// Block-wise progressive training: every block learns, stage by stage, to give what its
// full-precision original gives, on the inputs that its quantized predecessors produce.
//
//   y = block_fp(stream_0);  for each stage t: minimise mean (block_t(x) - y)^2
//
// x is stream_t (same), stream_{t-1} (higher) or both in rotation (mix). Streams are act (N, T, D):
// stream_0 in full precision and one a stage (stream_set.h); in `same`, y takes stream_0's place.
#pragma once

#include "engine/counting_backend.h"
#include "train/memory_plan.h"
#include "train/run_directory.h"
#include "train/train.h"

namespace bbb::train {

// Trains the stages that `run` lacks, the first of them from its saved state where there is one.
// Finished ones are not touched; the streams behind them are computed again by the code that
// computed them first. Throws where that state is of another run or runs ahead of the results.
void train_blocks(Backend& backend, const Checkpoint& source, const data::Windows& windows,
                  const TrainConfig& config, const BlockMemory& memory, const RunDirectory& run,
                  const Observer& observer);

// Holds of the device what the phase will hold, without training. Returns the bytes that recorded
// steps keep.
int64_t rehearse_blocks(engine::CountingBackend& backend, const Checkpoint& source,
                        const TrainConfig& config, models::Recompute recompute,
                        const StreamPlan& streams);

}  // namespace bbb::train
