// Averages of masters, and codes that oscillate: each op against its formula, and runs that use all
// of them and are killed.
#include "quant/oscillation.h"

#include <catch2/catch.hpp>
#include <cmath>

#include "quant/e4m3.h"
#include "tests/flat_weights.h"
#include "tests/tiny_run.h"

using namespace bbb;
using namespace bbb::tests;

namespace {

// A quantized matrix of 2 bits, a weight in full precision, and a norm.
struct Weights : FlatWeights {
  explicit Weights(Backend& b)
      : FlatWeights(b, {{256, 2}, {128, quant::kNoQuantizer}, {96, quant::kNotQuantized}}, 32) {
    engine::Rng rng(3);
    for (size_t i = 0; i < parameters.size(); ++i)
      set(w.tensor(), i, normal(rng, parameters[i].count, 0.05));
    quantize();
  }
  void quantize() {
    backend.max_group_range(q, w.tensor());
    backend.fake_quant(q, w.tensor());
  }
};

Tensor control_at(Backend& b, int64_t step) {
  std::vector<double> slots(engine::kControlSize, 0.0);
  slots[engine::kStep] = static_cast<double>(step);
  return make(b, {engine::kControlSize}, b.real(), slots);
}

}  // namespace

TEST_CASE("oscillation: the state counts changes, forgets half of them, and stays frozen",
          "[oscillation]") {
  uint8_t state = quant::next_flip_state(0, 2, true, true);
  CHECK(state == 0x20);  // the first step only notes the level
  for (int flip = 1; flip <= quant::kMaxFlips; ++flip) {
    state = quant::next_flip_state(state, flip % 2 == 0 ? 2 : -1, false, false);
    CHECK((state >> 1 & 7) == flip);
    CHECK((state & 1) == (flip == quant::kMaxFlips));
  }
  state = quant::next_flip_state(state, -1, true, false);
  CHECK((state >> 1 & 7) == 3);
  CHECK((state & 1) == 1);
  CHECK(state >> 4 == 15);  // -1 mod 16
}

TEST_CASE("oscillation: an average is the mean of the first steps, then decays", "[oscillation]") {
  Backend& b = backend();
  constexpr int64_t kCount = 1000;
  engine::Rng rng(1);
  const Tensor average = b.zeros({kCount}, b.real());
  std::vector<double> want(kCount, 0.0);
  for (int64_t step = 1; step <= 6; ++step) {
    const std::vector<double> w = normal(rng, kCount);
    b.average(average, make(b, {kCount}, b.real(), w), control_at(b, step), 0.75);
    const double rate = std::max(0.25, 1.0 / static_cast<double>(step));
    for (size_t i = 0; i < want.size(); ++i) want[i] += rate * (w[i] - want[i]);
    CHECK(relative_error(values_of(b, average), want) < 8 * epsilon_of(b.real()));
  }
}

TEST_CASE("oscillation: damping pulls quantized weights that are not clipped", "[oscillation]") {
  Backend& b = backend();
  const Weights weights(b);
  const std::vector<double> zeros(static_cast<size_t>(weights.total), 0.0);
  for (const DType dtype : {b.act(), b.real()}) {
    const Tensor g = make(b, {weights.total}, dtype, zeros);
    b.dampen(g, weights.w.tensor(), weights.q, 0.5);
    const auto w = values_of(b, weights.w.tensor()), wq = values_of(b, weights.wq.tensor()),
               s = values_of(b, weights.s.tensor()), got = values_of(b, g);
    const auto clipped = bytes_of(b, weights.clipped.tensor());
    int64_t pulled = 0;
    for (size_t i = 0; i < got.size(); ++i) {
      const bool quantized = i < 256 && !bit_of(clipped, i);
      const double want = quantized ? 0.5 * (w[i] - s[0] * wq[i]) : 0;
      CHECK(got[i] == Approx(want).epsilon(2 * epsilon_of(dtype)).margin(1e-9));
      pulled += got[i] != 0;
    }
    CHECK(pulled > 128);
  }
  CHECK(weights.untouched());
}

TEST_CASE("oscillation: a weight whose code changes seven times stops", "[oscillation]") {
  Backend& b = backend();
  Weights weights(b);
  std::vector<double> w = values_of(b, weights.w.tensor());
  const std::vector<double> ones(static_cast<size_t>(weights.total), 1.0);
  const Guarded state(b, {weights.total}, DType::U8);
  b.zero(state.tensor());
  // The first element of each group flips between the ends of its group; all others stay.
  for (int64_t step = 0; step <= quant::kMaxFlips + 1; ++step) {
    for (size_t i = 0; i < 256; i += 32)
      w[i] = step % 2 == 0 ? *std::max_element(&w[i + 1], &w[i + 32])
                           : *std::min_element(&w[i + 1], &w[i + 32]);
    b.copy(weights.w.tensor(), make(b, {weights.total}, b.real(), w));
    weights.quantize();
    const Tensor g = make(b, {weights.total}, b.act(), ones),
                 m = make(b, {weights.total}, b.act(), ones);
    b.freeze_flips(state.tensor(), g, m, weights.q, control_at(b, step));
    const auto gradient = values_of(b, g), moment = values_of(b, m);
    for (size_t i = 0; i < gradient.size(); ++i) {
      const bool frozen = i < 256 && i % 32 == 0 && step >= quant::kMaxFlips;
      CHECK(gradient[i] == (frozen ? 0 : 1));
      CHECK(moment[i] == (frozen ? 0 : 1));
    }
  }
  CHECK(values_of(b, weights.w.tensor()) == values_of(b, make(b, {weights.total}, b.real(), w)));
  CHECK(state.untouched());
}

TEST_CASE("oscillation: a killed run with all three ends with the same bytes", "[oscillation]") {
  const Fixture fixture;
  train::TrainConfig config = fixture.config;
  config.out = fixture.dir / "whole";
  config.e2e_steps = 6;
  config.e2e_lr = {3e-3};
  set_option(config, "e2e-average", "0.5");
  set_option(config, "e2e-damping", "0.01");
  set_option(config, "e2e-freeze", "flips");
  fixture.run(config);
  train::TrainConfig plain = config;
  plain.out = fixture.dir / "plain";
  set_option(plain, "e2e-average", "0");
  fixture.run(plain);
  CHECK(results(plain.out).at("e2e/final.safetensors") !=
        results(config.out).at("e2e/final.safetensors"));

  train::TrainConfig killed = config;
  killed.out = fixture.dir / "killed";
  for (const int64_t last : {3, 5}) {
    train::Observer observer;
    observer.after_e2e_step = [last](int64_t step) {
      if (step == last) throw Killed();
    };
    CHECK_THROWS_AS(fixture.run(killed, observer), Killed);
  }
  fixture.run(killed);
  CHECK(results(killed.out) == results(config.out));
}
