// The order in which training takes its windows: by batch slot.
//
//   window w belongs to slot w mod batch      slot s of `batch` gives row s of every batch
//
// Each epoch permutes the windows within each slot. Any number of ranks that divides the batch can
// share the slots, and together they see the same batches as one rank.
#pragma once

#include <cstdint>
#include <vector>

namespace bbb::train {

// The windows of `steps` steps of `batch` windows each, step by step: (steps * batch) indices in
// [0, samples). An epoch has samples / batch steps, rounded down; the windows that it omits differ
// from epoch to epoch. Equal arguments give equal orders. batch <= samples.
std::vector<int32_t> sample_order(uint64_t seed, int64_t samples, int64_t batch, int64_t steps);

}  // namespace bbb::train
