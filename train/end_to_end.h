// End-to-end training of the whole quantized model, on the text (cross-entropy) or on the logits of
// its full-precision original (KL, or Jensen-Shannon; engine/backend.h has its formula).
//
//   loss = mean over windows of the mean over their T - 1 predicted tokens of l_t
//   l_t  = -log q_t[x_{t+1}]   or   sum_v p_t (log p_t - log q_t)
//
// An optimizer step takes e2e_batch windows, e2e_micro_batch at a time, and accumulates gradients.
// The step is recorded once and replayed.
#pragma once

#include "engine/counting_backend.h"
#include "train/run_directory.h"
#include "train/train.h"

namespace bbb::train {

// Runs or resumes the phase and writes the run's final file.
void train_end_to_end(Backend& backend, const Checkpoint& source, const data::Windows& windows,
                      const TrainConfig& config, models::Recompute recompute,
                      const RunDirectory& run, const Observer& observer);

// Allocates on `backend` what the phase will hold, without training. Returns the bytes that the
// recorded step keeps.
int64_t rehearse_end_to_end(engine::CountingBackend& backend, const Checkpoint& source,
                            const TrainConfig& config, models::Recompute recompute);

// The masters from which the phase starts, and which are exported if there is no such phase: those
// of the block's last stage, or the full-precision weights if no blocks are trained.
models::LayerResult block_result(const RunDirectory& run, const Recipe& recipe,
                                 const TrainConfig& config, const Checkpoint& source,
                                 int64_t layer);

}  // namespace bbb::train
