#include "train/end_to_end.h"

#include <chrono>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <optional>

#include "autograd/ops.h"
#include "engine/progress.h"
#include "train/run_file.h"
#include "train/sample_order.h"
#include "train/saved_state.h"
#include "train/step_probe.h"

namespace bbb::train {
namespace {

using autograd::AdamW;
using autograd::GradientPasses;
using autograd::LossKind;
using autograd::Parameter;
using autograd::ParameterSet;
using autograd::Tape;
using autograd::TapeMode;
using autograd::Var;
using data::FileDType;
using data::SafeTensorsWriter;
using engine::DType;
using engine::Schedule;
using engine::Tensor;
using engine::Write;
using models::LayerResult;
using models::Llama;
using models::LlamaBlock;
using models::LlamaConfig;
using models::QuantLinear;

// The log comes back from the device this often: reading it makes a GPU wait.
int64_t steps_per_reading(const Backend& backend) {
  return backend.device() == engine::DeviceType::Cuda ? 20 : 1;
}

GradientPasses gradient_passes(const TrainConfig& config) {
  return config.e2e_batch == config.e2e_micro_batch ? GradientPasses::One : GradientPasses::Several;
}

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
        student_(backend, source, models::HeadRounding::BFloat16),
        parameters_(backend, gradient_passes(config)) {
    load(source);

    Schedule schedule;
    schedule.peak_lr = config.e2e_lr;
    schedule.warmup_steps = std::llround(0.03 * static_cast<double>(config.e2e_steps));
    schedule.total_steps = config.e2e_steps;
    optimizer_.emplace(parameters_, engine::AdamWSpec{}, schedule);
    log_ = backend.empty({config.e2e_steps, engine::kControlSize}, backend.real());
    loss_ = backend.empty({1}, backend.real());
    upload_windows(windows);
  }

  void run() {
    Position at;
    if (std::filesystem::exists(run_.e2e_state_file()))
      at = load_state();
    else if (config_.e2e_snap == Snap::On)
      snap();
    int64_t& step = at.step;
    upload_cursors(step);
    run_.keep_log([&](const Json& line) {
      return line.value("phase", "") != "e2e" || line.value("step", int64_t{0}) < step;
    });
    prepare();
    const auto replay = record(StepPart::Optimizer);

    std::optional<engine::Progress> progress;
    if (!observer_.quiet) progress.emplace("end to end", config_.e2e_steps);
    int64_t logged = step;
    SaveTimer timer(config_.save_every);
    auto since = std::chrono::steady_clock::now();
    while (step < config_.e2e_steps) {
      replay->run();
      ++step;
      const bool last = step == config_.e2e_steps, save = !last && timer.due(step);
      if (last || save || step % steps_per_reading(backend_) == 0) {
        backend_.synchronize();
        const auto now = std::chrono::steady_clock::now();
        log_steps(logged, step, std::chrono::duration<double>(now - since).count());
        logged = step;
        if (save) {
          save_state(run_.e2e_state_file(), run_.checksum(), at, backend_, state());
          timer.saved(now);
        }
        since = std::chrono::steady_clock::now();
      }
      if (progress) progress->set(step, cat("loss ", last_loss_));
      if (observer_.after_e2e_step) observer_.after_e2e_step(step);
    }
    BBB_CHECK(skipped_ < config_.e2e_steps,
              "end to end: every step was skipped, its loss or gradient was not finite");
    write_final();
    run_.remove_spent_states(config_, model_.layers);
  }

  // Puts the step's cursors before the step of this number.
  void upload_cursors(int64_t step) {
    const int32_t micro = static_cast<int32_t>(step * config_.e2e_batch / config_.e2e_micro_batch);
    const int32_t whole = static_cast<int32_t>(step);
    backend_.upload(cursor_, &micro);
    backend_.upload(step_cursor_, &whole);
  }

  // After prepare(): a step finds every buffer, and the ranges of the masters as they are.
  std::unique_ptr<engine::Replay> record(StepPart last) {
    return backend_.record([this, last] { step(last); });
  }

  // The GEMMs' operands from parameters that anything may have written.
  void prepare() {
    if (config_.e2e_train == EndToEndTrain::All)
      parameters_.prepare();
    else
      for (auto& block : student_.blocks()) block->prepare_scales();
  }

 private:
  engine::WeightGrid spec() const { return {config_.bits, config_.group}; }

