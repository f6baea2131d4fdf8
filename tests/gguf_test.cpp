// GGUF: files of the reference writer, dequantization against the reference, and malformed files.
// The goldens come from scripts/make_gguf_goldens.py.
#include "data/gguf.h"

#include <catch2/catch.hpp>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "data/files.h"
#include "tests/model_files.h"
#include "tests/support.h"

using namespace bbb;
using Catch::Matchers::Contains;
using tests::GgufFile;
using tests::raw;

namespace {

std::string golden(const std::string& name) { return tests::golden_folder() + "/" + name; }

std::string from_hex(const std::string& hex) {
  std::string out;
  for (size_t i = 0; i + 1 < hex.size(); i += 2)
    out += static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16));
  return out;
}

data::GgufContents parse(const std::string& file) {
  return data::parse_gguf(reinterpret_cast<const uint8_t*>(file.data()),
                          static_cast<int64_t>(file.size()), "f");
}

GgufFile small() {
  GgufFile f;
  f.text("name", "value");
  f.tensor("t", {2, 3}, 0, std::string(24, '\1'));
  f.tensor("u", {32}, 8, std::string(34, '\2'));
  return f;
}

}  // namespace

TEST_CASE("gguf: a file of the reference writer") {
  const data::Gguf g(golden("tiny.gguf"));
  CHECK(g.integer("an.u8") == 200);
  CHECK(g.integer("an.i8") == -100);
  CHECK(g.integer("an.u16") == 60000);
  CHECK(g.integer("an.i16") == -30000);
  CHECK(g.integer("an.u32") == 4000000000);
  CHECK(g.integer("an.i32") == -2000000000);
  CHECK(g.integer("an.u64") == int64_t{1} << 40);
  CHECK(g.integer("an.i64") == -(int64_t{1} << 40));
  CHECK(g.real("an.f32") == 0.5);
  CHECK(g.real("an.f64") == 1e300);
  CHECK(g.real("an.i8") == -100);
  CHECK(g.boolean("an.bool"));
  CHECK(g.string("an.string") == "h\xc3\xa9llo");
  CHECK(g.integers("integers") == std::vector<int64_t>{1, -2, 3});
  CHECK(g.reals("reals") == std::vector<double>{0.5, 1.5});
  CHECK(g.strings("strings") == std::vector<std::string>{"a", "", "\xe4\xb8\x96"});
  CHECK(g.has("nested"));
  CHECK_THROWS_WITH(g.integers("nested"), Contains("'nested' is not an array of integers"));
  CHECK(g.tensor("first").shape == engine::Shape{2, 3});
  std::vector<float> first(6), second(4);
  data::gguf_dequantize(first.data(), g.tensor("first"), "first");
  data::gguf_dequantize(second.data(), g.tensor("second"), "second");
  CHECK(first == std::vector<float>{0, 1, 2, 3, 4, 5});
  CHECK(second == std::vector<float>(4, 0.25f));

  CHECK_THROWS_WITH(g.integer("none"), Contains("metadata 'none' is missing"));
  CHECK_THROWS_WITH(g.integer("an.string"), Contains("metadata 'an.string' is not an integer"));
  CHECK_THROWS_WITH(g.real("an.string"), Contains("is not a number"));
  CHECK_THROWS_WITH(g.strings("reals"), Contains("is not an array of strings"));
  CHECK_THROWS_WITH(g.reals("an.f32"), Contains("is not an array"));
  CHECK_THROWS_WITH(g.tensor("third"), Contains("tensor 'third' is missing"));
}

