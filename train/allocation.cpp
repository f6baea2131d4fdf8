#include "train/allocation.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <optional>

#include "engine/cpu/thread_pool.h"
#include "engine/measure.h"
#include "train/sensitivity.h"
#include "train/statistics.h"

namespace bbb::train {

using engine::Backend;
using models::LayerStatistics;
using models::LinearShape;
using models::LlamaConfig;
using quant::LinearFormat;

namespace {

constexpr size_t kWidths = std::size(kAllocatedBits);
constexpr int64_t kMaxUnits = 1 << 16;
// Rows of a linear that stand for all: choices are compared on the same ones.
constexpr int64_t kErrorRows = 64;
constexpr double kPicoseconds = 1e6;  // a microsecond

size_t layout_of(size_t choice) { return choice / kWidths; }
int bits_of(size_t choice) { return kAllocatedBits[choice % kWidths]; }

// The options of an item that none both cheaper and as good beats, by rising cost.
std::vector<size_t> efficient(const std::vector<CostedOption>& options) {
  std::vector<size_t> order(options.size()), kept;
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return options[a].cost != options[b].cost ? options[a].cost < options[b].cost
                                              : options[a].loss < options[b].loss;
  });
  for (const size_t i : order)
    if (kept.empty() || options[i].loss < options[kept.back()].loss) kept.push_back(i);
  return kept;
}

// Of a model of one layer: the formats of the result with this layout and width at every site.
std::vector<LinearFormat> formats_of(const TrainConfig& config, const LlamaConfig& one_layer,
                                     LayerStatistics statistics, int bits) {
  for (models::SiteStatistics& site : statistics) site.bits = bits;
  return Recipe(config, one_layer, {std::move(statistics)}).result_formats(0);
}

LlamaConfig one_layer_of(LlamaConfig model) {
  model.layers = 1;
  return model;
}

// The costs of all choices, from that of a site's linears, given their formats.
SiteBudget budget_from(const LlamaConfig& model, const TrainConfig& config,
                       const std::function<int64_t(const std::vector<LinearFormat>&)>& cost) {
  const LlamaConfig one_layer = one_layer_of(model);
  const std::vector<LinearShape> shapes = models::block_linears(model);
  SiteBudget budget;
  for (size_t layout = 0; layout < Recipe::layouts(config, model, 0, shapes[0].k).size();
       ++layout) {
    LayerStatistics statistics;
    for (const LinearShape& shape : shapes)
      statistics[static_cast<size_t>(shape.site)] =
          nominal_site(config, Recipe::layouts(config, model, 0, shape.k)[layout]);
    for (const int bits : kAllocatedBits) {
      const std::vector<LinearFormat> formats = formats_of(config, one_layer, statistics, bits);
      for (size_t site = 0; site < models::kSites; ++site) {
        std::vector<LinearFormat> of_site;
        for (size_t i = 0; i < shapes.size(); ++i)
          if (static_cast<size_t>(shapes[i].site) == site) of_site.push_back(formats[i]);
        budget.costs[site].push_back(cost(of_site));
      }
    }
  }
  return budget;
}

// Sets what all sites may cost. `unit`: of the costs in one of the target's.
void set_most(SiteBudget& budget, const LlamaConfig& model, double target, double unit,
              const char* option, const char* what) {
  int64_t least = 0, most = 0;
  for (const std::vector<int64_t>& costs : budget.costs) {
    least += model.layers * *std::ranges::min_element(costs);
    most += model.layers * *std::ranges::max_element(costs);
  }
  if (!(target * unit >= static_cast<double>(least) &&
        target * unit <= static_cast<double>(most))) {
    constexpr double kDigits = 1e4;  // shown: four, rounded into the bounds
    throw UsageError(cat("--", option, " ", target, " is out of reach: the linears take from ",
                         std::ceil(static_cast<double>(least) / unit * kDigits) / kDigits, " to ",
                         std::floor(static_cast<double>(most) / unit * kDigits) / kDigits, " ",
                         what));
  }
  budget.most = static_cast<int64_t>(target * unit);
}

double bytes_of_a_bit(const LlamaConfig& model) {
  return static_cast<double>(model.linear_parameters()) / 8;
}

