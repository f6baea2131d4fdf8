// The order in which training takes its windows: by batch slot.
//
//   window w belongs to slot w mod batch      slot s of `batch` gives row s of every batch
//
// Each epoch permutes the windows within each slot. Any number of ranks that divides the batch can
// share the slots, and together they see the same batches as one rank.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/comm.h"

namespace bbb::train {

// The windows of `steps` steps of `batch` windows each, step by step: (steps * batch) indices in
// [0, samples). An epoch has samples / batch steps, rounded down; the windows that it omits differ
// from epoch to epoch. Equal arguments give equal orders. batch <= samples.
std::vector<int32_t> sample_order(uint64_t seed, int64_t samples, int64_t batch, int64_t steps);

// This rank's part of an order, step by step: (steps * batch / ranks) indices among its own
// windows, the ranks dividing the batch. Slot s, and window w of all, belong to rank s or w mod
// ranks; there it is window w / ranks.
std::vector<int32_t> own_order(const std::vector<int32_t>& order, const engine::Comm& comm);
// The token ids of this rank's windows among `count` windows of `seq` tokens, in order.
std::vector<int32_t> own_windows(const int32_t* ids, int64_t count, int64_t seq,
                                 const engine::Comm& comm);

}  // namespace bbb::train
