// Chats: messages to the one text that a chat model was trained on.
//
// A model names its format by a Jinja template. bbb has no template engine: it knows the templates
// of data/chat_known.cpp, each with what it writes, and refuses all others.
#pragma once

#include <ctime>
#include <string>
#include <vector>

#include "data/chat_template.h"
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

struct KnownChat;  // data/chat_known.h

class ChatFormat {
 public:
  // Throws Error, saying where it differs from the nearest, unless bbb knows the whole template.
  explicit ChatFormat(const std::string& jinja);

  // Equal to what transformers renders. Throws Error, with the template's own words where it has
  // them, on messages that the format cannot carry.
  std::string render(const std::vector<ChatMessage>& messages, GenerationPrompt generation,
                     const ChatContext& context) const;

 private:
  const KnownChat* known_ = nullptr;
  bool bos_ = false;     // the template begins with BOS, in front of all that `known_` writes
  WildcardTexts texts_;  // of this template
};

// Renders with the model's own format, today's date and special tokens. Throws Error, naming
// `model` (a path, for messages only), where it has no template or one that ChatFormat does not
// know.
std::string render_chat(const Tokenizer& tokenizer, const std::vector<ChatMessage>& messages,
                        const std::string& model = "the model");

// A JSON list of {"role": .., "content": ..}. Throws Error, naming `where` and the message.
std::vector<ChatMessage> parse_messages(const std::string& text, const std::string& where);

}  // namespace bbb::data
