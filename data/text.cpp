// Text files to token windows: one document per line (.jsonl) or per file (anything else).
#include "data/text.h"

#include <algorithm>
#include <cctype>

#include "data/files.h"
#include "data/gzip.h"
#include "data/json.h"
#include "quant/check.h"

namespace bbb::data {

std::string read_text(const std::string& path) {
  std::string content = read_file(path);
  return is_gzip(content) ? gunzip(content, path) : content;
}

bool is_jsonl(const std::string& path) {
  std::string name = path;
  std::ranges::transform(name, name.begin(), [](unsigned char c) { return std::tolower(c); });
  return name.ends_with(".jsonl") || name.ends_with(".jsonl.gz");
}

std::vector<std::string> read_documents(const std::string& path) {
  std::string content = read_text(path);
  std::vector<std::string> documents;
  if (is_jsonl(path)) {
    const std::string_view view = content;
    int64_t line_number = 0;
    for (size_t begin = 0; begin < view.size();) {
      const size_t end = std::min(view.find('\n', begin), view.size());
      const std::string_view line = view.substr(begin, end - begin);
      begin = end + 1;
      ++line_number;
      if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
      const nlohmann::json object =
          parse_json(line.data(), line.data() + line.size(), cat(path, ":", line_number));
      BBB_CHECK(object.is_object() && object.contains("text") && object.at("text").is_string(),
                path, ":", line_number, ": no \"text\" string");
      documents.push_back(object.at("text").get<std::string>());
    }
  } else {
    documents.push_back(std::move(content));
  }
  bool any = false;
  for (const std::string& document : documents) any = any || !document.empty();
  BBB_CHECK(any, path, ": no text");
  return documents;
}

std::vector<int32_t> training_tokens(const Tokenizer& tokenizer,
                                     const std::vector<std::string>& documents, int32_t doc_end) {
  BBB_CHECK(doc_end >= 0 && doc_end < tokenizer.vocab_size(), "the document end ", doc_end,
            " is outside the vocabulary of ", tokenizer.vocab_size());
  std::vector<int32_t> tokens;
  for (const std::string& document : documents) {
    if (tokenizer.add_bos() && tokenizer.bos()) tokens.push_back(*tokenizer.bos());
    const std::vector<int32_t> ids = tokenizer.encode(document, SpecialText::AsText);
    tokens.insert(tokens.end(), ids.begin(), ids.end());
    tokens.push_back(doc_end);
  }
  return tokens;
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

Windows make_windows(const std::vector<int32_t>& tokens, int64_t seq_len,
                     const std::string& source) {
  BBB_CHECK(seq_len >= 2, "a window of ", seq_len, " tokens predicts nothing; use at least 2");
  Windows windows;
  windows.seq_len = seq_len;
  windows.count = static_cast<int64_t>(tokens.size()) / seq_len;
  BBB_CHECK(windows.count > 0, source, ": ", tokens.size(), " tokens are fewer than one window of ",
            seq_len);
  windows.ids.assign(tokens.begin(), tokens.begin() + windows.count * seq_len);
  return windows;
}

std::vector<int32_t> next_tokens(const int32_t* ids, int64_t rows, int64_t seq_len) {
  std::vector<int32_t> next(ids + 1, ids + rows * seq_len);
  next.push_back(-1);
  for (int64_t row = 1; row < rows; ++row) next[static_cast<size_t>(row * seq_len - 1)] = -1;
  return next;
}

}  // namespace bbb::data
