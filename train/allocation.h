// Allocation: every input site takes the bits, split channels and outliers with which the model
// loses least at a target size or time (--target-bits, --target-us).
//
//   choices      {2, 3, 4 bits} x the layouts of Recipe::layouts: 0, 5 or 10 % of the channels
//                split, no outlier group or one. The linears of a site share a choice
//   e(c)         sum over the site's linears of (w^ - w)^2 E[x_p^2] (models::rounding_error)
//   KL_2         the site's sensitivity: KL of the full-precision model's distribution to that of
//                the model with this site alone rounded to 2 bits, the mean over the tokens of the
//                first windows (train/sensitivity.h)
//   KL(c)        = KL_2 e(c) / e(2 bits, first layout): the loss of a choice, comparable between
//                sites and layers
//   cost(c)      bytes of the tensors that hold the linears (LinearFormat), or the time of the
//                site's products of one row, which this device's kernels take
//
// The set of choices of least summed loss whose summed cost is within the target is found once. The
// run's statistics store it (SiteStatistics), and Recipe reads it there.
#pragma once

#include <array>
#include <functional>
#include <string>
#include <vector>

#include "data/text.h"
#include "engine/backend.h"
#include "train/recipe.h"

namespace bbb::train {

struct CostedOption {
  int64_t cost;
  double loss;
};
// One option of each item: a set of least summed loss whose summed cost is at most `budget`, which
// the cheapest options must not exceed. Dynamic programming over the cost beyond those, in units
// that divide it into at most 65,536 parts; costs are rounded up, and what this leaves is filled
// greedily. Exact if the units divide all costs. Of equal sets the same one each time.
std::vector<size_t> choose_options(const std::vector<std::vector<CostedOption>>& items,
                                   int64_t budget);

// What the choices of a site cost in any layer, in the order of layouts and in them of bits, and
// what all sites together may: bytes, or picoseconds.
struct SiteBudget {
  std::array<std::vector<int64_t>, models::kSites> costs;
  int64_t most = 0;
};
// Both throw UsageError with the bounds if the target is out of reach. `config` must be resolved.
SiteBudget size_budget(const models::LlamaConfig& model, const TrainConfig& config);
// Takes about a second: the products rotate through as many bytes as a token of the model reads.
SiteBudget time_budget(engine::Backend& backend, const models::LlamaConfig& model,
                       const TrainConfig& config);
// That of the configuration.
SiteBudget budget_of(engine::Backend& backend, const models::LlamaConfig& model,
                     const TrainConfig& config);

struct Allocation {
  std::vector<models::LayerStatistics> statistics;
  int64_t cost = 0;
  double loss = 0, least_bits_loss = 0;  // predicted KL; the same with every site at 2 bits
};
// Statistics are sums over the ranks. The first rank allocates; for the others nothing is returned.
// progress(done): of twice the layers.
Allocation allocate_sites(engine::Backend& backend, const models::Checkpoint& source,
                          const data::Windows& windows, const TrainConfig& config,
                          const SiteBudget& budget,
                          const std::function<void(int64_t done)>& progress);
// A table for people: how many layers' sites of each kind took what.
std::string describe(const Allocation& allocation, const models::LlamaConfig& model,
                     const TrainConfig& config);

}  // namespace bbb::train
