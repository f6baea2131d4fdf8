// ids[m] = the next token of row m (engine/sampling.h).
//
// Greedy: one pass, which finds the block of the largest logit. Otherwise: a pass of exponentials,
// and for a nucleus a histogram of weights by the upper bits of their keys. Only the tokens of the
// bin in which the nucleus ends are sorted.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "engine/cpu/cpu_backend.h"
#include "engine/sampling.h"

namespace bbb::engine {
namespace {

constexpr int64_t kBlock = 1024;

// The first of the largest logits. Throws if one is NaN or infinite.
template <typename T>
int32_t best_token(const T* x, int64_t v) {
  int64_t best_block = 0;
  T best = -std::numeric_limits<T>::infinity();
  for (int64_t at = 0; at < v; at += kBlock) {
    const int64_t count = std::min(kBlock, v - at);
    // 0 x is NaN where x is NaN or infinite, and so is the sum.
    if (lane_sum<T>(count, [=](int64_t i) { return x[at + i] * T{0}; }) != 0)
      for (int64_t i = at; i < at + count; ++i)
        BBB_CHECK(std::isfinite(x[i]), "the logit of token ", i, " is ", x[i],
                  ": no next token can be chosen");
    const T most = lane_max(x + at, count);
    if (most > best) best = most, best_block = at;
  }
  return static_cast<int32_t>(std::find(x + best_block, x + v, best) - x);
}

// The tokens that may be chosen: those with keys below `key`, and the first `ties` with this key.
struct Nucleus {
  uint32_t key = kLastSampleKey;
  int64_t ties = std::numeric_limits<int64_t>::max();
};

Nucleus nucleus_of(const std::vector<float>& e, double top_p) {
  constexpr int kShift = 18;
  std::array<uint64_t, (kLastSampleKey >> kShift) + 1> bins{};
  uint64_t total = 0;
  for (const float one : e)
    if (const uint64_t weight = sample_weight(one)) {
      bins[sample_key(one) >> kShift] += weight;
      total += weight;
    }
  const uint64_t target = sample_target(top_p, total);
  uint64_t reached = 0;
  uint32_t bin = 0;
  while (reached + bins[bin] < target) reached += bins[bin++];
  std::vector<uint32_t> keys;  // of the bin in which the nucleus ends
  for (const float one : e)
    if (sample_weight(one) > 0 && sample_key(one) >> kShift == bin) keys.push_back(sample_key(one));
  std::sort(keys.begin(), keys.end());
  Nucleus nucleus{0, 0};
  for (size_t i = 0; reached < target; ++i) {
    nucleus.ties = nucleus.key == keys[i] ? nucleus.ties + 1 : 1;
    nucleus.key = keys[i];
    reached += sample_weight(relative_probability_of(keys[i]));
  }
  return nucleus;
}

// Calls fn(id, weight) for the tokens of the nucleus by rising id until it returns true.
template <typename Fn>
void for_nucleus(const std::vector<float>& e, const Nucleus& nucleus, const Fn& fn) {
  int64_t ties = 0;
  for (size_t i = 0; i < e.size(); ++i) {
    const uint32_t key = sample_key(e[i]);
    if (key > nucleus.key || (key == nucleus.key && ties++ >= nucleus.ties)) continue;
    if (fn(static_cast<int32_t>(i), sample_weight(e[i]))) return;
  }
}

template <typename T>
int32_t drawn_token(const T* x, int64_t v, T most, const SampleSpec& spec, uint64_t random) {
  const float temperature = static_cast<float>(spec.temperature);
  std::vector<float> e(static_cast<size_t>(v));
  for (int64_t i = 0; i < v; ++i)
    e[static_cast<size_t>(i)] = relative_probability(static_cast<float>(x[i] - most), temperature);
  const Nucleus nucleus = spec.top_p < 1 ? nucleus_of(e, spec.top_p) : Nucleus{};
  uint64_t total = 0;
  for_nucleus(e, nucleus, [&](int32_t, uint64_t weight) {
    total += weight;
    return false;
  });
  const uint64_t draw = scaled_random(random, total);
  uint64_t sum = 0;
  int32_t chosen = 0;
  for_nucleus(e, nucleus, [&](int32_t id, uint64_t weight) {
    chosen = id;
    return (sum += weight) > draw;
  });
  return chosen;
}

}  // namespace

template <typename T>
void CpuBackend<T>::do_sample(const Tensor& ids, const Tensor& logits, const SampleRows& rows,
                              const SampleSpec& spec, const Tensor&) {
  const int64_t m = logits.dim(0), v = logits.dim(1), seen_bytes = (v + 7) / 8;
  parallel_for(m, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> copy;
    for (int64_t row = begin; row < end; ++row) {
      const T* x = data(logits) + row * v;
      uint8_t* seen = rows.seen.defined() ? rows.seen.data<uint8_t>() + row * seen_bytes : nullptr;
      if (spec.repetition_penalty != 1) {
        copy.assign(x, x + v);
        for (int64_t i = 0; i < v; ++i)
          if (seen[i / 8] >> i % 8 & 1)
            copy[static_cast<size_t>(i)] = penalized(x[i], static_cast<T>(spec.repetition_penalty));
        x = copy.data();
      }
      int32_t id = best_token(x, v);
      if (static_cast<float>(spec.temperature) > 0) {
        const auto* seed = rows.seeds.data<uint32_t>() + 2 * row;
        id = drawn_token(
            x, v, x[id], spec,
            random_bits(uint64_t{seed[1]} << 32 | seed[0], rows.positions.data<int32_t>()[row]));
      }
      ids.data<int32_t>()[row] = id;
      if (seen != nullptr) seen[id / 8] = static_cast<uint8_t>(seen[id / 8] | 1 << id % 8);
      if (rows.log.defined())
        rows.log.data<int32_t>()[*rows.cursor.data<int32_t>() % rows.log.dim(0) * m + row] = id;
    }
  });
}

BBB_CPU_INSTANTIATE(sample);

}  // namespace bbb::engine
