#include "train/end_to_end.h"

#include <filesystem>
#include <optional>

#include "autograd/ops.h"
#include "engine/progress.h"
#include "train/run_file.h"
#include "train/sample_order.h"
#include "train/step_loop.h"
#include "train/step_probe.h"
#include "train/student.h"

namespace bbb::train {
namespace {

using autograd::LossKind;
using autograd::Tape;
using autograd::TapeMode;
using autograd::Var;
using engine::DType;
using engine::Write;
using models::LayerResult;
using models::Llama;
using models::LlamaConfig;

constexpr uint64_t kOrderSeed = 0;  // block training's sub-seeds start at 1

class EndToEnd {
 public:
  EndToEnd(Backend& backend, const Checkpoint& source, const data::Windows& windows,
           const TrainConfig& config, models::Recompute recompute, const RunDirectory& run,
           const Observer& observer)
      : backend_(backend),
        config_(config),
        recompute_(recompute),
        run_(run),
        observer_(observer),
        model_(source.config()),
        recipe_(config, model_),
        student_(backend, source, config) {
    load(source);
    optimizer_.emplace(student_.parameters(), student_.quantizer(), engine::AdamWSpec{},
                       schedule_of(config.e2e_lr, config.e2e_steps));
    loop_.emplace(backend, run, config.e2e_steps, config.e2e_batch * config.seq_len, recompute,
                  config.save_every);
    loss_ = backend.empty({1}, backend.real());
    upload_windows(windows);
  }

  void run() {
    Position at;
    if (std::filesystem::exists(run_.e2e_state_file()))
      at = load_state();
    else if (config_.e2e_snap == Snap::On)
      student_.snap();
    rewind(at.step);
    run_.keep_log([&](const Json& line) {
      return line.value("phase", "") != "e2e" || line.value("step", int64_t{0}) < at.step;
    });
    student_.prepare();
    std::vector<std::unique_ptr<engine::Replay>> steps;
    steps.push_back(record(StepPart::Optimizer));

    std::optional<engine::Progress> progress;
    if (!observer_.quiet) progress.emplace("end to end", config_.e2e_steps);
    StepHooks hooks;
    hooks.line = [](int64_t) { return Json{{"phase", "e2e"}}; };
    hooks.save = [this](const Position& position) {
      save_state(run_.e2e_state_file(), run_.checksum(), position, backend_, state());
    };
    hooks.show = [&](const Position& position, float loss) {
      if (progress) progress->set(position.step, cat("loss ", loss));
    };
    hooks.after_step = [this](const Position& position) {
      if (observer_.after_e2e_step) observer_.after_e2e_step(position.step);
    };
    loop_->restart_timer();
    const StepLoop::Outcome outcome = loop_->run(steps, at, config_.e2e_steps, hooks);
    BBB_CHECK(outcome.skipped < config_.e2e_steps,
              "end to end: every step was skipped, its loss or gradient was not finite");
    write_final();
    run_.remove_spent_states(config_, model_.layers);
  }

  // Sets both cursors, so that the next step is `step`.
  void rewind(int64_t step) {
    const int32_t micro = static_cast<int32_t>(step * config_.e2e_batch / config_.e2e_micro_batch);
    backend_.upload(cursor_, &micro);
    loop_->rewind(step);
  }

  // Call prepare() first: a recorded step relies on the measured ranges of the masters.
  std::unique_ptr<engine::Replay> record(StepPart last) {
    return backend_.record([this, last] { step(last); });
  }

  Student& student() { return student_; }

 private:
  // Loads the student and, unless the loss is cross-entropy, the teacher.
  void load(const Checkpoint& source) {
    const bool has_teacher = config_.e2e_loss != EndToEndLoss::CrossEntropy;
    std::optional<engine::Progress> progress;
    if (!observer_.quiet)
      progress.emplace("loading", (has_teacher ? 2 : 1) * model_.layers,
                       engine::Progress::kPatience_s);
    const auto loaded = [&](int64_t layers) {
      if (progress) progress->set(layers);
    };
    student_.load(
        [&](int64_t layer) { return block_result(run_, recipe_, config_, source, layer); }, loaded);
    if (!has_teacher) return;
    teacher_.emplace(backend_, source, models::HeadRounding::BFloat16);
    teacher_->load_blocks(source, [&](int64_t layers) { loaded(model_.layers + layers); });
  }

