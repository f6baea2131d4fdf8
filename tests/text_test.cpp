// Documents, token streams and windows.
#include "data/text.h"

#include <catch2/catch.hpp>

#include "data/files.h"
#include "tests/support.h"

namespace bbb::tests {

using Catch::Contains;
using Ids = std::vector<int32_t>;

namespace {

const std::string kFixtures = golden_folder() + "/tokenizers/";

std::vector<std::string> documents_of(const std::string& name, const std::string& content) {
  const TempDir dir;
  data::write_file_atomic(dir / name, content);
  return data::read_documents(dir / name);
}

}  // namespace

TEST_CASE("documents of a text file and of a jsonl file", "[text]") {
  CHECK(documents_of("a.txt", " one\n\ntwo \n") == std::vector<std::string>{" one\n\ntwo \n"});
  CHECK(documents_of("a.jsonl", "{\"text\": \"one\\n\"}\n\n{\"id\": 1, \"text\": \" two\"}") ==
        std::vector<std::string>{"one\n", " two"});
  CHECK(documents_of("a.jsonl", "{\"text\": \"\"}\r\n{\"text\": \"x\"}\r\n").size() == 2);
}

TEST_CASE("bad texts name the file and the line", "[text]") {
  CHECK_THROWS_WITH(documents_of("a.txt", ""), Contains("a.txt"));
  CHECK_THROWS_WITH(documents_of("a.jsonl", "\n\n"), Contains("no text"));
  CHECK_THROWS_WITH(documents_of("a.jsonl", "{\"text\": \"\"}\n"), Contains("no text"));
  CHECK_THROWS_WITH(documents_of("a.jsonl", "{\"text\": \"x\"}\n\n{\"text\": \"x\"\n"),
                    Contains("a.jsonl:3"));
  CHECK_THROWS_WITH(documents_of("a.jsonl", "{\"text\": \"x\"}\n{\"body\": \"x\"}\n"),
                    Contains("a.jsonl:2"));
  CHECK_THROWS_WITH(documents_of("a.jsonl", "{\"text\": 5}\n"), Contains("a.jsonl:1"));
  CHECK_THROWS_WITH(documents_of("a.jsonl", "[1]\n"), Contains("a.jsonl:1"));
  CHECK_THROWS_WITH(data::read_documents("/nowhere/a.txt"), Contains("/nowhere/a.txt"));
}

TEST_CASE("gzip files are read as what they hold", "[text]") {
  // Deflate's stored blocks, so that the expected bytes can be written here: one member a text.
  const auto member = [](const std::string& text) {
    const auto word = [](uint32_t value, int bytes) {
      std::string out;
      for (int i = 0; i < bytes; ++i) out += static_cast<char>(value >> (8 * i));
      return out;
    };
    uint32_t crc = 0xffffffff;
    for (const unsigned char c : text) {
      crc ^= c;
      for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
    }
    const auto size = static_cast<uint32_t>(text.size());
    return std::string("\x1f\x8b\x08\0\0\0\0\0\0\xff\1", 11) + word(size, 2) + word(~size, 2) +
           text + word(~crc, 4) + word(size, 4);
  };
  CHECK(documents_of("a.txt.gz", member("one ") + member("two")) ==
        std::vector<std::string>{"one two"});
  CHECK(documents_of("a.JSONL.GZ", member("{\"text\": \"one\"}\n{\"text\": \"two\"}")) ==
        std::vector<std::string>{"one", "two"});
  CHECK(documents_of("no_suffix", member("one")) == std::vector<std::string>{"one"});
  CHECK(documents_of("a.Jsonl", "{\"text\": \"one\"}") == std::vector<std::string>{"one"});
  // More than the buffers hold, over many members.
  const std::string part(60000, 'x');
  std::string many, whole;
  for (int i = 0; i < 50; ++i) many += member(part), whole += part;
  CHECK((documents_of("a.gz", many) == std::vector<std::string>{whole}));

  const std::string good = member("some text");
  for (const size_t size : {good.size() - 1, good.size() - 9, size_t{5}})
    CHECK_THROWS_WITH(documents_of("a.gz", good.substr(0, size)),
                      Contains("a.gz: its gzip content"));
  std::string damaged = good;
  damaged[16] ^= 1;
  CHECK_THROWS_WITH(documents_of("a.gz", damaged), Contains("damaged"));
}

TEST_CASE("training ends each document, evaluation joins them", "[text]") {
  const auto plain = data::load_tokenizer(kFixtures + "gpt2");
  const auto with_bos = data::load_tokenizer(kFixtures + "llama3");
  const std::vector<std::string> documents = {"Hello world", "", "line <|endoftext|>\n"};
  for (const data::Tokenizer* tokenizer : {plain.get(), with_bos.get()}) {
    const int32_t end = tokenizer->document_end();
    Ids expected;
    for (const std::string& document : documents) {
      if (tokenizer->add_bos()) expected.push_back(*tokenizer->bos());
      const Ids ids = tokenizer->encode(document, data::SpecialText::AsText);
      expected.insert(expected.end(), ids.begin(), ids.end());
      expected.push_back(end);
    }
    CHECK(data::training_tokens(*tokenizer, documents, end) == expected);

    Ids joined =
        tokenizer->encode("Hello world\n\n\n\nline <|endoftext|>\n", data::SpecialText::AsText);
    if (tokenizer->add_bos()) joined.insert(joined.begin(), *tokenizer->bos());
    CHECK(data::evaluation_tokens(*tokenizer, documents) == joined);
  }
  CHECK(with_bos->add_bos());
  CHECK(!plain->add_bos());
  CHECK_THROWS_AS(data::training_tokens(*plain, documents, -1), Error);
  CHECK_THROWS_AS(
      data::training_tokens(*plain, documents, static_cast<int32_t>(plain->vocab_size())), Error);
}

TEST_CASE("windows do not overlap and drop the tail", "[text]") {
  const data::Windows windows = data::make_windows({1, 2, 3, 4, 5, 6, 7}, 3, "a.txt");
  CHECK(windows.count == 2);
  CHECK(windows.seq_len == 3);
  CHECK(windows.ids == Ids{1, 2, 3, 4, 5, 6});
  CHECK(data::make_windows({1, 2, 3}, 3, "a.txt").count == 1);
  CHECK_THROWS_WITH(data::make_windows({1, 2}, 3, "a.txt"), Contains("a.txt"));
  CHECK_THROWS_WITH(data::make_windows({}, 3, "a.txt"), Contains("a.txt"));
  CHECK_THROWS_AS(data::make_windows({1, 2, 3}, 0, "a.txt"), Error);
}

}  // namespace bbb::tests
