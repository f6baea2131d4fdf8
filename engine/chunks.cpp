#include "engine/chunks.h"

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

}  // namespace bbb::engine
