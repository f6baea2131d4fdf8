// sentencepiece tokenizers, computed by libsentencepiece itself.
//
// A GGUF's "llama" vocabulary is written back as the ModelProto that it came from (protobuf's wire
// format, by hand: the library ships no headers for it), so that both sources run the same code.
// Special tokens are cut out first and each text between them is encoded by itself, dummy prefix
// included, as llama.cpp and Llama-2's own code do.
#include <sentencepiece_processor.h>

#include <cstring>
#include <map>
#include <nlohmann/json.hpp>

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
    std::memcpy(bytes, &value, 4);  // little-endian, as the format wants it
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

class SentencePieceTokenizer final : public Tokenizer {
 public:
  explicit SentencePieceTokenizer(TokenizerFiles files) {
    const std::string where = files.source;
    const std::string* model = files.find("tokenizer.model");
    BBB_ASSERT(model != nullptr);
    const auto status = processor_.LoadFromSerializedProto(*model);
    BBB_CHECK(status.ok(), where, ": not a sentencepiece model: ", status.ToString());
    const TokenizerSettings settings = read_settings(files);
    files_ = std::move(files.files);

    std::map<int32_t, AddedToken> added;
    for (int32_t id = 0; id < pieces(); ++id) {
      if (processor_.IsControl(id)) added[id] = {id, processor_.IdToPiece(id), true, false, false};
    }
    size_ = pieces();
    for (const AddedToken& token : settings.added) {
      BBB_CHECK(token.id < 2 * pieces() + 1024, where, ": the id ", token.id,
                " of the added token ", token.content, " is out of range");
      // What the model itself holds as ordinary or user-defined, it finds itself.
      if (token.id >= pieces() || token.special) added[token.id] = token;
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
  }

  std::vector<int32_t> encode(std::string_view text, SpecialText special) const override {
    std::vector<int32_t> ids;
    for (const AddedTokens::Span& span : added_.split(text, special)) {
      if (span.id >= 0) {
        ids.push_back(span.id);
        continue;
      }
      std::vector<int> part;
      const auto status = processor_.Encode(span.text, &part);
      BBB_CHECK(status.ok(), "sentencepiece cannot encode a text: ", status.ToString());
      ids.insert(ids.end(), part.begin(), part.end());
    }
    return ids;
  }

  std::string piece(int32_t id, bool show_special) const override {
    BBB_CHECK(id >= 0 && id < size_, "token ", id, " is outside the vocabulary of ", size_);
    if (const AddedToken* token = added_.find(id)) {
      return token->special && !show_special ? "" : token->content;
    }
    if (id >= pieces() || processor_.IsUnused(id)) return "";
    const std::string& text = processor_.IdToPiece(id);
    if (processor_.IsUnknown(id)) return show_special ? text : "";
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

  std::string decode(const std::vector<int32_t>& ids) const override {
    std::string text;
    std::vector<int> run;
    const auto flush = [&] {
      std::string part;
      const auto status = processor_.Decode(run, &part);
      BBB_CHECK(status.ok(), "sentencepiece cannot decode: ", status.ToString());
      text += part;
      run.clear();
    };
    for (const int32_t id : ids) {
      BBB_CHECK(id >= 0 && id < size_, "token ", id, " is outside the vocabulary of ", size_);
      const AddedToken* token = added_.find(id);
      if (token == nullptr && id < pieces()) run.push_back(id);
      if (token == nullptr || token->special) continue;
      flush();
      text += token->content;
    }
    flush();
    return text;
  }

  std::optional<int32_t> find(std::string_view token) const override {
    if (const AddedToken* added = added_.find(token)) return added->id;
    const int32_t id = processor_.PieceToId(token);
    if (id < 0 || processor_.IdToPiece(id) != token) return std::nullopt;  // unknown: the unk id
    return id;
  }

  int64_t vocab_size() const override { return size_; }

  std::vector<std::pair<std::string, std::string>> export_files() const override { return files_; }

 private:
  int32_t pieces() const { return processor_.GetPieceSize(); }

  sentencepiece::SentencePieceProcessor processor_;
  AddedTokens added_;
  std::vector<std::pair<std::string, std::string>> files_;
  int64_t size_ = 0;
};

}  // namespace

std::unique_ptr<Tokenizer> make_sentencepiece_tokenizer(TokenizerFiles files) {
  return std::make_unique<SentencePieceTokenizer>(std::move(files));
}

TokenizerFiles sentencepiece_files(const Gguf& gguf) {
  const std::vector<std::string>& tokens = gguf.strings("tokenizer.ggml.tokens");
  const std::vector<double>& scores = gguf.reals("tokenizer.ggml.scores");
  const std::vector<int64_t>& types = gguf.integers("tokenizer.ggml.token_type");
  BBB_CHECK(!tokens.empty() && scores.size() == tokens.size() && types.size() == tokens.size(),
            gguf.path(), ": ", tokens.size(), " tokens, ", scores.size(), " scores and ",
            types.size(), " token types");
  const auto flag = [&](const char* key, bool otherwise) {
    return gguf.has(key) ? gguf.boolean(key) : otherwise;
  };
  const bool add_bos = flag("tokenizer.ggml.add_bos_token", true);
  json config = config_from_gguf(gguf, tokens, types, add_bos);
  config["tokenizer_class"] = "LlamaTokenizer";
  config["legacy"] = true;

  // The types have sentencepiece's own numbers: 1 normal, 2 unknown, 3 control, 4 user-defined,
  // 5 unused, 6 byte.
  WireWriter model;
  int64_t byte_pieces = 0;
  for (size_t i = 0; i < tokens.size(); ++i) {
    BBB_CHECK(!tokens[i].empty() && types[i] >= 1 && types[i] <= 6, gguf.path(), ": token ", i,
              " is empty or has the unknown type ", types[i]);
    WireWriter piece;
    piece.bytes(1, tokens[i]);
    piece.fixed32(2, static_cast<float>(scores[i]));
    piece.varint(3, static_cast<uint64_t>(types[i]));
    model.bytes(1, piece.str());
    byte_pieces += types[i] == 6;
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
