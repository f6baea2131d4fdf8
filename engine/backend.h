// Backend: every operation that bbb computes, about forty fused ops.
//
// A public method checks shapes, dtypes and device once (engine/backend.cpp); a private
// pure-virtual do_* computes. There is no fallback: an op that a backend lacks does not compile.
// The caller allocates the outputs, which are the first arguments. The only memory that an op
// allocates is its scratch.
//
// Dtypes: act() is the dtype of activations and of the weights that enter a GEMM; real() is that of
// masters, norm weights, losses and scales. A parameter's gradient is act where one backward pass
// writes it, and real where several passes are added: in act the sum would lose digits.
//     CpuBackend<float>   act F32   real F32        the reference
//     CpuBackend<double>  act F64   real F64        gradient checks
//     CudaBackend         act BF16  real F32
// Below, "act" and "real" mean these dtypes; F32, I32 and U8 are the same on every backend.
//
// Dimension letters: B batch, T time, D model, F hidden, H heads, K kv-heads, d head dim, V
// vocabulary, G group, N output features, M rows (tokens).
//
// Write::Overwrite ignores what the output held; Write::Add accumulates into it. Every op runs in
// stream order on its backend and is deterministic: the same inputs give the same bytes.
#pragma once

#include <array>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "engine/backend_ops.h"
#include "engine/gemm_choices.h"
#include "engine/tensor.h"
#include "engine/transfers.h"
#include "quant/format.h"
#include "quant/lc.h"
#include "quant/tiles.h"

namespace bbb::engine {

using quant::Rounding;
using quant::WeightGrid;

enum class Write { Overwrite, Add };
// Ops that need scratch memory on some device, and the shape on which its size depends.
enum class ScratchOp {
  Mse,                 // {}
  Sum,                 // {}
  StepControl,         // {}
  Attention,           // {}
  RmsNormBackward,     // (M, D), where dw is wanted
  InputScaleGradient,  // (N, K)
  LcWeightBackward,    // (N, K)
  LoraWeightBackward,  // (N, K, R)
  ChannelMoments,      // (M, K)
  AttentionCached,     // (B, T, H, d, Tmax, K, bits of the cache)
  Sample,              // (M, V)
  EmbedBackward,       // (M, V)
};
enum class Rotation { Forward, Inverse };

// A step recorded once and run many times.
class Replay {
 public:
  virtual ~Replay() = default;
  virtual void run() = 0;
  virtual int64_t kernels() const { return 0; }  // that one run launches on a GPU, as one graph
};

// Rows of src (n, ...). `order` undefined: all rows, in storage order. `order` defined: a batch of
// `count` rows that only the device knows; its row i is src[order[cursor * count + i]].
struct Rows {
  Rows(Tensor all) : src(std::move(all)) {}
  Rows(Tensor from, Tensor by, Tensor at)
      : src(std::move(from)), order(std::move(by)), cursor(std::move(at)) {}

  Tensor src;
  Tensor order;   // I32 (n)
  Tensor cursor;  // I32 (1), (cursor + 1) * count <= n
};

struct AttentionSpec {
  int64_t window = 0;  // a query sees its own and the window - 1 keys before it; 0: all before it
  double rope_factor = 1;  // of the rotation of q and k, whose gradients attention_backward undoes
  // Limit on the memory in which a backward may store dS, the gradient of the scores. If dS does
  // not fit, it is computed twice. So memory does not grow with the square of T.
  int64_t ds_bytes = int64_t{1} << 30;
  // Undefined, or I32 (B, T): query t of sequence b sees no key before first_key[b, t], which lies
  // between 0 and t and does not fall from one query to the next. For texts that share a sequence.
  // Not of attention over a cache.
  Tensor first_key = {};
};

// How sample() chooses a token (engine/sampling.h).
struct SampleSpec {
  double temperature = 0;  // 0: the largest logit, ties to the lower id
  double top_p = 1;        // the fewest most likely tokens whose probabilities reach top_p
  double repetition_penalty = 1;
};
// What sample() needs of each row. Tensors that it does not need may be undefined.
struct SampleRows {
  Tensor seeds = {};      // I32 (M, 2): low and high half of a seed; needed if temperature > 0
  Tensor positions = {};  // I32 (M): a draw depends on seed and position alone
  // U8 (M, ceil(V / 8)): bit v % 8 of byte v / 8 is set if token v has occurred; needed if the
  // repetition penalty is not 1.
  Tensor seen = {};
  Tensor log = {};     // I32 (n, M): row cursor % n gets the tokens
  Tensor cursor = {};  // I32 (1)
};

// A stored linear on the device, in one of two layouts.
struct PackedWeight {
  quant::LinearFormat format;
  // As in the file: the tensors of the format, U8 except for the F32 master scale and I32 channels.
  // Repacked: the master scale alone.
  std::array<Tensor, quant::kStoredParts> tensors;
  Tensor layout;  // U8: codes, scales and zeros as the backend's products read them; opaque

