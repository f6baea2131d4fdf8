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

// The range of group g of a matrix, scaled by its ratio.
template <typename Real>
static Range<Real> scaled_range(const Real* x, int group, const uint8_t* ratios, int64_t g,
                                Levels levels) {
  const Range<Real> range = range_of(x, group).of(levels);
  return ratios != nullptr ? range.scaled(range_ratio<Real>(ratios[g])) : range;
}

template <typename Real>
Real group_range_max(const Real* w, const uint8_t* ratios, Rows rows, int64_t k, int group,
                     Levels levels) {
  Real max_range = 0;
  for (int64_t g = rows.begin * (k / group); g < rows.end * (k / group); ++g)
    max_range =
        max_or_nan(max_range, scaled_range(w + g * group, group, ratios, g, levels).width());
  return max_range;
}

template <typename Real>
Real largest(const Real* x, int64_t count) {
  Real result = 0;
  for (int64_t i = 0; i < count; ++i) result = max_or_nan(result, x[i]);
  return result;
}

template <typename Real>
void fake_quant(Real* wq, uint8_t* e, uint8_t* z, uint8_t* clipped, const Real* w,
                const uint8_t* ratios, Rows rows, int64_t k, Real master_scale, WeightGrid spec,
                Rounding rounding, const WeightRule& rule) {
  const int group = spec.group;
  for (int64_t g = rows.begin * (k / group); g < rows.end * (k / group); ++g) {
    const Real* x = w + g * group;
    Real* out = wq + g * group;
    uint8_t* bits = clipped + g * group / 8;
    const GroupParams p = group_params(scaled_range(x, group, ratios, g, rule.levels), master_scale,
                                       spec.bits, rule.levels);
    e[g] = p.e;
    z[g] = p.z;
    if (rounding == Rounding::Identity) {
      for (int i = 0; i < group; ++i) out[i] = x[i] / master_scale;
      std::memset(bits, 0, static_cast<size_t>(group / 8));
      continue;
    }
    const Real step = step_of(p.e, master_scale), scale = Real(e4m3_decode(p.e));
    const Real zero = zero_point<Real>(p.z, spec.bits, rule.levels);
    bool masked[kLargestGroup];
    for (int i = 0; i < group; ++i) {
      const Real quotient = x[i] / step, steps = rounded_steps(quotient, rule.levels);
      const Real code = clamp_code(steps + zero, Real(max_code(spec.bits)));
      masked[i] = is_masked(quotient, steps, code - zero, rule);
      out[i] = level_of(code, zero, scale);
    }
    for (int i = 0; i < group; i += 8) {
      int byte = 0;
      for (int j = 0; j < 8; ++j) byte |= int{masked[i + j]} << j;
      bits[i / 8] = static_cast<uint8_t>(byte);
    }
  }
}

template <typename Real>
void nested_levels(Real* wq, const Real* w, const uint8_t* e, const uint8_t* z, Rows rows,
                   int64_t k, Real master_scale, int group, int bits, NestedDequant dequant) {
  for (int64_t g = rows.begin * (k / group); g < rows.end * (k / group); ++g) {
    const Real step = step_of(e[g], master_scale), half = Real(e4m3_decode(e[g])) / 2;
    for (int64_t i = g * group; i < (g + 1) * group; ++i) {
      const int code = static_cast<int>(code_of(w[i], step, z[g], kNestedBits));
      wq[i] = Real(nested_level_doubled(code >> (kNestedBits - bits), z[g], bits, dequant)) * half;
    }
  }
}

