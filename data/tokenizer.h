// Tokenizers: text to ids and back, equal to the reference implementations on every input.
//
//   BPE            a tokenizer.json, byte-level or with Metaspace and byte fallback;
//                  a GGUF's "gpt2" vocabulary
//   sentencepiece  a tokenizer.model where no tokenizer.json holds BPE;
//                  a GGUF's "llama" vocabulary
//
// A vocabulary may be smaller than the model's embedding: an id behind its last token has no text.
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
  AsText,  // special tokens' text in the input is ordinary text
  Parse,   // it becomes the special token: chat templates
};

class Tokenizer {
 public:
  virtual ~Tokenizer() = default;
  // No BOS or EOS is added; see bos() and add_bos(). Invalid UTF-8 never throws.
  virtual std::vector<int32_t> encode(std::string_view text, SpecialText special) const = 0;
  // The bytes of one token; a special token gives its text if `show_special`, else nothing. An id
  // without a token, such as that of a padding row of the embedding, gives nothing; a negative one
  // throws.
  virtual std::string piece(int32_t id, bool show_special) const = 0;
  // The text of a whole sequence: its pieces, less the space that encode() puts before a text.
  virtual std::string decode(const std::vector<int32_t>& ids) const;
  virtual std::optional<int32_t> find(std::string_view token) const = 0;  // exact vocabulary text
  virtual int64_t vocab_size() const = 0;  // the largest id of a token, plus 1

  std::optional<int32_t> bos() const { return bos_; }
  std::optional<int32_t> eos() const { return eos_; }
  bool add_bos() const { return add_bos_; }  // the model wants BOS at the start of a text
  const std::string& chat_template() const { return chat_template_; }  // Jinja; empty if none
  // Ids that end a turn: EOS and, where the vocabulary has them, <|im_end|>, <|eot_id|>,
  // <|end_of_text|>, ...
  std::vector<int32_t> end_of_turn() const;
  // <|endoftext|>, <|end_of_text|> or </s>, whichever the vocabulary has, else the first of
  // `stop_ids`, else EOS; throws if none.
  int32_t document_end(const std::vector<int32_t>& stop_ids = {}) const;
  // The Hugging Face files that hold this tokenizer (name, content), copied or, from a GGUF, made:
  // tokenizer.json or tokenizer.model, with tokenizer_config.json.
  virtual std::vector<std::pair<std::string, std::string>> export_files() const = 0;

 protected:
  std::optional<int32_t> bos_;
  std::optional<int32_t> eos_;
  bool add_bos_ = false;
  int64_t leading_spaces_ = 0;  // at most so many spaces at a text's start are not decoded
  std::string chat_template_;
};

// Model paths "synthetic:NAME": random weights, whose tokenizer's ids are the text's bytes.
constexpr std::string_view kSyntheticPrefix = "synthetic:";

// A model directory, a GGUF file or "synthetic:NAME". Of a directory tokenizer.json is read where
// it holds BPE, whatever tokenizer.model stands beside it; else tokenizer.model. Throws Error,
// naming the file and what is not supported.
std::unique_ptr<Tokenizer> load_tokenizer(const std::string& model_path);
// Of a GGUF without a pre-tokenizer's name, or with the name "default", a line on stderr says that
// its text may be cut otherwise than its model expects.
std::unique_ptr<Tokenizer> make_tokenizer(const Gguf& gguf);

}  // namespace bbb::data
