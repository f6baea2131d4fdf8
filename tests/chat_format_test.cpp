// Chat formats against transformers (scripts/make_chat_goldens.py), and what is refused.
#include "data/chat_format.h"

#include <catch2/catch.hpp>
#include <map>
#include <nlohmann/json.hpp>

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

TEST_CASE("chats of real templates are transformers' text and ids", "[chat_format]") {
  const json golden = json::parse(data::read_file(kFolder + "goldens.json"));
  const auto tokenizer = data::load_tokenizer(kFolder);
  std::map<std::string, data::ChatFormat> formats;
  data::ChatContext now = context();
  now.now = golden.at("now");
  int texts = 0, refused_alone = 0;
  for (const json& one : golden.at("cases")) {
    const std::string name = one.at("template");
    if (!formats.contains(name)) formats.emplace(name, real_format(name));
    std::vector<ChatMessage> messages;
    for (const json& message : golden.at("chats").at(one.at("chat").get<size_t>()))
      messages.push_back({message.at("role"), message.at("content")});
    const auto generation = one.at("prompt") ? GenerationPrompt::Add : GenerationPrompt::None;
    INFO(one.dump());
    if (one.contains("error")) {
      CHECK_THROWS_WITH(formats.at(name).render(messages, generation, now),
                        Contains(one.at("error").get<std::string>()));
      continue;
    }
    std::string text;
    try {
      text = formats.at(name).render(messages, generation, now);
    } catch (const Error& error) {  // what the template would drop without a word
      CHECK_THAT(error.what(), Contains("would drop message"));
      ++refused_alone;
      continue;
    }
    ++texts;
    CHECK(text == one.at("text").get<std::string>());
    if (one.contains("ids"))
      CHECK(tokenizer->encode(text, data::SpecialText::Parse) ==
            one.at("ids").get<std::vector<int32_t>>());
  }
  CHECK(texts > 350);
  CHECK(refused_alone < 10);
}

TEST_CASE("each template's family is known", "[chat_format]") {
  for (const auto& [name, family] :
       std::map<std::string, std::string>{{"smollm", "ChatML"},
                                          {"smollm2", "ChatML"},
                                          {"hermes-3", "ChatML"},
                                          {"llama-2", "Llama-2"},
                                          {"llama-3", "Llama-3"},
                                          {"llama-3.1", "Llama-3"},
                                          {"llama-3.2", "Llama-3"},
                                          {"mistral-v1", "Mistral"},
                                          {"mistral-v1-old", "Mistral"},
                                          {"mistral-v3", "Mistral"},
                                          {"mistral-v7", "Mistral"},
                                          {"mistral-nemo", "Mistral"},
                                          {"zephyr", "Zephyr"},
                                          {"deepseek-llm", "DeepSeek"},
                                          {"deepseek-coder", "DeepSeek"}}) {
    INFO(name);
    CHECK(real_format(name).family() == family);
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

TEST_CASE("a template that is not known entirely is refused", "[chat_format]") {
  const std::string smollm = data::read_file(kFolder + "smollm.jinja");
  CHECK_NOTHROW(data::ChatFormat(smollm));
  for (const std::string& unknown : {
           std::string(),
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
           // The check of roles is over other messages than the turns.
           changed(data::read_file(kFolder + "mistral-v3.jinja"),
                   "{%- for message in loop_messages %}", "{%- for message in messages %}"),
           // Names that hold only in some cases.
           "{% if messages[0]['role'] == 'user' %}{% set m = messages %}{% endif %}" +
               changed(smollm, "in messages", "in m"),
           changed(smollm, "{{'<|im_start|>'",
                   "{% if message['role'] == 'user' %}{% set content = message['content'] %}"
                   "{% endif %}{{ content + '<|im_start|>'"),
           "{% set add_generation_prompt = 'always' %}" + smollm,
           // Vicuna's marks, in a known shape.
           std::string("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}"
                       "{% endfor %}"),
       }) {
    INFO(unknown);
    CHECK_THROWS_WITH(data::ChatFormat(unknown), Contains("--prompt TEXT --special"));
  }
  for (const char* broken : {"{{", "{% if %}", "{# open", "{{ 'open }}", "{% for x %}",
                             "{{ '\\x41' }}", "\1if DEAD\2", "{% endfor %}"}) {
    INFO(broken);
    CHECK_THROWS_AS(data::ChatFormat(broken), Error);
  }
  std::string nested;
  for (int i = 0; i < 20'000; ++i) nested += "{% if tools %}";
  CHECK_THROWS_AS(data::ChatFormat(nested), Error);
  for (int i = 0; i < 20'000; ++i) nested += "{% endif %}";
  CHECK_THROWS_AS(data::ChatFormat(nested), Error);
}

TEST_CASE("messages that a format cannot carry are refused", "[chat_format]") {
  const auto format = real_format("mistral-v1-old");
  const auto render_these = [&](const std::vector<ChatMessage>& messages) {
    return format.render(messages, GenerationPrompt::Add, context());
  };
  CHECK_THROWS_WITH(render_these({{"system", "s"}, {"user", "u"}}), Contains("must alternate"));
  CHECK_THROWS_WITH(render_these({{"tool", "t"}}), Contains("'tool'"));
  CHECK_THROWS_WITH(render_these({}), Contains("a chat needs a message"));
  CHECK_THROWS_WITH(
      data::render_chat(*data::load_tokenizer("synthetic:smollm2-135m"), {{"user", "Hi"}}),
      Contains("--prompt TEXT --special"));
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
  if (demo_model().empty()) return;  // which says so
  const auto tokenizer = data::load_tokenizer(demo_model());
  CHECK(data::render_chat(*tokenizer, {{"user", "hello"}}) ==
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
        "Face<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n");
}

}  // namespace bbb::tests
