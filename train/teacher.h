// Teacher: the full-precision model, whose distribution the end-to-end phase learns.
//
//   beside   its forward pass is a part of every step
//   cached   one pass over this rank's windows keeps its last hidden states; its blocks are freed
//
// Both give a step the same bits.
#pragma once

#include <memory>

#include "models/llama.h"
#include "train/config.h"
#include "train/token_batches.h"
#include "train/train.h"

namespace bbb::train {

class Teacher {
 public:
  // Loads the model and, cached, runs it over all windows of `batches`.
  Teacher(engine::Backend& backend, const models::Checkpoint& source, const TokenBatches& batches,
          const TrainConfig& config, TeacherStates states, const Observer& observer);

  // act (windows, T D): what TokenBatches::next() is to gather; undefined beside.
  const engine::Tensor& states() const { return states_; }
  // Recorded: hidden states after the final norm of a batch, act (tokens, D).
  engine::Tensor hidden(const TokenBatches::Batch& batch) const;
  const engine::Tensor& head() const { return head_; }  // act (V, D)

 private:
  void cache(const TokenBatches& batches, const TrainConfig& config, const Observer& observer);

  engine::Backend& backend_;
  const int64_t d_model_;
  std::unique_ptr<models::Llama> model_;  // null once its states are cached
  engine::Tensor head_, states_;
};

// Is the teacher of a stage of `steps` steps cached? Where there is one and windows come again.
bool caches_teacher(const TrainConfig& config, int64_t steps, TeacherStates states);

}  // namespace bbb::train
