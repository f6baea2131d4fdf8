// bbb chat and bbb decode on a tiny chat model: turns in the cache, batches, files of prompts.
#include "tools/chat.h"

#include <catch2/catch.hpp>
#include <nlohmann/json.hpp>
#include <sstream>

#include "data/files.h"
#include "tests/printed.h"
#include "tests/tiny_model.h"

namespace bbb::tests {
namespace {

using data::ChatMessage;
using nlohmann::json;

const std::string kChats = golden_folder() + "/chat/";

std::string stdout_of(const std::function<void()>& work) { return printed_by(work).out; }

// A random model with the tokenizer of the chat goldens and the chat format of SmolLM2.
struct ChatModel {
  TempDir directory;
  models::LlamaConfig config = tiny_config();

  ChatModel() {
    config.vocab = data::load_tokenizer(kChats)->vocab_size();
    config.max_position = 512;
    write_tiny_model(directory.path(), config, 1);
    data::write_file_atomic(directory / "tokenizer.json",
                            data::read_file(kChats + "tokenizer.json"));
    json settings = json::parse(data::read_file(kChats + "tokenizer_config.json"));
    settings["chat_template"] = data::read_file(kChats + "smollm2.jinja");
    data::write_file_atomic(directory / "tokenizer_config.json", settings.dump());
  }

  // Rounded to packed 2-bit weights.
  std::string rounded() const {
    const std::string path = directory / "rounded";
    stdout_of([&] {
      REQUIRE(tools::export_command({"--model", directory.path(), "--rtn", "--bits", "2", "--out",
                                     path, "--device", on_cuda() ? "cuda" : "cpu"}) == 0);
    });
    return path;
  }

