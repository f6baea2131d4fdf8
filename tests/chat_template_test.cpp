// The Jinja subset against what Python's jinja2 renders (scripts/make_chat_goldens.py).
#include "data/chat_template.h"

#include <catch2/catch.hpp>
#include <nlohmann/json.hpp>

#include "data/files.h"
#include "data/tokenizer.h"
#include "tests/support.h"

namespace bbb::tests {

using Catch::Contains;

namespace {

std::string render(const std::string& source) {
  data::ChatContext context;
  context.messages = {{"user", "hi"}};
  return data::render_template(source, context);
}

}  // namespace

TEST_CASE("chat templates render as jinja2 renders them", "[chat]") {
  const auto golden = nlohmann::json::parse(
      data::read_file(golden_folder() + "/chat_templates.json"));
  REQUIRE(golden.at("cases").size() > 50);
  for (const auto& one : golden.at("cases")) {
    const std::string name = one.at("template");
    const std::string chat = one.at("chat");
    INFO(name << ", " << chat);
    data::ChatContext context;
    for (const auto& message : golden.at("chats").at(chat)) {
      context.messages.push_back({message.at("role"), message.at("content")});
    }
    context.bos_token = "<s>";
    context.eos_token = "</s>";
    context.add_generation_prompt = one.at("prompt");
    context.date = one.at("date");
    const std::string source = golden.at("templates").at(name);
    if (one.contains("error")) {
      CHECK_THROWS_WITH(data::render_template(source, context),
                        Contains(one.at("error").get<std::string>()));
    } else {
      CHECK(data::render_template(source, context) == one.at("text").get<std::string>());
    }
  }
}

TEST_CASE("constructs outside the subset are named", "[chat]") {
  CHECK_THROWS_WITH(render("{% macro m() %}{% endmacro %}"), Contains("macro"));
  CHECK_THROWS_WITH(render("{% generation %}"), Contains("generation"));
  CHECK_THROWS_WITH(render("{{ 1 | tojson }}"), Contains("tojson"));
  CHECK_THROWS_WITH(render("{{ frobnicate(1) }}"), Contains("frobnicate"));
  CHECK_THROWS_WITH(render("{{ 'a'.zfill(3) }}"), Contains("zfill"));
  CHECK_THROWS_WITH(render("{{ 1 is prime }}"), Contains("prime"));
  CHECK_THROWS_WITH(render("{{ nobody.name }}"), Contains("nobody"));
  CHECK_THROWS_WITH(render("{{ 'a' + 1 }}"), Contains("string + int"));
}

TEST_CASE("malformed and hostile templates are errors", "[chat]") {
  for (const char* source : {"{{",
                             "{% if %}",
                             "{% if 1 %}",
                             "{% endfor %}",
                             "{% for %}",
                             "{% for x %}",
                             "{# open",
                             "{{ 'open }}",
                             "{{ 1 + }}",
                             "{{ (1 }}",
                             "{{ [1, }}",
                             "{{ a. }}",
                             "{{ {1: 2} }}",
                             "{{ ! }}",
                             "{% set %}",
                             "{% set x = %}",
                             "{% if 1 %}{% endfor %}",
                             "{% else %}",
                             "{{ 1 // 0 }}",
                             "{% %}",
                             "{{ }}",
                             "{{ 99999999999999999999 }}",
                             "{{ range(1000000000) }}"}) {
    INFO(source);
    CHECK_THROWS_AS(render(source), Error);
  }
  CHECK_THROWS_AS(render(std::string(100'000, '(').insert(0, "{{ ")), Error);
  CHECK_THROWS_AS(render("{{ " + std::string(100'000, '-') + "1 }}"), Error);
  std::string nested;
  for (int i = 0; i < 50'000; ++i) nested += "{% if 1 %}";
  CHECK_THROWS_AS(render(nested), Error);
  std::string doubled = "{% set s = 'xxxxxxxx' %}";
  for (int i = 0; i < 60; ++i) doubled += "{% set s = s ~ s %}";
  CHECK_THROWS_WITH(render(doubled), Contains("too long"));
  std::string loops;
  for (int i = 0; i < 10; ++i) loops += "{% for i in range(1000) %}";
  for (int i = 0; i < 10; ++i) loops += "{% endfor %}";
  CHECK_THROWS_WITH(render(loops), Contains("steps"));
  std::string chain = "{{ 1";
  for (int i = 0; i < 100'000; ++i) chain += " + 1";
  CHECK_THROWS_AS(render(chain + " }}"), Error);
  CHECK(render("").empty());
  CHECK(render("{ % } # plain") == "{ % } # plain");
}

TEST_CASE("the demo model's own template", "[chat]") {
  if (demo_model().empty()) return;  // which says so
  const auto tokenizer = data::load_tokenizer(demo_model());
  CHECK(data::render_chat(*tokenizer, "hello") ==
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
        "Face<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n");
}

}  // namespace bbb::tests
