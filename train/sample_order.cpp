#include "train/sample_order.h"

#include <algorithm>

#include "engine/rng.h"
#include "quant/check.h"

namespace bbb::train {

std::vector<int32_t> sample_order(uint64_t seed, int64_t samples, int64_t batch, int64_t steps) {
  BBB_ASSERT(batch > 0 && batch <= samples);
  const int64_t steps_per_epoch = samples / batch;
  engine::Rng rng(seed);
  std::vector<int32_t> order(static_cast<size_t>(steps * batch));
  for (int64_t begin = 0; begin < steps; begin += steps_per_epoch)
    for (int64_t slot = 0; slot < batch; ++slot) {
      const int64_t windows = (samples - slot + batch - 1) / batch;
      const std::vector<int32_t> permutation = rng.permutation(windows);
      for (int64_t step = begin; step < std::min(steps, begin + steps_per_epoch); ++step)
        order[static_cast<size_t>(step * batch + slot)] =
            static_cast<int32_t>(permutation[static_cast<size_t>(step - begin)] * batch + slot);
    }
  return order;
}

std::vector<int32_t> own_order(const std::vector<int32_t>& order, const engine::Comm& comm) {
  std::vector<int32_t> own;
  for (const int32_t window : order)
    if (window % comm.size() == comm.rank()) own.push_back(window / comm.size());
  return own;
}

std::vector<int32_t> own_windows(const int32_t* ids, int64_t count, int64_t seq,
                                 const engine::Comm& comm) {
  std::vector<int32_t> own;
  for (int64_t w = comm.rank(); w < count; w += comm.size())
    own.insert(own.end(), ids + w * seq, ids + (w + 1) * seq);
  return own;
}

}  // namespace bbb::train
