// mse, cross_entropy, kl_divergence, jensen_shannon and sum against the F64 oracle.
#include <catch2/catch.hpp>
#include <limits>
#include <optional>

#include "tests/op_test.h"

namespace bbb::tests {
namespace {

using engine::Write;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

struct LossAndGradient {
  std::vector<double> loss, gradient;
};

LossAndGradient run_mse(Backend& b, const std::vector<double>& x, const std::vector<double>& y,
                        bool with_gradient = true) {
  const Shape shape{static_cast<int64_t>(x.size())};
  const Guarded loss(b, {1}, b.real()), dx(b, shape, b.act());
  b.zero(dx.tensor());
  b.mse(loss.tensor(), with_gradient ? dx.tensor() : Tensor(), make(b, shape, b.act(), x),
        make(b, shape, b.act(), y));
  CHECK(loss.untouched());
  CHECK(dx.untouched());
  return {values_of(b, loss.tensor()), values_of(b, dx.tensor())};
}

struct LogitCase {
  int64_t m, v;
};
// Vocabularies: smaller than a warp, narrow, wide, and wider than one step of a thread block.
const LogitCase kLogitCases[] = {{1, 1}, {5, 31}, {4, 33}, {7, 1000}, {2, 49152}, {2, 10001}};

// A target for every row but the second.
std::vector<int32_t> targets_of(const LogitCase& c, engine::Rng& rng) {
  std::vector<int32_t> targets(static_cast<size_t>(c.m));
  for (int32_t& t : targets) t = static_cast<int32_t>(rng.below(c.v));
  targets.front() = static_cast<int32_t>(c.v - 1);
  if (c.m > 1) targets[1] = -1;
  return targets;
}

// The device under test takes logits in `dtype`; the oracle has only one dtype.
LossAndGradient run_cross_entropy(Backend& b, const LogitCase& c, DType dtype,
                                  const std::vector<double>& logits,
                                  const std::vector<int32_t>& targets, double scale,
                                  bool with_gradient = true) {
  const Guarded loss(b, {c.m}, b.real()), dlogits(b, {c.m, c.v}, b.act());
  b.zero(dlogits.tensor());
  b.cross_entropy(loss.tensor(), with_gradient ? dlogits.tensor() : Tensor(),
                  make(b, {c.m, c.v}, dtype, logits), make_ids(b, {c.m}, targets), scale);
  CHECK(loss.untouched());
  CHECK(dlogits.untouched());
  return {values_of(b, loss.tensor()), values_of(b, dlogits.tensor())};
}

// Empty: kl_divergence. Otherwise jensen_shannon with this beta.
using Beta = std::optional<double>;
const Beta kKl;
const Beta kDivergences[] = {kKl, 0.25};

LossAndGradient run_divergence(Backend& b, const Beta& beta, const LogitCase& c, DType dtype,
                               const std::vector<double>& logits,
                               const std::vector<double>& teacher,
                               const std::vector<int32_t>& targets, double scale,
                               bool with_gradient = true) {
  const Guarded loss(b, {c.m}, b.real()), dlogits(b, {c.m, c.v}, b.act());
  b.zero(dlogits.tensor());
  const Tensor gradient = with_gradient ? dlogits.tensor() : Tensor();
  const Tensor x = make(b, {c.m, c.v}, dtype, logits), y = make(b, {c.m, c.v}, dtype, teacher);
  const Tensor ids = make_ids(b, {c.m}, targets);
  if (beta)
    b.jensen_shannon(loss.tensor(), gradient, x, y, ids, *beta, scale);
  else
    b.kl_divergence(loss.tensor(), gradient, x, y, ids, scale);
  CHECK(loss.untouched());
  CHECK(dlogits.untouched());
  return {values_of(b, loss.tensor()), values_of(b, dlogits.tensor())};
}

// Words [first, first + n) of every row.
std::vector<double> words_of(const std::vector<double>& logits, const LogitCase& c, int64_t first,
                             int64_t n) {
  std::vector<double> words;
  for (int64_t m = 0; m < c.m; ++m) {
    const auto row = logits.begin() + m * c.v + first;
    words.insert(words.end(), row, row + n);
  }
  return words;
}

enum class ChunkOrder { FirstToLast, LastToFirst };

// The loss from chunks of `chunk` words: cross-entropy if there is no teacher, otherwise that of
// `beta`. The gradient overwrites the logits if they have its dtype.
LossAndGradient run_chunks(Backend& b, const LogitCase& c, DType dtype,
                           const std::vector<double>& logits, const std::vector<double>& teacher,
                           const std::vector<int32_t>& targets, double scale, int64_t chunk,
                           ChunkOrder order = ChunkOrder::FirstToLast, const Beta& beta = kKl) {
  const bool kl = !teacher.empty();
  const Guarded loss(b, {c.m}, b.real()), student_kl(b, {c.m}, b.real());
  const Guarded state(b, {c.m, kl ? Backend::kKlState : Backend::kCrossEntropyState}, b.real());
  const Tensor ids = make_ids(b, {c.m}, targets);
  std::vector<int64_t> firsts;
  for (int64_t first = 0; first < c.v; first += chunk) firsts.push_back(first);
  if (order == ChunkOrder::LastToFirst) std::reverse(firsts.begin(), firsts.end());

  const auto words = [&](const std::vector<double>& values, int64_t first) {
    const int64_t n = std::min(chunk, c.v - first);
    return make(b, {c.m, n}, dtype, words_of(values, c, first, n));
  };
  const auto mode_of = [&](int64_t first) {
    return first == firsts[0] ? Write::Overwrite : Write::Add;
  };
  for (const int64_t first : firsts) {
    const Write mode = mode_of(first);
    if (kl)
      b.kl_divergence_chunk(loss.tensor(), state.tensor(), words(logits, first),
                            words(teacher, first), ids, mode);
    else
      b.cross_entropy_chunk(loss.tensor(), state.tensor(), words(logits, first), ids, first, mode);
  }
  if (beta)
    for (const int64_t first : firsts)
      b.jensen_shannon_chunk(loss.tensor(), student_kl.tensor(), words(logits, first),
                             words(teacher, first), state.tensor(), ids, *beta, mode_of(first));
  LossAndGradient result{values_of(b, loss.tensor()),
                         std::vector<double>(static_cast<size_t>(c.m * c.v))};
  for (const int64_t first : firsts) {
    const Tensor x = words(logits, first);
    const Guarded dlogits(b, x.shape(), b.act());
    if (dtype == b.act()) b.copy(dlogits.tensor(), x);
    const Tensor& in = dtype == b.act() ? dlogits.tensor() : x;
    if (beta)
      b.jensen_shannon_chunk_backward(dlogits.tensor(), in, words(teacher, first), state.tensor(),
                                      student_kl.tensor(), ids, *beta, scale);
    else if (kl)
      b.kl_divergence_chunk_backward(dlogits.tensor(), in, words(teacher, first), state.tensor(),
                                     ids, scale);
    else
      b.cross_entropy_chunk_backward(dlogits.tensor(), in, state.tensor(), ids, first, scale);
    CHECK(dlogits.untouched());
    const auto part = values_of(b, dlogits.tensor());
    for (int64_t m = 0; m < c.m; ++m)
      std::copy_n(part.begin() + m * x.dim(1), x.dim(1), result.gradient.begin() + m * c.v + first);
  }
  CHECK(loss.untouched());
  CHECK(student_kl.untouched());
  CHECK(state.untouched());
  return result;
}

struct ChunkCase {
  LogitCase logits;
  int64_t chunk;
};
// Chunks of one word, uneven last chunks, narrow and wide ones, wider than one step of a thread
// block, and wider than the vocabulary.
const ChunkCase kChunkCases[] = {{{1, 3}, 1},         {{5, 33}, 32},      {{7, 1000}, 384},
                                 {{3, 49152}, 16384}, {{3, 20001}, 8192}, {{4, 5000}, 1667},
                                 {{2, 1000}, 4096}};

std::vector<DType> logit_types() {
  if (backend().act() == backend().real()) return {backend().act()};
  return {backend().act(), backend().real()};
}

double run_sum(Backend& b, const std::vector<double>& x, double before, double scale, Write mode) {
  const Guarded out(b, {1}, b.real());
  b.copy(out.tensor(), make(b, {1}, b.real(), {before}));
  b.sum(out.tensor(), make(b, {static_cast<int64_t>(x.size())}, b.real(), x), scale, mode);
  CHECK(out.untouched());
  return values_of(b, out.tensor())[0];
}

}  // namespace

TEST_CASE("mse and its gradient", "[mse]") {
  // With the largest size, every thread block of the sum takes several steps.
  for (const int64_t n : {1, 31, 33, 1000, 300001, 2300000}) {
    CAPTURE(n);
    engine::Rng rng(23);
    const auto x = activations(rng, n), y = activations(rng, n);
    const auto got = run_mse(backend(), x, y), want = run_mse(oracle_f64(), x, y);
    // The loss sums positive terms, a few hundred per accumulator.
    CHECK(relative_error(got.loss, want.loss) <= 64 * real_epsilon());
    CHECK(relative_error(got.gradient, want.gradient) <= act_epsilon() + 4 * real_epsilon());
    if (n < 1000000) CHECK(run_mse(backend(), x, y, false).loss == got.loss);
  }
}

namespace {

// The elements [offset, ...) of a buffer. An offset of 1 breaks the alignment that wide loads need.
Tensor at_offset(Backend& b, int64_t offset, const Shape& shape, engine::Rng& rng) {
  const int64_t n = engine::numel_of(shape);
  return make(b, {n + offset}, b.act(), activations(rng, n + offset)).slice(offset, n).view(shape);
}

// Checks `count` rows of `row` elements, the second batch of an order, against a copy of these
// rows.
void check_mse_of_rows(Backend& b, int64_t count, int64_t row, int64_t x_offset, int64_t y_offset) {
  engine::Rng rng(47);
  const int64_t rows = 2 * count + 1;
  const Tensor x = at_offset(b, x_offset, {count, row}, rng);
  const engine::Rows y(at_offset(b, y_offset, {rows, row}, rng),
                       make_ids(b, {rows}, rng.permutation(rows)), make_ids(b, {1}, {1}));
  const Tensor gathered = b.empty({count, row}, b.act());
  b.gather_rows(gathered, y);
  const auto loss_of = [&](const Tensor& dx, const engine::Rows& target) {
    const Guarded loss(b, {1}, b.real());
    b.mse(loss.tensor(), dx, x, target);
    CHECK(loss.untouched());
    return values_of(b, loss.tensor());
  };
  const Guarded got(b, {count, row}, b.act()), want(b, {count, row}, b.act());
  const auto loss = loss_of(want.tensor(), gathered);
  CHECK(loss_of(got.tensor(), y) == loss);
  CHECK(loss_of(Tensor(), y) == loss);
  CHECK(got.untouched());
  CHECK(values_of(b, got.tensor()) == values_of(b, want.tensor()));
}

}  // namespace

TEST_CASE("mse of rows in an order equals mse of gathered rows, byte for byte", "[mse]") {
  struct Case {
    int64_t count, row;
  };
  // Rows of one element, of whole pieces, and of neither; rows much shorter than one step of the
  // sum, and longer ones. Rows end inside a thread's range and at its end.
  for (const Case& c : {Case{3, 1}, Case{40, 5}, Case{11, 24}, Case{3, 1001}, Case{4, 32768},
                        Case{100000, 24}, Case{9, 40003}, Case{3, 800000}})
    for (const int64_t x_offset : {0, 1})
      for (const int64_t y_offset : {0, 1}) {
        CAPTURE(c.count, c.row, x_offset, y_offset);
        check_mse_of_rows(backend(), c.count, c.row, x_offset, y_offset);
      }
  check_mse_of_rows(oracle_f64(), 3, 40003, 0, 0);
}

TEST_CASE("mse of equal tensors is 0, and NaN and Inf propagate", "[mse]") {
  std::vector<double> x(100, 0.5), y = x;
  CHECK(run_mse(backend(), x, y).loss[0] == 0.0);
  y[70] = kInf;
  CHECK(run_mse(backend(), x, y).loss[0] == kInf);
  y[70] = kNan;
  const auto got = run_mse(backend(), x, y);
  CHECK(std::isnan(got.loss[0]));
  for (size_t i = 0; i < x.size(); ++i) CHECK(std::isnan(got.gradient[i]) == (i == 70));
}

TEST_CASE("cross_entropy and its gradient", "[cross_entropy]") {
  for (const LogitCase& c : kLogitCases)
    for (const DType dtype : logit_types()) {
      CAPTURE(c.m, c.v, engine::name_of(dtype));
      engine::Rng rng(29);
      const auto logits = activations(rng, c.m * c.v, 4.0);
      const auto targets = targets_of(c, rng);
      const auto got = run_cross_entropy(backend(), c, dtype, logits, targets, 0.125);
      const auto want = run_cross_entropy(oracle_f64(), c, DType::F64, logits, targets, 0.125);
      // A difference of numbers up to the largest logit (about 20), plus the error of a logarithm.
      for (size_t i = 0; i < want.loss.size(); ++i)
        CHECK(std::abs(got.loss[i] - want.loss[i]) <= 64 * real_epsilon());
      if (c.v > 1)
        CHECK(relative_error(got.gradient, want.gradient) <= act_epsilon() + 64 * real_epsilon());
      CHECK(run_cross_entropy(backend(), c, dtype, logits, targets, 0.125, false).loss == got.loss);
      if (c.m > 1) {
        CHECK(got.loss[1] == 0.0);
        for (int64_t i = c.v; i < 2 * c.v; ++i) CHECK(got.gradient[static_cast<size_t>(i)] == 0.0);
      }
    }
}

TEST_CASE("cross_entropy may write the gradient over the logits", "[cross_entropy]") {
  Backend& b = backend();
  for (const LogitCase c : {LogitCase{3, 33}, LogitCase{3, 4096}}) {
    engine::Rng rng(31);
    const auto values = activations(rng, c.m * c.v, 4.0);
    const auto targets = targets_of(c, rng);
    const auto want = run_cross_entropy(b, c, b.act(), values, targets, 1.0);
    const Tensor logits = make(b, {c.m, c.v}, b.act(), values), loss = b.empty({c.m}, b.real());
    b.cross_entropy(loss, logits, logits, make_ids(b, {c.m}, targets), 1.0);
    CHECK(values_of(b, loss) == want.loss);
    CHECK(values_of(b, logits) == want.gradient);
  }
}

TEST_CASE("cross_entropy of extreme logits", "[cross_entropy]") {
  const LogitCase c{4, 40};
  std::vector<double> logits(static_cast<size_t>(c.m * c.v), 0.0);
  const auto row = [&](int64_t m) { return logits.begin() + m * c.v; };
  std::fill(row(0) + 1, row(1), -kInf);  // one word is possible
  row(1)[3] = 1e4;                       // e^x overflows without the maximum
  row(2)[5] = kNan;
  const auto got = run_cross_entropy(backend(), c, backend().real(), logits, {0, 3, 0, 7}, 1.0);
  CHECK(got.loss[0] == 0.0);
  CHECK(got.loss[1] == 0.0);
  CHECK(std::isnan(got.loss[2]));
  CHECK(got.loss[3] == Approx(std::log(40.0)).epsilon(1e-6));
  for (int64_t i = 0; i < c.m * c.v; ++i)
    if (i / c.v != 2) CHECK(std::isfinite(got.gradient[static_cast<size_t>(i)]));
}

TEST_CASE("kl_divergence and jensen_shannon, and their gradients",
          "[kl_divergence][jensen_shannon]") {
  for (const Beta& beta : kDivergences)
    for (const LogitCase& c : kLogitCases)
      for (const DType dtype : logit_types()) {
        CAPTURE(beta.value_or(0), c.m, c.v, engine::name_of(dtype));
        engine::Rng rng(37);
        const auto logits = activations(rng, c.m * c.v, 3.0);
        const auto teacher = activations(rng, c.m * c.v, 3.0);
        const auto targets = targets_of(c, rng);
        const auto run = [&](Backend& b, DType type, bool with_gradient) {
          return run_divergence(b, beta, c, type, logits, teacher, targets, 0.5, with_gradient);
        };
        const auto got = run(backend(), dtype, true), want = run(oracle_f64(), DType::F64, true);
        // Differences of log probabilities up to about 30, averaged with weights that sum to 1.
        for (size_t i = 0; i < want.loss.size(); ++i)
          CHECK(std::abs(got.loss[i] - want.loss[i]) <= 128 * real_epsilon());
        if (c.v > 1)
          CHECK(relative_error(got.gradient, want.gradient) <=
                act_epsilon() + 128 * real_epsilon());
        CHECK(run(backend(), dtype, false).loss == got.loss);
        if (c.m > 1) {
          CHECK(got.loss[1] == 0.0);
          for (int64_t i = c.v; i < 2 * c.v; ++i)
            CHECK(got.gradient[static_cast<size_t>(i)] == 0.0);
        }
      }
}

TEST_CASE("jensen_shannon: the value and gradient, written out", "[jensen_shannon]") {
  const LogitCase c{3, 1000};
  engine::Rng rng(71);
  const auto logits = activations(rng, c.m * c.v, 3.0), teacher = activations(rng, c.m * c.v, 3.0);
  for (const double beta : {0.1, 0.5, 0.9}) {
    CAPTURE(beta);
    std::vector<double> losses, gradient;
    for (int64_t m = 0; m < c.m; ++m) {
      const auto softmax = [&](const std::vector<double>& x) {
        std::vector<double> e;
        double sum = 0;
        for (int64_t i = m * c.v; i < (m + 1) * c.v; ++i)
          sum += e.emplace_back(std::exp(x[static_cast<size_t>(i)]));
        for (double& value : e) value /= sum;
        return e;
      };
      const auto p = softmax(teacher), q = softmax(logits);
      double kl_p = 0, kl_q = 0;
      const auto mixture = [&](size_t i) { return beta * p[i] + (1 - beta) * q[i]; };
      for (size_t i = 0; i < p.size(); ++i) {
        kl_p += p[i] * std::log(p[i] / mixture(i));
        kl_q += q[i] * std::log(q[i] / mixture(i));
      }
      losses.push_back(beta * kl_p + (1 - beta) * kl_q);
      for (size_t i = 0; i < p.size(); ++i)
        gradient.push_back(2 * (1 - beta) * q[i] * (std::log(q[i] / mixture(i)) - kl_q));
    }
    const auto exact =
        run_divergence(oracle_f64(), beta, c, DType::F64, logits, teacher, {0, 1, 2}, 2.0);
    CHECK(relative_error(exact.loss, losses) <= 1e-13);
    CHECK(relative_error(exact.gradient, gradient) <= 1e-13);
    const auto got =
        run_divergence(backend(), beta, c, backend().real(), logits, teacher, {0, 1, 2}, 2.0);
    CHECK(relative_error(got.loss, losses) <= 128 * real_epsilon());
    CHECK(relative_error(got.gradient, gradient) <= act_epsilon() + 128 * real_epsilon());
  }
}

TEST_CASE("jensen_shannon may write the gradient over the logits", "[jensen_shannon]") {
  Backend& b = backend();
  for (const LogitCase c : {LogitCase{3, 33}, LogitCase{3, 20000}}) {
    engine::Rng rng(73);
    const auto values = activations(rng, c.m * c.v, 3.0), other = activations(rng, c.m * c.v, 3.0);
    const auto targets = targets_of(c, rng);
    const auto want = run_divergence(b, 0.5, c, b.act(), values, other, targets, 1.0);
    const Tensor logits = make(b, {c.m, c.v}, b.act(), values), loss = b.empty({c.m}, b.real());
    b.jensen_shannon(loss, logits, logits, make(b, {c.m, c.v}, b.act(), other),
                     make_ids(b, {c.m}, targets), 0.5, 1.0);
    CHECK(values_of(b, loss) == want.loss);
    CHECK(values_of(b, logits) == want.gradient);
  }
}

TEST_CASE(
    "kl_divergence and jensen_shannon are 0 where student and teacher agree, and a NaN "
    "propagates",
    "[kl_divergence][jensen_shannon]") {
  const LogitCase c{3, 1000};
  engine::Rng rng(41);
  const auto teacher = activations(rng, c.m * c.v, 3.0);
  const std::vector<int32_t> targets{1, 2, 3};
  for (const Beta& beta : kDivergences) {
    CAPTURE(beta.value_or(0));
    const auto run = [&](const std::vector<double>& logits, const std::vector<double>& other) {
      return run_divergence(backend(), beta, c, backend().act(), logits, other, targets, 1.0);
    };
    const auto same = run(teacher, teacher);
    for (const double loss : same.loss) CHECK(std::abs(loss) <= 128 * real_epsilon());
    for (const double d : same.gradient) CHECK(std::abs(d) <= 64 * real_epsilon());
    for (const double bad : {kNan, kInf}) {
      auto broken = teacher;
      broken[1500] = bad;
      for (const auto& got : {run(broken, teacher), run(teacher, broken)}) {
        CHECK_FALSE(std::isnan(got.loss[0]));
        CHECK(std::isnan(got.loss[1]));
        CHECK(std::isnan(got.gradient[1500]));
        CHECK_FALSE(std::isnan(got.loss[2]));
        CHECK_FALSE(std::isnan(got.gradient[2500]));
      }
    }
  }
}

TEST_CASE("jensen_shannon is finite where student and teacher share no word", "[jensen_shannon]") {
  const LogitCase c{3, 4};
  // Impossible words; words that underflow; words that underflow only relative to each other.
  const std::vector<double> logits{0, -kInf, 0, -kInf, 0, -1e4, 0, -1e4, 0, -50, 0, -50};
  const std::vector<double> teacher{-kInf, 0, -kInf, 0, -1e4, 0, -1e4, 0, -50, 0, -50, 0};
  for (const double beta : {0.25, 0.5}) {
    const auto got =
        run_divergence(backend(), beta, c, backend().real(), logits, teacher, {0, 0, 0}, 1.0);
    const double entropy = -beta * std::log(beta) - (1 - beta) * std::log(1 - beta);
    for (const double loss : got.loss) CHECK(loss == Approx(entropy).epsilon(1e-6));
    for (const double d : got.gradient) CHECK(std::abs(d) <= 4 * real_epsilon());
  }
}

TEST_CASE("cross_entropy over chunks of the vocabulary", "[cross_entropy]") {
  for (const ChunkCase& chunks : kChunkCases)
    for (const DType dtype : logit_types()) {
      const LogitCase& c = chunks.logits;
      CAPTURE(c.m, c.v, chunks.chunk, engine::name_of(dtype));
      engine::Rng rng(53);
      const auto logits = activations(rng, c.m * c.v, 4.0);
      const auto targets = targets_of(c, rng);
      const auto want = run_cross_entropy(oracle_f64(), c, DType::F64, logits, targets, 0.125);
      for (const ChunkOrder order : {ChunkOrder::FirstToLast, ChunkOrder::LastToFirst}) {
        const auto got =
            run_chunks(backend(), c, dtype, logits, {}, targets, 0.125, chunks.chunk, order);
        // As for the whole vocabulary: chunks add a few roundings to the sum.
        for (size_t i = 0; i < want.loss.size(); ++i)
          CHECK(std::abs(got.loss[i] - want.loss[i]) <= 64 * real_epsilon());
        CHECK(relative_error(got.gradient, want.gradient) <= act_epsilon() + 64 * real_epsilon());
        if (c.m > 1) {
          CHECK(got.loss[1] == 0.0);
          for (int64_t i = c.v; i < 2 * c.v; ++i)
            CHECK(got.gradient[static_cast<size_t>(i)] == 0.0);
        }
        const auto again =
            run_chunks(backend(), c, dtype, logits, {}, targets, 0.125, chunks.chunk, order);
        CHECK(again.loss == got.loss);
        CHECK(again.gradient == got.gradient);
      }
    }
}

TEST_CASE("cross_entropy over chunks: extreme logits, and a target outside the vocabulary",
          "[cross_entropy]") {
  const LogitCase c{6, 40};
  std::vector<double> logits(static_cast<size_t>(c.m * c.v), 0.0);
  const auto row = [&](int64_t m) { return logits.begin() + m * c.v; };
  std::fill(row(0) + 1, row(1), -kInf);   // one word is possible, in the first chunk
  std::fill(row(1), row(1) + 39, -kInf);  // in the last
  row(2)[3] = 1e4;                        // e^x overflows without the maximum
  row(3)[37] = kNan;
  std::fill(row(5), row(5) + 16, -1e4);  // the first chunk underflows against the second
  const auto got =
      run_chunks(backend(), c, backend().real(), logits, {}, {0, 39, 3, 0, 40, 20}, 1.0, 16);
  CHECK(got.loss[0] == 0.0);
  CHECK(got.loss[1] == 0.0);
  CHECK(got.loss[2] == 0.0);
  CHECK(std::isnan(got.loss[3]));
  CHECK(got.loss[4] == kInf);
  CHECK(got.loss[5] == Approx(std::log(24.0)).epsilon(1e-6));
  for (int64_t i = 0; i < c.m * c.v; ++i)
    CHECK(std::isfinite(got.gradient[static_cast<size_t>(i)]) == (i / c.v != 3));
}

TEST_CASE("kl_divergence and jensen_shannon over chunks of the vocabulary",
          "[kl_divergence][jensen_shannon]") {
  for (const Beta& beta : kDivergences)
    for (const ChunkCase& chunks : kChunkCases)
      for (const DType dtype : logit_types()) {
        const LogitCase& c = chunks.logits;
        CAPTURE(beta.value_or(0), c.m, c.v, chunks.chunk, engine::name_of(dtype));
        engine::Rng rng(59);
        const auto logits = activations(rng, c.m * c.v, 3.0);
        const auto teacher = activations(rng, c.m * c.v, 3.0);
        const auto targets = targets_of(c, rng);
        const auto want =
            run_divergence(oracle_f64(), beta, c, DType::F64, logits, teacher, targets, 0.5);
        for (const ChunkOrder order : {ChunkOrder::FirstToLast, ChunkOrder::LastToFirst}) {
          const auto run = [&] {
            return run_chunks(backend(), c, dtype, logits, teacher, targets, 0.5, chunks.chunk,
                              order, beta);
          };
          const auto got = run();
          // As for the whole vocabulary.
          for (size_t i = 0; i < want.loss.size(); ++i)
            CHECK(std::abs(got.loss[i] - want.loss[i]) <= 128 * real_epsilon());
          CHECK(relative_error(got.gradient, want.gradient) <=
                act_epsilon() + 128 * real_epsilon());
          if (c.m > 1) {
            CHECK(got.loss[1] == 0.0);
            for (int64_t i = c.v; i < 2 * c.v; ++i)
              CHECK(got.gradient[static_cast<size_t>(i)] == 0.0);
          }
          const auto again = run();
          CHECK(again.loss == got.loss);
          CHECK(again.gradient == got.gradient);
        }
      }
}

TEST_CASE("kl_divergence over chunks where student and teacher agree, or nearly",
          "[kl_divergence]") {
  const LogitCase c{3, 20001};
  engine::Rng rng(61);
  const auto teacher = activations(rng, c.m * c.v, 3.0);
  const std::vector<int32_t> targets{1, 2, 3};
  const auto same = run_chunks(backend(), c, backend().act(), teacher, teacher, targets, 1.0, 8192);
  // Both sides take the same steps, but a compiler may contract them differently.
  for (const double loss : same.loss) CHECK(std::abs(loss) <= 4 * real_epsilon());
  for (const double d : same.gradient) CHECK(std::abs(d) <= 4 * real_epsilon());

  // The logits differ by a hundredth, and by a shift that changes no probability: the loss is half
  // the variance, 5e-5. The log of the ratio of sums has the error of two sums of positive terms,
  // some tens of roundings that mostly cancel. The mean of t - s has an error of its own size.
  for (const double shift : {0.0, 0.25, -16.0}) {
    CAPTURE(shift);
    std::vector<double> logits(teacher.size());
    for (size_t i = 0; i < logits.size(); ++i) {
      const double noise = static_cast<float>(1e-2 * rng.normal());
      logits[i] = static_cast<float>(teacher[i] + shift + noise);
    }
    const auto got =
        run_chunks(backend(), c, backend().real(), logits, teacher, targets, 1.0, 8192);
    const auto want =
        run_divergence(oracle_f64(), kKl, c, DType::F64, logits, teacher, targets, 1.0);
    for (size_t i = 0; i < want.loss.size(); ++i) {
      const double tolerance = 16 * (1 + std::abs(shift)) * real_epsilon();
      CHECK(want.loss[i] > tolerance);
      CHECK(std::abs(got.loss[i] - want.loss[i]) <= tolerance);
    }
  }
}

TEST_CASE("kl_divergence and jensen_shannon over chunks: impossible words, and a NaN",
          "[kl_divergence][jensen_shannon]") {
  const LogitCase c{6, 40};
  engine::Rng rng(67);
  auto logits = activations(rng, c.m * c.v, 3.0), teacher = activations(rng, c.m * c.v, 3.0);
  const auto at = [&](std::vector<double>& x, int64_t m) { return x.begin() + m * c.v; };
  std::fill(at(teacher, 0), at(teacher, 0) + 16, -kInf);     // an impossible chunk: for the teacher
  std::fill(at(logits, 1) + 16, at(logits, 1) + 32, -kInf);  // for the student
  std::fill(at(teacher, 2), at(teacher, 2) + 20, -kInf);     // for both
  std::fill(at(logits, 2), at(logits, 2) + 20, -kInf);
  logits[static_cast<size_t>(3 * c.v + 39)] = kNan;
  teacher[static_cast<size_t>(4 * c.v)] = kNan;
  // Possible at first; a later chunk makes it almost impossible for the teacher.
  at(logits, 5)[0] = -kInf;
  std::fill(at(teacher, 5), at(teacher, 5) + 16, -1e4);
  const std::vector<int32_t> targets(6, 0);
  const DType real = backend().real();
  for (const Beta& beta : kDivergences) {
    CAPTURE(beta.value_or(0));
    const auto got = run_chunks(backend(), c, real, logits, teacher, targets, 1.0, 16,
                                ChunkOrder::FirstToLast, beta);
    const auto want =
        run_divergence(oracle_f64(), beta, c, DType::F64, logits, teacher, targets, 1.0);
    for (const size_t i : {0, 2, 5}) {
      CHECK(std::isfinite(want.loss[i]));
      CHECK(got.loss[i] == Approx(want.loss[i]).epsilon(128 * real_epsilon()));
    }
    if (!beta) CHECK(want.loss[1] == kInf);
    CHECK(std::isfinite(want.loss[1]) == beta.has_value());
    CHECK(got.loss[1] == Approx(want.loss[1]).epsilon(128 * real_epsilon()));
    CHECK(std::isnan(got.loss[3]));
    CHECK(std::isnan(got.loss[4]));
    for (int64_t i = 0; i < c.m * c.v; ++i) {
      const auto at_i = static_cast<size_t>(i);
      CHECK(std::isnan(got.gradient[at_i]) == std::isnan(want.gradient[at_i]));
    }
  }
}

TEST_CASE("sum, scaled, written or added", "[sum]") {
  for (const int64_t n : {1, 31, 33, 5000, 1500000}) {
    CAPTURE(n);
    engine::Rng rng(43);
    const auto x = normal(rng, n);
    double magnitude = 0.0;
    for (const double v : x) magnitude += std::abs(v);
    for (const Write mode : {Write::Overwrite, Write::Add}) {
      const double got = run_sum(backend(), x, 2.5, -0.5, mode);
      const double want = run_sum(oracle_f64(), x, 2.5, -0.5, mode);
      // Relative to the sum of magnitudes, because terms of both signs cancel.
      CHECK(std::abs(got - want) <= 16 * real_epsilon() * (2.5 + 0.5 * magnitude));
      CHECK(run_sum(backend(), x, 2.5, -0.5, mode) == got);
    }
  }
  CHECK(run_sum(backend(), {1, 2, 3}, kNan, 1.0, Write::Overwrite) == 6.0);
}

}  // namespace bbb::tests