TEST_CASE("gguf: every type dequantizes to the reference's values") {
  const auto types = nlohmann::json::parse(data::read_file(golden("gguf_types.json")));
  CHECK(types.size() == 15);
  for (const auto& [name, golden] : types.items()) {
    INFO(name);
    const std::string blocks = from_hex(golden["blocks"].get<std::string>());
    const std::string values = from_hex(golden["values"].get<std::string>());
    const uint32_t type = golden["type"].get<uint32_t>();
    const int64_t n = static_cast<int64_t>(values.size() / 4);
    CHECK(data::gguf_type_name(type) == name);
    REQUIRE(data::gguf_type_bytes(type, n) == static_cast<int64_t>(blocks.size()));
    std::vector<float> expected(static_cast<size_t>(n)), out(expected);
    std::memcpy(expected.data(), values.data(), values.size());
    const data::GgufTensor tensor = {type,
                                     {n},
                                     reinterpret_cast<const uint8_t*>(blocks.data()),
                                     static_cast<int64_t>(blocks.size())};
    data::gguf_dequantize(out.data(), tensor, name);
    CHECK(out == expected);  // the same operations in the same order: equal, not close
  }
  CHECK_THROWS_WITH(data::gguf_type_name(99), Contains("type number 99"));
  CHECK_THROWS_WITH(data::gguf_type_bytes(12, 255), Contains("not whole blocks of Q4_K"));
}

TEST_CASE("gguf: every type of the reference is read, or refused by its name") {
  const auto names = nlohmann::json::parse(data::read_file(golden("gguf_type_names.json")));
  CHECK(names.size() > 30);
  for (const auto& [name, number] : names.items()) {
    std::string said;
    try {
      said = data::gguf_type_name(number.get<uint32_t>());
    } catch (const Error& e) {
      said = std::string(e.what());
      CHECK_THAT(said, Contains("unsupported ggml type " + name + "; F32, F16, Q4_0"));
      continue;
    }
    CHECK(said == name);
  }
}

TEST_CASE("gguf: a split model is opened by its first part") {
  const tests::TempDir dir;
  const auto part = [](int i, const std::string& count = "00003") {
    return "split-0000" + std::to_string(i) + "-of-" + count + ".gguf";
  };
  const auto copy = [&](int from, const std::string& to) {
    tests::write_plain(dir / to, data::read_file(golden(part(from))));
  };
  for (int i : {1, 2, 3}) copy(i, part(i));
  {
    const data::Gguf g(dir / part(1));
    CHECK(g.string("a.string") == "in the first part");
    CHECK(g.tensors().size() == 3);
    for (const auto& [name, value] :
         {std::pair("first", 0.5f), std::pair("second", 1.5f), std::pair("third", 2.5f)}) {
      std::vector<float> out(4);
      data::gguf_dequantize(out.data(), g.tensor(name), name);
      CHECK(out == std::vector<float>(4, value));
    }
  }
  CHECK_THROWS_WITH(data::Gguf(dir / part(2)),
                    Contains(part(2) + ": part 2 of 3") && Contains(dir / part(1)));
  copy(1, "blob");
  CHECK_THROWS_WITH(data::Gguf(dir / "blob"), Contains("name holds '-00001-of-00003'"));
  copy(2, part(3));
  CHECK_THROWS_WITH(data::Gguf(dir / part(1)), Contains(part(3) + ": is not part 3 of 3"));
  std::filesystem::remove(dir / part(3));
  CHECK_THROWS_WITH(data::Gguf(dir / part(1)), Contains("part 3, " + (dir / part(3))));

  // The suffix of a file's name does not matter.
  for (int i : {1, 2, 3}) copy(i, "m-0000" + std::to_string(i) + "-of-00003");
  CHECK(data::Gguf(dir / "m-00001-of-00003").tensors().size() == 3);
}

