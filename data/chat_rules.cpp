#include <algorithm>
#include <utility>
#include <vector>

#include "data/chat_pattern.h"
#include "data/chat_template.h"
#include "quant/check.h"

namespace bbb::data {

namespace {

// Rewrites that change nothing for messages of system, user and assistant whose contents are text,
// without tools. transformers defines `tools` (none) and strftime_now, and no other variable.
constexpr std::pair<const char*, const char*> kRules[] = {
    // Branches that are never or always taken.
    {"{%if DEAD%}BODY{%endif%}", ""},
    {"{%if DEAD%}BODY{%else%}(BODY){%endif%}", "$1"},
    {"{%if DEAD%}BODY{%elif ", "{%if "},
    {"{%elif DEAD%}BODY(?={%e)", ""},
    {"{%if TRUE%}(BODY)(?:{%el[^\\x02]*%}BODY)*{%endif%}", "$1"},
    // Statements without effect.
    {"{%if [^\\x02]*%}{%endif%}", ""},
    {"{%set (?:tools_in_user_message|user_messages)%}LINE{%endset%}", ""},
    {"{%(?:end)?generation%}", ""},
    // A loop whose result stays inside it.
    {"{%set (\\w+)%}{{\\[\\]}}{%endset%}{%for message in rest%}{%if message.role not "
     "in \\['tool','tool_results'\\] and not message.get\\('tool_calls'\\)%}{%set "
     "\\1%}{{\\1}}{{\\[message\\]}}{%endset%}{%endif%}{%endfor%}{%for message in "
     "\\1%}BODY{%endfor%}",
     ""},
    // The check of roles, in the loop over the turns or in one of its own.
    {"{%set ns%}{{namespace\\((?:index=0)?\\)}}{%endset%}(?:{%set ns.index%}{{0}}{%endset%})?"
     "({%for message in (?:messages|rest)%}{%if \\(message.role=='user'\\)!=\\()ns.index%2==0"
     "(\\)%}LINE{%endif%}){%set ns.index%}{{ns.index}}{{1}}{%endset%}{%endfor%}",
     "${1}loop.index0%2==0$2{%endfor%}"},
    {"{%if "
     "\\(message.role=='user'\\)!=\\(loop.index0%2==0\\)%}{{raise_exception\\('([^\\x04]*)'\\)}}"
     "{%endif%}",
     "{%alternate $1%}"},
    {"{%for message in (messages|rest)%}({%alternate [^\\x02]*%}){%endfor%}"
     "(?=[\\s\\S]*{%for message in \\1%})",
     "$2"},
    // "Is there any system message?"
    {"{%set ns%}{{namespace\\(found=false\\)}}{%endset%}{%for message in messages%}{%if "
     "message.role=='system'%}{%set ns.found%}{{true}}{%endset%}{%endif%}{%endfor%}(LINE){%if not "
     "ns.found%}",
     "$1{%if no_system%}"},
    // One chain of branches for the roles.
    {"{%else%}({%if message.role==[^\\x02]*%}BODY(?:{%el[^\\x02]*%}BODY)*{%endif%}){%endif%}",
     "{%el$1"},
    {"{%el{%if", "{%elif"},
    {"({%if message.role=='\\w+'%}LINE(?:{%elif message.role=='\\w+'%}LINE)*){%endif%}"
     "(?={%if message.role=='\\w+'%}LINE(?:{%elif message.role=='\\w+'%}LINE)*{%endif%})",
     "$1{%chain%}"},
    {"{%chain%}{%if ", "{%elif "},
    // BOS put in front of the first turn.
    {"{%set (\\w+)%}(LINE){%endset%}{%if loop.first%}{%set "
     "\\1%}{{bos_token}}{{\\1}}{%endset%}{%endif%}{{\\1}}",
     "{%if loop.first%}{{bos_token}}{%endif%}$2"},
};

// A constant that is set once, outside of branches and loops, and that no condition asks for.
bool replace_constant(std::string* text) {
  static Pattern set(
      "^(?<before>LINE){%set "
      "(?<name>(?!tools|custom_tools|builtin_tools|add_generation_prompt|USE_)"
      "\\w+)%}(?<value>(?:[^\\x01-\\x04]|{{strftime_now\\([^\\x04]*\\)}})*){%endset%}(?<after>["
      "\\s\\S]*)"
      "$");
  if (!set.find(*text)) return false;
  std::string after = set.text("after");
  const std::string name = set.text("name");
  if (Pattern("{%[^\\x02]*\\b" + name + "\\b").find(after)) return false;
  replace_all(&after, marked("{{" + name + "}}"), set.text("value"));
  *text = set.text("before") + after;
  return true;
}

// A name for the message's content, in the branch or loop that sets it.
bool replace_content(std::string* text) {
  static Pattern set(
      "{%set content%}{{(?<value>message.content(?:\\|trim)?)}}{%endset%}(?<scope>BODY)");
  for (size_t from = 0; set.find(*text, from); from = set.begin() + 1) {
    std::string scope = set.text("scope");
    const bool again = scope.find(marked("{%set content%}")) != std::string::npos;
    if (again || scope.find(marked("{{content")) == std::string::npos) continue;
    replace_all(&scope, marked("{{content}}"), marked("{{" + set.text("value") + "}}"));
    replace_all(&scope, marked("{{content|trim}}"), marked("{{message.content|trim}}"));
    text->replace(set.begin(), set.end() - set.begin(), scope);
    return true;
  }
  return false;
}

}  // namespace

std::string plain_template(const std::string& jinja) {
  static std::vector<std::pair<Pattern, std::string>> rules = [] {
    std::vector<std::pair<Pattern, std::string>> made;
    for (const auto& [pattern, with] : kRules) made.emplace_back(Pattern(pattern), marked(with));
    return made;
  }();
  std::string text = canonical_template(jinja), before;
  // Real templates have about 60; the time to match grows with the square of their number.
  constexpr int64_t kMostTags = 500;
  BBB_CHECK(std::count(text.begin(), text.end(), '\1') <= kMostTags, "the chat template has over ",
            kMostTags, " statements");
  while (before != text) {
    before = text;
    for (auto& [pattern, with] : rules) pattern.replace(&text, with);
    while (replace_constant(&text) || replace_content(&text)) {
    }
  }
  return text;
}

}  // namespace bbb::data
