// The training steps of both phases on their own, for measurements: the very code that a run
// records, on a fresh model. No file is read or written.
#pragma once

#include <memory>

#include "engine/backend.h"
#include "train/memory_plan.h"
#include "train/train.h"

namespace bbb::train {

// The parts of a step in order; a recording ends after one of them.
//   Quantize    the batch's rows gathered, the weights fake-quantized
//   Forward     through the loss (end to end: the teacher too)
//   Backward    every gradient
//   Optimizer   norm, schedule, AdamW: the whole step
// An end-to-end step accumulates over micro-batches, so its parts are cut from each of them.
enum class StepPart { Quantize, Forward, Backward, Optimizer };

class StepProbe {
 public:
  virtual ~StepProbe() = default;
  virtual std::unique_ptr<engine::Replay> record(StepPart last) = 0;
  virtual void rewind() = 0;  // to the first step of those that the configuration asks for
};

// One block, the configuration's first stage.
std::unique_ptr<StepProbe> probe_block_step(Backend& backend, const Checkpoint& source,
                                            const data::Windows& windows, const TrainConfig& config,
                                            const BlockMemory& memory);
// The whole model, from round to nearest; config.stages must be empty.
std::unique_ptr<StepProbe> probe_end_to_end_step(Backend& backend, const Checkpoint& source,
                                                 const data::Windows& windows,
                                                 const TrainConfig& config,
                                                 const PhaseMemory& memory);

}  // namespace bbb::train