// Picoseconds of one row's products with packed weights of these formats, from the row as a model
// has it: they make its operand.
int64_t time_site(Backend& backend, const std::vector<LinearFormat>& formats,
                  int64_t rotation_bytes) {
  const LinearFormat& first = formats[0];
  int64_t bytes = 0;
  for (const LinearFormat& format : formats) bytes += format.bytes();
  const int64_t copies = engine::copies_for(bytes, rotation_bytes);
  std::optional<engine::OperandSpec> spec;
  if (!first.exact_input()) spec = engine::upload_operand(backend, first);
  const engine::Tensor x =
      engine::random_activations(backend, {1, spec ? first.k : first.stored_k()}, 1);
  std::vector<std::vector<engine::PackedWeight>> weights;
  std::vector<engine::Tensor> y;
  for (const LinearFormat& format : formats) {
    weights.push_back(engine::random_weights(backend, format, copies));
    y.push_back(backend.empty({1, format.n}, backend.act()));
  }
  // A graph's launch must not count; a CPU has none, but a coarser clock.
  constexpr int64_t kProducts = 256, kCallsOfCpu = 8;
  const engine::ProductRounds rounds(backend, kProducts, copies, [&](int64_t copy) {
    engine::PackedProducts products;
    for (size_t i = 0; i < formats.size(); ++i)
      products.push_back({y[i], weights[i][static_cast<size_t>(copy)], {}});
    backend.packed_gemv(products, x, spec ? &*spec : nullptr);
  });
  const bool gpu = backend.device() == engine::DeviceType::Cuda;
  const double seconds =
      engine::measure_seconds(backend, {.calls = gpu ? 1 : kCallsOfCpu}, [&] { rounds.run(); });
  return static_cast<int64_t>(1e6 * kPicoseconds * seconds /
                              static_cast<double>(rounds.products()));
}

}  // namespace

std::vector<size_t> choose_options(const std::vector<std::vector<CostedOption>>& items,
                                   int64_t budget) {
  std::vector<std::vector<size_t>> options;
  int64_t spare = budget, unit = 0;
  for (const std::vector<CostedOption>& item : items) {
    options.push_back(efficient(item));
    const int64_t cheapest = item[options.back()[0]].cost;
    spare -= cheapest;
    for (const size_t o : options.back()) unit = std::gcd(unit, item[o].cost - cheapest);
  }
  BBB_ASSERT(spare >= 0);
  const auto extra = [&](size_t i, size_t o) {
    return items[i][options[i][o]].cost - items[i][options[i][0]].cost;
  };
  if (unit == 0 || spare / unit > kMaxUnits) unit = std::max<int64_t>(1, spare / kMaxUnits + 1);
  const int64_t units = spare / unit;

  // least[u]: of the items so far, within u units; chosen[i][u]: the option of item i in it.
  std::vector<double> least(static_cast<size_t>(units + 1), 0.0), next(least.size());
  std::vector<std::vector<uint8_t>> chosen;
  for (size_t i = 0; i < items.size(); ++i) {
    std::vector<uint8_t>& best = chosen.emplace_back(least.size(), uint8_t{0});
    for (size_t o = 0; o < options[i].size(); ++o) {
      const double loss = items[i][options[i][o]].loss;
      const int64_t taken = (extra(i, o) + unit - 1) / unit;
      for (int64_t u = taken; u <= units; ++u) {
        const double sum = least[static_cast<size_t>(u - taken)] + loss;
        if (o > 0 && sum >= next[static_cast<size_t>(u)]) continue;
        next[static_cast<size_t>(u)] = sum;
        best[static_cast<size_t>(u)] = static_cast<uint8_t>(o);
      }
    }
    least.swap(next);
  }
  std::vector<size_t> at(items.size());
  int64_t left = units;
  for (size_t i = items.size(); i-- > 0;) {
    at[i] = chosen[i][static_cast<size_t>(left)];
    left -= (extra(i, at[i]) + unit - 1) / unit;
    spare -= extra(i, at[i]);
  }

  // Rounding up has left some of the budget: the largest gains that still fit.
  for (;;) {
    double gain = 0;
    size_t item = 0, option = 0;
    for (size_t i = 0; i < items.size(); ++i)
      for (size_t o = at[i] + 1; o < options[i].size(); ++o) {
        const double lost = items[i][options[i][at[i]]].loss - items[i][options[i][o]].loss;
        if (extra(i, o) - extra(i, at[i]) <= spare && lost > gain)
          gain = lost, item = i, option = o;
      }
    if (gain == 0) break;
    spare -= extra(item, option) - extra(item, at[item]);
    at[item] = option;
  }
  for (size_t i = 0; i < items.size(); ++i) at[i] = options[i][at[i]];
  return at;
}

