#include "quant/host_panels.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "quant/check.h"
#include "quant/e4m3.h"
#include "quant/host_panels_kernel.h"
#include "quant/host_panels_sets.h"
#include "quant/pack.h"

namespace bbb::quant::host {
namespace {

constexpr uint8_t kPanelNan = 0xFF;
constexpr float kLargestInteger = 32639;     // 256 * 127 + 127: both parts fit in 8 bits
constexpr float kSmallestSplit = 0x1p-113f;  // below it kLargestInteger / max|x| may be infinite

// Plain loops over the lanes.
struct Portable {
  using Ints = std::array<int32_t, 16>;
  using Floats = std::array<float, 16>;
  using Dots = Ints;
  static constexpr int kLanes = 16;

  template <typename Out, typename Fn>
  static Out each(const Fn& fn) {
    Out out;
    for (size_t i = 0; i < out.size(); ++i) out[i] = fn(i);
    return out;
  }
  // Sums wrap: a partial sum may leave 32 bits, a group's sum does not.
  static int32_t wrapped(uint32_t x) { return static_cast<int32_t>(x); }

  static Ints load(const uint8_t* from) {
    Ints out;
    std::memcpy(out.data(), from, sizeof out);
    return out;
  }
  static Ints splat(int32_t x) {
    return each<Ints>([=](size_t) { return x; });
  }
  static Ints shift_right(const Ints& x, int by) {
    return each<Ints>([&](size_t i) { return wrapped(uint32_t(x[i]) >> by); });
  }
  static Ints shift_left(const Ints& x, int by) {
    return each<Ints>([&](size_t i) { return wrapped(uint32_t(x[i]) << by); });
  }
  static Ints mask(const Ints& x, int32_t bits) {
    return each<Ints>([&](size_t i) { return x[i] & bits; });
  }
  static Ints add(const Ints& a, const Ints& b) {
    return each<Ints>([&](size_t i) { return wrapped(uint32_t(a[i]) + uint32_t(b[i])); });
  }
  static Ints subtract(const Ints& a, const Ints& b) {
    return each<Ints>([&](size_t i) { return wrapped(uint32_t(a[i]) - uint32_t(b[i])); });
  }
  static Ints multiply(const Ints& a, const Ints& b) {
    return each<Ints>([&](size_t i) { return wrapped(uint32_t(a[i]) * uint32_t(b[i])); });
  }
  static Dots no_dots() { return splat(0); }
  static Dots dot(const Dots& sum, const Ints& codes, const int8_t* x) {
    return each<Ints>([&](size_t i) {
      int32_t out = sum[i];
      for (int j = 0; j < 4; ++j) out += (codes[i] >> (8 * j) & 0xFF) * x[j];
      return out;
    });
  }
  static Dots four_times(const Dots& sum) { return shift_left(sum, 2); }
  static Ints total(const Dots& sum) { return sum; }
  static Ints quarter(const Ints& x) {
    return each<Ints>([&](size_t i) { return x[i] >> 2; });
  }
  static Ints bytes(const uint8_t* from) {
    return each<Ints>([=](size_t i) { return int32_t{from[i]}; });
  }
  // In the lowest 2 bits of a lane.
  static Ints zeros_of_2_bits(const uint8_t* from, int) {
    return each<Ints>([=](size_t i) { return from[i / 4] >> (2 * (i % 4)); });
  }
  // four[the lowest 2 bits of a lane].
  static Ints one_of_four(const int32_t* four, const Ints& index) {
    return each<Ints>([&](size_t i) { return four[index[i] & 3]; });
  }
  static Floats scales(const uint8_t* from) {
    return each<Floats>([=](size_t i) { return e4m3_decode(from[i]) * 0x1p-8f; });
  }
  static Floats no_floats() { return {}; }
  static Floats to_float(const Ints& x) {
    return each<Floats>([&](size_t i) { return static_cast<float>(x[i]); });
  }
  static Floats multiply_add(const Floats& x, const Floats& e, float scale, const Floats& sum) {
    return each<Floats>([&](size_t i) { return std::fma(x[i], e[i] * scale, sum[i]); });
  }
  static void store(float* to, const Floats& x) { std::copy(x.begin(), x.end(), to); }
};

}  // namespace

PanelLayout::PanelLayout(int64_t k, const WeightGrid& grid)
    : planes(grid.bits <= 2   ? 1
             : grid.bits <= 4 ? 2
                              : 4),
      zero_bits(grid.bits == 2 && !grid.nested ? 2 : 8),
      groups(k / grid.group),
      zero_bytes(2 * zero_bits),
      code_bytes(planes * grid.group * kPanelRows / 4),
      factor(grid.nested ? 2 << (kNestedBits - grid.bits) : 2),
      offset(grid.nested ? nested_level_doubled(0, 0, grid.bits, grid.dequant) : 0) {
  bytes = of_group(groups - 1).codes + code_bytes;
}

// In a word of codes, the lower bit of its position i.
static constexpr int position_shift(int i) { return i % 4 * 8 + i / 4 * 2; }

int64_t panels_bytes(int64_t n, int64_t k, const WeightGrid& grid) {
  return (n + kPanelRows - 1) / kPanelRows * PanelLayout(k, grid).bytes;
}

void make_panels(uint8_t* out, const PackedView& file, Rows panels) {
  const PanelLayout layout(file.k, file.grid);
  const int group = file.grid.group, zero_width = file.grid.nested ? kNestedBits : file.grid.bits;
  const int64_t words = group / 16;
  std::vector<uint8_t> codes(static_cast<size_t>(file.k)),
      zeros(static_cast<size_t>(layout.groups));
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    uint8_t* const base = out + panel * layout.bytes;
    std::memset(base, 0, static_cast<size_t>(layout.bytes));
    for (int64_t r = 0; r < kPanelRows; ++r) {
      const int64_t row = panel * kPanelRows + r;
      if (row >= file.n) break;
      row_codes(codes.data(), file, row);
      unpack_codes(zeros.data(), file.zeros + row * zero_row_bytes(file.k, group, zero_width),
                   layout.groups, zero_width);
      const uint8_t* code = codes.data();
      for (int64_t g = 0; g < layout.groups; ++g) {
        const PanelLayout::Places at = layout.of_group(g);
        for (int64_t word = 0; word < words; ++word, code += 16)
          for (int plane = 0; plane < layout.planes; ++plane) {
            uint32_t packed = 0;
            for (int i = 0; i < 16; ++i)
              packed |= static_cast<uint32_t>(code[i] >> (2 * plane) & 3) << position_shift(i);
            std::memcpy(base + at.codes + ((plane * words + word) * kPanelRows + r) * 4, &packed,
                        4);
          }
        const uint8_t e = file.scales[row * layout.groups + g], z = zeros[static_cast<size_t>(g)];
        base[at.scales + r] = (e & 0x7F) == kE4m3Nan ? kPanelNan : e;
        if (layout.zero_bits == 8)
          base[at.zeros + r] = z;
        else
          base[at.zeros + r / 4] |= static_cast<uint8_t>(z << (2 * (r % 4)));
      }
    }
  }
}