template <typename Real>
void snap(Real* w, uint8_t* ratios, Rows rows, int64_t k, Real master_scale, WeightGrid spec) {
  const int group = spec.group;
  for (int64_t g = rows.begin * (k / group); g < rows.end * (k / group); ++g) {
    Real* x = w + g * group;
    const Levels levels = spec.levels;
    const Range<Real> range = range_of(x, group),
                      scaled = scaled_range(x, group, ratios, g, levels);
    const GroupParams p = group_params(scaled, master_scale, spec.bits, levels);
    const Real step = step_of(p.e, master_scale), zero = zero_point<Real>(p.z, spec.bits, levels);
    Real middle[kLargestGroup];
    for (int i = 0; i < group; ++i)
      middle[i] = (code_of(x[i], step, zero, spec.bits, levels) - zero) * step;

    const Range<Real> spanned = range_of(middle, group).of(levels);
    const GroupParams q = group_params(spanned, master_scale, spec.bits, levels);
    // The groups of maximum range give S; this one may be the only one.
    const auto gives_s = [&](const Range<Real>& r) {
      return master_scale_of(raw_scale(r.width(), spec.bits, levels)) == master_scale;
    };
    const bool same = q.e == p.e && q.z == p.z && gives_s(spanned) == gives_s(scaled);
    if (same && ratios != nullptr) ratios[g] = 0;
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
    const Real step = step_of(e[g], master_scale),
               zero = zero_point<Real>(z[g], spec.bits, spec.levels);
    for (int64_t i = g * group; i < (g + 1) * group; ++i)
      codes[i] = static_cast<uint8_t>(code_of(w[i], step, zero, spec.bits, spec.levels));
  }
}

template <typename Real>
void scale_codes(Real* wq, uint8_t* e, const uint8_t* codes, const uint8_t* z, const Real* sigma,
                 Rows rows, int64_t k, Real master_scale, WeightGrid spec) {
  const int group = spec.group;
  for (int64_t g = rows.begin * (k / group); g < rows.end * (k / group); ++g) {
    e[g] = encode_scale(sigma[g], master_scale, spec.bits);
    const Real scale = Real(e4m3_decode(e[g])),
               zero = zero_point<Real>(z[g], spec.bits, spec.levels);
    for (int64_t i = g * group; i < (g + 1) * group; ++i)
      wq[i] = level_of(Real(codes[i]), zero, scale);
  }
}

template <typename Real>
void scale_codes_backward(Real* dsigma, const Real* dw, const uint8_t* codes, const uint8_t* z,
                          Rows rows, int64_t k, WeightGrid spec, bool accumulate) {
  const int group = spec.group;
  for (int64_t g = rows.begin * (k / group); g < rows.end * (k / group); ++g) {
    const Real zero = zero_point<Real>(z[g], spec.bits, spec.levels);
    Real sum = 0;
    for (int64_t i = g * group; i < (g + 1) * group; ++i) sum += dw[i] * (Real(codes[i]) - zero);
    dsigma[g] = accumulate ? dsigma[g] + sum : sum;
  }
}

template <typename Real>
void learned_quant(Real* wq, uint8_t* e, uint8_t* z, const Real* w, const Real* sigma,
                   const Real* zeta, Rows rows, int64_t k, Real master_scale, WeightGrid spec) {
  const int group = spec.group;
  for (int64_t g = rows.begin * (k / group); g < rows.end * (k / group); ++g) {
    e[g] = encode_scale(sigma[g], master_scale, spec.bits);
    if (zeta != nullptr) z[g] = zero_of(zeta[g], spec.bits);
    const Real step = step_of(e[g], master_scale), scale = Real(e4m3_decode(e[g])),
               zero = zero_point<Real>(z[g], spec.bits, spec.levels);
    for (int64_t i = g * group; i < (g + 1) * group; ++i)
      wq[i] = level_of(code_of(w[i], step, zero, spec.bits, spec.levels), zero, scale);
  }
}

template <typename Real>
void learned_quant_backward(Real* dw, Real* dsigma, Real* dzeta, const Real* w, const uint8_t* e,
                            const uint8_t* z, Rows rows, int64_t k, Real master_scale,
                            WeightGrid spec) {
  const int group = spec.group;
  for (int64_t g = rows.begin * (k / group); g < rows.end * (k / group); ++g) {
    const Real step = step_of(e[g], master_scale),
               zero = zero_point<Real>(z[g], spec.bits, spec.levels);
    GridGradient<Real> sum;
    for (int64_t i = g * group; i < (g + 1) * group; ++i)
      dw[i] = sum.take(dw[i], w[i], step, zero, spec.bits, spec.levels);
    dsigma[g] = sum.scale;
    if (dzeta != nullptr) dzeta[g] = sum.zero;
  }
}

