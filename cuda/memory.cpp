// The caching pool of device memory; see memory.h.
#ifdef BBB_HAS_CUDA
#include "cuda/memory.h"

#include <algorithm>

#include "quant/launch.h"

namespace bbb::cuda {
namespace {

constexpr int64_t kSmallStep = 512;
constexpr int64_t kLargeStep = int64_t{2} << 20;
constexpr int64_t kLargeFrom = int64_t{1} << 20;
constexpr int64_t kSlackBytes = 64 << 10;            // waste that never matters
constexpr int64_t kLargestBlock = int64_t{1} << 50;  // more than any GPU has

int64_t bucket_of(int64_t bytes) {
  const int64_t step = bytes > kLargeFrom ? kLargeStep : kSmallStep;
  return std::max<int64_t>(1, (bytes + step - 1) / step) * step;
}

void* device_malloc(int64_t bytes) {
  void* block = nullptr;
  const cudaError_t status = cudaMalloc(&block, static_cast<size_t>(bytes));
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // or the next launch would report it
    return nullptr;
  }
  BBB_CUDA(status);
  return block;
}

}  // namespace

MemoryPool::~MemoryPool() { free_blocks(); }

std::shared_ptr<engine::Storage> MemoryPool::allocate(int64_t bytes) {
  int64_t block_bytes = bytes <= kLargestBlock ? bucket_of(bytes) : bytes;
  const std::lock_guard lock(usage_->mutex);
  void* block = bytes <= kLargestBlock ? take(block_bytes) : nullptr;
  if (block == nullptr) {
    size_t free = 0, total = 0;
    BBB_CUDA(cudaMemGetInfo(&free, &total));
    throw Error(cat("out of GPU memory: ", bytes, " bytes requested, ", usage_->held_bytes,
                    " held by tensors, ", free, " free of ", total));
  }
  usage_->held_bytes += block_bytes;
  usage_->peak_bytes = std::max(usage_->peak_bytes, usage_->held_bytes);
  return std::make_shared<engine::Storage>(
      block, bytes,
      [pool = shared_from_this(), block, block_bytes] { pool->give_back(block, block_bytes); });
}

// A block of at least block_bytes, which becomes its true size; nullptr where there is none.
void* MemoryPool::take(int64_t& block_bytes) {
  const auto fit = cached_.lower_bound(block_bytes);
  if (fit != cached_.end() && fit->first - block_bytes <= std::max(block_bytes / 4, kSlackBytes)) {
    block_bytes = fit->first;
    void* const block = fit->second;
    cached_.erase(fit);
    return block;
  }
  void* block = device_malloc(block_bytes);
  if (block == nullptr && reclaim_ == Reclaim::OnPressure && !cached_.empty()) {
    free_blocks();
    block = device_malloc(block_bytes);
  }
  return block;
}

void MemoryPool::give_back(void* block, int64_t block_bytes) {
  const std::lock_guard lock(usage_->mutex);
  usage_->held_bytes -= block_bytes;
  // Before its equals: the block used last is taken first, and may still be in the cache.
  cached_.emplace_hint(cached_.lower_bound(block_bytes), block_bytes, block);
}

void MemoryPool::release_cached() {
  const std::lock_guard lock(usage_->mutex);
  if (reclaim_ == Reclaim::OnPressure) free_blocks();
}

int64_t MemoryPool::cached_bytes() const {
  const std::lock_guard lock(usage_->mutex);
  int64_t bytes = 0;
  for (const auto& [size, block] : cached_) bytes += size;
  return bytes;
}

// cudaFree waits for the kernels that still use a block. Its status is ignored: at exit the driver
// may be gone already, and the memory with it.
void MemoryPool::free_blocks() {
  for (const auto& [size, block] : cached_) cudaFree(block);
  cached_.clear();
  cudaGetLastError();
}

}  // namespace bbb::cuda
#endif