  tools::ModelFiles files() const {
    tools::CommandLine line("chat", "");
    line.options()("model", "", cxxopts::value<std::string>())("bits", "",
                                                               cxxopts::value<std::string>());
    REQUIRE(line.parse({"--model", directory.path()}));
    return tools::ModelFiles(line, backend());
  }
};

// What chat() writes to `out`.
std::string chat_text(models::Generator& generator, const tools::ModelFiles& files,
                      std::vector<ChatMessage>& messages, const std::string& lines) {
  std::istringstream in(lines);
  return stdout_of([&] { tools::chat(generator, files, 8, 3, messages, in, stdout); });
}

tools::Arguments with(tools::Arguments arguments, const tools::Arguments& more) {
  arguments.insert(arguments.end(), more.begin(), more.end());
  return arguments;
}

// The JSON of `bbb decode` with these arguments, and its stdout as `printed`.
json decode(const std::string& model, const tools::Arguments& arguments) {
  const TempDir out;
  int code = -1;
  const std::string printed = stdout_of([&] {
    code = tools::decode_command(
        with(arguments, {"--model", model, "--device", on_cuda() ? "cuda" : "cpu", "--max-tokens",
                         "6", "--json", out / "out.json"}));
  });
  REQUIRE(code == 0);
  json result = json::parse(data::read_file(out / "out.json"));
  result["printed"] = printed;
  return result;
}

TEST_CASE("chat: a turn in the cache answers like the whole chat decoded anew", "[chat]") {
  const ChatModel model;
  const tools::ModelFiles files = model.files();
  const auto llama = files.load(backend());
  const engine::SampleSpec spec{.temperature = 0.7, .top_p = 0.95, .repetition_penalty = 1.2};
  models::Generator generator(*llama, 1, 400, spec);
  std::vector<ChatMessage> messages = {{"system", "Be brief."}};
  const std::string first = chat_text(generator, files, messages, "Hi there\r\n\r\n");
  REQUIRE(messages.size() == 3);
  CHECK(messages[1].content == "Hi there");
  CHECK(first == messages[2].content + "\n");

  std::vector<ChatMessage> next = messages;
  next.push_back({"user", "Tell me more"});
  const std::vector<int32_t> ids = files.chat_ids(next);
  // At least the first turn up to the answer is not run again.
  const auto before = files.chat_ids({messages.begin(), messages.begin() + 2});
  CHECK(generator.kept(0, ids) >= static_cast<int64_t>(before.size()));
  const std::string second =
      chat_text(generator, files, messages, "Tell me more\r\n/exit\r\nNobody reads this\n");
  REQUIRE(messages.size() == 5);
  CHECK(second == tools::whole_characters(messages[4].content) + "\n");

  if (on_cuda()) return;  // a longer prefill rounds differently in bf16
  models::Generator fresh(*llama, 1, 400, spec);
  std::vector<ChatMessage> anew(messages.begin(), messages.begin() + 3);
  CHECK(chat_text(fresh, files, anew, "Tell me more") == second);
}

TEST_CASE("chat: ends when the context is full", "[chat]") {
  const ChatModel model;
  const tools::ModelFiles files = model.files();
  const auto llama = files.load(backend());
  const int64_t n = static_cast<int64_t>(files.chat_ids({{"user", "Hi"}}).size());
  // Room for no prompt, for the first token, for less than an answer, and for one answer.
  for (const auto& [capacity, turns] :
       {std::pair<int64_t, size_t>{n - 1, 1}, {n, 1}, {n + 3, 1}, {n + 7, 2}}) {
    CAPTURE(capacity - n);
    models::Generator generator(*llama, 1, capacity, {});
    std::vector<ChatMessage> messages;
    const std::string text = chat_text(generator, files, messages, "Hi\nHi\nHi\n");
    CHECK(messages.size() == 2 * turns);
    CHECK(text.empty() == (capacity < n));
  }
}

TEST_CASE("text is written in whole characters", "[chat]") {
  const std::string text = "a\u00e9\u65e5\U0001f600!";
  std::string bytes = stdout_of([&] {
    tools::TextStream stream(stdout);
    size_t at = 0;
    for (const char byte : text) {
      const long before = std::ftell(stdout);
      stream.put(std::string(1, byte));
      const size_t written = static_cast<size_t>(std::ftell(stdout));
      // After the last byte of a character everything is written, before it nothing new.
      ++at;
      const bool whole = at == text.size() || (static_cast<unsigned char>(text[at]) & 0xC0) != 0x80;
      CHECK(written == (whole ? at : static_cast<size_t>(before)));
    }
    stream.put("\xe6");  // cut
    stream.finish();
  });
  CHECK(bytes == text + "\uFFFD\n");
}

TEST_CASE("decode: a batch gives every prompt the text that it gets alone", "[chat]") {
  const ChatModel model;
  const tools::Arguments sampling = {"--temperature",        "0.8", "--top-p", "0.9",
                                     "--repetition-penalty", "1.1"};
  const std::vector<std::string> prompts = {"one", "a much longer prompt, with words", "three"};
  const std::string file = model.directory / "prompts.txt";
  data::write_file_atomic(file, prompts[0] + "\r\n\n" + prompts[1] + "\n" + prompts[2]);
  for (const std::string& path : {model.directory.path(), model.rounded()}) {
    CAPTURE(path);
    const json together =
        decode(path, with({"--prompts", file, "--batch", "2", "--seed", "5"}, sampling));
    CHECK(together.at("batch") == 2);
    CHECK(together.at("tokens_per_s") > 0);
    REQUIRE(together.at("sequences").size() == 3);
    int64_t generated = 0, prompt_tokens = 0;
    std::string printed;
    for (size_t i = 0; i < 3; ++i) {
      // On a GPU a product of as many rows rounds alike, so the prompt is alone in a batch of 2.
      const json alone = decode(path, with({"--prompt", prompts[i], "--seed", std::to_string(5 + i),
                                            "--batch", on_cuda() ? "2" : "1"},
                                           sampling));
      const json &one = on_cuda() ? alone.at("sequences")[0] : alone,
                 &sequence = together.at("sequences")[i];
      for (const char* key : {"text", "stopped", "prompt_tokens", "generated_tokens"})
        CHECK(sequence.at(key) == one.at(key));
      generated += one.at("generated_tokens").get<int64_t>();
      prompt_tokens += one.at("prompt_tokens").get<int64_t>();
      printed += cat("[", i, "] ", alone.at("printed").get<std::string>());
    }
    CHECK(together.at("generated_tokens") == generated);
    CHECK(together.at("prompt_tokens") == prompt_tokens);
    if (!on_cuda()) CHECK(together.at("printed").get<std::string>() == printed);

    // Several continuations of one prompt have seeds of their own.
    const json three =
        decode(path, with({"--prompt", "one", "--batch", "3", "--seed", "5"}, sampling));
    REQUIRE(three.at("sequences").size() == 3);
    if (!on_cuda()) CHECK(three.at("sequences")[0] == together.at("sequences")[0]);
    CHECK(three.at("sequences")[0].at("text") != three.at("sequences")[1].at("text"));
  }
}

TEST_CASE("decode: a file of prompts makes a list, however many it has", "[chat]") {
  const ChatModel model;
  const std::string path = model.directory.path(), file = model.directory / "prompts.txt";
  data::write_file_atomic(file, "one\n");
  const json listed = decode(path, {"--prompts", file}), single = decode(path, {"--prompt", "one"});
  REQUIRE(listed.at("sequences").size() == 1);
  CHECK(listed.at("sequences")[0].at("text") == single.at("text"));
  CHECK(!listed.contains("text"));
  CHECK(!single.contains("sequences"));
  CHECK(listed.at("printed").get<std::string>() ==
        "[0] " + single.at("printed").get<std::string>());

  // An error of a prompt names its line.
  std::string words;
  for (int64_t i = 0; i < model.config.max_position; ++i) words += " word";
  data::write_file_atomic(file, "one\n\n" + words + "\n");
  CHECK_THROWS_WITH(decode(path, {"--prompts", file}),
                    Catch::Contains("prompts.txt:3: the prompt has "));
  CHECK_THROWS_WITH(decode(path, {"--prompt", words}),
                    Catch::Contains("--prompt: the prompt has "));
}

TEST_CASE("decode: a prompt without tokens, or with one that has no row, names its line",
          "[chat]") {
  ChatModel model;
  const std::string path = model.directory.path(), file = model.directory / "prompts.jsonl";
  data::write_file_atomic(file, "{\"prompt\": \"one\"}\n{\"prompt\": \"\"}\n");
  CHECK_THROWS_WITH(decode(path, {"--prompts", file}),
                    Catch::Contains("prompts.jsonl:2: the prompt is empty"));
  model.config.vocab = 90;
  write_tiny_model(path, model.config, 1);
  data::write_file_atomic(file, "{\"prompt\": \"1\"}\n{\"prompt\": \"the word\"}\n");
  CHECK_THROWS_WITH(decode(path, {"--prompts", file}),
                    Catch::Contains("prompts.jsonl:2: ") && Catch::Contains("has no row"));
}

TEST_CASE("decode: options that would do nothing are refused", "[chat]") {
  const ChatModel model;
  const auto refused = [&](const tools::Arguments& arguments, const char* message) {
    CAPTURE(arguments);
    CHECK_THROWS_AS(decode(model.directory.path(), arguments), UsageError);
    CHECK_THROWS_WITH(decode(model.directory.path(), arguments), Catch::Contains(message));
  };
  refused({"--prompt", "a", "--top-p", "0.9"}, "--top-p needs a --temperature");
  refused({"--prompt", "a", "--seed", "3"}, "--seed needs a --temperature");
  refused({"--prompt", "a", "--seed", "3", "--temperature", "0"}, "--seed needs a --temperature");
  refused({"--prompt", "a", "--batch", "2"}, "--batch of one prompt needs a --temperature");
  refused({"--prompt", "a", "--context", "9"}, "--context needs --synthetic");
}

TEST_CASE("decode: a synthetic model stops at its last position", "[chat]") {
  const Output output = bbb({"decode", "--synthetic", "smollm2-135m", "--context", "8190",
                             "--max-tokens", "5", "--device", "cpu"});
  CHECK(output.code == 0);
  CHECK_THAT(output.err, Catch::Contains("the context of 8192 tokens is full") &&
                             Catch::Contains("decode 2 tokens"));
}

TEST_CASE("decode: prompts and chats of a JSON-lines file", "[chat]") {
  const ChatModel model;
  const std::string path = model.directory / "prompts.jsonl";
  data::write_file_atomic(path,
                          "{\"prompt\": \"one\"}\n\n"
                          "{\"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}]}\n");
  const json together = decode(model.directory.path(), {"--prompts", path});
  CHECK(together.at("batch") == 2);
  const json alone[] = {decode(model.directory.path(), {"--prompt", "one"}),
                        decode(model.directory.path(), {"--chat", "Hi"})};
  for (size_t i = 0; i < 2; ++i) {
    CHECK(together.at("sequences")[i].at("prompt_tokens") == alone[i].at("prompt_tokens"));
    // On a GPU a product of 2 rows rounds differently.
    if (!on_cuda()) CHECK(together.at("sequences")[i].at("text") == alone[i].at("text"));
  }

  for (const std::string bad :
       {"{\"prompt\": 3}", "{}", "[]", "{\"prompt\": \"a\", \"messages\": []}",
        "{\"messages\": [{\"role\": \"assistant\", \"content\": \"Hi\"}]}", "{\"prompt\": "}) {
    CAPTURE(bad);
    data::write_file_atomic(path, "{\"prompt\": \"one\"}\n" + bad + "\n");
    CHECK_THROWS_WITH(decode(model.directory.path(), {"--prompts", path}),
                      Catch::Contains("prompts.jsonl:2"));
  }
  data::write_file_atomic(path, "\n");
  CHECK_THROWS_WITH(decode(model.directory.path(), {"--prompts", path}),
                    Catch::Contains("no prompt"));
  CHECK_THROWS_WITH(decode(model.directory.path(), {"--prompts", path, "--prompt", "a"}),
                    Catch::Contains("give one of"));
  CHECK_THROWS_WITH(decode(model.directory.path(), {"--prompt", "a", "--batch", "65"}),
                    Catch::Contains("--batch takes"));
}

TEST_CASE("decode: --kv-bits shrinks the cache", "[chat]") {
  const ChatModel model;
  const std::string& path = model.directory.path();
  const int64_t heads = 2 * model.config.layers * model.config.kv_heads;  // of keys and values
  for (const auto& [bits, head_bytes] : std::vector<std::pair<std::string, int64_t>>{
           {"16", 64 * engine::size_bytes(backend().act())}, {"8", 64 + 4}, {"4", 32 + 4}}) {
    const json out = decode(path, {"--prompt", "one", "--kv-bits", bits});
    CHECK(out["kv_bits"] == std::stoi(bits));
    CHECK(out["kv_bytes_per_token"] == heads * head_bytes);
    CHECK(out["generated_tokens"] > 0);
  }
  CHECK_THROWS_AS(decode(path, {"--prompt", "one", "--kv-bits", "2"}), UsageError);
}

}  // namespace
}  // namespace bbb::tests