SiteBudget size_budget(const LlamaConfig& model, const TrainConfig& config) {
  SiteBudget budget = budget_from(model, config, [](const std::vector<LinearFormat>& formats) {
    int64_t bytes = 0;
    for (const LinearFormat& format : formats) bytes += format.bytes();
    return bytes;
  });
  set_most(budget, model, config.target_bits, bytes_of_a_bit(model), "target-bits",
           "bits a weight");
  return budget;
}

SiteBudget time_budget(Backend& backend, const LlamaConfig& model, const TrainConfig& config) {
  // What a token reads with the fewest bits, but no more than far exceeds the caches.
  constexpr int64_t kMostRotation = 256 << 20;
  int64_t layer_bytes = 0;
  const LayerStatistics plain;
  for (const LinearFormat& format : formats_of(config, one_layer_of(model), plain, 2))
    layer_bytes += format.bytes();
  const int64_t rotation = std::min(kMostRotation, model.layers * layer_bytes);
  // Products of equal sizes take equal times, wherever their channels come from.
  std::vector<std::pair<std::vector<LinearFormat>, int64_t>> timed;
  const auto same_products = [](const LinearFormat& a, const LinearFormat& b) {
    return a.n == b.n && a.stored_k() == b.stored_k() && a.weight == b.weight &&
           a.input.bits == b.input.bits;
  };
  SiteBudget budget = budget_from(model, config, [&](const std::vector<LinearFormat>& formats) {
    for (const auto& [of, time] : timed)
      if (std::ranges::equal(of, formats, same_products)) return time;
    const double own = static_cast<double>(time_site(backend, formats, rotation));
    // All ranks take the first one's times.
    return timed.emplace_back(formats, static_cast<int64_t>(config.comm->gather({own})[0][0]))
        .second;
  });
  set_most(budget, model, config.target_us, kPicoseconds, "target-us",
           "microseconds a token on this device");
  return budget;
}

SiteBudget budget_of(Backend& backend, const LlamaConfig& model, const TrainConfig& config) {
  return config.target_us > 0 ? time_budget(backend, model, config) : size_budget(model, config);
}

