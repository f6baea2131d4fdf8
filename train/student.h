// Student: the quantized model that the end-to-end phase trains, and its parameters.
//
//   all      the blocks' linears, through the quantizer, and norms
//   scales   one sigma a group over frozen codes; norms stay
#pragma once

#include <functional>
#include <optional>
#include <vector>

#include "models/llama.h"
#include "train/recipe.h"

namespace bbb::train {

class Student {
 public:
  // Embedding, final norm and head are the source's. config must outlive the student.
  Student(engine::Backend& backend, const models::Checkpoint& source, const TrainConfig& config);

  // Makes the parameters from what start(layer) gives. `loaded` is told how many layers are done.
  void load(const std::function<models::LayerResult(int64_t layer)>& start,
            const std::function<void(int64_t layers)>& loaded);
  models::Llama& model() { return model_; }
  autograd::ParameterSet& parameters() { return parameters_; }
  const autograd::ParameterSet& parameters() const { return parameters_; }
  const autograd::WeightQuantizer* quantizer() const {  // null where scales train
    return quantizer_ ? &*quantizer_ : nullptr;
  }

  // The GEMMs' operands from parameters that anything may have written; and, at the start of a
  // step, from those that nothing but the optimizer has written since.
  void prepare();
  void quantize();
  void finish_backward();
  void snap();  // masters to the middle of their bins, where all train

 private:
  void load_masters(models::LlamaBlock& block, const models::LayerResult& start);
  void load_scales(models::LlamaBlock& block, const models::LayerResult& start);

  engine::Backend& backend_;
  const TrainConfig& config_;
  models::Llama model_;
  autograd::ParameterSet parameters_;
  std::optional<autograd::WeightQuantizer> quantizer_;
  std::vector<autograd::Parameter*> sigmas_;  // of all linears in order, where scales train
};

}  // namespace bbb::train
