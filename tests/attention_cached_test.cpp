// append_kv and attention_cached against the F64 oracle.
#include <array>
#include <catch2/catch.hpp>
#include <limits>

#include "tests/op_test.h"

namespace bbb::tests {
namespace {

using engine::AttentionSpec;

struct CachedCase {
  int64_t b, t, t_max, h, k, d, window;
  int start;  // of the first sequence

  // A later sequence starts a few positions before.
  std::vector<int32_t> starts() const {
    std::vector<int32_t> starts;
    for (int i = 0; i < b; ++i) starts.push_back(std::max(0, start - 70 * i));
    return starts;
  }
};

// One query: the first position, the end of a split of 128 keys and past it, one to twenty query
// heads per kv head, windows that skip splits. Several queries: prompts at the start and in the
// middle.
const CachedCase kCases[] = {{1, 1, 1, 1, 1, 64, 0, 0},       {2, 1, 300, 9, 3, 64, 0, 0},
                             {1, 1, 300, 9, 3, 64, 0, 127},   {2, 1, 300, 4, 2, 96, 0, 128},
                             {1, 1, 300, 4, 1, 128, 0, 299},  {1, 1, 700, 20, 1, 64, 0, 650},
                             {1, 1, 700, 40, 2, 128, 0, 31},  {2, 1, 700, 4, 2, 64, 17, 640},
                             {1, 1, 700, 4, 2, 96, 128, 600}, {1, 1, 2100, 2, 1, 64, 0, 2099},
                             {1, 2, 300, 9, 3, 64, 0, 31},    {2, 33, 100, 4, 2, 64, 0, 0},
                             {1, 70, 300, 4, 2, 128, 0, 65},  {1, 130, 300, 2, 1, 96, 17, 170}};

struct Inputs {
  explicit Inputs(const CachedCase& c) {
    engine::Rng rng(19);
    const int64_t cache = c.b * c.t_max * c.k * c.d;
    q = activations(rng, c.b * c.t * c.h * c.d);
    k = activations(rng, cache);
    v = activations(rng, cache);
    // Keys and values past the last position must not affect the result.
    const int64_t row = c.k * c.d;
    const std::vector<int32_t> starts = c.starts();
    for (int64_t i = 0; i < cache; ++i)
      if (i / row % c.t_max >= starts[static_cast<size_t>(i / row / c.t_max)] + c.t)
        k[static_cast<size_t>(i)] = v[static_cast<size_t>(i)] =
            std::numeric_limits<double>::quiet_NaN();
  }
  std::vector<double> q, k, v;
};

std::vector<double> run(Backend& b, const CachedCase& c, const Inputs& in) {
  const Shape queries = {c.b, c.t, c.h, c.d}, cache = {c.b, c.t_max, c.k, c.d};
  const Guarded o(b, queries, b.act());
  b.attention_cached(o.tensor(), make(b, queries, b.act(), in.q), make(b, cache, b.act(), in.k),
                     make(b, cache, b.act(), in.v), make_ids(b, {c.b}, c.starts()),
                     AttentionSpec{c.window});
  CHECK(o.untouched());
  return values_of(b, o.tensor());
}

// The roundings of o and of p; sums in FP32.
double tolerance() { return act_epsilon() + 64 * real_epsilon(); }

}  // namespace

namespace {

void check_case(const CachedCase& c) {
  CAPTURE(c.b, c.t, c.t_max, c.h, c.k, c.d, c.window, c.start);
  const Inputs in(c);
  const auto got = run(backend(), c, in);
  for (const double o : got) REQUIRE(std::isfinite(o));
  CHECK(relative_error(got, run(oracle_f64(), c, in)) <= tolerance());
  CHECK(got == run(backend(), c, in));
}

}  // namespace

TEST_CASE("attention_cached sees the keys up to its position", "[attention_cached]") {
  for (const CachedCase& c : kCases) check_case(c);
}

TEST_CASE("attention_cached with every kind of head size", "[attention_cached]") {
  for (const int64_t d : {8,   16,  32,  40,  48,  56,  64,  72,  80,  88, 96,
                          104, 112, 120, 128, 136, 160, 192, 200, 224, 256})
    for (const CachedCase& c : {CachedCase{1, 1, 70, 1, 1, d, 0, 0},
                                {2, 1, 300, 9, 3, d, 0, 127},
                                {1, 1, 300, 20, 1, d, 0, 299},
                                {1, 1, 300, 4, 2, d, 17, 190},
                                {1, 2, 40, 4, 2, d, 0, 31},
                                {2, 33, 100, 4, 2, d, 0, 31},
                                {1, 130, 300, 2, 1, d, 17, 170}})
      check_case(c);
}

TEST_CASE("append_kv rotates as rope does", "[attention_cached][rope]") {
  Backend& b = backend();
  engine::Rng rng(24);
  for (const int64_t d : {8, 40, 64, 96, 128, 200, 256})
    for (const auto& [batch, t, heads, kv_heads] : std::vector<std::array<int64_t, 4>>{
             {1, 1, 1, 1}, {1, 1, 32, 8}, {3, 1, 9, 3}, {2, 7, 4, 2}})
      for (const int begin : {0, 5, 1000}) {
        CAPTURE(d, batch, t, heads, kv_heads, begin);
        const int64_t t_max = begin + 20;
        const Shape cache = {batch, t_max, kv_heads, d}, keys = {batch, t, kv_heads, d},
                    queries = {batch, t, heads, d};
        std::vector<int32_t> starts;
        for (int i = 0; i < batch; ++i) starts.push_back(begin + 3 * i);
        const Tensor start = make_ids(b, {batch}, starts), inv_freq = frequencies(b, d);
        const auto k = activations(rng, batch * t * kv_heads * d);
        const auto v = activations(rng, batch * t * kv_heads * d);
        const auto q = activations(rng, batch * t * heads * d);
        const auto before = activations(rng, batch * t_max * kv_heads * d);
        const auto run = [&](bool together) {
          const Guarded k_cache(b, cache, b.act()), v_cache(b, cache, b.act());
          const Guarded rotated(b, queries, b.act());
          b.copy(k_cache.tensor(), make(b, cache, b.act(), before));
          b.copy(v_cache.tensor(), make(b, cache, b.act(), before));
          b.copy(rotated.tensor(), make(b, queries, b.act(), q));
          const Tensor new_k = make(b, keys, b.act(), k), new_v = make(b, keys, b.act(), v);
          if (together) {
            b.append_kv(k_cache.tensor(), v_cache.tensor(), new_k, new_v, start, rotated.tensor(),
                        inv_freq);
          } else {
            b.rope(rotated.tensor(), inv_freq, start, engine::Rotation::Forward);
            b.rope(new_k, inv_freq, start, engine::Rotation::Forward);
            b.append_kv(k_cache.tensor(), v_cache.tensor(), new_k, new_v, start);
          }
          CHECK((k_cache.untouched() && v_cache.untouched() && rotated.untouched()));
          return std::array{values_of(b, k_cache.tensor()), values_of(b, v_cache.tensor()),
                            values_of(b, rotated.tensor())};
        };
        const auto got = run(true), want = run(false);
        CHECK(got[1] == want[1]);
        // The two kernels may contract a product and a sum differently.
        const double bound = on_cuda() ? act_epsilon() / 16 : 0.0;
        CHECK(relative_error(got[0], want[0]) <= bound);
        CHECK(relative_error(got[2], want[2]) <= bound);
      }
}

TEST_CASE("append_kv writes its rows and no others", "[attention_cached]") {
  const int64_t d = GENERATE(8, 40, 64, 200, 256);
  const int64_t batch = 2, t_max = 20, heads = 3, row = heads * d;
  Backend& b = backend();
  engine::Rng rng(23);
  const Shape cache = {batch, t_max, heads, d};
  const Guarded k_cache(b, cache, b.act()), v_cache(b, cache, b.act());
  auto k_expected = activations(rng, batch * t_max * row);
  auto v_expected = activations(rng, batch * t_max * row);
  b.copy(k_cache.tensor(), make(b, cache, b.act(), k_expected));
  b.copy(v_cache.tensor(), make(b, cache, b.act(), v_expected));
  struct Append {
    std::vector<int32_t> starts;
    int64_t t;
  };
  for (const auto& [starts, t] : {Append{{0, 0}, 1}, {{1, 5}, 7}, {{8, 0}, 12}, {{3, 19}, 1}}) {
    CAPTURE(starts, t);
    const auto k = activations(rng, batch * t * row), v = activations(rng, batch * t * row);
    b.append_kv(k_cache.tensor(), v_cache.tensor(), make(b, {batch, t, heads, d}, b.act(), k),
                make(b, {batch, t, heads, d}, b.act(), v), make_ids(b, {batch}, starts));
    for (int64_t i = 0; i < batch * t * row; ++i) {
      const int64_t one = i / (t * row), start = starts[static_cast<size_t>(one)];
      const int64_t to = (one * t_max + start) * row + i % (t * row);
      k_expected[static_cast<size_t>(to)] = k[static_cast<size_t>(i)];
      v_expected[static_cast<size_t>(to)] = v[static_cast<size_t>(i)];
    }
    CHECK(values_of(b, k_cache.tensor()) == values_of(b, make(b, cache, b.act(), k_expected)));
    CHECK(values_of(b, v_cache.tensor()) == values_of(b, make(b, cache, b.act(), v_expected)));
  }
  CHECK(k_cache.untouched());
  CHECK(v_cache.untouched());
}

TEST_CASE("positions past a key-value cache throw, and none of its bytes change",
          "[attention_cached]") {
  const int64_t t_max = 20, heads = 3, d = 64;
  Backend& b = backend();
  engine::Rng rng(29);
  const Shape cache = {1, t_max, heads, d};
  const auto before = activations(rng, t_max * heads * d);
  const Guarded k_cache(b, cache, b.act()), v_cache(b, cache, b.act());
  b.copy(k_cache.tensor(), make(b, cache, b.act(), before));
  b.copy(v_cache.tensor(), make(b, cache, b.act(), before));
  for (const auto& [start, t] : {std::pair<int, int64_t>{20, 1}, {-1, 1}, {18, 3}, {20, 7}}) {
    CAPTURE(start, t);
    const Shape rows = {1, t, heads, d};
    const Tensor x = make(b, rows, b.act(), activations(rng, t * heads * d));
    const Tensor o = b.empty(rows, b.act()), at = make_ids(b, {1}, {start});
    const std::string says =
        cat("positions ", start, " to ", start + t - 1, " of a key-value cache of 20");
    const auto append = [&] {
      b.append_kv(k_cache.tensor(), v_cache.tensor(), x, x, at);
      b.synchronize();
    };
    CHECK_THROWS_WITH(append(), Catch::Contains(says));
    const auto attend = [&] {
      b.attention_cached(o, x, k_cache.tensor(), v_cache.tensor(), at, AttentionSpec{});
      b.synchronize();
    };
    CHECK_THROWS_WITH(attend(), Catch::Contains(says));
    CHECK_NOTHROW(b.synchronize());
  }
  const auto expected = values_of(b, make(b, cache, b.act(), before));
  CHECK(values_of(b, k_cache.tensor()) == expected);
  CHECK(values_of(b, v_cache.tensor()) == expected);
  CHECK(k_cache.untouched());
  CHECK(v_cache.untouched());
  // As in decoding: a replay runs past the end, and the host does not know its position.
  const Tensor x = make(b, {1, 1, heads, d}, b.act(), activations(rng, heads * d));
  const Tensor at = make_ids(b, {1}, {19});
  const auto next = b.record([&] {
    b.append_kv(k_cache.tensor(), v_cache.tensor(), x, x, at);
    b.advance(at);
  });
  const auto step = [&] {
    next->run();
    b.synchronize();
  };
  CHECK_NOTHROW(step());
  CHECK_THROWS_WITH(step(), Catch::Contains("positions 20 to 20"));

  // One sequence of several.
  for (const int64_t t : {1, 3}) {
    const Shape pair = {2, t, heads, d};
    const Tensor y = make(b, pair, b.act(), activations(rng, 2 * t * heads * d));
    const Tensor o = b.empty(pair, b.act()), starts = make_ids(b, {2}, {0, 21});
    const Tensor both = b.zeros({2, t_max, heads, d}, b.act());
    const auto attend = [&] {
      b.attention_cached(o, y, both, both, starts, AttentionSpec{});
      b.synchronize();
    };
    CHECK_THROWS_WITH(attend(), Catch::Contains(cat("positions 21 to ", 20 + t)));
    const auto append = [&] {
      b.append_kv(both, both, y, y, starts);
      b.synchronize();
    };
    CHECK_THROWS_WITH(append(), Catch::Contains(cat("positions 21 to ", 20 + t)));
  }
}

TEST_CASE("a recorded attention_cached reads start at every replay", "[attention_cached]") {
  CachedCase c{1, 1, 300, 9, 3, 64, 0, 299};
  const Inputs in(c);
  Backend& b = backend();
  const Shape queries = {c.b, c.t, c.h, c.d}, cache = {c.b, c.t_max, c.k, c.d};
  const Tensor q = make(b, queries, b.act(), in.q), start = make_ids(b, {1}, {0});
  const Tensor k = make(b, cache, b.act(), in.k), v = make(b, cache, b.act(), in.v);
  const Tensor o = b.empty(queries, b.act());
  const auto replay =
      b.record([&] { b.attention_cached(o, q, k, v, start, AttentionSpec{c.window}); });
  for (const int position : {0, 130, 40, 299}) {
    CAPTURE(position);
    b.upload(start, &position);
    replay->run();
    c.start = position;
    CHECK(values_of(b, o) == run(b, c, in));
  }
}

}  // namespace bbb::tests
