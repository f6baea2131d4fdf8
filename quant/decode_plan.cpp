#include "quant/decode_plan.h"

#include <algorithm>
#include <utility>

#include "quant/packed_tiles.h"

namespace bbb::quant {

namespace {

// Instructions of a warp, counted in machine code: of a slice of a part, and of each of its tiles.
constexpr int64_t kSliceCost = 90, kTileCost = 47;
constexpr int kLeastRingTiles = 2 * kPartTiles;  // of a warp: one part is read, one is in flight
constexpr int kMaxLayers = 256;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int32_t to_int(int64_t x) { return static_cast<int32_t>(x); }

// Neighbouring row tiles of one matrix in a cluster's share.
struct Segment {
  int64_t matrix, matrix_tiles, first_tile, tiles, slot;
};

std::vector<Segment> segments_of(const DecodeShape& shape, int product, int64_t first,
                                 int64_t tiles) {
  const auto segment = [&](size_t matrix, int64_t begin, int64_t count, int64_t slot) {
    return Segment{static_cast<int64_t>(matrix), row_tiles(shape.rows()[matrix]), begin, count,
                   slot};
  };
  switch (static_cast<DecodeProduct>(product)) {
    case DecodeProduct::Output:
      return {segment(3, first, tiles, 0)};
    case DecodeProduct::GateUp:
      return {segment(4, first, tiles, 0), segment(5, first, tiles, 0)};
    case DecodeProduct::Down:
      return {segment(6, first, tiles, 0)};
    case DecodeProduct::QueryKeyValue:
      break;
  }
  std::vector<Segment> segments;
  int64_t begin = 0;  // of the matrix in the product's tiles
  for (size_t matrix = 0; matrix < 3; ++matrix) {
    const int64_t end = begin + row_tiles(shape.rows()[matrix]);
    const int64_t from = std::max(first, begin), to = std::min(first + tiles, end);
    if (from < to) segments.push_back(segment(matrix, from - begin, to - from, from - first));
    begin = end;
  }
  return segments;
}

// Cuts the segments into parts of at most `most` tiles.
std::vector<WarpShare> parts_of(const std::vector<Segment>& segments, int64_t most) {
  std::vector<WarpShare> parts;
  for (const Segment& s : segments) {
    const int64_t count = ceil_div(s.tiles, most);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t begin = i * s.tiles / count, end = (i + 1) * s.tiles / count;
      parts.push_back({to_int(s.matrix), to_int(s.matrix_tiles), to_int(s.first_tile + begin),
                       to_int(end - begin), to_int(s.slot + begin), 0});
    }
  }
  return parts;
}

// False if the share needs more warps than there are.
bool divide_share(ClusterShare& share, const std::vector<Segment>& segments, int64_t slices) {
  int64_t least = INT64_MAX;
  for (int64_t most = 1; most <= kPartTiles; ++most) {
    const std::vector<WarpShare> parts = parts_of(segments, most);
    const int64_t count = static_cast<int64_t>(parts.size());
    if (count > kDecodeWarps) continue;
    const int64_t lanes = std::min<int64_t>(kDecodeWarps / count, slices);
    const int64_t largest = std::ranges::max(parts, {}, &WarpShare::tiles).tiles;
    const int64_t cost = ceil_div(slices, lanes) * (kSliceCost + kTileCost * largest);
    if (cost >= least) continue;
    least = cost;
    share.lanes = to_int(lanes);
    std::ranges::fill(share.warps, WarpShare{});
    for (int64_t i = 0; i < count * lanes; ++i) {
      share.warps[i] = parts[static_cast<size_t>(i / lanes)];
      share.warps[i].lane = to_int(i % lanes);
    }
  }
  return least < INT64_MAX;
}

constexpr int64_t kAlignment = 128, kBarrierBytes = 8;
constexpr int64_t aligned(int64_t bytes) { return ceil_div(bytes, kAlignment) * kAlignment; }

}  // namespace

std::array<int64_t, kLayerMatrices> DecodeShape::rows() const {
  const int64_t kv = kv_heads * head_dim;
  return {heads * head_dim, kv, kv, d_model, hidden, hidden, d_model};
}

