// Checksums for the records of a run: XXH3 in chunks. Threads can share the work, and a file that
// is written piece by piece gets the same checksum.
//
//   checksum = XXH3(XXH3(chunk 0), XXH3(chunk 1), ..)   chunks of kChecksumChunk bytes, the last
//   shorter
//
// They detect accidents, not forgeries.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace bbb::data {

using Bytes = std::span<const uint8_t>;

constexpr int64_t kChecksumChunk = int64_t{4} << 20;  // bytes

uint64_t checksum64(const void* data, int64_t bytes);
inline uint64_t checksum64(const std::string& text) {
  return checksum64(text.data(), static_cast<int64_t>(text.size()));
}
// One checksum per part. Threads share the chunks of all parts: it runs at the speed of memory.
std::vector<uint64_t> checksums(const std::vector<Bytes>& parts);

std::string hex(uint64_t checksum);  // 16 digits

// The same checksum of bytes that are added piece by piece.
class Checksum {
 public:
  Checksum();
  ~Checksum();
  void add(const void* data, int64_t bytes);
  uint64_t value() const;  // of everything added so far

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace bbb::data
