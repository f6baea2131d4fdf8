// Chunks of device memory, with addresses that are never accessed.
#include "engine/chunks.h"

#include <catch2/catch.hpp>
#include <map>

#include "engine/rng.h"

namespace bbb::tests {
namespace {

using engine::Chunks;

char* const kSlab = reinterpret_cast<char*>(uintptr_t{1} << 40);
// void*: a failed check would print a char* as the text that it points at.
void* at(int64_t offset) { return kSlab + offset; }

}  // namespace

TEST_CASE("chunks: leftover and freed memory serves other sizes", "[chunks]") {
  Chunks chunks;
  CHECK(chunks.take(1) == nullptr);
  chunks.add(kSlab, 110);
  CHECK(chunks.take(40) == at(0));
  CHECK(chunks.take(40) == at(40));
  CHECK(chunks.take(40) == nullptr);
  CHECK(chunks.take(30) == at(80));
  CHECK(chunks.free_bytes() == 0);
  // Free neighbours merge, in whatever order they are returned.
  chunks.give_back(kSlab);
  chunks.give_back(kSlab + 80);
  CHECK(chunks.take(41) == nullptr);
  CHECK(chunks.remove_free_slabs().empty());
  chunks.give_back(kSlab + 40);
  CHECK(chunks.take(110) == at(0));
  chunks.give_back(kSlab);
  CHECK(chunks.remove_free_slabs() == std::vector<void*>{at(0)});
  CHECK(chunks.free_bytes() == 0);
  CHECK(chunks.take(1) == nullptr);
}

TEST_CASE("chunks: the smallest one that fits is split, and slabs do not merge", "[chunks]") {
  Chunks chunks;
  chunks.add(kSlab, 100);
  chunks.add(kSlab + 100, 50);  // adjacent, but another slab
  CHECK(chunks.take(50) == at(100));
  chunks.give_back(kSlab + 100);
  CHECK(chunks.take(120) == nullptr);
  CHECK(chunks.take(60) == at(0));
  CHECK(chunks.take(40) == at(60));
  chunks.give_back(kSlab + 60);
  CHECK(chunks.take(50) == at(100));
  CHECK(chunks.free_bytes() == 40);
}

TEST_CASE("chunks: random requests never overlap, and returned slabs are whole", "[chunks]") {
  engine::Rng rng(21);
  Chunks chunks;
  constexpr int64_t kSlabBytes = 1000, kSlabs = 3;
  for (int64_t i = 0; i < kSlabs; ++i) chunks.add(kSlab + i * kSlabBytes, kSlabBytes);
  std::map<char*, int64_t> taken;
  int64_t refused = 0;
  for (int i = 0; i < 5000; ++i) {
    if (rng.below(2) == 0 && !taken.empty()) {
      auto some = taken.begin();
      std::advance(some, rng.below(static_cast<int64_t>(taken.size())));
      chunks.give_back(some->first);
      taken.erase(some);
    } else {
      const int64_t bytes = 1 + rng.below(300);
      char* const chunk = static_cast<char*>(chunks.take(bytes));
      if (chunk == nullptr) {
        ++refused;
        continue;
      }
      const auto after = taken.lower_bound(chunk);
      REQUIRE((after == taken.end() || chunk + bytes <= after->first));
      REQUIRE(
          (after == taken.begin() || std::prev(after)->first + std::prev(after)->second <= chunk));
      REQUIRE((chunk - kSlab) / kSlabBytes == (chunk + bytes - 1 - kSlab) / kSlabBytes);
      taken.emplace(chunk, bytes);
    }
    int64_t held = 0;
    for (const auto& [chunk, bytes] : taken) held += bytes;
    REQUIRE(chunks.free_bytes() == kSlabs * kSlabBytes - held);
  }
  CHECK(refused > 0);
  for (const auto& [chunk, bytes] : taken) chunks.give_back(chunk);
  CHECK(chunks.remove_free_slabs().size() == kSlabs);
}

}  // namespace bbb::tests
