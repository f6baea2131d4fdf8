// Averages of masters, and codes that oscillate: damped or frozen (engine/backend.h).
//
//   average       average += rate (w - average)      8 bytes read and 4 written an element
//   dampen        g += rate (w - S wq)               6 read, that of g read and written
//   freeze_flips  state, and g and m of frozen ones  3 read and 1 written, the rest only if frozen
//
// average is a flat launch. The others take a tile (quant/tiles.h) a block, one element a thread at
// a time.
#include "cuda/cuda_backend.h"
#include "cuda/vector.h"
#include "quant/grid.h"
#include "quant/oscillation.h"
#include "quant/tiles.h"

namespace bbb::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void average_kernel(float* __restrict__ average, const float* __restrict__ w,
                               const float* __restrict__ control, float least_rate, int64_t n) {
  const int64_t i = first_element<1>();
  const float rate = fmaxf(least_rate, 1.0f / fmaxf(control[engine::kStep], 1.0f));
  if (i < n) average[i] += rate * (w[i] - average[i]);
}

template <typename T>
__global__ void dampen_kernel(T* __restrict__ g, const float* __restrict__ w,
                              const bf16* __restrict__ wq, const uint8_t* __restrict__ clipped,
                              const float* __restrict__ s,
                              const quant::WeightTile* __restrict__ tiles,
                              const int32_t* __restrict__ bits, float rate) {
  const quant::WeightTile tile = tiles[blockIdx.x];
  if (!quant::has_codes(bits[tile.slot])) return;
  const float scale = s[tile.slot];
  const int64_t begin = tile.begin * quant::kTileAlign;
  for (int j = threadIdx.x; j < tile.count; j += kThreads) {
    const int64_t i = begin + j;
    if (clipped[i / 8] >> (i % 8) & 1) continue;
    from_float(g[i], to_float(g[i]) + rate * (w[i] - scale * to_float(wq[i])));
  }
}

template <typename T>
__global__ void freeze_flips_kernel(uint8_t* __restrict__ state, T* __restrict__ g,
                                    bf16* __restrict__ m, const bf16* __restrict__ wq,
                                    const uint8_t* __restrict__ e,
                                    const quant::WeightTile* __restrict__ tiles,
                                    const int32_t* __restrict__ bits,
                                    const float* __restrict__ control, int group) {
  const quant::WeightTile tile = tiles[blockIdx.x];
  if (!quant::has_codes(bits[tile.slot])) return;
  const int step = static_cast<int>(control[engine::kStep]);
  const bool first = step == 0, halve = step % engine::Backend::kFlipWindow == 0;
  const int64_t begin = tile.begin * quant::kTileAlign;
  for (int j = threadIdx.x; j < tile.count; j += kThreads) {
    const int64_t i = begin + j;
    const float value = to_float(wq[i]);
    const int level = static_cast<int>(floorf(value / quant::e4m3_decode(e[i / group])));
    state[i] = quant::next_flip_state(state[i], level, halve, first);
    if ((state[i] & 1) == 0) continue;
    from_float(g[i], 0.0f);
    from_float(m[i], 0.0f);
  }
}

const quant::WeightTile* tiles_of(const QuantizedWeights& q) {
  return static_cast<const quant::WeightTile*>(q.tiles.raw());
}

LaunchShape one_tile_a_block(const QuantizedWeights& q) {
  return {dim3(static_cast<unsigned>(q.tiles.dim(0))), dim3(kThreads)};
}

}  // namespace

void CudaBackend::do_average(const Tensor& average, const Tensor& w, const Tensor& control,
                             double decay) {
  launch(stream_, {blocks_for(w.numel(), kThreads, 1), dim3(kThreads)}, average_kernel,
         average.data<float>(), w.data<float>(), control.data<float>(),
         static_cast<float>(1 - decay), w.numel());
}

void CudaBackend::do_dampen(const Tensor& g, const Tensor& w, const QuantizedWeights& q,
                            double rate) {
  with_elements(g, [&]<typename T>(T* gradient) {
    launch(stream_, one_tile_a_block(q), dampen_kernel<T>, gradient, w.data<float>(), bf16_of(q.wq),
           q.clipped.data<uint8_t>(), q.s.data<float>(), tiles_of(q), q.bits.data<int32_t>(),
           static_cast<float>(rate));
  });
}

void CudaBackend::do_freeze_flips(const Tensor& state, const Tensor& g, const Tensor& m,
                                  const QuantizedWeights& q, const Tensor& control) {
  with_elements(g, [&]<typename T>(T* gradient) {
    launch(stream_, one_tile_a_block(q), freeze_flips_kernel<T>, state.data<uint8_t>(), gradient,
           bf16_of(m), bf16_of(q.wq), q.e.data<uint8_t>(), tiles_of(q), q.bits.data<int32_t>(),
           control.data<float>(), q.group);
  });
}

}  // namespace bbb::cuda
