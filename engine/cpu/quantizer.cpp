// The quantizer's ops (numerics.md sections 1 and 2): quant/host.cpp, a few tiles or a range of
// rows per task.
#include <algorithm>
#include <vector>

#include "engine/cpu/cpu_backend.h"
#include "quant/host.h"

namespace bbb::engine {

namespace host = quant::host;

static constexpr int64_t kTileGrain = kElementGrain / quant::kTileElements;

static const quant::WeightTile* tiles_of(const QuantizedWeights& q) {
  return static_cast<const quant::WeightTile*>(q.tiles.raw());
}

// A tile, seen as rows of one group each.
static host::Rows groups_of(const quant::WeightTile& tile, int group) {
  const int64_t begin = tile.begin * quant::kTileAlign / group;
  return {begin, begin + tile.count / group};
}

template <typename T>
void CpuBackend<T>::do_max_group_range(const QuantizedWeights& q, const Tensor& w) {
  const quant::WeightTile* tiles = tiles_of(q);
  const auto* bits = q.bits.data<int32_t>();
  std::vector<T> parts(static_cast<size_t>(q.tiles.dim(0)), T(0));
  parallel_for(q.tiles.dim(0), kTileGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      if (bits[tiles[i].slot] != quant::kNotQuantized)
        parts[static_cast<size_t>(i)] =
            host::group_range_max(w.data<T>(), q.ratios.data<uint8_t>(),
                                  groups_of(tiles[i], q.group), q.group, q.group, q.rule.levels);
  });
  T* max_range = q.max_range.data<T>();
  std::fill_n(max_range, q.max_range.numel(), T(0));
  std::fill_n(q.prequantized.data<T>(), q.prequantized.numel(), T(0));
  for (size_t i = 0; i < parts.size(); ++i)
    max_range[tiles[i].slot] = quant::max_or_nan(max_range[tiles[i].slot], parts[i]);
}

template <typename T>
void CpuBackend<T>::do_fake_quant(const QuantizedWeights& q, const Tensor& w) {
  const quant::WeightTile* tiles = tiles_of(q);
  const auto* bits = q.bits.data<int32_t>();
  for (int64_t slot = 0; slot < q.bits.numel(); ++slot)
    if (bits[slot] != quant::kNotQuantized)
      q.s.data<T>()[slot] = bits[slot] == quant::kNoQuantizer
                                ? T(1)
                                : quant::master_scale_of(quant::raw_scale(
                                      q.max_range.data<T>()[slot], bits[slot], q.rule.levels));
  parallel_for(q.tiles.dim(0), kTileGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const quant::WeightTile& tile = tiles[i];
      const int64_t first = tile.begin * quant::kTileAlign;
      const int width = bits[tile.slot];
      if (width == quant::kNotQuantized) continue;
      if (width == quant::kNoQuantizer) {
        std::copy_n(w.data<T>() + first, tile.count, q.wq.data<T>() + first);
        std::fill_n(q.clipped.data<uint8_t>() + first / 8, tile.count / 8, uint8_t{0});
        continue;
      }
      host::fake_quant(q.wq.data<T>(), q.e.data<uint8_t>(), q.z.data<uint8_t>(),
                       q.clipped.data<uint8_t>(), w.data<T>(), q.ratios.data<uint8_t>(),
                       groups_of(tile, q.group), q.group, q.s.data<T>()[tile.slot],
                       {width, q.group}, q.rounding, q.rule);
    }
  });
}

template <typename T>
void CpuBackend<T>::do_nested_levels(const Tensor& wq, const QuantizedWeights& q, const Tensor& w,
                                     int bits, quant::NestedDequant dequant) {
  const quant::WeightTile* tiles = tiles_of(q);
  const auto* widths = q.bits.data<int32_t>();
  parallel_for(q.tiles.dim(0), kTileGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      if (widths[tiles[i].slot] == quant::kNestedBits)
        host::nested_levels(wq.data<T>(), w.data<T>(), q.e.data<uint8_t>(), q.z.data<uint8_t>(),
                            groups_of(tiles[i], q.group), q.group, q.s.data<T>()[tiles[i].slot],
                            q.group, bits, dequant);
  });
}

template <typename T>
void CpuBackend<T>::do_quantize_codes(const Tensor& codes, const Tensor& w, const Tensor& e,
                                      const Tensor& z, const Tensor& s, const WeightGrid& spec) {
  const int64_t k = w.dim(1);
  parallel_for(w.dim(0), row_grain(k), [&](int64_t begin, int64_t end) {
    host::quantize_codes(codes.data<uint8_t>(), w.data<T>(), e.data<uint8_t>(), z.data<uint8_t>(),
                         {begin, end}, k, *s.data<T>(), spec);
  });
}

