// bbb tokenize: a text file's token ids and the text of each, tokenized as in all other commands.
#include <cstdio>
#include <nlohmann/json.hpp>

#include "data/chat_format.h"
#include "data/files.h"
#include "data/text.h"
#include "data/tokenizer.h"
#include "tools/cli.h"

namespace bbb::tools {

int tokenize_command(const Arguments& arguments) {
  CommandLine line("tokenize", "Token ids of a text, without BOS, and the text of each token");
  line.options()                                                                            //
      ("model", "directory or GGUF file", cxxopts::value<std::string>())                    //
      ("text-file", "the text, taken as it is", cxxopts::value<std::string>())              //
      ("chat", "the text is a user's message: put it into the model's chat format")         //
      ("special", "the text of a special token becomes that token; else it is plain text")  //
      ("json", "write ids and pieces to this file, not to standard output",
       cxxopts::value<std::string>());
  if (!line.parse(arguments)) return 0;
  check_writable(line, "json");
  const std::string model = line.required("model");
  std::string text = data::read_text(line.required("text-file"));
  const auto tokenizer = data::load_tokenizer(model);
  const bool is_chat = line.has("chat");
  if (is_chat) text = data::render_chat(*tokenizer, {{"user", text}}, model);
  const auto special =
      is_chat || line.has("special") ? data::SpecialText::Parse : data::SpecialText::AsText;

  const std::vector<int32_t> ids = tokenizer->encode(text, special);
  std::vector<std::string> pieces;
  for (const int32_t id : ids) pieces.push_back(tokenizer->piece(id, true));
  const nlohmann::ordered_json result = {{"ids", ids}, {"pieces", pieces}};
  // A token may hold part of a character, which JSON cannot express: it becomes U+FFFD.
  const std::string out =
      result.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
  if (line.has("json")) {
    data::write_file_atomic(line.required("json"), out);
  } else {
    std::fwrite(out.data(), 1, out.size(), stdout);
  }
  return 0;
}

}  // namespace bbb::tools
