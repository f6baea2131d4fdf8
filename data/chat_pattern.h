// Regular expressions over canonical templates (chat_template.h).
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>

namespace bbb::data {

void replace_all(std::string* text, std::string_view from, std::string_view to);

// Writes {% %} {{ }} as canonical templates have them.
std::string marked(std::string text);

// A PCRE2 expression in which {% %} {{ }} mean tags, a point means itself, LINE any text with
// holes, BODY anything in which each if and for has its end, and the conditions DEAD and TRUE, of
// which a chat without tools knows the outcome, what chat_pattern.cpp says. All throw Error where a
// template makes the search too long.
class Pattern {
 public:
  explicit Pattern(const std::string& pattern);
  bool find(const std::string& text, size_t from = 0);
  // Of the last match: its bounds, and a named group, none if it took no part.
  size_t begin() const;
  size_t end() const;
  std::optional<std::string> group(const char* name) const;
  std::string text(const char* name) const { return group(name).value_or(""); }
  // Replaces every match, `with` naming groups as $1.
  void replace(std::string* text, const std::string& with);

 private:
  std::shared_ptr<void> code_, match_;
};

}  // namespace bbb::data
