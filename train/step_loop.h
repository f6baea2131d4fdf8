// StepLoop: runs recorded optimizer steps, for both phases: log, saved states, skipped steps.
//
//   feed(s) replay s | feed(s+1) replay s+1 | .. window's end: synchronize, log, perhaps save | ..
//
// A recorded step ends in end_step(), which writes the optimizer's control into a row of the log
// on the device. The host reads the rows of a window at once: each read makes a GPU wait.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "autograd/optimizer.h"
#include "train/run_directory.h"
#include "train/saved_state.h"
#include "train/train.h"

namespace bbb::train {

// What a phase adds to the loop. `line` and `save` are needed.
struct StepHooks {
  std::function<void(int64_t step)> feed;        // before a step
  std::function<Json(int64_t step)> line;        // how the step's line in the log begins
  std::function<void()> before_save;             // finishes everything that a state must follow
  std::function<void(const Position& at)> save;  // writes the state
  std::function<void()> synchronized;            // the host has waited for the device
  std::function<void(const Position& at, float loss)>
      show;  // progress; `loss` is the last one read
  std::function<void(const Position& at)> after_step;
};

class StepLoop {
 public:
  // `total`: most steps between two calls of rewind(). The run must outlive the loop.
  StepLoop(Backend& backend, const RunDirectory& run, int64_t total, int64_t tokens_per_step,
           models::Recompute recompute, int64_t save_every);

  const Tensor& cursor() const { return cursor_; }            // I32 (1): the step, on the device
  void rewind(int64_t step) const;                            // before the step of this number
  void end_step(const autograd::Optimizer& optimizer) const;  // for a recorded step

  struct Outcome {
    int64_t skipped = 0;  // steps whose loss or gradient was not finite, since rewind(0)
    double seconds = 0;   // of the steps, all queued work included
  };
  // Runs steps [at.step, end), `steps` in rotation, and saves when it is time before the end.
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

// All that an optimizer's steps change.
NamedTensors optimizer_state(const autograd::ParameterSet& parameters,
                             const autograd::Optimizer& optimizer);
// The schedule of a phase: 3 % warm-up, cosine to a twentieth.
engine::Schedule schedule_of(double lr, int64_t steps);

}  // namespace bbb::train
