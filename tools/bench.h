// Benchmarks on random weights: the trainers' own steps, and packed matrix-vector products.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "engine/backend.h"
#include "models/config.h"
#include "models/recompute.h"
#include "tools/measure.h"
#include "train/config.h"

namespace bbb::tools {

struct TrainBench {
  models::LlamaConfig model;
  bool end_to_end = false;  // the whole model and its teacher; else one block
  int64_t batch = 8;        // windows a step
  int64_t seq_len = 2048;
  int64_t steps = 100;                         // timed
  std::optional<models::Recompute> recompute;  // empty: by memory
  std::vector<GemmShape> peak;
  train::GemmAlgorithms gemm_algorithms = train::GemmAlgorithms::Timed;  // of the step
  std::string gemm_file;                        // keeps these algorithms; empty: none
  std::function<void(const std::string&)> say;  // what timing them reports; may be empty
};

struct TrainBenchResult {
  double step_s = 0;
  double quantize_s = 0, forward_s = 0, backward_s = 0, optimizer_s = 0;  // their sum is step_s
  double flops = 0;                                                       // useful ones of a step
  double gemm_peak = 0;  // flops a second, measured afterwards
  int64_t kernels = 0;   // a step, in one graph; 0 on the CPU
  int64_t peak_bytes = 0;
};

// Useful floating-point operations of one token's training; recomputation is not counted. P weights
// in the linears, T seq_len:
//   block        6 P + 7 T H d        linears: forward, dx, dw, 2 P each. Causal attention: scores
//                                     and values over T / 2 keys, 2 T H d forward, 2.5 times that
//                                     backward. Less 2 for each weight of q, k and v: a block's
//                                     input takes no gradient, and no dx is made for it.
//   end to end   all blocks' sum, where only the first saves those dx; 2 P + 2 T H d for the
//                teacher; and the head: 6 V D for logits, their gradient with respect to h and the
//                teacher's logits.
double training_flops_per_token(const models::LlamaConfig& model, int64_t seq_len, bool end_to_end);

// model.layers blocks, end to end; otherwise the first one alone. Every part of a step is the
// difference of two recordings that end before and after it.
TrainBenchResult bench_train(engine::Backend& backend, const TrainBench& bench);

// The layers, at most the model's own, with which end-to-end training of this size fits the device.
int64_t layers_that_fit(engine::Backend& backend, const TrainBench& bench);

struct GemvShape {
  int64_t n, k;
};

struct GemvResult {
  GemvShape shape;
  double packed_s = 0, dense_s = 0;
  double packed_bytes = 0, dense_bytes = 0;  // weights, x and y
};

// One row through packed 2-bit weights, and through act weights by gemm_nt. Each product reads the
// next of as many weights as fill `rotation_bytes`, so that none waits in a cache.
GemvResult bench_gemv(engine::Backend& backend, GemvShape shape, int64_t rotation_bytes);

}  // namespace bbb::tools
