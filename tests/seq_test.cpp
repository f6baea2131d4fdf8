// SEQ, the symmetric grid, and the straight-through estimators: the ops on the device under test
// against formulas, and against the CPU bit for bit.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>
#include <vector>

#include "models/layer_result.h"
#include "models/quant_linear.h"
#include "models/site_statistics.h"
#include "quant/host.h"
#include "quant/pack.h"
#include "tests/flat_weights.h"
#include "tests/formats.h"
#include "tests/op_test.h"
#include "tests/quantizer_formula.h"

namespace bbb::tests {
namespace {

namespace host = quant::host;
using engine::WeightGrid;
using engine::Write;
using quant::Levels;
using quant::Ste;
using quant::WeightRule;
using Values = std::vector<double>;

constexpr WeightRule kSeq{Levels::Seq, Ste::Clip, 1};

WeightGrid seq_grid(int bits, int group = 32) {
  return {.bits = bits, .group = group, .levels = Levels::Seq};
}

Values masters(engine::Rng& rng, int64_t count) {
  Values w = normal(rng, count, 0.02);
  for (int64_t i = 0; i < count; ++i) {
    double& v = w[static_cast<size_t>(i)];
    v = static_cast<float>(std::ldexp(v, static_cast<int>(i / 32 % 7) - 5) * (i % 97 == 5 ? 8 : 1));
    if (i / 32 % 11 == 3) v = 0;
    if (i / 32 % 11 == 4) v = std::abs(v);
  }
  return w;
}

Values as_act(Values values) {
  return backend().act() == DType::BF16 ? round_bf16(std::move(values)) : values;
}

// The grid by its definition. Where it rounds, the type is float.
struct SeqResult {
  double s = 1;
  std::vector<uint8_t> e, codes, clipped;
  Values levels;  // (n + 1/2) a

