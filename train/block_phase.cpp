#include "train/block_phase.h"

#include <chrono>
#include <cmath>
#include <optional>

#include "autograd/ops.h"
#include "engine/progress.h"
#include "engine/rng.h"
#include "train/step_probe.h"

namespace bbb::train {
namespace {

using autograd::AdamW;
using autograd::ParameterSet;
using autograd::Tape;
using autograd::TapeMode;
using autograd::Var;
using engine::DType;
using engine::Replay;
using engine::Schedule;
using engine::Tensor;
using engine::Write;
using models::BlockMasters;
using models::LlamaBlock;
using models::LlamaConfig;

constexpr int64_t kStepsInFlight = 16;  // steps queued before the progress bar waits for them

struct StageResult {
  BlockMasters masters;
  std::vector<double> validation;  // before training, then after each epoch
};

// What one stage keeps from block to block.
struct StageStep {
  explicit StageStep(ParameterSet& parameters, const Schedule& s)
      : schedule(s), optimizer(parameters, {}, s) {}
  Schedule schedule;
  AdamW optimizer;
  std::vector<std::unique_ptr<Replay>> steps;  // one an input stream, taken in turn
};

class BlockPhase {
 public:
  BlockPhase(Backend& backend, const Checkpoint& source, const data::Windows& windows,
             const TrainConfig& config, const RunDirectory& run, const Observer& observer)
      : backend_(backend),
        source_(source),
        config_(config),
        run_(run),
        observer_(observer),
        model_(source.config()),
        rows_(config.samples + config.val_samples),
        steps_per_epoch_(config.samples / config.batch),
        parameters_(backend) {
    embed(windows);
    work_.emplace(backend, model_, 0, inv_freq_);
    work_->declare_parameters(parameters_);
    parameters_.allocate();
    work_->bind_parameters(parameters_, {config.stages[0].weight_bits, config.group});
    best_ = backend.empty(parameters_.masters().shape(), backend.real());

    const int64_t total = config.epochs * steps_per_epoch_;
    order_ = backend.empty({total * config.batch}, DType::I32);
    cursor_ = backend.zeros({1}, DType::I32);
    log_ = backend.empty({total, engine::kControlSize}, backend.real());
    validation_ = backend.empty({1}, backend.real());
    for (double lr : config.lr) {
      Schedule schedule;
      schedule.peak_lr = lr;
      schedule.warmup_steps = std::llround(0.03 * static_cast<double>(total));
      schedule.total_steps = total;
      stages_.push_back(std::make_unique<StageStep>(parameters_, schedule));
    }
  }

  void run(int64_t finished) {
    for (int64_t block = 0; block < finished; ++block) {
      const data::SafeTensors file(run_.block_file(block));
      advance_teacher(block, streams_[0]);
      for (size_t t = 0; t < stages_.size(); ++t)
        advance_stage(t, read_masters(file, stage_prefix(t), model_));
    }
    const int64_t steps_per_block =
        static_cast<int64_t>(stages_.size()) * config_.epochs * steps_per_epoch_;
    if (!observer_.quiet) progress_.emplace("blocks", model_.layers * steps_per_block);
    for (int64_t block = finished; block < model_.layers; ++block) {
      steps_done_ = block * steps_per_block;
      train_block(block);
      if (observer_.after_block) observer_.after_block(block);
    }
  }

  // For a probe: the first block stands before the first step of its first stage.
  void begin() {
    advance_teacher(0, target_);
    load(0, float_masters(source_, 0));
    work_->prepare();
    rewind();
  }
  void rewind() {
    stages_[0]->optimizer.restart(stages_[0]->schedule);
    upload_order(0, 0);
  }
  std::unique_ptr<Replay> record(StepPart last) {
    const Tensor input = training_inputs(0)[0];
    return backend_.record([this, input, last] { step(*stages_[0], input, last); });
  }

 private:
  bool same() const { return config_.input_stream == InputStream::Same; }

