// The kinds of tokenizer files that real checkpoints hold, against the ids of Python's `tokenizers`
// and `sentencepiece` (scripts/make_tokenizer_kinds.py).
#include <algorithm>
#include <catch2/catch.hpp>
#include <nlohmann/json.hpp>

#include "data/files.h"
#include "data/tokenizer.h"
#include "tests/model_files.h"
#include "tests/support.h"
#include "tools/cli.h"

namespace bbb::tests {

using data::SpecialText;
using data::Tokenizer;
using nlohmann::json;
using Ids = std::vector<int32_t>;

namespace {

const std::string kFixtures = golden_folder() + "/tokenizers/";

const json& goldens() {
  static const json parsed = json::parse(data::read_file(kFixtures + "kinds.json"));
  return parsed;
}

json base_of(const std::string& name) {
  if (name == "pieces") return goldens().at("pieces");
  return json::parse(data::read_file(kFixtures + name + "/tokenizer.json"));
}

// A merge patch by RFC 7386, but a null is a value, and an object with a type replaces the whole
// object.
json patched(json base, const json& change) {
  for (const auto& [key, value] : change.items()) {
    const bool merges = value.is_object() && !value.contains("type") && base[key].is_object();
    base[key] = merges ? patched(base[key], value) : value;
  }
  return base;
}

void check_ids(const Tokenizer& tokenizer, const json& texts, const json& ids) {
  REQUIRE(texts.size() == ids.size());
  for (size_t i = 0; i < texts.size(); ++i) {
    INFO("text " << i << ": " << texts[i]);
    CHECK(tokenizer.encode(texts[i].get<std::string>(), SpecialText::Parse) == ids[i].get<Ids>());
  }
}

void write(const std::string& path, const json& content) {
  data::write_file_atomic(path, content.dump());
}

std::string error_of(const std::string& model) {
  try {
    data::load_tokenizer(model);
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

// A changed copy of a fixture. A GGUF is not recognized by its name, so this name will do.
std::string changed(const TempDir& dir, const std::string& fixture, const std::string& from,
                    const std::string& to) {
  std::string bytes = data::read_file(kFixtures + fixture);
  const size_t at = bytes.find(from);
  REQUIRE(at != std::string::npos);
  data::write_file_atomic(dir / "changed", bytes.replace(at, from.size(), to));
  return dir / "changed";
}

// The code point in the form of UTF-8, even if it is a surrogate.
std::string utf8(uint32_t point) {
  const auto tail = [&](int shift) { return static_cast<char>(0x80 | (point >> shift & 0x3F)); };
  if (point < 0x80) return {static_cast<char>(point)};
  if (point < 0x800) return {static_cast<char>(0xC0 | point >> 6), tail(0)};
  if (point < 0x10000) return {static_cast<char>(0xE0 | point >> 12), tail(6), tail(0)};
  return {static_cast<char>(0xF0 | point >> 18), tail(12), tail(6), tail(0)};
}

// `tokenizer` exported, and loaded again.
std::unique_ptr<Tokenizer> exported(const Tokenizer& tokenizer, const TempDir& dir) {
  for (const auto& [name, content] : tokenizer.export_files()) {
    data::write_file_atomic(dir / name, content);
  }
  return data::load_tokenizer(dir.path());
}

}  // namespace

TEST_CASE("tokenizer.json of every kind gives the reference's ids and text", "[tokenizer]") {
  for (const json& kind : goldens().at("kinds")) {
    INFO(kind.at("name"));
    const TempDir dir;
    const json root = patched(base_of(kind.at("base")), kind.at("change"));
    write(dir / "tokenizer.json", root);
    const auto tokenizer = data::load_tokenizer(dir.path());
    const json& texts = goldens().at("texts").at(kind.at("base").get<std::string>());
    check_ids(*tokenizer, texts, kind.at("ids"));
    if (!kind.contains("decoded")) continue;
    for (size_t i = 0; i < texts.size(); ++i) {
      INFO("text " << i << ": " << texts[i]);
      CHECK(tokenizer->decode(kind.at("ids")[i].get<Ids>()) ==
            kind.at("decoded")[i].get<std::string>());
    }
  }
}

TEST_CASE("a folder with tokenizer.model adds the prefix space where `legacy` says",
          "[tokenizer]") {
  // One of three files defines the token after the model's pieces.
  const int64_t size = static_cast<int64_t>(base_of("pieces").at("model").at("vocab").size());
  const json extra = {{"content", "<extra>"}, {"special", true}};
  json unigram = {{"model", {{"type", "Unigram"}}}, {"added_tokens", json::array({extra})}};
  unigram["added_tokens"][0]["id"] = size;
  const json config = {{"added_tokens_decoder", {{std::to_string(size), extra}}}};
  const std::pair<const char*, json> sources[] = {{"tokenizer.json", unigram},
                                                  {"tokenizer_config.json", config},
                                                  {"added_tokens.json", {{"<extra>", size}}}};
  for (const auto& [file, content] : sources) {
    for (const json& golden : goldens().at("sentencepiece")) {
      INFO(file << ", legacy " << golden.at("legacy"));
      const TempDir dir;
      data::write_file_atomic(dir / "tokenizer.model",
                              data::read_file(kFixtures + "sentencepiece/tokenizer.model"));
      write(dir / file, content);
      json settings = std::string(file) == "tokenizer_config.json" ? content : json::object();
      settings["legacy"] = golden.at("legacy");
      settings["additional_special_tokens"] = {"<extra>"};
      write(dir / "tokenizer_config.json", settings);
      const auto tokenizer = data::load_tokenizer(dir.path());
      CHECK(tokenizer->vocab_size() == size + 1);
      CHECK(tokenizer->find("<extra>") == size);
      check_ids(*tokenizer, golden.at("texts"), golden.at("ids"));
    }
  }
}

TEST_CASE("BOS from the post-processor's template, unless the settings name and add another",
          "[tokenizer]") {
  const json start = {{"SpecialToken", {{"id", "<|im_start|>"}, {"type_id", 0}}}};
  const json text = {{"Sequence", {{"id", "A"}, {"type_id", 0}}}};
  const auto load = [&](const json& single, const json& config) {
    const TempDir dir;
    json root = base_of("gpt2");
    const json by_template = {{"type", "TemplateProcessing"}, {"single", single}};
    root["post_processor"] = {{"type", "Sequence"},
                              {"processors", {{{"type", "ByteLevel"}}, by_template}}};
    write(dir / "tokenizer.json", root);
    if (!config.is_null()) write(dir / "tokenizer_config.json", config);
    return data::load_tokenizer(dir.path());
  };
  struct Case {
    json single, config;
    std::optional<int32_t> bos;
    bool add_bos;
  };
  const Case cases[] = {
      {{start, text}, nullptr, 1, true},
      {{text, start}, nullptr, std::nullopt, false},
      {{text}, nullptr, std::nullopt, false},
      {{start, text}, {{"bos_token", "<|endoftext|>"}}, 1, true},
      {{start, text}, {{"add_bos_token", true}}, 1, true},
      {{start, text}, {{"add_bos_token", false}, {"bos_token", "<|endoftext|>"}}, 0, false},
      {{text}, {{"add_bos_token", true}, {"bos_token", "<|endoftext|>"}}, 0, true},
  };
  for (const Case& c : cases) {
    INFO(c.single << ", " << c.config);
    const auto tokenizer = load(c.single, c.config);
    CHECK(tokenizer->bos() == c.bos);
    CHECK(tokenizer->add_bos() == c.add_bos);
  }
  json unknown = start;
  unknown["SpecialToken"]["id"] = "<no\n>";
  CHECK_THROWS_WITH(load({unknown, text}, nullptr),
                    Catch::Contains("lacks the BOS token <no\\x0a>"));
}

TEST_CASE("tokenizer.json takes precedence over tokenizer.model", "[tokenizer]") {
  const TempDir dir;
  write(dir / "tokenizer.json", base_of("gpt2"));
  const auto alone = data::load_tokenizer(dir.path());
  const std::string text = "Hello, <|im_start|>world";
  const Ids ids = alone->encode(text, SpecialText::Parse);
  for (const std::string& model :  // tiktoken's list of tokens and ranks; another vocabulary
       {std::string("IQ== 0\nIg== 1\n"),
        data::read_file(kFixtures + "sentencepiece/tokenizer.model")}) {
    data::write_file_atomic(dir / "tokenizer.model", model);
    CHECK(data::load_tokenizer(dir.path())->encode(text, SpecialText::Parse) == ids);
  }
}

TEST_CASE("a GGUF's padded sentencepiece vocabulary is read and exported", "[tokenizer]") {
  const json& golden = goldens().at("padded");
  const auto tokenizer = data::load_tokenizer(kFixtures + "pieces.gguf");
  const TempDir dir;
  const auto again = exported(*tokenizer, dir);
  const int32_t size = golden.at("size").get<int32_t>();
  for (const Tokenizer* each : {tokenizer.get(), again.get()}) {
    check_ids(*each, golden.at("texts"), golden.at("ids"));
    CHECK(each->vocab_size() == size);
    CHECK(each->piece(*each->find("<|user|>"), false) == "<|user|>");
    CHECK(each->piece(*each->find("<|end|>"), false).empty());
    for (int32_t id = size - 7; id < size; ++id) CHECK(each->piece(id, false).empty());
    CHECK(each->decode({size - 1, 300, size - 4}) == each->decode({300}));
  }
}

TEST_CASE("a GGUF's byte-level vocabulary splits text as its pre-tokenizer's name says",
          "[tokenizer]") {
  for (const auto& [name, golden] : goldens().at("pre").items()) {
    INFO(name);
    const auto tokenizer = data::load_tokenizer(kFixtures + "pre-" + name + ".gguf");
    const TempDir dir;
    const auto again = exported(*tokenizer, dir);
    for (const Tokenizer* each : {tokenizer.get(), again.get()}) {
      check_ids(*each, golden.at("texts"), golden.at("ids"));
      CHECK(each->vocab_size() == golden.at("size").get<int64_t>());
      CHECK(!each->find("[PAD518]"));
    }
  }
}

TEST_CASE("deepseek-llm's classes hold the reference's code points", "[tokenizer]") {
  // The probes are a letter, an "ideograph" and a sign. The golden lists the ranges of code points
  // that stay in one word with each; in such a word, bytes merge across the two characters.
  const auto tokenizer = data::load_tokenizer(kFixtures + "pre-deepseek-llm.gguf");
  const json& golden = goldens().at("pre").at("deepseek-llm").at("joined");
  REQUIRE(golden.size() == 3);
  for (const auto& [probe, ranges] : golden.items()) {
    INFO("probe " << probe);
    const Ids alone = tokenizer->encode(probe, SpecialText::AsText);
    REQUIRE(alone.size() == 1);
    std::vector<bool> expected(0x20000);
    for (const json& range : ranges) {
      for (size_t point = range[0]; point <= range[1]; ++point) expected[point] = true;
    }
    std::vector<bool> joined(expected.size());
    for (uint32_t point = 0; point < joined.size(); ++point) {
      joined[point] = tokenizer->encode(probe + utf8(point), SpecialText::AsText)[0] != alone[0];
    }
    CHECK(std::count(joined.begin(), joined.end(), true) > 30);
    const auto wrong = std::mismatch(joined.begin(), joined.end(), expected.begin());
    INFO("first wrong code point " << wrong.first - joined.begin());
    CHECK(wrong.first == joined.end());
  }
}

TEST_CASE("GGUFs whose pre-tokenizer's name is an alias, or adds BOS", "[tokenizer]") {
  const TempDir dir;
  const json& golden = goldens().at("pre").at("llama-bpe");
  for (const std::string name : {"llama3", "llama-v3", "falcon3", "pixtral", "lfm2", "midm-2.0"}) {
    INFO(name);
    const auto tokenizer = data::load_tokenizer(
        changed(dir, "pre-llama-bpe.gguf", gguf_string("llama-bpe"), gguf_string(name)));
    check_ids(*tokenizer, golden.at("texts"), golden.at("ids"));
  }
  for (const char* fixture : {"pre-llama-bpe.gguf", "pre-tekken.gguf", "pre-qwen2.gguf"}) {
    INFO(fixture);
    const auto tokenizer = data::load_tokenizer(
        changed(dir, fixture, "tokenizer.ggml.eos_token_id", "tokenizer.ggml.bos_token_id"));
    CHECK(tokenizer->bos() == 0);
    CHECK(tokenizer->add_bos() == (std::string(fixture) != "pre-qwen2.gguf"));
  }
}

TEST_CASE("GGUF vocabularies without a pre-tokenizer's name, or with one text twice",
          "[tokenizer]") {
  const TempDir dir;
  const auto changed = [&](const char* fixture, const std::string& from, const std::string& to) {
    return tests::changed(dir, fixture, from, to);
  };
  const auto unnamed =
      data::load_tokenizer(changed("pre-default.gguf", "tokenizer.ggml.pre", "tokenizer.ggml.xyz"));
  check_ids(*unnamed, goldens().at("pre").at("default").at("texts"),
            goldens().at("pre").at("default").at("ids"));
  using Catch::Contains;
  CHECK_THAT(error_of(changed("pre-smollm.gguf", "smollm", "smellm")), Contains("smellm"));
  CHECK_THAT(error_of(changed("pieces.gguf", "<|user|>", "<unk>aaa")), Contains("no error"));
  CHECK_THAT(error_of(changed("pieces.gguf", "<|user|>", "\x3c|end|\x3e\x20")),
             Contains("no error"));
  const std::string model =
      std::string("tokenizer.ggml.model\x8\0\0\0", 24);  // key and type: a string
  CHECK_THAT(
      error_of(changed("pieces.gguf", model + gguf_string("llama"), model + gguf_string("no\nne"))),
      Contains("model no\\x0ane is not supported"));
  // "he" is a piece of its own; "er" becomes another "he".
  CHECK_THAT(error_of(changed("pieces.gguf", std::string("\2\0\0\0\0\0\0\0er", 10),
                              std::string("\2\0\0\0\0\0\0\0he", 10))),
             Contains("both he"));
}

TEST_CASE("an id after the vocabulary has no text", "[tokenizer]") {
  for (const char* model : {"gpt2", "sentencepiece"}) {
    const auto tokenizer = data::load_tokenizer(kFixtures + model);
    const int32_t padding = static_cast<int32_t>(tokenizer->vocab_size());
    for (const int32_t id : {padding, padding + 1000, INT32_MAX}) {
      CHECK(tokenizer->piece(id, true).empty());
      CHECK(tokenizer->decode({id, 300, id}) == tokenizer->decode({300}));
      const Ids ends = tokenizer->end_of_turn();
      CHECK(std::find(ends.begin(), ends.end(), id) == ends.end());
    }
  }
}

TEST_CASE("bbb tokenize writes ids and pieces", "[tokenizer]") {
  const TempDir dir;
  data::write_file_atomic(dir / "text", "caf\u00e9 <|im_end|>\n");
  const auto run = [&](tools::Arguments more) {
    tools::Arguments arguments = {"--model",    kFixtures + "gpt2", "--text-file",
                                  dir / "text", "--json",           dir / "out"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    CHECK(tools::tokenize_command(arguments) == 0);
    return json::parse(data::read_file(dir / "out"));
  };
  const auto tokenizer = data::load_tokenizer(kFixtures + "gpt2");
  const std::string text = data::read_file(dir / "text");
  const json plain = run({});
  CHECK(plain.at("ids").get<Ids>() == tokenizer->encode(text, SpecialText::AsText));
  CHECK(plain.at("pieces").size() == plain.at("ids").size());
  const json special = run({"--special"});
  CHECK(special.at("ids").get<Ids>() == tokenizer->encode(text, SpecialText::Parse));
  std::string joined;
  for (const json& piece : special.at("pieces")) joined += piece.get<std::string>();
  CHECK(joined == text);
  CHECK_THROWS_AS(tools::tokenize_command({"--model", kFixtures + "gpt2"}), UsageError);
  CHECK_THROWS_AS(
      tools::tokenize_command({"--model", kFixtures + "gpt2", "--text-file", dir / "no"}), Error);
}

}  // namespace bbb::tests
