// safetensors: round trips, shards, and every way in which a header can be wrong.
#include "data/safetensors.h"

#include <catch2/catch.hpp>
#include <filesystem>

#include "data/files.h"
#include "tests/model_files.h"
#include "tests/support.h"

namespace fs = std::filesystem;
using namespace bbb;
using Catch::Matchers::Contains;
using data::FileDType;
using data::SafeTensors;

namespace {

// Parses a file with this header and this many zero bytes of data.
void parse(const std::string& header, size_t data_bytes) {
  const std::string file = tests::safetensors_file(header, std::string(data_bytes, '\0'));
  data::parse_safetensors(reinterpret_cast<const uint8_t*>(file.data()),
                          static_cast<int64_t>(file.size()), "f");
}

std::string entry(const std::string& name, const std::string& dtype, const std::string& shape,
                  const std::string& begin, const std::string& end) {
  return "\"" + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":[" + shape +
         "],\"data_offsets\":[" + begin + "," + end + "]}";
}

std::vector<float> floats(const data::SafeTensor& t) {
  std::vector<float> out(static_cast<size_t>(t.numel()));
  data::to_float(out.data(), t, "t");
  return out;
}

}  // namespace

TEST_CASE("safetensors: the trailing checksum detects every changed bit") {
  const tests::TempDir dir;
  const std::vector<float> a = {1, 2, 3, 4, 5, -6};
  for (const data::Trailer trailer : {data::Trailer::None, data::Trailer::Checksum}) {
    data::SafeTensorsWriter writer(dir / "f", {{"a", FileDType::F32, {6}}}, {}, trailer);
    writer.add("a", a.data(), 8);
    writer.add("a", a.data() + 2, 16);
    writer.finish();
    CHECK(data::trailer_matches(data::MappedFile(dir / "f")) ==
          (trailer == data::Trailer::Checksum));
  }
  CHECK(floats(SafeTensors(dir / "f").at("a")) == a);
  const std::string whole = data::read_file(dir / "f");
  for (size_t bit = 0; bit < 8 * whole.size(); ++bit) {
    std::string changed = whole;
    changed[bit / 8] ^= static_cast<char>(1 << bit % 8);
    tests::write_plain(dir / "g", changed);
    REQUIRE_FALSE(data::trailer_matches(data::MappedFile(dir / "g")));
  }
  tests::write_plain(dir / "g", whole.substr(0, 7));
  CHECK_FALSE(data::trailer_matches(data::MappedFile(dir / "g")));
}

TEST_CASE("safetensors: the reader reads what the writer wrote") {
  const tests::TempDir dir;
  const std::vector<float> a = {1, 2, 3, 4, 5, -6};
  const std::vector<uint16_t> b = {0x3f80, 0xc000};  // bf16 1, -2
  const std::vector<uint16_t> h = {0x3c00, 0x8000, 0x0001, 0x7bff};
  const std::vector<double> d = {0.1};
  const uint8_t u = 9;
  {
    data::SafeTensorsWriter writer(dir / "f",
                                   {{"a", FileDType::F32, {2, 3}},
                                    {"b", FileDType::BF16, {2}},
                                    {"h", FileDType::F16, {4, 1}},
                                    {"none", FileDType::I32, {0, 5}},
                                    {"d", FileDType::F64, {1}},
                                    {"scalar", FileDType::U8, {}}},
                                   {{"format", "pt"}});
    writer.add("a", a.data(), 24);
    writer.add("b", b.data(), 4);
    writer.add("h", h.data(), 8);
    writer.add("none", nullptr, 0);
    writer.add("d", d.data(), 8);
    writer.add("scalar", &u, 1);
    CHECK_FALSE(fs::exists(dir / "f"));
    writer.finish();
  }
  const SafeTensors read(dir / "f");
  CHECK(read.tensors().size() == 6);
  CHECK(read.file_bytes() == static_cast<int64_t>(fs::file_size(dir / "f")));
  CHECK(read.at("a").shape == engine::Shape{2, 3});
  CHECK(floats(read.at("a")) == a);
  CHECK(floats(read.at("b")) == std::vector<float>{1, -2});
  CHECK(floats(read.at("h")) == std::vector<float>{1, -0.0f, 0x1p-24f, 65504});
  CHECK(floats(read.at("d")) == std::vector<float>{0.1f});
  CHECK(read.at("none").numel() == 0);
  CHECK(*read.at("scalar").data == 9);
  CHECK_THROWS_WITH(read.at("missing"), Contains("tensor 'missing' is missing"));
  CHECK_THROWS_WITH(floats(read.at("scalar")), Contains("is U8, not a floating-point"));
}

