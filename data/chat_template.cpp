// The Jinja subset of chat_template.h: source -> tags -> tree -> text.
//
// Values are immutable but for namespace(); `for` opens a scope and `if` does not. Depth, steps and
// text length are bounded, for templates come with downloaded models.
#include "data/chat_template.h"

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <variant>

#include "data/tokenizer.h"
#include "quant/check.h"

namespace bbb::data {

namespace {

constexpr int kMaxDepth = 200;
constexpr int64_t kMaxSteps = 4'000'000;
constexpr size_t kMaxText = size_t{64} << 20;

[[noreturn]] void fail(const std::string& what) { throw Error(cat("the chat template: ", what)); }

// Values.

struct Value;
using List = std::vector<Value>;
using Dict = std::map<std::string, Value>;
struct Undefined {};
struct None {};

struct Value {
  std::variant<Undefined, None, bool, int64_t, double, std::string, std::shared_ptr<List>,
               std::shared_ptr<Dict>>
      data;
  template <typename T>
  bool is() const {
    return std::holds_alternative<T>(data);
  }
  template <typename T>
  const T& as() const {
    return std::get<T>(data);
  }
};

Value list_value(List list) { return {std::make_shared<List>(std::move(list))}; }
Value dict_value(Dict dict) { return {std::make_shared<Dict>(std::move(dict))}; }
bool is_list(const Value& value) { return value.is<std::shared_ptr<List>>(); }
bool is_dict(const Value& value) { return value.is<std::shared_ptr<Dict>>(); }
const List& list_of(const Value& value) { return *value.as<std::shared_ptr<List>>(); }
Dict& dict_of(const Value& value) { return *value.as<std::shared_ptr<Dict>>(); }
bool is_int(const Value& value) { return value.is<int64_t>() || value.is<bool>(); }
bool is_number(const Value& value) { return is_int(value) || value.is<double>(); }
int64_t int_of(const Value& value) {
  return value.is<bool>() ? value.as<bool>() : value.as<int64_t>();
}
double number_of(const Value& value) {
  return value.is<double>() ? value.as<double>() : static_cast<double>(int_of(value));
}

const char* kind_of(const Value& value) {
  static constexpr const char* kNames[] = {"undefined", "none",   "bool", "int",
                                           "float",     "string", "list", "dict"};
  return kNames[value.data.index()];
}

bool truth(const Value& value) {
  if (value.is<Undefined>() || value.is<None>()) return false;
  if (is_number(value)) return number_of(value) != 0;
  if (value.is<std::string>()) return !value.as<std::string>().empty();
  return is_list(value) ? !list_of(value).empty() : !dict_of(value).empty();
}

bool equal(const Value& a, const Value& b) {
  if (is_number(a) && is_number(b)) {
    return is_int(a) && is_int(b) ? int_of(a) == int_of(b) : number_of(a) == number_of(b);
  }
  if (a.data.index() != b.data.index()) return false;
  if (a.is<std::string>()) return a.as<std::string>() == b.as<std::string>();
  if (is_list(a)) {
    const List& left = list_of(a);
    const List& right = list_of(b);
    return std::equal(left.begin(), left.end(), right.begin(), right.end(), equal);
  }
  if (is_dict(a)) {
    return std::equal(dict_of(a).begin(), dict_of(a).end(), dict_of(b).begin(), dict_of(b).end(),
                      [](const auto& x, const auto& y) {
                        return x.first == y.first && equal(x.second, y.second);
                      });
  }
  return true;  // both undefined or both none
}

std::string text_of(const Value& value) {
  if (value.is<Undefined>()) return "";
  if (value.is<None>()) return "None";
  if (value.is<bool>()) return value.as<bool>() ? "True" : "False";
  if (value.is<int64_t>()) return std::to_string(value.as<int64_t>());
  if (value.is<std::string>()) return value.as<std::string>();
  fail(cat("printing a ", kind_of(value), " is not supported"));
}

const std::string& string_of(const Value& value, const char* what) {
  if (!value.is<std::string>()) fail(cat(what, " needs a string, not ", kind_of(value)));
  return value.as<std::string>();
}

int64_t length_of(const Value& value) {
  if (is_list(value)) return static_cast<int64_t>(list_of(value).size());
  if (is_dict(value)) return static_cast<int64_t>(dict_of(value).size());
  int64_t characters = 0;
  for (const char c : string_of(value, "length")) characters += (c & 0xc0) != 0x80;
  return characters;
}

// Where a string method or filter strips by default: ASCII white space.
constexpr std::string_view kSpaces = " \t\n\v\f\r";

std::string strip(const std::string& text, std::string_view set, bool left, bool right) {
  const size_t begin = left ? std::min(text.find_first_not_of(set), text.size()) : 0;
  const size_t last = right ? text.find_last_not_of(set) : text.size() - 1;
  if (text.empty() || last == std::string::npos || begin > last) return "";
  return text.substr(begin, last - begin + 1);
}

std::string change_case(std::string text, bool upper) {
  for (char& c : text) {
    if (upper && c >= 'a' && c <= 'z') c = static_cast<char>(c - 32);
    if (!upper && c >= 'A' && c <= 'Z') c = static_cast<char>(c + 32);
  }
  return text;
}

// Tags and their tokens.

enum class TokenKind { Name, Int, Float, String, Op, End };

struct Token {
  TokenKind kind;
  std::string text;
};

enum class TagKind { Text, Output, Statement };

struct Tag {
  TagKind kind;
  std::string text;           // Text
  std::vector<Token> tokens;  // Output and Statement, ended by End
};

bool is_name_start(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; }
bool is_digit(char c) { return c >= '0' && c <= '9'; }

class Lexer {
 public:
  explicit Lexer(std::string source) : source_(std::move(source)) {
    // One newline at the very end is not part of a template.
    if (!source_.empty() && source_.back() == '\n') source_.pop_back();
  }

