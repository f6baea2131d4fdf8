// Llama: the one forward pass of bbb. Teacher and student, block-wise and end to end, training,
// prefill and decode run these functions.
#pragma once

#include <array>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "autograd/muon.h"
#include "data/text.h"
#include "models/checkpoint.h"
#include "models/operand.h"
#include "models/quant_linear.h"
#include "models/recompute.h"
#include "models/table.h"

namespace bbb::models {

// Keys and values of B sequences for every layer, and the position of each sequence's next token.
// forward() writes from `start` on and does not change `start`. The caller advances it, with
// Backend::advance inside a recorded step.
struct KvCache {
  // A quantized cache has up to three positions more.
  KvCache(Backend& backend, const LlamaConfig& config, int64_t batch, int64_t capacity_tokens,
          quant::KvFormat kv_format = {});
  KvCache sequence(int64_t b) const;  // sequence b alone; shares the memory

  // Throws if the format does not fit the model's heads.
  static void check(const LlamaConfig& config, quant::KvFormat format);

  int64_t bytes_per_token() const;

  quant::KvFormat format;
  std::vector<Tensor> k, v;  // per layer, act (B, capacity, K, d), or U8 as in `format`
  Tensor start;              // I32 (B) on the device

 private:
  KvCache() = default;
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

  // x act (B, T, D) -> (B, T, D). kv: null, or, on an inference tape only, keys and values are
  // appended at kv->start and attended to. An inference tape ignores `recompute`. first_key:
  // undefined, or, without kv, I32 (B, T), the attention's (AttentionSpec).
  Var forward(Tape& tape, const Var& x, KvCache* kv, Recompute recompute,
              const Tensor& first_key = {});

  // Full-precision weights, rounded to act.
  void set_float(const LayerResult& weights);
  // Weights in the stored positions of their formats, rounded to act: the levels of quantized
  // linears, the masters of others.
  void set_stored(const LayerResult& weights);
  // The checkpoint's weights, one at a time. A linear that is stored in full precision becomes a
  // FloatWeight. `buffer` as for QuantLinear::set_packed.
  void load(const Checkpoint& source, const Tensor& buffer);
  // A quantized result, as a load of its export sets it.
  void set_packed(const LayerResult& result);
  void set_norms(const LayerResult& from);   // constants
  void set_biases(const LayerResult& from);  // of the linears that have one
  // Makes the operands for linears of these formats.
  void set_operands(const std::vector<quant::LinearFormat>& formats, bool packed);

  // Makes linears, of these formats, and norms parameters of `set`, which must not be allocated
  // yet. If the set has ranks, linears are sharded. `rule` is for the linears and their adapters;
  // norms take AdamW's. `lc`: of linears behind LC. `lora`: gives them adapters.
  void declare_parameters(ParameterSet& set, const std::vector<quant::LinearFormat>& formats,
                          autograd::UpdateRule rule = autograd::UpdateRule::AdamW,
                          const autograd::LcTraining& lc = {},
                          const autograd::LoraTraining& lora = {});
  // The same with learned grids, whose `parts` train at `rule`'s rate.
  void declare_learned(ParameterSet& set, const std::vector<quant::LinearFormat>& formats,
                       LearnedParts parts, const quant::SlotRule<double>& rule);
  // After set.allocate(): binds linears and norms to their parameters, the linears behind the set's
  // quantizer.
  void bind_parameters(WeightQuantizer& quantizer, const std::vector<quant::LinearFormat>& formats);
  void bind_learned(const std::vector<quant::LinearFormat>& formats);  // needs no quantizer
  // Of all linears (QuantLinear); the seed decides all draws.
  void start_adapters(uint64_t seed);
  void discard_adapters();
  // Uploads the masters of a result in the block's formats. In the input norm zeros become 2^-60:
  // its gradient may be found by dividing by its weight, so an exact zero could never train again.
  void set_masters(const LayerResult& result);
  // The layer as it is now: masters, or the quantized linears (QuantLinear::quantized), and norms.
  LayerResult result(LinearContent content);