TEST_CASE("safetensors: a tensor written in pieces gives the same file") {
  const tests::TempDir dir;
  const uint8_t bytes[] = {1, 2, 3, 4, 5, 6, 7};
  const auto write = [&](const std::string& name, const std::vector<int64_t>& pieces) {
    data::SafeTensorsWriter writer(
        dir / name,
        {{"a", FileDType::U8, {7}}, {"none", FileDType::U8, {0}}, {"b", FileDType::U8, {7}}});
    for (const char* tensor : {"a", "b"}) {
      int64_t begin = 0;
      for (const int64_t piece : pieces) {
        writer.add(tensor, bytes + begin, piece);
        begin += piece;
      }
      if (tensor[0] == 'a') writer.add("none", bytes, 0);
    }
    writer.finish();
    return data::read_file(dir / name);
  };
  CHECK(write("pieces", {3, 1, 3}) == write("whole", {7}));
}

TEST_CASE("safetensors: a writer without finish() leaves nothing") {
  const tests::TempDir dir;
  { data::SafeTensorsWriter writer(dir / "f", {{"a", FileDType::U8, {1}}}); }
  CHECK(fs::is_empty(dir.path()));
  CHECK_THROWS_WITH(data::SafeTensorsWriter(dir / "no/f", {}), Contains("cannot write"));
}

TEST_CASE("safetensors: malformed headers") {
  const std::string good = "{" + entry("t", "F32", "2,1", "0", "8") + "}";
  CHECK_NOTHROW(parse(good, 8));
  CHECK_NOTHROW(parse(good + "   ", 8));

  struct Case {
    std::string header;
    size_t bytes;
    const char* message;
  };
  const std::string name(1000, 'n');
  const Case cases[] = {
      {"", 0, "malformed JSON"},
      {"{", 0, "malformed JSON at byte 2: the file is cut short, or damaged"},
      {"[]", 0, "not a JSON object"},
      {"{\"a\xff\":1}", 0, "malformed JSON"},
      {std::string(100, '['), 0, "nested too deeply"},
      {"{\"t\":1}", 0, "tensor 't': its description is not an object"},
      {"{\"t\":{}}", 0, "tensor 't': 'dtype' is missing"},
      {"{\"t\":{\"dtype\":1,\"shape\":[],\"data_offsets\":[0,1]}}", 1, "dtype is not a string"},
      {"{" + entry("t", "F33", "2", "0", "8") + "}", 8, "tensor 't': unsupported dtype 'F33'"},
      {"{" + entry("t", "F32", "-2", "0", "8") + "}", 8, "other than a size"},
      {"{" + entry("t", "F32", "2.0", "0", "8") + "}", 8, "other than a size"},
      {"{" + entry("t", "F32", "18446744073709551615", "0", "8") + "}", 8, "other than a size"},
      {"{" + entry("t", "F32", "4611686018427387904", "0", "8") + "}", 8, "too many elements"},
      {"{" + entry("t", "F32", "4294967296,4294967296", "0", "8") + "}", 8, "too many elements"},
      {"{" + entry("t", "F32", "1,1,1,1,1,1,1,1,2", "0", "8") + "}", 8, "not an array of up to 8"},
      {"{" + entry("t", "F32", "2", "0", "9") + "}", 9, "needs 8 bytes, the header gives it 9"},
      {"{" + entry("t", "F32", "3", "0", "8") + "}", 8, "needs 12 bytes, the header gives it 8"},
      {"{" + entry("t", "F32", "2", "8", "0") + "}", 8, "lie outside"},
      {"{" + entry("t", "F32", "2", "0", "8") + "}", 7, "bytes 0 to 8 lie outside the file's 7"},
      {"{" + entry("t", "F32", "2", "0", "-1") + "}", 8, "not a pair of sizes"},
      {"{" + entry("t", "F32", "2", "0", "8,9") + "}", 8, "not a pair of sizes"},
      {"{" + entry("t", "F32", "2", "4", "12") + "}", 12, "a gap of 4 bytes before tensor 't'"},
      {"{" + entry("t", "F32", "2", "0", "8") + "}", 12, "4 bytes at the end belong to no tensor"},
      {"{" + entry("a", "U8", "4", "0", "4") + "," + entry("b", "U8", "4", "2", "6") + "}", 6,
       "tensor 'b' at byte 2 overlaps"},
      {"{" + entry("a", "U8", "4", "0", "4") + "," + entry("a", "U8", "4", "4", "8") + "}", 8,
       "'a' is given twice"},
      {"{\"__metadata__\":3}", 0, "__metadata__ is not an object"},
      {"{\"__metadata__\":{\"a\":3}}", 0, "other than strings"},
      {"{" + entry(name, "F33", "2", "0", "8") + "}", 8, "nnn...'"},
      {"{" + entry("\xc3\xa9\\n", "F33", "2", "0", "8") + "}", 8, "'\\xc3\\xa9\\x0a'"},
  };
  for (const Case& c : cases) {
    INFO(c.header.substr(0, 200));
    CHECK_THROWS_WITH(parse(c.header, c.bytes), Contains(c.message));
  }
}

