// Averages of masters, and codes that oscillate: damped or frozen (engine/backend.h).
#include "quant/oscillation.h"

#include <algorithm>
#include <cmath>

#include "engine/cpu/cpu_backend.h"
#include "quant/grid.h"

namespace bbb::engine {

static bool bit_of(const uint8_t* bits, int64_t i) { return bits[i / 8] >> (i % 8) & 1; }

template <typename T>
void CpuBackend<T>::do_average(const Tensor& average, const Tensor& w, const Tensor& control,
                               double decay) {
  T* const sums = data(average);
  const T* const masters = data(w);
  const T by = std::max(static_cast<T>(1 - decay), 1 / std::max(data(control)[kStep], T{1}));
  parallel_for(w.numel(), kElementGrain, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) sums[i] += by * (masters[i] - sums[i]);
  });
}

// Calls fn(i, S, e) for every element of a quantized weight.
template <typename T, typename Pool, typename Fn>
static void over_quantized(const QuantizedWeights& q, Pool&& parallel, const Fn& fn) {
  const auto* tiles = static_cast<const quant::WeightTile*>(q.tiles.raw());
  const auto* bits = q.bits.data<int32_t>();
  const T* s = q.s.data<T>();
  const auto* e = q.e.data<uint8_t>();
  parallel(q.tiles.dim(0), [=](int64_t first, int64_t last) {
    for (int64_t tile = first; tile < last; ++tile) {
      if (!quant::has_codes(bits[tiles[tile].slot])) continue;
      const int64_t begin = tiles[tile].begin * quant::kTileAlign;
      for (int64_t i = begin; i < begin + tiles[tile].count; ++i)
        fn(i, s[tiles[tile].slot], e[i / q.group]);
    }
  });
}

template <typename T>
void CpuBackend<T>::do_dampen(const Tensor& g, const Tensor& w, const QuantizedWeights& q,
                              double rate) {
  T* const gradient = data(g);
  const T *masters = data(w), *levels = data(q.wq);
  const auto* clipped = q.clipped.data<uint8_t>();
  const T by = static_cast<T>(rate);
  over_quantized<T>(
      q, [this](int64_t n, const auto& fn) { parallel_for(n, 4, fn); },
      [=](int64_t i, T s, uint8_t) {
        if (!bit_of(clipped, i)) gradient[i] += by * (masters[i] - s * levels[i]);
      });
}

template <typename T>
void CpuBackend<T>::do_freeze_flips(const Tensor& state, const Tensor& g, const Tensor& m,
                                    const QuantizedWeights& q, const Tensor& control) {
  T *gradient = data(g), *moment = data(m);
  const T* const levels = data(q.wq);
  auto* const states = state.data<uint8_t>();
  const auto step = static_cast<int64_t>(data(control)[kStep]);
  const bool first = step == 0, halve = step % kFlipWindow == 0;
  over_quantized<T>(
      q, [this](int64_t n, const auto& fn) { parallel_for(n, 4, fn); },
      [=](int64_t i, T, uint8_t e) {
        const T level = levels[i] / static_cast<T>(quant::e4m3_decode(e));
        states[i] =
            quant::next_flip_state(states[i], static_cast<int>(std::floor(level)), halve, first);
        if ((states[i] & 1) == 0) return;
        gradient[i] = 0;
        moment[i] = 0;
      });
}

BBB_CPU_INSTANTIATE(average);
BBB_CPU_INSTANTIATE(dampen);
BBB_CPU_INSTANTIATE(freeze_flips);

}  // namespace bbb::engine
