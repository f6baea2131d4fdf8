// Saved states: everything that a phase needs to continue from a step as if it had never stopped,
// and the timer that decides when to save.
//
// A state is a file of the run (run_file.h). It holds the phase's tensors as on the device, and
//   position    I64 (3)  block, stage, steps done
//   validation  F64 (n)  losses of the stage so far; missing if there are none
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "autograd/parameter.h"
#include "data/safetensors.h"
#include "engine/backend.h"

namespace bbb::train {

// In the end-to-end phase, block is 0.
struct Position {
  int64_t block = 0;
  int64_t stage = 0;
  int64_t step = 0;                // steps done
  std::vector<double> validation;  // before training, then after each epoch
};

struct NamedTensor {
  std::string name;
  engine::Tensor tensor;  // act, real or U8
  // If not null, the tensor is a flat buffer of this set. A state holds the whole one, whatever
  // part this rank has. So any number of ranks continues from it.
  const autograd::ParameterSet* set = nullptr;
};
using NamedTensors = std::vector<NamedTensor>;
int64_t bytes_of(const NamedTensors& tensors);  // in a state

// Replaces the file at `path` completely or not at all. The work that computes the tensors must
// have finished. Throws, naming path and cause, if the file cannot be written. Of sharded tensors
// every rank calls it, and those without a path write nothing.
void save_state(const std::string& path, uint64_t run, const Position& position,
                engine::Backend& backend, const NamedTensors& tensors);

class SavedState {
 public:
  // Maps the file. Throws, naming it, if it is damaged or of another run.
  SavedState(const std::string& path, uint64_t run);
  const Position& position() const { return position_; }
  // Uploads every tensor. Throws if one is missing in the file or has another shape or dtype there.
  void load(engine::Backend& backend, const NamedTensors& tensors) const;

 private:
  std::string path_;
  data::SafeTensors file_;
  Position position_;
};

// When a phase saves: every `every` steps or, if that is 0, by the clock: after 30 s or twenty
// times the duration of the last save, whichever is longer. So saving takes at most a twentieth of
// the time.
class SaveTimer {
 public:
  using Clock = std::chrono::steady_clock;

  explicit SaveTimer(int64_t every) : every_(every), since_(Clock::now()) {}
  bool due(int64_t step, Clock::time_point now = Clock::now()) const;
  void restart(Clock::time_point now = Clock::now()) { since_ = now; }  // the clock starts again
  void saved(Clock::time_point begun, Clock::time_point now = Clock::now());

 private:
  int64_t every_;
  Clock::time_point since_;
  Clock::duration cost_{};  // of the last save
};

}  // namespace bbb::train
