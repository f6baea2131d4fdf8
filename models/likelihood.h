// Log-likelihoods of the ends of token sequences: what multiple-choice tasks compare.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "models/llama.h"

namespace bbb::models {

// A context and its continuation: the last `scored` tokens, at least one and not all.
struct ScoredTokens {
  std::vector<int32_t> tokens;
  int64_t scored = 0;
};

// For each sequence, in the order given: the sum of log p(token | tokens before it), natural
// logarithm, over its scored tokens. Sequences of similar length share a batch, padded on the
// right; attention is causal, so padding changes no result. progress(done): sequences so far.
// Throws on a token outside the vocabulary and on a result that is not finite. kv: as perplexity().
std::vector<double> log_likelihoods(Llama& model, const std::vector<ScoredTokens>& sequences,
                                    const std::function<void(int64_t done)>& progress,
                                    quant::KvFormat kv = {});

}  // namespace bbb::models
