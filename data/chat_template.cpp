#include "data/chat_template.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <string_view>
#include <utility>
#include <vector>

#include "quant/check.h"

namespace bbb::data {

namespace {

constexpr std::string_view kSpaces = " \t\n\v\f\r";
constexpr std::string_view kMarks = "\1\2\3\4\5";
constexpr std::pair<const char*, const char*> kShown[] = {
    {"\1", "{%"}, {"\2", "%}"}, {"\3", "{{"}, {"\4", "}}"}};

bool is_word(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
}

void replace_all(std::string* text, std::string_view from, std::string_view to) {
  for (size_t at = 0; (at = text->find(from, at)) != std::string::npos; at += to.size())
    text->replace(at, from.size(), to);
}

// The tokens of a tag: words, signs, and strings enclosed in bytes 5.
using Tokens = std::vector<std::string>;

bool is_string(const std::string& token) { return token[0] == '\5'; }

std::string join(const Tokens& tokens) {
  std::string out;
  for (const std::string& token : tokens) {
    const bool words = !out.empty() && (is_word(out.back()) || out.back() == '\5') &&
                       (is_word(token[0]) || is_string(token));
    out += (words ? " " : "") + token;
  }
  return out;
}

// An output's terms, joined: a string constant becomes plain text, any other term its own {{ }}.
std::string joined_output(const Tokens& tokens) {
  std::string out;
  Tokens term;
  int depth = 0;
  for (size_t i = 0; i <= tokens.size(); ++i) {
    const std::string token = i < tokens.size() ? tokens[i] : "+";
    depth += (token == "(" || token == "[" || token == "{") -
             (token == ")" || token == "]" || token == "}");
    if (i < tokens.size() && (depth > 0 || (token != "+" && token != "~"))) {
      term.push_back(token);
      continue;
    }
    const bool constant = term.size() == 1 && is_string(term[0]);
    out += constant ? term[0].substr(1, term[0].size() - 2) : "\3" + join(term) + "\4";
    term.clear();
  }
  return out;
}

class Reader {
 public:
  explicit Reader(const std::string& source) : source_(source) {}

  std::string run() {
    bool line_start = true;
    while (at_ < source_.size()) {
      const size_t open = next_open();
      std::string text = source_.substr(at_, open - at_);
      if (open == source_.size()) {
        out_ += text;
        break;
      }
      const char kind = source_[open + 1];
      at_ = open + 2;
      const char sign = take_sign();
      if (sign == '-') text.resize(text.find_last_not_of(kSpaces) + 1);
      if (kind != '{' && sign == '\0') strip_indent(&text, line_start);
      out_ += text;
      const char end_sign = kind == '#' ? skip_comment() : read_tag(kind);
      line_start = skip_behind(end_sign, kind != '{');
    }
    BBB_CHECK(loop_variable_.empty() || !names_message_, "it uses the names ", loop_variable_,
              " and message");
    return out_;
  }

 private:
  size_t next_open() const {
    size_t at = at_;
    while (
        at + 1 < source_.size() &&
        !(source_[at] == '{' && std::string_view("{%#").find(source_[at + 1]) != std::string::npos))
      ++at;
    return at + 1 < source_.size() ? at : source_.size();
  }

  char take_sign() {
    const bool sign = at_ < source_.size() && (source_[at_] == '-' || source_[at_] == '+');
    return sign ? source_[at_++] : '\0';
  }

  // lstrip_blocks: removes the blanks between the start of a line and a block.
  static void strip_indent(std::string* text, bool line_start) {
    const size_t begin = text->rfind('\n') + 1;  // 0 where there is none
    if (begin == 0 && !line_start) return;
    if (text->find_first_not_of(" \t", begin) == std::string::npos) text->resize(begin);
  }

  // trim_blocks: skips the newline after a block. The sign "-" skips all white space. Returns
  // whether the next text begins a line.
  bool skip_behind(char sign, bool block) {
    const size_t begin = at_;
    if (sign == '-') at_ = std::min(source_.find_first_not_of(kSpaces, at_), source_.size());
    if (block && sign == '\0' && at_ < source_.size() && source_[at_] == '\n') ++at_;
    return at_ > begin && source_[at_ - 1] == '\n';
  }

