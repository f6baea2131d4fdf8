#include "train/result_quantizer.h"

#include <algorithm>

#include "models/llama.h"

namespace bbb::train {

models::LayerResult ResultQuantizer::operator()(int64_t layer, models::LayerResult result) const {
  const std::vector<quant::LinearFormat> formats = recipe_.result_formats(layer);
  result = recipe_.start(layer, result, formats);
  if (std::ranges::all_of(result.linears, &models::LinearResult::quantized)) return result;
  autograd::ParameterSet parameters(backend_, autograd::GradientPasses::One);
  models::LlamaBlock block(backend_, model_, 0, engine::Tensor());
  block.declare_parameters(parameters, formats);
  parameters.allocate();
  autograd::WeightQuantizer quantizer(parameters, config_.group, config_.range,
                                      engine::Rounding::Nearest, {}, {},
                                      Recipe::weight_rule(config_));
  block.bind_parameters(quantizer, formats);
  block.set_masters(result);
  quantizer.prepare();
  result.linears = block.result(models::LinearContent::Stored).linears;
  return result;
}

}  // namespace bbb::train
