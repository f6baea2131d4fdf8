// bbb chat: a conversation on the terminal, or with the lines of a file.
#include <unistd.h>

#include <algorithm>
#include <iostream>

#include "tools/chat.h"

namespace bbb::tools {

void chat(models::Generator& generator, const ModelFiles& files, int64_t max_tokens, uint64_t seed,
          std::vector<data::ChatMessage>& messages, std::istream& in, std::FILE* out) {
  const bool terminal = &in == &std::cin && isatty(STDIN_FILENO);
  for (std::string line;;) {
    if (terminal) std::fputs("> ", stderr);
    if (!std::getline(in, line)) return;
    if (line.ends_with('\r')) line.pop_back();
    if (line == "/exit") return;
    if (line.empty()) continue;
    messages.push_back({"user", line});
    const std::vector<int32_t> ids = files.chat_ids(messages);
    Answer answer{.limit = max_tokens};
    TextStream stream(out);
    const auto append = [&](int32_t token) {
      stream.put(answer.append(token, files));
      return answer.running();
    };
    const bool fits = static_cast<int64_t>(ids.size()) <= generator.capacity();
    if (fits && append(generator.prefill(0, ids, seed)))
      generator.run(std::min(max_tokens - answer.generated, generator.steps_left()),
                    [&](const std::vector<int32_t>& tokens) { return append(tokens[0]); });
    if (fits) stream.finish();
    messages.push_back({"assistant", answer.text});
    if (answer.running()) {
      std::fprintf(stderr, "the context of %lld tokens is full\n",
                   static_cast<long long>(generator.capacity()));
      return;
    }
  }
}

int chat_command(const Arguments& arguments) {
  CommandLine line("chat", "Talk to any checkpoint: a message a line, until /exit or the end");
  line.options()                                                             //
      ("model", "directory or GGUF file", cxxopts::value<std::string>())     //
      ("bits", CommandLine::kNestedBitsHelp, cxxopts::value<std::string>())  //
      ("kv-bits", CommandLine::kKvBitsHelp,
       cxxopts::value<std::string>()->default_value("16"))                                 //
      ("system", "the system prompt", cxxopts::value<std::string>())                       //
      ("max-tokens", "of an answer", cxxopts::value<std::string>()->default_value("512"))  //
      ("context", "tokens of the whole chat, at most; no more than the model knows positions",
       cxxopts::value<std::string>()->default_value("4096"));
  add_sampling_options(line);
  if (!line.parse(arguments)) return 0;
  const int64_t max_tokens = line.integer("max-tokens", 1, 1 << 20);
  const int64_t context = line.integer("context", 1, 1 << 20);
  const engine::SampleSpec sampling = sample_spec(line);
  const uint64_t seed = sample_seed(line);
  const quant::KvFormat kv = line.kv_format();
  const auto backend = line.make_backend();
  const ModelFiles files(line, *backend);
  std::vector<data::ChatMessage> messages;
  if (line.has("system")) messages.push_back({"system", line.text("system")});
  // A chat format that bbb does not know is an error before the weights are read.
  std::vector<data::ChatMessage> first = messages;
  first.push_back({"user", "Hi"});
  files.chat_ids(first);
  models::KvCache::check(files.source->config(), kv);
  const auto model = files.load(*backend);
  const int64_t positions = model->config().max_position;
  if (context > positions)
    std::fprintf(stderr, "the context is %lld tokens, as many as the model has positions\n",
                 static_cast<long long>(positions));
  models::Generator generator(*model, 1, std::min(context, positions), sampling, kv);
  chat(generator, files, max_tokens, seed, messages, std::cin, stdout);
  return 0;
}

}  // namespace bbb::tools
