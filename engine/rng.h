// Rng: splitmix64-seeded xoshiro256**, the same numbers on every platform.
// Source: Blackman & Vigna, "Scrambled linear pseudorandom number generators" (2021).
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "quant/hd.h"

namespace bbb::engine {

// Output n of the generator splitmix64 is splitmix64(seed + kSplitmixStep (n + 1)).
constexpr uint64_t kSplitmixStep = 0x9e3779b97f4a7c15ull;
BBB_HD uint64_t splitmix64(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

// A seed from names or numbers: FNV-1a. It must never change, as random draws depend on it.
inline uint64_t seed_from(const void* data, size_t bytes) {
  uint64_t seed = 0xcbf29ce484222325ull;
  for (size_t i = 0; i < bytes; ++i)
    seed = (seed ^ static_cast<const uint8_t*>(data)[i]) * 0x100000001b3ull;
  return seed;
}

class Rng {
 public:
  explicit Rng(uint64_t seed) {
    for (uint64_t& s : state_) s = splitmix64(seed += kSplitmixStep);
  }

  uint64_t next() {
    const uint64_t result = rotl(state_[1] * 5, 7) * 9;
    const uint64_t t = state_[1] << 17;
    state_[2] ^= state_[0];
    state_[3] ^= state_[1];
    state_[1] ^= state_[2];
    state_[0] ^= state_[3];
    state_[2] ^= t;
    state_[3] = rotl(state_[3], 45);
    return result;
  }

  double uniform() { return static_cast<double>(next() >> 11) * 0x1.0p-53; }  // [0, 1)
  int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
  double normal() {  // Box-Muller
    const double u = 1.0 - uniform(), v = uniform();
    return std::sqrt(-2.0 * std::log(u)) * std::cos(6.283185307179586 * v);
  }

  std::vector<int32_t> permutation(int64_t n) {  // Fisher-Yates
    std::vector<int32_t> p(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) p[static_cast<size_t>(i)] = static_cast<int32_t>(i);
    for (int64_t i = n - 1; i > 0; --i)
      std::swap(p[static_cast<size_t>(i)], p[static_cast<size_t>(below(i + 1))]);
    return p;
  }

 private:
  static uint64_t rotl(uint64_t x, int k) { return (x << k) | (x >> (64 - k)); }
  uint64_t state_[4];
};

}  // namespace bbb::engine
