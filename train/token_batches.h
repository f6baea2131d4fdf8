// TokenBatches: the windows of a stage of the whole model, on the device, and the micro-batches
// that its steps take from them.
//
//   order    w w | w w || w w | w w || ..    a step's windows, a micro-batch at a time
//   cursor   the next micro-batch, counted over all steps
//
// All are this rank's own.
#pragma once

#include <algorithm>
#include <vector>

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
    const int64_t seq = config.seq_len;
    const engine::Comm& comm = *config.comm;
    const std::vector<int32_t> targets = windows.rows(0, config.samples).targets();
    const auto own = [&](const std::vector<int32_t>& all) {
      return models::upload_ints(backend, own_windows(all.data(), config.samples, seq, comm),
                                 {comm.share(config.samples), seq});
    };
    ids_ = own(windows.ids);
    targets_ = own(targets);
    if (!windows.first_key.empty()) first_key_ = own(windows.first_key);
    // Sub-seed 0: those of block training start at 1.
    const std::vector<int32_t> order =
        sample_order(sub_seed(config.seed, 0, stage), config.samples, config.e2e_batch, steps);
    order_ = models::upload_ints(backend, own_order(order, comm), {steps * own_e2e_batch(config)});
    cursor_ = backend.empty({1}, engine::DType::I32);
    std::vector<int64_t> of_window;
    for (auto window = targets.begin(); window != targets.end(); window += seq) {
      of_window.push_back(std::count_if(window, window + seq, [](int32_t id) { return id >= 0; }));
      BBB_ASSERT(of_window.back() > 0);  // as make_windows() promises: no step counts nothing
    }
    counted_.resize(static_cast<size_t>(steps));
    for (size_t i = 0; i < order.size(); ++i)
      counted_[i / static_cast<size_t>(config.e2e_batch)] +=
          of_window[static_cast<size_t>(order[i])];
  }

  // How many tokens each step's loss counts, over its whole batch.
  const std::vector<int64_t>& counted() const { return counted_; }
  // The loss is the mean over them. A recorded step divides by the number of all, which its factor
  // puts right. Empty: every step counts all.
  std::vector<double> loss_factors() const {
    const int64_t all = config_.e2e_batch * (config_.seq_len - 1);
    std::vector<double> factors;
    if (std::ranges::count(counted_, all) != std::ssize(counted_))
      for (const int64_t counted : counted_)
        factors.push_back(static_cast<double>(all) / static_cast<double>(counted));
    return factors;
  }

  // The next step will be `step`.
  void rewind(int64_t step) const {
    const auto micro =
        static_cast<int32_t>(step * own_e2e_batch(config_) / own_micro_batch(config_));
    backend_.upload(cursor_, &micro);
  }

  struct Batch {
    // I32 (micro-batch, T), as those of data::Windows; first_key undefined if it has none.
    engine::Tensor ids, targets, first_key;
    engine::Tensor states;  // of next(); else undefined
  };
  // Recorded: gathers the next micro-batch. states: rows of all windows to gather with it, or
  // undefined.
  Batch next(const engine::Tensor& states = {}) const {
    const auto gather = [&](const engine::Tensor& rows) {
      if (!rows.defined()) return engine::Tensor();
      const engine::Tensor batch =
          backend_.empty({own_micro_batch(config_), rows.dim(1)}, rows.dtype());
      backend_.gather_rows(batch, {rows, order_, cursor_});
      return batch;
    };
    const Batch batch{gather(ids_), gather(targets_), gather(first_key_), gather(states)};
    backend_.advance(cursor_);
    return batch;
  }
  int64_t windows() const { return ids_.dim(0); }
  // Windows [begin, begin + count) in their own order.
  Batch at(int64_t begin, int64_t count) const {
    const auto rows = [&](const engine::Tensor& all) {
      return all.defined() ? all.rows(begin, count) : engine::Tensor();
    };
    return {rows(ids_), rows(targets_), rows(first_key_), {}};
  }

 private:
  engine::Backend& backend_;
  const TrainConfig& config_;
  engine::Tensor ids_, targets_, first_key_;  // I32 (samples, T)
  engine::Tensor order_;                      // I32 (steps * batch): the windows of all steps
  engine::Tensor cursor_;                     // I32 (1)
  std::vector<int64_t> counted_;              // of all steps, on all ranks
};

}  // namespace bbb::train
