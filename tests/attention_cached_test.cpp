// attention_cached, in bf16 and quantized, against the F64 oracle.
#include <catch2/catch.hpp>
#include <limits>

#include "quant/e4m3.h"
#include "tests/op_test.h"

namespace bbb::tests {
namespace {

using engine::AttentionSpec;
using quant::KvFormat;

struct CachedCase {
  int64_t b, t, t_max, h, k, d, window;
  int start;  // of the first sequence
  KvFormat format = {};

  // A later sequence starts a few positions before.
  std::vector<int32_t> starts() const {
    std::vector<int32_t> starts;
    for (int i = 0; i < b; ++i) starts.push_back(std::max(0, start - 70 * i));
    return starts;
  }
};

// One query: the first position, the ends of tiles and splits, splits of one tile and of many, one
// to twenty query heads per kv head, windows that skip tiles, long contexts. Several queries:
// prompts at the start and in the middle, one and several tiles of queries and keys.
const CachedCase kCases[] = {
    {1, 1, 4, 1, 1, 64, 0, 0},          {2, 1, 300, 9, 3, 64, 0, 0},
    {1, 1, 300, 9, 3, 64, 0, 127},      {2, 1, 300, 4, 2, 96, 0, 128},
    {1, 1, 300, 4, 1, 128, 0, 299},     {1, 1, 700, 20, 1, 64, 0, 650},
    {1, 1, 700, 40, 2, 128, 0, 31},     {1, 1, 700, 32, 8, 128, 0, 33},
    {2, 1, 700, 4, 2, 64, 17, 640},     {1, 1, 700, 4, 2, 96, 128, 600},
    {1, 1, 1000, 9, 3, 64, 0, 999},     {1, 1, 2100, 2, 1, 64, 0, 2099},
    {8, 1, 4100, 16, 8, 64, 0, 4096},   {2, 1, 4100, 4, 2, 128, 1000, 4096},
    {1, 1, 32768, 2, 1, 32, 0, 32767},  {1, 2, 300, 9, 3, 64, 0, 31},
    {2, 33, 100, 4, 2, 64, 0, 0},       {1, 70, 300, 4, 2, 128, 0, 65},
    {1, 130, 300, 2, 1, 96, 17, 170},   {2, 200, 700, 4, 2, 64, 0, 300},
    {1, 300, 1300, 4, 2, 128, 0, 1000}, {1, 129, 1000, 2, 1, 128, 300, 700},
    {1, 2, 4100, 2, 1, 64, 0, 4090}};

struct Inputs {
  explicit Inputs(const CachedCase& c) {
    engine::Rng rng(19);
    q = activations(rng, c.b * c.t * c.h * c.d);
    if (c.format.quantized()) {
      k_bytes = random_cache(rng, c);
      v_bytes = random_cache(rng, c);
      return;
    }
    const int64_t cache = c.b * c.t_max * c.k * c.d;
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

  // Random codes, z about the middle, e such that values are about 1; NaN past the last position.
  static std::vector<uint8_t> random_cache(engine::Rng& rng, const CachedCase& c) {
    const auto below = [&](int n) { return static_cast<uint8_t>(rng.below(n)); };
    std::vector<uint8_t> bytes;
    for (const int32_t start : c.starts()) {
      for (int64_t i = 0; i < c.t_max * c.k * c.format.code_bytes(c.d); ++i)
        bytes.push_back(below(256));
      const int64_t pair_bytes = KvFormat::pair_bytes(c.d);
      for (int64_t i = 0; i < c.t_max * c.k * pair_bytes; i += 2) {
        const bool visible = i / (c.k * pair_bytes) < start + c.t;
        const bool padding = i % pair_bytes >= c.d / KvFormat::kGroup * 2;
        const int lowest_e = c.format.bits == 8 ? 0x08 : 0x20;  // 2^-6 and 2^-3
        const int middle = 1 << (c.format.bits - 1);
        bytes.push_back(!visible  ? quant::kE4m3Nan
                        : padding ? 0
                                  : static_cast<uint8_t>(lowest_e + below(8)));
        bytes.push_back(padding ? 0 : static_cast<uint8_t>(middle / 2 + below(middle)));
      }
    }
    return bytes;
  }

  Tensor cache(Backend& b, const CachedCase& c, const std::vector<double>& values,
               const std::vector<uint8_t>& bytes) const {
    if (!c.format.quantized()) return make(b, {c.b, c.t_max, c.k, c.d}, b.act(), values);
    return make_bytes(b, {c.b, c.t_max, c.k, c.format.head_bytes(c.d)}, bytes);
  }
  Tensor k_cache(Backend& b, const CachedCase& c) const { return cache(b, c, k, k_bytes); }
  Tensor v_cache(Backend& b, const CachedCase& c) const { return cache(b, c, v, v_bytes); }

  std::vector<double> q, k, v;
  std::vector<uint8_t> k_bytes, v_bytes;  // of a quantized cache
};

std::vector<double> run(Backend& b, const CachedCase& c, const Inputs& in) {
  const Shape queries = {c.b, c.t, c.h, c.d};
  const Guarded o(b, queries, b.act());
  b.attention_cached(o.tensor(), make(b, queries, b.act(), in.q), in.k_cache(b, c),
                     in.v_cache(b, c), make_ids(b, {c.b}, c.starts()), AttentionSpec{c.window},
                     c.format);
  CHECK(o.untouched());
  return values_of(b, o.tensor());
}

// The roundings of o and of p; sums in FP32. With several queries a GPU also rounds the keys and
// values of 8 bits.
double tolerance(const CachedCase& c) {
  const int roundings = c.t > 1 && c.format.bits == 8 ? 2 : 1;
  return roundings * act_epsilon() + 64 * real_epsilon();
}

}  // namespace

namespace {

void check_case(const CachedCase& c) {
  CAPTURE(c.b, c.t, c.t_max, c.h, c.k, c.d, c.window, c.start, c.format.bits);
  const Inputs in(c);
  const auto got = run(backend(), c, in);
  for (const double o : got) REQUIRE(std::isfinite(o));
  CHECK(relative_error(got, run(oracle_f64(), c, in)) <= tolerance(c));
  CHECK(got == run(backend(), c, in));
}

}  // namespace

TEST_CASE("attention_cached sees the keys up to its position", "[attention_cached]") {
  for (const int bits : {16, 8, 4})
    for (CachedCase c : kCases) {
      c.format.bits = bits;
      check_case(c);
    }
}

TEST_CASE("attention_cached with every kind of head size", "[attention_cached]") {
  for (const int bits : {16, 8, 4})
    for (const int64_t d : {8,   16,  32,  40,  48,  56,  64,  72,  80,  88, 96,
                            104, 112, 120, 128, 136, 160, 192, 200, 224, 256})
      for (CachedCase c : {CachedCase{1, 1, 72, 1, 1, d, 0, 0},
                           {2, 1, 300, 9, 3, d, 0, 127},
                           {1, 1, 300, 20, 1, d, 0, 299},
                           {1, 1, 300, 4, 2, d, 17, 190},
                           {1, 2, 40, 4, 2, d, 0, 31},
                           {2, 33, 100, 4, 2, d, 0, 31},
                           {1, 130, 300, 2, 1, d, 17, 170}}) {
        c.format.bits = bits;
        if (bits == 16 || d % KvFormat::kGroup == 0) check_case(c);
      }
}

TEST_CASE("a quantized cache that does not fit its format is refused", "[attention_cached]") {
  Backend& b = backend();
  const auto attend = [&](int64_t t_max, int64_t d, KvFormat format) {
    const Tensor x = b.zeros({1, 1, 2, d}, b.act());
    const Tensor cache = b.zeros({1, t_max, 2, format.head_bytes(d)}, DType::U8);
    b.attention_cached(x, x, cache, cache, make_ids(b, {1}, {0}), AttentionSpec{}, format);
  };
  CHECK_NOTHROW(attend(8, 64, {4}));
  CHECK_THROWS_WITH(attend(8, 40, {8}), Catch::Contains("multiples of 32, not 40"));
  CHECK_THROWS_WITH(attend(9, 64, {8}), Catch::Contains("9 positions, not a multiple of 4"));
  CHECK_THROWS_WITH(attend(8, 64, {2}), Catch::Contains("a cache of 2 bits"));
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
