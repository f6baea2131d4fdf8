// sentencepiece tokenizers, computed by libsentencepiece itself.
//
// A GGUF's "llama" vocabulary is converted back to the ModelProto that it came from, so that both
// sources run the same code. Protobuf's wire format is written by hand: the library ships no
// headers for it.
//
// Text is split at special tokens first, and each part is encoded by itself. With `legacy`, and
// from a GGUF, every part gets the prefix space; otherwise only a part at the very start gets it.
#include <sentencepiece_processor.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>

#include "data/files.h"
#include "data/tokenizer_parts.h"
#include "quant/check.h"

namespace bbb::data {

using nlohmann::json;

namespace {

constexpr std::string_view kSpace = "\u2581";  // stands for a space inside a piece

// Protobuf's wire format: a varint key (field << 3 | wire type), then the value.
class WireWriter {
 public:
  void varint(int field, uint64_t value) {
    raw(static_cast<uint64_t>(field) << 3);
    raw(value);
  }
  void fixed32(int field, float value) {
    raw(static_cast<uint64_t>(field) << 3 | 5);
    char bytes[4];
    std::memcpy(bytes, &value, 4);  // little-endian, as the format requires
    out_.append(bytes, 4);
  }
  void bytes(int field, std::string_view value) {
    raw(static_cast<uint64_t>(field) << 3 | 2);
    raw(value.size());
    out_ += value;
  }
  const std::string& str() const { return out_; }

 private:
  void raw(uint64_t value) {
    for (; value >= 0x80; value >>= 7) out_ += static_cast<char>(value | 0x80);
    out_ += static_cast<char>(value);
  }
  std::string out_;
};

// Appends a second normalizer_spec (field 3) with add_dummy_prefix (field 3) false: protobuf merges
// the two, and the later value counts.
std::string without_prefix(const std::string& model) {
  WireWriter normalizer;
  normalizer.varint(3, 0);
  WireWriter more;
  more.bytes(3, normalizer.str());
  return model + more.str();
}

class SentencePieceTokenizer final : public Tokenizer {
 public:
  SentencePieceTokenizer(TokenizerFiles files, const json& root) {
    const std::string where = files.source;
    const std::string* model = files.find("tokenizer.model");
    BBB_ASSERT(model != nullptr);
    const TokenizerSettings settings = read_settings(files, root);
    const bool has_prefix = settings.add_prefix_space;
    load(&processor_, has_prefix ? *model : without_prefix(*model), where);
    if (has_prefix && !settings.legacy) {
      bare_ = std::make_unique<sentencepiece::SentencePieceProcessor>();
      load(bare_.get(), without_prefix(*model), where);
    }
    files_ = std::move(files.files);

    size_ = pieces();
    std::map<int32_t, AddedToken> added;
    for (int32_t id = 0; id < pieces(); ++id) {
      if (processor_.IsControl(id) || processor_.IsUnknown(id)) {
        added[id] = {.id = id, .content = processor_.IdToPiece(id)};
      }
    }
    for (const AddedToken& token :
         settings.added_tokens([this](std::string_view name) { return find_piece(name); })) {
      BBB_CHECK(token.id < 2 * pieces() + 1024, where, ": the id ", token.id,
                " of the added token ", printable(token.content), " is out of range");
      added[token.id] = token;
      size_ = std::max<int64_t>(size_, token.id + 1);
    }
    std::vector<AddedToken> tokens;
    for (auto& [id, token] : added) tokens.push_back(token);
    added_ = AddedTokens(std::move(tokens));

    if (processor_.bos_id() >= 0) bos_ = processor_.bos_id();
    if (processor_.eos_id() >= 0) eos_ = processor_.eos_id();
    if (settings.bos && find(*settings.bos)) bos_ = find(*settings.bos);
    if (settings.eos && find(*settings.eos)) eos_ = find(*settings.eos);
    add_bos_ = settings.add_bos.value_or(bos_.has_value());
    BBB_CHECK(!add_bos_ || bos_, where, ": a BOS token is to be added, but there is none");
    chat_template_ = settings.chat_template;
    // Encode a text to see whether the model itself adds the prefix space.
    std::vector<std::string> pieces_of_a;
    BBB_CHECK(processor_.Encode("a", &pieces_of_a).ok() && !pieces_of_a.empty(), where,
              ": sentencepiece cannot encode a text");
    leading_spaces_ = pieces_of_a[0].starts_with(kSpace);
  }

  std::vector<int32_t> encode(std::string_view text, SpecialText special) const override {
    std::vector<int32_t> ids;
    for (const AddedTokens::Span& span : added_.split(text, special)) {
      if (span.id >= 0) {
        ids.push_back(span.id);
        continue;
      }
      const bool is_bare = bare_ && span.text.data() != text.data();
      std::vector<int> part;
      const auto status = (is_bare ? *bare_ : processor_).Encode(span.text, &part);
      BBB_CHECK(status.ok(), "sentencepiece cannot encode a text: ", status.ToString());
      ids.insert(ids.end(), part.begin(), part.end());
    }
    return ids;
  }

  std::string piece(int32_t id, bool show_special) const override {
    BBB_CHECK(id >= 0, "token ", id, " is negative");
    if (const AddedToken* token = added_.find(id)) {
      return token->special && !show_special ? "" : token->content;
    }
    if (id >= pieces() || processor_.IsUnused(id)) return "";
    const std::string& text = processor_.IdToPiece(id);
    if (processor_.IsByte(id)) {  // "<0x0A>"
      return std::string(1, static_cast<char>(std::stoi(text.substr(3, 2), nullptr, 16)));
    }
    std::string out;
    for (size_t i = 0; i < text.size();) {
      const bool space = text.compare(i, kSpace.size(), kSpace) == 0;
      out += space ? ' ' : text[i];
      i += space ? kSpace.size() : 1;
    }
    return out;
  }