  // Windows, targets (the next token; -1 for the last token of a window), and the windows of all
  // steps.
  void upload_windows(const data::Windows& windows) {
    const int64_t seq = config_.seq_len;
    const std::vector<int32_t> ids(windows.ids.begin(),
                                   windows.ids.begin() + config_.samples * seq);
    std::vector<int32_t> targets(ids.begin() + 1, ids.end());
    targets.push_back(-1);
    for (size_t i = static_cast<size_t>(seq) - 1; i < targets.size(); i += static_cast<size_t>(seq))
      targets[i] = -1;
    ids_ = backend_.empty({config_.samples, seq}, DType::I32);
    targets_ = backend_.empty({config_.samples, seq}, DType::I32);
    backend_.upload(ids_, ids.data());
    backend_.upload(targets_, targets.data());

    const std::vector<int32_t> order =
        sample_order(sub_seed(config_.seed, kOrderSeed, 0), config_.samples, config_.e2e_batch,
                     config_.e2e_steps);
    order_ = backend_.empty({static_cast<int64_t>(order.size())}, DType::I32);
    backend_.upload(order_, order.data());
    cursor_ = backend_.empty({1}, DType::I32);
  }

  // Recorded: one optimizer step.
  void step(StepPart last) {
    student_.quantize();
    for (int64_t done = 0; done < config_.e2e_batch; done += config_.e2e_micro_batch)
      accumulate(done == 0 ? Write::Overwrite : Write::Add, last);
    if (last < StepPart::Backward) return;
    student_.finish_backward();
    if (last == StepPart::Backward) return;
    optimizer_->step(loss_);
    loop_->end_step(*optimizer_);
  }

  void accumulate(Write mode, StepPart last) {
    const int64_t rows = config_.e2e_micro_batch, seq = config_.seq_len, tokens = rows * seq;
    const Tensor ids = backend_.empty({rows, seq}, DType::I32);
    const Tensor targets = backend_.empty({rows, seq}, DType::I32);
    backend_.gather_rows(ids, {ids_, order_, cursor_});
    backend_.gather_rows(targets, {targets_, order_, cursor_});
    backend_.advance(cursor_);
    if (last == StepPart::Quantize) return;

    Tape tape(backend_, TapeMode::Training);
    Tensor teacher_h;
    Var h;
    const auto teacher_forward = [&] {
      if (!teacher_) return;
      Tape inference(backend_, TapeMode::Inference);
      teacher_h = teacher_->forward(inference, ids, nullptr, models::Recompute::None)
                      .value()
                      .view({tokens, model_.d_model});
    };
    const auto student_forward = [&] {
      h = autograd::reshape(tape, student_.model().forward(tape, ids, nullptr, recompute_),
                            {tokens, model_.d_model});
    };
    backend_.overlap(teacher_forward, student_forward);
    const LossKind kind = !teacher_                              ? LossKind::CrossEntropy
                          : config_.e2e_loss == EndToEndLoss::Kl ? LossKind::Kl
                                                                 : LossKind::JensenShannon;
    const double scale = 1.0 / static_cast<double>(config_.e2e_batch * (seq - 1));
    const Var loss = autograd::head_loss(
        tape, kind, h, student_.model().head(), targets.view({tokens}), teacher_h, scale,
        models::head_chunks(models::head_budget(backend_), tokens, model_.vocab, backend_.act()),
        Tensor(), config_.e2e_jsd_beta);
    if (last == StepPart::Forward) return;
    tape.backward(loss);
    backend_.sum(loss_, loss.value(), 1.0, mode);
  }

