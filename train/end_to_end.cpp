#include "train/end_to_end.h"

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <optional>

#include "autograd/ops.h"
#include "train/dry_run.h"
#include "train/loss_weights.h"
#include "train/oscillation.h"
#include "train/run_file.h"
#include "train/step_loop.h"
#include "train/step_probe.h"
#include "train/teacher.h"
#include "train/token_batches.h"

namespace bbb::train {
namespace {

using autograd::LossKind;
using autograd::Tape;
using autograd::TapeMode;
using autograd::Var;
using engine::DType;
using engine::Write;
using models::LayerResult;
using models::LlamaConfig;

// One stage of the whole model.
class EndToEnd {
 public:
  EndToEnd(Backend& backend, const Checkpoint& source, const data::Windows& windows,
           const TrainConfig& config, const Recipe& recipe, const RunDirectory& run,
           const Observer& observer, models::Recompute recompute, TeacherStates states,
           size_t stage, const StartOfModel& start)
      : backend_(backend),
        config_(config),
        recompute_(recompute),
        run_(run),
        observer_(observer),
        model_(source.config()),
        recipe_(recipe),
        stage_(stage),
        steps_(recipe.whole_stages()[stage].steps),
        student_(backend, source, config, recipe, stage) {
    batches_.emplace(backend, windows, config, stage, steps_);
    load(source, start, caches_teacher(config, steps_, states) ? states : TeacherStates::Beside);
    optimizer_.emplace(student_.parameters(), student_.quantizer(), engine::AdamWSpec{},
                       schedule_of(recipe.whole_stages()[stage].lr, steps_));
    oscillation_.emplace(backend, config, student_);
    loop_.emplace(backend, run, steps_, config.e2e_batch * config.seq_len, recompute,
                  config.save_every, is_sharded() ? config.comm.get() : nullptr);
    loss_ = backend.empty({1}, backend.real());
    const std::vector<double> factors = batches_->loss_factors();
    masked_ = !factors.empty();
    gradients_.emplace(*config.comm, student_.parameters());
    const size_t precisions = Recipe::precisions(config);
    if (precisions > 1 || masked_) weights_.emplace(backend, precisions, steps_, factors);
  }

  void run() {
    if (config_.e2e_snap == Snap::On && stage_ == 0) student_.snap();  // sets the ratios, too
    const std::string& name = recipe_.whole_stages()[stage_].name;
    Position at{0, static_cast<int64_t>(stage_), 0, {}};
    if (const std::optional<SavedState> saved = run_.resume_whole(stage_, steps_)) {
      saved->load(backend_, state());
      at = saved->position();
    } else {
      oscillation_->start();
    }
    rewind(at.step);
    student_.prepare();
    std::vector<std::unique_ptr<engine::Replay>> steps;
    steps.push_back(record(StepPart::Optimizer));

    engine::Progress progress = observer_.progress(cat("end to end ", name), steps_);
    StepHooks hooks;
    hooks.line = [&](int64_t) {
      return Json{{"phase", "e2e"}, {"stage", name}, {"stage_number", stage_}};
    };
    hooks.save = [this](const Position& position) {
      if (run_.writes() || is_sharded())
        save_state(run_.writes() ? run_.e2e_state_file() : "", run_.checksum(), position, backend_,
                   state());
    };
    hooks.show = [&](const Position& position, float loss) {
      char note[32];  // "loss -1.234e-38" at the longest
      std::snprintf(note, sizeof note, "loss %.4g", loss);
      progress.set(position.step, note);
    };
    hooks.after_step = [this](const Position& position) {
      if (observer_.after_e2e_step) observer_.after_e2e_step(position.step);
    };
    loop_->restart_timer();
    const StepLoop::Outcome outcome = loop_->run(steps, at, steps_, hooks);
    BBB_CHECK(outcome.skipped < steps_, "end to end, ", name,
              ": every step was skipped, its loss or gradient was not finite");
    oscillation_->finish();
    if (run_.writes() || is_sharded()) student_.write_result(run_);
    if (run_.writes()) std::filesystem::remove(run_.e2e_state_file());
  }

