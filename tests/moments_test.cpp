// Moments of 8 bits: their levels, the rounding between them, and AdamW's steps with them.
#include "quant/moments.h"

#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>

#include "tests/flat_weights.h"
#include "tests/op_test.h"

namespace bbb::tests {
namespace {

using quant::kFirstLevels;
using quant::kSecondLevels;
using quant::kTileAlign;
using quant::moment_code;
using quant::moment_level;

constexpr uint32_t kDraws = 1u << quant::kMomentShift;

// One step on `count` elements without a quantizer, from gradients g. `applied`: kApplied.
void step(Backend& b, const Tensor& w, const Tensor& m, const Tensor& v, const Tensor& g,
          int applied) {
  std::vector<double> slots(engine::kControlSize);
  slots[engine::kApplied] = applied;
  slots[engine::kLr] = 1e-2;
  slots[engine::kScale] = 1;
  const std::vector<quant::WeightTile> tiles = quant::make_tiles({w.numel()});
  engine::ParameterTable table{
      .tiles = b.empty({static_cast<int64_t>(tiles.size()), 4}, DType::I32),
      .slots = make(b, {1, 3}, b.real(), {1, 0, 0})};
  b.upload(table.tiles, tiles.data());
  b.adamw(w, m, v, g, make(b, {engine::kControlSize}, b.real(), slots), table, {}, {});
}

struct Unpacked {
  std::vector<double> first, second;
};

Unpacked unpacked(Backend& b, const Tensor& m, const Tensor& v) {
  Unpacked values;
  const std::vector<uint8_t> of_m = bytes_of(b, m), of_v = bytes_of(b, v);
  for (size_t at = 0; at < of_m.size(); at += quant::kMomentBlockBytes) {
    float m_scale, v_scale;
    std::memcpy(&m_scale, &of_m[at + kTileAlign], sizeof m_scale);
    std::memcpy(&v_scale, &of_v[at + kTileAlign], sizeof v_scale);
    for (size_t i = at; i < at + kTileAlign; ++i) {
      values.first.push_back(quant::first_moment(of_m[i], m_scale));
      values.second.push_back(quant::second_moment(of_v[i], v_scale));
    }
  }
  return values;
}

}  // namespace

TEST_CASE("levels of moments rise by an eighth of an octave at most", "[moments]") {
  for (const int levels : {kFirstLevels, kSecondLevels}) {
    CHECK(moment_level(0, levels) == 0);
    CHECK(moment_level(levels, levels) == 1);
    for (int code = 1; code <= levels; ++code) {
      const float level = moment_level(code, levels);
      for (const uint32_t draw : {0u, kDraws / 2, kDraws - 1})
        CHECK(moment_code(level, levels, 0, draw) == code);
      if (code == 1) continue;
      const float below = moment_level(code - 1, levels);
      CHECK(level > below);
      CHECK(level <= below * 1.125f);
    }
  }
}

TEST_CASE("moments are rounded up as often as keeps their mean", "[moments]") {
  engine::Rng rng(5);
  constexpr int kSteps = 4096;
  for (int i = 0; i < 200; ++i) {
    const auto x = static_cast<float>(std::exp2(-17 * rng.uniform()));
    for (const int levels : {kFirstLevels, kSecondLevels}) {
      double sum = 0;
      for (uint32_t draw = 0; draw < kDraws; draw += kDraws / kSteps)
        sum += moment_level(moment_code(x, levels, 0, draw), levels);
      const double distance = std::max(double{x} / 8, double{moment_level(1, levels)});
      CHECK(std::abs(sum / kSteps - x) <= distance / kSteps);
    }
  }
  for (const float tiny : {1e-38f, 1e-20f, 1e-11f})
    for (const uint32_t draw : {0u, kDraws - 1}) {
      CHECK(moment_code(tiny, kSecondLevels, 1, draw) == 1);
      CHECK(moment_code(0.0f, kSecondLevels, 1, draw) == 0);
    }
}

TEST_CASE("adamw with moments of 8 bits is the published update, then rounds them", "[moments]") {
  for (Backend* const device : {&backend(), &oracle_f64()})
    for (const bool wide : {false, true}) {
      Backend& b = *device;
      const DType dtype = wide ? b.real() : b.act();
      const int64_t n = 3 * kTileAlign + quant::kTileElements;
      engine::Rng rng(17);
      const Guarded w(b, {n}, b.real()), m(b, {quant::moment_bytes(n)}, DType::U8),
          v(b, {quant::moment_bytes(n)}, DType::U8);
      std::vector<double> weights = normal(rng, n);
      b.copy(w.tensor(), make(b, {n}, b.real(), weights));
      b.zero(m.tensor());
      b.zero(v.tensor());
      Unpacked before = unpacked(b, m.tensor(), v.tensor());
      for (int t = 1; t <= 4; ++t) {
        std::vector<double> g = round_bf16(normal(rng, n, 1e-2));
        for (size_t i = 0; i < 2 * kTileAlign; ++i) g[i] *= i < kTileAlign ? 0 : i % 2;
        step(b, w.tensor(), m.tensor(), v.tensor(), make(b, {n}, dtype, g), t);
        const Unpacked after = unpacked(b, m.tensor(), v.tensor());
        bool near = true, kept = true;
        for (size_t i = 0; i < g.size(); ++i) {
          const double first = 0.9 * before.first[i] + 0.1 * g[i];
          const double second = 0.999 * before.second[i] + 0.001 * g[i] * g[i];
          weights[i] -= 1e-2 * (first / (1 - std::pow(0.9, t))) /
                        (std::sqrt(second / (1 - std::pow(0.999, t))) + 1e-8);
          // Within a level, or below the lowest one of a block whose largest is about 0.05.
          near = near && std::abs(after.first[i] - first) <= std::abs(first) / 8 + 1e-6;
          near = near && std::abs(after.second[i] - second) <= second / 8 + 1e-12;
          kept = kept && (after.second[i] > 0) == (second > 0);
        }
        CAPTURE(t, wide);
        CHECK(near);
        CHECK(kept);
        CHECK(relative_error(values_of(b, w.tensor()), weights) <= 32 * epsilon_of(b.real()));
        before = after;
      }
      CHECK((w.untouched() && m.untouched() && v.untouched()));
    }
}

TEST_CASE("moments of 8 bits follow a gradient that changes", "[moments]") {
  Backend& b = backend();
  const int64_t n = kTileAlign;
  const Tensor w = b.zeros({n}, b.real()), m = b.zeros({quant::moment_bytes(n)}, DType::U8),
               v = b.zeros({quant::moment_bytes(n)}, DType::U8);
  const auto run = [&](int from, int to, double gradient) {
    std::vector<double> g(static_cast<size_t>(n), gradient);
    g[0] = 1;  // the block's scale stays
    const Tensor gradients = make(b, {n}, b.real(), g);
    for (int t = from; t <= to; ++t) step(b, w, m, v, gradients, t);
    const Unpacked now = unpacked(b, m, v);
    double first = 0, second = 0;
    for (size_t i = 1; i < g.size(); ++i) first += now.first[i], second += now.second[i];
    return std::pair{first / static_cast<double>(n - 1), second / static_cast<double>(n - 1)};
  };
  const auto [first, second] = run(1, 2000, 0.25);
  CHECK(first == Approx(0.25).epsilon(0.05));
  CHECK(second == Approx(0.0625 * (1 - std::pow(0.999, 2000))).epsilon(0.05));
  const auto [gone, decayed] = run(2001, 3000, 0);
  CHECK(std::abs(gone) < 1e-4);
  CHECK(decayed == Approx(second * std::pow(0.999, 1000)).epsilon(0.1));
}

TEST_CASE("moments of 8 bits are the same bytes on every device", "[moments]") {
  const int64_t n = 5 * kTileAlign + quant::kTileElements;
  std::vector<std::vector<uint8_t>> made[2];
  for (size_t device = 0; device < 2; ++device) {
    Backend& b = device == 0 ? oracle() : backend();
    engine::Rng rng(29);
    const Tensor w = b.zeros({n}, b.real()), m = b.zeros({quant::moment_bytes(n)}, DType::U8),
                 v = b.zeros({quant::moment_bytes(n)}, DType::U8);
    for (int t = 1; t <= 20; ++t) {
      std::vector<double> g = normal(rng, n, 1e-3);
      for (double& value : g) value = static_cast<float>(value);
      step(b, w, m, v, make(b, {n}, b.real(), g), t);
      for (const Tensor* moments : {&m, &v}) made[device].push_back(bytes_of(b, *moments));
    }
  }
  CHECK(made[0] == made[1]);
}

}  // namespace bbb::tests