template <typename Real>
Real clamp_ratios(Real* ratio, const Real* w, Rows rows, int64_t k, WeightGrid spec) {
  const int group = spec.group;
  Real most = 0;
  for (int64_t g = rows.begin * (k / group); g < rows.end * (k / group); ++g) {
    ratio[g] = learned_ratio(ratio[g]);
    const Range<Real> range = range_of(w + g * group, group).of(spec.levels).scaled(ratio[g]);
    most = max_or_nan(most, raw_scale(range.width(), spec.bits, spec.levels));
  }
  return most;
}

template <typename Real>
void ratio_quant(Real* wq, uint8_t* e, uint8_t* z, const Real* ratio, const Real* w, Rows rows,
                 int64_t k, Real master_scale, WeightGrid spec) {
  const int group = spec.group;
  for (int64_t g = rows.begin * (k / group); g < rows.end * (k / group); ++g) {
    const Range<Real> range = range_of(w + g * group, group).of(spec.levels).scaled(ratio[g]);
    const GroupParams p = group_params(range, master_scale, spec.bits, spec.levels);
    e[g] = p.e;
    z[g] = p.z;
    const Real step = step_of(p.e, master_scale), scale = Real(e4m3_decode(p.e)),
               zero = zero_point<Real>(p.z, spec.bits, spec.levels);
    for (int64_t i = g * group; i < (g + 1) * group; ++i)
      wq[i] = level_of(code_of(w[i], step, zero, spec.bits, spec.levels), zero, scale);
  }
}

template <typename Real>
void ratio_quant_backward(Real* dw, Real* dratio, const Real* w, const uint8_t* e, const uint8_t* z,
                          Rows rows, int64_t k, Real master_scale, WeightGrid spec) {
  const int group = spec.group;
  for (int64_t g = rows.begin * (k / group); g < rows.end * (k / group); ++g) {
    const Range<Real> range = range_of(w + g * group, group).of(spec.levels);
    const Real step = step_of(e[g], master_scale),
               zero = zero_point<Real>(z[g], spec.bits, spec.levels);
    Real sum = 0;
    for (int64_t i = g * group; i < (g + 1) * group; ++i)
      dw[i] =
          take_level(sum, dw[i], unclamped_code(w[i], step, zero, spec.levels), zero, spec.bits);
    dratio[g] = sum * raw_scale(range.width(), spec.bits, spec.levels);
  }
}

void row_codes(uint8_t* codes, const PackedView& w, int64_t row) {
  if (!w.grid.nested)
    return unpack_codes(codes, w.qweight + row * code_row_bytes(w.k, w.grid.bits), w.k,
                        w.grid.bits);
  for (int64_t k = 0; k < w.k; ++k) {
    int code = 0;
    for (int plane = 0; plane < w.grid.bits; ++plane)
      code = 2 * code + (w.qweight[(plane * w.n + row) * (w.k / 8) + k / 8] >> (k % 8) & 1);
    codes[k] = static_cast<uint8_t>(code);
  }
}

// Twice the integer level of each weight of a row: 2 (q - z).
static void doubled_levels(int32_t* out, const PackedView& w, int64_t row) {
  const int bits = w.grid.bits, group = w.grid.group;
  const int zero_bits = w.grid.nested ? kNestedBits : bits;
  const uint8_t* zeros = w.zeros + row * zero_row_bytes(w.k, group, zero_bits);
  std::vector<uint8_t> codes(static_cast<size_t>(w.k));
  row_codes(codes.data(), w, row);
  for (int64_t i = 0; i < w.k; ++i) {
    const int q = codes[static_cast<size_t>(i)], z = packed_code(zeros, i / group, zero_bits);
    out[i] = w.grid.nested ? nested_level_doubled(q, z, bits, w.grid.dequant) : 2 * (q - z);
  }
}