  // All streams start as the embedding of the training windows, then of the validation windows.
  void embed(const data::Windows& windows) {
    const models::Llama model(backend_, source_, models::HeadRounding::BFloat16);
    inv_freq_ = model.inv_freq();
    const int64_t seq = config_.seq_len;
    std::vector<int32_t> ids(windows.ids.begin(), windows.ids.begin() + config_.samples * seq);
    ids.insert(ids.end(), windows.ids.end() - config_.val_samples * seq, windows.ids.end());
    const Tensor tokens = backend_.empty({rows_ * seq}, DType::I32);
    backend_.upload(tokens, ids.data());
    const engine::Shape shape{rows_, seq, model_.d_model};
    streams_.push_back(backend_.empty(shape, backend_.act()));
    backend_.embed(streams_[0].view({rows_ * seq, model_.d_model}), tokens, model.embedding());
    for (size_t t = 0; t < config_.stages.size(); ++t) {
      streams_.push_back(backend_.empty(shape, backend_.act()));
      backend_.copy(streams_.back(), streams_[0]);
    }
    target_ = same() ? streams_[0] : backend_.empty(shape, backend_.act());
  }

  Var forward(LlamaBlock& block, const Tensor& x) {
    Tape tape(backend_, TapeMode::Inference);
    return block.forward(tape, Var(x), nullptr);
  }

  // out = block(in), batch by batch; out may be in.
  void advance(LlamaBlock& block, const Tensor& out, const Tensor& in) {
    for (int64_t row = 0; row < rows_; row += config_.batch) {
      const int64_t count = std::min(config_.batch, rows_ - row);
      backend_.copy(out.rows(row, count), forward(block, in.rows(row, count)).value());
    }
  }

  void advance_teacher(int64_t layer, const Tensor& out) {
    LlamaBlock teacher(backend_, model_, layer, inv_freq_);
    teacher.load_float(source_);
    advance(teacher, out, streams_[0]);
  }

  void advance_stage(size_t t, const BlockMasters& masters) {
    load(t, masters);
    work_->prepare();
    advance(*work_, streams_[t + 1], streams_[t + 1]);
  }

  void load(size_t t, const BlockMasters& masters) {
    work_->set_masters(masters);
    work_->set_bits(config_.stages[t].weight_bits);
  }

  void train_block(int64_t layer) {
    advance_teacher(layer, target_);
    std::vector<StageResult> results;
    for (size_t t = 0; t < stages_.size(); ++t) {
      load(t, t == 0 ? float_masters(source_, layer) : results.back().masters);
      results.push_back(train_stage(layer, t));
    }
    write(layer, results);
    if (layer + 1 == model_.layers) return;
    for (size_t t = 0; t < stages_.size(); ++t) advance_stage(t, results[t].masters);
    if (!same()) backend_.copy(streams_[0], target_);
  }

  StageResult train_stage(int64_t layer, size_t t) {
    StageStep& stage = *stages_[t];
    stage.optimizer.restart(stage.schedule);
    upload_order(layer, t);
    StageResult result;
    result.validation.push_back(validate(t));
    log_validation(layer, t, 0, result.validation.back());
    if (stage.steps.empty())
      for (const Tensor& input : training_inputs(t))
        stage.steps.push_back(
            backend_.record([this, &stage, input] { step(stage, input, StepPart::Optimizer); }));

    int64_t skipped = 0;
    std::optional<double> best;
    for (int64_t epoch = 0; epoch < config_.epochs; ++epoch) {
      const auto start = std::chrono::steady_clock::now();
      for (int64_t i = 0; i < steps_per_epoch_; ++i) {
        const size_t step = static_cast<size_t>(epoch * steps_per_epoch_ + i);
        stage.steps[step % stage.steps.size()]->run();
        if (i % kStepsInFlight == 0) backend_.synchronize();
        ++steps_done_;
        if (progress_)
          progress_->set(steps_done_, cat("block ", layer + 1, "/", model_.layers, " w",
                                          config_.stages[t].weight_bits));
      }
      backend_.synchronize();
      const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
      skipped = log_epoch(layer, t, epoch, elapsed.count());

      const double loss = validate(t);
      result.validation.push_back(loss);
      log_validation(layer, t, epoch + 1, loss);
      if (!best || !std::isfinite(*best) || loss < *best) {
        best = loss;
        backend_.copy(best_, parameters_.masters());
      }
    }
    BBB_CHECK(skipped < config_.epochs * steps_per_epoch_, "block ", layer, ", w",
              config_.stages[t].weight_bits,
              ": every step was skipped, its loss or gradient was not finite");
    backend_.copy(parameters_.masters(), best_);
    result.masters = work_->masters();
    return result;
  }

