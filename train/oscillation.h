// Oscillation: what the end-to-end phase does about codes that oscillate between two neighbours
// (Backend::average, dampen, freeze_flips), as configured.
#pragma once

#include "train/saved_state.h"
#include "train/student.h"

namespace bbb::train {

class Oscillation {
 public:
  // After student.load(). The references must outlive this.
  Oscillation(engine::Backend& backend, const TrainConfig& config, Student& student);

  void start() const;                                          // of a stage that does not resume
  void change_gradients(const engine::Tensor& control) const;  // recorded, before the optimizer
  void average(const engine::Tensor& control) const;           // recorded, after it
  void finish() const;                                         // the result: perhaps the average
  void add_state(NamedTensors& state) const;

 private:
  engine::Backend& backend_;
  const TrainConfig& config_;
  Student& student_;
  engine::Tensor average_;  // real: of the masters; undefined without --e2e-average
  engine::Tensor flips_;    // U8: of the masters (Backend::freeze_flips); undefined without it
};

}  // namespace bbb::train
