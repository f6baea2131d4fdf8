#include "train/block_phase.h"

#include <filesystem>
#include <future>
#include <memory>
#include <optional>
#include <utility>

#include "train/dry_run.h"
#include "train/stage_trainer.h"

namespace bbb::train {
namespace {

using autograd::Tape;
using autograd::TapeMode;
using autograd::Var;
using models::LayerResult;
using models::LlamaBlock;
using models::LlamaConfig;

class BlockPhase {
 public:
  BlockPhase(Backend& backend, const Checkpoint& source, const data::Windows& windows,
             const TrainConfig& config, const Recipe& recipe, const RunDirectory& run,
             const Observer& observer, models::Recompute recompute, const StreamPlan& plan)
      : backend_(backend),
        source_(source),
        config_(config),
        run_(run),
        observer_(observer),
        model_(source.config()),
        recipe_(recipe),
        recompute_(recompute),
        streams_(backend, model_, config, plan) {
    const models::Llama model(backend, source, models::HeadRounding::BFloat16);
    inv_freq_ = model.inv_freq();
    streams_.embed(model.embedding(), windows);
  }

  // Starts at the first unfinished stage; `saved`: its state, if there is one.
  void run(int64_t finished_stages, std::optional<SavedState> saved) {
    saved_ = std::move(saved);
    const int64_t stages = block_stages(config_), first = finished_stages / stages;
    recompute_streams(first);
    if (!observer_.quiet)
      progress_.emplace("blocks", model_.layers * stages * steps_per_stage(config_));
    for (int64_t block = first; block < model_.layers; ++block) {
      train_block(block, block == first ? finished_stages % stages : 0);
      if (observer_.after_block) observer_.after_block(block);
    }
    finish_write();
    progress_.reset();  // ends its line
    if (!observer_.quiet) report(times_, config_, model_.layers);
  }

  // For a probe: prepares the first step of the first stage of the first block.
  void begin() {
    load_start(0, 0, enter_with_target(0));
    trainer_->quantized_block();
    rewind();
  }
  void rewind() {
    trainer_->rewind(0, 0);
    trainer_->feed_first(0);
  }
  StageTrainer& trainer() { return *trainer_; }

  // Allocates the most that run() holds. The second block's teacher is allocated while the recorded
  // steps of the first block are kept.
  void rehearse() {
    // The two layers with the most stored positions.
    const int64_t first =
        std::max<int64_t>(0, std::min(Recipe::widest_layer(config_, model_), model_.layers - 2));
    for (int64_t layer = first; layer < std::min(first + 2, model_.layers); ++layer) {
      const LayerResult weights = enter_with_target(layer);
      for (size_t t = 0; t < config_.stages.size(); ++t) {
        load_start(layer, t, weights);
        trainer_->rehearse(layer, t);
        if (layer + 1 < model_.layers) advance_stage(t);  // no block follows the last
      }
    }
  }

 private:
  void train_block(int64_t layer, int64_t finished_stages) {
    const bool from_its_start = finished_stages == 0 && !saved_;
    time_ = BlockTime();
    time_.stages.resize(config_.stages.size());
    LayerResult original;
    timed(backend_, time_.weights_s, [&] { original = full_precision(layer); });
    enter(layer);
    if (config_.target == Target::Full)
      advance_teacher(layer, original, streams_.target(), streams_.full());
    std::vector<std::shared_ptr<const LayerResult>> results;
    for (size_t t = 0; t < config_.stages.size(); ++t) {
      if (static_cast<int64_t>(t) < finished_stages) {
        results.push_back(std::make_shared<LayerResult>(finished_result(layer, t)));
        continue;
      }
      if (config_.target == Target::Follow)
        advance_teacher(layer, original, streams_.target(), streams_.stage(t));
      timed(backend_, time_.weights_s,
            [&] { load_start(layer, t, t == 0 ? original : *results.back()); });
      results.push_back(train_stage(layer, t));
    }
    if (layer + 1 == model_.layers) return;
    // In reverse: the masters of the last stage are still in the block.
    for (size_t t = config_.stages.size(); t-- > 0;) {
      if (t + 1 < config_.stages.size())
        timed(backend_, time_.weights_s, [&] { trainer_->load(layer, t, *results[t]); });
      timed(backend_, time_.streams_s, [&] { advance_stage(t); });
    }
    if (&streams_.target() != &streams_.full())
      timed(backend_, time_.streams_s, [&] {
        streams_.rewrite(streams_.full(), streams_.target(),
                         [](const Tensor& x, const Tensor&) { return x; });
      });
    if (!from_its_start) return;
    run_.append_log({log_line(time_, layer, config_)});
    times_.push_back(time_);
  }

