// StepLoop: runs the recorded optimizer steps of both phases: log, saved states, skipped steps.
//
//   feed(s) replay s | feed(s+1) replay s+1 | .. | end of a window: synchronize, log, save if due
//
// A recorded step ends in end_step(), which copies the optimizer's control into a row of the log
// on the device. The host reads the rows of a window at once, because each read makes a GPU wait.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "autograd/optimizer.h"
#include "train/run_directory.h"
#include "train/saved_state.h"
#include "train/train.h"

namespace bbb::train {

// What a phase adds to the loop. `line` and `save` are required, the others may be empty.
struct StepHooks {
  std::function<void(int64_t step)> feed;        // before a step
  std::function<Json(int64_t step)> line;        // how the step's line in the log begins
  std::function<void()> before_save;             // finishes everything that a state must follow
  std::function<void(const Position& at)> save;  // writes the state
  std::function<void()> synchronized;            // the host has waited for the device
  std::function<void(const Position& at, float loss)>
      show;  // progress, after a step; `loss` of the last step that was logged
  std::function<void(const Position& at)> after_step;
};

class StepLoop {
 public:
  // `total`: the number of steps, rows of the log on the device. backend and run must outlive the
  // loop. save_every as in TrainConfig. together: null, or the ranks that save at the same steps,
  // those that the first one's clock chooses.
  StepLoop(Backend& backend, const RunDirectory& run, int64_t total, int64_t tokens_per_step,
           models::Recompute recompute, int64_t save_every, engine::Comm* together = nullptr);

  const Tensor& cursor() const { return cursor_; }            // I32 (1): the step, on the device
  void rewind(int64_t step) const;                            // the next step will be `step`
  void end_step(const autograd::Optimizer& optimizer) const;  // the last call of a recorded step

  struct Outcome {
    int64_t skipped = 0;  // steps whose loss or gradient was not finite, since the first step
    double seconds = 0;   // of the steps, including all work that they queued
  };
  // Runs steps [at.step, end): step s replays steps[s % steps.size()]. Advances `at`. Saves a state
  // when it is due, but not after the last step, where the caller may call save_if_due().
  Outcome run(const std::vector<std::unique_ptr<engine::Replay>>& steps, Position& at, int64_t end,
              const StepHooks& hooks);
  void save_if_due(const Position& at, const StepHooks& hooks);
  void restart_timer() { timer_.restart(); }

 private:
  int64_t read_log(int64_t begin, int64_t end, double seconds, const StepHooks& hooks);
  void save(const Position& at, const StepHooks& hooks);
  bool save_is_due(int64_t step) const;

  Backend& backend_;
  const RunDirectory& run_;
  int64_t tokens_per_step_;
  models::Recompute recompute_;
  int64_t window_;  // steps between two reads of the log
  Tensor cursor_;
  Tensor log_;  // real (total, kControlSize)
  SaveTimer timer_;
  engine::Comm* together_;
  float last_loss_ = 0;
};

// GradientAverage: gradients and loss of a step become their means over the ranks, of which each
// has the mean over its equal part of the batch. Recorded.
//
//   begin_pass() backward | begin_pass() backward | .. | join() | finish_backward | finish(loss)
//
// The reduction of a weight's gradient starts in the last pass, and runs beside the rest of it.
// What finish_backward makes of these gradients, which is linear in them, is a mean already. With
// one rank nothing happens.
//
// The gradient of a sharded parameter is reduced in every pass, while that of the next one is
// computed in the other buffer; then this rank's part goes to the flat gradients:
//
//   compute   dW 6 | dW 5 | copy part 6, dW 4 | copy part 5, dW 3 | ..
//   ranks          | reduce 6 | reduce 5      | reduce 4          | ..
class GradientAverage {
 public:
  // Sets on_gradient of the parameters, which must be allocated; all must outlive this.
  GradientAverage(engine::Comm& comm, autograd::ParameterSet& parameters);

  struct Pass {
    bool first, last;  // of the step
  };
  void begin_pass(Pass pass);
  void join();
  void finish(const Tensor& loss);  // loss: real (1)

 private:
  void start(const autograd::Parameter& parameter);
  void start_sharded(const autograd::Parameter& parameter);
  void take_part();  // of the last parameter that start_sharded() got
  void reduce(const Tensor& gradients);

  engine::Comm& comm_;
  autograd::ParameterSet& parameters_;
  Pass pass_{true, true};
  std::vector<char> started_;  // of each parameter: nothing is left to reduce
  const autograd::Parameter* reducing_ = nullptr;
  engine::Write take_mode_ = engine::Write::Overwrite;
};

// All tensors that optimizer steps change.
NamedTensors optimizer_state(const autograd::ParameterSet& parameters,
                             const autograd::Optimizer& optimizer);
// The schedule of a phase: 3 % warm-up, then a cosine down to lr / 20.
engine::Schedule schedule_of(double lr, int64_t steps);

}  // namespace bbb::train
