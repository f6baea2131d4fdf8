// ResultQuantizer: the layers of a run's result, quantized by the code that training runs.
#pragma once

#include "train/recipe.h"
#include "train/train.h"

namespace bbb::train {

class ResultQuantizer {
 public:
  // All must outlive the quantizer.
  ResultQuantizer(Backend& backend, const models::LlamaConfig& model, const TrainConfig& config,
                  const Recipe& recipe)
      : backend_(backend), model_(model), config_(config), recipe_(recipe) {}

  // From masters or codes in any format. Codes of the result's grid stay.
  models::LayerResult operator()(int64_t layer, models::LayerResult result) const;

 private:
  Backend& backend_;
  const models::LlamaConfig& model_;
  const TrainConfig& config_;
  const Recipe& recipe_;
};

}  // namespace bbb::train