  // Weights of the student, and of the teacher where there is one.
  void load(const Checkpoint& source) {
    const bool kl = config_.e2e_loss == EndToEndLoss::Kl;
    std::optional<engine::Progress> progress;
    if (!observer_.quiet)
      progress.emplace("loading", (kl ? 2 : 1) * model_.layers, engine::Progress::kPatience_s);
    const auto loaded = [&](int64_t layers) {
      if (progress) progress->set(layers);
    };
    if (config_.e2e_train == EndToEndTrain::All)
      bind_masters(source, loaded);
    else
      bind_scales(source, loaded);
    if (!kl) return;
    teacher_.emplace(backend_, source, models::HeadRounding::BFloat16);
    teacher_->load_blocks(source, [&](int64_t layers) { loaded(model_.layers + layers); });
  }

  // All: the blocks' linears, through the quantizer, and norms.
  void bind_masters(const Checkpoint& source, const std::function<void(int64_t)>& loaded) {
    for (auto& block : student_.blocks()) block->declare_parameters(parameters_);
    parameters_.allocate();
    for (auto& block : student_.blocks()) {
      block->bind_parameters(parameters_, spec());
      block->set_masters(block_result(run_, recipe_, config_, source, block->layer()));
      loaded(block->layer() + 1);
    }
  }

  // Scales: sigma over frozen codes. A block's masters live only until its codes are taken.
  void bind_scales(const Checkpoint& source, const std::function<void(int64_t)>& loaded) {
    std::vector<Parameter*> sigmas;
    for (auto& block : student_.blocks())
      for (QuantLinear* linear : block->linears())
        sigmas.push_back(&parameters_.add(linear->name() + ".sigma",
                                          {linear->n(), linear->k() / config_.group}));
    parameters_.allocate();
    size_t next = 0;
    for (auto& block : student_.blocks()) {
      ParameterSet masters(backend_, GradientPasses::One);
      block->declare_parameters(masters);
      masters.allocate();
      block->bind_parameters(masters, spec());
      block->set_masters(block_result(run_, recipe_, config_, source, block->layer()));
      masters.prepare();
      for (QuantLinear* linear : block->linears()) linear->set_scales(*sigmas[next++]);
      for (models::NormWeight* norm : {&block->input_norm(), &block->post_norm()}) {
        const Tensor value = backend_.empty(norm->value.shape(), backend_.real());
        backend_.copy(value, norm->value);
        norm->set_constant(value);
      }
      loaded(block->layer() + 1);
    }
  }

  void snap() {
    parameters_.prepare();
    for (auto& block : student_.blocks()) block->snap();
  }

  // As prepare(), at the start of a step: nothing but the optimizer has written them since
  // prepare().
  void quantize() {
    if (config_.e2e_train == EndToEndTrain::All)
      parameters_.quantize();
    else
      prepare();
  }

  // Windows, their shifted targets (-1 behind the last token) and the order of all steps.
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
    step_cursor_ = backend_.empty({1}, DType::I32);
  }

  // Recorded: one optimizer step.
  void step(StepPart last) {
    quantize();
    for (int64_t done = 0; done < config_.e2e_batch; done += config_.e2e_micro_batch)
      accumulate(done == 0 ? Write::Overwrite : Write::Add, last);
    if (last < StepPart::Backward) return;
    for (auto& block : student_.blocks()) block->finish_backward();
    if (last == StepPart::Backward) return;
    optimizer_->step(loss_);
    backend_.log_control(log_, optimizer_->control(), step_cursor_);
    backend_.advance(step_cursor_);
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
    const auto teach = [&] {
      if (!teacher_) return;
      Tape inference(backend_, TapeMode::Inference);
      teacher_h = teacher_->forward(inference, ids, nullptr, models::Recompute::None)
                      .value()
                      .view({tokens, model_.d_model});
    };
    const auto study = [&] {
      h = autograd::reshape(tape, student_.forward(tape, ids, nullptr, recompute_),
                            {tokens, model_.d_model});
    };
    backend_.beside(teach, study);
    const LossKind kind = teacher_ ? LossKind::Kl : LossKind::CrossEntropy;
    const double scale = 1.0 / static_cast<double>(config_.e2e_batch * (seq - 1));
    const Var loss = autograd::head_loss(
        tape, kind, h, student_.head(), targets.view({tokens}), teacher_h, scale,
        models::head_chunks(models::head_budget(backend_), tokens, model_.vocab, backend_.act()),
        Tensor());
    if (last == StepPart::Forward) return;
    tape.backward(loss);
    backend_.sum(loss_, loss.value(), 1.0, mode);
  }

