#include "tools/generation.h"

#include <algorithm>
#include <utility>

#include "data/files.h"
#include "tools/load_model.h"

namespace bbb::tools {

using data::SpecialText;

namespace {

// The length of the longest prefix of `bytes` that ends with a whole UTF-8 character. The rest
// waits for more bytes.
size_t complete_utf8(const std::string& bytes) {
  size_t end = bytes.size();
  for (size_t back = 1; back <= std::min<size_t>(3, end); ++back) {
    const unsigned char c = static_cast<unsigned char>(bytes[end - back]);
    if ((c & 0xC0) == 0x80) continue;  // a continuation byte: look further left for its lead
    const size_t need = c >= 0xF0 ? 4 : c >= 0xE0 ? 3 : c >= 0xC0 ? 2 : 1;
    return need > back ? end - back : end;
  }
  return end;
}

constexpr const char* kReplacement = "\uFFFD";  // of an unfinished character

}  // namespace

std::string whole_characters(const std::string& text) {
  const size_t n = complete_utf8(text);
  return n == text.size() ? text : text.substr(0, n) + kReplacement;
}

void add_sampling_options(CommandLine& line) {
  line.options()  //
      ("temperature", "0: always the most likely token",
       cxxopts::value<std::string>()->default_value("0"))  //
      ("top-p", "draw from the fewest most likely tokens whose probabilities reach this",
       cxxopts::value<std::string>()->default_value("1"))  //
      ("repetition-penalty", "divides positive logits of tokens that occurred, multiplies others",
       cxxopts::value<std::string>()->default_value("1"))  //
      ("seed", "of the draws", cxxopts::value<std::string>()->default_value("0"));
}

engine::SampleSpec sample_spec(const CommandLine& line) {
  const engine::SampleSpec spec{.temperature = line.real("temperature", 0, 100),
                                .top_p = line.real("top-p", 0, 1),
                                .repetition_penalty = line.real("repetition-penalty", 0.01, 100)};
  for (const char* name : {"top-p", "seed"}) {
    const bool seeds_weights = name == std::string("seed") && line.has("synthetic");
    if (spec.temperature == 0 && line.has(name) && !seeds_weights)
      throw UsageError(
          cat("--", name, " needs a --temperature above 0: without it nothing is drawn"));
  }
  return spec;
}

uint64_t sample_seed(const CommandLine& line) {
  return static_cast<uint64_t>(line.integer("seed", 0));
}

ModelFiles::ModelFiles(const CommandLine& line, const engine::Backend& backend)
    : path(line.required("model")), source(models::open_checkpoint(path, line.nested_bits())) {
  backend.check_head_size(source->config().head_dim);
  tokenizer = data::load_tokenizer(path);
  stops = tokenizer->end_of_turn();
  for (const int32_t id : source->stop_ids()) stops.push_back(id);
}

std::unique_ptr<models::Llama> ModelFiles::load(engine::Backend& backend) const {
  return load_model(backend, *source);
}

std::vector<int32_t> ModelFiles::text_ids(const std::string& text, SpecialText special) const {
  return checked(tokenizer->encode(text, special));
}

std::vector<int32_t> ModelFiles::chat_ids(const std::vector<data::ChatMessage>& messages) const {
  return text_ids(data::render_chat(*tokenizer, messages, path), SpecialText::Parse);
}

std::vector<int32_t> ModelFiles::checked(std::vector<int32_t> ids) const {
  const auto bos = tokenizer->bos();
  if (tokenizer->add_bos() && bos && (ids.empty() || ids.front() != *bos))
    ids.insert(ids.begin(), *bos);
  BBB_CHECK(!ids.empty(), "the prompt is empty and this model has no BOS token to start from");
  for (const int32_t id : ids)
    BBB_CHECK(id < source->config().vocab, path, ": token ", id, " ('",
              data::printable(tokenizer->piece(id, true)), "') of the prompt has no row in the ",
              "embedding of ", source->config().vocab);
  return ids;
}

std::string Answer::append(int32_t token, const ModelFiles& files) {
  if (!running()) return {};
  if (std::ranges::find(files.stops, token) != files.stops.end()) {
    stopped = "end-of-turn";
    return {};
  }
  const std::string piece = files.tokenizer->piece(token, false);
  text += piece;
  if (++generated == limit) stopped = at_limit;
  return piece;
}

void TextStream::put(const std::string& piece) {
  pending_ += piece;
  const size_t n = complete_utf8(pending_);
  std::fwrite(pending_.data(), 1, n, out_);
  std::fflush(out_);
  pending_.erase(0, n);
}

void TextStream::finish() {
  if (!std::exchange(pending_, {}).empty()) std::fputs(kReplacement, out_);
  std::fputc('\n', out_);
  std::fflush(out_);
}

}  // namespace bbb::tools
