// End-to-end training of the whole quantized model, on the text (cross-entropy) or on the logits of
// its full-precision original (KL, or Jensen-Shannon; engine/backend.h has its formula).
//
//   loss = mean over windows of the mean over their T - 1 predicted tokens of l_t
//   l_t  = -log q_t[x_{t+1}]   or   sum_v p_t (log p_t - log q_t)
//
// An optimizer step takes e2e_batch windows, e2e_micro_batch at a time, and accumulates gradients.
// Ranks share the windows of a step.
// The step of a stage is recorded once and replayed.
#pragma once

#include "engine/counting_backend.h"
#include "train/memory_plan.h"
#include "train/run_directory.h"
#include "train/student.h"
#include "train/train.h"

namespace bbb::train {

// Runs or resumes the stages of the whole model, each from the result of the one before, and writes
// their files.
void train_end_to_end(Backend& backend, const Checkpoint& source, const data::Windows& windows,
                      const TrainConfig& config, const Recipe& recipe, const StartOfModel& start,
                      const PhaseMemory& memory, const RunDirectory& run, const Observer& observer);

// Allocates on `backend` the most that a stage will hold, without training.
Rehearsal rehearse_end_to_end(engine::CountingBackend& backend, const Checkpoint& source,
                              const TrainConfig& config, models::Recompute recompute,
                              TeacherStates states);

}  // namespace bbb::train
