// attention and its backward against the F64 oracle.
#include <catch2/catch.hpp>

#include "models/synthetic_checkpoint.h"
#include "tests/op_test.h"
#include "tests/tiny_model.h"

namespace bbb::tests {
namespace {

using engine::AttentionSpec;

struct AttentionCase {
  int64_t b, t, h, k, window;
};

// Lengths just below and above the rows of a warp, a tile and a block; one, two and three query
// heads per kv head; windows shorter than a tile, as long as a block, and longer than the text.
const AttentionCase kCases[] = {{2, 1, 4, 2, 0},     {1, 31, 9, 3, 0},   {1, 33, 1, 1, 17},
                                {2, 64, 4, 2, 0},    {1, 65, 4, 2, 17},  {1, 127, 1, 1, 128},
                                {1, 200, 4, 2, 128}, {2, 200, 4, 2, 17}, {1, 300, 9, 3, 0},
                                {1, 300, 1, 1, 17},  {1, 300, 4, 2, 1}};

struct Inputs {
  Inputs(const AttentionCase& c, int64_t d, double scale = 1.0) {
    engine::Rng rng(17);
    q = activations(rng, c.b * c.t * c.h * d, scale);
    k = activations(rng, c.b * c.t * c.k * d, scale);
    v = activations(rng, c.b * c.t * c.k * d);
    dout = activations(rng, c.b * c.t * c.h * d);
  }
  std::vector<double> q, k, v, dout;
};

constexpr int64_t kNoDs = 0;  // no memory for ds: the scores' gradients are computed twice

// Rotary: q and k count as rotated, and their gradients are rotated back.
enum class Positions { None, Rotary };

struct Results {
  std::vector<double> o, lse, dq, dk, dv;
};

Results run(Backend& b, const AttentionCase& c, int64_t d, const Inputs& in,
            Positions positions = Positions::None, int64_t ds_bytes = AttentionSpec().ds_bytes,
            double rope_factor = 1, const std::vector<int32_t>& first_key = {}) {
  const Shape queries = {c.b, c.t, c.h, d}, keys = {c.b, c.t, c.k, d};
  const AttentionSpec spec{
      .window = c.window,
      .rope_factor = rope_factor,
      .ds_bytes = ds_bytes,
      .first_key = first_key.empty() ? Tensor() : make_ids(b, {c.b, c.t}, first_key)};
  const Tensor inv_freq = positions == Positions::Rotary ? frequencies(b, d) : Tensor();
  const Tensor q = make(b, queries, b.act(), in.q), k = make(b, keys, b.act(), in.k);
  const Tensor v = make(b, keys, b.act(), in.v), dout = make(b, queries, b.act(), in.dout);
  const Guarded o(b, queries, b.act()), lse(b, {c.b, c.h, c.t}, b.real());
  const Guarded dq(b, queries, b.act()), dk(b, keys, b.act()), dv(b, keys, b.act());
  b.attention(o.tensor(), lse.tensor(), q, k, v, spec);
  b.attention_backward(dq.tensor(), dk.tensor(), dv.tensor(), dout, q, k, v, o.tensor(),
                       lse.tensor(), inv_freq, spec);
  for (const Guarded* output : {&o, &lse, &dq, &dk, &dv}) CHECK(output->untouched());
  return {values_of(b, o.tensor()), values_of(b, lse.tensor()), values_of(b, dq.tensor()),
          values_of(b, dk.tensor()), values_of(b, dv.tensor())};
}

// For o: the rounding of o and that of p before p v, each at most half an epsilon. The errors of
// FP32 sums of up to 2048 terms are far below their bound.
double forward_tolerance() { return act_epsilon() + 64 * real_epsilon(); }

// For the gradients: their own rounding, that of p or ds, that of o inside delta, and that of the
// rotation angle, an FP32 product whose error is an epsilon of the position.
double backward_tolerance(const AttentionCase& c) {
  return 2 * act_epsilon() + real_epsilon() * (128 + static_cast<double>(c.t));
}

// Whether every query sees a single key.
bool single_key(const AttentionCase& c, const std::vector<int32_t>& first_key) {
  for (size_t i = 0; i < first_key.size(); ++i)
    if (first_key[i] != static_cast<int32_t>(i) % c.t) return c.t == 1 || c.window == 1;
  return !first_key.empty() || c.t == 1 || c.window == 1;
}

void check(const Results& got, const Results& expected, const AttentionCase& c, int64_t d,
           const std::vector<int32_t>& first_key = {}) {
  CHECK(relative_error(got.o, expected.o) <= forward_tolerance());
  CHECK(relative_error(got.lse, expected.lse) <= 64 * real_epsilon());
  CHECK(relative_error(got.dv, expected.dv) <= backward_tolerance(c));
  if (!single_key(c, first_key)) {
    CHECK(relative_error(got.dq, expected.dq) <= backward_tolerance(c));
    CHECK(relative_error(got.dk, expected.dk) <= backward_tolerance(c));
    return;
  }
  // With a single key, ds = dp - delta is 0 except for the order of two sums of d terms.
  const auto vanishes = [&](const std::vector<double>& gradient) {
    for (const double g : gradient)
      if (!(std::abs(g) <= 16.0 * static_cast<double>(d) * real_epsilon())) return false;
    return true;
  };
  CHECK(vanishes(got.dq));
  CHECK(vanishes(got.dk));
}

void check_case(const AttentionCase& c, int64_t d) {
  CAPTURE(c.b, c.t, c.h, c.k, c.window, d);
  const Inputs in(c, d);
  for (const Positions positions : {Positions::None, Positions::Rotary}) {
    CAPTURE(positions == Positions::Rotary);
    const Results expected = run(oracle_f64(), c, d, in, positions);
    check(run(backend(), c, d, in, positions), expected, c, d);
    if (on_cuda()) check(run(backend(), c, d, in, positions, kNoDs), expected, c, d);
  }
}

// First keys of documents whose lengths take turns. Each sequence begins with another length.
std::vector<int32_t> documents(const AttentionCase& c, const std::vector<int64_t>& lengths) {
  std::vector<int32_t> first_key;
  for (int64_t b = 0; b < c.b; ++b) {
    size_t document = static_cast<size_t>(b);
    int64_t begin = 0;
    for (int64_t t = 0; t < c.t; ++t) {
      if (t == begin + lengths[document % lengths.size()]) {
        begin = t;
        ++document;
      }
      first_key.push_back(static_cast<int32_t>(begin));
    }
  }
  return first_key;
}

// Documents of one token, ends within and between tiles of 16 to 128 rows, documents longer than a
// tile, and one document alone.
void check_documents(const AttentionCase& c, int64_t d) {
  const Inputs in(c, d);
  for (const std::vector<int64_t>& lengths :
       {std::vector<int64_t>{1}, {5, 1, 40, 17}, {64}, {150, 3}, {c.t}}) {
    CAPTURE(c.b, c.t, c.h, c.k, c.window, d, lengths);
    const std::vector<int32_t> first_key = documents(c, lengths);
    const auto within = [&](Backend& b, int64_t ds_bytes) {
      return run(b, c, d, in, Positions::Rotary, ds_bytes, 1, first_key);
    };
    const Results expected = within(oracle_f64(), kNoDs);
    check(within(backend(), AttentionSpec().ds_bytes), expected, c, d, first_key);
    if (on_cuda()) check(within(backend(), kNoDs), expected, c, d, first_key);
  }
}

}  // namespace

TEST_CASE("attention and its gradients, head size 64", "[attention]") {
  for (const AttentionCase& c : kCases) check_case(c, 64);
}

TEST_CASE("attention and its gradients, head size 96", "[attention]") {
  for (const AttentionCase& c : kCases) check_case(c, 96);
}

TEST_CASE("attention and its gradients, head size 128", "[attention]") {
  for (const AttentionCase& c : kCases) check_case(c, 128);
}

// GPU kernels are compiled for head sizes 64, 96, 128, 192 and 256. Other multiples of 8 are padded
// to these. If a size is 8 more than a multiple of 16, a pair's two columns are in two lanes.
TEST_CASE("attention and its gradients, every kind of head size", "[attention]") {
  const AttentionCase cases[] = {
      {2, 1, 4, 2, 0}, {1, 31, 3, 1, 0}, {1, 33, 2, 2, 17}, {1, 130, 4, 2, 0}};
  for (const int64_t d : {8,   16,  32,  40,  48,  56,  64,  72,  80,  88, 96,
                          104, 112, 120, 128, 136, 160, 192, 200, 224, 256})
    for (const AttentionCase& c : cases) check_case(c, d);
}

// 12 x 11 kv heads: on a GPU of up to 132 SMs each block of keys sums over its query heads itself.
TEST_CASE("attention over many heads with padded sizes", "[attention]") {
  if (!needs_cuda()) return;
  for (const int64_t d : {40, 80, 104, 160, 200, 256}) check_case({12, 129, 22, 11, 100}, d);
}

TEST_CASE("attention over 2048 positions, and over enough heads to fill a GPU", "[attention]") {
  if (!needs_cuda()) return;
  check_case({1, 2048, 2, 1, 0}, 64);
  check_case({1, 2048, 2, 1, 0}, 128);
  check_case({1, 2048, 2, 1, 500}, 64);
  check_case({1, 1000, 3, 1, 300}, 96);
  check_case({3, 577, 6, 3, 129}, 128);
  // 2 x 12 x 11 blocks of keys: each sums over its query heads itself.
  check_case({12, 129, 22, 11, 0}, 64);
}

// More kv heads than the scratch memory for ds can hold at a time on a GPU of up to 160 SMs.
TEST_CASE("attention over so many heads that their scores' gradients share memory", "[attention]") {
  if (!needs_cuda()) return;
  check_case({25, 130, 10, 10, 0}, 64);
  check_case({25, 130, 20, 10, 100}, 64);
  check_case({25, 130, 10, 10, 0}, 96);
  check_case({25, 130, 10, 10, 0}, 128);
  check_case({8, 600, 13, 13, 0}, 64);
}

TEST_CASE("attention within documents, and its gradients", "[attention]") {
  for (const AttentionCase& c : kCases) check_documents(c, 64);
}

TEST_CASE("attention within documents, other head sizes and larger shapes", "[attention]") {
  if (!needs_cuda()) return;
  for (const int64_t d : {96, 128})
    for (const AttentionCase& c : kCases) check_documents(c, d);
  for (const int64_t d : {8, 40, 80, 104, 136, 160, 192, 200, 256}) {
    check_documents({2, 130, 4, 2, 0}, d);
    check_documents({1, 300, 3, 1, 100}, d);
  }
  for (const int64_t d : {40, 160, 256}) check_documents({12, 129, 22, 11, 100}, d);
  for (const int64_t d : {64, 96, 128}) {
    check_documents({1, 2048, 2, 1, 0}, d);
    check_documents({3, 577, 6, 3, 129}, d);
    check_documents({12, 129, 22, 11, 0}, d);
    check_documents({25, 130, 10, 10, 0}, d);  // ds of a part of the heads at a time
  }
  check_documents({8, 600, 13, 13, 0}, 64);
}

TEST_CASE("attention with one document is attention", "[attention]") {
  const AttentionCase c{2, 200, 4, 2, 0};
  for (const int64_t d : {64, 96, 128, 160}) {
    const Inputs in(c, d);
    const Results plain = run(backend(), c, d, in);
    const Results one =
        run(backend(), c, d, in, Positions::None, AttentionSpec().ds_bytes, 1, documents(c, {c.t}));
    // Two kernels on a GPU, which a compiler may round differently.
    CHECK(relative_error(one.o, plain.o) <= act_epsilon());
    CHECK(relative_error(one.lse, plain.lse) <= 64 * real_epsilon());
    CHECK(relative_error(one.dq, plain.dq) <= act_epsilon());
    CHECK(relative_error(one.dk, plain.dk) <= act_epsilon());
    CHECK(relative_error(one.dv, plain.dv) <= act_epsilon());
  }
}

// Keys and values of another document may hold anything.
TEST_CASE("attention within documents does not add what it does not see", "[attention]") {
  const AttentionCase c{1, 300, 4, 2, 0};
  const int64_t begin = 131;  // of the second document
  for (const int64_t d : {64, 128, 160}) {
    Inputs in(c, d);
    const std::vector<int32_t> first_key = documents(c, {begin, c.t});
    const auto within = [&] {
      return run(backend(), c, d, in, Positions::None, AttentionSpec().ds_bytes, 1, first_key);
    };
    const Results before = within();
    for (size_t i = 0; i < static_cast<size_t>(begin * c.k * d); ++i) {
      in.k[i] = 8 * in.k[i];  // larger scores than any that the second document sees
      in.v[i] = -2 * in.v[i];
    }
    const Results after = within();
    const auto second = [&](const std::vector<double>& rows, int64_t heads) {
      return std::vector<double>(rows.begin() + begin * heads * d, rows.end());
    };
    CHECK(second(after.o, c.h) == second(before.o, c.h));
    CHECK(second(after.dq, c.h) == second(before.dq, c.h));
    CHECK(second(after.dk, c.k) == second(before.dk, c.k));
    CHECK(second(after.dv, c.k) == second(before.dv, c.k));
    CHECK(after.o != before.o);
  }
}

TEST_CASE("attention gives the same bytes twice", "[attention]") {
  for (const AttentionCase& c : {AttentionCase{2, 200, 4, 2, 0}, AttentionCase{1, 300, 9, 3, 17},
                                 AttentionCase{25, 130, 10, 10, 0}}) {
    const Inputs in(c, 64);
    for (const Positions positions : {Positions::None, Positions::Rotary}) {
      const Results first = run(backend(), c, 64, in, positions);
      const Results second = run(backend(), c, 64, in, positions);
      CHECK(first.o == second.o);
      CHECK(first.lse == second.lse);
      CHECK(first.dq == second.dq);
      CHECK(first.dk == second.dk);
      CHECK(first.dv == second.dv);
      const Results again = run(backend(), c, 64, in, positions, kNoDs);
      CHECK(again.dk == first.dk);
      CHECK(again.dv == first.dv);
      CHECK(again.dq == run(backend(), c, 64, in, positions, kNoDs).dq);
    }
  }
}

// With -DBBB_STRESS=ON, the Hopper kernels' copying and computing threads and their queue pause at
// random points. Steps that are in order only by luck then go out of order.
TEST_CASE("attention gives the same bytes whichever threads are delayed", "[attention][stress]") {
  if (!needs_cuda()) return;
#ifdef BBB_STRESS
  constexpr int kRuns = 100;
#else
  constexpr int kRuns = 3;
#endif
  struct StressCase {
    AttentionCase shape;
    int64_t d;
  };
  // One work item and several, windows, sums over grouped heads, items that share the memory of ds.
  for (const auto& [c, d] :
       {StressCase{{2, 200, 4, 2, 0}, 64}, StressCase{{2, 200, 4, 2, 0}, 96},
        StressCase{{2, 200, 4, 2, 0}, 128}, StressCase{{3, 577, 6, 3, 129}, 128},
        StressCase{{12, 129, 22, 11, 0}, 64}, StressCase{{25, 130, 10, 10, 0}, 64}})
    for (const int64_t ds_bytes : {AttentionSpec().ds_bytes, kNoDs}) {
      CAPTURE(c.b, c.t, c.h, c.k, c.window, d, ds_bytes);
      const Inputs in(c, d);
      const Results first = run(backend(), c, d, in, Positions::Rotary, ds_bytes);
      check(first, run(oracle_f64(), c, d, in, Positions::Rotary), c, d);
      for (int again = 1; again < kRuns; ++again) {
        const Results other = run(backend(), c, d, in, Positions::Rotary, ds_bytes);
        REQUIRE(other.o == first.o);
        REQUIRE(other.lse == first.lse);
        REQUIRE(other.dq == first.dq);
        REQUIRE(other.dk == first.dk);
        REQUIRE(other.dv == first.dv);
      }
    }
}

TEST_CASE("attention of rotated q and k: dq and dk are rotated back and scaled, dv is not",
          "[attention]") {
  Backend& cpu = oracle_f64();
  struct RotatedCase {
    AttentionCase shape;
    double factor;
  };
  for (const auto& [c, factor] :
       {RotatedCase{{2, 65, 4, 2, 0}, 1.0}, RotatedCase{{2, 65, 4, 2, 0}, 1.25},
        RotatedCase{{1, 33, 9, 3, 17}, 1.0}, RotatedCase{{1, 200, 9, 3, 17}, 1.25}})
    for (const int64_t d : {40, 64, 96, 104, 128, 160, 256}) {
      CAPTURE(c.t, d, factor);
      const Inputs in(c, d);
      const auto run_rotated = [&](Backend& b) {
        return run(b, c, d, in, Positions::Rotary, AttentionSpec().ds_bytes, factor);
      };
      const Results plain = run(backend(), c, d, in);
      const Results rotated = run_rotated(backend());
      CHECK(rotated.dv == plain.dv);
      const auto rotated_back = [&](const std::vector<double>& gradient, int64_t heads) {
        const Tensor x = make(cpu, {c.b, c.t, heads, d}, DType::F64, gradient);
        cpu.rope(x, frequencies(cpu, d), Tensor(), engine::Rotation::Inverse, factor);
        return values_of(cpu, x);
      };
      // Each side is rounded once, and so are the angles.
      const double tolerance = act_epsilon() + real_epsilon() * (4 + static_cast<double>(c.t));
      CHECK(relative_error(rotated.dq, rotated_back(plain.dq, c.h)) <= tolerance);
      CHECK(relative_error(rotated.dk, rotated_back(plain.dk, c.k)) <= tolerance);
      CHECK(relative_error(rotated.dq, plain.dq) > 0.1);
      CHECK(relative_error(rotated.dk, plain.dk) > 0.1);
      const Results exact = run(cpu, c, d, in), exact_rotated = run_rotated(cpu);
      const double rounding = 4 * epsilon_of(DType::F64);
      CHECK(relative_error(exact_rotated.dq, rotated_back(exact.dq, c.h)) <= rounding);
      CHECK(relative_error(exact_rotated.dk, rotated_back(exact.dk, c.k)) <= rounding);
    }
}

TEST_CASE("attention does not read later keys and values", "[attention]") {
  const AttentionCase c{1, 200, 4, 2, 0};
  const int64_t d = 64, seen = 70;
  Inputs in(c, d);
  const Results before = run(backend(), c, d, in);
  for (size_t i = static_cast<size_t>(seen * c.k * d); i < in.k.size(); ++i) {
    in.k[i] = -in.k[i];
    in.v[i] = 2 * in.v[i];
  }
  const Results after = run(backend(), c, d, in);
  const auto head = [&](const std::vector<double>& o) {
    return std::vector<double>(o.begin(), o.begin() + seen * c.h * d);
  };
  CHECK(relative_error(head(after.o), head(before.o)) <= 64 * real_epsilon());
  CHECK(relative_error(after.o, before.o) > 0.1);
}

TEST_CASE("attention of scores that saturate the softmax", "[attention]") {
  // Scores of several hundred: exp would overflow if the row maximum were not subtracted. A score's
  // absolute error is its size times an FP32 epsilon; it becomes a relative error of p.
  const AttentionCase c{1, 130, 2, 1, 0};
  for (const int64_t d : {64, 128}) {
    const Inputs in(c, d, 8.0);
    const Results got = run(backend(), c, d, in), expected = run(oracle_f64(), c, d, in);
    CHECK(relative_error(got.o, expected.o) <= forward_tolerance() + 1024 * real_epsilon());
    CHECK(relative_error(got.lse, expected.lse) <= 64 * real_epsilon());
    for (const double g : got.dk) REQUIRE(std::isfinite(g));
  }
}

TEST_CASE("a model with an unsupported head size is refused before it is loaded", "[attention]") {
  for (const int64_t d : {2, 20, 60, 100, 264, 512}) {
    CAPTURE(d);
    models::LlamaConfig config = tiny_config();
    config.head_dim = d;
    const auto source = models::make_synthetic_checkpoint(config, "tiny");
    const auto make_model = [&] { models::Llama(backend(), *source, models::HeadRounding::None); };
    if (on_cuda())
      CHECK_THROWS_WITH(make_model(), Catch::Contains(cat("not ", d, " ")));
    else
      CHECK_NOTHROW(make_model());
  }
}

}  // namespace bbb::tests
