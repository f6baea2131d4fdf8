// Autograd: every op against central differences in F64, then the device's backward against the
// CPU's.
//
// A check takes differences along random directions, so that one number tests every element of an
// input. With step 1e-5 and F64 the error of a difference is about 1e-10.
#include <catch2/catch.hpp>
#include <cmath>

#include "autograd/ops.h"
#include "autograd/optimizer.h"
#include "autograd/parameter.h"
#include "models/llama.h"
#include "tests/formats.h"
#include "tests/support.h"
#include "tests/tiny_model.h"

using namespace bbb;
using namespace bbb::tests;
using autograd::GradientPasses;
using autograd::HeadChunks;
using autograd::Tape;
using autograd::TapeMode;
using autograd::Var;
using engine::Rng;
using engine::Write;
using models::Recompute;

namespace {

constexpr double kRelative = 1e-7;
constexpr double kStep = 1e-5;

double dot(const std::vector<double>& a, const std::vector<double>& b) {
  REQUIRE(a.size() == b.size());
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

double norm(const std::vector<double>& a) { return std::sqrt(dot(a, a)); }

struct Input {
  Shape shape;
  std::vector<double> values;
};

Input random_input(Rng& rng, const Shape& shape, double scale = 1.0) {
  return {shape, normal(rng, engine::numel_of(shape), scale)};
}

using Build = std::function<Var(Tape&, const std::vector<Var>&)>;

// Compares d(weights . y) / d(input) along a random direction, for every input. A loss has one
// element and takes no weights.
void check_gradients(const std::vector<Input>& inputs, const Build& build, bool is_loss = false) {
  Backend& cpu = oracle_f64();
  Rng rng(7);
  std::vector<double> weights;
  const auto value = [&](const std::vector<Input>& at) {
    std::vector<Var> vars;
    for (const Input& input : at)
      vars.emplace_back(make(cpu, input.shape, DType::F64, input.values));
    Tape tape(cpu, TapeMode::Inference);
    const std::vector<double> y = values_of(cpu, build(tape, vars).value());
    if (weights.empty()) weights = is_loss ? std::vector<double>{1} : normal(rng, y.size());
    return dot(y, weights);
  };
  value(inputs);

  std::vector<Var> vars;
  for (const Input& input : inputs)
    vars.push_back(Var::input(make(cpu, input.shape, DType::F64, input.values)));
  Tape tape(cpu, TapeMode::Training);
  const Var y = build(tape, vars);
  tape.backward(y, is_loss ? Tensor() : make(cpu, y.value().shape(), DType::F64, weights));

  for (size_t i = 0; i < inputs.size(); ++i) {
    CAPTURE(i);
    REQUIRE(vars[i].has_grad());
    const std::vector<double> gradient = values_of(cpu, vars[i].grad());
    const std::vector<double> direction = normal(rng, gradient.size());
    std::vector<Input> forth = inputs, back = inputs;
    for (size_t j = 0; j < direction.size(); ++j) {
      forth[i].values[j] += kStep * direction[j];
      back[i].values[j] -= kStep * direction[j];
    }
    const double difference = (value(forth) - value(back)) / (2 * kStep);
    REQUIRE(norm(gradient) > 0);
    CHECK(std::abs(difference - dot(gradient, direction)) <= kRelative * norm(gradient));
  }
}

}  // namespace

TEST_CASE("linear: gradients of x, w and the residual", "[autograd]") {
  Rng rng(1);
  check_gradients(
      {random_input(rng, {2, 3, 5}), random_input(rng, {4, 5}), random_input(rng, {2, 3, 4})},
      [&](Tape& tape, const std::vector<Var>& in) {
        return linear(tape, in[0], in[1], Tensor(), in[2]);
      });
  check_gradients({random_input(rng, {3, 5})}, [&](Tape& tape, const std::vector<Var>& in) {
    Rng fixed(2);
    const Tensor w = make(oracle_f64(), {4, 5}, DType::F64, normal(fixed, 20));
    const Tensor a = make(oracle_f64(), {1}, DType::F64, {0.25});
    return linear(tape, in[0], Var(w), a, Var());
  });
}

TEST_CASE("linear: the gradient of w is taken with respect to alpha w", "[autograd]") {
  Backend& cpu = oracle_f64();
  Rng rng(3);
  const Tensor x = make(cpu, {3, 5}, DType::F64, normal(rng, 15));
  const std::vector<double> w = normal(rng, 20), seed = normal(rng, 12);
  std::vector<std::vector<double>> gradients;
  for (double alpha : {1.0, 0.25}) {
    const Var leaf = Var::input(make(cpu, {4, 5}, DType::F64, w));
    Tape tape(cpu, TapeMode::Training);
    const Var y = linear(tape, Var(x), leaf, make(cpu, {1}, DType::F64, {alpha}), Var());
    tape.backward(y, make(cpu, {3, 4}, DType::F64, seed));
    gradients.push_back(values_of(cpu, leaf.grad()));
  }
  CHECK(gradients[0] == gradients[1]);
}

TEST_CASE("linear: one x feeds two products and a residual", "[autograd]") {
  Rng rng(4);
  check_gradients({random_input(rng, {3, 4}), random_input(rng, {4, 4}), random_input(rng, {4, 4})},
                  [](Tape& tape, const std::vector<Var>& in) {
                    const Var a = linear(tape, in[0], in[1], Tensor(), in[0]);
                    return linear(tape, in[0], in[2], Tensor(), a);
                  });
}

TEST_CASE("rms_norm, swiglu, add, reshape: gradients", "[autograd]") {
  Rng rng(5);
  check_gradients(
      {random_input(rng, {2, 3, 8}), random_input(rng, {8})},
      [](Tape& tape, const std::vector<Var>& in) { return rms_norm(tape, in[0], in[1], 1e-5); });
  check_gradients(
      {random_input(rng, {3, 8}), random_input(rng, {3, 8})},
      [](Tape& tape, const std::vector<Var>& in) { return swiglu(tape, in[0], in[1]); });
  check_gradients({random_input(rng, {3, 8}), random_input(rng, {3, 8})},
                  [](Tape& tape, const std::vector<Var>& in) {
                    const Var sum = add(tape, in[0], in[1]);
                    return reshape(tape, add(tape, sum, sum), {4, 6});
                  });
}

TEST_CASE("attention: gradients with grouped queries, a window and rotary positions",
          "[autograd]") {
  Rng rng(8);
  Backend& cpu = oracle_f64();
  const Tensor frequencies = make(cpu, {3}, DType::F32, {1.0, 0.25, 0.0625});
  for (const Tensor& inv_freq : {Tensor(), frequencies})
    for (int64_t window : {0, 3})
      check_gradients({random_input(rng, {2, 7, 4, 6}), random_input(rng, {2, 7, 2, 6}),
                       random_input(rng, {2, 7, 2, 6})},
                      [&](Tape& tape, const std::vector<Var>& in) {
                        // q and k are rotated in place, so copy them.
                        const auto copy = [&](const Var& x) {
                          return add(tape, x, Var(cpu.zeros(x.value().shape(), DType::F64)));
                        };
                        return attention(tape, copy(in[0]), copy(in[1]), in[2], inv_freq, {window});
                      });
}

constexpr autograd::LossKind kLossKinds[] = {
    autograd::LossKind::CrossEntropy, autograd::LossKind::Kl, autograd::LossKind::JensenShannon};

// A teacher (F64) of `rows` hidden states of width 6, with a head of its own of 11 words.
static autograd::TeacherHead teacher_of(autograd::LossKind kind, int64_t rows) {
  if (kind == autograd::LossKind::CrossEntropy) return {};
  Rng rng(16);
  Backend& cpu = oracle_f64();
  const auto drawn = [&](int64_t n) { return make(cpu, {n, 6}, DType::F64, normal(rng, n * 6)); };
  return {drawn(rows), drawn(11)};
}

TEST_CASE("losses: gradients, rows in chunks, rows without a target", "[autograd]") {
  Rng rng(9);
  const Input h = random_input(rng, {7, 6}), table = random_input(rng, {11, 6});
  const std::vector<double> other = normal(rng, 42);
  const std::vector<int32_t> ids = {3, -1, 0, 10, 5, -1, 2};
  check_gradients(
      {h},
      [&](Tape& tape, const std::vector<Var>& in) {
        return mse(tape, in[0], make(oracle_f64(), {7, 6}, DType::F64, other));
      },
      true);
  for (const autograd::LossKind kind : kLossKinds)
    for (const HeadChunks chunks :
         {HeadChunks{3, 11}, {100, 100}, {100, 4}, {3, 4}, {2, 1}})  // 11 words: 4, 4 and 3
      check_gradients(
          {h, table},
          [&](Tape& tape, const std::vector<Var>& in) {
            Backend& cpu = oracle_f64();
            return head_loss(tape, kind, in[0], in[1], make_ids(cpu, {7}, ids), teacher_of(kind, 7),
                             0.2, chunks, Tensor(), 0.3);
          },
          true);
}

TEST_CASE("embed: the gradient of a table, and of one that is the head, too", "[autograd]") {
  Rng rng(13);
  const Input table = random_input(rng, {11, 6});
  const std::vector<int32_t> ids = {3, 3, 0, 10, 5, 3, 0, 2}, targets = {3, 0, 10, -1, 3, 0, 2, 8};
  Backend& cpu = oracle_f64();
  const auto embedded = [&](Tape& tape, const Var& rows) {
    return reshape(tape, embed(tape, make_ids(cpu, {2, 4}, ids), rows), {8, 6});
  };
  check_gradients({table},
                  [&](Tape& tape, const std::vector<Var>& in) { return embedded(tape, in[0]); });
  for (const autograd::LossKind kind : kLossKinds)
    for (const HeadChunks chunks : {HeadChunks{100, 100}, {3, 11}, {3, 4}})
      check_gradients(
          {table},
          [&](Tape& tape, const std::vector<Var>& in) {
            return head_loss(tape, kind, embedded(tape, in[0]), in[0], make_ids(cpu, {8}, targets),
                             teacher_of(kind, 8), 0.2, chunks, Tensor());
          },
          true);
}

TEST_CASE("head_loss: a weight is a factor of both gradients, not of the value", "[autograd]") {
  Backend& cpu = oracle_f64();
  Rng rng(14);
  const Tensor h = make(cpu, {7, 6}, DType::F64, normal(rng, 42)),
               table = make(cpu, {11, 6}, DType::F64, normal(rng, 66)),
               targets = make_ids(cpu, {7}, {3, -1, 0, 10, 5, -1, 2});
  for (const HeadChunks chunks : {HeadChunks{100, 100}, {3, 11}, {3, 4}}) {
    std::vector<std::vector<double>> loss, dh, dtable;
    for (const Tensor& weight : {Tensor(), make(cpu, {1}, DType::F64, {0.25})}) {
      Tape tape(cpu, TapeMode::Training);
      const Var x = Var::input(h), head = Var::input(table);
      const Var out = head_loss(tape, autograd::LossKind::CrossEntropy, x, head, targets, {}, 0.2,
                                chunks, Tensor(), 0.5, weight);
      tape.backward(out);
      loss.push_back(values_of(cpu, out.value()));
      dh.push_back(values_of(cpu, x.grad()));
      dtable.push_back(values_of(cpu, head.grad()));
    }
    CHECK(loss[0] == loss[1]);
    for (auto* gradients : {&dh, &dtable}) {
      for (double& g : (*gradients)[0]) g *= 0.25;  // a power of two: exact
      CHECK((*gradients)[0] == (*gradients)[1]);
    }
  }
}

TEST_CASE("llama: gradients of embedding and head through the whole model", "[autograd]") {
  Backend& cpu = oracle_f64();
  models::LlamaConfig config = tiny_config();
  config.vocab = 19;
  const TempDir directory;
  write_tiny_model(directory.path(), config, 1);
  const auto source = models::open_checkpoint(directory.path());
  models::Llama model(cpu, *source, models::HeadRounding::None);
  model.load_blocks(*source);
  Rng rng(15);
  const Shape shape{config.vocab, config.d_model};
  const Input embedding = random_input(rng, shape), head = random_input(rng, shape, 0.1);
  const std::vector<int32_t> ids = random_tokens(3, 10, config.vocab),
                             targets = random_tokens(4, 10, config.vocab);
  for (const Recompute recompute : {Recompute::None, Recompute::Attention, Recompute::Block})
    for (const bool tied : {false, true})
      check_gradients(
          tied ? std::vector<Input>{head} : std::vector<Input>{embedding, head},
          [&](Tape& tape, const std::vector<Var>& in) {
            model.set_tables(in.front(), in.back());
            const Var h = model.forward(tape, make_ids(cpu, {2, 5}, ids), nullptr, recompute);
            return head_loss(tape, autograd::LossKind::CrossEntropy,
                             reshape(tape, h, {10, config.d_model}), model.head_var(),
                             make_ids(cpu, {10}, targets), {}, 0.1, {4, 7}, Tensor());
          },
          true);
}

TEST_CASE("head_loss: the value, against a softmax written out", "[autograd]") {
  Backend& device = backend();
  Rng rng(10);
  const int64_t m = 5, d = 8, v = 13;
  const std::vector<double> h = round_bf16(normal(rng, m * d)), w = round_bf16(normal(rng, v * d));
  const std::vector<int32_t> targets = {0, 12, -1, 4, 7};
  double expected = 0;
  std::vector<double> expected_rows;
  for (int64_t i = 0; i < m; ++i) {
    std::vector<double> logits(static_cast<size_t>(v), 0.0);
    double total = 0;
    for (int64_t j = 0; j < v; ++j) {
      for (int64_t k = 0; k < d; ++k) logits[j] += h[i * d + k] * w[j * d + k];
      total += std::exp(logits[j]);
    }
    const double loss = targets[i] < 0 ? 0 : std::log(total) - logits[targets[i]];
    expected_rows.push_back(loss);
    expected += 0.5 * loss;
  }
  Tensor row_loss = device.empty({m}, device.real());
  Tape tape(device, TapeMode::Inference);
  const Var loss =
      head_loss(tape, autograd::LossKind::CrossEntropy, Var(make(device, {m, d}, device.act(), h)),
                Var(make(device, {v, d}, device.act(), w)), make_ids(device, {m}, targets), {}, 0.5,
                {2, v}, row_loss);
  // Inputs are exact in act; logits and the loss are FP32: a dozen roundings.
  const double tolerance = 16 * epsilon_of(DType::F32);
  CHECK(relative_error(values_of(device, row_loss), expected_rows) < tolerance);
  CHECK(relative_error(values_of(device, loss.value()), {expected}) < tolerance);
}

namespace {

// A head whose rows and words split into uneven chunks.
struct HeadCase {
  static constexpr int64_t kRows = 37, kWidth = 64, kWords = 1000;
  autograd::LossKind kind;
  std::vector<double> h, teacher, table;
  std::vector<int32_t> targets;

