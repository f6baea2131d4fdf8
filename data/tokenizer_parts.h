// What the two kinds of tokenizer share: a model directory's tokenizer files, the settings in them,
// the cutting of text at added tokens, and a GGUF's vocabulary.
#pragma once

#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "data/tokenizer.h"

namespace bbb::data {

// Files of one tokenizer, read from a directory or made from a GGUF.
struct TokenizerFiles {
  std::string source;                                      // the path that errors name
  std::vector<std::pair<std::string, std::string>> files;  // (name, content)
  const std::string* find(std::string_view name) const;    // null where absent
};

struct AddedToken {
  int32_t id = -1;
  std::string content;
  bool special = true;
  bool lstrip = false;      // takes the white space before it along
  bool rstrip = false;      // ... and after it
  bool normalized = false;  // found in the normalized text, not in the text itself
};

using Lookup = std::function<std::optional<int32_t>(std::string_view)>;

// From tokenizer_config.json, special_tokens_map.json, added_tokens.json, chat_template.jinja and,
// for the added tokens, tokenizer.json.
struct TokenizerSettings {
  std::optional<std::string> bos;
  std::optional<std::string> eos;
  std::optional<bool> add_bos;
  // A text between special tokens gets the prefix space too. Files that do not say were written
  // when there was no other way.
  bool legacy = true;
  bool add_prefix_space = true;
  std::string chat_template;
  std::vector<AddedToken> added;
  std::vector<std::string> special_names;  // BOS, EOS and others; special, added or not

  // `added`, and the vocabulary's tokens that only special_names lists.
  std::vector<AddedToken> added_tokens(const Lookup& vocabulary) const;
};
// `root` is tokenizer.json's object, empty where there is none.
TokenizerSettings read_settings(const TokenizerFiles& files, const nlohmann::json& root);

// Finds added tokens in text: leftmost, then longest.
class AddedTokens {
 public:
  AddedTokens() = default;
  explicit AddedTokens(std::vector<AddedToken> tokens);
  struct Span {
    std::string_view text;
    int32_t id = -1;  // -1: ordinary text
  };
  // With SpecialText::AsText the tokens that are special stay text.
  std::vector<Span> split(std::string_view text, SpecialText special) const;
  const AddedToken* find(int32_t id) const;
  const AddedToken* find(std::string_view content) const;

 private:
  std::vector<AddedToken> tokens_;                    // longest first
  std::vector<std::vector<uint32_t>> by_first_byte_;  // 256 lists into tokens_, longest first
};

std::unique_ptr<Tokenizer> make_bpe_tokenizer(TokenizerFiles files, const nlohmann::json& root);
std::unique_ptr<Tokenizer> make_sentencepiece_tokenizer(TokenizerFiles files,
                                                        const nlohmann::json& root);
// The files that a GGUF's "gpt2" or "llama" vocabulary amounts to.
TokenizerFiles bpe_files(const Gguf& gguf);
TokenizerFiles sentencepiece_files(const Gguf& gguf);
// A vocabulary of the 256 bytes, each its own id, without merges, and <|endoftext|>, id 256.
TokenizerFiles byte_files(const std::string& source);

// tokenizer.ggml.token_type; the numbers are sentencepiece's own.
enum class PieceType { Normal = 1, Unknown, Control, UserDefined, Unused, Byte };

// A GGUF's tokens. Converters pad vocabularies with empty pieces and with one text over and over:
// such a piece is unused here and has no text, and every other text occurs once. Throws, naming the
// text, where two pieces that mean something share it.
struct GgufVocabulary {
  std::vector<std::string> tokens;
  std::vector<PieceType> types;
};
GgufVocabulary read_vocabulary(const Gguf& gguf);
// tokenizer_config.json made from a GGUF's metadata.
nlohmann::json config_from_gguf(const Gguf& gguf, const GgufVocabulary& vocabulary, bool add_bos);

}  // namespace bbb::data
