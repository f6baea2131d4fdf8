// Every op computes its value, then records a closure that holds only what its backward reads.
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

// A loss computes dx, for a gradient of 1, in the forward pass; the backward hands it to x.
void record_loss(Tape& tape, const Var& loss, const Var& x, const Tensor& dx) {
  tape.record([&backend = tape.backend(), loss = loss.gradient_only(), x = x.gradient_only(), dx] {
    if (loss.has_grad()) x.give_grad(backend, dx);
  });
}

HeadChunks within(HeadChunks chunks, int64_t rows, int64_t vocab) {
  return {std::min(chunks.rows, rows), std::min(chunks.vocab, vocab)};
}

bool has_teacher(LossKind kind) { return kind != LossKind::CrossEntropy; }

int64_t state_size(LossKind kind) {
  return has_teacher(kind) ? Backend::kKlState : Backend::kCrossEntropyState;
}

// head_loss of chunks.rows rows at a time. Its scratch is that of one chunk, for any M and V.
class HeadLoss {
 public:
  struct TokenRows {
    Tensor losses;
    Tensor dh;        // undefined: not computed
    Var::Slot dhead;  // its gradient undefined: not computed
    Tensor h, teacher_h, targets;

    bool backward() const { return dh.defined() || dhead.grad.defined(); }
  };

  HeadLoss(Backend& backend, LossKind kind, const Tensor& head, const Tensor& teacher_head,
           double scale, double jsd_beta, const Tensor& weight, HeadChunks chunks, TapeMode mode)
      : backend_(backend),
        kind_(kind),
        head_(head),
        teacher_head_(teacher_head),
        scale_(scale),
        jsd_beta_(jsd_beta),
        weight_(weight),
        words_(chunks.vocab) {
    // In training logits are act, and their gradient takes their place. A loss that is only
    // measured needs more digits than act has.
    const DType dtype = mode == TapeMode::Training ? backend.act() : backend.real();
    logits_ = backend.empty({chunks.rows * words_}, dtype);
    if (has_teacher(kind)) teacher_ = backend.empty({chunks.rows * words_}, dtype);
    if (words_ == head.dim(0)) return;
    state_ = backend.empty({chunks.rows, state_size(kind)}, backend.real());
    if (kind == LossKind::JensenShannon) student_kl_ = backend.empty({chunks.rows}, backend.real());
    if (mode == TapeMode::Training)
      dh_sum_ = backend.empty({chunks.rows, head.dim(1)}, backend.real());
  }

  void run(const TokenRows& rows) const {
    if (words_ == head_.dim(0))
      run_whole(rows);
    else
      run_in_chunks(rows);
  }

 private:
  struct Logits {
    Tensor student, teacher;
  };

  // The logits of words [first, min(first + words_, V)), in the scratch.
  Logits logits_of(const TokenRows& rows, int64_t first) const {
    const Shape shape{rows.h.dim(0), std::min(words_, head_.dim(0) - first)};
    const auto product = [&](const Tensor& scratch, const Tensor& h, const Tensor& head) {
      const Tensor logits = scratch.slice(0, engine::numel_of(shape)).view(shape);
      backend_.gemm_nt(logits, h, head.rows(first, shape[1]), Tensor(), Tensor());
      return logits;
    };
    Logits logits{product(logits_, rows.h, head_), Tensor()};
    if (has_teacher(kind_)) logits.teacher = product(teacher_, rows.teacher_h, teacher_head_);
    return logits;
  }

  void run_whole(const TokenRows& rows) const {
    const Logits logits = logits_of(rows, 0);
    const Tensor dlogits = rows.backward() ? logits.student : Tensor();
    if (kind_ == LossKind::JensenShannon)
      backend_.jensen_shannon(rows.losses, dlogits, logits.student, logits.teacher, rows.targets,
                              jsd_beta_, scale_);
    else if (kind_ == LossKind::Kl)
      backend_.kl_divergence(rows.losses, dlogits, logits.student, logits.teacher, rows.targets,
                             scale_);
    else
      backend_.cross_entropy(rows.losses, dlogits, logits.student, rows.targets, scale_);
    if (rows.backward()) add_gradients(rows, rows.dh, dlogits, 0, Write::Overwrite);
  }

