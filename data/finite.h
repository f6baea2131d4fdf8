// Scans a file's raw bytes for weights that are NaN, infinite or beyond BF16's range.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "data/half.h"
#include "engine/tensor.h"
#include "quant/e4m3.h"

namespace bbb::data {

// How a tensor is stored: in blocks of `elements` weights, `bytes` bytes each.
struct BlockType {
  int64_t elements;
  int64_t bytes;
  void (*expand)(float* out, const uint8_t* p, int64_t blocks);
  bool (*finite)(const uint8_t* p, int64_t blocks);  // whether is_weight() holds for every weight
};

// Whether a value is finite and stays so when rounded to BF16, the type of tables and activations.
inline bool is_weight(double value) { return std::fabs(value) < 0x1.FFp127; }

// Blocks of one scalar. Its bits without the sign order it by magnitude; is_weight() holds below
// kLimit.
template <typename Bits, Bits kLimit, float (*kValue)(Bits)>
constexpr BlockType scalar_blocks() {
  constexpr int64_t kBytes = sizeof(Bits);
  return {1, kBytes,
          [](float* out, const uint8_t* p, int64_t n) {
            for (int64_t i = 0; i < n; ++i) out[i] = kValue(load_as<Bits>(p + i * kBytes));
          },
          [](const uint8_t* p, int64_t n) {
            constexpr Bits kMagnitude = static_cast<Bits>(~Bits{0}) >> 1;
            Bits bad = 0;
            for (int64_t i = 0; i < n; ++i)
              bad |= (load_as<Bits>(p + i * kBytes) & kMagnitude) >= kLimit;
            return bad == 0;
          }};
}
inline float double_to_float(uint64_t bits) {
  return static_cast<float>(std::bit_cast<double>(bits));
}
inline constexpr BlockType
    kF64Blocks = scalar_blocks<uint64_t, 0x47EFF00000000000, double_to_float>(),  // 0x1.FFp127
    kF32Blocks = scalar_blocks<uint32_t, 0x7F7F8000, float_of_bits>(),            // 0x1.FFp127
    kF16Blocks = scalar_blocks<uint16_t, 0x7C00, half_to_float>(),
    kBf16Blocks = scalar_blocks<uint16_t, 0x7F80, bf16_to_float>(),
    kE4m3Blocks = scalar_blocks<uint8_t, quant::kE4m3Nan, quant::e4m3_decode>();

struct RawWeight {
  std::string name;
  engine::Shape shape;  // row-major
  const uint8_t* data;
  BlockType type;
};

// Throws if is_weight() does not hold for some weight, and names the first tensor in this order and
// the first position in it: "PATH: NAME[3, 17] is nan". Reads every byte once, on all cores.
void check_finite(const std::vector<RawWeight>& weights, const std::string& path);

}  // namespace bbb::data