  std::vector<Tag> run() {
    std::vector<Tag> tags;
    bool at_line_start = true;
    while (at_ < source_.size()) {
      const size_t open = next_open();
      std::string text = source_.substr(at_, open - at_);
      at_ = open;
      if (open == source_.size()) {
        tags.push_back({TagKind::Text, std::move(text), {}});
        break;
      }
      const char kind = source_[open + 1];
      at_ += 2;
      const char sign = at_ < source_.size() ? source_[at_] : '\0';
      if (sign == '-') {
        text = strip(text, kSpaces, false, true);
      } else if (kind != '{' && sign != '+') {
        strip_indent(&text, at_line_start);
      }
      if (sign == '-' || sign == '+') ++at_;
      if (!text.empty()) tags.push_back({TagKind::Text, std::move(text), {}});
      if (kind == '#') {
        const size_t close = source_.find("#}", at_);
        if (close == std::string::npos) fail("a comment does not end");
        at_ = close + 2;
        after_close(source_[close - 1], true, &at_line_start);
        continue;
      }
      Tag tag{kind == '{' ? TagKind::Output : TagKind::Statement, "", {}};
      const char end_sign = read_tokens(kind == '{' ? "}}" : "%}", &tag.tokens);
      tags.push_back(std::move(tag));
      after_close(end_sign, kind == '%', &at_line_start);
    }
    return tags;
  }

 private:
  size_t next_open() const {
    for (size_t i = at_; i + 1 < source_.size(); ++i) {
      const char next = source_[i + 1];
      if (source_[i] == '{' && (next == '{' || next == '%' || next == '#')) return i;
    }
    return source_.size();
  }

  // lstrip_blocks: blanks between the start of a line and a block go.
  static void strip_indent(std::string* text, bool at_line_start) {
    const size_t newline = text->rfind('\n');
    if (newline == std::string::npos && !at_line_start) return;
    const size_t line = newline == std::string::npos ? 0 : newline + 1;
    if (text->find_first_not_of(" \t", line) == std::string::npos) text->resize(line);
  }

  // trim_blocks: the newline after a block goes; "-" takes all white space.
  void after_close(char sign, bool is_block, bool* at_line_start) {
    const size_t begin = at_;
    if (sign == '-') {
      while (at_ < source_.size() && kSpaces.find(source_[at_]) != std::string_view::npos) ++at_;
    } else if (is_block && sign != '+' && at_ < source_.size() && source_[at_] == '\n') {
      ++at_;
    }
    *at_line_start = at_ > begin && source_[at_ - 1] == '\n';
  }

  // Tokens up to the closing marker; returns the sign before it.
  char read_tokens(std::string_view close, std::vector<Token>* tokens) {
    int braces = 0;
    while (at_ < source_.size()) {
      const char c = source_[at_];
      const bool has_sign = c == '-' || c == '+';
      if (braces == 0 && source_.compare(at_ + has_sign, close.size(), close) == 0) {
        at_ += has_sign + close.size();
        tokens->push_back({TokenKind::End, "the end of the tag"});
        return has_sign ? c : '\0';
      }
      if (kSpaces.find(c) != std::string_view::npos) {
        ++at_;
      } else if (is_name_start(c)) {
        const size_t begin = at_;
        while (at_ < source_.size() && (is_name_start(source_[at_]) || is_digit(source_[at_]))) {
          ++at_;
        }
        tokens->push_back({TokenKind::Name, source_.substr(begin, at_ - begin)});
      } else if (is_digit(c)) {
        read_number(tokens);
      } else if (c == '\'' || c == '"') {
        tokens->push_back({TokenKind::String, read_string()});
      } else {
        static constexpr std::string_view kPairs[] = {"==", "!=", "<=", ">=", "//", "**"};
        std::string op(1, c);
        for (const std::string_view pair : kPairs) {
          if (source_.compare(at_, 2, pair) == 0) op = pair;
        }
        if (op.size() == 1 &&
            std::string_view("+-*/%~|.,:()[]{}<>=").find(c) == std::string::npos) {
          fail(cat("the character ", op, " in a tag"));
        }
        braces += (c == '{') - (c == '}');
        at_ += op.size();
        tokens->push_back({TokenKind::Op, op});
      }
    }
    fail("a tag does not end");
  }

  void read_number(std::vector<Token>* tokens) {
    const size_t begin = at_;
    bool is_float = false;
    while (at_ < source_.size() && is_digit(source_[at_])) ++at_;
    if (at_ + 1 < source_.size() && source_[at_] == '.' && is_digit(source_[at_ + 1])) {
      is_float = true;
      for (++at_; at_ < source_.size() && is_digit(source_[at_]);) ++at_;
    }
    if (at_ - begin > 15) fail("a number of more than 15 digits");
    tokens->push_back(
        {is_float ? TokenKind::Float : TokenKind::Int, source_.substr(begin, at_ - begin)});
  }

  std::string read_string() {
    const char quote = source_[at_++];
    std::string out;
    for (; at_ < source_.size(); ++at_) {
      const char c = source_[at_];
      if (c == quote) {
        ++at_;
        return out;
      }
      if (c != '\\' || at_ + 1 == source_.size()) {
        out += c;
        continue;
      }
      const char escaped = source_[++at_];
      switch (escaped) {
        case 'n':
          out += '\n';
          break;
        case 't':
          out += '\t';
          break;
        case 'r':
          out += '\r';
          break;
        case '\\':
        case '\'':
        case '"':
          out += escaped;
          break;
        case 'x':
        case 'u':
        case 'U':
          fail(cat("the escape \\", escaped, " in a string is not supported"));
        default:
          out += cat('\\', escaped);
      }
    }
    fail("a string does not end");
  }

