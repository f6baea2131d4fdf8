// CountingBackend: the bytes that it counts against those of the device's allocator.
#include "engine/counting_backend.h"

#include <catch2/catch.hpp>

#include "autograd/ops.h"
#include "tests/op_test.h"

namespace bbb::tests {
namespace {

using autograd::Tape;
using autograd::TapeMode;
using autograd::Var;
using engine::CountingBackend;

// The ops of one block, forward and backward, with sizes that round differently. `weights` outlive
// the pass.
void pass(Backend& b, const std::vector<Tensor>& weights) {
  const int64_t batch = 2, t = 96, heads = 4, d = 64, width = heads * d;
  Tape tape(b, TapeMode::Training);
  const Var x = Var::input(b.empty({batch, t, width}, b.act()));
  const Var norm = Var::leaf(weights[0], weights[1], engine::Write::Overwrite);
  const Var h = rms_norm(tape, x, norm, 1e-5);
  const Var w = Var::leaf(weights[2], weights[3], engine::Write::Overwrite);
  const Var q = reshape(tape, linear(tape, h, w, Tensor(), Var()), {batch, t, heads, d});
  const Var out = attention(tape, q, q, q, Tensor(), {});
  const Var y = swiglu(tape, reshape(tape, out, {batch, t, width}), x);
  const Var loss = mse(tape, y, b.empty({batch, t, width}, b.act()));
  tape.backward(loss);
  b.input_scale_gradient(b.empty({width}, b.real()), weights[0], weights[2], Tensor(), weights[3],
                         engine::Write::Overwrite);
}

std::vector<Tensor> weights_of(Backend& b) {
  const int64_t width = 256;
  std::vector<Tensor> weights;
  weights.push_back(b.zeros({width}, b.real()));
  weights.push_back(b.zeros({width}, b.real()));
  weights.push_back(b.zeros({width, width}, b.act()));
  weights.push_back(b.zeros({width, width}, b.real()));
  return weights;
}

// The peak bytes of tensors during `work`, beyond those held before.
int64_t held_bytes(Backend& b, const std::function<void()>& work) {
  b.reset_memory_peak();
  const int64_t before = b.memory_peak_bytes();
  work();
  b.synchronize();
  return b.memory_peak_bytes() - before;
}

}  // namespace

TEST_CASE("counting: the peak of ops equals the device's", "[counting]") {
  CountingBackend counter(backend());
  CHECK_FALSE(counter.computes());
  const auto work = [](Backend& b) {
    return held_bytes(b, [&] {
      const std::vector<Tensor> weights = weights_of(b);
      pass(b, weights);
    });
  };
  const int64_t counted = work(counter);
  CHECK(counted > 0);
  CHECK(counted == work(backend()));
  CHECK(counted == work(counter));  // everything was freed
}

TEST_CASE("counting: the peak of recordings equals the device's", "[counting]") {
  CountingBackend counter(backend());
  const auto work = [](Backend& b) {
    return held_bytes(b, [&] {
      const std::vector<Tensor> weights = weights_of(b);
      const auto first = b.record([&] { pass(b, weights); });
      const auto second = b.record([&] {
        pass(b, weights);
        b.overlap([&] { b.zero(b.empty({3 << 20}, DType::U8)); },
                  [&] { b.zero(b.empty({5 << 20}, DType::U8)); });
      });
      first->run();
      second->run();
      const Tensor another = b.empty({7 << 20}, DType::U8);
    });
  };
  const int64_t counted = work(counter);
  CHECK(counted == work(backend()));
  CHECK(counter.recorded_bytes() == 0);  // the recordings are gone
  {
    const auto replay = counter.record([&] { counter.zeros({3 << 20}, DType::U8); });
    CHECK(counter.recorded_bytes() == (on_cuda() ? 4 << 20 : 0));
  }
}

TEST_CASE("counting: an upload reads no host value, and a download gives zeros", "[counting]") {
  CountingBackend counter(backend());
  const Tensor t = counter.empty({4}, DType::I32);
  const std::vector<int32_t> values{1, 2, 3, 4};
  counter.upload(t, values.data());
  std::vector<int32_t> back(4, 7);
  counter.download(back.data(), t);
  CHECK(back == std::vector<int32_t>(4, 0));
  CHECK_THROWS_AS(counter.add(t, t, t), Error);  // shapes and types are still checked
}

}  // namespace bbb::tests
