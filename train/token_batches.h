// TokenBatches: the windows of a stage of the whole model, on the device, and the micro-batches
// that its steps take from them.
//
//   order    w w | w w || w w | w w || ..    a step's windows, a micro-batch at a time
//   cursor   the next micro-batch, counted over all steps
//
// All are this rank's own.
#pragma once

#include "data/text.h"
#include "models/quant_linear.h"
#include "train/run_directory.h"
#include "train/sample_order.h"

namespace bbb::train {

class TokenBatches {
 public:
  // Of the first `samples` windows, in the order of `steps` steps of this stage.
  TokenBatches(engine::Backend& backend, const data::Windows& windows, const TrainConfig& config,
               size_t stage, int64_t steps)
      : backend_(backend), config_(config) {
    const int64_t rows = config.comm->share(config.samples), seq = config.seq_len;
    const std::vector<int32_t> ids =
        own_windows(windows.ids.data(), config.samples, seq, *config.comm);
    ids_ = models::upload_ints(backend, ids, {rows, seq});
    targets_ = models::upload_ints(backend, data::next_tokens(ids.data(), rows, seq), {rows, seq});
    // Sub-seed 0: those of block training start at 1.
    order_ = models::upload_ints(backend,
                                 own_order(sample_order(sub_seed(config.seed, 0, stage),
                                                        config.samples, config.e2e_batch, steps),
                                           *config.comm),
                                 {steps * own_e2e_batch(config)});
    cursor_ = backend.empty({1}, engine::DType::I32);
  }

  // The next step will be `step`.
  void rewind(int64_t step) const {
    const auto micro =
        static_cast<int32_t>(step * own_e2e_batch(config_) / own_micro_batch(config_));
    backend_.upload(cursor_, &micro);
  }

  struct Batch {
    engine::Tensor ids, targets;  // I32 (micro-batch, T); targets as data::next_tokens()
  };
  // Recorded: gathers the next micro-batch.
  Batch next() const {
    const engine::Shape shape{own_micro_batch(config_), config_.seq_len};
    const Batch batch{backend_.empty(shape, engine::DType::I32),
                      backend_.empty(shape, engine::DType::I32)};
    backend_.gather_rows(batch.ids, {ids_, order_, cursor_});
    backend_.gather_rows(batch.targets, {targets_, order_, cursor_});
    backend_.advance(cursor_);
    return batch;
  }

 private:
  engine::Backend& backend_;
  const TrainConfig& config_;
  engine::Tensor ids_, targets_;  // I32 (samples, T)
  engine::Tensor order_;          // I32 (steps * batch): the windows of all steps
  engine::Tensor cursor_;         // I32 (1)
};

}  // namespace bbb::train
