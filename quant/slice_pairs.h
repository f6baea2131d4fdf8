// Scales and zero points of a stored matrix with 3, 4 or 8 bits, once more: the products of many
// rows (cuda/packed_gemm.cu) read them beside the file's codes (Backend::repack).
//
// An entry is of 128 positions of a row: four sub-groups of 32. Groups of 64 or 128 repeat theirs.
//
//     bytes 0 .. 3   e of each sub-group
//     bytes 4 .. 7   z of each sub-group
//
// Entry (slice, row) is number slice * rows + row, where rows fill tiles of 16. What lies outside
// of the matrix is 0.
#pragma once

#include <cstdint>

#include "quant/format.h"
#include "quant/packed_tiles.h"

namespace bbb::quant {

constexpr int kSlicePairBytes = 8;

// Whether products of many rows read this format: the copy engine takes rows of codes of a multiple
// of 16 bytes.
inline bool has_slice_pairs(const LinearFormat& format) {
  const int bits = format.weight.bits;
  return !format.weight.nested && (bits == 3 || bits == 4 || bits == 8) &&
         code_row_bytes(format.stored_k(), bits) % 16 == 0;
}

BBB_HD constexpr int64_t slice_pair_rows(int64_t n) { return row_tiles(n) * kTileRows; }
constexpr int64_t slice_pairs_bytes(int64_t n, int64_t k) {
  return column_slices(k) * slice_pair_rows(n) * kSlicePairBytes;
}

// Byte `byte` of entry (slice, row).
BBB_HD uint8_t slice_pair_byte(const PackedView& w, int64_t slice, int64_t row, int byte) {
  const int64_t column = slice * kTileColumns + byte % 4 * kSubgroup;
  if (row >= w.n || column >= w.k) return 0;
  const int64_t g = column / w.grid.group;
  return byte < 4 ? w.scales[row * (w.k / w.grid.group) + g]
                  : packed_code(w.zeros + row * zero_row_bytes(w.k, w.grid.group, w.grid.bits), g,
                                w.grid.bits);
}

}  // namespace bbb::quant