template <typename Real>
void unpack_row(Real* out, const PackedView& w, int64_t row) {
  const int bits = w.grid.bits, group = w.grid.group;
  const int64_t groups = w.k / group;
  if (w.grid.nested) {
    std::vector<int32_t> levels(static_cast<size_t>(w.k));
    doubled_levels(levels.data(), w, row);
    for (int64_t i = 0; i < w.k; ++i)
      out[i] = Real(levels[static_cast<size_t>(i)]) *
               (Real(e4m3_decode(w.scales[row * groups + i / group])) / 2);
    return;
  }
  const uint8_t* stream = w.qweight + row * code_row_bytes(w.k, bits);
  const bool symmetric = w.grid.levels == Levels::Seq;
  const uint8_t* zeros = symmetric ? nullptr : w.zeros + row * zero_row_bytes(w.k, group, bits);
  for (int64_t g = 0; g < groups; ++g) {
    const Real scale = Real(e4m3_decode(w.scales[row * groups + g]));
    const Real z =
        zero_point<Real>(symmetric ? uint8_t{0} : packed_code(zeros, g, bits), bits, w.grid.levels);
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

template <typename Real>
void packed_gemv(Real* y, const QuantizedRows<Real>& x, const PackedView& w, const Real* addend,
                 Rows rows, int64_t m_total) {
  const int group = w.grid.group;
  const int64_t groups = w.k / group;
  std::vector<int32_t> weight(static_cast<size_t>(w.k));
  for (int64_t n = rows.begin; n < rows.end; ++n) {
    doubled_levels(weight.data(), w, n);
    for (int64_t m = 0; m < m_total; ++m) {
      Real total = 0;
      for (int64_t g = 0; g < groups; ++g) {
        const int zero = x.zeros[m * groups + g];
        const uint8_t* codes = x.codes + m * w.k + g * group;
        int32_t sum = 0;
        for (int i = 0; i < group; ++i)
          sum += weight[static_cast<size_t>(g * group + i)] * (codes[i] - zero);
        // The scale is exact: two significands of 4 bits. Halving undoes the doubled levels.
        total += Real(sum) *
                 (Real(e4m3_decode(w.scales[n * groups + g])) / 2 * x.scales[m * groups + g]);
      }
      Real result = Real(*w.master_scale) * total;
      if (addend != nullptr) result += addend[m * w.n + n];
      y[m * w.n + n] = result;
    }
  }
}

// x = H x, by butterflies of strides 1, 2, .., G / 2.
template <typename Real>
static void hadamard(Real* x, int group) {
  for (int stride = 1; stride < group; stride *= 2)
    for (int i = 0; i < group; ++i) {
      if ((i & stride) != 0) continue;
      const Real u = x[i], v = x[i + stride];
      x[i] = u + v;
      x[i + stride] = u - v;
    }
}

template <typename Real>
static void rotate(Real* x, int group, int shift) {
  hadamard(x, group);
  for (int i = 0; i < group; ++i) x[i] = std::ldexp(x[i], -shift);
}

// The sum of `terms` in the order of a binary tree: i with i xor 1, then i xor 2, 4, ..
template <typename Real>
static Real tree_sum(Real (&terms)[kLargestGroup], int group) {
  for (int stride = 1; stride < group; stride *= 2)
    for (int i = 0; i < group; i += 2 * stride) terms[i] = terms[i] + terms[i + stride];
  return terms[0];
}

template <typename Real>
static Real level_at(Real x, const GroupParams& p, Real step, int bits,
                     Levels levels = Levels::MinMax) {
  const Real zero = zero_point<Real>(p.z, bits, levels);
  return (code_of(x, step, zero, bits, levels) - zero) * step;
}

// The parameters of a group of activations.
template <typename Real>
static GroupParams activation_params(const Real* x, const OperandView& v, Real master_scale) {
  const int bits = v.grid.bits, group = v.group;
  const Range<Real> range = range_of(x, group);
  GroupParams best = group_params(range, master_scale, bits);
  if (!is_searched(v.grid.range, bits)) return best;
  Real least = 0;
  for (int c = 0; c < kRangeRatios; ++c) {
    const GroupParams p = group_params(range.scaled(range_ratio<Real>(c)), master_scale, bits);
    const Real step = step_of(p.e, master_scale);
    Real terms[kLargestGroup];
    for (int i = 0; i < group; ++i) {
      const Real d = level_at(x[i], p, step, bits) - x[i];
      terms[i] = d * d;
    }
    const Real error = tree_sum(terms, group);
    if (c == 0 || error < least) least = error, best = p;
  }
  return best;
}

template <typename Real>
static void gather_row(Real* to, const Real* x, const OperandView& v) {
  for (int64_t p = 0; p < v.stored_k; ++p) {
    const int64_t channel = v.channels != nullptr ? v.channels[p] : p < v.k ? p : -1;
    to[p] = channel < 0 ? Real(0) : x[channel];
    if (p >= v.outliers && p < v.pairs_end) to[p] *= Real(v.pair_factor);
  }
  for (int64_t p = v.rotated_begin; p < v.rotated_end; p += v.group)
    rotate(to + p, v.group, activation_rotation_shift(v.group));
}

template <typename Real>
void operand(Real* out, uint8_t* clipped, const QuantizedRows<Real>& codes, const Real* x,
             Rows rows, const OperandView& v, Rounding rounding) {
  const int64_t columns = v.stored_k, groups = columns / v.group;
  std::vector<Real> gathered(static_cast<size_t>(columns));
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    gather_row(gathered.data(), x + row * v.k, v);
    if (v.grid.bits == 16 || rounding == Rounding::Identity) {
      std::copy(gathered.begin(), gathered.end(), out + row * columns);
      if (clipped != nullptr)
        std::memset(clipped + row * columns / 8, 0, static_cast<size_t>(columns / 8));
      continue;
    }
    Real most = 0, most_outlier = 0;
    for (int64_t p = 0; p < columns; p += v.group) {
      Real& largest = p < v.outliers ? most_outlier : most;
      largest = max_or_nan(largest, range_of(gathered.data() + p, v.group).width());
    }
    const Real master_scale = master_scale_of(raw_scale(most, v.grid.bits));
    const Real outlier_scale = outlier_master_scale_of(raw_scale(most_outlier, kOutlierBits));
    for (int64_t g = 0; g < groups; ++g) {
      const Real* in = gathered.data() + g * v.group;
      const bool outlier = g * v.group < v.outliers;
      const int bits = outlier ? kOutlierBits : v.grid.bits;
      const Real scale = outlier ? outlier_scale : master_scale;
      const GroupParams p =
          outlier ? outlier_params(range_of(in, v.group), scale) : activation_params(in, v, scale);
      const Real step = step_of(p.e, scale);
      if (codes.codes != nullptr) {
        codes.zeros[row * groups + g] = p.z;
        codes.scales[row * groups + g] = step;
      }
      for (int i = 0; i < v.group; ++i) {
        const int64_t at = row * columns + g * v.group + i;
        const Real unclamped = unclamped_code(in[i], step, p.z);
        const Real code = clamp_code(unclamped, Real(max_code(bits)));
        if (codes.codes != nullptr) codes.codes[at] = static_cast<uint8_t>(code);
        if (out != nullptr) out[at] = (code - Real(p.z)) * step;
        if (clipped == nullptr) continue;
        if (i % 8 == 0) clipped[at / 8] = 0;
        clipped[at / 8] |= static_cast<uint8_t>(int{quant::is_clipped(unclamped, bits)} << (i % 8));
      }
    }
  }
}

template <typename Real>
void operand_backward(Real* dx, const Real* dout, const uint8_t* clipped, Rows rows,
                      const OperandView& v) {
  const int64_t columns = v.stored_k;
  std::vector<Real> d(static_cast<size_t>(columns));
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    for (int64_t p = 0; p < columns; ++p) {
      const int64_t at = row * columns + p;
      const bool lost = clipped != nullptr && (clipped[at / 8] >> (at % 8) & 1);
      d[static_cast<size_t>(p)] = lost ? Real(0) : dout[at];
    }
    for (int64_t p = v.rotated_begin; p < v.rotated_end; p += v.group)
      rotate(d.data() + p, v.group, activation_rotation_shift(v.group));
    for (int64_t channel = 0; channel < v.k; ++channel) {
      const int64_t p = v.positions != nullptr ? v.positions[channel] : channel;
      Real sum = d[static_cast<size_t>(p)];
      if (p >= v.outliers && p < v.pairs_end)
        sum = (sum + d[static_cast<size_t>(p) + 1]) * Real(v.pair_factor);
      dx[row * v.k + channel] = sum;
    }
  }
}

