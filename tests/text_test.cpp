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
  return data::read_texts(dir / name);
}

std::vector<data::Document> as_documents(const std::vector<std::string>& texts) {
  std::vector<data::Document> documents;
  for (const std::string& text : texts) documents.push_back({text});
  return documents;
}

const std::string kChats = golden_folder() + "/chat/";

// The tokenizer of kChats with a chat template.
std::unique_ptr<data::Tokenizer> chat_tokenizer(const TempDir& dir, const std::string& name) {
  data::write_file_atomic(dir / "tokenizer.json", data::read_file(kChats + "tokenizer.json"));
  data::write_file_atomic(dir / "tokenizer_config.json",
                          data::read_file(kChats + "tokenizer_config.json"));
  if (!name.empty())
    data::write_file_atomic(dir / "chat_template.jinja", data::read_file(kChats + name + ".jinja"));
  return data::load_tokenizer(dir.path());
}

// The text of the tokens that count, run by run.
std::vector<std::string> counted_texts(const data::Tokenizer& tokenizer,
                                       const data::TokenStream& stream) {
  std::vector<std::string> texts;
  bool before = false;
  for (size_t i = 0; i < stream.ids.size(); ++i) {
    const bool counts = stream.counted[i] != 0;
    if (counts && !before) texts.emplace_back();
    if (counts) texts.back() += tokenizer.piece(stream.ids[i], true);
    before = counts;
  }
  return texts;
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
  CHECK_THROWS_WITH(data::read_texts("/nowhere/a.txt"), Contains("/nowhere/a.txt"));
  CHECK_THROWS_WITH(documents_of("a.jsonl", "{\"messages\": []}\n"), Contains("no \"text\""));
  using namespace std::string_literals;
  CHECK_THROWS_WITH(documents_of("a.txt", "a\0b\0c\0d\0"s), Contains("a.txt: byte 2"));  // UTF-16
  CHECK_THROWS_WITH(documents_of("a.txt",
                                 "\xFD"
                                 "7zXZ and so on"),
                    Contains("a.txt: byte 1"));
}

TEST_CASE("a text may begin with a byte order mark and end inside of a character", "[text]") {
  CHECK(documents_of("a.txt",
                     "\xEF\xBB\xBF"
                     "caf\xC3") == std::vector<std::string>{"caf\xC3"});
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
    const data::TokenStream stream =
        data::training_tokens(*tokenizer, as_documents(documents), end);
    CHECK(stream.ids == expected);
    CHECK(stream.counted == std::vector<uint8_t>(expected.size(), 1));
    REQUIRE(stream.starts.size() == 3);
    CHECK(stream.starts[0] == 0);
    CHECK(expected[static_cast<size_t>(stream.starts[2]) - 1] == end);

    Ids joined =
        tokenizer->encode("Hello world\n\n\n\nline <|endoftext|>\n", data::SpecialText::AsText);
    if (tokenizer->add_bos()) joined.insert(joined.begin(), *tokenizer->bos());
    CHECK(data::evaluation_tokens(*tokenizer, documents) == joined);
  }
  CHECK(with_bos->add_bos());
  CHECK(!plain->add_bos());
  std::vector<data::Document> many;
  for (int i = 0; i < 100; ++i) many.push_back({cat("document ", i, std::string(i % 7, '.'))});
  const auto tokens_on = [&](int threads) {
    return data::training_tokens(*plain, many, plain->document_end(), {}, "", threads);
  };
  const data::TokenStream one = tokens_on(1), four = tokens_on(4);
  CHECK(four.ids == one.ids);
  CHECK(four.starts == one.starts);
  CHECK(four.counted == one.counted);
  for (const int64_t id : {int64_t{-1}, plain->vocab_size()})
    CHECK_THROWS_AS(
        data::training_tokens(*plain, as_documents(documents), static_cast<int32_t>(id)), Error);
}

