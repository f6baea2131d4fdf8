// A block:   a = x + o_proj(attention(rope(q_proj h), rope(k_proj h), v_proj h)),  h = norm(x)
//            y = a + down_proj(silu(gate_proj g) * up_proj g),                     g = norm(a)
// In Qwen3 a norm over each head follows q_proj and k_proj. Both residual sums are addends of the
// GEMMs. The model: embed, blocks, norm; logits = h head^T.
//
// In block training x takes no gradient, so only the input norm's weight would need the gradient of
// h. Its gradient comes from the weight gradients of q_proj, k_proj and v_proj instead
// (Backend::input_scale_gradient): three products less, 8 % of a block's operations.
#include "models/llama.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "engine/rng.h"

namespace bbb::models {

using engine::DType;
using engine::Shape;

namespace {

QuantLinear make_linear(Backend& backend, const LlamaConfig& config, int64_t layer, size_t index) {
  const LinearShape shape = block_linears(config)[index];
  return QuantLinear(backend, layer_name(layer, shape.name), shape.n, shape.k);
}

PackedWeight upload_stored(Backend& backend, const Checkpoint& source, const std::string& name,
                           const quant::LinearFormat& format) {
  return engine::upload_packed(backend, format, [&](const quant::StoredTensor& tensor) {
    return source.stored(name + tensor.suffix);
  });
}

// The norm's gradient is found by dividing by its weight (Backend::input_scale_gradient), so an
// exact zero could never train again. 2^-60 vanishes in every sum and is an exact factor.
constexpr float kLeastNorm = 0x1p-60f;

std::vector<float> without_zeros(std::vector<float> norm) {
  std::replace(norm.begin(), norm.end(), 0.0f, kLeastNorm);
  return norm;
}

}  // namespace

void NormWeight::set_constant(Tensor weight) {
  value = std::move(weight);
  parameter = nullptr;
  leaf = Var(value);
}

void NormWeight::set_parameter(Parameter& trained) {
  value = trained.master;
  parameter = &trained;
  leaf = Var::leaf(value, trained.grad, Write::Overwrite);
}

void NormWeight::finish_backward(Backend& backend) {
  if (!parameter) return;
  if (leaf.has_grad())
    set_parameter(*parameter);
  else
    backend.zero(parameter->grad);
}

LlamaBlock::LlamaBlock(Backend& backend, const LlamaConfig& config, int64_t layer, Tensor inv_freq)
    : backend_(backend),
      config_(config),
      layer_(layer),
      inv_freq_(std::move(inv_freq)),
      q_(make_linear(backend, config, layer, 0)),
      k_(make_linear(backend, config, layer, 1)),
      v_(make_linear(backend, config, layer, 2)),
      o_(make_linear(backend, config, layer, 3)),
      gate_(make_linear(backend, config, layer, 4)),
      up_(make_linear(backend, config, layer, 5)),
      down_(make_linear(backend, config, layer, 6)) {}

std::vector<QuantLinear*> LlamaBlock::linears() {
  return {&q_, &k_, &v_, &o_, &gate_, &up_, &down_};
}

void LlamaBlock::set_operands(const std::vector<quant::LinearFormat>& formats, bool packed) {
  const std::vector<LinearShape> shapes = block_linears(config_);
  BBB_ASSERT(formats.size() == shapes.size());
  for (size_t i = 0; i < shapes.size(); ++i)
    if (i == 0 || shapes[i].site != shapes[i - 1].site)
      operands_[shapes[i].site].set(backend_, formats[i], packed);
  if (!packed) return;
  const std::vector<QuantLinear*> all = linears();
  for (size_t i = 0; i < shapes.size(); ++i)
    if (formats[i].is_lc())
      operands_[shapes[i].site].set_lc(all[i]->packed().u, all[i]->packed().map);
}

LinearInput LlamaBlock::tapped(Site site, LinearInput input) const {
  if (tap_) {
    BBB_ASSERT(input.x.defined() && !input.norm.defined() && !input.up.defined());
    tap_(site, input.x.value());
  }
  return input;
}

Var LlamaBlock::attention_half(Tape& tape, const Var& x, KvCache* kv, const Tensor& first_key) {
  const int64_t b = x.value().dim(0), t = x.value().dim(1), d = config_.head_dim;
  const engine::AttentionSpec spec{.window = config_.sliding_window,
                                   .rope_factor = rope_factor(config_),
                                   .first_key = first_key};

  // The gradients of several precisions are of different weights, and those of sharded weights are
  // gone when the backward pass is done.
  norm_through_products_ = tape.recording() && !nested_ && operands_[kAttentionSite].exact() &&
                           !x.requires_grad() && input_norm_.parameter != nullptr &&
                           !q_.parameter()->sharded;
  const Var norm = norm_through_products_ ? Var(input_norm_.value) : input_norm_.var();
  LinearInput h =
      tapped(kAttentionSite, operands_[kAttentionSite].rms_norm(tape, x, norm, config_.rms_eps));
  std::vector<Var> projected = QuantLinear::forward(tape, {&q_, &k_, &v_}, h);
  h = LinearInput();
  const auto heads = [&](const Var& rows, int64_t count) {
    return reshape(tape, rows, {b, t, count, d});
  };
  Var q = heads(projected[0], config_.heads);
  Var k = heads(projected[1], config_.kv_heads);
  const Var v = heads(projected[2], config_.kv_heads);
  projected.clear();
  if (config_.qk_norm) {
    q = rms_norm(tape, q, q_norm_.var(), config_.rms_eps);
    k = rms_norm(tape, k, k_norm_.var(), config_.rms_eps);
  }

  Var out;
  if (kv) {
    const size_t layer = static_cast<size_t>(layer_);
    const Tensor &k_cache = kv->k[layer], &v_cache = kv->v[layer];
    out = Var(backend_.empty(q.value().shape(), backend_.act()));
    if (t == 1) {
      backend_.attention_step(out.value(), q.value(), k.value(), v.value(), k_cache, v_cache,
                              kv->start, frequencies(t), spec, kv->format);
    } else {
      backend_.append_kv(k_cache, v_cache, k.value(), v.value(), kv->start, q.value(),
                         frequencies(t), kv->format, spec.rope_factor);
      backend_.attention_cached(out.value(), q.value(), k_cache, v_cache, kv->start, spec,
                                kv->format);
    }
  } else {
    out = attention(tape, q, k, v, frequencies(t), spec);
  }
  out = reshape(tape, out, {b, t, config_.heads * d});
  return o_.forward(tape, tapped(kOutputSite, operands_[kOutputSite].plain(tape, out)), x);
}

// Dynamic scaling: a sequence longer than the model's positions has its own. Only perplexity and
// tasks run one, in one piece.
Tensor LlamaBlock::frequencies(int64_t tokens) const {
  const bool own = config_.rope_scaling && config_.rope_scaling->kind == RopeKind::Dynamic &&
                   tokens > config_.max_position;
  return own ? upload_as(backend_, rope_inv_freq(config_, tokens), inv_freq_.shape(), DType::F32)
             : inv_freq_;
}

Var LlamaBlock::mlp_half(Tape& tape, const Var& x) {
  LinearInput g =
      tapped(kMlpSite, operands_[kMlpSite].rms_norm(tape, x, post_norm_.var(), config_.rms_eps));
  const std::vector<Var> hidden = QuantLinear::forward(tape, {&gate_, &up_}, g);
  g = LinearInput();
  return down_.forward(
      tape, tapped(kDownSite, operands_[kDownSite].swiglu(tape, hidden[0], hidden[1])), x);
}

Var LlamaBlock::forward(Tape& tape, const Var& x, KvCache* kv, Recompute recompute,
                        const Tensor& first_key) {
  if (!tape.recording()) return mlp_half(tape, attention_half(tape, x, kv, first_key));
  const auto attend = [this, first_key](Tape& t, const Var& in) {
    return attention_half(t, in, nullptr, first_key);
  };
  const auto feed = [this](Tape& t, const Var& in) { return mlp_half(t, in); };
  BBB_ASSERT(kv == nullptr);
  const Var attended = recompute == Recompute::None ? attend(tape, x) : checkpoint(tape, attend, x);
  return recompute == Recompute::Block ? checkpoint(tape, feed, attended) : feed(tape, attended);
}

// Weights.

std::vector<NormWeight*> LlamaBlock::norms() {
  if (!config_.qk_norm) return {&input_norm_, &post_norm_};
  return {&input_norm_, &post_norm_, &q_norm_, &k_norm_};
}

void LlamaBlock::set_norms(const LayerResult& from) {
  const std::vector<NormShape> shapes = block_norms(config_);
  const std::vector<NormWeight*> weights = norms();
  for (size_t i = 0; i < shapes.size(); ++i)
    weights[i]->set_constant(upload_as(backend_, from.norm(i), {shapes[i].size}, backend_.real()));
}

void LlamaBlock::set_biases(const LayerResult& from) {
  const std::vector<LinearShape> shapes = block_linears(config_);
  const std::vector<QuantLinear*> all = linears();
  for (size_t i = 0; i < shapes.size(); ++i)
    if (shapes[i].bias) all[i]->set_bias(from.linears[i].bias);
}

void LlamaBlock::set_float(const LayerResult& weights) {
  const std::vector<QuantLinear*> all = linears();
  BBB_ASSERT(weights.linears.size() == all.size());
  for (size_t i = 0; i < all.size(); ++i)
    all[i]->set_float(
        upload_as(backend_, weights.linears[i].master, {all[i]->n(), all[i]->k()}, backend_.act()));
  set_norms(weights);
  set_biases(weights);
}

void LlamaBlock::set_stored(const LayerResult& weights) {
  const std::vector<QuantLinear*> all = linears();
  BBB_ASSERT(weights.linears.size() == all.size());
  std::vector<quant::LinearFormat> formats;
  for (size_t i = 0; i < all.size(); ++i) {
    const LinearResult& linear = weights.linears[i];
    formats.push_back(linear.format);
    all[i]->set_float(upload_as(backend_, linear.quantized() ? linear.levels() : linear.master,
                                {linear.format.n, linear.format.stored_k()}, backend_.act()),
                      linear.format);
  }
  set_norms(weights);
  set_biases(weights);
  set_operands(formats, false);
}

void LlamaBlock::load(const Checkpoint& source, const Tensor& buffer) {
  std::vector<quant::LinearFormat> formats;
  const LayerResult constants = norms_and_biases(source, layer_);
  set_norms(constants);
  set_biases(constants);
  for (QuantLinear* linear : linears()) {
    const std::string& name = linear->name();
    const Shape shape{linear->n(), linear->k()};
    const auto format = source.packed_format(name, linear->n(), linear->k());
    if (format)
      linear->set_stored(
          *format, [&](const quant::StoredTensor& t) { return source.stored(name + t.suffix); },
          buffer);
    else
      linear->set_float(
          upload_as(backend_, source.load(name + ".weight", shape), shape, backend_.act()));
    formats.push_back(linear->format());
  }
  set_operands(formats, source.kind() == CheckpointKind::Packed);
}

void LlamaBlock::set_packed(const LayerResult& result) {
  const std::vector<QuantLinear*> all = linears();
  std::vector<quant::LinearFormat> formats;
  int64_t largest = 0;
  for (const LinearResult& linear : result.linears) {
    formats.push_back(linear.format);
    largest = std::max(largest, QuantLinear::buffer_elements(backend_, linear.format));
  }
  const Tensor buffer = largest > 0 ? backend_.empty({largest}, backend_.act()) : Tensor();
  for (size_t i = 0; i < all.size(); ++i)
    all[i]->set_stored(
        formats[i],
        [&](const quant::StoredTensor& tensor) {
          return result.linears[i].part(tensor.part).data();
        },
        buffer);
  set_norms(result);
  set_biases(result);
  set_operands(formats, true);
}

// Training.

void LlamaBlock::declare_parameters(ParameterSet& set,
                                    const std::vector<quant::LinearFormat>& formats,
                                    autograd::UpdateRule rule, const autograd::LcTraining& lc,
                                    const autograd::LoraTraining& lora) {
  declared_.clear();
  declared_v_.clear();
  declared_adapters_.clear();
  lora_alpha_ = lora.alpha;
  const std::vector<QuantLinear*> all = linears();
  BBB_ASSERT(formats.size() == all.size());
  for (size_t i = 0; i < all.size(); ++i) {
    const engine::Shape shape{formats[i].n, formats[i].stored_k()};
    declared_.push_back(
        &set.add(all[i]->name() + ".weight", shape, autograd::slot_rule(rule, shape)));
    declared_.back()->sharded = set.comm() != nullptr;
    declared_.back()->frozen =
        lora.rank > 0 && lora.masters == autograd::LoraTraining::Masters::Fixed;
  }
  for (const NormShape& norm : block_norms(config_))
    declared_.push_back(&set.add(layer_name(layer_, norm.name), {norm.size}));
  for (size_t i = 0; lora.rank > 0 && i < all.size(); ++i)
    for (const auto& [part, shape] : {std::pair(".lora_a", engine::Shape{formats[i].n, lora.rank}),
                                      {".lora_b", {lora.rank, formats[i].stored_k()}}})
      declared_adapters_.push_back(
          &set.add(all[i]->name() + part, shape, autograd::slot_rule(rule, shape)));
  const std::vector<LinearShape> shapes = block_linears(config_);
  for (size_t i = 0; i < all.size(); ++i) {
    if (!formats[i].is_lc()) continue;
    const std::string& name = all[i]->name();
    const quant::SlotRule<double> rule{.lr_factor = lc.scale_rate};
    std::optional<LcSite>& site = lc_sites_[shapes[i].site];
    if (i == 0 || shapes[i].site != shapes[i - 1].site)
      site = {.u = &set.add(name + ".u", {formats[i].k}, rule),
              .map = &set.add(name + ".map", {quant::kLcVector, quant::kLcVector + 1}, rule),
              .learns_map = lc.learns_map,
              .du = {},
              .dmap = {}};
    declared_v_.push_back(&set.add(name + ".v", {formats[i].n}, rule));
    declared_v_.back()->derived = site->u->derived = site->map->derived = true;
  }
}

void LlamaBlock::declare_learned(ParameterSet& set, const std::vector<quant::LinearFormat>& formats,
                                 LearnedParts parts, const quant::SlotRule<double>& rule) {
  declare_parameters(set, formats);
  learned_.clear();
  for (size_t i = 0; i < formats.size(); ++i) {
    const auto add = [&](const char* part) {
      Parameter& of_groups =
          set.add(linears()[i]->name() + part, {formats[i].n, formats[i].groups()}, rule);
      of_groups.derived = true;
      return &of_groups;
    };
    LearnedGrid& grid = learned_.emplace_back(LearnedGrid{.master = declared_[i]});
    if (parts == LearnedParts::Ratios)
      grid.ratio = add(".ratio");
    else
      grid.sigma = add(".sigma");
    if (parts == LearnedParts::ScalesZeros) grid.zeta = add(".zeta");
  }
}

void LlamaBlock::bind_learned(const std::vector<quant::LinearFormat>& formats) {
  BBB_ASSERT(learned_.size() == formats.size());
  for (size_t i = 0; i < formats.size(); ++i) linears()[i]->set_learned(learned_[i], formats[i]);
  set_operands(formats, false);
  bind_norms();
}

void LlamaBlock::bind_norms() {
  const std::vector<NormWeight*> weights = norms();
  const size_t first = declared_.size() - weights.size();
  for (size_t i = 0; i < weights.size(); ++i) weights[i]->set_parameter(*declared_[first + i]);
  declared_.clear();
  learned_.clear();
}

void LlamaBlock::bind_parameters(WeightQuantizer& quantizer,
                                 const std::vector<quant::LinearFormat>& formats) {
  const std::vector<QuantLinear*> all = linears();
  BBB_ASSERT(declared_.size() == all.size() + norms().size() && formats.size() == all.size());
  for (std::optional<LcSite>& site : lc_sites_) {
    if (!site) continue;
    site->du = backend_.empty(site->u->master.shape(), backend_.real());
    site->dmap = backend_.empty(site->map->master.shape(), backend_.real());
  }
  const std::vector<LinearShape> shapes = block_linears(config_);
  for (size_t i = 0; i < all.size(); ++i)
    if (formats[i].is_lc())
      all[i]->set_trained_lc(quantizer, *declared_[i], *declared_v_[i], *lc_sites_[shapes[i].site],
                             formats[i]);
    else
      all[i]->set_trained(quantizer, *declared_[i], formats[i]);
  for (size_t i = 0; i < declared_adapters_.size(); i += 2)
    all[i / 2]->set_adapters(*declared_adapters_[i], *declared_adapters_[i + 1], lora_alpha_);
  declared_adapters_.clear();
  set_operands(formats, false);
  bind_norms();
}

void LlamaBlock::start_adapters(uint64_t seed) {
  engine::Rng rng(seed);
  for (QuantLinear* linear : linears()) linear->start_adapters(rng);
}

void LlamaBlock::discard_adapters() {
  for (QuantLinear* linear : linears()) linear->discard_adapters();
}

void LlamaBlock::set_masters(const LayerResult& result) {
  const std::vector<QuantLinear*> all = linears();
  BBB_ASSERT(result.linears.size() == all.size());
  for (size_t i = 0; i < all.size(); ++i) all[i]->set_master(result.linears[i]);
  const std::vector<NormWeight*> weights = norms();
  for (size_t i = 0; i < weights.size(); ++i)
    upload_into(backend_, weights[i]->value,
                weights[i] == &input_norm_ ? without_zeros(result.input_norm) : result.norm(i));
  set_biases(result);
}

LayerResult LlamaBlock::result(LinearContent content) {
  LayerResult result;
  for (QuantLinear* linear : linears())
    result.linears.push_back(content == LinearContent::Stored ? linear->quantized()
                                                              : linear->master());
  const std::vector<NormWeight*> weights = norms();
  for (size_t i = 0; i < weights.size(); ++i)
    result.norm(i) = download_floats(backend_, weights[i]->value);
  return result;
}

void LlamaBlock::set_formats(const std::vector<quant::LinearFormat>& formats) {
  const std::vector<QuantLinear*> all = linears();
  BBB_ASSERT(formats.size() == all.size());
  for (size_t i = 0; i < all.size(); ++i) all[i]->set_format(formats[i]);
  set_operands(formats, false);
}

void LlamaBlock::select_precision(size_t i) {
  nested_ = true;
  for (QuantLinear* linear : linears()) linear->select_precision(i);
}

void LlamaBlock::freeze_codes(const LayerResult& result, const std::vector<Parameter*>& sigmas) {
  const std::vector<QuantLinear*> all = linears();
  std::vector<quant::LinearFormat> formats;
  for (size_t i = 0; i < all.size(); ++i) {
    all[i]->freeze_codes(result.linears[i], *sigmas[i]);
    formats.push_back(result.linears[i].format);
  }
  set_norms(result);
  set_biases(result);
  set_operands(formats, false);
}

void LlamaBlock::prepare_scales() {
  for (QuantLinear* linear : linears()) linear->prepare_scales();
}

void LlamaBlock::finish_backward() {
  for (NormWeight* norm : norms())
    if (norm == &input_norm_ && norm_through_products_)
      finish_input_norm();
    else
      norm->finish_backward(backend_);
  for (QuantLinear* linear : linears()) linear->finish_backward();
  for (std::optional<LcSite>& site : lc_sites_)
    if (site) site->finish_backward(backend_);
}

void LlamaBlock::finish_input_norm() {
  const Tensor& gradient = input_norm_.parameter->grad;
  const Tensor sum = backend_.empty(gradient.shape(), backend_.real());  // rounded only at the end
  Write mode = Write::Overwrite;
  for (const QuantLinear* linear : {&q_, &k_, &v_})
    if (linear->input_scale_gradient(sum, input_norm_.value, mode)) mode = Write::Add;
  if (mode == Write::Overwrite)
    backend_.zero(gradient);
  else
    backend_.cast(gradient, sum);
}

void LlamaBlock::snap() {
  for (QuantLinear* linear : linears()) linear->snap();
}

// The model.

Llama::Llama(Backend& backend, LlamaConfig config) : backend_(backend), config_(std::move(config)) {
  backend.check_head_size(config_.head_dim);
  inv_freq_ = upload_as(backend_, rope_inv_freq(config_), {config_.head_dim / 2}, DType::F32);
  for (int64_t layer = 0; layer < config_.layers; ++layer)
    blocks_.push_back(std::make_unique<LlamaBlock>(backend_, config_, layer, inv_freq_));
}

void round_table(Backend& backend, const Tensor& table, const Tensor& values,
                 HeadRounding rounding) {
  if (rounding == HeadRounding::None || table.dtype() == DType::BF16)
    return backend.cast(table, values);
  const Tensor rounded = backend.empty(table.shape(), DType::BF16);
  backend.cast(rounded, values);
  backend.cast(table, rounded);
}

Llama::Llama(Backend& backend, const Checkpoint& source, HeadRounding rounding)
    : Llama(backend, source.config()) {
  const Shape shape{config_.vocab, config_.d_model};
  // A packed checkpoint's tables are bf16 (format.md): half of what F32 reads for a token.
  const DType dtype = source.kind() == CheckpointKind::Packed ? DType::BF16 : backend.act();
  const auto table = [&](const char* name) -> Table {
    const std::string module = table_module(name);
    const auto format = source.packed_format(module, shape[0], shape[1]);
    if (!format) return {Var(backend.empty(shape, dtype)), nullptr};
    return {{}, std::make_shared<PackedWeight>(upload_stored(backend, source, module, *format))};
  };
  embedding_ = table(kEmbedding);
  head_ = config_.tied_head ? embedding_ : table(kHead);
  norm_.set_constant(backend.empty({config_.d_model}, backend.real()));
  load_outer(outer_of(source), rounding);
}

void Llama::load_outer(const LoadOuter& load, HeadRounding rounding) {
  for (const OuterWeight& weight : outer_weights(config_)) {
    const Table& table = weight.name == kHead ? head_ : embedding_;
    if (weight.name == kFinalNorm)
      upload_into(backend_, norm_.value, load(weight));
    else if (table.packed == nullptr)
      round_table(backend_, table.tensor(),
                  upload_as(backend_, load(weight), weight.shape, backend_.real()), rounding);
  }
}

void Llama::set_tables(Var embedding, Var head) {
  embedding_ = {std::move(embedding), nullptr};
  head_ = {std::move(head), nullptr};
}

void Llama::load_blocks(const Checkpoint& source,
                        const std::function<void(int64_t done)>& progress) {
  int64_t largest = 0;  // elements of an unpacked linear
  for (const auto& block : blocks_)
    for (const QuantLinear* linear : block->linears())
      if (const auto format = source.packed_format(linear->name(), linear->n(), linear->k()))
        largest = std::max(largest, QuantLinear::buffer_elements(backend_, *format));
  const Tensor buffer = largest > 0 ? packed_buffer(largest) : Tensor();
  for (auto& block : blocks_) {
    block->load(source, buffer);
    if (progress) progress(block->layer() + 1);
  }
}

std::shared_ptr<const quant::ChannelOrder> evenly_split(int64_t k, int group, double ratio) {
  const auto all = static_cast<int64_t>(std::round(ratio * static_cast<double>(k)));
  if (all == 0) return nullptr;
  std::vector<int32_t> split;
  for (int64_t i = 0; i < all; ++i) split.push_back(static_cast<int32_t>(i * k / all));
  return std::make_shared<const quant::ChannelOrder>(k, group, std::vector<int32_t>(), split);
}

std::unique_ptr<Llama> Llama::synthetic(Backend& backend, const LlamaConfig& config,
                                        const SyntheticFormat& format, uint64_t seed) {
  const WeightGrid& grid = format.weight;
  const int head_bits = format.head_bits;
  std::unique_ptr<Llama> model(new Llama(backend, config));
  engine::Rng rng(seed);

  // Embedding and head: one random tile of rows, repeated.
  const auto table = [&] {
    const int64_t tile_rows = std::min<int64_t>(config.vocab, 256);
    std::vector<float> values(static_cast<size_t>(tile_rows * config.d_model));
    for (float& value : values) value = static_cast<float>(0.02 * rng.normal());
    const Tensor tile = upload_as(backend, values, {tile_rows, config.d_model}, DType::BF16);
    Tensor out = backend.empty({config.vocab, config.d_model}, DType::BF16);
    for (int64_t row = 0; row < config.vocab; row += tile_rows) {
      const int64_t rows = std::min(tile_rows, config.vocab - row);
      backend.copy(out.rows(row, rows), tile.rows(0, rows));
    }
    return Table{Var(out), nullptr};
  };
  const std::vector<float> ones(static_cast<size_t>(config.d_model), 1.0f);
  model->norm_.set_constant(upload_as(backend, ones, {config.d_model}, backend.real()));

  // Packed weights: uniform codes and zero points, e in [1/2, 2). S is about 1 / sqrt(K) in
  // linears. All read one random stream, each layer from its own offset.
  constexpr int64_t kLayerOffset = 64;
  int64_t stream_bytes =
      head_bits == kDenseBits ? 0 : config.vocab * config.d_model * head_bits / 8;
  int64_t largest = 0;
  const auto format_of = [&](int64_t n, int64_t k) -> quant::LinearFormat {
    return {.n = n,
            .k = k,
            .weight = grid,
            .input = format.input,
            .order = evenly_split(k, grid.group, format.split)};
  };
  for (const LinearShape& shape : block_linears(config)) {
    const quant::LinearFormat linear = format_of(shape.n, shape.k);
    stream_bytes = std::max(stream_bytes, shape.n * linear.stored_k() * grid.bits / 8);
    largest = std::max(largest, QuantLinear::buffer_elements(backend, linear));
  }
  stream_bytes += kLayerOffset * config.layers;
  std::vector<uint64_t> words(static_cast<size_t>((stream_bytes + 7) / 8));
  for (uint64_t& word : words) word = rng.next();
  const uint8_t* stream = reinterpret_cast<const uint8_t*>(words.data());

  LayerResult constants;
  const std::vector<NormShape> norms = block_norms(config);
  for (size_t i = 0; i < norms.size(); ++i)
    constants.norm(i).assign(static_cast<size_t>(norms[i].size), 1.0f);
  for (const LinearShape& shape : block_linears(config))
    constants.linears.emplace_back().bias.assign(static_cast<size_t>(shape.n), 0.0f);

  std::vector<uint8_t> scales;
  const auto packed = [&](const quant::LinearFormat& format, float master_scale,
                          const uint8_t* bytes) {
    return engine::upload_packed(backend, format,
                                 [&](const quant::StoredTensor& tensor) -> const void* {
                                   if (tensor.part == quant::StoredPart::MasterScale)
                                     return &master_scale;
                                   if (tensor.part == quant::StoredPart::SplitChannels)
                                     return format.order->split().data();
                                   if (tensor.part != quant::StoredPart::Scales) return bytes;
                                   scales.resize(static_cast<size_t>(tensor.bytes()));
                                   for (size_t i = 0; i < scales.size(); ++i)
                                     scales[i] = 0x30 + bytes[i] % 16;
                                   return scales.data();
                                 });
  };
  if (head_bits == kDenseBits) {
    model->embedding_ = table();
    model->head_ = config.tied_head ? model->embedding_ : table();
  } else {
    // Values of about 0.02.
    model->head_.packed = std::make_shared<PackedWeight>(
        packed(table_format(config, head_bits), std::ldexp(1.0f, -4 - head_bits), stream));
    model->embedding_ = config.tied_head ? model->head_ : table();
  }

  const Tensor buffer = largest > 0 ? model->packed_buffer(largest) : Tensor();
  for (auto& block : model->blocks_) {
    const uint8_t* bytes = stream + kLayerOffset * block->layer();
    std::vector<quant::LinearFormat> formats;
    for (QuantLinear* linear : block->linears()) {
      formats.push_back(format_of(linear->n(), linear->k()));
      const float master_scale = static_cast<float>(
          std::exp2(std::round(-0.5 * std::log2(static_cast<double>(linear->k())))));
      linear->set_packed(packed(formats.back(), master_scale, bytes), buffer);
    }
    block->set_operands(formats, true);
    block->set_norms(constants);
    block->set_biases(constants);
  }
  return model;
}

Var Llama::embed_tokens(Tape& tape, const Tensor& ids) const {
  if (embedding_.packed == nullptr) return embed(tape, ids, embedding_.dense);
  BBB_ASSERT(!tape.recording());
  const Tensor x = backend_.empty({ids.dim(0), ids.dim(1), config_.d_model}, backend_.act());
  const int64_t rows = ids.numel();
  backend_.embed_packed(x.view({rows, config_.d_model}), ids.view({rows}), *embedding_.packed);
  return Var(x);
}

Var Llama::forward(Tape& tape, const Tensor& ids, KvCache* kv, Recompute recompute,
                   const Tensor& first_key) {
  Var x = embed_tokens(tape, ids);
  for (auto& block : blocks_) x = block->forward(tape, x, kv, recompute, first_key);
  return rms_norm(tape, x, norm_.var(), config_.rms_eps);
}

Tensor Llama::logits(const Tensor& h) const {
  Tensor out = backend_.empty({h.dim(0), config_.vocab}, backend_.real());
  if (head_.packed == nullptr) {
    backend_.gemm_nt(out, h, head(), Tensor(), Tensor());
    return out;
  }
  const int64_t most = std::min(backend_.max_packed_rows(head_.packed->format), h.dim(0));
  for (int64_t row = 0; row < h.dim(0); row += most) {
    const int64_t rows = std::min(most, h.dim(0) - row);
    backend_.packed_gemv(out.rows(row, rows), h.rows(row, rows), *head_.packed, Tensor());
  }
  return out;
}

}  // namespace bbb::models
