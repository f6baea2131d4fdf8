// Byte-pair encoding from a tokenizer.json, as Python's `tokenizers` computes it.
//
//   text -> split at added tokens -> Normalizer -> split at added tokens with `normalized`
//        -> words (PreTokenizer) -> symbols -> merges, lowest rank first
//
// There are two kinds of vocabulary. In a byte-level one, a word's symbols are its bytes, each
// written as one printable character (GPT-2's table). In one of sentencepiece's kind, they are its
// characters; U+2581 stands for a space, and "<0x0A>" for one byte of a character that the
// vocabulary lacks. A GGUF's "gpt2" vocabulary is first converted to a tokenizer.json.
#include <algorithm>
#include <array>
#include <charconv>
#include <cstdio>
#include <deque>
#include <nlohmann/json.hpp>
#include <unordered_map>

#include "data/files.h"
#include "data/normalizer.h"
#include "data/pre_tokenizer.h"
#include "data/tokenizer_parts.h"
#include "quant/check.h"

namespace bbb::data {

using nlohmann::json;

namespace {

// The code point that stands for each byte. Printable Latin-1 stands for itself; the other 68 bytes
// are numbered from U+0100.
const std::array<uint32_t, 256>& byte_code_points() {
  static const std::array<uint32_t, 256> table = [] {
    std::array<uint32_t, 256> out{};
    uint32_t next = 256;
    for (uint32_t byte = 0; byte < 256; ++byte) {
      const bool printable =
          (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
      out[byte] = printable ? byte : next++;
    }
    return out;
  }();
  return table;
}

// The bytes that a byte-level token's text stands for; nothing if it has other characters.
std::optional<std::string> bytes_of_text(std::string_view text) {
  static const std::array<int16_t, 324> byte_of = [] {
    std::array<int16_t, 324> out;
    out.fill(-1);
    for (size_t byte = 0; byte < 256; ++byte) {
      out[byte_code_points()[byte]] = static_cast<int16_t>(byte);
    }
    return out;
  }();
  std::string bytes;
  for (size_t i = 0; i < text.size();) {
    const int64_t length = utf8_length(text.substr(i));
    if (length != 1 && length != 2) return std::nullopt;
    uint32_t point = static_cast<uint8_t>(text[i]);
    if (length == 2) point = (point & 0x1f) << 6 | (static_cast<uint8_t>(text[i + 1]) & 0x3f);
    if (point >= byte_of.size() || byte_of[point] < 0) return std::nullopt;
    bytes += static_cast<char>(byte_of[point]);
    i += static_cast<size_t>(length);
  }
  return bytes;
}

// The character that stands for a byte, in UTF-8.
std::string text_of_byte(size_t byte) {
  const uint32_t point = byte_code_points()[byte];
  if (point < 0x80) return std::string(1, static_cast<char>(point));
  return {static_cast<char>(0xC0 | point >> 6), static_cast<char>(0x80 | (point & 0x3F))};
}

// The byte that a text of the form "<0x0A>" stands for.
std::optional<uint8_t> byte_of_piece(std::string_view text) {
  unsigned byte = 0;
  if (text.size() != 6 || !text.starts_with("<0x") || text[5] != '>') return std::nullopt;
  const auto [end, error] = std::from_chars(text.data() + 3, text.data() + 5, byte, 16);
  if (error != std::errc() || end != text.data() + 5) return std::nullopt;
  return static_cast<uint8_t>(byte);
}

uint64_t pair_key(int32_t left, int32_t right) {
  return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
}

// The `decoder` of a tokenizer.json: turns a token's text into plain text. Byte-level vocabularies
// need none.
struct Decoder {
  std::vector<std::pair<std::string, std::string>> replace;
  bool byte_fallback = false;
  int64_t leading_spaces = 0;  // removed from the start of the whole text

  void add(const json& spec, const std::string& source) {
    const std::string type = spec.is_object() ? spec.value("type", "") : spec.dump();
    if (type == "Sequence") {
      for (const json& step : spec.at("decoders")) add(step, source);
    } else if (type == "Replace" && spec.at("pattern").contains("String")) {
      replace.emplace_back(spec.at("pattern").at("String").get<std::string>(),
                           spec.at("content").get<std::string>());
      BBB_CHECK(!replace.back().first.empty(), source, ": the decoder replaces an empty text");
    } else if (type == "Metaspace") {
      replace.emplace_back(spec.value("replacement", "\u2581"), " ");
      leading_spaces = spec.value("prepend_scheme", "always") != "never";
    } else if (type == "ByteFallback") {
      byte_fallback = true;
    } else if (type == "Strip" && spec.value("content", "") == " " && spec.value("stop", 0) == 0) {
      leading_spaces = spec.value("start", 0);
    } else {
      BBB_CHECK(type == "Fuse" || type == "ByteLevel", source, ": the decoder ", printable(type),
                " is not supported");
    }
  }

  std::string operator()(const std::string& text) const {
    const std::optional<uint8_t> byte = byte_fallback ? byte_of_piece(text) : std::nullopt;
    if (byte) return std::string(1, static_cast<char>(*byte));
    std::string out = text;
    for (const auto& [from, to] : replace) out = replaced(out, from, to);
    return out;
  }
};

class BpeTokenizer final : public Tokenizer {
 public:
  BpeTokenizer(TokenizerFiles files, const json& root)
      : normalizer_(root.value("normalizer", json()), files.source + "/tokenizer.json"),
        pre_tokenizer_(root.value("pre_tokenizer", json()), files.source + "/tokenizer.json") {
    const std::string where = files.source + "/tokenizer.json";
    const json& model = root.at("model");
    BBB_CHECK(model.value("type", "BPE") == "BPE", where, ": the tokenizer model ",
              printable(model.value("type", "")), " is not supported");
    for (const char* key : {"dropout", "continuing_subword_prefix", "end_of_word_suffix"}) {
      const bool unset = !model.contains(key) || model.at(key).is_null() || model.at(key) == "";
      BBB_CHECK(unset, where, ": the model's ", key, " is not supported");
    }
    ignore_merges_ = model.value("ignore_merges", false);
    byte_fallback_ = model.value("byte_fallback", false);
    fuse_unknown_ = model.value("fuse_unk", false);
    const json decoder = root.value("decoder", json());
    if (!decoder.is_null()) decoder_.add(decoder, where);
    BBB_CHECK(pre_tokenizer_.byte_level() || !decoder.is_null(), where,
              ": a vocabulary that is not byte-level has no decoder");
    leading_spaces_ = decoder_.leading_spaces;

    const TokenizerSettings settings = read_settings(files, root);
    read_vocabulary(settings, model.at("vocab"), where);
    read_merges(model.at("merges"), where);
    if (model.contains("unk_token") && model.at("unk_token").is_string()) {
      unknown_ = find(model.at("unk_token").get<std::string>());
    }
    const std::optional<std::string> first = template_start(root.value("post_processor", json()));
    add_bos_ = settings.add_bos.value_or(first.has_value());
    // Without an add_bos flag, the reference adds the template's token.
    const std::optional<std::string> bos =
        first && (!settings.bos || !settings.add_bos) ? first : settings.bos;
    if (bos) bos_ = find(*bos);
    if (settings.eos) eos_ = find(*settings.eos);
    chat_template_ = settings.chat_template;
    BBB_CHECK(!add_bos_ || bos, where, ": a BOS token is to be added, but none is named");
    BBB_CHECK(!add_bos_ || bos_, where, ": the vocabulary lacks the BOS token ", printable(*bos));
    files_ = std::move(files.files);
  }

  std::vector<int32_t> encode(std::string_view text, SpecialText special) const override {
    std::vector<int32_t> ids;
    std::deque<std::string> made;                                          // words point into it
    std::unordered_map<std::string_view, std::pair<size_t, size_t>> seen;  // word -> (begin, count)
    for (const AddedTokens::Span& raw : added_.split(text, special)) {
      if (raw.id >= 0) {
        ids.push_back(raw.id);
        continue;
      }
      const std::string_view normal =
          normalizer_.empty() ? raw.text : made.emplace_back(normalizer_.apply(raw.text));
      for (const AddedTokens::Span& span : added_normalized_.split(normal, special)) {
        if (span.id >= 0) {
          ids.push_back(span.id);
          continue;
        }
        const bool is_start = raw.text.data() == text.data() && span.text.data() == normal.data();
        for (const std::string_view word : pre_tokenizer_.split(span.text, is_start, &made)) {
          const auto [entry, is_new] = seen.try_emplace(word, ids.size(), 0);
          auto& [begin, count] = entry->second;
          if (is_new) {
            append_word(word, &ids);
            count = ids.size() - begin;
          } else {
            for (size_t i = 0; i < count; ++i) ids.push_back(ids[begin + i]);
          }
        }
      }
    }
    return ids;
  }

  std::string piece(int32_t id, bool show_special) const override {
    BBB_CHECK(id >= 0, "token ", id, " is negative");
    const size_t index = static_cast<size_t>(id);
    return index >= bytes_.size() || (special_[index] && !show_special) ? "" : bytes_[index];
  }

  std::optional<int32_t> find(std::string_view token) const override {
    const auto found = ids_.find(std::string(token));
    if (found == ids_.end()) return std::nullopt;
    return found->second;
  }

  int64_t vocab_size() const override { return static_cast<int64_t>(bytes_.size()); }

  std::vector<std::pair<std::string, std::string>> export_files() const override { return files_; }

 private:
  struct Merge {
    int32_t rank;
    int32_t id;
  };

  void read_vocabulary(const TokenizerSettings& settings, const json& vocabulary,
                       const std::string& where) {
    // Ids must be almost dense. Otherwise one wild id could demand a table of any size.
    const int64_t limit =
        2 * static_cast<int64_t>(vocabulary.size() + settings.added.size()) + 1024;
    const auto store = [&](int64_t id, const std::string& text, std::string bytes, bool special) {
      BBB_CHECK(id >= 0 && id < limit, where, ": the id ", id, " of the token ", printable(text),
                " is out of range");
      if (id >= vocab_size()) {
        bytes_.resize(static_cast<size_t>(id) + 1);
        special_.resize(static_cast<size_t>(id) + 1, 0);
      }
      bytes_[static_cast<size_t>(id)] = std::move(bytes);
      special_[static_cast<size_t>(id)] = special;
      ids_[text] = static_cast<int32_t>(id);
    };
    const bool byte_level = pre_tokenizer_.byte_level();
    byte_ids_.fill(-1);
    fallback_ids_.fill(-1);
    BBB_CHECK(vocabulary.is_object() && !vocabulary.empty(), where,
              ": \"vocab\" is no object with tokens");
    for (const auto& [text, id] : vocabulary.items()) {
      BBB_CHECK(id.is_number_integer(), where, ": the id of the token ", printable(text),
                " is no whole number");
      const int32_t number = static_cast<int32_t>(id.get<int64_t>());
      const std::optional<std::string> bytes = byte_level ? bytes_of_text(text) : text;
      store(id.get<int64_t>(), text, byte_level ? bytes.value_or(text) : decoder_(text), false);
      if (bytes) words_[*bytes] = number;
      if (bytes && bytes->size() == 1) byte_ids_[static_cast<uint8_t>((*bytes)[0])] = number;
      if (const auto byte = byte_of_piece(text)) fallback_ids_[*byte] = number;
    }
    std::vector<AddedToken> raw;
    std::vector<AddedToken> normalized;
    for (AddedToken& token :
         settings.added_tokens([this](std::string_view name) { return find(name); })) {
      const std::string text = token.content;
      if (token.normalized) token.content = normalizer_.apply(text);
      BBB_CHECK(!token.content.empty(), where,
                ": the normalizer leaves nothing of the added token ", printable(text));
      store(token.id, text, byte_level ? text : decoder_(token.content), token.special);
      (token.normalized ? normalized : raw).push_back(std::move(token));
    }
    added_ = AddedTokens(std::move(raw));
    added_normalized_ = AddedTokens(std::move(normalized));
  }

  void read_merges(const json& merges, const std::string& where) {
    BBB_CHECK(merges.is_array(), where, ": \"merges\" is no array");
    merges_.reserve(merges.size());
    int32_t rank = 0;
    for (const json& merge : merges) {
      std::string left;
      std::string right;
      if (merge.is_string()) {
        const std::string text = merge.get<std::string>();
        const size_t space = text.find(' ', 1);
        BBB_CHECK(space != std::string::npos, where, ": the merge \"", printable(text),
                  "\" is not a pair");
        left = text.substr(0, space);
        right = text.substr(space + 1);
      } else {
        BBB_CHECK(merge.is_array() && merge.size() == 2, where, ": a merge is not a pair");
        left = merge.at(0).get<std::string>();
        right = merge.at(1).get<std::string>();
      }
      const std::optional<int32_t> ids[3] = {find(left), find(right), find(left + right)};
      BBB_CHECK(ids[0] && ids[1] && ids[2], where, ": the merge of ", printable(left), " and ",
                printable(right), " names a token that the vocabulary lacks");
      merges_[pair_key(*ids[0], *ids[1])] = {rank++, *ids[2]};
    }
  }

  // The token that the post-processor's template puts before a single text, if any.
  static std::optional<std::string> template_start(const json& spec) {
    const std::string type = spec.is_object() ? spec.value("type", "") : "";
    if (type == "Sequence") {
      for (const json& step : spec.at("processors")) {
        if (const auto token = template_start(step)) return token;
      }
    }
    if (type != "TemplateProcessing" || spec.at("single").empty()) return std::nullopt;
    const json& first = spec.at("single").at(0);
    if (!first.contains("SpecialToken")) return std::nullopt;
    return first.at("SpecialToken").at("id").get<std::string>();
  }

  // The ids of the word's bytes or characters. A character that the vocabulary lacks becomes the
  // tokens of its bytes; without these, the unknown token; without that, nothing.
  std::vector<int32_t> symbol_ids(std::string_view word) const {
    std::vector<int32_t> ids;
    ids.reserve(word.size());
    bool is_pending = false;  // the unknown token is due; the next unknown character may join it
    const auto flush = [&] {
      if (is_pending) ids.push_back(*unknown_);
      is_pending = false;
    };
    for (size_t i = 0, length = 1; i < word.size(); i += length) {
      const uint8_t byte = static_cast<uint8_t>(word[i]);
      int32_t id = byte_ids_[byte];
      if (!pre_tokenizer_.byte_level() && byte >= 0x80) {
        length = static_cast<size_t>(std::max<int64_t>(1, utf8_length(word.substr(i))));
        const auto found = words_.find(std::string(word.substr(i, length)));
        id = found == words_.end() ? -1 : found->second;
      } else {
        length = 1;
      }
      if (id >= 0) {
        flush();
        ids.push_back(id);
        continue;
      }
      const std::string character =
          pre_tokenizer_.byte_level() ? text_of_byte(byte) : std::string(word.substr(i, length));
      const auto fallback = [&](char c) { return fallback_ids_[static_cast<uint8_t>(c)]; };
      if (byte_fallback_ && std::all_of(character.begin(), character.end(),
                                        [&](char c) { return fallback(c) >= 0; })) {
        // As in the reference, a pending unknown token comes after these bytes.
        for (const char c : character) ids.push_back(fallback(c));
      } else if (unknown_) {
        if (!fuse_unknown_) flush();
        is_pending = true;
      }
    }
    flush();
    return ids;
  }

  // Merges the word's symbols, always the pair of lowest rank, leftmost first. A linked list of
  // symbols and a heap of candidate pairs make this O(n log n). A candidate is stale if its symbols
  // no longer have the ids that it was made from.
  void append_word(std::string_view word, std::vector<int32_t>* out) const {
    if (ignore_merges_) {
      const auto whole = words_.find(std::string(word));
      if (whole != words_.end()) {
        out->push_back(whole->second);
        return;
      }
    }
    struct Symbol {
      int32_t id;  // -1 once merged into its left neighbour
      int32_t previous;
      int32_t next;
    };
    struct Candidate {
      int32_t rank;
      int32_t left;  // symbol index
      uint64_t pair;
      int32_t merged;
    };
    const auto later = [](const Candidate& a, const Candidate& b) {
      return a.rank != b.rank ? a.rank > b.rank : a.left > b.left;
    };
    std::vector<Symbol> symbols;
    symbols.reserve(word.size());
    for (const int32_t id : symbol_ids(word)) {
      const int32_t index = static_cast<int32_t>(symbols.size());
      symbols.push_back({id, index - 1, index + 1});
    }
    if (symbols.empty()) return;
    symbols.back().next = -1;

    std::vector<Candidate> heap;
    const auto offer = [&](int32_t left) {
      const int32_t right = left < 0 ? -1 : symbols[static_cast<size_t>(left)].next;
      if (right < 0) return;
      const uint64_t pair =
          pair_key(symbols[static_cast<size_t>(left)].id, symbols[static_cast<size_t>(right)].id);
      const auto merge = merges_.find(pair);
      if (merge == merges_.end()) return;
      heap.push_back({merge->second.rank, left, pair, merge->second.id});
      std::push_heap(heap.begin(), heap.end(), later);
    };
    for (int32_t i = 0; i + 1 < static_cast<int32_t>(symbols.size()); ++i) offer(i);
    while (!heap.empty()) {
      std::pop_heap(heap.begin(), heap.end(), later);
      const Candidate best = heap.back();
      heap.pop_back();
      Symbol& left = symbols[static_cast<size_t>(best.left)];
      if (left.id < 0 || left.next < 0) continue;
      Symbol& right = symbols[static_cast<size_t>(left.next)];
      if (pair_key(left.id, right.id) != best.pair) continue;
      left.id = best.merged;
      left.next = right.next;
      right.id = -1;
      if (left.next >= 0) symbols[static_cast<size_t>(left.next)].previous = best.left;
      offer(left.previous);
      offer(best.left);
    }
    for (int32_t i = 0; i >= 0; i = symbols[static_cast<size_t>(i)].next) {
      out->push_back(symbols[static_cast<size_t>(i)].id);
    }
  }

  Normalizer normalizer_;
  PreTokenizer pre_tokenizer_;
  Decoder decoder_;
  std::vector<std::pair<std::string, std::string>> files_;
  AddedTokens added_;
  AddedTokens added_normalized_;
  std::vector<std::string> bytes_;                // by id
  std::vector<uint8_t> special_;                  // by id
  std::unordered_map<std::string, int32_t> ids_;  // by the vocabulary's text
  // By bytes (byte-level) or by the vocabulary's text, without added tokens.
  std::unordered_map<std::string, int32_t> words_;
  std::array<int32_t, 256> byte_ids_;      // of one-byte words
  std::array<int32_t, 256> fallback_ids_;  // of "<0x00>" to "<0xFF>"
  std::unordered_map<uint64_t, Merge> merges_;
  std::optional<int32_t> unknown_;
  bool ignore_merges_ = false;
  bool byte_fallback_ = false;
  bool fuse_unknown_ = false;
};

// llama.cpp's word patterns for the names of tokenizer.ggml.pre. Each pattern splits the words that
// the previous ones produced. `gpt2`: GPT-2's pattern comes last. `llama3`: a word that is a token
// is not merged, and BOS is added unless the file says otherwise.
struct NamedPatterns {
  std::vector<std::string_view> names;
  std::vector<std::string> patterns;
  bool gpt2 = false;
  bool llama3 = false;
};

// DeepSeek's letters: those of scripts with upper and lower case.
const char* const kCasedLetters =
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-"
    "\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90"
    "-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d"
    "\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-"
    "\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
    "\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d"
    "\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e"
    "\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f"
    "\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943";

const std::vector<NamedPatterns>& named_patterns() {
  static const std::string kQwen2 = replaced(kLlama3Pattern, R"(\p{N}{1,3})", R"(\p{N})");
  static const std::string kTekken =
      R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|)"
      R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|)"
      R"(\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
  static const std::string kIdeographs = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+";
  static const std::vector<NamedPatterns> kNamed = {
      {{"gpt-2", "gpt2", "phi-2"}, {}, true},
      {{"smollm", "starcoder", "refact"}, {R"(\p{N})"}, true},
      {{"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2", "midm-2.0"},
       {kLlama3Pattern},
       false,
       true},
      {{"tekken"}, {kTekken}, false, true},
      {{"qwen2", "deepseek-r1-qwen"}, {kQwen2}},
      {{"deepseek-llm"},
       {R"([\r\n])", cat(R"(\s?[)", kCasedLetters, "]+"),
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+", R"(\s+$)", kIdeographs,
        R"(\p{N}+)"}},
      {{"deepseek-coder"}, {R"([\r\n])", R"(\s?\p{L}+)", R"(\s?\p{P}+)", kIdeographs, R"(\p{N})"}},
      {{"default"}, {R"([\p{P}\$\+<=>\^~\|]+)", kGpt2Pattern, R"(\p{N}+)", R"([0-9][0-9][0-9])"}},
  };
  return kNamed;
}

const NamedPatterns& patterns_of(const std::string& name, const std::string& source) {
  for (const NamedPatterns& named : named_patterns()) {
    if (std::find(named.names.begin(), named.names.end(), name) != named.names.end()) return named;
  }
  throw Error(cat(source, ": the pre-tokenizer ", printable(name),
                  " (tokenizer.ggml.pre) is not supported"));
}

json byte_level(bool use_regex) {
  return {{"type", "ByteLevel"},
          {"add_prefix_space", false},
          {"trim_offsets", true},
          {"use_regex", use_regex}};
}

json pre_tokenizer_of(const NamedPatterns& named) {
  json steps = json::array();
  for (const std::string& pattern : named.patterns) {
    steps.push_back({{"type", "Split"},
                     {"pattern", {{"Regex", pattern}}},
                     {"behavior", "Isolated"},
                     {"invert", false}});
  }
  steps.push_back(byte_level(named.gpt2));
  return {{"type", "Sequence"}, {"pretokenizers", std::move(steps)}};
}

// The inverse of pre_tokenizer_of(): appends the patterns of a byte-level pre_tokenizer. Returns
// false if it has a step that no name stands for.
bool read_patterns(const json& spec, NamedPatterns* out) {
  const std::string type = spec.is_object() ? spec.value("type", "") : "";
  if (type == "Sequence") {
    const json& steps = spec.at("pretokenizers");
    return std::all_of(steps.begin(), steps.end(),
                       [&](const json& step) { return read_patterns(step, out); });
  }
  if (type == "Digits" && spec.value("individual_digits", false)) {
    out->patterns.push_back(R"(\p{N})");
    return true;
  }
  if (type == "Split" && spec.at("pattern").contains("Regex")) {
    out->patterns.push_back(spec.at("pattern").at("Regex").get<std::string>());
    return true;
  }
  out->gpt2 = type == "ByteLevel" && spec.value("use_regex", true);
  return type == "ByteLevel" && !spec.value("add_prefix_space", true);
}

}  // namespace

