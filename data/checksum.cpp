#include "data/checksum.h"

#include <algorithm>
#include <cstdio>

#include "engine/cpu/thread_pool.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace bbb::data {
namespace {

uint64_t join(const std::vector<uint64_t>& chunks) {
  return XXH3_64bits(chunks.data(), chunks.size() * sizeof(uint64_t));
}

}  // namespace

std::vector<uint64_t> checksums(const std::vector<Bytes>& parts) {
  struct Chunk {
    Bytes bytes;
    uint64_t* sum;
  };
  std::vector<std::vector<uint64_t>> sums;  // by part, then by chunk
  std::vector<Chunk> chunks;
  const size_t chunk = static_cast<size_t>(kChecksumChunk);
  for (const Bytes& part : parts) {
    std::vector<uint64_t>& own = sums.emplace_back((part.size() + chunk - 1) / chunk);
    for (size_t i = 0; i < own.size(); ++i)
      chunks.push_back(
          {part.subspan(i * chunk, std::min(chunk, part.size() - i * chunk)), &own[i]});
  }
  const auto work = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Chunk& c = chunks[static_cast<size_t>(i)];
      *c.sum = XXH3_64bits(c.bytes.data(), c.bytes.size());
    }
  };
  int64_t bytes = 0;
  for (const Bytes& part : parts) bytes += static_cast<int64_t>(part.size());
  engine::ThreadPool(engine::threads_for(bytes, kChecksumChunk))
      .parallel_for(static_cast<int64_t>(chunks.size()), 1, work);
  std::vector<uint64_t> result;
  for (const std::vector<uint64_t>& own : sums) result.push_back(join(own));
  return result;
}

uint64_t checksum64(const void* data, int64_t bytes) {
  return checksums({Bytes(static_cast<const uint8_t*>(data), static_cast<size_t>(bytes))})[0];
}

std::string hex(uint64_t checksum) {
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(checksum));
  return text;
}

struct Checksum::Impl {
  std::vector<uint64_t> chunks;  // checksums of the complete chunks
  XXH3_state_t state;            // of the incomplete chunk
  int64_t bytes = 0;             // in the incomplete chunk
};

Checksum::Checksum() : impl_(std::make_unique<Impl>()) { XXH3_64bits_reset(&impl_->state); }
Checksum::~Checksum() = default;

void Checksum::add(const void* data, int64_t bytes) {
  const uint8_t* p = static_cast<const uint8_t*>(data);
  while (bytes > 0) {
    const int64_t taken = std::min(bytes, kChecksumChunk - impl_->bytes);
    XXH3_64bits_update(&impl_->state, p, static_cast<size_t>(taken));
    p += taken;
    bytes -= taken;
    impl_->bytes += taken;
    if (impl_->bytes < kChecksumChunk) continue;
    impl_->chunks.push_back(XXH3_64bits_digest(&impl_->state));
    XXH3_64bits_reset(&impl_->state);
    impl_->bytes = 0;
  }
}

uint64_t Checksum::value() const {
  std::vector<uint64_t> chunks = impl_->chunks;
  if (impl_->bytes > 0) chunks.push_back(XXH3_64bits_digest(&impl_->state));
  return join(chunks);
}

}  // namespace bbb::data
