#include "models/quant_linear.h"

#include <utility>

#include "engine/cpu/thread_pool.h"
#include "quant/e4m3.h"
#include "quant/host.h"

namespace bbb::models {

using autograd::linear;
using engine::DType;
using engine::Shape;
using quant::StoredPart;

static std::vector<uint8_t> download_bytes(Backend& backend, const Tensor& tensor) {
  std::vector<uint8_t> bytes(static_cast<size_t>(tensor.bytes()));
  backend.download(bytes.data(), tensor);
  return bytes;
}

static constexpr int64_t kSnapRows = 64;  // one thread's work

Tensor upload_as(Backend& backend, const std::vector<float>& values, Shape shape, DType dtype) {
  Tensor out = backend.empty(std::move(shape), dtype);
  upload_into(backend, out, values);
  return out;
}

void upload_into(Backend& backend, const Tensor& dst, const std::vector<float>& values) {
  BBB_ASSERT(dst.numel() == static_cast<int64_t>(values.size()));
  if (dst.dtype() == DType::F32) {
    backend.upload(dst, values.data());
    return;
  }
  Tensor staged = backend.empty(dst.shape(), DType::F32);
  backend.upload(staged, values.data());
  backend.cast(dst, staged);
}

std::vector<float> download_floats(Backend& backend, const Tensor& tensor) {
  Tensor staged = tensor;
  if (tensor.dtype() != DType::F32) {
    staged = backend.empty(tensor.shape(), DType::F32);
    backend.cast(staged, tensor);
  }
  std::vector<float> values(static_cast<size_t>(tensor.numel()));
  backend.download(values.data(), staged);
  return values;
}

QuantLinear::QuantLinear(Backend& backend, std::string name, int64_t n, int64_t k)
    : backend_(backend), name_(std::move(name)), n_(n), k_(k) {}

void QuantLinear::set_float(Tensor weight) {
  BBB_ASSERT(weight.shape() == (Shape{n_, k_}));
  state_ = LinearState::Float;
  set_ = nullptr;
  parameter_ = nullptr;
  weight_ = std::move(weight);
  leaf_ = Var(weight_);
  master_scale_ = e_ = z_ = codes_ = dweight_ = buffer_ = Tensor();
  packed_ = PackedWeight();
}

void QuantLinear::set_fake_quant(ParameterSet& set, Parameter& master, WeightGrid spec,
                                 Rounding rounding) {
  BBB_ASSERT(master.master.shape() == (Shape{n_, k_}));
  BBB_CHECK(k_ % spec.group == 0, name_, ": ", k_, " input features are no multiple of the group ",
            spec.group);
  state_ = LinearState::FakeQuant;
  spec_ = spec;
  set_ = &set;
  parameter_ = &master;
  autograd::QuantizedParameter quantized = set.add_quantizer(master, spec, rounding);
  weight_ = std::move(quantized.wq);
  master_scale_ = std::move(quantized.s);
  e_ = std::move(quantized.e);
  z_ = std::move(quantized.z);
  codes_ = buffer_ = Tensor();
  packed_ = PackedWeight();
  dweight_ = master.grad;
  fresh_leaf();
}

void QuantLinear::set_bits(int bits) {
  BBB_ASSERT(state_ == LinearState::FakeQuant);
  spec_.bits = bits;
  set_->set_bits(*parameter_, bits);
}

void QuantLinear::set_scales(Parameter& sigma) {
  BBB_ASSERT(sigma.master.shape() == (Shape{n_, k_ / spec_.group}));
  const float master_scale = download_floats(backend_, master_scale_)[0];
  std::vector<float> initial;
  for (const uint8_t e : download_bytes(backend_, e_))
    initial.push_back(master_scale * quant::e4m3_decode(e));
  upload_into(backend_, sigma.master, initial);

  codes_ = current_codes();
  state_ = LinearState::Scales;
  set_ = nullptr;
  parameter_ = &sigma;
  dweight_ = backend_.empty({n_, k_}, sigma.grad.dtype());
  fresh_leaf();
}

void QuantLinear::set_packed(PackedWeight weight, Tensor buffer) {
  BBB_ASSERT(weight.format.n == n_ && weight.format.k == k_ && buffer.numel() >= n_ * k_);
  state_ = LinearState::Packed;
  spec_ = weight.format.weight;
  set_ = nullptr;
  parameter_ = nullptr;
  weight_ = e_ = z_ = codes_ = dweight_ = Tensor();
  leaf_ = Var();
  master_scale_ = backend_.empty({1}, backend_.real());
  backend_.cast(master_scale_, weight[StoredPart::MasterScale]);
  packed_ = std::move(weight);
  buffer_ = std::move(buffer);
}

void QuantLinear::fresh_leaf() { leaf_ = Var::leaf(weight_, dweight_, Write::Overwrite); }

void QuantLinear::prepare_scales() {
  BBB_ASSERT(state_ == LinearState::Scales);
  backend_.scale_codes(weight_, e_, master_scale_, codes_, z_, parameter_->master, spec_);
}

bool QuantLinear::input_scale_gradient(const Tensor& ds, const Tensor& s, Write mode) const {
  if (!leaf_.has_grad()) return false;
  backend_.input_scale_gradient(ds, s, weight_, multiplier(), dweight_, mode);
  return true;
}

void QuantLinear::finish_backward() {
  if (!parameter_) return;
  if (!leaf_.has_grad()) {
    backend_.zero(parameter_->grad);
    return;
  }
  if (state_ == LinearState::Scales)
    backend_.scale_codes_backward(parameter_->grad, dweight_, codes_, z_, spec_, Write::Overwrite);
  fresh_leaf();
}

Tensor QuantLinear::current_codes() const {
  if (state_ == LinearState::Scales) return codes_;
  BBB_ASSERT(state_ == LinearState::FakeQuant && quantizes());
  Tensor codes = backend_.empty({n_, k_}, DType::U8);
  backend_.quantize_codes(codes, parameter_->master, e_, z_, master_scale_, spec_);
  return codes;
}

LinearResult QuantLinear::quantized() const {
  LinearResult result;
  result.format = format();
  result.part(StoredPart::Codes) =
      pack_rows(download_bytes(backend_, current_codes()), n_, spec_.bits);
  result.part(StoredPart::Scales) = download_bytes(backend_, e_);
  result.part(StoredPart::Zeros) = pack_rows(download_bytes(backend_, z_), n_, spec_.bits);
  const float s = download_floats(backend_, master_scale_)[0];
  const auto* bytes = reinterpret_cast<const uint8_t*>(&s);
  result.part(StoredPart::MasterScale).assign(bytes, bytes + sizeof s);
  return result;
}

void QuantLinear::snap() {
  BBB_ASSERT(state_ == LinearState::FakeQuant && quantizes());
  std::vector<float> masters = download_floats(backend_, parameter_->master);
  const float master_scale = download_floats(backend_, master_scale_)[0];
  engine::ThreadPool(0).parallel_for(n_, kSnapRows, [&](int64_t begin, int64_t end) {
    quant::host::snap(masters.data(), {begin, end}, k_, master_scale, spec_);
  });
  upload_into(backend_, parameter_->master, masters);
}

Var QuantLinear::forward(Tape& tape, const Var& x, const Var& residual) {
  if (state_ == LinearState::Packed) return forward_packed(tape, x, residual);
  BBB_ASSERT(leaf_.defined());
  return linear(tape, x, leaf_, multiplier(), residual);
}

Var QuantLinear::forward_packed(Tape& tape, const Var& x, const Var& residual) {
  BBB_ASSERT(!tape.recording());
  const int64_t m = x.value().numel() / k_;
  if (m > Backend::kMaxPackedRows) {
    const Tensor weight = buffer_.slice(0, n_ * k_).view({n_, k_});
    backend_.unpack(weight, packed_);
    return linear(tape, x, Var(weight), master_scale_, residual);
  }
  Shape shape = x.value().shape();
  shape.back() = n_;
  Tensor y = backend_.empty(shape, backend_.act());
  backend_.packed_gemv(y.view({m, n_}), x.value().view({m, k_}), packed_,
                       residual.defined() ? residual.value().view({m, n_}) : Tensor());
  return Var(y);
}

}  // namespace bbb::models
