// The exported directory (format.md): written, read back and compared, then renamed into place.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "data/tokenizer.h"
#include "models/checkpoint.h"
#include "models/layer_result.h"

namespace bbb::models {

enum class ExportFormat { Packed, HuggingFace };

// What is written. Packed: the head, and a tied embedding, have `head_bits`: 16, 8 or 4. An
// embedding of its own stays BF16: a step reads one row of it.
struct ExportAs {
  ExportAs(ExportFormat format, int head_bits = kDenseBits) : format(format), head_bits(head_bits) {
    BBB_ASSERT(head_bits == kDenseBits || format == ExportFormat::Packed);
  }

  ExportFormat format;
  int head_bits;
};

constexpr int64_t kMaxShardBytes = 5'000'000'000;

// Writes `directory`: embedding, final norm and head from `outer`, the tokenizer's files, and the
// quantized layers layer(i), whose linears have formats(i). layer(i) and `outer` are called twice:
// after writing, everything is read back and compared byte by byte with the second result, before
// the directory is renamed into place. An error, also from layer(i), leaves nothing behind.
// bbb_json: the content of bbb.json. progress(done): layers written and then read back, 2 x layers
// in total. Returns the bits per weight, from the written file.
double export_model(const std::string& directory, const Checkpoint& source,
                    const data::Tokenizer& tokenizer,
                    const std::function<std::vector<quant::LinearFormat>(int64_t)>& formats,
                    const ExportAs& as, const LoadOuter& outer,
                    const std::function<LayerResult(int64_t)>& layer, const std::string& bbb_json,
                    const std::function<void(int64_t done)>& progress,
                    int64_t max_shard_bytes = kMaxShardBytes);

}  // namespace bbb::models
