// StageTrainer: trains one block in one stage. It minimises mean (block(x) - y)^2 over the training
// windows and keeps the masters of the best validation loss.
//
// One LlamaBlock serves all blocks of the same formats in turn. Its tensors keep their addresses,
// so that the step of a stage is recorded once and replayed for every block.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "models/llama.h"
#include "train/block_times.h"
#include "train/loss_weights.h"
#include "train/recipe.h"
#include "train/step_loop.h"
#include "train/step_probe.h"
#include "train/stream_set.h"
#include "train/train.h"

namespace bbb::train {

// Formats of a block's linears, stage by stage.
using StageFormats = std::vector<std::vector<quant::LinearFormat>>;

class StageTrainer {
 public:
  // hooks: what the phase adds (show, before_save, synchronized). The references must outlive the
  // trainer.
  StageTrainer(Backend& backend, const models::LlamaConfig& model, const TrainConfig& config,
               StageFormats formats, const Recipe& recipe, models::Recompute recompute,
               StreamSet& streams, Tensor inv_freq, const RunDirectory& run,
               const Observer& observer, StepHooks hooks);

  const StageFormats& formats() const { return formats_; }
  // Sets the block's formats to those of stage t, and its masters to a result in them. If the stage
  // trains adapters, they start.
  void load(int64_t layer, size_t t, const models::LayerResult& result);
  // The block with its current masters quantized, for a pass over a stream.
  models::LlamaBlock& quantized_block();

  // Trains from the loaded masters, or from `saved`. Adds to `time`. Returns the validation losses:
  // before training, then after each epoch. Throws if every step was skipped.
  std::vector<double> train(int64_t layer, size_t t, std::optional<SavedState> saved,
                            BlockTime::Stage& time);
  // The masters of the best validation loss, which stay in the block, without adapters; of learned
  // grids, their codes.
  models::LayerResult result();

  // Records the step of stage t on one of its input streams, up to the part `last`. The masters
  // must have been quantized.
  // Several precisions take one step together, each on its own stream; `input` is then 0.
  std::unique_ptr<engine::Replay> record(size_t t, size_t input, StepPart last);
  // Before the first step of stage t of a layer: uploads its sample order, restarts the optimizer.
  void rewind(int64_t layer, size_t t);
  void feed_first(size_t t);  // its batch, from streams that are not on the device
  // What train() holds, without training.
  void rehearse(int64_t layer, size_t t);
  int64_t state_bytes() const { return bytes_of(state(0)); }  // after record() of stage 0

 private:
  struct Stage {
    std::unique_ptr<autograd::Optimizer> optimizer;
    std::vector<std::unique_ptr<engine::Replay>> steps;  // one for each input stream, in rotation
  };
  void prepare();   // quantizes, whatever has written the masters
  void quantize();  // the same, if only the optimizer has written them
  void record_steps(size_t t);
  void step(size_t t, size_t input, StepPart last);
  std::vector<autograd::Anchor> anchors(size_t t) const;  // of the block's output in stage t
  std::vector<double> train_epochs(size_t t, Position at, BlockTime::Stage& time);
  double validate(size_t t);
  void add_validation(Stream& input);
  NamedTensors state(size_t t) const;
  StepHooks step_hooks(size_t t, const Position& at);
  Json log_line(const char* phase, const Position& at, int64_t epoch) const;
  void log_validation(const Position& at) const;

  Backend& backend_;
  const TrainConfig& config_;
  const Recipe& recipe_;
  const StageFormats formats_;
  const models::Recompute recompute_;
  StreamSet& streams_;
  const RunDirectory& run_;
  const Observer& observer_;
  const StepHooks hooks_;
  const int64_t steps_per_epoch_;
  autograd::ParameterSet parameters_;
  models::LlamaBlock block_;
  std::optional<autograd::WeightQuantizer> quantizer_;  // none with learned grids
  Tensor best_;                                         // masters of the best validation loss
  Tensor order_;  // I32 (steps * this rank's batch): stream rows of all steps of a stage
  std::vector<int32_t> host_order_;         // the same, on the host
  std::optional<GradientAverage> average_;  // over the ranks
  std::optional<StepLoop> loop_;
  Tensor validation_;                   // real (1)
  std::optional<LossWeights> weights_;  // of several precisions
  Tensor loss_;                         // real (1): the sum of their losses
  std::vector<Stage> stages_;
  std::unique_ptr<StepFeed> feed_;
};

}  // namespace bbb::train
