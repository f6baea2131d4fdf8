// Byte-level byte-pair encoding, as Python's `tokenizers` computes it.
//
//   text -> added tokens cut out -> words (PreTokenizer) -> bytes -> merges, lowest rank first
//
// Vocabularies write a byte as one printable character (GPT-2's table); here tokens are kept as the
// bytes they stand for. A GGUF's "gpt2" vocabulary is first written as a tokenizer.json.
#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <unordered_map>

#include "data/pre_tokenizer.h"
#include "data/tokenizer_parts.h"
#include "quant/check.h"

namespace bbb::data {

using nlohmann::json;

namespace {

// The code point that stands for a byte: printable Latin-1 itself, the other 68 from U+0100 on.
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

// The bytes that a vocabulary's text stands for; nothing where it has other characters.
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

uint64_t pair_key(int32_t left, int32_t right) {
  return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
}

class BpeTokenizer final : public Tokenizer {
 public:
  BpeTokenizer(TokenizerFiles files, const json& root)
      : pre_tokenizer_(root.value("pre_tokenizer", json()), files.source + "/tokenizer.json"),
        files_(std::move(files.files)) {
    const std::string where = files.source + "/tokenizer.json";
    BBB_CHECK(!root.contains("normalizer") || root.at("normalizer").is_null(), where,
              ": a normalizer is not supported");
    const json& model = root.at("model");
    BBB_CHECK(model.value("type", "BPE") == "BPE", where, ": the tokenizer model ",
              model.value("type", ""), " is not supported");
    BBB_CHECK(!model.value("byte_fallback", false), where,
              ": a sentencepiece vocabulary, which needs tokenizer.model");
    for (const char* key : {"dropout", "continuing_subword_prefix", "end_of_word_suffix"}) {
      const bool unset = !model.contains(key) || model.at(key).is_null() || model.at(key) == "";
      BBB_CHECK(unset, where, ": the model's ", key, " is not supported");
    }
    ignore_merges_ = model.value("ignore_merges", false);
    read_vocabulary(root, model, where);
    read_merges(model.at("merges"), where);
    if (model.contains("unk_token") && model.at("unk_token").is_string()) {
      unknown_ = find(model.at("unk_token").get<std::string>());
    }
    TokenizerFiles named{files.source, files_};
    const TokenizerSettings settings = read_settings(named);
    if (settings.bos) bos_ = find(*settings.bos);
    if (settings.eos) eos_ = find(*settings.eos);
    chat_template_ = settings.chat_template;
    add_bos_ = settings.add_bos.value_or(
        starts_with_bos(root.value("post_processor", json()), settings.bos));
    BBB_CHECK(!add_bos_ || bos_, where, ": a BOS token is to be added, but none is named");
  }

