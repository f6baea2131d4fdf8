// Chat formats against transformers (scripts/make_chat_goldens.py), and chats that are refused.
#include "data/chat_format.h"

#include <catch2/catch.hpp>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "data/files.h"
#include "tests/support.h"

namespace bbb::tests {

using Catch::Contains;
using data::ChatMessage;
using data::GenerationPrompt;
using nlohmann::json;

namespace {

const std::string kFolder = golden_folder() + "/chat/";

data::ChatFormat real_format(const std::string& name) {
  return data::ChatFormat(data::read_file(kFolder + name + ".jinja"));
}

data::ChatContext context() { return {"<s>", "</s>", 1738411200}; }

std::string render(const std::string& jinja, const std::vector<ChatMessage>& messages) {
  return data::ChatFormat(jinja).render(messages, GenerationPrompt::Add, context());
}

std::string changed(std::string text, const std::string& from, const std::string& to) {
  const size_t at = text.find(from);
  REQUIRE(at != std::string::npos);
  return text.replace(at, from.size(), to);
}

}  // namespace

TEST_CASE("chats in real templates give the text and ids of transformers", "[chat_format]") {
  const json golden = json::parse(data::read_file(kFolder + "goldens.json"));
  const auto tokenizer = data::load_tokenizer(kFolder);
  std::map<std::string, data::ChatFormat> formats;
  data::ChatContext now = context();
  now.now = golden.at("now");
  // DeepSeek R1's template writes the last system prompt first, wherever it is.
  const auto refused_here = [](const std::string& name, int chat) {
    return name == "deepseek-r1-distill" && (chat == 10 || chat == 11);
  };
  int texts = 0;
  for (const json& one : golden.at("cases")) {
    const std::string name = one.at("template");
    if (!formats.contains(name)) formats.emplace(name, real_format(name));
    std::vector<ChatMessage> messages;
    for (const json& message : golden.at("chats").at(one.at("chat").get<size_t>()))
      messages.push_back({message.at("role"), message.at("content")});
    const auto generation = one.at("prompt") ? GenerationPrompt::Add : GenerationPrompt::None;
    INFO(one.dump());
    const auto text = [&] { return formats.at(name).render(messages, generation, now); };
    if (one.contains("error")) {
      CHECK_THROWS_WITH(text(), Contains(one.at("error").get<std::string>()));
      continue;
    }
    if (refused_here(name, one.at("chat"))) {
      CHECK_THROWS_WITH(text(), Contains("has no place in the chat template"));
      continue;
    }
    ++texts;
    CHECK(text() == one.at("text").get<std::string>());
    if (one.contains("ids"))
      CHECK(tokenizer->encode(text(), data::SpecialText::Parse) ==
            one.at("ids").get<std::vector<int32_t>>());
  }
  CHECK(texts > 700);
}

// The text before an answer is what asks for it, so that training and chatting agree.
TEST_CASE("an answer begins where the generation prompt ends", "[chat_format]") {
  const json golden = json::parse(data::read_file(kFolder + "goldens.json"));
  const std::vector<ChatMessage> chat = {
      {"user", "Hi"}, {"assistant", "Hello"}, {"user", "Why?"}, {"assistant", "So it is."}};
  std::set<std::string> names;
  for (const json& one : golden.at("cases")) names.insert(one.at("template").get<std::string>());
  std::set<std::string> others;
  for (const std::string& name : names) {
    INFO(name);
    const data::ChatFormat format = real_format(name);
    const auto whole = format.render_answers(chat, GenerationPrompt::None, context());
    REQUIRE(whole.answers.size() == 2);
    for (const auto& answer : whole.answers) {
      CHECK(answer.begin < answer.content_end);
      CHECK(answer.content_end <= answer.turn_end);
      CHECK(answer.turn_end <= whole.text.size());
    }
    const auto& last = whole.answers[1];
    CHECK(whole.text.substr(0, last.content_end).ends_with("So it is."));
    const std::string asked =
        format.render({chat.begin(), chat.end() - 1}, GenerationPrompt::Add, context());
    if (asked != whole.text.substr(0, last.begin)) others.insert(name);
  }
  // It prompts a thought, which the turn of an answer leaves out.
  CHECK(others == std::set<std::string>{"deepseek-r1-distill"});
}

TEST_CASE("line ends of a chat template do not matter", "[chat_format]") {
  const json golden = json::parse(data::read_file(kFolder + "goldens.json"));
  std::set<std::string> names;
  for (const json& one : golden.at("cases")) names.insert(one.at("template").get<std::string>());
  CHECK(names.size() >= 25);
  const std::vector<ChatMessage> chat = {{"user", "a"}, {"assistant", "b"}, {"user", "c"}};
  for (const std::string& name : names) {
    const std::string jinja = data::read_file(kFolder + name + ".jinja");
    for (const std::string end : {"\r\n", "\r"}) {
      std::string other;
      for (const char c : jinja) other += c == '\n' ? end : std::string(1, c);
      INFO(name);
      CHECK(render(other, chat) == render(jinja, chat));
    }
  }
}

TEST_CASE("details of a chat format are read from its template", "[chat_format]") {
  const std::vector<ChatMessage> hi = {{"user", " Hi "}};
  const std::string chatml =
      "{% for m in messages %}{{ \"<|im_start|>\" ~ m.role + '\\n' + m['content'] }}<|im_end|>\n\n"
      "{%- endfor %}{%- if add_generation_prompt -%}  {{'<|im_start|>assistant\\n'}}{% endif %}";
  CHECK(render(chatml, hi) == "<|im_start|>user\n Hi <|im_end|><|im_start|>assistant\n");
  CHECK(render(changed(chatml, "m['content']", "m['content'] | trim"), hi) ==
        "<|im_start|>user\nHi<|im_end|><|im_start|>assistant\n");
  CHECK(render(changed(chatml, "m['content']", "m.content.strip()"), hi) ==
        "<|im_start|>user\nHi<|im_end|><|im_start|>assistant\n");
  CHECK(render("{{ bos_token }}" + chatml, hi) ==
        "<s><|im_start|>user\n Hi <|im_end|><|im_start|>assistant\n");
  // Escapes in strings as in Python; any other name for the loop's variable.
  const std::string prompt = "<|im_start|>system\nA B \u00e9 \u65e5'\\<|im_end|>\n";
  CHECK(render(changed(data::read_file(kFolder + "smollm2.jinja"),
                       "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
                       R"(\x41 \u0042 \xe9 \u65e5\'\\)"),
               hi) == prompt + "<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\n");
  const std::string zephyr =
      "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}"
      "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}";
  CHECK(render(zephyr, hi) == "<|user|>\n Hi </s>\n<|assistant|>");
  const std::string inst =
      "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + "
      "m['content'] + '[/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}"
      "{% endfor %}";
  CHECK(render(inst, {{"user", "a"}, {"assistant", "b"}, {"user", "c"}}) ==
        "<s>[INST] a[/INST] b</s>[INST] c[/INST]");
}

TEST_CASE("a template that is only partly known is refused", "[chat_format]") {
  const std::string smollm = data::read_file(kFolder + "smollm.jinja");
  CHECK_NOTHROW(data::ChatFormat(smollm));
  for (const std::string& unknown : std::vector<std::string>{
           "",
           std::string("{{ messages[0]['content'] }}"),
           changed(smollm, "message['content']", "message['content'] | upper"),
           changed(smollm, "message['content']", "message['content'][1:]"),
           changed(smollm, "in messages", "in messages[1:]"),
           changed(smollm, "in messages", "in messages | reverse"),
           changed(smollm, "{% if add", "{% if not add"),
           changed(smollm, "{% endfor %}", "{% if loop.last %}x{% endif %}{% endfor %}"),
           changed(smollm, "{% for", "{% set messages = messages[1:] %}{% for"),
           changed(smollm, "message['role'] +", "message['role'].title() +"),
           changed(smollm, "'<|im_start|>'", "'<|im_begin|>'"),
           changed(smollm, "{% endif %}", "{% else %}x{% endif %}"),
           // The check of roles loops over other messages than the turns do.
           changed(data::read_file(kFolder + "mistral-v3.jinja"),
                   "{%- for message in loop_messages %}", "{%- for message in messages %}"),
           // Names that are set only in some cases.
           "{% if messages[0]['role'] == 'user' %}{% set m = messages %}{% endif %}" +
               changed(smollm, "in messages", "in m"),
           changed(smollm, "{{'<|im_start|>'",
                   "{% if message['role'] == 'user' %}{% set content = message['content'] %}"
                   "{% endif %}{{ content + '<|im_start|>'"),
           "{% set add_generation_prompt = 'always' %}" + smollm,
           // Order and number of texts in and after the loop.
           changed(smollm, "{% endfor %}",
                   "{% if loop.last and add_generation_prompt %}G{% endif %}{% endfor %}"),
           changed(data::read_file(kFolder + "zephyr.jinja"), "{% endfor %}", "{% endfor %}E"),
           "{% if messages[0].role != 'system' %}D{% endif %}" +
               data::read_file(kFolder + "smollm2.jinja"),
           changed(data::read_file(kFolder + "smollm2.jinja"), "{{'<|im_start|>'",
                   "{% if loop.first %}F{% endif %}{{'<|im_start|>'"),
           // Two names for the system prompt, one of them trimmed.
           changed(data::read_file(kFolder + "mistral-v1.jinja"),
                   "{%- set system_message = messages[0]['content'] %}",
                   "{%- set system_message = messages[0]['content'] %}"
                   "{%- set b = messages[0]['content'] | trim %}"),
           std::string("{% set message = 'x' %}{% for m in messages %}{{ '<|im_start|>' + "
                       "m['role'] + '\\n' + "
                       "message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"),
           // The system prompt "is defined" is not "is not false".
           changed(data::read_file(kFolder + "llama-2.jinja"), "system_message != false",
                   "system_message is defined"),
           changed(data::read_file(kFolder + "mistral-v1.jinja"), "system_message is defined",
                   "system_message != false"),
           // Branches for tools that would run without tools.
           changed(data::read_file(kFolder + "mistral-v3.jinja"), "{%- if tools is not none and",
                   "{%- if tools is none and"),
           changed(data::read_file(kFolder + "llama-3.1.jinja"), "{%- set tools = none %}",
                   "{%- set tools = [1] %}"),
           // Qwen3 that keeps the thoughts of every turn, or leaves out those of the last.
           changed(data::read_file(kFolder + "qwen3.jinja"), "loop.index0 > ns.last_query_index",
                   "loop.index0 >= 0"),
           changed(data::read_file(kFolder + "qwen3-strings.jinja"),
                   "{%- if loop.last or (not loop.last and reasoning_content) %}",
                   "{%- if not loop.last and reasoning_content %}"),
           changed(data::read_file(kFolder + "qwen2.5.jinja"), "not message.tool_calls",
                   "message.tool_calls"),
           // Vicuna's marks, in the shape of a known template.
           std::string("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}"
                       "{% endfor %}"),
       }) {
    INFO(unknown);
    CHECK_THROWS_WITH(data::ChatFormat(unknown), Contains("it differs from ") || Contains("names"));
  }
  CHECK_THROWS_WITH(data::ChatFormat(changed(smollm, "message['content']", "message['text']")),
                    Contains("ChatML at 'text}}<|im_end|>"));
  for (const char* broken : {"{{", "{% if %}", "{# open", "{{ 'open }}", "{% for x %}",
                             "{{ '\\x4' }}", "{{ '\\ud800' }}", "{{ '\\q' }}",
                             "{% raw %}x{% endraw %}", "\1if DEAD\2", "{% endfor %}"}) {
    INFO(broken);
    CHECK_THROWS_AS(data::ChatFormat(broken), Error);
  }
  std::string nested;
  for (int i = 0; i < 20'000; ++i) nested += "{% if tools %}";
  CHECK_THROWS_AS(data::ChatFormat(nested), Error);
  for (int i = 0; i < 20'000; ++i) nested += "{% endif %}";
  CHECK_THROWS_AS(data::ChatFormat(nested), Error);
}

TEST_CASE("messages that a format cannot express are refused", "[chat_format]") {
  const auto format = real_format("mistral-v1-old");
  const auto render_these = [&](const std::vector<ChatMessage>& messages) {
    return format.render(messages, GenerationPrompt::Add, context());
  };
  CHECK_THROWS_WITH(render_these({{"system", "s"}, {"user", "u"}}), Contains("must alternate"));
  CHECK_THROWS_WITH(render_these({{"tool", "t"}}), Contains("'tool'"));
  CHECK_THROWS_WITH(render_these({}), Contains("a chat needs a message"));
}

TEST_CASE("the error for a refused template names the model and the remedy", "[chat_format]") {
  const TempDir folder;
  const std::string path = folder.path();
  for (const char* file : {"tokenizer.json", "tokenizer_config.json"})
    data::write_file_atomic(path + "/" + file, data::read_file(kFolder + file));
  const std::vector<ChatMessage> hi = {{"user", "Hi"}};
  const std::string advice = "bbb decode --prompt TEXT --special";
  CHECK_THROWS_WITH(data::render_chat(*data::load_tokenizer(path), hi, path),
                    Contains(path) && Contains(advice) && Contains("has no chat template"));
  for (const auto& [jinja, what] : std::map<std::string, std::string>{
           {"{{ messages[0]['text'] }}", "{{messages[0].text}}"}, {"{{ '\\q' }}", "escape \\q"}}) {
    data::write_file_atomic(path + "/chat_template.jinja", jinja);
    CHECK_THROWS_WITH(data::render_chat(*data::load_tokenizer(path), hi, path),
                      Contains(path) && Contains(advice) && Contains(what));
  }
}

TEST_CASE("messages files are checked", "[chat_format]") {
  const auto messages = data::parse_messages(
      R"([{"role": "system", "content": "s"}, {"content": "u", "role": "user"}])", "m.json");
  REQUIRE(messages.size() == 2);
  CHECK(messages[1].role == "user");
  CHECK(messages[1].content == "u");
  for (const auto& [text, what] : std::map<std::string, std::string>{
           {"[", "malformed JSON"},
           {"{}", "not a list of messages"},
           {"[]", "not a list of messages"},
           {R"([{"role": "user", "content": "u"}, "x"])", "message 2"},
           {R"([{"role": "user"}])", "message 1"},
           {R"([{"role": "user", "content": ["u"]}])", "no text as its content"},
           {R"([{"role": "user", "content": "u", "name": "n"}])", "message 1"},
           {R"([{"role": "tool", "content": "u"}])", "'tool'"},
       }) {
    INFO(text);
    CHECK_THROWS_WITH(data::parse_messages(text, "m.json"), Contains("m.json") && Contains(what));
  }
}

TEST_CASE("the demo model's own chat format", "[chat_format]") {
  if (demo_model().empty()) return;  // demo_model() reports it
  const auto tokenizer = data::load_tokenizer(demo_model());
  CHECK(data::render_chat(*tokenizer, {{"user", "hello"}}) ==
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
        "Face<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n");
}

}  // namespace bbb::tests
