// QuantLinear: gradients against their formulas, and its states against each other.
#include "models/quant_linear.h"

#include <catch2/catch.hpp>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <iostream>

#include "autograd/optimizer.h"
#include "quant/grid.h"
#include "quant/pack.h"
#include "tests/formats.h"
#include "tests/support.h"

using namespace bbb;
using namespace bbb::tests;
using autograd::GradientPasses;
using autograd::Tape;
using autograd::TapeMode;
using autograd::Var;
using engine::Rng;
using models::LinearResult;
using models::QuantLinear;

namespace {

constexpr int64_t kN = 24, kK = 96, kM = 33;

struct Trained {
  Backend& device;
  autograd::ParameterSet set;
  autograd::Parameter& master;
  std::optional<autograd::WeightQuantizer> quantizer;
  QuantLinear linear;
  std::vector<double> weights;

  Trained(Backend& backend, int bits, int group, GradientPasses passes = GradientPasses::Several)
      : device(backend),
        set(backend, passes),
        master(set.add("w", {kN, kK})),
        linear(backend, "model.layers.0.mlp.up_proj", kN, kK) {
    set.allocate();
    Rng rng(1);
    weights = round_bf16(normal(rng, kN * kK, 0.05));
    // One group is all zeros, one all of one sign.
    for (int64_t i = 0; i < 32; ++i) weights[i] = 0;
    for (int64_t i = 32; i < 64; ++i) weights[i] = std::abs(weights[i]);
    device.copy(master.master, make(device, {kN, kK}, device.real(), weights));
    quantizer.emplace(set, group);
    linear.set_trained(*quantizer, master, plain_format(kN, kK, bits, group));
    quantizer->prepare();
  }

  // Runs one pass. Returns the gradient of the quantized weight, before any quantizer: dy^T x, in
  // F64.
  std::vector<double> pass() {
    Rng rng(2);
    const std::vector<double> x = round_bf16(normal(rng, kM * kK));
    const std::vector<double> dy = round_bf16(normal(rng, kM * kN));
    Tape tape(device, TapeMode::Training);
    const Var y =
        linear.forward(tape, input_of(Var(make(device, {kM, kK}, device.act(), x))), Var());
    tape.backward(y, make(device, {kM, kN}, device.act(), dy));
    linear.finish_backward();
    std::vector<double> dw(static_cast<size_t>(kN * kK), 0.0);
    for (int64_t m = 0; m < kM; ++m)
      for (int64_t n = 0; n < kN; ++n)
        for (int64_t k = 0; k < kK; ++k) dw[n * kK + k] += dy[m * kN + n] * x[m * kK + k];
    return dw;
  }
};

// The error of one rounding to the type of the parameter's gradient.
double rounding_of(const autograd::Parameter& parameter) {
  return parameter.grad.dtype() == DType::BF16 ? epsilon_of(DType::BF16) : 0;
}

// The quantized weight as training holds it, one value a byte.
struct QuantizedState {
  std::vector<uint8_t> codes, scales, zeros;
  float master_scale;

  explicit QuantizedState(const models::LinearResult& result) {
    const auto& [n, k, grid, input, order] = result.format;
    codes = models::unpack_rows(result.part(quant::StoredPart::Codes), n, k, grid.bits);
    scales = result.part(quant::StoredPart::Scales);
    zeros =
        models::unpack_rows(result.part(quant::StoredPart::Zeros), n, k / grid.group, grid.bits);
    std::memcpy(&master_scale, result.part(quant::StoredPart::MasterScale).data(), sizeof(float));
  }
};

engine::PackedWeight pack(Backend& device, const models::LinearResult& result) {
  return engine::upload_packed(device, result.format, [&](const quant::StoredTensor& t) {
    return result.part(t.part).data();
  });
}

}  // namespace

