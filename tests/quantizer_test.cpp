// The quantizer's ops on the device under test against CpuBackend<float>: scales, zero points,
// codes, levels and clipping masks must be equal, not close.
#include <catch2/catch.hpp>
#include <cmath>
#include <limits>
#include <vector>

#include "quant/grid.h"
#include "tests/op_test.h"

namespace bbb::tests {
namespace {

using engine::GridSpec;
using engine::Rounding;
using engine::Write;
using Values = std::vector<double>;

// (rows, groups a row): a single group, part of a warp, warps that end inside a block, and several
// blocks with a tail.
const std::vector<std::pair<int64_t, int64_t>> kSizes = {
    {1, 1}, {3, 1}, {1, 31}, {33, 18}, {7, 129}};

// F32 values: normal, with groups of very different sizes and some outliers.
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

// Everything the quantizer makes of w, on one backend.
struct Quantized {
  Tensor w, s, wq, e, z, codes;
};

Quantized quantize(Backend& b, int64_t n, int64_t k, const Values& w, GridSpec spec,
                   Rounding rounding = Rounding::Nearest) {
  const int64_t groups = k / spec.group;
  Quantized q{make(b, {n, k}, b.real(), w),    b.empty({1}, b.real()),
              b.empty({n, k}, b.act()),        b.empty({n, groups}, DType::U8),
              b.empty({n, groups}, DType::U8), b.empty({n, k}, DType::U8)};
  b.master_scale(q.s, q.w, spec);
  b.fake_quant(q.wq, q.e, q.z, q.w, q.s, spec, rounding);
  b.quantize_codes(q.codes, q.w, q.e, q.z, q.s, spec);
  return q;
}

Values as_act(Values values) {
  return backend().act() == DType::BF16 ? round_bf16(std::move(values)) : values;
}

// Equal, with NaN equal to NaN.
bool same(const Values& a, const Values& b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i)
    if (!(a[i] == b[i] || (std::isnan(a[i]) && std::isnan(b[i])))) return false;
  return true;
}

template <typename Fn>
void for_each_case(const Fn& fn) {
  for (const int bits : {2, 3, 4, 8})
    for (const int group : {32, 64, 128})
      for (const auto& [n, groups] : kSizes) {
        CAPTURE(bits, group, n, groups);
        fn(GridSpec{bits, group}, n, groups * group);
      }
}

TEST_CASE("master scale, codes and levels equal the reference", "[quantizer]") {
  engine::Rng rng(21);
  for_each_case([&](GridSpec spec, int64_t n, int64_t k) {
    const Values w = masters(rng, n, k, spec.group);
    const Quantized got = quantize(backend(), n, k, w, spec);
    const Quantized want = quantize(oracle(), n, k, w, spec);
    CHECK(values_of(backend(), got.s) == values_of(oracle(), want.s));
    CHECK(bytes_of(backend(), got.e) == bytes_of(oracle(), want.e));
    CHECK(bytes_of(backend(), got.z) == bytes_of(oracle(), want.z));
    CHECK(bytes_of(backend(), got.codes) == bytes_of(oracle(), want.codes));
    const Values levels = values_of(oracle(), want.wq);
    CHECK(same(values_of(backend(), got.wq), as_act(levels)));
    if (spec.bits <= 4) CHECK(round_bf16(levels) == levels);  // exact in bf16
  });
}

TEST_CASE("a large master scale reduction finds its maximum anywhere", "[quantizer]") {
  engine::Rng rng(22);
  const int64_t n = 1030, k = 1056;
  Values w(static_cast<size_t>(n * k), 0.001);
  for (const int64_t at : {int64_t{0}, n * k / 2 + 5, n * k - 1}) {
    w[static_cast<size_t>(at)] = -3.0;
    Tensor s = backend().empty({1}, backend().real());
    const Tensor masters = make(backend(), {n, k}, backend().real(), w);
    backend().master_scale(s, masters, {2, 32});
    const float raw = (0.001f + 3.0f) / 3.0f;
    CHECK(values_of(backend(), s)[0] == quant::master_scale_of(raw));
    w[static_cast<size_t>(at)] = 0.001;
  }
}

TEST_CASE("without rounding the quantizer is the identity", "[quantizer]") {
  engine::Rng rng(23);
  const GridSpec spec{2, 32};
  const Values w = masters(rng, 5, 96, 32);
  const Quantized q = quantize(backend(), 5, 96, w, spec, Rounding::Identity);
  Values expected = w;
  const double s = values_of(backend(), q.s)[0];
  for (double& v : expected) v /= s;  // exact
  CHECK(values_of(backend(), q.wq) == as_act(expected));
}

TEST_CASE("the straight-through gradient is 0 exactly where a master was clipped", "[quantizer]") {
  engine::Rng rng(24);
  for_each_case([&](GridSpec spec, int64_t n, int64_t k) {
    Values w = masters(rng, n, k, spec.group), dw = normal(rng, n * k);
    for (double& v : dw) v = static_cast<float>(v);
    // Scales of the masters before they moved: the ends are now clipped by more than half a step.
    const Quantized q = quantize(backend(), n, k, w, spec);
    for (double& v : w) v = static_cast<float>(v * 1.75);
    const Tensor moved = make(backend(), {n, k}, backend().real(), w);
    Guarded guarded(backend(), {n, k}, backend().real());
    backend().copy(guarded.tensor(), make(backend(), {n, k}, backend().real(), dw));
    backend().ste_backward(guarded.tensor(), moved, q.e, q.z, q.s, spec);

    const auto e = bytes_of(backend(), q.e), z = bytes_of(backend(), q.z);
    const float s = static_cast<float>(values_of(backend(), q.s)[0]);
    const float top = static_cast<float>((1 << spec.bits) - 1);
    Values expected = dw;
    int64_t clipped = 0;
    for (size_t i = 0; i < w.size(); ++i) {
      const size_t g = i / static_cast<size_t>(spec.group);
      const float x = static_cast<float>(w[i]);
      const float level = std::floor(x / (s * quant::e4m3_decode(e[g])) + 0.5f) + float(z[g]);
      if (level < 0 || level > top) expected[i] = 0, ++clipped;
    }
    CHECK(clipped > 0);
    CHECK(values_of(backend(), guarded.tensor()) == expected);
    CHECK(guarded.untouched());
  });
}

TEST_CASE("NaN and infinity in one master poison every level", "[quantizer]") {
  engine::Rng rng(25);
  for (const double bad : {std::nan(""), -std::nan(""), double(INFINITY), -double(INFINITY)}) {
    Values w = masters(rng, 9, 288, 32);
    w[1234] = bad;
    const Quantized q = quantize(backend(), 9, 288, w, {2, 32});
    CHECK(std::isnan(values_of(backend(), q.s)[0]));
    for (const double v : values_of(backend(), q.wq)) REQUIRE(std::isnan(v));
  }
}

TEST_CASE("the quantizer writes inside its outputs only", "[quantizer]") {
  engine::Rng rng(26);
  for_each_case([&](GridSpec spec, int64_t n, int64_t k) {
    Backend& b = backend();
    const int64_t groups = k / spec.group;
    const Tensor w = make(b, {n, k}, b.real(), masters(rng, n, k, spec.group));
    Guarded s(b, {1}, b.real()), wq(b, {n, k}, b.act()), e(b, {n, groups}, DType::U8),
        z(b, {n, groups}, DType::U8), codes(b, {n, k}, DType::U8);
    b.master_scale(s.tensor(), w, spec);
    b.fake_quant(wq.tensor(), e.tensor(), z.tensor(), w, s.tensor(), spec, Rounding::Nearest);
    b.quantize_codes(codes.tensor(), w, e.tensor(), z.tensor(), s.tensor(), spec);
    CHECK((s.untouched() && wq.untouched() && e.untouched() && z.untouched() && codes.untouched()));
  });
}

TEST_CASE("learned scales: S, e and levels, and the gradient of sigma", "[quantizer]") {
  engine::Rng rng(27);
  for_each_case([&](GridSpec spec, int64_t n, int64_t k) {
    const int64_t groups = k / spec.group;
    Values sigma = normal(rng, n * groups, 0.01);
    for (double& v : sigma) v = static_cast<float>(rng.below(8) == 0 ? v : std::abs(v));
    std::vector<uint8_t> codes(static_cast<size_t>(n * k)), zeros(static_cast<size_t>(n * groups));
    for (auto* bytes : {&codes, &zeros})
      for (uint8_t& v : *bytes) v = static_cast<uint8_t>(rng.below(int64_t{1} << spec.bits));
    Values dw = normal(rng, n * k), before = normal(rng, n * groups);
    for (double& v : dw) v = static_cast<float>(v);
    for (double& v : before) v = static_cast<float>(v);

    struct Result {
      Values s, wq, dsigma, added;
      std::vector<uint8_t> e;
    };
    const auto run = [&](Backend& b) {
      const Tensor q = make_bytes(b, {n, k}, codes), z = make_bytes(b, {n, groups}, zeros);
      const Tensor d = make(b, {n, k}, b.real(), dw);
      const Tensor added = make(b, {n, groups}, b.real(), before);
      Guarded wq(b, {n, k}, b.act()), e(b, {n, groups}, DType::U8), s(b, {1}, b.real()),
          dsigma(b, {n, groups}, b.real());
      b.scale_codes(wq.tensor(), e.tensor(), s.tensor(), q, z,
                    make(b, {n, groups}, b.real(), sigma), spec);
      b.scale_codes_backward(dsigma.tensor(), d, q, z, spec, Write::Overwrite);
      b.scale_codes_backward(added, d, q, z, spec, Write::Add);
      CHECK((wq.untouched() && e.untouched() && s.untouched() && dsigma.untouched()));
      return Result{values_of(b, s.tensor()), values_of(b, wq.tensor()),
                    values_of(b, dsigma.tensor()), values_of(b, added), bytes_of(b, e.tensor())};
    };
    const Result got = run(backend()), want = run(oracle()), exact = run(oracle_f64());
    CHECK(got.s == want.s);
    CHECK(got.e == want.e);
    CHECK(same(got.wq, as_act(want.wq)));
    // A sum of G products, each rounded once and added in some order: at most G roundings, whose
    // errors grow as sqrt(G) <= 12; the terms are as large as the sum times sqrt(G) at worst.
    const double tolerance = 16 * real_epsilon();
    CHECK(relative_error(got.dsigma, exact.dsigma) < tolerance);
    CHECK(relative_error(got.added, exact.added) < tolerance);
  });
}

}  // namespace
}  // namespace bbb::tests
