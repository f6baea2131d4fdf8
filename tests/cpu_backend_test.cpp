// The CPU backends, the oracles of all other tests, against formulas in double and central
// differences.
//
// A central difference with step h = 1e-5 has the error h^2 f''' / 6 + eps |f| / h, about 1e-10.
// The bound 1e-7 leaves room for outputs of a few tens, but none for a wrong formula.
#include <algorithm>
#include <atomic>
#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <thread>

#include "engine/cpu/memory.h"
#include "engine/cpu/thread_pool.h"
#include "engine/cpu/vector_math.h"
#include "tests/support.h"

namespace bbb::tests {
namespace {

using engine::AttentionSpec;
using engine::Rotation;
using engine::Write;

constexpr double kGradientBound = 1e-7;
using Tensors = std::vector<Tensor>;

// forward(in) is any output; backward(in, dout) gives the gradient of every input. Compares them
// with differences of sum(probe * forward(in)).
void check_gradient(const std::vector<Shape>& shapes,
                    const std::function<Tensor(const Tensors&)>& forward,
                    const std::function<Tensors(const Tensors&, const Tensor&)>& backward) {
  constexpr double kStep = 1e-5;
  Backend& b = oracle_f64();
  engine::Rng rng(11);
  std::vector<std::vector<double>> values;
  for (const Shape& shape : shapes) values.push_back(normal(rng, engine::numel_of(shape)));
  const auto tensors = [&] {
    Tensors in;
    for (size_t i = 0; i < shapes.size(); ++i)
      in.push_back(make(b, shapes[i], DType::F64, values[i]));
    return in;
  };
  const Tensor out = forward(tensors());
  const std::vector<double> probe = normal(rng, out.numel());
  const auto loss = [&] {
    const std::vector<double> y = values_of(b, forward(tensors()));
    double total = 0;
    for (size_t i = 0; i < y.size(); ++i) total += probe[i] * y[i];
    return total;
  };
  const Tensors gradients = backward(tensors(), make(b, out.shape(), DType::F64, probe));
  for (size_t i = 0; i < shapes.size(); ++i) {
    std::vector<double> expected;
    for (double& x : values[i]) {
      const double saved = x;
      x = saved + kStep;
      const double above = loss();
      x = saved - kStep;
      const double below = loss();
      x = saved;
      expected.push_back((above - below) / (2 * kStep));
    }
    INFO("input " << i);
    CHECK(relative_error(values_of(b, gradients[i]), expected) < kGradientBound);
  }
}

struct AttentionShape {
  int64_t batch, time, heads, kv_heads, d, window;
};

// The formula, T x T, in double: o (B, T, H, d) and lse (B, H, T).
void naive_attention(const AttentionShape& s, const std::vector<double>& q,
                     const std::vector<double>& k, const std::vector<double>& v,
                     std::vector<double>& o, std::vector<double>& lse) {
  o.assign(q.size(), 0.0);
  lse.assign(static_cast<size_t>(s.batch * s.heads * s.time), 0.0);
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t h = 0; h < s.heads; ++h)
      for (int64_t t = 0; t < s.time; ++t) {
        const auto at_q = static_cast<size_t>(((b * s.time + t) * s.heads + h) * s.d);
        const auto at_k = [&](int64_t key) {
          return static_cast<size_t>(
              ((b * s.time + key) * s.kv_heads + h / (s.heads / s.kv_heads)) * s.d);
        };
        const int64_t first = s.window > 0 ? std::max<int64_t>(0, t - s.window + 1) : 0;
        std::vector<double> weights;
        double total = 0;
        for (int64_t key = first; key <= t; ++key) {
          double score = 0;
          for (size_t i = 0; i < static_cast<size_t>(s.d); ++i)
            score += q[at_q + i] * k[at_k(key) + i];
          weights.push_back(std::exp(score / std::sqrt(static_cast<double>(s.d))));
          total += weights.back();
        }
        for (int64_t key = first; key <= t; ++key)
          for (size_t i = 0; i < static_cast<size_t>(s.d); ++i)
            o[at_q + i] += weights[static_cast<size_t>(key - first)] / total * v[at_k(key) + i];
        lse[static_cast<size_t>((b * s.heads + h) * s.time + t)] = std::log(total);
      }
}

std::vector<double> naive_product(const std::vector<double>& a, const std::vector<double>& b,
                                  int64_t m, int64_t n, int64_t k) {  // (m, k) (n, k)^T
  std::vector<double> y(static_cast<size_t>(m * n), 0.0);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j)
      for (int64_t l = 0; l < k; ++l)
        y[static_cast<size_t>(i * n + j)] +=
            a[static_cast<size_t>(i * k + l)] * b[static_cast<size_t>(j * k + l)];
  return y;
}

