// The tokenizer of a model as metadata of a GGUF: tokenizer.ggml.* and tokenizer.chat_template.
//
//   from a GGUF            its own entries, copied
//   byte-level BPE         model "gpt2": texts, types and merges of tokenizer.json
//   sentencepiece's BPE    model "llama": texts, scores and types of tokenizer.model
#pragma once

#include <string>
#include <vector>

#include "data/gguf.h"
#include "data/gguf_writer.h"
#include "data/tokenizer.h"

namespace bbb::data {

GgufMetadata gguf_tokenizer(const Gguf& gguf);
// `source`: the path that errors name. `rows`: of the embedding; llama.cpp wants a text for each,
// so rows without a token get one of type Unused. `stop_ids`: the tokens that end a text. Throws,
// saying what, if llama.cpp would read the tokenizer in another way.
GgufMetadata gguf_tokenizer(const Tokenizer& tokenizer, const std::string& source, int64_t rows,
                            const std::vector<int32_t>& stop_ids);

}  // namespace bbb::data
