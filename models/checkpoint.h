// Checkpoint: any model that bbb reads, under Hugging Face names, row-major, as a Llama wants it.
//
//   a directory with config.json and safetensors   full precision, or exported
//                                                  (quantization_config)
//   a GGUF file of the llama architecture          dequantized; permuted Q and K put back
//   synthetic:NAME                                 random weights (synthetic_checkpoint.h)
#pragma once

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
  data::Bytes source;  // what decides its values: its bytes in the mapped file, or a seed
};

class Checkpoint {
 public:
  virtual ~Checkpoint() = default;
  virtual CheckpointKind kind() const = 0;
  const LlamaConfig& config() const { return config_; }
  const std::string& path() const { return path_; }
  // Every tensor in the file, for `bbb inspect`.
  virtual std::vector<TensorInfo> list() const = 0;
  // Reads every weight that the model uses, on all cores; throws, naming the first tensor and
  // position in it, where one is NaN, infinite or beyond BF16's range.
  virtual void check_finite() const = 0;
  // Token ids at which a text ends: each eos_token_id of config.json, then of
  // generation_config.json, or a GGUF's; those that no row of the embedding has are left out.
  std::vector<int32_t> stop_ids() const;
  virtual bool contains(const std::string& name) const = 0;
  // A full-precision tensor by Hugging Face name, of exactly this shape; throws, naming it,
  // otherwise.
  virtual std::vector<float> load(const std::string& name, const engine::Shape& shape) const = 0;
  // What the linear (N, K) is in an exported directory, all its tensors checked; nullopt where it
  // is in full precision.
  virtual std::optional<quant::LinearFormat> packed_format(const std::string&, int64_t,
                                                           int64_t) const {
    return std::nullopt;
  }
  // The bytes of a tensor of such a linear, in the mapped file.
  virtual const uint8_t* stored(const std::string& name) const;
  // 8 x bytes over elements, of the linears that are (or would be) quantized.
  virtual double bits_per_weight() const = 0;
  // Hugging Face files to carry into an export: config.json, generation_config.json (name,
  // content).
  virtual std::string config_json() const = 0;  // the source's own keys, or made from GGUF metadata
  virtual std::string generation_config_json() const { return ""; }

 protected:
  LlamaConfig config_;
  std::string path_;
};

// Throws, saying what is wrong, if `path` is none of the kinds, or any tensor is missing, misshapen
// or (packed) one too many. No weights are read, but for a head in the file of a model whose config
// ties it to the embedding: one that differs is used, and a line on stderr says so.
std::unique_ptr<Checkpoint> open_checkpoint(const std::string& path);

}  // namespace bbb::models
