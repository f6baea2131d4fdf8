// Who computes what in the kernel that runs all layers of a decode step (cuda/decode_layers.cu): a
// static schedule as plain data.
//
// The products of a layer are four: q k v, output, gate up, down. A cluster of `ranks` blocks takes
// a share of the row tiles of each (quant/packed_tiles.h), the same in every layer; rank r takes
// the r-th part of the slices of K. Inside of a block, the share is cut into parts of one matrix,
// and every part is taken by `lanes` warps, each with every lanes-th slice:
//
//     rows     cluster 0 | cluster 1 | ..            K   rank 0 | rank 1 | ..
//     block    part 0: warps 0 .. lanes - 1, part 1: the next warps, ..
//
// A share of gate up holds pairs: tile i of gate and tile i of up. So that the cluster has both
// inputs of SwiGLU.
//
// Attention: a unit is up to kUnitHeads query heads of one key-value head. A unit's visible keys
// are split evenly among the ranks of `partials` clusters; a cluster's ranks merge their results.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

namespace bbb::quant {

constexpr int kDecodeWarps = 16;  // of a block
constexpr int kDecodeThreads = 32 * kDecodeWarps;
constexpr int kPartTiles = 8;  // most row tiles of a part: accumulators of a warp
// A slice of an operand in shared memory: two words a lane, then sum and unit of each sub-group.
constexpr int kOperandBytes = 32 * 8 + 4 * 8;
constexpr int kUnitHeads = 4;    // most query heads of a unit of attention
constexpr int kMaxPartials = 4;  // most clusters that share a unit
constexpr int kMaxRanks = 4;
constexpr int kMaxNormLines = 4;  // lines of 4 values that a thread keeps of a row to be normalized

enum class DecodeProduct { QueryKeyValue, Output, GateUp, Down };
constexpr int kDecodeProducts = 4;
// A layer's matrices: q, k, v, output, gate, up, down.
constexpr int kLayerMatrices = 7;
constexpr int first_matrix(int product) { return product == 0 ? 0 : product + 2 + product / 3; }
static_assert(first_matrix(1) == 3 && first_matrix(2) == 4 && first_matrix(3) == 6);

struct DecodeShape {
  int64_t d_model, hidden, heads, kv_heads, head_dim;
  int64_t layers;
  // Of each product's operand: the most stored positions of a layer, and whether any layer has them
  // in another order than the channels.
  std::array<int64_t, kDecodeProducts> stored_k;
  std::array<bool, kDecodeProducts> gathers;

  std::array<int64_t, kLayerMatrices> rows() const;  // N of each matrix
  int64_t channels(int product) const;               // K of a product's input
  int64_t row_tiles(int product) const;              // of gate up: pairs
};

// What a warp takes of a product; no tiles: nothing.
struct WarpShare {
  int32_t matrix;        // 0 .. kLayerMatrices - 1
  int32_t matrix_tiles;  // row tiles of the whole matrix
  int32_t first_tile;    // of the matrix
  int32_t tiles;
  int32_t slot;  // place of the first tile in the cluster's share
  int32_t lane;  // takes slices lane, lane + lanes, .. of the block's
};
struct ClusterShare {
  int32_t first_tile;  // of the product: its matrices' tiles one after another, or pairs
  int32_t tiles;
  int32_t lanes;
  WarpShare warps[kDecodeWarps];
};

// What a block keeps of a layer in shared memory.
struct LayerEntry {
  const uint8_t* tiles[kLayerMatrices];
  float master_scales[kLayerMatrices];
  int32_t slices[kDecodeProducts];
};

// Byte offsets of a block's shared memory. The rings of tiles are at 0.
struct DecodeMemory {
  int32_t barriers, operand, staged, exchange, entries, total;
  int32_t exchange_floats;  // of one of the two buffers
  int32_t ring_tiles;       // of a warp
};

struct DecodePlan {
  DecodeShape shape;
  int32_t clusters, ranks;
  std::array<std::vector<ClusterShare>, kDecodeProducts> shares;
  int32_t units, partials;
  DecodeMemory memory;
};

// What attention's warps leave for the block, in the memory of operand, staged row and exchange:
// (warps, heads, d) floats.
constexpr int64_t merged_bytes(int64_t head_dim) {
  return int64_t{kDecodeWarps} * kUnitHeads * head_dim * 4;
}

// `smem_bytes`: of a block. Nothing, if the kernel does not take the shape or it does not fit.
std::optional<DecodePlan> plan_decode(const DecodeShape& shape, int clusters, int ranks,
                                      int64_t smem_bytes);

}  // namespace bbb::quant
