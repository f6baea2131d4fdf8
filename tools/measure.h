// Times and rates of a device, as commands report them.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "engine/measure.h"

namespace bbb::tools {

using engine::measure_in_turns;
using engine::measure_seconds;
using engine::random_activations;
using engine::random_bytes;
using engine::random_normal;
using engine::Repeats;

double median(std::vector<double> values);  // the upper of two middle values; 0 if there is none

// Bytes per second of a sum over a tensor far larger than any cache.
double measure_read_bandwidth(engine::Backend& backend);

// y (M, N) = x (M, K) w^T (N, K) in act.
struct GemmShape {
  int64_t m, n, k;
  double flops() const { return 2.0 * static_cast<double>(m) * static_cast<double>(n * k); }
};
// Steps: benchmarks choose algorithms as a run of this length does.
inline constexpr int64_t kLongRun = 100'000;

// Floating-point operations per second of gemm_nt: the median of the best shape, with rotating
// buffers and algorithms chosen by timing.
double measure_gemm_peak(engine::Backend& backend, const std::vector<GemmShape>& shapes);
// Shapes at which a GPU comes near its peak; a small one for a CPU.
std::vector<GemmShape> peak_shapes(const engine::Backend& backend);

// Products of gemm_nt that come near the peak, to be timed in turns with other work: under load, a
// GPU's clock changes within tens of milliseconds. A run takes less than one, so that it does not
// change the clock itself. The algorithm is the fastest of the library's suggestions.
class PeakProducts {
 public:
  explicit PeakProducts(engine::Backend& backend);
  // Of the fastest of `shapes`.
  PeakProducts(engine::Backend& backend, const std::vector<GemmShape>& shapes);
  void run() const { of_.replay->run(); }
  double flops() const { return of_.flops; }  // of a run

 private:
  struct Recorded {
    std::vector<engine::Tensor> operands;
    std::unique_ptr<engine::Replay> replay;
    double flops = 0;
  };
  static Recorded record(engine::Backend& backend, const GemmShape& shape);
  Recorded of_;
};

}  // namespace bbb::tools
