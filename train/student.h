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
  // Embedding, final norm and head are the source's, and constant. config must outlive the student.
  Student(engine::Backend& backend, const models::Checkpoint& source, const TrainConfig& config);

  // Makes the parameters from the masters of start(layer). loaded(layers): layers done so far.
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
  void finish_backward();
  void snap();  // moves masters to the middle of their bins; only if all train

 private:
  void load_masters(models::LlamaBlock& block, const models::LayerResult& start);
  void load_scales(models::LlamaBlock& block, const models::LayerResult& start);

  engine::Backend& backend_;
  const TrainConfig& config_;
  models::Llama model_;
  autograd::ParameterSet parameters_;
  std::optional<autograd::WeightQuantizer> quantizer_;
  std::vector<autograd::Parameter*> sigmas_;  // of all linears in order, if scales train
};

}  // namespace bbb::train
