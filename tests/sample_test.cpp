// sample against its definition (engine/sampling.h), written out with a sort of the vocabulary, and
// against distributions and sets that are known.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <limits>
#include <numeric>
#include <set>

#include "engine/sampling.h"
#include "tests/op_test.h"
#include "tests/require_quiet.h"

namespace bbb::tests {
namespace {

using engine::SampleRows;
using engine::SampleSpec;
using Ids = std::vector<int32_t>;

struct Rows {
  int64_t m, v;
  std::vector<double> logits;           // (M, V), exact in float
  std::vector<uint64_t> seeds = {};     // (M)
  Ids positions = {};                   // (M)
  std::vector<std::set<int32_t>> seen;  // (M)
};

std::vector<uint8_t> bits_of(const Rows& in) {
  const int64_t bytes = (in.v + 7) / 8;
  std::vector<uint8_t> bits(static_cast<size_t>(in.m * bytes));
  for (int64_t row = 0; row < in.m; ++row)
    for (const int32_t id : in.seen[static_cast<size_t>(row)])
      bits[static_cast<size_t>(row * bytes + id / 8)] |= static_cast<uint8_t>(1 << id % 8);
  return bits;
}

Tensor seeds_of(Backend& b, const std::vector<uint64_t>& seeds) {
  Ids halves;
  for (const uint64_t seed : seeds) {
    halves.push_back(static_cast<int32_t>(seed));
    halves.push_back(static_cast<int32_t>(seed >> 32));
  }
  return make_ids(b, {static_cast<int64_t>(seeds.size()), 2}, halves);
}

Ids ids_of(Backend& b, const Tensor& ids) {
  const std::vector<double> values = values_of(b, ids);
  return {values.begin(), values.end()};
}

// The chosen tokens; checks the seen ones afterwards.
Ids run(Backend& b, const Rows& in, const SampleSpec& spec) {
  const Guarded ids(b, {in.m}, DType::I32);
  SampleRows rows;
  if (!in.seeds.empty()) rows.seeds = seeds_of(b, in.seeds);
  if (!in.positions.empty()) rows.positions = make_ids(b, {in.m}, in.positions);
  if (!in.seen.empty()) rows.seen = make_bytes(b, {in.m, (in.v + 7) / 8}, bits_of(in));
  b.sample(ids.tensor(), make(b, {in.m, in.v}, b.real(), in.logits), rows, spec);
  const Ids chosen = ids_of(b, ids.tensor());  // on a GPU, a bad logit throws here
  CHECK(ids.untouched());
  if (!in.seen.empty()) {
    Rows after = in;
    for (size_t row = 0; row < chosen.size(); ++row) after.seen[row].insert(chosen[row]);
    CHECK(bytes_of(b, rows.seen) == bits_of(after));
  }
  return chosen;
}

// The definition, for F32 logits.
int32_t expected(const Rows& in, size_t row, const SampleSpec& spec) {
  const size_t v = static_cast<size_t>(in.v);
  std::vector<float> x(v), e(v);
  for (size_t i = 0; i < v; ++i) {
    x[i] = static_cast<float>(in.logits[row * v + i]);
    const float penalty = static_cast<float>(spec.repetition_penalty);
    if (!in.seen.empty() && in.seen[row].contains(static_cast<int32_t>(i)))
      x[i] = x[i] > 0 ? x[i] / penalty : x[i] * penalty;
  }
  const auto most = std::max_element(x.begin(), x.end());
  if (spec.temperature == 0) return static_cast<int32_t>(most - x.begin());
  for (size_t i = 0; i < v; ++i)
    e[i] = engine::relative_probability(x[i] - *most, static_cast<float>(spec.temperature));
  std::vector<size_t> order(v);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return e[a] > e[b]; });
  uint64_t total = 0;
  for (const float one : e) total += engine::sample_weight(one);
  const uint64_t target = engine::sample_target(spec.top_p, total);
  std::vector<bool> nucleus(v);
  uint64_t sum = 0;
  for (size_t i = 0; sum < target; ++i) {
    nucleus[order[i]] = true;
    sum += engine::sample_weight(e[order[i]]);
  }
  uint64_t draw = engine::scaled_random(engine::random_bits(in.seeds[row], in.positions[row]), sum);
  for (size_t i = 0;; ++i) {
    if (!nucleus[i]) continue;
    const uint64_t weight = engine::sample_weight(e[i]);
    if (weight > draw) return static_cast<int32_t>(i);
    draw -= weight;
  }
}