void gather_weight(float* stored, const float* plain, Rows rows, const LinearFormat& format,
                   const ChannelOrder& order) {
  const int64_t columns = order.stored_k(), k = order.k();
  const int group = format.weight.group;
  const float half = order.side() == SplitSide::Weight ? 0.5f : 1.0f;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    float* to = stored + row * columns;
    for (int64_t p = 0; p < columns; ++p) {
      const int32_t channel = order.channels()[static_cast<size_t>(p)];
      const bool pair = p >= order.pairs_begin() && p < order.pairs_end();
      to[p] = channel < 0 ? 0.0f : plain[row * k + channel] * (pair ? half : 1.0f);
    }
    if (format.input.hadamard)
      for (int64_t p = order.rotated_begin(); p < order.rotated_end(); p += group)
        rotate(to + p, group, weight_rotation_shift(group));
  }
}

void merge_weight(float* plain, const float* stored, Rows rows, const LinearFormat& format,
                  const ChannelOrder& order) {
  const int64_t columns = order.stored_k(), k = order.k();
  const int group = format.weight.group;
  const float factor = order.side() == SplitSide::Weight ? 1.0f : 0.5f;
  std::vector<float> w(static_cast<size_t>(columns));
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    std::copy_n(stored + row * columns, columns, w.data());
    if (format.input.hadamard)
      for (int64_t p = order.rotated_begin(); p < order.rotated_end(); p += group)
        rotate(w.data() + p, group, activation_rotation_shift(group));
    for (int64_t channel = 0; channel < k; ++channel) {
      const auto p = static_cast<size_t>(order.positions()[static_cast<size_t>(channel)]);
      const bool pair = static_cast<int64_t>(p) >= order.pairs_begin() &&
                        static_cast<int64_t>(p) < order.pairs_end();
      plain[row * k + channel] = pair ? (w[p] + w[p + 1]) * factor : w[p];
    }
  }
}

