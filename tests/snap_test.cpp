// Snapping moves weights to the middle of their bins. Quantized again, they give the same grid and
// the same codes.
#include <catch2/catch.hpp>
#include <cmath>

#include "engine/rng.h"
#include "quant/host.h"
#include "tests/require_quiet.h"

namespace bbb::tests {
namespace {

namespace host = quant::host;
using quant::WeightGrid;

constexpr int64_t kGroups = 24;

// Draws one matrix. With `lone`, the first group alone decides S. Its scale is in the range where
// bin middles would halve S.
template <typename Real>
std::vector<Real> draw(engine::Rng& rng, WeightGrid spec, bool lone) {
  std::vector<Real> w(static_cast<size_t>(kGroups * spec.group));
  const double s = std::ldexp(1.0, static_cast<int>(rng.below(40)) - 30);
  for (int64_t g = 0; g < kGroups; ++g) {
    Real* x = w.data() + g * spec.group;
    const int64_t kind = rng.below(7);
    const double scale = s * (lone ? 0.25 : std::exp2(-6 * rng.uniform()));
    for (int i = 0; i < spec.group; ++i) {
      double v = rng.normal();
      if (kind == 1) v = std::abs(v);
      if (kind == 2) v = -std::abs(v);
      if (kind == 3) v = 0;
      if (kind == 4) v *= 1e-6;                  // the smallest scale code
      if (kind == 5) v = std::round(2 * v) / 2;  // many ties
      if (kind == 6 && i > 1) v *= 0.05;         // two weights span the range
      x[i] = static_cast<Real>(scale * v);
    }
    if (!lone || g > 0) continue;
    const double width = quant::max_code(spec.bits) * s * (224 + 8.5 * rng.uniform());
    const double low = rng.uniform();
    for (int i = 0; i < spec.group; ++i) x[i] = static_cast<Real>(width * rng.normal() * 0.05);
    x[3] = static_cast<Real>(-low * width);
    x[7] = static_cast<Real>(x[3] + width);
  }
  return w;
}

template <typename Real>
struct Quantized {
  Real s;
  std::vector<Real> levels;
  std::vector<uint8_t> e, z, clipped;

  Quantized(const std::vector<Real>& w, WeightGrid spec)
      : levels(w.size()), e(kGroups), z(kGroups), clipped(w.size() / 8) {
    const host::Rows rows{0, kGroups};
    s = quant::master_scale_of(quant::raw_scale(
        host::group_range_max(w.data(), nullptr, rows, spec.group, spec.group), spec.bits));
    host::fake_quant(levels.data(), e.data(), z.data(), clipped.data(), w.data(), nullptr, rows,
                     spec.group, s, spec, quant::Rounding::Nearest);
  }
};

template <typename Real>
void check_snap(WeightGrid spec) {
  CAPTURE(spec.bits, spec.group, sizeof(Real));
  engine::Rng rng(19);
  int64_t off_middle = 0, total = 0;
  bool held_s = false;
  for (int trial = 0; trial < 300; ++trial) {
    CAPTURE(trial);
    const bool lone = trial % 3 == 0;
    const std::vector<Real> w = draw<Real>(rng, spec, lone);
    const Quantized<Real> before(w, spec);
    std::vector<Real> snapped = w;
    host::snap(snapped.data(), nullptr, {0, kGroups}, spec.group, before.s, spec);
    const Quantized<Real> after(snapped, spec);
    REQUIRE(after.s == before.s);
    REQUIRE(after.e == before.e);
    REQUIRE(after.z == before.z);
    REQUIRE(after.levels == before.levels);
    std::vector<Real> again = snapped;
    host::snap(again.data(), nullptr, {0, kGroups}, spec.group, before.s, spec);
    REQUIRE(again == snapped);

    std::vector<Real> middles = before.levels;
    for (size_t i = 0; i < w.size(); ++i) {
      middles[i] *= before.s;
      off_middle += snapped[i] != middles[i];
      // A weight never moves away from the middle.
      REQUIRE_QUIET(std::abs(snapped[i] - middles[i]) <= std::abs(w[i] - middles[i]));
    }
    total += static_cast<int64_t>(w.size());
    held_s |= Quantized<Real>(middles, spec).s != before.s;
  }
  // Some groups would change if all their weights moved to the middle, so a few weights stay off
  // it.
  CHECK(off_middle > 0);
  CHECK(off_middle < total / 10);
  CHECK(held_s);
}

}  // namespace

TEST_CASE("snap: S, e, z and codes do not change, at every bit width and group size",
          "[quantizer]") {
  for (const int bits : {2, 3, 4, 8})
    for (const int group : {32, 64, 128}) {
      check_snap<float>({bits, group});
      check_snap<double>({bits, group});
    }
}

}  // namespace bbb::tests
