// Export of a model in the formats of format.md: written, read back and compared, then renamed into
// place.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "data/tokenizer.h"
#include "models/checkpoint.h"
#include "models/layer_result.h"

namespace bbb::models {

// Gguf is one file, the others are directories.
enum class ExportFormat { Packed, HuggingFace, Gptq, Gguf };
// Embedding and head of a GGUF.
enum class GgufTables { BF16, Q8_0 };

struct ExportOptions {
  ExportFormat format = ExportFormat::Packed;
  GgufTables gguf_tables = GgufTables::BF16;
  // Of a packed head and of an embedding tied to it: 16, 8 or 4. An embedding of its own stays
  // BF16: a step reads one row of it.
  int head_bits = kDenseBits;

  ExportOptions() = default;
  ExportOptions(ExportFormat f, int bits = kDenseBits) : format(f), head_bits(bits) {
    BBB_ASSERT(bits == kDenseBits || f == ExportFormat::Packed);
  }
};

// The largest difference between a weight of the packed model and of the file.
struct LargestRounding {
  float difference = 0;
  std::string name;  // of the tensor
};

struct ExportSummary {
  double bits_per_weight;  // of the linears, from the written file
  LargestRounding rounding;
  bool lost_activations;  // whether the model quantizes activations and the format cannot say so
};

constexpr int64_t kMaxShardBytes = 5'000'000'000;

// Writes `path`: embedding, final norm and head from `outer`, the tokenizer, and the quantized
// layers layer(i), whose linears have formats(i). layer(i) and `outer` are called twice: after
// writing, everything is read back and compared with the second result, before the output is
// renamed into place. An error, also from layer(i), leaves nothing behind.
// bbb_json: the content of bbb.json. progress(done): layers written and then read back, 2 x layers
// in total.
ExportSummary export_model(const std::string& path, const Checkpoint& source,
                           const data::Tokenizer& tokenizer,
                           const std::function<std::vector<quant::LinearFormat>(int64_t)>& formats,
                           const ExportOptions& options, const LoadOuter& outer,
                           const std::function<LayerResult(int64_t)>& layer,
                           const std::string& bbb_json,
                           const std::function<void(int64_t done)>& progress,
                           int64_t max_shard_bytes = kMaxShardBytes);

}  // namespace bbb::models
