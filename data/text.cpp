// Text files to token windows: one document per line (.jsonl) or per file (anything else).
#include "data/text.h"

#include <algorithm>
#include <cctype>
#include <functional>

#include "data/files.h"
#include "data/gzip.h"
#include "data/json.h"
#include "data/pre_tokenizer.h"
#include "engine/cpu/thread_pool.h"
#include "quant/check.h"

namespace bbb::data {

namespace {

// Throws if these bytes are no text: other encodings and packed files. A text that was cut may end
// inside of a character.
void check_utf8(std::string_view text, const std::string& path) {
  size_t valid = 0;
  for (const auto& [run, is_utf8] : utf8_runs(text.substr(0, text.find('\0')))) {
    if (!is_utf8) break;
    valid += run.size();
  }
  constexpr size_t kCharacter = 4;  // bytes, at most
  BBB_CHECK(text.size() - valid < kCharacter, path, ": byte ", valid + 1,
            " is not UTF-8, so this is no text; of packed files, .gz alone is unpacked");
}

}  // namespace

std::string read_text(const std::string& path) {
  std::string content = read_file(path);
  if (is_gzip(content)) content = gunzip(content, path);
  constexpr std::string_view kByteOrderMark = "\xEF\xBB\xBF";
  if (content.starts_with(kByteOrderMark)) content.erase(0, kByteOrderMark.size());
  return content;
}

bool is_jsonl(const std::string& path) {
  std::string name = path;
  std::ranges::transform(name, name.begin(), [](unsigned char c) { return std::tolower(c); });
  return name.ends_with(".jsonl") || name.ends_with(".jsonl.gz");
}

// Calls add(object, where) for every line of a .jsonl file that is not blank.
static void read_lines(const std::string& path,
                       const std::function<void(const nlohmann::json&, const std::string&)>& add) {
  const std::string content = read_text(path);
  const std::string_view view = content;
  int64_t line_number = 0;
  for (size_t begin = 0; begin < view.size();) {
    const size_t end = std::min(view.find('\n', begin), view.size());
    const std::string_view line = view.substr(begin, end - begin);
    begin = end + 1;
    ++line_number;
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    const std::string where = cat(path, ":", line_number);
    add(parse_json(line.data(), line.data() + line.size(), where), where);
  }
}

static std::string text_of(const nlohmann::json& object, const std::string& where) {
  BBB_CHECK(object.is_object() && object.contains("text") && object.at("text").is_string(), where,
            ": no \"text\" string");
  return object.at("text").get<std::string>();
}

std::vector<std::string> read_texts(const std::string& path) {
  std::vector<std::string> texts;
  if (!is_jsonl(path))
    check_utf8(texts.emplace_back(read_text(path)), path);
  else
    read_lines(path, [&](const nlohmann::json& object, const std::string& where) {
      texts.push_back(text_of(object, where));
    });
  const bool any = !std::ranges::all_of(texts, &std::string::empty);
  BBB_CHECK(any, path, ": no text");
  return texts;
}

std::vector<Document> read_documents(const std::string& path) {
  if (!is_jsonl(path)) return {{read_texts(path)[0]}};
  std::vector<Document> documents;
  read_lines(path, [&](const nlohmann::json& object, const std::string& where) {
    if (!object.is_object() || !object.contains("messages"))
      return documents.push_back({text_of(object, where)});
    BBB_CHECK(!object.contains("text"), where, ": gives both \"text\" and \"messages\"");
    documents.push_back({"", messages_of(object.at("messages"), where)});
  });
  const bool any = std::ranges::any_of(
      documents, [](const Document& d) { return !d.text.empty() || !d.messages.empty(); });
  BBB_CHECK(any, path, ": no text");
  return documents;
}

// Appends a chat's tokens. Which ones are an answer's follows from how many tokens the text up to
// a position shares with the whole text: a token across the position is not shared.
static void append_chat(TokenStream& stream, const Tokenizer& tokenizer, const RenderedChat& chat,
                        const std::vector<int32_t>& stops) {
  const std::vector<int32_t> ids = tokenizer.encode(chat.text, SpecialText::Parse);
  if (tokenizer.add_bos() && tokenizer.bos() && (ids.empty() || ids[0] != *tokenizer.bos()))
    stream.ids.push_back(*tokenizer.bos());
  stream.counted.resize(stream.ids.size(), 0);
  const auto tokens_before = [&](size_t position) {
    const std::vector<int32_t> part =
        tokenizer.encode(std::string_view(chat.text).substr(0, position), SpecialText::Parse);
    const auto shared = std::mismatch(part.begin(), part.end(), ids.begin(), ids.end());
    return shared.first - part.begin();
  };
  std::vector<uint8_t> counted(ids.size(), 0);
  for (const RenderedChat::Answer& answer : chat.answers) {
    const auto content_end = ids.begin() + tokens_before(answer.content_end);
    const auto turn_end = std::max(content_end, ids.begin() + tokens_before(answer.turn_end));
    const auto stop = std::find_first_of(content_end, turn_end, stops.begin(), stops.end());
    const auto end = stop == turn_end ? turn_end : stop + 1;
    for (auto id = ids.begin() + tokens_before(answer.begin); id < end; ++id)
      counted[static_cast<size_t>(id - ids.begin())] = 1;
  }
  stream.ids.insert(stream.ids.end(), ids.begin(), ids.end());
  stream.counted.insert(stream.counted.end(), counted.begin(), counted.end());
}

TokenStream training_tokens(const Tokenizer& tokenizer, const std::vector<Document>& documents,
                            int32_t doc_end, const std::vector<int32_t>& stop_ids,
                            const std::string& model, int threads) {
  BBB_CHECK(doc_end >= 0 && doc_end < tokenizer.vocab_size(), "the document end ", doc_end,
            " is outside the vocabulary of ", tokenizer.vocab_size());
  std::optional<TrainingChats> chats;
  if (!std::ranges::all_of(documents, [](const Document& d) { return d.messages.empty(); }))
    chats.emplace(tokenizer, model);
  std::vector<int32_t> stops = tokenizer.end_of_turn();
  stops.insert(stops.end(), stop_ids.begin(), stop_ids.end());
  const auto tokens_of = [&](const Document& document) {
    TokenStream tokens;
    const bool chat = !document.messages.empty();
    if (chat) {
      append_chat(tokens, tokenizer, chats->render(document.messages), stops);
    } else {
      if (tokenizer.add_bos() && tokenizer.bos()) tokens.ids.push_back(*tokenizer.bos());
      const std::vector<int32_t> ids = tokenizer.encode(document.text, SpecialText::AsText);
      tokens.ids.insert(tokens.ids.end(), ids.begin(), ids.end());
    }
    if (!chat || tokens.ids.back() != doc_end) tokens.ids.push_back(doc_end);
    tokens.counted.resize(tokens.ids.size(), chat ? 0 : 1);
    return tokens;
  };
  constexpr int64_t kAtOnce = 8;  // documents that a thread takes
  const auto count = static_cast<int64_t>(documents.size());
  std::vector<TokenStream> parts(documents.size());
  std::vector<std::string> errors(documents.size());  // so that the first document's is thrown
  engine::ThreadPool(threads).parallel_for(count, kAtOnce, [&](int64_t begin, int64_t end) {
    for (auto i = static_cast<size_t>(begin); i < static_cast<size_t>(end); ++i) {
      try {
        parts[i] = tokens_of(documents[i]);
      } catch (const Error& error) {
        errors[i] = error.what();
      }
    }
  });
  TokenStream stream;
  for (size_t i = 0; i < parts.size(); ++i) {
    BBB_CHECK(errors[i].empty(), "document ", i + 1, ": ", errors[i]);
    const TokenStream part = std::move(parts[i]);
    stream.starts.push_back(static_cast<int64_t>(stream.ids.size()));
    stream.ids.insert(stream.ids.end(), part.ids.begin(), part.ids.end());
    stream.counted.insert(stream.counted.end(), part.counted.begin(), part.counted.end());
  }
  return stream;
}

std::vector<int32_t> evaluation_tokens(const Tokenizer& tokenizer,
                                       const std::vector<std::string>& documents) {
  std::string joined;
  for (const std::string& document : documents) {
    if (&document != &documents.front()) joined += "\n\n";
    joined += document;
  }
  std::vector<int32_t> tokens = tokenizer.encode(joined, SpecialText::AsText);
  if (tokenizer.add_bos() && tokenizer.bos()) tokens.insert(tokens.begin(), *tokenizer.bos());
  return tokens;
}

Windows Windows::rows(int64_t begin, int64_t n) const {
  const auto part = [&]<typename T>(const std::vector<T>& of) {
    return of.empty()
               ? of
               : std::vector<T>(of.begin() + begin * seq_len, of.begin() + (begin + n) * seq_len);
  };
  return {part(ids), n, seq_len, part(counted), part(first_key)};
}

std::vector<int32_t> Windows::targets() const {
  std::vector<int32_t> next(ids.size(), -1);
  for (size_t i = 0; i + 1 < ids.size(); ++i)
    if (static_cast<int64_t>(i + 1) % seq_len != 0 && (counted.empty() || counted[i + 1] != 0))
      next[i] = ids[i + 1];
  return next;
}

Windows make_windows(const TokenStream& stream, int64_t seq_len, const std::string& source,
                     Packing packing) {
  BBB_CHECK(seq_len >= 2, "a window of ", seq_len, " tokens predicts nothing; use at least 2");
  const auto total = static_cast<int64_t>(stream.ids.size());
  BBB_CHECK(total >= seq_len, source, ": ", total, " tokens are fewer than one window of ",
            seq_len);
  std::vector<uint8_t> counted = stream.counted;
  if (packing == Packing::Documents)
    for (const int64_t start : stream.starts) counted[static_cast<size_t>(start)] = 0;

  Windows windows;
  windows.seq_len = seq_len;
  bool all = true;
  auto next_start = stream.starts.begin();
  for (int64_t begin = 0; begin + seq_len <= total; begin += seq_len) {
    const int64_t end = begin + seq_len;
    const auto targets = std::count(counted.begin() + begin + 1, counted.begin() + end, 1);
    if (targets == 0) continue;
    ++windows.count;
    all = all && targets == seq_len - 1;
    windows.ids.insert(windows.ids.end(), stream.ids.begin() + begin, stream.ids.begin() + end);
    windows.counted.insert(windows.counted.end(), counted.begin() + begin, counted.begin() + end);
    if (packing == Packing::Stream) continue;
    int32_t first = 0;
    for (int64_t at = begin; at < end; ++at) {
      while (next_start != stream.starts.end() && *next_start < at) ++next_start;
      if (next_start != stream.starts.end() && *next_start == at)
        first = static_cast<int32_t>(at - begin);
      windows.first_key.push_back(first);
    }
  }
  BBB_CHECK(windows.count > 0, source, ": no window of ", seq_len,
            " tokens holds a token that the loss counts");
  if (all) windows.counted.clear();
  return windows;
}

Windows make_windows(const std::vector<int32_t>& tokens, int64_t seq_len,
                     const std::string& source) {
  return make_windows({tokens, std::vector<uint8_t>(tokens.size(), 1), {}}, seq_len, source,
                      Packing::Stream);
}

}  // namespace bbb::data
