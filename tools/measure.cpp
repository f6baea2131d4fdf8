#include "tools/measure.h"

#include <algorithm>
#include <utility>

#include "engine/median.h"

namespace bbb::tools {

using engine::Backend;
using engine::DType;
using engine::Tensor;

namespace {

bool is_gpu(const Backend& backend) { return backend.device() == engine::DeviceType::Cuda; }

// Seconds of one product of this shape.
double measure_gemm(Backend& backend, const GemmShape& shape) {
  constexpr int kBuffers = 3;
  const int products = is_gpu(backend) ? 12 : 1;
  Tensor x[kBuffers], w[kBuffers], y[kBuffers];
  for (int i = 0; i < kBuffers; ++i) {
    const uint64_t seed = static_cast<uint64_t>(i);
    x[i] = random_activations(backend, {shape.m, shape.k}, 2 * seed);
    w[i] = random_activations(backend, {shape.n, shape.k}, 2 * seed + 1);
    y[i] = backend.empty({shape.m, shape.n}, backend.act());
  }
  const auto replay = backend.record([&] {
    for (int p = 0; p < products; ++p) {
      const int i = p % kBuffers;
      backend.gemm_nt(y[i], x[i], w[i], Tensor(), Tensor());
    }
  });
  return measure_seconds(backend, Repeats(), [&] { replay->run(); }) / products;
}

}  // namespace

double median(std::vector<double> values) { return engine::median(std::move(values)); }

double measure_read_bandwidth(Backend& backend) {
  const bool gpu = is_gpu(backend);
  const int64_t bytes =
      std::min<int64_t>(gpu ? int64_t{4} << 30 : 1 << 28, backend.memory_available_bytes() / 4);
  const int64_t size = engine::size_bytes(backend.real());
  const Tensor x = random_normal(backend, {bytes / size}, backend.real(), 1);
  const Tensor total = backend.empty({1}, backend.real());
  const int sums = gpu ? 8 : 1;
  const auto replay = backend.record([&] {
    for (int i = 0; i < sums; ++i) backend.sum(total, x, 1.0, engine::Write::Overwrite);
  });
  const double seconds = measure_seconds(backend, Repeats(), [&] { replay->run(); });
  return static_cast<double>(sums * x.numel() * size) / seconds;
}

double measure_gemm_peak(Backend& backend, const std::vector<GemmShape>& shapes) {
  engine::GemmTuning tuning;
  tuning.memory_bytes = backend.memory_available_bytes() / 4;
  tuning.step_runs = tuning.product_runs = kLongRun;
  const engine::GemmTuningScope tuned(backend, std::move(tuning));
  double best = 0;
  for (const GemmShape& shape : shapes)
    best = std::max(best, shape.flops() / measure_gemm(backend, shape));
  return best;
}

PeakProducts::Recorded PeakProducts::record(Backend& backend, const GemmShape& shape) {
  constexpr int kProducts = 2;
  Recorded of;
  const Tensor x = of.operands.emplace_back(random_activations(backend, {shape.m, shape.k}, 1));
  const Tensor w = of.operands.emplace_back(random_activations(backend, {shape.n, shape.k}, 2));
  const Tensor y = of.operands.emplace_back(backend.empty({shape.m, shape.n}, backend.act()));
  of.replay = backend.record([&backend, x, w, y] {
    for (int i = 0; i < kProducts; ++i) backend.gemm_nt(y, x, w, Tensor(), Tensor());
  });
  of.flops = kProducts * shape.flops();
  return of;
}

PeakProducts::PeakProducts(Backend& backend)
    : PeakProducts(backend, is_gpu(backend) ? std::vector<GemmShape>{{4096, 8192, 4096},
                                                                     {8192, 4096, 4096},
                                                                     {4096, 4096, 8192}}
                                            : peak_shapes(backend)) {}

PeakProducts::PeakProducts(Backend& backend, const std::vector<GemmShape>& shapes) {
  engine::GemmTuning tuning;
  tuning.memory_bytes = backend.memory_available_bytes() / 4;
  const engine::GemmTuningScope tuned(backend, std::move(tuning));
  std::vector<Recorded> all;
  std::vector<std::function<void()>> runs;
  for (const GemmShape& shape : shapes) {
    all.push_back(record(backend, shape));
    runs.push_back([replay = all.back().replay.get()] { replay->run(); });
  }
  const std::vector<double> seconds = measure_in_turns(backend, Repeats(), runs);
  double best = 0;
  for (size_t i = 0; i < all.size(); ++i)
    if (const double rate = all[i].flops / seconds[i]; rate > best) {
      best = rate;
      of_ = std::move(all[i]);
    }
}

std::vector<GemmShape> peak_shapes(const Backend& backend) {
  if (!is_gpu(backend)) return {{512, 512, 512}};
  return {{8192, 8192, 8192}, {16384, 4096, 4096}, {16384, 11008, 4096}, {16384, 4096, 11008}};
}

}  // namespace bbb::tools