  NamedTensors state() const { return optimizer_state(student_.parameters(), *optimizer_); }

  Position load_state() const {
    const SavedState saved(run_.e2e_state_file(), run_.checksum());
    const int64_t step = saved.position().step;
    BBB_CHECK(step > 0 && step < config_.e2e_steps, run_.e2e_state_file(), ": step ", step, " of ",
              config_.e2e_steps);
    saved.load(backend_, state());
    return saved.position();
  }

  void write_final() {
    student_.prepare();
    const models::LinearContent content = final_content(config_);
    std::vector<data::SafeTensorsWriter::Entry> entries;
    for (int64_t layer = 0; layer < model_.layers; ++layer)
      models::declare_layer(entries, layer, model_, recipe_.result_formats(layer), content);
    RunFileWriter writer(run_.final_file(), run_.checksum(), entries);
    for (auto& block : student_.model().blocks())
      models::add_layer(writer, block->layer(), model_, block->result(content), content);
    writer.finish();
  }

  Backend& backend_;
  const TrainConfig& config_;
  const models::Recompute recompute_;
  const RunDirectory& run_;
  const Observer& observer_;
  const LlamaConfig& model_;
  const Recipe recipe_;

  Student student_;
  std::optional<Llama> teacher_;
  std::optional<autograd::Optimizer> optimizer_;
  std::optional<StepLoop> loop_;
  Tensor ids_, targets_;  // I32 (samples, T)
  Tensor order_;          // I32 (steps * e2e_batch): the windows of all steps
  Tensor cursor_;         // I32 (1): the micro-batch, counted over all steps
  Tensor loss_;           // real (1): the loss of the whole step
};

}  // namespace

int64_t rehearse_end_to_end(engine::CountingBackend& backend, const Checkpoint& source,
                            const TrainConfig& config, models::Recompute recompute) {
  TrainConfig from_weights = config;
  from_weights.stages.clear();  // so that no stage file is read; memory does not depend on it
  data::Windows windows;
  windows.seq_len = config.seq_len;
  windows.count = config.samples;
  windows.ids.resize(static_cast<size_t>(windows.count * windows.seq_len));
  const RunDirectory run(config.out);
  Observer quiet;
  quiet.quiet = true;
  EndToEnd phase(backend, source, windows, from_weights, recompute, run, quiet);
  phase.student().prepare();
  const auto step = phase.record(StepPart::Optimizer);
  step->run();
  return backend.recorded_bytes();
}

StepProbe probe_end_to_end_step(Backend& backend, const Checkpoint& source,
                                const data::Windows& windows, const TrainConfig& config,
                                const PhaseMemory& memory) {
  BBB_ASSERT(config.stages.empty());
  struct Held {
    TrainConfig config;
    RunDirectory run;  // names no file as long as nothing is saved
    Observer observer;
    std::optional<EndToEnd> phase;
  };
  const std::shared_ptr<Held> held(new Held{config, RunDirectory(config.out), {}, {}});
  held->phase.emplace(backend, source, windows, held->config, memory.recompute, held->run,
                      held->observer);
  held->phase->student().prepare();
  held->phase->rewind(0);
  return {[held](StepPart last) { return held->phase->record(last); },
          [held] { held->phase->rewind(0); }};
}

void train_end_to_end(Backend& backend, const Checkpoint& source, const data::Windows& windows,
                      const TrainConfig& config, models::Recompute recompute,
                      const RunDirectory& run, const Observer& observer) {
  EndToEnd(backend, source, windows, config, recompute, run, observer).run();
}

LayerResult block_result(const RunDirectory& run, const Recipe& recipe, const TrainConfig& config,
                         const Checkpoint& source, int64_t layer) {
  if (config.stages.empty()) return models::full_precision(source, layer);
  const int64_t last = static_cast<int64_t>(config.stages.size()) - 1;
  return run.stage_result(layer, last, recipe, source.config());
}

}  // namespace bbb::train