  explicit HeadCase(autograd::LossKind kind_) : kind(kind_) {
    Rng rng(12);
    const auto exact = [&](int64_t n, double scale) { return round_bf16(normal(rng, n, scale)); };
    h = exact(kRows * kWidth, 1.0);
    teacher = exact(kRows * kWidth, 1.0);
    table = exact(kWords * kWidth, 0.25);  // logits have a standard deviation of 2
    for (int64_t i = 0; i < kRows; ++i)
      targets.push_back(i % 9 == 4 ? -1 : static_cast<int32_t>(rng.below(kWords)));
  }
};

struct HeadResult {
  std::vector<double> loss, row_loss, dh, dhead;  // dh, dhead: in training
};

enum class Call { Direct, Recorded };

HeadResult run_head(Backend& b, const HeadCase& c, TapeMode mode, HeadChunks chunks, Call call) {
  const Shape rows{HeadCase::kRows, HeadCase::kWidth};
  const Tensor h = make(b, rows, b.act(), c.h);
  const Tensor table = make(b, {HeadCase::kWords, HeadCase::kWidth}, b.act(), c.table);
  autograd::TeacherHead teacher;
  if (c.kind != autograd::LossKind::CrossEntropy)
    teacher = {make(b, rows, b.act(), c.teacher), table};
  const Tensor targets = make_ids(b, {HeadCase::kRows}, c.targets);
  const Guarded row_loss(b, {HeadCase::kRows}, b.real());
  const Tensor loss = b.empty({1}, b.real()), dh = b.empty(rows, b.act());
  const Guarded dhead(b, table.shape(), b.real());
  const auto step = [&] {
    Tape tape(b, mode);
    const Var x = Var::input(h), head = Var::leaf(table, dhead.tensor(), Write::Overwrite);
    const Var out =
        head_loss(tape, c.kind, x, head, targets, teacher, 0.125, chunks, row_loss.tensor());
    b.copy(loss, out.value());
    if (mode == TapeMode::Inference) return;
    tape.backward(out);
    b.copy(dh, x.grad());
  };
  if (call == Call::Recorded)
    b.record(step)->run();
  else
    step();
  HeadResult result{values_of(b, loss), values_of(b, row_loss.tensor()), {}, {}};
  if (mode == TapeMode::Training) {
    result.dh = values_of(b, dh);
    result.dhead = values_of(b, dhead.tensor());
  }
  CHECK(row_loss.untouched());
  CHECK(dhead.untouched());
  return result;
}

}  // namespace

TEST_CASE("head_loss: chunks of the vocabulary give the result of the whole", "[autograd]") {
  for (const autograd::LossKind kind : kLossKinds)
    for (const TapeMode mode : {TapeMode::Inference, TapeMode::Training}) {
      const HeadCase c(kind);
      const HeadResult whole =
          run_head(backend(), c, mode, {HeadCase::kRows, HeadCase::kWords}, Call::Direct);
      // The oracle does not round. Training rounds logits of up to about 8 to act; the losses
      // average these errors over the words.
      const HeadResult exact =
          run_head(oracle_f64(), c, mode, {HeadCase::kRows, HeadCase::kWords}, Call::Direct);
      const double logit_error =
          8 * (mode == TapeMode::Training ? epsilon_of(backend().act()) : 0) +
          128 * epsilon_of(backend().real());
      for (const HeadChunks chunks :
           {HeadChunks{16, HeadCase::kWords}, {100, 384}, {16, 384}, {16, 104}, {37, 999}}) {
        CAPTURE(static_cast<int>(kind), mode == TapeMode::Training, chunks.rows, chunks.vocab);
        const HeadResult got = run_head(backend(), c, mode, chunks, Call::Direct);
        for (size_t i = 0; i < c.targets.size(); ++i) {
          CHECK(std::abs(got.row_loss[i] - whole.row_loss[i]) <= logit_error);
          CHECK(std::abs(got.row_loss[i] - exact.row_loss[i]) <= logit_error);
          if (c.targets[i] < 0) CHECK(got.row_loss[i] == 0);
        }
        CHECK(std::abs(got.loss[0] - exact.loss[0]) <= 0.125 * HeadCase::kRows * logit_error);
        if (mode == TapeMode::Training) {
          // The relative error of a logit's gradient is at most the error of the logit. The
          // gradient and the sum are each rounded once.
          CHECK(relative_error(got.dh, exact.dh) <= logit_error + 2 * epsilon_of(backend().act()));
          CHECK(relative_error(got.dhead, exact.dhead) <=
                logit_error + 2 * epsilon_of(backend().act()));
          for (int64_t i = 0; i < HeadCase::kRows; ++i)
            for (int64_t j = 0; j < HeadCase::kWidth && c.targets[i] < 0; ++j)
              CHECK(got.dh[i * HeadCase::kWidth + j] == 0);
        }
        // A second call and a recorded step give the same bytes.
        for (const Call call : {Call::Direct, Call::Recorded}) {
          const HeadResult again = run_head(backend(), c, mode, chunks, call);
          CHECK(again.row_loss == got.row_loss);
          CHECK(again.loss == got.loss);
          CHECK(again.dh == got.dh);
          CHECK(again.dhead == got.dhead);
        }
      }
    }
}

TEST_CASE("head_loss: its memory does not grow with a vocabulary in chunks", "[autograd]") {
  Backend& b = backend();
  const int64_t m = 512, d = 256;
  const Tensor h = b.zeros({m, d}, b.act());
  const Tensor targets = b.zeros({m}, DType::I32);
  for (const autograd::LossKind kind : kLossKinds) {
    std::vector<int64_t> held;
    for (const int64_t v : {int64_t{16384}, int64_t{32768}, int64_t{50000}}) {
      const Tensor table = b.zeros({v, d}, b.act());
      autograd::TeacherHead teacher;
      if (kind != autograd::LossKind::CrossEntropy) teacher = {h, table};
      b.reset_memory_peak();
      const int64_t before = b.memory_peak_bytes();
      Tape tape(b, TapeMode::Training);
      tape.backward(head_loss(tape, kind, Var::input(h), Var(table), targets, teacher, 1.0,
                              {256, 8192}, Tensor()));
      held.push_back(b.memory_peak_bytes() - before);
    }
    CHECK(held[0] == held[1]);
    CHECK(held[0] == held[2]);
    CHECK(held[0] < 256 * 50000 * engine::size_bytes(b.act()));
  }
}

TEST_CASE("tape: an inference tape and an unused output give no gradients", "[autograd]") {
  Backend& cpu = oracle_f64();
  Rng rng(11);
  const Var x = Var::input(make(cpu, {2, 3}, DType::F64, normal(rng, 6)));
  Tape inference(cpu, TapeMode::Inference);
  CHECK_FALSE(add(inference, x, x).requires_grad());

  Tape tape(cpu, TapeMode::Training);
  const Var other = Var::input(make(cpu, {2, 3}, DType::F64, normal(rng, 6)));
  swiglu(tape, other, other);
  const Var y = add(tape, x, x);
  tape.backward(y, make(cpu, {2, 3}, DType::F64, std::vector<double>(6, 1.0)));
  CHECK_FALSE(other.has_grad());
  CHECK(values_of(cpu, x.grad()) == std::vector<double>(6, 2.0));
  CHECK_THROWS_AS(other.grad(), Error);
}

TEST_CASE("tape: the first gradient overwrites a leaf's own buffer, later ones add to it",
          "[autograd]") {
  Backend& cpu = oracle_f64();
  for (const Write mode : {Write::Overwrite, Write::Add}) {
    Tensor grad = make(cpu, {2}, DType::F64, {100, 200});
    const Var leaf = Var::leaf(make(cpu, {2}, DType::F64, {1, 2}), grad, mode);
    Tape tape(cpu, TapeMode::Training);
    const Var y = add(tape, leaf, add(tape, leaf, leaf));
    tape.backward(y, make(cpu, {2}, DType::F64, {1, 1}));
    CHECK(values_of(cpu, grad) ==
          (mode == Write::Add ? std::vector<double>{103, 203} : std::vector<double>{3, 3}));
  }
}

// A whole block.

namespace {

struct BlockRun {
  std::vector<double> y, dx;
  std::vector<std::vector<double>> gradients;  // of every parameter, in the order of the set
};

// A trainable block on `device`, its masters and norms drawn from one seed.
struct TrainedBlock {
  Backend& device;
  models::LlamaConfig config;
  autograd::ParameterSet set;
  std::optional<autograd::WeightQuantizer> quantizer;
  models::LlamaBlock block;
  std::vector<std::vector<double>> masters;

