// Student: the quantized model that the end-to-end phase trains, and its parameters.
//
//   all      the blocks' linears, behind the quantizer, and their norms
//   scales   one sigma per group over frozen codes; norms are constant
#pragma once

#include <functional>
#include <optional>
#include <vector>

#include "models/llama.h"
#include "train/recipe.h"

namespace bbb::train {

class Student {
 public:
  // For a stage of the whole model. Embedding, final norm and head are the source's, and constant.
  // config and recipe must outlive the student.
  Student(engine::Backend& backend, const models::Checkpoint& source, const TrainConfig& config,
          const Recipe& recipe, size_t stage);

  // Makes the parameters from the masters of start(layer), in any format. loaded(layers): layers
  // done so far.
  void load(const std::function<models::LayerResult(int64_t layer)>& start,
            const std::function<void(int64_t layers)>& loaded);
  models::Llama& model() { return model_; }
  autograd::ParameterSet& parameters() { return parameters_; }
  const autograd::ParameterSet& parameters() const { return parameters_; }
  const autograd::WeightQuantizer* quantizer() const {  // null if scales train
    return quantizer_ ? &*quantizer_ : nullptr;
  }

  // Both quantize the parameters. quantize() may replace prepare() if only the optimizer has
  // written parameters since: at the start of a step.
  void prepare();
  void quantize();
  // Of several precisions that train together (QuantLinear::select_precision).
  void select_precision(size_t i);
  void finish_backward();
  void snap();  // moves masters to the middle of their bins; only if all train

 private:
  std::vector<quant::LinearFormat> formats(const models::LlamaBlock& block) const {
    return recipe_.whole_formats(block.layer(), stage_);
  }
  void load_scales(models::LlamaBlock& block, const models::LayerResult& start);

  engine::Backend& backend_;
  const TrainConfig& config_;
  const Recipe& recipe_;
  const size_t stage_;
  models::Llama model_;
  autograd::ParameterSet parameters_;
  std::optional<autograd::WeightQuantizer> quantizer_;
  std::vector<autograd::Parameter*> sigmas_;  // of all linears in order, if scales train
};

}  // namespace bbb::train