std::vector<double> transposed(const std::vector<double>& a, int64_t m, int64_t n) {
  std::vector<double> t(a.size());
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j)
      t[static_cast<size_t>(j * m + i)] = a[static_cast<size_t>(i * n + j)];
  return t;
}

Tensor zeros64(Shape shape) { return oracle_f64().zeros(std::move(shape), DType::F64); }
Tensor empty64(Shape shape) { return oracle_f64().empty(std::move(shape), DType::F64); }

}  // namespace

TEST_CASE("the thread pool covers every index once and passes exceptions on") {
  engine::ThreadPool pool(4);
  for (const int64_t n : {0, 1, 31, 33, 1000}) {
    std::vector<std::atomic<int>> seen(static_cast<size_t>(n));
    std::atomic<int64_t> nested{0};
    pool.parallel_for(n, 7, [&](int64_t begin, int64_t end) {
      // A nested loop is serial. Assertions come after the threads are done: Catch takes one at a
      // time.
      pool.parallel_for(end - begin, 2, [&](int64_t b, int64_t e) { nested += e - b; });
      for (int64_t i = begin; i < end; ++i) ++seen[static_cast<size_t>(i)];
    });
    for (const auto& count : seen) CHECK(count == 1);
    CHECK(nested == n);
  }
  CHECK_THROWS_WITH(
      pool.parallel_for(100, 1, [](int64_t i, int64_t) { BBB_CHECK(i != 50, "fifty"); }), "fifty");
}