  std::optional<int32_t> find(std::string_view token) const override {
    if (const AddedToken* added = added_.find(token)) return added->id;
    return find_piece(token);
  }

  int64_t vocab_size() const override { return size_; }

  std::vector<std::pair<std::string, std::string>> export_files() const override { return files_; }

 private:
  static void load(sentencepiece::SentencePieceProcessor* processor, const std::string& model,
                   const std::string& where) {
    const auto status = processor->LoadFromSerializedProto(model);
    BBB_CHECK(status.ok(), where,
              ": tokenizer.model is no sentencepiece model or is cut short, and there is no "
              "tokenizer.json of BPE");
  }
  int32_t pieces() const { return processor_.GetPieceSize(); }
  std::optional<int32_t> find_piece(std::string_view text) const {
    const int32_t id = processor_.PieceToId(text);
    if (id < 0 || processor_.IdToPiece(id) != text) return std::nullopt;  // an unknown text: unk
    return id;
  }

  sentencepiece::SentencePieceProcessor processor_;
  std::unique_ptr<sentencepiece::SentencePieceProcessor> bare_;  // adds no prefix; null: not needed
  AddedTokens added_;
  std::vector<std::pair<std::string, std::string>> files_;
  int64_t size_ = 0;
};

}  // namespace

std::unique_ptr<Tokenizer> make_sentencepiece_tokenizer(TokenizerFiles files, const json& root) {
  return std::make_unique<SentencePieceTokenizer>(std::move(files), root);
}

TokenizerFiles sentencepiece_files(const Gguf& gguf) {
  GgufVocabulary vocabulary = read_vocabulary(gguf);
  std::vector<std::string>& tokens = vocabulary.tokens;
  std::vector<PieceType>& types = vocabulary.types;
  const std::vector<double>& scores = gguf.reals("tokenizer.ggml.scores");
  BBB_CHECK(scores.size() == tokens.size(), gguf.path(), ": ", tokens.size(), " tokens but ",
            scores.size(), " scores");
  const auto flag = [&](const char* key, bool otherwise) {
    return gguf.has(key) ? gguf.boolean(key) : otherwise;
  };
  // One piece stands for unknown text: the one that the file names, else the first of type Unknown,
  // else <unk>, else id 0. Other pieces of type Unknown become Control.
  const auto named = std::find(tokens.begin(), tokens.end(), "<unk>");
  const auto typed = std::find(types.begin(), types.end(), PieceType::Unknown);
  const size_t unknown = gguf.has("tokenizer.ggml.unknown_token_id")
                             ? static_cast<size_t>(gguf.integer("tokenizer.ggml.unknown_token_id"))
                         : typed != types.end()  ? static_cast<size_t>(typed - types.begin())
                         : named != tokens.end() ? static_cast<size_t>(named - tokens.begin())
                                                 : 0;
  BBB_CHECK(unknown < tokens.size() && !tokens[unknown].empty() &&
                (tokens[unknown] == "<unk>" || types[unknown] == PieceType::Unknown ||
                 types[unknown] == PieceType::Control),
            gguf.path(), ": no piece stands for unknown text");
  std::replace(types.begin(), types.end(), PieceType::Unknown, PieceType::Control);
  types[unknown] = PieceType::Unknown;

  const bool add_bos = flag("tokenizer.ggml.add_bos_token", true);
  json config = config_from_gguf(gguf, vocabulary, add_bos);
  config["tokenizer_class"] = "LlamaTokenizer";
  config["legacy"] = true;
  config["unk_token"] = tokens[unknown];

  WireWriter model;
  int64_t byte_pieces = 0;
  for (size_t i = 0; i < tokens.size(); ++i) {
    // Text that equals a user-defined piece is split off before sentencepiece sees it. A merge that
    // produces such a piece is an ordinary one.
    const PieceType type = types[i] == PieceType::UserDefined ? PieceType::Normal : types[i];
    WireWriter piece;
    // sentencepiece requires a different text for every piece. No input matches "[PAD n]": pieces
    // write a space as U+2581.
    piece.bytes(1, tokens[i].empty() ? cat("[PAD ", i, "]") : tokens[i]);
    piece.fixed32(2, static_cast<float>(scores[i]));
    piece.varint(3, static_cast<uint64_t>(type));
    model.bytes(1, piece.str());
    byte_pieces += type == PieceType::Byte;
  }
  WireWriter trainer;
  trainer.varint(3, 2);  // model_type: BPE
  trainer.varint(4, tokens.size());
  trainer.varint(35, byte_pieces == 256);  // byte_fallback
  // The pieces that stand for unknown, BOS and EOS.
  for (const auto& [field, key] :
       {std::pair(45, "unk_token"), std::pair(46, "bos_token"), std::pair(47, "eos_token")}) {
    if (config.contains(key)) trainer.bytes(field, config.at(key).get<std::string>());
  }
  WireWriter normalizer;
  normalizer.bytes(1, "identity");
  normalizer.varint(3, flag("tokenizer.ggml.add_space_prefix", true));
  normalizer.varint(4, flag("tokenizer.ggml.remove_extra_whitespaces", false));
  normalizer.varint(5, 1);  // escape_whitespaces
  model.bytes(2, trainer.str());
  model.bytes(3, normalizer.str());
  return {gguf.path(),
          {{"tokenizer.model", model.str()}, {"tokenizer_config.json", config.dump(2)}}};
}

}  // namespace bbb::data