  std::vector<int32_t> encode(std::string_view text, SpecialText special) const override {
    std::vector<int32_t> ids;
    std::unordered_map<std::string_view, std::pair<size_t, size_t>> seen;  // word -> its first ids
    for (const AddedTokens::Span& span : added_.split(text, special)) {
      if (span.id >= 0) {
        ids.push_back(span.id);
        continue;
      }
      for (const std::string_view word : pre_tokenizer_.split(span.text)) {
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
    return ids;
  }

  std::string piece(int32_t id, bool show_special) const override {
    BBB_CHECK(id >= 0 && id < vocab_size(), "token ", id, " is outside the vocabulary of ",
              vocab_size());
    return special_[static_cast<size_t>(id)] && !show_special ? ""
                                                              : bytes_[static_cast<size_t>(id)];
  }

  std::string decode(const std::vector<int32_t>& ids) const override {
    std::string text;
    for (const int32_t id : ids) text += piece(id, false);
    return text;
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

  void read_vocabulary(const json& root, const json& model, const std::string& where) {
    std::vector<AddedToken> added;
    if (root.contains("added_tokens")) {
      for (const json& token : root.at("added_tokens")) {
        added.push_back(read_added_token(token, token.at("id").get<int32_t>(), where));
      }
    }
    const json& vocabulary = model.at("vocab");
    // Ids must be almost dense, so that a wild one cannot ask for a table of any size.
    const int64_t limit = 2 * static_cast<int64_t>(vocabulary.size() + added.size()) + 1024;
    const auto store = [&](int64_t id, const std::string& text, std::string bytes, bool special) {
      BBB_CHECK(id >= 0 && id < limit, where, ": the id ", id, " of the token ", text,
                " is out of range");
      if (id >= vocab_size()) {
        bytes_.resize(static_cast<size_t>(id) + 1);
        special_.resize(static_cast<size_t>(id) + 1, 0);
      }
      bytes_[static_cast<size_t>(id)] = std::move(bytes);
      special_[static_cast<size_t>(id)] = special;
      ids_[text] = static_cast<int32_t>(id);
    };
    byte_ids_.fill(-1);
    for (const auto& [text, id] : vocabulary.items()) {
      const std::optional<std::string> bytes = bytes_of_text(text);
      const int64_t number = id.get<int64_t>();
      store(number, text, bytes.value_or(text), false);
      if (!bytes) continue;
      words_[*bytes] = static_cast<int32_t>(number);
      if (bytes->size() == 1) {
        byte_ids_[static_cast<uint8_t>((*bytes)[0])] = static_cast<int32_t>(number);
      }
    }
    for (const AddedToken& token : added) {
      store(token.id, token.content, token.content, token.special);
    }
    added_ = AddedTokens(std::move(added));
  }

  void read_merges(const json& merges, const std::string& where) {
    merges_.reserve(merges.size());
    int32_t rank = 0;
    for (const json& merge : merges) {
      std::string left;
      std::string right;
      if (merge.is_string()) {
        const std::string text = merge.get<std::string>();
        const size_t space = text.find(' ', 1);
        BBB_CHECK(space != std::string::npos, where, ": the merge \"", text, "\" is not a pair");
        left = text.substr(0, space);
        right = text.substr(space + 1);
      } else {
        left = merge.at(0).get<std::string>();
        right = merge.at(1).get<std::string>();
      }
      const std::optional<int32_t> ids[3] = {find(left), find(right), find(left + right)};
      BBB_CHECK(ids[0] && ids[1] && ids[2], where, ": the merge of ", left, " and ", right,
                " names a token that the vocabulary lacks");
      merges_[pair_key(*ids[0], *ids[1])] = {rank++, *ids[2]};
    }
  }

  // Whether the post-processor's template puts BOS before a single text.
  static bool starts_with_bos(const json& spec, const std::optional<std::string>& bos) {
    if (!spec.is_object() || !bos) return false;
    if (spec.value("type", "") == "Sequence") {
      for (const json& step : spec.at("processors")) {
        if (starts_with_bos(step, bos)) return true;
      }
    }
    if (spec.value("type", "") != "TemplateProcessing" || spec.at("single").empty()) return false;
    const json& first = spec.at("single").at(0);
    return first.contains("SpecialToken") && first.at("SpecialToken").at("id") == *bos;
  }

  // Merges the word's symbols, always the pair of lowest rank, leftmost first: a linked list of
  // symbols and a heap of candidate pairs, O(n log n). Candidates that a merge has overtaken are
  // recognized by the ids that they were made from.
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
    for (const char c : word) {
      int32_t id = byte_ids_[static_cast<uint8_t>(c)];
      if (id < 0) {
        if (!unknown_) continue;  // as the reference does with a byte that no token holds
        id = *unknown_;
      }
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

  PreTokenizer pre_tokenizer_;
  std::vector<std::pair<std::string, std::string>> files_;
  AddedTokens added_;
  std::vector<std::string> bytes_;                  // by id
  std::vector<uint8_t> special_;                    // by id
  std::unordered_map<std::string, int32_t> ids_;    // by the vocabulary's text
  std::unordered_map<std::string, int32_t> words_;  // by bytes, added tokens left out
  std::array<int32_t, 256> byte_ids_;
  std::unordered_map<uint64_t, Merge> merges_;
  std::optional<int32_t> unknown_;
  bool ignore_merges_ = false;
};

json pre_tokenizer_of(const std::string& name, const std::string& source) {
  const auto byte_level = [](bool use_regex) {
    return json{{"type", "ByteLevel"},
                {"add_prefix_space", false},
                {"trim_offsets", true},
                {"use_regex", use_regex}};
  };
  const auto sequence = [](json first, json second) {
    return json{{"type", "Sequence"},
                {"pretokenizers", json::array({std::move(first), std::move(second)})}};
  };
  if (name == "gpt-2" || name == "gpt2" || name == "phi-2") return byte_level(true);
  if (name == "smollm" || name == "starcoder" || name == "refact") {
    return sequence({{"type", "Digits"}, {"individual_digits", true}}, byte_level(true));
  }
  if (name == "llama-bpe" || name == "llama3" || name == "llama-v3") {
    return sequence({{"type", "Split"},
                     {"pattern", {{"Regex", kLlama3Pattern}}},
                     {"behavior", "Isolated"},
                     {"invert", false}},
                    byte_level(false));
  }
  throw Error(cat(source, ": the pre-tokenizer ", name, " (tokenizer.ggml.pre) is not supported"));
}

}  // namespace

std::unique_ptr<Tokenizer> make_bpe_tokenizer(TokenizerFiles files) {
  const json root = json_of(files, "tokenizer.json");
  return std::make_unique<BpeTokenizer>(std::move(files), root);
}

TokenizerFiles byte_files(const std::string& source) {
  json vocabulary = json::object();
  for (size_t byte = 0; byte < 256; ++byte) {
    const uint32_t point = byte_code_points()[byte];
    const char utf8[] = {static_cast<char>(0xC0 | point >> 6),
                         static_cast<char>(0x80 | (point & 0x3F))};
    vocabulary[point < 0x80 ? std::string(1, static_cast<char>(point)) : std::string(utf8, 2)] =
        byte;
  }
  const json end = {{"content", "<|endoftext|>"}, {"lstrip", false},
                    {"normalized", false},        {"rstrip", false},
                    {"single_word", false},       {"special", true}};
  json added = end;
  added["id"] = 256;
  const json byte_level = {{"type", "ByteLevel"},
                           {"add_prefix_space", false},
                           {"trim_offsets", true},
                           {"use_regex", true}};
  const json root = {
      {"version", "1.0"},
      {"added_tokens", json::array({added})},
      {"normalizer", nullptr},
      {"pre_tokenizer", byte_level},
      {"post_processor", byte_level},
      {"decoder", byte_level},
      {"model", {{"type", "BPE"}, {"vocab", std::move(vocabulary)}, {"merges", json::array()}}}};
  const json config = {{"tokenizer_class", "PreTrainedTokenizerFast"},
                       {"eos_token", end.at("content")},
                       {"add_bos_token", false},
                       {"added_tokens_decoder", {{"256", end}}}};
  return {source, {{"tokenizer.json", root.dump()}, {"tokenizer_config.json", config.dump(2)}}};
}

TokenizerFiles bpe_files(const Gguf& gguf) {
  const std::vector<std::string>& tokens = gguf.strings("tokenizer.ggml.tokens");
  const std::vector<int64_t>& types = gguf.integers("tokenizer.ggml.token_type");
  BBB_CHECK(types.size() == tokens.size(), gguf.path(), ": ", tokens.size(), " tokens but ",
            types.size(), " token types");
  BBB_CHECK(gguf.has("tokenizer.ggml.pre"), gguf.path(),
            ": no tokenizer.ggml.pre, so the pre-tokenizer is unknown");
  const std::string& pre = gguf.string("tokenizer.ggml.pre");
  const json pre_tokenizer = pre_tokenizer_of(pre, gguf.path());
  const bool is_llama3 = pre_tokenizer.value("type", "") == "Sequence" &&
                         pre_tokenizer.at("pretokenizers").at(0).at("type") == "Split";
  const bool add_bos = gguf.has("tokenizer.ggml.add_bos_token")
                           ? gguf.boolean("tokenizer.ggml.add_bos_token")
                           : is_llama3;
  const json config = config_from_gguf(gguf, tokens, types, add_bos);

  json vocabulary = json::object();
  json added = json::array();
  for (size_t i = 0; i < tokens.size(); ++i) {
    vocabulary[tokens[i]] = i;
    const auto token = config.at("added_tokens_decoder").find(std::to_string(i));
    if (token == config.at("added_tokens_decoder").end()) continue;
    added.push_back(*token);
    added.back()["id"] = i;
  }
  const json byte_level = {{"type", "ByteLevel"},
                           {"add_prefix_space", false},
                           {"trim_offsets", true},
                           {"use_regex", true}};
  json post_processor = byte_level;
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
                     {"pre_tokenizer", pre_tokenizer},
                     {"post_processor", post_processor},
                     {"decoder", byte_level},
                     {"model",
                      {{"type", "BPE"},
                       {"dropout", nullptr},
                       {"unk_token", nullptr},
                       {"continuing_subword_prefix", nullptr},
                       {"end_of_word_suffix", nullptr},
                       {"fuse_unk", false},
                       {"byte_fallback", false},
                       {"ignore_merges", is_llama3},
                       {"vocab", std::move(vocabulary)},
                       {"merges", gguf.strings("tokenizer.ggml.merges")}}}};
  json named = config;
  named["tokenizer_class"] = "PreTrainedTokenizerFast";
  return {gguf.path(), {{"tokenizer.json", root.dump()}, {"tokenizer_config.json", named.dump(2)}}};
}

}  // namespace bbb::data
