// The kinds of tokenizer files that real checkpoints hold, against the ids of Python's `tokenizers`
// and `sentencepiece` (scripts/make_tokenizer_kinds.py).
#include <catch2/catch.hpp>
#include <nlohmann/json.hpp>

#include "data/files.h"
#include "data/tokenizer.h"
#include "tests/support.h"
#include "tools/cli.h"

namespace bbb::tests {

using data::SpecialText;
using data::Tokenizer;
using nlohmann::json;
using Ids = std::vector<int32_t>;

namespace {

const std::string kFixtures = std::string(BBB_SOURCE_DIR) + "/tests/goldens/tokenizers/";

const json& goldens() {
  static const json parsed = json::parse(data::read_file(kFixtures + "kinds.json"));
  return parsed;
}

json base_of(const std::string& name) {
  if (name == "pieces") return goldens().at("pieces");
  return json::parse(data::read_file(kFixtures + name + "/tokenizer.json"));
}

// RFC 7386, but a null is a value, and an object with a type replaces the whole other one.
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

TEST_CASE("a folder with tokenizer.model writes the prefix space where `legacy` wants it",
          "[tokenizer]") {
  // The token behind the model's pieces stands in one of three files.
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

TEST_CASE("tokenizer.json outranks a tokenizer.model beside it", "[tokenizer]") {
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

TEST_CASE("a GGUF's byte-level vocabulary is cut as its pre-tokenizer's name says", "[tokenizer]") {
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

TEST_CASE("GGUF vocabularies without a name for the pre-tokenizer, or with one text twice",
          "[tokenizer]") {
  // A changed copy of a fixture: `from` and `to` are of one length.
  const TempDir dir;
  const auto changed = [&](const char* fixture, const std::string& from, const std::string& to) {
    std::string bytes = data::read_file(kFixtures + fixture);
    const size_t at = bytes.find(from);
    REQUIRE(at != std::string::npos);
    bytes.replace(at, from.size(), to);
    data::write_file_atomic(dir / "changed", bytes);  // a GGUF is not known by its name
    return dir / "changed";
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
  // "he" is a piece of its own; "er" becomes another "he".
  CHECK_THAT(error_of(changed("pieces.gguf", std::string("\2\0\0\0\0\0\0\0er", 10),
                              std::string("\2\0\0\0\0\0\0\0he", 10))),
             Contains("both he"));
}

TEST_CASE("an id behind the vocabulary has no text", "[tokenizer]") {
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
