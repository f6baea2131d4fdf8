// Chat templates: a subset of Jinja, as Hugging Face renders it (trim_blocks, lstrip_blocks).
//
//   statements   for (else, if), if / elif / else, set (name, namespace attribute, block)
//   expressions  literals, names, attributes, subscripts, slices, calls, + - * / // % ~,
//   comparisons,
//                in, and / or / not, inline if, filters, tests
//   functions    namespace, range, raise_exception, strftime_now
// Anything else is an error that names it.
#pragma once

#include <string>
#include <vector>

namespace bbb::data {

struct ChatMessage {
  std::string role;
  std::string content;
};

struct ChatContext {
  std::vector<ChatMessage> messages;
  std::string bos_token;
  std::string eos_token;
  bool add_generation_prompt = true;
  std::string date;  // what strftime_now returns; empty: the template finds it undefined
};

// Throws Error, naming what, on malformed templates, on constructs outside the subset, and with the
// template's own words on raise_exception.
std::string render_template(const std::string& source, const ChatContext& context);

}  // namespace bbb::data