TEST_CASE("quant_linear: the gradient passes straight through, except where the code was clipped",
          "[quant_linear]") {
  for (const int bits : {2, 4})
    for (const GradientPasses passes : {GradientPasses::One, GradientPasses::Several}) {
      CAPTURE(bits, passes == GradientPasses::One);
      Trained trained(backend(), bits, 32, passes);
      Backend& device = trained.device;
      const QuantizedState state(trained.linear.quantized());
      std::vector<double> expected = trained.pass();
      // x and dy are exact in act. 33 products are summed in FP32 and rounded to the gradient's
      // type.
      const std::vector<double> gradient = values_of(device, trained.master.grad);
      CHECK(relative_error(gradient, expected) <
            8 * epsilon_of(DType::F32) + rounding_of(trained.master));
      expected = gradient;

      // The optimizer's first moment is 0.1 times the gradient that it applies, rounded to act.
      engine::Schedule schedule;
      schedule.clip_norm = 0;
      autograd::Optimizer adamw(trained.set, &*trained.quantizer, {}, schedule);
      adamw.step(make(device, {1}, device.real(), {1.0}));
      std::vector<double> taken = values_of(device, trained.set.m());
      taken.resize(expected.size());
      int clipped = 0;
      double squares = 0;
      for (size_t i = 0; i < expected.size(); ++i) {
        const size_t group = i / 32;
        const double s = state.master_scale * quant::e4m3_decode(state.scales[group]);
        const double q = std::floor(trained.weights[i] / s + 0.5) + state.zeros[group];
        if (q < 0 || q > std::exp2(bits) - 1) {
          CHECK(taken[i] == 0);
          expected[i] = 0;
          ++clipped;
        }
        squares += expected[i] * expected[i];
        expected[i] *= 0.1;
      }
      CHECK(clipped > 0);
      CHECK(relative_error(taken, expected) <
            16 * epsilon_of(DType::F32) +
                (device.act() == DType::BF16 ? epsilon_of(DType::BF16) / 2 : 0));
      CHECK(values_of(device, adamw.control())[engine::kGradNorm] ==
            Approx(std::sqrt(squares)).epsilon(64 * epsilon_of(DType::F32)));
    }
}

TEST_CASE("quant_linear: the gradient of learned scales", "[quant_linear]") {
  for (const GradientPasses passes : {GradientPasses::One, GradientPasses::Several}) {
    Trained trained(backend(), 2, 32);
    const QuantizedState before(trained.linear.quantized());
    autograd::ParameterSet set(trained.device, passes);
    autograd::Parameter& sigma = set.add("sigma", {kN, kK / 32});
    set.allocate();
    trained.linear.freeze_codes(trained.linear.quantized(), sigma);
    trained.linear.prepare_scales();
    CHECK(trained.linear.holds<models::FrozenCodes>());

    const std::vector<double> dw = trained.pass();
    std::vector<double> expected(static_cast<size_t>(kN * kK / 32), 0.0);
    for (size_t i = 0; i < dw.size(); ++i)
      expected[i / 32] += dw[i] * (before.codes[i] - before.zeros[i / 32]);
    // dW^ is rounded; then the sum of 32 of its elements is rounded.
    CHECK(relative_error(values_of(trained.device, sigma.grad), expected) <
          16 * epsilon_of(DType::F32) + 2 * rounding_of(sigma));
  }
}

TEST_CASE("quant_linear: learned scales start at the fake quantizer's weights", "[quant_linear]") {
  Trained trained(backend(), 2, 32);
  const LinearResult before = trained.linear.quantized();
  autograd::ParameterSet set(trained.device, GradientPasses::One);
  autograd::Parameter& sigma = set.add("sigma", {kN, kK / 32});
  set.allocate();
  trained.linear.freeze_codes(trained.linear.quantized(), sigma);
  trained.linear.prepare_scales();
  const LinearResult after = trained.linear.quantized();
  for (const quant::StoredPart part : {quant::StoredPart::Codes, quant::StoredPart::Zeros})
    CHECK(after.part(part) == before.part(part));
  CHECK(after.dequantize() == before.dequantize());
}

TEST_CASE("quant_linear: a learned grid starts at the fake quantizer's weights", "[quant_linear]") {
  for (const bool from_codes : {false, true}) {
    Trained trained(backend(), 2, 32);
    const LinearResult before = trained.linear.quantized();
    autograd::ParameterSet set(trained.device, GradientPasses::One);
    models::LearnedGrid grid{&set.add("w", {kN, kK}), &set.add("sigma", {kN, kK / 32}),
                             &set.add("zeta", {kN, kK / 32})};
    set.allocate();
    const LinearResult start = from_codes ? before : trained.linear.master();
    trained.linear.set_learned(grid, before.format);
    trained.linear.set_master(start);
    trained.linear.prepare_scales();
    const LinearResult after = trained.linear.quantized();
    CHECK(after.dequantize() == before.dequantize());
    CHECK(after.part(quant::StoredPart::Codes) == before.part(quant::StoredPart::Codes));
    CHECK(after.part(quant::StoredPart::Zeros) == before.part(quant::StoredPart::Zeros));
    // Without a pass all gradients are 0.
    for (autograd::Parameter* p : {grid.master, grid.sigma, grid.zeta})
      trained.device.copy(p->grad, make(trained.device, p->grad.shape(), p->grad.dtype(),
                                        std::vector<double>(p->grad.numel(), 1.0)));
    trained.linear.finish_backward();
    for (autograd::Parameter* p : {grid.master, grid.sigma, grid.zeta})
      for (const double g : values_of(trained.device, p->grad)) CHECK(g == 0);
  }
}