  std::string source_;
  size_t at_ = 0;
};

// The tree.

enum class ExprKind {
  Literal,    // value
  Name,       // text
  ListOf,     // kids
  DictOf,     // kids: key, value, key, value ...
  Attribute,  // kids[0], text
  Subscript,  // kids[0], kids[1]
  Slice,      // kids[0], kids[1], kids[2]; a null bound is open
  Call,       // kids[0] called with the others; names of keyword arguments
  Filter,     // text applied to kids[0] with the others
  Test,       // kids[0] is text, with the others
  Unary,      // text, kids[0]
  Binary,     // text, kids[0], kids[1]
  Compare,    // kids[0] and the others, with the operators in names
  Choose,     // kids[0] if kids[1] else kids[2]
};

struct Expr {
  ExprKind kind;
  std::string text;
  Value value;
  std::vector<std::unique_ptr<Expr>> kids;
  std::vector<std::string> names;
  int depth = 1;  // of the tree below: "a + b + c + ..." grows it without nesting
};
using ExprPtr = std::unique_ptr<Expr>;

enum class NodeKind { Text, Output, For, If, Set };

struct Node {
  NodeKind kind;
  std::string text;                // Text; Set: the name or namespace
  std::vector<std::string> names;  // For: targets; Set: the namespace's attribute, if any
  std::vector<ExprPtr> exprs;      // Output, For (list, filter), If (a condition a branch), Set
  std::vector<std::vector<Node>> bodies;  // For (body, else), If (a body a branch, else), Set block
};
using Nodes = std::vector<Node>;

class Parser {
 public:
  explicit Parser(std::vector<Tag> tags) : tags_(std::move(tags)) {}

  Nodes run() {
    Nodes nodes = body();
    if (tag_ < tags_.size())
      fail(cat("{% ", tags_[tag_].tokens[0].text, " %} without a beginning"));
    return nodes;
  }

 private:
  // Nodes up to a statement that ends or divides its parent's body, which stays unread.
  Nodes body() {
    const Depth depth(&depth_);
    Nodes nodes;
    while (tag_ < tags_.size()) {
      Tag& tag = tags_[tag_];
      tokens_ = &tag.tokens;
      at_ = 0;
      if (tag.kind == TagKind::Text) {
        nodes.push_back({NodeKind::Text, std::move(tag.text), {}, {}, {}});
        ++tag_;
      } else if (tag.kind == TagKind::Output) {
        Node node{NodeKind::Output, "", {}, {}, {}};
        node.exprs.push_back(expression());
        end_tag();
        nodes.push_back(std::move(node));
      } else {
        const std::string word = peek().text;
        if (word == "elif" || word == "else" || word.compare(0, 3, "end") == 0) return nodes;
        nodes.push_back(statement());
      }
    }
    return nodes;
  }

  Node statement() {
    const std::string word = take_name("a statement");
    if (word == "for") return for_statement();
    if (word == "if") return if_statement();
    if (word == "set") return set_statement();
    fail(cat("the statement {% ", word, " %} is not supported"));
  }

  Node for_statement() {
    Node node{NodeKind::For, "", {}, {}, {}};
    node.names.push_back(take_name("a loop variable"));
    while (accept(",")) node.names.push_back(take_name("a loop variable"));
    if (!accept_name("in")) fail("a for without in");
    node.exprs.push_back(or_expression());
    node.exprs.push_back(accept_name("if") ? expression() : nullptr);
    end_tag();
    node.bodies.push_back(body());
    node.bodies.emplace_back();
    if (begin_divider("else")) {
      end_tag();
      node.bodies[1] = body();
    }
    end_block("endfor");
    return node;
  }

  Node if_statement() {
    Node node{NodeKind::If, "", {}, {}, {}};
    do {
      node.exprs.push_back(expression());
      end_tag();
      node.bodies.push_back(body());
    } while (begin_divider("elif"));
    if (begin_divider("else")) {
      end_tag();
      node.bodies.push_back(body());
    }
    end_block("endif");
    return node;
  }

  Node set_statement() {
    Node node{NodeKind::Set, take_name("a variable"), {}, {}, {}};
    if (accept(".")) node.names.push_back(take_name("an attribute"));
    if (accept("=")) {
      node.exprs.push_back(expression());
      end_tag();
    } else {
      end_tag();
      node.bodies.push_back(body());
      end_block("endset");
    }
    return node;
  }

  // Whether the statement at hand is `word`; if so, reads that word.
  bool begin_divider(const char* word) {
    if (tag_ == tags_.size()) return false;
    tokens_ = &tags_[tag_].tokens;
    at_ = 0;
    return accept_name(word);
  }
  void end_block(const char* word) {
    if (!begin_divider(word)) fail(cat("{% ", word, " %} is missing"));
    end_tag();
  }
  void end_tag() {
    if (peek().kind != TokenKind::End) fail(cat("unexpected ", peek().text));
    ++tag_;
  }

  const Token& peek() const { return (*tokens_)[at_]; }
  bool at_op(const char* op) const { return peek().kind == TokenKind::Op && peek().text == op; }
  bool at_name(const char* name) const {
    return peek().kind == TokenKind::Name && peek().text == name;
  }
  bool accept(const char* op) {
    const bool found = at_op(op);
    at_ += found;
    return found;
  }
  bool accept_name(const char* name) {
    const bool found = at_name(name);
    at_ += found;
    return found;
  }
  void expect(const char* op) {
    if (!accept(op)) fail(cat("expected ", op, " before ", peek().text));
  }
  std::string take_name(const char* what) {
    if (peek().kind != TokenKind::Name) fail(cat("expected ", what, " before ", peek().text));
    return (*tokens_)[at_++].text;
  }

