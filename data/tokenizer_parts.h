// Shared by the two kinds of tokenizer: a model directory's tokenizer files, the settings in them,
// splitting text at added tokens, and a GGUF's vocabulary.
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
  bool lstrip = false;      // includes the white space before it
  bool rstrip = false;      // includes the white space after it
  bool normalized = false;  // matched in the normalized text, not in the original
};

using Lookup = std::function<std::optional<int32_t>(std::string_view)>;

// From tokenizer_config.json, special_tokens_map.json, added_tokens.json, chat_template.jinja and,
// for the added tokens, tokenizer.json.
struct TokenizerSettings {
  std::optional<std::string> bos;
  std::optional<std::string> eos;
  std::optional<bool> add_bos;
  // Text between special tokens gets the prefix space too. True by default: files without this
  // setting were written when there was no other way.
  bool legacy = true;
  bool add_prefix_space = true;
  std::string chat_template;
  std::vector<AddedToken> added;
  std::vector<std::string> special_names;  // BOS, EOS and others: special even if not in `added`

  // `added`, plus the vocabulary's tokens that only special_names lists.
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
  // With SpecialText::AsText, special tokens stay text.
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
// Tokenizer files made from a GGUF's "gpt2" or "llama" vocabulary.
TokenizerFiles bpe_files(const Gguf& gguf);
TokenizerFiles sentencepiece_files(const Gguf& gguf);
// llama.cpp's name (tokenizer.ggml.pre) for how a byte-level tokenizer.json splits text into words.
// Throws if it has none.
std::string gguf_pre_tokenizer(const nlohmann::json& root, const std::string& source);
// A vocabulary without merges: the 256 bytes, each with its value as id, and <|endoftext|>, id 256.
TokenizerFiles byte_files(const std::string& source);

// tokenizer.ggml.token_type; the numbers are sentencepiece's own.
enum class PieceType { Normal = 1, Unknown, Control, UserDefined, Unused, Byte };

// A GGUF's tokens. Converters pad vocabularies with empty pieces and with repeats of one text. Here
// such a piece has type Unused and no text, so that every other text occurs once. read_vocabulary()
// throws, naming the text, if a repeated piece is not Unknown, Control or Unused.
struct GgufVocabulary {
  std::vector<std::string> tokens;
  std::vector<PieceType> types;
};
GgufVocabulary read_vocabulary(const Gguf& gguf);
// tokenizer_config.json made from a GGUF's metadata.
nlohmann::json config_from_gguf(const Gguf& gguf, const GgufVocabulary& vocabulary, bool add_bos);

}  // namespace bbb::data
