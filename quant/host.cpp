#include "quant/host.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "quant/pack.h"

namespace bbb::quant::host {

template <typename Real>
static Range<Real> range_of(const Real* x, int group) {
  Range<Real> range;
  for (int i = 0; i < group; ++i) range.include(x[i]);
  return range;
}

template <typename Real>
Real group_range_max(const Real* w, Rows rows, int64_t k, int group) {
  Real max_range = 0;
  for (int64_t i = rows.begin * k; i < rows.end * k; i += group)
    max_range = max_or_nan(max_range, range_of(w + i, group).width());
  return max_range;
}

template <typename Real>
Real largest(const Real* x, int64_t count) {
  Real result = 0;
  for (int64_t i = 0; i < count; ++i) result = max_or_nan(result, x[i]);
  return result;
}

constexpr int kLargestGroup = 128;

template <typename Real>
void fake_quant(Real* wq, uint8_t* e, uint8_t* z, uint8_t* clipped, const Real* w, Rows rows,
                int64_t k, Real master_scale, WeightGrid spec, Rounding rounding) {
  const int group = spec.group;
  for (int64_t g = rows.begin * (k / group); g < rows.end * (k / group); ++g) {
    const Real* x = w + g * group;
    Real* out = wq + g * group;
    uint8_t* bits = clipped + g * group / 8;
    const GroupParams p = group_params(range_of(x, group), master_scale, spec.bits);
    e[g] = p.e;
    z[g] = p.z;
    if (rounding == Rounding::Identity) {
      for (int i = 0; i < group; ++i) out[i] = x[i] / master_scale;
      std::memset(bits, 0, static_cast<size_t>(group / 8));
      continue;
    }
    const Real step = step_of(p.e, master_scale), scale = Real(e4m3_decode(p.e));
    Real codes[kLargestGroup];
    for (int i = 0; i < group; ++i) {
      codes[i] = unclamped_code(x[i], step, p.z);
      out[i] = level_of(clamp_code(codes[i], Real(max_code(spec.bits))), p.z, scale);
    }
    for (int i = 0; i < group; i += 8) {
      int byte = 0;
      for (int j = 0; j < 8; ++j) byte |= int{is_clipped(codes[i + j], spec.bits)} << j;
      bits[i / 8] = static_cast<uint8_t>(byte);
    }
  }
}

template <typename Real>
void snap(Real* w, Rows rows, int64_t k, Real master_scale, WeightGrid spec) {
  const int group = spec.group;
  for (int64_t g = rows.begin * (k / group); g < rows.end * (k / group); ++g) {
    Real* x = w + g * group;
    const Range<Real> range = range_of(x, group);
    const GroupParams p = group_params(range, master_scale, spec.bits);
    const Real step = step_of(p.e, master_scale);
    Real middle[kLargestGroup];
    for (int i = 0; i < group; ++i)
      middle[i] = (code_of(x[i], step, p.z, spec.bits) - Real(p.z)) * step;

    const Range<Real> spanned = range_of(middle, group);
    const GroupParams q = group_params(spanned, master_scale, spec.bits);
    // The groups of maximum range give S; this one may be the only one.
    const auto gives_s = [&](const Range<Real>& r) {
      return master_scale_of(raw_scale(r.width(), spec.bits)) == master_scale;
    };
    const bool same = q.e == p.e && q.z == p.z && gives_s(spanned) == gives_s(range);
    // All values between a weight and the middle of its bin have the same code.
    for (int i = 0; i < group; ++i)
      if (same)
        x[i] = middle[i];
      else if (x[i] != range.mn && x[i] != range.mx)
        x[i] = std::clamp(middle[i], range.mn, range.mx);
  }
}

template <typename Real>
void quantize_codes(uint8_t* codes, const Real* w, const uint8_t* e, const uint8_t* z, Rows rows,
                    int64_t k, Real master_scale, WeightGrid spec) {
  const int group = spec.group;
  for (int64_t g = rows.begin * (k / group); g < rows.end * (k / group); ++g) {
    const Real step = step_of(e[g], master_scale);
    for (int64_t i = g * group; i < (g + 1) * group; ++i)
      codes[i] = static_cast<uint8_t>(code_of(w[i], step, z[g], spec.bits));
  }
}

template <typename Real>
void scale_codes(Real* wq, uint8_t* e, const uint8_t* codes, const uint8_t* z, const Real* sigma,
                 Rows rows, int64_t k, Real master_scale, WeightGrid spec) {
  const int group = spec.group;
  for (int64_t g = rows.begin * (k / group); g < rows.end * (k / group); ++g) {
    e[g] = encode_scale(sigma[g], master_scale, spec.bits);
    const Real scale = Real(e4m3_decode(e[g]));
    for (int64_t i = g * group; i < (g + 1) * group; ++i)
      wq[i] = level_of(Real(codes[i]), z[g], scale);
  }
}

template <typename Real>
void scale_codes_backward(Real* dsigma, const Real* dw, const uint8_t* codes, const uint8_t* z,
                          Rows rows, int64_t k, WeightGrid spec, bool accumulate) {
  const int group = spec.group;
  for (int64_t g = rows.begin * (k / group); g < rows.end * (k / group); ++g) {
    Real sum = 0;
    for (int64_t i = g * group; i < (g + 1) * group; ++i)
      sum += dw[i] * (Real(codes[i]) - Real(z[g]));
    dsigma[g] = accumulate ? dsigma[g] + sum : sum;
  }
}

// One row of (q - z) e.
template <typename Real>
static void unpack_row(Real* out, const PackedView& w, int64_t row) {
  const int bits = w.grid.bits, group = w.grid.group;
  const int64_t groups = w.k / group;
  const uint8_t* stream = w.qweight + row * code_row_bytes(w.k, bits);
  const uint8_t* zeros = w.zeros + row * zero_row_bytes(w.k, group, bits);
  for (int64_t g = 0; g < groups; ++g) {
    const Real scale = Real(e4m3_decode(w.scales[row * groups + g]));
    const uint8_t z = packed_code(zeros, g, bits);
    if (bits == 2) {  // the shipping width: four levels a group, four codes a byte
      const Real level[4] = {level_of(Real(0), z, scale), level_of(Real(1), z, scale),
                             level_of(Real(2), z, scale), level_of(Real(3), z, scale)};
      Real* to = out + g * group;
      const uint8_t* from = stream + g * group / 4;
      for (int64_t j = 0; j < group / 4; ++j)
        for (int64_t c = 0; c < 4; ++c) to[4 * j + c] = level[from[j] >> (2 * c) & 3];
      continue;
    }
    for (int64_t i = g * group; i < (g + 1) * group; ++i)
      out[i] = level_of(Real(packed_code(stream, i, bits)), z, scale);
  }
}

template <typename Real>
void unpack(Real* wq, const PackedView& w, Rows rows) {
  for (int64_t row = rows.begin; row < rows.end; ++row) unpack_row(wq + row * w.k, w, row);
}

template <typename Real>
void packed_gemv(Real* y, const Real* x, const PackedView& w, const Real* addend, Rows rows,
                 int64_t m_total) {
  constexpr int64_t kLanes = 32;  // independent sums: they vectorise, and round less than one
  std::vector<Real> weight(static_cast<size_t>(w.k));
  for (int64_t n = rows.begin; n < rows.end; ++n) {
    unpack_row(weight.data(), w, n);
    for (int64_t m = 0; m < m_total; ++m) {
      Real lanes[kLanes] = {};
      for (int64_t i = 0; i < w.k; i += kLanes)  // K is a multiple of the group, at least 32
        for (int64_t j = 0; j < kLanes; ++j)
          lanes[j] += weight[static_cast<size_t>(i + j)] * x[m * w.k + i + j];
      Real sum = 0;
      for (const Real lane : lanes) sum += lane;
      Real result = Real(*w.master_scale) * sum;
      if (addend != nullptr) result += addend[m * w.n + n];
      y[m * w.n + n] = result;
    }
  }
}

#define BBB_INSTANTIATE(Real)                                                                     \
  template Real group_range_max(const Real*, Rows, int64_t, int);                                    \
  template Real largest(const Real*, int64_t);                                                    \
  template void fake_quant(Real*, uint8_t*, uint8_t*, uint8_t*, const Real*, Rows, int64_t, Real, \
                           WeightGrid, Rounding);                                                 \
  template void snap(Real*, Rows, int64_t, Real, WeightGrid);                                     \
  template void quantize_codes(uint8_t*, const Real*, const uint8_t*, const uint8_t*, Rows,       \
                               int64_t, Real, WeightGrid);                                        \
  template void scale_codes(Real*, uint8_t*, const uint8_t*, const uint8_t*, const Real*, Rows,   \
                            int64_t, Real, WeightGrid);                                           \
  template void scale_codes_backward(Real*, const Real*, const uint8_t*, const uint8_t*, Rows,    \
                                     int64_t, WeightGrid, bool);                                  \
  template void unpack(Real*, const PackedView&, Rows);                                           \
  template void packed_gemv(Real*, const Real*, const PackedView&, const Real*, Rows, int64_t)

BBB_INSTANTIATE(float);
BBB_INSTANTIATE(double);
#undef BBB_INSTANTIATE

}  // namespace bbb::quant::host