  static ExprPtr make(ExprKind kind, std::string text, ExprPtr a = nullptr, ExprPtr b = nullptr) {
    auto expr = std::make_unique<Expr>();
    expr->kind = kind;
    expr->text = std::move(text);
    for (ExprPtr* kid : {&a, &b}) {
      if (!*kid) continue;
      expr->depth = std::max(expr->depth, (*kid)->depth + 1);
      expr->kids.push_back(std::move(*kid));
    }
    if (expr->depth > kMaxDepth) fail("nested too deeply");
    return expr;
  }

  struct Depth {
    int* depth;
    explicit Depth(int* d) : depth(d) {
      if (++*depth > kMaxDepth) fail("nested too deeply");
    }
    ~Depth() { --*depth; }
  };

  ExprPtr expression() {
    const Depth depth(&depth_);
    ExprPtr left = or_expression();
    if (!accept_name("if")) return left;
    ExprPtr choose = make(ExprKind::Choose, "", std::move(left), or_expression());
    choose->kids.push_back(accept_name("else") ? expression() : make(ExprKind::Literal, ""));
    return choose;
  }

  ExprPtr or_expression() {
    ExprPtr left = and_expression();
    while (accept_name("or")) {
      left = make(ExprKind::Binary, "or", std::move(left), and_expression());
    }
    return left;
  }
  ExprPtr and_expression() {
    ExprPtr left = not_expression();
    while (accept_name("and")) {
      left = make(ExprKind::Binary, "and", std::move(left), not_expression());
    }
    return left;
  }
  ExprPtr not_expression() {
    const Depth depth(&depth_);
    if (accept_name("not")) return make(ExprKind::Unary, "not", not_expression());
    return comparison();
  }

  ExprPtr comparison() {
    ExprPtr first = binary(0);
    ExprPtr compare;
    for (;;) {
      std::string op;
      for (const char* symbol : {"==", "!=", "<=", ">=", "<", ">"}) {
        if (op.empty() && accept(symbol)) op = symbol;
      }
      if (op.empty() && accept_name("in")) op = "in";
      if (op.empty() && at_name("not") && (*tokens_)[at_ + 1].text == "in") {
        at_ += 2;
        op = "not in";
      }
      if (op.empty()) return compare ? std::move(compare) : std::move(first);
      if (!compare) compare = make(ExprKind::Compare, "", std::move(first));
      compare->kids.push_back(binary(0));
      compare->names.push_back(op);
    }
  }

  // Left-associative operators, loosest first: + and -, then ~, then * / // %.
  ExprPtr binary(size_t level) {
    static const std::vector<std::vector<const char*>> kLevels = {
        {"+", "-"}, {"~"}, {"*", "//", "/", "%"}};
    if (level == kLevels.size()) return unary();
    ExprPtr left = binary(level + 1);
    for (;;) {
      const char* op = nullptr;
      for (const char* candidate : kLevels[level]) {
        if (op == nullptr && accept(candidate)) op = candidate;
      }
      if (op == nullptr) return left;
      left = make(ExprKind::Binary, op, std::move(left), binary(level + 1));
    }
  }

  ExprPtr unary() {
    const Depth depth(&depth_);
    if (accept("-")) return make(ExprKind::Unary, "-", unary());
    ExprPtr expr = postfix(primary());
    for (;;) {
      if (accept("|")) {
        expr = make(ExprKind::Filter, take_name("a filter"), std::move(expr));
        if (accept("(")) arguments(expr.get());
      } else if (accept_name("is")) {
        const bool negated = accept_name("not");
        expr = make(ExprKind::Test, take_name("a test"), std::move(expr));
        if (accept("(")) arguments(expr.get());
        if (negated) expr = make(ExprKind::Unary, "not", std::move(expr));
      } else {
        return expr;
      }
    }
  }

  ExprPtr postfix(ExprPtr expr) {
    for (;;) {
      if (accept(".")) {
        expr = make(ExprKind::Attribute, take_name("an attribute"), std::move(expr));
      } else if (accept("(")) {
        expr = make(ExprKind::Call, "", std::move(expr));
        arguments(expr.get());
      } else if (accept("[")) {
        ExprPtr bounds[2];
        const bool open_start = at_op(":");
        if (!open_start) bounds[0] = expression();
        if (accept(":")) {
          if (!at_op("]")) bounds[1] = expression();
          expr = make(ExprKind::Slice, "", std::move(expr));
          for (ExprPtr& bound : bounds) expr->kids.push_back(std::move(bound));
        } else {
          expr = make(ExprKind::Subscript, "", std::move(expr), std::move(bounds[0]));
        }
        expect("]");
      } else {
        return expr;
      }
    }
  }

  void arguments(Expr* call) {
    while (!accept(")")) {
      std::string name;
      if (peek().kind == TokenKind::Name && (*tokens_)[at_ + 1].text == "=" &&
          (*tokens_)[at_ + 1].kind == TokenKind::Op) {
        name = take_name("an argument");
        ++at_;
      }
      call->kids.push_back(expression());
      call->names.push_back(name);
      if (!at_op(")")) expect(",");
    }
  }

