#include "engine/memory_pool.h"

#include <algorithm>

namespace bbb::engine {

static constexpr int64_t kSmallStep = 512;
static constexpr int64_t kLargeStep = int64_t{2} << 20;
static constexpr int64_t kLargeFrom = int64_t{1} << 20;
static constexpr int64_t kLargestBlock = int64_t{1} << 50;  // more than any device has

MemoryPool::~MemoryPool() {
  const std::lock_guard lock(device_->mutex);
  free_slabs();
  device_->held_bytes -= reserved_bytes_;
}

int64_t MemoryPool::block_bytes(int64_t bytes) {
  if (bytes > kLargestBlock) return bytes;
  const int64_t step = bytes > kLargeFrom ? kLargeStep : kSmallStep;
  return std::max<int64_t>(1, (bytes + step - 1) / step) * step;
}

std::shared_ptr<Storage> MemoryPool::allocate(int64_t bytes, int64_t block_bytes) {
  const std::lock_guard lock(device_->mutex);
  void* const block = bytes <= kLargestBlock ? take(block_bytes) : nullptr;
  if (block == nullptr)
    throw Error(cat("out of device memory: ", bytes, " bytes requested, ", device_->held_bytes,
                    " held by tensors, ", device_->room()));
  if (reclaim_ == Reclaim::OnPressure) hold(block_bytes);
  return std::make_shared<Storage>(block, bytes, [pool = shared_from_this(), block, block_bytes] {
    pool->give_back(block, block_bytes);
  });
}

void MemoryPool::hold(int64_t bytes) {
  device_->held_bytes += bytes;
  device_->peak_bytes = std::max(device_->peak_bytes, device_->held_bytes);
}

Chunks& MemoryPool::chunks_for(int64_t block_bytes) {
  return block_bytes > kLargeFrom ? large_ : small_;
}

// nullptr if there is no room.
void* MemoryPool::take(int64_t block_bytes) {
  Chunks& chunks = chunks_for(block_bytes);
  if (void* const block = chunks.take(block_bytes)) return block;
  const int64_t slab_bytes = std::max(block_bytes, kLargeStep);
  void* slab = device_->allocate(slab_bytes);
  if (slab == nullptr && reclaim_ == Reclaim::OnPressure) {
    free_slabs();
    slab = device_->allocate(slab_bytes);
  }
  if (slab == nullptr) return nullptr;
  if (reclaim_ == Reclaim::Never) {
    reserved_bytes_ += slab_bytes;
    hold(slab_bytes);
  }
  chunks.add(slab, slab_bytes);
  return chunks.take(block_bytes);
}

void MemoryPool::give_back(void* block, int64_t block_bytes) {
  const std::lock_guard lock(device_->mutex);
  if (reclaim_ == Reclaim::OnPressure) device_->held_bytes -= block_bytes;
  chunks_for(block_bytes).give_back(block);
}

void MemoryPool::release_cached() {
  const std::lock_guard lock(device_->mutex);
  if (reclaim_ == Reclaim::OnPressure) free_slabs();
}

int64_t MemoryPool::cached_bytes() const {
  const std::lock_guard lock(device_->mutex);
  return small_.free_bytes() + large_.free_bytes();
}

int64_t MemoryPool::peak_bytes() const {
  const std::lock_guard lock(device_->mutex);
  return device_->peak_bytes;
}

void MemoryPool::reset_peak() {
  const std::lock_guard lock(device_->mutex);
  device_->peak_bytes = device_->held_bytes;
}

void MemoryPool::free_slabs() {
  for (Chunks* chunks : {&small_, &large_})
    for (void* slab : chunks->remove_free_slabs()) device_->release(slab);
}

}  // namespace bbb::engine