  // Of a block that trains: other formats with the same stored positions. A recorded step keeps the
  // operands of its recording; the width of weights changes in it too.
  void set_formats(const std::vector<quant::LinearFormat>& formats);
  // Of every linear (QuantLinear::select_precision).
  void select_precision(size_t i);
  // Called in forward() with the operand of every site, act (..., K'), as its linears multiply it.
  void set_tap(std::function<void(Site site, const Tensor& x)> tap) { tap_ = std::move(tap); }
  // Frozen codes of a quantized layer; sigmas[i] holds the scales of linear i.
  void freeze_codes(const LayerResult& result, const std::vector<Parameter*>& sigmas);
  void prepare_scales();  // of learned grids, or after freeze_codes()
  void finish_backward();
  void snap();

  std::vector<QuantLinear*> linears();  // in the order of block_linears()
  NormWeight& input_norm() { return input_norm_; }
  NormWeight& post_norm() { return post_norm_; }
  int64_t layer() const { return layer_; }

 private:
  Var attention_half(Tape& tape, const Var& x, KvCache* kv, const Tensor& first_key);
  Var mlp_half(Tape& tape, const Var& x);
  LinearInput tapped(Site site, LinearInput input) const;
  void finish_input_norm();
  void bind_norms();                         // and forgets what was declared
  std::vector<NormWeight*> norms();          // in the order of block_norms()
  Tensor frequencies(int64_t tokens) const;  // of the rotations of a sequence

  Backend& backend_;
  const LlamaConfig& config_;
  int64_t layer_;
  Tensor inv_freq_;
  NormWeight input_norm_, post_norm_, q_norm_, k_norm_;  // the last two only with qk_norm
  bool nested_ = false;                                  // trains several precisions
  bool norm_through_products_ = false;  // input_norm_'s gradient: from dW^ of q_, k_ and v_
  QuantLinear q_, k_, v_, o_, gate_, up_, down_;
  std::array<Operand, kSites> operands_;
  std::function<void(Site, const Tensor&)> tap_;
  std::vector<Parameter*> declared_;    // of linears, then norms; until they are bound
  std::vector<LearnedGrid> learned_;    // of linears, likewise
  std::vector<Parameter*> declared_v_;  // of linears behind LC, likewise
  std::array<std::optional<LcSite>, kSites> lc_sites_;  // empty: no LC
  std::vector<Parameter*> declared_adapters_;           // A and B of each linear, likewise
  double lora_alpha_ = 1;
};

// BFloat16 rounds embedding and head, so that training, export and later readers see the same
// values (format.md). Norms are never rounded. If act is BF16, embedding and head are BF16 anyway.
enum class HeadRounding { None, BFloat16 };

// table act (V, D) = values real (V, D), rounded.
void round_table(Backend& backend, const Tensor& table, const Tensor& values,
                 HeadRounding rounding);

// Of a model of random weights.
struct SyntheticFormat {
  WeightGrid weight = {};
  quant::InputGrid input = {};  // bits 16 or without outliers
  int head_bits = kDenseBits;   // of the head and a tied embedding: 16, 8 or 4
  double split = 0;             // ratio of the channels of each linear that are split
};

// Splits this ratio of K channels, evenly spread; null if that is none.
std::shared_ptr<const quant::ChannelOrder> evenly_split(int64_t k, int group, double ratio);

class Llama {
 public:
  // Loads embedding, final norm and head; the blocks have no weights yet.
  Llama(Backend& backend, const Checkpoint& source, HeadRounding rounding);
  Llama(const Llama&) = delete;
  Llama& operator=(const Llama&) = delete;
  // Packed random weights, fixed by `seed`. It takes the device memory of a real model.
  static std::unique_ptr<Llama> synthetic(Backend& backend, const LlamaConfig& config,
                                          const SyntheticFormat& format, uint64_t seed);

  // Float or packed, as in the source. progress(done): blocks loaded so far.
  void load_blocks(const Checkpoint& source,
                   const std::function<void(int64_t done)>& progress = nullptr);