  ExprPtr primary() {
    const Token token = peek();
    if (token.kind != TokenKind::End) ++at_;
    ExprPtr literal = make(ExprKind::Literal, "");
    switch (token.kind) {
      case TokenKind::Int:
        literal->value = {int64_t{std::stoll(token.text)}};
        return literal;
      case TokenKind::Float:
        literal->value = {std::stod(token.text)};
        return literal;
      case TokenKind::String:
        literal->value = {token.text};
        while (peek().kind == TokenKind::String) {  // adjacent strings are one
          literal->value = {literal->value.as<std::string>() + (*tokens_)[at_++].text};
        }
        return literal;
      case TokenKind::Name: {
        const std::string& name = token.text;
        if (name == "true" || name == "True")
          literal->value = {true};
        else if (name == "false" || name == "False")
          literal->value = {false};
        else if (name == "none" || name == "None")
          literal->value = {None{}};
        else
          return make(ExprKind::Name, name);
        return literal;
      }
      case TokenKind::Op:
        if (token.text == "(") return tuple_or_group();
        if (token.text == "[") return sequence("]", nullptr);
        if (token.text == "{") return dictionary();
        break;
      case TokenKind::End:
        break;
    }
    fail(cat("unexpected ", token.text));
  }

  ExprPtr tuple_or_group() {
    if (accept(")")) return make(ExprKind::ListOf, "");
    ExprPtr first = expression();
    if (accept(")")) return first;
    expect(",");
    return sequence(")", std::move(first));
  }
  ExprPtr sequence(const char* close, ExprPtr first) {
    ExprPtr list = make(ExprKind::ListOf, "", std::move(first));
    while (!accept(close)) {
      list->kids.push_back(expression());
      if (!at_op(close)) expect(",");
    }
    return list;
  }
  ExprPtr dictionary() {
    ExprPtr dict = make(ExprKind::DictOf, "");
    while (!accept("}")) {
      dict->kids.push_back(expression());
      expect(":");
      dict->kids.push_back(expression());
      if (!at_op("}")) expect(",");
    }
    return dict;
  }

  std::vector<Tag> tags_;
  size_t tag_ = 0;
  const std::vector<Token>* tokens_ = nullptr;
  size_t at_ = 0;
  int depth_ = 0;
};

// Evaluation.

class Interpreter {
 public:
  explicit Interpreter(const ChatContext& context) : date_(context.date) {
    List messages;
    for (const ChatMessage& message : context.messages) {
      messages.push_back(dict_value({{"role", {message.role}}, {"content", {message.content}}}));
    }
    scopes_.push_back({{"messages", list_value(std::move(messages))},
                       {"bos_token", {context.bos_token}},
                       {"eos_token", {context.eos_token}},
                       {"add_generation_prompt", {context.add_generation_prompt}}});
    // Functions are only ever called or tested for: any defined value stands for them.
    for (const char* name : {"namespace", "range", "raise_exception"}) scopes_[0][name] = {true};
    if (!date_.empty()) scopes_[0]["strftime_now"] = {true};
  }

  void run(const Nodes& nodes, std::string* out) {
    for (const Node& node : nodes) {
      switch (node.kind) {
        case NodeKind::Text:
          *out += node.text;
          break;
        case NodeKind::Output:
          *out += text_of(eval(*node.exprs[0]));
          break;
        case NodeKind::If:
          run_if(node, out);
          break;
        case NodeKind::For:
          run_for(node, out);
          break;
        case NodeKind::Set:
          run_set(node);
          break;
      }
      if (out->size() > kMaxText) fail("its text is too long");
    }
  }

 private:
  void run_if(const Node& node, std::string* out) {
    for (size_t i = 0; i < node.exprs.size(); ++i) {
      if (truth(eval(*node.exprs[i]))) return run(node.bodies[i], out);
    }
    if (node.bodies.size() > node.exprs.size()) run(node.bodies.back(), out);
  }

  void bind(const Node& node, const Value& item) {
    if (node.names.size() == 1) {
      scopes_.back()[node.names[0]] = item;
      return;
    }
    if (!is_list(item) || list_of(item).size() != node.names.size()) {
      fail(cat("a loop over ", node.names.size(), " variables needs lists of as many"));
    }
    for (size_t i = 0; i < node.names.size(); ++i) {
      scopes_.back()[node.names[i]] = list_of(item)[i];
    }
  }

  void run_for(const Node& node, std::string* out) {
    const List all = items(eval(*node.exprs[0]));
    scopes_.emplace_back();
    List kept;
    for (const Value& item : all) {
      bind(node, item);
      if (!node.exprs[1] || truth(eval(*node.exprs[1]))) kept.push_back(item);
    }
    const int64_t count = static_cast<int64_t>(kept.size());
    for (int64_t i = 0; i < count; ++i) {
      charge(16 + node.bodies[0].size());  // the loop's own variables and its body
      scopes_.back().clear();
      bind(node, kept[static_cast<size_t>(i)]);
      Dict loop = {{"index", {i + 1}},        {"index0", {i}},
                   {"revindex", {count - i}}, {"revindex0", {count - i - 1}},
                   {"first", {i == 0}},       {"last", {i + 1 == count}},
                   {"length", {count}}};
      if (i > 0) loop["previtem"] = kept[static_cast<size_t>(i - 1)];
      if (i + 1 < count) loop["nextitem"] = kept[static_cast<size_t>(i + 1)];
      scopes_.back()["loop"] = dict_value(std::move(loop));
      run(node.bodies[0], out);
    }
    scopes_.pop_back();
    if (count == 0) run(node.bodies[1], out);
  }

  void run_set(const Node& node) {
    Value value;
    if (node.exprs.empty()) {
      std::string text;
      run(node.bodies[0], &text);
      value = {text};
    } else {
      value = eval(*node.exprs[0]);
    }
    if (node.names.empty()) {
      scopes_.back()[node.text] = value;
      return;
    }
    const Value target = lookup(node.text);
    if (!is_dict(target)) fail(cat(node.text, " is not a namespace"));
    dict_of(target)[node.names[0]] = value;
  }

