// Recipe: the format of every linear in every stage. Training, saving and export ask it.
#pragma once

#include <string>
#include <vector>

#include "models/config.h"
#include "quant/format.h"
#include "train/config.h"

namespace bbb::train {

class Recipe {
 public:
  // Both must outlive the recipe.
  Recipe(const TrainConfig& config, const models::LlamaConfig& model)
      : config_(config), model_(model) {}

  // Formats of a layer's linears, in the order of block_linears(), in a stage of the block phase.
  std::vector<quant::LinearFormat> stage_formats(int64_t layer, int64_t stage) const {
    return formats(layer, config_.stages[static_cast<size_t>(stage)]);
  }
  std::string stage_name(int64_t stage) const {  // "w2a16"
    return to_string({config_.stages[static_cast<size_t>(stage)]});
  }
  // The same in the end-to-end phase and in an export.
  std::vector<quant::LinearFormat> result_formats(int64_t layer) const {
    return formats(layer, {.weight_bits = config_.bits});
  }

 private:
  std::vector<quant::LinearFormat> formats(int64_t, const Stage& stage) const {
    std::vector<quant::LinearFormat> formats;
    for (const models::LinearShape& linear : models::block_linears(model_))
      formats.push_back({.n = linear.n,
                         .k = linear.k,
                         .weight = {.bits = stage.weight_bits, .group = config_.group},
                         .input = {.bits = stage.activation_bits}});
    return formats;
  }

  const TrainConfig& config_;
  const models::LlamaConfig& model_;
};

}  // namespace bbb::train
