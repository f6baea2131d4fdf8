// A batch runs through the blocks as a whole. Only the rows that predict a scored token go through
// the head. The host adds the losses in F64.
#include "models/likelihood.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>

namespace bbb::models {

namespace {

// Enough rows for an efficient matrix product, padding included.
int64_t batch_tokens(const Backend& backend) {
  return backend.device() == engine::DeviceType::Cuda ? 16384 : 1024;
}

// The last token of a sequence is predicted, never an input.
int64_t input_length(const ScoredTokens& sequence) {
  return static_cast<int64_t>(sequence.tokens.size()) - 1;
}

void check_sequence(const ScoredTokens& sequence, int64_t vocab) {
  BBB_ASSERT(sequence.scored > 0 && sequence.scored <= input_length(sequence));
  for (int32_t id : sequence.tokens)
    BBB_CHECK(id >= 0 && id < vocab, "token ", id, " is not in the model's vocabulary of ", vocab);
}

// The losses of the scored tokens of `batch`, one sequence after the other.
std::vector<float> scored_losses(Llama& model, const std::vector<const ScoredTokens*>& batch,
                                 int64_t length, quant::KvFormat kv) {
  Backend& backend = model.backend();
  const int64_t count = static_cast<int64_t>(batch.size());
  std::vector<int32_t> inputs(static_cast<size_t>(count * length), 0);
  std::vector<int32_t> rows, targets;  // of the scored tokens: b * length + t, and the token at t+1
  for (int64_t b = 0; b < count; ++b) {
    const std::vector<int32_t>& tokens = batch[static_cast<size_t>(b)]->tokens;
    std::copy(tokens.begin(), tokens.end() - 1, inputs.begin() + b * length);
    const int64_t end = input_length(*batch[static_cast<size_t>(b)]);
    for (int64_t t = end - batch[static_cast<size_t>(b)]->scored; t < end; ++t) {
      rows.push_back(static_cast<int32_t>(b * length + t));
      targets.push_back(tokens[static_cast<size_t>(t + 1)]);
    }
  }
  const int64_t scored = static_cast<int64_t>(rows.size());
  const int64_t width = model.config().d_model;
  const Tensor losses = backend.empty({scored}, backend.real());
  const Tensor scored_h = backend.empty({scored, width}, backend.act());
  Tape tape(backend, autograd::TapeMode::Inference);
  {
    std::optional<KvCache> cache;
    if (kv.quantized()) cache.emplace(backend, model.config(), count, length, kv);
    const Var h = model.forward(tape, upload_ints(backend, inputs, {count, length}),
                                cache ? &*cache : nullptr, Recompute::None);
    // A lookup in the table of all hidden states copies the scored rows.
    backend.embed(scored_h, upload_ints(backend, rows, {scored}),
                  h.value().view({count * length, width}));
  }
  model.token_losses(losses, scored_h, upload_ints(backend, targets, {scored}));
  return download_floats(backend, losses);
}

}  // namespace

std::vector<double> log_likelihoods(Llama& model, const std::vector<ScoredTokens>& sequences,
                                    const std::function<void(int64_t done)>& progress,
                                    quant::KvFormat kv) {
  for (const ScoredTokens& sequence : sequences) check_sequence(sequence, model.config().vocab);
  // Longest first: a batch that does not fit in memory fails at once, not after an hour.
  std::vector<size_t> order(sequences.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return input_length(sequences[a]) > input_length(sequences[b]);
  });

  std::vector<double> sums(sequences.size());
  for (size_t begin = 0; begin < order.size();) {
    const int64_t length = input_length(sequences[order[begin]]);
    const size_t most =
        static_cast<size_t>(std::max<int64_t>(1, batch_tokens(model.backend()) / length));
    const size_t end = std::min(order.size(), begin + most);
    std::vector<const ScoredTokens*> batch;
    for (size_t i = begin; i < end; ++i) batch.push_back(&sequences[order[i]]);
    const std::vector<float> losses = scored_losses(model, batch, length, kv);
    size_t next = 0;
    for (; begin < end; ++begin) {
      double& sum = sums[order[begin]];
      for (int64_t i = 0; i < sequences[order[begin]].scored; ++i) sum -= losses[next++];
      BBB_CHECK(std::isfinite(sum), "the log-likelihood of sequence ", order[begin], " is ", sum,
                ": it cannot be compared");
    }
    if (progress) progress(static_cast<int64_t>(end));
  }
  return sums;
}

}  // namespace bbb::models
