// Times and rates of a device, as commands report them.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "engine/backend.h"

namespace bbb::tools {

double median(std::vector<double> values);  // the upper one of two; 0 of none

// Median seconds of one call of `run`, which queues work: calls are timed in groups, each waited
// for, after `warmup` calls that are not.
struct Repeats {
  int64_t warmup = 3;
  int64_t groups = 9;
  int64_t calls = 1;  // a group
};
double measure_seconds(engine::Backend& backend, const Repeats& repeats,
                       const std::function<void()>& run);

// Bytes read and written a second by a copy far larger than any cache.
double measure_bandwidth(engine::Backend& backend);

// Normal values, act: a stretch of random ones repeated, since a card's clock depends on its data.
engine::Tensor random_activations(engine::Backend& backend, engine::Shape shape, uint64_t seed);
// U8 (count): random bytes from `first` on, `choices` of them.
engine::Tensor random_bytes(engine::Backend& backend, int64_t count, int first, int choices,
                            uint64_t seed);

// y (M, N) = x (M, K) w^T (N, K) in act.
struct GemmShape {
  int64_t m, n, k;
  double flops() const { return 2.0 * static_cast<double>(m) * static_cast<double>(n * k); }
};
// Steps: benchmarks choose algorithms as a run of so many does.
inline constexpr int64_t kLongRun = 100'000;

// Floating-point operations a second of gemm_nt: the best shape's median, buffers rotating, the
// algorithms chosen by timing.
double measure_gemm_peak(engine::Backend& backend, const std::vector<GemmShape>& shapes);
// The shapes at which a GPU comes near its peak; small ones for a CPU.
std::vector<GemmShape> peak_shapes(const engine::Backend& backend);

}  // namespace bbb::tools
