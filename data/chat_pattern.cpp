#include "data/chat_pattern.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "quant/check.h"

namespace bbb::data {

namespace {

// Names for parts of patterns. BODY is anything in which each if and for has its end.
constexpr std::pair<const char*, const char*> kParts[] = {
    {"DEAD",
     "(?:not tools is defined|not add_generation_prompt is defined|TOOLCALL|"
     "(?:tools|tools is not none|(?:custom_tools|builtin_tools) is defined|"
     "tools_in_user_message and not tools is none|"
     "USE_DEFAULT_PROMPT==true|false==true)(?: and (?:(?! or )[^\\x02])*)?|"
     "builtin_tools is defined or tools is not none)"},
    {"TRUE",
     "(?:not \\(TOOLCALL\\)|(?:message|messages[0]).content is string|"
     "strftime_now is defined|not date_string is defined|"
     "not tools_in_user_message is defined)"},
    {"TOOLCALL", "ONECALL(?: or ONECALL)*"},
    {"ONECALL",
     "\\(?(?:message.role=='(?:tool|tool_results|tool_calls|ipython)'|"
     "'tool_calls' in message|message.tool_calls(?: is defined)?"
     "(?: and message.tool_calls is not none)?)\\)?"},
    {"HAS_SYSTEM", "system(?: is defined|!=false)"},
    {"LINE", "[^\\x01\\x02]*"},
    {"BODY", "(?&body)"},
    {".", "\\."},
    {"[0]", "\\[0\\]"},
    {"[1:]", "\\[1:\\]"},
};
constexpr const char* kBody =
    "(?(DEFINE)(?<body>(?:[^\\x01]++|\\x01(?!if |for |el|endif|endfor)[^\\x02]*+\\x02|"
    "\\x01(?:if|for) [^\\x02]*+\\x02(?&body)(?:\\x01el[^\\x02]*+\\x02(?&body))*+"
    "\\x01end(?:if|for)\\x02)*+))";

pcre2_code* code_of(const std::shared_ptr<void>& code) {
  return static_cast<pcre2_code*>(code.get());
}
pcre2_match_data* match_of(const std::shared_ptr<void>& match) {
  return static_cast<pcre2_match_data*>(match.get());
}
PCRE2_SPTR bytes(const char* text) { return reinterpret_cast<PCRE2_SPTR>(text); }

}  // namespace

void replace_all(std::string* text, std::string_view from, std::string_view to) {
  for (size_t at = 0; (at = text->find(from, at)) != std::string::npos; at += to.size())
    text->replace(at, from.size(), to);
}

std::string marked(std::string text) {
  for (const auto& [from, to] : {std::pair{"{%", "\1"}, {"%}", "\2"}, {"{{", "\3"}, {"}}", "\4"}})
    replace_all(&text, from, to);
  return text;
}

Pattern::Pattern(const std::string& pattern) {
  std::string text = marked(pattern);
  for (const auto& [name, part] : kParts) replace_all(&text, name, part);
  text += kBody;
  int error = 0;
  size_t offset = 0;
  code_.reset(pcre2_compile(bytes(text.data()), text.size(), PCRE2_DOTALL | PCRE2_DUPNAMES, &error,
                            &offset, nullptr),
              pcre2_code_free);
  BBB_CHECK(code_ != nullptr, "internal error: the pattern ", text, " fails at ", offset);
  match_.reset(pcre2_match_data_create_from_pattern(code_of(code_), nullptr),
               pcre2_match_data_free);
}

bool Pattern::find(const std::string& text, size_t from) {
  const int found = pcre2_match(code_of(code_), bytes(text.data()), text.size(), from, 0,
                                match_of(match_), nullptr);
  BBB_CHECK(found > 0 || found == PCRE2_ERROR_NOMATCH, "the chat template is too complex");
  return found > 0;
}

size_t Pattern::begin() const { return pcre2_get_ovector_pointer(match_of(match_))[0]; }
size_t Pattern::end() const { return pcre2_get_ovector_pointer(match_of(match_))[1]; }

std::optional<std::string> Pattern::group(const char* name) const {
  PCRE2_UCHAR* text = nullptr;
  size_t size = 0;
  if (pcre2_substring_get_byname(match_of(match_), bytes(name), &text, &size) < 0) return {};
  const std::string out(reinterpret_cast<const char*>(text), size);
  pcre2_substring_free(text);
  return out;
}

void Pattern::replace(std::string* text, const std::string& with) {
  size_t size = 2 * text->size() + 4096;
  std::string out(size, '\0');
  const int count =
      pcre2_substitute(code_of(code_), bytes(text->data()), text->size(), 0,
                       PCRE2_SUBSTITUTE_GLOBAL, match_of(match_), nullptr, bytes(with.data()),
                       with.size(), reinterpret_cast<PCRE2_UCHAR*>(out.data()), &size);
  BBB_CHECK(count >= 0, "the chat template is too complex");
  text->assign(out, 0, size);
}

}  // namespace bbb::data