// out = q step + first of a group of one row, whose first word is at `codes`.
template <int kPlanes>
static void unpack_group(float* out, const uint8_t* codes, int64_t words, float step, float first) {
  for (int64_t word = 0; word < words; ++word, out += 16) {
    uint32_t packed[kPlanes];
    for (int plane = 0; plane < kPlanes; ++plane)
      std::memcpy(&packed[plane], codes + (plane * words + word) * 4 * kPanelRows, 4);
    for (int i = 0; i < 16; ++i) {
      uint32_t q = 0;
      for (int plane = 0; plane < kPlanes; ++plane)
        q |= (packed[plane] >> position_shift(i) & 3) << (2 * plane);
      out[i] = static_cast<float>(static_cast<int32_t>(q)) * step + first;
    }
  }
}

void unpack_panel_row(float* wq, const PanelView& w, int64_t row) {
  const PanelLayout layout(w.k, w.grid);
  const int group = w.grid.group;
  const int64_t r = row % kPanelRows;
  const uint8_t* const base = w.panels + row / kPanelRows * layout.bytes;
  const auto unpack = layout.planes == 1   ? unpack_group<1>
                      : layout.planes == 2 ? unpack_group<2>
                                           : unpack_group<4>;
  PanelLayout::Places at{};
  for (int64_t g = 0; g < layout.groups; ++g) {
    at = g % kUnitGroups == 0 ? layout.of_group(g) : layout.after(at);
    const float half = e4m3_decode(base[at.scales + r]) / 2;
    const int32_t z =
        layout.zero_bits == 8 ? base[at.zeros + r] : base[at.zeros + r / 4] >> (2 * (r % 4)) & 3;
    // Both are exact, and so is their sum: a few bits times an integer.
    unpack(wq + g * group, base + at.codes + 4 * r, group / 16,
           static_cast<float>(layout.factor) * half,
           static_cast<float>(layout.offset - 2 * z) * half);
  }
}

