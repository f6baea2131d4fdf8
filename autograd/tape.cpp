#include "autograd/tape.h"

#include <utility>

namespace bbb::autograd {

Var Var::leaf(Tensor value, Tensor grad, Write mode) {
  BBB_ASSERT(value.numel() == grad.numel());
  Var var = input(std::move(value));
  var.gradient_->dtype = grad.dtype();
  var.gradient_->buffer = grad.view(var.gradient_->shape);
  var.gradient_->owned_by_leaf = true;
  var.gradient_->first = mode;
  return var;
}

Var Var::input(Tensor value) {
  Var var(std::move(value));
  var.gradient_ = std::make_shared<Gradient>();
  var.gradient_->shape = var.value_.shape();
  var.gradient_->dtype = var.value_.dtype();
  return var;
}

const Tensor& Var::grad() const {
  BBB_ASSERT(has_grad() && gradient_->buffer.defined());
  return gradient_->buffer;
}

Var Var::gradient_only() const {
  Var var;
  var.gradient_ = gradient_;
  return var;
}

Var::Slot Var::grad_slot(Backend& backend) const {
  BBB_ASSERT(requires_grad());
  Gradient& g = *gradient_;
  if (!g.buffer.defined()) g.buffer = backend.empty(g.shape, g.dtype);
  const Write mode = g.written ? Write::Add : g.first;
  g.written = true;
  return {g.buffer, mode};
}

void Var::give_grad(Backend& backend, Tensor grad) const {
  if (!requires_grad()) return;
  Gradient& g = *gradient_;
  BBB_ASSERT(grad.numel() == engine::numel_of(g.shape) && grad.dtype() == g.dtype);
  grad = grad.view(g.shape);
  if (!g.written && !g.owned_by_leaf) {
    g.buffer = std::move(grad);
    g.written = true;
    return;
  }
  const Slot slot = grad_slot(backend);
  if (slot.mode == Write::Overwrite)
    backend.copy(slot.grad, grad);
  else
    backend.add(slot.grad, slot.grad, grad);
}

void Var::drop_grad() const {
  if (!requires_grad()) return;
  if (!gradient_->owned_by_leaf) gradient_->buffer = Tensor();
  gradient_->written = false;
}

Var Tape::output(Tensor value, std::initializer_list<Var> inputs) const {
  bool wanted = false;
  for (const Var& input : inputs) wanted = wanted || input.requires_grad();
  return wanted && recording() ? Var::input(std::move(value)) : Var(std::move(value));
}

void Tape::record(std::function<void()> closure) {
  BBB_ASSERT(recording());
  closures_.push_back(std::move(closure));
}

void Tape::backward(const Var& root, Tensor seed) {
  BBB_ASSERT(root.requires_grad());
  if (seed.defined())
    root.give_grad(backend_, std::move(seed));
  else
    root.gradient_->written = true;
  while (!closures_.empty()) {
    // Moved out first, so that what the closure holds is freed as soon as it has run.
    const std::function<void()> closure = std::move(closures_.back());
    closures_.pop_back();
    closure();
  }
}

Var checkpoint(Tape& tape, const std::function<Var(Tape&, const Var&)>& fn, const Var& x) {
  Backend& backend = tape.backend();
  Tape inference(backend, TapeMode::Inference);
  const Tensor value = fn(inference, Var(x.value())).value();
  if (!tape.recording()) return Var(value);

  // Even if x takes no gradient, parameters inside fn may.
  Var out = Var::input(value);
  tape.record([&backend, fn, x, out = out.gradient_only()] {
    if (!out.has_grad()) return;
    Tensor seed = out.grad();
    out.drop_grad();
    Tape again(backend, TapeMode::Training);
    const Var x_again = x.requires_grad() ? Var::input(x.value()) : Var(x.value());
    const Var y = fn(again, x_again).gradient_only();  // the value is known already
    if (!y.requires_grad()) return;
    again.backward(y, std::move(seed));
    if (x_again.has_grad()) x.give_grad(backend, x_again.grad());
  });
  return out;
}

}  // namespace bbb::autograd