  bool repacked() const { return layout.defined(); }
  const Tensor& operator[](quant::StoredPart part) const {
    return tensors[static_cast<size_t>(part)];
  }
  quant::PackedView view() const;  // of the file's layout
};
DType dtype_of(const quant::StoredTensor& tensor);  // the dtype of its device copy
class Backend;
// A layout for a backend whose products read the file's bytes as they are: quant::joined_parts.
void join_parts(Backend& backend, const Tensor& layout, const PackedWeight& file);
quant::PackedView joined_view(const PackedWeight& repacked);
// Uploads a linear and repacks it, in the format that is multiplied (LinearFormat::multiplied).
// bytes(t) is the content of tensor t of `format`.
PackedWeight upload_packed(Backend& backend, const quant::LinearFormat& format,
                           const std::function<const void*(const quant::StoredTensor&)>& bytes);

// One of several products of the same rows.
struct PackedProduct {
  Tensor y;  // act or real (M, N)
  const PackedWeight& weight;
  Tensor addend;  // undefined or act (M, N)
};
using PackedProducts = std::vector<PackedProduct>;

// The operand of the linears of an input site (quant/format.h): gathered by their channel order,
// rotated, quantized. view.channels and view.positions are the tensors' memory.
struct OperandSpec {
  quant::OperandView view = {};
  Tensor channels, positions;  // I32 (K'), (K); undefined: the order is the identity
  // The order as products read it, U8 (2 K'): of each position, in 16 bits, twice its channel, or 2
  // K for padding. Undefined too where 2 K takes more bits.
  Tensor offsets = {};
  Rounding rounding = Rounding::Nearest;

  bool quantizes() const { return view.grid.bits < 16; }
};
// For linears of this format.
OperandSpec upload_operand(Backend& backend, const quant::LinearFormat& format);

// An operand of M rows. An op writes the defined tensors.
struct OperandRows {
  Tensor x;  // act (M, K')
  Tensor
      clipped;  // U8 (M, K'/8): bit i % 8 of byte i / 8 is set where position i takes no gradient
  // The same as integers, x = (codes - zeros) scales: U8 (M, K'), U8 (M, K'/G), real (M, K'/G);
  // scales hold e S_row. Only if the operand is quantized.
  Tensor codes, zeros, scales;
};

// Where each parameter of a model is in flat buffers of P elements (P a multiple of
// quant::kTileAlign), and how the optimizer treats it. A parameter's slot is its row in every
// table.
struct ParameterTable {
  Tensor tiles;  // I32 (tiles, 4): quant::WeightTile, covering all parameters
  Tensor slots;  // real (slots, 3): quant::SlotRule
};

// The tables and outputs of the quantizer of P masters. Undefined tensors: there is no quantizer.
//
// S rarely changes from one step to the next. So adamw may prequantize the new masters with the
// last S, and fake_quant then quantizes only the parameters whose S has changed.
struct QuantizedWeights {
  Tensor tiles;      // the ParameterTable's
  Tensor bits;       // I32 (slots): WeightGrid's, or quant::kNotQuantized
  Tensor max_range;  // real (slots): the maximum group range of the masters: mx - mn, of SEQ 2 m
  Tensor s;          // real (slots): the master scale S of the last fake_quant; 0 before the first
  Tensor prequantized;  // real (slots): the S with which adamw prequantized; 0: it did not
  Tensor clipped;  // U8 (P / 8): bit i % 8 of byte i / 8 is set where element i takes no gradient
  Tensor wq;       // act (P)
  Tensor e, z;     // U8 (P / G), E4M3 bytes and one zero point a byte
  Tensor ratios = {};  // U8 (P / G): each group's index of quant::range_ratio; undefined: all are 1
  quant::WeightRule rule = {};
  int group = 32;
  Rounding rounding = Rounding::Nearest;
};

// A weight behind LC (quant/lc.h). N and K are multiples of 32.
struct LcWeight {
  Tensor latent;  // real (N, K)
  Tensor u, v;    // real (K), (N)
  Tensor map;     // real (4, 5)
  quant::LcRule rule;
};

// The state of the optimizer's schedule, real (kControlSize). It is on the device, so that a step
// never waits for the host. step_control writes it; adamw and log_control read it.
enum ControlSlot : int {
  kStep = 0,      // steps begun, counting skipped ones; step_control adds 1
  kApplied = 1,   // steps applied: Adam's t in the bias correction
  kLr = 2,        // learning rate of this step
  kScale = 3,     // factor on the gradient, from clipping; 0 if kSkip is set
  kSkip = 4,      // 1 if this step's loss or gradient norm is not finite
  kSkipped = 5,   // steps skipped so far
  kGradNorm = 6,  // global gradient norm before clipping
  kLoss = 7,      // the loss of this step
  kControlSize = 8,
};

struct Schedule {
  double peak_lr = 1e-3;
  double final_ratio = 0.05;  // the cosine ends at peak_lr * final_ratio
  int64_t warmup_steps = 0;   // linear from peak / warmup to peak
  int64_t total_steps = 1;
  double clip_norm = 1.0;  // 0: no clipping
};

struct AdamWSpec {
  double beta1 = 0.9;
  double beta2 = 0.999;
  double epsilon = 1e-8;
};

class Backend {
 public:
  virtual ~Backend() = default;

