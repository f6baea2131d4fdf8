// Text files to token windows.
//
//   file       lines of .jsonl, each a text or a chat; any other file is one text
//   tokens     document | doc_end | document | doc_end | ..
//   windows    cut from that stream, without regard to documents
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "data/chat_format.h"
#include "data/tokenizer.h"

namespace bbb::data {

// The content of a text file; of a gzip file, known by its first bytes, what it unpacks to.
std::string read_text(const std::string& path);
// Whether the file's name ends in .jsonl or .jsonl.gz, in any case.
bool is_jsonl(const std::string& path);

// The "text" fields of a .jsonl file in order; any other file, such as a .txt, is one text.
// Throws, naming file and line, on malformed JSON, a missing "text", or no text at all.
std::vector<std::string> read_texts(const std::string& path);

// A text, or a chat if it has messages.
struct Document {
  std::string text;
  std::vector<ChatMessage> messages = {};
  bool operator==(const Document&) const = default;
};
// The same, where a line of a .jsonl file may also be a chat: {"messages": [{"role": .., "content":
// ..}, ..]}.
std::vector<Document> read_documents(const std::string& path);

// Tokens of documents, one behind the other.
struct TokenStream {
  std::vector<int32_t> ids;
  // 1: a loss counts this token where it is the one to predict; 0: the token of a chat that no
  // assistant writes.
  std::vector<uint8_t> counted;
  std::vector<int64_t> starts;  // of each document
};
// For training: each document's ids, then `doc_end`, unless a chat ends with it already. With the
// tokenizer's add_bos, BOS before each document. A chat is rendered in the model's own format; of
// its tokens those of the assistant's answers count, each answer up to the token that ends its
// turn: the first of end_of_turn() and `stop_ids`. Throws as render_chat() does, with `model`; what
// a document is the cause of, with its number. threads: 0: all cores.
TokenStream training_tokens(const Tokenizer& tokenizer, const std::vector<Document>& documents,
                            int32_t doc_end, const std::vector<int32_t>& stop_ids = {},
                            const std::string& model = "the model", int threads = 0);

// For perplexity: documents joined by exactly two newlines and tokenized as one text, after one BOS
// if the tokenizer adds it.
std::vector<int32_t> evaluation_tokens(const Tokenizer& tokenizer,
                                       const std::vector<std::string>& documents);

// What a token attends to. Stream: all tokens before it in its window. Documents: those of its own
// document; then the last token of a document has nothing to predict.
enum class Packing { Stream, Documents };

// Non-overlapping windows of seq_len tokens, without the tail: (N, seq_len), row-major.
struct Windows {
  std::vector<int32_t> ids;
  int64_t count = 0;
  int64_t seq_len = 0;
  std::vector<uint8_t> counted = {};    // as the stream's; empty: every token counts
  std::vector<int32_t> first_key = {};  // of Documents (engine::AttentionSpec); else empty

  Windows rows(int64_t begin, int64_t n) const;  // windows begin .. begin + n - 1
  // What the positions of these windows predict, (rows, seq_len): the next token; -1 where it does
  // not count, and for the last position of a window.
  std::vector<int32_t> targets() const;
};
// Windows without a token that counts are left out. Throws if no window is left.
Windows make_windows(const TokenStream& stream, int64_t seq_len, const std::string& source,
                     Packing packing);
// Every token counts.
Windows make_windows(const std::vector<int32_t>& tokens, int64_t seq_len,
                     const std::string& source);

}  // namespace bbb::data
