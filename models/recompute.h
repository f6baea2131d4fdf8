// Recompute: which of a block's activations training keeps for the backward pass. Every mode gives
// the same bits.
//
//     None        all of them
//     Attention   the MLP half's; the attention half (norm, q, k, v, rope, attention, o) runs again
//     Block       the inputs of both halves; each half runs again by itself
#pragma once

namespace bbb::models {

enum class Recompute { None, Attention, Block };

const char* to_string(Recompute recompute);  // "none", "attention", "block"

}  // namespace bbb::models
