// Tokenizers against the ids of Python's `tokenizers` and `sentencepiece`
// (scripts/make_tokenizer_goldens.py).
#include "data/tokenizer.h"

#include <catch2/catch.hpp>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "data/files.h"
#include "data/text.h"
#include "engine/rng.h"
#include "tests/support.h"

namespace bbb::tests {

using data::SpecialText;
using data::Tokenizer;
using Ids = std::vector<int32_t>;

namespace {

const std::string kFixtures = golden_folder() + "/tokenizers/";

const nlohmann::json& goldens() {
  static const nlohmann::json parsed =
      nlohmann::json::parse(data::read_file(kFixtures + "goldens.json"));
  return parsed;
}

const std::vector<std::string>& nasty() {
  static const auto texts = goldens().at("nasty").get<std::vector<std::string>>();
  return texts;
}

// Checks every text of the nasty set, with special tokens as text and, if there is a golden,
// parsed.
void check_nasty(const Tokenizer& tokenizer, const char* name) {
  const nlohmann::json& golden = goldens().at(name);
  REQUIRE(golden.at("as_text").size() == nasty().size());
  for (size_t i = 0; i < nasty().size(); ++i) {
    INFO(name << ", text " << i << ": " << nasty()[i]);
    CHECK(tokenizer.encode(nasty()[i], SpecialText::AsText) == golden.at("as_text")[i].get<Ids>());
    if (!golden.contains("parsed")) continue;
    CHECK(tokenizer.encode(nasty()[i], SpecialText::Parse) == golden.at("parsed")[i].get<Ids>());
  }
}

// Texts that are not UTF-8, and a text that is cut at every byte.
const std::vector<std::string>& broken_texts() {
  static const std::vector<std::string> texts = [] {
    std::vector<std::string> out = {
        "\xff\xfe",       "a\x80z",           "\xc3",     "\xe2\x82",
        "x\xed\xa0\x80y", "\xf4\x90\x80\x80", "\xc0\xaf", std::string("\0\xff\0", 3)};
    const std::string emoji = "ok \xf0\x9f\x98\x80 done";
    for (size_t length = 0; length <= emoji.size(); ++length) {
      out.push_back(emoji.substr(0, length));
      out.push_back(emoji.substr(length));
    }
    std::string all;
    for (int byte = 0; byte < 256; ++byte) all += static_cast<char>(byte);
    out.push_back(all);
    return out;
  }();
  return texts;
}

void check_round_trip(const Tokenizer& tokenizer, bool broken) {
  for (const std::string& text : nasty()) {
    const Ids ids = tokenizer.encode(text, SpecialText::AsText);
    CHECK(tokenizer.decode(ids) == text);
    std::string pieces;
    for (const int32_t id : ids) pieces += tokenizer.piece(id, false);
    CHECK(pieces == text);
  }
  for (const std::string& text : broken_texts()) {
    const Ids ids = tokenizer.encode(text, SpecialText::AsText);
    if (broken) CHECK(tokenizer.decode(ids) == text);
  }
}

// `tokenizer` exported, and loaded again.
std::unique_ptr<Tokenizer> exported(const Tokenizer& tokenizer, const TempDir& dir) {
  for (const auto& [name, content] : tokenizer.export_files()) {
    data::write_file_atomic(dir / name, content);
  }
  return data::load_tokenizer(dir.path());
}

void check_same_settings(const Tokenizer& a, const Tokenizer& b) {
  CHECK(a.vocab_size() == b.vocab_size());
  CHECK(a.bos() == b.bos());
  CHECK(a.eos() == b.eos());
  CHECK(a.add_bos() == b.add_bos());
  CHECK(a.chat_template() == b.chat_template());
  CHECK(a.end_of_turn() == b.end_of_turn());
}

std::unique_ptr<Tokenizer> demo_tokenizer() {
  if (demo_model().empty()) return nullptr;  // demo_model() reports it
  return data::load_tokenizer(demo_model());
}

}  // namespace

TEST_CASE("byte-level BPE with GPT-2's pre-tokenizer", "[tokenizer]") {
  const auto tokenizer = data::load_tokenizer(kFixtures + "gpt2");
  check_nasty(*tokenizer, "gpt2");
  check_round_trip(*tokenizer, true);
  CHECK(!tokenizer->bos());
  CHECK(!tokenizer->add_bos());
  CHECK(tokenizer->eos() == 0);
  CHECK(tokenizer->document_end() == 0);
  CHECK(tokenizer->end_of_turn() == Ids{0, 2});
  CHECK(tokenizer->chat_template() == "{{ messages[0].content }}");
  CHECK(tokenizer->find("<|im_start|>") == 1);
  CHECK(!tokenizer->find("<|no such token|>"));
  CHECK(tokenizer->piece(1, true) == "<|im_start|>");
  CHECK(tokenizer->piece(1, false).empty());
  CHECK_THROWS_AS(tokenizer->piece(-1, true), Error);
  const TempDir dir;
  const auto again = exported(*tokenizer, dir);
  check_nasty(*again, "gpt2");
  check_same_settings(*tokenizer, *again);
}

TEST_CASE("byte-level BPE with Llama-3's pre-tokenizer, also from a GGUF", "[tokenizer]") {
  const auto tokenizer = data::load_tokenizer(kFixtures + "llama3");
  const auto from_gguf = data::load_tokenizer(kFixtures + "llama3.gguf");
  const TempDir dir;
  const auto again = exported(*from_gguf, dir);
  check_nasty(*tokenizer, "llama3");
  check_round_trip(*tokenizer, true);
  CHECK(tokenizer->bos() == 0);
  CHECK(tokenizer->add_bos());  // by the post-processor's template
  CHECK(tokenizer->document_end() == 1);
  CHECK(tokenizer->end_of_turn() == Ids{1, 2});
  check_same_settings(*tokenizer, *from_gguf);
  check_same_settings(*tokenizer, *again);
  // A GGUF cannot store lstrip, which one added token of the fixture has.
  for (const std::string& text : nasty()) {
    if (text.find("-> x") != std::string::npos) continue;
    const Ids ids = tokenizer->encode(text, SpecialText::Parse);
    CHECK(from_gguf->encode(text, SpecialText::Parse) == ids);
    CHECK(again->encode(text, SpecialText::Parse) == ids);
  }
}

TEST_CASE("sentencepiece, from its model and from a GGUF", "[tokenizer]") {
  const auto tokenizer = data::load_tokenizer(kFixtures + "sentencepiece");
  const auto from_gguf = data::load_tokenizer(kFixtures + "sentencepiece.gguf");
  const TempDir dir;
  const auto again = exported(*from_gguf, dir);
  check_nasty(*tokenizer, "sentencepiece");
  check_nasty(*from_gguf, "sentencepiece");
  check_nasty(*again, "sentencepiece");
  check_same_settings(*tokenizer, *from_gguf);
  check_same_settings(*tokenizer, *again);
  CHECK(tokenizer->bos() == 1);
  CHECK(tokenizer->eos() == 2);
  CHECK(tokenizer->add_bos());
  CHECK(tokenizer->document_end() == 2);
  for (size_t i = 0; i < nasty().size(); ++i) {
    const Ids ids = tokenizer->encode(nasty()[i], SpecialText::AsText);
    CHECK(tokenizer->decode(ids) ==
          goldens().at("sentencepiece").at("decoded")[i].get<std::string>());
    std::string pieces;
    for (const int32_t id : ids) pieces += tokenizer->piece(id, false);
    if (!nasty()[i].empty()) CHECK(pieces == " " + tokenizer->decode(ids));
  }
  for (const std::string& text : broken_texts()) {
    CHECK_NOTHROW(tokenizer->encode(text, SpecialText::AsText));
  }
  // Special tokens; the text between them is encoded by itself.
  Ids expected = {1};
  const Ids hello = tokenizer->encode("Hello", SpecialText::AsText);
  expected.insert(expected.end(), hello.begin(), hello.end());
  expected.push_back(2);
  CHECK(tokenizer->encode("<s>Hello</s>", SpecialText::Parse) == expected);
  CHECK(tokenizer->encode("<s>Hello</s>", SpecialText::AsText) != expected);
  CHECK(tokenizer->decode(expected) == "Hello");
}

TEST_CASE("SmolLM2's vocabulary equals the reference on the nasty set", "[tokenizer]") {
  const auto tokenizer = demo_tokenizer();
  if (!tokenizer) return;
  check_nasty(*tokenizer, "smollm");
  check_round_trip(*tokenizer, false);  // it lacks tokens for some bytes that UTF-8 never has
  CHECK(tokenizer->document_end() == 0);
  CHECK(tokenizer->bos() == 1);
  CHECK(tokenizer->eos() == 2);
  CHECK(!tokenizer->add_bos());
  CHECK(tokenizer->vocab_size() == 49152);
  const TempDir dir;
  const auto again = exported(*tokenizer, dir);
  check_same_settings(*tokenizer, *again);
  for (const std::string& text : nasty()) {
    CHECK(again->encode(text, SpecialText::Parse) == tokenizer->encode(text, SpecialText::Parse));
  }
}

TEST_CASE("SmolLM2's vocabulary equals the reference on WikiText-2", "[tokenizer]") {
  const std::string path = data_file("wiki.test.raw");
  const auto tokenizer = demo_tokenizer();
  if (!tokenizer || path.empty()) return;
  const Ids ids = data::evaluation_tokens(*tokenizer, data::read_texts(path));
  CHECK(ids.size() == 303415);
  CHECK(ids.size() == goldens().at("smollm").at("wiki_count").get<size_t>());
  CHECK(std::to_string(engine::seed_from(ids.data(), ids.size() * 4)) ==
        goldens().at("smollm").at("wiki_fnv").get<std::string>());
  CHECK(tokenizer->decode(ids) == data::read_file(path));
}

TEST_CASE("long words do not take quadratic time", "[tokenizer]") {
  const auto tokenizer = data::load_tokenizer(kFixtures + "gpt2");
  for (const char* unit : {"a", "the", " ", "!", "\xff"}) {
    std::string text;
    while (text.size() < 300'000) text += unit;
    CHECK(tokenizer->decode(tokenizer->encode(text, SpecialText::AsText)) == text);
  }
}

TEST_CASE("bad tokenizer files are one-line errors that name the cause", "[tokenizer]") {
  const TempDir dir;
  const auto good = nlohmann::json::parse(data::read_file(kFixtures + "gpt2/tokenizer.json"));
  const auto error_of = [&](const std::string& content) -> std::string {
    data::write_file_atomic(dir / "tokenizer.json", content);
    try {
      data::load_tokenizer(dir.path());
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  };
  CHECK(error_of(good.dump()) == "no error");
  const auto changed = [&](const char* pointer, const nlohmann::json& value) {
    nlohmann::json root = good;
    root[nlohmann::json::json_pointer(pointer)] = value;
    const std::string error = error_of(root.dump());
    INFO(error);
    CHECK(error.find('\n') == std::string::npos);
    if (error != "no error") CHECK(error.find(dir.path()) != std::string::npos);
    return error;
  };
  using Catch::Contains;
  CHECK_THAT(changed("/pre_tokenizer", {{"type", "Whitespace"}}), Contains("Whitespace"));
  CHECK_THAT(changed("/pre_tokenizer", {{"type", "Metaspace"}, {"prepend_scheme", "last"}}),
             Contains("last"));
  CHECK_THAT(changed("/decoder", nullptr), Contains("no error"));  // byte-level texts need none
  CHECK_THAT(changed("/decoder", {{"type", "WordPiece"}}), Contains("WordPiece"));
  CHECK_THAT(changed("/normalizer", {{"type", "Lowercase"}}), Contains("Lowercase"));
  CHECK_THAT(changed("/model/type", "Unigram"), Contains("Unigram"));
  CHECK_THAT(changed("/model/dropout", 0.5), Contains("dropout"));
  CHECK_THAT(changed("/model/merges/0", "zz qq"), Contains("zz"));
  CHECK_THAT(changed("/model/merges/0", "single"), Contains("single"));
  CHECK_THAT(changed("/model/vocab/a", 2'000'000'000), Contains("2000000000"));
  CHECK_THAT(changed("/model/vocab/a", -7), Contains("-7"));
  CHECK_THAT(changed("/model/vocab", "text"), Contains("\"vocab\""));
  CHECK_THAT(changed("/model/vocab/a", 1.5), Contains("no whole number"));
  CHECK_THAT(changed("/model/merges", nullptr), Contains("\"merges\""));
  CHECK_THAT(changed("/model/merges/0", {"a", "b", "c"}), Contains("not a pair"));
  CHECK_THAT(changed("/added_tokens/0/single_word", true), Contains("single_word"));
  // Texts from the file do not break the line.
  CHECK_THAT(changed("/pre_tokenizer", {{"type", "a\nb"}}), Contains("a\\x0ab"));
  CHECK_THAT(changed("/pre_tokenizer", {{"type", "Metaspace"}, {"prepend_scheme", "a\nb"}}),
             Contains("a\\x0ab"));
  for (const char* pattern : {"a\nb(", "a\nb[\\S]"}) {
    CHECK_THAT(
        changed("/pre_tokenizer",
                {{"type", "Split"}, {"pattern", {{"Regex", pattern}}}, {"behavior", "Isolated"}}),
        Contains("a\\x0ab"));
  }
  CHECK_THAT(changed("/normalizer", {{"type", "a\nb"}}), Contains("a\\x0ab"));
  CHECK_THAT(changed("/decoder", {{"type", "a\nb"}}), Contains("a\\x0ab"));
  CHECK_THAT(changed("/model/type", "a\nb"), Contains("a\\x0ab"));
  CHECK_THAT(changed("/model/merges/0", "a\nb"), Contains("a\\x0ab"));
  CHECK_THAT(changed("/model/merges/0", {"a\nb", "c\nd"}), Contains("a\\x0ab and c\\x0ad"));
  CHECK_THAT(changed("/model/vocab/a\nb", -1), Contains("a\\x0ab"));
  CHECK_THAT(changed("/added_tokens/0", {{"id", 0}, {"content", "a\nb"}, {"single_word", true}}),
             Contains("a\\x0ab"));

  auto erased = good;
  erased["normalizer"] = {{"type", "Replace"}, {"pattern", {{"String", "Q\n"}}}, {"content", ""}};
  erased["added_tokens"].push_back({{"id", 600}, {"content", "Q\n"}, {"normalized", true}});
  CHECK_THAT(error_of(erased.dump()), Contains("nothing of the added token Q\\x0a"));

  data::write_file_atomic(dir / "tokenizer.json", good.dump());
  for (const std::string key : {"x7", "7x", "", " 7", "99999999999999999999", "a\nb"}) {
    data::write_file_atomic(
        dir / "tokenizer_config.json",
        nlohmann::json({{"added_tokens_decoder", {{key, {{"content", "x"}}}}}}).dump());
    CHECK_THROWS_WITH(data::load_tokenizer(dir.path()),
                      Contains("tokenizer_config.json: added_tokens_decoder has the key '" +
                               data::printable(key) + "', which is no id"));
  }
  data::write_file_atomic(dir / "tokenizer_config.json", "{}");

  CHECK_THAT(error_of("{"), Contains("malformed"));
  CHECK_THAT(error_of("[]"), Contains("tokenizer.json"));
  const TempDir empty;
  CHECK_THROWS_WITH(data::load_tokenizer(empty.path()), Contains("tokenizer.json"));
  data::write_file_atomic(empty / "tokenizer.model", "not a model");
  CHECK_THROWS_WITH(data::load_tokenizer(empty.path()), Contains("sentencepiece"));
}

}  // namespace bbb::tests
