// attention_step: what append_kv and attention_cached do, for one position a sequence.
#include <catch2/catch.hpp>
#include <limits>

#include "tests/op_test.h"

namespace bbb::tests {
namespace {

using engine::AttentionSpec;
using quant::KvFormat;

struct StepCase {
  int64_t b, t_max, h, k, d, window;
  int start;  // of the first sequence; a later one is 70 positions before
  KvFormat format = {};

  std::vector<int32_t> starts() const {
    std::vector<int32_t> starts;
    for (int i = 0; i < b; ++i) starts.push_back(std::max(0, start - 70 * i));
    return starts;
  }
};

// The first position, both ends of a tile, a tile for each warp of a cluster and one more, several
// rounds of the copies, windows that skip tiles, one to twenty query heads per kv-head, so many
// heads that clusters are small, and head sizes of every path.
const StepCase kCases[] = {{1, 4, 1, 1, 64, 0, 0},         {2, 304, 9, 3, 64, 0, 15},
                           {2, 304, 9, 3, 64, 0, 16},      {1, 304, 4, 2, 96, 0, 127},
                           {1, 704, 4, 1, 128, 0, 299},    {1, 800, 20, 1, 64, 0, 767},
                           {1, 800, 32, 8, 128, 0, 768},   {1, 704, 40, 2, 128, 0, 31},
                           {2, 704, 4, 2, 64, 17, 640},    {1, 704, 4, 2, 96, 128, 600},
                           {1, 1100, 32, 8, 128, 0, 1087}, {1, 1100, 16, 16, 128, 0, 1024},
                           {8, 4100, 16, 8, 64, 0, 4099},  {2, 4100, 4, 2, 128, 1000, 4096},
                           {1, 32768, 2, 1, 32, 0, 32767}, {1, 32768, 4, 1, 64, 0, 32767},
                           {3, 304, 4, 2, 80, 0, 200},     {40, 40, 32, 8, 64, 0, 39},
                           {1, 40, 32, 8, 128, 0, 0},      {1, 40, 32, 32, 128, 0, 1},
                           {1, 40, 9, 3, 96, 0, 15},       {1, 40, 8, 1, 128, 0, 16},
                           {1, 40, 7, 1, 128, 0, 17},      {1, 1032, 32, 32, 128, 0, 1023},
                           {1, 704, 18, 2, 128, 17, 640}};

struct Result {
  std::vector<double> o;
  std::vector<uint8_t> k_cache, v_cache;  // as stored
};

// Before the step, the caches hold random rows up to `start`, and NaN from there on: the step may
// read none of those.
Result run(Backend& b, const StepCase& c, bool together) {
  engine::Rng rng(19);
  const Shape queries = {c.b, 1, c.h, c.d}, keys = {c.b, 1, c.k, c.d};
  const bool quantized = c.format.quantized();
  const Shape cache = {c.b, c.t_max, c.k, quantized ? c.format.head_bytes(c.d) : c.d};
  const DType dtype = quantized ? DType::U8 : b.act();
  const Guarded k_cache(b, cache, dtype), v_cache(b, cache, dtype), o(b, queries, b.act());
  const auto starts = c.starts();
  for (const Tensor& of : {k_cache.tensor(), v_cache.tensor()})
    if (quantized) {
      // Filled by the op that is tested elsewhere.
      b.zero(of);
      const int64_t rows = *std::ranges::max_element(starts);
      const Tensor x =
          make(b, {c.b, rows, c.k, c.d}, b.act(), activations(rng, c.b * rows * c.k * c.d));
      if (rows > 0)
        b.append_kv(of, b.zeros(cache, dtype), x, x,
                    make_ids(b, {c.b}, std::vector<int32_t>(starts.size(), 0)), {}, {}, c.format);
    } else {
      auto values = activations(rng, c.b * c.t_max * c.k * c.d);
      const int64_t row = c.k * c.d;
      for (int64_t i = 0; i < c.b * c.t_max * row; ++i)
        if (i / row % c.t_max >= starts[static_cast<size_t>(i / row / c.t_max)])
          values[static_cast<size_t>(i)] = std::numeric_limits<double>::quiet_NaN();
      b.copy(of, make(b, cache, dtype, values));
    }
  const Tensor q = make(b, queries, b.act(), activations(rng, c.b * c.h * c.d));
  const Tensor k = make(b, keys, b.act(), activations(rng, c.b * c.k * c.d));
  const Tensor v = make(b, keys, b.act(), activations(rng, c.b * c.k * c.d));
  const Tensor start = make_ids(b, {c.b}, starts), inv_freq = frequencies(b, c.d);
  const AttentionSpec spec{.window = c.window, .rope_factor = 1.25};
  if (together) {
    b.attention_step(o.tensor(), q, k, v, k_cache.tensor(), v_cache.tensor(), start, inv_freq, spec,
                     c.format);
  } else {
    b.append_kv(k_cache.tensor(), v_cache.tensor(), k, v, start, q, inv_freq, c.format,
                spec.rope_factor);
    b.attention_cached(o.tensor(), q, k_cache.tensor(), v_cache.tensor(), start, spec, c.format);
  }
  CHECK((o.untouched() && k_cache.untouched() && v_cache.untouched()));
  const auto bytes_of = [&](const Tensor& t) {
    std::vector<uint8_t> bytes(static_cast<size_t>(t.bytes()));
    b.download(bytes.data(), t);
    return bytes;
  };
  return {values_of(b, o.tensor()), bytes_of(k_cache.tensor()), bytes_of(v_cache.tensor())};
}

}  // namespace

TEST_CASE("attention_step is append_kv and attention_cached", "[attention_step]") {
  for (const int bits : {16, 8, 4})
    for (StepCase c : kCases) {
      c.format.bits = bits;
      if (bits < 16 && (c.d % KvFormat::kGroup != 0 || c.t_max > 2000)) continue;
      CAPTURE(c.b, c.t_max, c.h, c.k, c.d, c.window, c.start, bits);
      const Result got = run(backend(), c, true), want = run(backend(), c, false);
      for (const double o : got.o) REQUIRE(std::isfinite(o));
      // The roundings of o and of p; sums in FP32. A rotated key may differ in its last bit.
      CHECK(relative_error(got.o, want.o) <= 2 * act_epsilon() + 64 * real_epsilon());
      CHECK(got.v_cache == want.v_cache);
      CHECK(got.o == run(backend(), c, true).o);
      // The oracle does not round the angles, of up to `start`, to FP32.
      if (bits == 16)
        CHECK(relative_error(got.o, run(oracle_f64(), c, true).o) <=
              2 * act_epsilon() + (64 + c.start) * real_epsilon());
    }
}

TEST_CASE("attention_step writes the row of its position and no other", "[attention_step]") {
  for (const int64_t d : {64, 96, 128, 80}) {
    const int64_t batch = 2, t_max = 50, heads = 3, row = heads * d;
    CAPTURE(d);
    Backend& b = backend();
    engine::Rng rng(23);
    const Shape cache = {batch, t_max, heads, d}, rows = {batch, 1, heads, d};
    const Guarded k_cache(b, cache, b.act()), v_cache(b, cache, b.act());
    const Tensor rows_before = make(b, cache, b.act(), activations(rng, batch * t_max * row));
    const auto before = values_of(b, rows_before);
    b.copy(k_cache.tensor(), rows_before);
    b.copy(v_cache.tensor(), rows_before);
    const std::vector<int32_t> starts = {17, 49};
    const Tensor start = make_ids(b, {batch}, starts), inv_freq = frequencies(b, d);
    const Tensor k = make(b, rows, b.act(), activations(rng, batch * row));
    const Tensor v = make(b, rows, b.act(), activations(rng, batch * row));
    const Tensor q = make(b, rows, b.act(), activations(rng, batch * row));
    b.attention_step(b.empty(rows, b.act()), q, k, v, k_cache.tensor(), v_cache.tensor(), start,
                     inv_freq, AttentionSpec{});
    CHECK((k_cache.untouched() && v_cache.untouched()));
    b.rope(k, inv_freq, start, engine::Rotation::Forward);
    const auto new_k = values_of(b, k), new_v = values_of(b, v);
    const auto got_k = values_of(b, k_cache.tensor()), got_v = values_of(b, v_cache.tensor());
    for (int64_t i = 0; i < batch * t_max * row; ++i) {
      const size_t at = static_cast<size_t>(i), one = static_cast<size_t>(i / row / t_max);
      const size_t in_row = one * static_cast<size_t>(row) + static_cast<size_t>(i % row);
      if (i / row % t_max == starts[one]) {
        // The kernels may contract a product and a sum differently, which can change the rounding.
        CHECK(std::abs(got_k[at] - new_k[in_row]) <=
              2 * act_epsilon() * std::abs(new_k[in_row]) + 1e-5);
        CHECK(got_v[at] == new_v[in_row]);
      } else {
        REQUIRE(got_k[at] == before[at]);
        REQUIRE(got_v[at] == before[at]);
      }
    }
  }
}

TEST_CASE("attention_step at a position past the cache throws and writes nothing",
          "[attention_step]") {
  const int64_t t_max = 20, heads = 3, d = 64;
  Backend& b = backend();
  const Shape cache = {1, t_max, heads, d}, rows = {1, 1, heads, d};
  const Guarded k_cache(b, cache, b.act()), v_cache(b, cache, b.act());
  b.zero(k_cache.tensor());
  b.zero(v_cache.tensor());
  engine::Rng rng(29);
  const Tensor x = make(b, rows, b.act(), activations(rng, heads * d)), o = b.empty(rows, b.act());
  const Tensor inv_freq = frequencies(b, d);
  for (const int at : {20, -1}) {
    const auto step = [&] {
      b.attention_step(o, x, x, x, k_cache.tensor(), v_cache.tensor(), make_ids(b, {1}, {at}),
                       inv_freq, AttentionSpec{});
      b.synchronize();
    };
    CHECK_THROWS_WITH(step(), Catch::Contains(cat("positions ", at, " to ", at)));
    CHECK_NOTHROW(b.synchronize());
  }
  for (const Tensor& of : {k_cache.tensor(), v_cache.tensor()})
    for (const double value : values_of(b, of)) REQUIRE(value == 0);
  CHECK((k_cache.untouched() && v_cache.untouched()));
  const Tensor two = b.zeros({1, 2, heads, d}, b.act());
  CHECK_THROWS_AS(b.attention_step(two, two, two, two, k_cache.tensor(), v_cache.tensor(),
                                   make_ids(b, {1}, {0}), inv_freq, AttentionSpec{}),
                  Error);
}

TEST_CASE("a recorded attention_step reads start at every replay", "[attention_step]") {
  Backend& b = backend();
  const int64_t t_max = 40, heads = 4, kv_heads = 2, d = 64, steps = 37;
  engine::Rng rng(31);
  const Shape cache = {1, t_max, kv_heads, d}, queries = {1, 1, heads, d},
              keys = {1, 1, kv_heads, d};
  const Tensor inv_freq = frequencies(b, d), start = make_ids(b, {1}, {0});
  const Tensor q = b.empty(queries, b.act()), k = b.empty(keys, b.act()),
               v = b.empty(keys, b.act());
  const Tensor o = b.empty(queries, b.act());
  const Tensor k_cache = b.zeros(cache, b.act()), v_cache = b.zeros(cache, b.act());
  const Tensor k_apart = b.zeros(cache, b.act()), v_apart = b.zeros(cache, b.act());
  const auto replay = b.record([&] {
    b.attention_step(o, q, k, v, k_cache, v_cache, start, inv_freq, AttentionSpec{});
    b.advance(start);
  });
  for (int position = 0; position < steps; ++position) {
    CAPTURE(position);
    const Tensor new_q = make(b, queries, b.act(), activations(rng, heads * d));
    const Tensor new_k = make(b, keys, b.act(), activations(rng, kv_heads * d));
    const Tensor new_v = make(b, keys, b.act(), activations(rng, kv_heads * d));
    b.copy(q, new_q);
    b.copy(k, new_k);
    b.copy(v, new_v);
    replay->run();
    const auto got = values_of(b, o);
    const Tensor at = make_ids(b, {1}, {position}), want = b.empty(queries, b.act());
    b.append_kv(k_apart, v_apart, new_k, new_v, at, new_q, inv_freq);
    b.attention_cached(want, new_q, k_apart, v_apart, at, AttentionSpec{});
    CHECK(relative_error(got, values_of(b, want)) <= 2 * act_epsilon() + 64 * real_epsilon());
  }
}

}  // namespace bbb::tests
