// Statistics of input sites: the channels that they choose, their file, and the weights from which
// a stage starts.
#include "models/site_statistics.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <filesystem>
#include <set>

#include "quant/host.h"
#include "tests/formats.h"
#include "tests/support.h"
#include "tests/tiny_model.h"

namespace bbb::tests {
namespace {

using models::ChannelStatistics;
using models::LayerResult;
using models::LayerStatistics;
using models::LinearResult;
using models::SiteStatistics;
using models::SplitMetric;
using quant::ChannelOrder;
using quant::LinearFormat;
using quant::RangeRule;
using quant::SplitSide;
using Channels = std::vector<int32_t>;

// The `count` best channels that are not excluded: the best one of the rest, again and again.
Channels best(const std::vector<double>& values, int64_t count, const Channels& excluded) {
  std::set<int32_t> taken(excluded.begin(), excluded.end()), chosen;
  while (static_cast<int64_t>(chosen.size()) < count && taken.size() < values.size()) {
    int32_t at = -1;
    for (int32_t i = 0; i < static_cast<int32_t>(values.size()); ++i)
      if (!taken.count(i) &&
          (at < 0 || values[static_cast<size_t>(i)] > values[static_cast<size_t>(at)]))
        at = i;
    taken.insert(at);
    chosen.insert(at);
  }
  return {chosen.begin(), chosen.end()};
}

// Small whole numbers, so that ties are frequent and every product is exact.
std::vector<double> few_values(engine::Rng& rng, size_t count) {
  std::vector<double> values(count);
  for (double& value : values) value = static_cast<double>(rng.below(5));
  return values;
}

// A linear's weights as multiples of 2^-8, so that halves and their offsets are exact.
LinearResult plain_linear(engine::Rng& rng, int64_t n, int64_t k) {
  LinearResult linear;
  linear.format = plain_format(n, k, quant::kNoQuantizer);
  for (int64_t i = 0; i < n * k; ++i)
    linear.master.push_back(static_cast<float>(std::round(40 * rng.normal())) / 256);
  return linear;
}

LinearFormat ordered(const LinearResult& plain, int bits, int group, Channels outliers,
                     Channels split, SplitSide side, bool hadamard = false) {
  LinearFormat format = plain_format(plain.format.n, plain.format.k, bits, group);
  format.input.hadamard = hadamard;
  format.input.outliers = static_cast<int>(outliers.size());
  format.order =
      std::make_shared<ChannelOrder>(format.k, group, std::move(outliers), std::move(split), side);
  return format;
}

Channels ascending(int32_t first, int32_t count, int32_t step = 1) {
  Channels channels;
  for (int32_t i = 0; i < count; ++i) channels.push_back(first + i * step);
  return channels;
}

LinearResult start(const LinearResult& from, const LinearFormat& format,
                   RangeRule range = RangeRule::MinMax, const std::vector<float>& energy = {}) {
  return models::start_stage(from, format, energy, range, 0);
}

// The step S e of each group, as training finds it.
std::vector<float> steps_of(const LinearResult& linear) {
  const LinearFormat& format = linear.format;
  const int64_t columns = format.stored_k();
  const quant::host::Rows rows{0, format.n};
  const size_t groups = static_cast<size_t>(format.n * format.groups());
  std::vector<uint8_t> e(groups), z(groups), clipped(linear.master.size() / 8);
  std::vector<float> wq(linear.master.size()), steps;
  const float s = quant::master_scale_of(
      quant::raw_scale(quant::host::group_range_max(linear.master.data(), nullptr, rows, columns,
                                                    format.weight.group),
                       format.weight.bits));
  quant::host::fake_quant(wq.data(), e.data(), z.data(), clipped.data(), linear.master.data(),
                          nullptr, rows, columns, s, format.weight, quant::Rounding::Nearest);
  for (const uint8_t scale : e) steps.push_back(quant::step_of(scale, s));
  return steps;
}

}  // namespace

TEST_CASE("site statistics: outliers and split channels equal brute force, ties included",
          "[statistics]") {
  engine::Rng rng(3);
  for (int trial = 0; trial < 200; ++trial) {
    const size_t k = 1 + static_cast<size_t>(rng.below(40));
    ChannelStatistics inputs;
    inputs.sum_squares = few_values(rng, k);
    for (double& value : inputs.sum_squares) value *= value;  // whole norms
    inputs.max = few_values(rng, k);
    inputs.kurtosis = few_values(rng, k);
    const models::WeightStatistics weights{few_values(rng, k), few_values(rng, k)};
    const auto count = [&] { return rng.below(static_cast<int64_t>(k) + 1); };
    const Channels outliers = models::choose_outliers(inputs, count());
    CHECK(outliers == best(inputs.sum_squares, static_cast<int64_t>(outliers.size()), {}));

    std::vector<double> l2_mean(k), l2_max(k);
    for (size_t i = 0; i < k; ++i) {
      l2_mean[i] = std::sqrt(inputs.sum_squares[i]) * weights.mean[i];
      l2_max[i] = std::sqrt(inputs.sum_squares[i]) * weights.max[i];
    }
    const std::pair<SplitMetric, const std::vector<double>*> metrics[] = {
        {SplitMetric::L2Mean, &l2_mean},
        {SplitMetric::L2Max, &l2_max},
        {SplitMetric::ActivationMax, &inputs.max},
        {SplitMetric::WeightMax, &weights.max},
        {SplitMetric::Kurtosis, &inputs.kurtosis}};
    for (const auto& [metric, values] : metrics) {
      CAPTURE(trial, k, static_cast<int>(metric));
      const int64_t wanted = count();
      const Channels split = models::choose_split(inputs, weights, metric, wanted, outliers);
      CHECK(split == best(*values, wanted, outliers));
      for (const int32_t channel : split)
        CHECK_FALSE(std::binary_search(outliers.begin(), outliers.end(), channel));
    }
  }
}

TEST_CASE("site statistics: kurtosis from moments is that of the values", "[statistics]") {
  Backend& device = backend();
  constexpr int64_t kTokens = 200, kChannels = 70;
  engine::Rng rng(4);
  std::vector<double> x = round_bf16(normal(rng, kTokens * kChannels));
  for (int64_t t = 0; t < kTokens; ++t) {
    x[t * kChannels] = 0.1;                           // constant
    x[t * kChannels + 1] = t == 17 ? 30 : 0.25;       // one spike
    x[t * kChannels + 2] = 8 + x[t * kChannels + 2];  // a large mean
  }
  x = round_bf16(x);
  const Tensor moments = device.zeros({Backend::kMoments, kChannels}, DType::F64);
  device.channel_moments(moments, make(device, {kTokens, kChannels}, device.act(), x));
  const auto inputs = ChannelStatistics::from_moments(values_of(device, moments), kTokens);

  const auto direct = [](const std::vector<double>& values) {
    double mean = 0, second = 0, fourth = 0;
    for (const double v : values) mean += v / static_cast<double>(values.size());
    for (const double v : values) {
      second += (v - mean) * (v - mean) / static_cast<double>(values.size());
      fourth += std::pow(v - mean, 4) / static_cast<double>(values.size());
    }
    return second < 1e-12 ? 0 : fourth / (second * second);
  };
  for (int64_t c = 0; c < kChannels; ++c) {
    CAPTURE(c);
    std::vector<double> channel;
    double squares = 0, most = 0;
    for (int64_t t = 0; t < kTokens; ++t) {
      channel.push_back(x[t * kChannels + c]);
      squares += channel.back() * channel.back();
      most = std::max(most, std::abs(channel.back()));
    }
    CHECK(inputs.sum_squares[static_cast<size_t>(c)] == Approx(squares).epsilon(1e-12));
    CHECK(inputs.max[static_cast<size_t>(c)] == most);
    // A mean of 8 deviations costs 8^4 of the digits.
    CHECK(inputs.kurtosis[static_cast<size_t>(c)] == Approx(direct(channel)).epsilon(1e-9));
  }
  CHECK(inputs.site_kurtosis == Approx(direct(x)).epsilon(1e-9));
}

TEST_CASE("site statistics: weights are taken over the rows of all linears of a site",
          "[statistics]") {
  const models::LlamaConfig config = tiny_config();
  const std::vector<models::LinearShape> shapes = models::block_linears(config);
  engine::Rng rng(5);
  LayerResult layer;
  for (const models::LinearShape& shape : shapes)
    layer.linears.push_back(plain_linear(rng, shape.n, shape.k));
  for (const models::Site site :
       {models::kAttentionSite, models::kOutputSite, models::kMlpSite, models::kDownSite}) {
    const models::WeightStatistics weights = models::weight_statistics(config, layer, site);
    for (size_t c = 0; c < weights.mean.size(); ++c) {
      double sum = 0, most = 0;
      int64_t rows = 0;
      for (size_t i = 0; i < shapes.size(); ++i)
        for (int64_t n = 0; shapes[i].site == site && n < shapes[i].n; ++n, ++rows) {
          const double w =
              std::abs(layer.linears[i].master[static_cast<size_t>(n * shapes[i].k) + c]);
          sum += w;
          most = std::max(most, w);
        }
      CHECK(weights.mean[c] == Approx(sum / static_cast<double>(rows)).epsilon(1e-12));
      CHECK(weights.max[c] == most);
    }
  }
}

TEST_CASE("site statistics: a file gives them back", "[statistics]") {
  const models::LlamaConfig config = tiny_config();
  std::vector<LayerStatistics> layers(static_cast<size_t>(config.layers));
  for (size_t layer = 0; layer < layers.size(); ++layer)
    for (size_t i = 0; i < layers[layer].size(); ++i) {
      SiteStatistics& site = layers[layer][i];
      site.kurtosis = 3.5 + static_cast<double>(layer);
      if (i != 1) site.outliers = ascending(static_cast<int32_t>(i), 32);
      if (i != 2) site.split = {40, 41 + static_cast<int32_t>(layer)};
      if (i == 3) site.side = SplitSide::Activation;
      site.energy = {0.5f, static_cast<float>(i), 2.25f};
    }
  const TempDir dir;
  data::SafeTensorsWriter writer(dir / "model.safetensors", models::declare_statistics(layers));
  models::add_statistics(writer, layers);
  writer.finish();
  const std::vector<LayerStatistics> read =
      models::read_statistics(data::SafeTensors(dir.path()), config);
  REQUIRE(read.size() == layers.size());
  for (size_t layer = 0; layer < layers.size(); ++layer)
    for (size_t i = 0; i < layers[layer].size(); ++i) {
      const SiteStatistics &a = read[layer][i], &b = layers[layer][i];
      CHECK(a.kurtosis == b.kurtosis);
      CHECK(a.outliers == b.outliers);
      CHECK(a.split == b.split);
      CHECK(a.side == b.side);
      CHECK(a.energy == b.energy);
    }
  models::LlamaConfig deeper = config;
  deeper.layers = 3;
  CHECK_THROWS_WITH(models::read_statistics(data::SafeTensors(dir.path()), deeper),
                    Catch::Contains("model.layers.2") && Catch::Contains("is missing"));
}

TEST_CASE("stage: gathered and merged again, a weight is what it was", "[stage]") {
  engine::Rng rng(6);
  for (const int64_t k : {96, 576})
    for (const int group : {32, 128})
      for (const int bits : {2, 4, 16})
        for (const SplitSide side : {SplitSide::Weight, SplitSide::Activation})
          for (const bool hadamard : {false, true}) {
            if (group > k) continue;
            CAPTURE(k, group, bits, side == SplitSide::Weight, hadamard);
            const LinearResult plain = plain_linear(rng, 12, k);
            const int32_t outliers = group < k ? group : 0;
            const LinearFormat format =
                ordered(plain, bits, group, ascending(0, outliers),
                        k == 96 && outliers > 0 ? Channels{40, 77} : ascending(outliers, 40, 3),
                        side, hadamard);
            const LinearResult gathered = start(plain, format),
                               merged = start(gathered, plain.format);
            CHECK(merged.format == plain.format);
            REQUIRE(merged.master.size() == plain.master.size());
            if (!hadamard) {
              CHECK(merged.master == plain.master);
              continue;
            }
            // Two rotations round log2 G times each.
            const std::vector<double> was(plain.master.begin(), plain.master.end()),
                is(merged.master.begin(), merged.master.end());
            CHECK(relative_error(is, was) < 8 * epsilon_of(DType::F32));
          }
}

TEST_CASE("stage: pairs are merged and split again by the step of the new width", "[stage]") {
  engine::Rng rng(7);
  const LinearResult plain = plain_linear(rng, 40, 96);
  const Channels split = {3, 8, 50, 90};
  const LinearFormat four = ordered(plain, 4, 32, {}, split, SplitSide::Weight),
                     two = ordered(plain, 2, 32, {}, split, SplitSide::Weight);
  LinearResult trained = start(plain, four);
  for (float& w : trained.master)  // by training, the copies have moved apart
    w += static_cast<float>(std::round(3 * rng.normal())) / 1024;
  const LinearResult merged = start(trained, plain.format), again = start(trained, two);
  CHECK(again.master == start(merged, two).master);
  const std::vector<float> steps = steps_of(again);
  const int64_t columns = two.stored_k();
  for (int64_t n = 0; n < two.n; ++n)
    for (size_t i = 0; i < split.size(); ++i) {
      const size_t at = static_cast<size_t>(n * columns) + 2 * i;
      const float w = merged.master[static_cast<size_t>(n * two.k + split[i])],
                  s = steps[static_cast<size_t>(n * two.groups())];
      CHECK(again.master[at] == w / 2 - s / 4);
      CHECK(again.master[at + 1] == w / 2 + s / 4);
    }
  // Halved activations need no offset: both copies hold their mean.
  const LinearFormat halved = ordered(plain, 2, 32, {}, split, SplitSide::Activation);
  const LinearResult copies = start(trained, halved);
  for (int64_t n = 0; n < two.n; ++n)
    for (size_t i = 0; i < split.size(); ++i) {
      const size_t at = static_cast<size_t>(n * columns) + 2 * i;
      const float w = merged.master[static_cast<size_t>(n * two.k + split[i])];
      CHECK(copies.master[at] == w);
      CHECK(copies.master[at + 1] == w);
    }
}

TEST_CASE("stage: masters and ratios are carried on as long as the width stays", "[stage]") {
  engine::Rng rng(8);
  const LinearResult plain = plain_linear(rng, 40, 96);
  LinearFormat format = ordered(plain, 2, 32, {}, {3, 8, 50}, SplitSide::Weight);
  const std::vector<float> energy(static_cast<size_t>(format.stored_k()), 1.5f);
  LinearResult trained = start(plain, format, RangeRule::Search, energy);
  REQUIRE(trained.ratios.size() == static_cast<size_t>(format.n * format.groups()));
  CHECK(*std::max_element(trained.ratios.begin(), trained.ratios.end()) > 0);
  for (float& w : trained.master) w += static_cast<float>(0.001 * rng.normal());

  format.input.bits = 2;  // w2a16, then w2a2
  const LinearResult same = start(trained, format, RangeRule::Search, energy);
  CHECK(same.format == format);
  CHECK(same.master == trained.master);
  CHECK(same.ratios == trained.ratios);

  LinearFormat wider = format;
  wider.weight.bits = 4;
  CHECK(start(trained, wider, RangeRule::Search, energy).master != trained.master);
  CHECK(start(trained, format).ratios.empty());  // min-max has none

  CHECK_THROWS_AS(start(plain, format, RangeRule::Search), Error);
  CHECK_THROWS_AS(start(plain, format, RangeRule::Search, std::vector<float>(96, 1.0f)), Error);
  // At 8 bits nothing is searched.
  LinearFormat eight = format;
  eight.weight.bits = 8;
  const LinearResult all_one = start(plain, eight, RangeRule::Search);
  CHECK(all_one.ratios == std::vector<uint8_t>(static_cast<size_t>(eight.n * eight.groups()), 0));
}

TEST_CASE("stage: with several precisions at once pairs split by the step of the lowest",
          "[stage]") {
  engine::Rng rng(9);
  const LinearResult plain = plain_linear(rng, 16, 96);
  LinearFormat nested = ordered(plain, 8, 32, {}, {3, 8}, SplitSide::Weight);
  nested.weight.nested = true;
  const LinearResult began = models::start_stage(plain, nested, {}, RangeRule::MinMax, 2);
  LinearFormat eight = nested;
  eight.weight.nested = false;
  LinearResult as_eight = began;
  as_eight.format = eight;
  const std::vector<float> steps = steps_of(as_eight);
  for (int64_t n = 0; n < nested.n; ++n) {
    const size_t at = static_cast<size_t>(n * nested.stored_k());
    // The 2-bit step is 64 steps of 8 bits: the copies are half of it apart.
    CHECK(began.master[at + 1] - began.master[at] ==
          Approx(32 * steps[static_cast<size_t>(n * nested.groups())]).epsilon(1e-6));
  }
}

}  // namespace bbb::tests
