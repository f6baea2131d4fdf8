// The waits of this process for its GPU, begun and ended: odd within a wait. Another thread may
// read it.
#pragma once

#include <atomic>
#include <cstdint>

namespace bbb::cuda {

inline std::atomic<int64_t> host_waits{0};

}  // namespace bbb::cuda
