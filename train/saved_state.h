// The middle of a phase on disk: all that it needs to go on from a step as if it had never stopped,
// and when that is written.
//
// A file of the run (run_file.h): the phase's tensors as they are on the device, beside them
//   position    I64 (3)  block, stage, steps done
//   validation  F64 (n)  losses of the stage so far; only where there are any
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "data/safetensors.h"
#include "engine/backend.h"

namespace bbb::train {

// End to end there are no blocks and stages: 0.
struct Position {
  int64_t block = 0;
  int64_t stage = 0;
  int64_t step = 0;                // steps done
  std::vector<double> validation;  // before training, then after each epoch
};

using NamedTensors = std::vector<std::pair<std::string, engine::Tensor>>;  // act or real

// Replaces the file at `path` whole or not at all. What computes the tensors must have finished.
// Throws, naming path and cause, where it cannot be written.
void save_state(const std::string& path, uint64_t run, const Position& position,
                engine::Backend& backend, const NamedTensors& tensors);

class SavedState {
 public:
  // Maps the file. Throws, naming it, where it is damaged or of another run.
  SavedState(const std::string& path, uint64_t run);
  const Position& position() const { return position_; }
  // Uploads every tensor; throws where the file holds it in another shape or dtype.
  void load(engine::Backend& backend, const NamedTensors& tensors) const;

 private:
  std::string path_;
  data::SafeTensors file_;
  Position position_;
};

// When a phase saves: after every `every` steps, or, where that is 0, by the clock: after 30 s, and
// after twenty times as long as saving took, so that it costs a twentieth at most.
class SaveTimer {
 public:
  using Clock = std::chrono::steady_clock;

  explicit SaveTimer(int64_t every) : every_(every), since_(Clock::now()) {}
  bool due(int64_t step, Clock::time_point now = Clock::now()) const;
  void restart(Clock::time_point now = Clock::now()) { since_ = now; }  // nothing is unsaved
  void saved(Clock::time_point begun, Clock::time_point now = Clock::now());

 private:
  int64_t every_;
  Clock::time_point since_;
  Clock::duration cost_{};  // of the last save
};

}  // namespace bbb::train