  Value lookup(const std::string& name) const {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      const auto found = scope->find(name);
      if (found != scope->end()) return found->second;
    }
    return {};
  }

  // What a loop, `in` or a list filter walks over.
  static List items(const Value& value) {
    if (is_list(value)) return list_of(value);
    List out;
    if (is_dict(value)) {
      for (const auto& [key, unused] : dict_of(value)) out.push_back({key});
      return out;
    }
    fail(cat("looping over a ", kind_of(value), " is not supported"));
  }

  void charge(size_t steps) {
    steps_ += static_cast<int64_t>(steps);
    if (steps_ > kMaxSteps) fail("it takes too many steps");
  }

  // Charged by the size of the value, for whoever asked for it may walk over it or copy it.
  Value eval(const Expr& expr) {
    charge(1);
    Value value = compute(expr);
    if (is_list(value)) charge(list_of(value).size());
    if (is_dict(value)) charge(dict_of(value).size());
    if (value.is<std::string>()) charge(value.as<std::string>().size() / 1024);
    return value;
  }

  Value compute(const Expr& expr) {
    switch (expr.kind) {
      case ExprKind::Literal:
        return expr.value;
      case ExprKind::Name:
        return lookup(expr.text);
      case ExprKind::ListOf:
        return list_value(eval_from(expr, 0));
      case ExprKind::DictOf: {
        Dict dict;
        for (size_t i = 0; i < expr.kids.size(); i += 2) {
          dict[string_of(eval(*expr.kids[i]), "a key")] = eval(*expr.kids[i + 1]);
        }
        return dict_value(std::move(dict));
      }
      case ExprKind::Attribute:
        return subscript(eval(*expr.kids[0]), {expr.text}, *expr.kids[0]);
      case ExprKind::Subscript:
        return subscript(eval(*expr.kids[0]), eval(*expr.kids[1]), *expr.kids[0]);
      case ExprKind::Slice:
        return slice(expr);
      case ExprKind::Call:
        return call(expr);
      case ExprKind::Filter:
        return filter(expr.text, eval_from(expr, 0), expr.names);
      case ExprKind::Test:
        return {test(expr.text, eval_from(expr, 0))};
      case ExprKind::Unary: {
        const Value value = eval(*expr.kids[0]);
        if (expr.text == "not") return {!truth(value)};
        if (value.is<double>()) return {-value.as<double>()};
        if (!is_int(value)) fail(cat("minus a ", kind_of(value)));
        return {-int_of(value)};
      }
      case ExprKind::Binary:
        return binary(expr);
      case ExprKind::Compare:
        return {compare(expr)};
      case ExprKind::Choose:
        return eval(*expr.kids[truth(eval(*expr.kids[1])) ? 0 : 2]);
    }
    fail("an expression of an unknown kind");
  }

  List eval_from(const Expr& expr, size_t first) {
    List values;
    for (size_t i = first; i < expr.kids.size(); ++i) values.push_back(eval(*expr.kids[i]));
    return values;
  }

  static Value subscript(const Value& base, const Value& key, const Expr& where) {
    if (is_dict(base) && key.is<std::string>()) {
      const auto found = dict_of(base).find(key.as<std::string>());
      return found == dict_of(base).end() ? Value{} : found->second;
    }
    if (is_list(base) && is_int(key)) {
      const int64_t size = length_of(base);
      const int64_t index = int_of(key) < 0 ? int_of(key) + size : int_of(key);
      return index < 0 || index >= size ? Value{} : list_of(base)[static_cast<size_t>(index)];
    }
    if (base.is<Undefined>())
      fail(cat(where.text.empty() ? "a value" : where.text, " is undefined"));
    if (base.is<std::string>() && is_int(key)) fail("a subscript of a string is not supported");
    return {};
  }

  Value slice(const Expr& expr) {
    const Value base = eval(*expr.kids[0]);
    if (!is_list(base)) fail(cat("a slice of a ", kind_of(base), " is not supported"));
    const int64_t size = length_of(base);
    int64_t bounds[2] = {0, size};
    for (size_t i = 0; i < 2; ++i) {
      if (!expr.kids[i + 1]) continue;
      const Value bound = eval(*expr.kids[i + 1]);
      if (bound.is<None>()) continue;
      if (!is_int(bound)) fail(cat("a slice bound is a ", kind_of(bound)));
      const int64_t value = int_of(bound) < 0 ? int_of(bound) + size : int_of(bound);
      bounds[i] = std::min(std::max<int64_t>(value, 0), size);
    }
    const List& list = list_of(base);
    if (bounds[0] >= bounds[1]) return list_value({});
    return list_value(List(list.begin() + bounds[0], list.begin() + bounds[1]));
  }

  Value binary(const Expr& expr) {
    const std::string& op = expr.text;
    const Value a = eval(*expr.kids[0]);
    if (op == "and") return truth(a) ? eval(*expr.kids[1]) : a;
    if (op == "or") return truth(a) ? a : eval(*expr.kids[1]);
    const Value b = eval(*expr.kids[1]);
    if (op == "~" || (op == "+" && a.is<std::string>() && b.is<std::string>())) {
      const std::string text = text_of(a) + text_of(b);
      if (text.size() > kMaxText) fail("its text is too long");
      return {text};
    }
    if (op == "+" && is_list(a) && is_list(b)) {
      List list = list_of(a);
      list.insert(list.end(), list_of(b).begin(), list_of(b).end());
      if (list.size() > kMaxSteps) fail("a list is too long");
      return list_value(std::move(list));
    }
    if (!is_number(a) || !is_number(b)) {
      fail(cat(kind_of(a), " ", op, " ", kind_of(b), " is not supported"));
    }
    const bool divides = op == "/" || op == "//" || op == "%";
    if (divides && number_of(b) == 0) fail("a division by zero");
    if (is_int(a) && is_int(b) && op != "/") return {int_arithmetic(op, int_of(a), int_of(b))};
    if (op == "+") return {number_of(a) + number_of(b)};
    if (op == "-") return {number_of(a) - number_of(b)};
    if (op == "*") return {number_of(a) * number_of(b)};
    if (op == "/") return {number_of(a) / number_of(b)};
    fail(cat("float ", op, " float is not supported"));
  }

