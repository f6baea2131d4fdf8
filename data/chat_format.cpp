#include "data/chat_format.h"

#include <algorithm>
#include <map>

#include "data/chat_known.h"
#include "data/files.h"
#include "data/json.h"
#include "data/pre_tokenizer.h"
#include "quant/check.h"

namespace bbb::data {

namespace {

constexpr const char* kRoles[] = {"system", "user", "assistant"};
// What stands for the content of an assistant's message, or a part of it.
constexpr const char* kContents[] = {"content", "trimmed", "answer", "reply", "thought"};
constexpr const char* kInstead =
    "; write the special tokens yourself: bbb decode --prompt TEXT --special";
// A default that a template may begin with. It never applies: transformers always sets
// add_generation_prompt.
const std::string kPreamble =
    "\1if not add_generation_prompt is defined\2"
    "\1set add_generation_prompt=false\2\1endif\2";
const std::string kBos = "\3bos_token\4";

using Values = std::map<std::string, std::string>;

// The text without white space at both ends. Like Python, counts four control characters as white
// space.
std::string trimmed(std::string_view text) {
  static const std::string spaces = std::string(kWhiteSpace) + "\x1c\x1d\x1e\x1f";
  const auto is_space = [](std::string_view character) {
    const size_t whole = static_cast<size_t>(utf8_length(character));  // 0: cut or malformed
    return whole > 0 && whole == character.size() && spaces.find(character) != std::string::npos;
  };
  size_t size = 0;
  while (is_space(text.substr(0, size = static_cast<size_t>(utf8_length(text)))))
    text.remove_prefix(size);
  const auto last = [&] {
    size_t at = text.empty() ? 0 : text.size() - 1;
    while (at > 0 && (static_cast<uint8_t>(text[at]) & 0xc0) == 0x80) --at;
    return text.substr(at);
  };
  while (is_space(last())) text.remove_suffix(last().size());
  return std::string(text);
}

// Replaces each {name} in a text of KnownChat with its value.
std::string filled(std::string_view text, const Values& values) {
  std::string out;
  for (size_t open; (open = text.find('{')) != std::string_view::npos;) {
    const size_t close = text.find('}', open);
    out += text.substr(0, open);
    out += values.at(std::string(text.substr(open + 1, close - open - 1)));
    text.remove_prefix(close + 1);
  }
  return out += text;
}

// Where filled(text) holds the content of a message: its first and its last form.
std::pair<size_t, size_t> content_of(std::string_view text, const Values& values) {
  size_t size = 0, begin = std::string::npos, end = 0;
  for (size_t open; (open = text.find('{')) != std::string_view::npos;) {
    const size_t close = text.find('}', open);
    const std::string name(text.substr(open + 1, close - open - 1));
    size += open;
    const bool content = std::ranges::count(kContents, name) > 0;
    if (content) begin = std::min(begin, size);
    size += values.at(name).size();
    if (content) end = size;
    text.remove_prefix(close + 1);
  }
  return {begin, end};
}

void set_content(Values* values, const std::string& content) {
  const std::string think = "</think>";
  const size_t end = content.rfind(think);
  (*values)["content"] = content;
  (*values)["trimmed"] = trimmed(content);
  (*values)["answer"] = end == std::string::npos ? content : content.substr(end + think.size());
}

std::string without_newlines(const std::string& text) {
  const size_t begin = text.find_first_not_of('\n');
  return begin == std::string::npos ? ""
                                    : text.substr(begin, text.find_last_not_of('\n') + 1 - begin);
}

// The text between <think> and </think>; nothing where there is no </think>.
std::string thought_in(const std::string& content) {
  const std::string begin = "<think>";
  const size_t end = content.find("</think>");
  if (end == std::string::npos) return "";
  const std::string thought = content.substr(0, end);
  const size_t at = thought.rfind(begin);
  return without_newlines(at == std::string::npos ? thought : thought.substr(at + begin.size()));
}

bool is_system(const ChatMessage& message) { return message.role == "system"; }

// The index of the last user's message that is no result of a tool; the last index if there is
// none.
size_t last_question(const std::vector<ChatMessage>& messages) {
  for (size_t i = messages.size(); i-- > 0;)
    if (messages[i].role == "user" && !(messages[i].content.starts_with("<tool_response>") &&
                                        messages[i].content.ends_with("</tool_response>")))
      return i;
  return messages.size() - 1;
}

// The text that `known` writes for a message; null if the format has no such turn.
const char* turn_text(const KnownChat& known, const ChatMessage& message, bool last) {
  const char* text = is_system(message)             ? known.system
                     : message.role == "user"       ? known.user
                     : last && known.last_assistant ? known.last_assistant
                                                    : known.assistant;
  return text ? text : known.turn;
}

}  // namespace

ChatFormat::ChatFormat(const std::string& jinja) {
  std::string text = canonical_template(jinja);
  if (text.starts_with(kPreamble)) text.erase(0, kPreamble.size());
  bos_ = text.starts_with(kBos);
  if (bos_) text.erase(0, kBos.size());
  size_t most = 0;
  const char* nearest = "every known one";
  for (const KnownChat& known : known_chats()) {
    size_t reached = 0;
    const auto texts = match_template(known.pattern, text, &reached);
    if (texts) {
      known_ = &known;
      texts_ = *texts;
      return;
    }
    if (reached > most) most = reached, nearest = known.name;
  }
  constexpr size_t kShown = 60;
  throw Error(cat("it differs from ", nearest, " at '",
                  printable(shown_template(text.substr(most, kShown))), "'"));
}

RenderedChat ChatFormat::render_answers(const std::vector<ChatMessage>& messages,
                                        GenerationPrompt generation,
                                        const ChatContext& context) const {
  BBB_CHECK(!messages.empty(), "a chat needs a message");
  for (const ChatMessage& message : messages)
    BBB_CHECK(std::ranges::count(kRoles, message.role) > 0, "the role '", message.role,
              "' is not one of system, user and assistant");
  Values values = {{"bos", context.bos_token}, {"eos", context.eos_token}};
  for (size_t i = 0; i < texts_.size(); ++i) values[std::to_string(i)] = texts_[i];
  if (known_->date >= 0) {
    std::string& date = values[std::to_string(known_->date)];
    std::tm now{};
    localtime_r(&context.now, &now);
    char text[256];
    const size_t size = std::strftime(text, sizeof(text), date.c_str(), &now);
    BBB_CHECK(size > 0, "the chat template's date format '", printable(date), "' gives no date");
    date.assign(text, size);
  }

  const bool own_turn = known_->system_in == SystemIn::OwnTurn;
  std::optional<std::string> system;  // the system prompt that a user's turn will carry
  RenderedChat chat;
  std::string& out = chat.text;
  out = (bos_ ? context.bos_token : "") + filled(known_->start, values);
  size_t begin = 0;  // the first turn of the loop
  set_content(&values, messages[0].content);
  if (is_system(messages[0])) {
    begin = known_->first_system || !own_turn;
    if (known_->first_system) out += filled(known_->first_system, values);
    if (!own_turn) system = messages[0].content;
  } else if (known_->no_system &&
             !(known_->no_system_at_all && std::ranges::any_of(messages, is_system)) &&
             !(known_->no_system_unless &&
               messages[0].content.find(known_->no_system_unless) != std::string::npos)) {
    (own_turn ? out : system.emplace()) += filled(known_->no_system, values);
  }

  for (size_t i = begin; known_->alternate && i < messages.size(); ++i)
    BBB_CHECK((messages[i].role == "user") == ((i - begin) % 2 == 0),
              "the chat template refuses these messages: ", filled(known_->alternate, values));
  const size_t question = last_question(messages);
  for (size_t i = begin; i < messages.size(); ++i) {
    const ChatMessage& message = messages[i];
    const bool last = i + 1 == messages.size();
    const char* text = turn_text(*known_, message, last);
    const std::string thought = thought_in(message.content);
    const bool thinks = known_->thinking && message.role == "assistant" && i > question &&
                        (!thought.empty() || (last && known_->thinking_ends));
    if (thinks) text = known_->thinking;
    BBB_CHECK(text || !known_->refusal,
              "the chat template refuses these messages: ", filled(known_->refusal, values));
    BBB_CHECK(text, "message ", i + 1, " has no place in the chat template: it is the ",
              message.role, "'s");
    values["role"] = message.role;
    set_content(&values, message.content);
    values["thought"] = thought;
    const std::string& answer = values["answer"];
    const bool whole = answer.size() == message.content.size();
    values["reply"] = whole && !thinks
                          ? answer
                          : answer.substr(std::min(answer.find_first_not_of('\n'), answer.size()));
    const bool carries = known_->system_in == SystemIn::FirstTurn ? i == begin : last;
    if (system && carries && message.role == "user") {
      values["system"] = *system;
      set_content(&values, filled(known_->content_with_system, values));
    }
    const std::string turn = filled(text, values);
    if (message.role == "assistant") {
      const std::string prompt = filled(known_->end, values) + filled(known_->generation, values);
      const auto [begin, end] = content_of(text, values);
      const auto leaves = std::mismatch(turn.begin(), turn.end(), prompt.begin(), prompt.end());
      const auto shared = static_cast<size_t>(leaves.first - turn.begin());
      chat.answers.push_back(
          {out.size() + std::min(shared, begin), out.size() + end, out.size() + turn.size()});
    }
    out += turn;
  }
  out += filled(known_->end, values);
  if (generation == GenerationPrompt::Add) out += filled(known_->generation, values);
  return chat;
}

// `instead`: what the user can do without a format.
static ChatFormat format_of(const Tokenizer& tokenizer, const std::string& model,
                            const char* instead) {
  BBB_CHECK(!tokenizer.chat_template().empty(), model, " has no chat template", instead);
  try {
    return ChatFormat(tokenizer.chat_template());
  } catch (const Error& error) {
    throw Error(
        cat(model, ": the chat template is not one that bbb knows: ", error.what(), instead));
  }
}

static ChatContext context_of(const Tokenizer& tokenizer, std::time_t now) {
  ChatContext context;
  context.now = now;
  if (tokenizer.bos()) context.bos_token = tokenizer.piece(*tokenizer.bos(), true);
  if (tokenizer.eos()) context.eos_token = tokenizer.piece(*tokenizer.eos(), true);
  return context;
}

std::string render_chat(const Tokenizer& tokenizer, const std::vector<ChatMessage>& messages,
                        const std::string& model) {
  return format_of(tokenizer, model, kInstead)
      .render(messages, GenerationPrompt::Add, context_of(tokenizer, std::time(nullptr)));
}

TrainingChats::TrainingChats(const Tokenizer& tokenizer, const std::string& model)
    : format_(format_of(tokenizer, model, "; give chats as \"text\", written out")) {
  std::tm day{};  // noon where the program runs: render() asks for the local date
  day.tm_year = 2024 - 1900;
  day.tm_mon = 6;
  day.tm_mday = 26;
  day.tm_hour = 12;
  day.tm_isdst = -1;
  context_ = context_of(tokenizer, std::mktime(&day));
}

std::vector<ChatMessage> parse_messages(const std::string& text, const std::string& where) {
  return messages_of(parse_json(text, where), where);
}

std::vector<ChatMessage> messages_of(const nlohmann::json& list, const std::string& where) {
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
