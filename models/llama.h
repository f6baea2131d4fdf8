// Llama: the one forward pass of bbb. Teacher and student, block-wise and end to end, training,
// prefill and decode run these functions.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "models/checkpoint.h"
#include "models/operand.h"
#include "models/quant_linear.h"
#include "models/recompute.h"

namespace bbb::models {

// Keys and values of one sequence for every layer, and the position at which the next token stands.
// forward() writes behind `start` and leaves it alone: the caller moves it on (set_start, or the
// backend's advance inside a recorded step).
struct KvCache {
  KvCache(Backend& backend, const LlamaConfig& config, int64_t capacity_tokens);
  void set_start(int64_t position);

  Backend& backend;
  std::vector<Tensor> k, v;  // per layer, act (1, capacity, K, d)
  Tensor start;              // I32 (1) on the device
  int64_t capacity;
};

// An RMSNorm weight, trainable or not.
struct NormWeight {
  Tensor value;                    // real (D)
  Parameter* parameter = nullptr;  // then value is its master

  void set_constant(Tensor weight);
  void set_parameter(Parameter& trained);
  const Var& var() const { return leaf; }  // a leaf into the parameter's gradient, or a constant
  void finish_backward(Backend& backend);  // zeroes the gradient if no pass wrote it

  Var leaf;  // one handle for all uses since finish_backward()
};

class LlamaBlock {
 public:
  // `config` must outlive the block.
  LlamaBlock(Backend& backend, const LlamaConfig& config, int64_t layer, Tensor inv_freq);

  // x act (B, T, D) -> (B, T, D). kv: keys and values are appended at kv->start and attended to; on
  // an inference tape only, which keeps nothing and heeds no `recompute`.
  Var forward(Tape& tape, const Var& x, KvCache* kv, Recompute recompute);

  // Full-precision weights, rounded to act.
  void set_float(const LayerResult& weights);
  // The checkpoint's weights, one at a time: packed where it has them packed. `buffer`
  // (QuantLinear::set_packed) is shared by all layers.
  void load(const Checkpoint& source, const Tensor& buffer);
  void set_norms(const std::vector<float>& input, const std::vector<float>& post);  // constants

  // Makes linears and norms parameters of `set`, which is not allocated yet.
  void declare_parameters(ParameterSet& set);
  // After set.allocate(): puts the linears behind its quantizer.
  void bind_parameters(WeightQuantizer& quantizer, int bits);
  // The parameters from the masters of a result. The norm's gradient is found by dividing by its
  // weight, so an exact zero could never train again: zeros become 2^-60.
  void set_masters(const LayerResult& result);
  // The layer as it is now: its masters, or what the quantizer holds (QuantLinear::quantized).
  LayerResult result(LinearContent content);

  void set_bits(int bits);
  void prepare_scales();  // after every linear's freeze_codes()
  void finish_backward();
  void snap();

  std::vector<QuantLinear*> linears();  // in the order of block_linears()
  NormWeight& input_norm() { return input_norm_; }
  NormWeight& post_norm() { return post_norm_; }
  int64_t layer() const { return layer_; }

 private:
  Var attention_half(Tape& tape, const Var& x, KvCache* kv);
  Var mlp_half(Tape& tape, const Var& x);
  void finish_input_norm();

  Backend& backend_;
  const LlamaConfig& config_;
  int64_t layer_;
  Tensor inv_freq_;
  NormWeight input_norm_, post_norm_;
  bool norm_through_products_ = false;  // input_norm_'s gradient comes from its products' weights
  QuantLinear q_, k_, v_, o_, gate_, up_, down_;
  Operand attention_in_, o_in_, mlp_in_, down_in_;
  std::vector<Parameter*> declared_;  // the linears', then the norms', until they are bound
};

// BFloat16 rounds embedding and head once, so that training, export and every later reader see the
// same values (format.md); norms stay F32 throughout. On a device of bf16 activations both are bf16
// either way.
enum class HeadRounding { None, BFloat16 };

class Llama {
 public:
  // Embedding, final norm, head and blocks without weights in the blocks.
  Llama(Backend& backend, const Checkpoint& source, HeadRounding rounding);
  Llama(const Llama&) = delete;
  Llama& operator=(const Llama&) = delete;
  // Packed random weights of these sizes; `seed` fixes them. Device memory is that of a real model.
  static std::unique_ptr<Llama> synthetic(Backend& backend, const LlamaConfig& config,
                                          WeightGrid spec, uint64_t seed);

  // Float or packed, as the source is. `progress` hears how many blocks are loaded.
  void load_blocks(const Checkpoint& source,
                   const std::function<void(int64_t done)>& progress = nullptr);

  // ids I32 (B, T) -> hidden states after the final norm, act (B, T, D).
  Var forward(Tape& tape, const Tensor& ids, KvCache* kv, Recompute recompute);
  // h act (M, D) -> real (M, V).
  Tensor logits(const Tensor& h) const;

  Backend& backend() const { return backend_; }
  const LlamaConfig& config() const { return config_; }
  std::vector<std::unique_ptr<LlamaBlock>>& blocks() { return blocks_; }
  const Tensor& embedding() const { return embedding_; }  // act (V, D)
  const Tensor& head() const { return head_; }            // act (V, D)
  NormWeight& norm() { return norm_; }
  Tensor inv_freq() const { return inv_freq_; }

 private:
  Llama(Backend& backend, LlamaConfig config);
  Tensor packed_buffer() const;  // act, of the largest linear's size
  Backend& backend_;
  LlamaConfig config_;
  Tensor embedding_, head_, inv_freq_;
  NormWeight norm_;
  std::vector<std::unique_ptr<LlamaBlock>> blocks_;
};

// What one buffer of logits may take, and how many rows make a product with the head worth it.
struct HeadBudget {
  int64_t bytes = 0;
  int64_t least_rows = 0;
};
// Follows the device, not what is free on it: chunks decide the last bits of a loss.
HeadBudget head_budget(const Backend& backend);
// The chunks in which (M, V) logits of this type stay within the budget. The whole vocabulary for
// as many rows as fit, in whole tiles of a product, where these are least_rows or all rows there
// are; else least_rows rows and equal parts of the vocabulary, multiples of 128 words but for the
// last. Only a budget below 128 words for those rows is exceeded.
autograd::HeadChunks head_chunks(const HeadBudget& budget, int64_t rows, int64_t vocab,
                                 engine::DType logits);

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
