// MemoryPool: a caching allocator of device memory, in the order of one stream.
//
// A request is rounded up: to 512 bytes, above 1 MiB to 2 MiB. It is cut out of a free chunk of a
// slab (chunks.h). If no chunk is large enough, the driver gives a new slab, of the size of the
// request but at least 2 MiB. Requests up to 1 MiB share slabs of their own. A freed chunk is
// reusable at once: its next user runs later on the same stream. Free slabs return to the driver
// when an allocation fails, in release_cached(), and when the pool dies. The pool outlives the
// backend while a tensor holds one of its chunks.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <mutex>

#include "engine/chunks.h"
#include "engine/tensor.h"

namespace bbb::cuda {

// Of all pools of a backend: bytes held by tensors, plus all slabs of pools of recordings.
struct MemoryUsage {
  std::mutex mutex;
  int64_t held_bytes = 0;
  int64_t peak_bytes = 0;
};

// Never: recorded graphs contain the addresses, so not even a free slab may be released.
enum class Reclaim { OnPressure, Never };

class MemoryPool : public std::enable_shared_from_this<MemoryPool> {
 public:
  MemoryPool(std::shared_ptr<MemoryUsage> usage, Reclaim reclaim)
      : usage_(std::move(usage)), reclaim_(reclaim) {}
  ~MemoryPool();
  MemoryPool(const MemoryPool&) = delete;
  MemoryPool& operator=(const MemoryPool&) = delete;

  // 512-byte aligned, uninitialized. Throws, naming the bytes, if the GPU has no room.
  std::shared_ptr<engine::Storage> allocate(int64_t bytes);
  void release_cached();  // waits for the device
  int64_t cached_bytes() const;
  const std::shared_ptr<MemoryUsage>& usage() const { return usage_; }

 private:
  void* take(int64_t block_bytes);
  void give_back(void* block, int64_t block_bytes);
  void free_slabs();
  void hold(int64_t bytes);

  std::shared_ptr<MemoryUsage> usage_;  // its mutex guards the rest too
  Reclaim reclaim_;
  engine::ChunkPool chunks_;
  int64_t reserved_bytes_ = 0;  // Reclaim::Never: bytes of all slabs
};

// The pools of recorded steps; all replays hold them. Each of a step's two streams has its own
// pool: memory freed in the order of one stream may still be in use on the other.
struct RecordingPools {
  explicit RecordingPools(const std::shared_ptr<MemoryUsage>& usage)
      : main(std::make_shared<MemoryPool>(usage, Reclaim::Never)),
        side(std::make_shared<MemoryPool>(usage, Reclaim::Never)) {}
  std::shared_ptr<MemoryPool> main, side;
};

}  // namespace bbb::cuda