  // dh (+)= dlogits head;  dhead (+)= dlogits^T h, of the words from `first` on.
  void add_gradients(const TokenRows& rows, const Tensor& dh, const Tensor& dlogits, int64_t first,
                     Write mode) const {
    const int64_t words = dlogits.dim(1);
    if (dh.defined()) backend_.gemm_nn(dh, dlogits, head_.rows(first, words), Tensor(), mode);
    if (!rows.dhead.grad.defined()) return;
    if (weight_.defined()) backend_.scale(dlogits, weight_);
    backend_.gemm_tn(rows.dhead.grad.rows(first, words), dlogits, rows.h, rows.dhead.mode);
  }

  // The gradient of a logit needs sums over its whole row. So a first sweep over the chunks finds
  // the sums, and the last one computes the gradients from the logits, computed again. Between them
  // Jensen-Shannon adds up its terms, which need the maxima and sums of both rows. A sweep starts
  // with the chunk whose logits are still in the scratch:
  //   logits 0 | logits 1 | .. | logits n -> dlogits n | logits n-1 -> dlogits n-1 | .. | dlogits 0
  void run_in_chunks(const TokenRows& rows) const {
    const int64_t m = rows.h.dim(0), last = (head_.dim(0) - 1) / words_ * words_;
    const Tensor state = state_.rows(0, m);
    int64_t first = 0;  // word of the chunk in the scratch
    Logits logits = logits_of(rows, first);
    const auto sweep = [&](const auto& visit) {
      const int64_t step = first == 0 ? words_ : -words_, end = first == 0 ? last : 0;
      for (visit(Write::Overwrite); first != end; visit(Write::Add))
        logits = logits_of(rows, first += step);
    };
    sweep([&](Write mode) {
      if (has_teacher(kind_))
        backend_.kl_divergence_chunk(rows.losses, state, logits.student, logits.teacher,
                                     rows.targets, mode);
      else
        backend_.cross_entropy_chunk(rows.losses, state, logits.student, rows.targets, first, mode);
    });
    const Tensor student_kl = student_kl_.defined() ? student_kl_.rows(0, m) : Tensor();
    if (kind_ == LossKind::JensenShannon)
      sweep([&](Write mode) {
        backend_.jensen_shannon_chunk(rows.losses, student_kl, logits.student, logits.teacher,
                                      state, rows.targets, jsd_beta_, mode);
      });
    if (!rows.backward()) return;

    const Tensor dh_sum = rows.dh.defined() ? dh_sum_.rows(0, m) : Tensor();
    sweep([&](Write mode) {
      const Tensor& dlogits = logits.student;
      if (kind_ == LossKind::JensenShannon)
        backend_.jensen_shannon_chunk_backward(dlogits, logits.student, logits.teacher, state,
                                               student_kl, rows.targets, jsd_beta_, scale_);
      else if (kind_ == LossKind::Kl)
        backend_.kl_divergence_chunk_backward(dlogits, logits.student, logits.teacher, state,
                                              rows.targets, scale_);
      else
        backend_.cross_entropy_chunk_backward(dlogits, logits.student, state, rows.targets, first,
                                              scale_);
      add_gradients(rows, dh_sum, dlogits, first, mode);
    });
    if (rows.dh.defined()) backend_.cast(rows.dh, dh_sum);
  }

  Backend& backend_;
  const LossKind kind_;
  const Tensor head_, teacher_head_;
  const double scale_, jsd_beta_;
  const Tensor weight_;
  const int64_t words_;                 // in a chunk
  Tensor logits_, teacher_;             // of a chunk
  Tensor state_, student_kl_, dh_sum_;  // running values over the chunks, where there are several
};

}  // namespace

