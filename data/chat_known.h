// The chat templates that bbb knows, and the text that each writes.
#pragma once

#include <string>
#include <vector>

namespace bbb::data {

enum class SystemIn { OwnTurn, FirstTurn, LastTurn };

// The texts may hold {bos}, {eos}, {0} .. {9} (the wildcards of `pattern`) and, in turns:
// {role}, {content}, {trimmed} (the content without white space at its ends), {answer} (the content
// after its last </think>), {reply} and {thought} (see `thinking`) and {system} (the system
// prompt).
struct KnownChat {
  const char* name;
  std::string pattern = {};    // the canonical template (chat_template.h) without a leading BOS
  const char* start = "";      // before all turns
  const char* turn = nullptr;  // for roles without their own text below; null: no such turn
  const char* system = nullptr;
  const char* user = nullptr;
  const char* assistant = nullptr;
  const char* last_assistant = nullptr;  // if it differs: an assistant's turn that ends the chat
  // Qwen3's turn of an assistant behind the last question: a user's message that is no
  // <tool_response>. {thought} is the text between <think> and </think>, {reply} what follows it,
  // without newlines at the start.
  const char* thinking = nullptr;
  bool thinking_ends = false;  // the turn that ends the chat is written like this without a thought
  const char* first_system = nullptr;  // if it differs: a system message that begins the chat
  SystemIn system_in = SystemIn::OwnTurn;
  const char* content_with_system = nullptr;  // of the user's turn that carries the system prompt
  // Used if the first message is not the system's. With OwnTurn it is written before the turns;
  // else it becomes the system prompt.
  const char* no_system = nullptr;
  bool no_system_at_all = false;           // use `no_system` only if no message is the system's
  const char* no_system_unless = nullptr;  // ... and only if the first content lacks this text
  const char* end = "";                    // after all turns
  const char* generation = "";
  const char* alternate = nullptr;  // the error if user and assistant do not alternate
  const char* refusal = nullptr;    // the error for a role without a turn
  int date = -1;                    // the wildcard that holds a date format; -1: none
};

const std::vector<KnownChat>& known_chats();

}  // namespace bbb::data
