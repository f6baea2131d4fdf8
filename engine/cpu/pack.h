// Pack: 32 bytes of numbers as one value, for loops that the compiler does not vectorize by itself.
// Operators work on each number. The same bits on every machine.
#pragma once

#include <cstdint>
#include <cstring>

// Packs stay inside inline functions, so that how they are passed without AVX does not matter.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace bbb::engine {

template <typename T>
struct PackOf {
  static constexpr int kLanes = 32 / sizeof(T);
  typedef T Pack __attribute__((vector_size(32)));

  static Pack load(const T* from) {
    Pack pack;
    std::memcpy(&pack, from, sizeof pack);
    return pack;
  }
  static void store(T* to, const Pack& pack) { std::memcpy(to, &pack, sizeof pack); }
  // The upper half is added to the lower one, and so on.
  static T sum(const Pack& pack) {
    T lanes[kLanes];
    store(lanes, pack);
#pragma GCC unroll 3
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
  }
};

// sum of a[i] b[i] over [0, n).
template <typename T>
[[gnu::always_inline]] inline T pack_dot(const T* a, const T* b, int64_t n) {
  using P = PackOf<T>;
  typename P::Pack even{}, odd{};
  int64_t i = 0;
  for (; n - i >= 2 * P::kLanes; i += 2 * P::kLanes) {
    even += P::load(a + i) * P::load(b + i);
    odd += P::load(a + i + P::kLanes) * P::load(b + i + P::kLanes);
  }
  T total = P::sum(even + odd);
  for (; i < n; ++i) total += a[i] * b[i];
  return total;
}

}  // namespace bbb::engine
