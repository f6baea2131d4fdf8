// Chunks: which parts of memory slabs are in use. Bookkeeping only: the memory is never touched.
//
// A request takes the smallest free chunk that is large enough and splits off the rest. A chunk
// that is given back merges with its free neighbours, so that memory of one size serves any size.
#pragma once

#include <cstdint>
#include <functional>
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

// The policy of a caching pool of device memory: how requests become blocks, and blocks slabs.
//
//   request        block size, a multiple of   new slab if no free chunk is large enough
//   up to 1 MiB    512 bytes                   2 MiB, shared
//   above 1 MiB    2 MiB                       the block's size
class ChunkPool {
 public:
  static int64_t block_bytes(int64_t bytes);
  // slab(bytes) allocates a new slab, or returns nullptr; then take() returns nullptr too.
  void* take(int64_t block_bytes, const std::function<void*(int64_t bytes)>& slab);
  void give_back(void* block, int64_t block_bytes);
  std::vector<void*> remove_free_slabs();
  int64_t free_bytes() const { return small_.free_bytes() + large_.free_bytes(); }

 private:
  Chunks& chunks_for(int64_t block_bytes);

  Chunks small_, large_;
};

}  // namespace bbb::engine
