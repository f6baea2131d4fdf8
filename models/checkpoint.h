// Checkpoint: any model that bbb reads, with Hugging Face names and row-major tensors, as Llama
// expects them.
//
//   a directory with config.json and safetensors   full precision, or exported
//                                                  (quantization_config)
//   a GGUF file of llama, qwen2 or qwen3           dequantized; llama's permuted Q and K put back
//   synthetic:NAME                                 random weights (synthetic_checkpoint.h)
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "data/checksum.h"
#include "data/gguf.h"
#include "data/safetensors.h"
#include "models/config.h"
#include "quant/format.h"

namespace bbb::models {

enum class CheckpointKind { HuggingFace, Gguf, Packed };

struct TensorInfo {
  std::string name;
  std::string dtype;
  engine::Shape shape;
  int64_t bytes;
  data::Bytes source;  // decides the values: the bytes in the mapped file, or a seed
};

class Checkpoint {
 public:
  virtual ~Checkpoint() = default;
  virtual CheckpointKind kind() const = 0;
  const LlamaConfig& config() const { return config_; }
  const std::string& path() const { return path_; }
  // Every tensor in the file, for `bbb inspect`.
  virtual std::vector<TensorInfo> list() const = 0;
  // Reads every weight that the model uses, on all cores. Throws, naming the first tensor and the
  // position in it, if one is NaN, infinite or beyond BF16's range.
  virtual void check_finite() const = 0;
  // Token ids at which a text ends: each eos_token_id of config.json, then of
  // generation_config.json, or a GGUF's. Ids without a row in the embedding are left out.
  std::vector<int32_t> stop_ids() const;
  // A full-precision tensor by Hugging Face name. Throws, naming it, if it is missing or has
  // another shape.
  virtual std::vector<float> load(const std::string& name, const engine::Shape& shape) const = 0;
  // The format of the linear (N, K) in an exported directory, after checking its tensors; nullopt
  // if it is stored in full precision. Also of a table (models/table.h).
  virtual std::optional<quant::LinearFormat> packed_format(const std::string&, int64_t,
                                                           int64_t) const {
    return std::nullopt;
  }
  // The bytes of one tensor of a packed linear, in the mapped file. Throws if nothing is packed.
  virtual const uint8_t* stored(const std::string& name) const;
  // 8 x bytes / elements, over the linears that are (or would be) quantized. Of a nested export: of
  // the planes that are read.
  virtual double bits_per_weight() const = 0;
  // Of embedding and head as stored, and of their weights.
  virtual int64_t table_bytes() const = 0;
  int64_t table_weights() const;
  // Bits of an input channel's activation, averaged over all input sites; 16 if none is quantized.
  quant::ActivationBits bits_per_activation() const;
  // Contents of the Hugging Face files that an export carries.
  virtual std::string config_json() const = 0;  // the source's own, or made from its configuration
  virtual std::string generation_config_json() const { return ""; }  // "": none

 protected:
  LlamaConfig config_;
  std::string path_;
};

// Bits of an input channel's activation, averaged over all input sites. formats(layer): of its
// linears, in the order of block_linears().
quant::ActivationBits bits_per_activation(
    const LlamaConfig& config,
    const std::function<std::vector<quant::LinearFormat>(int64_t layer)>& formats);

// Tables: embedding and head, (V, D). One of 8 or 4 bits has the tensors of a linear, in groups of
// 32 and without a channel order; its input is neither quantized nor rotated.
inline constexpr int kDenseBits = 16;  // of a table that is not quantized
// The name in front of these tensors: "lm_head" of "lm_head.weight".
std::string table_module(const std::string& name);
// Throws if D is not a multiple of the group.
quant::LinearFormat table_format(const LlamaConfig& config, int bits);

// Throws, saying what is wrong, if `path` is none of the kinds, or a tensor is missing, misshapen
// or unknown. Reads no weights, with one exception: if the config ties the head to the embedding
// and the file holds a head, the two are compared. A head that differs is used, and a line on
// stderr says so.
// `bits`: of a nested export, the bits to read (8, 4, 3 or 2); 0: all. Anything else refuses it.
std::unique_ptr<Checkpoint> open_checkpoint(const std::string& path, int bits = 0);

// The GGUF name of a Hugging Face tensor; "" if it has none.
std::string gguf_name(const std::string& name);
// Whether a GGUF holds the rows of this tensor in another order: those of Q and K, and their
// biases, of the architecture llama. Hugging Face rotates the pair (j, j + d/2) of a head,
// llama.cpp the neighbours (2j, 2j + 1). For Qwen it rotates as Hugging Face does.
bool has_gguf_rows(const LlamaConfig& config, const std::string& name);
// Where a GGUF stores such a row: row p d/2 + j of a head at 2j + p.
int64_t gguf_row(int64_t row, int64_t head_dim);

}  // namespace bbb::models
