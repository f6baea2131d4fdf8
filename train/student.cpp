#include "train/student.h"

namespace bbb::train {

using autograd::GradientPasses;
using models::LayerResult;
using models::LlamaBlock;
using models::QuantLinear;

Student::Student(engine::Backend& backend, const models::Checkpoint& source,
                 const TrainConfig& config, const Recipe& recipe, size_t stage)
    : backend_(backend),
      config_(config),
      recipe_(recipe),
      stage_(stage),
      model_(backend, source, models::HeadRounding::BFloat16),
      parameters_(backend, config.e2e_batch == config.e2e_micro_batch && recipe.precisions() == 1
                               ? GradientPasses::One
                               : GradientPasses::Several) {}

void Student::load(const std::function<LayerResult(int64_t layer)>& start,
                   const std::function<void(int64_t layers)>& loaded) {
  const bool all = config_.e2e_train == EndToEndTrain::All;
  for (auto& block : model_.blocks()) {
    const std::vector<quant::LinearFormat> linears = formats(*block);
    if (all) {
      block->declare_parameters(parameters_, linears);
      continue;
    }
    const std::vector<QuantLinear*> named = block->linears();
    for (size_t i = 0; i < linears.size(); ++i)
      sigmas_.push_back(
          &parameters_.add(named[i]->name() + ".sigma", {linears[i].n, linears[i].groups()}));
  }
  parameters_.allocate();
  if (all)
    quantizer_.emplace(parameters_, config_.group, config_.range, engine::Rounding::Nearest,
                       recipe_.nested());
  for (auto& block : model_.blocks()) {
    const int64_t layer = block->layer();
    const LayerResult result =
        models::start_stage(model_.config(), start(layer), formats(*block),
                            recipe_.statistics(layer), config_.range, recipe_.lowest_bits());
    if (all) {
      block->bind_parameters(*quantizer_, formats(*block));
      block->set_masters(result);
    } else {
      load_scales(*block, result);
    }
    loaded(layer + 1);
  }
}

// The block's masters live only in this function, until its codes are frozen.
void Student::load_scales(LlamaBlock& block, const LayerResult& start) {
  autograd::ParameterSet masters(backend_, GradientPasses::One);
  block.declare_parameters(masters, formats(block));
  masters.allocate();
  autograd::WeightQuantizer quantizer(masters, config_.group, config_.range);
  block.bind_parameters(quantizer, formats(block));
  block.set_masters(start);
  quantizer.prepare();
  const std::vector<QuantLinear*> linears = block.linears();
  const size_t first = static_cast<size_t>(block.layer()) * linears.size();
  for (size_t i = 0; i < linears.size(); ++i) linears[i]->freeze_codes(*sigmas_[first + i]);
  block.set_norms(start.input_norm, start.post_norm);
}

void Student::prepare() {
  if (quantizer_) return quantizer_->prepare();
  for (auto& block : model_.blocks()) block->prepare_scales();
}

void Student::quantize() {
  if (quantizer_) return quantizer_->quantize();
  prepare();
}

void Student::select_precision(size_t i) {
  for (auto& block : model_.blocks()) block->select_precision(i);
}

void Student::finish_backward() {
  for (auto& block : model_.blocks()) block->finish_backward();
}

void Student::snap() {
  prepare();
  for (auto& block : model_.blocks()) block->snap();
}

}  // namespace bbb::train