TEST_CASE("quant_linear: finish_backward without a pass zeroes the gradient", "[quant_linear]") {
  Trained trained(backend(), 2, 32);
  trained.pass();
  const std::vector<double> first = values_of(trained.device, trained.master.grad);
  trained.pass();  // overwrites the first gradient
  CHECK(values_of(trained.device, trained.master.grad) == first);
  trained.linear.finish_backward();
  CHECK(values_of(trained.device, trained.master.grad) ==
        std::vector<double>(static_cast<size_t>(kN * kK), 0.0));
}

TEST_CASE("quant_linear: packed products equal the training forward", "[quant_linear]") {
  Backend& device = backend();
  for (const int bits : {2, 3, 4})
    for (const int64_t rows : {1, 3, 8, 9, 33}) {
      CAPTURE(bits, rows);
      Trained trained(device, bits, 32);
      QuantLinear packed(device, "packed", kN, kK);
      packed.set_packed(pack(device, trained.linear.quantized()),
                        device.empty({kN * kK}, device.act()));
      Rng rng(3);
      const Var x(make(device, {1, rows, kK}, device.act(), round_bf16(normal(rng, rows * kK))));
      const Var residual(
          make(device, {1, rows, kN}, device.act(), round_bf16(normal(rng, rows * kN))));
      Tape tape(device, TapeMode::Inference);
      const Var expected = trained.linear.forward(tape, input_of(x), residual);
      const Var actual = packed.forward(tape, input_of(x), residual);
      CHECK(actual.value().shape() == expected.value().shape());
      // The same products are summed in another order. Near a tie of bf16 the two sums may round
      // differently, which is one unit in a few outputs. The packed product on the CPU rounds
      // activations to 16 bits (numerics.md section 2).
      const double tolerance = device.act() == DType::BF16       ? epsilon_of(DType::BF16) / 4
                               : rows <= Backend::kMaxPackedRows ? 1e-4
                                                                 : 16 * epsilon_of(DType::F32);
      CHECK(relative_error(values_of(device, actual.value()), values_of(device, expected.value())) <
            tolerance);
    }
}

TEST_CASE("quant_linear: with 16 bits the weight is the master, without a quantizer",
          "[quant_linear]") {
  Trained trained(backend(), models::kNoQuantizer, 32);
  const std::vector<double> expected = trained.pass();
  CHECK(relative_error(values_of(trained.device, trained.master.grad), expected) <
        8 * epsilon_of(DType::F32));
  std::vector<double> identity(static_cast<size_t>(kK * kK), 0.0);
  for (int64_t i = 0; i < kK; ++i) identity[i * kK + i] = 1;
  Tape tape(trained.device, TapeMode::Inference);
  const Var y = trained.linear.forward(
      tape, input_of(Var(make(trained.device, {kK, kK}, trained.device.act(), identity))), Var());
  const std::vector<double> transposed = values_of(trained.device, y.value());
  for (int64_t n = 0; n < kN; ++n)
    for (int64_t k = 0; k < kK; ++k) REQUIRE(transposed[k * kN + n] == trained.weights[n * kK + k]);
  // The next stage has fewer bits.
  trained.linear.set_format(plain_format(kN, kK, 2));
  trained.quantizer->prepare();
  CHECK(trained.linear.quantized().format.weight.bits == 2);
}

