// append_kv: rotating as rope, writing its rows only, and quantizing by the written formula.
#include <array>
#include <catch2/catch.hpp>
#include <cmath>
#include <limits>

#include "quant/e4m3.h"
#include "tests/op_test.h"

namespace bbb::tests {
namespace {

using quant::KvFormat;

// numerics.md sections 2 and 9, in FP32: the bytes of one head, its codes behind those of `codes`
// and its pairs behind those of `pairs`.
void quantize_head(std::vector<uint8_t>& codes, std::vector<uint8_t>& pairs, const double* x,
                   int64_t d, int bits) {
  const float top = static_cast<float>((1 << bits) - 1);
  const auto clamped = [&](float v) { return v > 0 ? std::min(v, top) : 0.0f; };  // NaN: 0
  const size_t first_pair = pairs.size();
  for (int64_t group = 0; group < d; group += KvFormat::kGroup) {
    float mn = 0, mx = 0;
    bool nan = false;
    for (int64_t i = group; i < group + KvFormat::kGroup; ++i) {
      nan |= std::isnan(x[i]);
      mn = std::min(mn, static_cast<float>(x[i]));
      mx = std::max(mx, static_cast<float>(x[i]));
    }
    const auto rounding = bits == 8 ? quant::ScaleRounding::Up : quant::ScaleRounding::NearestEven;
    const uint8_t e =
        nan ? quant::kE4m3Nan
            : std::max(quant::kE4m3SmallestCode, quant::e4m3_encode((mx - mn) / top, rounding));
    const float s = quant::e4m3_decode(e);
    const float z = clamped(std::floor(-mn / s + 0.5f));
    uint32_t byte = 0;
    for (int64_t i = group; i < group + KvFormat::kGroup; ++i) {
      const float steps = std::floor(static_cast<float>(x[i]) / s + 0.5f);
      const uint32_t q = static_cast<uint32_t>(clamped(steps + z));
      if (bits == 8) {
        codes.push_back(static_cast<uint8_t>(q));
      } else if (i % 2 == 0) {
        byte = q;
      } else {
        codes.push_back(static_cast<uint8_t>(byte | q << 4));
      }
    }
    pairs.push_back(e);
    pairs.push_back(static_cast<uint8_t>(z));
  }
  pairs.resize(first_pair + static_cast<size_t>(KvFormat::pair_bytes(d)));
}

}  // namespace

TEST_CASE("append_kv rotates as rope does", "[append_kv][rope]") {
  Backend& b = backend();
  engine::Rng rng(24);
  for (const int64_t d : {8, 40, 64, 96, 128, 200, 256})
    for (const auto& [batch, t, heads, kv_heads] : std::vector<std::array<int64_t, 4>>{
             {1, 1, 1, 1}, {1, 1, 32, 8}, {3, 1, 9, 3}, {2, 7, 4, 2}})
      for (const auto& [begin, factor] :
           std::vector<std::pair<int, double>>{{0, 1.0}, {5, 1.25}, {1000, 1.0}, {1000, 1.25}}) {
        CAPTURE(d, batch, t, heads, kv_heads, begin, factor);
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
                        inv_freq, {}, factor);
          } else {
            b.rope(rotated.tensor(), inv_freq, start, engine::Rotation::Forward, factor);
            b.rope(new_k, inv_freq, start, engine::Rotation::Forward, factor);
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

TEST_CASE("append_kv writes its rows and no others", "[append_kv]") {
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

TEST_CASE("append_kv quantizes by the formula, and writes its rows and no others", "[append_kv]") {
  Backend& b = backend();
  engine::Rng rng(31);
  const int64_t batch = 2, t_max = 20, heads = 3;
  for (const int bits : {8, 4})
    for (const int64_t d : {32, 64, 96, 128, 160, 256})
      for (const auto& [first, t] : std::vector<std::pair<int, int64_t>>{{0, 1}, {5, 7}, {8, 12}}) {
        CAPTURE(bits, d, first, t);
        const KvFormat format{bits};
        const Shape rows = {batch, t, heads, d},
                    cache = {batch, t_max, heads, format.head_bytes(d)};
        std::vector<double> k = activations(rng, engine::numel_of(rows)), v = k;
        // A group of zeros, tiny values, one sign, a scale beyond E4M3, and a NaN.
        const auto group = [&](int64_t index, const auto& value) {
          for (int64_t i = 0; i < KvFormat::kGroup; ++i)
            v[static_cast<size_t>(index * KvFormat::kGroup + i)] = value(i);
        };
        for (double& x : v) x = -x;
        group(0, [](int64_t) { return 0.0; });
        group(1, [](int64_t i) { return std::ldexp(static_cast<double>(i), -20); });
        group(2, [](int64_t i) { return -1.0 - static_cast<double>(i); });
        if (t > 1) {
          group(3, [](int64_t i) { return std::ldexp(static_cast<double>(i - 9), 14); });
          v[4 * KvFormat::kGroup] = std::numeric_limits<double>::quiet_NaN();
        }
        const std::vector<uint8_t> before(static_cast<size_t>(engine::numel_of(cache)), 0xA5);
        const Guarded k_cache(b, cache, DType::U8), v_cache(b, cache, DType::U8);
        b.upload(k_cache.tensor(), before.data());
        b.upload(v_cache.tensor(), before.data());
        b.append_kv(k_cache.tensor(), v_cache.tensor(), make(b, rows, b.act(), k),
                    make(b, rows, b.act(), v), make_ids(b, {batch}, {first, first}), {}, {},
                    format);
        const auto expected = [&](const std::vector<double>& x) {
          std::vector<uint8_t> bytes = before;
          for (int64_t one = 0; one < batch; ++one) {
            std::vector<uint8_t> codes, pairs;
            for (int64_t head = 0; head < t * heads; ++head)
              quantize_head(codes, pairs, x.data() + (one * t * heads + head) * d, d, bits);
            const auto sequence = bytes.begin() + one * t_max * heads * format.head_bytes(d);
            std::copy(codes.begin(), codes.end(), sequence + first * heads * format.code_bytes(d));
            std::copy(pairs.begin(), pairs.end(),
                      sequence + t_max * heads * format.code_bytes(d) +
                          first * heads * KvFormat::pair_bytes(d));
          }
          return bytes;
        };
        CHECK(bytes_of(b, k_cache.tensor()) == expected(k));
        CHECK(bytes_of(b, v_cache.tensor()) == expected(v));
        CHECK((k_cache.untouched() && v_cache.untouched()));
      }
}

TEST_CASE("append_kv quantizes the keys that rope rounds", "[append_kv][rope]") {
  Backend& b = backend();
  engine::Rng rng(37);
  for (const auto& [bits, factor] :
       std::vector<std::pair<int, double>>{{8, 1.0}, {8, 1.25}, {4, 1.0}, {4, 1.25}})
    for (const int64_t d : {32, 64, 96, 128, 256})
      for (const auto& [batch, t, heads, kv_heads] : std::vector<std::array<int64_t, 4>>{
               {1, 1, 1, 1}, {1, 1, 32, 8}, {3, 1, 9, 3}, {2, 7, 4, 2}}) {
        CAPTURE(bits, factor, d, batch, t, heads, kv_heads);
        const KvFormat format{bits};
        const Shape keys = {batch, t, kv_heads, d}, queries = {batch, t, heads, d};
        std::vector<int32_t> starts;
        for (int i = 0; i < batch; ++i) starts.push_back(1000 + 3 * i);
        const Tensor start = make_ids(b, {batch}, starts), inv_freq = frequencies(b, d);
        const auto k = activations(rng, engine::numel_of(keys));
        const auto q = activations(rng, engine::numel_of(queries));
        const auto run = [&](bool together) {
          const Tensor k_cache = b.zeros({batch, 1020, kv_heads, format.head_bytes(d)}, DType::U8);
          const Tensor v_cache = b.zeros(k_cache.shape(), DType::U8);
          const Tensor new_k = make(b, keys, b.act(), k), new_v = make(b, keys, b.act(), k);
          const Guarded rotated(b, queries, b.act());
          b.copy(rotated.tensor(), make(b, queries, b.act(), q));
          if (together) {
            b.append_kv(k_cache, v_cache, new_k, new_v, start, rotated.tensor(), inv_freq, format,
                        factor);
          } else {
            b.rope(rotated.tensor(), inv_freq, start, engine::Rotation::Forward, factor);
            b.rope(new_k, inv_freq, start, engine::Rotation::Forward, factor);
            b.append_kv(k_cache, v_cache, new_k, new_v, start, {}, {}, format);
          }
          CHECK(rotated.untouched());
          return std::tuple{bytes_of(b, k_cache), bytes_of(b, v_cache),
                            values_of(b, rotated.tensor())};
        };
        const auto [got_k, got_v, got_q] = run(true);
        const auto [want_k, want_v, want_q] = run(false);
        CHECK(got_v == want_v);
        // The two kernels may contract a product and a sum differently: on a GPU a few keys are
        // rounded to the other side.
        int64_t differ = 0;
        for (size_t i = 0; i < got_k.size(); ++i) differ += got_k[i] != want_k[i];
        CHECK(differ <= (on_cuda() ? 2 + engine::numel_of(keys) / 50 : 0));
        CHECK(relative_error(got_q, want_q) <= (on_cuda() ? act_epsilon() / 16 : 0.0));
      }
}

}  // namespace bbb::tests