// `count` draws from one row.
Rows draws_from(const std::vector<double>& logits, int64_t count) {
  Rows in{count, static_cast<int64_t>(logits.size()), {}, {}, {}, {}};
  for (int64_t i = 0; i < count; ++i) {
    in.logits.insert(in.logits.end(), logits.begin(), logits.end());
    in.seeds.push_back(static_cast<uint64_t>(i / 100));
    in.positions.push_back(static_cast<int32_t>(i % 100));
  }
  return in;
}

std::set<int32_t> set_of(const std::vector<double>& logits, double top_p, int64_t count) {
  const Ids ids = run(backend(), draws_from(logits, count), {.temperature = 1, .top_p = top_p});
  return {ids.begin(), ids.end()};
}

}  // namespace

TEST_CASE("sample: temperature 0 takes the largest logit, and of equal ones the lower id",
          "[sample]") {
  const double low = -3e38;
  CHECK(run(backend(), {3, 4, {1, 3, -2, 3, low, low, low, low, -5, -4, -0.0, 0}, {}, {}, {}},
            {}) == Ids{1, 0, 2});
  // The first and the last token, and ties across blocks of any size.
  for (const int64_t v : {1, 31, 1024, 4096, 4097, 49152, 151936}) {
    CAPTURE(v);
    engine::Rng rng(3);
    Rows in{3, v, normal(rng, 3 * v), {}, {}, {}};
    for (double& x : in.logits) x = static_cast<float>(x);
    in.logits[0] = in.logits[static_cast<size_t>(v - 1)] = 50;
    in.logits[static_cast<size_t>(2 * v - 1)] = 50;
    Ids best{0, static_cast<int32_t>(v - 1), 0};
    best[2] = expected(in, 2, {});
    CHECK(run(backend(), in, {}) == best);
  }
}

TEST_CASE("sample: the tokens of its definition, for every size and kind of row", "[sample]") {
  for (const int64_t v : {1, 2, 31, 257, 4096, 4097, 12000, 49152, 151936})
    for (const double temperature : {0.3, 1.0, 20.0})
      for (const double top_p : {0.0, 0.1, 0.9, 0.999, 1.0})
        for (const double penalty : {1.0, 1.3}) {
          CAPTURE(v, temperature, top_p, penalty);
          const SampleSpec spec{temperature, top_p, penalty};
          engine::Rng rng(static_cast<uint64_t>(v));
          // Smooth, with many ties, all equal, far apart.
          Rows in{4, v, normal(rng, 4 * v, 3), {1, 2, uint64_t{1} << 63, 4}, {}, {}};
          const auto row = [&](int64_t i) { return in.logits.begin() + i * v; };
          for (auto x = row(1); x != row(2); ++x) *x = std::round(*x);
          std::fill(row(2), row(3), -1.5);
          for (auto x = row(3); x != row(4); ++x) *x *= 100;
          for (double& x : in.logits) x = static_cast<float>(x);
          if (penalty != 1) {
            in.seen.resize(4);
            for (auto& seen : in.seen)
              for (int i = 0; i < 20; ++i) seen.insert(static_cast<int32_t>(rng.below(v)));
          }
          for (const int32_t position : v > 20000 ? Ids{77777} : Ids{0, 1, 2, 3}) {
            in.positions = {position, position, position, position};
            const Ids got = run(backend(), in, spec);
            for (size_t i = 0; i < 4; ++i) REQUIRE_QUIET(got[i] == expected(in, i, spec));
          }
        }
}

TEST_CASE("sample: draws follow the softmax", "[sample]") {
  const std::vector<double> logits{0, 1, -1, 2, 0.5, -3, 2, 0.25};
  const int64_t count = 20000;
  for (const double temperature : {1.0, 0.5, 3.0}) {
    CAPTURE(temperature);
    const Ids ids = run(backend(), draws_from(logits, count), {.temperature = temperature});
    double total = 0, chi_squared = 0;
    for (const double x : logits) total += std::exp(x / temperature);
    for (size_t i = 0; i < logits.size(); ++i) {
      const double mean = count * std::exp(logits[i] / temperature) / total;
      const double drawn = static_cast<double>(std::ranges::count(ids, static_cast<int32_t>(i)));
      chi_squared += (drawn - mean) * (drawn - mean) / mean;
    }
    CHECK(chi_squared < 24.3);  // 7 degrees of freedom: exceeded once in a thousand
    CHECK(chi_squared > 0.6);   // fewer once in a thousand
  }
}

