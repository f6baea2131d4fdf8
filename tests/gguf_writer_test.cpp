// GGUFs that bbb writes: containers, blocks and tokenizers, read back by the reader.
#include "data/gguf_writer.h"

#include <catch2/catch.hpp>
#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "data/files.h"
#include "data/gguf.h"
#include "data/gguf_tokenizer.h"
#include "data/half.h"
#include "tests/require_quiet.h"
#include "tests/support.h"

using namespace bbb;
using namespace bbb::tests;
using Catch::Matchers::Contains;
using data::GgmlType;

namespace {

const std::string kFixtures = golden_folder() + "/tokenizers/";

std::vector<uint8_t> bytes_of(const std::vector<float>& values) {
  const auto* p = reinterpret_cast<const uint8_t*>(values.data());
  return {p, p + values.size() * sizeof(float)};
}

std::vector<float> dequantized(GgmlType type, const std::vector<uint8_t>& blocks, int64_t count) {
  std::vector<float> out(static_cast<size_t>(count));
  data::gguf_dequantize(
      out.data(),
      {static_cast<uint32_t>(type), {count}, blocks.data(), static_cast<int64_t>(blocks.size())},
      "t");
  return out;
}

// A GGUF of a tokenizer alone, loaded.
std::unique_ptr<data::Tokenizer> written(const TempDir& dir, const data::GgufMetadata& metadata) {
  const std::string path = dir / "tokenizer.gguf";
  std::filesystem::remove(path);
  data::GgufWriter writer(path, metadata, {});
  writer.finish();
  writer.commit();
  return data::load_tokenizer(path);
}

}  // namespace

TEST_CASE("float to half: every half, and the floats between two of them", "[gguf]") {
  for (uint32_t h = 0; h < 0x7c00; ++h) {
    const auto half = static_cast<uint16_t>(h), above = static_cast<uint16_t>(h + 1);
    const float low = data::half_to_float(half);
    REQUIRE_QUIET(data::float_to_half(low) == half);
    REQUIRE_QUIET(data::float_to_half(-low) == (half | 0x8000));
    // 65536 stands for infinity's place behind the largest half.
    const float high = above == 0x7c00 ? 65536 : data::half_to_float(above);
    const float middle = low + (high - low) / 2;
    REQUIRE_QUIET(data::float_to_half(middle) == (half % 2 == 0 ? half : above));
    REQUIRE_QUIET(data::float_to_half(std::nextafter(middle, 0.0f)) == half);
    REQUIRE_QUIET(data::float_to_half(std::nextafter(middle, high)) == above);
  }
  CHECK(data::float_to_half(INFINITY) == 0x7c00);
  CHECK(std::isnan(data::half_to_float(data::float_to_half(NAN))));
}

TEST_CASE("gguf writer: metadata of every type, and tensors", "[gguf]") {
  const TempDir dir;
  const std::vector<float> table = {1, 2, 3, 4, 5, 6};
  {
    data::GgufWriter writer(dir / "m.gguf",
                            {{"a.count", uint32_t{4000000000}},
                             {"a.signed", int32_t{-5}},
                             {"a.real", 0.5f},
                             {"a.flag", true},
                             {"a.text", "h\xc3\xa9"},
                             {"a.integers", std::vector<int32_t>{1, -2}},
                             {"a.reals", std::vector<float>{0.25f}},
                             {"a.texts", std::vector<std::string>{"x", "", "yz"}}},
                            {{"table", {2, 3}}, {"blocks", {1, 32}}});
    writer.add("table", GgmlType::F32, bytes_of(table));
    writer.add("blocks", GgmlType::Q8_0, data::round_q8_0(std::vector<float>(32, 127)));
    writer.finish();
    CHECK(data::Gguf(writer.temporary()).boolean("a.flag"));
    writer.commit();
  }
  const data::Gguf g(dir / "m.gguf");
  CHECK(g.integer("a.count") == 4000000000);
  CHECK(g.integer("a.signed") == -5);
  CHECK(g.real("a.real") == 0.5);
  CHECK(g.string("a.text") == "h\xc3\xa9");
  CHECK(g.integers("a.integers") == std::vector<int64_t>{1, -2});
  CHECK(g.reals("a.reals") == std::vector<double>{0.25});
  CHECK(g.strings("a.texts") == std::vector<std::string>{"x", "", "yz"});
  CHECK(g.tensor("table").shape == engine::Shape{2, 3});
  std::vector<float> read(6);
  data::gguf_dequantize(read.data(), g.tensor("table"), "table");
  CHECK(read == table);
  CHECK(g.tensor("blocks").type == 8);

  { data::GgufWriter unfinished(dir / "n.gguf", {}, {{"t", {1}}}); }
  CHECK(std::distance(std::filesystem::directory_iterator(dir.path()), {}) == 1);
}