  // Sets both cursors, so that the next step is `step`.
  void rewind(int64_t step) {
    batches_->rewind(step);
    loop_->rewind(step);
  }

  // Call prepare() first: a recorded step relies on the measured ranges of the masters.
  std::unique_ptr<engine::Replay> record(StepPart last) {
    return backend_.record([this, last] { step(last); });
  }

  Student& student() { return student_; }
  bool is_sharded() { return student_.parameters().sharded_elements() > 0; }

  // All tensors that steps change.
  NamedTensors state() const {
    NamedTensors state = optimizer_state(student_.parameters(), *optimizer_);
    oscillation_->add_state(state);
    return state;
  }

 private:
  // Loads, unless the loss is cross-entropy, the teacher, and then the student: a cached teacher's
  // weights are gone by then.
  void load(const Checkpoint& source, const StartOfModel& start, TeacherStates states) {
    if (config_.e2e_loss != EndToEndLoss::CrossEntropy)
      teacher_.emplace(backend_, source, *batches_, config_, states, observer_);
    engine::Progress progress =
        observer_.progress("loading", model_.layers, engine::Progress::kPatience_s);
    student_.load(start, [&](int64_t layers) { progress.set(layers); });
  }

  // Recorded: one optimizer step.
  void step(StepPart last) {
    student_.quantize();
    if (weights_) step_weights_ = weights_->at(loop_->cursor());
    const int64_t batch = own_e2e_batch(config_), micro = own_micro_batch(config_);
    for (int64_t done = 0; done < batch; done += micro)
      accumulate({done == 0, done + micro == batch}, last);
    if (last < StepPart::Backward) return;
    if (masked_) backend_.scale(loss_, step_weights_.slice(0, 1));  // the first precision's: factor
    gradients_->join();
    student_.finish_backward();
    if (last == StepPart::Backward) return;
    gradients_->finish(loss_);
    oscillation_->change_gradients(optimizer_->control());
    optimizer_->step(loss_);
    oscillation_->average(optimizer_->control());
    loop_->end_step(*optimizer_);
  }

  // `of_step`: the micro-batch's place in the step.
  void accumulate(GradientAverage::Pass of_step, StepPart last) {
    const int64_t seq = config_.seq_len, tokens = own_micro_batch(config_) * seq;
    const TokenBatches::Batch batch = batches_->next(teacher_ ? teacher_->states() : Tensor());
    if (last == StepPart::Quantize) return student_.join();

    Tensor teacher_h;
    for (size_t p = 0; p < Recipe::precisions(config_); ++p) {
      Tape tape(backend_, TapeMode::Training);
      Var h;
      const auto teacher_forward = [&] {
        if (teacher_ && p == 0) teacher_h = teacher_->hidden(batch);
      };
      const auto student_forward = [&] {
        student_.join();
        if (Recipe::precisions(config_) > 1) student_.select_precision(p);
        h = autograd::reshape(
            tape, student_.model().forward(tape, batch.ids, nullptr, recompute_, batch.first_key),
            {tokens, model_.d_model});
      };
      backend_.overlap(teacher_forward, student_forward);
      const LossKind kind = !teacher_                              ? LossKind::CrossEntropy
                            : config_.e2e_loss == EndToEndLoss::Kl ? LossKind::Kl
                                                                   : LossKind::JensenShannon;
      autograd::TeacherHead teacher;
      if (teacher_) teacher = {teacher_h, teacher_->head()};
      const double scale = 1.0 / static_cast<double>(own_e2e_batch(config_) * (seq - 1));
      const Var loss = autograd::head_loss(
          tape, kind, h, student_.model().head_var(), batch.targets.view({tokens}), teacher, scale,
          models::head_chunks(models::head_budget(backend_), tokens, model_.vocab, backend_.act()),
          Tensor(), config_.e2e_jsd_beta,
          weights_ ? step_weights_.slice(static_cast<int64_t>(p), 1) : Tensor());
      if (last == StepPart::Forward) continue;
      const bool starts = of_step.first && p == 0;
      gradients_->begin_pass({starts, of_step.last && p + 1 == Recipe::precisions(config_)});
      tape.backward(loss);
      backend_.sum(loss_, loss.value(), 1.0, starts ? Write::Overwrite : Write::Add);
    }
  }