Allocation allocate_sites(Backend& backend, const models::Checkpoint& source,
                          const data::Windows& windows, const TrainConfig& config,
                          const SiteBudget& budget,
                          const std::function<void(int64_t done)>& progress) {
  const LlamaConfig& model = source.config();
  const LlamaConfig one_layer = one_layer_of(model);
  const std::vector<LinearShape> shapes = models::block_linears(model);
  const size_t choices = budget.costs[0].size();
  engine::ThreadPool pool(config.comm->first() ? 0 : 1);
  std::vector<std::vector<LayerStatistics>> layouts;  // of each layer
  std::vector<std::vector<double>> errors;            // of each site: those of its choices
  collect_layouts(
      backend, source, windows, config,
      [&](int64_t layer, const auto& original, std::vector<LayerStatistics> of_layer) {
        if (!config.comm->first()) return;
        std::vector<std::vector<LinearFormat>> formats;  // of each choice
        for (size_t c = 0; c < choices; ++c)
          formats.push_back(formats_of(config, one_layer, of_layer[layout_of(c)], bits_of(c)));
        std::vector<double> of_linears(shapes.size() * choices);
        pool.parallel_for(
            static_cast<int64_t>(of_linears.size()), 1, [&](int64_t begin, int64_t end) {
              for (auto at = static_cast<size_t>(begin); at < static_cast<size_t>(end); ++at) {
                const size_t i = at / choices, c = at % choices;
                of_linears[at] = models::rounding_error(
                    original.linears[i], formats[c][i],
                    of_layer[layout_of(c)][static_cast<size_t>(shapes[i].site)].energy,
                    config.range, kErrorRows);
              }
            });
        errors.resize(errors.size() + models::kSites, std::vector<double>(choices));
        for (size_t at = 0; at < of_linears.size(); ++at)
          errors[errors.size() - models::kSites + static_cast<size_t>(shapes[at / choices].site)]
                [at % choices] += of_linears[at];
        layouts.push_back(std::move(of_layer));
        progress(layer + 1);
      });

  if (!config.comm->first()) return {};

  Sensitivity sensitivity(backend, source, windows, config);
  for (int64_t layer = 0; layer < model.layers; ++layer) {
    const models::LayerResult original = models::full_precision(source, layer);
    const LayerStatistics& plain = layouts[static_cast<size_t>(layer)][layout_of(0)];
    const std::vector<LinearFormat> formats = formats_of(config, one_layer, plain, bits_of(0));
    std::vector<std::vector<float>> rounded;
    for (size_t i = 0; i < shapes.size(); ++i)
      rounded.push_back(models::rounded_weight(original.linears[i], formats[i],
                                               plain[static_cast<size_t>(shapes[i].site)].energy,
                                               config.range));
    sensitivity.add_layer(layer, original, rounded);
    progress(model.layers + layer + 1);
  }
  const std::vector<double> divergences = sensitivity.divergences();

  std::vector<std::vector<CostedOption>> sites(errors.size());
  for (size_t s = 0; s < sites.size(); ++s)
    for (size_t c = 0; c < choices; ++c)
      sites[s].push_back({budget.costs[s % models::kSites][c],
                          errors[s][0] > 0 ? divergences[s] * errors[s][c] / errors[s][0] : 0});
  const std::vector<size_t> chosen = choose_options(sites, budget.most);
  Allocation allocation;
  allocation.statistics.resize(layouts.size());
  for (size_t s = 0; s < sites.size(); ++s) {
    const size_t layer = s / models::kSites, site = s % models::kSites;
    models::SiteStatistics& of = allocation.statistics[layer][site];
    of = std::move(layouts[layer][layout_of(chosen[s])][site]);
    of.bits = bits_of(chosen[s]);
    allocation.cost += sites[s][chosen[s]].cost;
    allocation.loss += sites[s][chosen[s]].loss;
    allocation.least_bits_loss += sites[s][0].loss;
  }
  return allocation;
}

std::string describe(const Allocation& allocation, const LlamaConfig& model,
                     const TrainConfig& config) {
  constexpr const char* kNames[models::kSites] = {"q, k, v", "o", "gate, up", "down"};
  char line[160];
  std::string text = "inputs      2 bits  3 bits  4 bits   split 5 %  split 10 %   outliers\n";
  std::array<int64_t, models::kSites> inputs;  // features
  for (const LinearShape& shape : models::block_linears(model))
    inputs[static_cast<size_t>(shape.site)] = shape.k;
  for (size_t site = 0; site < inputs.size(); ++site) {
    const std::vector<SiteLayout> layouts = Recipe::layouts(config, model, 0, inputs[site]);
    const auto count = [&](const auto& is) {
      return static_cast<long long>(std::ranges::count_if(
          allocation.statistics, [&](const LayerStatistics& layer) { return is(layer[site]); }));
    };
    const auto of_bits = [&](int bits) {
      return count([&](const models::SiteStatistics& s) { return s.bits == bits; });
    };
    const auto of_split = [&](size_t layout) {
      return count([&](const models::SiteStatistics& s) {
        return static_cast<int64_t>(s.split.size()) == layouts[layout].split;
      });
    };
    std::snprintf(line, sizeof line, "%-10s %7lld %7lld %7lld %11lld %11lld %10lld\n", kNames[site],
                  of_bits(2), of_bits(3), of_bits(4), of_split(1), of_split(2),
                  count([](const models::SiteStatistics& s) { return !s.outliers.empty(); }));
    text += line;
  }
  const Recipe recipe(config, model, allocation.statistics);
  std::snprintf(line, sizeof line, "%.4f bits per weight", recipe.bits_per_weight());
  text += line;
  if (config.target_us > 0) {
    std::snprintf(line, sizeof line, ", %.1f us a token for the products of one row",
                  static_cast<double>(allocation.cost) / kPicoseconds);
    text += line;
  }
  std::snprintf(line, sizeof line, "; predicted KL before training %.4g, with 2 bits alone %.4g\n",
                allocation.loss, allocation.least_bits_loss);
  return text + line;
}

}  // namespace bbb::train
