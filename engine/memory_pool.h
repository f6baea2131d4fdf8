// MemoryPool: a caching allocator of device memory, in the order of one stream.
//
// A request is rounded up to a block, which is cut out of a free chunk of a slab (chunks.h). Small
// and large blocks have separate slabs:
//
//   request        block, a multiple of   new slab if no free chunk is large enough
//   up to 1 MiB    512 bytes              2 MiB
//   above 1 MiB    2 MiB                  the block's size
//
// A freed chunk is reusable at once: its next user runs later on the same stream. Free slabs return
// to the device when an allocation fails, in release_cached(), and when the pool dies. The pool
// outlives the backend while a tensor holds one of its chunks.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "engine/chunks.h"
#include "engine/tensor.h"

namespace bbb::engine {

// The device behind all pools of a backend, and the bytes that they hold.
struct DeviceMemory {
  std::function<void*(int64_t bytes)> allocate;  // a slab; nullptr if there is no room
  std::function<void(void* slab)> release;       // waits for kernels that still use the slab
  std::function<std::string()> room;             // "5 free of 8", for an error

  std::mutex mutex;        // guards the counts and the pools
  int64_t held_bytes = 0;  // by tensors, plus all slabs of pools that never reclaim
  int64_t peak_bytes = 0;
};

// When a pool releases free slabs. Never: recorded steps contain the addresses of its memory.
enum class Reclaim { OnPressure, Never };

class MemoryPool : public std::enable_shared_from_this<MemoryPool> {
 public:
  MemoryPool(std::shared_ptr<DeviceMemory> device, Reclaim reclaim)
      : device_(std::move(device)), reclaim_(reclaim) {}
  ~MemoryPool();
  MemoryPool(const MemoryPool&) = delete;
  MemoryPool& operator=(const MemoryPool&) = delete;

  // The request, rounded up as above. A caller with other rules passes its own block_bytes below.
  static int64_t block_bytes(int64_t bytes);
  // Uninitialized; aligned to 512 bytes if all blocks are multiples of that. Throws, naming the
  // bytes, if the device has no room.
  std::shared_ptr<Storage> allocate(int64_t bytes) { return allocate(bytes, block_bytes(bytes)); }
  std::shared_ptr<Storage> allocate(int64_t bytes, int64_t block_bytes);
  void release_cached();  // waits for the device
  int64_t cached_bytes() const;
  int64_t reserved_bytes() const { return reserved_bytes_; }
  int64_t peak_bytes() const;  // of all pools of the device, since the last reset_peak()
  void reset_peak();
  const std::shared_ptr<DeviceMemory>& device() const { return device_; }

 private:
  void* take(int64_t block_bytes);
  void give_back(void* block, int64_t block_bytes);
  void free_slabs();
  void hold(int64_t bytes);
  Chunks& chunks_for(int64_t block_bytes);

  std::shared_ptr<DeviceMemory> device_;
  Reclaim reclaim_;
  Chunks small_, large_;
  int64_t reserved_bytes_ = 0;  // Reclaim::Never: bytes of all slabs
};

// The pools of recorded steps; all replays hold them. Each of a step's two streams has its own
// pool, because memory freed in the order of one stream may still be in use on the other.
struct RecordingPools {
  explicit RecordingPools(const std::shared_ptr<DeviceMemory>& device)
      : main(std::make_shared<MemoryPool>(device, Reclaim::Never)),
        side(std::make_shared<MemoryPool>(device, Reclaim::Never)) {}
  std::shared_ptr<MemoryPool> main, side;
};

}  // namespace bbb::engine
