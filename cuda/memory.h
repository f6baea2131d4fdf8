// MemoryPool: device memory kept for reuse, in the order of one stream.
//
// A request is rounded up (to 512 bytes, above 1 MiB to 2 MiB) and cut out of a free chunk of a
// slab that the driver gave (chunks.h); where none is large enough, a new slab is asked for, as
// large as the request. Small requests share slabs of their own. A chunk given back is reusable at
// once: whoever takes it next runs later on the same stream. Free slabs go back to the driver when
// an allocation fails, and when the pool dies; it outlives the backend while a tensor still holds
// one of its chunks.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <mutex>

#include "cuda/chunks.h"
#include "engine/tensor.h"

namespace bbb::cuda {

// Over every pool of a backend: bytes held by tensors, and all that pools of recordings ever took.
struct MemoryUsage {
  std::mutex mutex;
  int64_t held_bytes = 0;
  int64_t peak_bytes = 0;
};

// Never: recorded graphs hold the addresses, so not even a free slab may go.
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
  void* take(int64_t block_bytes);
  void give_back(void* block, int64_t block_bytes);
  void free_slabs();
  Chunks& chunks_for(int64_t block_bytes);
  void hold(int64_t bytes);

  std::shared_ptr<MemoryUsage> usage_;  // its mutex guards the rest too
  Reclaim reclaim_;
  Chunks small_, large_;
  int64_t reserved_bytes_ = 0;  // Reclaim::Never: of all slabs
};

// What recorded steps allocate from, and all their replays hold: each of a step's two streams has a
// pool of its own, since the order of one says nothing about the other.
struct RecordingPools {
  explicit RecordingPools(const std::shared_ptr<MemoryUsage>& usage)
      : main(std::make_shared<MemoryPool>(usage, Reclaim::Never)),
        side(std::make_shared<MemoryPool>(usage, Reclaim::Never)) {}
  std::shared_ptr<MemoryPool> main, side;
};

}  // namespace bbb::cuda
