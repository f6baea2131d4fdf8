#include "data/chat_template.h"

#include <algorithm>
#include <map>
#include <set>
#include <string_view>
#include <vector>

#include "quant/check.h"

namespace bbb::data {

namespace {

constexpr std::string_view kSpaces = " \t\n\v\f\r";

struct Token {
  enum Kind { Word, Text, Sign } kind;  // Word: names and numbers
  std::string text;
  bool operator==(const Token& other) const { return kind == other.kind && text == other.text; }
};
using Tokens = std::vector<Token>;

bool is_word(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
}

// One spelling for the same access: x['y'] is x.y, x.strip() is x|trim.
Tokens one_spelling(const Tokens& tokens) {
  Tokens out;
  const auto starts = [&](size_t at, const Tokens& those) {
    return tokens.size() - at >= those.size() &&
           std::equal(those.begin(), those.end(), tokens.begin() + static_cast<ptrdiff_t>(at));
  };
  for (size_t i = 0; i < tokens.size(); ++i) {
    const bool key = i > 0 && i + 2 < tokens.size() && tokens[i].text == "[" &&
                     tokens[i].kind == Token::Sign && tokens[i - 1].text != "in" &&
                     tokens[i + 1].kind == Token::Text && tokens[i + 2].text == "]" &&
                     !tokens[i + 1].text.empty() &&
                     std::all_of(tokens[i + 1].text.begin(), tokens[i + 1].text.end(), is_word);
    if (key) {
      out.push_back({Token::Sign, "."});
      out.push_back({Token::Word, tokens[i + 1].text});
      i += 2;
    } else if (starts(i, {{Token::Sign, "."},
                          {Token::Word, "strip"},
                          {Token::Sign, "("},
                          {Token::Sign, ")"}})) {
      out.push_back({Token::Sign, "|"});
      out.push_back({Token::Word, "trim"});
      i += 3;
    } else if (starts(i, {{Token::Word, "index0"}, {Token::Sign, "=="}, {Token::Word, "0"}})) {
      out.push_back({Token::Word, "first"});
      i += 2;
    } else {
      out.push_back(tokens[i]);
    }
  }
  return out;
}

// Whether `begin`, an opening parenthesis, is closed by the token in front of `end`.
bool wrapped(const Tokens& tokens, size_t begin, size_t end) {
  if (end - begin < 2 || !(tokens[begin] == Token{Token::Sign, "("})) return false;
  int depth = 0;
  for (size_t i = begin; i < end; ++i) {
    if (tokens[i].kind != Token::Sign) continue;
    depth += (tokens[i].text == "(") - (tokens[i].text == ")");
    if (depth == 0) return i + 1 == end;
  }
  return false;
}

std::string join(const Tokens& tokens, size_t begin, size_t end) {
  while (wrapped(tokens, begin, end)) ++begin, --end;
  static constexpr std::string_view kOperators[] = {"and", "or", "not", "in", "is", "if", "else"};
  const auto spaced = [&](size_t i) {
    return tokens[i].kind == Token::Word && std::ranges::count(kOperators, tokens[i].text) > 0;
  };
  std::string out;
  for (size_t i = begin; i < end; ++i) {
    const bool words =
        i > begin && tokens[i].kind != Token::Sign && tokens[i - 1].kind != Token::Sign;
    if (i > begin && (words || spaced(i) || spaced(i - 1))) out += ' ';
    std::string text = tokens[i].text;
    if (tokens[i].kind == Token::Text) {
      std::replace(text.begin(), text.end(), '\'', '\5');
      text = "'" + text + "'";
    }
    out += text;
  }
  return out;
}

// A sum of strings as text with holes.
std::string line(const Tokens& tokens, size_t begin) {
  std::string out;
  int depth = 0;
  for (size_t i = begin, term = begin; i <= tokens.size(); ++i) {
    const bool at_sign = i < tokens.size() && tokens[i].kind == Token::Sign;
    const std::string sign = at_sign ? tokens[i].text : "";
    depth +=
        (sign == "(" || sign == "[" || sign == "{") - (sign == ")" || sign == "]" || sign == "}");
    if (i < tokens.size() && (depth > 0 || (sign != "+" && sign != "~"))) continue;
    const bool constant = i - term == 1 && tokens[term].kind == Token::Text;
    out += constant ? tokens[term].text : "\3" + join(tokens, term, i) + "\4";
    term = i + 1;
  }
  return out;
}

class Reader {
 public:
  explicit Reader(const std::string& source) : source_(source) {
    BBB_CHECK(source.find_first_of("\1\2\3\4\5") == std::string::npos,
              "the chat template holds control characters");
    if (!source_.empty() && source_.back() == '\n') source_.pop_back();  // as Jinja does
  }

