// What the two kinds of tokenizer share: a model directory's tokenizer files, the settings in them,
// and the cutting of text at added tokens.
#pragma once

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
  bool lstrip = false;  // takes the white space before it along
  bool rstrip = false;  // ... and after it
};

// From tokenizer_config.json, special_tokens_map.json, added_tokens.json and chat_template.jinja.
struct TokenizerSettings {
  std::optional<std::string> bos;
  std::optional<std::string> eos;
  std::optional<bool> add_bos;
  std::string chat_template;
  std::vector<AddedToken> added;
};
TokenizerSettings read_settings(const TokenizerFiles& files);
// The named file's object; an empty one where the file is absent.
nlohmann::json json_of(const TokenizerFiles& files, std::string_view name);
// `object` as tokenizer.json and tokenizer_config.json write an added token.
AddedToken read_added_token(const nlohmann::json& object, int32_t id, const std::string& source);

// Finds added tokens in text: leftmost, then longest.
class AddedTokens {
 public:
  AddedTokens() = default;
  explicit AddedTokens(std::vector<AddedToken> tokens);
  struct Span {
    std::string_view text;
    int32_t id = -1;  // -1: ordinary text
  };
  // With SpecialText::AsText only the tokens that are not special are found.
  std::vector<Span> split(std::string_view text, SpecialText special) const;
  const AddedToken* find(int32_t id) const;
  const AddedToken* find(std::string_view content) const;

 private:
  std::vector<AddedToken> tokens_;                    // longest first
  std::vector<std::vector<uint32_t>> by_first_byte_;  // 256 lists into tokens_, longest first
};

std::unique_ptr<Tokenizer> make_bpe_tokenizer(TokenizerFiles files);
std::unique_ptr<Tokenizer> make_sentencepiece_tokenizer(TokenizerFiles files);
// The files that a GGUF's "gpt2" or "llama" vocabulary amounts to.
TokenizerFiles bpe_files(const Gguf& gguf);
TokenizerFiles sentencepiece_files(const Gguf& gguf);
// A vocabulary of the 256 bytes, each its own id, without merges, and <|endoftext|>, id 256.
TokenizerFiles byte_files(const std::string& source);
// tokenizer_config.json made from a GGUF's metadata.
nlohmann::json config_from_gguf(const Gguf& gguf, const std::vector<std::string>& tokens,
                                const std::vector<int64_t>& types, bool add_bos);

}  // namespace bbb::data