  // When this returns, the result may still be being written to the stage's file.
  std::shared_ptr<const LayerResult> train_stage(int64_t layer, size_t t) {
    const std::vector<double> validation =
        trainer_->train(layer, t, std::exchange(saved_, std::nullopt), time_.stages[t]);
    std::shared_ptr<const LayerResult> result;
    timed(backend_, time_.weights_s, [&] {
      result = std::make_shared<LayerResult>(trainer_->result());
      finish_write();
    });
    writing_ = std::async(std::launch::async, [this, layer, t, result, validation] {
      run_.write_stage(layer, static_cast<int64_t>(t), recipe_, model_, *result, validation);
      if (run_.writes()) std::filesystem::remove(run_.block_state_file());
    });
    return result;
  }

  // Makes the trainer that fits the layer's formats, unless the last layer's does.
  void enter(int64_t layer) {
    StageFormats formats;
    for (int64_t t = 0; t < block_stages(config_); ++t)
      formats.push_back(recipe_.stage_formats(layer, t));
    if (trainer_ && trainer_->formats() == formats) return;
    StepHooks hooks;
    hooks.show = [this](const Position& at, float) { show(at); };
    hooks.before_save = [this] { finish_write(); };  // a state must not be ahead of the results
    hooks.synchronized = [this] { finish_write_if_done(); };
    trainer_.reset();  // its memory, before the next one takes its own
    trainer_.emplace(backend_, model_, config_, std::move(formats), recipe_, recompute_, streams_,
                     inv_freq_, run_, observer_, std::move(hooks));
  }

  // Enters a layer and computes the target of its first stage. Returns the original weights.
  LayerResult enter_with_target(int64_t layer) {
    LayerResult original = full_precision(layer);
    enter(layer);
    advance_teacher(layer, original, streams_.target(),
                    config_.target == Target::Full ? streams_.full() : streams_.stage(0));
    return original;
  }

  // Loads the start of stage t: from the result of the stage before, or the original weights.
  void load_start(int64_t layer, size_t t, const LayerResult& from) {
    trainer_->load(layer, t, recipe_.start(layer, from, trainer_->formats()[t]));
  }

  void advance(LlamaBlock& block, Stream& out, Stream& in) {
    streams_.rewrite(out, in, [&](const Tensor& x, const Tensor& first_key) {
      Tape tape(backend_, TapeMode::Inference);
      return block.forward(tape, Var(x), nullptr, models::Recompute::None, first_key).value();
    });
  }

  // The original weights of a layer. Layers must be requested in order: the weights of the next
  // layer are read, or drawn, while the device works on this one.
  LayerResult full_precision(int64_t layer) {
    LayerResult weights =
        next_weights_.valid() ? next_weights_.get() : models::full_precision(source_, layer);
    if (layer + 1 < model_.layers)
      next_weights_ =
          std::async(std::launch::async, models::full_precision, std::cref(source_), layer + 1);
    return weights;
  }

  void advance_teacher(int64_t layer, const LayerResult& weights, Stream& out, Stream& in) {
    LlamaBlock teacher(backend_, model_, layer, inv_freq_);
    timed(backend_, time_.weights_s, [&] { teacher.set_float(weights); });
    timed(backend_, time_.streams_s, [&] { advance(teacher, out, in); });
  }

  // Passes stream t through the block, with the masters and width that are loaded.
  void advance_stage(size_t t) {
    LlamaBlock& block = trainer_->quantized_block();
    for (size_t p = 0; p < streams_.precisions(); ++p) {
      if (streams_.precisions() > 1) block.select_precision(p);
      advance(block, streams_.stage(t, p), streams_.stage(t, p));
    }
  }