void unpack_panels(float* wq, const PanelView& w, Rows panels) {
  const int64_t end = std::min(w.n, panels.end * kPanelRows);
  for (int64_t row = panels.begin * kPanelRows; row < end; ++row)
    unpack_panel_row(wq + row * w.k, w, row);
}

void SplitRows::resize(int64_t rows, int64_t columns, int group_size) {
  m = rows;
  k = columns;
  group = group_size;
  groups = k / group;
  parts.resize(static_cast<size_t>(2 * m * k));
  sums.resize(static_cast<size_t>(m * groups));
  zero_terms.resize(static_cast<size_t>(4 * m * groups));
  scales.resize(static_cast<size_t>(m * groups));
}

// Writes a group: both parts of its integers, their sum and the scale. integer(i) is number i.
template <typename Integer>
static void split_group(SplitRows& out, int64_t g, float scale, const Integer& integer) {
  const int group = out.group;  // a copy: to the compiler, a write of an int8_t may change out
  int8_t* const high = out.parts.data() + g / out.groups * 2 * out.k + g % out.groups * group;
  int8_t* const low = high + out.k;
  int32_t sum = 0;
  for (int i = 0; i < group; ++i) {
    const int32_t a = integer(i);
    high[i] = static_cast<int8_t>((a + 128) >> 8);
    low[i] = static_cast<int8_t>(a);
    sum += 256 * high[i] + low[i];
  }
  out.sums[static_cast<size_t>(g)] = sum;
  for (int z = 0; z < 4; ++z) out.zero_terms[static_cast<size_t>(4 * g + z)] = -4 * z * sum;
  out.scales[static_cast<size_t>(g)] = 64 * scale;
}

void split_rows(SplitRows& out, const float* x, Rows groups) {
  const int group = out.group;
  for (int64_t g = groups.begin; g < groups.end; ++g) {
    const float* const from = x + g * group;
    // Of the bits without a sign the largest integer is the largest magnitude, or a NaN.
    uint32_t most = 0;
    for (int i = 0; i < group; ++i)
      most = std::max(most, std::bit_cast<uint32_t>(from[i]) & 0x7FFFFFFFu);
    const float largest = std::bit_cast<float>(most);
    const float inverse = largest < kSmallestSplit ? 0 : kLargestInteger / largest;
    split_group(out, g, largest / kLargestInteger, [&](int i) {
      // In 1.5 * 2^23 + a the lowest bits are those of a, rounded to nearest even.
      return int32_t{
          static_cast<int16_t>(std::bit_cast<uint32_t>(from[i] * inverse + 12582912.0f))};
    });
  }
}

void split_rows(SplitRows& out, const QuantizedRows<float>& x, Rows groups) {
  const int group = out.group;
  for (int64_t g = groups.begin; g < groups.end; ++g) {
    const uint8_t* const codes = x.codes + g * group;
    const int zero = x.zeros[g];
    split_group(out, g, x.scales[g], [&](int i) { return int32_t{codes[i]} - zero; });
  }
}

bool runs(VectorSet set) {
#if defined(__x86_64__)
  if (set == VectorSet::Avx2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
  if (set == VectorSet::Avx512Vnni)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
#endif
  return set == VectorSet::Portable;
}

VectorSet fastest_set() {
  static const VectorSet fastest = runs(VectorSet::Avx512Vnni) ? VectorSet::Avx512Vnni
                                   : runs(VectorSet::Avx2)     ? VectorSet::Avx2
                                                               : VectorSet::Portable;
  return fastest;
}

void panel_gemv(float* y, const SplitRows& x, const PanelView& w, const float* addend, Rows panels,
                VectorSet set) {
  switch (set) {
    case VectorSet::Portable:
      return panel_gemv_on<Portable>(y, x, w, addend, panels);
#if defined(__x86_64__)
    case VectorSet::Avx2:
      return panel_gemv_avx2(y, x, w, addend, panels);
    case VectorSet::Avx512Vnni:
      return panel_gemv_avx512(y, x, w, addend, panels);
#endif
    default:
      BBB_ASSERT(!"a vector set of this CPU");
  }
}

}  // namespace bbb::quant::host
