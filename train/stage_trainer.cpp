#include "train/stage_trainer.h"

#include <cmath>
#include <utility>

#include "autograd/ops.h"
#include "train/sample_order.h"

namespace bbb::train {

using autograd::Tape;
using autograd::TapeMode;
using autograd::Var;
using engine::DType;
using engine::Replay;
using models::LayerResult;

namespace {

bool better(double loss, double best) { return !std::isfinite(best) || loss < best; }

double best_of(const std::vector<double>& losses) {
  double best = losses.front();
  for (double loss : losses)
    if (better(loss, best)) best = loss;
  return best;
}

}  // namespace

StageTrainer::StageTrainer(Backend& backend, const models::LlamaConfig& model,
                           const TrainConfig& config, StageFormats formats, const Recipe& recipe,
                           models::Recompute recompute, StreamSet& streams, Tensor inv_freq,
                           const RunDirectory& run, const Observer& observer, StepHooks hooks)
    : backend_(backend),
      config_(config),
      recipe_(recipe),
      formats_(std::move(formats)),
      recompute_(recompute),
      streams_(streams),
      run_(run),
      observer_(observer),
      hooks_(std::move(hooks)),
      steps_per_epoch_(config.samples / config.batch),
      // The mean of two ranks' act is rounded once, as the gradient of one rank is.
      parameters_(backend, streams.precisions() == 1 && config.comm->size() <= 2
                               ? autograd::GradientPasses::One
                               : autograd::GradientPasses::Several),
      block_(backend, model, 0, std::move(inv_freq)) {
  if (config.grid_train != GridTrain::None) {
    block_.declare_learned(parameters_, formats_[0], Recipe::learned_parts(config),
                           {.lr_factor = config.grid_lr / config.lr[0]});
    parameters_.allocate();
    block_.bind_learned(formats_[0]);
  } else {
    block_.declare_parameters(parameters_, formats_[0], config.optimizer, recipe.lc(),
                              adapts_blocks(config, formats_.size() - 1)
                                  ? recipe.lora(autograd::LoraTraining::Masters::Train)
                                  : autograd::LoraTraining());
    parameters_.allocate();
    quantizer_.emplace(parameters_, config.group, config.range, engine::Rounding::Nearest,
                       recipe.nested(), recipe.lc(), Recipe::weight_rule(config));
    block_.bind_parameters(*quantizer_, formats_[0]);
  }
  average_.emplace(*config.comm, parameters_);
  best_ = backend.empty(parameters_.masters().shape(), backend.real());
  const int64_t total = steps_per_stage(config);
  order_ = backend.empty({total * own_batch(config)}, DType::I32);
  loop_.emplace(backend, run, total, config.batch * config.seq_len, recompute, config.save_every);
  validation_ = backend.empty({1}, backend.real());
  if (streams.precisions() > 1) {
    weights_.emplace(backend, streams.precisions(), total);
    loss_ = backend.empty({1}, backend.real());
  }
  for (double lr : config.lr)
    stages_.push_back(
        {std::make_unique<autograd::Optimizer>(parameters_, quantizer_ ? &*quantizer_ : nullptr,
                                               engine::AdamWSpec{}, schedule_of(lr, total)),
         {}});
}

void StageTrainer::load(int64_t layer, size_t t, const LayerResult& result) {
  block_.set_formats(formats_[t]);
  block_.set_masters(result);
  const bool adapts = adapts_blocks(config_, t);
  if (quantizer_) quantizer_->adapt(adapts);
  if (adapts) block_.start_adapters(recipe_.adapter_seed(layer, static_cast<int64_t>(t)));
}

void StageTrainer::prepare() {
  if (quantizer_) return quantizer_->prepare();
  block_.prepare_scales();
}

void StageTrainer::quantize() {
  if (quantizer_) return quantizer_->quantize();
  block_.prepare_scales();
}

models::LlamaBlock& StageTrainer::quantized_block() {
  prepare();
  return block_;
}

std::vector<double> StageTrainer::train(int64_t layer, size_t t, std::optional<SavedState> saved,
                                        BlockTime::Stage& time) {
  rewind(layer, t);
  // Record before validating. Both share some products, and these are to be timed as a step's.
  record_steps(t);
  Position at{layer, static_cast<int64_t>(t), 0, {}};
  if (saved) {
    at = saved->position();
    saved->load(backend_, state(t));
    loop_->rewind(at.step);
    saved.reset();
  } else {
    timed(backend_, time.validation_s, [&] { at.validation.push_back(validate(t)); });
    log_validation(at);
    // The masters at the start are a candidate too: at 8 bits training may improve nothing.
    backend_.copy(best_, parameters_.masters());
  }
  return train_epochs(t, at, time);
}

LayerResult StageTrainer::result() {
  backend_.copy(parameters_.masters(), best_);
  if (quantizer_ && quantizer_->adapts()) {
    if (config_.lora_end == LoraEnd::Discard) block_.discard_adapters();
    quantizer_->prepare();  // merges what is left
  }
  if (quantizer_) return block_.result(models::LinearContent::Masters);
  block_.prepare_scales();
  return block_.result(models::LinearContent::Stored);
}

std::vector<double> StageTrainer::train_epochs(size_t t, Position at, BlockTime::Stage& time) {
  const int64_t total = steps_per_stage(config_);
  const StepHooks hooks = step_hooks(t, at);
  double best = best_of(at.validation);
  int64_t skipped = 0;
  loop_->restart_timer();
  while (at.step < total) {
    const int64_t end = (at.step / steps_per_epoch_ + 1) * steps_per_epoch_;
    feed_ = std::make_unique<StepFeed>(streams_, t, host_order_, at.step, end);
    prepare();  // a step relies on the measured ranges of the masters
    const StepLoop::Outcome outcome = loop_->run(stages_[t].steps, at, end, hooks);
    feed_.reset();
    time.train_s += outcome.seconds;
    skipped = outcome.skipped;
    timed(backend_, time.validation_s, [&] { at.validation.push_back(validate(t)); });
    log_validation(at);
    if (better(at.validation.back(), best)) {
      best = at.validation.back();
      backend_.copy(best_, parameters_.masters());
    }
    if (at.step < total) loop_->save_if_due(at, hooks);
  }
  BBB_CHECK(skipped < total, "block ", at.block, ", w", config_.stages[t].weight_bits,
            ": every step was skipped, its loss or gradient was not finite");
  return at.validation;
}

StepHooks StageTrainer::step_hooks(size_t t, const Position& start) {
  StepHooks hooks = hooks_;
  hooks.feed = [this](int64_t step) { feed_->next(step); };
  hooks.line = [this, start](int64_t step) {
    return log_line("block", start, step / steps_per_epoch_);
  };
  hooks.save = [this, t](const Position& at) {
    if (run_.writes()) save_state(run_.block_state_file(), run_.checksum(), at, backend_, state(t));
  };
  hooks.after_step = [this](const Position& at) {
    if (observer_.after_block_step) observer_.after_block_step(at.block, at.stage, at.step);
  };
  return hooks;
}

NamedTensors StageTrainer::state(size_t t) const {
  NamedTensors state = optimizer_state(parameters_, *stages_[t].optimizer);
  state.push_back({"best", best_});
  return state;
}

void StageTrainer::rewind(int64_t layer, size_t t) {
  stages_[t].optimizer->restart();
  host_order_ = own_order(sample_order(sub_seed(config_.seed, static_cast<uint64_t>(layer) + 1, t),
                                       config_.samples, config_.batch, steps_per_stage(config_)),
                          *config_.comm);
  backend_.upload(order_, host_order_.data());
  loop_->rewind(0);
}

void StageTrainer::record_steps(size_t t) {
  if (!stages_[t].steps.empty()) return;
  prepare();  // products are timed on quantized weights
  const size_t rotation = weights_ ? 1 : streams_.inputs(t).size();
  for (size_t i = 0; i < rotation; ++i)
    stages_[t].steps.push_back(record(t, i, StepPart::Optimizer));
}

std::unique_ptr<Replay> StageTrainer::record(size_t t, size_t input, StepPart last) {
  return backend_.record([this, t, input, last] { step(t, input, last); });
}

void StageTrainer::rehearse(int64_t layer, size_t t) {
  rewind(layer, t);
  record_steps(t);
  for (const std::unique_ptr<Replay>& step : stages_[t].steps) step->run();
  feed_first(t);
  validate(t);
}

void StageTrainer::feed_first(size_t t) {
  StepFeed(streams_, t, host_order_, 0, steps_per_epoch_).next(0);
}

std::vector<autograd::Anchor> StageTrainer::anchors(size_t t) const {
  using autograd::Anchor;
  if (!adapts_blocks(config_, t)) return {};
  switch (config_.lora_match) {
    case LoraMatch::Moments:
      return {Anchor::Moments};
    case LoraMatch::Kl:
      return {Anchor::Kl};
    case LoraMatch::Both:
      return {Anchor::Moments, Anchor::Kl};
    default:
      return {};
  }
}

// Recorded: everything that it reads is on the device. It starts from masters that prepare() or the
// step before left. The loss of several precisions is the sum of their mean squared errors; its
// gradient counts each by its weight.
void StageTrainer::step(size_t t, size_t input, StepPart last) {
  const std::vector<Stream*> inputs = streams_.inputs(t);
  const Tensor& cursor = loop_->cursor();
  const auto gather = [&](size_t i) { return streams_.step_input(*inputs[i], i, order_, cursor); };
  Tensor x = gather(input);
  const engine::Rows y = streams_.step_target(inputs.size(), order_, cursor);
  const Tensor first_key = streams_.step_first_key(order_, cursor);
  const Tensor weights = weights_ ? weights_->at(cursor) : Tensor();
  const std::vector<autograd::Anchor> anchors = this->anchors(t);
  Tensor target = y.src;
  if (!anchors.empty() && y.order.defined()) {
    target = backend_.empty(x.shape(), backend_.act());
    backend_.gather_rows(target, y);
  }
  quantize();
  if (last == StepPart::Quantize) return;
  Tensor sum = loss_;
  for (size_t p = 0; p < streams_.precisions(); ++p) {
    if (p > 0) x = gather(p);
    Tape tape(backend_, TapeMode::Training);
    if (weights_) block_.select_precision(p);
    const auto forward = [&] {
      const Var out = block_.forward(tape, Var(x), nullptr, recompute_, first_key);
      if (!weights_) return out;
      return autograd::weighted(tape, out, weights.slice(static_cast<int64_t>(p), 1));
    };
    const Var out = forward(), loss = autograd::mse(tape, out, y);
    for (const autograd::Anchor kind : anchors)
      backend_.sum(
          loss.value(),
          autograd::anchor(tape, kind, out, target, config_.lora_match_weight, config_.comm.get())
              .value(),
          1.0, engine::Write::Add);
    if (last == StepPart::Forward) continue;
    average_->begin_pass({p == 0, p + 1 == streams_.precisions()});
    tape.backward(loss);
    if (weights_)
      backend_.sum(loss_, loss.value(), 1.0,
                   p == 0 ? engine::Write::Overwrite : engine::Write::Add);
    else
      sum = loss.value();
  }
  if (last == StepPart::Forward) return;
  average_->join();
  block_.finish_backward();
  if (last == StepPart::Backward) return;
  average_->finish(sum);
  stages_[t].optimizer->step(sum);
  loop_->end_step(*stages_[t].optimizer);
}

// Mean squared error over the validation windows, on the stage's first input stream; the sum over
// the precisions, each on its own.
double StageTrainer::validate(size_t t) {
  prepare();
  backend_.zero(validation_);
  for (size_t p = 0; p < streams_.precisions(); ++p) {
    if (weights_) block_.select_precision(p);
    add_validation(*streams_.inputs(t)[p]);
  }
  return config_.comm->sum({models::download_floats(backend_, validation_)[0]})[0];
}

void StageTrainer::add_validation(Stream& input) {
  const int64_t begin = StreamSet::samples(config_), rows = streams_.rows();
  Reader inputs = streams_.in_order(input, 0, begin, rows);
  Reader targets = streams_.in_order(streams_.target(), 1, begin, rows);
  for (int64_t row = begin; row < rows; row += streams_.batch()) {
    const int64_t count = std::min(streams_.batch(), rows - row);
    Tape tape(backend_, TapeMode::Inference);
    const Var x(streams_.as_windows(inputs.next()));
    const Var y =
        block_.forward(tape, x, nullptr, models::Recompute::None, streams_.first_key(row, count));
    const Var loss = autograd::mse(tape, y, streams_.as_windows(targets.next()));
    backend_.sum(validation_, loss.value(),
                 static_cast<double>(count) / static_cast<double>(config_.val_samples),
                 engine::Write::Add);
  }
}

Json StageTrainer::log_line(const char* phase, const Position& at, int64_t epoch) const {
  return {{"phase", phase},
          {"block", at.block},
          {"stage", to_string({config_.stages[static_cast<size_t>(at.stage)]})},
          {"epoch", epoch}};
}

void StageTrainer::log_validation(const Position& at) const {
  Json line = log_line("validation", at, at.step / steps_per_epoch_);
  line["loss"] = at.validation.back();
  run_.append_log({line});
}

}  // namespace bbb::train