TEST_CASE("gguf writer: blocks hold their codes", "[gguf]") {
  uint8_t codes[32];
  for (uint8_t i = 0; i < 32; ++i) codes[i] = static_cast<uint8_t>(i * 7 % 16);
  std::vector<uint8_t> q4_0(data::kQ4_0Bytes), q4_1(data::kQ4_1Bytes);
  data::pack_q4_0(q4_0.data(), 0.375f, codes);
  data::pack_q4_1(q4_1.data(), 0.375f, -1.5f, codes);
  const auto symmetric = dequantized(GgmlType::Q4_0, q4_0, 32);
  const auto offset = dequantized(GgmlType::Q4_1, q4_1, 32);
  for (size_t i = 0; i < 32; ++i) {
    CHECK(symmetric[i] == 0.375f * static_cast<float>(codes[i] - 8));
    CHECK(offset[i] == 0.375f * static_cast<float>(codes[i]) - 1.5f);
  }

  // Half a step of max / 127, and what rounding the step to 11 bits adds at the ends.
  engine::Rng rng(1);
  std::vector<float> values(96);
  for (size_t i = 0; i < values.size(); ++i)
    values[i] = i < 64 ? static_cast<float>(rng.normal()) : 0;
  const auto read = dequantized(GgmlType::Q8_0, data::round_q8_0(values), 96);
  for (size_t block = 0; block < 3; ++block) {
    float largest = 0;
    for (size_t i = 0; i < 32; ++i) largest = std::max(largest, std::fabs(values[32 * block + i]));
    for (size_t i = 0; i < 32; ++i)
      CHECK(std::fabs(read[32 * block + i] - values[32 * block + i]) <=
            largest * (0.5f / 127 + 0x1p-11f));
  }
}

TEST_CASE("gguf writer: a tokenizer is the same again", "[gguf][tokenizer]") {
  const auto goldens = nlohmann::json::parse(data::read_file(kFixtures + "goldens.json"));
  const auto texts = goldens.at("nasty").get<std::vector<std::string>>();
  for (const std::string name :
       {"gpt2", "sentencepiece", "llama3.gguf", "pieces.gguf", "sentencepiece.gguf",
        "pre-deepseek-coder.gguf", "pre-deepseek-llm.gguf", "pre-default.gguf",
        "pre-llama-bpe.gguf", "pre-qwen2.gguf", "pre-smollm.gguf", "pre-tekken.gguf"}) {
    CAPTURE(name);
    const auto tokenizer = data::load_tokenizer(kFixtures + name);
    const TempDir dir;
    const int64_t rows = tokenizer->vocab_size() + 3;
    std::vector<std::unique_ptr<data::Tokenizer>> again;
    again.push_back(written(dir, data::gguf_tokenizer(*tokenizer, name, rows, {})));
    if (name.ends_with(".gguf"))
      again.push_back(written(dir, data::gguf_tokenizer(data::Gguf(kFixtures + name))));
    for (const auto& read : again) {
      CHECK(read->bos() == tokenizer->bos());
      CHECK(read->eos() == tokenizer->eos());
      CHECK(read->add_bos() == tokenizer->add_bos());
      CHECK(read->chat_template() == tokenizer->chat_template());
      for (const std::string& text : texts) {
        INFO(text);
        CHECK(read->encode(text, data::SpecialText::AsText) ==
              tokenizer->encode(text, data::SpecialText::AsText));
        CHECK(read->encode(text, data::SpecialText::Parse) ==
              tokenizer->encode(text, data::SpecialText::Parse));
      }
    }
    const data::Gguf file(dir / "tokenizer.gguf");
    if (again.size() == 1)
      CHECK(static_cast<int64_t>(file.strings("tokenizer.ggml.tokens").size()) == rows);
  }
}

TEST_CASE("gguf writer: the tokens that end a text; BOS", "[gguf][tokenizer]") {
  const auto tokenizer = data::load_tokenizer(kFixtures + "gpt2");  // its EOS is 0
  const TempDir dir;
  written(dir, data::gguf_tokenizer(*tokenizer, "m", tokenizer->vocab_size(), {2, 0, 7}));
  const data::Gguf file(dir / "tokenizer.gguf");
  CHECK(file.integer("tokenizer.ggml.eos_token_id") == 0);
  CHECK(file.integer("tokenizer.ggml.eot_token_id") == 2);
  CHECK(file.integer("tokenizer.ggml.eom_token_id") == 7);
  CHECK_FALSE(file.has("tokenizer.ggml.bos_token_id"));
}

TEST_CASE("gguf writer: a tokenizer that llama.cpp would read differently is refused",
          "[gguf][tokenizer]") {
  const TempDir dir;
  const auto good = nlohmann::json::parse(data::read_file(kFixtures + "gpt2/tokenizer.json"));
  const auto error_of = [&](const char* pointer, const nlohmann::json& value) -> std::string {
    nlohmann::json root = good;
    if (*pointer) root[nlohmann::json::json_pointer(pointer)] = value;
    data::write_file_atomic(dir / "tokenizer.json", root.dump());
    const auto tokenizer = data::load_tokenizer(dir.path());
    try {
      data::gguf_tokenizer(*tokenizer, "m", tokenizer->vocab_size() - (*pointer ? 0 : 1), {});
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  };
  CHECK_THAT(error_of("/model/ignore_merges", true), Contains("no name for its pre_tokenizer"));
  CHECK_THAT(error_of("/pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", true}}),
             Contains("no name for its pre_tokenizer"));
  CHECK_THAT(error_of("/normalizer", {{"type", "NFKC"}}), Contains("its normalizer is NFKC"));
  CHECK_THAT(error_of("", nullptr), Contains("and the embedding "));
}
