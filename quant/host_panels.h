// Products of few rows with packed weights on a CPU, from 2-bit codes and 8-bit activations.
//
// A panel is 16 rows of W; rows beyond N hold zeros. One pass reads the panels in the order of
// their bytes. A panel is a sequence of units of 16 groups; the last may have fewer. A unit:
//
//     zeros   for each group, 16 zero points of 2 bits (plain 2-bit codes) or of 8
//     scales  for each group, 16 bytes: E4M3 codes, 0xFF for NaN; no others with a sign, which a
//             checkpoint refuses. Then zeros up to a multiple of 64 bytes
//     codes   for each group and plane, G/16 vectors of 64 bytes; 32-bit word r is row r's
//
// A plane holds two bits of every code, lowest first: 1 plane for 2 bits, 2 for 3 or 4, 4 for 8. In
// word w of a group, bits 2 i of byte j belong to position 16 w + 4 i + j. So a shift and a mask
// make 4 codes of 16 rows, each a byte. Plain 2-bit codes take as many bytes as in the file.
//
// An activation is a 16-bit integer A times its group's scale, split into two 8-bit integers:
//
//     A = 256 high + low,  x = A scale:   scale = max|x| / 32639, A = round(x / scale), error at
//                                         most scale / 2: 2e-5 of RMS(x) for normal values. If
//                                         max|x| < 2^-113, A = 0
//     quantized operands:                 A = code - zero, exact
//
// With the doubled level of a weight, L = f q + c - 2 z (f = 2, c = 0; nested codes: spec.h), a
// group's sum is the exact integer
//
//     D[g] = f (256 sum q high + sum q low) + (c - 2 z) sum A,   |D| < 2^31 for every grid
//     y = S sum_g D[g] (e[g] / 2 * scale[g])                     in FP32, groups in order
//
// Every instruction set gives the same bits. The packed bytes are read once for up to 4 rows of
// activations. 8 positions of 16 rows take a shift, two masks and, for each row of activations,
// four products of bytes.
#pragma once

#include <vector>

#include "quant/host.h"

namespace bbb::quant::host {

inline constexpr int64_t kPanelRows = 16, kUnitGroups = 16;

// The places in a panel of rows of K' codes.
struct PanelLayout {
  PanelLayout(int64_t k, const WeightGrid& grid);

  struct Places {
    int64_t zeros, scales, codes;
  };
  Places of_group(int64_t g) const {
    const int64_t i = g % kUnitGroups, first = g - i, left = groups - first;
    const int64_t count = left < kUnitGroups ? left : kUnitGroups;
    const int64_t unit = g / kUnitGroups * (codes_after(kUnitGroups) + kUnitGroups * code_bytes);
    return {unit + i * zero_bytes, unit + count * zero_bytes + i * kPanelRows,
            unit + codes_after(count) + i * code_bytes};
  }
  // Of the next group in the same unit.
  Places after(const Places& at) const {
    return {at.zeros + zero_bytes, at.scales + kPanelRows, at.codes + code_bytes};
  }
  // Of a unit of `count` groups, the place of its codes.
  int64_t codes_after(int64_t count) const {
    return (count * (zero_bytes + kPanelRows) + 63) / 64 * 64;
  }

  int planes;
  int zero_bits;                   // 2 or 8
  int64_t groups;                  // of a row
  int64_t zero_bytes, code_bytes;  // of a group
  int64_t bytes;                   // of a panel, a multiple of 64
  int32_t factor, offset;          // f and c
};

// A repacked linear.
struct PanelView {
  const uint8_t* panels;
  const float* master_scale;
  int64_t n;
  int64_t k;  // stored positions
  WeightGrid grid;

  int64_t count() const { return (n + kPanelRows - 1) / kPanelRows; }
};

int64_t panels_bytes(int64_t n, int64_t k, const WeightGrid& grid);
// Of panels [begin, end), as all below.
void make_panels(uint8_t* out, const PackedView& file, Rows panels);
// wq = (q - z) e of row `row`, (K).
void unpack_panel_row(float* wq, const PanelView& w, int64_t row);
// The same of all rows of the panels.
void unpack_panels(float* wq, const PanelView& w, Rows panels);

// Rows of activations as integers, which split_rows() writes.
struct SplitRows {
  void resize(int64_t rows, int64_t columns, int group_size);  // the content is lost

  int64_t m = 0, k = 0;
  int group = 0;
  int64_t groups = 0;               // of a row
  std::vector<int8_t> parts;        // (M, 2, K): high, low
  std::vector<int32_t> sums;        // (M, K/G): of A
  std::vector<int32_t> zero_terms;  // (M, K/G, 4): -4 z sum, for z = 0 .. 3
  std::vector<float> scales;        // (M, K/G): 64 times the scale
};
// Groups [begin, end) of the M K/G of all rows.
void split_rows(SplitRows& out, const float* x, Rows groups);
void split_rows(SplitRows& out, const QuantizedRows<float>& x, Rows groups);

enum class VectorSet { Portable, Avx2, Avx512Vnni };
bool runs(VectorSet set);  // on this CPU
VectorSet fastest_set();

// y[m, n] = S sum_k x[m, k] wq[n, k] (+ addend[m, n]) for the rows n of the panels. y, addend (M,
// N); addend may be null. A NaN or infinity in x makes its row of y NaN or infinite.
void panel_gemv(float* y, const SplitRows& x, const PanelView& w, const float* addend, Rows panels,
                VectorSet set);

}  // namespace bbb::quant::host
