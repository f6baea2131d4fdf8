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
  const bool wide = dst.dtype() == DType::F32;
  const Tensor staged = wide ? dst : backend.empty(dst.shape(), DType::F32);
  if (backend.computes()) {
    BBB_ASSERT(dst.numel() == static_cast<int64_t>(values.size()));
    backend.upload(staged, values.data());
  }
  if (!wide) backend.cast(dst, staged);
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
  state_ = FloatWeight();
  grid_ = {.bits = kNoQuantizer};
  quantized_ = {.wq = std::move(weight), .e = {}, .z = {}, .s = {}};
  dweight_ = Tensor();
  leaf_ = Var(quantized_.wq);
}

void QuantLinear::set_trained(WeightQuantizer& quantizer, Parameter& master, int bits) {
  BBB_ASSERT(master.master.shape() == (Shape{n_, k_}));
  state_ = TrainedWeight{&quantizer, &master};
  grid_ = {.bits = bits, .group = quantizer.group()};
  quantized_ = quantizer.add(master, bits);
  dweight_ = master.grad;
  fresh_leaf();
}

void QuantLinear::set_bits(int bits) {
  const auto& trained = get<TrainedWeight>();
  grid_.bits = bits;
  trained.quantizer->set_bits(*trained.master, bits);
}

void QuantLinear::freeze_codes(Parameter& sigma) {
  BBB_ASSERT(sigma.master.shape() == (Shape{n_, k_ / grid_.group}));
  if (backend_.computes()) {
    const float master_scale = download_floats(backend_, quantized_.s)[0];
    std::vector<float> initial;
    for (const uint8_t e : download_bytes(backend_, quantized_.e))
      initial.push_back(master_scale * quant::e4m3_decode(e));
    upload_into(backend_, sigma.master, initial);
  }
  state_ = FrozenCodes{&sigma, current_codes()};
  dweight_ = backend_.empty({n_, k_}, sigma.grad.dtype());
  fresh_leaf();
}

void QuantLinear::set_packed(PackedWeight weight, Tensor buffer) {
  BBB_ASSERT(weight.format.n == n_ && weight.format.k == k_ && buffer.numel() >= n_ * k_);
  grid_ = weight.format.weight;
  quantized_ = {.wq = {}, .e = {}, .z = {}, .s = backend_.empty({1}, backend_.real())};
  backend_.cast(quantized_.s, weight[StoredPart::MasterScale]);
  dweight_ = Tensor();
  leaf_ = Var();
  state_ = PackedLinear{std::move(weight), std::move(buffer)};
}

Parameter* QuantLinear::parameter() const {
  if (const auto* trained = std::get_if<TrainedWeight>(&state_)) return trained->master;
  if (const auto* frozen = std::get_if<FrozenCodes>(&state_)) return frozen->sigma;
  return nullptr;
}

void QuantLinear::fresh_leaf() { leaf_ = Var::leaf(quantized_.wq, dweight_, Write::Overwrite); }

void QuantLinear::prepare_scales() {
  const auto& frozen = get<FrozenCodes>();
  backend_.scale_codes(quantized_.wq, quantized_.e, quantized_.s, frozen.codes, quantized_.z,
                       frozen.sigma->master, grid_);
}

bool QuantLinear::input_scale_gradient(const Tensor& ds, const Tensor& s, Write mode) const {
  if (!leaf_.has_grad()) return false;
  backend_.input_scale_gradient(ds, s, quantized_.wq, multiplier(), dweight_, mode);
  return true;
}

void QuantLinear::finish_backward() {
  if (parameter() == nullptr) return;
  if (!leaf_.has_grad()) return backend_.zero(parameter()->grad);
  if (const auto* frozen = std::get_if<FrozenCodes>(&state_))
    backend_.scale_codes_backward(frozen->sigma->grad, dweight_, frozen->codes, quantized_.z, grid_,
                                  Write::Overwrite);
  fresh_leaf();
}

Tensor QuantLinear::current_codes() const {
  if (const auto* frozen = std::get_if<FrozenCodes>(&state_)) return frozen->codes;
  BBB_ASSERT(grid_.bits < kNoQuantizer);
  const Tensor codes = backend_.empty({n_, k_}, DType::U8);
  backend_.quantize_codes(codes, get<TrainedWeight>().master->master, quantized_.e, quantized_.z,
                          quantized_.s, grid_);
  return codes;
}

LinearResult QuantLinear::quantized() const {
  LinearResult result;
  result.format = format();
  result.part(StoredPart::Codes) =
      pack_rows(download_bytes(backend_, current_codes()), n_, grid_.bits);
  result.part(StoredPart::Scales) = download_bytes(backend_, quantized_.e);
  result.part(StoredPart::Zeros) =
      pack_rows(download_bytes(backend_, quantized_.z), n_, grid_.bits);
  const float s = download_floats(backend_, quantized_.s)[0];
  const auto* bytes = reinterpret_cast<const uint8_t*>(&s);
  result.part(StoredPart::MasterScale).assign(bytes, bytes + sizeof s);
  return result;
}

void QuantLinear::snap() {
  BBB_ASSERT(grid_.bits < kNoQuantizer);
  const Tensor& master = get<TrainedWeight>().master->master;
  std::vector<float> masters = download_floats(backend_, master);
  const float master_scale = download_floats(backend_, quantized_.s)[0];
  engine::ThreadPool(0).parallel_for(n_, kSnapRows, [&](int64_t begin, int64_t end) {
    quant::host::snap(masters.data(), {begin, end}, k_, master_scale, grid_);
  });
  upload_into(backend_, master, masters);
}

Var QuantLinear::forward(Tape& tape, const Var& x, const Var& residual) {
  if (const auto* packed = std::get_if<PackedLinear>(&state_))
    return forward_packed(tape, x, residual, *packed);
  BBB_ASSERT(leaf_.defined());
  return linear(tape, x, leaf_, multiplier(), residual);
}

Var QuantLinear::forward_packed(Tape& tape, const Var& x, const Var& residual,
                                const PackedLinear& packed) {
  BBB_ASSERT(!tape.recording());
  const int64_t m = x.value().numel() / k_;
  if (m > Backend::kMaxPackedRows) {
    const Tensor weight = packed.buffer.slice(0, n_ * k_).view({n_, k_});
    backend_.unpack(weight, packed.weight);
    return linear(tape, x, Var(weight), quantized_.s, residual);
  }
  Shape shape = x.value().shape();
  shape.back() = n_;
  Tensor y = backend_.empty(shape, backend_.act());
  backend_.packed_gemv(y.view({m, n_}), x.value().view({m, k_}), packed.weight,
                       residual.defined() ? residual.value().view({m, n_}) : Tensor());
  return Var(y);
}

}  // namespace bbb::models
