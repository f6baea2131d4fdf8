// Differentiable ops over Var: thin wrappers that pair a backend op with its backward.
// Shapes are those of engine/backend.h. Every function allocates its output.
#pragma once

#include "autograd/tape.h"
#include "engine/comm.h"

namespace bbb::autograd {

using engine::AttentionSpec;

// y = alpha x w^T (+ residual) (+ bias). x (..., K), w (N, K), residual (..., N) or undefined,
// alpha real (1) or undefined, bias real (N) or undefined, a constant. dx = alpha dy w; d_residual
// = dy; dw = dy^T x: the gradient with respect to alpha w, which a master behind a quantizer with
// scale alpha needs.
Var linear(Tape& tape, const Var& x, const Var& w, const Tensor& alpha, const Var& residual,
           const Tensor& bias = Tensor());
// x (..., D), w real (D).
Var rms_norm(Tape& tape, const Var& x, const Var& w, double eps);
Var swiglu(Tape& tape, const Var& gate, const Var& up);
// Operands (..., K') of x (..., K), of rms_norm(x, w) and of swiglu(gate, up). Gradients go
// straight through the quantizer, except where it clipped.
Var operand(Tape& tape, const Var& x, const engine::OperandSpec& spec);
Var rms_norm_operand(Tape& tape, const Var& x, const Var& w, double eps,
                     const engine::OperandSpec& spec);
Var swiglu_operand(Tape& tape, const Var& gate, const Var& up, const engine::OperandSpec& spec);
// q (B, T, H, d), k and v (B, T, K, d). inv_freq: undefined, or F32 (d/2): then q and k are first
// rotated in place, from position 0, with spec.rope_factor, and the caller must not use them again.
Var attention(Tape& tape, const Var& q, const Var& k, const Var& v, const Tensor& inv_freq,
              const AttentionSpec& spec);
Var add(Tape& tape, const Var& a, const Var& b);
// x itself; its gradient is multiplied by weight, real (1) on the device. So a loss of it counts
// `weight` times.
Var weighted(Tape& tape, const Var& x, const Tensor& weight);
// Same elements, other shape.
Var reshape(Tape& tape, const Var& x, engine::Shape shape);
// ids I32 (B, T), table (V, D) -> (B, T, D). A gradient of the table is real.
Var embed(Tape& tape, const Tensor& ids, const Var& table);
// mean((x - y)^2), real (1); y is a constant: of x's shape, or a batch of x.dim(0) rows.
Var mse(Tape& tape, const Var& x, const engine::Rows& y);

// What anchors the activations x (.., D) to y, likewise, a constant (the distribution matching of
// the paper's appendix B.3): a loss beside another one of the same tape, whose backward() runs
// both. D channels, M rows.
//   Moments  the means and standard deviations of the channels (Backend::match_moments)
//   Kl       weight / M sum_m KL(softmax(y[m]) || softmax(x[m])) over the channels
// `comm`, or null: moments are then those of the rows of all its ranks, M on each.
enum class Anchor { Moments, Kl };
Var anchor(Tape& tape, Anchor kind, const Var& x, const Tensor& y, double weight,
           engine::Comm* comm = nullptr);

enum class LossKind { CrossEntropy, Kl, JensenShannon };

// How many of the (M, V) logits are held at once; larger values mean all.
struct HeadChunks {
  int64_t rows = 0;
  int64_t vocab = 0;
};

// The hidden states h (M, D) and the head act (V, D) whose logits a loss compares with, constants.
struct TeacherHead {
  Tensor h, head;
};

// The loss of a language model's head, without ever holding all logits: logits and the gradient of
// h are computed chunk by chunk. If a chunk is less than the whole vocabulary, the gradient
// computes the logits a second time, except for one chunk. JensenShannon computes them once more.
// h (M, D); head act (V, D); targets I32 (M), -1 ignored; no teacher for CrossEntropy. Returns
// scale times the sum of the rows' losses, real (1). row_loss: undefined, or real (M), which
// receives the unscaled losses. jsd_beta: of JensenShannon. weight: undefined, or real (1) on the
// device, a factor of the gradients. A gradient of the head is real: chunks are added to it. They
// are added in this call, not in Tape::backward(), because only here are the logits held.
Var head_loss(Tape& tape, LossKind kind, const Var& h, const Var& head, const Tensor& targets,
              const TeacherHead& teacher, double scale, HeadChunks chunks, const Tensor& row_loss,
              double jsd_beta = 0.5, const Tensor& weight = Tensor());

}  // namespace bbb::autograd