  virtual DeviceType device() const = 0;
  virtual DType act() const = 0;
  virtual DType real() const = 0;
  virtual std::string device_name() const = 0;         // "NVIDIA H200" or the CPU's own name
  virtual int64_t memory_total_bytes() const = 0;      // of the device
  virtual int64_t memory_available_bytes() const = 0;  // what a run may still allocate
  virtual int64_t memory_peak_bytes() const = 0;       // peak of what tensors held
  virtual void reset_memory_peak() = 0;
  // False: only sizes are computed (engine/counting_backend.h), and host values are not read.
  virtual bool computes() const { return true; }
  // The size of the block that the allocator takes for a tensor of `bytes`.
  virtual int64_t block_bytes(int64_t bytes) const = 0;
  // Scratch of one call: the public method allocates it and passes it to do_*.
  virtual int64_t scratch_bytes(ScratchOp op, const Shape& shape) const = 0;
  // The scratch of attention_backward, for q (B, T, H, d) and k (B, T, K, d).
  virtual int64_t attention_backward_scratch_bytes(const Shape& q, const Shape& k,
                                                   const AttentionSpec& spec) const = 0;

  // --- memory -----------------------------------------------------------------------------------
  Tensor empty(Shape shape,
               DType dtype);  // uninitialized; throws, naming the bytes, if out of memory
  Tensor zeros(Shape shape, DType dtype);
  void upload(const Tensor& dst,
              const void* src);  // dst.bytes() from host memory; returns when src may be reused
  void download(void* dst, const Tensor& src);  // waits for the stream, then src.bytes() to host
  void copy(const Tensor& dst, const Tensor& src);  // same dtype and numel
  void cast(const Tensor& dst,
            const Tensor& src);  // among act, real, F32, BF16 (round to nearest even); same numel
  void zero(const Tensor& dst);
  virtual void synchronize() = 0;
  virtual Transfers& transfers() = 0;  // copies from and to host memory that overlap with the ops
  // Records `step` and returns it ready to run(). Recording does not execute the step.
  // On the CPU run() simply calls `step`. On a GPU it repeats the recorded kernels with the host
  // values of the recording. So only values on the device may change between runs.
  // Memory that `step` allocates lives as long as the Replay. Memory that `step` frees may be
  // overwritten by another Replay.
  virtual std::unique_ptr<Replay> record(std::function<void()> step) = 0;
  // Runs both functions. On a GPU, inside a recorded step, their kernels may overlap: neither may
  // read what the other writes, and everything that `side` reads must stay alive until this
  // returns.
  virtual void overlap(const std::function<void()>& side, const std::function<void()>& main) = 0;

  // --- embedding, rows --------------------------------------------------------------------------
  // out[m] = table[ids[m]].   out act (M, D); ids I32 (M), each in [0, V); table act or BF16 (V,
  // D).
  void embed(const Tensor& out, const Tensor& ids, const Tensor& table);
  // out[m] = S e (q - z) of row ids[m] of a repacked table, rounded to act. Its codes have 4 or 8
  // bits and are not nested.
  void embed_packed(const Tensor& out, const Tensor& ids, const PackedWeight& table);
  // dtable[ids[m]] (+)= dx[m], in the order of m; Overwrite zeroes the rows of all other ids.
  // dtable real (V, D); dx act (M, D); ids I32 (M), each in [0, V).
  void embed_backward(const Tensor& dtable, const Tensor& dx, const Tensor& ids, Write mode);
  // out = the rows of a batch of count = out.dim(0); `batch` has an order. out's and src's rows
  // have the same dtype and number of elements.
  void gather_rows(const Tensor& out, const Rows& batch);
  // cursor += 1, I32 (n).
  void advance(const Tensor& cursor);
  // log[cursor] = control, real (n, kControlSize) and (kControlSize).
  void log_control(const Tensor& log, const Tensor& control, const Tensor& cursor);

  // --- matrix products --------------------------------------------------------------------------
  // FP32 accumulation (F64 on the F64 reference). alpha: real (1) on the device, undefined means 1.
  // y = alpha * x w^T (+ addend).   y act or real (M, N); x act (M, K); w act or BF16 (N, K);
  // addend: undefined or act (M, N).
  void gemm_nt(const Tensor& y, const Tensor& x, const Tensor& w, const Tensor& alpha,
               const Tensor& addend);
  // dx (+)= alpha * dy w.           dx act or real (M, K); dy act (M, N); w act (N, K).
  void gemm_nn(const Tensor& dx, const Tensor& dy, const Tensor& w, const Tensor& alpha,
               Write mode);
  // dw (+)= dy^T x.                 dw act (Overwrite only) or real (N, K); dy act (M, N); x act
  // (M, K).
  void gemm_tn(const Tensor& dw, const Tensor& dy, const Tensor& x, Write mode);
  // What chooses among algorithms: library, version and device; "" if there is no choice.
  virtual std::string gemm_library() const = 0;
  // From now on every large product takes its fastest algorithm. A product is timed when it is
  // first encountered: before it runs or, within record(), before the final recording (`step` is
  // then called again). nullopt: back to the library's first suggestions, as at the start.
  virtual void tune_gemms(std::optional<GemmTuning> tuning) = 0;

