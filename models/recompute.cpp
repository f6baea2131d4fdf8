#include "models/recompute.h"

#include <algorithm>

#include "quant/check.h"

namespace bbb::models {

const char* to_string(Recompute recompute) {
  switch (recompute) {
    case Recompute::None:
      return "none";
    case Recompute::Attention:
      return "attention";
    case Recompute::Block:
      return "block";
  }
  BBB_ASSERT(false);
}

ActivationMemory activation_memory(const engine::Backend& backend, const LlamaConfig& config,
                                   int64_t windows, int64_t seq_len, Recompute recompute) {
  const int64_t act = engine::size_bytes(backend.act()), real = engine::size_bytes(backend.real());
  // Bytes a token of a (D), (H d), (K d) and (F) tensor, and of an inverse RMS.
  const int64_t d = config.d_model * act, q = config.heads * config.head_dim * act,
                kv = config.kv_heads * config.head_dim * act, f = config.hidden * act;
  const int64_t lse = config.heads * real;
  const int64_t tokens = windows * seq_len;
  const int64_t scratch =
      backend.attention_backward_scratch({windows, seq_len, config.heads, config.head_dim},
                                         {windows, seq_len, config.kv_heads, config.head_dim},
                                         engine::AttentionSpec{config.sliding_window});

  const int64_t attention = d + 2 * q + 2 * kv + real + lse;  // norm; q, o; k, v
  const int64_t mlp = d + 3 * f + real;                       // norm; gate, up, their product
  const int64_t halves = 2 * d;                               // what each of them gives
  const int64_t attention_gradients = d + 2 * q + 2 * kv;     // of its output; o, q; k, v
  const int64_t mlp_gradients = d + 3 * f;                    // of its output; product, gate, up

  int64_t kept = halves, in_mlp = 0, in_attention = 0;
  if (recompute == Recompute::Block) {
    // SwiGLU's product is gone by then; as it is made again, the half's output is there instead.
    in_mlp = mlp + std::max(mlp_gradients - f, 2 * d);
  } else {
    kept += mlp;
    in_mlp = mlp_gradients - f;
    in_attention -= mlp;  // gone by then
  }
  in_attention += attention_gradients;
  if (recompute == Recompute::None)
    kept += attention;
  else
    in_attention += attention;

  ActivationMemory memory;
  memory.kept_bytes = kept * tokens;
  // The scratch may be a piece larger than any that the MLP leaves behind.
  memory.backward_bytes = std::max(in_mlp, in_attention) * tokens + scratch;
  memory.inference_bytes = (d + std::max(attention + d, d + mlp)) * tokens;
  return memory;
}

}  // namespace bbb::models
