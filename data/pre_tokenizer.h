// The `pre_tokenizer` of a tokenizer.json: splits text into words, inside which byte-pair merges
// happen. It is a list of steps. A step splits by a regular expression (PCRE2, UTF mode), or writes
// the space that some tokenizers put before a text.
#pragma once

#include <deque>
#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace bbb::data {

// GPT-2's and Llama-3's word patterns.
extern const char* const kGpt2Pattern;
extern const char* const kLlama3Pattern;

// The characters of Unicode's White_Space.
inline constexpr std::string_view kWhiteSpace =
    "\t\n\v\f\r "
    "\u0085\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000";

// The length of the valid UTF-8 character at the start of `text`; 0 if there is none.
int64_t utf8_length(std::string_view text);
// Splits `text` into runs of valid (true) and of invalid bytes.
std::vector<std::pair<std::string_view, bool>> utf8_runs(std::string_view text);

class PreTokenizer {
 public:
  // The `pre_tokenizer` object: ByteLevel, Digits, Split by a Regex, Metaspace, a Sequence of
  // these, or null, which leaves a text whole. Throws, naming it, for anything else. `source` names
  // the file in errors.
  PreTokenizer(const nlohmann::json& spec, const std::string& source);

  // The words of `text` in order. A pattern puts bytes that are not UTF-8 into words of their own.
  // `is_start`: `text` begins the whole input, where Metaspace's scheme `first` writes its space.
  // `made` stores the words that a step had to write anew; the result points into it.
  std::vector<std::string_view> split(std::string_view text, bool is_start,
                                      std::deque<std::string>* made) const;
  bool byte_level() const { return byte_level_; }

 private:
  struct Words {
    std::vector<std::string_view> list;
    std::deque<std::string>* made;
  };
  // Takes one word and appends its parts to `out`. `is_first`: it begins the whole input.
  using Step = std::function<void(std::string_view word, bool is_first, Words* out)>;
  void add(const nlohmann::json& spec, const std::string& source);
  void add_pattern(const std::string& pattern, const std::string& source);
  void add_metaspace(const nlohmann::json& spec, const std::string& source);

  std::vector<Step> steps_;
  bool byte_level_ = false;
};

// `text` with every `from` (not empty) replaced by `to`.
std::string replaced(std::string_view text, std::string_view from, std::string_view to);

}  // namespace bbb::data
