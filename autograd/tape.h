// Tape: reverse-mode differentiation as a flat list of closures, run backwards.
//
// An op computes its value at once and, if the tape records and an input wants a gradient, pushes a
// closure that turns the output's gradient into those of the inputs. backward() runs the closures
// in reverse and frees each once it has run. No graph, no sort.
//
// Gradient contract. A closure reads out.grad() and adds into each input through grad_slot(): the
// first writer allocates and overwrites, later ones accumulate. Once a closure has run, nobody
// reads out.grad() again, so a closure may hand that buffer on (give_grad) instead of copying it.
#pragma once

#include <functional>
#include <initializer_list>
#include <memory>
#include <vector>

#include "engine/backend.h"

namespace bbb::autograd {

using engine::Backend;
using engine::Tensor;
using engine::Write;

// A value and, while training, its gradient. Copying a Var copies the handles; the gradient is
// shared by all copies, so a leaf used twice accumulates whatever the order of its uses.
class Var {
 public:
  Var() = default;
  // A constant: no gradient.
  explicit Var(Tensor value) : value_(std::move(value)) {}
  // A leaf whose gradient goes to `grad` (same number of elements, any gradient dtype); `mode` says
  // whether the first write overwrites it.
  static Var leaf(Tensor value, Tensor grad, Write mode);
  // A leaf that wants a gradient, allocated when first written.
  static Var input(Tensor value);

  bool defined() const { return value_.defined() || gradient_ != nullptr; }
  const Tensor& value() const { return value_; }
  bool requires_grad() const { return gradient_ != nullptr; }
  bool has_grad() const { return gradient_ && gradient_->written; }
  const Tensor& grad() const;  // throws if nothing was written
  // The handle a closure keeps of a value that its backward does not read: the gradient alone.
  Var gradient_only() const;

  struct Slot {
    Tensor grad;
    Write mode;
  };
  Slot grad_slot(Backend& backend) const;               // marks it written
  void give_grad(Backend& backend, Tensor grad) const;  // takes over the buffer, or adds it
  void drop_grad() const;                               // frees an intermediate gradient

 private:
  struct Gradient {
    engine::Shape shape;
    engine::DType dtype;
    Tensor buffer;
    bool owned_by_leaf = false;  // the buffer outlives the pass and must be written, not replaced
    bool written = false;
    Write first = Write::Overwrite;
  };
  Tensor value_;
  std::shared_ptr<Gradient> gradient_;
  friend class Tape;
};

enum class TapeMode { Inference, Training };

class Tape {
 public:
  Tape(Backend& backend, TapeMode mode) : backend_(backend), mode_(mode) {}

  Backend& backend() const { return backend_; }
  bool recording() const { return mode_ == TapeMode::Training; }

  // The Var of an op's output: wants a gradient where the tape records and any input does.
  Var output(Tensor value, std::initializer_list<Var> inputs) const;
  // Keeps `closure` for backward(). Call it only where output.requires_grad().
  void record(std::function<void()> closure);

  // Runs the closures backwards from `root`, whose gradient is `seed`; the buffer is consumed. A
  // loss (mse, head_loss) is a root of gradient 1 and takes no seed: its factor is an argument of
  // the loss. The tape is empty afterwards.
  void backward(const Var& root, Tensor seed = Tensor());

 private:
  Backend& backend_;
  TapeMode mode_;
  std::vector<std::function<void()>> closures_;
};

// y = fn(tape, x) without keeping fn's intermediates: backward runs fn again on a tape of its own.
// fn must be pure: the same x gives the same y. Parameters used inside still receive gradients.
Var checkpoint(Tape& tape, const std::function<Var(Tape&, const Var&)>& fn, const Var& x);

}  // namespace bbb::autograd
