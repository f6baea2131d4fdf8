#include "engine/chunks.h"

#include <algorithm>
#include <iterator>

#include "quant/check.h"

namespace bbb::engine {

void Chunks::add(void* slab, int64_t bytes) {
  const auto [place, added] = chunks_.emplace(static_cast<char*>(slab), Chunk{bytes, true, false});
  BBB_ASSERT(added && bytes > 0);
  set_free(place);
}

void Chunks::set_free(Place place) {
  place->second.free = true;
  free_.emplace(place->second.bytes, place->first);
}

void* Chunks::take(int64_t bytes) {
  BBB_ASSERT(bytes > 0);
  const auto fit = free_.lower_bound({bytes, nullptr});
  if (fit == free_.end()) return nullptr;
  const Place place = chunks_.find(fit->second);
  free_.erase(fit);
  place->second.free = false;
  const int64_t rest = place->second.bytes - bytes;
  place->second.bytes = bytes;
  if (rest > 0)
    set_free(
        chunks_.emplace_hint(std::next(place), place->first + bytes, Chunk{rest, false, false}));
  return place->first;
}

void Chunks::give_back(void* chunk) {
  Place place = chunks_.find(static_cast<char*>(chunk));
  BBB_ASSERT(place != chunks_.end() && !place->second.free);
  const auto absorb_next = [this](Place into) {
    const Place next = std::next(into);
    if (next == chunks_.end() || next->second.begins_slab || !next->second.free) return;
    free_.erase({next->second.bytes, next->first});
    into->second.bytes += next->second.bytes;
    chunks_.erase(next);
  };
  absorb_next(place);
  set_free(place);
  if (place->second.begins_slab) return;
  const Place before = std::prev(place);
  if (!before->second.free) return;
  free_.erase({before->second.bytes, before->first});
  absorb_next(before);
  set_free(before);
}

std::vector<void*> Chunks::remove_free_slabs() {
  std::vector<void*> slabs;
  for (Place place = chunks_.begin(); place != chunks_.end();) {
    const Place next = std::next(place);
    const bool ends_slab = next == chunks_.end() || next->second.begins_slab;
    if (place->second.begins_slab && ends_slab && place->second.free) {
      slabs.push_back(place->first);
      free_.erase({place->second.bytes, place->first});
      chunks_.erase(place);
    }
    place = next;
  }
  return slabs;
}

int64_t Chunks::free_bytes() const {
  int64_t bytes = 0;
  for (const auto& [size, chunk] : free_) bytes += size;
  return bytes;
}

static constexpr int64_t kSmallStep = 512;
static constexpr int64_t kLargeStep = int64_t{2} << 20;
static constexpr int64_t kLargeFrom = int64_t{1} << 20;

int64_t ChunkPool::block_bytes(int64_t bytes) {
  const int64_t step = bytes > kLargeFrom ? kLargeStep : kSmallStep;
  return std::max<int64_t>(1, (bytes + step - 1) / step) * step;
}

Chunks& ChunkPool::chunks_for(int64_t block_bytes) {
  return block_bytes > kLargeFrom ? large_ : small_;
}

void* ChunkPool::take(int64_t block_bytes, const std::function<void*(int64_t bytes)>& slab) {
  Chunks& chunks = chunks_for(block_bytes);
  if (void* const block = chunks.take(block_bytes)) return block;
  const int64_t slab_bytes = std::max(block_bytes, kLargeStep);
  void* const added = slab(slab_bytes);
  if (added == nullptr) return nullptr;
  chunks.add(added, slab_bytes);
  return chunks.take(block_bytes);
}

void ChunkPool::give_back(void* block, int64_t block_bytes) {
  chunks_for(block_bytes).give_back(block);
}

std::vector<void*> ChunkPool::remove_free_slabs() {
  std::vector<void*> slabs = small_.remove_free_slabs();
  for (void* slab : large_.remove_free_slabs()) slabs.push_back(slab);
  return slabs;
}

}  // namespace bbb::engine
