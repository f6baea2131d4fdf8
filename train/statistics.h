// Statistics of the input sites of all layers, over the full-precision stream of the first windows
// (numerics.md section 2): a pass of its own before training.
//
//   pass 1   moments of every channel        -> outliers, split channels, kurtosis
//   pass 2   energies E[x^2] of the gathered and rotated inputs, by stored position
//   pass 3   for --split-side auto: the error of the outputs with a split on either side, at the
//            widths of the result
#pragma once

#include <functional>

#include "data/text.h"
#include "engine/counting_backend.h"
#include "train/config.h"
#include "train/recipe.h"

namespace bbb::train {

constexpr int64_t kStatisticsWindows = 128;

// Over the first min(samples, 128) windows. progress(layers): layers done so far. `config` must be
// resolved and must not allocate.
std::vector<models::LayerStatistics> collect_statistics(
    engine::Backend& backend, const models::Checkpoint& source, const data::Windows& windows,
    const TrainConfig& config, const std::function<void(int64_t layers)>& progress);

// The same of every layer in each of its layouts (Recipe::layouts), with its full-precision
// weights, one layer after another.
using AddLayouts = std::function<void(int64_t layer, const models::LayerResult& original,
                                      std::vector<models::LayerStatistics> layouts)>;
void collect_layouts(engine::Backend& backend, const models::Checkpoint& source,
                     const data::Windows& windows, const TrainConfig& config,
                     const AddLayouts& add);

// The stored layers from which weights behind LC start, one after another: the same pass finds
// E[x x^T] of every site. `recipe` has the formats.
void collect_lc_starts(engine::Backend& backend, const models::Checkpoint& source,
                       const data::Windows& windows, const TrainConfig& config,
                       const Recipe& recipe,
                       const std::function<void(int64_t layer, models::LayerResult start)>& add);

// Allocates on `backend` the most that the passes hold, without those of an allocation
// (train/allocation.h).
void rehearse_statistics(engine::CountingBackend& backend, const models::Checkpoint& source,
                         const TrainConfig& config);

}  // namespace bbb::train