  void log_steps(int64_t begin, int64_t end, double seconds) {
    const std::vector<float> slots =
        models::download_floats(backend_, log_.rows(begin, end - begin));
    const double tokens =
        static_cast<double>((end - begin) * config_.e2e_batch * config_.seq_len) / seconds;
    std::vector<Json> lines;
    for (int64_t i = begin; i < end; ++i) {
      const float* control = &slots[static_cast<size_t>((i - begin) * engine::kControlSize)];
      Json line;
      line["phase"] = "e2e";
      line["step"] = i;
      add_measures(line, control, tokens, backend_.memory_peak_bytes());
      line["recompute"] = models::to_string(recompute_);
      lines.push_back(std::move(line));
      last_loss_ = control[engine::kLoss];
      skipped_ = std::llround(control[engine::kSkipped]);
    }
    run_.append_log(lines);
  }

  NamedTensors state() const {
    return {{"masters", parameters_.masters()},
            {"m", parameters_.m()},
            {"v", parameters_.v()},
            {"control", optimizer_->control()}};
  }

  Position load_state() const {
    const SavedState saved(run_.e2e_state_file(), run_.checksum());
    const int64_t step = saved.position().step;
    BBB_CHECK(step > 0 && step < config_.e2e_steps, run_.e2e_state_file(), ": step ", step, " of ",
              config_.e2e_steps);
    saved.load(backend_, state());
    return saved.position();
  }

  void write_final() {
    prepare();
    const models::LinearContent content = final_content(config_);
    std::vector<SafeTensorsWriter::Entry> entries;
    for (int64_t layer = 0; layer < model_.layers; ++layer)
      models::declare_layer(entries, layer_prefix(layer), model_, recipe_.result_formats(layer),
                            content);
    RunFileWriter writer(run_.final_file(), run_.checksum(), entries);
    for (auto& block : student_.blocks())
      models::add_layer(writer, layer_prefix(block->layer()), model_, block->result(content),
                        content);
    writer.finish();
  }

  Backend& backend_;
  const TrainConfig& config_;
  const models::Recompute recompute_;
  const RunDirectory& run_;
  const Observer& observer_;
  const LlamaConfig& model_;
  const Recipe recipe_;

  Llama student_;
  std::optional<Llama> teacher_;
  ParameterSet parameters_;
  std::optional<AdamW> optimizer_;
  Tensor ids_, targets_;  // I32 (samples, T)
  Tensor order_;          // I32: windows of all steps
  Tensor cursor_;         // I32 (1): the micro-batch
  Tensor step_cursor_;    // I32 (1): the optimizer step
  Tensor log_;            // real (steps, kControlSize)
  Tensor loss_;           // real (1): of the whole step
  float last_loss_ = 0;
  int64_t skipped_ = 0;
};

class EndToEndProbe final : public StepProbe {
 public:
  EndToEndProbe(Backend& backend, const Checkpoint& source, const data::Windows& windows,
                const TrainConfig& config)
      : config_(config),
        run_(config.out),
        phase_(backend, source, windows, config_,
               plan_end_to_end_memory(backend, source.config(), config_).recompute, run_,
               observer_) {
    phase_.prepare();
    phase_.upload_cursors(0);
  }
  std::unique_ptr<engine::Replay> record(StepPart last) override { return phase_.record(last); }
  void rewind() override { phase_.upload_cursors(0); }

 private:
  const TrainConfig config_;
  const RunDirectory run_;  // names no file as long as nothing is saved
  const Observer observer_{};
  EndToEnd phase_;
};

}  // namespace

