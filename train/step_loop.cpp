#include "train/step_loop.h"

#include <chrono>
#include <cmath>
#include <utility>

#include "models/quant_linear.h"

namespace bbb::train {

using engine::DType;
using Clock = std::chrono::steady_clock;

StepLoop::StepLoop(Backend& backend, const RunDirectory& run, int64_t total,
                   int64_t tokens_per_step, models::Recompute recompute, int64_t save_every,
                   engine::Comm* together)
    : backend_(backend),
      run_(run),
      tokens_per_step_(tokens_per_step),
      recompute_(recompute),
      window_(backend.device() == engine::DeviceType::Cuda ? 20 : 1),
      cursor_(backend.zeros({1}, DType::I32)),
      log_(backend.empty({total, engine::kControlSize}, backend.real())),
      timer_(save_every),
      together_(save_every == 0 ? together : nullptr) {}

bool StepLoop::save_is_due(int64_t step) const {
  const bool due = timer_.due(step);
  return together_ == nullptr ? due : together_->gather({due ? 1.0 : 0.0})[0][0] != 0;
}

void StepLoop::rewind(int64_t step) const {
  const int32_t value = static_cast<int32_t>(step);
  backend_.upload(cursor_, &value);
}

void StepLoop::end_step(const autograd::Optimizer& optimizer) const {
  backend_.log_control(log_, optimizer.control(), cursor_);
  backend_.advance(cursor_);
}

StepLoop::Outcome StepLoop::run(const std::vector<std::unique_ptr<engine::Replay>>& steps,
                                Position& at, int64_t end, const StepHooks& hooks) {
  Outcome outcome;
  int64_t logged = at.step;
  auto since = Clock::now();
  while (at.step < end) {
    if (hooks.feed) hooks.feed(at.step);
    steps[static_cast<size_t>(at.step) % steps.size()]->run();
    ++at.step;
    const bool last = at.step == end, save_now = !last && save_is_due(at.step);
    if (last || save_now || at.step % window_ == 0) {
      backend_.synchronize();
      const double seconds = std::chrono::duration<double>(Clock::now() - since).count();
      outcome.seconds += seconds;
      outcome.skipped = read_log(logged, at.step, seconds, hooks);
      logged = at.step;
      if (hooks.synchronized) hooks.synchronized();
      if (save_now) save(at, hooks);
      since = Clock::now();
    }
    if (hooks.show) hooks.show(at, last_loss_);
    if (hooks.after_step) hooks.after_step(at);
  }
  return outcome;
}

void StepLoop::save_if_due(const Position& at, const StepHooks& hooks) {
  if (!timer_.due(at.step)) return;
  backend_.synchronize();
  save(at, hooks);
}

void StepLoop::save(const Position& at, const StepHooks& hooks) {
  if (hooks.before_save) hooks.before_save();
  const auto begun = SaveTimer::Clock::now();
  hooks.save(at);
  timer_.saved(begun);
}

int64_t StepLoop::read_log(int64_t begin, int64_t end, double seconds, const StepHooks& hooks) {
  const std::vector<float> slots = models::download_floats(backend_, log_.rows(begin, end - begin));
  const double tokens_per_s = static_cast<double>((end - begin) * tokens_per_step_) / seconds;
  std::vector<Json> lines;
  int64_t skipped = 0;
  for (int64_t step = begin; step < end; ++step) {
    const float* control = &slots[static_cast<size_t>((step - begin) * engine::kControlSize)];
    Json line = hooks.line(step);
    line["step"] = step;
    line["loss"] = control[engine::kLoss];
    line["lr"] = control[engine::kLr];
    line["grad_norm"] = control[engine::kGradNorm];
    line["skipped"] = control[engine::kSkip] != 0;
    line["tokens_per_s"] = std::llround(tokens_per_s);
    line["memory_bytes"] = backend_.memory_peak_bytes();
    line["recompute"] = models::to_string(recompute_);
    lines.push_back(std::move(line));
    last_loss_ = control[engine::kLoss];
    skipped = std::llround(control[engine::kSkipped]);
  }
  run_.append_log(lines);
  return skipped;
}

GradientAverage::GradientAverage(engine::Comm& comm, autograd::ParameterSet& parameters)
    : comm_(comm), parameters_(parameters), started_(parameters.parameters().size()) {
  if (comm.size() == 1) return;
  for (const auto& parameter : parameters.parameters())
    parameter->on_gradient = [this, of = parameter.get()] {
      if (of->sharded)
        start_sharded(*of);
      else if (pass_.last && !of->frozen)
        start(*of);
    };
}

// The first gradient of a pass may take the buffer of the last one of the pass before.
void GradientAverage::begin_pass(Pass pass) {
  take_part();
  pass_ = pass;
  comm_.show_work();
}

void GradientAverage::start(const autograd::Parameter& parameter) {
  comm_.start_all_reduce(parameter.grad, engine::Reduce::Mean);
  started_[static_cast<size_t>(parameter.slot)] = true;
}

void GradientAverage::start_sharded(const autograd::Parameter& parameter) {
  BBB_ASSERT(reducing_ == nullptr || (reducing_->slot - parameter.slot) % 2 != 0);  // other buffer
  take_part();
  parameters_.clear_padding(parameter);
  comm_.start_reduce_scatter(parameters_.gradient_parts(parameter), engine::Reduce::Mean);
  reducing_ = &parameter;
  take_mode_ = pass_.first ? engine::Write::Overwrite : engine::Write::Add;
}

void GradientAverage::take_part() {
  if (reducing_ == nullptr) return;
  comm_.join();
  Backend& backend = parameters_.backend();
  const Tensor part = comm_.part_of(parameters_.gradient_parts(*reducing_));
  const Tensor gradient = parameters_.own_part(parameters_.grads(), *reducing_);
  if (take_mode_ == engine::Write::Add)
    backend.add(gradient, gradient, part);
  else if (gradient.dtype() == part.dtype())
    backend.copy(gradient, part);
  else
    backend.cast(gradient, part);
  reducing_ = nullptr;
}

void GradientAverage::join() {
  take_part();
  comm_.join();
}

// Sums in real, also of gradients that are act, but for those of two ranks: their sum is rounded
// once either way.
void GradientAverage::reduce(const Tensor& gradients) {
  Backend& backend = parameters_.backend();
  if (gradients.dtype() == backend.real() || comm_.size() == 2)
    return comm_.all_reduce(gradients, engine::Reduce::Mean);
  const Tensor& buffer = parameters_.spare_buffer();
  for (int64_t begin = 0; begin < gradients.numel(); begin += buffer.numel()) {
    const int64_t count = std::min(buffer.numel(), gradients.numel() - begin);
    const Tensor piece = gradients.slice(begin, count), sum = buffer.slice(0, count);
    backend.cast(sum, piece);
    comm_.all_reduce(sum, engine::Reduce::Mean);
    backend.cast(piece, sum);
  }
}

// In as few pieces as the parameters that need nothing leave.
void GradientAverage::finish(const Tensor& loss) {
  if (comm_.size() == 1) return;
  const Tensor& grads = parameters_.grads();
  int64_t begin = parameters_.sharded_elements();
  const auto reduce_up_to = [&](int64_t end) {
    if (begin < end) reduce(grads.slice(begin, end - begin));
  };
  for (size_t i = 0; i < started_.size(); ++i) {
    const autograd::Parameter& parameter = *parameters_.parameters()[i];
    const bool done = std::exchange(started_[i], false) || parameter.derived || parameter.frozen;
    if (!done || parameter.sharded) continue;
    reduce_up_to(parameters_.offset(parameter));
    begin = parameters_.offset(parameter) + quant::padded_elements(parameter.grad.numel());
  }
  reduce_up_to(grads.numel());
  comm_.all_reduce(loss, engine::Reduce::Mean);
}

NamedTensors optimizer_state(const autograd::ParameterSet& parameters,
                             const autograd::Optimizer& optimizer) {
  return {{"masters", parameters.masters(), &parameters},
          {"m", parameters.m(), &parameters},
          {"v", parameters.v(), &parameters},
          {"control", optimizer.control()}};
}

engine::Schedule schedule_of(double lr, int64_t steps) {
  engine::Schedule schedule;
  schedule.peak_lr = lr;
  schedule.warmup_steps = std::llround(0.03 * static_cast<double>(steps));
  schedule.total_steps = steps;
  return schedule;
}

}  // namespace bbb::train
