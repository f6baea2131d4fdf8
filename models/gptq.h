// GPTQ-v2: how GPTQModel and transformers store a quantized linear. For P with N outputs and K
// inputs, b bits, groups of G:
//
//   P.qweight   I32 (K b / 32, N)          32 / b codes of one output in a word, lowest bits first
//   P.qzeros    I32 (K / G, N b / 32)      32 / b zero points of one group in a word
//   P.scales    F16 (K / G, N)             S e
//   P.g_idx     I32 (K)                    the group of each input: k / G
//
// Sizes that do not divide are rounded up. W[n, k] = scales[g, n] (q - z).
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "data/safetensors.h"
#include "models/layer_result.h"

namespace bbb::models {

struct GptqLinear {
  std::vector<int32_t> qweight, qzeros;
  std::vector<uint16_t> scales;  // bits of binary16
  std::vector<int32_t> g_idx;
};

// Throws, naming the linear, if the format has what GPTQ cannot hold: 3 bits, quantized
// activations, a channel order, a rotation.
void check_gptq(const quant::LinearFormat& format, const std::string& name);
// In the order of the members of GptqLinear.
std::vector<data::SafeTensorsWriter::Entry> gptq_entries(const quant::LinearFormat& format,
                                                         const std::string& name);
// Throws, naming the tensor and the group, if a scale is not exact in binary16.
GptqLinear to_gptq(const LinearResult& linear, const std::string& name);
// The weight (N, K), from a file.
std::vector<float> read_gptq(const data::SafeTensors& file, const quant::LinearFormat& format,
                             const std::string& name);
nlohmann::ordered_json gptq_config(const quant::LinearFormat& format);

}  // namespace bbb::models