TEST_CASE("quant_linear: snapping keeps the grid, and so does a step that moves no master",
          "[quant_linear]") {
  Backend& device = backend();
  for (const int bits : {2, 3, 4, 8})
    for (const int group : {32, 64, 128}) {
      CAPTURE(bits, group);
      constexpr int64_t kRows = 100, kColumns = 384;
      autograd::ParameterSet set(device, GradientPasses::One);
      autograd::Parameter& master = set.add("w", {kRows, kColumns});
      set.allocate();
      QuantLinear linear(device, "w", kRows, kColumns);
      autograd::WeightQuantizer quantizer(set, group);
      linear.set_trained(quantizer, master, plain_format(kRows, kColumns, bits, group));
      Rng rng(6);
      models::upload_into(device, master.master, [&] {
        const std::vector<double> drawn = normal(rng, kRows * kColumns, 0.05);
        return std::vector<float>(drawn.begin(), drawn.end());
      }());
      quantizer.prepare();
      const LinearResult before = linear.quantized();
      const auto check = [&] { CHECK(linear.quantized().stored == before.stored); };
      linear.snap();
      const std::vector<float> snapped = models::download_floats(device, master.master),
                               middles = before.dequantize();
      int off_middle = 0;
      for (size_t i = 0; i < middles.size(); ++i) off_middle += snapped[i] != middles[i];
      CHECK(off_middle < kRows * kColumns / 10);
      quantizer.prepare();
      check();

      device.zero(set.grads());
      autograd::Optimizer adamw(set, &quantizer, {}, {});
      adamw.step(make(device, {1}, device.real(), {1.0}));
      quantizer.quantize();
      CHECK(models::download_floats(device, master.master) == snapped);
      check();
    }
}

namespace {

// Two linears and a norm, trained on their own inputs by a step that can be recorded. The loss is
// uploaded, so a test can set it to NaN.
struct TwoLinears {
  Backend& device;
  autograd::ParameterSet set;
  autograd::Parameter &up, &norm, &down;
  std::optional<autograd::WeightQuantizer> quantizer;
  QuantLinear first, second;
  std::optional<autograd::Optimizer> adamw;
  Tensor x, dy, loss;

  static engine::Schedule schedule() {
    engine::Schedule schedule;
    schedule.peak_lr = 3e-3;
    schedule.total_steps = 20;
    return schedule;
  }

  TwoLinears(Backend& backend, int bits, int group, int64_t n, int64_t k)
      : device(backend),
        set(backend, GradientPasses::One),
        up(set.add("up", {n, k})),
        norm(set.add("norm", {n})),
        down(set.add("down", {k, 2 * k})),
        first(backend, "up", n, k),
        second(backend, "down", k, 2 * k) {
    set.allocate();
    quantizer.emplace(set, group);
    adamw.emplace(set, &*quantizer, engine::AdamWSpec{}, schedule());
    Rng rng(4);
    first.set_trained(*quantizer, up, plain_format(n, k, bits, group));
    second.set_trained(*quantizer, down, plain_format(k, 2 * k, bits, group));
    device.copy(up.master, make(device, {n, k}, device.real(), normal(rng, n * k, 0.05)));
    device.copy(down.master, make(device, {k, 2 * k}, device.real(), normal(rng, 2 * k * k, 0.2)));
    device.copy(norm.grad, make(device, {n}, norm.grad.dtype(), normal(rng, n)));
    x = make(device, {kM, 2 * k}, device.act(), round_bf16(normal(rng, kM * 2 * k)));
    dy = make(device, {kM, n}, device.act(), round_bf16(normal(rng, kM * n)));
    loss = make(device, {1}, device.real(), {1.0});
  }

  // Call prepare() or quantize() first.
  void pass_and_update() {
    Tape tape(device, TapeMode::Training);
    const Var y =
        first.forward(tape, input_of(second.forward(tape, input_of(Var(x)), Var())), Var());
    const Tensor seed = device.empty(dy.shape(), dy.dtype());
    device.copy(seed, dy);
    tape.backward(y, seed);
    first.finish_backward();
    second.finish_backward();
    adamw->step(loss);
  }

  std::vector<std::vector<uint8_t>> state() const {
    std::vector<std::vector<uint8_t>> all;
    const engine::QuantizedWeights& q = quantizer->weights();
    for (const Tensor& t : {set.masters(), set.m(), set.v(), set.grads(), adamw->control(),
                            q.max_range, q.s, q.clipped, first.parameter()->master})
      all.push_back(bytes_of(device, t));
    for (const QuantLinear* linear : {&first, &second})
      for (const std::vector<uint8_t>& part : linear->quantized().stored) all.push_back(part);
    return all;
  }
};

}  // namespace

