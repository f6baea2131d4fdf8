// Pre-tokenizers: each step splits every word so far. A pattern splits a word into its matches and
// the text between them.
//
// PCRE2's \s under UCP differs from Unicode's White_Space (it has U+180E), so \s and \S are written
// out as classes. ^ and $ match at every line, as in Oniguruma, which the reference uses. Invalid
// bytes are split off first, so that PCRE2 only sees valid UTF-8.
#include "data/pre_tokenizer.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <memory>
#include <nlohmann/json.hpp>

#include "data/files.h"
#include "quant/check.h"

namespace bbb::data {

using nlohmann::json;

const char* const kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
const char* const kLlama3Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|)"
    R"(\s*[\r\n]+|\s+(?!\S)|\s+)";

int64_t utf8_length(std::string_view text) {
  if (text.empty()) return 0;
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t lead = byte(0);
  if (lead < 0x80) return 1;
  const size_t length = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : 2;
  if (lead < 0xc2 || lead > 0xf4 || text.size() < length) return 0;
  for (size_t i = 1; i < length; ++i) {
    if ((byte(i) & 0xc0) != 0x80) return 0;
  }
  // Overlong forms, surrogates, and code points above U+10FFFF.
  if (lead == 0xe0 && byte(1) < 0xa0) return 0;
  if (lead == 0xed && byte(1) > 0x9f) return 0;
  if (lead == 0xf0 && byte(1) < 0x90) return 0;
  if (lead == 0xf4 && byte(1) > 0x8f) return 0;
  return static_cast<int64_t>(length);
}

std::vector<std::pair<std::string_view, bool>> utf8_runs(std::string_view text) {
  std::vector<std::pair<std::string_view, bool>> runs;
  size_t begin = 0;
  bool valid = true;
  for (size_t i = 0; i < text.size();) {
    const int64_t length = utf8_length(text.substr(i));
    if ((length > 0) != valid) {
      if (i > begin) runs.emplace_back(text.substr(begin, i - begin), valid);
      begin = i;
      valid = length > 0;
    }
    i += static_cast<size_t>(std::max<int64_t>(1, length));
  }
  if (begin < text.size()) runs.emplace_back(text.substr(begin), valid);
  return runs;
}

std::string replaced(std::string_view text, std::string_view from, std::string_view to) {
  std::string out;
  for (size_t done = 0;;) {
    const size_t found = text.find(from, done);
    out += text.substr(done, found - done);
    if (found == std::string_view::npos) return out;
    out += to;
    done = found + from.size();
  }
}

namespace {

// The pattern with \s and \S written out as Unicode's White_Space.
std::string expand_white_space(const std::string& pattern, const std::string& source) {
  std::string out;
  bool in_class = false;
  for (size_t i = 0; i < pattern.size(); ++i) {
    const char c = pattern[i];
    if (c == '\\' && i + 1 < pattern.size()) {
      const char escaped = pattern[++i];
      if (escaped == 's' || escaped == 'S') {
        BBB_CHECK(escaped == 's' || !in_class, source, ": \\S inside a class of the pattern ",
                  printable(pattern), " is not supported");
        if (in_class) {
          out += kWhiteSpace;
        } else {
          out += cat(escaped == 's' ? "[" : "[^", kWhiteSpace, "]");
        }
      } else {
        out += c;
        out += escaped;
      }
      continue;
    }
    if (c == '[') in_class = true;
    if (c == ']') in_class = false;
    out += c;
  }
  return out;
}

struct CodeDeleter {
  void operator()(pcre2_code* code) const { pcre2_code_free(code); }
};
struct MatchDataDeleter {
  void operator()(pcre2_match_data* data) const { pcre2_match_data_free(data); }
};

std::string pcre2_message(int code) {
  PCRE2_UCHAR buffer[256];
  pcre2_get_error_message(code, buffer, sizeof(buffer));
  return reinterpret_cast<const char*>(buffer);
}

class Pattern {
 public:
  Pattern(const std::string& text, const std::string& source) {
    const std::string pattern = expand_white_space(text, source);
    int error = 0;
    PCRE2_SIZE offset = 0;
    code_.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                              PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE, &error, &offset, nullptr));
    BBB_CHECK(code_ != nullptr, source, ": the pre-tokenizer's pattern ", printable(text),
              " does not compile: ", pcre2_message(error));
    pcre2_jit_compile(code_.get(), PCRE2_JIT_COMPLETE);  // without a JIT the interpreter matches
  }

  // Appends the matches in `word`, which is valid UTF-8, and the gaps between them.
  void cut(std::string_view word, std::vector<std::string_view>* out) const {
    const std::unique_ptr<pcre2_match_data, MatchDataDeleter> match(
        pcre2_match_data_create_from_pattern(code_.get(), nullptr));
    const PCRE2_SIZE* bounds = pcre2_get_ovector_pointer(match.get());
    size_t done = 0;
    size_t from = 0;
    while (from < word.size()) {
      const int found = pcre2_match(code_.get(), reinterpret_cast<PCRE2_SPTR>(word.data()),
                                    word.size(), from, PCRE2_NO_UTF_CHECK, match.get(), nullptr);
      if (found == PCRE2_ERROR_NOMATCH) break;
      BBB_CHECK(found >= 0, "the pre-tokenizer's pattern fails on a text of ", word.size(),
                " bytes: ", pcre2_message(found));
      const size_t begin = bounds[0];
      const size_t end = bounds[1];
      if (end == begin) {  // an empty match splits nothing
        from = begin + static_cast<size_t>(std::max<int64_t>(1, utf8_length(word.substr(begin))));
        continue;
      }
      if (begin > done) out->push_back(word.substr(done, begin - done));
      out->push_back(word.substr(begin, end - begin));
      done = from = end;
    }
    if (done < word.size()) out->push_back(word.substr(done));
  }

 private:
  std::unique_ptr<pcre2_code, CodeDeleter> code_;
};

}  // namespace

