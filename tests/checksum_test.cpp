// Checksums: equal for the same bytes, in whatever pieces they come; different for other bytes.
#include "data/checksum.h"

#include <algorithm>
#include <catch2/catch.hpp>

#include "engine/cpu/thread_pool.h"
#include "engine/rng.h"

namespace bbb::tests {
namespace {

using data::kChecksumChunk;

std::vector<uint8_t> random_bytes(int64_t count) {
  engine::Rng rng(3);
  std::vector<uint8_t> bytes(static_cast<size_t>(count));
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(rng.next() >> 56);
  return bytes;
}

uint64_t of(const std::vector<uint8_t>& bytes) {
  return data::checksum64(bytes.data(), static_cast<int64_t>(bytes.size()));
}

}  // namespace

TEST_CASE("checksum: fixed values, so that old records stay valid") {
  CHECK(data::hex(data::checksum64("")) == "2d06800538d394c2");  // XXH3 of no bytes
  CHECK(data::hex(0x1f) == "000000000000001f");
  // Two chunks and a rest; expected value from another implementation of XXH3.
  std::vector<uint8_t> bytes(static_cast<size_t>(2 * kChecksumChunk + 5));
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<uint8_t>(i * 31 + (i >> 8));
  CHECK(data::hex(of(bytes)) == "f1e6d0951bb883f7");
}

TEST_CASE("checksum: piece by piece, whole, and together with others") {
  const std::vector<uint8_t> bytes = random_bytes(2 * kChecksumChunk + 5);
  std::vector<data::Bytes> parts;
  std::vector<uint64_t> expected;
  for (const int64_t size : {int64_t{0}, int64_t{1}, kChecksumChunk - 1, kChecksumChunk,
                             kChecksumChunk + 1, 2 * kChecksumChunk, 2 * kChecksumChunk + 5}) {
    CAPTURE(size);
    for (const int64_t piece : {int64_t{100'001}, kChecksumChunk, 3 * kChecksumChunk}) {
      data::Checksum sum;
      for (int64_t at = 0; at < size; at += piece)
        sum.add(bytes.data() + at, std::min(piece, size - at));
      CHECK(sum.value() == data::checksum64(bytes.data(), size));
    }
    parts.push_back(data::Bytes(bytes).first(static_cast<size_t>(size)));
    expected.push_back(data::checksum64(bytes.data(), size));
  }
  CHECK(data::checksums(parts) == expected);
}

TEST_CASE("checksum: no more threads than chunks") {
  CHECK(engine::threads_for(0, kChecksumChunk) == 1);
  CHECK(engine::threads_for(kChecksumChunk, kChecksumChunk) == 1);
  CHECK(engine::threads_for(kChecksumChunk + 1, kChecksumChunk) <= 2);
  CHECK(engine::threads_for(INT64_MAX, 1) == engine::ThreadPool(0).threads());
}

TEST_CASE("checksum: every byte and its position count") {
  std::vector<uint8_t> bytes = random_bytes(2 * kChecksumChunk + 5);
  const uint64_t before = of(bytes);
  for (const int64_t at : {int64_t{0}, kChecksumChunk - 1, kChecksumChunk, 2 * kChecksumChunk,
                           2 * kChecksumChunk + 4}) {
    uint8_t& byte = bytes[static_cast<size_t>(at)];
    byte ^= 1;
    CHECK(of(bytes) != before);
    byte ^= 1;
  }
  std::rotate(bytes.begin(), bytes.begin() + kChecksumChunk, bytes.end());
  CHECK(of(bytes) != before);
}

}  // namespace bbb::tests
