// Chunks: which parts of memory slabs are in use. It only keeps the books and never touches the
// memory.
//
// A request takes the smallest free chunk that is large enough and cuts it to size. A chunk given
// back merges with its free neighbours, so memory of one size serves every other.
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
  void add(void* slab, int64_t bytes);  // all of it free
  void* take(int64_t bytes);            // nullptr if no free chunk is large enough
  void give_back(void* chunk);
  // The slabs with no chunk in use; they belong to the caller from here on.
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

// The policy of a caching pool of device memory: how requests become blocks, and blocks slabs. A
// request is rounded up to a block: to 512 bytes, above 1 MiB to 2 MiB. Blocks of up to 1 MiB share
// slabs of 2 MiB; a larger block without a free chunk gets a slab of its own size.
class ChunkPool {
 public:
  static int64_t block_bytes(int64_t bytes);
  // `slab` gives a new slab of so many bytes, or nullptr. nullptr where it does.
  void* take(int64_t block_bytes, const std::function<void*(int64_t bytes)>& slab);
  void give_back(void* block, int64_t block_bytes);
  std::vector<void*> remove_free_slabs();
  int64_t free_bytes() const { return small_.free_bytes() + large_.free_bytes(); }

 private:
  Chunks& chunks_for(int64_t block_bytes);

  Chunks small_, large_;
};

}  // namespace bbb::engine
