// A full-precision Llama of random weights without a file: for benchmarks, and to try out a model's
// size before its weights are available.
//
//   linears, embedding, head   about normal, deviation 1 / sqrt(K), truncated to bf16
//   norms, biases              1, 0
//
// A tensor is drawn when it is loaded. It depends only on the seed, its name and its shape.
#pragma once

#include <memory>
#include <string>

#include "models/checkpoint.h"

namespace bbb::models {

// `path`: the name in errors and records.
std::unique_ptr<Checkpoint> make_synthetic_checkpoint(LlamaConfig config, std::string path,
                                                      uint64_t seed = 0);

// A checkpoint without values: load() gives an empty vector. For backends that do not compute.
std::unique_ptr<Checkpoint> make_weightless_checkpoint(LlamaConfig config);

}  // namespace bbb::models
