// The layout of 2-bit codes that Hopper GPUs multiply (Backend::repack).
//
// A tile holds kTileRows output rows by kTileColumns positions: four sub-groups of 32 positions,
// which have one scale and zero point a row each. Groups of 64 or 128 repeat theirs. A tile is what
// a warp multiplies: lane = 4 r + t holds four words
//
//     word 0  row r,     positions P                   word 2  row r,     positions 16 + P
//     word 1  row r + 8, positions P                   word 3  row r + 8, positions 16 + P
//
// of all four sub-groups, P = 2t, 2t + 8, 2t + 1, 2t + 9 for bytes 0 to 3. Bits 2i, 2i + 1 of a
// byte are the code in sub-group i. So one mask makes
//
//     of all bytes        the A fragment of m16n8k32 in bytes, of codes times 4^i, for an x whose
//                         positions are in the order of P
//     of bytes 0 and 2    registers 0 and 1 of the A fragment of k16 in bf16; bytes 1 and 3 are
//                         its registers 2 and 3. Positions are in their own order.
//
//     bytes 0 .. 511     the words, 16 bytes a lane
//     bytes 512 .. 575   scales: 2 bytes a lane, e of sub-group t of rows r and r + 8
//     bytes 576 .. 591   zero points: 2 bytes for each r, of rows r and r + 8, sub-group i in bits
//                        2i, 2i + 1
//
// Tile (slice, row tile) is at tile_index(): all rows of 128 positions, then the next positions.
// What lies outside of the matrix is 0.
#pragma once

#include <cstdint>

#include "quant/format.h"
#include "quant/hd.h"
#include "quant/pack.h"

namespace bbb::quant {

constexpr int kTileRows = 16;
constexpr int kTileColumns = 128;
constexpr int kSubgroup = 32;  // positions
constexpr int kTileScales = 512, kTileZeros = 576, kTileBytes = 592;
static_assert(kTileBytes % 16 == 0, "the copy engine moves multiples of 16 bytes");

// Whether this grid has the layout.
constexpr bool has_tiles(const WeightGrid& grid) { return grid.bits == 2 && !grid.nested; }

BBB_HD constexpr int64_t row_tiles(int64_t n) { return (n + kTileRows - 1) / kTileRows; }
BBB_HD constexpr int64_t column_slices(int64_t k) { return (k + kTileColumns - 1) / kTileColumns; }
constexpr int64_t tiled_bytes(int64_t n, int64_t k) {
  return row_tiles(n) * column_slices(k) * kTileBytes;
}
BBB_HD constexpr int64_t tile_index(int64_t n, int64_t slice, int64_t row_tile) {
  return slice * row_tiles(n) + row_tile;
}

// The offset in a tile of the byte with the codes of (row, column) in each sub-group; column < 32.
BBB_HD constexpr int code_offset(int row, int column) {
  const int lane = row % 8 * 4 + column % 8 / 2, word = column / 16 * 2 + row / 8;
  return lane * 16 + word * 4 + column % 2 * 2 + column / 8 % 2;
}
BBB_HD constexpr int scale_offset(int row, int subgroup) {
  return kTileScales + (row % 8 * 4 + subgroup) * 2 + row / 8;
}
BBB_HD constexpr int zero_offset(int row) { return kTileZeros + row % 8 * 2 + row / 8; }

// Code, scale and zero point of (row, column) of the matrix.
BBB_HD uint8_t tiled_code(const uint8_t* tiles, int64_t n, int64_t row, int64_t column) {
  const uint8_t* tile = tiles + tile_index(n, column / kTileColumns, row / kTileRows) * kTileBytes;
  const int inside = static_cast<int>(column % kTileColumns);
  return tile[code_offset(static_cast<int>(row % kTileRows), inside % kSubgroup)] >>
             (inside / kSubgroup * 2) &
         3;
}
BBB_HD uint8_t tiled_scale(const uint8_t* tiles, int64_t n, int64_t row, int64_t column) {
  const uint8_t* tile = tiles + tile_index(n, column / kTileColumns, row / kTileRows) * kTileBytes;
  return tile[scale_offset(static_cast<int>(row % kTileRows),
                           static_cast<int>(column % kTileColumns) / kSubgroup)];
}
BBB_HD uint8_t tiled_zero(const uint8_t* tiles, int64_t n, int64_t row, int64_t column) {
  const uint8_t* tile = tiles + tile_index(n, column / kTileColumns, row / kTileRows) * kTileBytes;
  return tile[zero_offset(static_cast<int>(row % kTileRows))] >>
             (static_cast<int>(column % kTileColumns) / kSubgroup * 2) &
         3;
}

// Byte `offset` of tile (slice, row tile), from the file's layout.
BBB_HD uint8_t tile_byte(const PackedView& w, int64_t slice, int64_t row_tile, int offset) {
  // Its row in the tile, and for codes its column in a sub-group.
  const int pair = offset < kTileScales  ? offset / 64
                   : offset < kTileZeros ? (offset - kTileScales) / 8
                                         : (offset - kTileZeros) / 2;
  const int half = offset < kTileScales ? offset / 4 % 2 : offset % 2;
  const int64_t row = row_tile * kTileRows + pair + half * 8;
  if (row >= w.n) return 0;
  if (offset >= kTileScales && offset < kTileZeros) {
    const int64_t column = slice * kTileColumns + (offset - kTileScales) / 2 % 4 * kSubgroup;
    return column < w.k ? w.scales[row * (w.k / w.grid.group) + column / w.grid.group] : uint8_t{0};
  }
  const int inside =  // of a code
      offset / 16 % 4 * 2 + offset / 8 % 2 * 16 + offset % 2 * 8 + offset / 2 % 2;
  unsigned byte = 0;
  for (int i = 0; i < 4; ++i) {
    const int64_t column = slice * kTileColumns + i * kSubgroup;
    if (column >= w.k) break;
    const unsigned code =
        offset < kTileScales
            ? packed_code(w.qweight + row * code_row_bytes(w.k, 2), column + inside, 2)
            : packed_code(w.zeros + row * zero_row_bytes(w.k, w.grid.group, 2),
                          column / w.grid.group, 2);
    byte |= code << (2 * i);
  }
  return static_cast<uint8_t>(byte);
}

}  // namespace bbb::quant
