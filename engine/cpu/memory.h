// HostMemory: 64-byte aligned blocks, kept for reuse when freed.
//
// A training step allocates the same sizes again and again. A block returned to the system would
// cost a page fault for every 4 KiB the next time. So freed blocks are kept in a list per size, in
// total at most kCacheShare of the machine's memory. Blocks of medium size are cut from slabs;
// freed ones merge and serve any medium size. The cache returns to the system, with the slabs that
// hold no block, when a large block finds too little memory.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "engine/chunks.h"
#include "engine/tensor.h"

namespace bbb::engine {

class HostMemory : public std::enable_shared_from_this<HostMemory> {
 public:
  HostMemory() = default;
  ~HostMemory();
  HostMemory(const HostMemory&) = delete;
  HostMemory& operator=(const HostMemory&) = delete;

  // Throws Error, naming the bytes, if the machine does not have them.
  std::shared_ptr<Storage> allocate(int64_t bytes);

  int64_t peak_bytes() const;
  void reset_peak();
  int64_t cached_bytes() const;
  void drop_cache();

  // The request, rounded up to a multiple of 64 bytes; above 512 bytes to a multiple of 1/8 of the
  // power of two below it. Few sizes, little waste.
  static int64_t block_bytes(int64_t bytes);
  // Both: of the machine, at most what the process's control group allows (cgroup.h).
  static int64_t total_bytes();
  static int64_t available_bytes();  // without swap: MemAvailable of /proc/meminfo

 private:
  static constexpr double kCacheShare = 0.25;

  void release(void* block, int64_t block_bytes);
  // The caller holds the mutex. A block is null if the system refuses it.
  void* take_slabbed(int64_t size);
  void* take_single(int64_t size);
  void free_cached();

  mutable std::mutex mutex_;
  Chunks slabs_;                                   // the blocks of medium size
  std::map<int64_t, std::vector<void*>> singles_;  // of the others: size -> free blocks
  int64_t single_bytes_ = 0;                       // in singles_
  int64_t held_bytes_ = 0;
  int64_t peak_bytes_ = 0;
};

}  // namespace bbb::engine