  SeqResult(const Values& w, int bits, int group) : clipped(w.size() / 8) {
    const float half = static_cast<float>(1 << (bits - 1));
    const auto size = static_cast<size_t>(group);
    std::vector<float> raw;
    for (size_t begin = 0; begin < w.size(); begin += size) {
      float most = 0;
      for (size_t i = begin; i < begin + size; ++i)
        most = std::max(most, std::abs(static_cast<float>(w[i])));
      raw.push_back(most / half);
    }
    s = formula_master_scale(*std::max_element(raw.begin(), raw.end()));
    for (size_t g = 0; g < raw.size(); ++g) {
      e.push_back(formula_scale(raw[g] / s, bits));
      const float a = quant::e4m3_decode(e[g]), step = static_cast<float>(s) * a;
      for (size_t i = g * size; i < (g + 1) * size; ++i) {
        const float floor = std::floor(static_cast<float>(w[i]) / step);
        const float n = std::clamp(floor, -half, half - 1);
        codes.push_back(static_cast<uint8_t>(n + half));
        levels.push_back(static_cast<double>((n + 0.5f) * a));
        if (n != floor) clipped[i / 8] |= static_cast<uint8_t>(1 << i % 8);
      }
    }
  }
};

}  // namespace

TEST_CASE("seq: master scale, codes and levels equal the formula", "[seq][quantizer]") {
  engine::Rng rng(21);
  Backend& b = backend();
  for (const int bits : {2, 3, 4, 8})
    for (const int group : {32, 64, 128})
      for (const auto& [n, groups] :
           {std::pair<int64_t, int64_t>{1, 1}, {3, 1}, {1, 31}, {33, 18}, {7, 129}}) {
        CAPTURE(bits, group, n, groups);
        const int64_t k = groups * group, count = n * k;
        const Values w = masters(rng, count);
        const SeqResult want(w, bits, group);
        FlatWeights flat(b, {{5, quant::kNotQuantized}, {count, bits}}, group);
        flat.q.rule = kSeq;
        flat.set(flat.w.tensor(), 1, w);
        b.max_group_range(flat.q, flat.w.tensor());
        b.fake_quant(flat.q, flat.w.tensor());
        CHECK(flat.untouched());
        const int64_t begin = flat.begins[1];
        const Tensor e = flat.e.tensor().slice(begin / group, n * groups).view({n, groups}),
                     z = flat.z.tensor().slice(begin / group, n * groups).view({n, groups}),
                     s = flat.s.tensor().slice(1, 1), codes = b.empty({n, k}, DType::U8);
        CHECK(values_of(b, s)[0] == want.s);
        CHECK(bytes_of(b, e) == want.e);
        CHECK(bytes_of(b, flat.clipped.tensor().slice(begin / 8, count / 8)) == want.clipped);
        CHECK(values_of(b, flat.wq.tensor().slice(begin, count)) == as_act(want.levels));
        if (bits <= 4) CHECK(round_bf16(want.levels) == want.levels);  // exact in bf16
        b.quantize_codes(codes, flat.w.tensor().slice(begin, count).view({n, k}), e, z, s,
                         seq_grid(bits, group));
        CHECK(bytes_of(b, codes) == want.codes);
      }
}

// Rules and their share of masked weights: with ratios down to 1/2 much is clipped.
TEST_CASE("ste: every rule on the device equals the CPU bit for bit", "[seq][quantizer][ratios]") {
  for (const int group : {32, 64, 128})
    for (const WeightRule rule :
         {WeightRule{Levels::MinMax, Ste::All, 1}, WeightRule{Levels::MinMax, Ste::Trust, 0.75f},
          WeightRule{Levels::MinMax, Ste::Trust, 1.5f}, kSeq, WeightRule{Levels::Seq, Ste::All, 1},
          WeightRule{Levels::Seq, Ste::Trust, 0.75f}}) {
      CAPTURE(group, rule.levels == Levels::Seq, static_cast<int>(rule.ste), rule.trust);
      const std::vector<FlatParameter> parameters = {{5, quant::kNotQuantized},
                                                     {577 * group, 2},
                                                     {group, 3},
                                                     {77 * group, 4},
                                                     {9 * group, quant::kNoQuantizer}};
      const auto run = [&](Backend& b) {
        engine::Rng rng(28);
        FlatWeights flat(b, parameters, group);
        flat.q.rule = rule;
        flat.draw_ratios(rng);
        for (size_t p = 0; p < parameters.size(); ++p)
          flat.set(flat.w.tensor(), p, masters(rng, parameters[p].count));
        return flat.quantized();
      };
      const std::vector<Values> got = run(backend());
      std::vector<Values> want = run(oracle());
      want[2] = as_act(want[2]);
      for (size_t i = 0; i < got.size(); ++i) {
        INFO(FlatWeights::kQuantized[i]);
        CHECK(got[i] == want[i]);
      }
      const auto masked =
          std::count_if(got[5].begin(), got[5].end(), [](double v) { return v != 0; });
      if (rule.ste == Ste::All)
        CHECK(masked == 0);
      else
        CHECK(masked > 100);
    }
}

TEST_CASE("ste: trust leaves out exactly the weights farther than its distance from their level",
          "[seq][quantizer]") {
  engine::Rng rng(31);
  Backend& b = backend();
  constexpr int kGroup = 32;
  const int64_t count = 300 * kGroup;
  for (const Levels levels : {Levels::MinMax, Levels::Seq}) {
    const Values w = masters(rng, count);
    FlatWeights flat(b, {{count, 2}}, kGroup);
    engine::Rng drawn(5);
    flat.draw_ratios(drawn);
    flat.set(flat.w.tensor(), 0, w);
    std::vector<uint8_t> clip;
    for (const float trust : {0.0f, 0.5f, 1.0f, 2.0f}) {  // 0: Ste::Clip
      CAPTURE(levels == Levels::Seq, trust);
      flat.q.rule = {levels, trust == 0 ? Ste::Clip : Ste::Trust, trust};
      b.max_group_range(flat.q, flat.w.tensor());
      b.fake_quant(flat.q, flat.w.tensor());
      const auto mask = bytes_of(b, flat.clipped.tensor()), e = bytes_of(b, flat.e.tensor());
      const Values wq = values_of(b, flat.wq.tensor());
      const double s = values_of(b, flat.s.tensor())[0];
      if (trust == 0) {
        clip = mask;
        continue;
      }
      int64_t wrong = 0, masked = 0, other = 0;
      for (int64_t i = 0; i < count; ++i) {
        const auto at = static_cast<size_t>(i);
        const double step = s * quant::e4m3_decode(e[at / kGroup]);
        const double distance = std::abs(w[at] - s * wq[at]) / step;  // in steps
        if (std::abs(distance - trust / 2) < 1e-5) continue;          // float decides
        wrong += bit_of(mask, at) != (distance > trust / 2);
        other += bit_of(mask, at) != bit_of(clip, at);
        masked += bit_of(mask, at);
      }
      CHECK(wrong == 0);
      CHECK(masked > 50);
      // QuEST's distance, half a step, is where clipping begins.
      CHECK((other == 0) == (trust == 1));
    }
  }
}

TEST_CASE("seq: frozen codes and learned scales, and their gradients", "[seq][quantizer]") {
  engine::Rng rng(27);
  for (const int bits : {2, 3, 4}) {
    CAPTURE(bits);
    const WeightGrid spec = seq_grid(bits);
    const int64_t n = 9, groups = 35, k = groups * 32;
    const double zero = ((1 << bits) - 1) / 2.0;
    Values sigma, w = normal(rng, n * k), dw = round_bf16(normal(rng, n * k));
    for (double& v : w) v = static_cast<float>(v);
    for (int64_t g = 0; g < n * groups; ++g)
      sigma.push_back(static_cast<float>((0.5 + rng.uniform()) * 3 / (1 << bits)));
    std::vector<uint8_t> codes(static_cast<size_t>(n * k));
    for (uint8_t& v : codes) v = static_cast<uint8_t>(rng.below(int64_t{1} << bits));

    Backend& b = backend();
    Guarded wq(b, {n, k}, b.act()), e(b, {n, groups}, DType::U8), z(b, {n, groups}, DType::U8),
        s(b, {1}, b.real()), d(b, {n, k}, b.real()), ds(b, {n, groups}, b.real());
    b.zero(z.tensor());
    const Tensor scales = make(b, {n, groups}, b.real(), sigma), q = make_bytes(b, {n, k}, codes),
                 master = make(b, {n, k}, b.real(), w);
    b.copy(d.tensor(), make(b, {n, k}, b.real(), dw));
    b.scale_codes(wq.tensor(), e.tensor(), s.tensor(), q, z.tensor(), scales, spec);
    b.scale_codes_backward(ds.tensor(), d.tensor(), q, z.tensor(), spec, Write::Overwrite);
    const double master_scale = values_of(b, s.tensor())[0];
    CHECK(master_scale == formula_master_scale(*std::max_element(sigma.begin(), sigma.end())));
    const Values frozen = values_of(b, wq.tensor()), dfrozen = values_of(b, ds.tensor());
    b.learned_quant(wq.tensor(), e.tensor(), z.tensor(), s.tensor(), master, scales, Tensor(),
                    spec);
    b.learned_quant_backward(d.tensor(), ds.tensor(), Tensor(), master, e.tensor(), z.tensor(),
                             s.tensor(), spec);
    const Values learned = values_of(b, wq.tensor()), dlearned = values_of(b, ds.tensor()),
                 dweight = values_of(b, d.tensor());
    const auto scale_codes = bytes_of(b, e.tensor());
    CHECK((wq.untouched() && e.untouched() && z.untouched() && s.untouched() && d.untouched() &&
           ds.untouched()));
    Values levels, want, dwant;
    for (size_t g = 0; g < sigma.size(); ++g) {
      REQUIRE(scale_codes[g] == formula_scale(sigma[g] / master_scale, bits));
      const double a = quant::e4m3_decode(scale_codes[g]);
      double sum = 0, terms = 0, learned_sum = 0, learned_terms = 0;
      for (size_t i = g * 32; i < (g + 1) * 32; ++i) {
        levels.push_back((codes[i] - zero) * a);
        sum += dw[i] * (codes[i] - zero);
        terms += std::abs(dw[i] * (codes[i] - zero));
        const double quotient = static_cast<float>(w[i] / (master_scale * a));
        const double unclamped = std::floor(quotient) + 0.5,
                     step = std::clamp(unclamped, -zero, zero);
        want.push_back(step * a);
        const bool clipped = step != unclamped;
        dwant.push_back(clipped ? 0 : dw[i]);
        const double term = dw[i] * (clipped ? step : step - quotient);
        learned_sum += term;
        learned_terms += std::abs(term);
      }
      // Sums of 32 products, each rounded: at most 32 roundings of their magnitudes.
      CHECK(std::abs(dfrozen[g] - sum) <= 64 * real_epsilon() * terms);
      CHECK(std::abs(dlearned[g] - learned_sum) <= 64 * real_epsilon() * learned_terms);
    }
    CHECK(frozen == as_act(levels));
    CHECK(learned == as_act(want));
    CHECK(dweight == dwant);
  }
}

TEST_CASE("seq: the gradient of a learned scale is that of the clamp without rounding",
          "[seq][quantizer]") {
  // Weights on levels inside, or far outside: there rounding changes nothing, and the derivative
  // of w^ = clamp(w / s, -3/2, 3/2) s by central differences in F64 is what the op gives.
  const auto f64 = engine::make_cpu_f64_backend(1);
  Backend& b = *f64;
  const WeightGrid spec = seq_grid(2);
  const int64_t n = 3, groups = 2, k = 64;
  engine::Rng rng(29);
  const Values dw = normal(rng, n * k);
  Values sigma, w;
  for (int64_t g = 0; g < n * groups; ++g) {
    sigma.push_back(std::ldexp(1.0 + 0.125 * static_cast<double>(g), -3));  // E4M3 holds it
    const double steps[] = {-0.5, 0.5, -2.75, 3.25};
    for (int j = 0; j < 32; ++j) w.push_back(steps[rng.below(4)] * sigma.back());
  }
  const auto loss = [&] {
    double sum = 0;
    for (size_t i = 0; i < w.size(); ++i)
      sum += dw[i] * std::clamp(w[i] / sigma[i / 32], -1.5, 1.5) * sigma[i / 32];
    return sum;
  };
  const auto derivative = [&](double& of) {
    constexpr double kStep = 0x1p-20;
    const double at = of;
    of = at + kStep;
    const double up = loss();
    of = at - kStep;
    const double down = loss();
    of = at;
    return (up - down) / (2 * kStep);
  };
  const Tensor master = make(b, {n, k}, DType::F64, w), d = make(b, {n, k}, DType::F64, dw);
  const Tensor wq = b.empty({n, k}, DType::F64), e = b.empty({n, groups}, DType::U8),
               z = b.zeros({n, groups}, DType::U8), s = b.empty({1}, DType::F64),
               ds = b.empty({n, groups}, DType::F64);
  b.learned_quant(wq, e, z, s, master, make(b, {n, groups}, DType::F64, sigma), Tensor(), spec);
  b.learned_quant_backward(d, ds, Tensor(), master, e, z, s, spec);
  const Values dws = values_of(b, d), dsigma = values_of(b, ds);
  int clipped = 0;
  for (size_t i = 0; i < w.size(); ++i) {
    CHECK(dws[i] == Approx(derivative(w[i])).margin(1e-7));
    clipped += dws[i] == 0;
  }
  CHECK(clipped > 20);
  for (size_t g = 0; g < sigma.size(); ++g)
    CHECK(dsigma[g] == Approx(derivative(sigma[g])).epsilon(1e-7).margin(1e-7));
}

TEST_CASE("seq: its tensors, 2.25 bits a weight, and what products read", "[seq][format]") {
  const quant::LinearFormat format{.n = 4096, .k = 4096, .weight = seq_grid(2)};
  const auto tensors = format.tensors();
  REQUIRE(tensors.size() == 3);
  CHECK(tensors[0].shape == std::vector<int64_t>{4096, 1024});
  CHECK(tensors[1].part == quant::StoredPart::Scales);
  CHECK(tensors[2].part == quant::StoredPart::MasterScale);
  for (const int bits : {2, 3, 4}) {
    const quant::LinearFormat f{.n = 4096, .k = 4096, .weight = seq_grid(bits)};
    CHECK(8.0 * static_cast<double>(f.bytes()) / (4096.0 * 4096.0) ==
          Approx(bits + 0.25).epsilon(1e-5));
    const quant::LinearFormat read = f.multiplied();
    CHECK(read.weight == WeightGrid{.bits = bits < 4 ? bits + 1 : 8, .group = 32});
    CHECK(read.multiplied() == read);
  }
}

TEST_CASE("seq: packed products and unpacked weights are those of the levels", "[seq][packed]") {
  engine::Rng rng(33);
  Backend& b = backend();
  for (const int bits : {2, 3, 4})
    for (const auto& [n, k, group] :
         {std::tuple<int64_t, int64_t, int>{40, 96, 32}, {33, 256, 64}, {128, 640, 128}}) {
      CAPTURE(bits, n, k, group);
      models::LinearResult linear;
      linear.format = {.n = n, .k = k, .weight = seq_grid(bits, group)};
      const int64_t groups = k / group;
      std::vector<uint8_t> codes(static_cast<size_t>(n * k)), e(static_cast<size_t>(n * groups));
      for (uint8_t& v : codes) v = static_cast<uint8_t>(rng.below(int64_t{1} << bits));
      for (uint8_t& v : e) v = static_cast<uint8_t>(0x30 + rng.below(16));
      constexpr float kMaster = 0x1p-5f;
      linear.store(codes, e, std::vector<uint8_t>(e.size()), kMaster);
      Values levels;
      for (size_t i = 0; i < codes.size(); ++i)
        levels.push_back((codes[i] - ((1 << bits) - 1) / 2.0) *
                         quant::e4m3_decode(e[i / static_cast<size_t>(group)]) * kMaster);
      const std::vector<float> stored = linear.levels();
      CHECK(Values(stored.begin(), stored.end()) == levels);

      const engine::PackedWeight packed = engine::upload_packed(
          b, linear.format,
          [&](const quant::StoredTensor& t) { return linear.part(t.part).data(); });
      CHECK(packed.format == linear.format.multiplied());
      const Tensor wq = b.empty({n, k}, b.act());
      b.unpack(wq, packed);
      Values unpacked = values_of(b, wq);
      for (double& v : unpacked) v *= kMaster / 2;
      CHECK(unpacked == levels);
      for (const int64_t m : {1, 3, 8}) {
        const Values x = activations(rng, m * k);
        Values want;
        for (int64_t row = 0; row < m; ++row)
          for (int64_t j = 0; j < n; ++j) {
            double sum = 0;
            for (int64_t i = 0; i < k; ++i)
              sum += x[static_cast<size_t>(row * k + i)] * levels[static_cast<size_t>(j * k + i)];
            want.push_back(sum);
          }
        const Tensor y = b.empty({m, n}, b.real());
        b.packed_gemv(y, make(b, {m, k}, b.act(), x), packed, Tensor());
        CHECK(relative_error(values_of(b, y), want) < 1e-4);  // x may be split into integers
      }
    }
}

TEST_CASE("seq: snapping keeps the grid and every code", "[seq][quantizer]") {
  engine::Rng rng(19);
  for (const int bits : {2, 3, 4})
    for (int trial = 0; trial < 100; ++trial) {
      CAPTURE(bits, trial);
      constexpr int64_t kGroups = 24, kGroup = 32;
      const WeightGrid spec = seq_grid(bits);
      const Values drawn = masters(rng, kGroups * kGroup);
      std::vector<float> w(drawn.begin(), drawn.end());
      std::vector<uint8_t> ratios(kGroups);
      for (uint8_t& r : ratios) r = static_cast<uint8_t>(rng.below(quant::kRangeRatios));
      struct Made {
        float s;
        std::vector<float> levels;
        std::vector<uint8_t> e;
      };
      const auto quantize = [&] {
        Made made{0, std::vector<float>(w.size()), std::vector<uint8_t>(kGroups)};
        std::vector<uint8_t> z(kGroups), clipped(w.size() / 8);
        const host::Rows rows{0, kGroups};
        made.s = quant::master_scale_of(quant::raw_scale(
            host::group_range_max(w.data(), ratios.data(), rows, kGroup, kGroup, Levels::Seq), bits,
            Levels::Seq));
        host::fake_quant(made.levels.data(), made.e.data(), z.data(), clipped.data(), w.data(),
                         ratios.data(), rows, kGroup, made.s, spec, quant::Rounding::Nearest, kSeq);
        return made;
      };
      const Made before = quantize();
      const std::vector<float> from = w;
      host::snap(w.data(), ratios.data(), {0, kGroups}, kGroup, before.s, spec);
      const Made after = quantize();
      REQUIRE(after.s == before.s);
      REQUIRE(after.e == before.e);
      REQUIRE(after.levels == before.levels);
      size_t moved = 0;
      for (size_t i = 0; i < w.size(); ++i) moved += w[i] != from[i];
      CHECK(moved > w.size() / 2);
    }
}

TEST_CASE("seq: a split pair sums to round(w / s), and codes start masters on the same grid",
          "[seq][stage_start]") {
  engine::Rng rng(101);
  for (const int bits : {2, 3, 4}) {
    CAPTURE(bits);
    const int64_t n = 60, k = 256;
    std::vector<int32_t> split;
    for (int32_t c = 0; c < k; c += 2) split.push_back(c);
    quant::LinearFormat format{.n = n, .k = k, .weight = seq_grid(bits)};
    format.order = std::make_shared<quant::ChannelOrder>(k, 32, std::vector<int32_t>{}, split,
                                                         quant::SplitSide::Weight);
    models::LinearResult plain;
    plain.format = plain_format(n, k, quant::kNoQuantizer);
    for (const double v : normal(rng, n * k, 0.02)) plain.master.push_back(static_cast<float>(v));
    models::LinearResult start =
        models::start_stage(plain, format, {}, quant::RangeRule::MinMax, 0);
    const models::LinearGrid grid = models::nearest_grid(start);
    const int64_t stored = format.stored_k();
    std::vector<uint8_t> codes;
    int64_t checked = 0, clipped = 0;
    for (int64_t i = 0; i < n * stored; ++i) {
      const float step = quant::step_of(grid.e[static_cast<size_t>(i / 32)], grid.master_scale);
      const float zero = quant::zero_point<float>(0, bits, Levels::Seq);
      codes.push_back(static_cast<uint8_t>(
          quant::code_of(start.master[static_cast<size_t>(i)], step, zero, bits, Levels::Seq)));
      const int64_t position = i % stored;
      if (position >= format.order->pairs_end() || position % 2 == 0) continue;
      const float* pair = start.master.data() + i - 1;
      const auto steps = [&](float x) { return quant::unclamped_code(x, step, zero, Levels::Seq); };
      if (quant::is_clipped(steps(pair[0]), bits) || quant::is_clipped(steps(pair[1]), bits)) {
        ++clipped;
        continue;
      }
      const double exact = (double{pair[0]} + pair[1]) / step + 0.5;
      if (std::ceil(exact) - exact < 1e-4 || exact - std::floor(exact) < 1e-4) continue;
      ++checked;
      REQUIRE(steps(pair[0]) + steps(pair[1]) - 2 * zero == static_cast<float>(std::floor(exact)));
    }
    CHECK(checked > n * 100);
    CHECK(clipped < n * 13);  // a tenth of the pairs
    // Stored, and taken up again by training of all weights: the same scales and codes, except in
    // groups that use no outermost code.
    start.store(codes, grid.e, grid.zeros, grid.master_scale);
    start.master.clear();
    const models::LinearResult again =
        models::start_stage(start, format, {}, quant::RangeRule::MinMax, 0);
    CHECK(again.stored == start.stored);
    const models::LinearGrid regained = models::nearest_grid(again);
    int64_t other = 0, outer = 0;
    for (size_t g = 0; g < grid.e.size(); ++g) {
      const auto* first = codes.data() + g * 32;
      const bool spans = std::any_of(
          first, first + 32, [&](uint8_t q) { return q == 0 || q == quant::max_code(bits); });
      outer += spans;
      if (!spans) continue;
      const float step = quant::step_of(regained.e[g], regained.master_scale);
      other += step != quant::step_of(grid.e[g], grid.master_scale);
      for (size_t i = g * 32; i < (g + 1) * 32; ++i)
        other +=
            quant::code_of(again.master[i], step, quant::zero_point<float>(0, bits, Levels::Seq),
                           bits, Levels::Seq) != static_cast<float>(codes[i]);
    }
    CHECK(other == 0);
    CHECK(outer > static_cast<int64_t>(grid.e.size()) * 9 / 10);
  }
}

}  // namespace bbb::tests
