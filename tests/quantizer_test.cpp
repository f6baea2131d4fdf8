// The quantizer's ops on the device under test against the formula. Scales, zero points, codes,
// levels and clipping masks must be equal, not close.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <limits>
#include <set>
#include <vector>

#include "quant/grid.h"
#include "tests/flat_weights.h"
#include "tests/op_test.h"
#include "tests/quantizer_formula.h"

namespace bbb::tests {
namespace {

using engine::Rounding;
using engine::WeightGrid;
using engine::Write;
using Values = std::vector<double>;

// (rows, groups a row): a single group, part of a warp, warps that end inside a tile, a whole tile,
// several tiles with a tail.
const std::vector<std::pair<int64_t, int64_t>> kSizes = {{1, 1},  {3, 1},   {1, 31},
                                                         {1, 32}, {33, 18}, {7, 129}};

// Normal F32 values with some outliers. Groups differ widely in magnitude; some are all zeros or
// all positive.
Values masters(engine::Rng& rng, int64_t n, int64_t k, int group) {
  Values w = normal(rng, n * k, 0.02);
  for (int64_t i = 0; i < n * k; ++i) {
    const int64_t g = i / group;
    double& v = w[static_cast<size_t>(i)];
    v = static_cast<float>(std::ldexp(v, static_cast<int>(g % 7) - 5) * (i % 97 == 5 ? 8 : 1));
    if (g % 11 == 3) v = 0;
    if (g % 11 == 4) v = std::abs(v);
  }
  return w;
}

// Everything that the quantizer computes from w on one backend. In the flat buffers w is between
// two norms.
struct Quantized {
  Tensor w, s, wq, e, z, codes;
  std::vector<uint8_t> clipped;
  double max_range;
  bool untouched;
};

Quantized quantize(Backend& b, int64_t n, int64_t k, const Values& w, WeightGrid spec,
                   Rounding rounding = Rounding::Nearest) {
  const int64_t groups = k / spec.group;
  const FlatWeights flat(
      b, {{5, quant::kNotQuantized}, {n * k, spec.bits}, {130, quant::kNotQuantized}}, spec.group,
      rounding);
  flat.set(flat.w.tensor(), 1, w);
  b.max_group_range(flat.q, flat.w.tensor());
  b.fake_quant(flat.q, flat.w.tensor());
  const int64_t begin = flat.begins[1];
  const auto scales = [&](const Tensor& t) {
    return t.slice(begin / spec.group, n * groups).view({n, groups});
  };
  Quantized q{.w = flat.w.tensor().slice(begin, n * k).view({n, k}),
              .s = flat.s.tensor().slice(1, 1),
              .wq = flat.wq.tensor().slice(begin, n * k).view({n, k}),
              .e = scales(flat.e.tensor()),
              .z = scales(flat.z.tensor()),
              .codes = b.empty({n, k}, DType::U8),
              .clipped = bytes_of(b, flat.clipped.tensor().slice(begin / 8, n * k / 8)),
              .max_range = values_of(b, flat.max_range.tensor())[1],
              .untouched = flat.untouched()};
  b.quantize_codes(q.codes, q.w, q.e, q.z, q.s, spec);
  return q;
}

Values as_act(Values values) {
  return backend().act() == DType::BF16 ? round_bf16(std::move(values)) : values;
}

template <typename Fn>
void for_each_case(const Fn& fn) {
  for (const int bits : {2, 3, 4, 8})
    for (const int group : {32, 64, 128})
      for (const auto& [n, groups] : kSizes) {
        CAPTURE(bits, group, n, groups);
        fn(WeightGrid{bits, group}, n, groups * group);
      }
}

TEST_CASE("master scale, codes and levels equal the formula", "[quantizer]") {
  engine::Rng rng(21);
  for_each_case([&](WeightGrid spec, int64_t n, int64_t k) {
    const Values w = masters(rng, n, k, spec.group);
    const Quantized got = quantize(backend(), n, k, w, spec);
    const FormulaResult want = quantize_by_formula(w, spec.bits, spec.group);
    CHECK(got.untouched);
    CHECK(got.max_range == want.max_range);
    CHECK(values_of(backend(), got.s)[0] == want.s);
    CHECK(got.clipped == want.clipped);
    CHECK(bytes_of(backend(), got.e) == want.e);
    CHECK(bytes_of(backend(), got.z) == want.z);
    CHECK(bytes_of(backend(), got.codes) == want.codes);
    CHECK(values_of(backend(), got.wq) == as_act(want.levels));
    if (spec.bits <= 4) CHECK(round_bf16(want.levels) == want.levels);  // exact in bf16
  });
}

TEST_CASE("nested_levels are those of the top bits of 8-bit codes", "[quantizer][nested]") {
  engine::Rng rng(29);
  Backend& b = backend();
  for (const int group : {32, 64, 128})
    for (const auto& [n, groups] : kSizes) {
      const int64_t count = n * groups * group;
      const Values w = masters(rng, n, groups * group, group);
      const FormulaResult eight = quantize_by_formula(w, quant::kNestedBits, group);
      // Parameters of other widths, and norms, are not nested: their levels stay.
      const FlatWeights flat(b,
                             {{5, quant::kNotQuantized},
                              {count, quant::kNestedBits},
                              {count, 2},
                              {130, quant::kNotQuantized}},
                             group);
      for (const size_t parameter : {1, 2}) flat.set(flat.w.tensor(), parameter, w);
      b.max_group_range(flat.q, flat.w.tensor());
      b.fake_quant(flat.q, flat.w.tensor());
      for (const int bits : {2, 3, 4})
        for (const auto dequant : {quant::NestedDequant::Middle, quant::NestedDequant::Floor}) {
          CAPTURE(group, n, groups, bits, dequant == quant::NestedDequant::Middle);
          const int bin = 1 << (quant::kNestedBits - bits);
          Values want;
          for (int64_t i = 0; i < count; ++i) {
            const auto at = static_cast<size_t>(i), g = static_cast<size_t>(i / group);
            const double low = eight.codes[at] / bin * bin,
                         offset = dequant == quant::NestedDequant::Middle ? (bin - 1) / 2.0 : 0.0;
            want.push_back((low + offset - eight.z[g]) * quant::e4m3_decode(eight.e[g]));
          }
          const Guarded wq(b, {flat.total}, b.act());
          const Values before(static_cast<size_t>(flat.total), 7.0);
          b.copy(wq.tensor(), make(b, {flat.total}, b.act(), before));
          b.nested_levels(wq.tensor(), flat.q, flat.w.tensor(), bits, dequant);
          CHECK(values_of(b, wq.tensor().slice(flat.begins[1], count)) == as_act(want));
          for (const auto& [begin, end] :
               {std::pair{int64_t{0}, flat.begins[1]}, {flat.begins[2], flat.total}}) {
            const Values others = values_of(b, wq.tensor().slice(begin, end - begin));
            CHECK(std::ranges::count(others, 7.0) == end - begin);
          }
          CHECK((wq.untouched() && flat.untouched()));
        }
    }
}

TEST_CASE("scales at every code and midpoint and weights at every tie equal the formula",
          "[quantizer]") {
  constexpr float kMaster = 0x1p-9f, kInfinity = std::numeric_limits<float>::infinity();
  constexpr int kGroup = 32, kLargest = 0x7E;
  for (const int bits : {2, 3, 4, 8}) {
    const auto top = static_cast<float>(quant::max_code(bits));
    const float max_width = top * quant::kE4m3Max * kMaster;
    Values w;
    // Adds a group from 0 to `width` that holds ties between its codes and the floats next to them.
    const auto add_group = [&](float width) {
      if (width > max_width) return;
      const float step = quant::step_of(quant::encode_scale(width / top, kMaster, bits), kMaster);
      std::vector<float> group{width};
      for (int tie = 0; tie < quant::max_code(bits) && group.size() + 3 <= kGroup; ++tie) {
        const float x = (static_cast<float>(tie) + 0.5f) * step;
        for (const float near : {x, std::nextafter(x, 0.0f), std::nextafter(x, kInfinity)})
          group.push_back(std::min(near, width));
      }
      group.resize(kGroup, 0.0f);
      w.insert(w.end(), group.begin(), group.end());
    };
    add_group(max_width);
    for (int code = 0; code < kLargest; ++code) {
      const float low = quant::e4m3_decode(static_cast<uint8_t>(code));
      const float high = quant::e4m3_decode(static_cast<uint8_t>(code + 1));
      for (const float scale : {high, (low + high) / 2}) {  // exact, and so are its products
        const float width = top * scale * kMaster;
        for (const float near :
             {width, std::nextafter(width, 0.0f), std::nextafter(width, kInfinity)})
          add_group(near);
      }
    }
    const auto groups = static_cast<int64_t>(w.size()) / kGroup;
    const Quantized got = quantize(backend(), groups, kGroup, w, {bits, kGroup});
    const FormulaResult want = quantize_by_formula(w, bits, kGroup);
    CAPTURE(bits, groups);
    CHECK(want.s == kMaster);
    CHECK(std::set<uint8_t>(want.e.begin(), want.e.end()).size() == kLargest);
    CHECK(values_of(backend(), got.s)[0] == kMaster);
    CHECK(bytes_of(backend(), got.e) == want.e);
    CHECK(bytes_of(backend(), got.z) == want.z);
    CHECK(bytes_of(backend(), got.codes) == want.codes);
    CHECK(got.clipped == want.clipped);
    CHECK(values_of(backend(), got.wq) == as_act(want.levels));
  }
}

TEST_CASE("one launch quantizes every parameter with its own bit width", "[quantizer]") {
  engine::Rng rng(28);
  for (const int group : {32, 64, 128}) {
    CAPTURE(group);
    const std::vector<FlatParameter> parameters = {
        {33 * 18 * group, 2}, {7, quant::kNotQuantized},
        {group, 8},           {5 * group, quant::kNoQuantizer},
        {3 * group, 3},       {300, quant::kNotQuantized},
        {601 * group, 4}};
    std::vector<Values> w;
    for (const FlatParameter& p : parameters)
      w.push_back(p.bits == quant::kNotQuantized ? Values(static_cast<size_t>(p.count), 1.0)
                                                 : masters(rng, 1, p.count, group));
    Backend& b = backend();
    const FlatWeights got(b, parameters, group);
    for (size_t p = 0; p < parameters.size(); ++p) got.set(got.w.tensor(), p, w[p]);
    // Twice: the second pass overwrites the results of the first.
    for (int pass = 0; pass < 2; ++pass) {
      b.max_group_range(got.q, got.w.tensor());
      b.fake_quant(got.q, got.w.tensor());
    }
    CHECK(got.untouched());
    for (size_t p = 0; p < parameters.size(); ++p) {
      const auto [count, bits, rule] = parameters[p];
      if (bits == quant::kNotQuantized || bits == quant::kNoQuantizer) continue;
      CAPTURE(p);
      const FormulaResult want = quantize_by_formula(w[p], bits, group);
      const int64_t begin = got.begins[p];
      const auto of_groups = [&, count = count](const Guarded& scales) {
        return bytes_of(b, scales.tensor().slice(begin / group, count / group));
      };
      CHECK(values_of(b, got.max_range.tensor())[p] == want.max_range);
      CHECK(values_of(b, got.s.tensor())[p] == want.s);
      CHECK(of_groups(got.e) == want.e);
      CHECK(of_groups(got.z) == want.z);
      CHECK(bytes_of(b, got.clipped.tensor().slice(begin / 8, count / 8)) == want.clipped);
      CHECK(values_of(b, got.wq.tensor().slice(begin, count)) == as_act(want.levels));
    }
    CHECK(values_of(backend(), got.s.tensor())[3] == 1);  // no quantizer: the weight itself
    CHECK(values_of(backend(), got.wq.tensor().slice(got.begins[3], 5 * group)) == as_act(w[3]));
    CHECK(values_of(backend(), got.max_range.tensor())[1] == 0);
    CHECK(values_of(backend(), got.wq.tensor().slice(got.begins[1], 7)) == Values(7, 0.0));
  }
}

TEST_CASE("the maximum group range is found anywhere in a large matrix", "[quantizer]") {
  const int64_t n = 1030, k = 1056;
  Values w(static_cast<size_t>(n * k), 0.001);
  for (const int64_t at : {int64_t{0}, n * k / 2 + 5, n * k - 1}) {
    w[static_cast<size_t>(at)] = -3.0;
    const FlatWeights flat(backend(), {{n * k, 2}}, 32);
    flat.set(flat.w.tensor(), 0, w);
    backend().max_group_range(flat.q, flat.w.tensor());
    CHECK(values_of(backend(), flat.max_range.tensor())[0] == 0.001f + 3.0f);
    w[static_cast<size_t>(at)] = 0.001;
  }
}

TEST_CASE("without rounding the quantizer is the identity", "[quantizer]") {
  engine::Rng rng(23);
  const WeightGrid spec{2, 32};
  const Values w = masters(rng, 5, 96, 32);
  const Quantized q = quantize(backend(), 5, 96, w, spec, Rounding::Identity);
  Values expected = w;
  const double s = values_of(backend(), q.s)[0];
  for (double& v : expected) v /= s;  // exact
  CHECK(values_of(backend(), q.wq) == as_act(expected));
}

TEST_CASE("a clipping bit is set exactly where a master is outside the grid", "[quantizer]") {
  engine::Rng rng(24);
  int64_t clipped_of_all = 0;
  for_each_case([&](WeightGrid spec, int64_t n, int64_t k) {
    const Values w = masters(rng, n, k, spec.group);
    const Quantized q = quantize(backend(), n, k, w, spec);
    const auto e = bytes_of(backend(), q.e), z = bytes_of(backend(), q.z);
    const float s = static_cast<float>(values_of(backend(), q.s)[0]);
    const float top = static_cast<float>((1 << spec.bits) - 1);
    int64_t clipped = 0, wrong = 0;
    for (size_t i = 0; i < w.size(); ++i) {
      const size_t g = i / static_cast<size_t>(spec.group);
      const float x = static_cast<float>(w[i]);
      const float level = std::floor(x / (s * quant::e4m3_decode(e[g])) + 0.5f) + float(z[g]);
      const bool outside = level < 0 || level > top;
      clipped += outside;
      wrong += outside != bit_of(q.clipped, i);
    }
    CHECK(wrong == 0);
    clipped_of_all += clipped;
  });
  CHECK(clipped_of_all > 0);
  const Quantized identity =
      quantize(backend(), 3, 96, masters(rng, 3, 96, 32), {2, 32}, Rounding::Identity);
  CHECK(std::count(identity.clipped.begin(), identity.clipped.end(), 0) == 3 * 96 / 8);
}

TEST_CASE("one NaN or infinite master makes every level NaN", "[quantizer]") {
  engine::Rng rng(25);
  for (const double bad : {std::nan(""), -std::nan(""), double(INFINITY), -double(INFINITY)}) {
    Values w = masters(rng, 9, 288, 32);
    w[1234] = bad;
    const Quantized q = quantize(backend(), 9, 288, w, {2, 32});
    CHECK(std::isnan(values_of(backend(), q.s)[0]));
    for (const double v : values_of(backend(), q.wq)) REQUIRE(std::isnan(v));
  }
}

// Everything that max_group_range and fake_quant write for weights with ratios, as the device under
// test and as the CPU makes it.
TEST_CASE("range ratios: the device equals the CPU bit for bit", "[quantizer][ratios]") {
  for (const int group : {32, 64, 128})
    for (const Rounding rounding : {Rounding::Nearest, Rounding::Identity}) {
      CAPTURE(group, rounding == Rounding::Identity);
      const std::vector<FlatParameter> parameters = {
          {5, quant::kNotQuantized},       {577 * group, 2}, {group, 3},
          {131, quant::kNotQuantized},     {77 * group, 4},  {9 * group, 8},
          {9 * group, quant::kNoQuantizer}};
      const auto run = [&](Backend& b) {
        engine::Rng rng(28);
        FlatWeights flat(b, parameters, group, rounding);
        flat.draw_ratios(rng);
        for (size_t p = 0; p < parameters.size(); ++p)
          flat.set(flat.w.tensor(), p, masters(rng, 1, parameters[p].count, group));
        return flat.quantized();
      };
      const std::vector<Values> got = run(backend());
      std::vector<Values> want = run(oracle());
      want[2] = as_act(want[2]);
      for (size_t i = 0; i < got.size(); ++i) {
        INFO(FlatWeights::kQuantized[i]);
        REQUIRE(got[i].size() == want[i].size());
        const auto [a, b] = std::mismatch(got[i].begin(), got[i].end(), want[i].begin());
        const auto at = a - got[i].begin();
        INFO("first difference at " << at);
        CHECK(a == got[i].end());
      }
      // A ratio of 1/2 must clip something.
      if (rounding == Rounding::Nearest)
        CHECK(std::count_if(got[5].begin(), got[5].end(), [](double v) { return v != 0; }) > 100);
    }
}

TEST_CASE("range ratios: all 1 is the same as none", "[quantizer][ratios]") {
  Backend& b = backend();
  engine::Rng rng(29);
  const std::vector<FlatParameter> parameters = {{300 * 32, 2}, {7 * 32, 8}};
  FlatWeights with(b, parameters, 32);
  const FlatWeights without(b, parameters, 32);
  with.q.ratios = b.zeros({with.total / 32}, DType::U8);
  for (size_t p = 0; p < parameters.size(); ++p) {
    const Values w = masters(rng, 1, parameters[p].count, 32);
    with.set(with.w.tensor(), p, w);
    without.set(without.w.tensor(), p, w);
  }
  for (const FlatWeights* flat : {&without, static_cast<const FlatWeights*>(&with)}) {
    b.max_group_range(flat->q, flat->w.tensor());
    b.fake_quant(flat->q, flat->w.tensor());
  }
  for (const auto& [a, c] :
       {std::pair(&with.max_range, &without.max_range), std::pair(&with.wq, &without.wq),
        std::pair(&with.e, &without.e), std::pair(&with.z, &without.z),
        std::pair(&with.clipped, &without.clipped)})
    CHECK(bytes_of(b, a->tensor()) == bytes_of(b, c->tensor()));
}

TEST_CASE("quantize_codes writes only its output", "[quantizer]") {
  engine::Rng rng(26);
  for_each_case([&](WeightGrid spec, int64_t n, int64_t k) {
    Backend& b = backend();
    const Quantized q = quantize(b, n, k, masters(rng, n, k, spec.group), spec);
    const Guarded codes(b, {n, k}, DType::U8);
    b.quantize_codes(codes.tensor(), q.w, q.e, q.z, q.s, spec);
    CHECK(codes.untouched());
    CHECK(bytes_of(b, codes.tensor()) == bytes_of(b, q.codes));
  });
}

TEST_CASE("learned scales: S, e and levels, and the gradient of sigma", "[quantizer]") {
  engine::Rng rng(27);
  for_each_case([&](WeightGrid spec, int64_t n, int64_t k) {
    const int64_t groups = k / spec.group;
    Values sigma = normal(rng, n * groups, 0.01);
    for (double& v : sigma) v = static_cast<float>(rng.below(8) == 0 ? v : std::abs(v));
    std::vector<uint8_t> codes(static_cast<size_t>(n * k)), zeros(static_cast<size_t>(n * groups));
    for (auto* bytes : {&codes, &zeros})
      for (uint8_t& v : *bytes) v = static_cast<uint8_t>(rng.below(int64_t{1} << spec.bits));
    Values dw = round_bf16(normal(rng, n * k)), before = normal(rng, n * groups);
    for (double& v : before) v = static_cast<float>(v);

    struct Result {
      Values s, wq, dsigma, rounded, added;
      std::vector<uint8_t> e;
    };
    const auto run = [&](Backend& b) {
      const Tensor q = make_bytes(b, {n, k}, codes), z = make_bytes(b, {n, groups}, zeros);
      const Tensor d = make(b, {n, k}, b.real(), dw);
      const Tensor added = make(b, {n, groups}, b.real(), before);
      Guarded wq(b, {n, k}, b.act()), e(b, {n, groups}, DType::U8), s(b, {1}, b.real()),
          dsigma(b, {n, groups}, b.real()), rounded(b, {n, groups}, b.act());
      b.scale_codes(wq.tensor(), e.tensor(), s.tensor(), q, z,
                    make(b, {n, groups}, b.real(), sigma), spec);
      b.scale_codes_backward(dsigma.tensor(), d, q, z, spec, Write::Overwrite);
      b.scale_codes_backward(rounded.tensor(), make(b, {n, k}, b.act(), dw), q, z, spec,
                             Write::Overwrite);
      b.scale_codes_backward(added, d, q, z, spec, Write::Add);
      CHECK((wq.untouched() && e.untouched() && s.untouched() && dsigma.untouched() &&
             rounded.untouched()));
      return Result{values_of(b, s.tensor()),      values_of(b, wq.tensor()),
                    values_of(b, dsigma.tensor()), values_of(b, rounded.tensor()),
                    values_of(b, added),           bytes_of(b, e.tensor())};
    };
    const Result got = run(backend());
    const double s = formula_master_scale(*std::max_element(sigma.begin(), sigma.end()));
    std::vector<uint8_t> e;
    for (const double v : sigma) e.push_back(formula_scale(v / s, spec.bits));
    Values levels, dsigma(sigma.size(), 0.0), added = before;
    for (size_t i = 0; i < codes.size(); ++i) {
      const size_t g = i / static_cast<size_t>(spec.group);
      const double steps = codes[i] - zeros[g];
      levels.push_back(steps * quant::e4m3_decode(e[g]));
      dsigma[g] += dw[i] * steps;
    }
    for (size_t g = 0; g < dsigma.size(); ++g) added[g] += dsigma[g];
    CHECK(got.s == Values{s});
    CHECK(got.e == e);
    CHECK(got.wq == as_act(levels));
    // A sum of G products takes at most G roundings, in any order. Their errors grow as sqrt(G),
    // which is at most 12; at worst the terms are sqrt(G) times as large as the sum.
    const double tolerance = 16 * real_epsilon();
    CHECK(relative_error(got.dsigma, dsigma) < tolerance);
    // The same sum of the same terms, rounded.
    CHECK(got.rounded == as_act(got.dsigma));
    CHECK(relative_error(got.added, added) < tolerance);
  });
}

TEST_CASE("learned grids: levels, and the gradients of weight, scale and zero point",
          "[quantizer]") {
  engine::Rng rng(28);
  for_each_case([&](WeightGrid spec, int64_t n, int64_t k) {
    const int64_t groups = k / spec.group;
    const double top = (1 << spec.bits) - 1;
    Values sigma, zeta, w = normal(rng, n * k), dw = round_bf16(normal(rng, n * k));
    for (int64_t g = 0; g < n * groups; ++g) {
      sigma.push_back(static_cast<float>((0.5 + rng.uniform()) * 3 / top));
      // Some outside of the codes.
      zeta.push_back(static_cast<float>(rng.uniform() * (top + 2) - 1));
    }
    for (double& v : w) v = static_cast<float>(v);
    struct Result {
      Values s, wq, dw, dsigma, dzeta, dw_fixed, dsigma_fixed, rounded;
      std::vector<uint8_t> e, z, z_fixed;
    };
    const auto run = [&](Backend& b, const Values& sigmas, const Values& weights) {
      Guarded wq(b, {n, k}, b.act()), e(b, {n, groups}, DType::U8), z(b, {n, groups}, DType::U8),
          s(b, {1}, b.real()), d(b, {n, k}, b.real()), ds(b, {n, groups}, b.real()),
          dz(b, {n, groups}, b.real()), ds_act(b, {n, groups}, b.act());
      const Tensor master = make(b, {n, k}, b.real(), weights),
                   scales = make(b, {n, groups}, b.real(), sigmas);
      const auto backward = [&](const Guarded& to, const Tensor& zeros) {
        b.copy(to.tensor(), make(b, {n, k}, b.real(), dw));
        b.learned_quant_backward(to.tensor(), ds.tensor(), zeros, master, e.tensor(), z.tensor(),
                                 s.tensor(), spec);
      };
      b.learned_quant(wq.tensor(), e.tensor(), z.tensor(), s.tensor(), master, scales,
                      make(b, {n, groups}, b.real(), zeta), spec);
      backward(d, dz.tensor());
      Result r{values_of(b, s.tensor()),
               values_of(b, wq.tensor()),
               values_of(b, d.tensor()),
               values_of(b, ds.tensor()),
               values_of(b, dz.tensor()),
               {},
               {},
               {},
               bytes_of(b, e.tensor()),
               bytes_of(b, z.tensor()),
               {}};
      // In act: the same sums, rounded. Without zeta: zero points are an input.
      const Tensor act = make(b, {n, k}, b.act(), dw);
      b.learned_quant_backward(act, ds_act.tensor(), Tensor(), master, e.tensor(), z.tensor(),
                               s.tensor(), spec);
      r.rounded = values_of(b, ds_act.tensor());
      CHECK(values_of(b, act) == as_act(r.dw));
      b.learned_quant(wq.tensor(), e.tensor(), z.tensor(), s.tensor(), master, scales, Tensor(),
                      spec);
      backward(d, Tensor());
      CHECK(values_of(b, wq.tensor()) == r.wq);
      r.dw_fixed = values_of(b, d.tensor());
      r.dsigma_fixed = values_of(b, ds.tensor());
      r.z_fixed = bytes_of(b, z.tensor());
      CHECK((wq.untouched() && e.untouched() && z.untouched() && s.untouched() && d.untouched() &&
             ds.untouched() && dz.untouched() && ds_act.untouched()));
      return r;
    };
    const Result got = run(backend(), sigma, w);
    CHECK(got.dw_fixed == got.dw);
    CHECK(got.dsigma_fixed == got.dsigma);
    CHECK(got.z_fixed == got.z);
    CHECK(got.rounded == as_act(got.dsigma));

    const double s = formula_master_scale(*std::max_element(sigma.begin(), sigma.end()));
    CHECK(got.s == Values{s});
    Values levels, dws, dsigma(sigma.size(), 0.0), dzeta(sigma.size(), 0.0);
    Values terms(sigma.size(), 0.0), zero_terms(sigma.size(), 0.0);  // their sums of magnitudes
    for (size_t g = 0; g < sigma.size(); ++g) {
      const double e = quant::e4m3_decode(formula_scale(sigma[g] / s, spec.bits)), step = s * e;
      const double z = std::clamp(std::floor(zeta[g] + 0.5), 0.0, top);
      CHECK(static_cast<double>(got.z[g]) == z);
      CHECK(double{quant::e4m3_decode(got.e[g])} == e);
      for (int j = 0; j < spec.group; ++j) {
        const size_t i = g * static_cast<size_t>(spec.group) + static_cast<size_t>(j);
        const auto as_real = [](double v) { return double{static_cast<float>(v)}; };
        const double quotient = as_real(w[i] / step);
        const double code = std::floor(as_real(quotient + 0.5)) + z;
        const double q = std::clamp(code, 0.0, top);
        levels.push_back((q - z) * e);
        const bool clipped = q != code;
        dws.push_back(clipped ? 0 : dw[i]);
        const double term = dw[i] * (clipped ? q - z : q - z - quotient);
        dsigma[g] += term;
        terms[g] += std::abs(term);
        if (clipped) dzeta[g] -= dw[i] * step, zero_terms[g] += std::abs(dw[i] * step);
      }
    }
    CHECK(got.wq == as_act(levels));
    CHECK(got.dw == dws);
    // Sums of G products, each rounded: at most G roundings of their magnitudes.
    for (size_t g = 0; g < sigma.size(); ++g) {
      CHECK(std::abs(got.dsigma[g] - dsigma[g]) <= 2 * spec.group * real_epsilon() * terms[g]);
      CHECK(std::abs(got.dzeta[g] - dzeta[g]) <= 2 * spec.group * real_epsilon() * zero_terms[g]);
    }
  });
}

TEST_CASE("learned grids: the gradients are those of the clamp without rounding", "[quantizer]") {
  // Weights on levels or far outside: there rounding changes nothing, and the derivative of
  //   w^ = (clamp(w / s + z, 0, L) - z) s
  // by central differences in F64 is what the op gives.
  const auto backend = engine::make_cpu_f64_backend(1);
  Backend& b = *backend;
  const WeightGrid spec{2, 32};
  const int64_t n = 3, k = 64, groups = 2;
  engine::Rng rng(29);
  const Values dw = normal(rng, n * k);
  Values sigma, zeta, w;
  for (int64_t g = 0; g < n * groups; ++g) {
    sigma.push_back(std::ldexp(1.0 + 0.125 * static_cast<double>(g), -3));  // E4M3 holds it
    zeta.push_back(static_cast<double>(rng.below(4)));
    for (int j = 0; j < 32; ++j) {
      const double code = static_cast<double>(rng.below(6)) - 1;  // 0 .. 3, and one outside
      w.push_back((code - zeta.back()) * sigma.back());
    }
  }
  // Codes on the ends of the range have two one-sided derivatives: they move inside.
  for (size_t i = 0; i < w.size(); ++i) {
    const size_t g = i / 32;
    const double code = w[i] / sigma[g] + zeta[g];
    if (code == 0 || code == 3) w[i] += (code == 0 ? 1 : -1) * sigma[g];
  }
  const auto loss = [&](const Values& weights, const Values& scales, const Values& zeros) {
    double sum = 0;
    for (size_t i = 0; i < weights.size(); ++i) {
      const double s = scales[i / 32], z = zeros[i / 32];
      sum += dw[i] * (std::clamp(weights[i] / s + z, 0.0, 3.0) - z) * s;
    }
    return sum;
  };
  const auto derivative = [&](Values& of, size_t i, const auto& f) {
    constexpr double kStep = 0x1p-20;
    const double at = of[i];
    of[i] = at + kStep;
    const double up = f();
    of[i] = at - kStep;
    const double down = f();
    of[i] = at;
    return (up - down) / (2 * kStep);
  };
  const Tensor master = make(b, {n, k}, DType::F64, w), d = make(b, {n, k}, DType::F64, dw);
  const Tensor wq = b.empty({n, k}, DType::F64), e = b.empty({n, groups}, DType::U8),
               z = b.empty({n, groups}, DType::U8), s = b.empty({1}, DType::F64),
               ds = b.empty({n, groups}, DType::F64), dz = b.empty({n, groups}, DType::F64);
  b.learned_quant(wq, e, z, s, master, make(b, {n, groups}, DType::F64, sigma),
                  make(b, {n, groups}, DType::F64, zeta), spec);
  b.learned_quant_backward(d, ds, dz, master, e, z, s, spec);
  const Values dws = values_of(b, d), dsigma = values_of(b, ds), dzeta = values_of(b, dz);
  const auto now = [&] { return loss(w, sigma, zeta); };
  int clipped = 0;
  for (size_t i = 0; i < w.size(); ++i) {
    CHECK(dws[i] == Approx(derivative(w, i, now)).margin(1e-7));
    clipped += dws[i] == 0;
  }
  CHECK(clipped > 20);
  for (size_t g = 0; g < sigma.size(); ++g) {
    CHECK(dsigma[g] == Approx(derivative(sigma, g, now)).epsilon(1e-7).margin(1e-7));
    CHECK(dzeta[g] == Approx(derivative(zeta, g, now)).epsilon(1e-7).margin(1e-7));
  }
}

}  // namespace
}  // namespace bbb::tests
