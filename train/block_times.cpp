#include "train/block_times.h"

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

nlohmann::ordered_json log_line(const BlockTime& time, int64_t block, const TrainConfig& config) {
  nlohmann::ordered_json line;
  line["phase"] = "time";
  line["block"] = block;
  for (size_t t = 0; t < time.stages.size(); ++t)
    line["stages"].push_back({{"stage", to_string({config.stages[t]})},
                              {"train_s", time.stages[t].train_s},
                              {"validation_s", time.stages[t].validation_s}});
  line["streams_s"] = time.streams_s;
  line["weights_s"] = time.weights_s;
  return line;
}

void report(const std::vector<BlockTime>& times, const TrainConfig& config, int64_t layers) {
  if (times.empty()) return;
  const BlockTime middle = median(times);
  std::printf("blocks: %s, the median of %zu\n", to_string(middle, config).c_str(), times.size());
  if (!config.extrapolate) return;
  const RunLength& to = *config.extrapolate;
  const BlockTime longer = extrapolate(middle, config, to);
  std::printf(
      "%lld samples x %lld tokens, %lld epochs a stage, streams where they are here: %s; %.2f h "
      "for %lld blocks\n",
      static_cast<long long>(to.samples), static_cast<long long>(config.seq_len),
      static_cast<long long>(to.epochs), to_string(longer, config).c_str(),
      longer.total_s() * static_cast<double>(layers) / 3600, static_cast<long long>(layers));
}

}  // namespace bbb::train
