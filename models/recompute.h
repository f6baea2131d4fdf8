// Recompute: which of a block's activations training keeps for the backward pass, and what that
// takes. Every mode gives the same bits.
//
//     None        all of them
//     Attention   the MLP half's; the attention half (norm, q, k, v, rope, attention, o) runs again
//     Block       the inputs of both halves; each half runs again by itself
//
// The sizes below follow LlamaBlock::forward tensor by tensor, in the moments at which most of them
// are alive: in the MLP, as SwiGLU's backward makes the gradients of gate and up; in the attention,
// as its backward makes those of q, k and v.
#pragma once

#include "engine/backend.h"
#include "models/config.h"

namespace bbb::models {

enum class Recompute { None, Attention, Block };

const char* to_string(Recompute recompute);  // "none", "attention", "block"

// Bytes of one block's pass over `windows` windows of seq_len tokens.
struct ActivationMemory {
  int64_t kept_bytes = 0;       // from its forward to its backward, its output included
  int64_t backward_bytes = 0;   // at most beside that, gradients and recomputed activations
  int64_t inference_bytes = 0;  // at most, its input included, where nothing is kept
};
ActivationMemory activation_memory(const engine::Backend& backend, const LlamaConfig& config,
                                   int64_t windows, int64_t seq_len, Recompute recompute);

}  // namespace bbb::models
