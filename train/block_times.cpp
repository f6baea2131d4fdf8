#include "train/block_times.h"

#include <algorithm>
#include <cstdio>
#include <utility>

#include "engine/median.h"
#include "quant/check.h"

namespace bbb::train {
namespace {

template <typename Part>
double median_of(const std::vector<BlockTime>& blocks, const Part& part) {
  std::vector<double> values;
  for (const BlockTime& block : blocks) values.push_back(part(block));
  return engine::median(std::move(values));
}

std::string seconds(double value) {
  char text[32];
  std::snprintf(text, sizeof text, value < 100 ? "%.3g s" : "%.0f s", value);
  return text;
}

}  // namespace

double BlockTime::train_s() const {
  double sum = 0;
  for (const Stage& stage : stages) sum += stage.train_s;
  return sum;
}

double BlockTime::validation_s() const {
  double sum = 0;
  for (const Stage& stage : stages) sum += stage.validation_s;
  return sum;
}

double BlockTime::total_s() const { return train_s() + validation_s() + streams_s + weights_s; }

BlockTime median(const std::vector<BlockTime>& blocks) {
  BBB_ASSERT(!blocks.empty());
  BlockTime middle;
  for (size_t t = 0; t < blocks[0].stages.size(); ++t)
    middle.stages.push_back(
        {median_of(blocks, [t](const BlockTime& b) { return b.stages[t].train_s; }),
         median_of(blocks, [t](const BlockTime& b) { return b.stages[t].validation_s; })});
  middle.streams_s = median_of(blocks, [](const BlockTime& b) { return b.streams_s; });
  middle.weights_s = median_of(blocks, [](const BlockTime& b) { return b.weights_s; });
  return middle;
}

BlockTime extrapolate(const BlockTime& measured, const TrainConfig& config, const RunLength& to) {
  const auto ratio = [](int64_t wanted, int64_t had) {
    return static_cast<double>(wanted) / static_cast<double>(had);
  };
  const double steps =
      ratio(to.samples / config.batch * to.epochs, config.samples / config.batch * config.epochs);
  BlockTime longer = measured;
  for (BlockTime::Stage& stage : longer.stages) {
    stage.train_s *= steps;
    stage.validation_s *= ratio(to.epochs + 1, config.epochs + 1);
  }
  longer.streams_s *= ratio(to.samples + config.val_samples, config.samples + config.val_samples);
  return longer;
}

std::string to_string(const BlockTime& time, const TrainConfig& config) {
  std::string text = cat(seconds(time.total_s()), " a block: ");
  for (size_t t = 0; t < time.stages.size(); ++t)
    text += cat(to_string({config.stages[t]}), " ", seconds(time.stages[t].train_s), ", ");
  return text + cat("validation ", seconds(time.validation_s()), ", streams ",
                    seconds(time.streams_s), ", weights ", seconds(time.weights_s));
}

}  // namespace bbb::train
