// How weights start a stage: rounding-aware splitting, and the weighted search of ranges.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <memory>
#include <vector>

#include "engine/rng.h"
#include "quant/host.h"
#include "tests/require_quiet.h"

namespace bbb::tests {
namespace {

namespace host = quant::host;
using engine::Rng;
using quant::ChannelOrder;
using quant::LinearFormat;
using quant::RangeRule;
using quant::SplitSide;

// N rows of K channels, `splits` of them split, drawn at random.
struct Linear {
  LinearFormat format;
  ChannelOrder order;
  std::vector<float> halves, start;  // (N, K')
  std::vector<uint8_t> ratios;
  float master_scale = 0, max_range = 0;

  Linear(Rng& rng, int64_t n, int64_t k, quant::WeightGrid grid, int64_t splits,
         SplitSide side = SplitSide::Weight)
      : format{.n = n, .k = k, .weight = grid, .input = {}, .order = nullptr},
        order(k, grid.group, {}, drawn(rng, k, splits), side) {
    format.order = std::make_shared<ChannelOrder>(order);
  }

  void gather(const std::vector<float>& plain) {
    const size_t size = static_cast<size_t>(format.n * format.stored_k());
    halves.resize(size);
    start.resize(size);
    ratios.resize(size / static_cast<size_t>(format.weight.group));
    host::gather_weight(halves.data(), plain.data(), rows(), format, order);
    master_scale = quant::master_scale_of(
        quant::raw_scale(host::group_range_max(halves.data(), nullptr, rows(), format.stored_k(),
                                               format.weight.group),
                         format.code_bits()));
  }
  void run(const host::StageStart& how) {
    max_range = host::start_rows(start.data(), ratios.data(), halves.data(), rows(), format, order,
                                 master_scale, how);
  }
  host::Rows rows() const { return {0, format.n}; }
  int64_t groups() const { return format.n * format.groups(); }