  std::vector<Tensor> training_inputs(size_t t) const {
    switch (config_.input_stream) {
      case InputStream::Same:
        return {streams_[t + 1]};
      case InputStream::Higher:
        return {streams_[t]};
      default:
        return {streams_[t + 1], streams_[t]};
    }
  }

  // Recorded: everything it reads lies on the device.
  void step(StageStep& stage, const Tensor& input, StepPart last) {
    const engine::Shape shape{config_.batch, config_.seq_len, model_.d_model};
    const Tensor x = backend_.empty(shape, backend_.act());
    const Tensor y = backend_.empty(shape, backend_.act());
    backend_.gather_rows(x, input, order_, cursor_);
    backend_.gather_rows(y, target_, order_, cursor_);
    work_->prepare();
    if (last == StepPart::Quantize) return;
    Tape tape(backend_, TapeMode::Training);
    const Var loss = autograd::mse(tape, work_->forward(tape, Var(x), nullptr), y);
    if (last == StepPart::Forward) return;
    tape.backward(loss);
    work_->finish_backward();
    if (last == StepPart::Backward) return;
    stage.optimizer.step(loss.value());
    backend_.log_control(log_, stage.optimizer.control(), cursor_);
    backend_.advance(cursor_);
  }

  // A permutation an epoch; the samples beyond the last whole batch are left out.
  void upload_order(int64_t layer, size_t t) {
    engine::Rng rng(sub_seed(config_.seed, static_cast<uint64_t>(layer) + 1, t));
    std::vector<int32_t> order;
    for (int64_t epoch = 0; epoch < config_.epochs; ++epoch) {
      const std::vector<int32_t> permutation = rng.permutation(config_.samples);
      order.insert(order.end(), permutation.begin(),
                   permutation.begin() + steps_per_epoch_ * config_.batch);
    }
    backend_.upload(order_, order.data());
    backend_.zero(cursor_);
  }

  // Mean squared error over the validation windows, on the first of the stage's training inputs.
  double validate(size_t t) {
    const Tensor input = training_inputs(t)[0];
    work_->prepare();
    backend_.zero(validation_);
    for (int64_t row = config_.samples; row < rows_; row += config_.batch) {
      const int64_t count = std::min(config_.batch, rows_ - row);
      Tape tape(backend_, TapeMode::Inference);
      const Var y = work_->forward(tape, Var(input.rows(row, count)), nullptr);
      const Var loss = autograd::mse(tape, y, target_.rows(row, count));
      backend_.sum(validation_, loss.value(),
                   static_cast<double>(count) / static_cast<double>(config_.val_samples),
                   Write::Add);
    }
    return models::download_floats(backend_, validation_)[0];
  }

  Json log_line(const char* phase, int64_t layer, size_t t) const {
    Json line;
    line["phase"] = phase;
    line["block"] = layer;
    line["stage"] = to_string({config_.stages[t]});
    return line;
  }

  void log_validation(int64_t layer, size_t t, int64_t epoch, double loss) const {
    Json line = log_line("validation", layer, t);
    line["epoch"] = epoch;
    line["loss"] = loss;
    run_.append_log({line});
  }

  // The log of the last epoch's steps; returns the steps skipped so far in this stage.
  int64_t log_epoch(int64_t layer, size_t t, int64_t epoch, double seconds) const {
    const std::vector<float> slots =
        models::download_floats(backend_, log_.rows(epoch * steps_per_epoch_, steps_per_epoch_));
    const double tokens =
        static_cast<double>(steps_per_epoch_ * config_.batch * config_.seq_len) / seconds;
    std::vector<Json> lines;
    int64_t skipped = 0;
    for (int64_t i = 0; i < steps_per_epoch_; ++i) {
      const float* control = &slots[static_cast<size_t>(i * engine::kControlSize)];
      Json line = log_line("block", layer, t);
      line["epoch"] = epoch;
      line["step"] = epoch * steps_per_epoch_ + i;
      line["loss"] = control[engine::kLoss];
      line["lr"] = control[engine::kLr];
      line["grad_norm"] = control[engine::kGradNorm];
      line["skipped"] = control[engine::kSkip] != 0;
      line["tokens_per_s"] = std::llround(tokens);
      line["memory_bytes"] = backend_.memory_peak_bytes();
      lines.push_back(std::move(line));
      skipped = std::llround(control[engine::kSkipped]);
    }
    run_.append_log(lines);
    return skipped;
  }

