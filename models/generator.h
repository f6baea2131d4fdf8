// Generator: text from a model, a token at a time, for B sequences at once.
//
//     prefill(b, tokens)    runs the new tokens of sequence b and chooses its next token
//     run(steps, each)      embed, blocks, head, position + 1, sample; again and again
//
// A step is recorded once. Each sequence has its own position in the key-value cache, and the
// chosen tokens stay on the device, where the next step reads them. The host gets a copy. On a GPU
// it is up to kAhead steps behind, so the device never waits for it:
//
//     device   step 0 | step 1 | step 2 | step 3 | ..
//     host              each(0)  each(1)  each(2)
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "models/llama.h"

namespace bbb::models {

class Generator {
 public:
  // Every sequence has `capacity_tokens` positions. `model` must outlive the Generator.
  Generator(Llama& model, int64_t batch, int64_t capacity_tokens, const engine::SampleSpec& spec,
            quant::KvFormat kv = {});
  Generator(const Generator&) = delete;
  Generator& operator=(const Generator&) = delete;

  // Makes `tokens` the content of sequence b and returns the token after them. Keys and values of a
  // prefix that the sequence holds already are kept. The draws depend on `seed` and the tokens'
  // positions alone.
  int32_t prefill(int64_t b, const std::vector<int32_t>& tokens, uint64_t seed);
  // Empties sequence b. Its place takes part in every step; what comes out means nothing.
  void clear(int64_t b);
  // As if each sequence held `count` tokens: for measurements.
  void assume(int64_t count);

  // Runs up to `steps` steps. A step appends to each sequence the token that was chosen last, and
  // chooses the next. each(tokens) gets the chosen tokens (B) of every step, in order. After it
  // has returned false no step starts, but it gets the tokens of those that have started.
  void run(int64_t steps, const std::function<bool(const std::vector<int32_t>& tokens)>& each);

  // How many of `tokens` a prefill of sequence b would keep.
  int64_t kept(int64_t b, const std::vector<int32_t>& tokens) const;
  // Steps that still fit into the cache.
  int64_t steps_left() const;
  int64_t capacity() const { return capacity_; }
  // Whether a step computes all blocks in one operation.
  bool fused() const { return kv_.decoder != nullptr; }
  int64_t kv_bytes_per_token() const { return kv_.bytes_per_token(); }

 private:
  void set_position(const Tensor& start, int64_t position);
  void start_step();

  static constexpr int64_t kAhead = 2;
  static constexpr int64_t kLogRows = kAhead + 1;

  Llama& model_;
  engine::Backend& backend_;
  int64_t batch_, capacity_;
  engine::SampleSpec spec_;
  KvCache kv_;
  Tensor counters_;  // I32 (B + 1): kv_.start, then the number of steps
  Tensor tokens_;    // I32 (B): chosen last
  engine::SampleRows rows_;
  std::shared_ptr<engine::Storage> host_log_;           // the same rows as rows_.log
  std::vector<std::shared_ptr<engine::Fence>> logged_;  // host_log_ has the row
  int64_t started_ = 0;                                 // steps
  std::vector<std::vector<int32_t>> held_;              // the tokens of each sequence in the cache
  std::vector<int32_t> last_;                           // tokens_, as far as the host knows
  std::unique_ptr<engine::Replay> step_;
};

}  // namespace bbb::models
