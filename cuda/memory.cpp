// The caching pool of device memory; see memory.h.
#ifdef BBB_HAS_CUDA
#include "cuda/memory.h"

#include <algorithm>

#include "quant/launch.h"

namespace bbb::cuda {
namespace {

constexpr int64_t kLargestBlock = int64_t{1} << 50;  // more than any GPU has

void* device_malloc(int64_t bytes) {
  void* block = nullptr;
  const cudaError_t status = cudaMalloc(&block, static_cast<size_t>(bytes));
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // or the next launch reports it
    return nullptr;
  }
  BBB_CUDA(status);
  return block;
}

}  // namespace

MemoryPool::~MemoryPool() {
  const std::lock_guard lock(usage_->mutex);
  free_slabs();
  usage_->held_bytes -= reserved_bytes_;
}

std::shared_ptr<engine::Storage> MemoryPool::allocate(int64_t bytes) {
  const int64_t block_bytes =
      bytes <= kLargestBlock ? engine::ChunkPool::block_bytes(bytes) : bytes;
  const std::lock_guard lock(usage_->mutex);
  void* const block = bytes <= kLargestBlock ? take(block_bytes) : nullptr;
  if (block == nullptr) {
    size_t free = 0, total = 0;
    BBB_CUDA(cudaMemGetInfo(&free, &total));
    throw Error(cat("out of GPU memory: ", bytes, " bytes requested, ", usage_->held_bytes,
                    " held by tensors, ", free, " free of ", total));
  }
  if (reclaim_ == Reclaim::OnPressure) hold(block_bytes);
  return std::make_shared<engine::Storage>(
      block, bytes,
      [pool = shared_from_this(), block, block_bytes] { pool->give_back(block, block_bytes); });
}

void MemoryPool::hold(int64_t bytes) {
  usage_->held_bytes += bytes;
  usage_->peak_bytes = std::max(usage_->peak_bytes, usage_->held_bytes);
}

// nullptr if there is no room.
void* MemoryPool::take(int64_t block_bytes) {
  return chunks_.take(block_bytes, [this](int64_t slab_bytes) {
    void* slab = device_malloc(slab_bytes);
    if (slab == nullptr && reclaim_ == Reclaim::OnPressure) {
      free_slabs();
      slab = device_malloc(slab_bytes);
    }
    if (slab != nullptr && reclaim_ == Reclaim::Never) {
      reserved_bytes_ += slab_bytes;
      hold(slab_bytes);
    }
    return slab;
  });
}

void MemoryPool::give_back(void* block, int64_t block_bytes) {
  const std::lock_guard lock(usage_->mutex);
  if (reclaim_ == Reclaim::OnPressure) usage_->held_bytes -= block_bytes;
  chunks_.give_back(block, block_bytes);
}

void MemoryPool::release_cached() {
  const std::lock_guard lock(usage_->mutex);
  if (reclaim_ == Reclaim::OnPressure) free_slabs();
}

int64_t MemoryPool::cached_bytes() const {
  const std::lock_guard lock(usage_->mutex);
  return chunks_.free_bytes();
}

// cudaFree waits for the kernels that still use a slab. Its status is ignored: at exit the driver,
// and the memory with it, may be gone already.
void MemoryPool::free_slabs() {
  for (void* slab : chunks_.remove_free_slabs()) cudaFree(slab);
  cudaGetLastError();
}

}  // namespace bbb::cuda
#endif
