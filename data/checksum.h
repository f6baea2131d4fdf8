// Checksums for the records of a run: XXH3 in chunks, so that threads share the work and a file
// that is written piece by piece gets the same number.
//
//   checksum = XXH3(XXH3(chunk 0), XXH3(chunk 1), ..)   chunks of kChecksumChunk bytes, the last
//   shorter
//
// They tell accidents, not forgeries.
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
// One for each part, at the speed of memory: threads share all chunks.
std::vector<uint64_t> checksums(const std::vector<Bytes>& parts);

std::string hex(uint64_t checksum);  // 16 digits

// The same, of bytes that come one after another.
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
