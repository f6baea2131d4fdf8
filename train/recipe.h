// Recipe: the format of every linear in every stage. Training, saving and export ask it.
//
//   stages of the block phase          0 .. stages - 1
//   stages of the whole model          those of Algorithm 2, if it replaces the block phase,
//                                      then the end-to-end phase's
#pragma once

#include <algorithm>
#include <functional>
#include <string>
#include <vector>

#include "autograd/weight_quantizer.h"
#include "models/lc_start.h"
#include "models/quant_linear.h"
#include "models/site_statistics.h"
#include "train/config.h"

namespace bbb::train {

// A stage that trains the whole model.
struct WholeStage {
  std::vector<Stage> widths;  // of every layer
  int64_t steps;
  double lr;
  std::string name;  // "w2a16"
};

// The widths from which an allocation chooses.
inline constexpr int kAllocatedBits[] = {2, 3, 4};

// How many channels of an input are split, and how many are outliers.
struct SiteLayout {
  int64_t split = 0, outliers = 0;
};
// A site of this layout whose first channels are outliers and next ones split: for sizes alone.
models::SiteStatistics nominal_site(const TrainConfig& config, const SiteLayout& layout);

// The stored result of a layer, in these formats, from which its weights start.
using LayerStart = std::function<models::LayerResult(
    int64_t layer, const std::vector<quant::LinearFormat>& formats)>;

class Recipe {
 public:
  // `config` must be resolved. Both must outlive the recipe. Without statistics the channels of an
  // order, and the widths of an allocation, are nominal: for sizes alone. `starts`: if the
  // configuration needs them; null: weights start from their nearest codes.
  Recipe(const TrainConfig& config, const models::LlamaConfig& model,
         std::vector<models::LayerStatistics> statistics = {}, LayerStart starts = nullptr);

  // Formats of a layer's linears, in the order of block_linears(), in a stage of the block phase.
  std::vector<quant::LinearFormat> stage_formats(int64_t layer, int64_t stage) const;
  std::string stage_name(int64_t stage) const;  // "w2a16"
  int64_t block_stages() const;                 // 0 if Algorithm 2 replaces the block phase
  const std::vector<WholeStage>& whole_stages() const { return whole_stages_; }
  std::vector<quant::LinearFormat> whole_formats(int64_t layer, size_t stage) const;
  // The formats of the run's result, and of its export.
  std::vector<quant::LinearFormat> result_formats(int64_t layer) const;
  double bits_per_weight() const;  // of the result's linears, as an export stores them

  // Of a layer; nominal without statistics, where energies are missing.
  const models::LayerStatistics& statistics(int64_t layer) const {
    return statistics_[static_cast<size_t>(layer)];
  }
  // Do formats or ranges follow from statistics of the calibration text?
  static bool needs_statistics(const TrainConfig& config);
  // Channels of an input of K features that are split in this layer: ceil(r K), at most those that
  // are no outliers.
  static int64_t split_count(const TrainConfig& config, const models::LlamaConfig& model,
                             int64_t layer, int64_t k);
  // The layouts of an input of K features: one or, where an allocation chooses, all that it chooses
  // from, as many for every K. The last one has the most stored positions.
  static std::vector<SiteLayout> layouts(const TrainConfig& config,
                                         const models::LlamaConfig& model, int64_t layer,
                                         int64_t k);
  // The activation bits of a site in a stage of `bits`: a down-projection whose input's kurtosis is
  // above the threshold takes at least 4.
  static int activation_bits(const TrainConfig& config, models::Site site, double kurtosis,
                             int bits);
  // Do weights start from stored codes that the calibration text decides (LayerStart)?
  static bool needs_starts(const TrainConfig& config) {
    return config.quantizer == Quantizer::Lc && config.from.empty();
  }
  // Does a pass over the text come before training?
  static bool reads_text(const TrainConfig& config) {
    return needs_statistics(config) || needs_starts(config);
  }
  // How masters of groups are quantized.
  static quant::WeightRule weight_rule(const TrainConfig& config) {
    return {config.quantizer == Quantizer::Seq ? quant::Levels::Seq : quant::Levels::MinMax,
            config.ste, static_cast<float>(config.ste_trust)};
  }
  // What trains with masters behind a learned grid; only with --grid-train.
  static models::LearnedParts learned_parts(const TrainConfig& config) {
    return config.grid_train == GridTrain::Ratios   ? models::LearnedParts::Ratios
           : config.grid_train == GridTrain::Scales ? models::LearnedParts::Scales
                                                    : models::LearnedParts::ScalesZeros;
  }
  // How latents behind LC train, and how a layer's start.
  autograd::LcTraining lc() const {
    return {config_.lc_gradient, config_.lc_map == LcMap::Learned, config_.lc_scale_rate};
  }
  models::LcStart lc_start(int64_t layer) const;
  autograd::LoraTraining lora(autograd::LoraTraining::Masters masters) const {
    return {config_.lora_rank, config_.lora_alpha, masters};
  }
  // Of the adapters of a layer in a stage, counted over both kinds, those of blocks first.
  uint64_t adapter_seed(int64_t layer, int64_t stage) const;
  // The lower precisions that train together with 8 bits; none without --any-precision.
  autograd::NestedPrecisions nested() const;
  // Precisions that train together, 8 bits included.
  static size_t precisions(const TrainConfig& config) {
    return std::max<size_t>(1, config.any_precision.size());
  }
  // A layer, the first or the last one, with the most stored positions.
  static int64_t widest_layer(const TrainConfig& config, const models::LlamaConfig& model);
  // The masters from which a stage of these formats starts, made of a layer's masters in any
  // format.
  models::LayerResult start(int64_t layer, const models::LayerResult& from,
                            const std::vector<quant::LinearFormat>& formats) const;

 private:
  std::vector<quant::LinearFormat> formats(int64_t layer, const Stage& stage) const;

  const TrainConfig& config_;
  const models::LlamaConfig& model_;
  std::vector<models::LayerStatistics> statistics_;
  // The order of each layer and site; null: ascending, without padding.
  std::vector<std::array<std::shared_ptr<const quant::ChannelOrder>, models::kSites>> orders_;
  std::vector<WholeStage> whole_stages_;
  LayerStart starts_;
};

}  // namespace bbb::train
