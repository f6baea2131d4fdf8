// Benchmarks on random weights: the trainers' own steps, packed products, decoding and prefill.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "engine/backend.h"
#include "models/config.h"
#include "models/llama.h"
#include "models/recompute.h"
#include "tools/measure.h"
#include "train/config.h"

namespace bbb::tools {

struct TrainBench {
  models::LlamaConfig model;
  bool end_to_end = false;  // true: the whole model and its teacher; false: one block
  int64_t batch = 8;        // windows a step, of all ranks together
  int64_t seq_len = 2048;
  int64_t steps = 100;                         // timed
  train::Stage widths;                         // of weights and activations
  train::TrainConfig grid;                     // its grid options; weights' ranges are not searched
  std::optional<models::Recompute> recompute;  // empty: by memory
  std::vector<GemmShape> peak;
  train::GemmAlgorithms gemm_algorithms = train::GemmAlgorithms::Timed;  // of the step
  std::string gemm_file;                        // stores these algorithms; empty: no file
  std::function<void(const std::string&)> say;  // takes reports of their timing; may be empty
  std::shared_ptr<engine::Comm> comm = std::make_shared<engine::Comm>();  // ranks of one step
  int64_t micro_batch = 0;  // end to end: windows through the model at once; 0: by device
  train::Moments moments = train::Moments::Wide;  // end to end
};

struct TrainBenchResult {
  double step_s = 0;
  double quantize_s = 0, forward_s = 0, backward_s = 0, optimizer_s = 0;  // their sum is step_s
  double flops = 0;      // useful ones, of a rank's step
  double gemm_peak = 0;  // flops per second, measured after the step
  int64_t kernels = 0;   // per step, in one graph; 0 on the CPU
  int64_t peak_bytes = 0;
};

// Useful floating-point operations to train on one token, without recomputation. P: weights in the
// linears. T: seq_len.
//
//   block        6 P              linears: forward, dx and dw, 2 P each
//                + 7 T H d        causal attention over T / 2 keys: scores and values, 2 T H d
//                                 forward, 2.5 times that backward
//                - 2 P(q, k, v)   a block's input takes no gradient: these have no dx
//   end to end   the blocks' sum, where only the first block saves those dx
//                + 2 P + 2 T H d  the teacher, for every block
//                + 6 V D          the head: logits, their gradient with respect to h, the
//                                 teacher's logits
double training_flops_per_token(const models::LlamaConfig& model, int64_t seq_len, bool end_to_end);

// Times model.layers blocks end to end, or only the first block. The time of each part of a step is
// the difference between a recording that ends after it and one that ends before it. Every rank
// calls it.
TrainBenchResult bench_train(engine::Backend& backend, const TrainBench& bench);

// The largest number of layers, at most the model's own, that end-to-end training of this size can
// fit on the device of every rank; at least 1.
int64_t layers_that_fit(engine::Backend& backend, const TrainBench& bench);

// One kind of product: what it must read and write, its operations, and its time with the weight in
// memory (cold) and where it fits, in a cache (warm). Beside each time the operations per second of
// the PeakProducts that took turns with it; 0: there were none.
struct TimedProduct {
  double bytes = 0, flops = 0;
  double cold_s = 0, warm_s = 0;
  double cold_peak = 0, warm_peak = 0;
};

struct GemvResult {
  TimedProduct packed;     // packed weights, act x: packed_gemv
  TimedProduct quantized;  // packed weights, x of as many bits: quantized_gemv
  TimedProduct dense;      // act weights (N, K): gemm_nt
};

// Times products of `rows` rows of x (rows, K'), at most Backend::kMaxPackedRows, with a packed
// weight of this format. Cold products rotate through copies of the weight that fill
// `rotation_bytes`, so that none is still in a cache.
GemvResult bench_gemv(engine::Backend& backend, const quant::LinearFormat& format, int64_t rows,
                      int64_t rotation_bytes);

// The same for any number of rows: `packed` and `quantized` are the forward of a model's packed
// linear, from a finished operand of 16 bits and of as many as the weight has. With at most
// Backend::kMaxPackedRows rows, the time holds the quantization.
GemvResult bench_gemm(engine::Backend& backend, const quant::LinearFormat& format, int64_t rows,
                      int64_t rotation_bytes, const PeakProducts& peak);

struct DecodeBench {
  int64_t batch = 1;
  std::vector<int64_t> prompts;  // tokens of each prefill
  int64_t tokens = 256;          // generated after it
  int64_t context = 1024;        // and steps with so many tokens in the cache
  quant::KvFormat kv = {};

  int64_t positions() const;  // that a sequence reaches at most
  // Drops prompts and shortens the context, if these may change, to what `positions` allow.
  void shrink(int64_t positions, bool change_prompts, bool change_context);
};

struct DecodeTime {
  int64_t prompt = 0;    // tokens in the cache before the first step
  double prefill_s = 0;  // of all sequences; 0: none was run
  double step_s = 0;     // after a prefill the mean, else the median
  double bytes = 0;      // that a step reads on average: weights, head, keys and values
};

struct DecodeResult {
  int64_t weight_bytes = 0, head_bytes = 0;  // of a step: blocks; head
  int64_t kv_bytes = 0;                      // of a token of a sequence
  std::vector<DecodeTime> prefilled;         // of bench.prompts
  DecodeTime at_context;
};

// Times greedy decoding after random prompts.
DecodeResult bench_decode(models::Llama& model, const DecodeBench& bench);

// Seconds of a prefill of random tokens, the choice of the next token included.
double bench_prefill(models::Llama& model, int64_t tokens);
// Its floating-point operations: 2 P + 2 T H d a token and block, with P weights in the linears and
// T tokens, of which a query sees half on average; 2 V D for the head, of the last token alone.
double prefill_flops(const models::LlamaConfig& model, int64_t tokens);

}  // namespace bbb::tools