namespace {

// One group of gathered weights at the start of a stage.
class GroupStart {
 public:
  // Positions [pairs_begin, pairs_end) of the group hold pairs that are to be offset.
  GroupStart(const float* halves, const WeightGrid& grid, int bits, int pairs_begin, int pairs_end,
             float split)
      : halves_(halves),
        group_(grid.group),
        pairs_begin_(pairs_begin),
        pairs_end_(pairs_end),
        bits_(bits),
        levels_(grid.levels),
        split_(split) {}

  // The weights at this ratio, and their parameters.
  void place(int ratio, float master_scale) {
    std::copy_n(halves_, group_, w_);
    params_ = params_at(ratio, master_scale);
    if (pairs_begin_ >= pairs_end_) return;
    for (;;) {  // each round can only raise e, so this ends
      const float offset = step_of(params_.e, master_scale) * split_;
      for (int i = pairs_begin_; i < pairs_end_; i += 2) {
        w_[i] = halves_[i] - offset;
        w_[i + 1] = halves_[i + 1] + offset;
      }
      const GroupParams next = params_at(ratio, master_scale);
      const bool stands = next.e == params_.e;
      params_ = next;
      if (stands) return;
    }
  }

  // Of the placed weights: the sum of (w^ - w)^2 E[x^2], a pair being one term.
  float error(float master_scale, const float* energy) const {
    const float step = step_of(params_.e, master_scale);
    float terms[kLargestGroup];
    for (int i = 0; i < group_; ++i) {
      const bool pair = i >= pairs_begin_ && i < pairs_end_;
      float d = level_at(w_[i], params_, step, bits_, levels_);
      if (pair)
        d = d + level_at(w_[i + 1], params_, step, bits_, levels_) - 2.0f * halves_[i];
      else
        d = d - w_[i];
      terms[i] = d * d * energy[i];
      if (pair) terms[++i] = 0.0f;
    }
    return tree_sum(terms, group_);
  }

  const float* weights() const { return w_; }
  float range(int ratio) const { return range_at(ratio).width(); }

 private:
  Range<float> range_at(int ratio) const {
    return range_of(w_, group_).of(levels_).scaled(range_ratio<float>(ratio));
  }
  GroupParams params_at(int ratio, float master_scale) const {
    return group_params(range_at(ratio), master_scale, bits_, levels_);
  }

  const float* halves_;
  int group_, pairs_begin_, pairs_end_, bits_;
  Levels levels_;
  float split_;  // a copy's offset, in steps
  float w_[kLargestGroup];
  GroupParams params_;
};

}  // namespace

