// A conversation with a model: what `bbb chat` does after loading.
#pragma once

#include <cstdio>
#include <istream>
#include <string>
#include <vector>

#include "models/generator.h"
#include "tools/generation.h"

namespace bbb::tools {

// Reads a user's message from each line of `in` and writes the answers to `out` as they are made.
// Empty lines are skipped. Each turn is the whole chat in the model's format, of which the cache
// keeps the part that it holds (Generator::prefill). An answer has up to `max_tokens` tokens.
// `messages`: the chat so far; it is continued. Ends at the end of `in`, at the line /exit, or when
// the cache is full, which a line on stderr says.
void chat(models::Generator& generator, const ModelFiles& files, int64_t max_tokens, uint64_t seed,
          std::vector<data::ChatMessage>& messages, std::istream& in, std::FILE* out);

}  // namespace bbb::tools
