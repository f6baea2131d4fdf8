// The private ops of a backend, listed once for every class that declares or instantiates them.
// BBB_OP_NAME: the types of do_NAME's parameters: those of Backend::NAME, then its scratch if any.
#pragma once

#include "engine/tensor.h"
#include "quant/format.h"

namespace bbb::engine {
using Arg = const Tensor&;
using quant::KvFormat;
}  // namespace bbb::engine

// clang-format off
#define BBB_OP_upload Arg, const void*
#define BBB_OP_copy Arg, Arg
#define BBB_OP_cast Arg, Arg
#define BBB_OP_zero Arg
#define BBB_OP_embed Arg, Arg, Arg
#define BBB_OP_embed_packed Arg, Arg, const PackedWeight&
#define BBB_OP_embed_backward Arg, Arg, Arg, Write, Arg
#define BBB_OP_gather_rows Arg, const Rows&
#define BBB_OP_advance Arg
#define BBB_OP_log_control Arg, Arg, Arg
#define BBB_OP_gemm_nt Arg, Arg, Arg, Arg, Arg
#define BBB_OP_gemm_nn Arg, Arg, Arg, Arg, Write
#define BBB_OP_gemm_tn Arg, Arg, Arg, Write
#define BBB_OP_rms_norm Arg, Arg, Arg, Arg, double
#define BBB_OP_rms_norm_backward Arg, Arg, Arg, Arg, Arg, Arg, Write, Write, Arg
#define BBB_OP_input_scale_gradient Arg, Arg, Arg, Arg, Arg, Write, Arg
#define BBB_OP_swiglu Arg, Arg, Arg
#define BBB_OP_swiglu_backward Arg, Arg, Arg, Arg, Arg
#define BBB_OP_operand const OperandRows&, Arg, const OperandSpec&
#define BBB_OP_rms_norm_operand const OperandRows&, Arg, Arg, Arg, double, const OperandSpec&
#define BBB_OP_swiglu_operand const OperandRows&, Arg, Arg, const OperandSpec&
#define BBB_OP_operand_backward Arg, Arg, Arg, const OperandSpec&
#define BBB_OP_swiglu_operand_backward Arg, Arg, Arg, Arg, Arg, Arg, const OperandSpec&
#define BBB_OP_channel_moments Arg, Arg, Arg
#define BBB_OP_rope Arg, Arg, Arg, Rotation, double
#define BBB_OP_scale Arg, Arg
#define BBB_OP_nested_levels Arg, const QuantizedWeights&, Arg, int, quant::NestedDequant
#define BBB_OP_add Arg, Arg, Arg
#define BBB_OP_add_bias Arg, Arg
#define BBB_OP_attention Arg, Arg, Arg, Arg, Arg, const AttentionSpec&, Arg
#define BBB_OP_attention_backward Arg, Arg, Arg, Arg, Arg, Arg, Arg, Arg, Arg, Arg, \
  const AttentionSpec&, Arg
#define BBB_OP_append_kv Arg, Arg, Arg, Arg, Arg, Arg, Arg, KvFormat, double
#define BBB_OP_attention_cached Arg, Arg, Arg, Arg, Arg, const AttentionSpec&, KvFormat, Arg
#define BBB_OP_attention_step Arg, Arg, Arg, Arg, Arg, Arg, Arg, Arg, const AttentionSpec&, KvFormat, \
  Arg
