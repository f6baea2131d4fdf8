// The grids of weights and activations, and how to round on them.
#pragma once

namespace bbb::quant {

// How the range of a group is found. MinMax: its minimum and maximum. Search: those times the ratio
// of least squared error (numerics.md section 2).
enum class RangeRule { MinMax, Search };

// Nested codes read at fewer bits: at the middle of their bin, or at its lower end.
enum class NestedDequant { Middle, Floor };

// The values that codes stand for. MinMax: a scale and a zero point a group. Seq: a scale a group,
// levels at odd halves of it on both sides of 0 (numerics.md section 6). Lc: an affine map over
// vectors of four, between Hadamard transforms (quant/lc.h); 2 bits.
enum class Levels { MinMax, Seq, Lc };

struct WeightGrid {
  int bits = 2;    // 2, 3, 4 or 8; kNoQuantizer where an op says so
  int group = 32;  // input features that share a scale and a zero point: 32, 64 or 128
  // Nested codes have 8 bits, of which a load reads the top `bits`. The scales and zero points are
  // those of 8 bits.
  bool nested = false;
  NestedDequant dequant = NestedDequant::Middle;
  Levels levels = Levels::MinMax;

  bool operator==(const WeightGrid&) const = default;
};

// The weights that take no gradient through the rounding. Clip: those whose code the clamp moves,
// so that they are more than half a step from their level. All: none. Trust: those more than a
// distance T from their level.
enum class Ste { Clip, All, Trust };

// How training quantizes weights: MinMax or Seq, and the straight-through estimator.
struct WeightRule {
  Levels levels = Levels::MinMax;
  Ste ste = Ste::Clip;
  float trust = 1;  // T of Trust, in half steps

  bool operator==(const WeightRule&) const = default;
};

// The activations that enter a linear.
struct InputGrid {
  int bits = 16;     // 16: they are not quantized
  int outliers = 0;  // channels of largest RMS, at 8 bits in groups of their own, first in order
  RangeRule range = RangeRule::MinMax;
  bool hadamard = false;  // groups that hold single channels alone are rotated

  bool operator==(const InputGrid&) const = default;
};

// The side of a product that the two copies of a split channel halve.
enum class SplitSide { Weight, Activation };

constexpr int kNoQuantizer = 16;  // bits of a weight that trains in full precision
constexpr int kNestedBits = 8;    // of nested codes
constexpr int kOutlierBits = 8;   // of the activations of outlier channels
constexpr int kLargestGroup = 128;

enum class Rounding {
  Nearest,   // round(x) = floor(x + 1/2)
  Identity,  // no rounding: for gradient checks, which must not difference through a step
};

}  // namespace bbb::quant
