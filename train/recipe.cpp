#include "train/recipe.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "engine/rng.h"
#include "train/run_directory.h"

namespace bbb::train {

using models::LayerStatistics;
using models::LinearShape;
using models::LlamaConfig;
using quant::LinearFormat;

namespace {

// Apart from the sub-seeds of sample orders.
constexpr uint64_t kDrawSeed = 1 << 20, kLcSeed = 1 << 21, kLoraSeed = 1 << 22;

// The parts of an input's channels that an allocation may split.
constexpr double kSplitRatios[] = {0, 0.05, 0.1};

// Channels of K, rounded up. Slightly less, so that a ratio such as 0.05 of 100 channels gives 5.
int64_t part_of(double ratio, int64_t k) {
  return static_cast<int64_t>(std::ceil(ratio * static_cast<double>(k) - 1e-9));
}

// Statistics of the right sizes, or of the largest that an allocation may choose.
LayerStatistics nominal_statistics(const TrainConfig& config, const LlamaConfig& model,
                                   int64_t layer) {
  LayerStatistics statistics;
  for (const LinearShape& linear : models::block_linears(model)) {
    models::SiteStatistics& site = statistics[static_cast<size_t>(linear.site)];
    site = nominal_site(config, Recipe::layouts(config, model, layer, linear.k).back());
    if (allocates(config)) site.bits = *std::ranges::max_element(kAllocatedBits);
  }
  return statistics;
}

// Draws `count` of the layers without replacement, layer j (from 0) with weight (layers - j)^bias.
std::vector<size_t> draw_layers(engine::Rng& rng, size_t layers, size_t count, double bias) {
  std::vector<size_t> left(layers), drawn;
  std::iota(left.begin(), left.end(), 0);
  const auto weight = [&](size_t j) { return std::pow(static_cast<double>(layers - j), bias); };
  while (drawn.size() < count) {
    double total = 0;
    for (const size_t j : left) total += weight(j);
    double at = rng.uniform() * total;
    size_t chosen = 0;
    while (chosen + 1 < left.size() && (at -= weight(left[chosen])) >= 0) ++chosen;
    drawn.push_back(left[chosen]);
    left.erase(left.begin() + static_cast<std::ptrdiff_t>(chosen));
  }
  return drawn;
}

// Algorithm 2 (method.md section 2): stage t switches floor(r_t B) blocks to its widths, r_t linear
// from first_ratio to 1; the others stay as they were, at first in full precision.
std::vector<WholeStage> algorithm2(const TrainConfig& config, const LlamaConfig& model) {
  std::vector<WholeStage> stages;
  const auto layers = static_cast<size_t>(model.layers);
  const auto count = static_cast<double>(config.stages.size());
  engine::Rng rng(sub_seed(config.seed, kDrawSeed, 0));
  std::vector<Stage> widths(layers, Stage{16, 16});
  for (size_t t = 0; t < config.stages.size(); ++t) {
    const double ratio = t + 1 == config.stages.size()
                             ? 1
                             : config.first_ratio + (1 - config.first_ratio) *
                                                        static_cast<double>(t) /
                                                        std::max(1.0, count - 1);
    // Slightly more, so that a ratio such as 0.29 of 100 blocks gives 29.
    const auto switched = static_cast<size_t>(ratio * static_cast<double>(layers) + 1e-9);
    std::vector<size_t> chosen(switched);
    std::iota(chosen.begin(), chosen.end(), 0);
    if (config.block_schedule == BlockSchedule::Stochastic)
      chosen = draw_layers(rng, layers, switched, config.depth_bias);
    for (const size_t layer : chosen) widths[layer] = config.stages[t];
    int64_t steps = config.epochs * steps_per_pass(config);
    if (config.e2e_steps > 0) steps = std::min(steps, config.e2e_steps);
    stages.push_back({widths, steps, config.lr[t], to_string({config.stages[t]})});
  }
  return stages;
}

}  // namespace

models::SiteStatistics nominal_site(const TrainConfig& config, const SiteLayout& layout) {
  models::SiteStatistics site;
  if (config.split_side == SplitSideChoice::Activation) site.side = quant::SplitSide::Activation;
  site.outliers.resize(static_cast<size_t>(layout.outliers));
  std::iota(site.outliers.begin(), site.outliers.end(), 0);
  site.split.resize(static_cast<size_t>(layout.split));
  std::iota(site.split.begin(), site.split.end(), static_cast<int32_t>(layout.outliers));
  return site;
}

Recipe::Recipe(const TrainConfig& config, const LlamaConfig& model,
               std::vector<LayerStatistics> statistics, LayerStart starts)
    : config_(config),
      model_(model),
      statistics_(std::move(statistics)),
      starts_(std::move(starts)) {
  for (int64_t layer = static_cast<int64_t>(statistics_.size()); layer < model.layers; ++layer)
    statistics_.push_back(nominal_statistics(config, model, layer));
  for (const LayerStatistics& layer : statistics_) {
    auto& orders = orders_.emplace_back();
    for (const LinearShape& linear : models::block_linears(model)) {
      const models::SiteStatistics& site = layer[static_cast<size_t>(linear.site)];
      if (site.outliers.empty() && site.split.empty() && linear.k % config.group == 0) continue;
      orders[static_cast<size_t>(linear.site)] = std::make_shared<quant::ChannelOrder>(
          linear.k, config.group, site.outliers, site.split,
          site.split.empty() ? quant::SplitSide::Weight : site.side);
    }
  }
  if (config.block_schedule != BlockSchedule::All) whole_stages_ = algorithm2(config, model);
  if (config.e2e_steps == 0) return;
  for (size_t t = 0; t < config.e2e_stages.size(); ++t) {
    const ModelStage& stage = config.e2e_stages[t];
    whole_stages_.push_back({std::vector<Stage>(static_cast<size_t>(model.layers), stage),
                             std::min(config.e2e_steps, stage.passes * steps_per_pass(config)),
                             config.e2e_lr[t], to_string({stage})});
  }
}

std::vector<LinearFormat> Recipe::stage_formats(int64_t layer, int64_t stage) const {
  return formats(layer, config_.stages[static_cast<size_t>(stage)]);
}

std::string Recipe::stage_name(int64_t stage) const {
  return to_string({config_.stages[static_cast<size_t>(stage)]});
}

int64_t Recipe::block_stages() const { return train::block_stages(config_); }

std::vector<LinearFormat> Recipe::whole_formats(int64_t layer, size_t stage) const {
  return formats(layer, whole_stages_[stage].widths[static_cast<size_t>(layer)]);
}

std::vector<LinearFormat> Recipe::result_formats(int64_t layer) const {
  if (!whole_stages_.empty()) return whole_formats(layer, whole_stages_.size() - 1);
  if (config_.stages.empty()) return formats(layer, {config_.bits, config_.act_bits});
  return stage_formats(layer, block_stages() - 1);
}

double Recipe::bits_per_weight() const {
  int64_t bytes = 0;
  for (int64_t layer = 0; layer < model_.layers; ++layer)
    for (const LinearFormat& format : result_formats(layer)) bytes += format.bytes();
  return 8 * static_cast<double>(bytes) / static_cast<double>(model_.linear_parameters());
}

bool Recipe::needs_statistics(const TrainConfig& config) {
  return config.range == RangeRule::Search || !config.ocs_ratio.empty() ||
         config.act_outliers > 0 || config.down_kurtosis > 0 || allocates(config);
}

int64_t Recipe::split_count(const TrainConfig& config, const LlamaConfig& model, int64_t layer,
                            int64_t k) {
  if (config.ocs_ratio.empty()) return 0;
  const double mean = config.ocs_ratio[0];
  const bool range = config.ocs_ratio.size() == 2;
  const double first = range ? mean : mean / 2, last = range ? config.ocs_ratio[1] : mean * 3 / 2;
  const double depth =
      model.layers > 1 ? static_cast<double>(layer) / static_cast<double>(model.layers - 1) : 0.5;
  return std::min(part_of(first + (last - first) * depth, k), k - config.act_outliers);
}

std::vector<SiteLayout> Recipe::layouts(const TrainConfig& config, const LlamaConfig& model,
                                        int64_t layer, int64_t k) {
  if (!allocates(config)) return {{split_count(config, model, layer, k), config.act_outliers}};
  std::vector<SiteLayout> layouts;
  std::vector<int64_t> outliers = {config.act_outliers};
  if (config.act_outliers == 0) outliers.push_back(config.group < k ? config.group : 0);
  for (const int64_t count : outliers)
    for (const double ratio : kSplitRatios)
      layouts.push_back({std::min(part_of(ratio, k), k - count), count});
  return layouts;
}

int Recipe::activation_bits(const TrainConfig& config, models::Site site, double kurtosis,
                            int bits) {
  const bool sensitive =
      site == models::kDownSite && config.down_kurtosis > 0 && kurtosis > config.down_kurtosis;
  return sensitive ? std::max(bits, 4) : bits;
}

autograd::NestedPrecisions Recipe::nested() const {
  autograd::NestedPrecisions nested;
  nested.dequant = config_.nested_dequant;
  for (const int bits : config_.any_precision)
    if (bits < quant::kNestedBits) nested.bits.push_back(bits);
  return nested;
}

int64_t Recipe::widest_layer(const TrainConfig& config, const LlamaConfig& model) {
  const bool falls = config.ocs_ratio.size() == 2 && config.ocs_ratio[0] > config.ocs_ratio[1];
  return falls ? 0 : model.layers - 1;
}

models::LcStart Recipe::lc_start(int64_t layer) const {
  return {config_.lc_map == LcMap::Scalar,
          sub_seed(config_.seed, kLcSeed, static_cast<uint64_t>(layer))};
}

uint64_t Recipe::adapter_seed(int64_t layer, int64_t stage) const {
  return sub_seed(config_.seed, kLoraSeed + static_cast<uint64_t>(layer),
                  static_cast<uint64_t>(stage));
}

models::LayerResult Recipe::start(int64_t layer, const models::LayerResult& from,
                                  const std::vector<LinearFormat>& formats) const {
  if (config_.quantizer == Quantizer::Lc) {
    const bool plain = !from.linears[0].format.is_lc();
    if (plain && starts_)
      return models::lc_latents(model_, starts_(layer, formats), formats, lc_start(layer), &from);
    return models::lc_latents(model_, from, formats, lc_start(layer));
  }
  // Of the precisions that train at once; 0: only one trains.
  const int lowest_bits = config_.any_precision.empty() ? 0 : config_.any_precision.back();
  return models::start_stage(model_, from, formats, statistics(layer), config_.range, lowest_bits);
}

std::vector<LinearFormat> Recipe::formats(int64_t layer, const Stage& stage) const {
  const auto at = static_cast<size_t>(layer);
  std::vector<LinearFormat> formats;
  for (const LinearShape& linear : models::block_linears(model_)) {
    const auto site = static_cast<size_t>(linear.site);
    LinearFormat& format = formats.emplace_back();
    format.n = linear.n;
    format.k = linear.k;
    format.order = orders_[at][site];
    format.weight = {.bits = std::max(stage.weight_bits, statistics_[at][site].bits),
                     .group = config_.group};
    format.weight.levels =
        config_.quantizer == Quantizer::Lc ? quant::Levels::Lc : weight_rule(config_).levels;
    if (!config_.any_precision.empty() && stage.weight_bits == quant::kNestedBits) {
      format.weight.nested = true;
      format.weight.dequant = config_.nested_dequant;
    }
    format.input = {
        .bits = stage.activation_bits,
        .outliers = format.order ? static_cast<int>(format.order->outliers().size()) : 0,
        .range = stage.activation_bits < 16 ? config_.act_range : RangeRule::MinMax,
        .hadamard = config_.rotate == Rotate::Group};
    format.input.bits = activation_bits(config_, linear.site, statistics_[at][site].kurtosis,
                                        stage.activation_bits);
  }
  return formats;
}

}  // namespace bbb::train
