// Student: the quantized model that the end-to-end phase trains, and its parameters.
//
//   all      the blocks' linears, behind the quantizer, and their norms. With --e2e-embedding train
//            also embedding, head and final norm; forward() reads embedding and head rounded to
//            BF16, as they are exported. With --grid-train each group's scale, scale and zero
//            point, or ratio trains, too. Several ranks shard the linears (shards_whole())
//   scales   one sigma per group over frozen codes; norms are constant
#pragma once

#include <functional>
#include <optional>
#include <vector>

#include "models/llama.h"
#include "train/recipe.h"
#include "train/run_directory.h"

namespace bbb::train {

// From what a stage of the whole model starts: the masters of every layer, in any format, and the
// weights outside of the layers; null: the source's.
struct StartOfModel {
  std::function<models::LayerResult(int64_t layer)> layer;
  models::LoadOuter outer;
};

// The learning rate of embedding and head, as a part of the stage's. They have 16 bits, so a step
// need not reach the threshold between two codes.
inline constexpr double kEmbeddingRate = 0.25;

class Student {
 public:
  // For a stage of the whole model. source, config and recipe must outlive the student.
  Student(engine::Backend& backend, const models::Checkpoint& source, const TrainConfig& config,
          const Recipe& recipe, size_t stage);

  // Makes the parameters. start.outer must outlive the student. loaded(layers): layers done so far.
  void load(const StartOfModel& start, const std::function<void(int64_t layers)>& loaded);
  models::Llama& model() { return model_; }
  autograd::ParameterSet& parameters() { return parameters_; }
  const autograd::ParameterSet& parameters() const { return parameters_; }
  const autograd::WeightQuantizer* quantizer() const {  // null if a grid trains
    return quantizer_ ? &*quantizer_ : nullptr;
  }

  // Both quantize the parameters. quantize() may replace prepare() if only the optimizer has
  // written parameters since: at the start of a step. Behind quantize(), join() must precede the
  // first forward().
  void prepare();
  void quantize();
  void join() const;
  // Of several precisions that train together (QuantLinear::select_precision).
  void select_precision(size_t i);
  void finish_backward();
  void snap();  // moves masters to the middle of their bins; only if all train
  // The weights outside of the layers as they are now; null if they are the source's own.
  models::LoadOuter outer() const;
  // Writes the stage's result, if the run writes. Discards adapters, if the configuration asks for
  // it. If the weights are sharded, every rank calls it; otherwise those that write suffice.
  void write_result(const RunDirectory& run);

 private:
  // Embedding or head, if they train.
  struct Table {
    autograd::Parameter* parameter;
    engine::Tensor value;     // act (V, D): the master, rounded
    engine::Tensor gradient;  // real (V, D): the sum over a step, which is rounded once
    autograd::Var leaf;       // of both
  };

  void bind_outer(const models::LoadOuter& load);
  void prepare_tables();
  std::vector<quant::LinearFormat> formats(const models::LlamaBlock& block) const {
    return recipe_.whole_formats(block.layer(), stage_);
  }

  engine::Backend& backend_;
  const models::Checkpoint& source_;
  const TrainConfig& config_;
  const Recipe& recipe_;
  const size_t stage_;
  models::Llama model_;
  autograd::ParameterSet parameters_;
  std::optional<autograd::WeightQuantizer> quantizer_;
  std::vector<std::vector<autograd::Parameter*>> sigmas_;  // of each layer's linears, if they train
  std::vector<autograd::Parameter*> outer_;  // in the order of outer_weights(), if they train
  std::vector<Table> tables_;                // of outer_: the embedding first, the head last
  models::LoadOuter start_outer_;
};

}  // namespace bbb::train