float start_rows(float* w, uint8_t* ratios, const float* halves, Rows rows,
                 const LinearFormat& format, const ChannelOrder& order, float master_scale,
                 const StageStart& start) {
  const int group = format.weight.group, bits = format.code_bits();
  const int64_t columns = order.stored_k(), groups = columns / group;
  const bool searched = is_searched(start.range, bits);
  const bool splits = order.side() == SplitSide::Weight;
  const int shift = start.lowest_bits > 0 ? bits - start.lowest_bits : 0;
  float most = 0.0f;
  for (int64_t row = rows.begin; row < rows.end; ++row)
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = g * group, at = row * columns + begin;
      const auto within = [&](int64_t position) {
        return static_cast<int>(std::clamp<int64_t>(position - begin, 0, group));
      };
      float from[kLargestGroup];
      std::copy_n(halves + at, group, from);
      GroupStart trial(from, format.weight, bits, splits ? within(order.pairs_begin()) : 0,
                       splits ? within(order.pairs_end()) : 0, std::ldexp(0.25f, shift));
      int best = 0;
      if (searched) {
        float least = 0.0f;
        for (int c = 0; c < kRangeRatios; ++c) {
          trial.place(c, master_scale);
          const float error = trial.error(master_scale, start.energy + begin);
          if (c == 0 || error < least) least = error, best = c;
        }
      }
      trial.place(best, master_scale);
      std::copy_n(trial.weights(), group, w + at);
      if (ratios != nullptr) ratios[row * groups + g] = static_cast<uint8_t>(best);
      most = max_or_nan(most, trial.range(best));
    }
  return most;
}

#define BBB_INSTANTIATE(Real)                                                                      \
  template Real group_range_max(const Real*, const uint8_t*, Rows, int64_t, int, Levels);          \
  template Real largest(const Real*, int64_t);                                                     \
  template void fake_quant(Real*, uint8_t*, uint8_t*, uint8_t*, const Real*, const uint8_t*, Rows, \
                           int64_t, Real, WeightGrid, Rounding, const WeightRule&);                \
  template void snap(Real*, uint8_t*, Rows, int64_t, Real, WeightGrid);                            \
  template void nested_levels(Real*, const Real*, const uint8_t*, const uint8_t*, Rows, int64_t,   \
                              Real, int, int, NestedDequant);                                      \
  template void quantize_codes(uint8_t*, const Real*, const uint8_t*, const uint8_t*, Rows,        \
                               int64_t, Real, WeightGrid);                                         \
  template void scale_codes(Real*, uint8_t*, const uint8_t*, const uint8_t*, const Real*, Rows,    \
                            int64_t, Real, WeightGrid);                                            \
  template void scale_codes_backward(Real*, const Real*, const uint8_t*, const uint8_t*, Rows,     \
                                     int64_t, WeightGrid, bool);                                   \
  template void learned_quant(Real*, uint8_t*, uint8_t*, const Real*, const Real*, const Real*,    \
                              Rows, int64_t, Real, WeightGrid);                                    \
  template void learned_quant_backward(Real*, Real*, Real*, const Real*, const uint8_t*,           \
                                       const uint8_t*, Rows, int64_t, Real, WeightGrid);           \
  template Real clamp_ratios(Real*, const Real*, Rows, int64_t, WeightGrid);                       \
  template void ratio_quant(Real*, uint8_t*, uint8_t*, const Real*, const Real*, Rows, int64_t,    \
                            Real, WeightGrid);                                                     \
  template void ratio_quant_backward(Real*, Real*, const Real*, const uint8_t*, const uint8_t*,    \
                                     Rows, int64_t, Real, WeightGrid);                             \
  template void unpack_row(Real*, const PackedView&, int64_t);                                     \
  template void unpack(Real*, const PackedView&, Rows);                                            \
  template void packed_gemv(Real*, const Real*, const PackedView&, const Real*, Rows, int64_t);    \
  template void packed_gemv(Real*, const QuantizedRows<Real>&, const PackedView&, const Real*,     \
                            Rows, int64_t);                                                        \
  template void operand(Real*, uint8_t*, const QuantizedRows<Real>&, const Real*, Rows,            \
                        const OperandView&, Rounding);                                             \
  template void operand_backward(Real*, const Real*, const uint8_t*, Rows, const OperandView&)

BBB_INSTANTIATE(float);
BBB_INSTANTIATE(double);
#undef BBB_INSTANTIATE

}  // namespace bbb::quant::host
