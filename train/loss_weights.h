// LossWeights: how much the loss of each precision counts when several train at once (numerics.md
// section 4). The first always counts 1; the others start at 0.1 and ramp linearly to 1. A step may
// have a factor, which multiplies all. The weights of all steps are on the device, so that a
// recorded step finds its own.
#pragma once

#include <numeric>
#include <vector>

#include "models/quant_linear.h"

namespace bbb::train {

class LossWeights {
 public:
  static constexpr double kStart = 0.1;

  // factors: of each step; empty: 1.
  LossWeights(engine::Backend& backend, size_t precisions, int64_t steps,
              const std::vector<double>& factors = {})
      : backend_(backend) {
    const auto count = static_cast<int64_t>(precisions);
    std::vector<float> weights;
    for (int64_t step = 0; step < steps; ++step) {
      const double done =
          steps > 1 ? static_cast<double>(step) / static_cast<double>(steps - 1) : 1;
      const double factor = factors.empty() ? 1 : factors[static_cast<size_t>(step)];
      for (int64_t p = 0; p < count; ++p)
        weights.push_back(static_cast<float>(factor * (p == 0 ? 1 : kStart + (1 - kStart) * done)));
    }
    table_ = models::upload_as(backend, weights, {steps, count}, backend.real());
    std::vector<int32_t> order(static_cast<size_t>(steps));
    std::iota(order.begin(), order.end(), 0);
    order_ = models::upload_ints(backend, order, {steps});
  }

  // Of the step that `cursor` counts, real (precisions).
  engine::Tensor at(const engine::Tensor& cursor) const {
    const engine::Tensor row = backend_.empty({1, table_.dim(1)}, backend_.real());
    backend_.gather_rows(row, {table_, order_, cursor});
    return row.view({table_.dim(1)});
  }

 private:
  engine::Backend& backend_;
  engine::Tensor table_, order_;
};

}  // namespace bbb::train
