// Chats: renders messages as text in the format that a chat model was trained on.
//
// A model gives its format as a Jinja template. bbb has no template engine: data/chat_known.cpp
// lists the templates that it knows and the text that each writes. All others are refused.
#pragma once

#include <ctime>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "data/chat_template.h"
#include "data/tokenizer.h"

namespace bbb::data {

struct ChatMessage {
  std::string role;  // "system", "user" or "assistant"
  std::string content;
  bool operator==(const ChatMessage&) const = default;
};

enum class GenerationPrompt {
  None,
  Add
};  // Add: the text ends where the assistant's answer begins

// A rendered chat.
struct RenderedChat {
  // Positions in the text. An answer begins where the text leaves the one that asks for it (the
  // generation prompt); its content ends before whatever ends the turn.
  struct Answer {
    size_t begin, content_end, turn_end;
  };
  std::string text;
  std::vector<Answer> answers;  // of the assistant's turns, in order
};

// Values that a template takes from its model and its environment.
struct ChatContext {
  std::string bos_token, eos_token;
  std::time_t now = 0;  // some templates write the date
};

struct KnownChat;  // data/chat_known.h

class ChatFormat {
 public:
  // Throws Error unless bbb knows the whole template. The error says where the template differs
  // from the nearest known one.
  explicit ChatFormat(const std::string& jinja);

  // Renders the same text as transformers. Throws Error on messages that the format cannot express,
  // in the template's own words if it has any.
  std::string render(const std::vector<ChatMessage>& messages, GenerationPrompt generation,
                     const ChatContext& context) const {
    return render_answers(messages, generation, context).text;
  }
  RenderedChat render_answers(const std::vector<ChatMessage>& messages, GenerationPrompt generation,
                              const ChatContext& context) const;

 private:
  const KnownChat* known_ = nullptr;
  bool bos_ = false;     // the template writes BOS before everything that `known_` writes
  WildcardTexts texts_;  // matched in this template
};

// Renders with the model's own template and special tokens, and today's date. Throws Error if the
// model has no template, or one that ChatFormat does not know. `model` is a path, only for errors.
std::string render_chat(const Tokenizer& tokenizer, const std::vector<ChatMessage>& messages,
                        const std::string& model = "the model");

// Renders chats as training data: without a generation prompt, and with the same date every day
// (26 July 2024, Llama 3.2's own for a template that cannot ask), so that a run can be continued.
// The constructor throws as render_chat() does.
class TrainingChats {
 public:
  TrainingChats(const Tokenizer& tokenizer, const std::string& model);
  RenderedChat render(const std::vector<ChatMessage>& messages) const {
    return format_.render_answers(messages, GenerationPrompt::None, context_);
  }

 private:
  ChatFormat format_;
  ChatContext context_;
};

// A JSON list of {"role": .., "content": ..}. Throws Error, naming `where` and the message.
std::vector<ChatMessage> parse_messages(const std::string& text, const std::string& where);
std::vector<ChatMessage> messages_of(const nlohmann::json& list, const std::string& where);

}  // namespace bbb::data
