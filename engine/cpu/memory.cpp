#include "engine/cpu/memory.h"

#include <sys/mman.h>
#include <sys/sysinfo.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <fstream>

namespace bbb::engine {
namespace {

// A request of at least this size is refused if the machine has less available. Otherwise the
// system would grant it and kill the process later.
constexpr int64_t kCheckedBytes = int64_t{64} << 20;

// Blocks of at least kHugePage ask for pages of this size, and so do slabs, from which blocks of at
// least kSlabbed are cut. Two cores of an EPYC in a virtual machine read such pages at 56 to 61
// GB/s, and pages of 4 KiB at 33 to 41. Advice: without such pages nothing else changes.
constexpr int64_t kHugePage = int64_t{2} << 20, kSlabbed = int64_t{32} << 10;
constexpr int64_t kSlab = int64_t{16} << 20;

bool is_slabbed(int64_t size) { return size >= kSlabbed && size < kHugePage; }

void* aligned_block(int64_t size) {
  const bool huge = size >= kHugePage;
  void* const block =
      std::aligned_alloc(static_cast<size_t>(huge ? kHugePage : 64), static_cast<size_t>(size));
  if (huge && block != nullptr) madvise(block, static_cast<size_t>(size), MADV_HUGEPAGE);
  return block;
}

}  // namespace

HostMemory::~HostMemory() {
  drop_cache();
  for (void* slab : slabs_) std::free(slab);
}

int64_t HostMemory::block_bytes(int64_t bytes) {
  const auto size = static_cast<uint64_t>(std::max<int64_t>(bytes, 1));
  const uint64_t step = std::max<uint64_t>(64, std::bit_floor(size) / 8);
  return static_cast<int64_t>((size + step - 1) / step * step);
}

std::shared_ptr<Storage> HostMemory::allocate(int64_t bytes) {
  const int64_t size = block_bytes(bytes);
  void* block = nullptr;
  {
    const std::lock_guard lock(mutex_);
    const auto it = free_.find(size);
    if (it != free_.end() && !it->second.empty()) {
      block = it->second.back();
      it->second.pop_back();
      cached_bytes_ -= size;
    } else {
      if (size >= kCheckedBytes && size > available_bytes()) drop_cache();
      if (size < kCheckedBytes || size <= available_bytes()) block = new_block(size);
      if (block == nullptr) {
        drop_cache();
        throw Error(cat("out of memory: a tensor of ", bytes, " bytes, with ", available_bytes(),
                        " bytes available"));
      }
    }
    held_bytes_ += size;
    peak_bytes_ = std::max(peak_bytes_, held_bytes_);
  }
  return std::make_shared<Storage>(
      block, bytes, [self = shared_from_this(), block, size] { self->release(block, size); });
}

void HostMemory::release(void* block, int64_t block_bytes) {
  static const auto cap = static_cast<int64_t>(kCacheShare * static_cast<double>(total_bytes()));
  const std::lock_guard lock(mutex_);
  held_bytes_ -= block_bytes;
  if (!is_slabbed(block_bytes) && cached_bytes_ + block_bytes > cap) {
    std::free(block);
    return;
  }
  free_[block_bytes].push_back(block);
  cached_bytes_ += block_bytes;
}

void* HostMemory::new_block(int64_t size) {
  if (!is_slabbed(size)) return aligned_block(size);
  if (slabs_.empty() || slab_used_bytes_ + size > kSlab) {
    void* const slab = aligned_block(kSlab);
    if (slab == nullptr) return nullptr;
    slabs_.push_back(slab);
    slab_used_bytes_ = 0;
  }
  void* const block = static_cast<uint8_t*>(slabs_.back()) + slab_used_bytes_;
  slab_used_bytes_ += size;
  return block;
}

void HostMemory::drop_cache() {
  for (auto& [size, blocks] : free_) {
    if (is_slabbed(size)) continue;
    for (void* block : blocks) std::free(block);
    cached_bytes_ -= size * static_cast<int64_t>(blocks.size());
    blocks.clear();
  }
}

int64_t HostMemory::peak_bytes() const {
  const std::lock_guard lock(mutex_);
  return peak_bytes_;
}

void HostMemory::reset_peak() {
  const std::lock_guard lock(mutex_);
  peak_bytes_ = held_bytes_;
}

int64_t HostMemory::cached_bytes() const {
  const std::lock_guard lock(mutex_);
  return cached_bytes_;
}

int64_t HostMemory::total_bytes() {
  struct sysinfo info {};
  if (sysinfo(&info) != 0) return 0;
  return static_cast<int64_t>(info.totalram) * static_cast<int64_t>(info.mem_unit);
}

int64_t HostMemory::available_bytes() {
  std::ifstream meminfo("/proc/meminfo");
  std::string key, unit;
  int64_t kib = 0;
  while (meminfo >> key >> kib) {
    if (key == "MemAvailable:") return kib * 1024;
    std::getline(meminfo, unit);
  }
  return total_bytes();
}

}  // namespace bbb::engine