std::string gguf_pre_tokenizer(const json& root, const std::string& source) {
  NamedPatterns found;
  const json spec = root.value("pre_tokenizer", json());
  const bool known = read_patterns(spec, &found);
  const bool ignore_merges = root.at("model").value("ignore_merges", false);
  for (const NamedPatterns& named : named_patterns())
    if (known && named.patterns == found.patterns && named.gpt2 == found.gpt2 &&
        named.llama3 == ignore_merges)
      return std::string(named.names[0]);
  throw Error(cat(source, ": a GGUF cannot hold this tokenizer: llama.cpp has no name for its ",
                  "pre_tokenizer ", printable(spec.dump(-1, ' ', true))));
}

std::unique_ptr<Tokenizer> make_bpe_tokenizer(TokenizerFiles files, const json& root) {
  return std::make_unique<BpeTokenizer>(std::move(files), root);
}

TokenizerFiles byte_files(const std::string& source) {
  json vocabulary = json::object();
  for (size_t byte = 0; byte < 256; ++byte) vocabulary[text_of_byte(byte)] = byte;
  const json end = {{"content", "<|endoftext|>"}, {"lstrip", false},
                    {"normalized", false},        {"rstrip", false},
                    {"single_word", false},       {"special", true}};
  json added = end;
  added["id"] = 256;
  const json root = {
      {"version", "1.0"},
      {"added_tokens", json::array({added})},
      {"normalizer", nullptr},
      {"pre_tokenizer", byte_level(true)},
      {"post_processor", byte_level(true)},
      {"decoder", byte_level(true)},
      {"model", {{"type", "BPE"}, {"vocab", std::move(vocabulary)}, {"merges", json::array()}}}};
  const json config = {{"tokenizer_class", "PreTrainedTokenizerFast"},
                       {"eos_token", end.at("content")},
                       {"add_bos_token", false},
                       {"added_tokens_decoder", {{"256", end}}}};
  return {source, {{"tokenizer.json", root.dump()}, {"tokenizer_config.json", config.dump(2)}}};
}

