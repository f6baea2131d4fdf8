// Times products of rows of x with a matrix, packed and dense. A recorded graph holds many
// products. Cold: each takes the next copy of the weight.
//
//     bench_gemv    few rows: packed_gemv, quantized_gemv, gemm_nt
//     bench_gemm    any number: a packed linear as a model multiplies by it, gemm_nt
#include <algorithm>
#include <memory>

#include "models/quant_linear.h"
#include "tools/bench.h"

namespace bbb::tools {

using engine::Backend;
using engine::copies_for;
using engine::PackedWeight;
using engine::Tensor;

namespace {

// In a graph, about 3 to 5 ms on an H100: far more time than its launch.
constexpr int64_t kMaxProducts = 2048;
constexpr double kMaxFlops = 2e12, kMaxBytes = 1e10;

struct Measured {
  double seconds;  // of one product
  double peak;     // TimedProduct
};

// product(i) queues one with copy i of the weight. `peak` may be null.
Measured measure_products(Backend& backend, const TimedProduct& timed, int64_t copies,
                          const PeakProducts* peak,
                          const std::function<void(int64_t copy)>& product) {
  const double most = std::min(kMaxFlops / timed.flops, kMaxBytes / timed.bytes);
  const auto wanted = static_cast<int64_t>(std::clamp<double>(most, 1, kMaxProducts));
  const engine::ProductRounds rounds(backend, wanted, copies, product);
  std::vector<std::function<void()>> runs = {[&] { rounds.run(); }};
  if (peak != nullptr) runs.push_back([&] { peak->run(); });
  const std::vector<double> seconds = measure_in_turns(backend, Repeats(), runs);
  return {seconds[0] / static_cast<double>(rounds.products()),
          peak != nullptr ? peak->flops() / seconds[1] : 0};
}

// product(i) makes y (M, N) from x with copy i of a weight (N, K). `bytes` of all three.
TimedProduct time_product(Backend& backend, const GemmShape& shape, int64_t copies, int64_t bytes,
                          const PeakProducts* peak,
                          const std::function<void(int64_t copy)>& product) {
  TimedProduct timed;
  timed.bytes = static_cast<double>(bytes);
  timed.flops = shape.flops();
  const Measured cold = measure_products(backend, timed, copies, peak, product);
  const Measured warm = measure_products(backend, timed, 1, peak, product);
  timed.cold_s = cold.seconds, timed.cold_peak = cold.peak;
  timed.warm_s = warm.seconds, timed.warm_peak = warm.peak;
  return timed;
}

// gemm_nt with act weights.
TimedProduct time_dense(Backend& backend, int64_t n, const Tensor& x, int64_t rotation_bytes,
                        const PeakProducts* peak) {
  const int64_t rows = x.dim(0), k = x.dim(1), act = engine::size_bytes(backend.act());
  const int64_t copies = copies_for(n * k * act, rotation_bytes);
  const Tensor weights = random_activations(backend, {copies * n, k}, 2);
  const Tensor y = backend.empty({rows, n}, backend.act());
  return time_product(
      backend, {rows, n, k}, copies, (n * k + rows * (k + n)) * act, peak,
      [&](int64_t i) { backend.gemm_nt(y, x, weights.rows(i * n, n), Tensor(), Tensor()); });
}

// Forward of a packed linear, from the operand that its input of these bits makes of x.
TimedProduct time_linear(Backend& backend, quant::LinearFormat format, const Tensor& x,
                         int activation_bits, int64_t rotation_bytes, const PeakProducts* peak) {
  format.input.bits = activation_bits;
  const int64_t n = format.n, k = format.stored_k();
  const int64_t rows = x.dim(0), act = engine::size_bytes(backend.act());
  models::Operand operand;
  operand.set(backend, format, true);
  autograd::Tape tape(backend, autograd::TapeMode::Inference);
  const models::LinearInput input = operand.plain(tape, autograd::Var(x));

  const Tensor buffer = backend.empty({n * k}, backend.act());
  std::vector<std::unique_ptr<models::QuantLinear>> linears;
  for (PackedWeight& weight :
       engine::random_weights(backend, format, copies_for(format.bytes(), rotation_bytes))) {
    linears.push_back(std::make_unique<models::QuantLinear>(backend, "bench", n, format.k));
    linears.back()->set_packed(std::move(weight), buffer);
  }
  return time_product(backend, {rows, n, k}, static_cast<int64_t>(linears.size()),
                      format.bytes() + rows * (k + n) * act, peak, [&](int64_t i) {
                        linears[static_cast<size_t>(i)]->forward(tape, input, autograd::Var());
                      });
}

}  // namespace

GemvResult bench_gemv(Backend& backend, const quant::LinearFormat& format, int64_t rows,
                      int64_t rotation_bytes) {
  const int64_t n = format.n, k = format.stored_k();
  const int64_t act = engine::size_bytes(backend.act());
  const int64_t real = engine::size_bytes(backend.real());
  const int64_t y_bytes = rows * n * act, x_bytes = rows * k * act;
  const int64_t operand_bytes = rows * (k + format.groups() * (1 + real));

  GemvResult result;
  const Tensor x = random_activations(backend, {rows, k}, 1);
  {
    const Tensor y = backend.empty({rows, n}, backend.act());
    const engine::OperandRows operand =
        engine::random_operand(backend, rows, format, format.weight.bits);
    const std::vector<PackedWeight> weights =
        engine::random_weights(backend, format, copies_for(format.bytes(), rotation_bytes));
    const auto copies = static_cast<int64_t>(weights.size());
    const auto weight = [&](int64_t i) -> const PackedWeight& {
      return weights[static_cast<size_t>(i)];
    };
    result.packed =
        time_product(backend, {rows, n, k}, copies, format.bytes() + x_bytes + y_bytes, nullptr,
                     [&](int64_t i) { backend.packed_gemv(y, x, weight(i), Tensor()); });
    result.quantized = time_product(
        backend, {rows, n, k}, copies, format.bytes() + operand_bytes + y_bytes, nullptr,
        [&](int64_t i) { backend.quantized_gemv(y, operand, weight(i), Tensor()); });
  }
  result.dense = time_dense(backend, n, random_activations(backend, {rows, format.k}, 1),
                            rotation_bytes, nullptr);
  return result;
}

GemvResult bench_gemm(Backend& backend, const quant::LinearFormat& format, int64_t rows,
                      int64_t rotation_bytes, const PeakProducts& peak) {
  const Tensor x = random_activations(backend, {rows, format.k}, 1);
  GemvResult result;
  result.packed = time_linear(backend, format, x, models::kDenseBits, rotation_bytes, &peak);
  result.quantized = time_linear(backend, format, x, format.weight.bits, rotation_bytes, &peak);
  result.dense = time_dense(backend, format.n, x, rotation_bytes, &peak);
  return result;
}

}  // namespace bbb::tools
