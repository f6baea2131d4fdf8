// End-to-end training: the whole quantized model learns from the text (cross-entropy) or from its
// full-precision original (KL), through the head.
//
//   loss = mean over windows of the mean over their T - 1 predicted tokens of l_t
//   l_t  = -log q_t[x_{t+1}]   or   sum_v p_t (log p_t - log q_t)
//
// An optimizer step takes e2e_batch windows, e2e_micro_batch at a time, gradients accumulating. The
// step is recorded once and replayed.
#pragma once

#include "engine/backend.h"
#include "models/quant_linear.h"
#include "train/run_directory.h"
#include "train/train.h"

namespace bbb::train {

// The most that the phase will hold of the device.
struct EndToEndMemory {
  int64_t device_bytes = 0;
  models::Recompute recompute = models::Recompute::None;
};

// What a model of these sizes needs in this mode.
int64_t end_to_end_memory_bytes(Backend& backend, const models::LlamaConfig& model,
                                const TrainConfig& config, models::Recompute recompute);
// Throws, saying what to change, where the phase does not fit.
EndToEndMemory plan_end_to_end_memory(Backend& backend, const models::LlamaConfig& model,
                                      const TrainConfig& config);

// Runs or resumes the phase and writes the run's final file.
void train_end_to_end(Backend& backend, const Checkpoint& source, const data::Windows& windows,
                      const TrainConfig& config, const EndToEndMemory& memory,
                      const RunDirectory& run, const Observer& observer);

// The masters with which the phase starts, and which an export takes where there is no such phase:
// those of the block's last stage, or the full-precision weights where no blocks were trained.
models::LayerResult block_result(const RunDirectory& run, const Recipe& recipe,
                                 const TrainConfig& config, const Checkpoint& source,
                                 int64_t layer);

}  // namespace bbb::train