template <typename T>
void CpuBackend<T>::do_scale_codes(const Tensor& wq, const Tensor& e, const Tensor& s,
                                   const Tensor& codes, const Tensor& z, const Tensor& sigma,
                                   const WeightGrid& spec) {
  const int64_t k = codes.dim(1);
  *s.data<T>() = quant::master_scale_of(host::largest(sigma.data<T>(), sigma.numel()));
  parallel_for(codes.dim(0), row_grain(k), [&](int64_t begin, int64_t end) {
    host::scale_codes(wq.data<T>(), e.data<uint8_t>(), codes.data<uint8_t>(), z.data<uint8_t>(),
                      sigma.data<T>(), {begin, end}, k, *s.data<T>(), spec);
  });
}

template <typename T>
void CpuBackend<T>::do_scale_codes_backward(const Tensor& dsigma, const Tensor& dw,
                                            const Tensor& codes, const Tensor& z,
                                            const WeightGrid& spec, Write mode) {
  const int64_t k = codes.dim(1);
  parallel_for(codes.dim(0), row_grain(k), [&](int64_t begin, int64_t end) {
    host::scale_codes_backward(dsigma.data<T>(), dw.data<T>(), codes.data<uint8_t>(),
                               z.data<uint8_t>(), {begin, end}, k, spec, mode == Write::Add);
  });
}

template <typename T>
void CpuBackend<T>::do_learned_quant(const Tensor& wq, const Tensor& e, const Tensor& z,
                                     const Tensor& s, const Tensor& w, const Tensor& sigma,
                                     const Tensor& zeta, const WeightGrid& spec) {
  const int64_t k = w.dim(1);
  *s.data<T>() = quant::master_scale_of(host::largest(sigma.data<T>(), sigma.numel()));
  parallel_for(w.dim(0), row_grain(k), [&](int64_t begin, int64_t end) {
    host::learned_quant(wq.data<T>(), e.data<uint8_t>(), z.data<uint8_t>(), w.data<T>(),
                        sigma.data<T>(), zeta.data<T>(), {begin, end}, k, *s.data<T>(), spec);
  });
}

template <typename T>
void CpuBackend<T>::do_learned_quant_backward(const Tensor& dw, const Tensor& dsigma,
                                              const Tensor& dzeta, const Tensor& w, const Tensor& e,
                                              const Tensor& z, const Tensor& s,
                                              const WeightGrid& spec) {
  const int64_t k = w.dim(1);
  parallel_for(w.dim(0), row_grain(k), [&](int64_t begin, int64_t end) {
    host::learned_quant_backward(dw.data<T>(), dsigma.data<T>(), dzeta.data<T>(), w.data<T>(),
                                 e.data<uint8_t>(), z.data<uint8_t>(), {begin, end}, k,
                                 *s.data<T>(), spec);
  });
}

template <typename T>
void CpuBackend<T>::do_ratio_quant(const Tensor& wq, const Tensor& e, const Tensor& z,
                                   const Tensor& s, const Tensor& ratio, const Tensor& w,
                                   const WeightGrid& spec) {
  const int64_t n = w.dim(0), k = w.dim(1), grain = row_grain(k);
  std::vector<T> largest(static_cast<size_t>((n + grain - 1) / grain));
  parallel_for(n, grain, [&](int64_t begin, int64_t end) {
    largest[static_cast<size_t>(begin / grain)] =
        host::clamp_ratios(ratio.data<T>(), w.data<T>(), {begin, end}, k, spec);
  });
  *s.data<T>() =
      quant::master_scale_of(host::largest(largest.data(), static_cast<int64_t>(largest.size())));
  parallel_for(n, grain, [&](int64_t begin, int64_t end) {
    host::ratio_quant(wq.data<T>(), e.data<uint8_t>(), z.data<uint8_t>(),
                      static_cast<const T*>(ratio.data<T>()), w.data<T>(), {begin, end}, k,
                      *s.data<T>(), spec);
  });
}

template <typename T>
void CpuBackend<T>::do_ratio_quant_backward(const Tensor& dw, const Tensor& dratio, const Tensor& w,
                                            const Tensor& e, const Tensor& z, const Tensor& s,
                                            const WeightGrid& spec) {
  const int64_t k = w.dim(1);
  parallel_for(w.dim(0), row_grain(k), [&](int64_t begin, int64_t end) {
    host::ratio_quant_backward(dw.data<T>(), dratio.data<T>(), w.data<T>(), e.data<uint8_t>(),
                               z.data<uint8_t>(), {begin, end}, k, *s.data<T>(), spec);
  });
}

BBB_CPU_INSTANTIATE(ratio_quant);
BBB_CPU_INSTANTIATE(ratio_quant_backward);
BBB_CPU_INSTANTIATE(learned_quant);
BBB_CPU_INSTANTIATE(learned_quant_backward);
BBB_CPU_INSTANTIATE(max_group_range);
BBB_CPU_INSTANTIATE(fake_quant);
BBB_CPU_INSTANTIATE(nested_levels);
BBB_CPU_INSTANTIATE(quantize_codes);
BBB_CPU_INSTANTIATE(scale_codes);
BBB_CPU_INSTANTIATE(scale_codes_backward);

}  // namespace bbb::engine
