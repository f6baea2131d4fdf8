// GPTQ in place of the block phase: rounds the weights of block after block, each linear with the
// errors of its outputs fed back (models/ldlq.h), on what the quantized blocks before it give.
//
//   for each block:
//     start on the grid of its stage, as blocks that train: gathered, rotated, split, searched
//     for each site in order (q,k,v; o; gate,up; down):
//       H = sum x x^T of its operand x, all sites in front quantized     a pass over the stream
//       round its linears
//     stream <- block(stream)                                            a pass
//
// There is one stream, act (N, T, D), and no target. A finished block is a file of codes; a killed
// run continues with the block in which it was.
#pragma once

#include "engine/counting_backend.h"
#include "models/site_statistics.h"
#include "train/memory_plan.h"
#include "train/run_directory.h"
#include "train/train.h"

namespace bbb::train {

inline constexpr int64_t kGptqPasses = models::kSites + 1;  // of all windows, through each block

// Quantizes the blocks that `run` lacks. The stream behind finished blocks is computed again, by
// the code that computed it first.
void quantize_blocks(Backend& backend, const Checkpoint& source, const data::Windows& windows,
                     const TrainConfig& config, const Recipe& recipe, const StreamPlan& streams,
                     const RunDirectory& run, const Observer& observer);

// Allocates on `backend` the most that the phase will hold.
Rehearsal rehearse_gptq(engine::CountingBackend& backend, const Checkpoint& source,
                        const TrainConfig& config, const StreamPlan& streams);

// The seconds of one block on the first `samples` windows of `config`.
double time_gptq_block(Backend& backend, const Checkpoint& source, const data::Windows& windows,
                       const TrainConfig& config, const StreamPlan& streams);

}  // namespace bbb::train
