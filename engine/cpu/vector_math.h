// Loops that the compiler vectorizes without fast-math: a branch-free exponential, and reductions
// over a fixed number of lanes, so that the order of a sum does not depend on the machine.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "quant/hd.h"

namespace bbb::engine {

// e^x within 2 ulp. x = n ln 2 + r with |r| <= ln 2 / 2; e^r is its Taylor polynomial of degree 7
// (remainder 2^-27 of e^r); 2^n is made from bits, as two factors so that n = 128 does not
// overflow.
// Results below the smallest normal are 0. The same bits on every device: no product that is added
// to is left to the compiler to fuse.
BBB_HD float vector_exp(float x) {
  constexpr float kLowest = -87.33654f, kHighest = 88.72283f;  // ln of the smallest normal, FLT_MAX
  constexpr float kMagic = 12582912.0f;                        // 1.5 * 2^23: adding it rounds
  const float bounded = x < kLowest ? kLowest : (x > kHighest ? kHighest : x);
  const float n = std::fma(bounded, 1.44269504f, kMagic) - kMagic;
  float r = std::fma(n, -0.693145752f, bounded);  // ln 2 in two parts
  r = std::fma(n, -1.42860677e-6f, r);
  float p = 1.0f / 5040;
  p = std::fma(p, r, 1.0f / 720);
  p = std::fma(p, r, 1.0f / 120);
  p = std::fma(p, r, 1.0f / 24);
  p = std::fma(p, r, 1.0f / 6);
  p = std::fma(p, r, 0.5f);
  p = std::fma(p, r, 1.0f);
  p = std::fma(p, r, 1.0f);
  const int32_t whole = static_cast<int32_t>(n), half = whole >> 1;
  const float low = std::bit_cast<float>((half + 127) << 23);
  const float high = std::bit_cast<float>((whole - half + 127) << 23);
  const float y = p * low * high;
  return x < kLowest ? 0.0f : (x > kHighest ? std::numeric_limits<float>::infinity() : y);
}

inline double vector_exp(double x) { return std::exp(x); }

// sum of f(i) over [0, n): lane l adds i = l, l + kLanes, ...; then the lanes are added by halves,
// and the last n % kLanes terms in order. T is a number, or a structure of numbers with a +=.
template <typename T, typename F>
T lane_sum(int64_t n, const F& f) {
  constexpr int kLanes = 64 / sizeof(T) * 2;
  T lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) lanes[l] += f(i + l);
#ifndef __CUDACC__  // nvcc does not know the pragma
#pragma GCC unroll 8
#endif
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  T total = lanes[0];
  for (; i < n; ++i) total += f(i);
  return total;
}

// max of x over [0, n), -infinity if n is 0. A NaN may be lost; the sums that follow keep it.
template <typename T>
T lane_max(const T* x, int64_t n) {
  constexpr int kLanes = 64 / sizeof(T) * 2;
  T lanes[kLanes];
  for (T& lane : lanes) lane = -std::numeric_limits<T>::infinity();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) lanes[l] = lanes[l] < x[i + l] ? x[i + l] : lanes[l];
#ifndef __CUDACC__  // nvcc does not know the pragma
#pragma GCC unroll 8
#endif
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l)
      lanes[l] = lanes[l] < lanes[l + half] ? lanes[l + half] : lanes[l];
  T most = lanes[0];
  for (; i < n; ++i) most = most < x[i] ? x[i] : most;
  return most;
}

}  // namespace bbb::engine
