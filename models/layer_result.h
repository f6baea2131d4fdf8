// LayerResult: the result of training, or of any other method, for one layer, on the host. Stage
// files, a run's final file and the export hold nothing else of a layer. Tensors in a file:
//
//   model.layers.L.self_attn.q_proj.weight      F32 (N, K')       the master, if a later stage
//                                                                 needs it
//   model.layers.L.self_attn.q_proj.ratios      U8 (N, K' / G)    its range ratios, if searched
//   or model.layers.L.self_attn.q_proj.qweight  ..          the tensors of the linear's format
//   with LC, beside the latents .weight: .u (K), .v (N) and .map (4, 5), F32 as they train
//   model.layers.L.self_attn.q_proj.bias        F32 (N)           if the linear has one
//   model.layers.L.input_layernorm.weight       F32 (D)           and the other norms
//
// A file may also hold the weights outside of the layers, F32 under their own names.
#pragma once

#include <array>
#include <functional>
#include <string>
#include <vector>

#include "data/safetensors.h"
#include "models/checkpoint.h"
#include "quant/format.h"
#include "quant/lc.h"

namespace bbb::models {

struct LinearResult {
  quant::LinearFormat format;
  std::vector<float> master;    // (N, K') in stored positions, or empty
  std::vector<uint8_t> ratios;  // (N, K'/G), indices of quant::range_ratio; empty: all are 1
  // Of a master behind LC, whose `master` holds the latents: what else trains. u and map are those
  // of the site.
  struct Lc {
    std::vector<float> u, v, map;  // (K), (N), (4, 5)
    static constexpr std::vector<float> Lc::*kParts[] = {&Lc::u, &Lc::v, &Lc::map};
  } lc;
  std::vector<float> bias;  // (N), the source's; or empty: the linear has none
  // The bytes of each of the format's tensors; empty if only the master is stored.
  std::array<std::vector<uint8_t>, quant::kStoredParts> stored;

  bool quantized() const { return !stored[0].empty(); }
  std::vector<uint8_t>& part(quant::StoredPart p) { return stored[static_cast<size_t>(p)]; }
  const std::vector<uint8_t>& part(quant::StoredPart p) const {
    return stored[static_cast<size_t>(p)];
  }
  // Fills the stored tensors: codes (N, K') and zeros (N, K'/G), one a byte, e (N, K'/G), S.
  void store(const std::vector<uint8_t>& codes, const std::vector<uint8_t>& e,
             const std::vector<uint8_t>& zeros, float master_scale);
  // S e (q - z) of a quantized result in its stored positions (N, K'), exact in float.
  std::vector<float> levels() const;
  // The same as a weight (N, K). Pairs are summed (or averaged), rotations undone, and LC
  // transforms, which rounds.
  std::vector<float> dequantize() const;
  float master_scale() const;  // of a quantized result
};

// The grid of a linear's groups, in stored positions: e and zeros (N, K'/G), one a byte.
struct LinearGrid {
  float master_scale;
  std::vector<uint8_t> e, zeros;  // zeros of a symmetric format: 0, not used
};
LinearGrid stored_grid(const LinearResult& quantized);  // not of nested codes
// That of rounding the masters to nearest, with their ratios.
LinearGrid nearest_grid(const LinearResult& masters);

// The integers of a quantized linear without a channel order: W[n, k] = s[n, g] (q[n, k] - z[n, g])
// with g = k / G. Padding at the end of a row is left out. Of a symmetric format these are 2 q, the
// zero point 2^b - 1 and half the scale.
struct LinearCodes {
  static constexpr float kSmallestHalf = 0x1p-24f;  // of IEEE binary16

  int64_t n, k, group, groups;
  std::vector<uint8_t> codes;  // (N, K)
  std::vector<uint8_t> zeros;  // (N, groups)
  std::vector<float> scales;   // (N, groups): s; of a group of weights 0, kSmallestHalf
};
LinearCodes linear_codes(const LinearResult& linear);

struct LayerResult {
  std::vector<float> input_norm, post_norm;  // (D)
  std::vector<float> q_norm, k_norm;         // (d); empty: the block has none
  std::vector<LinearResult> linears;         // in the order of block_linears()

  // In the order of block_norms().
  static constexpr std::vector<float> LayerResult::*kNorms[] = {
      &LayerResult::input_norm, &LayerResult::post_norm, &LayerResult::q_norm,
      &LayerResult::k_norm};
  std::vector<float>& norm(size_t i) { return this->*kNorms[i]; }
  const std::vector<float>& norm(size_t i) const { return this->*kNorms[i]; }
};

// LC. The parts of a result's format from its codes (N, K), one a byte, and back. u and v are
// rounded to F16.
void store_lc(LinearResult& result, const std::vector<uint8_t>& codes, const LinearResult::Lc& lc);
struct LcCodes {
  std::vector<uint8_t> codes;
  LinearResult::Lc lc;
};
LcCodes lc_codes(const LinearResult& result);
// How latents become codes.
quant::LcRule lc_rule(const quant::LinearFormat& format);

// From one code per byte to one bit stream per row (quant/pack.h).
std::vector<uint8_t> pack_rows(const std::vector<uint8_t>& codes, int64_t rows, int bits);
// The inverse, for `columns` codes a row.
std::vector<uint8_t> unpack_rows(const std::vector<uint8_t>& packed, int64_t rows, int64_t columns,
                                 int bits);
// From one 8-bit code per byte to bit planes, the highest first.
std::vector<uint8_t> bit_planes(const std::vector<uint8_t>& codes);

enum class LinearContent { Masters, Stored };

// The entries of one layer in a file, in the order in which add_layer() adds them. `range`: whether
// the masters have ratios.
void declare_layer(std::vector<data::SafeTensorsWriter::Entry>& entries, int64_t layer,
                   const LlamaConfig& config, const std::vector<quant::LinearFormat>& formats,
                   LinearContent content, quant::RangeRule range);
void add_layer(data::SafeTensorsWriter& writer, int64_t layer, const LlamaConfig& config,
               const LayerResult& result, LinearContent content);
// Reads each linear's master or, if the file holds none, the tensors of its format. Throws, naming
// the tensor, if one is missing or has another shape or type.
LayerResult read_layer(const data::SafeTensors& file, int64_t layer, const LlamaConfig& config,
                       const std::vector<quant::LinearFormat>& formats);
// The norms of a layer and the biases of its linears.
LayerResult norms_and_biases(const Checkpoint& source, int64_t layer);
// The full-precision weights of a layer, as masters with bits = kNoQuantizer.
LayerResult full_precision(const Checkpoint& source, int64_t layer);

// A weight outside of the layers.
struct OuterWeight {
  std::string name;
  engine::Shape shape;
};
// Embedding, final norm and, if it is not tied, head.
std::vector<OuterWeight> outer_weights(const LlamaConfig& config);
// Loads one of them.
using LoadOuter = std::function<std::vector<float>(const OuterWeight& weight)>;
// Both read from their argument, which must outlive the result. Of a file that holds none: null.
LoadOuter outer_of(const Checkpoint& source);
LoadOuter outer_of(const data::SafeTensors& file);
void declare_outer(std::vector<data::SafeTensorsWriter::Entry>& entries, const LlamaConfig& config);
void add_outer(data::SafeTensorsWriter& writer, const LlamaConfig& config, const LoadOuter& load);

}  // namespace bbb::models