  // Python's: // and % round towards minus infinity.
  static int64_t int_arithmetic(const std::string& op, int64_t a, int64_t b) {
    int64_t result = 0;
    bool overflow = false;
    if (op == "+") overflow = __builtin_add_overflow(a, b, &result);
    if (op == "-") overflow = __builtin_sub_overflow(a, b, &result);
    if (op == "*") overflow = __builtin_mul_overflow(a, b, &result);
    if (overflow || ((op == "//" || op == "%") && b == -1 && a == INT64_MIN)) {
      fail("a number is too large");
    }
    const bool adjust = (op == "//" || op == "%") && a % b != 0 && (a < 0) != (b < 0);
    if (op == "//") return a / b - adjust;
    if (op == "%") return a % b + (adjust ? b : 0);
    return result;
  }

  bool compare(const Expr& expr) {
    Value left = eval(*expr.kids[0]);
    for (size_t i = 0; i < expr.names.size(); ++i) {
      const Value right = eval(*expr.kids[i + 1]);
      if (!compare_two(expr.names[i], left, right)) return false;
      left = right;
    }
    return true;
  }

  static bool compare_two(const std::string& op, const Value& a, const Value& b) {
    if (op == "==") return equal(a, b);
    if (op == "!=") return !equal(a, b);
    if (op == "in") return contains(b, a);
    if (op == "not in") return !contains(b, a);
    int order = 0;
    if (is_number(a) && is_number(b)) {
      order = (number_of(a) > number_of(b)) - (number_of(a) < number_of(b));
    } else if (a.is<std::string>() && b.is<std::string>()) {
      order = a.as<std::string>().compare(b.as<std::string>());
    } else {
      fail(cat(kind_of(a), " ", op, " ", kind_of(b), " is not supported"));
    }
    if (op == "<") return order < 0;
    if (op == "<=") return order <= 0;
    return op == ">" ? order > 0 : order >= 0;
  }

  static bool contains(const Value& all, const Value& one) {
    if (all.is<std::string>()) {
      return all.as<std::string>().find(string_of(one, "in")) != std::string::npos;
    }
    for (const Value& item : items(all)) {
      if (equal(item, one)) return true;
    }
    return false;
  }

  Value call(const Expr& expr) {
    const Expr& callee = *expr.kids[0];
    const List arguments = eval_from(expr, 1);
    if (callee.kind == ExprKind::Attribute) {
      return method(callee.text, eval(*callee.kids[0]), arguments);
    }
    const std::string& name = callee.text;
    if (callee.kind != ExprKind::Name || lookup(name).is<Undefined>()) {
      fail(cat("the function ", name, " is not supported"));
    }
    if (name == "raise_exception") fail(text_of(arguments.empty() ? Value{} : arguments[0]));
    if (name == "strftime_now") return {date_};
    if (name == "namespace") {
      Dict dict;
      for (size_t i = 0; i < arguments.size(); ++i) {
        if (expr.names[i].empty()) fail("namespace() takes keywords only");
        dict[expr.names[i]] = arguments[i];
      }
      return dict_value(std::move(dict));
    }
    if (name == "range") return range(arguments);
    fail(cat("the function ", name, " is not supported"));
  }