TokenizerFiles bpe_files(const Gguf& gguf) {
  const std::string pre =
      gguf.has("tokenizer.ggml.pre") ? gguf.string("tokenizer.ggml.pre") : "default";
  if (pre == "default") {
    std::fprintf(stderr,
                 "bbb: %s names no pre-tokenizer of its own (tokenizer.ggml.pre); text is split by "
                 "llama.cpp's default, which may differ from what the model was trained on\n",
                 gguf.path().c_str());
  }
  const NamedPatterns& named = patterns_of(pre, gguf.path());
  const bool add_bos = gguf.has("tokenizer.ggml.add_bos_token")
                           ? gguf.boolean("tokenizer.ggml.add_bos_token")
                           : named.llama3 && gguf.has("tokenizer.ggml.bos_token_id");
  const GgufVocabulary pieces = read_vocabulary(gguf);
  json config = config_from_gguf(gguf, pieces, add_bos);
  config["tokenizer_class"] = "PreTrainedTokenizerFast";

  json vocabulary = json::object();
  json added = json::array();
  const json& decoder = config.at("added_tokens_decoder");
  for (size_t i = 0; i < pieces.tokens.size(); ++i) {
    if (pieces.types[i] == PieceType::Unused) continue;  // padding: an id without a token
    vocabulary[pieces.tokens[i]] = i;
    const auto token = decoder.find(std::to_string(i));
    if (token == decoder.end()) continue;
    added.push_back(*token);
    added.back()["id"] = i;
  }
  json post_processor = byte_level(true);
  if (add_bos && config.contains("bos_token")) {
    const json& bos = config.at("bos_token");
    const json bos_step = {{"SpecialToken", {{"id", bos}, {"type_id", 0}}}};
    const auto text_step = [](const char* id, int type) {
      return json{{"Sequence", {{"id", id}, {"type_id", type}}}};
    };
    post_processor = {
        {"type", "TemplateProcessing"},
        {"single", json::array({bos_step, text_step("A", 0)})},
        {"pair", json::array({bos_step, text_step("A", 0), bos_step, text_step("B", 1)})},
        {"special_tokens",
         {{bos.get<std::string>(),
           {{"id", bos},
            {"ids", json::array({gguf.integer("tokenizer.ggml.bos_token_id")})},
            {"tokens", json::array({bos})}}}}}};
  }
  const json root = {{"version", "1.0"},
                     {"truncation", nullptr},
                     {"padding", nullptr},
                     {"added_tokens", std::move(added)},
                     {"normalizer", nullptr},
                     {"pre_tokenizer", pre_tokenizer_of(named)},
                     {"post_processor", post_processor},
                     {"decoder", byte_level(true)},
                     {"model",
                      {{"type", "BPE"},
                       {"dropout", nullptr},
                       {"unk_token", nullptr},
                       {"continuing_subword_prefix", nullptr},
                       {"end_of_word_suffix", nullptr},
                       {"fuse_unk", false},
                       {"byte_fallback", false},
                       {"ignore_merges", named.llama3},
                       {"vocab", std::move(vocabulary)},
                       {"merges", gguf.strings("tokenizer.ggml.merges")}}}};
  return {gguf.path(),
          {{"tokenizer.json", root.dump()}, {"tokenizer_config.json", config.dump(2)}}};
}

}  // namespace bbb::data
