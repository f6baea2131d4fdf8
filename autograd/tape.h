// Tape: reverse-mode differentiation as a flat list of closures, run backwards.
//
// An op computes its value at once. If the tape records and an input takes a gradient, the op also
// pushes a closure that turns the output's gradient into the gradients of the inputs. backward()
// runs the closures in reverse and frees each once it has run. No graph, no sort.
//
// Gradient contract. A closure reads out.grad() and adds into each input through grad_slot(): the
// first writer allocates and overwrites, later writers accumulate. Only this closure reads
// out.grad(), so it may hand the buffer to an input (give_grad) instead of copying it.
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
  // A leaf whose gradient is written to `grad` (same number of elements, any gradient dtype);
  // `mode` is that of the first write.
  static Var leaf(Tensor value, Tensor grad, Write mode);
  // A leaf that takes a gradient, allocated when first written.
  static Var input(Tensor value);

  bool defined() const { return value_.defined() || gradient_ != nullptr; }
  const Tensor& value() const { return value_; }
  bool requires_grad() const { return gradient_ != nullptr; }
  bool has_grad() const { return gradient_ && gradient_->written; }
  const Tensor& grad() const;  // throws if nothing was written
  // The gradient without the value: for a closure whose backward does not read the value.
  Var gradient_only() const;

  struct Slot {
    Tensor grad;
    Write mode;
  };
  Slot grad_slot(Backend& backend) const;               // the caller must write it
  void give_grad(Backend& backend, Tensor grad) const;  // takes over the buffer, or adds it
  void drop_grad() const;                               // frees an intermediate gradient

 private:
  struct Gradient {
    engine::Shape shape;
    engine::DType dtype;
    Tensor buffer;
    bool owned_by_leaf = false;  // `buffer` is the leaf's: it is written, never replaced
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

  // The Var of an op's output. It takes a gradient if the tape records and any input takes one.
  Var output(Tensor value, std::initializer_list<Var> inputs) const;
  // Keeps `closure` for backward(). Call it only where output.requires_grad().
  void record(std::function<void()> closure);

  // Runs the closures backwards from `root`, whose gradient is `seed`; the seed's buffer is
  // consumed. A loss (mse, head_loss) takes no seed: its gradient is 1. Afterwards the tape is
  // empty.
  void backward(const Var& root, Tensor seed = Tensor());

 private:
  Backend& backend_;
  TapeMode mode_;
  std::vector<std::function<void()>> closures_;
};

// y = fn(tape, x) without keeping fn's intermediates: backward runs fn again, on its own tape. fn
// must be pure: the same x gives the same y. Parameters that fn uses still receive gradients.
Var checkpoint(Tape& tape, const std::function<Var(Tape&, const Var&)>& fn, const Var& x);

}  // namespace bbb::autograd
