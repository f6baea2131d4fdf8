// A full-precision Llama of random weights that lies in no file: for benchmarks, and for runs that
// prove a model's size out before its weights are there.
//
//   linears, embedding, head   about normal, scale 1 / sqrt(K), cut to bf16
//   norms                      1
//
// A tensor is drawn when it is loaded, from the seed and its name alone.
#pragma once

#include <memory>
#include <string>

#include "models/checkpoint.h"

namespace bbb::models {

// `path` is what errors and records name.
std::unique_ptr<Checkpoint> make_synthetic_checkpoint(LlamaConfig config, std::string path,
                                                      uint64_t seed = 0);

// A checkpoint of these sizes without values: load() gives an empty vector. For backends that do
// not compute.
std::unique_ptr<Checkpoint> make_weightless_checkpoint(LlamaConfig config);

}  // namespace bbb::models