  // skip_comment() and read_tag() return the sign before the closing bracket.
  char skip_comment() {
    const size_t close = source_.find("#}", at_);
    BBB_CHECK(close != std::string::npos, "a comment does not end");
    at_ = close - 1;
    const char sign = take_sign();
    at_ = close + 2;
    return sign;
  }

  char read_tag(char kind) {
    const std::string_view close = kind == '{' ? "}}" : "%}";
    Tokens tokens;
    for (int braces = 0; at_ < source_.size();) {
      const size_t begin = at_;
      const char c = source_[at_], sign = take_sign();
      if (braces == 0 && source_.compare(at_, 2, close) == 0) {
        at_ += 2;
        write(kind, tokens);
        return sign;
      }
      at_ = begin + 1;
      if (kSpaces.find(c) != std::string_view::npos) continue;
      if (c == '\'' || c == '"') {
        tokens.push_back("\5" + read_string(c) + "\5");
        continue;
      }
      while (is_word(c) && at_ < source_.size() && is_word(source_[at_])) ++at_;
      if (std::string_view("=!<>").find(c) != std::string_view::npos)
        at_ += source_.compare(at_, 1, "=") == 0;
      braces += (c == '{') - (c == '}');
      tokens.push_back(source_.substr(begin, at_ - begin));
      use_one_spelling(&tokens);
    }
    throw Error("a tag does not end");
  }

  std::string read_string(char quote) {
    std::string out;
    while (at_ < source_.size() && source_[at_] != quote) {
      const char c = source_[at_++];
      out += c == '\\' && at_ < source_.size() ? read_escape() : std::string(1, c);
    }
    BBB_CHECK(at_ < source_.size(), "a string does not end");
    ++at_;
    return out;
  }

  std::string read_escape() {
    static constexpr std::string_view kEscapes = "ntrabfv\\'\"", kEscaped = "\n\t\r\a\b\f\v\\'\"";
    const char name = source_[at_++];
    if (name == '\n') return "";  // the string continues on the next line
    const size_t escape = kEscapes.find(name);
    if (escape < kEscapes.size()) return {kEscaped[escape]};
    const std::string digits = source_.substr(at_, name == 'x' ? 2 : name == 'u' ? 4 : 0);
    const auto json =
        nlohmann::json::parse(cat("\"\\u", name == 'x' ? "00" : "", digits, "\""), nullptr, false);
    const std::string out = json.is_string() ? json.get<std::string>() : "";
    BBB_CHECK(!out.empty() && kMarks.find(out[0]) == std::string::npos, "the escape \\", name,
              digits, " in a string is not supported");
    at_ += digits.size();
    return out;
  }

  // Rewrites x['y'] as x.y, x.strip() as x|trim, index0==0 as first.
  static void use_one_spelling(Tokens* tokens) {
    const auto ends = [&](size_t back, const char* token) {
      return tokens->size() >= back && (*tokens)[tokens->size() - back] == token;
    };
    const auto replace = [&](size_t count, const Tokens& with) {
      tokens->resize(tokens->size() - count);
      tokens->insert(tokens->end(), with.begin(), with.end());
    };
    const size_t size = tokens->size();
    if (ends(4, ".") && ends(3, "strip") && ends(2, "(") && ends(1, ")")) {
      replace(4, {"|", "trim"});
    } else if (ends(3, "index0") && ends(2, "==") && ends(1, "0")) {
      replace(3, {"first"});
    } else if (size > 3 && ends(3, "[") && ends(1, "]")) {
      const std::string object = (*tokens)[size - 4], key = (*tokens)[size - 2];
      const bool indexes = (is_word(object[0]) && object != "in") || object == "]";
      if (indexes && is_string(key) && key.size() > 2 &&
          std::all_of(key.begin() + 1, key.end() - 1, is_word))
        replace(3, {".", key.substr(1, key.size() - 2)});
    }
  }