  // --- norms, activations, positions ------------------------------------------------------------
  // r = 1 / sqrt(mean(x^2) + eps); y = x r w.   y, x act (M, D); inv_rms real (M); w real (D).
  void rms_norm(const Tensor& y, const Tensor& inv_rms, const Tensor& x, const Tensor& w,
                double eps);
  // dx (+)= r (dy w - x r^2 mean(dy w x)); dw (+)= sum_m dy x r. dx act, dw act (Overwrite only) or
  // real (D); either may be undefined, then it is not computed. dx may be dy's buffer.
  void rms_norm_backward(const Tensor& dx, const Tensor& dw, const Tensor& dy, const Tensor& x,
                         const Tensor& inv_rms, const Tensor& w, Write dx_mode, Write dw_mode);
  // The gradient of a scale s on the input features of a linear, from the weight's gradient alone.
  // For y = (s . x) W^^T:
  //     ds_k (+)= sum_n W^[n, k] dW^[n, k] / s_k,   0 where s_k is 0 (the gradient is lost there)
  // A norm's weight is such a scale; this saves the product that makes dL/d(s . x). ds, s real (K);
  // W^ = alpha w: alpha real (1) or undefined (1), w act (N, K); dw act or real (N, K).
  void input_scale_gradient(const Tensor& ds, const Tensor& s, const Tensor& w, const Tensor& alpha,
                            const Tensor& dw, Write mode);
  // h = silu(gate) * up.   all act, same shape.
  void swiglu(const Tensor& h, const Tensor& gate, const Tensor& up);
  void swiglu_backward(const Tensor& dgate, const Tensor& dup, const Tensor& dh, const Tensor& gate,
                       const Tensor& up);
  // Rotates halves in place: pairs (i, i + d/2) of each head by angle (start[b] + t) * inv_freq[i],
  // or back for Rotation::Inverse, and multiplies them by `factor`: the inverse is the gradient.
  // x act (B, T, H, d); inv_freq F32 (d/2); start I32 (B) on the device or undefined (0).
  void rope(const Tensor& x, const Tensor& inv_freq, const Tensor& start, Rotation direction,
            double factor = 1);
  // Operands of K' stored positions (numerics.md section 2), from x act (M, K); from rms_norm(x,
  // w); from swiglu(gate, up). The input is rounded to act before it is gathered. A rotated value
  // is rounded to act once, if it is not quantized.
  void operand(const OperandRows& out, const Tensor& x, const OperandSpec& spec);
  void rms_norm_operand(const OperandRows& out, const Tensor& inv_rms, const Tensor& x,
                        const Tensor& w, double eps, const OperandSpec& spec);
  void swiglu_operand(const OperandRows& out, const Tensor& gate, const Tensor& up,
                      const OperandSpec& spec);
  // The gradient of the operand's input, straight through where it was not clipped: dx act (M, K);
  // dout act (M, K'); clipped U8 (M, K'/8) or undefined. For swiglu that of gate and up.
  void operand_backward(const Tensor& dx, const Tensor& dout, const Tensor& clipped,
                        const OperandSpec& spec);
  void swiglu_operand_backward(const Tensor& dgate, const Tensor& dup, const Tensor& dout,
                               const Tensor& clipped, const Tensor& gate, const Tensor& up,
                               const OperandSpec& spec);
  // Adds to moments, F64 (kMoments, K): sums over the rows of x act (M, K) of x, x^2, x^3, x^4; and
  // the largest |x|. Sums are F64, in a fixed order.
  void channel_moments(const Tensor& moments, const Tensor& x);
  static constexpr int64_t kMoments = 5;
  // x *= factor, real (1) on the device.   x act or real.
  void scale(const Tensor& x, const Tensor& factor);
  // out = a + b.   All act or all real, same shape; out may be a or b.
  void add(const Tensor& out, const Tensor& a, const Tensor& b);
  // Adds bias, real (N), to every row of y, act (M, N).
  void add_bias(const Tensor& y, const Tensor& bias);

  // --- attention --------------------------------------------------------------------------------
  // Throws if attention does not support heads of size d. Call it before a model is loaded.
  virtual void check_head_size(int64_t d) const = 0;
  // Causal, grouped queries (H a multiple of K), scale 1/sqrt(d), never a T x T matrix in memory.
  // o act (B, T, H, d); lse real (B, H, T): log sum exp of the scaled scores; q act (B, T, H, d);
  // k, v act (B, T, K, d).
  void attention(const Tensor& o, const Tensor& lse, const Tensor& q, const Tensor& k,
                 const Tensor& v, const AttentionSpec& spec);
  // All three gradients, overwritten. inv_freq: undefined, or F32 (d/2). If it is defined, q and k
  // are rotated, q = rope(q', inv_freq) from position 0 with spec.rope_factor, and dq and dk are
  // the gradients of q' and k': rotated back before they are rounded.
  void attention_backward(const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& dout,
                          const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o,
                          const Tensor& lse, const Tensor& inv_freq, const AttentionSpec& spec);
  // cache[b, start[b] + t] = k[b, t], the same for v.  caches act (B, Tmax, K, d); start I32 (B) on
  // the device. Positions past the cache throw, here and in attention_cached. On a GPU only the
  // device knows `start`, so the next upload, download or synchronize() throws. With inv_freq,
  // q (B, T, H, d) is rotated in place and k on its way to the cache: rope from position start
  // with rope_factor, rounded to act. A quantized cache is U8 (B, Tmax, K, format.head_bytes(d)), d
  // a multiple of 32.
  void append_kv(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k, const Tensor& v,
                 const Tensor& start, const Tensor& q = {}, const Tensor& inv_freq = {},
                 KvFormat format = {}, double rope_factor = 1);
  // Query t of sequence b is at position start[b] + t and sees keys 0 .. start[b] + t of its cache,
  // within the window. o, q act (B, T, H, d). Keys and values of a quantized cache are (q - z) e;
  // with several queries a GPU rounds them to bf16, which changes them at 8 bits.
  void attention_cached(const Tensor& o, const Tensor& q, const Tensor& k_cache,
                        const Tensor& v_cache, const Tensor& start, const AttentionSpec& spec,
                        KvFormat format = {});
  // append_kv, with inv_freq, and attention_cached of one position a sequence: T is 1. What q holds
  // afterwards is undefined. start and the rows before it are read early: they were written before
  // an op that no kernel overtakes, such as the advance() of start after each step.
  void attention_step(const Tensor& o, const Tensor& q, const Tensor& k, const Tensor& v,
                      const Tensor& k_cache, const Tensor& v_cache, const Tensor& start,
                      const Tensor& inv_freq, const AttentionSpec& spec, KvFormat format = {});

