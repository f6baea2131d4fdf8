// Tiles: how kernels walk flat buffers that hold the parameters of a model one after another.
//
// Every parameter starts on a multiple of kTileAlign elements and is padded to one, so that it
// holds whole groups of any size; the padding is zeros. A tile is a part of one parameter, handled
// by one block of threads. The table of tiles covers the buffer and is in device memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "quant/check.h"
#include "quant/spec.h"

namespace bbb::quant {

constexpr int64_t kTileAlign = 128;      // elements
constexpr int64_t kTileElements = 4096;  // most elements of a tile
constexpr int kNotQuantized = 0;         // bits of a parameter that is no weight: a norm

struct alignas(16) WeightTile {
  int32_t begin;  // first element / kTileAlign
  int32_t count;  // elements, a multiple of kTileAlign
  int32_t slot;   // index of the parameter in every table that has a row for each
  int32_t unused;
};
static_assert(sizeof(WeightTile) == 4 * sizeof(int32_t));

inline int64_t padded_elements(int64_t count) {
  return (count + kTileAlign - 1) / kTileAlign * kTileAlign;
}

// The tiles of consecutive parameters: `counts` elements each before padding, slot i for parameter
// i. Throws above 2^31 tile units, which is 2^38 elements.
inline std::vector<WeightTile> make_tiles(const std::vector<int64_t>& counts) {
  std::vector<WeightTile> tiles;
  int64_t at = 0;
  for (size_t slot = 0; slot < counts.size(); ++slot) {
    const int64_t end = at + padded_elements(counts[slot]);
    BBB_CHECK(end / kTileAlign <= INT32_MAX, "a model of ", end, " elements is too large");
    for (; at < end; at += tiles.back().count)
      tiles.push_back({static_cast<int32_t>(at / kTileAlign),
                       static_cast<int32_t>(std::min(kTileElements, end - at)),
                       static_cast<int32_t>(slot), 0});
  }
  return tiles;
}

// The optimizer's row of a parameter. T is the type of the masters.
template <typename T>
struct SlotRule {
  T lr_factor = 1;
  T decay = 0;   // decoupled weight decay
  T direct = 0;  // 1: the gradient is the step itself, as Muon makes it
};

}  // namespace bbb::quant
