// The waits of this process's threads for its GPU, for a thread that watches (engine/comm.h).
#pragma once

#include <atomic>
#include <cstdint>

namespace bbb::cuda {

inline std::atomic<int64_t> host_waits{0};   // begun
inline std::atomic<int> waiting_threads{0};  // now

// A wait for the GPU lasts as long as this.
class HostWait {
 public:
  HostWait() { ++host_waits, ++waiting_threads; }
  ~HostWait() { --waiting_threads; }
  HostWait(const HostWait&) = delete;
  HostWait& operator=(const HostWait&) = delete;
};

}  // namespace bbb::cuda