TEST_CASE("windows do not overlap and drop the tail", "[text]") {
  const data::Windows windows = data::make_windows({1, 2, 3, 4, 5, 6, 7}, 3, "a.txt");
  CHECK(windows.count == 2);
  CHECK(windows.seq_len == 3);
  CHECK(windows.ids == Ids{1, 2, 3, 4, 5, 6});
  CHECK(data::make_windows({1, 2, 3}, 3, "a.txt").count == 1);
  CHECK_THROWS_WITH(data::make_windows({1, 2}, 3, "a.txt"), Contains("a.txt"));
  CHECK_THROWS_WITH(data::make_windows(Ids{}, 3, "a.txt"), Contains("a.txt"));
  CHECK_THROWS_AS(data::make_windows({1, 2, 3}, 0, "a.txt"), Error);
}

TEST_CASE("a jsonl file may mix texts and chats", "[text]") {
  const TempDir dir;
  const std::string path = dir / "a.jsonl";
  const auto read = [&](const std::string& content) {
    data::write_file_atomic(path, content);
    return data::read_documents(path);
  };
  const std::vector<data::Document> documents = read(
      "{\"text\": \"one\"}\n{\"id\": 1, \"messages\": [{\"role\": \"user\", \"content\": "
      "\"Hi\"}, {\"role\": \"assistant\", \"content\": \"Ho\"}]}\n");
  CHECK(documents ==
        std::vector<data::Document>{{"one"}, {"", {{"user", "Hi"}, {"assistant", "Ho"}}}});
  for (const auto& [line, says] :
       {std::pair{"{\"text\": \"a\", \"messages\": []}", "gives both"},
        {"{\"messages\": []}", "not a list of messages"},
        {"{\"messages\": [{\"role\": \"tool\", \"content\": \"x\"}]}", "the role 'tool'"},
        {"{\"messages\": [{\"role\": \"user\"}]}", "message 1"},
        {"{\"chat\": 1}", "no \"text\""}})
    CHECK_THROWS_WITH(read(std::string("{\"text\": \"x\"}\n") + line),
                      Contains("a.jsonl:2: ") && Contains(says));
}

TEST_CASE("of a chat the answers count, up to the token that ends each", "[text]") {
  const std::vector<data::Document> documents = {{"Some text."},
                                                 {"",
                                                  {{"system", "Be kind."},
                                                   {"user", "Hi"},
                                                   {"assistant", "Hello there"},
                                                   {"user", "Why?"},
                                                   {"assistant", "So."}}}};
  struct Case {
    const char* name;
    std::vector<std::string> counted;
  };
  // What the model has to write after the prompt that `bbb chat` gives it.
  for (const Case& c : {Case{"smollm2", {"Hello there<|im_end|>", "So.<|im_end|>"}},
                        {"qwen2.5", {"Hello there<|im_end|>", "So.<|im_end|>"}},
                        {"llama-3.2", {"Hello there<|eot_id|>", "So.<|eot_id|>"}},
                        {"llama-2", {" Hello there </s>", " So. </s>"}},
                        {"mistral-v3", {" Hello there</s>", " So.</s>"}},
                        {"zephyr", {"Hello there</s>", "So.</s>"}},
                        {"deepseek-llm", {" Hello there</s>", " So.</s>"}}}) {
    CAPTURE(c.name);
    const TempDir dir;
    const auto tokenizer = chat_tokenizer(dir, c.name);
    const int32_t end = tokenizer->document_end();
    const data::TokenStream stream = data::training_tokens(*tokenizer, documents, end);
    std::vector<std::string> expected = c.counted;
    expected.insert(expected.begin(), "Some text.<|endoftext|>");
    CHECK(counted_texts(*tokenizer, stream) == expected);
    CHECK(stream.ids.back() == end);
    CHECK(stream.counted.back() == 0);
    // The chat is what the model's template writes.
    const std::string text =
        data::TrainingChats(*tokenizer, "m").render(documents[1].messages).text;
    Ids chat(stream.ids.begin() + stream.starts[1], stream.ids.end() - 1);
    CHECK(chat == tokenizer->encode(text, data::SpecialText::Parse));
    // A run can be continued on another day.
    CHECK((text.find("Today Date") == std::string::npos) ==
          (text.find("26 Jul 2024") == std::string::npos));
    // A chat that ends with the document's end has no second one.
    const auto stop = *tokenizer->find("</s>");
    if (c.counted.back().ends_with("</s>") && c.name != std::string("zephyr"))
      CHECK(data::training_tokens(*tokenizer, documents, stop).ids.size() == stream.ids.size() - 1);
  }
  const TempDir dir;
  const auto tokenizer = chat_tokenizer(dir, "");
  const auto tokens_of = [&](const std::vector<data::Document>& all) {
    return data::training_tokens(*tokenizer, all, 0, {}, "some/model");
  };
  CHECK_NOTHROW(tokens_of({{"Some text."}}));
  CHECK_THROWS_WITH(tokens_of(documents), Contains("some/model has no chat template; give chats"));
  data::write_file_atomic(dir / "chat_template.jinja", "{{ messages }}");
  const auto unknown = data::load_tokenizer(dir.path());
  CHECK_THROWS_WITH(data::training_tokens(*unknown, documents, 0, {}, "some/model"),
                    Contains("some/model: the chat template is not one that bbb knows"));
  const TempDir strict;
  const auto alternating = chat_tokenizer(strict, "llama-2");
  CHECK_THROWS_WITH(
      data::training_tokens(*alternating, {{"x"}, {"", {{"user", "a"}, {"user", "b"}}}}, 0),
      Contains("document 2: the chat template refuses these messages"));
}

