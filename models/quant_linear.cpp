#include "models/quant_linear.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "data/half.h"
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

Tensor upload_ints(Backend& backend, const std::vector<int32_t>& values, Shape shape) {
  Tensor out = backend.empty(std::move(shape), DType::I32);
  BBB_ASSERT(out.numel() == static_cast<int64_t>(values.size()));
  backend.upload(out, values.data());
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
    : backend_(backend), name_(std::move(name)), n_(n), k_(k) {
  format_ = {.n = n, .k = k, .weight = {.bits = kNoQuantizer}};
}

void QuantLinear::set_bias(const std::vector<float>& bias) {
  if (!bias_.defined()) {  // later, recorded steps hold the addresses
    bias_ = backend_.empty({n_}, backend_.real());
    bias_rows_ = backend_.empty({Backend::kMaxPackedRows, n_}, backend_.act());
  }
  upload_into(backend_, bias_, bias);
  backend_.zero(bias_rows_);
  backend_.add_bias(bias_rows_, bias_);
}

std::vector<float> QuantLinear::bias() const {
  return bias_.defined() ? download_floats(backend_, bias_) : std::vector<float>();
}

void QuantLinear::set_float(Tensor weight) {
  BBB_ASSERT(weight.shape() == (Shape{n_, k_}));
  set_float(std::move(weight), {.n = n_, .k = k_, .weight = {.bits = kNoQuantizer}});
}

void QuantLinear::set_float(Tensor weight, const quant::LinearFormat& format) {
  state_ = FloatWeight();
  format_ = format;
  quantized_ = {.wq = std::move(weight), .e = {}, .z = {}, .s = {}, .ratios = {}, .nested = {}};
  dweight_ = Tensor();
  leaf_ = Var(quantized_.wq);
}

void QuantLinear::set_trained(WeightQuantizer& quantizer, Parameter& master,
                              const quant::LinearFormat& format) {
  BBB_ASSERT(format.n == n_ && format.k == k_ && format.weight.group == quantizer.group());
  BBB_ASSERT(master.grad.shape() == (Shape{n_, format.stored_k()}));
  BBB_ASSERT(format.weight.levels == quantizer.weights().rule.levels);
  format_ = format;
  state_ = TrainedWeight{&quantizer, &master};
  quantized_ = quantizer.add(master, format.code_bits());
  dweight_ = master.grad;
  fresh_leaf();
}

void QuantLinear::set_adapters(Parameter& a, Parameter& b, double alpha) {
  BBB_ASSERT(holds<TrainedWeight>());
  auto& trained = std::get<TrainedWeight>(state_);
  trained.adapters = trained.quantizer->add_adapters(*trained.master, a, b, alpha);
}

void QuantLinear::start_adapters(engine::Rng& rng) {
  const autograd::Adapters& adapters = get<TrainedWeight>().adapters;
  discard_adapters();
  const Tensor& b = adapters.b->master;
  const double deviation = 1 / std::sqrt(static_cast<double>(b.dim(1)));
  std::vector<float> draws(backend_.computes() ? static_cast<size_t>(b.numel()) : 0);
  for (float& draw : draws) draw = static_cast<float>(deviation * rng.normal());
  upload_into(backend_, b, draws);
}

void QuantLinear::discard_adapters() { backend_.zero(get<TrainedWeight>().adapters.a->master); }

void QuantLinear::set_trained_lc(WeightQuantizer& quantizer, Parameter& latent, Parameter& v,
                                 LcSite& site, const quant::LinearFormat& format) {
  BBB_ASSERT(format.n == n_ && format.k == k_ && format.is_lc());
  format_ = format;
  const autograd::LcParameter lc = quantizer.add_lc(latent, *site.u, v, *site.map);
  state_ = TrainedLc{&latent, &v, &site, lc.from};
  quantized_ = {.wq = lc.w, .e = {}, .z = {}, .s = {}, .ratios = {}, .nested = {}};
  dweight_ = latent.grad;
  fresh_leaf();
}

void LcSite::finish_backward(Backend& backend) {
  if (mode == Write::Overwrite) {  // no linear had a gradient
    backend.zero(u->grad);
    return backend.zero(map->grad);
  }
  backend.cast(u->grad, du);
  if (learns_map) backend.cast(map->grad, dmap);
  mode = Write::Overwrite;
}

void QuantLinear::set_format(const quant::LinearFormat& format) {
  BBB_ASSERT(parameter() != nullptr && format.stored_k() == columns());
  BBB_ASSERT(format.weight.group == format_.weight.group);
  const auto* trained = std::get_if<TrainedWeight>(&state_);
  if (trained != nullptr && format.code_bits() != format_.code_bits())
    trained->quantizer->set_bits(*trained->master, format.code_bits());
  BBB_ASSERT(trained != nullptr || format.weight == format_.weight);
  format_ = format;
}

void QuantLinear::own_buffers(const quant::LinearFormat& format) {
  format_ = format;
  holds_codes_ = false;
  const Shape groups{n_, format_.groups()};
  quantized_ = {.wq = backend_.empty({n_, columns()}, backend_.act()),
                .e = backend_.empty(groups, DType::U8),
                .z = backend_.empty(groups, DType::U8),
                .s = backend_.empty({1}, backend_.real()),
                .ratios = {},
                .nested = {}};
}

void QuantLinear::set_learned(const LearnedGrid& parameters, const quant::LinearFormat& format) {
  BBB_ASSERT(format.n == n_ && format.k == k_ && !format.weight.nested);
  BBB_ASSERT(parameters.master->master.shape() == (Shape{n_, format.stored_k()}));
  own_buffers(format);
  state_ = parameters;
  dweight_ = parameters.master->grad;
  fresh_leaf();
}

void QuantLinear::set_master(const LinearResult& result) {
  if (const auto* learned = std::get_if<LearnedGrid>(&state_)) {
    if (!backend_.computes()) return;
    holds_codes_ = learned->ratio != nullptr && result.master.empty();
    if (holds_codes_) {  // no ratio has exactly this grid
      const LinearGrid grid = stored_grid(result);
      std::vector<float> levels = result.levels();
      for (float& w : levels) w /= grid.master_scale;  // exact
      upload_into(backend_, quantized_.wq, levels);
      backend_.upload(quantized_.e, grid.e.data());
      backend_.upload(quantized_.z, grid.zeros.data());
      return upload_into(backend_, quantized_.s, {grid.master_scale});
    }
    if (learned->ratio != nullptr) {
      std::vector<float> ratios(static_cast<size_t>(n_ * format_.groups()), 1.0f);
      for (size_t g = 0; g < result.ratios.size(); ++g)
        ratios[g] = quant::range_ratio<float>(result.ratios[g]);
      upload_into(backend_, learned->master->master, result.master);
      return upload_into(backend_, learned->ratio->master, ratios);
    }
    const LinearGrid grid = result.quantized() ? stored_grid(result) : nearest_grid(result);
    std::vector<float> sigma, zeta(grid.zeros.begin(), grid.zeros.end());
    for (const uint8_t e : grid.e) sigma.push_back(grid.master_scale * quant::e4m3_decode(e));
    upload_into(backend_, learned->master->master,
                result.quantized() ? result.levels() : result.master);
    upload_into(backend_, learned->sigma->master, sigma);
    backend_.upload(quantized_.z, grid.zeros.data());
    if (learned->zeta != nullptr) upload_into(backend_, learned->zeta->master, zeta);
    return;
  }
  if (const auto* lc = std::get_if<TrainedLc>(&state_)) {
    upload_into(backend_, lc->latent->master, result.master);
    upload_into(backend_, lc->site->u->master, result.lc.u);
    upload_into(backend_, lc->v->master, result.lc.v);
    return upload_into(backend_, lc->site->map->master, result.lc.map);
  }
  if (sharded()) return set_part(result);
  const auto& trained = get<TrainedWeight>();
  upload_into(backend_, trained.master->master, result.master);
  if (trained.adapters.a != nullptr) {
    backend_.copy(trained.adapters.base, trained.master->master);
    discard_adapters();
  }
  if (!quantized_.ratios.defined() || !backend_.computes()) return;
  BBB_ASSERT(static_cast<int64_t>(result.ratios.size()) == quantized_.ratios.numel());
  backend_.upload(quantized_.ratios, result.ratios.data());
}

// Uploads this rank's part.
void QuantLinear::set_part(const LinearResult& result) {
  const Parameter& master = *parameter();
  const auto [begin, end] = set().own_range(master);
  if (!backend_.computes() || begin == end) return;
  const int64_t group = format_.weight.group;
  const auto part = [begin = begin, end = end](const auto& whole, int64_t of) {
    return std::vector(whole.begin() + begin / of, whole.begin() + end / of);
  };
  upload_into(backend_, set().own_part(set().masters(), master).slice(0, end - begin),
              part(result.master, 1));
  if (!quantized_.ratios.defined()) return;
  BBB_ASSERT(static_cast<int64_t>(result.ratios.size()) == master.grad.numel() / group);
  backend_.upload(quantized_.ratios.slice(0, (end - begin) / group),
                  part(result.ratios, group).data());
}

LinearResult QuantLinear::master() const {
  LinearResult result;
  result.format = format_;
  result.bias = bias();
  if (sharded()) {
    const Parameter& master = *parameter();
    const int64_t count = master.grad.numel();
    result.master =
        download_floats(backend_, set().gather(set().own_part(set().masters(), master), count));
    if (quantized_.ratios.defined())
      result.ratios =
          download_bytes(backend_, set().gather(quantized_.ratios, count / format_.weight.group));
    return result;
  }
  result.master = download_floats(backend_, parameter()->master);
  if (const auto* lc = std::get_if<TrainedLc>(&state_))
    result.lc = {download_floats(backend_, lc->site->u->master),
                 download_floats(backend_, lc->v->master),
                 download_floats(backend_, lc->site->map->master)};
  if (quantized_.ratios.defined()) result.ratios = download_bytes(backend_, quantized_.ratios);
  return result;
}

void QuantLinear::freeze_codes(const LinearResult& result, Parameter& sigma) {
  own_buffers(result.format);
  BBB_ASSERT(sigma.master.shape() == (Shape{n_, format_.groups()}));
  state_ = FrozenCodes{&sigma, backend_.empty({n_, columns()}, DType::U8)};
  dweight_ = backend_.empty({n_, columns()}, sigma.grad.dtype());
  fresh_leaf();
  if (!backend_.computes()) return;
  const LinearGrid grid = stored_grid(result);
  const std::vector<uint8_t> codes =
      unpack_rows(result.part(StoredPart::Codes), n_, columns(), format_.weight.bits);
  backend_.upload(get<FrozenCodes>().codes, codes.data());
  backend_.upload(quantized_.z, grid.zeros.data());
  std::vector<float> initial;
  for (const uint8_t e : grid.e) initial.push_back(grid.master_scale * quant::e4m3_decode(e));
  upload_into(backend_, sigma.master, initial);
}

int64_t QuantLinear::buffer_elements(const Backend& backend, const quant::LinearFormat& format) {
  return backend.max_packed_rows(format.multiplied()) == Backend::kAnyRows
             ? 0
             : format.n * format.stored_k();
}

void QuantLinear::set_packed(PackedWeight weight, Tensor buffer) {
  BBB_ASSERT(weight.format.n == n_ && weight.format.k == k_);
  const int64_t elements = buffer_elements(backend_, weight.format);
  BBB_ASSERT(elements == 0 || buffer.numel() >= elements);
  format_ = weight.format;
  quantized_ = {.wq = {},
                .e = {},
                .z = {},
                .s = backend_.empty({1}, backend_.real()),
                .ratios = {},
                .nested = {}};
  backend_.cast(quantized_.s, weight[StoredPart::MasterScale]);
  dweight_ = Tensor();
  leaf_ = Var();
  state_ = PackedLinear{std::move(weight), std::move(buffer)};
}

void QuantLinear::set_stored(const quant::LinearFormat& format,
                             const std::function<const void*(const quant::StoredTensor&)>& bytes,
                             Tensor buffer) {
  if (!format.is_lc())
    return set_packed(engine::upload_packed(backend_, format, bytes), std::move(buffer));
  PackedLinear lc;
  const std::vector<quant::StoredTensor> stored = format.tensors();
  const auto find = [&](StoredPart part) {
    return bytes(*std::ranges::find(stored, part, &quant::StoredTensor::part));
  };
  // Products read q as S e (q - z).
  const float one = 1;
  const std::vector<uint8_t> scales(static_cast<size_t>(format.n * format.groups()),
                                    quant::e4m3_encode_nearest(1.0f)),
      zeros(scales.size());
  lc.weight = engine::upload_packed(backend_, format.codes_alone(),
                                    [&](const quant::StoredTensor& t) -> const void* {
                                      if (t.part == StoredPart::Codes) return find(t.part);
                                      if (t.part == StoredPart::Scales) return scales.data();
                                      if (t.part == StoredPart::Zeros) return zeros.data();
                                      return &one;
                                    });
  const auto halves = [&](StoredPart part, int64_t count) {
    const auto* from = static_cast<const uint8_t*>(find(part));
    std::vector<float> values;
    for (int64_t i = 0; i < count; ++i)
      values.push_back(data::half_to_float(data::load_as<uint16_t>(from + 2 * i)));
    return upload_as(backend_, values, {count}, backend_.real());
  };
  lc.u = halves(StoredPart::InputScale, format.k);
  lc.v = halves(StoredPart::OutputScale, format.n);
  std::vector<float> map(quant::kLcMapSize);
  std::memcpy(map.data(), find(StoredPart::Map), map.size() * sizeof(float));
  lc.map = upload_as(backend_, map, {quant::kLcVector, quant::kLcVector + 1}, backend_.real());
  BBB_ASSERT(buffer.numel() >= buffer_elements(backend_, lc.weight.format));
  lc.buffer = std::move(buffer);
  format_ = format;
  quantized_ = {};
  dweight_ = Tensor();
  leaf_ = Var();
  state_ = std::move(lc);
}

Parameter* QuantLinear::parameter() const {
  if (const auto* trained = std::get_if<TrainedWeight>(&state_)) return trained->master;
  if (const auto* learned = std::get_if<LearnedGrid>(&state_)) return learned->master;
  if (const auto* lc = std::get_if<TrainedLc>(&state_)) return lc->latent;
  if (const auto* frozen = std::get_if<FrozenCodes>(&state_)) return frozen->sigma;
  return nullptr;
}

void QuantLinear::fresh_leaf() {
  leaf_ = Var::leaf(quantized_.wq, dweight_, Write::Overwrite);
  nested_leaves_.clear();
  const Write mode = sharded() ? Write::Overwrite : Write::Add;
  for (const Tensor& wq : quantized_.nested)
    nested_leaves_.push_back(Var::leaf(wq, dweight_, mode));
}

void QuantLinear::prepare_scales() {
  if (holds_codes_) return;
  const auto* learned = std::get_if<LearnedGrid>(&state_);
  if (learned != nullptr && learned->ratio != nullptr)
    return backend_.ratio_quant(quantized_.wq, quantized_.e, quantized_.z, quantized_.s,
                                learned->ratio->master, learned->master->master, format_.weight);
  if (learned != nullptr)
    return backend_.learned_quant(quantized_.wq, quantized_.e, quantized_.z, quantized_.s,
                                  learned->master->master, learned->sigma->master,
                                  learned->zeta != nullptr ? learned->zeta->master : Tensor(),
                                  format_.weight);
  const auto& frozen = get<FrozenCodes>();
  backend_.scale_codes(quantized_.wq, quantized_.e, quantized_.s, frozen.codes, quantized_.z,
                       frozen.sigma->master, format_.weight);
}

bool QuantLinear::input_scale_gradient(const Tensor& ds, const Tensor& s, Write mode) const {
  if (!leaf_.has_grad()) return false;
  backend_.input_scale_gradient(ds, s, quantized_.wq, multiplier(), dweight_, mode);
  return true;
}

void QuantLinear::finish_backward() {
  if (parameter() == nullptr || sharded()) return;
  if (const auto* learned = std::get_if<LearnedGrid>(&state_)) {
    if (!leaf_.has_grad()) backend_.zero(dweight_);  // then those of the grid become 0
    if (learned->ratio != nullptr)
      backend_.ratio_quant_backward(dweight_, learned->ratio->grad, learned->master->master,
                                    quantized_.e, quantized_.z, quantized_.s, format_.weight);
    else
      backend_.learned_quant_backward(
          dweight_, learned->sigma->grad, learned->zeta != nullptr ? learned->zeta->grad : Tensor(),
          learned->master->master, quantized_.e, quantized_.z, quantized_.s, format_.weight);
    return fresh_leaf();
  }
  const auto* lc = std::get_if<TrainedLc>(&state_);
  const auto* trained = std::get_if<TrainedWeight>(&state_);
  const bool adapts = trained != nullptr && trained->quantizer->adapts();
  if (!leaf_.has_grad()) {
    if (adapts) {
      backend_.zero(trained->adapters.a->grad);
      backend_.zero(trained->adapters.b->grad);
    }
    if (lc != nullptr) backend_.zero(lc->v->grad);
    return backend_.zero(parameter()->grad);
  }
  if (lc != nullptr) {
    LcSite& site = *lc->site;
    input_scale_gradient(site.du, site.u->master, site.mode);
    backend_.lc_weight_backward(dweight_, lc->v->grad, site.learns_map ? site.dmap : Tensor(),
                                dweight_, quantized_.wq, lc->from, site.mode);
    site.mode = Write::Add;
  }
  if (adapts) trained->quantizer->finish_backward(*trained->master, trained->adapters);
  if (const auto* frozen = std::get_if<FrozenCodes>(&state_))
    backend_.scale_codes_backward(frozen->sigma->grad, dweight_, frozen->codes, quantized_.z,
                                  format_.weight, Write::Overwrite);
  fresh_leaf();
}

Tensor QuantLinear::current_codes() const {
  if (const auto* frozen = std::get_if<FrozenCodes>(&state_)) return frozen->codes;
  BBB_ASSERT(format_.weight.bits < kNoQuantizer && !sharded());
  const Tensor codes = backend_.empty({n_, columns()}, DType::U8);
  backend_.quantize_codes(codes, parameter()->master, quantized_.e, quantized_.z, quantized_.s,
                          code_grid());
  return codes;
}

LinearResult QuantLinear::quantized() const {
  if (holds<TrainedLc>()) {
    LinearResult result = master();
    const std::vector<float> latents = std::exchange(result.master, {});
    const quant::LcRule rule = lc_rule(format_);
    std::vector<uint8_t> codes;
    for (const float latent : latents)
      codes.push_back(static_cast<uint8_t>(quant::lc_code(quant::lc_position(latent, rule), rule)));
    store_lc(result, codes, std::exchange(result.lc, {}));
    return result;
  }
  LinearResult result;
  result.format = format_;
  result.bias = bias();
  const Tensor codes = current_codes();
  if (backend_.computes())
    result.store(download_bytes(backend_, codes), download_bytes(backend_, quantized_.e),
                 download_bytes(backend_, quantized_.z),
                 download_floats(backend_, quantized_.s)[0]);
  return result;
}

void QuantLinear::snap() {
  if (format_.weight.bits == kNoQuantizer) return;  // no bins
  LinearResult result = master();
  if (format_.is_lc()) {
    const quant::LcRule rule = lc_rule(format_);
    for (float& latent : result.master)
      latent = quant::lc_latent(quant::lc_code(quant::lc_position(latent, rule), rule), rule);
    return set_master(result);
  }
  const float master_scale = download_floats(backend_, quantized_.s)[0];
  uint8_t* const ratios = result.ratios.empty() ? nullptr : result.ratios.data();
  engine::ThreadPool(0).parallel_for(n_, kSnapRows, [&](int64_t begin, int64_t end) {
    quant::host::snap(result.master.data(), ratios, {begin, end}, columns(), master_scale,
                      code_grid());
  });
  set_master(result);
}

Var QuantLinear::forward(Tape& tape, const LinearInput& x, const Var& residual) {
  if (packed_lc()) return forward_lc(tape, {this}, x, residual)[0];
  if (multiplies_codes(x)) return forward_packed(tape, {this}, x, residual)[0];
  if (const auto* packed = std::get_if<PackedLinear>(&state_)) {
    BBB_ASSERT(!tape.recording());
    const Tensor weight = packed->buffer.slice(0, n_ * columns()).view({n_, columns()});
    backend_.unpack(weight, packed->weight);
    return linear(tape, x.whole(tape), Var(weight), quantized_.s, residual, bias_);
  }
  BBB_ASSERT(leaf_.defined());
  if (tape.recording() && sharded()) fresh_leaf();  // every pass overwrites the gradient
  // A weight of 16 bits is the same at every precision.
  const bool own = precision_ == 0 || !format_.weight.nested;
  // Closures run backwards: this one behind the product's.
  const Parameter* const written = holds<FrozenCodes>() ? nullptr : parameter();
  if (tape.recording() && written != nullptr && written->on_gradient)
    tape.record(written->on_gradient);
  return linear(tape, x.whole(tape), own ? leaf_ : nested_leaves_[precision_ - 1], multiplier(),
                residual, bias_);
}

std::vector<Var> QuantLinear::forward(Tape& tape, const std::vector<QuantLinear*>& site,
                                      const LinearInput& x) {
  const auto in_one = [&](const QuantLinear* linear) {
    return linear->multiplies_codes(x) &&
           linear->format_.weight.group == site[0]->format_.weight.group;
  };
  if (site[0]->packed_lc()) return forward_lc(tape, site, x, Var());
  if (std::ranges::all_of(site, in_one)) return forward_packed(tape, site, x, Var());
  std::vector<Var> outputs;
  for (QuantLinear* linear : site) outputs.push_back(linear->forward(tape, x, Var()));
  return outputs;
}

bool QuantLinear::multiplies_codes(const LinearInput& x) const {
  if (!holds<PackedLinear>()) return false;
  const int64_t rows = engine::numel_of(x.shape) / columns();
  return rows <= backend_.max_packed_rows(format_);
}

std::vector<Var> QuantLinear::forward_packed(Tape& tape, const std::vector<QuantLinear*>& site,
                                             const LinearInput& x, const Var& residual) {
  BBB_ASSERT(!tape.recording());
  Backend& backend = tape.backend();
  Shape shape = x.shape;
  const int64_t k = shape.back(), m = engine::numel_of(shape) / k;
  std::vector<Var> outputs;
  engine::PackedProducts products;
  for (const QuantLinear* linear : site) {
    const int64_t n = shape.back() = linear->n_;
    outputs.emplace_back(backend.empty(shape, backend.act()));
    Tensor addend;
    if (residual.defined())
      addend = residual.value().view({m, n});
    else if (linear->bias_.defined() && m <= Backend::kMaxPackedRows)
      addend = linear->bias_rows_.rows(0, m);
    products.push_back(
        {outputs.back().value().view({m, n}), linear->get<PackedLinear>().weight, addend});
  }
  const auto rows = [&](const Var& of) { return of.value().view({m, of.value().dim(-1)}); };
  if (x.norm.defined())
    backend.packed_gemv_normed(products, rows(x.x), x.norm.value(), x.eps, x.operand);
  else if (x.up.defined())
    backend.packed_gemv_gated(products, rows(x.x), rows(x.up), x.operand);
  else
    backend.packed_gemv(products, rows(x.x), x.operand);
  for (size_t i = 0; i < site.size(); ++i)
    if (site[i]->bias_.defined() && (residual.defined() || !products[i].addend.defined()))
      backend.add_bias(products[i].y, site[i]->bias_);
  return outputs;
}

// x is the operand that LC makes (Operand), with a constant a row.
std::vector<Var> QuantLinear::forward_lc(Tape& tape, const std::vector<QuantLinear*>& site,
                                         const LinearInput& x, const Var& residual) {
  BBB_ASSERT(!tape.recording() && x.constant.defined());
  Backend& backend = tape.backend();
  Shape shape = x.shape;
  const int64_t k = shape.back(), m = engine::numel_of(shape) / k;
  const Tensor rows = x.x.value().view({m, k});
  engine::PackedProducts products;
  for (const QuantLinear* linear : site)
    products.push_back(
        {backend.empty({m, linear->n_}, backend.real()), linear->packed().weight, {}});
  if (m <= backend.max_packed_rows(site[0]->packed().weight.format)) {
    backend.packed_gemv(products, rows);
  } else {
    for (size_t i = 0; i < site.size(); ++i) {
      const int64_t n = site[i]->n_;
      const Tensor codes = site[i]->packed().buffer.slice(0, n * k).view({n, k});
      backend.unpack(codes, products[i].weight);
      backend.gemm_nt(products[i].y, rows, codes, Tensor(), Tensor());
    }
  }
  std::vector<Var> outputs;
  for (size_t i = 0; i < site.size(); ++i) {
    const int64_t n = shape.back() = site[i]->n_;
    outputs.emplace_back(backend.empty(shape, backend.act()));
    const Tensor y = outputs.back().value().view({m, n});
    backend.lc_output(y, products[i].y, x.constant, site[i]->packed().v,
                      residual.defined() ? residual.value().view({m, n}) : Tensor());
    if (site[i]->bias_.defined()) backend.add_bias(y, site[i]->bias_);
  }
  return outputs;
}

}  // namespace bbb::models
