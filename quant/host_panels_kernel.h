// The loop of panel_gemv (host_panels.h) on a vector set V:
//
//     V::kLanes         rows of a vector: a panel is 16 / kLanes of them
//     V::Ints, Floats   32 bits a lane
//     V::Dots           sums of products of bytes, which V::total() adds up to one Ints
//
// Included once for each set, inside the region that allows its instructions. So this file includes
// nothing: an inline function of another header would be compiled with them too.

namespace bbb::quant::host {

// The codes are read this many bytes after their prefetch. So far ahead of the end of a panel's
// codes are its scales and zeros, and the next panel.
constexpr int64_t kAhead = 2048;

// kRows rows of activations from row `m`.
template <typename V, int kRows>
static void panel_rows(float* y, const SplitRows& x, const PanelView& w, const PanelLayout& layout,
                       const float* addend, int64_t panel, int64_t m) {
  using Ints = typename V::Ints;
  const uint8_t* const base = w.panels + panel * layout.bytes;
  const int words = w.grid.group / 16;
  const int64_t row = panel * kPanelRows;
  const int8_t* const high = x.parts.data() + 2 * m * x.k;  // the next row is 2 K further
  const int8_t* const low = high + x.k;
  const int32_t* const sums = x.sums.data() + m * x.groups;
  const float* const scales = x.scales.data() + m * x.groups;

  for (int lane = 0; lane < kPanelRows; lane += V::kLanes) {
    const uint8_t* codes = base + 4 * lane;
    typename V::Floats out[kRows];
    for (int r = 0; r < kRows; ++r) out[r] = V::no_floats();
    for (int64_t g = 0; g < x.groups; ++g) {
      Ints dot[kRows];
      for (int r = 0; r < kRows; ++r) dot[r] = V::splat(0);
      for (int plane = 0; plane < layout.planes; ++plane) {
        typename V::Dots dot_high[kRows], dot_low[kRows];
        for (int r = 0; r < kRows; ++r) dot_high[r] = dot_low[r] = V::no_dots();
        int64_t k = g * w.grid.group;
        for (int word = 0; word < words; ++word, codes += 4 * kPanelRows) {
          const Ints packed = V::load(codes);
          __builtin_prefetch(codes + kAhead);
          for (int i = 0; i < 4; ++i, k += 4) {
            const Ints code = V::mask(V::shift_right(packed, 2 * i), 0x03030303);
            for (int r = 0; r < kRows; ++r) {
              dot_high[r] = V::dot(dot_high[r], code, high + 2 * r * x.k + k);
              dot_low[r] = V::dot(dot_low[r], code, low + 2 * r * x.k + k);
            }
          }
        }
        for (int r = 0; r < kRows; ++r) {
          const Ints both = V::add(V::shift_left(V::total(dot_high[r]), 8), V::total(dot_low[r]));
          dot[r] = V::add(dot[r], V::shift_left(both, 2 * plane));
        }
      }
      const uint8_t* const z = base + layout.zeros + g * (2 * layout.zero_bits);
      const Ints zero = layout.zero_bits == 2 ? V::zeros_of_2_bits(z, lane) : V::bytes(z + lane);
      const Ints shared = V::subtract(V::splat(layout.offset), V::add(zero, zero));
      const typename V::Floats e = V::scales(base + layout.scales + g * kPanelRows + lane);
      for (int r = 0; r < kRows; ++r) {
        const Ints sum = V::add(V::multiply(dot[r], V::splat(layout.factor)),
                                V::multiply(shared, V::splat(sums[r * x.groups + g])));
        // V::scales() gives e / 256, and the level is doubled.
        out[r] = V::multiply_add(V::to_float(sum), e, 128 * scales[r * x.groups + g], out[r]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      float values[V::kLanes];
      V::store(values, out[r]);
      for (int i = 0; i < V::kLanes && row + lane + i < w.n; ++i) {
        const int64_t at = (m + r) * w.n + row + lane + i;
        const float value = *w.master_scale * values[i];
        y[at] = addend != nullptr ? value + addend[at] : value;
      }
    }
  }
}

template <typename V>
static void panel_gemv_on(float* y, const SplitRows& x, const PanelView& w, const float* addend,
                          Rows panels) {
  const PanelLayout layout(w.k, w.grid);
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    int64_t m = 0;
    for (; x.m - m >= 4; m += 4) panel_rows<V, 4>(y, x, w, layout, addend, panel, m);
    if (x.m - m >= 2) panel_rows<V, 2>(y, x, w, layout, addend, panel, m), m += 2;
    if (x.m - m >= 1) panel_rows<V, 1>(y, x, w, layout, addend, panel, m);
  }
}

}  // namespace bbb::quant::host
