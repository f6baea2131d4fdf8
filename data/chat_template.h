// A chat template's Jinja in one canonical spelling, in which equal templates look equal.
#pragma once

#include <string>

namespace bbb::data {

// Comments, quotes, white space inside tags and white-space control (trim_blocks and lstrip_blocks,
// as Hugging Face sets them) are resolved; an output's constants become plain text:
//
//   {{ 'a' + x.b }}, {{ "a" ~ x['b'] }}        a{{x.b}}
//   {% set x = 'a' + y %}                      {%set x%}a{{y}}{%endset%}
//   x.strip(), loop.index0 == 0                x|trim, loop.first
//   for m in messages                          for message in messages
//   names set to messages[1:], messages[0]['content'], message['content']
//                                              rest, system, content
//
// {% %} are written as the bytes 1 and 2, {{ }} as 3 and 4, a quote inside a tag's string as 5, so
// that no text looks like a tag. Throws Error on templates that hold these bytes and on tags that
// do not end.
std::string canonical_template(const std::string& jinja);

// The canonical template without what cannot matter for messages of system, user and assistant
// whose contents are text: branches for tools, aliases, detours. Throws as above, and on templates
// of over 500 statements.
std::string plain_template(const std::string& jinja);

}  // namespace bbb::data