int64_t end_to_end_memory_bytes(Backend& backend, const LlamaConfig& model,
                                const TrainConfig& config, models::Recompute recompute) {
  const int64_t act = engine::size_bytes(backend.act()), real = engine::size_bytes(backend.real());
  const int64_t parameters = model.layers * block_parameters(model);
  const int64_t tokens = config.e2e_micro_batch * config.seq_len;
  const bool kl = config.e2e_loss == EndToEndLoss::Kl;
  // All: masters, second and first moments, gradients; clipped bits. Scales: dW^, codes, and those
  // four once a group.
  const int64_t gradient = gradient_passes(config) == GradientPasses::One ? act : real;
  const int64_t trained =
      config.e2e_train == EndToEndTrain::All
          ? parameters * (2 * real + act + gradient) + parameters / 8
          : parameters * (gradient + 1) + parameters / config.group * (2 * real + act + gradient);
  const int64_t operands = parameters * act * (kl ? 2 : 1) + parameters / config.group * 2;
  const int64_t table = model.vocab * model.d_model;
  const int64_t tables = table * act * (model.tied_head ? 1 : 2) * (kl ? 2 : 1);
  const int64_t texts =
      (2 * config.samples * config.seq_len + config.e2e_steps * config.e2e_batch) * 4 +
      config.e2e_steps * engine::kControlSize * real;

  // Hidden states beside the blocks': the embedding's, behind the last norm, the teacher's.
  const int64_t hidden = tokens * model.d_model * act;
  const models::ActivationMemory block =
      models::activation_memory(backend, model, config.e2e_micro_batch, config.seq_len, recompute);
  const int64_t kept = model.layers * block.kept_bytes + (kl ? 3 : 2) * hidden;
  const models::HeadBudget budget = models::head_budget(backend);
  const int64_t head =
      autograd::head_loss_bytes(backend, kl ? LossKind::Kl : LossKind::CrossEntropy, tokens,
                                model.d_model, model.vocab,
                                models::head_chunks(budget, tokens, model.vocab, backend.act())) +
      2 * tokens * engine::size_bytes(DType::I32);  // ids, targets
  // On a GPU the teacher runs beside the student, in memory of its own.
  const int64_t teacher =
      kl && backend.device() == engine::DeviceType::Cuda ? block.inference_bytes : 0;
  const int64_t step = kept + teacher + std::max(block.backward_bytes, head);
  // Before that, weights arrive in F32: a table, or the masters whose scales are taken.
  const int64_t arriving =
      std::max(table * 4, config.e2e_train == EndToEndTrain::All
                              ? 0
                              : block_parameters(model) * (2 * real + 2 * act + 1));
  return allocated_bytes(backend, trained + operands + tables + texts + std::max(step, arriving));
}

EndToEndMemory plan_end_to_end_memory(Backend& backend, const LlamaConfig& model,
                                      const TrainConfig& config) {
  const auto bytes = [&](models::Recompute recompute) {
    return end_to_end_memory_bytes(backend, model, config, recompute);
  };
  EndToEndMemory memory;
  memory.recompute = choose_recompute(config.memory, device_room(backend, config.memory), bytes);
  memory.device_bytes = bytes(memory.recompute);
  std::string advice = "lower --seq-len or --e2e-micro-batch";
  if (config.e2e_train == EndToEndTrain::All) advice += ", take --e2e-train scales";
  if (config.memory.recompute && *config.memory.recompute != models::Recompute::Block)
    advice += ", take --recompute block";
  if (!config.stages.empty()) advice += ", or leave the phase out with --e2e-steps 0";
  check_memory(backend, memory.device_bytes, config.memory,
               cat("end-to-end training of ", config.e2e_micro_batch, " windows of ",
                   config.seq_len, " tokens at once"),
               advice);
  return memory;
}

std::unique_ptr<StepProbe> probe_end_to_end_step(Backend& backend, const Checkpoint& source,
                                                 const data::Windows& windows,
                                                 const TrainConfig& config) {
  BBB_ASSERT(config.stages.empty());
  return std::make_unique<EndToEndProbe>(backend, source, windows, config);
}

void train_end_to_end(Backend& backend, const Checkpoint& source, const data::Windows& windows,
                      const TrainConfig& config, const EndToEndMemory& memory,
                      const RunDirectory& run, const Observer& observer) {
  EndToEnd(backend, source, windows, config, memory.recompute, run, observer).run();
}

LayerResult block_result(const RunDirectory& run, const Recipe& recipe, const TrainConfig& config,
                         const Checkpoint& source, int64_t layer) {
  if (config.stages.empty()) return models::full_precision(source, layer);
  const int64_t last = static_cast<int64_t>(config.stages.size()) - 1;
  return run.stage_result(layer, last, recipe, source.config());
}

}  // namespace bbb::train
