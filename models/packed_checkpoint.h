// The exported directory (format.md): writing it, and reading every layer back before it counts.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "data/tokenizer.h"
#include "models/checkpoint.h"
#include "models/layer_result.h"

namespace bbb::models {

enum class ExportFormat { Packed, HuggingFace };

constexpr int64_t kMaxShardBytes = 5'000'000'000;

// Writes `directory` from the source's embedding, final norm, head and tokenizer and from the
// quantized layers that `layer(i)` gives; formats(i): those of its linears. `layer` is called twice
// for each layer: every linear is read back and compared with a second answer, byte by byte, before
// the directory is renamed into place. Any error, also one that `layer` throws, leaves nothing
// behind. bbb_json: the content of bbb.json. progress: layers written, then read back, twice as
// many in all. Returns the bits per weight, from the file.
double export_model(const std::string& directory, const Checkpoint& source,
                    const data::Tokenizer& tokenizer,
                    const std::function<std::vector<quant::LinearFormat>(int64_t)>& formats,
                    ExportFormat format, const std::function<LayerResult(int64_t)>& layer,
                    const std::string& bbb_json, const std::function<void(int64_t done)>& progress,
                    int64_t max_shard_bytes = kMaxShardBytes);

}  // namespace bbb::models
