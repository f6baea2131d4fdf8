// WeightGrid: the quantization grid, and how to round on it.
#pragma once

namespace bbb::quant {

struct WeightGrid {
  int bits = 2;    // 2, 3, 4 or 8; kNoQuantizer where an op says so
  int group = 32;  // input features that share a scale and a zero point: 32, 64 or 128

  bool operator==(const WeightGrid&) const = default;
};

constexpr int kNoQuantizer = 16;  // bits of a weight that trains in full precision

enum class Rounding {
  Nearest,   // round(x) = floor(x + 1/2)
  Identity,  // no rounding: for gradient checks, which must not difference through a step
};

}  // namespace bbb::quant
