// Reading a chat format from its Jinja template, in three steps:
//   1. canonical_template(): one spelling for each construct.
//   2. plain_template(): what cannot matter, such as branches for tools, goes.
//   3. kShape: one regular expression, the shape of all known formats, must match everything that
//   is left.
// So a template is either read completely or refused.
#include "data/chat_format.h"

#include <algorithm>
#include <map>

#include "data/chat_pattern.h"
#include "data/chat_template.h"
#include "data/files.h"
#include "data/json.h"
#include "quant/check.h"

namespace bbb::data {

namespace {

constexpr const char* kUnknown =
    "the model's chat template is not one of the formats that bbb knows (ChatML, Llama-2, Llama-3, "
    "Mistral, Zephyr, DeepSeek); write the special tokens yourself with --prompt TEXT --special";
constexpr const char* kRoles[] = {"system", "user", "assistant"};

// The shape of all known formats.
constexpr const char* kShape =
    "^(?:{%alternate (?<alternate>[^\\x02]*)%})?(?<start1>LINE)"
    "(?:{%if messages[0].role=='system'%}(?<with>BODY)(?:{%else%}(?<without>BODY))?{%endif%})?"
    "(?:{%alternate (?<alternate>[^\\x02]*)%})?(?<start2>LINE)"
    "(?:{%if HAS_SYSTEM%}(?<use>LINE){%endif%})?"
    "(?:{%if (?:messages[0].role!='system'|(?<none>no_system))%}(?<default>LINE){%endif%})?"
    "{%for message in (?<list>messages|rest)%}"
    "(?:{%if loop.first%}(?<first>LINE)(?<looped>){%endif%})?"
    "(?:{%if loop.first and messages[0].role!='system'%}(?<default>LINE){%endif%})?"
    "(?:{%alternate (?<alternate>[^\\x02]*)%})?"
    "(?:{%if loop.first and HAS_SYSTEM%}{%set content%}(?<content>LINE){%endset%}{%else%}"
    "{%set content%}{{message.content}}{%endset%}{%endif%})?"
    "(?<before>LINE)(?<chain>{%if message.role==[^\\x02]*%}BODY(?:{%el[^\\x02]*%}BODY)*{%endif%})?"
    "(?<after>LINE)(?:{%if loop.last and add_generation_prompt%}(?<generation>LINE)(?<looped>)"
    "{%endif%})?"
    "{%endfor%}(?<end>LINE)(?:{%if add_generation_prompt%}(?<generation>LINE){%endif%})?$";

// Marks of the families, all in the text of a turn of each role with its generation prompt.
struct Family {
  const char* name;
  std::vector<std::string> marks;
};
const Family kFamilies[] = {
    {"ChatML", {"<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"}},
    {"Llama-3", {"<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"}},
    {"Llama-2", {"[INST]", "<<SYS>>\n", "\n<</SYS>>\n\n", "[/INST]"}},
    {"Mistral", {"[INST]", "[/INST]"}},
    {"Zephyr", {"<|user|>\n", "<|assistant|>", "\3eos_token\4"}},
    {"DeepSeek", {"<｜User｜>", "<｜Assistant｜>"}},
    {"DeepSeek", {"User: ", "Assistant:", "\3eos_token\4"}},
    {"DeepSeek", {"### Instruction:\n", "### Response:", "\n<|EOT|>\n"}},
};

// Without the white space at both ends, as Python sees it.
std::string trimmed(std::string_view text) {
  static constexpr std::string_view kSpaces[] = {
      " ",      "\t",     "\n",     "\v",     "\f",     "\r",     "\x1c",   "\x1d",
      "\x1e",   "\x1f",   "\u0085", "\u00a0", "\u1680", "\u2000", "\u2001", "\u2002",
      "\u2003", "\u2004", "\u2005", "\u2006", "\u2007", "\u2008", "\u2009", "\u200a",
      "\u2028", "\u2029", "\u202f", "\u205f", "\u3000"};
  for (bool more = true; more;) {
    more = false;
    for (const std::string_view space : kSpaces) {
      const bool front = text.starts_with(space), back = !front && text.ends_with(space);
      if (front) text.remove_prefix(space.size());
      if (back) text.remove_suffix(space.size());
      more = more || front || back;
    }
  }
  return std::string(text);
}

// Fills the holes of a line with `values`, by name.
std::string filled(const std::string& line, std::map<std::string, std::string> values,
                   const ChatContext& context) {
  values["bos_token"] = context.bos_token;
  values["eos_token"] = context.eos_token;
  std::string out;
  for (size_t at = 0; at < line.size();) {
    const size_t open = std::min(line.find('\3', at), line.size());
    out += line.substr(at, open - at);
    if (open == line.size()) break;
    const size_t close = line.find('\4', open);
    std::string hole = line.substr(open + 1, close - open - 1);
    at = close + 1;
    const size_t quote = hole.find('\'');
    if (quote != std::string::npos) {  // a function of one string
      std::string argument = hole.substr(quote + 1, hole.rfind('\'') - quote - 1);
      replace_all(&argument, "\5", "'");
      BBB_CHECK(hole.starts_with("strftime"),
                "the chat template refuses these messages: ", argument);
      std::tm date{};
      localtime_r(&context.now, &date);
      char text[256];
      out.append(text, std::strftime(text, sizeof(text), argument.c_str(), &date));
      continue;
    }
    const bool trim = hole.ends_with("|trim");
    const std::string& value = values[trim ? hole.substr(0, hole.size() - 5) : hole];
    out += trim ? trimmed(value) : value;
  }
  return out;
}

size_t role_index(const std::string& role) {
  const size_t index = static_cast<size_t>(std::ranges::find(kRoles, role) - kRoles);
  BBB_CHECK(index < std::size(kRoles), "the role '", role,
            "' is not one of system, user and assistant");
  return index;
}

}  // namespace

ChatFormat::ChatFormat(const std::string& jinja) {
  static Pattern shape(kShape);
  const std::string text = plain_template(jinja);
  BBB_CHECK(shape.find(text), kUnknown);
  alternate_ = shape.group("alternate");
  if (alternate_) replace_all(&*alternate_, "\5", "'");
  first_content_ = shape.group("content");
  before_turn_ = shape.text("before");
  after_turn_ = shape.text("after");
  end_ = shape.text("end");
  generation_ = shape.text("generation");
  any_system_ = shape.group("none").has_value();
  start_with_system_ = start_without_ = shape.text("start1");
  read_prologue(shape.text("with"), shape.text("without"));
  // A loop over the rest may run no turn, and then not write what stands in its first or last.
  BBB_CHECK(
      skips_system_ == (shape.text("list") == "rest") && !(skips_system_ && shape.group("looped")),
      kUnknown);
  start_with_system_ += shape.text("start2") + shape.text("use") + shape.text("first");
  start_without_ += shape.text("start2") + (default_system_ ? shape.text("use") : "") +
                    shape.text("first") + shape.text("default");
  read_turns(shape.group("chain"));
  check_lines();
  recognize();
}

// What the template does where the first message is the system's, and where it is not: text, and
// where the system prompt and the turns are.
void ChatFormat::read_prologue(const std::string& with_system, const std::string& without_system) {
  static Pattern step("\\G(?<line>LINE)(?:{%set (?<name>\\w+)%}(?<value>LINE){%endset%}|$)");
  bool rest_without = false;
  for (const bool with : {true, false}) {
    const std::string& body = with ? with_system : without_system;
    for (size_t at = 0; at < body.size(); at = step.end()) {
      BBB_CHECK(step.find(body, at), kUnknown);
      (with ? start_with_system_ : start_without_) += step.text("line");
      const std::string name = step.text("name"), value = step.text("value");
      if (with && (name == "rest" || name == "messages")) {
        BBB_CHECK(value == marked("{{messages[1:]}}"), kUnknown);
        skips_system_ = true;
        rest_without = rest_without || name == "messages";
      } else if (name == "rest") {
        BBB_CHECK(value == marked("{{messages}}"), kUnknown);
        rest_without = true;
      } else if (name == "system" && with) {
        system_ = value;
      } else if (name == "system") {
        if (value != marked("{{false}}")) default_system_ = value;
      } else {
        BBB_CHECK(name.empty(), kUnknown);
      }
    }
  }
  BBB_CHECK(skips_system_ == rest_without, kUnknown);
}

void ChatFormat::read_turns(const std::optional<std::string>& chain) {
  static Pattern branch(
      "\\G{%(?<test>if|elif|else)(?<roles>(?: (?:or )?message.role=='\\w+')*)%}"
      "(?:{%if loop.(?<where>first|last) and HAS_SYSTEM%}(?<system>LINE){%else%}(?<line>LINE)"
      "{%endif%}|(?<line>LINE))(?:{%endif%}$)?");
  if (!chain) turns_.fill(Turn{});  // before_turn_ holds it
  for (size_t at = 0; chain && at < chain->size(); at = branch.end()) {
    BBB_CHECK(branch.find(*chain, at), kUnknown);
    Turn turn{branch.text("line"), branch.text("system"), SystemIn::NoTurn};
    if (branch.group("where"))
      turn.system_in = branch.text("where") == "first" ? SystemIn::FirstTurn : SystemIn::LastTurn;
    for (size_t role = 0; role < turns_.size(); ++role) {
      const bool named =
          branch.text("roles").find(cat("'", kRoles[role], "'")) != std::string::npos;
      BBB_CHECK(!named || !turns_[role], kUnknown);
      if (named || (branch.text("test") == "else" && !turns_[role])) turns_[role] = turn;
    }
  }
}

// Every hole must be one that render() fills where the line is used.
void ChatFormat::check_lines() const {
  const std::string call = "|(?:strftime_now|raise_exception)\\('[^']*'\\)",
                    turn = "|message.role|message.content(?:\\|trim)?",
                    system = "|system(?:\\|trim)?";
  const auto check = [](const std::string& line, const std::string& holes) {
    Pattern known("^(?:[^\\x03\\x04]|{{(?:bos_token|eos_token" + holes + ")}})*$");
    BBB_CHECK(known.find(line), kUnknown);
  };
  check(start_with_system_, call + (system_ ? system : "") + "|messages[0].content(?:\\|trim)?");
  check(start_without_, call + (default_system_ ? system : ""));
  check(system_.value_or(""), "|messages[0].content(?:\\|trim)?");
  for (const Line& line : {end_, generation_, default_system_.value_or("")}) check(line, call);
  check(first_content_.value_or(""), turn + system);
  const std::string turn_holes = call + turn + (first_content_ ? "|content(?:\\|trim)?" : "");
  check(before_turn_ + after_turn_, turn_holes);
  for (const auto& one : turns_) {
    if (one) check(one->line, turn_holes), check(one->with_system, turn_holes + system);
  }
}

void ChatFormat::recognize() {
  std::string all = first_content_.value_or("") + generation_;
  for (size_t role = 0; role < turns_.size(); ++role) {
    if (!turns_[role]) continue;
    std::string turn = before_turn_ + turns_[role]->line + after_turn_;
    replace_all(&turn, marked("{{message.role}}"), kRoles[role]);
    all += turn;
  }
  for (const Family& family : kFamilies) {
    const bool has_all = std::ranges::all_of(
        family.marks, [&](const std::string& mark) { return all.find(mark) != std::string::npos; });
    if (has_all && family_.empty()) family_ = family.name;
  }
  BBB_CHECK(!family_.empty(), kUnknown);
}

std::string ChatFormat::render(const std::vector<ChatMessage>& messages,
                               GenerationPrompt generation, const ChatContext& context) const {
  BBB_CHECK(!messages.empty(), "a chat needs a message");
  for (const ChatMessage& message : messages) role_index(message.role);
  const auto is_system = [](const ChatMessage& message) { return message.role == "system"; };
  const bool first_is_system = is_system(messages[0]);
  const bool has_system = any_system_ ? std::ranges::any_of(messages, is_system) : first_is_system;
  std::map<std::string, std::string> values = {{"messages[0].content", messages[0].content}};
  const bool system = has_system ? system_.has_value() : default_system_.has_value();
  if (system) values["system"] = filled(has_system ? *system_ : *default_system_, values, context);

  std::string out = filled(has_system ? start_with_system_ : start_without_, values, context);
  const size_t begin = skips_system_ && first_is_system ? 1 : 0;
  for (size_t i = begin; i < messages.size(); ++i) {
    const ChatMessage& message = messages[i];
    BBB_CHECK(!alternate_ || (message.role == "user") == ((i - begin) % 2 == 0),
              "the chat template refuses these messages: ", alternate_.value_or(""));
    values["message.role"] = message.role;
    values["message.content"] = values["content"] = message.content;
    if (first_content_ && system && i == begin)
      values["content"] = filled(*first_content_, values, context);
    const std::optional<Turn>& turn = turns_[role_index(message.role)];
    BBB_CHECK(turn || (i == 0 && first_is_system && system_),
              "the chat template would drop message ", i + 1, ", which is the ", message.role,
              "'s");
    out += filled(before_turn_, values, context);
    if (turn) {
      const bool holds = (turn->system_in == SystemIn::FirstTurn && i == begin) ||
                         (turn->system_in == SystemIn::LastTurn && i + 1 == messages.size());
      out += filled(holds && system ? turn->with_system : turn->line, values, context);
    }
    out += filled(after_turn_, values, context);
  }
  out += filled(end_, values, context);
  return generation == GenerationPrompt::Add ? out + filled(generation_, values, context) : out;
}

std::string render_chat(const Tokenizer& tokenizer, const std::vector<ChatMessage>& messages,
                        GenerationPrompt generation) {
  BBB_CHECK(!tokenizer.chat_template().empty(),
            "the model has no chat template; write the special tokens yourself with --prompt TEXT "
            "--special");
  ChatContext context;
  context.now = std::time(nullptr);
  if (tokenizer.bos()) context.bos_token = tokenizer.piece(*tokenizer.bos(), true);
  if (tokenizer.eos()) context.eos_token = tokenizer.piece(*tokenizer.eos(), true);
  return ChatFormat(tokenizer.chat_template()).render(messages, generation, context);
}

std::vector<ChatMessage> parse_messages(const std::string& text, const std::string& where) {
  const nlohmann::json list = parse_json(text, where);
  BBB_CHECK(list.is_array() && !list.empty(), where,
            ": not a list of messages [{\"role\": .., \"content\": ..}, ..]");
  std::vector<ChatMessage> messages;
  for (const nlohmann::json& one : list) {
    const std::string name = cat(where, ": message ", messages.size() + 1);
    BBB_CHECK(one.is_object() && one.size() == 2, name, " is not {\"role\": .., \"content\": ..}");
    for (const char* key : {"role", "content"}) {
      BBB_CHECK(one.contains(key) && one.at(key).is_string(), name, " has no text as its ", key);
    }
    messages.push_back({one.at("role"), one.at("content")});
    BBB_CHECK(std::ranges::count(kRoles, messages.back().role) > 0, name, ": the role '",
              printable(messages.back().role), "' is not one of system, user and assistant");
  }
  return messages;
}

}  // namespace bbb::data
