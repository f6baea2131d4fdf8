// Sensitivity of the input sites: what the model's distribution loses when one of them alone is
// rounded.
//
// One pass over the layers, one of them in memory at a time. It carries the hidden states of the
// full-precision model and of every model with one rounded site so far:
//
//   layer l    passes the streams of the sites before it; its own four sites branch off
//              from the full-precision stream, which then passes too
//   the end    KL of the full-precision distribution to each stream's, the mean over all tokens
#pragma once

#include <vector>

#include "data/text.h"
#include "engine/counting_backend.h"
#include "models/llama.h"
#include "train/config.h"

namespace bbb::train {

class Sensitivity {
 public:
  // The first windows that it takes: one more is one more pass over the model for every site.
  static constexpr int64_t kWindows = 4, kWindowsOfCpu = 1;

  // All must outlive the object.
  Sensitivity(engine::Backend& backend, const models::Checkpoint& source,
              const data::Windows& windows, const TrainConfig& config);

  // Layers in order. rounded[i]: the weight (N, K) of linear i, rounded. `original` and `rounded`
  // are not read by a backend that does not compute.
  void add_layer(int64_t layer, const models::LayerResult& original,
                 const std::vector<std::vector<float>>& rounded);
  // After the last layer: of every site, layer by layer. Throws if one is not finite.
  std::vector<double> divergences();

 private:
  engine::Tensor stream(int64_t i) const { return streams_.rows(i * tokens_, tokens_); }
  void pass(models::LlamaBlock& block, const engine::Tensor& out, const engine::Tensor& in);

  engine::Backend& backend_;
  const TrainConfig& config_;
  models::Llama model_;  // without blocks
  int64_t windows_, tokens_;
  // act: the full-precision one, then those of all sites, (tokens, D) each.
  engine::Tensor streams_;
  engine::Tensor first_key_;  // of the windows, if they hold documents apart
};

// Allocates on `backend` the most that a pass holds.
void rehearse_sensitivity(engine::CountingBackend& backend, const models::Checkpoint& source,
                          const TrainConfig& config);

}  // namespace bbb::train