  // --- sampling ---------------------------------------------------------------------------------
  // ids[m] = a token chosen by row m of logits (engine/sampling.h), which also becomes a seen one.
  // A logit that is NaN or infinite throws. On a GPU the next upload, download or synchronize()
  // throws; until then the row's id is 0, and -1 in the log.   ids I32 (M); logits real (M, V).
  void sample(const Tensor& ids, const Tensor& logits, const SampleRows& rows,
              const SampleSpec& spec);

  // --- losses -----------------------------------------------------------------------------------
  // loss = mean((x - y)^2); dx = 2 (x - y) / numel. loss real (1); x act; dx act or undefined; y
  // act: of x's shape, or a batch of x.dim(0) rows, which gives the same bits as a gathered copy.
  void mse(const Tensor& loss, const Tensor& dx, const Tensor& x, const Rows& y);
  // The distance of the means mu and standard deviations sigma of the channels of x from those of
  // y, over their rows:
  //     loss = weight mean_c ((mu - mu_y)^2 + (sigma - sigma_y)^2)
  //     dx = 2 weight / (M D) (mu - mu_y + (sigma - sigma_y) (x - mu) / sigma)
  // where sigma is 0, the last term is 0. loss real (1); x act (M, D); dx likewise or undefined;
  // moments and target F64 (kMoments, D): those of x and y by channel_moments, of M rows each.
  void match_moments(const Tensor& loss, const Tensor& dx, const Tensor& x, const Tensor& moments,
                     const Tensor& target, double weight);
  // loss[m] = log sum exp(logits[m]) - logits[m, target]; dlogits = scale * (softmax - onehot).
  // loss real (M); dlogits act (M, V) or undefined; logits act or real (M, V); targets I32 (M); -1
  // gives loss 0 and gradient 0.
  void cross_entropy(const Tensor& loss, const Tensor& dlogits, const Tensor& logits,
                     const Tensor& targets, double scale);
  // loss[m] = sum_v p (log p - log q), p = softmax(teacher), q = softmax(logits); dlogits = scale *
  // (q - p). Rows with targets[m] < 0 give loss 0 and gradient 0.
  void kl_divergence(const Tensor& loss, const Tensor& dlogits, const Tensor& logits,
                     const Tensor& teacher, const Tensor& targets, double scale);
  // The generalized Jensen-Shannon divergence. loss[m] = beta KL(p||r) + (1 - beta) KL(q||r) with
  // r = beta p + (1 - beta) q; dlogits = scale * (1 - beta) q (log(q / r) - KL(q||r)). beta, as a
  // float, lies between 0 and 1, both excluded. Otherwise as kl_divergence.
  void jensen_shannon(const Tensor& loss, const Tensor& dlogits, const Tensor& logits,
                      const Tensor& teacher, const Tensor& targets, double beta, double scale);
  // Cross-entropy and KL over chunks of C words of the vocabulary: each chunk once, in any order.
  // `state`, real, holds the running values of each row; `loss` is its loss over the chunks so far.
  // Overwrite starts with this chunk, Add continues. first_word is the word of the chunk's first
  // column. A target in no chunk gives an infinite loss.
  // loss real (M); state (M, kCrossEntropyState) or (M, kKlState); logits, teacher act or real
  // (M, C), both alike; targets I32 (M).
  void cross_entropy_chunk(const Tensor& loss, const Tensor& state, const Tensor& logits,
                           const Tensor& targets, int64_t first_word, Write mode);
  void kl_divergence_chunk(const Tensor& loss, const Tensor& state, const Tensor& logits,
                           const Tensor& teacher, const Tensor& targets, Write mode);
  // The gradient of one chunk, from the state after all chunks. dlogits act (M, C); it may be the
  // buffer of the logits where these are act.
  void cross_entropy_chunk_backward(const Tensor& dlogits, const Tensor& logits,
                                    const Tensor& state, const Tensor& targets, int64_t first_word,
                                    double scale);
  void kl_divergence_chunk_backward(const Tensor& dlogits, const Tensor& logits,
                                    const Tensor& teacher, const Tensor& state,
                                    const Tensor& targets, double scale);
  // Jensen-Shannon over chunks: first kl_divergence_chunk of all chunks finds the maxima and sums
  // in `state`, then this adds up the terms of each chunk, once, in any order. student_kl real (M)
  // is the running KL(q||r), which the gradient needs.
  void jensen_shannon_chunk(const Tensor& loss, const Tensor& student_kl, const Tensor& logits,
                            const Tensor& teacher, const Tensor& state, const Tensor& targets,
                            double beta, Write mode);
  void jensen_shannon_chunk_backward(const Tensor& dlogits, const Tensor& logits,
                                     const Tensor& teacher, const Tensor& state,
                                     const Tensor& student_kl, const Tensor& targets, double beta,
                                     double scale);
  // Per row: the maximum, the sum of e^(x - maximum) and the target's logit.
  static constexpr int64_t kCrossEntropyState = 3;
  // Per row: maximum and sum of the student s and of the teacher t, and sum e^(t - max t) (t - s).
  static constexpr int64_t kKlState = 5;
  // out (+)= scale * sum(x).   out real (1); x real, any shape; fixed order.
  void sum(const Tensor& out, const Tensor& x, double scale, Write mode);