 private:
  static std::vector<int32_t> drawn(Rng& rng, int64_t k, int64_t splits) {
    std::vector<int32_t> channels = rng.permutation(k);
    channels.resize(static_cast<size_t>(splits));
    std::sort(channels.begin(), channels.end());
    return channels;
  }
};

std::vector<float> normals(Rng& rng, int64_t count, double scale) {
  std::vector<float> w(static_cast<size_t>(count));
  for (float& v : w) v = static_cast<float>(scale * rng.normal());
  return w;
}

quant::Range<float> range_of(const float* x, int group) {
  quant::Range<float> range;
  for (int i = 0; i < group; ++i) range.include(x[i]);
  return range;
}

// Of the pairs, 0.2 to 1.8 % clip: those at the ends of their group's range.
constexpr double kMostClipped = 0.02;

// In the order of a binary tree.
float tree_sum(const std::vector<float>& terms, size_t begin, size_t count) {
  if (count == 1) return terms[begin];
  return tree_sum(terms, begin, count / 2) + tree_sum(terms, begin + count / 2, count / 2);
}

}  // namespace

TEST_CASE("stage start: a split pair sums to the quantized weight, ties included",
          "[stage_start]") {
  // w = (k + 1/2) s, and the floats next to it, with s held: for every scale code and some S.
  for (const float master : {0x1p-30f, 0x1p-9f, 1.0f})
    for (int code = 1; code <= 0x7E; ++code) {
      const float s = quant::step_of(static_cast<uint8_t>(code), master);
      for (int k = -9; k <= 9; ++k) {
        const float w = (static_cast<float>(k) + 0.5f) * s;
        const auto steps = [&](float x) { return quant::unclamped_code(x, s, 0); };
        CAPTURE(master, code, k);
        REQUIRE(steps(w / 2 - s / 4) + steps(w / 2 + s / 4) == steps(w));
        REQUIRE(steps(w) == static_cast<float>(k + 1));
      }
    }
}

TEST_CASE("stage start: a million random weights split without changing what they quantize to",
          "[stage_start]") {
  Rng rng(101);
  int64_t checked = 0, near_ties = 0;
  for (const int bits : {2, 3, 4})
    for (const int group : {32, 64, 128}) {
      CAPTURE(bits, group);
      const int64_t k = 512, n = 440, splits = k * 3 / 4;
      int64_t clipped = 0;
      Linear linear(rng, n, k, {bits, group}, splits);
      std::vector<float> plain = normals(rng, n * k, 0.02);
      // Ties of one step, among weights that are exact multiples of it.
      for (int64_t i = 0; i < n * k; i += 16)
        plain[static_cast<size_t>(i)] = (static_cast<float>(rng.below(4)) - 1.5f) * 0x1p-7f;
      linear.gather(plain);
      linear.run({});
      for (int64_t g = 0; g < linear.groups(); ++g) {
        const float* w = linear.start.data() + g * group;
        const float* halves = linear.halves.data() + g * group;
        const quant::GroupParams p =
            quant::group_params(range_of(w, group), linear.master_scale, bits);
        const float s = quant::step_of(p.e, linear.master_scale);
        const int64_t first = g % linear.format.groups() * group;
        for (int i = 0; i < group; i += 2) {
          const int64_t position = first + i;
          if (position >= linear.order.pairs_end()) {
            REQUIRE_QUIET(w[i] == halves[i]);
            continue;
          }
          // The offsets belong to the step that stands.
          REQUIRE_QUIET(w[i] == halves[i] - s * 0.25f);
          REQUIRE_QUIET(w[i + 1] == halves[i + 1] + s * 0.25f);
          const float a = quant::unclamped_code(w[i], s, p.z);
          const float b = quant::unclamped_code(w[i + 1], s, p.z);
          const float weight = 2 * halves[i];
          if (quant::is_clipped(a, bits) || quant::is_clipped(b, bits)) {
            ++clipped;
            continue;
          }
          const double exact = static_cast<double>(weight) / s + 0.5;
          const double below = std::ceil(exact) - exact;  // of the next tie
          if (below > 0 && below < 1e-6) {
            ++near_ties;
            continue;
          }
          ++checked;
          CAPTURE(g, i, weight, s, w[i], w[i + 1]);
          REQUIRE_QUIET(a + b - 2.0f * static_cast<float>(p.z) == quant::round_half_up(weight / s));
        }
      }
      const double share = static_cast<double>(clipped) / static_cast<double>(n * splits);
      CAPTURE(share);
      CHECK(share < kMostClipped);
    }
  CAPTURE(checked, near_ties);
  CHECK(checked >= 1000000);
  CHECK(near_ties < 100);
}

TEST_CASE(
    "stage start: a million ties of each group's own step split without changing what they "
    "quantize to",
    "[stage_start]") {
  Rng rng(104);
  int64_t checked = 0;
  for (const int bits : {2, 3, 4})
    for (const int group : {32, 64, 128}) {
      CAPTURE(bits, group);
      const int64_t k = 512, n = 280;
      int64_t clipped = 0, ties = 0, moved = 0;  // moved: groups whose step changed
      Linear linear(rng, n, k, {bits, group}, k);
      linear.gather(normals(rng, n * k, 0.02));
      linear.run({});
      // A group keeps the pairs of its lowest and highest weight: they decide its step. The others
      // become (j + 1/2) s, whose halves j s / 2 and (j + 1) s / 2 are within its range.
      const auto params = [&](int64_t g) {
        return quant::group_params(range_of(linear.start.data() + g * group, group),
                                   linear.master_scale, bits);
      };
      std::vector<uint8_t> steps;
      for (int64_t g = 0; g < linear.groups(); ++g) {
        const float* w = linear.start.data() + g * group;
        float* halves = linear.halves.data() + g * group;
        const quant::Range<float> range = range_of(w, group);
        steps.push_back(params(g).e);
        const float s = quant::step_of(steps.back(), linear.master_scale);
        const auto least = static_cast<int64_t>(std::ceil(2 * range.mn / s)),
                   most = static_cast<int64_t>(std::floor(2 * range.mx / s)) - 1;
        REQUIRE_QUIET(least <= most);
        for (int i = 0; i < group; i += 2) {
          if (w[i] == range.mn || w[i + 1] == range.mx) continue;
          const int64_t j =
              least + static_cast<int64_t>(rng.below(static_cast<uint64_t>(most - least + 1)));
          halves[i] = halves[i + 1] = (static_cast<float>(j) + 0.5f) * s / 2;
        }
      }
      linear.run({});  // S is held
      for (int64_t g = 0; g < linear.groups(); ++g) {
        const float* w = linear.start.data() + g * group;
        const float* halves = linear.halves.data() + g * group;
        const quant::GroupParams p = params(g);
        if (p.e != steps[static_cast<size_t>(g)]) {
          ++moved;
          continue;
        }
        const float s = quant::step_of(p.e, linear.master_scale);
        for (int i = 0; i < group; i += 2) {
          const float weight = 2 * halves[i], j = weight / s - 0.5f;
          if (j != std::floor(j)) continue;  // it decides the range
          ++ties;
          const float a = quant::unclamped_code(w[i], s, p.z);
          const float b = quant::unclamped_code(w[i + 1], s, p.z);
          if (quant::is_clipped(a, bits) || quant::is_clipped(b, bits)) {
            ++clipped;
            continue;
          }
          ++checked;
          CAPTURE(g, i, weight, s, w[i], w[i + 1]);
          REQUIRE_QUIET(a + b - 2.0f * static_cast<float>(p.z) == j + 1);
        }
      }
      CHECK(moved < linear.groups() / 100);
      const double share = static_cast<double>(clipped) / static_cast<double>(ties);
      CAPTURE(share);
      CHECK(share < kMostClipped);
    }
  CAPTURE(checked);
  CHECK(checked >= 1000000);
}

TEST_CASE("stage start: at fewer bits a nested pair sums to within half a step of the weight",
          "[stage_start]") {
  Rng rng(105);
  constexpr int kBits = quant::kNestedBits;
  for (const int lowest : {2, 3, 4})
    for (const int group : {32, 128}) {
      CAPTURE(lowest, group);
      const int64_t n = 200, k = 512;
      Linear linear(rng, n, k, {.bits = kBits, .group = group, .nested = true}, k);
      linear.gather(normals(rng, n * k, 0.02));
      linear.run({.lowest_bits = lowest});
      int64_t clipped = 0;
      double worst = 0;  // in steps
      for (int64_t g = 0; g < linear.groups(); ++g) {
        const float* w = linear.start.data() + g * group;
        const quant::GroupParams p =
            quant::group_params(range_of(w, group), linear.master_scale, kBits);
        const double s = quant::step_of(p.e, linear.master_scale);
        for (int i = 0; i < group; i += 2) {
          double sum = 0;  // of the pair's levels, in steps of 8 bits
          bool clips = false;
          for (const float copy : {w[i], w[i + 1]}) {
            const float code = quant::unclamped_code(copy, static_cast<float>(s), p.z);
            clips = clips || quant::is_clipped(code, kBits);
            const int q = static_cast<int>(quant::clamp_code(code, 255.0f));
            sum += quant::nested_level_doubled(q >> (kBits - lowest), p.z, lowest,
                                               quant::NestedDequant::Middle) /
                   2.0;
          }
          if (clips) {
            ++clipped;
            continue;
          }
          const double weight = 2.0 * linear.halves[static_cast<size_t>(g * group + i)];
          worst = std::max(worst, std::abs(sum - weight / s) / (1 << (kBits - lowest)));
        }
      }
      CAPTURE(worst, clipped);
      CHECK(worst <= 0.5 + 1e-4);  // weights are floats
      CHECK(worst > 0.4);
      CHECK(clipped < n * k / 100);
    }
}

TEST_CASE("stage start: splitting quarters the error of naive halves", "[stage_start]") {
  Rng rng(102);
  {  // of weights spread evenly over two steps on either side, with s held
    const float s = 0x1.8p-6f;
    double aware = 0, naive = 0;
    for (int i = 0; i < 100000; ++i) {
      const auto w = static_cast<float>(2 * s * (2 * rng.uniform() - 1));
      const auto level = [&](float x) { return double{quant::unclamped_code(x, s, 0)} * s; };
      const double split = level(w / 2 - s / 4) + level(w / 2 + s / 4) - w;
      const double halved = 2 * level(w / 2) - w;
      aware += split * split, naive += halved * halved;
    }
    CHECK(aware / naive == Approx(0.25).margin(0.02));
  }
  // Through start_rows. At 2 bits a group has too few steps for errors to be uniform.
  for (const int bits : {4, 8}) {
    const int group = 32;
    Linear linear(rng, 400, 512, {bits, group}, 512);
    std::vector<float> plain(400 * 512);
    for (float& v : plain) v = static_cast<float>(0.02 * (2 * rng.uniform() - 1));
    linear.gather(plain);
    linear.run({});
    double aware = 0, naive = 0;
    for (int64_t g = 0; g < linear.groups(); ++g) {
      const float* w = linear.start.data() + g * group;
      const float* halves = linear.halves.data() + g * group;
      const quant::GroupParams p =
          quant::group_params(range_of(w, group), linear.master_scale, bits);
      const float s = quant::step_of(p.e, linear.master_scale);
      for (int i = 0; i < group; i += 2) {
        const float codes[] = {quant::unclamped_code(w[i], s, p.z),
                               quant::unclamped_code(w[i + 1], s, p.z),
                               quant::unclamped_code(halves[i], s, p.z)};
        if (std::any_of(std::begin(codes), std::end(codes),
                        [&](float code) { return quant::is_clipped(code, bits); }))
          continue;
        const double z = p.z, weight = 2.0 * halves[i];
        const double split = (codes[0] - z + codes[1] - z) * s - weight;
        const double halved = 2 * (codes[2] - z) * s - weight;
        aware += split * split, naive += halved * halved;
      }
    }
    CAPTURE(bits, aware, naive);
    CHECK(aware / naive == Approx(0.25).margin(0.02));
  }
}

TEST_CASE("stage start: the range search equals trying every ratio", "[stage_start]") {
  Rng rng(103);
  for (const int bits : {2, 3, 4, 8})
    for (const int group : {32, 64, 128})
      for (const SplitSide side : {SplitSide::Weight, SplitSide::Activation}) {
        CAPTURE(bits, group, side == SplitSide::Activation);
        const int64_t n = 24, k = 512;
        Linear linear(rng, n, k, {bits, group}, 51, side);
        linear.gather(normals(rng, n * k, 0.02));
        const int64_t columns = linear.format.stored_k();
        std::vector<float> energy = normals(rng, columns, 1.0);
        for (float& e : energy) e = std::exp(2 * e);
        linear.run({.range = RangeRule::Search, .energy = energy.data()});

        const float master = linear.master_scale;
        int below_one = 0;
        float most = 0;
        for (int64_t g = 0; g < linear.groups(); ++g) {
          const int64_t first = g % linear.format.groups() * group;
          const std::vector<float> halves(linear.halves.begin() + g * group,
                                          linear.halves.begin() + (g + 1) * group);
          const auto is_pair = [&](size_t i) {
            return side == SplitSide::Weight &&
                   first + static_cast<int64_t>(i) < linear.order.pairs_end();
          };
          std::vector<float> best;
          int best_ratio = 0;
          float least = 0;
          for (int c = 0; c < (bits == 8 ? 1 : quant::kRangeRatios); ++c) {
            const float ratio = quant::range_ratio<float>(c);
            std::vector<float> w = halves;
            const auto params = [&] {
              const quant::Range<float> range = range_of(w.data(), group);
              return quant::group_params(quant::Range<float>{ratio * range.mn, ratio * range.mx},
                                         master, bits);
            };
            quant::GroupParams p = params();
            for (int e = -1; e != p.e;) {  // the fixed point
              e = p.e;
              const float offset = quant::step_of(p.e, master) / 4;
              for (size_t i = 0; i < w.size() && is_pair(i); i += 2) {
                w[i] = halves[i] - offset;
                w[i + 1] = halves[i + 1] + offset;
              }
              p = params();
            }
            const float step = quant::step_of(p.e, master);
            const auto level = [&](size_t i) {
              return (quant::code_of(w[i], step, p.z, bits) - static_cast<float>(p.z)) * step;
            };
            std::vector<float> terms;
            for (size_t i = 0; i < w.size(); ++i) {
              const float weight = energy[static_cast<size_t>(first) + i];
              if (is_pair(i)) {
                const float d = level(i) + level(i + 1) - 2.0f * halves[i];
                terms.insert(terms.end(), {d * d * weight, 0.0f});
                ++i;
              } else {
                const float d = level(i) - w[i];
                terms.push_back(d * d * weight);
              }
            }
            const float error = tree_sum(terms, 0, terms.size());
            if (c == 0 || error < least) least = error, best = w, best_ratio = c;
          }
          CAPTURE(g, best_ratio, least);
          REQUIRE(best_ratio == linear.ratios[static_cast<size_t>(g)]);
          REQUIRE(std::equal(best.begin(), best.end(), linear.start.begin() + g * group));
          below_one += best_ratio > 0;
          const quant::Range<float> range = range_of(best.data(), group);
          const float ratio = quant::range_ratio<float>(best_ratio);
          most = std::max(most, ratio * range.mx - ratio * range.mn);
        }
        CHECK(linear.max_range == most);
        CHECK(linear.max_range == host::group_range_max(linear.start.data(), linear.ratios.data(),
                                                        linear.rows(), columns, group));
        if (bits == 2) CHECK(below_one > linear.groups() / 4);
        if (bits == 8) CHECK(below_one == 0);
      }
}

}  // namespace bbb::tests