TEST_CASE("quant_linear: recorded steps reuse group ranges and equal steps that measure them",
          "[quant_linear]") {
  Backend& device = backend();
  for (const int group : {32, 64, 128})
    for (const int bits : {2, 8}) {
      CAPTURE(group, bits);
      TwoLinears recorded(device, bits, group, 33, 3 * group),
          measured(device, bits, group, 33, 3 * group);
      recorded.quantizer->prepare();
      const auto replay = device.record([&] {
        recorded.quantizer->quantize();
        recorded.pass_and_update();
      });
      for (int step = 0; step < 6; ++step) {
        CAPTURE(step);
        for (TwoLinears* each : {&recorded, &measured})
          device.copy(each->loss, make(device, {1}, device.real(), {step == 3 ? NAN : 1.0}));
        replay->run();
        measured.quantizer->prepare();
        measured.pass_and_update();
        REQUIRE(recorded.state() == measured.state());
      }
      CHECK(values_of(device, recorded.adamw->control())[engine::kSkipped] == 1);

      // S from the ranges that AdamW left equals S of the masters.
      recorded.quantizer->quantize();
      measured.quantizer->prepare();
      REQUIRE(recorded.state() == measured.state());
    }
}

TEST_CASE("quant_linear: quantizing and the optimizer are four kernels for any number of linears",
          "[quant_linear]") {
  if (!needs_cuda()) return;
  if (std::getenv("BBB_SYNC_LAUNCHES") != nullptr) {
    std::cout << "SKIPPED: steps are not recorded under BBB_SYNC_LAUNCHES\n";
    return;
  }
  TwoLinears trained(backend(), 2, 32, 33, 96);
  trained.quantizer->prepare();
  const auto replay = backend().record([&] {
    trained.quantizer->quantize();
    trained.adamw->step(trained.loss);
  });
  CHECK(replay->kernels() == 4);
}

TEST_CASE("quant_linear: masters and bit widths may change between steps", "[quant_linear]") {
  Backend& device = backend();
  TwoLinears trained(device, 8, 32, 33, 96);
  trained.quantizer->prepare();
  trained.pass_and_update();
  // After new masters and another bit width, prepare() is the only call needed.
  Rng rng(5);
  for (const int bits : {8, 2, models::kNoQuantizer, 4}) {
    CAPTURE(bits);
    const std::vector<double> values = normal(rng, 96 * 192, 3.0);
    device.copy(trained.down.master, make(device, {96, 192}, device.real(), values));
    trained.first.set_format(plain_format(33, 96, bits));
    trained.second.set_format(plain_format(96, 192, bits));
    trained.quantizer->prepare();
    TwoLinears fresh(device, bits, 32, 33, 96);
    device.copy(fresh.set.masters(), trained.set.masters());
    fresh.quantizer->prepare();
    const engine::QuantizedWeights &made = trained.quantizer->weights(),
                                   &wanted = fresh.quantizer->weights();
    CHECK(bytes_of(device, wanted.s) == bytes_of(device, made.s));
    CHECK(bytes_of(device, wanted.clipped) == bytes_of(device, made.clipped));
    CHECK(values_of(device, wanted.wq.slice(0, 33 * 96)) ==
          values_of(device, made.wq.slice(0, 33 * 96)));
    trained.pass_and_update();
  }
}

namespace {
template <typename Optimizer>
concept TakesNewSchedules = requires(Optimizer optimizer, engine::Schedule schedule) {
  optimizer.restart(schedule);
};
}  // namespace

TEST_CASE("quant_linear: a recorded step uses the current bit width of its linear",
          "[quant_linear]") {
  // A recorded step has copied its schedule, so the optimizer offers no way to change it.
  static_assert(!TakesNewSchedules<autograd::Optimizer>);

  Backend& device = backend();
  Rng rng(7);
  const Var x(make(device, {kM, kK}, device.act(), round_bf16(normal(rng, kM * kK))));
  Trained trained(device, models::kNoQuantizer, 32);
  const Tensor y = device.empty({kM, kN}, device.act());
  const auto forward = [&](Trained& of) {
    of.quantizer->quantize();
    Tape tape(device, TapeMode::Inference);
    device.copy(y, of.linear.forward(tape, input_of(x), Var()).value());
  };
  const auto replay = device.record([&] { forward(trained); });
  for (const int bits : {2, models::kNoQuantizer, 8, 4, models::kNoQuantizer}) {
    CAPTURE(bits);
    trained.linear.set_format(plain_format(kN, kK, bits));
    replay->run();
    const std::vector<double> replayed = values_of(device, y);
    Trained fresh(device, bits, 32);
    forward(fresh);
    CHECK(replayed == values_of(device, y));
  }
}
