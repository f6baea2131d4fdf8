// StageTrainer: trains one block through one stage, minimising mean (block(x) - y)^2 over the
// training windows; keeps the masters of the best validation loss.
//
// One LlamaBlock serves all blocks: its weights are loaded anew and its tensors keep their
// addresses, so that a stage's step is recorded once and replayed for every block.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "models/llama.h"
#include "train/block_times.h"
#include "train/recipe.h"
#include "train/step_loop.h"
#include "train/step_probe.h"
#include "train/stream_set.h"
#include "train/train.h"

namespace bbb::train {

class StageTrainer {
 public:
  // What the phase adds: it is told of progress, and finishes its own writing before a state is
  // saved and when the host has waited anyway.
  struct Hooks {
    std::function<void(const Position& at)> show;
    std::function<void()> before_save, synchronized;
  };

  // All must outlive the trainer.
  StageTrainer(Backend& backend, const models::LlamaConfig& model, const TrainConfig& config,
               models::Recompute recompute, StreamSet& streams, Tensor inv_freq,
               const RunDirectory& run, const Observer& observer, Hooks hooks);

  // Puts masters, and the width of stage t, into the block.
  void load(size_t t, const models::LayerResult& result);
  // The block as it was loaded or trained, for a pass over a stream.
  models::LlamaBlock& quantized_block();

  // From the loaded masters, or from `saved`. Adds to `time`. Returns the validation losses: before
  // training, then after each epoch.
  std::vector<double> train(int64_t layer, size_t t, std::optional<SavedState> saved,
                            BlockTime::Stage& time);
  models::LayerResult result();  // the masters of the best validation loss, which stay in the block

  // The steps of a stage alone, for a probe and for planning: of the first block, the step of an
  // input stream, up to `last`; and back to the first step.
  std::unique_ptr<engine::Replay> record(size_t t, size_t input, StepPart last);
  void rewind(int64_t layer, size_t t);
  void feed_first(size_t t);  // its batch, from streams that are not on the device
  // What train() holds, without training.
  void rehearse(int64_t layer, size_t t);

 private:
  struct Stage {
    std::unique_ptr<autograd::Optimizer> optimizer;
    std::vector<std::unique_ptr<engine::Replay>> steps;  // one for each input stream, in rotation
  };
  void record_steps(size_t t);
  void step(size_t t, size_t input, StepPart last);
  std::vector<double> train_epochs(size_t t, Position at, BlockTime::Stage& time);
  double validate(size_t t);
  NamedTensors state(size_t t) const;
  StepHooks step_hooks(size_t t, const Position& at);
  Json log_line(const char* phase, const Position& at, int64_t epoch) const;
  void log_validation(const Position& at) const;

  Backend& backend_;
  const TrainConfig& config_;
  const models::Recompute recompute_;
  StreamSet& streams_;
  const RunDirectory& run_;
  const Observer& observer_;
  const Hooks hooks_;
  const int64_t steps_per_epoch_;
  autograd::ParameterSet parameters_;
  models::LlamaBlock block_;
  std::optional<autograd::WeightQuantizer> quantizer_;
  Tensor best_;                      // masters of the best validation loss
  Tensor order_;                     // I32: rows of all steps of a stage
  std::vector<int32_t> host_order_;  // the same
  std::optional<StepLoop> loop_;
  Tensor validation_;  // real (1)
  std::vector<Stage> stages_;
  std::unique_ptr<StepFeed> feed_;
};

}  // namespace bbb::train
