// Tokenizers: text to ids and back, with the results of the reference implementations on every
// input.
//
//   BPE            a tokenizer.json, byte-level or with Metaspace and byte fallback;
//                  a GGUF's "gpt2" vocabulary
//   sentencepiece  a tokenizer.model where no tokenizer.json holds BPE;
//                  a GGUF's "llama" vocabulary
//
// A vocabulary may be smaller than the model's embedding: an id after its last token has no text.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "data/gguf.h"

namespace bbb::data {

enum class SpecialText {
  AsText,  // the text of a special token is ordinary text
  Parse,   // the text of a special token becomes that token: for chat templates
};

class Tokenizer {
 public:
  virtual ~Tokenizer() = default;
  // No BOS or EOS is added; see bos() and add_bos(). Invalid UTF-8 never throws.
  virtual std::vector<int32_t> encode(std::string_view text, SpecialText special) const = 0;
  // The bytes of one token. A special token gives its text if `show_special`, else nothing. An id
  // without a token, such as a padding row of the embedding, gives nothing. A negative id throws.
  virtual std::string piece(int32_t id, bool show_special) const = 0;
  // The text of a whole sequence: its pieces without the space that encode() puts before a text.
  virtual std::string decode(const std::vector<int32_t>& ids) const;
  virtual std::optional<int32_t> find(std::string_view token) const = 0;  // exact vocabulary text
  virtual int64_t vocab_size() const = 0;  // the largest id of a token, plus 1

  std::optional<int32_t> bos() const { return bos_; }
  std::optional<int32_t> eos() const { return eos_; }
  bool add_bos() const { return add_bos_; }  // the model expects BOS at the start of a text
  const std::string& chat_template() const { return chat_template_; }  // Jinja; empty if none
  // Ids that end a turn: EOS and, where the vocabulary has them, <|im_end|>, <|eot_id|>,
  // <|end_of_text|>, ...
  std::vector<int32_t> end_of_turn() const;
  // The first of <|endoftext|>, <|end_of_text|> and </s> that the vocabulary has, else the first of
  // `stop_ids`, else EOS. Throws if there is none.
  int32_t document_end(const std::vector<int32_t>& stop_ids = {}) const;
  // The Hugging Face files (name, content) that hold this tokenizer: tokenizer.json or
  // tokenizer.model, with tokenizer_config.json. They are copies, or made from a GGUF.
  virtual std::vector<std::pair<std::string, std::string>> export_files() const = 0;

 protected:
  std::optional<int32_t> bos_;
  std::optional<int32_t> eos_;
  bool add_bos_ = false;
  int64_t leading_spaces_ = 0;  // decode() removes at most this many spaces from the start
  std::string chat_template_;
};

// Model paths "synthetic:NAME": random weights, and a tokenizer whose ids are the text's bytes.
constexpr std::string_view kSyntheticPrefix = "synthetic:";

// `model_path`: a model directory, a GGUF file or "synthetic:NAME". In a directory, a
// tokenizer.json of BPE takes precedence over tokenizer.model. Throws Error, naming the file and
// what is not supported.
std::unique_ptr<Tokenizer> load_tokenizer(const std::string& model_path);
// If the GGUF names no pre-tokenizer, or "default", a line on stderr warns that text may be split
// differently than the model expects.
std::unique_ptr<Tokenizer> make_tokenizer(const Gguf& gguf);

}  // namespace bbb::data
