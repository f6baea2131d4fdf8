// Shared by `bbb decode` and `bbb chat`: sampling options, loading, prompts as ids, text as it
// comes.
#pragma once

#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "data/chat_format.h"
#include "models/llama.h"
#include "tools/cli.h"

namespace bbb::tools {

void add_sampling_options(CommandLine& line);
engine::SampleSpec sample_spec(const CommandLine& line);
uint64_t sample_seed(const CommandLine& line);

// A checkpoint and its tokenizer, before any weight is read.
struct ModelFiles {
  std::string path;
  std::unique_ptr<models::Checkpoint> source;
  std::unique_ptr<data::Tokenizer> tokenizer;

  // Of --model and --bits; checks that `backend` supports the head size.
  ModelFiles(const CommandLine& line, const engine::Backend& backend);
  // Checks every weight, then loads them.
  std::unique_ptr<models::Llama> load(engine::Backend& backend) const;

  // With BOS in front where the model expects it. Throws if there is no token, or one without a row
  // in the embedding.
  std::vector<int32_t> text_ids(const std::string& text, data::SpecialText special) const;
  std::vector<int32_t> chat_ids(const std::vector<data::ChatMessage>& messages) const;
  std::vector<int32_t> stop_ids() const;  // end of a turn, and what the model's config names

 private:
  std::vector<int32_t> checked(std::vector<int32_t> ids) const;
};

// Writes pieces to a file, whole UTF-8 characters at a time.
class TextStream {
 public:
  explicit TextStream(std::FILE* out) : out_(out) {}
  void put(const std::string& piece);
  void finish();                                     // writes what is left, and a new line
  const std::string& text() const { return text_; }  // all pieces

 private:
  std::FILE* out_;
  std::string text_, pending_;
};

}  // namespace bbb::tools