  void write(int64_t layer, const std::vector<StageResult>& results) const {
    std::vector<data::SafeTensorsWriter::Entry> entries;
    Json validation;
    for (size_t t = 0; t < results.size(); ++t) {
      declare_masters(entries, stage_prefix(t), model_);
      validation.push_back(results[t].validation);
    }
    data::SafeTensorsWriter writer(
        run_.block_file(layer), entries,
        {{"stages", to_string(config_.stages)}, {"validation_loss", validation.dump()}});
    for (size_t t = 0; t < results.size(); ++t)
      add_masters(writer, stage_prefix(t), model_, results[t].masters);
    writer.finish();
  }

  Backend& backend_;
  const Checkpoint& source_;
  const TrainConfig& config_;
  const RunDirectory& run_;
  const Observer& observer_;
  const LlamaConfig& model_;
  const int64_t rows_;  // N: training and validation windows
  const int64_t steps_per_epoch_;

  std::vector<Tensor> streams_;  // 0: full precision; t + 1: stage t
  Tensor target_;                // y
  Tensor inv_freq_;
  ParameterSet parameters_;
  std::optional<LlamaBlock> work_;
  Tensor best_;    // masters of the best validation loss
  Tensor order_;   // I32: rows of all steps of a stage
  Tensor cursor_;  // I32 (1): the step
  Tensor log_;     // real (steps, kControlSize)
  Tensor validation_;
  std::vector<std::unique_ptr<StageStep>> stages_;
  std::optional<engine::Progress> progress_;
  int64_t steps_done_ = 0;
};

int64_t memory_bytes(Backend& backend, const LlamaConfig& model, const TrainConfig& config) {
  const int64_t act = engine::size_bytes(backend.act()), real = engine::size_bytes(backend.real());
  const int64_t stages = static_cast<int64_t>(config.stages.size());
  const int64_t recordings = config.input_stream == InputStream::Mix ? 2 * stages : stages;
  const int64_t streams = stages + (config.input_stream == InputStream::Same ? 1 : 2);
  const int64_t stream_bytes =
      (config.samples + config.val_samples) * config.seq_len * model.d_model * act;
  // Masters, gradients, two moments and the best masters; the GEMMs' operands of work and teacher.
  const int64_t parameter_bytes = block_parameters(model) * (5 * real + 2 * act + 1);
  const int64_t table_bytes = 2 * model.vocab * model.d_model * act;
  // One recording for each stage, and the passes outside of them.
  return streams * stream_bytes + parameter_bytes + table_bytes +
         (recordings + 1) * block_activation_bytes(backend, model, config.batch * config.seq_len);
}

class BlockProbe final : public StepProbe {
 public:
  BlockProbe(Backend& backend, const Checkpoint& source, const data::Windows& windows,
             const TrainConfig& config)
      : config_(config),
        run_(config.out),
        phase_(backend, source, windows, config_, run_, observer_) {
    phase_.begin();
  }
  std::unique_ptr<Replay> record(StepPart last) override { return phase_.record(last); }
  void rewind() override { phase_.rewind(); }

 private:
  const TrainConfig config_;
  const RunDirectory run_;  // names no file as long as no block is finished
  const Observer observer_{};
  BlockPhase phase_;
};

void check_block_memory(Backend& backend, const LlamaConfig& model, const TrainConfig& config) {
  check_memory(backend, memory_bytes(backend, model, config),
               cat("block training on ", config.samples, " samples of ", config.seq_len, " tokens"),
               "lower --samples, --seq-len or --batch");
}

}  // namespace

std::unique_ptr<StepProbe> probe_block_step(Backend& backend, const Checkpoint& source,
                                            const data::Windows& windows,
                                            const TrainConfig& config) {
  check_block_memory(backend, source.config(), config);
  return std::make_unique<BlockProbe>(backend, source, windows, config);
}

void train_blocks(Backend& backend, const Checkpoint& source, const data::Windows& windows,
                  const TrainConfig& config, const RunDirectory& run, const Observer& observer) {
  const int64_t finished = run.finished_blocks(source.config().layers);
  if (finished == source.config().layers) return;
  check_block_memory(backend, source.config(), config);
  run.keep_log([&](const Json& line) { return line.value("block", finished) < finished; });
  BlockPhase(backend, source, windows, config, run, observer).run(finished);
}

}  // namespace bbb::train
