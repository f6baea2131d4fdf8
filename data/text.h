// Text files to token windows.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "data/tokenizer.h"

namespace bbb::data {

// The content of a text file; of a gzip file, known by its first bytes, what it unpacks to.
std::string read_text(const std::string& path);
// Whether the file's name ends in .jsonl or .jsonl.gz, in any case.
bool is_jsonl(const std::string& path);

// The "text" fields of a .jsonl file in order; any other file, such as a .txt, is one document.
// Throws, naming file and line, on malformed JSON, a missing "text", or no text at all.
std::vector<std::string> read_documents(const std::string& path);

// For training: each document's ids, then `doc_end`. With the tokenizer's add_bos, BOS before each
// document.
std::vector<int32_t> training_tokens(const Tokenizer& tokenizer,
                                     const std::vector<std::string>& documents, int32_t doc_end);

// For perplexity: documents joined by exactly two newlines and tokenized as one text, after one BOS
// if the tokenizer adds it.
std::vector<int32_t> evaluation_tokens(const Tokenizer& tokenizer,
                                       const std::vector<std::string>& documents);

// Non-overlapping windows of seq_len tokens, without the tail: (N, seq_len), row-major. Throws if
// there is not one whole window.
struct Windows {
  std::vector<int32_t> ids;
  int64_t count = 0;
  int64_t seq_len = 0;
};
Windows make_windows(const std::vector<int32_t>& tokens, int64_t seq_len,
                     const std::string& source);
// What the positions of `rows` windows predict, (rows, seq_len): the next token, and -1 for the
// last position of a window, which predicts nothing.
std::vector<int32_t> next_tokens(const int32_t* ids, int64_t rows, int64_t seq_len);

}  // namespace bbb::data
