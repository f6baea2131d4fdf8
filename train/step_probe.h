// Single training steps of both phases, for measurements: the code that a run records, on a fresh
// model. No file of a run is read or written.
#pragma once

#include <functional>
#include <memory>

#include "engine/backend.h"
#include "train/memory_plan.h"
#include "train/train.h"

namespace bbb::train {

// The parts of a step in order. A recording ends after one of them.
//   Quantize    the batch's rows gathered, the weights fake-quantized
//   Forward     up to the loss; end to end also the teacher
//   Backward    every gradient
//   Optimizer   norm, schedule, AdamW: the whole step
// In an end-to-end step the end applies to each micro-batch.
enum class StepPart { Quantize, Forward, Backward, Optimizer };

struct StepProbe {
  std::function<std::unique_ptr<engine::Replay>(StepPart last)> record;
  std::function<void()> rewind;  // the next step is the first of the configuration's steps
};

// The first block in the configuration's first stage.
StepProbe probe_block_step(Backend& backend, const Checkpoint& source, const data::Windows& windows,
                           const TrainConfig& config, const BlockMemory& memory);
// The whole model, from round to nearest; config.stages must be empty.
StepProbe probe_end_to_end_step(Backend& backend, const Checkpoint& source,
                                const data::Windows& windows, const TrainConfig& config,
                                const PhaseMemory& memory);

}  // namespace bbb::train
