#include "train/teacher.h"

#include <algorithm>

namespace bbb::train {

using autograd::Tape;
using autograd::TapeMode;
using engine::Tensor;

Teacher::Teacher(engine::Backend& backend, const models::Checkpoint& source,
                 const TokenBatches& batches, const TrainConfig& config, TeacherStates states,
                 const Observer& observer)
    : backend_(backend),
      d_model_(source.config().d_model),
      model_(std::make_unique<models::Llama>(backend, source, models::HeadRounding::BFloat16)),
      head_(model_->head()) {
  {
    engine::Progress progress = observer.progress("loading the teacher", source.config().layers,
                                                  engine::Progress::kPatience_s);
    model_->load_blocks(source, [&](int64_t layers) { progress.set(layers); });
  }
  if (states == TeacherStates::Cached) cache(batches, config, observer);
}

// Micro-batches of the steps' size, so that products run as they would in a step. The last one goes
// over some windows again.
void Teacher::cache(const TokenBatches& batches, const TrainConfig& config,
                    const Observer& observer) {
  const int64_t count = batches.windows(), micro = own_micro_batch(config);
  BBB_ASSERT(micro <= count);
  states_ = backend_.empty({count, config.seq_len * d_model_}, backend_.act());
  engine::Progress progress = observer.progress("teacher", count, engine::Progress::kPatience_s);
  for (int64_t begin = 0; begin < count; begin += micro) {
    const int64_t first = std::min(begin, count - micro);
    const Tensor h = hidden(batches.at(first, micro));
    backend_.copy(states_.rows(first, micro), h.view({micro, config.seq_len * d_model_}));
    if (!backend_.computes()) break;  // to count memory, one takes as much as all
    backend_.synchronize();           // otherwise progress would run ahead of the device
    progress.set(first + micro);
  }
  model_.reset();
}

Tensor Teacher::hidden(const TokenBatches::Batch& batch) const {
  const int64_t tokens = batch.ids.numel();
  if (model_ == nullptr) return batch.states.view({tokens, d_model_});
  Tape tape(backend_, TapeMode::Inference);
  return model_->forward(tape, batch.ids, nullptr, models::Recompute::None, batch.first_key)
      .value()
      .view({tokens, d_model_});
}

bool caches_teacher(const TrainConfig& config, int64_t steps, TeacherStates states) {
  return states == TeacherStates::Cached && config.e2e_loss != EndToEndLoss::CrossEntropy &&
         steps * config.e2e_batch >= 2 * config.samples;
}

}  // namespace bbb::train