  static Value range(const List& arguments) {
    int64_t bounds[3] = {0, 0, 1};
    if (arguments.empty() || arguments.size() > 3) fail("range() takes 1 to 3 numbers");
    for (size_t i = 0; i < arguments.size(); ++i) {
      if (!is_int(arguments[i])) fail("range() takes whole numbers");
      bounds[arguments.size() == 1 ? 1 : i] = int_of(arguments[i]);
    }
    List list;
    if (bounds[2] == 0) fail("range() with a step of 0");
    for (int64_t i = bounds[0]; bounds[2] > 0 ? i < bounds[1] : i > bounds[1]; i += bounds[2]) {
      if (list.size() >= 10'000) fail("range() is too long");
      list.push_back({i});
    }
    return list_value(std::move(list));
  }

  static Value method(const std::string& name, const Value& self, const List& arguments) {
    const auto argument = [&](size_t i) { return i < arguments.size() ? arguments[i] : Value{}; };
    if (is_dict(self)) {
      if (name == "get") {
        const auto found = dict_of(self).find(string_of(argument(0), "get"));
        if (found != dict_of(self).end()) return found->second;
        return arguments.size() > 1 ? arguments[1] : Value{None{}};
      }
      if (name == "items") return filter("items", {self}, {});
      if (name == "keys") return list_value(items(self));
    }
    if (self.is<std::string>()) {
      const std::string& text = self.as<std::string>();
      if (name == "strip" || name == "lstrip" || name == "rstrip") {
        const std::string set =
            arguments.empty() ? std::string(kSpaces) : string_of(arguments[0], "strip");
        return {strip(text, set, name != "rstrip", name != "lstrip")};
      }
      if (name == "upper" || name == "lower") return {change_case(text, name == "upper")};
      if (name == "startswith") return {text.rfind(string_of(argument(0), "startswith"), 0) == 0};
      if (name == "endswith") {
        const std::string& end = string_of(argument(0), "endswith");
        return {text.size() >= end.size() && text.substr(text.size() - end.size()) == end};
      }
      if (name == "replace") {
        return {
            replace(text, string_of(argument(0), "replace"), string_of(argument(1), "replace"))};
      }
      if (name == "split" && !arguments.empty()) {
        const std::string& separator = string_of(arguments[0], "split");
        if (separator.empty()) fail("split by an empty string");
        List parts;
        size_t begin = 0;
        for (size_t at; (at = text.find(separator, begin)) != std::string::npos;) {
          parts.push_back({text.substr(begin, at - begin)});
          begin = at + separator.size();
        }
        parts.push_back({text.substr(begin)});
        return list_value(std::move(parts));
      }
    }
    fail(cat("the method ", name, " of a ", kind_of(self), " is not supported"));
  }

  static std::string replace(const std::string& text, const std::string& from,
                             const std::string& to) {
    if (from.empty()) fail("replace of an empty string");
    std::string out;
    size_t begin = 0;
    for (size_t at; (at = text.find(from, begin)) != std::string::npos;) {
      out.append(text, begin, at - begin).append(to);
      if (out.size() > kMaxText) fail("its text is too long");
      begin = at + from.size();
    }
    return out.append(text, begin, std::string::npos);
  }

  // values[0] is what the filter is applied to.
  static Value filter(const std::string& name, const List& values,
                      const std::vector<std::string>& names) {
    for (const std::string& keyword : names) {
      if (!keyword.empty()) fail(cat("the argument ", keyword, " of the filter ", name));
    }
    const Value& value = values[0];
    if (name == "trim") return {strip(text_of(value), kSpaces, true, true)};
    if (name == "upper" || name == "lower") return {change_case(text_of(value), name == "upper")};
    if (name == "string") return {text_of(value)};
    if (name == "length" || name == "count") return {length_of(value)};
    if (name == "list") return list_value(items(value));
    if (name == "first" || name == "last") {
      const List list = items(value);
      if (list.empty()) return {};
      return name == "first" ? list.front() : list.back();
    }
    if ((name == "default" || name == "d") && values.size() > 1) {
      const bool use =
          value.is<Undefined>() || (values.size() > 2 && truth(values[2]) && !truth(value));
      return use ? values[1] : value;
    }
    if (name == "join") {
      std::string out;
      for (const Value& item : items(value)) {
        if (!out.empty() && values.size() > 1) out += text_of(values[1]);
        out += text_of(item);
      }
      return {out};
    }
    if (name == "replace" && values.size() == 3) {
      return {replace(text_of(value), text_of(values[1]), text_of(values[2]))};
    }
    if (name == "items" && is_dict(value)) {
      List pairs;
      for (const auto& [key, item] : dict_of(value)) pairs.push_back(list_value({{key}, item}));
      return list_value(std::move(pairs));
    }
    if ((name == "selectattr" || name == "rejectattr") && values.size() > 1) {
      List kept;
      for (const Value& item : items(value)) {
        const Value attribute = subscript(item, values[1], Expr{});
        List operands = {attribute};
        operands.insert(operands.end(),
                        values.begin() + std::min<ptrdiff_t>(3, values.end() - values.begin()),
                        values.end());
        const bool holds =
            values.size() > 2 ? test(string_of(values[2], "a test"), operands) : truth(attribute);
        if (holds == (name == "selectattr")) kept.push_back(item);
      }
      return list_value(std::move(kept));
    }
    fail(cat("the filter ", name, " is not supported"));
  }

  // values[0] is what the test is about.
  static bool test(const std::string& name, const List& values) {
    const Value& value = values[0];
    if (name == "defined") return !value.is<Undefined>();
    if (name == "undefined") return value.is<Undefined>();
    if (name == "none") return value.is<None>();
    if (name == "string") return value.is<std::string>();
    if (name == "number") return is_number(value);
    if (name == "integer") return value.is<int64_t>();
    if (name == "boolean") return value.is<bool>();
    if (name == "true") return value.is<bool>() && value.as<bool>();
    if (name == "false") return value.is<bool>() && !value.as<bool>();
    if (name == "mapping") return is_dict(value);
    if (name == "iterable" || name == "sequence") {
      return is_list(value) || is_dict(value) || value.is<std::string>();
    }
    if ((name == "odd" || name == "even") && is_int(value)) {
      return (int_of(value) % 2 != 0) == (name == "odd");
    }
    if ((name == "equalto" || name == "eq" || name == "==") && values.size() == 2) {
      return equal(value, values[1]);
    }
    if (name == "in" && values.size() == 2) return contains(values[1], value);
    fail(cat("the test ", name, " is not supported"));
  }

  std::string date_;
  std::vector<Dict> scopes_;
  int64_t steps_ = 0;
};

}  // namespace

std::string render_template(const std::string& source, const ChatContext& context) {
  const Nodes nodes = Parser(Lexer(source).run()).run();
  std::string out;
  Interpreter(context).run(nodes, &out);
  return out;
}

std::string render_chat(const Tokenizer& tokenizer, const std::string& user_message) {
  BBB_CHECK(!tokenizer.chat_template().empty(), "the model has no chat template; use --prompt");
  ChatContext context;
  context.messages = {{"user", user_message}};
  if (tokenizer.bos()) context.bos_token = tokenizer.piece(*tokenizer.bos(), true);
  if (tokenizer.eos()) context.eos_token = tokenizer.piece(*tokenizer.eos(), true);
  return render_template(tokenizer.chat_template(), context);
}

}  // namespace bbb::data
