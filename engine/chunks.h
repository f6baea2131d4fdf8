// Chunks: which parts of memory slabs are in use. Bookkeeping only: the memory is never touched.
//
// A request takes the smallest free chunk that is large enough and splits off the rest. A chunk
// that is given back merges with its free neighbours, so that memory of one size serves any size.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <utility>
#include <vector>

namespace bbb::engine {

class Chunks {
 public:
  void add(void* slab, int64_t bytes);  // a new slab, all free
  void* take(int64_t bytes);            // nullptr if no free chunk is large enough
  void give_back(void* chunk);
  // Removes the slabs with no chunk in use and returns them; the caller now owns them.
  std::vector<void*> remove_free_slabs();
  int64_t free_bytes() const;

 private:
  struct Chunk {
    int64_t bytes;
    bool begins_slab;
    bool free;
  };
  using Place = std::map<char*, Chunk>::iterator;

  void set_free(Place place);

  std::map<char*, Chunk> chunks_;
  std::set<std::pair<int64_t, char*>> free_;  // by size, then by address
};

}  // namespace bbb::engine
