// Every op: the value, then a closure that holds only what its backward reads.
#include "autograd/ops.h"

#include <algorithm>
#include <utility>

namespace bbb::autograd {

using engine::DType;
using engine::Rotation;
using engine::Shape;

namespace {

// (..., K) as the matrix (M, K).
Tensor matrix(const Tensor& x) { return x.view({x.numel() / x.dim(-1), x.dim(-1)}); }

Shape with_last(Shape shape, int64_t last) {
  shape.back() = last;
  return shape;
}

// The gradient `dx` of a loss of gradient 1, made in the forward pass, becomes x's in the backward.
void record_loss(Tape& tape, const Var& loss, const Var& x, const Tensor& dx) {
  tape.record([&backend = tape.backend(), loss = loss.gradient_only(), x = x.gradient_only(), dx] {
    if (loss.has_grad()) x.give_grad(backend, dx);
  });
}

}  // namespace

Var linear(Tape& tape, const Var& x, const Var& w, const Tensor& alpha, const Var& residual) {
  Backend& backend = tape.backend();
  const int64_t n = w.value().dim(0);
  Tensor y = backend.empty(with_last(x.value().shape(), n), backend.act());
  backend.gemm_nt(matrix(y), matrix(x.value()), w.value(), alpha,
                  residual.defined() ? matrix(residual.value()) : Tensor());
  Var out = tape.output(y, {x, w, residual});
  if (!out.requires_grad()) return out;
  // dx needs w's value and dw needs x's: each is kept only where the other's gradient is wanted.
  const Tensor x_value = w.requires_grad() ? x.value() : Tensor();
  const Tensor w_value = x.requires_grad() ? w.value() : Tensor();
  tape.record([&backend, x = x.gradient_only(), w = w.gradient_only(), alpha, x_value, w_value,
               residual = residual.gradient_only(), out = out.gradient_only()] {
    if (!out.has_grad()) return;
    const Tensor dy = out.grad();
    if (w.requires_grad()) {
      const Var::Slot slot = w.grad_slot(backend);
      backend.gemm_tn(slot.grad, matrix(dy), matrix(x_value), slot.mode);
    }
    if (x.requires_grad()) {
      const Var::Slot slot = x.grad_slot(backend);
      backend.gemm_nn(matrix(slot.grad), matrix(dy), w_value, alpha, slot.mode);
    }
    residual.give_grad(backend, dy);
  });
  return out;
}

Var rms_norm(Tape& tape, const Var& x, const Var& w, double eps) {
  Backend& backend = tape.backend();
  const Tensor rows = matrix(x.value());
  Tensor y = backend.empty(x.value().shape(), backend.act());
  Tensor inv_rms = backend.empty({rows.dim(0)}, backend.real());
  backend.rms_norm(matrix(y), inv_rms, rows, w.value(), eps);
  Var out = tape.output(y, {x, w});
  if (!out.requires_grad()) return out;
  tape.record([&backend, x, w, inv_rms, out = out.gradient_only()] {
    if (!out.has_grad()) return;
    const Var::Slot dx =
        x.requires_grad() ? x.grad_slot(backend) : Var::Slot{Tensor(), Write::Overwrite};
    const Var::Slot dw =
        w.requires_grad() ? w.grad_slot(backend) : Var::Slot{Tensor(), Write::Overwrite};
    backend.rms_norm_backward(dx.grad.defined() ? matrix(dx.grad) : Tensor(), dw.grad,
                              matrix(out.grad()), matrix(x.value()), inv_rms, w.value(), dx.mode,
                              dw.mode);
  });
  return out;
}

Var swiglu(Tape& tape, const Var& gate, const Var& up) {
  Backend& backend = tape.backend();
  Tensor h = backend.empty(gate.value().shape(), backend.act());
  backend.swiglu(h, gate.value(), up.value());
  Var out = tape.output(h, {gate, up});
  if (!out.requires_grad()) return out;
  tape.record([&backend, gate, up, out = out.gradient_only()] {
    if (!out.has_grad()) return;
    Tensor dgate = backend.empty(gate.value().shape(), backend.act());
    Tensor dup = backend.empty(up.value().shape(), backend.act());
    backend.swiglu_backward(dgate, dup, out.grad(), gate.value(), up.value());
    gate.give_grad(backend, dgate);
    up.give_grad(backend, dup);
  });
  return out;
}

Var rope(Tape& tape, const Var& x, const Tensor& inv_freq, const Tensor& start) {
  Backend& backend = tape.backend();
  backend.rope(x.value(), inv_freq, start, Rotation::Forward);
  Var out = tape.output(x.value(), {x});
  if (!out.requires_grad()) return out;
  // A rotation's transpose is its inverse: the gradient turns back in its own buffer.
  tape.record([&backend, x = x.gradient_only(), inv_freq, start, out = out.gradient_only()] {
    if (!out.has_grad()) return;
    backend.rope(out.grad(), inv_freq, start, Rotation::Inverse);
    x.give_grad(backend, out.grad());
  });
  return out;
}

Var attention(Tape& tape, const Var& q, const Var& k, const Var& v, const AttentionSpec& spec) {
  Backend& backend = tape.backend();
  const Shape& shape = q.value().shape();  // (B, T, H, d)
  Tensor o = backend.empty(shape, backend.act());
  Tensor lse = backend.empty({shape[0], shape[2], shape[1]}, backend.real());
  backend.attention(o, lse, q.value(), k.value(), v.value(), spec);
  Var out = tape.output(o, {q, k, v});
  if (!out.requires_grad()) return out;
  tape.record([&backend, q, k, v, o, lse, spec, out = out.gradient_only()] {
    if (!out.has_grad()) return;
    Tensor dq = backend.empty(q.value().shape(), backend.act());
    Tensor dk = backend.empty(k.value().shape(), backend.act());
    Tensor dv = backend.empty(v.value().shape(), backend.act());
    backend.attention_backward(dq, dk, dv, out.grad(), q.value(), k.value(), v.value(), o, lse,
                               spec);
    q.give_grad(backend, dq);
    k.give_grad(backend, dk);
    v.give_grad(backend, dv);
  });
  return out;
}

Var add(Tape& tape, const Var& a, const Var& b) {
  Backend& backend = tape.backend();
  Tensor sum = backend.empty(a.value().shape(), backend.act());
  backend.add(sum, a.value(), b.value());
  Var out = tape.output(sum, {a, b});
  if (!out.requires_grad()) return out;
  tape.record([&backend, a = a.gradient_only(), b = b.gradient_only(), out = out.gradient_only()] {
    if (!out.has_grad()) return;
    if (b.requires_grad()) {
      const Var::Slot slot = b.grad_slot(backend);
      if (slot.mode == Write::Overwrite)
        backend.copy(slot.grad, out.grad());
      else
        backend.add(slot.grad, slot.grad, out.grad());
    }
    a.give_grad(backend, out.grad());  // last: out's buffer is a's from here on
  });
  return out;
}

Var reshape(Tape& tape, const Var& x, Shape shape) {
  Var out = tape.output(x.value().view(std::move(shape)), {x});
  if (!out.requires_grad()) return out;
  tape.record([&backend = tape.backend(), x = x.gradient_only(), out = out.gradient_only()] {
    if (out.has_grad()) x.give_grad(backend, out.grad());
  });
  return out;
}

Var embed(Tape& tape, const Tensor& ids, const Tensor& table) {
  Backend& backend = tape.backend();
  Shape shape = ids.shape();
  shape.push_back(table.dim(1));
  Tensor out = backend.empty(shape, backend.act());
  backend.embed(matrix(out), ids.view({ids.numel()}), table);
  return tape.output(out, {});
}

Var mse(Tape& tape, const Var& x, const Tensor& y) {
  Backend& backend = tape.backend();
  Tensor loss = backend.empty({1}, backend.real());
  Var out = tape.output(loss, {x});
  Tensor dx = out.requires_grad() ? backend.empty(x.value().shape(), backend.act()) : Tensor();
  backend.mse(loss, dx, x.value(), y);
  if (out.requires_grad()) record_loss(tape, out, x, dx);
  return out;
}

Var head_loss(Tape& tape, LossKind kind, const Var& h, const Tensor& head, const Tensor& targets,
              const Tensor& teacher_h, double scale, int64_t chunk_rows, const Tensor& row_loss) {
  Backend& backend = tape.backend();
  const int64_t m = h.value().dim(0), v = head.dim(0);
  const int64_t chunk = std::min(chunk_rows, m);
  BBB_ASSERT(chunk > 0 && (kind == LossKind::Kl) == teacher_h.defined());

  Tensor loss = backend.empty({1}, backend.real());
  Var out = tape.output(loss, {h});
  const bool backward = out.requires_grad();
  // Scratch of one chunk, whatever M is. Training keeps logits as activations, and their gradient
  // in the same place; a loss that is only measured wants more digits than activations have.
  const DType dtype = backward ? backend.act() : backend.real();
  Tensor logits = backend.empty({chunk, v}, dtype);
  Tensor teacher = teacher_h.defined() ? backend.empty({chunk, v}, dtype) : Tensor();
  Tensor dh = backward ? backend.empty(h.value().shape(), backend.act()) : Tensor();
  Tensor losses = row_loss.defined() ? row_loss : backend.empty({m}, backend.real());

  for (int64_t begin = 0; begin < m; begin += chunk) {
    const int64_t rows = std::min(chunk, m - begin);
    const Tensor chunk_logits = logits.rows(0, rows);
    const Tensor chunk_dlogits = backward ? chunk_logits : Tensor();
    const Tensor chunk_losses = losses.rows(begin, rows);
    const Tensor chunk_targets = targets.rows(begin, rows);
    backend.gemm_nt(chunk_logits, h.value().rows(begin, rows), head, Tensor(), Tensor());
    if (kind == LossKind::Kl) {
      const Tensor chunk_teacher = teacher.rows(0, rows);
      backend.gemm_nt(chunk_teacher, teacher_h.rows(begin, rows), head, Tensor(), Tensor());
      backend.kl_divergence(chunk_losses, chunk_dlogits, chunk_logits, chunk_teacher, chunk_targets,
                            scale);
    } else {
      backend.cross_entropy(chunk_losses, chunk_dlogits, chunk_logits, chunk_targets, scale);
    }
    if (backward)
      backend.gemm_nn(dh.rows(begin, rows), chunk_dlogits, head, Tensor(), Write::Overwrite);
  }
  backend.sum(loss, losses, scale, Write::Overwrite);
  if (backward) record_loss(tape, out, h, dh);
  return out;
}

}  // namespace bbb::autograd