  LayerResult finished_result(int64_t layer, size_t t) const {
    return run_.stage_result(layer, static_cast<int64_t>(t), recipe_, model_);
  }

  // Computes the streams after the first `blocks` blocks, which are finished.
  void recompute_streams(int64_t blocks) {
    const int64_t passes = block_stages(config_) + 1;
    engine::Progress progress =
        observer_.progress("resuming", blocks * passes, engine::Progress::kPatience_s);
    const auto advanced = [&](int64_t block, int64_t done) {
      backend_.synchronize();  // otherwise progress would run ahead of the device
      progress.set(block * passes + done, cat("block ", block + 1, "/", blocks));
    };
    for (int64_t block = 0; block < blocks; ++block) {
      if (config_.target == Target::Full)
        advance_teacher(block, full_precision(block), streams_.full(), streams_.full());
      enter(block);
      advanced(block, 1);
      for (size_t t = 0; t < config_.stages.size(); ++t) {
        trainer_->load(block, t, finished_result(block, t));
        advance_stage(t);
        advanced(block, static_cast<int64_t>(t) + 2);
      }
    }
  }

  void finish_write() {
    if (writing_.valid()) writing_.get();
  }
  // Rethrows a write error now, for instance a full disk, not a stage later.
  void finish_write_if_done() {
    if (writing_.valid() && writing_.wait_for(std::chrono::seconds(0)) == std::future_status::ready)
      writing_.get();
  }

  void show(const Position& at) {
    if (!progress_) return;
    const int64_t stages = at.block * block_stages(config_) + at.stage;
    progress_->set(
        stages * steps_per_stage(config_) + at.step,
        cat("block ", at.block + 1, "/", model_.layers, " ", recipe_.stage_name(at.stage)));
  }

  Backend& backend_;
  const Checkpoint& source_;
  const TrainConfig& config_;
  const RunDirectory& run_;
  const Observer& observer_;
  const LlamaConfig& model_;
  const Recipe& recipe_;
  const models::Recompute recompute_;
  StreamSet streams_;
  Tensor inv_freq_;
  std::optional<StageTrainer> trainer_;
  std::optional<SavedState> saved_;  // until its stage has loaded it
  std::optional<engine::Progress> progress_;
  BlockTime time_;                // of the current block
  std::vector<BlockTime> times_;  // of blocks trained whole by this process, except the last block
  // The last members: their destructors wait for threads that use the other members.
  std::future<LayerResult> next_weights_;
  std::future<void> writing_;  // the newest stage's file
};

}  // namespace

Rehearsal rehearse_blocks(engine::CountingBackend& backend, const Checkpoint& source,
                          const TrainConfig& config, models::Recompute recompute,
                          const StreamPlan& streams) {
  DryRun<BlockPhase> dry(backend, source, blank_windows(config), without_comm(config),
                         {.quiet = true}, recompute, streams);
  dry.phase.rehearse();
  return {backend.recorded_bytes(), dry.phase.trainer().state_bytes()};
}

StepProbe probe_block_step(Backend& backend, const Checkpoint& source, const data::Windows& windows,
                           const TrainConfig& config, const BlockMemory& memory) {
  const auto dry = std::make_shared<DryRun<BlockPhase>>(
      backend, source, windows, config, Observer(), memory.recompute, memory.streams);
  dry->phase.begin();
  return {[dry](StepPart last) { return dry->phase.trainer().record(0, 0, last); },
          [dry] { dry->phase.rewind(); }};
}

void train_blocks(Backend& backend, const Checkpoint& source, const data::Windows& windows,
                  const TrainConfig& config, const Recipe& recipe, const BlockMemory& memory,
                  const RunDirectory& run, const Observer& observer) {
  const int64_t finished = run.finished_stages(config, source.config().layers);
  std::optional<SavedState> saved = run.resume_blocks(config, finished);
  BlockPhase(backend, source, windows, config, recipe, run, observer, memory.recompute,
             memory.streams)
      .run(finished, std::move(saved));
}

}  // namespace bbb::train
