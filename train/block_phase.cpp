#include "train/block_phase.h"

#include <chrono>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <future>
#include <memory>
#include <numeric>
#include <optional>
#include <utility>

#include "autograd/ops.h"
#include "engine/cpu/memory.h"
#include "engine/progress.h"
#include "engine/rng.h"
#include "train/block_times.h"
#include "train/run_file.h"
#include "train/saved_state.h"
#include "train/step_probe.h"

namespace bbb::train {
namespace {

using autograd::AdamW;
using autograd::GradientPasses;
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

// What one stage keeps from block to block.
struct StageStep {
  StageStep(ParameterSet& parameters, const Schedule& schedule)
      : optimizer(parameters, {}, schedule) {}
  AdamW optimizer;
  std::vector<std::unique_ptr<Replay>> steps;  // one an input stream, taken in turn
};

bool better(double loss, double best) { return !std::isfinite(best) || loss < best; }

double best_of(const std::vector<double>& losses) {
  double best = losses.front();
  for (double loss : losses)
    if (better(loss, best)) best = loss;
  return best;
}

int64_t stages_of(const TrainConfig& config) { return static_cast<int64_t>(config.stages.size()); }
int64_t steps_per_stage(const TrainConfig& config) {
  return config.epochs * (config.samples / config.batch);
}

// Rings that training takes at once: one for each input stream, one for the target.
int rings_of(const TrainConfig& config) { return config.input_stream == InputStream::Mix ? 3 : 2; }

int64_t streams_of(const TrainConfig& config) {
  return static_cast<int64_t>(config.stages.size()) +
         (config.input_stream == InputStream::Same ? 1 : 2);
}

StreamShape stream_shape(const Backend& backend, const LlamaConfig& model,
                         const TrainConfig& config) {
  StreamShape shape;
  shape.rows = config.samples + config.val_samples;
  shape.row_numel = config.seq_len * model.d_model;
  shape.row_bytes = shape.row_numel * engine::size_bytes(backend.act());
  shape.batch_rows = config.batch;
  return shape;
}

class BlockPhase {
 public:
  BlockPhase(Backend& backend, const Checkpoint& source, const data::Windows& windows,
             const TrainConfig& config, const BlockMemory& memory, const RunDirectory& run,
             const Observer& observer)
      : backend_(backend),
        source_(source),
        config_(config),
        run_(run),
        observer_(observer),
        model_(source.config()),
        recompute_(memory.recompute),
        rows_(config.samples + config.val_samples),
        steps_per_epoch_(config.samples / config.batch),
        parameters_(backend, GradientPasses::One),
        timer_(config.save_every) {
    make_streams(memory.streams);
    embed(windows);
    work_.emplace(backend, model_, 0, inv_freq_);
    work_->declare_parameters(parameters_);
    parameters_.allocate();
    work_->bind_parameters(parameters_, {config.stages[0].weight_bits, config.group});
    best_ = backend.empty(parameters_.masters().shape(), backend.real());

    const int64_t total = steps_per_stage(config);
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

  // From the first stage that is not finished, and from `saved` where that lies in it.
  void run(int64_t finished_stages, std::optional<SavedState> saved) {
    saved_ = std::move(saved);
    const int64_t stages = stages_of(config_), first = finished_stages / stages;
    recompute_streams(first);
    if (!observer_.quiet)
      progress_.emplace("blocks", model_.layers * stages * steps_per_stage(config_));
    for (int64_t block = first; block < model_.layers; ++block) {
      train_block(block, block == first ? finished_stages % stages : 0);
      if (observer_.after_block) observer_.after_block(block);
    }
    finish_write();
    progress_.reset();  // ends its line
    if (!observer_.quiet) report();
  }

  // For a probe: the first block stands before the first step of its first stage.
  void begin() {
    const BlockMasters weights = full_precision(0);
    advance_teacher(0, weights, *target_);
    load(0, weights);
    parameters_.prepare();
    rewind();
  }
  void rewind() {
    stages_[0]->optimizer.restart();
    upload_order(0, 0);
    Feed(*this, 0, 0, steps_per_epoch_)
        .next(0);  // the batch that steps read where no stream is on the device
  }
  std::unique_ptr<Replay> record(StepPart last) {
    return backend_.record([this, last] { step(0, 0, last); });
  }

 private:
  // Hands a stage's steps [begin, end) their batches, those of streams that are not on the device.
  class Feed {
   public:
    Feed(BlockPhase& phase, size_t stage, int64_t begin, int64_t end) : phase_(phase) {
      const std::vector<Stream*> inputs = phase.training_inputs(stage);
      const int64_t batch = phase.config_.batch;
      const auto rows = [&](size_t which, size_t among) {
        std::vector<int32_t> chosen;
        for (int64_t step = begin; step < end; ++step)
          if (static_cast<size_t>(step) % among == which)
            chosen.insert(chosen.end(), phase.host_order_.begin() + step * batch,
                          phase.host_order_.begin() + (step + 1) * batch);
        return chosen;
      };
      for (size_t i = 0; i < inputs.size(); ++i)
        inputs_.push_back(reader(*inputs[i], i, rows(i, inputs.size())));
      target_ = reader(*phase.target_, inputs.size(), rows(0, 1));
    }

    void next(int64_t step) {
      Reader* const input = inputs_[static_cast<size_t>(step) % inputs_.size()].get();
      if (input != nullptr) input->next();
      if (target_) target_->next();
    }

   private:
    std::unique_ptr<Reader> reader(Stream& stream, size_t ring, std::vector<int32_t> rows) {
      if (stream.tier() == Tier::Device) return nullptr;  // the step gathers by itself
      return std::make_unique<Reader>(phase_.backend_, stream, phase_.ring(ring), std::move(rows));
    }

    BlockPhase& phase_;
    std::vector<std::unique_ptr<Reader>> inputs_;
    std::unique_ptr<Reader> target_;
  };

  void make_streams(const StreamPlan& plan) {
    const StreamShape shape = stream_shape(backend_, model_, config_);
    for (Tier tier : plan.tiers)
      store_.push_back(std::make_unique<Stream>(backend_, shape, tier, plan.scratch));
    for (int i = 0; i < plan.rings; ++i)
      rings_.push_back(std::make_unique<Ring>(backend_, shape, plan.uses(Tier::File)));
    for (size_t t = 0; t <= config_.stages.size(); ++t) streams_.push_back(store_[t].get());
    target_ = config_.input_stream == InputStream::Same ? streams_[0] : store_.back().get();
  }

  Ring* ring(size_t index) const { return index < rings_.size() ? rings_[index].get() : nullptr; }

  // Reads rows [begin, end) in their order.
  Reader in_order(Stream& stream, size_t ring_index, int64_t begin, int64_t end) {
    std::vector<int32_t> rows(static_cast<size_t>(end - begin));
    std::iota(rows.begin(), rows.end(), static_cast<int32_t>(begin));
    return Reader(backend_, stream, ring(ring_index), std::move(rows));
  }

  // All streams start as the embedding of the training windows, then of the validation windows.
  void embed(const data::Windows& windows) {
    const models::Llama model(backend_, source_, models::HeadRounding::BFloat16);
    inv_freq_ = model.inv_freq();
    const int64_t seq = config_.seq_len;
    std::vector<int32_t> ids(windows.ids.begin(), windows.ids.begin() + config_.samples * seq);
    ids.insert(ids.end(), windows.ids.end() - config_.val_samples * seq, windows.ids.end());
    const Tensor tokens = backend_.empty({rows_ * seq}, DType::I32);
    backend_.upload(tokens, ids.data());
    for (Stream* stream : streams_) {
      Writer writer(backend_, *stream, ring(0));
      for (int64_t row = 0; row < rows_; row += config_.batch) {
        const int64_t count = std::min(config_.batch, rows_ - row);
        const Tensor out = backend_.empty({count * seq, model_.d_model}, backend_.act());
        backend_.embed(out, tokens.slice(row * seq, count * seq), model.embedding());
        writer.write(row, out);
      }
      writer.finish();
    }
  }

  Tensor as_windows(const Tensor& rows) const {
    return rows.view({rows.dim(0), config_.seq_len, model_.d_model});
  }

  Var forward(Tape& tape, LlamaBlock& block, const Tensor& rows) {
    return block.forward(tape, Var(as_windows(rows)), nullptr, models::Recompute::None);
  }

  // out = change(in), batch by batch; out may be in.
  template <typename Change>
  void rewrite(Stream& out, Stream& in, const Change& change) {
    Reader reader = in_order(in, 0, 0, rows_);
    Writer writer(backend_, out, ring(1));
    for (int64_t row = 0; row < rows_; row += config_.batch)
      writer.write(row, change(reader.next()));
    writer.finish();
  }

  void advance(LlamaBlock& block, Stream& out, Stream& in) {
    rewrite(out, in, [&](const Tensor& rows) {
      Tape tape(backend_, TapeMode::Inference);
      return forward(tape, block, rows).value();
    });
  }

  // The original weights of a layer. Layers are asked for in order: the next one's are read, or
  // made, beside the work on this one.
  BlockMasters full_precision(int64_t layer) {
    BlockMasters weights =
        next_weights_.valid() ? next_weights_.get() : float_masters(source_, layer);
    if (layer + 1 < model_.layers)
      next_weights_ = std::async(std::launch::async, float_masters, std::cref(source_), layer + 1);
    return weights;
  }

  // Adds the time that `work` takes, all that it queues included.
  template <typename Work>
  void timed(double& seconds, const Work& work) {
    const auto start = std::chrono::steady_clock::now();
    work();
    backend_.synchronize();
    seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }

  void advance_teacher(int64_t layer, const BlockMasters& weights, Stream& out) {
    LlamaBlock teacher(backend_, model_, layer, inv_freq_);
    timed(time_.weights_s, [&] { teacher.set_float(weights); });
    timed(time_.streams_s, [&] { advance(teacher, out, *streams_[0]); });
  }

  // With the masters and the width that stand in the block.
  void advance_stage(size_t t) {
    parameters_.prepare();
    advance(*work_, *streams_[t + 1], *streams_[t + 1]);
  }

  void load(size_t t, const BlockMasters& masters) {
    work_->set_masters(masters);
    work_->set_bits(config_.stages[t].weight_bits);
  }

  BlockMasters finished_masters(int64_t layer, size_t t) const {
    return run_.stage_masters(layer, static_cast<int64_t>(t), model_);
  }

  // The streams behind the first `blocks` blocks, which are finished.
  void recompute_streams(int64_t blocks) {
    std::optional<engine::Progress> progress;
    const int64_t passes = stages_of(config_) + 1;
    if (!observer_.quiet && blocks > 0)
      progress.emplace("resuming", blocks * passes, engine::Progress::kPatience_s);
    const auto advanced = [&](int64_t block, int64_t done) {
      backend_.synchronize();  // the time that it took is this pass's
      if (progress) progress->set(block * passes + done, cat("block ", block + 1, "/", blocks));
    };
    for (int64_t block = 0; block < blocks; ++block) {
      advance_teacher(block, full_precision(block), *streams_[0]);
      advanced(block, 1);
      for (size_t t = 0; t < stages_.size(); ++t) {
        load(t, finished_masters(block, t));
        advance_stage(t);
        advanced(block, static_cast<int64_t>(t) + 2);
      }
    }
  }

  void train_block(int64_t layer, int64_t finished_stages) {
    const bool from_its_start = finished_stages == 0 && !saved_;
    time_ = BlockTime();
    time_.stages.resize(stages_.size());
    BlockMasters original;
    timed(time_.weights_s, [&] { original = full_precision(layer); });
    advance_teacher(layer, original, *target_);
    std::vector<std::shared_ptr<const BlockMasters>> results;
    for (size_t t = 0; t < stages_.size(); ++t) {
      if (static_cast<int64_t>(t) < finished_stages) {
        results.push_back(std::make_shared<BlockMasters>(finished_masters(layer, t)));
        continue;
      }
      timed(time_.weights_s, [&] { load(t, t == 0 ? original : *results.back()); });
      results.push_back(train_stage(layer, t));
    }
    if (layer + 1 == model_.layers) return;
    // The last stage's masters stand in the block still.
    for (size_t t = stages_.size(); t-- > 0;) {
      if (t + 1 < stages_.size()) timed(time_.weights_s, [&] { load(t, *results[t]); });
      timed(time_.streams_s, [&] { advance_stage(t); });
    }
    if (target_ != streams_[0])
      timed(time_.streams_s,
            [&] { rewrite(*streams_[0], *target_, [](const Tensor& rows) { return rows; }); });
    if (from_its_start) log_time(layer);
  }

  // Returns the masters of the best validation loss, which are on their way into the stage's file.
  std::shared_ptr<const BlockMasters> train_stage(int64_t layer, size_t t) {
    StageStep& stage = *stages_[t];
    stage.optimizer.restart();
    upload_order(layer, t);
    // Ahead of the validation, which has some of its products: they are timed as a step's.
    if (stage.steps.empty()) {
      parameters_.prepare();  // products are timed on quantized weights
      for (size_t i = 0; i < training_inputs(t).size(); ++i)
        stage.steps.push_back(backend_.record([this, t, i] { step(t, i, StepPart::Optimizer); }));
    }
    const Position at = saved_ ? resume_stage(stage) : start_stage(layer, t);
    const std::vector<double> validation = train_epochs(t, at);

    std::shared_ptr<const BlockMasters> result;
    timed(time_.weights_s, [&] {
      backend_.copy(parameters_.masters(), best_);
      result = std::make_shared<BlockMasters>(work_->masters());
      finish_write();
    });
    writing_ = std::async(std::launch::async, [this, layer, t, result, validation] {
      write(layer, t, *result, validation);
      std::filesystem::remove(run_.block_state_file());
    });
    return result;
  }

  // One file at a time is written beside the training of what comes after it. Throws what went
  // wrong there.
  void finish_write() {
    if (writing_.valid()) writing_.get();
  }
  // So that a full disk ends the run when it is met, not a stage later.
  void finish_write_if_done() {
    if (writing_.valid() && writing_.wait_for(std::chrono::seconds(0)) == std::future_status::ready)
      writing_.get();
  }

  Position start_stage(int64_t layer, size_t t) {
    Position at{layer, static_cast<int64_t>(t), 0, {timed_validation(t)}};
    log_validation(at);
    // What the stage starts from is a candidate too: at 8 bits training may have nothing to add.
    backend_.copy(best_, parameters_.masters());
    return at;
  }

  Position resume_stage(const StageStep& stage) {
    const Position at = saved_->position();
    saved_->load(backend_, state(stage));
    const int32_t step = static_cast<int32_t>(at.step);
    backend_.upload(cursor_, &step);
    saved_.reset();
    return at;
  }

  // All that a stage's steps change.
  NamedTensors state(const StageStep& stage) const {
    return {{"masters", parameters_.masters()},
            {"m", parameters_.m()},
            {"v", parameters_.v()},
            {"best", best_},
            {"control", stage.optimizer.control()}};
  }

  // From `at` to the stage's end; returns all validation losses.
  std::vector<double> train_epochs(size_t t, Position at) {
    const int64_t total = steps_per_stage(config_);
    double best = best_of(at.validation);
    int64_t skipped = 0;
    timer_.restart();
    while (at.step < total) {
      skipped = finish_epoch(t, at);
      const double loss = timed_validation(t);
      at.validation.push_back(loss);
      log_validation(at);
      if (better(loss, best)) {
        best = loss;
        backend_.copy(best_, parameters_.masters());
      }
      if (at.step < total && timer_.due(at.step)) save(t, at);
    }
    BBB_CHECK(skipped < total, "block ", at.block, ", w", config_.stages[t].weight_bits,
              ": every step was skipped, its loss or gradient was not finite");
    return at.validation;
  }

  // Trains from `at` to the end of its epoch; returns the steps skipped so far in this stage.
  int64_t finish_epoch(size_t t, Position& at) {
    using Clock = std::chrono::steady_clock;
    const std::vector<std::unique_ptr<Replay>>& steps = stages_[t]->steps;
    const int64_t end = (at.step / steps_per_epoch_ + 1) * steps_per_epoch_;
    Feed feed(*this, t, at.step, end);
    parameters_.prepare();  // the steps trust the ranges of the masters that they find
    int64_t logged = at.step, skipped = 0;
    auto since = Clock::now();
    const auto log = [&] {
      backend_.synchronize();
      const double seconds = std::chrono::duration<double>(Clock::now() - since).count();
      time_.stages[t].train_s += seconds;
      skipped = log_steps(at, logged, seconds);
      logged = at.step;
    };
    while (at.step < end) {
      feed.next(at.step);
      steps[static_cast<size_t>(at.step) % steps.size()]->run();
      if (at.step % kStepsInFlight == 0) {
        backend_.synchronize();
        finish_write_if_done();
      }
      ++at.step;
      show(at);
      if (at.step < end && timer_.due(at.step)) {
        log();
        save(t, at);
        since = Clock::now();
      }
      if (observer_.after_block_step) observer_.after_block_step(at.block, at.stage, at.step);
    }
    log();
    return skipped;
  }

  void save(size_t t, const Position& at) {
    finish_write();  // the state stands behind all that is finished
    backend_.synchronize();
    const auto begun = SaveTimer::Clock::now();
    save_state(run_.block_state_file(), run_.checksum(), at, backend_, state(*stages_[t]));
    timer_.saved(begun);
  }

  void show(const Position& at) {
    if (!progress_) return;
    const int64_t stages = at.block * stages_of(config_) + at.stage;
    progress_->set(stages * steps_per_stage(config_) + at.step,
                   cat("block ", at.block + 1, "/", model_.layers, " w",
                       config_.stages[static_cast<size_t>(at.stage)].weight_bits));
  }

  std::vector<Stream*> training_inputs(size_t t) const {
    switch (config_.input_stream) {
      case InputStream::Same:
        return {streams_[t + 1]};
      case InputStream::Higher:
        return {streams_[t]};
      default:
        return {streams_[t + 1], streams_[t]};
    }
  }

  // The input of the cursor's step: gathered, or where the feed puts it.
  Tensor step_input(const Stream& stream, size_t ring_index) {
    if (stream.tier() != Tier::Device) return as_windows(ring(ring_index)->batch());
    const Tensor batch =
        backend_.empty({config_.batch, config_.seq_len, model_.d_model}, backend_.act());
    backend_.gather_rows(batch, {stream.resident(), order_, cursor_});
    return batch;
  }
  // Its target, which only the loss reads: in the stream, or where the feed puts it.
  engine::Rows step_target(size_t ring_index) {
    if (target_->tier() != Tier::Device) return as_windows(ring(ring_index)->batch());
    return {target_->resident(), order_, cursor_};
  }

  // Recorded: everything it reads lies on the device. It starts from masters that prepare() or the
  // step before it left.
  void step(size_t t, size_t input, StepPart last) {
    StageStep& stage = *stages_[t];
    const std::vector<Stream*> inputs = training_inputs(t);
    const Tensor x = step_input(*inputs[input], input);
    const engine::Rows y = step_target(inputs.size());
    parameters_.quantize();
    if (last == StepPart::Quantize) return;
    Tape tape(backend_, TapeMode::Training);
    const Var loss = autograd::mse(tape, work_->forward(tape, Var(x), nullptr, recompute_), y);
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
    host_order_.clear();
    for (int64_t epoch = 0; epoch < config_.epochs; ++epoch) {
      const std::vector<int32_t> permutation = rng.permutation(config_.samples);
      host_order_.insert(host_order_.end(), permutation.begin(),
                         permutation.begin() + steps_per_epoch_ * config_.batch);
    }
    backend_.upload(order_, host_order_.data());
    backend_.zero(cursor_);
  }

  double timed_validation(size_t t) {
    double loss = 0;
    timed(time_.stages[t].validation_s, [&] { loss = validate(t); });
    return loss;
  }

  // Mean squared error over the validation windows, on the first of the stage's training inputs.
  double validate(size_t t) {
    Reader inputs = in_order(*training_inputs(t)[0], 0, config_.samples, rows_);
    Reader targets = in_order(*target_, 1, config_.samples, rows_);
    parameters_.prepare();
    backend_.zero(validation_);
    for (int64_t row = config_.samples; row < rows_; row += config_.batch) {
      const int64_t count = std::min(config_.batch, rows_ - row);
      Tape tape(backend_, TapeMode::Inference);
      const Var y = forward(tape, *work_, inputs.next());
      const Var loss = autograd::mse(tape, y, as_windows(targets.next()));
      backend_.sum(validation_, loss.value(),
                   static_cast<double>(count) / static_cast<double>(config_.val_samples),
                   Write::Add);
    }
    return models::download_floats(backend_, validation_)[0];
  }

  Json log_line(const char* phase, const Position& at, int64_t epoch) const {
    Json line;
    line["phase"] = phase;
    line["block"] = at.block;
    line["stage"] = to_string({config_.stages[static_cast<size_t>(at.stage)]});
    line["epoch"] = epoch;
    return line;
  }

  void log_validation(const Position& at) const {
    Json line = log_line("validation", at, at.step / steps_per_epoch_);
    line["loss"] = at.validation.back();
    run_.append_log({line});
  }

  // Logs steps [begin, at.step), which took so many seconds; returns the steps skipped so far in
  // this stage.
  int64_t log_steps(const Position& at, int64_t begin, double seconds) const {
    const int64_t count = at.step - begin;
    const std::vector<float> slots = models::download_floats(backend_, log_.rows(begin, count));
    const double tokens = static_cast<double>(count * config_.batch * config_.seq_len) / seconds;
    std::vector<Json> lines;
    int64_t skipped = 0;
    for (int64_t i = 0; i < count; ++i) {
      const float* control = &slots[static_cast<size_t>(i * engine::kControlSize)];
      Json line = log_line("block", at, (begin + i) / steps_per_epoch_);
      line["step"] = begin + i;
      add_measures(line, control, tokens, backend_.memory_peak_bytes());
      line["recompute"] = models::to_string(recompute_);
      lines.push_back(std::move(line));
      skipped = std::llround(control[engine::kSkipped]);
    }
    run_.append_log(lines);
    return skipped;
  }

  void log_time(int64_t layer) {
    Json line;
    line["phase"] = "time";
    line["block"] = layer;
    for (size_t t = 0; t < stages_.size(); ++t) {
      Json stage;
      stage["stage"] = to_string({config_.stages[t]});
      stage["train_s"] = time_.stages[t].train_s;
      stage["validation_s"] = time_.stages[t].validation_s;
      line["stages"].push_back(stage);
    }
    line["streams_s"] = time_.streams_s;
    line["weights_s"] = time_.weights_s;
    run_.append_log({line});
    times_.push_back(time_);
  }

  // Where a block's time went, and what a longer run would take.
  void report() const {
    if (times_.empty()) return;
    const BlockTime middle = median(times_);
    std::printf("blocks: %s, the median of %zu\n", to_string(middle, config_).c_str(),
                times_.size());
    if (!config_.extrapolate) return;
    const RunLength& to = *config_.extrapolate;
    const BlockTime longer = extrapolate(middle, config_, to);
    std::printf(
        "%lld samples x %lld tokens, %lld epochs a stage, streams where they lie here: %s; %.2f h "
        "for %lld blocks\n",
        static_cast<long long>(to.samples), static_cast<long long>(config_.seq_len),
        static_cast<long long>(to.epochs), to_string(longer, config_).c_str(),
        longer.total_s() * static_cast<double>(model_.layers) / 3600,
        static_cast<long long>(model_.layers));
  }

  void write(int64_t layer, size_t t, const BlockMasters& masters,
             const std::vector<double>& validation) const {
    std::vector<data::SafeTensorsWriter::Entry> entries;
    declare_masters(entries, layer_prefix(layer), model_);
    RunFileWriter writer(
        run_.stage_file(layer, static_cast<int64_t>(t)), run_.checksum(), entries,
        {{"stage", to_string({config_.stages[t]})}, {"validation_loss", Json(validation).dump()}});
    add_masters(writer, layer_prefix(layer), model_, masters);
    writer.finish();
  }

  Backend& backend_;
  const Checkpoint& source_;
  const TrainConfig& config_;
  const RunDirectory& run_;
  const Observer& observer_;
  const LlamaConfig& model_;
  const models::Recompute recompute_;
  const int64_t rows_;  // N: training and validation windows
  const int64_t steps_per_epoch_;

  std::vector<std::unique_ptr<Ring>> rings_;  // none where every stream is on the device
  std::vector<std::unique_ptr<Stream>> store_;
  std::vector<Stream*> streams_;  // 0: full precision; t + 1: stage t
  Stream* target_ = nullptr;      // y; in `same`, streams_[0]
  Tensor inv_freq_;
  ParameterSet parameters_;
  std::optional<LlamaBlock> work_;
  Tensor best_;                      // masters of the best validation loss
  Tensor order_;                     // I32: rows of all steps of a stage
  std::vector<int32_t> host_order_;  // the same
  Tensor cursor_;                    // I32 (1): the step
  Tensor log_;                       // real (steps, kControlSize)
  Tensor validation_;
  std::vector<std::unique_ptr<StageStep>> stages_;
  std::optional<SavedState> saved_;  // until the stage in which it lies goes on from it
  SaveTimer timer_;
  std::optional<engine::Progress> progress_;
  BlockTime time_;                // of the block at hand
  std::vector<BlockTime> times_;  // of the blocks trained whole by this process, but the last
  // Last, so that what they run ends before anything that it uses.
  std::future<BlockMasters> next_weights_;
  std::future<void> writing_;  // the newest stage's file
};

// Of the device, for all but the streams.
int64_t memory_bytes(Backend& backend, const LlamaConfig& model, const TrainConfig& config,
                     models::Recompute recompute) {
  const int64_t act = engine::size_bytes(backend.act()), real = engine::size_bytes(backend.real());
  const int64_t parameters = block_parameters(model), tokens = config.batch * config.seq_len;
  const int64_t steps = config.epochs * (config.samples / config.batch);
  const models::ActivationMemory block =
      models::activation_memory(backend, model, config.batch, config.seq_len, recompute);
  // Masters, second moments, the best masters; first moments, gradients of one pass, wq; e, z and
  // clipped bits; order and log of a stage.
  const int64_t trained = parameters * (3 * real + 3 * act) + parameters / config.group * 2 +
                          parameters / 8 + steps * (config.batch * 4 + engine::kControlSize * real);
  int64_t largest = 0;  // of the linears: it arrives in F32
  for (const models::LinearShape& linear : models::block_linears(model))
    largest = std::max(largest, linear.n * linear.k);
  const int64_t teacher = parameters * act + std::max(block.inference_bytes, largest * 4);
  // A step's input, and its activations.
  const int64_t step = tokens * model.d_model * act + block.kept_bytes + block.backward_bytes;
  // What a recorded step allocates stays its own; without recording, the passes share.
  const int64_t passes =
      backend.device() == engine::DeviceType::Cuda ? teacher + step : std::max(teacher, step);
  // Before the first block: embedding and head, one of them on its way in F32, a batch's rows.
  const int64_t embedding = model.vocab * model.d_model * (2 * act + 4) +
                            tokens * model.d_model * act +
                            (config.samples + config.val_samples) * config.seq_len * 4;
  return allocated_bytes(backend, std::max(trained + passes, embedding));
}

// The state that a killed run left in its first unfinished stage, if it got that far.
std::optional<SavedState> state_within(const TrainConfig& config, const RunDirectory& run,
                                       int64_t finished_stages) {
  const std::string file = run.block_state_file();
  if (!std::filesystem::exists(file)) return std::nullopt;
  std::optional<SavedState> saved(std::in_place, file, run.checksum());
  const Position& at = saved->position();
  const int64_t stage = at.block * stages_of(config) + at.stage;
  const int64_t epoch = at.step / (config.samples / config.batch);
  BBB_CHECK(at.block >= 0 && at.stage >= 0 && at.stage < stages_of(config) && at.step > 0 &&
                at.step < steps_per_stage(config) &&
                static_cast<int64_t>(at.validation.size()) == epoch + 1,
            file, ": block ", at.block, ", stage ", at.stage, ", step ", at.step,
            " is no place in this run");
  BBB_CHECK(
      stage <= finished_stages, file, ": is of block ", at.block, ", stage ", at.stage, ", but ",
      run.stage_file(finished_stages / stages_of(config), finished_stages % stages_of(config)),
      " is missing; delete the state, too, to train from there again");
  if (stage < finished_stages) saved.reset();  // its stage was finished since
  return saved;
}

class BlockProbe final : public StepProbe {
 public:
  BlockProbe(Backend& backend, const Checkpoint& source, const data::Windows& windows,
             const TrainConfig& config)
      : config_(config),
        run_(config.out),
        phase_(backend, source, windows, config_,
               plan_block_memory(backend, source.config(), config_), run_, observer_) {
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

}  // namespace

BlockMemory plan_block_memory(Backend& backend, const LlamaConfig& model,
                              const TrainConfig& config) {
  BlockMemory memory;
  const StreamShape shape = stream_shape(backend, model, config);
  const int64_t device_bytes = device_room(backend, config.memory);
  memory.recompute =
      choose_recompute(config.memory, device_bytes, [&](models::Recompute recompute) {
        // Streams may lie elsewhere, but the batches in use may not.
        return memory_bytes(backend, model, config, recompute) +
               Ring::device_bytes(rings_of(config), shape);
      });
  memory.device_bytes = memory_bytes(backend, model, config, memory.recompute);
  check_memory(backend, memory.device_bytes, config.memory,
               cat("block training, its streams aside, with ", config.batch, " windows of ",
                   config.seq_len, " tokens at once"),
               "lower --batch or --seq-len");
  StreamRoom room;
  room.device_bytes = device_bytes - memory.device_bytes;
  // Beside streams the host holds a block's weights: this one's, the next one's, every stage's.
  const int64_t weights_bytes = (2 + stages_of(config)) * block_parameters(model) * 4;
  room.host_bytes =
      std::max<int64_t>(0, engine::HostMemory::available_bytes() / 5 * 4 - weights_bytes);
  if (backend.device() == engine::DeviceType::Cpu)  // one memory for both
    room.host_bytes = std::max<int64_t>(0, room.host_bytes - device_bytes);
  if (config.memory.host_bytes > 0)
    room.host_bytes = std::min(room.host_bytes, config.memory.host_bytes);
  room.scratch = config.memory.scratch;
  if (!room.scratch.empty()) room.scratch_bytes = free_disk_bytes(room.scratch);
  memory.streams = plan_streams(streams_of(config), rings_of(config), shape, room);
  memory.device_bytes += memory.streams.device_bytes;
  return memory;
}

std::unique_ptr<StepProbe> probe_block_step(Backend& backend, const Checkpoint& source,
                                            const data::Windows& windows,
                                            const TrainConfig& config) {
  return std::make_unique<BlockProbe>(backend, source, windows, config);
}

void train_blocks(Backend& backend, const Checkpoint& source, const data::Windows& windows,
                  const TrainConfig& config, const BlockMemory& memory, const RunDirectory& run,
                  const Observer& observer) {
  const LlamaConfig& model = source.config();
  const int64_t stages = stages_of(config), finished = run.finished_stages(config, model.layers);
  if (finished == model.layers * stages) return;
  std::optional<SavedState> saved = state_within(config, run, finished);
  // A block's lines stand in the order of its work: those of whole stages, then the state's.
  const int64_t lines_per_stage = steps_per_stage(config) + config.epochs + 1;
  int64_t left = finished % stages * lines_per_stage;
  if (saved)
    left += saved->position().step + static_cast<int64_t>(saved->position().validation.size());
  run.keep_log([&](const Json& line) {
    const int64_t block = line.value("block", model.layers);
    return block < finished / stages || (block == finished / stages && left-- > 0);
  });
  BlockPhase(backend, source, windows, config, memory, run, observer)
      .run(finished, std::move(saved));
}

}  // namespace bbb::train
