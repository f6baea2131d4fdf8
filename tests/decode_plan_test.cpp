// The schedule of the kernel of a decode step: every tile of every product is taken once.
#include "quant/decode_plan.h"

#include <catch2/catch.hpp>
#include <map>
#include <set>
#include <tuple>

#include "models/config.h"
#include "quant/packed_tiles.h"

namespace bbb::tests {
namespace {

using quant::DecodePlan;
using quant::DecodeProduct;
using quant::DecodeShape;
using quant::kDecodeProducts;
using quant::kDecodeWarps;

constexpr int64_t kSmemBytes = 220 * 1024;  // of a block on Hopper, less what the kernel adds

DecodeShape shape_of(const models::LlamaConfig& c) {
  return {.d_model = c.d_model,
          .hidden = c.hidden,
          .heads = c.heads,
          .kv_heads = c.kv_heads,
          .head_dim = c.head_dim,
          .layers = c.layers,
          .stored_k = {c.d_model, c.heads * c.head_dim, c.d_model, c.hidden},
          .gathers = {}};
}

// (matrix, tile, slice of rank `rank`) -> how often it is taken.
void check_covers(const DecodePlan& plan) {
  using Tile = std::tuple<int, int64_t, int64_t>;
  const std::array<std::set<int>, kDecodeProducts> matrices = {{{0, 1, 2}, {3}, {4, 5}, {6}}};
  for (size_t p = 0; p < kDecodeProducts; ++p) {
    const int64_t slices = quant::column_slices(plan.shape.stored_k[p]);
    std::map<Tile, int> taken;
    REQUIRE(plan.shares[p].size() == static_cast<size_t>(plan.clusters));
    for (const quant::ClusterShare& share : plan.shares[p]) {
      std::set<std::tuple<bool, int, int>> places;  // (is up, slot, lane)
      for (const quant::WarpShare& w : share.warps) {
        if (w.tiles == 0) continue;
        REQUIRE(w.tiles <= quant::kPartTiles);
        REQUIRE(matrices[p].count(w.matrix) == 1);
        REQUIRE(w.lane < share.lanes);
        REQUIRE(w.matrix_tiles ==
                quant::row_tiles(plan.shape.rows()[static_cast<size_t>(w.matrix)]));
        for (int i = 0; i < w.tiles; ++i) {
          REQUIRE(w.slot + i < share.tiles);
          REQUIRE(places.insert({w.matrix == 5, w.slot + i, w.lane}).second);
        }
        for (int64_t rank = 0; rank < plan.ranks; ++rank)
          for (int64_t s = rank * slices / plan.ranks + w.lane;
               s < (rank + 1) * slices / plan.ranks; s += share.lanes)
            for (int64_t i = 0; i < w.tiles; ++i) ++taken[{w.matrix, w.first_tile + i, s}];
      }
      // Every lane of every row sends its sums.
      const size_t kinds = p == static_cast<size_t>(DecodeProduct::GateUp) ? 2 : 1;
      REQUIRE(places.size() == kinds * static_cast<size_t>(share.tiles * share.lanes));
    }
    int64_t tiles = 0;
    for (const int m : matrices[p])
      tiles += quant::row_tiles(plan.shape.rows()[static_cast<size_t>(m)]);
    REQUIRE(taken.size() == static_cast<size_t>(tiles * slices));
    for (const auto& [tile, count] : taken) REQUIRE(count == 1);
  }
  // A thread finishes the same row of `output` and of `down`.
  for (size_t c = 0; c < static_cast<size_t>(plan.clusters); ++c) {
    REQUIRE(plan.shares[1][c].first_tile == plan.shares[3][c].first_tile);
    REQUIRE(plan.shares[1][c].tiles == plan.shares[3][c].tiles);
  }
}

void check_memory(const DecodePlan& plan) {
  const quant::DecodeMemory& m = plan.memory;
  CHECK(m.ring_tiles >= 2 * quant::kPartTiles);
  CHECK(m.barriers == m.ring_tiles * kDecodeWarps * quant::kTileBytes);
  CHECK(m.operand >= m.barriers + 8 * m.ring_tiles * kDecodeWarps);
  CHECK(m.entries - m.operand >= quant::merged_bytes(plan.shape.head_dim));
  CHECK(m.entries - m.exchange >= 8 * m.exchange_floats);
  CHECK(m.total <= kSmemBytes);
  for (const int offset : {m.operand, m.staged, m.exchange, m.entries, m.total})
    CHECK(offset % 128 == 0);
  for (size_t p = 0; p < kDecodeProducts; ++p) {
    const int64_t slices =
        (quant::column_slices(plan.shape.stored_k[p]) + plan.ranks - 1) / plan.ranks;
    CHECK(m.staged - m.operand >= slices * quant::kOperandBytes);
    CHECK(m.exchange - m.staged >= (plan.shape.gathers[p] ? plan.shape.channels(static_cast<int>(p))
                                                          : slices * quant::kTileColumns) *
                                       2);
    for (const quant::ClusterShare& share : plan.shares[p])
      CHECK(share.tiles * quant::kTileRows * share.lanes * (p == 2 ? 2 : 1) <= m.exchange_floats);
  }
}

}  // namespace

TEST_CASE("decode plan: every tile of a model is taken once", "[decode_layers]") {
  for (const char* name : {"smollm2-135m", "llama-3.2-1b", "llama-3-8b", "llama-2-7b"})
    for (const auto& [clusters, ranks] : {std::pair{32, 4}, {33, 4}, {30, 4}, {66, 2}}) {
      CAPTURE(name, clusters, ranks);
      const auto plan =
          plan_decode(shape_of(models::synthetic_config(name)), clusters, ranks, kSmemBytes);
      REQUIRE(plan);
      check_covers(*plan);
      check_memory(*plan);
      // About 190 KB of weights are in flight.
      CHECK(plan->memory.ring_tiles * kDecodeWarps * quant::kTileBytes > 150 * 1024);
    }
}

TEST_CASE("decode plan: odd shapes, channel orders", "[decode_layers]") {
  // Rows that are no multiple of a tile; fewer tiles than clusters; groups of seven heads.
  DecodeShape qwen{.d_model = 3584,
                   .hidden = 18944,
                   .heads = 28,
                   .kv_heads = 4,
                   .head_dim = 128,
                   .layers = 28,
                   .stored_k = {3584, 3584, 3584, 18944},
                   .gathers = {}};
  DecodeShape odd{.d_model = 100,
                  .hidden = 300,
                  .heads = 3,
                  .kv_heads = 1,
                  .head_dim = 64,
                  .layers = 2,
                  .stored_k = {128, 224, 128, 320},
                  .gathers = {true, true, true, true}};
  for (const DecodeShape& shape : {qwen, odd})
    for (const auto& [clusters, ranks] : {std::pair{1, 4}, {3, 2}, {32, 4}, {66, 2}}) {
      CAPTURE(shape.d_model, clusters, ranks);
      const auto plan = plan_decode(shape, clusters, ranks, kSmemBytes);
      // One cluster has too few warps for the large model.
      REQUIRE(plan.has_value() == (clusters > 3 || shape.d_model == 100));
      if (!plan) continue;
      check_covers(*plan);
      check_memory(*plan);
      CHECK(plan->units == (shape.d_model == 100 ? 1 : 8));
      CHECK(plan->partials >= 1);
      CHECK(plan->partials <= quant::kMaxPartials);
    }
}

TEST_CASE("decode plan: shapes that the kernel does not take", "[decode_layers]") {
  const DecodeShape good = shape_of(models::synthetic_config("llama-3.2-1b"));
  REQUIRE(plan_decode(good, 32, 4, kSmemBytes));
  DecodeShape heads = good, columns = good, wide = good;
  heads.head_dim = 96;
  columns.stored_k[1] += 32;  // not the channels, and no order
  wide.d_model = 16384;
  for (const DecodeShape& shape : {heads, columns, wide})
    CHECK_FALSE(plan_decode(shape, 32, 4, kSmemBytes));
  CHECK_FALSE(plan_decode(good, 32, 3, kSmemBytes));
  CHECK_FALSE(plan_decode(good, 32, 4, 160 * 1024));
}

}  // namespace bbb::tests