TEST_CASE("windows keep what counts, and without it they are left out", "[text]") {
  //                             0  1  2  3   4  5  6  7   8  9 10 11  12
  const data::TokenStream stream{{10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22},
                                 {1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1},
                                 {0, 2, 5, 9}};
  const data::Windows stream4 = data::make_windows(stream, 4, "a", data::Packing::Stream);
  CHECK(stream4.count ==
        2);  // of the second window only the first token counts, which none predicts
  CHECK(stream4.ids == Ids{10, 11, 12, 13, 18, 19, 20, 21});
  CHECK(stream4.counted == std::vector<uint8_t>{1, 1, 1, 1, 0, 0, 1, 1});
  CHECK(stream4.first_key.empty());
  CHECK(stream4.targets() == Ids{11, 12, 13, -1, -1, 20, 21, -1});
  const data::Windows second = stream4.rows(1, 1);
  CHECK(second.ids == Ids{18, 19, 20, 21});
  CHECK(second.targets() == Ids{-1, 20, 21, -1});
  CHECK(second.count == 1);

  const data::Windows apart = data::make_windows(stream, 4, "a", data::Packing::Documents);
  CHECK(apart.ids == stream4.ids);
  CHECK(apart.first_key == Ids{0, 0, 2, 2, 0, 1, 1, 1});
  CHECK(apart.targets() == Ids{11, -1, 13, -1, -1, 20, 21, -1});  // 12 begins a document
  CHECK(apart.rows(1, 1).first_key == Ids{0, 1, 1, 1});

  const data::TokenStream all{{1, 2, 3, 4}, {1, 1, 1, 1}, {0}};
  CHECK(data::make_windows(all, 2, "a", data::Packing::Stream).counted.empty());
  CHECK(data::make_windows(all, 2, "a", data::Packing::Documents).first_key == Ids{0, 0, 0, 0});
  const data::TokenStream none{{1, 2, 3, 4}, {1, 0, 0, 0}, {0}};
  CHECK_THROWS_WITH(data::make_windows(none, 4, "a.jsonl", data::Packing::Stream),
                    Contains("a.jsonl: no window of 4 tokens holds a token that the loss counts"));
}

}  // namespace bbb::tests