// Late workers meet the next loop while it is set up, and sleep in the longer pauses.
TEST_CASE("the thread pool ends every loop before the next one begins") {
  engine::ThreadPool pool(4);
  engine::Rng rng(17);
  for (int loop = 0; loop < 20000; ++loop) {
    const int64_t n = 1 + rng.below(12), grain = 1 + rng.below(3);
    std::vector<int> seen(static_cast<size_t>(n));  // not atomic: each index has one writer
    pool.parallel_for(n, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) seen[static_cast<size_t>(i)] += loop + 1;
    });
    if (std::count(seen.begin(), seen.end(), loop + 1) != n) FAIL("loop " << loop << " of " << n);
    if (loop % 400 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

TEST_CASE("the vector exponential is the exponential") {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  double worst = 0;
  for (float x = -87.3f; x < 88.7f; x += 0.00137f) {
    const double exact = std::exp(static_cast<double>(x));
    worst = std::max(worst, std::fabs(static_cast<double>(engine::vector_exp(x)) / exact - 1));
  }
  CHECK(worst < 2 * 0x1p-23);  // the 2 ulp it promises
  CHECK(engine::vector_exp(0.0f) == 1.0f);
  CHECK(engine::vector_exp(-kInfinity) == 0.0f);
  CHECK(engine::vector_exp(-100.0f) == 0.0f);
  CHECK(engine::vector_exp(kInfinity) == kInfinity);
  CHECK(engine::vector_exp(89.0f) == kInfinity);
  CHECK(std::isnan(engine::vector_exp(std::numeric_limits<float>::quiet_NaN())));
}

// Sums of k products in F32 err by about sqrt(k) roundings of a product's size; 4 covers the
// spread.
TEST_CASE("matrix products equal plain sums, in every strip and mode") {
  struct Sizes {
    int64_t m, n, k;
  };
  for (const Sizes& s : {Sizes{1, 1, 1}, Sizes{1, 333, 65}, Sizes{3, 33, 31}, Sizes{257, 33, 64},
                         Sizes{33, 515, 96}, Sizes{260, 300, 200}, Sizes{0, 5, 4}}) {
    INFO(s.m << " x " << s.n << " x " << s.k);
    engine::Rng rng(3);
    const std::vector<double> x = round_bf16(normal(rng, s.m * s.k)),
                              w = round_bf16(normal(rng, s.n * s.k)),
                              dy = round_bf16(normal(rng, s.m * s.n));
    for (Backend* b : {&oracle(), &oracle_f64()}) {
      const DType t = b->act();
      const double bound =
          4 * epsilon_of(t) * std::sqrt(static_cast<double>(std::max({s.k, s.n, s.m})));
      const Tensor tx = make(*b, {s.m, s.k}, t, x), tw = make(*b, {s.n, s.k}, t, w);
      const Tensor tdy = make(*b, {s.m, s.n}, t, dy), half = make(*b, {1}, t, {0.5});

      Guarded y(*b, {s.m, s.n}, t);
      std::vector<double> expected = naive_product(x, w, s.m, s.n, s.k);
      b->gemm_nt(y.tensor(), tx, tw, Tensor(), Tensor());
      CHECK(relative_error(values_of(*b, y.tensor()), expected) <= bound);
      for (size_t i = 0; i < expected.size(); ++i) expected[i] = 0.5 * expected[i] + dy[i];
      b->gemm_nt(y.tensor(), tx, tw, half, tdy);
      CHECK(relative_error(values_of(*b, y.tensor()), expected) <= bound);
      CHECK(y.untouched());

      Guarded dx(*b, {s.m, s.k}, t);
      expected = naive_product(dy, transposed(w, s.n, s.k), s.m, s.k, s.n);
      b->gemm_nn(dx.tensor(), tdy, tw, Tensor(), Write::Overwrite);
      CHECK(relative_error(values_of(*b, dx.tensor()), expected) <= bound);
      for (double& e : expected) e *= 1.5;
      b->gemm_nn(dx.tensor(), tdy, tw, half, Write::Add);
      CHECK(relative_error(values_of(*b, dx.tensor()), expected) <= bound);
      CHECK(dx.untouched());

      Guarded dw(*b, {s.n, s.k}, t);
      expected = naive_product(transposed(dy, s.m, s.n), transposed(x, s.m, s.k), s.n, s.k, s.m);
      b->gemm_tn(dw.tensor(), tdy, tx, Write::Overwrite);
      CHECK(relative_error(values_of(*b, dw.tensor()), expected) <= bound);
      for (double& e : expected) e *= 2;
      b->gemm_tn(dw.tensor(), tdy, tx, Write::Add);
      CHECK(relative_error(values_of(*b, dw.tensor()), expected) <= bound);
      CHECK(dw.untouched());
    }
  }
}

// Scores err by some eps * sqrt(d). The exponential turns that into a relative error, and the sums
// over keys add little more. 16 eps covers both.
TEST_CASE("blocked attention equals the T x T formula") {
  for (const AttentionShape& s :
       {AttentionShape{1, 1, 1, 1, 4, 0}, AttentionShape{2, 31, 4, 2, 8, 0},
        AttentionShape{1, 64, 2, 2, 16, 0}, AttentionShape{2, 130, 6, 2, 16, 0},
        AttentionShape{1, 130, 3, 1, 12, 1}, AttentionShape{2, 200, 4, 4, 8, 33}}) {
    INFO("T " << s.time << ", window " << s.window);
    engine::Rng rng(5);
    const Shape q_shape{s.batch, s.time, s.heads, s.d}, k_shape{s.batch, s.time, s.kv_heads, s.d};
    const Shape lse_shape{s.batch, s.heads, s.time};
    std::vector<double> o, lse;
    const std::vector<double> q = round_bf16(normal(rng, engine::numel_of(q_shape))),
                              k = round_bf16(normal(rng, engine::numel_of(k_shape))),
                              v = round_bf16(normal(rng, engine::numel_of(k_shape)));
    naive_attention(s, q, k, v, o, lse);
    for (Backend* b : {&oracle(), &oracle_f64()}) {
      const DType t = b->act();
      Guarded out(*b, q_shape, t), out_lse(*b, lse_shape, t);
      const Tensor tq = make(*b, q_shape, t, q), tk = make(*b, k_shape, t, k),
                   tv = make(*b, k_shape, t, v);
      b->attention(out.tensor(), out_lse.tensor(), tq, tk, tv, AttentionSpec{s.window});
      CHECK(relative_error(values_of(*b, out.tensor()), o) < 16 * epsilon_of(t));
      CHECK(relative_error(values_of(*b, out_lse.tensor()), lse) < 16 * epsilon_of(t));
      CHECK(out.untouched());
      CHECK(out_lse.untouched());
    }
  }
}

TEST_CASE("attention over a cache equals attention, token by token and in pieces") {
  constexpr int64_t kBatch = 2, kTime = 90, kHeads = 4, kKv = 2, kDim = 8, kCapacity = 100;
  Backend& b = oracle_f64();
  engine::Rng rng(6);
  for (const int64_t window : {0, 20}) {
    const AttentionSpec spec{window};
    const auto random = [&](int64_t heads) {
      return make(b, {kBatch, kTime, heads, kDim}, DType::F64,
                  normal(rng, kBatch * kTime * heads * kDim));
    };
    const Tensor q = random(kHeads), k = random(kKv), v = random(kKv);
    const Tensor whole = empty64({kBatch, kTime, kHeads, kDim});
    b.attention(whole, empty64({kBatch, kHeads, kTime}), q, k, v, spec);
    // Positions [t, t + n) of every batch row.
    const auto cut = [&](const Tensor& x, int64_t t, int64_t n) {
      const Tensor piece = empty64({kBatch, n, x.dim(2), kDim});
      const int64_t width = x.dim(2) * kDim;
      for (int64_t row = 0; row < kBatch; ++row)
        b.copy(piece.slice(row * n * width, n * width),
               x.slice((row * kTime + t) * width, n * width));
      return piece;
    };
    const double nan = std::numeric_limits<double>::quiet_NaN();
    const auto cache = [&] {  // entries that were never written must never be read
      const Shape shape{kBatch, kCapacity, kKv, kDim};
      return make(b, shape, DType::F64,
                  std::vector<double>(static_cast<size_t>(engine::numel_of(shape)), nan));
    };
    const Tensor k_cache = cache(), v_cache = cache();
    for (int64_t t = 0, n = 70; t < kTime; t += n, n = 1) {
      const Tensor start =
          make_ids(b, {kBatch}, std::vector<int32_t>(kBatch, static_cast<int32_t>(t)));
      const Tensor o = empty64({kBatch, n, kHeads, kDim});
      b.append_kv(k_cache, v_cache, cut(k, t, n), cut(v, t, n), start);
      b.attention_cached(o, cut(q, t, n), k_cache, v_cache, start, spec);
      CHECK(relative_error(values_of(b, o), values_of(b, cut(whole, t, n))) < 1e-14);
    }
    const Tensor full = make_ids(b, {kBatch}, {0, kCapacity});
    CHECK_THROWS_WITH(b.append_kv(k_cache, v_cache, cut(k, 0, 1), cut(v, 0, 1), full),
                      "positions 100 to 100 of a key-value cache of 100");
  }
}

// Of q (B, T, H, d) and k, v (B, T, K, d), to all three.
static void check_attention_gradient(const Shape& q, const Shape& k, const AttentionSpec& spec) {
  Backend& b = oracle_f64();
  const Shape lse{q[0], q[2], q[1]};
  check_gradient(
      {q, k, k},
      [&](const Tensors& in) {
        const Tensor o = empty64(q);
        b.attention(o, empty64(lse), in[0], in[1], in[2], spec);
        return o;
      },
      [&](const Tensors& in, const Tensor& dout) {
        const Tensor o = empty64(q), l = empty64(lse);
        b.attention(o, l, in[0], in[1], in[2], spec);
        const Tensors grads{empty64(q), empty64(k), empty64(k)};
        b.attention_backward(grads[0], grads[1], grads[2], dout, in[0], in[1], in[2], o, l,
                             Tensor(), spec);
        return grads;
      });
}

TEST_CASE("attention's gradient") {
  for (const AttentionShape& s :
       {AttentionShape{2, 5, 4, 2, 4, 0}, AttentionShape{1, 9, 2, 1, 4, 3},
        AttentionShape{1, 67, 2, 1, 2, 0}}) {
    INFO("T " << s.time << ", window " << s.window);
    const AttentionSpec spec{s.window};
    const Shape q{s.batch, s.time, s.heads, s.d}, k{s.batch, s.time, s.kv_heads, s.d};
    check_attention_gradient(q, k, spec);
  }
}

TEST_CASE("attention within documents is that of each document alone, and so are its gradients") {
  Backend& b = oracle_f64();
  engine::Rng rng(8);
  constexpr int64_t kHeads = 4, kKv = 2, kDim = 6;
  const std::vector<int64_t> lengths = {1, 70, 3, 64, 29};
  int64_t time = 0;
  std::vector<int32_t> first_key;
  for (const int64_t length : lengths) {
    first_key.insert(first_key.end(), static_cast<size_t>(length), static_cast<int32_t>(time));
    time += length;
  }
  const auto random = [&](int64_t heads) {
    return make(b, {1, time, heads, kDim}, DType::F64, normal(rng, time * heads * kDim));
  };
  const Tensor q = random(kHeads), k = random(kKv), v = random(kKv), dout = random(kHeads);
  const Tensors all{empty64(q.shape()), empty64(q.shape()), empty64(k.shape()), empty64(k.shape())};
  for (const int64_t window : {0, 20}) {
    const AttentionSpec spec{.window = window, .first_key = make_ids(b, {1, time}, first_key)};
    const Tensor lse = empty64({1, kHeads, time});
    b.attention(all[0], lse, q, k, v, spec);
    b.attention_backward(all[1], all[2], all[3], dout, q, k, v, all[0], lse, Tensor(), spec);
    int64_t begin = 0;
    for (const int64_t length : lengths) {
      const auto part = [&](const Tensor& x) {
        const int64_t width = x.dim(2) * kDim;
        return x.slice(begin * width, length * width).view({1, length, x.dim(2), kDim});
      };
      const Tensors alone{empty64(part(q).shape()), empty64(part(q).shape()),
                          empty64(part(k).shape()), empty64(part(k).shape())};
      const Tensor own_lse = empty64({1, kHeads, length});
      const AttentionSpec own{window};
      b.attention(alone[0], own_lse, part(q), part(k), part(v), own);
      b.attention_backward(alone[1], alone[2], alone[3], part(dout), part(q), part(k), part(v),
                           alone[0], own_lse, Tensor(), own);
      // A document of one token has no gradient of its scores.
      for (size_t i = 0; i < all.size(); ++i)
        if (length > 1 || i == 0 || i == 3)
          CHECK(relative_error(values_of(b, part(all[i])), values_of(b, alone[i])) < 1e-13);
      begin += length;
    }
  }
  for (const std::vector<int32_t>& wrong : {std::vector<int32_t>{0, 1, 0}, {0, 2, 2}, {-1, 0, 0}}) {
    const Tensor x = empty64({1, 3, 1, 2});
    CHECK_THROWS_WITH(
        b.attention(x, empty64({1, 1, 3}), x, x, x, {.first_key = make_ids(b, {1, 3}, wrong)}),
        Catch::Contains("first_key[0, "));
  }
}

TEST_CASE("attention's gradient within documents") {
  Backend& b = oracle_f64();
  for (const int64_t window : {0, 3}) {
    const Shape q{2, 9, 4, 4}, k{2, 9, 2, 4};
    const AttentionSpec spec{.window = window,
                             .first_key = make_ids(b, {2, 9},
                                                   {0, 0, 0, 3, 4, 4, 4, 4, 4,  //
                                                    0, 0, 0, 0, 0, 0, 0, 7, 7})};
    check_attention_gradient(q, k, spec);
  }
}

TEST_CASE("rms_norm's gradient, written or added") {
  Backend& b = oracle_f64();
  for (const int64_t rows : {1, 37}) {
    const Shape x{rows, 33}, w{33};
    check_gradient(
        {x, w},
        [&](const Tensors& in) {
          const Tensor y = empty64(x);
          b.rms_norm(y, empty64({rows}), in[0], in[1], 1e-5);
          return y;
        },
        [&](const Tensors& in, const Tensor& dout) {
          const Tensor r = empty64({rows});
          b.rms_norm(empty64(x), r, in[0], in[1], 1e-5);
          const Tensors once{empty64(x), empty64(w)}, twice{zeros64(x), zeros64(w)};
          b.rms_norm_backward(once[0], once[1], dout, in[0], r, in[1], Write::Overwrite,
                              Write::Overwrite);
          for (int i = 0; i < 2; ++i)
            b.rms_norm_backward(twice[0], twice[1], dout, in[0], r, in[1], Write::Add, Write::Add);
          for (size_t i = 0; i < 2; ++i) {
            std::vector<double> doubled = values_of(b, once[i]);
            for (double& g : doubled) g *= 2;
            CHECK(relative_error(values_of(b, twice[i]), doubled) < 1e-14);
          }
          return once;
        });
  }
}

TEST_CASE("swiglu's gradient") {
  Backend& b = oracle_f64();
  const Shape shape{3, 11};
  check_gradient(
      {shape, shape},
      [&](const Tensors& in) {
        const Tensor h = empty64(shape);
        b.swiglu(h, in[0], in[1]);
        return h;
      },
      [&](const Tensors& in, const Tensor& dout) {
        const Tensors grads{empty64(shape), empty64(shape)};
        b.swiglu_backward(grads[0], grads[1], dout, in[0], in[1]);
        return grads;
      });
}

TEST_CASE("rope rotates pairs by their position, and its gradient rotates back") {
  Backend& b = oracle_f64();
  const Shape shape{2, 5, 3, 4};
  const Tensor freq = make(b, {2}, DType::F32, {1.0, 0.125});
  const Tensor start = make_ids(b, {2}, {7, 3});
  const auto rotated = [&](const Tensor& x, Rotation direction) {
    const Tensor y = empty64(shape);
    b.copy(y, x);
    b.rope(y, freq, start, direction);
    return y;
  };
  check_gradient(
      {shape}, [&](const Tensors& in) { return rotated(in[0], Rotation::Forward); },
      [&](const Tensors&, const Tensor& dout) {
        return Tensors{rotated(dout, Rotation::Inverse)};
      });
  const Tensor one = make(b, {1, 1, 1, 4}, DType::F64, {1, 2, 3, 4});
  b.rope(one, freq, start.rows(0, 1), Rotation::Forward);
  const double c0 = std::cos(7.0), s0 = std::sin(7.0), c1 = std::cos(0.875), s1 = std::sin(0.875);
  CHECK(relative_error(values_of(b, one),
                       {c0 - 3 * s0, 2 * c1 - 4 * s1, 3 * c0 + s0, 4 * c1 + 2 * s1}) < 1e-15);
}

TEST_CASE("the losses' gradients") {
  Backend& b = oracle_f64();
  constexpr int64_t kRows = 4, kVocabulary = 37;
  const Shape shape{kRows, kVocabulary};
  const Tensor targets = make_ids(b, {kRows}, {3, -1, 0, 36});
  // The probe weighs each row, but the op has one scale for all rows: scale the rows here.
  const auto scaled = [&](const Tensor& grad, const Tensor& weights) {
    std::vector<double> g = values_of(b, grad);
    const std::vector<double> w = values_of(b, weights);
    for (size_t i = 0; i < g.size(); ++i) g[i] *= w[i / kVocabulary];
    return make(b, shape, DType::F64, g);
  };
  check_gradient(
      {shape},
      [&](const Tensors& in) {
        const Tensor loss = empty64({kRows});
        b.cross_entropy(loss, Tensor(), in[0], targets, 1.0);
        CHECK(values_of(b, loss)[1] == 0.0);
        return loss;
      },
      [&](const Tensors& in, const Tensor& dout) {
        const Tensor grad = empty64(shape);
        b.cross_entropy(empty64({kRows}), grad, in[0], targets, 1.0);
        return Tensors{scaled(grad, dout)};
      });
  engine::Rng rng(8);
  const Tensor teacher = make(b, shape, DType::F64, normal(rng, kRows * kVocabulary));
  check_gradient(
      {shape},
      [&](const Tensors& in) {
        const Tensor loss = empty64({kRows});
        b.kl_divergence(loss, Tensor(), in[0], teacher, targets, 1.0);
        CHECK(values_of(b, loss)[1] == 0.0);
        return loss;
      },
      [&](const Tensors& in, const Tensor& dout) {
        const Tensor grad = empty64(shape);
        b.kl_divergence(empty64({kRows}), grad, in[0], teacher, targets, 1.0);
        return Tensors{scaled(grad, dout)};
      });
  for (const double beta : {0.1, 0.5, 0.9})
    check_gradient(
        {shape},
        [&](const Tensors& in) {
          const Tensor loss = empty64({kRows});
          b.jensen_shannon(loss, Tensor(), in[0], teacher, targets, beta, 1.0);
          CHECK(values_of(b, loss)[1] == 0.0);
          return loss;
        },
        [&](const Tensors& in, const Tensor& dout) {
          const Tensor grad = empty64(shape);
          b.jensen_shannon(empty64({kRows}), grad, in[0], teacher, targets, beta, 1.0);
          return Tensors{scaled(grad, dout)};
        });
  check_gradient(
      {shape},
      [&](const Tensors& in) {
        const Tensor loss = empty64({1});
        b.mse(loss, Tensor(), in[0], teacher);
        return loss;
      },
      [&](const Tensors& in, const Tensor& dout) {
        const Tensor grad = empty64(shape);
        b.mse(empty64({1}), grad, in[0], teacher);
        std::vector<double> g = values_of(b, grad);
        for (double& x : g) x *= values_of(b, dout)[0];
        return Tensors{make(b, shape, DType::F64, g)};
      });
}

TEST_CASE("the losses' values, also for extreme logits") {
  Backend& b = oracle();
  const Tensor targets = make_ids(b, {2}, {1, 2}), loss = b.empty({2}, DType::F32);
  // Logits near 1000 overflow unless the maximum is subtracted.
  const Tensor logits = make(b, {2, 3}, DType::F32, {1000, 1001, 999, 0, 0, 0});
  b.cross_entropy(loss, Tensor(), logits, targets, 1.0);
  const double first = std::log(std::exp(-1.0) + 1 + std::exp(-2.0));
  CHECK(values_of(b, loss)[0] == Approx(first).epsilon(1e-4));  // F32 near 1001 steps by 6e-5
  CHECK(values_of(b, loss)[1] == Approx(std::log(3.0)));
  b.kl_divergence(loss, Tensor(), logits, logits, targets, 1.0);
  CHECK(values_of(b, loss) == std::vector<double>{0, 0});
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const Tensor broken = make(b, {2, 3}, DType::F32, {0, nan, 0, 0, 0, 0});
  b.cross_entropy(loss, Tensor(), broken, targets, 1.0);
  CHECK(std::isnan(values_of(b, loss)[0]));
  CHECK(std::isfinite(values_of(b, loss)[1]));
}

TEST_CASE("the same bytes from any number of threads, and from any run") {
  engine::Rng rng(9);
  constexpr int64_t kRows = 150, kWidth = 200, kPadded = 30080;
  const std::vector<double> x = normal(rng, kRows * kWidth), w = normal(rng, kWidth);
  const std::vector<double> query = normal(rng, 2 * kWidth);
  std::vector<std::vector<uint8_t>> results;
  for (const int threads : {1, 2, 3, 3}) {
    const auto b = engine::make_cpu_backend(threads);
    const Tensor tx = make(*b, {kRows, kWidth}, DType::F32, x),
                 tw = make(*b, {kWidth}, DType::F32, w);
    const Tensor y = b->empty({kRows, kWidth}, DType::F32), r = b->empty({kRows}, DType::F32);
    const Tensor dx = b->empty({kRows, kWidth}, DType::F32), dw = b->empty({kWidth}, DType::F32);
    const Tensor control = b->zeros({engine::kControlSize}, DType::F32);
    const Tensor clipped = b->zeros({kPadded / 8}, DType::U8), g = b->zeros({kPadded}, DType::F32);
    b->rms_norm(y, r, tx, tw, 1e-6);
    b->rms_norm_backward(dx, dw, y, tx, r, tw, Write::Overwrite, Write::Overwrite);
    b->copy(g.slice(0, dx.numel()), dx);
    b->step_control(control, r.slice(0, 1), g, clipped, engine::Schedule{});
    // A decode step: several chunks of keys, and a product of one row by a bf16 matrix.
    const Tensor cache = make(*b, {1, kRows, 4, kWidth / 4}, DType::F32, x),
                 q = make(*b, {1, 1, 8, kWidth / 4}, DType::F32, query),
                 o = b->empty({1, 1, 8, kWidth / 4}, DType::F32);
    b->attention_cached(o, q, cache, cache, make_ids(*b, {1}, {kRows - 1}),
                        engine::AttentionSpec{});
    const Tensor logits = b->empty({1, kRows}, DType::F32);
    b->gemm_nt(logits, tx.slice(0, kWidth).view({1, kWidth}),
               make(*b, {kRows, kWidth}, DType::BF16, x), Tensor(), Tensor());
    std::vector<uint8_t> all;
    for (const Tensor& t : {y, dx, dw, control, o, logits})
      for (const uint8_t byte : bytes_of(*b, t)) all.push_back(byte);
    results.push_back(all);
  }
  for (const auto& result : results) CHECK(result == results[0]);
}

TEST_CASE("host memory: freed blocks of any size serve other sizes, and go back to the system") {
  const auto memory = std::make_shared<engine::HostMemory>();
  constexpr int64_t kSlab = int64_t{16} << 20;
  std::vector<std::shared_ptr<engine::Storage>> held;
  // One block at a time, in many sizes: a slab holds them all.
  for (int64_t kib = 33; kib < 1920; kib += 32) {
    held = {memory->allocate(kib << 10)};
    std::memset(held[0]->data(), 1, static_cast<size_t>(held[0]->bytes()));
    held.clear();
    CHECK(memory->cached_bytes() == kSlab);
  }
  // Two slabs, of which a block holds the second.
  for (int i = 0; i < 17; ++i) held.push_back(memory->allocate(int64_t{1} << 20));
  held.erase(held.begin(), held.end() - 1);
  held.push_back(memory->allocate(100));
  held.push_back(memory->allocate(int64_t{4} << 20));
  const int64_t in_use = int64_t{1} << 20;
  CHECK(memory->cached_bytes() == 2 * kSlab - in_use);
  memory->drop_cache();
  CHECK(memory->cached_bytes() == kSlab - in_use);
  held.clear();
  CHECK(memory->cached_bytes() == kSlab + 128 + (int64_t{4} << 20));
  memory->drop_cache();
  CHECK(memory->cached_bytes() == 0);
}

}  // namespace bbb::tests