  TrainedBlock(Backend& backend, int64_t window, int bits, engine::Rounding rounding,
               GradientPasses passes, const Layout* layout = nullptr,
               const models::LlamaConfig& of = tiny_config())
      : device(backend),
        config(of),
        set(backend, passes),
        block(backend, config, 0,
              models::upload_as(backend, models::rope_inv_freq(config), {config.head_dim / 2},
                                DType::F32)) {
    config.sliding_window = window;
    std::vector<quant::LinearFormat> formats = block_formats(config, bits);
    for (quant::LinearFormat& format : formats)
      if (layout != nullptr) lay_out(format, *layout);
    block.declare_parameters(set, formats);
    set.allocate();
    quantizer.emplace(set, formats[0].weight.group, quant::RangeRule::MinMax, rounding);
    block.bind_parameters(*quantizer, formats);
    Rng rng(12);
    for (auto& parameter : set.parameters()) {
      const bool is_norm = parameter->master.rank() == 1;
      std::vector<double> values = round_bf16(normal(rng, parameter->master.numel(), 0.1));
      for (double& value : values) value += is_norm ? 1 : 0;
      upload(*parameter, values);
      masters.push_back(values);
    }
    const auto shapes = models::block_linears(config);
    for (size_t i = 0; i < shapes.size(); ++i) {
      const std::vector<double> bias = round_bf16(normal(rng, shapes[i].n));
      if (shapes[i].bias) block.linears()[i]->set_bias({bias.begin(), bias.end()});
    }
    quantizer->prepare();
  }

