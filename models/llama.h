// Llama: the one forward pass of bbb. Teacher and student, block-wise and end to end, training,
// prefill and decode run these functions.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "models/checkpoint.h"
#include "models/quant_linear.h"

namespace bbb::models {

using autograd::ParameterSet;

// Keys and values of one sequence for every layer, and the position at which the next token stands.
struct KvCache {
  KvCache(Backend& backend, const LlamaConfig& config, int64_t capacity_tokens);
  std::vector<Tensor> k, v;  // per layer, act (1, capacity, K, d)
  Tensor start;              // I32 (1) on the device
  int64_t capacity;
};

// An RMSNorm weight, trainable or not.
struct NormWeight {
  Tensor value;                    // real (D)
  Parameter* parameter = nullptr;  // then value is its master
  Var var() const;                 // a leaf into the parameter's gradient, or a constant
  bool grad_written = false;
};

class LlamaBlock {
 public:
  LlamaBlock(Backend& backend, const LlamaConfig& config, int64_t layer, Tensor inv_freq);

  // x act (B, T, D) -> (B, T, D). kv: keys and values are appended at kv->start and attended to.
  Var forward(Tape& tape, const Var& x, KvCache* kv);

  // Full-precision weights (rounded to act) from a checkpoint.
  void load_float(const Checkpoint& source);
  void load_packed(const Checkpoint& source, Tensor buffer);
  // Makes every linear FakeQuant and the norms trainable, as parameters of `set` (not yet
  // allocated).
  void declare_parameters(ParameterSet& set);
  void bind_parameters(ParameterSet& set, GridSpec spec);  // after set.allocate(), same order
  void load_masters(const Checkpoint& source);             // full precision into the parameters
  void set_bits(int bits);
  void prepare();
  void finish_backward();

  std::vector<QuantLinear*> linears();  // in the order of block_linears()
  NormWeight& input_norm() { return input_norm_; }
  NormWeight& post_norm() { return post_norm_; }
  int64_t layer() const { return layer_; }

 private:
  Backend& backend_;
  const LlamaConfig& config_;
  int64_t layer_;
  Tensor inv_freq_;
  NormWeight input_norm_, post_norm_;
  QuantLinear q_, k_, v_, o_, gate_, up_, down_;
  std::vector<Parameter*> declared_;
};

enum class Recompute { None, Block };
enum class HeadRounding {
  None,
  BFloat16
};  // embedding, head and norms as trained and exported: bf16 values

class Llama {
 public:
  // Embedding, final norm, head and blocks without weights in the blocks.
  Llama(Backend& backend, const Checkpoint& source, HeadRounding rounding);
  // Packed random weights of these sizes; `seed` fixes them.
  static std::unique_ptr<Llama> synthetic(Backend& backend, const LlamaConfig& config,
                                          GridSpec spec, uint64_t seed);

  void load_blocks(const Checkpoint& source);  // float or packed, as the source is

  // ids I32 (B, T) -> hidden states after the final norm, act (B, T, D).
  Var forward(Tape& tape, const Tensor& ids, KvCache* kv, Recompute recompute);
  // h act (M, D) -> F32 (M, V).
  Tensor logits(const Tensor& h) const;

  const LlamaConfig& config() const { return config_; }
  std::vector<std::unique_ptr<LlamaBlock>>& blocks() { return blocks_; }
  const Tensor& embedding() const { return embedding_; }  // act (V, D)
  const Tensor& head() const { return head_; }            // act (V, D)
  NormWeight& norm() { return norm_; }
  Tensor inv_freq() const { return inv_freq_; }

 private:
  Llama(Backend& backend, LlamaConfig config);
  Backend& backend_;
  LlamaConfig config_;
  Tensor embedding_, head_, inv_freq_;
  NormWeight norm_;
  std::vector<std::unique_ptr<LlamaBlock>> blocks_;
};

// method.md section 5 over windows (count, seq_len): each window's mean NLL over its seq_len - 1
// shifted tokens; perplexity = exp(mean over windows).
struct Perplexity {
  double perplexity = 0;
  double nll = 0;
  double nll_stderr = 0;  // standard error of the mean over windows; 0 for one window
  int64_t windows = 0;
  int64_t tokens = 0;  // predicted
};
Perplexity perplexity(Llama& model, const std::vector<int32_t>& ids, int64_t count, int64_t seq_len,
                      const std::function<void(int64_t done)>& progress);

}  // namespace bbb::models
