// The loop of panel_gemv (host_panels.h) on a vector set V:
//
//     V::kLanes         rows of a vector: a panel is 16 / kLanes of them
//     V::Ints, Floats   32 bits a lane
//     V::Dots           sums of products of bytes, which V::total() adds up to one Ints
//
// Included once for each set, inside the region that allows its instructions. So this file includes
// nothing: an inline function of another header would be compiled with them too.

namespace bbb::quant::host {

// A line is read this many bytes after its prefetch. The panels of a task follow one another.
constexpr int64_t kAhead = 2048;

// sum[b][r] = 4 sum_k q x of block b, 32 positions in two words a row, with both parts of x joined.
// The codes at the odd positions of a byte come out of the mask as 4 q, which saves a shift. So the
// sums of the even ones are multiplied by 4. The blocks' chains of sums overlap.
template <typename V, int kBlocks, int kRows>
static inline void block_sums(typename V::Ints (&sum)[kBlocks][kRows], const uint8_t* codes,
                              const int8_t* x, int64_t k) {
  using Ints = typename V::Ints;
  typename V::Dots high[kBlocks][kRows], low[kBlocks][kRows];
  Ints packed[kBlocks][4];
  for (int b = 0; b < kBlocks; ++b) {
    for (int r = 0; r < kRows; ++r) high[b][r] = low[b][r] = V::no_dots();
    for (int word = 0; word < 2; ++word, codes += 4 * kPanelRows) {
      packed[b][2 * word] = V::load(codes);
      packed[b][2 * word + 1] = V::shift_right(packed[b][2 * word], 4);
      __builtin_prefetch(codes + kAhead);
    }
  }
#pragma GCC unroll 2
  for (int odd = 0; odd < 2; ++odd) {
    for (int b = 0; b < kBlocks; ++b)
      for (int r = 0; r < kRows && odd == 1; ++r) {
        high[b][r] = V::four_times(high[b][r]);
        low[b][r] = V::four_times(low[b][r]);
      }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      for (int b = 0; b < kBlocks; ++b) {
        const Ints code = V::mask(packed[b][i], odd == 1 ? 0x0C0C0C0C : 0x03030303);
        for (int r = 0; r < kRows; ++r) {
          const int8_t* const at = x + 2 * r * k + 32 * b + 8 * i + 4 * odd;
          high[b][r] = V::dot(high[b][r], code, at);
          low[b][r] = V::dot(low[b][r], code, at + k);
        }
      }
  }
  for (int b = 0; b < kBlocks; ++b)
    for (int r = 0; r < kRows; ++r)
      sum[b][r] = V::add(V::shift_left(V::total(high[b][r]), 8), V::total(low[b][r]));
}

// dot[r] = sum_k q x of a group, a plane after another.
template <typename V, int kRows>
static inline void group_dot(typename V::Ints (&dot)[kRows], const uint8_t* codes, const int8_t* x,
                             int64_t k, int group, int planes) {
  for (int r = 0; r < kRows; ++r) dot[r] = V::splat(0);
  for (int plane = 0; plane < planes; ++plane)
    for (int at = 0; at < group; at += 32, codes += 8 * kPanelRows) {
      typename V::Ints sum[1][kRows];
      block_sums<V>(sum, codes, x + at, k);
      for (int r = 0; r < kRows; ++r)
        dot[r] = V::add(dot[r], V::shift_left(V::quarter(sum[0][r]), 2 * plane));
    }
}

// kRows rows of activations from row `m`. kPlain: 2-bit codes, not nested, in groups of 32.
template <typename V, int kRows, bool kPlain>
static void panel_rows(float* y, const SplitRows& x, const PanelView& w, const PanelLayout& layout,
                       const float* addend, int64_t panel, int64_t m) {
  using Ints = typename V::Ints;
  const uint8_t* const base = w.panels + panel * layout.bytes;
  const int64_t k = x.k, groups = x.groups;
  const int8_t* const parts = x.parts.data() + 2 * m * k;  // the next row is 2 K further
  const int32_t* const sums = x.sums.data() + m * groups;
  const int32_t* const zero_terms = x.zero_terms.data() + 4 * m * groups;
  const float* const scales = x.scales.data() + m * groups;

  for (int lane = 0; lane < kPanelRows; lane += V::kLanes) {
    typename V::Floats out[kRows];
    for (int r = 0; r < kRows; ++r) out[r] = V::no_floats();
    for (int64_t g = 0; g < groups;) {
      const int64_t end = g + kUnitGroups < groups ? g + kUnitGroups : groups;
      const PanelLayout::Places places = layout.of_group(g);
      const uint8_t* zeros = base + places.zeros;
      const uint8_t* e = base + places.scales + lane;
      const uint8_t* codes = base + places.codes;
      for (const uint8_t* line = zeros; line < codes; line += 64) __builtin_prefetch(line + kAhead);
      codes += 4 * lane;

      // Adds group g; sum[r] is 4 sum_k q x if kPlain, else sum_k q x.
      const auto add_group = [&](const Ints(&sum)[kRows]) {
        Ints zero;  // of kPlain, in the lowest 2 bits
        if constexpr (kPlain)
          zero = V::zeros_of_2_bits(zeros, lane);
        else
          zero = layout.zero_bits == 2 ? V::mask(V::zeros_of_2_bits(zeros, lane), 3)
                                       : V::bytes(zeros + lane);
        const typename V::Floats scale = V::scales(e);
        for (int r = 0; r < kRows; ++r) {
          const int64_t at = r * groups + g;
          Ints total;
          if constexpr (kPlain) {
            total = V::add(sum[r], V::one_of_four(zero_terms + 4 * at, zero));
          } else {
            const Ints shared = V::subtract(V::splat(layout.offset), V::add(zero, zero));
            total = V::add(V::multiply(sum[r], V::splat(layout.factor)),
                           V::multiply(shared, V::splat(sums[at])));
          }
          out[r] = V::multiply_add(V::to_float(total), scale, scales[at], out[r]);
        }
        zeros += layout.zero_bytes;
        codes += layout.code_bytes;
        e += kPanelRows;
        ++g;
      };
      if constexpr (kPlain && kRows == 1)
        while (end - g >= 2) {
          Ints sum[2][1];
          block_sums<V>(sum, codes, parts + 32 * g, k);
          add_group(sum[0]);
          add_group(sum[1]);
        }
      while (g < end) {
        Ints sum[1][kRows];
        if constexpr (kPlain)
          block_sums<V>(sum, codes, parts + 32 * g, k);
        else
          group_dot<V>(sum[0], codes, parts + g * w.grid.group, k, w.grid.group, layout.planes);
        add_group(sum[0]);
      }
    }

    // V::scales() gives e / 256, x.scales 64 times the scale, and D is twice the sum of q - z.
    const float master_scale = (kPlain ? 1 : 2) * *w.master_scale;
    const int64_t row = panel * kPanelRows + lane;
    for (int r = 0; r < kRows; ++r) {
      float values[V::kLanes];
      V::store(values, out[r]);
      const int64_t first = (m + r) * w.n + row;
      const auto write = [&](int64_t count) {
        for (int64_t i = 0; i < count; ++i) {
          const float value = master_scale * values[i];
          y[first + i] = addend != nullptr ? value + addend[first + i] : value;
        }
      };
      if (w.n - row >= V::kLanes)
        write(V::kLanes);
      else
        write(w.n - row);
    }
  }
}

template <typename V, bool kPlain>
static void panel_gemv_of(float* y, const SplitRows& x, const PanelView& w,
                          const PanelLayout& layout, const float* addend, Rows panels) {
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    int64_t m = 0;
    for (; x.m - m >= 4; m += 4) panel_rows<V, 4, kPlain>(y, x, w, layout, addend, panel, m);
    if (x.m - m >= 2) panel_rows<V, 2, kPlain>(y, x, w, layout, addend, panel, m), m += 2;
    if (x.m - m >= 1) panel_rows<V, 1, kPlain>(y, x, w, layout, addend, panel, m);
  }
}

template <typename V>
static void panel_gemv_on(float* y, const SplitRows& x, const PanelView& w, const float* addend,
                          Rows panels) {
  const PanelLayout layout(w.k, w.grid);
  if (layout.zero_bits == 2 && w.grid.group == 32)
    panel_gemv_of<V, true>(y, x, w, layout, addend, panels);
  else
    panel_gemv_of<V, false>(y, x, w, layout, addend, panels);
}

}  // namespace bbb::quant::host