TEST_CASE("sample: top-p keeps the fewest most likely tokens that reach it", "[sample]") {
  // Probabilities 1/16, 1/2, 1/16, 1/4, 1/8.
  std::vector<double> logits;
  for (const double p : {1.0, 8.0, 1.0, 4.0, 2.0})
    logits.push_back(static_cast<float>(std::log(p)));
  const std::vector<std::pair<double, std::set<int32_t>>> cases = {
      {0, {1}},         {0.4, {1}},          {0.6, {1, 3}},           {0.74, {1, 3}},
      {0.8, {1, 3, 4}}, {0.9, {0, 1, 3, 4}}, {0.95, {0, 1, 2, 3, 4}}, {1, {0, 1, 2, 3, 4}}};
  for (const auto& [top_p, tokens] : cases) {
    CAPTURE(top_p);
    CHECK(set_of(logits, top_p, 1000) == tokens);
  }
  // Of equal ones the lower ids, and exactly as many as reach it.
  const std::set<int32_t> half = set_of(std::vector<double>(64, 7), 0.5, 2000);
  CHECK(half.size() == 32);
  CHECK(*half.rbegin() == 31);
  CHECK(set_of(std::vector<double>(64, 7), 0.501, 2000).size() == 33);
}

TEST_CASE("sample: a token that has occurred has its logit divided, or multiplied below 0",
          "[sample]") {
  const SampleSpec spec{.repetition_penalty = 1.25};
  std::vector<double> logits{2, 1.5, -0.5, 1.75, -4};
  Rows in{1, 5, logits, {}, {}, {{}}};
  // 2, then 1.75 over 1.6, then 1.6 over 1.5: token 0 stays ahead of the rest.
  CHECK(run(backend(), in, spec) == Ids{0});
  in.seen = {{0}};
  CHECK(run(backend(), in, spec) == Ids{3});
  in.seen = {{0, 3}};
  CHECK(run(backend(), in, spec) == Ids{0});
  in.logits = {-1, -1.2, -1.3, -3, -4};
  CHECK(run(backend(), in, spec) == Ids{1});
  in.seen = {{0, 1}};
  CHECK(run(backend(), in, spec) == Ids{0});  // -1.25, -1.5, -1.3
}

TEST_CASE("sample: a recorded step draws anew at every position and logs its tokens", "[sample]") {
  Backend& b = backend();
  const int64_t m = 3, v = 500, log_rows = 4, steps = 6;
  engine::Rng rng(5);
  Rows in{m, v, normal(rng, m * v), {9, 9, 10}, {4, 4, 4}, {{}, {}, {}}};
  for (double& x : in.logits) x = static_cast<float>(x);
  const SampleSpec spec{1, 0.95, 1.1};
  const Tensor logits = make(b, {m, v}, b.real(), in.logits), ids = b.zeros({m}, DType::I32);
  const Tensor counters = make_ids(b, {m + 1}, {4, 4, 4, 0});
  const Guarded log(b, {log_rows, m}, DType::I32);
  SampleRows rows;
  rows.seeds = seeds_of(b, in.seeds);
  rows.positions = counters.rows(0, m);
  rows.cursor = counters.rows(m, 1);
  rows.seen = b.zeros({m, (v + 7) / 8}, DType::U8);
  rows.log = log.tensor();
  const auto step = b.record([&] {
    b.sample(ids, logits, rows, spec);
    b.advance(counters);
  });
  for (int64_t s = 0; s < steps; ++s) {
    step->run();
    Ids chosen;
    for (size_t i = 0; i < static_cast<size_t>(m); ++i) {
      chosen.push_back(expected(in, i, spec));
      in.seen[i].insert(chosen[i]);
      ++in.positions[i];
    }
    CHECK(ids_of(b, ids) == chosen);
    CHECK(ids_of(b, log.tensor().rows(s % log_rows, 1)) == chosen);
  }
  CHECK(log.untouched());
  CHECK(bytes_of(b, rows.seen) == bits_of(in));
}

TEST_CASE("sample: a NaN or infinite logit is an error", "[sample]") {
  Backend& b = backend();
  const int64_t v = 9000;
  for (const double temperature : {0.0, 1.0})
    for (const double bad : {double(NAN), double(INFINITY), -double(INFINITY)})
      for (const int64_t at : {int64_t{0}, int64_t{1}, v - 1}) {
        CAPTURE(temperature, bad, at);
        Rows in{2, v, std::vector<double>(static_cast<size_t>(2 * v), 1.0), {1, 2}, {0, 0}, {}};
        in.logits[static_cast<size_t>(v + at)] = bad;
        if (at == 1) in.logits[static_cast<size_t>(v + 100)] = bad;  // the first one is named
        const SampleSpec spec{.temperature = temperature, .top_p = 0.9};
        CHECK_THROWS_WITH(run(b, in, spec),
                          Catch::Contains(cat("the logit of token ", at, " is ")));
        CHECK_NOTHROW(b.synchronize());
      }
}

}  // namespace bbb::tests
