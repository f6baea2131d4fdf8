// The arithmetic of Backend::sample, the same bits on every device.
//
// Weights are whole numbers, so their sums do not depend on the order of addition:
//     x = the logit after the repetition penalty
//     e = exp((x - max x) / temperature), a float in [0, 1];   weight = floor(e 2^39)
// Tokens are ordered by falling e, equal ones by rising id. The nucleus is the shortest prefix of
// this order whose weights reach sample_target(top_p, sum of all weights). A token of the nucleus
// is chosen with a probability that is proportional to its weight:
//     r = floor(random total / 2^64), total the weights of the nucleus, random 64 bits
// and the choice is the first token, by id, at which the sum of the nucleus's weights exceeds r.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "engine/cpu/vector_math.h"
#include "engine/rng.h"
#include "quant/hd.h"

namespace bbb::engine {

// Keskar et al., "CTRL: a conditional transformer language model" (2019), as transformers computes
// it: of a token that has occurred.
template <typename T>
BBB_HD T penalized(T logit, T penalty) {
  return logit > 0 ? logit / penalty : logit * penalty;
}

// e of a logit that is `below` (0 or less) from the largest one; temperature > 0.
BBB_HD float relative_probability(float below, float temperature) {
  return vector_exp(below / temperature);
}

constexpr int kWeightBits = 39;
BBB_HD uint64_t sample_weight(float e) {
  constexpr float kOne = static_cast<float>(int64_t{1} << kWeightBits);
  return static_cast<uint64_t>(static_cast<int64_t>(e * kOne));
}

// Orders tokens: 0 for e = 1, larger for less likely ones. Tokens of at least weight 1 have keys up
// to kLastSampleKey.
constexpr uint32_t kLastSampleKey = uint32_t{kWeightBits} << 23;
BBB_HD uint32_t sample_key(float e) {
  return std::bit_cast<uint32_t>(1.0f) - std::bit_cast<uint32_t>(e);
}
BBB_HD float relative_probability_of(uint32_t key) {
  return std::bit_cast<float>(std::bit_cast<uint32_t>(1.0f) - key);
}

// The weight that a nucleus must reach: at least 1, so that it has a token. total > 0.
BBB_HD uint64_t sample_target(double top_p, uint64_t total) {
  const double target = std::ceil(top_p * static_cast<double>(total));
  return target < 1                            ? 1
         : target < static_cast<double>(total) ? static_cast<uint64_t>(target)
                                               : total;
}

// The random bits of one token: output `position` of the splitmix64 generator with this seed.
BBB_HD uint64_t random_bits(uint64_t seed, int32_t position) {
  return splitmix64(seed + kSplitmixStep * (static_cast<uint64_t>(position) + 1));
}
// floor(random n / 2^64)
BBB_HD uint64_t scaled_random(uint64_t random, uint64_t n) {
#ifdef __CUDA_ARCH__
  return __umul64hi(random, n);
#else
  return static_cast<uint64_t>(static_cast<unsigned __int128>(random) * n >> 64);
#endif
}

}  // namespace bbb::engine
