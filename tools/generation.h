// Shared by `bbb decode` and `bbb chat`: sampling options, loading, prompts as ids, answers as they
// come.
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
// Throws UsageError if an option of the draws is given, but nothing is drawn.
engine::SampleSpec sample_spec(const CommandLine& line);
uint64_t sample_seed(const CommandLine& line);

// The least bytes that a step reads: the blocks' weights, norms and biases, and the head. Where a
// step has more rows than packed products take, every weight is unpacked, and a step moves more.
int64_t weight_bytes(models::Llama& model, engine::Backend& backend);

// A checkpoint and its tokenizer, before any weight is read.
struct ModelFiles {
  std::string path;
  std::unique_ptr<models::Checkpoint> source;
  std::unique_ptr<data::Tokenizer> tokenizer;
  std::vector<int32_t> stops;  // tokens that end a turn, and those that the model's config names

  // Of --model and --bits; checks that `backend` supports the head size.
  ModelFiles(const CommandLine& line, const engine::Backend& backend);
  // Checks every weight, then loads them.
  std::unique_ptr<models::Llama> load(engine::Backend& backend) const;

  // With BOS in front where the model expects it. Throws if there is no token, or one without a row
  // in the embedding.
  std::vector<int32_t> text_ids(const std::string& text, data::SpecialText special) const;
  std::vector<int32_t> chat_ids(const std::vector<data::ChatMessage>& messages) const;

 private:
  std::vector<int32_t> checked(std::vector<int32_t> ids) const;
};

// What follows a prompt: it grows until a stop token comes or it has `limit` tokens.
struct Answer {
  int64_t limit = 0;                    // tokens
  const char* at_limit = "max-tokens";  // why it stops there
  int64_t generated = 0;
  std::string text = {};
  std::string stopped = {};  // why; empty while it runs

  bool running() const { return stopped.empty(); }
  // Returns the text of the token. Of a stopped answer it is dropped: a step may have started.
  std::string append(int32_t token, const ModelFiles& files);
};

// An unfinished UTF-8 character at the end of a text becomes U+FFFD.
std::string whole_characters(const std::string& text);

// Writes pieces to a file, whole UTF-8 characters at a time.
class TextStream {
 public:
  explicit TextStream(std::FILE* out) : out_(out) {}
  void put(const std::string& piece);
  void finish();  // U+FFFD if a character is unfinished, and a new line

 private:
  std::FILE* out_;
  std::string pending_;
};

}  // namespace bbb::tools