int64_t DecodeShape::channels(int product) const {
  const std::array<int64_t, kDecodeProducts> all = {d_model, heads * head_dim, d_model, hidden};
  return all[static_cast<size_t>(product)];
}

int64_t DecodeShape::row_tiles(int product) const {
  const auto n = rows();
  if (product == static_cast<int>(DecodeProduct::GateUp)) return quant::row_tiles(hidden);
  if (product != static_cast<int>(DecodeProduct::QueryKeyValue)) return quant::row_tiles(d_model);
  return quant::row_tiles(n[0]) + quant::row_tiles(n[1]) + quant::row_tiles(n[2]);
}

std::optional<DecodePlan> plan_decode(const DecodeShape& shape, int clusters, int ranks,
                                      int64_t smem_bytes) {
  const bool power = ranks == 1 || ranks == 2 || ranks == kMaxRanks;
  if (clusters < 1 || !power || (shape.head_dim != 64 && shape.head_dim != 128)) return {};
  if (shape.kv_heads < 1 || shape.heads % shape.kv_heads != 0 || shape.layers > kMaxLayers)
    return {};
  // Values travel in lines of four.
  if (shape.d_model % 4 != 0 || shape.hidden % 4 != 0) return {};
  if (shape.d_model > int64_t{kMaxNormLines} * 4 * kDecodeThreads) return {};

  DecodePlan plan{shape, clusters, ranks, {}, 0, 0, {}};
  int64_t exchange = 0, slices_of_block = 0, staged = 0;
  for (int p = 0; p < kDecodeProducts; ++p) {
    const size_t product = static_cast<size_t>(p);
    const int64_t all = shape.row_tiles(p), slices = column_slices(shape.stored_k[product]);
    const int64_t of_rank = ceil_div(slices, ranks);
    if (shape.stored_k[product] % 32 != 0) return {};
    if (!shape.gathers[product] && shape.stored_k[product] != shape.channels(p)) return {};
    slices_of_block = std::max(slices_of_block, of_rank);
    staged = std::max(staged, shape.gathers[product] ? shape.channels(p) : of_rank * kTileColumns);
    for (int64_t c = 0; c < clusters; ++c) {
      ClusterShare share{};
      share.first_tile = to_int(c * all / clusters);
      share.tiles = to_int((c + 1) * all / clusters) - share.first_tile;
      if (share.tiles > 0) {
        const std::vector<Segment> segments = segments_of(shape, p, share.first_tile, share.tiles);
        // A thread finishes one row, or one row of gate and of up.
        if (share.tiles * kTileRows / ranks > kDecodeThreads) return {};
        if (!divide_share(share, segments, of_rank)) return {};
        const int64_t kinds = p == static_cast<int>(DecodeProduct::GateUp) ? 2 : 1;
        exchange = std::max(exchange, kinds * share.tiles * kTileRows * share.lanes);
      }
      plan.shares[product].push_back(share);
    }
  }

  const int64_t group = shape.heads / shape.kv_heads;
  plan.units = to_int(shape.kv_heads * ceil_div(group, kUnitHeads));
  plan.partials = to_int(std::clamp<int64_t>(clusters / plan.units, 1, kMaxPartials));

  const int64_t operand = aligned(slices_of_block * kOperandBytes), row = aligned(staged * 2);
  const int64_t buffer = aligned(exchange * 4);
  const int64_t work = aligned(std::max(operand + row + 2 * buffer, merged_bytes(shape.head_dim)));
  const int64_t entries = aligned(shape.layers * int64_t{sizeof(LayerEntry)});
  const int64_t tiles =
      (smem_bytes - work - entries - kAlignment) / (kDecodeWarps * (kTileBytes + kBarrierBytes));
  if (tiles < kLeastRingTiles) return {};
  DecodeMemory& m = plan.memory;
  m.ring_tiles = to_int(tiles);
  m.exchange_floats = to_int(buffer / 4);
  m.barriers = to_int(tiles * kDecodeWarps * kTileBytes);
  m.operand = to_int(aligned(m.barriers + tiles * kDecodeWarps * kBarrierBytes));
  m.staged = to_int(m.operand + operand);
  m.exchange = to_int(m.staged + row);
  m.entries = to_int(m.operand + work);
  m.total = to_int(m.entries + entries);
  return plan;
}

}  // namespace bbb::quant
