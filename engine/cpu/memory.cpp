#include "engine/cpu/memory.h"

#include <sys/mman.h>
#include <sys/sysinfo.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <fstream>

#include "engine/cpu/cgroup.h"

namespace bbb::engine {
namespace {

// A request of at least this size is refused if the machine has less available. Otherwise the
// system would grant it and kill the process later.
constexpr int64_t kCheckedBytes = int64_t{64} << 20;

// Blocks of at least kHugePage ask for pages of this size, and so do slabs, from which blocks of at
// least kSlabbed are cut (chunks.h). Two cores of an EPYC in a virtual machine read such pages at
// 56 to 61 GB/s, and pages of 4 KiB at 33 to 41. Advice: without such pages nothing else changes.
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

HostMemory::~HostMemory() { free_cached(); }

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
    block = is_slabbed(size) ? take_slabbed(size) : take_single(size);
    if (block == nullptr) {
      free_cached();
      throw Error(cat("out of memory: a tensor of ", bytes, " bytes, with ", available_bytes(),
                      " bytes available"));
    }
    held_bytes_ += size;
    peak_bytes_ = std::max(peak_bytes_, held_bytes_);
  }
  return std::make_shared<Storage>(
      block, bytes, [self = shared_from_this(), block, size] { self->release(block, size); });
}

void* HostMemory::take_slabbed(int64_t size) {
  if (void* const block = slabs_.take(size)) return block;
  void* const slab = aligned_block(kSlab);
  if (slab == nullptr) return nullptr;
  slabs_.add(slab, kSlab);
  return slabs_.take(size);
}

void* HostMemory::take_single(int64_t size) {
  const auto it = singles_.find(size);
  if (it != singles_.end() && !it->second.empty()) {
    void* const block = it->second.back();
    it->second.pop_back();
    single_bytes_ -= size;
    return block;
  }
  if (size >= kCheckedBytes && size > available_bytes()) {
    free_cached();
    if (size > available_bytes()) return nullptr;
  }
  return aligned_block(size);
}

void HostMemory::release(void* block, int64_t block_bytes) {
  static const auto cap = static_cast<int64_t>(kCacheShare * static_cast<double>(total_bytes()));
  const std::lock_guard lock(mutex_);
  held_bytes_ -= block_bytes;
  if (is_slabbed(block_bytes)) {
    slabs_.give_back(block);
  } else if (single_bytes_ + block_bytes > cap) {
    std::free(block);
  } else {
    singles_[block_bytes].push_back(block);
    single_bytes_ += block_bytes;
  }
}

void HostMemory::drop_cache() {
  const std::lock_guard lock(mutex_);
  free_cached();
}

void HostMemory::free_cached() {
  for (void* slab : slabs_.remove_free_slabs()) std::free(slab);
  for (const auto& [size, blocks] : singles_)
    for (void* block : blocks) std::free(block);
  singles_.clear();
  single_bytes_ = 0;
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
  return single_bytes_ + slabs_.free_bytes();
}

int64_t HostMemory::total_bytes() {
  struct sysinfo info {};
  if (sysinfo(&info) != 0) return 0;
  return std::min(cgroup_memory().limit_bytes,
                  static_cast<int64_t>(info.totalram) * static_cast<int64_t>(info.mem_unit));
}

int64_t HostMemory::available_bytes() {
  std::ifstream meminfo("/proc/meminfo");
  std::string key, unit;
  int64_t kib = 0;
  while (meminfo >> key >> kib) {
    if (key == "MemAvailable:") return std::min(kib * 1024, cgroup_memory().room_bytes);
    std::getline(meminfo, unit);
  }
  return total_bytes();
}

}  // namespace bbb::engine