  std::string run() {
    bool line_start = true;
    while (at_ < source_.size()) {
      const size_t open = next_open();
      std::string text = source_.substr(at_, open - at_);
      at_ = open;
      if (open == source_.size()) return out_ + text;
      const char kind = source_[open + 1];
      at_ += 2;
      const char sign = at_ < source_.size() ? source_[at_] : '\0';
      if (sign == '-') text.resize(text.find_last_not_of(kSpaces) + 1);
      if (kind != '{' && sign != '-' && sign != '+') strip_indent(&text, line_start);
      out_ += text;
      at_ += sign == '-' || sign == '+';
      const char end_sign = kind == '#' ? skip_comment() : read_tag(kind);
      line_start = skip_behind(end_sign, kind != '{');
    }
    return out_;
  }

 private:
  size_t next_open() const {
    size_t at = source_.find('{', at_);
    while (at < source_.size() &&
           (at + 1 == source_.size() ||
            std::string_view("{%#").find(source_[at + 1]) == std::string::npos))
      at = source_.find('{', at + 1);
    return std::min(at, source_.size());
  }

  // lstrip_blocks: blanks between the start of a line and a block go.
  static void strip_indent(std::string* text, bool line_start) {
    const size_t newline = text->rfind('\n');
    if (newline == std::string::npos && !line_start) return;
    const size_t begin = newline == std::string::npos ? 0 : newline + 1;
    if (text->find_first_not_of(" \t", begin) == std::string::npos) text->resize(begin);
  }

  // trim_blocks: the newline behind a block goes; "-" takes all white space. Returns whether the
  // next text begins a line.
  bool skip_behind(char sign, bool block) {
    const size_t begin = at_;
    if (sign == '-') at_ = std::min(source_.find_first_not_of(kSpaces, at_), source_.size());
    if (block && sign == '\0' && at_ < source_.size() && source_[at_] == '\n') ++at_;
    return at_ > begin && source_[at_ - 1] == '\n';
  }

  char skip_comment() {
    const size_t close = source_.find("#}", at_);
    BBB_CHECK(close != std::string::npos, "the chat template has a comment that does not end");
    at_ = close + 2;
    const char sign = source_[close - 1];
    return sign == '-' || sign == '+' ? sign : '\0';
  }

  // Writes the tag; returns the sign in front of its end.
  char read_tag(char kind) {
    const std::string_view close = kind == '{' ? "}}" : "%}";
    Tokens tokens;
    int braces = 0;
    while (at_ < source_.size()) {
      const char c = source_[at_];
      const bool sign = c == '-' || c == '+';
      if (braces == 0 && source_.compare(at_ + sign, 2, close) == 0) {
        at_ += 2 + sign;
        write(kind, one_spelling(tokens));
        return sign ? c : '\0';
      }
      const size_t begin = at_;
      if (kSpaces.find(c) != std::string_view::npos) {
        ++at_;
      } else if (c == '\'' || c == '"') {
        tokens.push_back({Token::Text, read_string()});
      } else if (is_word(c)) {
        while (at_ < source_.size() && is_word(source_[at_])) ++at_;
        tokens.push_back({Token::Word, source_.substr(begin, at_ - begin)});
      } else {
        braces += (c == '{') - (c == '}');
        const bool pair = at_ + 1 < source_.size() && source_[at_ + 1] == '=' &&
                          std::string_view("=!<>").find(c) != std::string_view::npos;
        at_ += 1 + pair;
        tokens.push_back({Token::Sign, source_.substr(begin, at_ - begin)});
      }
    }
    throw Error("the chat template has a tag that does not end");
  }