TEST_CASE("gguf: parts that do not belong together") {
  const tests::TempDir dir;
  const auto write = [&](uint32_t i, const std::string& tensor, uint32_t tensors) {
    GgufFile f;
    f.integer("split.no", i - 1);
    f.integer("split.count", 2);
    f.integer("split.tensors.count", tensors);
    f.tensor(tensor, {1}, 0, raw(1.0f));
    tests::write_plain(dir / ("s-0000" + std::to_string(i) + "-of-00002.gguf"), f.bytes());
  };
  write(1, "a", 2);
  write(2, "a", 2);
  CHECK_THROWS_WITH(data::Gguf(dir / "s-00001-of-00002.gguf"), Contains("'a' is in another part"));
  write(2, "b", 2);
  CHECK(data::Gguf(dir / "s-00001-of-00002.gguf").tensors().size() == 2);
  write(1, "a", 3);
  CHECK_THROWS_WITH(data::Gguf(dir / "s-00001-of-00002.gguf"), Contains("hold 2 tensors, not 3"));

  for (const int64_t number : {int64_t{-1}, int64_t{2}, INT64_MAX}) {
    GgufFile f;
    f.pair("split.no", 11, raw(number));
    f.integer("split.count", 2);
    tests::write_plain(dir / "one.gguf", f.bytes());
    CHECK_THROWS_WITH(data::Gguf(dir / "one.gguf"),
                      Contains("split.no is " + std::to_string(number) + ","));
  }
}

TEST_CASE("gguf: every truncation of a good file is refused") {
  const std::string file = small().bytes();
  CHECK(parse(file).tensors.size() == 2);
  // The last tensor's padding may be absent: 64 - 34 bytes of it.
  CHECK(parse(file.substr(0, file.size() - 30)).tensors.size() == 2);
  for (size_t size = 0; size < file.size() - 30; ++size)
    CHECK_THROWS_AS(parse(file.substr(0, size)), Error);
  CHECK_THROWS_WITH(parse(file + "x"), Contains("belong to no tensor"));
}

TEST_CASE("gguf: versions and byte order") {
  GgufFile f = small();
  f.version = 2;
  CHECK(parse(f.bytes()).version == 2);
  for (const uint32_t version : {0u, 1u, 4u}) {
    f.version = version;
    CHECK_THROWS_WITH(parse(f.bytes()), Contains("only 2 and 3 are read"));
  }
  f.version = 3u << 24;
  CHECK_THROWS_WITH(parse(f.bytes()), Contains("big-endian"));
  CHECK_THROWS_WITH(parse("GGML" + std::string(60, '\0')), Contains("not a GGUF file"));
}

TEST_CASE("gguf: malformed metadata") {
  const auto with = [](uint32_t type, const std::string& value) {
    GgufFile f;
    f.pair("key", type, value);
    return f.bytes();
  };
  const auto array = [&](uint32_t type, uint64_t count, const std::string& values) {
    return with(9, raw(type) + raw(count) + values);
  };
  CHECK_THROWS_WITH(parse(with(13, "")), Contains("'key' has unknown value type 13"));
  CHECK_THROWS_WITH(parse(with(7, "\2")), Contains("'key' holds 2 where a boolean"));
  CHECK_THROWS_WITH(parse(with(10, raw(~uint64_t{0}))), Contains("too large"));
  CHECK_THROWS_WITH(parse(with(8, raw(~uint64_t{0}))), Contains("runs past the file's end"));
  CHECK_THROWS_WITH(parse(array(9, 1000, "")), Contains("more than the file can hold"));
  std::string nested = raw<uint32_t>(4) + raw<uint64_t>(1) + raw<uint32_t>(7);
  for (int depth = 1; depth <= 8; ++depth) {
    CHECK(parse(with(9, nested)).metadata.count("key") == 1);
    nested = raw<uint32_t>(9) + raw<uint64_t>(1) + nested;
  }
  CHECK(parse(with(9, nested)).metadata.count("key") == 1);
  CHECK_THROWS_WITH(parse(with(9, raw<uint32_t>(9) + raw<uint64_t>(1) + nested)),
                    Contains("'key' nests arrays too deeply"));
  CHECK_THROWS_WITH(parse(array(77, 1, "")), Contains("'key' has unknown value type 77"));
  for (const uint32_t type : {0u, 6u, 7u, 8u, 12u})
    for (const uint64_t count : {~uint64_t{0}, uint64_t{1} << 61, uint64_t{1000}})
      CHECK_THROWS_WITH(parse(array(type, count, "")), Contains("more than the file can hold"));

  GgufFile f = small();
  f.text("name", "again");
  CHECK_THROWS_WITH(parse(f.bytes()), Contains("metadata 'name' is given twice"));
  for (const uint64_t count : {~uint64_t{0}, uint64_t{1} << 60}) {
    f = small();
    f.pair_count = count;
    CHECK_THROWS_WITH(parse(f.bytes()), Contains("metadata count"));
    f = small();
    f.tensor_count = count;
    CHECK_THROWS_WITH(parse(f.bytes()), Contains("tensor count"));
  }
  for (const uint32_t alignment : {0u, 3u, 48u, 0x80000000u}) {
    f = small();
    f.integer("general.alignment", alignment);
    CHECK_THROWS_WITH(parse(f.bytes()), Contains("not a power of two"));
  }
}

