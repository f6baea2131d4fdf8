#include "models/operand.h"

#include <utility>

namespace bbb::models {

using autograd::Tape;
using autograd::Var;
using engine::Backend;
using engine::Tensor;

static Tensor rows_of(const Tensor& x) { return x.view({x.numel() / x.dim(-1), x.dim(-1)}); }

void Operand::set(Backend& backend, const quant::LinearFormat& format, bool packed) {
  packed_ = packed;
  u_ = map_ = Tensor();
  if (format.exact_input()) return spec_.reset();
  const quant::ChannelOrder order = format.channel_order();
  if (spec_ && order_ == order) {
    spec_->view = quant::operand_view(format, spec_->view.channels, spec_->view.positions);
  } else {
    spec_ = engine::upload_operand(backend, format);
    order_ = order;
  }
}

void Operand::set_lc(Tensor u, Tensor map) {
  spec_.reset();
  u_ = std::move(u);
  map_ = std::move(map);
}

LinearInput Operand::lc(Tape& tape, const Var& x) const {
  BBB_ASSERT(!tape.recording());
  Backend& backend = tape.backend();
  LinearInput input = whole(Var(backend.empty(x.value().shape(), backend.act())));
  const Tensor rows = rows_of(x.value());
  input.constant = backend.empty({rows.dim(0)}, backend.real());
  backend.lc_operand(rows_of(input.x.value()), input.constant, rows, u_, map_);
  return input;
}

LinearInput Operand::whole(Var x) {
  LinearInput input;
  input.shape = x.value().shape();
  input.x = std::move(x);
  return input;
}

Var LinearInput::whole(Tape& tape) const {
  if (norm.defined())
    return operand ? autograd::rms_norm_operand(tape, x, norm, eps, *operand)
                   : autograd::rms_norm(tape, x, norm, eps);
  if (up.defined())
    return operand ? autograd::swiglu_operand(tape, x, up, *operand)
                   : autograd::swiglu(tape, x, up);
  return operand ? autograd::operand(tape, x, *operand) : x;
}

LinearInput Operand::unmade(Var x) const {
  LinearInput input = whole(std::move(x));
  if (!exact()) {
    input.operand = &*spec_;
    input.shape.back() = spec_->view.stored_k;
  }
  return input;
}

bool Operand::product_makes(const Tape& tape, const Tensor& x) const {
  return packed_ && !tape.recording() && x.numel() / x.dim(-1) <= Backend::kMaxPackedRows;
}

LinearInput Operand::rms_norm(Tape& tape, const Var& x, const Var& w, double eps) const {
  if (u_.defined()) return lc(tape, autograd::rms_norm(tape, x, w, eps));
  if (product_makes(tape, x.value())) {
    LinearInput input = unmade(x);
    input.norm = w;
    input.eps = eps;
    return input;
  }
  return whole(exact() ? autograd::rms_norm(tape, x, w, eps)
                       : autograd::rms_norm_operand(tape, x, w, eps, *spec_));
}

LinearInput Operand::swiglu(Tape& tape, const Var& gate, const Var& up) const {
  if (u_.defined()) return lc(tape, autograd::swiglu(tape, gate, up));
  if (product_makes(tape, gate.value())) {
    LinearInput input = unmade(gate);
    input.up = up;
    return input;
  }
  return whole(exact() ? autograd::swiglu(tape, gate, up)
                       : autograd::swiglu_operand(tape, gate, up, *spec_));
}

LinearInput Operand::plain(Tape& tape, const Var& x) const {
  if (u_.defined()) return lc(tape, x);
  if (exact() || product_makes(tape, x.value())) return unmade(x);
  return whole(autograd::operand(tape, x, *spec_));
}

}  // namespace bbb::models