  // ids I32 (B, T) -> hidden states after the final norm, act (B, T, D). first_key: of every block.
  Var forward(Tape& tape, const Tensor& ids, KvCache* kv, Recompute recompute,
              const Tensor& first_key = {});
  // h act (M, D) -> real (M, V).
  Tensor logits(const Tensor& h) const;
  // losses real (M): the cross-entropy of each row of h act (M, D) with its target, I32 (M), and 0
  // where that is -1. Computes the logits in chunks (head_chunks); of a packed head, a chunk of the
  // vocabulary at a time is dequantized.
  void token_losses(const Tensor& losses, const Tensor& h, const Tensor& targets) const;

  Backend& backend() const { return backend_; }
  const LlamaConfig& config() const { return config_; }
  std::vector<std::unique_ptr<LlamaBlock>>& blocks() { return blocks_; }
  // act (V, D); BF16 if the source is packed. Not of a table of 8 or 4 bits.
  const Tensor& embedding() const { return embedding_.tensor(); }
  const Tensor& head() const { return head_.tensor(); }
  const Var& head_var() const { return head_.dense; }
  const Table& head_table() const { return head_; }
  // Embedding and head of forward() from now on. They are constants unless these take gradients.
  void set_tables(Var embedding, Var head);
  // Replaces the values of embedding, head and final norm.
  void load_outer(const LoadOuter& load, HeadRounding rounding);
  NormWeight& norm() { return norm_; }
  Tensor inv_freq() const { return inv_freq_; }

 private:
  Llama(Backend& backend, LlamaConfig config);
  Tensor packed_buffer(int64_t numel) const { return backend_.empty({numel}, backend_.act()); }
  Var embed_tokens(Tape& tape, const Tensor& ids) const;
  Backend& backend_;
  LlamaConfig config_;
  Table embedding_, head_;
  Tensor inv_freq_;
  NormWeight norm_;
  std::vector<std::unique_ptr<LlamaBlock>> blocks_;
};

struct HeadBudget {
  int64_t bytes = 0;       // of one buffer of logits
  int64_t least_rows = 0;  // that keep a product with the head efficient
};
// Depends on the device, not on its free memory: chunks decide the last bits of a loss.
HeadBudget head_budget(const Backend& backend);
// The chunks that keep (rows, vocab) logits of this dtype within the budget. If the budget holds
// least_rows rows, or all, of the whole vocabulary: as many rows as fit, from 256 on a multiple of
// 256. Otherwise least_rows rows and equal parts of the vocabulary, multiples of 128 words except
// for the last. A part has at least 128 words, even if that exceeds the budget.
autograd::HeadChunks head_chunks(const HeadBudget& budget, int64_t rows, int64_t vocab,
                                 engine::DType logits);

// method.md section 5 over windows (count, seq_len): nll is the mean over windows of the mean NLL
// of the window's seq_len - 1 predicted tokens; perplexity = exp(nll). Throws if it is not finite.
struct Perplexity {
  double perplexity = 0;
  double nll = 0;
  double nll_stderr = 0;  // standard error of the mean over windows; 0 for one window
  int64_t windows = 0;
  int64_t tokens = 0;  // predicted
};
// kv: quantized keys and values go through a cache of this format, so they cost what they cost when
// the model generates.
Perplexity perplexity(Llama& model, const std::vector<int32_t>& ids, int64_t count, int64_t seq_len,
                      const std::function<void(int64_t done)>& progress, quant::KvFormat kv = {});
// The same with one block of the model in memory at a time, through which all windows pass. Of
// `model` embedding, final norm and head are used; load(block) gives a new block its weights.
// progress(done): blocks done so far. Only the tokens that the windows count are counted: nll is
// the mean over these tokens.
Perplexity perplexity_by_blocks(Llama& model, const data::Windows& windows,
                                const std::function<void(LlamaBlock&)>& load,
                                const std::function<void(int64_t done)>& progress);

}  // namespace bbb::models