#define BBB_OP_sample Arg, Arg, const SampleRows&, const SampleSpec&, Arg
#define BBB_OP_mse Arg, Arg, Arg, const Rows&, Arg
#define BBB_OP_match_moments Arg, Arg, Arg, Arg, Arg, double
#define BBB_OP_cross_entropy Arg, Arg, Arg, Arg, double
#define BBB_OP_kl_divergence Arg, Arg, Arg, Arg, Arg, double
#define BBB_OP_cross_entropy_chunk Arg, Arg, Arg, Arg, int64_t, Write
#define BBB_OP_kl_divergence_chunk Arg, Arg, Arg, Arg, Arg, Write
#define BBB_OP_cross_entropy_chunk_backward Arg, Arg, Arg, Arg, int64_t, double
#define BBB_OP_kl_divergence_chunk_backward Arg, Arg, Arg, Arg, Arg, double
#define BBB_OP_jensen_shannon Arg, Arg, Arg, Arg, Arg, double, double
#define BBB_OP_jensen_shannon_chunk Arg, Arg, Arg, Arg, Arg, Arg, double, Write
#define BBB_OP_jensen_shannon_chunk_backward Arg, Arg, Arg, Arg, Arg, Arg, double, double
#define BBB_OP_sum Arg, Arg, double, Write, Arg
#define BBB_OP_max_group_range const QuantizedWeights&, Arg
#define BBB_OP_fake_quant const QuantizedWeights&, Arg
#define BBB_OP_quantize_codes Arg, Arg, Arg, Arg, Arg, const WeightGrid&
#define BBB_OP_scale_codes Arg, Arg, Arg, Arg, Arg, Arg, const WeightGrid&
#define BBB_OP_scale_codes_backward Arg, Arg, Arg, Arg, const WeightGrid&, Write
#define BBB_OP_learned_quant Arg, Arg, Arg, Arg, Arg, Arg, Arg, const WeightGrid&
#define BBB_OP_learned_quant_backward Arg, Arg, Arg, Arg, Arg, Arg, Arg, const WeightGrid&
#define BBB_OP_ratio_quant Arg, Arg, Arg, Arg, Arg, Arg, const WeightGrid&
#define BBB_OP_ratio_quant_backward Arg, Arg, Arg, Arg, Arg, Arg, const WeightGrid&
#define BBB_OP_lc_weight Arg, const LcWeight&
#define BBB_OP_lc_weight_backward Arg, Arg, Arg, Arg, Arg, const LcWeight&, Write, Arg
#define BBB_OP_lora_weight Arg, Arg, Arg, Arg, double
#define BBB_OP_lora_weight_backward Arg, Arg, Arg, Arg, Arg, Arg, double, Arg
#define BBB_OP_lc_operand Arg, Arg, Arg, Arg, Arg
#define BBB_OP_lc_output Arg, Arg, Arg, Arg, Arg
#define BBB_OP_repack Arg, const PackedWeight&
#define BBB_OP_unpack Arg, const PackedWeight&
#define BBB_OP_packed_gemv const PackedProducts&, Arg, const OperandSpec*
#define BBB_OP_packed_gemv_normed const PackedProducts&, Arg, Arg, double, const OperandSpec*
#define BBB_OP_packed_gemv_gated const PackedProducts&, Arg, Arg, const OperandSpec*
#define BBB_OP_quantized_gemv const PackedProducts&, const OperandRows&
#define BBB_OP_average Arg, Arg, Arg, double
#define BBB_OP_dampen Arg, Arg, const QuantizedWeights&, double
#define BBB_OP_freeze_flips Arg, Arg, Arg, const QuantizedWeights&, Arg
#define BBB_OP_step_control Arg, Arg, Arg, Arg, const Schedule&, Arg
#define BBB_OP_muon_momentum Arg, Arg, Arg, Arg, Arg, double, Arg
#define BBB_OP_adamw Arg, Arg, Arg, Arg, Arg, const ParameterTable&, const QuantizedWeights&, \
  const AdamWSpec&

#define BBB_BACKEND_OPS(OP)                                                                      \
  OP(upload) OP(copy) OP(cast) OP(zero) OP(embed) OP(embed_packed) OP(embed_backward) OP(gather_rows) \
  OP(advance) OP(log_control)                                                                    \
  OP(gemm_nt) OP(gemm_nn) OP(gemm_tn) OP(rms_norm) OP(rms_norm_backward)                         \
  OP(input_scale_gradient) OP(swiglu) OP(swiglu_backward) OP(operand)                \
  OP(rms_norm_operand) OP(swiglu_operand) OP(operand_backward) OP(swiglu_operand_backward)       \
  OP(channel_moments) OP(quantized_gemv) OP(scale) OP(nested_levels) OP(rope) OP(add)           \
  OP(add_bias) OP(attention) OP(attention_backward) OP(append_kv) OP(attention_cached) OP(attention_step) OP(sample) OP(mse) OP(cross_entropy)            \
  OP(kl_divergence) OP(cross_entropy_chunk) OP(kl_divergence_chunk)                              \
  OP(cross_entropy_chunk_backward) OP(kl_divergence_chunk_backward) OP(sum)                      \
  OP(jensen_shannon) OP(jensen_shannon_chunk) OP(jensen_shannon_chunk_backward)                  \
  OP(max_group_range) OP(fake_quant) OP(quantize_codes) OP(scale_codes)                          \
  OP(scale_codes_backward) OP(learned_quant) OP(learned_quant_backward) OP(ratio_quant) OP(ratio_quant_backward) OP(lc_weight) OP(lc_weight_backward) OP(lc_operand) OP(lc_output)     \
  OP(repack) OP(unpack) OP(packed_gemv) OP(packed_gemv_normed) OP(packed_gemv_gated) \
  OP(step_control) OP(muon_momentum) OP(adamw) \
  OP(average) OP(dampen) OP(freeze_flips)                                                        \
  OP(lora_weight) OP(lora_weight_backward) OP(match_moments)
// clang-format on
#define BBB_PURE_OP(name) virtual void do_##name(BBB_OP_##name) = 0;
#define BBB_OVERRIDE_OP(name) void do_##name(BBB_OP_##name) override;