  // --- quantizer (numerics.md sections 1-3) -----------------------------------------------------
  // Measures q.max_range of w, real (P), and sets q.prequantized = 0. Call it after anything but
  // adamw has changed the masters.
  void max_group_range(const QuantizedWeights& q, const Tensor& w);
  // Quantizes all weights: S = 2^ceil(log2(s_raw / 448)) with s_raw from q.max_range, 1 where s_raw
  // is 0; wq = (q - z) e, W^ = S wq; e; z; and a clipped bit where q.rule gives the weight no
  // gradient: with Ste::Clip where round(w/s) + z left [0, 2^b - 1]. At kNoQuantizer wq = w, S = 1,
  // nothing is clipped, and e and z are left alone. w real (P): the masters of q.max_range. A
  // parameter whose S equals q.prequantized is not read: its wq, e, z and clipped bits are there
  // already. Rounding::Identity (gradient checks) leaves codes unrounded and unclipped: wq = w / S.
  void fake_quant(const QuantizedWeights& q, const Tensor& w);
  // Nested codes (numerics.md section 4) at fewer bits: wq = (q' - z) e, q' the middle or floor of
  // the 8-bit codes whose top `bits` bits are those of w's code. wq act (P). Call it after
  // fake_quant, for weights of 8 bits.
  void nested_levels(const Tensor& wq, const QuantizedWeights& q, const Tensor& w, int bits,
                     quant::NestedDequant dequant);
  // q = clamp(round(w / s) + z, 0, 2^b - 1), one code a byte. codes U8 (N, K).
  void quantize_codes(const Tensor& codes, const Tensor& w, const Tensor& e, const Tensor& z,
                      const Tensor& s, const WeightGrid& spec);
  // Learned scales: S from the largest sigma; e = E4M3(sigma / S); wq = (codes - z) e. sigma real
  // (N, K/G).
  void scale_codes(const Tensor& wq, const Tensor& e, const Tensor& s, const Tensor& codes,
                   const Tensor& z, const Tensor& sigma, const WeightGrid& spec);
  // dsigma (+)= sum over the group of dw (codes - z), straight through E4M3. dw (N, K) and dsigma
  // (N, K/G) both act (Overwrite only) or both real.
  void scale_codes_backward(const Tensor& dsigma, const Tensor& dw, const Tensor& codes,
                            const Tensor& z, const WeightGrid& spec, Write mode);

  // A weight with low-rank adapters (Hu et al., "LoRA", 2021): w = base + alpha a b, in the
  // precision of masters, the products of an element added in order of r.
  // w, base real (N, K); a real (N, R); b real (R, K).
  void lora_weight(const Tensor& w, const Tensor& base, const Tensor& a, const Tensor& b,
                   double alpha);
  // Its gradients, straight through a quantizer of w: da = alpha dw b^T, db = alpha a^T dw, where
  // dw is 0 at clipped elements. da (N, R), db (R, K), dw (N, K) all act or all real; clipped U8
  // (N K / 8), as of QuantizedWeights.
  void lora_weight_backward(const Tensor& da, const Tensor& db, const Tensor& dw,
                            const Tensor& clipped, const Tensor& a, const Tensor& b, double alpha);

  // A learned grid: S from the largest sigma; e = E4M3(sigma / S); z = clamp(round(zeta), 0, L);
  // q = clamp(round(w / s) + z, 0, L), s = S e; wq = (q - z) e. L = 2^b - 1.
  // wq act, w real (N, K); e, z U8, sigma, zeta real (N, K/G); s real (1). zeta undefined: z is an
  // input.
  void learned_quant(const Tensor& wq, const Tensor& e, const Tensor& z, const Tensor& s,
                     const Tensor& w, const Tensor& sigma, const Tensor& zeta,
                     const WeightGrid& spec);
  // Its gradients, straight through every rounding (Esser et al., "Learned step size quantization",
  // 2020; the zero point as in Chen et al., "EfficientQAT", 2024). Sums are over the group:
  //   q not clipped   dw stays;  dsigma = sum dw ((q - z) - w / s);  dzeta: no term
  //   clipped         dw = 0;    dsigma = sum dw (q - z);            dzeta = sum -dw s
  // dw (N, K), dsigma, dzeta (N, K/G) all act or all real; dzeta may be undefined.
  void learned_quant_backward(const Tensor& dw, const Tensor& dsigma, const Tensor& dzeta,
                              const Tensor& w, const Tensor& e, const Tensor& z, const Tensor& s,
                              const WeightGrid& spec);

