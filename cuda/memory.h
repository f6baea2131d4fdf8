// MemoryPool: device memory kept for reuse, in the order of one stream.
//
// A request is rounded up to its bucket (512 bytes, above 1 MiB: 2 MiB) and served by the smallest
// cached block that fits without wasting more than a quarter, else by the driver. A block given
// back is reusable at once: whoever takes it next runs later on the same stream. Blocks go back to
// the driver when an allocation fails, and when the pool dies; it outlives the backend while a
// tensor still holds one of its blocks.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

#include "engine/tensor.h"

namespace bbb::cuda {

// Bytes held by tensors, over every pool of a backend.
struct MemoryUsage {
  std::mutex mutex;
  int64_t held_bytes = 0;
  int64_t peak_bytes = 0;
};

// Never: a recorded graph holds the addresses, so not even an unused block may go.
enum class Reclaim { OnPressure, Never };

class MemoryPool : public std::enable_shared_from_this<MemoryPool> {
 public:
  MemoryPool(std::shared_ptr<MemoryUsage> usage, Reclaim reclaim)
      : usage_(std::move(usage)), reclaim_(reclaim) {}
  ~MemoryPool();
  MemoryPool(const MemoryPool&) = delete;
  MemoryPool& operator=(const MemoryPool&) = delete;

  // 512-byte aligned, uninitialized. Throws, naming the bytes, where the GPU has no room.
  std::shared_ptr<engine::Storage> allocate(int64_t bytes);
  void release_cached();  // waits for the device
  int64_t cached_bytes() const;
  const std::shared_ptr<MemoryUsage>& usage() const { return usage_; }

 private:
  void* take(int64_t& block_bytes);
  void give_back(void* block, int64_t block_bytes);
  void free_blocks();

  std::shared_ptr<MemoryUsage> usage_;  // its mutex guards cached_ too
  Reclaim reclaim_;
  std::multimap<int64_t, void*> cached_;  // by size
};

}  // namespace bbb::cuda
