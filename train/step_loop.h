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
  // loop. save_every as in TrainConfig.
  StepLoop(Backend& backend, const RunDirectory& run, int64_t total, int64_t tokens_per_step,
           models::Recompute recompute, int64_t save_every);

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

  Backend& backend_;
  const RunDirectory& run_;
  int64_t tokens_per_step_;
  models::Recompute recompute_;
  int64_t window_;  // steps between two reads of the log
  Tensor cursor_;
  Tensor log_;  // real (total, kControlSize)
  SaveTimer timer_;
  float last_loss_ = 0;
};

// GradientAverage: gradients and loss of a step become their means over the ranks, of which each
// has the mean over its equal part of the batch. Recorded.
//
//   passes of backward, last_pass() in front of the last | join() | finish_backward | finish(loss)
//
// The reduction of a weight's gradient starts in the last pass, and runs beside the rest of it.
// finish_backward computes more gradients, linear in those: of a mean they are the mean already,
// and finish() changes nothing but their last bits. With one rank nothing happens.
class GradientAverage {
 public:
  // Sets on_gradient of the parameters, which must be declared; all must outlive this.
  GradientAverage(engine::Comm& comm, autograd::ParameterSet& parameters);

  void last_pass() { last_ = true; }
  void join();
  void finish(const Tensor& loss);  // loss: real (1)

 private:
  engine::Comm& comm_;
  autograd::ParameterSet& parameters_;
  bool last_ = false;
  std::vector<char> started_;  // of each parameter
};

// All tensors that optimizer steps change.
NamedTensors optimizer_state(const autograd::ParameterSet& parameters,
                             const autograd::Optimizer& optimizer);
// The schedule of a phase: 3 % warm-up, then a cosine down to lr / 20.
engine::Schedule schedule_of(double lr, int64_t steps);

}  // namespace bbb::train
