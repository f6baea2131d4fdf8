// Tokenizers: text to ids and back, equal to the reference implementations on every input.
//
//   sentencepiece   tokenizer.model, or a GGUF's "llama" vocabulary
//   byte-level BPE  tokenizer.json, or a GGUF's "gpt2" vocabulary; pre-tokenizers of GPT-2, SmolLM
//                   (each digit alone, then GPT-2's) and Llama-3
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
  // The bytes of one token; a special token gives its text if `show_special`, else nothing.
  virtual std::string piece(int32_t id, bool show_special) const = 0;
  // Whole sequence, as the reference decodes it (sentencepiece drops the first space).
  virtual std::string decode(const std::vector<int32_t>& ids) const = 0;
  virtual std::optional<int32_t> find(std::string_view token) const = 0;  // exact vocabulary text
  virtual int64_t vocab_size() const = 0;

  std::optional<int32_t> bos() const { return bos_; }
  std::optional<int32_t> eos() const { return eos_; }
  bool add_bos() const { return add_bos_; }  // the model wants BOS at the start of a text
  const std::string& chat_template() const { return chat_template_; }  // Jinja; empty if none
  // Ids that end a turn: EOS and, where the vocabulary has them, <|im_end|>, <|eot_id|>,
  // <|end_of_text|>, ...
  std::vector<int32_t> end_of_turn() const;
  // <|endoftext|>, <|end_of_text|> or </s>, whichever the vocabulary has, else EOS; throws if none.
  int32_t document_end() const;
  // The Hugging Face files that hold this tokenizer (name, content): tokenizer.model, or
  // tokenizer.json and tokenizer_config.json, copied or, from a GGUF, made.
  virtual std::vector<std::pair<std::string, std::string>> export_files() const = 0;

 protected:
  std::optional<int32_t> bos_;
  std::optional<int32_t> eos_;
  bool add_bos_ = false;
  std::string chat_template_;
};

// Model paths "synthetic:NAME": random weights, whose tokenizer's ids are the text's bytes.
constexpr std::string_view kSyntheticPrefix = "synthetic:";

// A model directory (tokenizer.json or tokenizer.model with tokenizer_config.json), a .gguf file or
// "synthetic:NAME".
std::unique_ptr<Tokenizer> load_tokenizer(const std::string& model_path);
std::unique_ptr<Tokenizer> make_tokenizer(const Gguf& gguf);


}  // namespace bbb::data
