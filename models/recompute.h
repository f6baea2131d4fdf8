// Recompute: which activations of a block training keeps for the backward pass. Every mode gives
// the same bits.
//
//     None        keeps all
//     Attention   keeps the MLP half; the attention half (norm, q, k, v, rope, attention, o) is
//                 computed again
//     Block       keeps the inputs of both halves; each half is computed again
#pragma once

namespace bbb::models {

enum class Recompute { None, Attention, Block };

const char* to_string(Recompute recompute);  // "none", "attention", "block"

}  // namespace bbb::models
