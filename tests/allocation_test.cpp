// The choice of bits, split channels and outliers at a target: the knapsack, errors and
// sensitivities, and runs that train, resume and export what was chosen.
#include "train/allocation.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <filesystem>
#include <map>
#include <set>

#include "engine/rng.h"
#include "tests/support.h"
#include "tests/tiny_run.h"
#include "tests/trained_model.h"
#include "train/sensitivity.h"
#include "train/statistics.h"

namespace bbb::tests {
namespace {

using Catch::Matchers::Contains;
using models::LayerStatistics;
using models::LinearShape;
using quant::LinearFormat;
using train::CostedOption;
using train::Recipe;
using train::TrainConfig;
using Items = std::vector<std::vector<CostedOption>>;
using Options = std::vector<std::pair<const char*, std::string>>;

// Within the reach of the tiny model.
constexpr const char* kTarget = "3.4";

TrainConfig with(TrainConfig config, const Options& options) {
  for (const auto& [option, text] : options) set_option(config, option, text);
  return config;
}

TrainConfig make_config(const Fixture& fixture, const std::string& name, const Options& options) {
  TrainConfig config = fixture.config;
  config.out = fixture.dir / name;
  config.e2e_lr = {1e-3};
  config.e2e_steps = 4;
  return with(with(config, {{"target-bits", kTarget}, {"range", "search"}, {"rotate", "group"}}),
              options);
}

TrainConfig resolved(const TrainConfig& config) {
  return train::resolve(config, tiny_config(), backend().device());
}

struct Sum {
  int64_t cost = 0;
  double loss = 0;
};
Sum sum_of(const Items& items, const std::vector<size_t>& chosen) {
  REQUIRE(chosen.size() == items.size());
  Sum sum;
  for (size_t i = 0; i < items.size(); ++i) {
    sum.cost += items[i].at(chosen[i]).cost;
    sum.loss += items[i][chosen[i]].loss;
  }
  return sum;
}

// The least loss of all sets within the budget.
double least_loss(const Items& items, int64_t budget, size_t from = 0) {
  if (budget < 0) return std::numeric_limits<double>::infinity();
  if (from == items.size()) return 0;
  double least = std::numeric_limits<double>::infinity();
  for (const CostedOption& option : items[from])
    least = std::min(least, option.loss + least_loss(items, budget - option.cost, from + 1));
  return least;
}

Items random_items(engine::Rng& rng, size_t count, int64_t most_cost) {
  Items items(count);
  for (std::vector<CostedOption>& options : items)
    for (int64_t o = 1 + rng.below(5); o > 0; --o)
      options.push_back({1 + rng.below(most_cost), rng.uniform()});
  return items;
}

// Between the cheapest and the dearest set.
int64_t random_budget(engine::Rng& rng, const Items& items) {
  int64_t least = 0, most = 0;
  for (const std::vector<CostedOption>& options : items) {
    const auto [low, high] = std::ranges::minmax(options, {}, &CostedOption::cost);
    least += low.cost, most += high.cost;
  }
  return least + rng.below(most - least + 1);
}

std::vector<std::vector<LinearFormat>> result_formats(const Recipe& recipe) {
  std::vector<std::vector<LinearFormat>> formats;
  for (int64_t layer = 0; layer < tiny_config().layers; ++layer)
    formats.push_back(recipe.result_formats(layer));
  return formats;
}

void check_same_run(const std::string& actual, const std::string& expected) {
  const auto wanted = results(expected), got = results(actual);
  for (const auto& [name, bytes] : wanted) {
    INFO(name);
    REQUIRE(got.count(name) == 1);
    CHECK((got.at(name) == bytes));
  }
  CHECK(got.size() == wanted.size());
  CHECK(log_lines(actual, "") == log_lines(expected, ""));
}

std::string export_of(const Fixture& fixture, const TrainConfig& config,
                      models::ExportFormat format, const std::string& suffix) {
  const std::string out = config.out + suffix;
  train::export_run(backend(), *fixture.source, FileTokenizer(), config.out, out, format);
  return out;
}

std::string refusal(const TrainConfig& config) {
  try {
    train::resolve(config, tiny_config(), engine::DeviceType::Cuda);
  } catch (const UsageError& error) {
    return error.what();
  }
  return "";
}

}  // namespace

TEST_CASE("allocation: the chosen options are those of least loss within the budget",
          "[allocation]") {
  engine::Rng rng(3);
  for (int trial = 0; trial < 300; ++trial) {
    const Items items = random_items(rng, static_cast<size_t>(1 + rng.below(6)), 40);
    const int64_t budget = random_budget(rng, items);
    CAPTURE(trial, budget);
    const Sum sum = sum_of(items, train::choose_options(items, budget));
    CHECK(sum.cost <= budget);
    CHECK(sum.loss == Approx(least_loss(items, budget)).epsilon(1e-12));
  }
}

TEST_CASE("allocation: costs beyond the table's units lose no more than their rounding",
          "[allocation]") {
  constexpr int64_t kUnits = 1 << 16;
  engine::Rng rng(4);
  for (int trial = 0; trial < 40; ++trial) {
    const Items items = random_items(rng, 5, 1'000'000'000);
    const int64_t budget = random_budget(rng, items);
    CAPTURE(trial, budget);
    const std::vector<size_t> chosen = train::choose_options(items, budget);
    const Sum sum = sum_of(items, chosen);
    CHECK(sum.cost <= budget);
    int64_t least = 0;
    for (const std::vector<CostedOption>& options : items)
      least += std::ranges::min(options, {}, &CostedOption::cost).cost;
    const int64_t rounding = static_cast<int64_t>(items.size()) * ((budget - least) / kUnits + 1);
    CHECK(sum.loss <= least_loss(items, budget - rounding) * (1 + 1e-12));
    CHECK(chosen == train::choose_options(items, budget));
  }
}

TEST_CASE("allocation: what rounding a weight loses is its error, weighted by energies",
          "[allocation]") {
  constexpr int64_t kN = 6, kK = 64;
  engine::Rng rng(5);
  models::LinearResult original;
  original.format = {.n = kN, .k = kK, .weight = {.bits = quant::kNoQuantizer}};
  for (int64_t i = 0; i < kN * kK; ++i) original.master.push_back(static_cast<float>(rng.normal()));
  for (const auto range : {quant::RangeRule::MinMax, quant::RangeRule::Search})
    for (const auto side : {quant::SplitSide::Weight, quant::SplitSide::Activation}) {
      LinearFormat format{.n = kN, .k = kK, .weight = {.bits = 2}};
      format.order = std::make_shared<quant::ChannelOrder>(kK, 32, std::vector<int32_t>(),
                                                           std::vector<int32_t>{3, 5, 40}, side);
      // Of channels; a halved activation has a quarter.
      std::vector<double> of_channel;
      for (int64_t i = 0; i < kK; ++i) of_channel.push_back(0.5 + rng.uniform());
      std::vector<float> energy;
      for (int64_t p = 0; p < format.order->stored_k(); ++p) {
        const int32_t channel = format.order->channels()[static_cast<size_t>(p)];
        const bool pair = p < format.order->pairs_end();
        const double e = channel < 0 ? 0 : of_channel[static_cast<size_t>(channel)];
        energy.push_back(
            static_cast<float>(pair && side == quant::SplitSide::Activation ? e / 4 : e));
      }
      const std::vector<float> rounded = models::rounded_weight(original, format, energy, range);
      double expected = 0, of_even_rows = 0;
      for (size_t i = 0; i < rounded.size(); ++i) {
        const double d = static_cast<double>(rounded[i]) - original.master[i];
        const double term = d * d * of_channel[i % kK];
        expected += term;
        if (i / kK % 2 == 0) of_even_rows += term;
      }
      CHECK(expected > 0);
      // Halves and their sum are rounded to F32.
      CHECK(models::rounding_error(original, format, energy, range, kN) ==
            Approx(expected).epsilon(1e-5));
      // S of the sample is another one where its largest group is not the whole weight's.
      CHECK(models::rounding_error(original, format, energy, range, kN / 2) ==
            Approx(of_even_rows).epsilon(0.05));
    }
}

TEST_CASE("allocation: a site's sensitivity is the divergence of the model with it rounded",
          "[allocation]") {
  const Fixture fixture;
  const models::LlamaConfig model = tiny_config();
  const TrainConfig config = resolved(make_config(fixture, "run", {}));
  const std::vector<LinearShape> shapes = models::block_linears(model);
  Backend& device = backend();
  std::vector<models::LayerResult> originals;
  std::vector<std::vector<std::vector<float>>> rounded;  // of a layer and linear
  for (int64_t layer = 0; layer < model.layers; ++layer) {
    originals.push_back(models::full_precision(*fixture.source, layer));
    auto& of_layer = rounded.emplace_back();
    for (const models::LinearResult& linear : originals.back().linears) {
      of_layer.push_back(linear.master);
      // The o projections stay.
      if (shapes[of_layer.size() - 1].site == models::kOutputSite) continue;
      for (float& w : of_layer.back()) w = std::round(w * 8) / 8;
    }
  }
  train::Sensitivity sensitivity(device, *fixture.source, fixture.windows, config);
  for (int64_t layer = 0; layer < model.layers; ++layer)
    sensitivity.add_layer(layer, originals[static_cast<size_t>(layer)],
                          rounded[static_cast<size_t>(layer)]);
  const std::vector<double> divergences = sensitivity.divergences();
  REQUIRE(divergences.size() == static_cast<size_t>(model.layers * models::kSites));

  // The same windows through whole models, and the divergence of their logits in F64.
  const int64_t windows = device.device() == engine::DeviceType::Cuda
                              ? train::Sensitivity::kWindows
                              : train::Sensitivity::kWindowsOfCpu;
  const auto logits = [&](int64_t of_layer, int64_t of_site) {
    models::Llama llama(device, *fixture.source, models::HeadRounding::BFloat16);
    for (auto& block : llama.blocks()) {
      models::LayerResult weights = originals[static_cast<size_t>(block->layer())];
      for (size_t i = 0; i < shapes.size(); ++i)
        if (block->layer() == of_layer && shapes[i].site == of_site)
          weights.linears[i].master = rounded[static_cast<size_t>(of_layer)][i];
      block->set_float(weights);
    }
    std::vector<double> all;
    for (int64_t w = 0; w < windows; ++w) {
      const auto begin = fixture.windows.ids.begin() + w * Fixture::kSeqLen;
      const std::vector<double> of_window = logits_of(llama, {begin, begin + Fixture::kSeqLen});
      all.insert(all.end(), of_window.begin(), of_window.end());
    }
    return all;
  };
  const std::vector<double> full = logits(-1, 0);
  const auto vocab = static_cast<size_t>(model.vocab);
  for (int64_t layer = 0; layer < model.layers; ++layer)
    for (int64_t site = 0; site < models::kSites; ++site) {
      const std::vector<double> other = logits(layer, site);
      double sum = 0;
      for (size_t row = 0; row < full.size(); row += vocab) {
        double p_sum = 0, q_sum = 0, mean = 0;
        for (size_t v = row; v < row + vocab; ++v)
          p_sum += std::exp(full[v]), q_sum += std::exp(other[v]);
        for (size_t v = row; v < row + vocab; ++v)
          mean += std::exp(full[v]) / p_sum * (full[v] - other[v]);
        sum += mean - std::log(p_sum) + std::log(q_sum);
      }
      const double expected = sum / static_cast<double>(full.size() / vocab);
      const double found = divergences[static_cast<size_t>(layer * models::kSites + site)];
      CAPTURE(layer, site);
      if (site == models::kOutputSite)
        CHECK(found == Approx(0).margin(1e-6));
      else
        // In bf16, streams of equal weights differ by rounding alone.
        CHECK(found == Approx(expected).epsilon(device.act() == DType::BF16 ? 0.1 : 1e-3));
    }
}

TEST_CASE("allocation: every site has a choice within the budget, and more budget loses less",
          "[allocation]") {
  const Fixture fixture;
  const models::LlamaConfig model = tiny_config();
  double before = std::numeric_limits<double>::infinity();
  for (const char* target : {"2.9", "3.4", "4.4"}) {
    const TrainConfig config =
        resolved(make_config(fixture, "run", {{"target-bits", target}, {"stages", "w4a16,w2a16"}}));
    const train::SiteBudget budget = train::size_budget(model, config);
    const train::Allocation allocation = train::allocate_sites(
        backend(), *fixture.source, fixture.windows, config, budget, [](int64_t) {});
    CAPTURE(target);
    CHECK(allocation.cost <= budget.most);
    CHECK(allocation.loss < before);
    CHECK(allocation.loss <= allocation.least_bits_loss);
    before = allocation.loss;

    // The formats are those of the choice, and as large as it says.
    const Recipe recipe(config, model, allocation.statistics);
    CHECK(recipe.bits_per_weight() <= config.target_bits);
    int64_t bytes = 0;
    for (int64_t layer = 0; layer < model.layers; ++layer) {
      const auto shapes = models::block_linears(model);
      for (size_t i = 0; i < shapes.size(); ++i) {
        const models::SiteStatistics& site =
            allocation.statistics[static_cast<size_t>(layer)][static_cast<size_t>(shapes[i].site)];
        const LinearFormat result = recipe.result_formats(layer)[i];
        CHECK(std::ranges::count(train::kAllocatedBits, site.bits) == 1);
        CHECK(result.weight.bits == site.bits);
        CHECK(recipe.stage_formats(layer, 0)[i].weight.bits == 4);  // of at most as many bits
        CHECK(result.channel_order().split() == site.split);
        CHECK(result.channel_order().outliers() == site.outliers);
        CHECK(static_cast<int64_t>(site.energy.size()) == result.stored_k());
        bytes += result.bytes();
      }
    }
    CHECK(bytes == allocation.cost);
    const std::string table = train::describe(allocation, model, config);
    for (const char* text : {"q, k, v", "\no  ", "gate, up", "down", "bits per weight"})
      CHECK_THAT(table, Contains(text));
  }
}

TEST_CASE("allocation: runs survive every kill, and an export holds what was chosen",
          "[allocation]") {
  const Fixture fixture;
  const models::LlamaConfig model = tiny_config();
  const struct {
    const char* name;
    Options options;
  } cases[] = {
      {"whole", {}},
      {"blocks", {{"stages", "w4a16,w2a16"}, {"lr", "1e-3,3e-3"}, {"epochs", "1"}}},
      {"activations", {{"act-outliers", "32"}, {"act-range", "search"}}},
      {"gptq", {{"method", "gptq"}, {"stages", "w2a16"}}},
  };
  for (const auto& c : cases) {
    CAPTURE(c.name);
    TrainConfig config = make_config(fixture, c.name, c.options);
    if (c.name == std::string("activations")) config.e2e_stages = {{{2, 4}, 1}};
    fixture.run(config);
    TrainConfig killed = config;
    killed.out = config.out + "_killed";
    for (const int64_t step : {1, 3}) {
      train::Observer observer;
      observer.after_block_step = [&](int64_t block, int64_t stage, int64_t at) {
        if (block == 1 && stage == 1 && at == step) throw Killed();
      };
      observer.after_e2e_step = [&](int64_t at) {
        if (at == step) throw Killed();
      };
      CHECK_THROWS_AS(fixture.run(killed, observer), Killed);
    }
    fixture.run(killed);
    check_same_run(killed.out, config.out);

    // The statistics of the run are the choice.
    const train::RunDirectory run(config.out);
    const TrainConfig stored = run.identity().config;
    const Recipe recipe(stored, model, run.statistics(model));
    const auto formats = result_formats(recipe);
    std::set<int> widths;
    std::set<int64_t> splits;
    for (const auto& layer : formats)
      for (const LinearFormat& format : layer) {
        widths.insert(format.weight.bits);
        splits.insert(static_cast<int64_t>(format.channel_order().split().size()));
      }
    CHECK(widths.size() > 1);
    const auto checkpoint = models::open_checkpoint(
        export_of(fixture, config, models::ExportFormat::Packed, "_packed"));
    CHECK(checkpoint->bits_per_weight() == recipe.bits_per_weight());
    if (stored.method == train::Method::Gptq) {  // codes on the disk: of as many bits as are chosen
      int64_t bytes = 0;
      for (const auto& layer : formats)
        for (const LinearFormat& format : layer) bytes += format.bytes();
      CHECK(train::result_bytes(model, stored) >= bytes);
    }
    CHECK(checkpoint->bits_per_weight() <= stored.target_bits);
    CHECK(checkpoint->bits_per_weight() > 0.9 * stored.target_bits);
    const std::vector<LinearShape> shapes = models::block_linears(model);
    for (size_t layer = 0; layer < formats.size(); ++layer)
      for (size_t i = 0; i < shapes.size(); ++i)
        CHECK(checkpoint->packed_format(
                  models::layer_name(static_cast<int64_t>(layer), shapes[i].name), shapes[i].n,
                  shapes[i].k) == formats[layer][i]);
    // It computes.
    const auto packed = load_model(backend(), *checkpoint);
    const models::Perplexity perplexity = models::perplexity(
        *packed, fixture.windows.ids, fixture.windows.count, Fixture::kSeqLen, [](int64_t) {});
    CHECK(std::isfinite(perplexity.nll));
  }
}

TEST_CASE("allocation: other formats hold a mixed model, or name what they cannot",
          "[allocation]") {
  const Fixture fixture;
  const TrainConfig config = make_config(fixture, "run", {{"rotate", "none"}});
  fixture.run(config);
  const auto checkpoint =
      models::open_checkpoint(export_of(fixture, config, models::ExportFormat::HuggingFace, "_hf"));
  CHECK(checkpoint->kind() == models::CheckpointKind::HuggingFace);
  CHECK_THROWS_WITH(export_of(fixture, config, models::ExportFormat::Gptq, "_gptq"),
                    Contains("--format gptq"));
}

TEST_CASE("allocation: a run from another one keeps its choice, or makes its own", "[allocation]") {
  const Fixture fixture;
  const TrainConfig first = make_config(fixture, "first", {});
  fixture.run(first);
  const auto statistics_of = [](const TrainConfig& config) {
    return train::RunDirectory(config.out).statistics(tiny_config());
  };
  const auto bits_of = [](const std::vector<LayerStatistics>& layers) {
    std::vector<int> bits;
    for (const LayerStatistics& layer : layers)
      for (const models::SiteStatistics& site : layer) bits.push_back(site.bits);
    return bits;
  };
  TrainConfig second = make_config(fixture, "second", {});
  second.from = first.out;
  fixture.run(second);
  CHECK(bits_of(statistics_of(second)) == bits_of(statistics_of(first)));
  TrainConfig third = make_config(fixture, "third", {{"target-bits", "4.4"}});
  third.from = first.out;
  fixture.run(third);
  CHECK(bits_of(statistics_of(third)) != bits_of(statistics_of(first)));
}

TEST_CASE("allocation: times of a site's products, and a target that none reaches",
          "[allocation]") {
  const Fixture fixture;
  for (const char* stages : {"w2a16", "w2a4"})
    for (const char* target : {"1e-3", "1e9"}) {
      CAPTURE(stages, target);
      const TrainConfig config = resolved(make_config(
          fixture, "run", {{"target-bits", "none"}, {"target-us", target}, {"stages", stages}}));
      CHECK_THROWS_AS(train::time_budget(backend(), tiny_config(), config), UsageError);
      CHECK_THROWS_WITH(train::time_budget(backend(), tiny_config(), config),
                        Contains("--target-us") && Contains("microseconds a token on this device"));
    }
  // Nothing of such a run is left behind.
  const TrainConfig config =
      make_config(fixture, "refused", {{"target-bits", "none"}, {"target-us", "1e9"}});
  CHECK_THROWS_AS(fixture.run(config), UsageError);
  CHECK(!std::filesystem::exists(config.out));
}

TEST_CASE("allocation: a dry run writes nothing", "[allocation]") {
  const Fixture fixture;
  TrainConfig config = make_config(fixture, "run", {});
  config.dry_run = true;
  fixture.run(config);
  CHECK(!std::filesystem::exists(config.out));
}

TEST_CASE("allocation: options that fix what it chooses are refused by name", "[allocation]") {
  const Fixture fixture;
  const struct {
    Options options;
    const char* message;
  } cases[] = {
      {{{"target-us", "100"}}, "give one of --target-bits and --target-us"},
      {{{"any-precision", "8,4,2"}, {"range", "minmax"}}, "no --any-precision"},
      {{{"quantizer", "lc"}, {"range", "minmax"}, {"rotate", "none"}},
       "it is for --quantizer minmax"},
      {{{"ocs-ratio", "0.1"}},
       "--target-bits chooses the split channels of every input: no "
       "--ocs-ratio"},
      {{{"split-side", "auto"}}, "no --split-side auto"},
      {{{"stages", "w4a16"}}, "the last stage has 2 bits, not 4"},
      {{{"e2e-stages", "w2a16:1,w3a16:1"}, {"e2e-lr", "auto"}}, "the last stage has 2 bits, not 3"},
      {{{"target-bits", "2.1"}}, "--target-bits 2.1 is out of reach: the linears take from "},
      {{{"target-bits", "7"}}, "--target-bits 7 is out of reach: the linears take from "},
  };
  for (const auto& c : cases) {
    CAPTURE(c.message);
    CHECK_THAT(refusal(make_config(fixture, "run", c.options)), Contains(c.message));
  }
  CHECK(refusal(make_config(fixture, "run", {})) == "");
  TrainConfig timed = make_config(fixture, "run", {{"target-bits", "none"}, {"target-us", "100"}});
  CHECK(refusal(timed) == "");
  timed.gemm_algorithms = train::GemmAlgorithms::Heuristic;
  CHECK_THAT(refusal(timed), Contains("--target-us chooses by times: no --deterministic"));
}

}  // namespace bbb::tests
