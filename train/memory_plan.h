// Memory planning. A phase runs on a CountingBackend, which tells how much device memory it will
// hold. From that follow the activations that are recomputed and the places of the streams.
#pragma once

#include <string>

#include "engine/backend.h"
#include "models/recompute.h"
#include "train/config.h"
#include "train/stream_store.h"

namespace bbb::train {

// What a phase will need, counted without training.
struct Rehearsal {
  int64_t recorded_bytes = 0;  // that recorded steps keep
  int64_t state_bytes = 0;     // of the largest state that a killed run continues from
};
struct PhaseMemory : Rehearsal {
  int64_t device_bytes = 0;  // most that tensors hold at once, streams included
  models::Recompute recompute = models::Recompute::None;
  TeacherStates teacher = TeacherStates::Beside;  // of the end-to-end phase
};
struct BlockMemory : PhaseMemory {
  StreamPlan streams;
};

// Both throw, saying what to change, if the phase does not fit. `config` must be resolved.
BlockMemory plan_block_memory(engine::Backend& backend, const models::LlamaConfig& model,
                              const TrainConfig& config);
PhaseMemory plan_end_to_end_memory(engine::Backend& backend, const models::LlamaConfig& model,
                                   const TrainConfig& config);

// The memory of the end-to-end phase in these modes, whether it fits or not.
PhaseMemory count_end_to_end_memory(const engine::Backend& backend,
                                    const models::LlamaConfig& model, const TrainConfig& config,
                                    models::Recompute recompute, TeacherStates teacher);

// The memory of the pass over the input sites' statistics.
int64_t count_statistics_memory(const engine::Backend& backend, const models::LlamaConfig& model,
                                const TrainConfig& config);

// Throws if the host has no memory for the factors of GPTQ's Hessians or of LC's start.
void check_factor_memory(const models::LlamaConfig& model, const TrainConfig& config);

// What the device gives for so many bytes of tensors.
int64_t allocated_bytes(const engine::Backend& backend, int64_t bytes);
// The bytes of tensors that fit in what the device has left and in the budget.
int64_t tensor_room(const engine::Backend& backend, const MemoryBudget& budget);
// Throws where tensors of `bytes` do not fit.
void check_memory(const engine::Backend& backend, int64_t bytes, const MemoryBudget& budget,
                  const std::string& what, const std::string& advice);

}  // namespace bbb::train
