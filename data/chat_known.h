// The chat templates that bbb knows, and what each writes.
#pragma once

#include <string>
#include <vector>

namespace bbb::data {

enum class SystemIn { OwnTurn, FirstTurn, LastTurn };

// The texts may hold {bos}, {eos}, {0} .. {9} (the wildcards of `pattern`) and, in turns:
// {role}, {content}, {trimmed} (the content without white space at its ends), {answer} (the content
// behind its last </think>) and {system} (the system prompt).
struct KnownChat {
  const char* name;
  std::string pattern = {};    // the canonical template (chat_template.h), less a BOS in front
  const char* start = "";      // in front of all turns
  const char* turn = nullptr;  // of every role without its own below; null: no such turn
  const char* system = nullptr;
  const char* user = nullptr;
  const char* assistant = nullptr;
  const char* last_assistant = nullptr;  // where it differs: the last turn, if the assistant's
  const char* first_system = nullptr;    // where it differs: the first message, if the system's
  SystemIn system_in = SystemIn::OwnTurn;
  const char* content_with_system = nullptr;  // of the user's turn that carries the system prompt
  // Where the first message is not the system's: written in front of the turns, or with `system_in`
  // other than OwnTurn the system prompt.
  const char* no_system = nullptr;
  bool no_system_at_all = false;           // `no_system` only where no message is the system's
  const char* no_system_unless = nullptr;  // nor where the first content holds this
  const char* end = "";                    // behind all turns
  const char* generation = "";
  const char* alternate = nullptr;  // the error where user and assistant do not alternate
  const char* refusal = nullptr;    // the error for a role without a turn
  int date = -1;                    // the wildcard that is a date's format
};

const std::vector<KnownChat>& known_chats();

}  // namespace bbb::data