  std::string read_string() {
    const char quote = source_[at_++];
    std::string out;
    for (; at_ < source_.size() && source_[at_] != quote; ++at_) {
      if (source_[at_] == '\\' && at_ + 1 < source_.size()) {
        static constexpr std::string_view kEscapes = "ntr\\'\"", kEscaped = "\n\t\r\\'\"";
        if (source_[++at_] == '\n') continue;  // the string goes on in the next line
        const size_t escape = kEscapes.find(source_[at_]);
        BBB_CHECK(escape < kEscapes.size(), "the chat template has the escape \\", source_[at_],
                  ", which is not supported");
        out += kEscaped[escape];
      } else {
        out += source_[at_];
      }
    }
    BBB_CHECK(at_ < source_.size(), "the chat template has a string that does not end");
    ++at_;
    return out;
  }

  void write(char kind, Tokens tokens) {
    const bool sets = kind == '%' && tokens.size() > 3 && tokens[0].text == "set";
    for (size_t i = sets && tokens[2].text == "=" ? 2 : 0; i < tokens.size(); ++i) {
      const bool attribute = i > 0 && tokens[i - 1] == Token{Token::Sign, "."};
      const auto name = names_.find(tokens[i].text);
      if (tokens[i].kind == Token::Word && !attribute && name != names_.end())
        tokens[i].text = name->second;
    }
    if (kind == '{') {
      out_ += line(tokens, 0);
      return;
    }
    if (tokens.size() == 4 && tokens[0].text == "for" && tokens[2].text == "in" &&
        (tokens[3].text == "messages" || tokens[3].text == "rest")) {
      names_[tokens[1].text] = "message";
      tokens[1].text = "message";
    }
    if (!tokens.empty()) {
      const std::string& word = tokens[0].text;
      depth_ += (word == "if" || word == "for") - (word == "endif" || word == "endfor");
    }
    const auto equals = std::find(tokens.begin(), tokens.end(), Token{Token::Sign, "="});
    if (!sets || equals == tokens.end()) {
      const bool tests = tokens.size() > 1 && (tokens[0].text == "if" || tokens[0].text == "elif");
      out_ += "\1" +
              (tests ? tokens[0].text + " " + join(tokens, 1, tokens.size())
                     : join(tokens, 0, tokens.size())) +
              "\2";
      return;
    }
    const size_t value = static_cast<size_t>(equals - tokens.begin()) + 1;
    std::string name = join(tokens, 1, value - 1);
    if (value == 3) {
      const std::string what = join(tokens, value, tokens.size());
      const bool again = !set_.insert(name).second;
      if (what == "messages" && depth_ == 0 && !again) {
        names_[name] = "messages";
        return;
      }
      for (const auto& [from, to] : {std::pair{"messages[1:]", "rest"},
                                     {"messages[0].content", "system"},
                                     {"messages[0].content|trim", "system"},
                                     {"message.content", "content"},
                                     {"message.content|trim", "content"}}) {
        if (what == from && (!again || name == to)) names_[name] = to;
      }
      if (name != "messages" && names_.contains(name)) name = names_[name];
    }
    out_ += "\1set " + name + "\2" + line(tokens, value) + "\1endset\2";
  }

  std::string source_;
  size_t at_ = 0;
  std::string out_;
  std::map<std::string, std::string> names_;  // what a template calls a thing, and its name here
  int depth_ = 0;                             // of if and for
  std::set<std::string> set_;                 // names that have been set
};

}  // namespace

std::string canonical_template(const std::string& jinja) { return Reader(jinja).run(); }

}  // namespace bbb::data
