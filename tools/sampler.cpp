#include "tools/sampler.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "quant/check.h"

namespace bbb::tools {

int32_t Sampler::next(const std::vector<float>& logits) {
  BBB_ASSERT(!logits.empty());
  size_t best = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    BBB_CHECK(std::isfinite(logits[i]), "the logit of token ", i, " is ", logits[i],
              ": no next token can be chosen");
    if (logits[i] > logits[best]) best = i;
  }
  if (spec_.temperature <= 0) return static_cast<int32_t>(best);

  // Unnormalized probabilities, most likely first. Ties are ordered by id, so that a seed fixes the
  // text.
  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::vector<double> weight(logits.size());
  for (size_t i = 0; i < logits.size(); ++i)
    weight[i] = std::exp((static_cast<double>(logits[i]) - logits[best]) / spec_.temperature);
  std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    const double wa = weight[static_cast<size_t>(a)], wb = weight[static_cast<size_t>(b)];
    return wa != wb ? wa > wb : a < b;
  });
  const double total = std::accumulate(weight.begin(), weight.end(), 0.0);
  double nucleus = 0;
  size_t kept = 0;
  while (kept < order.size() && (kept == 0 || nucleus < spec_.top_p * total))
    nucleus += weight[static_cast<size_t>(order[kept++])];
  double draw = rng_.uniform() * nucleus;
  for (size_t i = 0; i < kept; ++i) {
    draw -= weight[static_cast<size_t>(order[i])];
    if (draw < 0) return order[i];
  }
  return order[kept - 1];
}

}  // namespace bbb::tools