PreTokenizer::PreTokenizer(const json& spec, const std::string& source) {
  if (!spec.is_null()) add(spec, source);
}

void PreTokenizer::add(const json& spec, const std::string& source) {
  const std::string type = spec.is_object() ? spec.value("type", "") : spec.dump();
  BBB_CHECK(!byte_level_, source, ": the pre_tokenizer ", printable(type),
            " after ByteLevel is not supported");
  if (type == "Sequence") {
    for (const json& step : spec.at("pretokenizers")) add(step, source);
  } else if (type == "Digits") {
    add_pattern(spec.value("individual_digits", false) ? R"(\p{N})" : R"(\p{N}+)", source);
  } else if (type == "ByteLevel") {
    if (spec.value("add_prefix_space", true)) {
      steps_.push_back([](std::string_view word, bool, Words* out) {
        if (!word.starts_with(' ')) word = out->made->emplace_back(" " + std::string(word));
        out->list.push_back(word);
      });
    }
    if (spec.value("use_regex", true)) add_pattern(kGpt2Pattern, source);
    byte_level_ = true;
  } else if (type == "Split") {
    const json& pattern = spec.at("pattern");
    BBB_CHECK(pattern.contains("Regex") && spec.value("behavior", "") == "Isolated" &&
                  !spec.value("invert", false),
              source, ": a Split pre_tokenizer other than by an Isolated Regex is not supported");
    add_pattern(pattern.at("Regex").get<std::string>(), source);
  } else if (type == "Metaspace") {
    add_metaspace(spec, source);
  } else {
    throw Error(cat(source, ": the pre_tokenizer ", printable(type), " is not supported"));
  }
}

void PreTokenizer::add_pattern(const std::string& pattern, const std::string& source) {
  const auto compiled = std::make_shared<const Pattern>(pattern, source);
  steps_.push_back([compiled](std::string_view word, bool, Words* out) {
    for (const auto& [run, is_valid] : utf8_runs(word)) {
      if (is_valid) {
        compiled->cut(run, &out->list);
      } else {
        out->list.push_back(run);
      }
    }
  });
}

// Replaces spaces with `replacement`, puts one before the word if the scheme says so, and splits
// before each one if `split` is set.
void PreTokenizer::add_metaspace(const json& spec, const std::string& source) {
  const std::string replacement = spec.value("replacement", "\u2581");
  const std::string scheme =
      spec.value("prepend_scheme", spec.value("add_prefix_space", true) ? "always" : "never");
  BBB_CHECK(scheme == "always" || scheme == "first" || scheme == "never", source,
            ": Metaspace's prepend_scheme ", printable(scheme), " is not supported");
  BBB_CHECK(!replacement.empty(), source, ": Metaspace's replacement is empty");
  const bool is_split = spec.value("split", true);
  steps_.push_back([=](std::string_view word, bool is_first, Words* out) {
    std::string& text = out->made->emplace_back(replaced(word, " ", replacement));
    if (!text.starts_with(replacement) && (scheme == "always" || (scheme == "first" && is_first))) {
      text.insert(0, replacement);
    }
    size_t begin = 0;
    while (is_split && begin < text.size()) {
      const size_t end = std::min(text.find(replacement, begin + 1), text.size());
      out->list.push_back(std::string_view(text).substr(begin, end - begin));
      begin = end;
    }
    if (!is_split) out->list.push_back(text);
  });
}

std::vector<std::string_view> PreTokenizer::split(std::string_view text, bool is_start,
                                                  std::deque<std::string>* made) const {
  std::vector<std::string_view> words = {text};
  for (const Step& step : steps_) {
    Words next{{}, made};
    for (const std::string_view word : words) {
      step(word, is_start && word.data() == words[0].data(), &next);
    }
    words = std::move(next.list);
  }
  return words;
}

}  // namespace bbb::data