  // Learned range ratios: the quantizer's own grid, its range times c. First c = clamp(c, 1/64,
  // 5/4), in place. Then mn_c = c mn, mx_c = c mx, s_raw = (mx_c - mn_c) / L, S from the largest,
  // e, z, q and wq as in fake_quant.   ratio real (N, K/G), the rest as in learned_quant.
  void ratio_quant(const Tensor& wq, const Tensor& e, const Tensor& z, const Tensor& s,
                   const Tensor& ratio, const Tensor& w, const WeightGrid& spec);
  // Its gradients, straight through every rounding; the range itself is constant:
  //   dratio = sum over the group of dw (q - z) (mx - mn) / L;  dw = 0 where q was clipped.
  // dw (N, K) and dratio (N, K/G) both act or both real.
  void ratio_quant_backward(const Tensor& dw, const Tensor& dratio, const Tensor& w,
                            const Tensor& e, const Tensor& z, const Tensor& s,
                            const WeightGrid& spec);

  // --- LC (numerics.md section 8, quant/lc.h) ---------------------------------------------------
  // w = diag(v) H W^ H diag(u).   w act (N, K).
  void lc_weight(const Tensor& w, const LcWeight& from);
  // From w and its gradient dw: dv = sum_k dw w / v; dlatent; dmap (+)= its gradient, if defined.
  // That of u is input_scale_gradient's. dlatent, dw (N, K) and dv (N) all act or all real; dlatent
  // may be dw's buffer; dmap real (4, 5).
  void lc_weight_backward(const Tensor& dlatent, const Tensor& dv, const Tensor& dmap,
                          const Tensor& dw, const Tensor& w, const LcWeight& from, Write dmap_mode);
  // The operand of products with the codes: x' = H (u o x); out = A^T of each vector of 4 of x';
  // constant = c . (their sum).   out, x act (M, K); constant real (M); u real (K); map real (4,
  // 5).
  void lc_operand(const Tensor& out, const Tensor& constant, const Tensor& x, const Tensor& u,
                  const Tensor& map);
  // y = v o H (product + constant) (+ addend).   y act (M, N); product real (M, N); constant real
  // (M); v real (N); addend act (M, N) or undefined.
  void lc_output(const Tensor& y, const Tensor& product, const Tensor& constant, const Tensor& v,
                 const Tensor& addend);

  // --- packed inference -------------------------------------------------------------------------
  // The layout that the products below read, from that of the file. Made once, at load.
  PackedWeight repack(const PackedWeight& file);
  virtual int64_t repacked_bytes(const quant::LinearFormat& format) const = 0;  // of its `layout`
  // In all below w is repacked by this backend.
  // wq = (q - z) e of a whole linear, as a GEMM operand; S is the GEMM's alpha. wq act (N, K).
  void unpack(const Tensor& wq, const PackedWeight& w);
  // y = x W^T (+ addend) straight from the packed codes, for up to max_packed_rows() rows and for
  // each of the weights, which have the same K and group. x act (M, K). The F32 CPU backend (all
  // widths) and a Hopper GPU (2-bit codes, M <= 4) take x as 16-bit integers: y is within 1e-4
  // relative RMS before rounding (numerics.md section 2), and an infinity in x makes its row of y
  // NaN.
  //
  // With `operand`, x act (M, operand->view.k), M <= kMaxPackedRows: x is made into that operand
  // first, whose codes are multiplied if it is quantized. On a Hopper GPU with 2-bit codes, M = 1,
  // K a multiple of 8 and, of a channel order, offsets, one kernel does both, as long as the row
  // fits into its shared memory; elsewhere operand() is in front of the product.
  void packed_gemv(const PackedProducts& products, const Tensor& x,
                   const OperandSpec* operand = nullptr);
  void packed_gemv(const Tensor& y, const Tensor& x, const PackedWeight& w, const Tensor& addend) {
    packed_gemv({{y, w, addend}}, x);
  }
  // packed_gemv of the rows of rms_norm(x, w, eps), w real (K), and of swiglu(gate, up), for M <=
  // kMaxPackedRows. The rows may be rounded to act, those of rms_norm before 1 / rms multiplies
  // them or after; in both cases before they become an operand.
  void packed_gemv_normed(const PackedProducts& products, const Tensor& x, const Tensor& w,
                          double eps, const OperandSpec* operand = nullptr);
  void packed_gemv_gated(const PackedProducts& products, const Tensor& gate, const Tensor& up,
                         const OperandSpec* operand = nullptr);
  // At least kMaxPackedRows, or kAnyRows: with more rows a weight is unpacked for a GEMM. On a GPU,
  // levels of 8 bits may be rounded to act for more than four rows, or for any number if the matrix
  // is large, as unpack rounds them.
  virtual int64_t max_packed_rows(const quant::LinearFormat& format) const = 0;
  static constexpr int64_t kMaxPackedRows = 8, kAnyRows = std::numeric_limits<int64_t>::max();
  // The same from the codes of an operand, M <= kMaxPackedRows: each group's sum is an exact
  // integer.
  void quantized_gemv(const PackedProducts& products, const OperandRows& x);
  void quantized_gemv(const Tensor& y, const OperandRows& x, const PackedWeight& w,
                      const Tensor& addend) {
    quantized_gemv({{y, w, addend}}, x);
  }

