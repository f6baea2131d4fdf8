// Cuts text into the words inside which byte-pair merges happen: the `pre_tokenizer` of a
// tokenizer.json, as a list of regular expressions applied one after the other (PCRE2, UTF mode).
#pragma once

#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace bbb::data {

// GPT-2's and Llama-3's word patterns.
extern const char* const kGpt2Pattern;
extern const char* const kLlama3Pattern;

// The length of the valid UTF-8 character at the start of `text`, 0 where there is none.
int64_t utf8_length(std::string_view text);

class PreTokenizer {
 public:
  // The `pre_tokenizer` object: ByteLevel, Digits, Split by a Regex, or a Sequence of these.
  // Throws, naming it, for anything else. `source` names the file in errors.
  PreTokenizer(const nlohmann::json& spec, const std::string& source);
  ~PreTokenizer();
  PreTokenizer(PreTokenizer&&) noexcept;

  // The words of `text` in order; together they are all of it. Bytes that are not UTF-8 stand in
  // words of their own.
  std::vector<std::string_view> split(std::string_view text) const;

 private:
  struct Pattern;
  void add(const nlohmann::json& spec, const std::string& source);
  std::vector<Pattern> patterns_;
  bool byte_level_ = false;
};

}  // namespace bbb::data
