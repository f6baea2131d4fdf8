// The private ops of a backend, listed once for the classes that declare them: OP(name, parameter
// types). do_NAME takes the arguments of Backend::NAME, then its scratch if it needs any.
#pragma once

#include "engine/tensor.h"

namespace bbb::engine {
using Arg = const Tensor&;
}

// clang-format off
#define BBB_BACKEND_OPS(OP)                                                                       \
  OP(upload, Arg, const void*)                                                                    \
  OP(copy, Arg, Arg)                                                                              \
  OP(cast, Arg, Arg)                                                                              \
  OP(zero, Arg)                                                                                   \
  OP(embed, Arg, Arg, Arg)                                                                        \
  OP(gather_rows, Arg, const Rows&)                                                               \
  OP(advance, Arg)                                                                                \
  OP(log_control, Arg, Arg, Arg)                                                                  \
  OP(gemm_nt, Arg, Arg, Arg, Arg, Arg)                                                            \
  OP(gemm_nn, Arg, Arg, Arg, Arg, Write)                                                          \
  OP(gemm_tn, Arg, Arg, Arg, Write)                                                               \
  OP(rms_norm, Arg, Arg, Arg, Arg, double)                                                        \
  OP(rms_norm_backward, Arg, Arg, Arg, Arg, Arg, Arg, Write, Write, Arg)                          \
  OP(input_scale_gradient, Arg, Arg, Arg, Arg, Arg, Write, Arg)                                   \
  OP(swiglu, Arg, Arg, Arg)                                                                       \
  OP(swiglu_backward, Arg, Arg, Arg, Arg, Arg)                                                    \
  OP(rope, Arg, Arg, Arg, Rotation)                                                               \
  OP(add, Arg, Arg, Arg)                                                                          \
  OP(attention, Arg, Arg, Arg, Arg, Arg, const AttentionSpec&, Arg)                               \
  OP(attention_backward, Arg, Arg, Arg, Arg, Arg, Arg, Arg, Arg, Arg, Arg,                        \
     const AttentionSpec&, Arg)                                                                   \
  OP(append_kv, Arg, Arg, Arg, Arg, Arg)                                                          \
  OP(attention_cached, Arg, Arg, Arg, Arg, Arg, const AttentionSpec&, Arg)                        \
  OP(mse, Arg, Arg, Arg, const Rows&, Arg)                                                        \
  OP(cross_entropy, Arg, Arg, Arg, Arg, double)                                                   \
  OP(kl_divergence, Arg, Arg, Arg, Arg, Arg, double)                                              \
  OP(cross_entropy_chunk, Arg, Arg, Arg, Arg, int64_t, Write)                                     \
  OP(kl_divergence_chunk, Arg, Arg, Arg, Arg, Arg, Write)                                         \
  OP(cross_entropy_chunk_backward, Arg, Arg, Arg, Arg, int64_t, double)                           \
  OP(kl_divergence_chunk_backward, Arg, Arg, Arg, Arg, Arg, double)                               \
  OP(sum, Arg, Arg, double, Write, Arg)                                                           \
  OP(max_group_range, const QuantizedWeights&, Arg)                                               \
  OP(fake_quant, const QuantizedWeights&, Arg)                                                    \
  OP(quantize_codes, Arg, Arg, Arg, Arg, Arg, const WeightGrid&)                                  \
  OP(scale_codes, Arg, Arg, Arg, Arg, Arg, Arg, const WeightGrid&)                                \
  OP(scale_codes_backward, Arg, Arg, Arg, Arg, const WeightGrid&, Write)                          \
  OP(unpack, Arg, const PackedWeight&)                                                            \
  OP(packed_gemv, Arg, Arg, const PackedWeight&, Arg)                                             \
  OP(step_control, Arg, Arg, Arg, Arg, const Schedule&, Arg)                                      \
  OP(adamw, Arg, Arg, Arg, Arg, Arg, const ParameterTable&, const QuantizedWeights&,              \
     const AdamWSpec&)
// clang-format on
#define BBB_PURE_OP(name, ...) virtual void do_##name(__VA_ARGS__) = 0;
#define BBB_OVERRIDE_OP(name, ...) void do_##name(__VA_ARGS__) override;
