// The bit stream of format.md: hand-written rows, all bytes, every width.
#include "quant/pack.h"

#include <catch2/catch.hpp>
#include <numeric>
#include <vector>

#include "engine/rng.h"

namespace bbb::tests {
namespace {

using Bytes = std::vector<uint8_t>;

Bytes pack(const Bytes& codes, int bits) {
  const auto count = static_cast<int64_t>(codes.size());
  Bytes stream(static_cast<size_t>(quant::packed_bytes(count, bits)), 0xA5);
  quant::pack_codes(stream.data(), codes.data(), count, bits);
  return stream;
}

Bytes unpack(const Bytes& stream, int64_t count, int bits) {
  Bytes codes(static_cast<size_t>(count));
  quant::unpack_codes(codes.data(), stream.data(), count, bits);
  return codes;
}

TEST_CASE("packed rows have the layout of the format", "[pack]") {
  // Two bits: byte j holds codes 4j .. 4j + 3 from its low bits up.
  CHECK(pack({3, 0, 1, 2, 1}, 2) == Bytes{0b10010011, 0b00000001});
  CHECK(pack({0xA, 0x5, 0xF}, 4) == Bytes{0x5A, 0x0F});
  // Three bits: code 2 is bits 6, 7 and 8, across the first two bytes; code 5 across the next two.
  CHECK(pack({1, 2, 7, 0, 0, 4, 0, 5}, 3) == Bytes{0b11010001, 0b00000001, 0b10100010});
  CHECK(pack({0, 255, 7}, 8) == Bytes{0, 255, 7});
}

TEST_CASE("every byte unpacks to codes that pack to the same byte", "[pack]") {
  Bytes all(256);
  std::iota(all.begin(), all.end(), uint8_t{0});
  for (const int bits : {2, 4, 8}) {
    const int64_t count = 256 * 8 / bits;
    CHECK(pack(unpack(all, count, bits), bits) == all);
  }
  // Three bytes are eight 3-bit codes: each byte value in each of the three places.
  for (int place = 0; place < 3; ++place)
    for (int value = 0; value < 256; ++value) {
      Bytes stream = {0x5C, 0xA3, 0x36};
      stream[static_cast<size_t>(place)] = static_cast<uint8_t>(value);
      CHECK(pack(unpack(stream, 8, 3), 3) == stream);
    }
}

TEST_CASE("random codes round-trip at any length, tail bits zero", "[pack]") {
  engine::Rng rng(7);
  for (const int bits : {2, 3, 4, 8})
    for (const int64_t count : {1, 2, 3, 5, 7, 18, 31, 33, 576}) {
      CAPTURE(bits, count);
      Bytes codes(static_cast<size_t>(count));
      for (uint8_t& code : codes) code = static_cast<uint8_t>(rng.below(int64_t{1} << bits));
      const Bytes stream = pack(codes, bits);
      CHECK(unpack(stream, count, bits) == codes);
      const int used = static_cast<int>(count * bits % 8);
      if (used != 0) CHECK(stream.back() >> used == 0);
    }
}

TEST_CASE("row sizes are those of the format", "[pack]") {
  CHECK(quant::code_row_bytes(576, 2) == 144);
  CHECK(quant::code_row_bytes(576, 3) == 216);
  CHECK(quant::zero_row_bytes(576, 32, 2) == 5);  // 18 groups, 36 bits
  CHECK(quant::zero_row_bytes(1536, 32, 2) == 12);
  CHECK(quant::zero_row_bytes(576, 32, 8) == 18);
  CHECK(quant::zero_row_bytes(128, 128, 2) == 1);
}

}  // namespace
}  // namespace bbb::tests
