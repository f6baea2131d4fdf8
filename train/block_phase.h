// Block-wise progressive training: every block learns, stage by stage, to give what its
// full-precision original gives, on the inputs that its quantized predecessors produce.
//
//   y = block_fp(stream_0);  for each stage t: minimise mean (block_t(x) - y)^2
//
// x is stream_t (same), stream_{t-1} (higher) or both in turn (mix). Streams are act (N, T, D):
// stream_0 in full precision and one a stage; in `same`, y takes stream_0's place. They lie where
// there is room for them (stream_store.h).
//
// One LlamaBlock serves all blocks, its weights loaded anew: its tensors keep their addresses, so
// that a stage's step is recorded once and replayed for every block, without a host round trip.
#pragma once

#include "engine/backend.h"
#include "train/run_directory.h"
#include "train/stream_store.h"
#include "train/train.h"

namespace bbb::train {

// The most that the phase will hold, and where its streams go.
struct BlockMemory {
  int64_t device_bytes = 0;  // streams included
  models::Recompute recompute = models::Recompute::None;
  StreamPlan streams;
};

// Throws, saying what to change, where the phase does not fit.
BlockMemory plan_block_memory(Backend& backend, const models::LlamaConfig& model,
                              const TrainConfig& config);

// Trains the stages that `run` lacks, the first of them from its saved state where there is one.
// Finished ones are not touched; the streams behind them are computed again by the code that
// computed them first. Throws where that state is of another run or runs ahead of the results.
void train_blocks(Backend& backend, const Checkpoint& source, const data::Windows& windows,
                  const TrainConfig& config, const BlockMemory& memory, const RunDirectory& run,
                  const Observer& observer);

}  // namespace bbb::train
