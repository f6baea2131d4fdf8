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
#include <memory>
#include <vector>

#include "engine/backend.h"

namespace bbb::autograd {

using engine::Backend;
using engine::Tensor;
using engine::Write;

// A value and, while training, its gradient. Copying a Var copies the handle.
class Var {
 public:
  Var() = default;
  // A constant: no gradient.
  explicit Var(Tensor value);
  // A leaf whose gradient goes to `grad` (same number of elements, any gradient dtype); `mode` says
  // whether the first write overwrites it.
  static Var leaf(Tensor value, Tensor grad, Write mode);
  // A leaf that wants a gradient, allocated when first written.
  static Var input(Tensor value);

  bool defined() const { return node_ != nullptr; }
  const Tensor& value() const { return node_->value; }
  bool requires_grad() const { return node_ && node_->requires_grad; }
  bool has_grad() const { return node_ && node_->written; }
  const Tensor& grad() const;  // throws if nothing was written
  void clear_value() { node_->value = Tensor(); }

  struct Slot {
    Tensor grad;
    Write mode;
  };
  Slot grad_slot(Backend& backend) const;               // marks it written
  void give_grad(Backend& backend, Tensor grad) const;  // takes over the buffer, or adds it
  void drop_grad() const;                               // frees an intermediate gradient

 private:
  struct Node {
    Tensor value;
    Tensor grad;
    bool requires_grad = false;
    bool written = false;
    Write first = Write::Overwrite;
  };
  std::shared_ptr<Node> node_;
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

  // Runs the closures backwards from `root`, whose gradient is `seed`. The tape is empty
  // afterwards.
  void backward(const Var& root, Tensor seed);

 private:
  Backend& backend_;
  TapeMode mode_;
  std::vector<std::function<void()>> closures_;
};

// y = fn(tape, x) without keeping fn's intermediates: backward runs fn again on a tape of its own.
// fn must be pure: the same x gives the same y. Parameters used inside still receive gradients.
Var checkpoint(Tape& tape, const std::function<Var(Tape&, const Var&)>& fn, const Var& x);

}  // namespace bbb::autograd
