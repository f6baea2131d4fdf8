// Times of work on a device, and random operands for it. Benchmarks and training, which chooses
// formats by their times, measure alike.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "engine/backend.h"

namespace bbb::engine {

// Median seconds of one call of `run`, which queues work. Calls are timed in groups after `warmup`
// untimed calls; each group ends when the device has finished it.
struct Repeats {
  int64_t warmup = 3;
  int64_t groups = 9;
  int64_t calls = 1;  // per group
};
double measure_seconds(Backend& backend, const Repeats& repeats, const std::function<void()>& run);
// The same of several works that take turns, so that all see the same clocks of the device.
std::vector<double> measure_in_turns(Backend& backend, const Repeats& repeats,
                                     const std::vector<std::function<void()>>& runs);

// A product with the next of `copies` copies of a weight each time, so that none is still in a
// cache. A run is one product or, on a GPU, a recording of whole rounds of the copies, at least
// `wanted` products.
class ProductRounds {
 public:
  ProductRounds(Backend& backend, int64_t wanted, int64_t copies,
                std::function<void(int64_t copy)> product);
  ProductRounds(const ProductRounds&) = delete;  // the recording refers to it
  void run() const { replay_->run(); }
  int64_t products() const { return products_; }  // of a run

 private:
  std::function<void(int64_t copy)> product_;
  int64_t copies_, products_;
  int64_t next_ = 0;
  std::unique_ptr<Replay> replay_;
};
// The copies of a weight that fill `rotation_bytes`, at least one.
int64_t copies_for(int64_t weight_bytes, int64_t rotation_bytes);

// Random normal values in act, or in `dtype`, repeated after the first 2^20: a GPU's clock depends
// on its data.
Tensor random_activations(Backend& backend, Shape shape, uint64_t seed);
Tensor random_normal(Backend& backend, Shape shape, DType dtype, uint64_t seed);
// U8 (count): random bytes from `first` to `first + choices - 1`.
Tensor random_bytes(Backend& backend, int64_t count, int first, int choices, uint64_t seed);
// A quantized operand (rows, K') for linears of this format, with codes of `bits` bits.
OperandRows random_operand(Backend& backend, int64_t rows, const quant::LinearFormat& format,
                           int bits);
// `count` repacked copies of a stored weight of random codes, with scales from 1/2 to 15/8.
std::vector<PackedWeight> random_weights(Backend& backend, const quant::LinearFormat& format,
                                         int64_t count);

}  // namespace bbb::engine
