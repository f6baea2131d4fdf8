// Where tokenizers come from, and the settings that both kinds share.
#include "data/tokenizer.h"

#include <sys/stat.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "data/files.h"
#include "data/json.h"
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

// The length in bytes of the white-space character at the start of `text`, 0 where there is none.
size_t white_space_length(std::string_view text) {
  static constexpr std::string_view kWide[] = {"\u0085", "\u00a0", "\u1680", "\u2000", "\u2001",
                                               "\u2002", "\u2003", "\u2004", "\u2005", "\u2006",
                                               "\u2007", "\u2008", "\u2009", "\u200a", "\u2028",
                                               "\u2029", "\u202f", "\u205f", "\u3000"};
  if (text.empty()) return 0;
  if (text[0] == ' ' || (text[0] >= '\t' && text[0] <= '\r')) return 1;
  for (const std::string_view wide : kWide) {
    if (text.substr(0, wide.size()) == wide) return wide.size();
  }
  return 0;
}

}  // namespace

const std::string* TokenizerFiles::find(std::string_view name) const {
  for (const auto& [file, content] : files) {
    if (file == name) return &content;
  }
  return nullptr;
}

json json_of(const TokenizerFiles& files, std::string_view name) {
  const std::string* content = files.find(name);
  if (content == nullptr) return json::object();
  const std::string where = cat(files.source, "/", name);
  json parsed = parse_json(*content, where);
  BBB_CHECK(parsed.is_object(), where, ": not a JSON object");
  return parsed;
}

AddedToken read_added_token(const json& object, int32_t id, const std::string& source) {
  AddedToken token;
  token.id = id;
  token.content = object.at("content").get<std::string>();
  token.special = object.value("special", false);
  token.lstrip = object.value("lstrip", false);
  token.rstrip = object.value("rstrip", false);
  BBB_CHECK(id >= 0 && !token.content.empty(), source, ": the added token ", id,
            " has no text or a negative id");
  BBB_CHECK(!object.value("single_word", false), source, ": the added token ", token.content,
            " has single_word, which is not supported");
  return token;
}

TokenizerSettings read_settings(const TokenizerFiles& files) {
  const json config = json_of(files, "tokenizer_config.json");
  const json map = json_of(files, "special_tokens_map.json");
  TokenizerSettings settings;
  settings.bos = token_text(config, "bos_token");
  settings.eos = token_text(config, "eos_token");
  if (!settings.bos) settings.bos = token_text(map, "bos_token");
  if (!settings.eos) settings.eos = token_text(map, "eos_token");
  const auto add_bos = config.find("add_bos_token");
  if (add_bos != config.end() && add_bos->is_boolean()) settings.add_bos = add_bos->get<bool>();

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

  const auto decoder = config.find("added_tokens_decoder");
  if (decoder != config.end()) {
    for (const auto& [id, token] : decoder->items()) {
      settings.added.push_back(read_added_token(
          token, static_cast<int32_t>(std::strtol(id.c_str(), nullptr, 10)), files.source));
    }
  } else {
    const json added = json_of(files, "added_tokens.json");
    for (const auto& [content, id] : added.items()) {
      settings.added.push_back({id.get<int32_t>(), content, false, false, false});
    }
  }
  return settings;
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
      if (token.special && special == SpecialText::AsText) continue;
      if (text.substr(i, token.content.size()) == token.content) return &token;
    }
    return nullptr;
  };
  for (size_t i = 0; !tokens_.empty() && i < text.size();) {
    const AddedToken* token = found_at(i);
    if (token == nullptr) {
      ++i;
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

json config_from_gguf(const Gguf& gguf, const std::vector<std::string>& tokens,
                      const std::vector<int64_t>& types, bool add_bos) {
  json config = {{"add_bos_token", add_bos}, {"add_eos_token", false}};
  config["clean_up_tokenization_spaces"] = false;
  const auto name_token = [&](const char* setting, const char* key) {
    if (!gguf.has(key)) return;
    const int64_t id = gguf.integer(key);
    BBB_CHECK(id >= 0 && id < static_cast<int64_t>(tokens.size()), gguf.path(), ": ", key, " is ",
              id, ", outside the vocabulary of ", tokens.size());
    config[setting] = tokens[static_cast<size_t>(id)];
  };
  name_token("bos_token", "tokenizer.ggml.bos_token_id");
  name_token("eos_token", "tokenizer.ggml.eos_token_id");
  name_token("unk_token", "tokenizer.ggml.unknown_token_id");
  name_token("pad_token", "tokenizer.ggml.padding_token_id");
  if (gguf.has("tokenizer.chat_template")) {
    config["chat_template"] = gguf.string("tokenizer.chat_template");
  }
  json added = json::object();
  for (size_t i = 0; i < types.size(); ++i) {
    if (types[i] != 3 && types[i] != 4) continue;  // control and user-defined
    added[std::to_string(i)] = {{"content", tokens[i]}, {"lstrip", false},
                                {"normalized", false},  {"rstrip", false},
                                {"single_word", false}, {"special", types[i] == 3}};
  }
  config["added_tokens_decoder"] = std::move(added);
  return config;
}

std::unique_ptr<Tokenizer> make_tokenizer(const Gguf& gguf) {
  const std::string& model = gguf.string("tokenizer.ggml.model");
  try {
    if (model == "gpt2") return make_bpe_tokenizer(bpe_files(gguf));
    if (model == "llama") return make_sentencepiece_tokenizer(sentencepiece_files(gguf));
  } catch (const json::exception& error) {  // a token that is not UTF-8
    throw Error(cat(gguf.path(), ": the vocabulary is malformed: ", error.what()));
  }
  throw Error(cat(gguf.path(), ": the tokenizer model ", model, " is not supported"));
}

std::unique_ptr<Tokenizer> load_tokenizer(const std::string& model_path) {
  if (model_path.starts_with(kSyntheticPrefix)) return make_bpe_tokenizer(byte_files(model_path));
  if (is_regular_file(model_path)) return make_tokenizer(Gguf(model_path));
  TokenizerFiles files;
  files.source = model_path;
  for (const char* name : {"tokenizer.model", "tokenizer.json", "tokenizer_config.json",
                           "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"}) {
    const std::string path = model_path + "/" + name;
    if (is_regular_file(path)) files.files.emplace_back(name, read_file(path));
  }
  try {
    if (files.find("tokenizer.model")) return make_sentencepiece_tokenizer(std::move(files));
    if (files.find("tokenizer.json")) return make_bpe_tokenizer(std::move(files));
  } catch (const json::exception& error) {
    throw Error(cat(model_path, ": the tokenizer's files are malformed: ", error.what()));
  }
  throw Error(cat(model_path, ": neither tokenizer.model nor tokenizer.json is there"));
}

}  // namespace bbb::data