TEST_CASE("safetensors: every truncation of a good file is refused") {
  engine::Rng rng(1);
  const std::string file =
      tests::safetensors_of({tests::file_tensor("a", FileDType::F32, {3}, rng),
                             tests::file_tensor("b", FileDType::U8, {2}, rng)});
  const auto read = [&](uint64_t header_bytes, size_t size) {
    const std::string cut = tests::raw(header_bytes) + file.substr(8, size - 8);
    return data::parse_safetensors(reinterpret_cast<const uint8_t*>(cut.data()),
                                   static_cast<int64_t>(size), "f");
  };
  uint64_t header_bytes;
  std::memcpy(&header_bytes, file.data(), 8);
  CHECK(read(header_bytes, file.size()).size() == 2);
  for (size_t size = 8; size < file.size(); ++size)
    CHECK_THROWS_AS(read(header_bytes, size), Error);
  for (const uint64_t lie : {uint64_t{1} << 63, ~uint64_t{0}, ~uint64_t{0} - 7})
    CHECK_THROWS_WITH(read(lie, file.size()), Contains("cut short"));
  CHECK_THROWS_WITH(data::parse_safetensors(nullptr, 0, "f"), Contains("too few"));
}

TEST_CASE("safetensors: shards") {
  const tests::TempDir dir;
  engine::Rng rng(2);
  const tests::FileTensor a = tests::file_tensor("a", FileDType::U8, {3}, rng);
  const tests::FileTensor b = tests::file_tensor("b", FileDType::U8, {4}, rng);
  tests::write_plain(dir / "one.safetensors", tests::safetensors_of({a}));
  tests::write_plain(dir / "two.safetensors", tests::safetensors_of({b}));
  const auto open = [&](const std::string& map) {
    tests::write_plain(dir / "model.safetensors.index.json", "{\"weight_map\":" + map + "}");
    return SafeTensors(dir.path()).tensors().size();
  };
  CHECK(open(R"({"a":"one.safetensors","b":"two.safetensors"})") == 2);
  CHECK_THROWS_WITH(open(R"({"a":"two.safetensors","b":"two.safetensors"})"),
                    Contains("tensor 'a' is not in two.safetensors"));
  CHECK_THROWS_WITH(open(R"({"a":"one.safetensors","b":"three.safetensors"})"),
                    Contains("three.safetensors: No such file"));
  CHECK_THROWS_WITH(open(R"({"a":"one.safetensors","c":"two.safetensors"})"), Contains("tensor"));
  CHECK_THROWS_WITH(open("3"), Contains("'weight_map' is missing or not an object"));
  CHECK_THROWS_WITH(open(R"({"a":3})"), Contains("not a file name"));
  for (const char* shard : {"../one.safetensors", "/etc/passwd", "..", ".", "", "a\\u0000b"})
    CHECK_THROWS_WITH(open("{\"a\":\"" + std::string(shard) + "\"}"),
                      Contains("not a file of this directory"));
  tests::write_plain(dir / "two.safetensors", tests::safetensors_of({b, a}));
  CHECK_THROWS_WITH(open(R"({"a":"one.safetensors","b":"two.safetensors"})"),
                    Contains("tensor 'a' of two.safetensors is not listed there"));
}

TEST_CASE("safetensors: paths without a file") {
  const tests::TempDir dir;
  CHECK_THROWS_WITH(SafeTensors(dir.path()), Contains("neither model.safetensors nor"));
  CHECK_THROWS_WITH(SafeTensors(dir / "none"), Contains("cannot open"));
  tests::write_plain(dir / "empty", "");
  CHECK_THROWS_WITH(SafeTensors(dir / "empty"), Contains("is empty"));
  fs::create_directory(dir / "model.safetensors");
  CHECK_THROWS_WITH(SafeTensors(dir.path()), Contains("is a directory, not a file"));
}
