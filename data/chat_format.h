// Chats: messages to the one text that a chat model was trained on.
//
// A model names its format by a Jinja template. bbb has no template engine: it knows the formats of
// ChatML (SmolLM too), Llama-2, Llama-3, Mistral, Zephyr and DeepSeek, which have one shape:
//
//   start  [default or own system prompt]  turn turn ...  [generation prompt]
//
// The template tells which format it is and how its details go: the texts around each role's
// content, trimming, the default system prompt, where the system prompt goes, what is refused.
#pragma once

#include <array>
#include <ctime>
#include <optional>
#include <string>
#include <vector>

#include "data/tokenizer.h"

namespace bbb::data {

struct ChatMessage {
  std::string role;  // "system", "user" or "assistant"
  std::string content;
};

enum class GenerationPrompt {
  None,
  Add
};  // Add: the text ends where the assistant's answer begins

// What a template takes from its model and its surroundings.
struct ChatContext {
  std::string bos_token, eos_token;
  std::time_t now = 0;  // some templates write the date
};

class ChatFormat {
 public:
  // Throws Error unless every part of the template is one that bbb knows.
  explicit ChatFormat(const std::string& jinja);

  const std::string& family() const { return family_; }
  // Equal to what transformers renders. Throws Error, with the template's own words where it has
  // them, on messages that the format cannot carry.
  std::string render(const std::vector<ChatMessage>& messages, GenerationPrompt generation,
                     const ChatContext& context) const;

 private:
  // Text with holes, such as {{message.content}}.
  using Line = std::string;
  enum class SystemIn { NoTurn, FirstTurn, LastTurn };
  struct Turn {
    Line line;
    Line with_system;  // used instead in the turn that holds the system prompt
    SystemIn system_in = SystemIn::NoTurn;
  };

  void read_prologue(const std::string& with_system, const std::string& without_system);
  void read_turns(const std::optional<std::string>& chain);
  void check_lines() const;
  void recognize();

  std::string family_;
  Line start_with_system_, start_without_;  // in front of the turns
  bool any_system_ = false;               // "with": any message is the system's, not just the first
  std::optional<Line> system_;            // the value of the hole `system`: the first message's
  std::optional<Line> default_system_;    // the same without a system message
  bool skips_system_ = false;             // the turns begin behind the system message
  std::optional<std::string> alternate_;  // the error where user and assistant do not alternate
  std::optional<Line> first_content_;     // the hole `content` of the first turn
  Line before_turn_, after_turn_;         // around each turn
  std::array<std::optional<Turn>, 3> turns_;  // of system, user and assistant; none: no place
  Line end_;                                  // behind the last turn
  Line generation_;
};

// Renders with the model's own format, today's date and special tokens. Throws Error where the
// model has no template or one that ChatFormat does not know.
std::string render_chat(const Tokenizer& tokenizer, const std::vector<ChatMessage>& messages,
                        GenerationPrompt generation = GenerationPrompt::Add);

// A JSON list of {"role": .., "content": ..}. Throws Error, naming `where` and the message.
std::vector<ChatMessage> parse_messages(const std::string& text, const std::string& where);

}  // namespace bbb::data
