#include "train/student.h"

#include <algorithm>

#include "train/result_quantizer.h"
#include "train/run_file.h"

namespace bbb::train {

using autograd::GradientPasses;
using models::OuterWeight;
using models::QuantLinear;

Student::Student(engine::Backend& backend, const models::Checkpoint& source,
                 const TrainConfig& config, const Recipe& recipe, size_t stage)
    : backend_(backend),
      source_(source),
      config_(config),
      recipe_(recipe),
      stage_(stage),
      model_(backend, source, models::HeadRounding::BFloat16),
      parameters_(backend,
                  own_e2e_batch(config) == own_micro_batch(config) &&
                          (config.comm->size() == 1 || shards_whole(config, stage)) &&
                          Recipe::precisions(config) == 1
                      ? GradientPasses::One
                      : GradientPasses::Several,
                  shards_whole(config, stage) ? config.comm.get() : nullptr, config.e2e_moments) {}

void Student::load(const StartOfModel& start, const std::function<void(int64_t layers)>& loaded) {
  const bool all = config_.e2e_train == EndToEndTrain::All;
  const bool adapts = adapts_whole(config_, stage_), learns = learns_whole_grid(config_);
  for (auto& block : model_.blocks()) {
    const std::vector<quant::LinearFormat> linears = formats(*block);
    if (learns) {
      block->declare_learned(parameters_, linears, Recipe::learned_parts(config_),
                             {.lr_factor = config_.grid_lr / recipe_.whole_stages()[stage_].lr});
      continue;
    }
    if (all) {
      block->declare_parameters(
          parameters_, linears, config_.optimizer, recipe_.lc(),
          adapts ? recipe_.lora(autograd::LoraTraining::Masters::Fixed) : autograd::LoraTraining());
      continue;
    }
    const std::vector<QuantLinear*> named = block->linears();
    std::vector<autograd::Parameter*>& sigmas = sigmas_.emplace_back();
    for (size_t i = 0; i < linears.size(); ++i)
      sigmas.push_back(
          &parameters_.add(named[i]->name() + ".sigma", {linears[i].n, linears[i].groups()}));
  }
  if (config_.e2e_embedding == EmbeddingTrain::Train)
    for (const OuterWeight& weight : models::outer_weights(model_.config()))
      outer_.push_back(&parameters_.add(
          weight.name, weight.shape,
          {.lr_factor = weight.name == models::kFinalNorm ? 1.0 : kEmbeddingRate}));
  start_outer_ = start.outer;
  // In front of allocate(): the tables pass through memory in F32, which the masters' then takes.
  if (outer_.empty() && start.outer) model_.load_outer(start.outer, models::HeadRounding::BFloat16);
  parameters_.allocate();
  if (!outer_.empty()) bind_outer(start.outer ? start.outer : models::outer_of(source_));
  if (all && !learns)
    quantizer_.emplace(parameters_, config_.group, config_.range, engine::Rounding::Nearest,
                       recipe_.nested(), recipe_.lc(), Recipe::weight_rule(config_));
  for (auto& block : model_.blocks()) {
    const int64_t layer = block->layer();
    if (all) {
      if (learns)
        block->bind_learned(formats(*block));
      else
        block->bind_parameters(*quantizer_, formats(*block));
      block->set_masters(recipe_.start(layer, start.layer(layer), formats(*block)));
      if (adapts)
        block->start_adapters(
            recipe_.adapter_seed(layer, recipe_.block_stages() + static_cast<int64_t>(stage_)));
    } else {
      const ResultQuantizer quantize(backend_, model_.config(), config_, recipe_);
      block->freeze_codes(quantize(layer, start.layer(layer)), sigmas_[static_cast<size_t>(layer)]);
    }
    loaded(layer + 1);
  }
  if (adapts) quantizer_->adapt(true);
}

void Student::bind_outer(const models::LoadOuter& load) {
  const std::vector<OuterWeight> weights = models::outer_weights(model_.config());
  for (size_t i = 0; i < weights.size(); ++i) {
    autograd::Parameter& parameter = *outer_[i];
    models::upload_into(backend_, parameter.master, load(weights[i]));
    if (weights[i].name == models::kFinalNorm) {
      model_.norm().set_parameter(parameter);
      continue;
    }
    const bool wide = parameter.grad.dtype() == backend_.real();
    tables_.push_back({&parameter,
                       weights[i].name == models::kHead ? model_.head() : model_.embedding(),
                       wide ? parameter.grad : backend_.empty(weights[i].shape, backend_.real()),
                       {}});
  }
}

void Student::prepare_tables() {
  for (Table& table : tables_) {
    models::round_table(backend_, table.value, table.parameter->master,
                        models::HeadRounding::BFloat16);
    table.leaf = autograd::Var::leaf(table.value, table.gradient, engine::Write::Overwrite);
  }
  if (!tables_.empty()) model_.set_tables(tables_.front().leaf, tables_.back().leaf);
}

models::LoadOuter Student::outer() const {
  if (outer_.empty()) return start_outer_;
  return [this](const OuterWeight& weight) {
    const auto named = [&](const autograd::Parameter* p) { return p->name == weight.name; };
    return models::download_floats(backend_, (*std::ranges::find_if(outer_, named))->master);
  };
}

void Student::prepare() {
  prepare_tables();
  if (quantizer_) return quantizer_->prepare();
  for (auto& block : model_.blocks()) block->prepare_scales();
}

void Student::quantize() {
  if (!quantizer_) return prepare();
  prepare_tables();
  quantizer_->quantize();
}

void Student::join() const {
  if (quantizer_) quantizer_->join();
}

void Student::select_precision(size_t i) {
  for (auto& block : model_.blocks()) block->select_precision(i);
}

void Student::finish_backward() {
  for (auto& block : model_.blocks()) block->finish_backward();
  model_.norm().finish_backward(backend_);
  for (const Table& table : tables_) {
    BBB_ASSERT(table.leaf.has_grad());
    if (table.parameter->grad.dtype() != table.gradient.dtype())
      backend_.cast(table.parameter->grad, table.gradient);
  }
}

void Student::write_result(const RunDirectory& run) {
  if (config_.lora_end == LoraEnd::Discard && adapts_whole(config_, stage_))
    for (auto& block : model_.blocks()) block->discard_adapters();
  prepare();
  const models::LlamaConfig& model = model_.config();
  const models::LinearContent content = final_content(config_);
  std::vector<data::SafeTensorsWriter::Entry> entries;
  for (auto& block : model_.blocks())
    models::declare_layer(entries, block->layer(), model, formats(*block), content, config_.range);
  const models::LoadOuter outer = this->outer();
  if (outer) models::declare_outer(entries, model);
  std::optional<RunFileWriter> writer;
  if (run.writes()) writer.emplace(run.whole_stage_file(recipe_, stage_), run.checksum(), entries);
  for (auto& block : model_.blocks()) {
    const models::LayerResult result = block->result(content);  // of the parts of all ranks
    if (writer) models::add_layer(*writer, block->layer(), model, result, content);
  }
  if (!writer) return;
  if (outer) models::add_outer(*writer, model, outer);
  writer->finish();
}

void Student::snap() {
  prepare();
  for (auto& block : model_.blocks()) block->snap();
}

}  // namespace bbb::train