  // --- optimizer --------------------------------------------------------------------------------
  // Straight-through estimator: the gradient of a weight is that of W^, and 0 where the weight was
  // clipped. Both ops read g that way.
  //
  // Reads loss, real (1), and the norm of g, and writes the slots of `control`: the learning rate
  // of step t (counted from 0) is peak * min(1, (t + 1) / warmup) * (f + (1 - f) * (1 + cos(pi t /
  // total)) / 2); the gradient factor is min(1, clip / norm). g act or real (P); clipped U8
  // (P / 8) or undefined; fixed order.
  void step_control(const Tensor& control, const Tensor& loss, const Tensor& g,
                    const Tensor& clipped, const Schedule& schedule);
  // The momentum of one matrix, before Muon makes it orthogonal (autograd/muon.h). With d = kScale
  // g, 0 where clipped: m = decay m + d, and x = d + decay m (Nesterov), divided by its Frobenius
  // norm; 0 if that is 0. If kSkip is set, m stays unchanged and x is 0.
  // x, m act (P); g act or real (P); clipped U8 (P / 8) or undefined.
  void muon_momentum(const Tensor& x, const Tensor& m, const Tensor& g, const Tensor& clipped,
                     const Tensor& control, double decay);
  // AdamW: decoupled weight decay (Loshchilov & Hutter), bias-corrected. If kSkip is set, w, m and
  // v stay unchanged. A parameter whose rule is `direct` takes w -= lr (g + decay w) instead, its
  // clipped elements too, and keeps m and v. With a quantizer q, an epilogue writes q.max_range of
  // the new w and may prequantize w with q.s. If it does, it replaces wq, e, z and clipped and sets
  // q.prequantized to q.s; otherwise it sets q.prequantized to 0. Either way wq, e, z and clipped
  // are valid only after the next fake_quant.
  // w, v real (P); m act (P), used before it is rounded; g act or real (P); control as written by
  // step_control.
  void adamw(const Tensor& w, const Tensor& m, const Tensor& v, const Tensor& g,
             const Tensor& control, const ParameterTable& table, const QuantizedWeights& q,
             const AdamWSpec& spec);

  // average += rate (w - average), rate = max(1 - decay, 1 / t) in step t = control[kStep] of the
  // schedule: at first the plain mean of all steps.   both real, same shape.
  void average(const Tensor& average, const Tensor& w, const Tensor& control, double decay);
  // Codes that oscillate between two neighbours (Nagel et al., "Overcoming oscillations in
  // quantization-aware training", 2022). Call both between the gradients and adamw, on weights that
  // fake_quant has just quantized.
  // Pulls masters to the middle of their bins: g += rate (w - S wq), except where w is clipped.
  // g act or real (P).
  void dampen(const Tensor& g, const Tensor& w, const QuantizedWeights& q, double rate);
  // Counts the changes of every code and freezes the weights that change too often: their g and m
  // become 0, from then on in every call. For weights of at most 4 bits. `state` U8 (P), 0 at the
  // start: bit 0 is set once frozen, bits 1-3 hold the count, bits 4-7 floor(q - z) mod 16. The
  // count is halved in every kFlipWindow-th step of `control`. At 7 the weight freezes.
  void freeze_flips(const Tensor& state, const Tensor& g, const Tensor& m,
                    const QuantizedWeights& q, const Tensor& control);
  static constexpr int kFlipWindow = 32;

 private:
  // Undefined if the op needs no scratch.
  Tensor make_scratch(int64_t bytes) { return bytes > 0 ? do_empty({bytes}, DType::U8) : Tensor(); }
  Tensor make_scratch(ScratchOp op, const Shape& shape = {}) {
    return make_scratch(scratch_bytes(op, shape));
  }

  virtual Tensor do_empty(Shape shape, DType dtype) = 0;
  virtual void do_download(void* dst, const Tensor& src) = 0;
  BBB_BACKEND_OPS(BBB_PURE_OP)
};

// Products are tuned while a scope lives. Only one may live at a time.
class GemmTuningScope {
 public:
  GemmTuningScope(Backend& backend, GemmTuning tuning) : backend_(backend) {
    backend.tune_gemms(std::move(tuning));
  }
  ~GemmTuningScope() { backend_.tune_gemms(std::nullopt); }
  GemmTuningScope(const GemmTuningScope&) = delete;
  GemmTuningScope& operator=(const GemmTuningScope&) = delete;

 private:
  Backend& backend_;
};

// `threads` 0: all cores.
std::unique_ptr<Backend> make_cpu_backend(int threads);
std::unique_ptr<Backend> make_cpu_f64_backend(int threads);
// Throws if the build has no CUDA or the machine no GPU. `device` counts from 0.
std::unique_ptr<Backend> make_cuda_backend(int device);
bool cuda_available();  // built with CUDA and a usable GPU is present

}  // namespace bbb::engine