  void write(char kind, Tokens tokens) {
    if (loop_variable_.empty() && tokens.size() == 4 && tokens[0] == "for" &&
        tokens[3] == "messages" && tokens[1] != "message")
      loop_variable_ = tokens[1];
    for (size_t i = 0; i < tokens.size(); ++i) {
      if (i > 0 && tokens[i - 1] == ".") continue;
      names_message_ = names_message_ || tokens[i] == "message";
      if (tokens[i] == loop_variable_) tokens[i] = "message";
    }
    const std::string word = tokens.empty() ? "" : tokens[0];
    BBB_CHECK(kind == '{' || word != "raw", "the statement raw is not supported");
    if (kind == '{') out_ += joined_output(tokens);
    // A generation block writes nothing: it only marks the assistant's text.
    if (kind == '%' && word != "generation" && word != "endgeneration")
      out_ += "\1" + join(tokens) + "\2";
  }

  const std::string& source_;
  size_t at_ = 0;
  std::string out_;
  std::string loop_variable_;   // of the first loop over messages, unless it is "message"
  bool names_message_ = false;  // the template itself uses the name "message"
};

// Replaces {% %} {{ }}, and ' inside them, with the bytes of canonical templates.
std::string marked(std::string text) {
  for (const auto& [mark, shown] : kShown) replace_all(&text, shown, mark);
  bool tag = false;
  for (char& c : text) {
    tag = c == '\1' || c == '\3' || (tag && c != '\2' && c != '\4');
    if (tag && c == '\'') c = '\5';
  }
  return text;
}

// The end of the body that begins at `at`: the else, elif, endif or endfor of its statement.
size_t branch_end(std::string_view text, size_t at) {
  int depth = 0;
  for (at = text.find('\1', at); at != std::string_view::npos; at = text.find('\1', at + 1)) {
    const auto end = std::find_if_not(text.begin() + at + 1, text.end(), is_word);
    const std::string_view word(text.begin() + at + 1, end);
    const bool ends = word == "endif" || word == "endfor";
    if (depth == 0 && (ends || word == "else" || word == "elif")) return at;
    depth += (word == "if" || word == "for") - ends;
  }
  return text.size();
}

}  // namespace

std::string canonical_template(std::string jinja) {
  BBB_CHECK(jinja.find_first_of(kMarks) == std::string::npos, "it holds control characters");
  replace_all(&jinja, "\r\n", "\n");
  replace_all(&jinja, "\r", "\n");
  if (jinja.ends_with('\n')) jinja.pop_back();  // as Jinja does
  return Reader(jinja).run();
}

std::string shown_template(std::string canonical) {
  for (const auto& [mark, shown] : kShown) replace_all(&canonical, mark, shown);
  replace_all(&canonical, "\5", "'");
  return canonical;
}

std::optional<WildcardTexts> match_template(const std::string& pattern,
                                            const std::string& canonical, size_t* reached) {
  const std::string want = marked(pattern);
  WildcardTexts texts;
  size_t& at = *reached = 0;
  for (size_t i = 0; i < want.size();) {
    if (want.compare(i, 4, "{..}") == 0) {
      at = branch_end(canonical, at);
      i += 4;
    } else if (want[i] == '{') {
      const size_t limit = std::min(canonical.find_first_of(kMarks, at), canonical.size());
      const std::string found = canonical.substr(at, limit - at);
      const std::string behind = want.substr(i + 3, want.find_first_of(kMarks, i) - i - 3);
      if (!found.ends_with(behind)) return {};
      at = limit - behind.size();
      texts.at(static_cast<size_t>(want[i + 1] - '0')) =
          found.substr(0, found.size() - behind.size());
      i += 3;
    } else if (at == canonical.size() || canonical[at] != want[i]) {
      return {};
    } else {
      ++at, ++i;
    }
  }
  if (at != canonical.size()) return {};
  return texts;
}

}  // namespace bbb::data
