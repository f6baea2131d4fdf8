// Loads tokenizers, and reads the settings that both kinds share.
#include "data/tokenizer.h"

#include <sys/stat.h>

#include <algorithm>
#include <charconv>
#include <nlohmann/json.hpp>
#include <set>
#include <unordered_map>

#include "data/files.h"
#include "data/json.h"
#include "data/model_path.h"
#include "data/pre_tokenizer.h"
#include "data/tokenizer_parts.h"
#include "quant/check.h"

namespace bbb::data {

using nlohmann::json;

namespace {

bool is_regular_file(const std::string& path) {
  struct stat status {};
  return stat(path.c_str(), &status) == 0 && S_ISREG(status.st_mode);
}

// A token named as "text" or as {"content": "text"}.
std::optional<std::string> token_text(const json& object, const char* key) {
  const auto found = object.find(key);
  if (found == object.end() || found->is_null()) return std::nullopt;
  if (found->is_object()) return found->at("content").get<std::string>();
  return found->get<std::string>();
}

// The length in bytes of the white-space character at the start of `text`; 0 if there is none.
size_t white_space_length(std::string_view text) {
  const std::string_view character = text.substr(0, static_cast<size_t>(utf8_length(text)));
  return kWhiteSpace.find(character) == std::string_view::npos ? 0 : character.size();
}

}  // namespace

const std::string* TokenizerFiles::find(std::string_view name) const {
  for (const auto& [file, content] : files) {
    if (file == name) return &content;
  }
  return nullptr;
}

namespace {

// The named file's object; an empty one where the file is absent.
json json_of(const TokenizerFiles& files, std::string_view name) {
  const std::string* content = files.find(name);
  if (content == nullptr) return json::object();
  const std::string where = cat(files.source, "/", name);
  json parsed = parse_json(*content, where);
  BBB_CHECK(parsed.is_object(), where, ": not a JSON object");
  return parsed;
}

// `object` as tokenizer.json and tokenizer_config.json write an added token.
AddedToken read_added_token(const json& object, int64_t id, const std::string& source) {
  AddedToken token;
  token.id = static_cast<int32_t>(id);
  token.content = object.at("content").get<std::string>();
  token.special = object.value("special", false);
  token.lstrip = object.value("lstrip", false);
  token.rstrip = object.value("rstrip", false);
  token.normalized = object.value("normalized", !token.special);
  BBB_CHECK(id >= 0 && id < INT32_MAX && !token.content.empty(), source, ": the added token ", id,
            " has no text or an id out of range");
  BBB_CHECK(!object.value("single_word", false), source, ": the added token ",
            printable(token.content), " has single_word, which is not supported");
  return token;
}

}  // namespace

TokenizerSettings read_settings(const TokenizerFiles& files, const json& root) {
  const json config = json_of(files, "tokenizer_config.json");
  const json map = json_of(files, "special_tokens_map.json");
  TokenizerSettings settings;
  settings.bos = token_text(config, "bos_token");
  settings.eos = token_text(config, "eos_token");
  if (!settings.bos) settings.bos = token_text(map, "bos_token");
  if (!settings.eos) settings.eos = token_text(map, "eos_token");
  const auto flag = [&](const char* key) -> std::optional<bool> {
    const auto found = config.find(key);
    if (found == config.end() || !found->is_boolean()) return std::nullopt;
    return found->get<bool>();
  };
  settings.add_bos = flag("add_bos_token");
  settings.legacy = flag("legacy").value_or(true);
  settings.add_prefix_space = flag("add_prefix_space").value_or(true);

  const auto chat = config.find("chat_template");
  if (const std::string* jinja = files.find("chat_template.jinja")) {
    settings.chat_template = *jinja;
  } else if (chat != config.end() && chat->is_array()) {
    for (const json& entry : *chat) {
      if (entry.value("name", "") == "default" || chat->size() == 1) {
        settings.chat_template = entry.at("template").get<std::string>();
      }
    }
  } else if (chat != config.end() && !chat->is_null()) {
    settings.chat_template = chat->get<std::string>();
  }

  for (const json* names : {&config, &map}) {
    for (const char* key : {"bos_token", "eos_token", "unk_token", "pad_token"}) {
      if (const auto name = token_text(*names, key)) settings.special_names.push_back(*name);
    }
    for (const char* key : {"additional_special_tokens", "extra_special_tokens"}) {
      const auto list = names->find(key);
      if (list == names->end()) continue;
      for (const json& token : *list) {  // a list of tokens, or an object of named tokens
        settings.special_names.push_back(
            (token.is_object() ? token.at("content") : token).get<std::string>());
      }
    }
  }
  const auto is_named = [&](const std::string& content) {
    const auto& names = settings.special_names;
    return std::find(names.begin(), names.end(), content) != names.end();
  };
  // The first file that lists a token defines it.
  std::set<std::string> known;
  const auto add = [&](AddedToken token) {
    if (known.insert(token.content).second) settings.added.push_back(std::move(token));
  };
  const json own = root.value("added_tokens", json::array());
  for (const json& token : own) {
    add(read_added_token(token, token.at("id").get<int64_t>(), files.source + "/tokenizer.json"));
  }
  const json decoder = config.value("added_tokens_decoder", json::object());
  const json listed = json_of(files, "added_tokens.json");
  for (const auto& [key, token] : decoder.items()) {
    const std::string where = files.source + "/tokenizer_config.json";
    int64_t id = 0;
    const auto [end, error] = std::from_chars(key.data(), key.data() + key.size(), id);
    BBB_CHECK(error == std::errc() && end == key.data() + key.size(), where,
              ": added_tokens_decoder has the key '", printable(key), "', which is no id");
    add(read_added_token(token, id, where));
  }
  for (const auto& [content, id] : listed.items()) {
    add(read_added_token({{"content", content}, {"special", is_named(content)}}, id.get<int64_t>(),
                         files.source + "/added_tokens.json"));
  }
  return settings;
}

std::vector<AddedToken> TokenizerSettings::added_tokens(const Lookup& vocabulary) const {
  std::vector<AddedToken> tokens = added;
  for (const std::string& name : special_names) {
    const bool is_known = std::any_of(tokens.begin(), tokens.end(), [&](const AddedToken& token) {
      return token.content == name;
    });
    const std::optional<int32_t> id = is_known || name.empty() ? std::nullopt : vocabulary(name);
    if (id) tokens.push_back({.id = *id, .content = name});
  }
  return tokens;
}

AddedTokens::AddedTokens(std::vector<AddedToken> tokens)
    : tokens_(std::move(tokens)), by_first_byte_(256) {
  std::stable_sort(tokens_.begin(), tokens_.end(), [](const AddedToken& a, const AddedToken& b) {
    return a.content.size() > b.content.size();
  });
  for (uint32_t i = 0; i < tokens_.size(); ++i) {
    by_first_byte_[static_cast<uint8_t>(tokens_[i].content[0])].push_back(i);
  }
}

std::vector<AddedTokens::Span> AddedTokens::split(std::string_view text,
                                                  SpecialText special) const {
  std::vector<Span> spans;
  size_t done = 0;
  const auto found_at = [&](size_t i) -> const AddedToken* {
    for (const uint32_t index : by_first_byte_[static_cast<uint8_t>(text[i])]) {
      const AddedToken& token = tokens_[index];
      if (text.substr(i, token.content.size()) == token.content) return &token;
    }
    return nullptr;
  };
  for (size_t i = 0; !tokens_.empty() && i < text.size();) {
    const AddedToken* token = found_at(i);
    if (token == nullptr || (token->special && special == SpecialText::AsText)) {
      i += token == nullptr ? 1 : token->content.size();
      continue;
    }
    size_t begin = i;
    size_t end = i + token->content.size();
    if (token->lstrip) {
      // The last run of white space between `done` and the token.
      for (size_t j = done, run = begin; j < i;) {
        const size_t space = white_space_length(text.substr(j));
        if (space == 0) run = i;
        if (space > 0 && run == i) run = j;
        j += space > 0 ? space : 1;
        begin = run;
      }
    }
    while (token->rstrip && white_space_length(text.substr(end)) > 0) {
      end += white_space_length(text.substr(end));
    }
    if (begin > done) spans.push_back({text.substr(done, begin - done), -1});
    spans.push_back({text.substr(begin, end - begin), token->id});
    i = done = end;
  }
  if (done < text.size()) spans.push_back({text.substr(done), -1});
  return spans;
}

const AddedToken* AddedTokens::find(int32_t id) const {
  for (const AddedToken& token : tokens_) {
    if (token.id == id) return &token;
  }
  return nullptr;
}

const AddedToken* AddedTokens::find(std::string_view content) const {
  for (const AddedToken& token : tokens_) {
    if (token.content == content) return &token;
  }
  return nullptr;
}

std::string Tokenizer::decode(const std::vector<int32_t>& ids) const {
  std::string text;
  for (const int32_t id : ids) text += piece(id, false);
  const size_t spaces = std::min(text.find_first_not_of(' '), text.size());
  return text.substr(std::min(spaces, static_cast<size_t>(leading_spaces_)));
}

std::vector<int32_t> Tokenizer::end_of_turn() const {
  std::vector<int32_t> ids;
  if (eos_) ids.push_back(*eos_);
  for (const char* name : {"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>",
                           "<|endoftext|>", "<|end|>", "<end_of_turn>"}) {
    const std::optional<int32_t> id = find(name);
    if (id && std::find(ids.begin(), ids.end(), *id) == ids.end()) ids.push_back(*id);
  }
  return ids;
}

int32_t Tokenizer::document_end(const std::vector<int32_t>& stop_ids) const {
  for (const char* name : {"<|endoftext|>", "<|end_of_text|>", "</s>"}) {
    if (const std::optional<int32_t> id = find(name)) return *id;
  }
  if (!stop_ids.empty()) return stop_ids.front();
  BBB_CHECK(eos_.has_value(),
            "neither the vocabulary nor the model names a token that ends a document; give its id "
            "with --doc-end");
  return *eos_;
}

GgufVocabulary read_vocabulary(const Gguf& gguf) {
  GgufVocabulary out;
  out.tokens = gguf.strings("tokenizer.ggml.tokens");
  const std::vector<int64_t>& types = gguf.integers("tokenizer.ggml.token_type");
  BBB_CHECK(!out.tokens.empty() && types.size() == out.tokens.size(), gguf.path(), ": ",
            out.tokens.size(), " tokens but ", types.size(), " token types");
  std::unordered_map<std::string_view, size_t> first;
  for (size_t i = 0; i < types.size(); ++i) {
    BBB_CHECK(types[i] >= 1 && types[i] <= 6, gguf.path(), ": token ", i, " has the unknown type ",
              types[i]);
    PieceType type = static_cast<PieceType>(types[i]);
    const auto [entry, is_new] = first.try_emplace(out.tokens[i], i);
    if (!is_new && !out.tokens[i].empty()) {
      BBB_CHECK(
          type == PieceType::Unknown || type == PieceType::Control || type == PieceType::Unused,
          gguf.path(), ": tokens ", entry->second, " and ", i, " are both ",
          printable(out.tokens[i]));
    }
    if (!is_new || out.tokens[i].empty()) type = PieceType::Unused;
    out.types.push_back(type);
  }
  std::vector<std::string> texts = out.tokens;
  for (size_t i = 0; i < texts.size(); ++i) {
    if (first.at(out.tokens[i]) != i) texts[i].clear();
  }
  out.tokens = std::move(texts);
  return out;
}

json config_from_gguf(const Gguf& gguf, const GgufVocabulary& vocabulary, bool add_bos) {
  const std::vector<std::string>& tokens = gguf.strings("tokenizer.ggml.tokens");
  json config = {{"add_bos_token", add_bos}, {"add_eos_token", false}};
  config["clean_up_tokenization_spaces"] = false;
  const auto name_token = [&](const char* setting, const char* key) {
    if (!gguf.has(key)) return;
    const int64_t id = gguf.integer(key);
    BBB_CHECK(id >= 0 && id < static_cast<int64_t>(tokens.size()), gguf.path(), ": ", key, " is ",
              id, ", outside the vocabulary of ", tokens.size());
    const std::string& text = tokens[static_cast<size_t>(id)];
    if (!text.empty()) config[setting] = text;
  };
  name_token("bos_token", "tokenizer.ggml.bos_token_id");
  name_token("eos_token", "tokenizer.ggml.eos_token_id");
  name_token("unk_token", "tokenizer.ggml.unknown_token_id");
  name_token("pad_token", "tokenizer.ggml.padding_token_id");
  if (gguf.has("tokenizer.chat_template")) {
    config["chat_template"] = gguf.string("tokenizer.chat_template");
  }
  json added = json::object();
  for (size_t i = 0; i < vocabulary.types.size(); ++i) {
    const PieceType type = vocabulary.types[i];
    if (type == PieceType::Unknown || type == PieceType::Control ||
        type == PieceType::UserDefined) {
      added[std::to_string(i)] = {
          {"content", vocabulary.tokens[i]},
          {"lstrip", false},
          {"normalized", false},
          {"rstrip", false},
          {"single_word", false},
          {"special", type != PieceType::UserDefined},
      };
    }
  }
  config["added_tokens_decoder"] = std::move(added);
  return config;
}

namespace {

std::unique_ptr<Tokenizer> make_tokenizer(TokenizerFiles files) {
  const std::string source = files.source;
  try {
    const json root = json_of(files, "tokenizer.json");
    const bool is_bpe = root.contains("model") && root.at("model").value("type", "BPE") == "BPE";
    if (files.find("tokenizer.model") && !is_bpe) {
      return make_sentencepiece_tokenizer(std::move(files), root);
    }
    if (files.find("tokenizer.json")) return make_bpe_tokenizer(std::move(files), root);
  } catch (const json::exception& error) {
    throw Error(cat(source, ": the tokenizer's files are malformed: ", error.what()));
  }
  throw Error(cat(source, ": neither tokenizer.model nor tokenizer.json is there"));
}

}  // namespace

std::unique_ptr<Tokenizer> make_tokenizer(const Gguf& gguf) {
  const std::string& model = gguf.string("tokenizer.ggml.model");
  try {
    if (model == "gpt2") return make_tokenizer(bpe_files(gguf));
    if (model == "llama") return make_tokenizer(sentencepiece_files(gguf));
  } catch (const json::exception& error) {  // a token that is not UTF-8
    throw Error(cat(gguf.path(), ": the vocabulary is malformed: ", error.what()));
  }
  throw Error(cat(gguf.path(), ": the tokenizer model ", printable(model), " is not supported"));
}

std::unique_ptr<Tokenizer> load_tokenizer(const std::string& model_path) {
  if (model_path.starts_with(kSyntheticPrefix)) return make_tokenizer(byte_files(model_path));
  if (is_regular_file(model_path)) return make_tokenizer(Gguf(model_path));
  TokenizerFiles files;
  files.source = model_path;
  for (const char* name : {"tokenizer.model", "tokenizer.json", "tokenizer_config.json",
                           "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"}) {
    const std::string path = model_path + "/" + name;
    if (is_regular_file(path)) files.files.emplace_back(name, read_file(path));
  }
  if (files.files.empty()) check_model_path(model_path);
  return make_tokenizer(std::move(files));
}

}  // namespace bbb::data
