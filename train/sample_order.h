// The order in which training takes its windows: by batch slot.
//
//   window w belongs to slot w mod batch      slot s of `batch` gives row s of every batch
//
// Each epoch permutes the windows of every slot by itself. Any number of ranks that divides the
// batch can share out the slots, and together they see the batches that one rank sees.
#pragma once

#include <cstdint>
#include <vector>

namespace bbb::train {

// The windows of `steps` steps of `batch` windows each, step by step: (steps * batch) indices in
// [0, samples). An epoch has samples / batch steps; windows that it leaves out differ from epoch to
// epoch. Equal arguments give equal orders. batch <= samples.
std::vector<int32_t> sample_order(uint64_t seed, int64_t samples, int64_t batch, int64_t steps);

}  // namespace bbb::train
