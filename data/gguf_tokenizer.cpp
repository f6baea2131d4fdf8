#include "data/gguf_tokenizer.h"

#include <algorithm>
#include <cstdio>
#include <limits>
#include <nlohmann/json.hpp>

#include "data/files.h"
#include "data/half.h"
#include "data/json.h"
#include "data/tokenizer_parts.h"
#include "quant/check.h"

namespace bbb::data {

using nlohmann::json;

namespace {

constexpr float kNoScore = -1000;  // of tokens that no merge makes

// The vocabulary in the form of a GGUF, by id.
struct Vocabulary {
  std::vector<std::string> tokens;
  std::vector<int32_t> types;
  std::vector<float> scores;

  explicit Vocabulary(int64_t rows) {
    for (int64_t id = 0; id < rows; ++id) tokens.push_back(cat("[PAD", id, "]"));
    types.assign(tokens.size(), static_cast<int32_t>(PieceType::Unused));
    scores.assign(tokens.size(), kNoScore);
  }

  void set(int64_t id, const std::string& text, PieceType type, float score,
           const std::string& source) {
    BBB_CHECK(id >= 0 && id < static_cast<int64_t>(tokens.size()), source, ": the token ",
              printable(text), " has the id ", id, ", and the embedding ", tokens.size(), " rows");
    tokens[static_cast<size_t>(id)] = text;
    types[static_cast<size_t>(id)] = static_cast<int32_t>(type);
    scores[static_cast<size_t>(id)] = score;
  }

  void add(const std::vector<AddedToken>& added, const std::string& source) {
    for (const AddedToken& token : added)
      set(token.id, token.content, token.special ? PieceType::Control : PieceType::UserDefined,
          kNoScore, source);
  }
};

// Reads protobuf's wire format: field(number, value) for each field in order. A varint or the bits
// of a 32-bit number is passed as `number`, a string as `bytes`.
template <typename Field>
void read_wire(std::string_view message, const std::string& source, Field field) {
  size_t at = 0;
  const auto check = [&](bool good) {
    BBB_CHECK(good, source, "/tokenizer.model: damaged at byte ", at);
  };
  const auto varint = [&] {
    uint64_t value = 0;
    for (int shift = 0;; shift += 7) {
      check(at < message.size() && shift < 64);
      const auto byte = static_cast<uint8_t>(message[at++]);
      value |= static_cast<uint64_t>(byte & 0x7f) << shift;
      if (byte < 0x80) return value;
    }
  };
  while (at < message.size()) {
    const uint64_t key = varint();
    const auto number = static_cast<int>(key >> 3);
    if ((key & 7) == 0) {
      field(number, varint(), std::string_view());
      continue;
    }
    const uint64_t bytes = (key & 7) == 2 ? varint() : (key & 7) == 5 ? 4 : (key & 7) == 1 ? 8 : 0;
    check(bytes <= message.size() - at && ((key & 7) == 2 || bytes > 0));
    const std::string_view value = message.substr(at, bytes);
    field(number, (key & 7) == 5 ? load_as<uint32_t>(value.data()) : 0, value);
    at += bytes;
  }
}

// The parts of a sentencepiece model that a GGUF holds.
struct PieceModel {
  struct Piece {
    std::string text;
    float score = 0;
    PieceType type = PieceType::Normal;
  };
  std::vector<Piece> pieces;
  bool add_prefix = true, remove_spaces = true;