Var linear(Tape& tape, const Var& x, const Var& w, const Tensor& alpha, const Var& residual,
           const Tensor& bias) {
  Backend& backend = tape.backend();
  const int64_t n = w.value().dim(0);
  Tensor y = backend.empty(with_last(x.value().shape(), n), backend.act());
  backend.gemm_nt(matrix(y), matrix(x.value()), w.value(), alpha,
                  residual.defined() ? matrix(residual.value()) : Tensor());
  if (bias.defined()) backend.add_bias(matrix(y), bias);
  Var out = tape.output(y, {x, w, residual});
  if (!out.requires_grad()) return out;
  // dx needs w's value, dw needs x's. Each value is kept only if the other's gradient is wanted.
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

// Adds the gradients of a norm's input and weight, given that of its output, dy (M, D).
static void rms_norm_backward(Backend& backend, const Var& x, const Var& w, const Tensor& dy,
                              const Tensor& inv_rms) {
  const Var::Slot none{Tensor(), Write::Overwrite};
  const Var::Slot dx = x.requires_grad() ? x.grad_slot(backend) : none;
  const Var::Slot dw = w.requires_grad() ? w.grad_slot(backend) : none;
  backend.rms_norm_backward(dx.grad.defined() ? matrix(dx.grad) : Tensor(), dw.grad, dy,
                            matrix(x.value()), inv_rms, w.value(), dx.mode, dw.mode);
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
    rms_norm_backward(backend, x, w, matrix(out.grad()), inv_rms);
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

namespace {

// The output of an operand over x's rows. The clipped bits are kept if a gradient needs them.
engine::OperandRows make_operand(Backend& backend, const Tensor& x, const engine::OperandSpec& spec,
                                 bool with_clipped) {
  const int64_t rows = x.numel() / spec.view.k, columns = spec.view.stored_k;
  engine::OperandRows out;
  out.x = backend.empty({rows, columns}, backend.act());
  if (with_clipped && spec.view.grid.bits < 16)
    out.clipped = backend.empty({rows, columns / 8}, DType::U8);
  return out;
}

Var operand_output(Tape& tape, const engine::OperandRows& rows, const Tensor& x,
                   std::initializer_list<Var> inputs) {
  return tape.output(rows.x.view(with_last(x.shape(), rows.x.dim(1))), inputs);
}

}  // namespace

Var operand(Tape& tape, const Var& x, const engine::OperandSpec& spec) {
  Backend& backend = tape.backend();
  const bool trains = tape.recording() && x.requires_grad();
  const engine::OperandRows rows = make_operand(backend, x.value(), spec, trains);
  backend.operand(rows, matrix(x.value()), spec);
  Var out = operand_output(tape, rows, x.value(), {x});
  if (!out.requires_grad()) return out;
  tape.record([&backend, spec, clipped = rows.clipped, shape = x.value().shape(),
               x = x.gradient_only(), out = out.gradient_only()] {
    if (!out.has_grad()) return;
    Tensor dx = backend.empty(shape, backend.act());
    backend.operand_backward(matrix(dx), matrix(out.grad()), clipped, spec);
    x.give_grad(backend, dx);
  });
  return out;
}

Var rms_norm_operand(Tape& tape, const Var& x, const Var& w, double eps,
                     const engine::OperandSpec& spec) {
  Backend& backend = tape.backend();
  const bool trains = tape.recording() && (x.requires_grad() || w.requires_grad());
  const engine::OperandRows rows = make_operand(backend, x.value(), spec, trains);
  Tensor inv_rms = backend.empty({rows.x.dim(0)}, backend.real());
  backend.rms_norm_operand(rows, inv_rms, matrix(x.value()), w.value(), eps, spec);
  Var out = operand_output(tape, rows, x.value(), {x, w});
  if (!out.requires_grad()) return out;
  tape.record([&backend, spec, clipped = rows.clipped, x, w, inv_rms, out = out.gradient_only()] {
    if (!out.has_grad()) return;
    const Tensor in = matrix(x.value()), dnorm = backend.empty(in.shape(), backend.act());
    backend.operand_backward(dnorm, matrix(out.grad()), clipped, spec);
    out.drop_grad();
    rms_norm_backward(backend, x, w, dnorm, inv_rms);
  });
  return out;
}

Var swiglu_operand(Tape& tape, const Var& gate, const Var& up, const engine::OperandSpec& spec) {
  Backend& backend = tape.backend();
  const bool trains = tape.recording() && (gate.requires_grad() || up.requires_grad());
  const engine::OperandRows rows = make_operand(backend, gate.value(), spec, trains);
  backend.swiglu_operand(rows, matrix(gate.value()), matrix(up.value()), spec);
  Var out = operand_output(tape, rows, gate.value(), {gate, up});
  if (!out.requires_grad()) return out;
  tape.record([&backend, spec, clipped = rows.clipped, gate, up, out = out.gradient_only()] {
    if (!out.has_grad()) return;
    Tensor dgate = backend.empty(gate.value().shape(), backend.act());
    Tensor dup = backend.empty(up.value().shape(), backend.act());
    backend.swiglu_operand_backward(matrix(dgate), matrix(dup), matrix(out.grad()), clipped,
                                    matrix(gate.value()), matrix(up.value()), spec);
    gate.give_grad(backend, dgate);
    up.give_grad(backend, dup);
  });
  return out;
}

Var attention(Tape& tape, const Var& q, const Var& k, const Var& v, const Tensor& inv_freq,
              const AttentionSpec& spec) {
  Backend& backend = tape.backend();
  if (inv_freq.defined()) {
    for (const Var* rotated : {&q, &k})
      backend.rope(rotated->value(), inv_freq, Tensor(), Rotation::Forward, spec.rope_factor);
  }
  const Shape& shape = q.value().shape();  // (B, T, H, d)
  Tensor o = backend.empty(shape, backend.act());
  Tensor lse = backend.empty({shape[0], shape[2], shape[1]}, backend.real());
  backend.attention(o, lse, q.value(), k.value(), v.value(), spec);
  Var out = tape.output(o, {q, k, v});
  if (!out.requires_grad()) return out;
  tape.record([&backend, q, k, v, o, lse, inv_freq, spec, out = out.gradient_only()] {
    if (!out.has_grad()) return;
    Tensor dq = backend.empty(q.value().shape(), backend.act());
    Tensor dk = backend.empty(k.value().shape(), backend.act());
    Tensor dv = backend.empty(v.value().shape(), backend.act());
    backend.attention_backward(dq, dk, dv, out.grad(), q.value(), k.value(), v.value(), o, lse,
                               inv_freq, spec);
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
    a.give_grad(backend, out.grad());  // last, as `a` may take over out's buffer
  });
  return out;
}

Var weighted(Tape& tape, const Var& x, const Tensor& weight) {
  Var out = tape.output(x.value(), {x});
  if (!out.requires_grad()) return out;
  tape.record(
      [&backend = tape.backend(), weight, x = x.gradient_only(), out = out.gradient_only()] {
        if (!out.has_grad()) return;
        backend.scale(out.grad(), weight);
        x.give_grad(backend, out.grad());
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

Var embed(Tape& tape, const Tensor& ids, const Var& table) {
  Backend& backend = tape.backend();
  Shape shape = ids.shape();
  shape.push_back(table.value().dim(1));
  Tensor x = backend.empty(shape, backend.act());
  const Tensor flat = ids.view({ids.numel()});
  backend.embed(matrix(x), flat, table.value());
  Var out = tape.output(x, {table});
  if (!out.requires_grad()) return out;
  tape.record([&backend, flat, table = table.gradient_only(), out = out.gradient_only()] {
    if (!out.has_grad()) return;
    const Var::Slot slot = table.grad_slot(backend);
    backend.embed_backward(slot.grad, matrix(out.grad()), flat, slot.mode);
  });
  return out;
}

Var mse(Tape& tape, const Var& x, const engine::Rows& y) {
  Backend& backend = tape.backend();
  Tensor loss = backend.empty({1}, backend.real());
  Var out = tape.output(loss, {x});
  Tensor dx = out.requires_grad() ? backend.empty(x.value().shape(), backend.act()) : Tensor();
  backend.mse(loss, dx, x.value(), y);
  if (out.requires_grad()) record_loss(tape, out, x, dx);
  return out;
}

Var anchor(Tape& tape, Anchor kind, const Var& x, const Tensor& y, double weight,
           engine::Comm* comm) {
  Backend& backend = tape.backend();
  const Tensor loss = backend.empty({1}, backend.real());
  Var out = tape.output(loss, {x});
  const bool backward = out.requires_grad();
  const Tensor rows = matrix(x.value()), target = matrix(y);
  const Tensor dx = backward ? backend.empty(rows.shape(), backend.act()) : Tensor();
  if (kind == Anchor::Moments) {
    const auto moments = [&](const Tensor& of) {
      Tensor sums = backend.zeros({Backend::kMoments, of.dim(1)}, engine::DType::F64);
      backend.channel_moments(sums, of);
      if (comm != nullptr) comm->all_reduce(sums, engine::Reduce::Mean);  // of maxima: not read
      return sums;
    };
    backend.match_moments(loss, dx, rows, moments(rows), moments(target), weight);
  } else {
    const double scale = weight / static_cast<double>(rows.dim(0));
    const Tensor losses = backend.empty({rows.dim(0)}, backend.real());
    const Tensor every = backend.zeros({rows.dim(0)}, engine::DType::I32);  // row counts
    backend.kl_divergence(losses, dx, rows, target, every, scale);
    backend.sum(loss, losses, scale, Write::Overwrite);
  }
  // No condition on `out`: backward() starts at the other loss.
  if (backward) tape.record([&backend, x = x.gradient_only(), dx] { x.give_grad(backend, dx); });
  return out;
}

Var head_loss(Tape& tape, LossKind kind, const Var& h, const Var& head, const Tensor& targets,
              const TeacherHead& teacher, double scale, HeadChunks chunks, const Tensor& row_loss,
              double jsd_beta, const Tensor& weight) {
  Backend& backend = tape.backend();
  const int64_t m = h.value().dim(0);
  chunks = within(chunks, m, head.value().dim(0));
  BBB_ASSERT(chunks.rows > 0 && chunks.vocab > 0);
  BBB_ASSERT(has_teacher(kind) == teacher.h.defined());
  if (has_teacher(kind)) BBB_ASSERT(teacher.head.shape() == head.value().shape());

  Tensor loss = backend.empty({1}, backend.real());
  Var out = tape.output(loss, {h, head});
  const bool backward = out.requires_grad(), of_h = backward && h.requires_grad();
  HeadLoss chunk(backend, kind, head.value(), teacher.head, scale, jsd_beta, weight, chunks,
                 backward ? TapeMode::Training : TapeMode::Inference);
  const Tensor dh = of_h ? backend.empty(h.value().shape(), backend.act()) : Tensor();
  Var::Slot dhead{Tensor(), Write::Overwrite};
  if (backward && head.requires_grad()) dhead = head.grad_slot(backend);
  Tensor losses = row_loss.defined() ? row_loss : backend.empty({m}, backend.real());
  for (int64_t begin = 0; begin < m; begin += chunks.rows) {
    const auto rows = [&](const Tensor& t) {
      return t.defined() ? t.rows(begin, std::min(chunks.rows, m - begin)) : Tensor();
    };
    chunk.run({rows(losses), rows(dh), dhead, rows(h.value()), rows(teacher.h), rows(targets)});
    dhead.mode = Write::Add;
  }
  backend.sum(loss, losses, scale, Write::Overwrite);
  if (!of_h) return out;
  if (weight.defined()) backend.scale(dh, weight);
  record_loss(tape, out, h, dh);
  return out;
}

}  // namespace bbb::autograd