TEST_CASE("gguf: alignments other than 32") {
  for (const uint32_t alignment : {8u, 64u}) {
    GgufFile f;
    f.alignment = alignment;
    f.integer("general.alignment", alignment);
    f.tensor("a", {3}, 1, "abcdef");
    f.tensor("b", {2}, 1, "ABCD");
    const std::string file = f.bytes();
    const data::GgufContents contents = parse(file);
    CHECK(std::string(reinterpret_cast<const char*>(contents.tensors.at("b").data), 4) == "ABCD");
  }
}

TEST_CASE("gguf: malformed tensors") {
  struct Case {
    std::vector<uint64_t> dims;
    uint32_t type;
    uint64_t offset;
    const char* message;
  };
  const uint64_t huge = uint64_t{1} << 40;
  const Case cases[] = {
      {{}, 0, 0, "has 0 dimensions"},
      {{1, 1, 1, 1, 1}, 0, 0, "has 5 dimensions"},
      {{0}, 0, 0, "empty, or too many"},
      {{~uint64_t{0}}, 0, 0, "too many elements"},
      {{huge, huge}, 0, 0, "too many elements"},
      {{huge}, 0, 0, "cut short"},
      {{4}, 4, 0, "tensor 't': unsupported ggml type Q4_2"},
      {{4}, 16, 0, "tensor 't': unsupported ggml type IQ2_XXS"},
      {{31}, 2, 0, "not a multiple of Q4_0's 32"},
      {{16, 2}, 2, 0, "rows of 16, not a multiple of Q4_0's 32"},
      {{4}, 0, 8, "not aligned to 32"},
      {{4}, 0, 32, "a gap of 32 bytes"},
      {{4}, 0, ~uint64_t{31}, "a gap of"},
      {{32}, 0, 0, "cut short"},
  };
  for (const Case& c : cases) {
    GgufFile f;
    f.info("t", c.dims, c.type, c.offset);
    f.data = std::string(64, '\0');
    INFO(c.message);
    CHECK_THROWS_WITH(parse(f.bytes()), Contains(c.message));
  }
  GgufFile f;
  f.info("a", {16}, 0, 0);
  f.info("b", {16}, 0, 32);
  f.data = std::string(96, '\0');
  CHECK_THROWS_WITH(parse(f.bytes()), Contains("tensor 'b' at offset 32 overlaps"));
  f = GgufFile();
  f.info("a", {8}, 0, 0);
  f.info("a", {8}, 0, 32);
  f.data = std::string(64, '\0');
  CHECK_THROWS_WITH(parse(f.bytes()), Contains("tensor 'a' is given twice"));
}

TEST_CASE("gguf: paths without a file") {
  const tests::TempDir dir;
  CHECK_THROWS_WITH(data::Gguf(dir / "none"), Contains("cannot open"));
  CHECK_THROWS_WITH(data::Gguf(dir.path()), Contains("is a directory"));
  tests::write_plain(dir / "empty", "");
  CHECK_THROWS_WITH(data::Gguf(dir / "empty"), Contains("is empty"));
}