  void upload(autograd::Parameter& parameter, const std::vector<double>& values) {
    device.copy(parameter.master, make(device, parameter.master.shape(), device.real(), values));
  }

  enum class Input { Differentiated, Constant };

  BlockRun run(const Shape& shape, const std::vector<double>& x, const std::vector<double>& seed,
               Recompute recompute = Recompute::None, Input kind = Input::Differentiated) {
    Tape tape(device, TapeMode::Training);
    const Tensor value = make(device, shape, device.act(), x);
    const Var input = kind == Input::Differentiated ? Var::input(value) : Var(value);
    const Var y = block.forward(tape, input, nullptr, recompute);
    BlockRun result;
    result.y = values_of(device, y.value());
    tape.backward(y, make(device, shape, device.act(), seed));
    block.finish_backward();
    if (kind == Input::Differentiated) result.dx = values_of(device, input.grad());
    for (auto& parameter : set.parameters())
      result.gradients.push_back(values_of(device, parameter->grad));
    return result;
  }
};

}  // namespace

TEST_CASE("block: gradients of x and of every parameter", "[autograd]") {
  struct Case {
    const Layout* layout = nullptr;
    int64_t window = 0;
    models::LlamaConfig config = tiny_config();
  };
  std::vector<Case> cases = {{}, {.window = 3}};
  for (const Layout& layout : kLayouts) cases.push_back({.layout = &layout});
  for (const models::LlamaConfig& config : other_families()) cases.push_back({.config = config});
  for (const auto& [layout, window, config] : cases) {
    CAPTURE(layout == nullptr ? "no order" : layout->name, window, config.model_type,
            config.mlp_bias);
    TrainedBlock trained(oracle_f64(), window, 2, engine::Rounding::Identity, GradientPasses::One,
                         layout, config);
    const Shape shape{2, 5, trained.config.d_model};
    Rng rng(13);
    const std::vector<double> x = normal(rng, engine::numel_of(shape));
    const std::vector<double> weights = normal(rng, x.size());
    const BlockRun run = trained.run(shape, x, weights);

    const auto value = [&](const std::vector<double>& at) {
      Tape tape(trained.device, TapeMode::Inference);
      trained.quantizer->prepare();
      const Var y = trained.block.forward(tape, Var(make(trained.device, shape, DType::F64, at)),
                                          nullptr, Recompute::None);
      return dot(values_of(trained.device, y.value()), weights);
    };
    const auto shifted = [](std::vector<double> at, const std::vector<double>& direction,
                            double step) {
      for (size_t i = 0; i < at.size(); ++i) at[i] += step * direction[i];
      return at;
    };
    const std::vector<double> direction = normal(rng, x.size());
    const double difference =
        (value(shifted(x, direction, kStep)) - value(shifted(x, direction, -kStep))) / (2 * kStep);
    CHECK(std::abs(difference - dot(run.dx, direction)) <= kRelative * norm(run.dx));

    for (size_t i = 0; i < trained.masters.size(); ++i) {
      autograd::Parameter& parameter = *trained.set.parameters()[i];
      CAPTURE(parameter.name);
      const std::vector<double> along = normal(rng, trained.masters[i].size());
      double ends[2];
      for (const int side : {0, 1}) {
        trained.upload(parameter, shifted(trained.masters[i], along, side ? kStep : -kStep));
        ends[side] = value(x);
      }
      trained.upload(parameter, trained.masters[i]);
      const double slope = (ends[1] - ends[0]) / (2 * kStep);
      CHECK(norm(run.gradients[i]) > 0);
      CHECK(std::abs(slope - dot(run.gradients[i], along)) <= kRelative * norm(run.gradients[i]));
    }
  }
}

TEST_CASE("block: an input without a gradient does not change the other gradients", "[autograd]") {
  std::vector<std::pair<Backend*, models::LlamaConfig>> cases = {{&oracle_f64(), tiny_config()},
                                                                 {&backend(), tiny_config()}};
  for (const models::LlamaConfig& config : other_families()) cases.push_back({&backend(), config});
  for (const auto& [device, config] : cases) {
    TrainedBlock trained(*device, 0, 2, engine::Rounding::Nearest, GradientPasses::One, nullptr,
                         config);
    const Shape shape{2, 9, trained.config.d_model};
    Rng rng(17);
    const std::vector<double> x = round_bf16(normal(rng, engine::numel_of(shape)));
    const std::vector<double> seed = round_bf16(normal(rng, x.size()));
    const BlockRun whole = trained.run(shape, x, seed);
    for (const Recompute recompute : {Recompute::None, Recompute::Block}) {
      const BlockRun run = trained.run(shape, x, seed, recompute, TrainedBlock::Input::Constant);
      CHECK(run.y == whole.y);
      for (size_t p = 0; p < whole.gradients.size(); ++p) {
        const std::string& name = trained.set.parameters()[p]->name;
        CAPTURE(name);
        // The first norm's gradient is computed in another way: it has the act roundings of dW^
        // instead of those of dh.
        if (name.find("input_layernorm") == std::string::npos)
          CHECK(run.gradients[p] == whole.gradients[p]);
        else
          CHECK(relative_error(run.gradients[p], whole.gradients[p]) <
                32 * epsilon_of(DType::F32) * (device->real() == DType::F64 ? 1e-7 : 1) +
                    (device->act() == DType::BF16 ? 2 * epsilon_of(DType::BF16) : 0));
      }
    }
  }
}

TEST_CASE("block: a norm's weight of 0 is trained", "[autograd]") {
  TrainedBlock trained(backend(), 0, 2, engine::Rounding::Nearest, GradientPasses::One);
  models::LayerResult masters = trained.block.result(models::LinearContent::Masters);
  masters.input_norm[3] = 0;
  trained.block.set_masters(masters);
  trained.quantizer->prepare();
  const Shape shape{2, 9, trained.config.d_model};
  Rng rng(18);
  const std::vector<double> x = round_bf16(normal(rng, engine::numel_of(shape)));
  const std::vector<double> seed = round_bf16(normal(rng, x.size()));
  const size_t norm = trained.masters.size() - 2;
  const std::vector<double> whole = trained.run(shape, x, seed).gradients[norm];
  const std::vector<double> run =
      trained.run(shape, x, seed, Recompute::None, TrainedBlock::Input::Constant).gradients[norm];
  CHECK(std::abs(whole[3]) > 0);
  CHECK(run[3] == Approx(whole[3]).epsilon(16 * epsilon_of(trained.device.act())));
}

TEST_CASE("block: recomputation gives the same value and gradients", "[autograd]") {
  TrainedBlock trained(backend(), 0, 2, engine::Rounding::Nearest, GradientPasses::One);
  const Shape shape{2, 9, trained.config.d_model};
  Rng rng(14);
  const std::vector<double> x = normal(rng, engine::numel_of(shape)), seed = normal(rng, x.size());
  const BlockRun kept = trained.run(shape, x, seed, Recompute::None);
  for (const Recompute recompute : {Recompute::Attention, Recompute::Block}) {
    CAPTURE(models::to_string(recompute));
    const BlockRun again = trained.run(shape, x, seed, recompute);
    CHECK(kept.y == again.y);
    CHECK(kept.dx == again.dx);
    CHECK(kept.gradients == again.gradients);
  }
}

TEST_CASE("block: two micro-batches accumulate, in any order of their passes", "[autograd]") {
  TrainedBlock trained(backend(), 0, 2, engine::Rounding::Nearest, GradientPasses::Several);
  const Shape shape{1, 6, trained.config.d_model};
  Rng rng(15);
  std::vector<std::vector<double>> x, seed;
  for (int i = 0; i < 2; ++i) {
    x.push_back(normal(rng, engine::numel_of(shape)));
    seed.push_back(normal(rng, x[0].size()));
  }
  const BlockRun first = trained.run(shape, x[0], seed[0]);
  const BlockRun second = trained.run(shape, x[1], seed[1]);
  // Both forwards before either backward.
  Tape tapes[2] = {{trained.device, TapeMode::Training}, {trained.device, TapeMode::Training}};
  Var y[2];
  for (int i = 0; i < 2; ++i)
    y[i] = trained.block.forward(
        tapes[i], Var::input(make(trained.device, shape, trained.device.act(), x[i])), nullptr,
        Recompute::None);
  for (int i = 0; i < 2; ++i)
    tapes[i].backward(y[i], make(trained.device, shape, trained.device.act(), seed[i]));
  trained.block.finish_backward();
  for (size_t p = 0; p < first.gradients.size(); ++p) {
    CAPTURE(trained.set.parameters()[p]->name);
    std::vector<double> expected = first.gradients[p];
    for (size_t i = 0; i < expected.size(); ++i) expected[i] += second.gradients[p][i];
    // The same FP32 sums in another order.
    CHECK(relative_error(values_of(trained.device, trained.set.parameters()[p]->grad), expected) <
          4 * epsilon_of(DType::F32));
  }
  // A step without any pass leaves gradients of 0.
  trained.block.finish_backward();
  for (auto& parameter : trained.set.parameters())
    CHECK(norm(values_of(trained.device, parameter->grad)) == 0);
}

TEST_CASE("block: the device's backward against F64", "[autograd]") {
  for (const int64_t window : {0, 5}) {
    const GradientPasses passes = window == 0 ? GradientPasses::One : GradientPasses::Several;
    TrainedBlock device(backend(), window, 2, engine::Rounding::Nearest, passes);
    TrainedBlock reference(oracle_f64(), window, 2, engine::Rounding::Nearest, passes);
    const Shape shape{2, 33, device.config.d_model};
    Rng rng(16);
    const std::vector<double> x = round_bf16(normal(rng, engine::numel_of(shape)));
    const std::vector<double> seed = round_bf16(normal(rng, x.size()));
    const BlockRun actual = device.run(shape, x, seed);
    const BlockRun expected = reference.run(shape, x, seed);
    // Any path through the block and back has about ten roundings to act. Masters are exact in
    // bf16, so the quantizer decides alike.
    const double tolerance = device.device.act() == DType::BF16 ? 4 * epsilon_of(DType::BF16)
                                                                : 32 * epsilon_of(DType::F32);
    CHECK(relative_error(actual.y, expected.y) < tolerance);
    CHECK(relative_error(actual.dx, expected.dx) < tolerance);
    for (size_t p = 0; p < expected.gradients.size(); ++p) {
      CAPTURE(device.set.parameters()[p]->name);
      CHECK(relative_error(actual.gradients[p], expected.gradients[p]) < tolerance);
    }
  }
}

TEST_CASE("optimizer: one step over a padded set, and a skipped one", "[autograd]") {
  Backend& device = backend();
  for (const GradientPasses passes : {GradientPasses::One, GradientPasses::Several}) {
    autograd::ParameterSet set(device, passes);
    autograd::Parameter& a = set.add("a", {3});
    autograd::Parameter& b = set.add("b", {2, 2});
    set.allocate();
    engine::Schedule schedule;
    schedule.peak_lr = 0.1;
    schedule.clip_norm = 0;
    autograd::Optimizer adamw(set, nullptr, {}, schedule);
    device.copy(a.grad, make(device, {3}, a.grad.dtype(), {1, -2, 0}));
    device.copy(b.grad, make(device, {2, 2}, b.grad.dtype(), {0.5, 0, 0, 3}));

    const Tensor bad = make(device, {1}, device.real(), {std::nan("")});
    adamw.step(bad);
    CHECK(values_of(device, a.master) == std::vector<double>{0, 0, 0});
    CHECK(values_of(device, adamw.control())[engine::kSkipped] == 1);

    adamw.restart();
    adamw.step(make(device, {1}, device.real(), {1.0}));
    // The first bias-corrected step moves by lr times the sign of the gradient.
    CHECK(relative_error(values_of(device, a.master), {-0.1, 0.1, 0}) < 1e-5);
    CHECK(relative_error(values_of(device, b.master), {-0.1, 0, 0, -0.1}) < 1e-5);
    const std::vector<double> control = values_of(device, adamw.control());
    CHECK(control[engine::kGradNorm] == Approx(std::sqrt(1 + 4 + 0.25 + 9)));
    CHECK(control[engine::kApplied] == 1);
  }
}