  PieceModel(const std::string& proto, const std::string& source) {
    uint64_t model_type = 1;  // unigram
    bool has_rules = false;
    read_wire(proto, source, [&](int field, uint64_t, std::string_view bytes) {
      if (field == 1) {
        Piece piece;
        read_wire(bytes, source, [&](int part, uint64_t number, std::string_view text) {
          if (part == 1) piece.text = text;
          if (part == 2) piece.score = float_of_bits(static_cast<uint32_t>(number));
          if (part == 3) piece.type = static_cast<PieceType>(number);
        });
        pieces.push_back(std::move(piece));
      } else if (field == 2) {
        read_wire(bytes, source, [&](int part, uint64_t number, std::string_view) {
          if (part == 3) model_type = number;
        });
      } else if (field == 3) {
        read_wire(bytes, source, [&](int part, uint64_t number, std::string_view text) {
          if (part == 2) has_rules = !text.empty();
          if (part == 3) add_prefix = number != 0;
          if (part == 4) remove_spaces = number != 0;
        });
      }
    });
    BBB_CHECK(model_type == 2 && !has_rules, source,
              ": a GGUF cannot hold this tokenizer.model: it ",
              has_rules ? "normalizes text" : "is not of the kind BPE");
  }
};

// `root`: of tokenizer.json.
GgufMetadata bpe_entries(const json& root, const TokenizerFiles& files, int64_t rows) {
  const std::string& source = files.source;
  const json normalizer = root.value("normalizer", json());
  const std::string kind = normalizer.is_object() ? normalizer.value("type", "") : "";
  BBB_CHECK(normalizer.is_null() || kind == "NFC", source,
            ": a GGUF cannot hold this tokenizer: its normalizer is ", printable(kind));
  if (kind == "NFC")
    std::fprintf(stderr, "%s: a GGUF has no normalizer: text is expected in Unicode's NFC\n",
                 source.c_str());
  const json& model = root.at("model");
  Vocabulary vocabulary(rows);
  for (const auto& [text, id] : model.at("vocab").items())
    vocabulary.set(id.get<int64_t>(), text, PieceType::Normal, 0, source);
  const auto lookup = [&](std::string_view text) -> std::optional<int32_t> {
    const auto found = model.at("vocab").find(std::string(text));
    return found == model.at("vocab").end() ? std::nullopt : std::optional(found->get<int32_t>());
  };
  vocabulary.add(read_settings(files, root).added_tokens(lookup), source);
  std::vector<std::string> merges;
  for (const json& merge : model.at("merges"))
    merges.push_back(merge.is_string() ? merge.get<std::string>()
                                       : cat(merge.at(0).get<std::string>(), " ",
                                             merge.at(1).get<std::string>()));
  return {{"tokenizer.ggml.model", "gpt2"},
          {"tokenizer.ggml.pre", gguf_pre_tokenizer(root, source)},
          {"tokenizer.ggml.tokens", std::move(vocabulary.tokens)},
          {"tokenizer.ggml.token_type", std::move(vocabulary.types)},
          {"tokenizer.ggml.merges", std::move(merges)}};
}

// `root`: of tokenizer.json, or an empty object.
GgufMetadata piece_entries(const json& root, const TokenizerFiles& files, int64_t rows) {
  const std::string& source = files.source;
  const PieceModel model(*files.find("tokenizer.model"), source);
  const TokenizerSettings settings = read_settings(files, root);
  Vocabulary vocabulary(rows);
  std::optional<uint32_t> unknown;
  for (size_t id = 0; id < model.pieces.size(); ++id) {
    const auto& [text, score, type] = model.pieces[id];
    vocabulary.set(static_cast<int64_t>(id), text, type, score, source);
    if (type == PieceType::Unknown) unknown = static_cast<uint32_t>(id);
  }
  const auto lookup = [&](std::string_view text) -> std::optional<int32_t> {
    for (size_t id = 0; id < model.pieces.size(); ++id)
      if (model.pieces[id].text == text) return static_cast<int32_t>(id);
    return std::nullopt;
  };
  std::vector<AddedToken> added = settings.added_tokens(lookup);
  // A piece that stands for unknown text keeps this type, although files list it as special.
  std::erase_if(added, [&](const AddedToken& token) {
    return unknown && token.id == static_cast<int32_t>(*unknown);
  });
  vocabulary.add(added, source);
  if (!settings.legacy)
    std::fprintf(stderr,
                 "%s: a GGUF puts a space behind every special token; this tokenizer (legacy "
                 "false) does so only at the start of a text\n",
                 source.c_str());
  GgufMetadata out = {
      {"tokenizer.ggml.model", "llama"},
      {"tokenizer.ggml.pre", "default"},
      {"tokenizer.ggml.tokens", std::move(vocabulary.tokens)},
      {"tokenizer.ggml.scores", std::move(vocabulary.scores)},
      {"tokenizer.ggml.token_type", std::move(vocabulary.types)},
      {"tokenizer.ggml.add_space_prefix", model.add_prefix && settings.add_prefix_space},
      {"tokenizer.ggml.remove_extra_whitespaces", model.remove_spaces}};
  if (unknown) out.emplace_back("tokenizer.ggml.unknown_token_id", *unknown);
  return out;
}

template <typename Narrow>
Narrow narrow(int64_t value, const std::string& key) {
  BBB_CHECK(
      value >= std::numeric_limits<Narrow>::min() && value <= std::numeric_limits<Narrow>::max(),
      "metadata '", printable(key), "' holds ", value, ", which is out of range");
  return static_cast<Narrow>(value);
}

}  // namespace

GgufMetadata gguf_tokenizer(const Gguf& gguf) {
  GgufMetadata out;
  const auto add = [&](const std::string& key, GgufMetadataValue value) {
    out.emplace_back(key, std::move(value));
  };
  for (const auto& [key, value] : gguf.metadata()) {
    if (!key.starts_with("tokenizer.")) continue;
    if (const auto* integer = std::get_if<int64_t>(&value)) {
      add(key, narrow<uint32_t>(*integer, key));
    } else if (const auto* real = std::get_if<double>(&value)) {
      add(key, static_cast<float>(*real));
    } else if (const auto* flag = std::get_if<bool>(&value)) {
      add(key, *flag);
    } else if (const auto* text = std::get_if<std::string>(&value)) {
      add(key, *text);
    } else if (const auto* array = std::get_if<GgufArray>(&value)) {
      if (const auto* texts = std::get_if<std::vector<std::string>>(array)) add(key, *texts);
      if (const auto* reals = std::get_if<std::vector<double>>(array))
        add(key, std::vector<float>(reals->begin(), reals->end()));
      if (const auto* integers = std::get_if<std::vector<int64_t>>(array)) {
        std::vector<int32_t> narrowed;
        for (const int64_t i : *integers) narrowed.push_back(narrow<int32_t>(i, key));
        add(key, std::move(narrowed));
      }
    }
  }
  return out;
}

GgufMetadata gguf_tokenizer(const Tokenizer& tokenizer, const std::string& source, int64_t rows,
                            const std::vector<int32_t>& stop_ids) {
  const TokenizerFiles files = {source, tokenizer.export_files()};
  GgufMetadata out;
  try {
    const std::string* text = files.find("tokenizer.json");
    const json root = text ? parse_json(*text, source + "/tokenizer.json") : json::object();
    const json spec = root.value("pre_tokenizer", json());
    const bool byte_level =
        root.contains("model") && spec.dump().find("\"ByteLevel\"") != std::string::npos;
    BBB_CHECK(byte_level || files.find("tokenizer.model"), source,
              ": a GGUF cannot hold this tokenizer.json; with the model's tokenizer.model beside "
              "it, it can");
    out = byte_level ? bpe_entries(root, files, rows) : piece_entries(root, files, rows);
  } catch (const json::exception& error) {
    throw Error(cat(source, ": the tokenizer's files are malformed: ", error.what()));
  }
  const auto add_id = [&](const char* key, int32_t id) {
    out.emplace_back(key, static_cast<uint32_t>(id));
  };
  if (tokenizer.bos()) add_id("tokenizer.ggml.bos_token_id", *tokenizer.bos());
  // A text ends at each of three tokens; llama.cpp finds further ones by their texts.
  std::vector<int32_t> ends = stop_ids;
  if (ends.empty() && tokenizer.eos()) ends = {*tokenizer.eos()};
  if (const auto own = std::find(ends.begin(), ends.end(), tokenizer.eos().value_or(-1));
      own != ends.end())
    std::rotate(ends.begin(), own, own + 1);
  const char* const keys[] = {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id",
                              "tokenizer.ggml.eom_token_id"};
  for (size_t i = 0; i < std::min(ends.size(), std::size(keys)); ++i) add_id(keys[i], ends[i]);
  out.emplace_back("tokenizer.ggml.add_bos_token", tokenizer.add_bos());
  out.emplace_back("tokenizer.ggml.add_eos_token", false);
  if (!tokenizer.chat_template().empty())
    out.emplace_back("tokenizer.chat_template", tokenizer.chat_template());
  return out;
}

}  // namespace bbb::data