  Backend& backend_;
  const TrainConfig& config_;
  const models::Recompute recompute_;
  const RunDirectory& run_;
  const Observer& observer_;
  const LlamaConfig& model_;
  const Recipe& recipe_;
  const size_t stage_;
  const int64_t steps_;

  Student student_;
  std::optional<Teacher> teacher_;
  std::optional<GradientAverage> gradients_;  // over the ranks
  std::optional<autograd::Optimizer> optimizer_;
  std::optional<Oscillation> oscillation_;
  std::optional<StepLoop> loop_;
  std::optional<TokenBatches> batches_;
  Tensor loss_;                         // real (1): the loss of the whole step, over all precisions
  bool masked_ = false;                 // some token of some step does not count
  std::optional<LossWeights> weights_;  // of several precisions, or of a masked loss
  Tensor step_weights_;                 // real (precisions): those of the step that is recorded
};

}  // namespace

// The full-precision model. `source` must outlive the result.
static StartOfModel start_of(const Checkpoint& source) {
  return {[&source](int64_t layer) { return models::full_precision(source, layer); }, nullptr};
}

Rehearsal rehearse_end_to_end(engine::CountingBackend& backend, const Checkpoint& source,
                              const TrainConfig& config, models::Recompute recompute,
                              TeacherStates states) {
  Rehearsal most;
  const size_t stages = Recipe(config, source.config()).whole_stages().size();
  for (size_t stage = 0; stage < stages; ++stage) {
    DryRun<EndToEnd> dry(backend, source, blank_windows(config), without_comm(config),
                         {.quiet = true}, recompute, states, stage, start_of(source));
    dry.phase.student().prepare();
    const auto step = dry.phase.record(StepPart::Optimizer);
    step->run();
    if (learns_whole_grid(config))  // the result is codes, of one linear after another
      for (const models::QuantLinear* linear :
           dry.phase.student().model().blocks().front()->linears())
        linear->quantized();
    most.recorded_bytes = std::max(most.recorded_bytes, backend.recorded_bytes());
    most.state_bytes = std::max(most.state_bytes, bytes_of(dry.phase.state()));
  }
  return most;
}

StepProbe probe_end_to_end_step(Backend& backend, const Checkpoint& source,
                                const data::Windows& windows, const TrainConfig& config,
                                const PhaseMemory& memory) {
  BBB_ASSERT(config.stages.empty());
  const auto dry = std::make_shared<DryRun<EndToEnd>>(backend, source, windows, config, Observer(),
                                                      memory.recompute, memory.teacher, size_t{0},
                                                      start_of(source));
  dry->phase.student().prepare();
  dry->phase.rewind(0);
  return {[dry](StepPart last) { return dry->phase.record(last); },
          [dry] { dry->phase.rewind(0); }};
}

void train_end_to_end(Backend& backend, const Checkpoint& source, const data::Windows& windows,
                      const TrainConfig& config, const Recipe& recipe, const StartOfModel& start,
                      const PhaseMemory& memory, const RunDirectory& run,
                      const Observer& observer) {
  const size_t stages = recipe.whole_stages().size();
  for (size_t stage = 0; stage < stages; ++stage) {
    if (std::filesystem::exists(run.whole_stage_file(recipe, stage))) continue;
    std::optional<data::SafeTensors> before;
    if (stage > 0)
      before.emplace(open_run_file(run.whole_stage_file(recipe, stage - 1), run.checksum(),
                                   "delete it, and the run trains from there again"));
    const auto layer_before = [&](int64_t layer) {
      return models::read_layer(*before, layer, source.config(),
                                recipe.whole_formats(layer, stage - 1));
    };
    EndToEnd(backend, source, windows, config, recipe, run, observer, memory.recompute,
             memory.teacher, stage,
             before ? StartOfModel{layer_before, models::outer_of(*before)} : start)
        .run();
    config.comm->barrier();  // the next stage reads the file
  }
}

}  // namespace bbb::train
