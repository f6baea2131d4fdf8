// E4M3 against a table built from its definition, at every code, midpoint and neighbour.
#include "quant/e4m3.h"

#include <catch2/catch.hpp>
#include <cmath>
#include <limits>
#include <vector>

namespace bbb::tests {
namespace {

using quant::e4m3_decode;
using quant::e4m3_encode;
using quant::ScaleRounding;

// (-1)^s 2^(E - 7) (1 + m / 8), or 2^-6 m / 8 where E = 0; written from the OCP specification.
double defined_value(int code) {
  const int exponent = (code >> 3) & 15, mantissa = code & 7;
  if (exponent == 15 && mantissa == 7) return std::numeric_limits<double>::quiet_NaN();
  const double magnitude = exponent == 0 ? std::ldexp(mantissa / 8.0, -6)
                                         : std::ldexp(1.0 + mantissa / 8.0, exponent - 7);
  return code & 0x80 ? -magnitude : magnitude;
}

constexpr int kLargest = 0x7E;

template <typename Real>
void check_between_codes() {
  const Real infinity = std::numeric_limits<Real>::infinity();
  for (int code = 0; code < kLargest; ++code) {
    const Real low = static_cast<Real>(defined_value(code));
    const Real high = static_cast<Real>(defined_value(code + 1));
    const Real middle = (low + high) / 2;  // exact
    const int even = code % 2 == 0 ? code : code + 1;
    CAPTURE(code, low, middle, high);
    for (const int sign : {0, 0x80}) {
      const Real s = sign ? -1 : 1;
      CHECK(e4m3_encode(s * std::nextafter(low, infinity)) == (sign | code));
      CHECK(e4m3_encode(s * std::nextafter(middle, Real(0))) == (sign | code));
      CHECK(e4m3_encode(s * middle) == (sign | even));
      CHECK(e4m3_encode(s * std::nextafter(middle, infinity)) == (sign | (code + 1)));
      CHECK(e4m3_encode(s * std::nextafter(high, Real(0))) == (sign | (code + 1)));
    }
    CHECK(e4m3_encode(std::nextafter(low, infinity), ScaleRounding::Up) == code + 1);
    CHECK(e4m3_encode(middle, ScaleRounding::Up) == code + 1);
    CHECK(e4m3_encode(high, ScaleRounding::Up) == code + 1);
  }
}

TEST_CASE("every E4M3 code decodes to its value, which encodes back to it", "[e4m3]") {
  for (int code = 0; code < 256; ++code) {
    CAPTURE(code);
    const double expected = defined_value(code);
    const float value = e4m3_decode(static_cast<uint8_t>(code));
    if (std::isnan(expected)) {
      CHECK(std::isnan(value));
    } else {
      CHECK(value == expected);
      CHECK(std::signbit(value) == std::signbit(expected));
    }
    CHECK(e4m3_encode(value) == code);
    CHECK(e4m3_encode(static_cast<double>(value)) == code);
    CHECK(e4m3_encode(value, ScaleRounding::Up) == code);
  }
  CHECK(e4m3_decode(kLargest) == 448.0f);
  CHECK(e4m3_decode(0x08) == 0x1p-6f);
  CHECK(e4m3_decode(0x01) == 0x1p-9f);
}

TEST_CASE("E4M3 rounds to nearest even, or up, at every midpoint", "[e4m3]") {
  check_between_codes<float>();
  check_between_codes<double>();
}

TEST_CASE("one Newton step rounds every scale's reciprocal to nearest", "[e4m3]") {
  const float infinity = std::numeric_limits<float>::infinity();
  for (int code = 1; code <= kLargest; ++code) {
    const float value = e4m3_decode(static_cast<uint8_t>(code)), want = 1.0f / value;
    float low = want, high = want;
    for (int ulps = 0; ulps <= 4; ++ulps) {
      CAPTURE(code, ulps);
      CHECK(quant::e4m3_refine_reciprocal(value, low) == want);
      CHECK(quant::e4m3_refine_reciprocal(value, high) == want);
      low = std::nextafter(low, 0.0f), high = std::nextafter(high, infinity);
    }
  }
}

TEST_CASE("E4M3 saturates at 448, keeps NaN and the sign of zero", "[e4m3]") {
  const float infinity = std::numeric_limits<float>::infinity();
  for (const float x : {448.0f, 464.0f, 480.0f, 1e30f, infinity}) {
    CHECK(e4m3_encode(x) == kLargest);
    CHECK(e4m3_encode(-x) == (0x80 | kLargest));
    CHECK(e4m3_encode(x, ScaleRounding::Up) == kLargest);
  }
  CHECK(e4m3_encode(std::numeric_limits<float>::quiet_NaN()) == 0x7F);
  CHECK(e4m3_encode(-0.0f) == 0x80);
  CHECK(e4m3_encode(std::numeric_limits<float>::denorm_min()) == 0);
  CHECK(e4m3_encode(std::numeric_limits<float>::denorm_min(), ScaleRounding::Up) == 1);
  CHECK(e4m3_encode(std::numeric_limits<double>::denorm_min(), ScaleRounding::Up) == 1);
}

}  // namespace
}  // namespace bbb::tests
