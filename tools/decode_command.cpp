// bbb decode: reads a prompt, streams text, then reports times and bandwidth.
//
// Prefill runs the prompt through the model once and fills the key-value cache. After that, each
// run of one recorded step makes a token: embed, blocks, head, logits, position + 1. The host only
// samples. Bytes per token: every weight of the blocks and the head as stored, plus the keys and
// values so far. The device's bandwidth is measured by a large copy, not taken from a data sheet.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <nlohmann/json.hpp>

#include "data/chat_format.h"
#include "data/files.h"
#include "data/tokenizer.h"
#include "engine/progress.h"
#include "models/llama.h"
#include "tools/cli.h"
#include "tools/measure.h"
#include "tools/sampler.h"

namespace bbb::tools {

using autograd::Tape;
using autograd::TapeMode;
using autograd::Var;
using engine::Backend;
using engine::DType;
using engine::Tensor;
using Clock = std::chrono::steady_clock;

namespace {

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

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

// Streams pieces to stdout, whole characters at a time.
class TextStream {
 public:
  void put(const std::string& piece) {
    text_ += piece;
    pending_ += piece;
    const size_t n = complete_utf8(pending_);
    std::fwrite(pending_.data(), 1, n, stdout);
    std::fflush(stdout);
    pending_.erase(0, n);
  }
  void finish() {
    std::fwrite(pending_.data(), 1, pending_.size(), stdout);
    pending_.clear();
    std::fputc('\n', stdout);
  }
  const std::string& text() const { return text_; }

 private:
  std::string text_, pending_;
};

// A model and its cache: prefill once, then one recorded step per token.
class Generator {
 public:
  Generator(Backend& backend, models::Llama& model, int64_t capacity_tokens)
      : backend_(backend),
        model_(model),
        kv_(backend, model.config(), capacity_tokens),
        token_(backend.zeros({1, 1}, DType::I32)),
        logits_(backend.zeros({1, model.config().vocab}, backend.real())),
        host_logits_(static_cast<size_t>(model.config().vocab)) {
    step_ = backend.record([this] {
      Tape tape(backend_, TapeMode::Inference);
      const Var h = model_.forward(tape, token_, &kv_, models::Recompute::None);
      backend_.copy(logits_, model_.logits(h.value().view({1, model_.config().d_model})));
      backend_.advance(kv_.start);
    });
  }

  // Runs the prompt and returns the logits after its last token.
  const std::vector<float>& prefill(const std::vector<int32_t>& prompt) {
    const int64_t n = static_cast<int64_t>(prompt.size());
    const Tensor ids = backend_.empty({1, n}, DType::I32);
    backend_.upload(ids, prompt.data());
    Tape tape(backend_, TapeMode::Inference);
    const Var h = model_.forward(tape, ids, &kv_, models::Recompute::None);
    const Tensor last = h.value().view({n, model_.config().d_model}).rows(n - 1, 1);
    backend_.copy(logits_, model_.logits(last));
    set_position(n);
    return fetch();
  }
  void set_position(int64_t position) {
    const int32_t start = static_cast<int32_t>(position);
    backend_.upload(kv_.start, &start);
  }
  const std::vector<float>& next(int32_t token) {
    backend_.upload(token_, &token);
    step_->run();
    return fetch();
  }

 private:
  const std::vector<float>& fetch() {
    backend_.download(host_logits_.data(), logits_);
    return host_logits_;
  }

  Backend& backend_;
  models::Llama& model_;
  models::KvCache kv_;
  Tensor token_, logits_;
  std::vector<float> host_logits_;
  std::unique_ptr<engine::Replay> step_;
};

// Bytes of a linear's weight as it is held: the tensors that a load reads, or act elements.
int64_t linear_bytes(const models::QuantLinear& linear, Backend& backend) {
  if (linear.holds<models::PackedLinear>()) {
    int64_t bytes = 0;
    for (const quant::StoredTensor& t : linear.format().loaded_tensors()) bytes += t.bytes();
    return bytes;
  }
  return linear.n() * linear.k() * engine::size_bytes(backend.act());
}

// Bytes that one token reads: the blocks' weights as stored, norms, and the head.
int64_t weight_bytes(models::Llama& model, Backend& backend) {
  const models::LlamaConfig& c = model.config();
  int64_t bytes = model.head().bytes();
  for (auto& block : model.blocks()) {
    bytes += 2 * c.d_model * engine::size_bytes(backend.real());
    for (models::QuantLinear* linear : block->linears()) bytes += linear_bytes(*linear, backend);
  }
  return bytes;
}

int64_t kv_bytes_per_token(const models::LlamaConfig& c, Backend& backend) {
  return 2 * c.layers * c.kv_heads * c.head_dim * engine::size_bytes(backend.act());
}

struct Report {
  int64_t prompt_tokens = 0, generated = 0;
  double prefill_s = 0;
  std::vector<double> step_s;
  double bytes_per_token = 0;
  std::string text, stopped = "max-tokens";
};

void print_report(const Report& r, Backend& backend, const CommandLine& line) {
  const double step = median(r.step_s);
  const double bandwidth = measure_bandwidth(backend);
  const double rate = step > 0 ? r.bytes_per_token / step : 0;
  if (r.prompt_tokens > 0)
    fmt::print(stderr, "prefill {} tokens in {:.2f} ms ({:.0f} tokens/s)\n", r.prompt_tokens,
               1e3 * r.prefill_s, static_cast<double>(r.prompt_tokens) / r.prefill_s);
  if (step > 0)
    fmt::print(stderr,
               "decode {} tokens, median {:.3f} ms a token, {:.1f} tokens/s, {:.1f} GB/s of {:.0f} "
               "measured by copying ({:.1f} %) on {}\n",
               r.step_s.size(), 1e3 * step, 1 / step, rate / 1e9, bandwidth / 1e9,
               100 * rate / bandwidth, backend.device_name());
  if (!line.has("json")) return;
  const nlohmann::ordered_json json = {{"text", r.text},
                                       {"stopped", r.stopped},
                                       {"prompt_tokens", r.prompt_tokens},
                                       {"generated_tokens", r.generated},
                                       {"prefill_ms", 1e3 * r.prefill_s},
                                       {"decode_ms_per_token", 1e3 * step},
                                       {"tokens_per_s", step > 0 ? 1 / step : 0},
                                       {"gb_per_s", rate / 1e9},
                                       {"device_gb_per_s", bandwidth / 1e9},
                                       {"bandwidth_fraction", rate / bandwidth},
                                       {"device", backend.device_name()}};
  data::write_file_atomic(
      line.text("json"), json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n");
}

Report decode_synthetic(const CommandLine& line, Backend& backend, int64_t max_tokens) {
  const models::LlamaConfig config = models::synthetic_config(line.text("synthetic"));
  const int64_t context = line.integer("context", 1, config.max_position);
  const auto model = models::Llama::synthetic(backend, config, engine::WeightGrid{},
                                              static_cast<uint64_t>(line.integer("seed", 0)));
  Generator generator(backend, *model, context + max_tokens);
  generator.set_position(context);
  Report report;
  for (int64_t i = 0; i < max_tokens; ++i) {
    const auto start = Clock::now();
    generator.next(static_cast<int32_t>(i % config.vocab));
    report.step_s.push_back(seconds_since(start));
  }
  report.generated = max_tokens;
  report.bytes_per_token =
      static_cast<double>(weight_bytes(*model, backend) +
                          kv_bytes_per_token(config, backend) * (context + max_tokens / 2));
  return report;
}

// Checks that exactly one of --prompt, --chat and --messages is given, and the options of each.
void check_prompt_options(const CommandLine& line) {
  if (line.has("prompt") + line.has("chat") + line.has("messages") != 1)
    throw UsageError("give one of --prompt, --chat, --messages and --synthetic");
  if (line.has("special") && !line.has("prompt")) throw UsageError("--special needs --prompt");
  if (line.has("system") && !line.has("chat")) throw UsageError("--system needs --chat");
  if (line.texts("chat").size() % 2 == 0 && line.has("chat"))
    throw UsageError("the last --chat is an assistant's; give the user's next message too");
}

// The messages of --messages, or of --system and all --chat.
std::vector<data::ChatMessage> chat_messages(const CommandLine& line) {
  std::vector<data::ChatMessage> messages;
  if (line.has("messages")) {
    const std::string path = line.required("messages");
    messages = data::parse_messages(data::read_file(path), path);
    BBB_CHECK(messages.back().role == "user", path, ": the last message must be the user's");
    return messages;
  }
  if (line.has("system")) messages.push_back({"system", line.text("system")});
  bool user = false;
  for (const std::string& text : line.texts("chat"))
    messages.push_back({(user = !user) ? "user" : "assistant", text});
  return messages;
}

std::vector<int32_t> prompt_ids(const CommandLine& line, const data::Tokenizer& tokenizer) {
  if (line.has("prompt"))
    return tokenizer.encode(line.text("prompt"), line.has("special") ? data::SpecialText::Parse
                                                                     : data::SpecialText::AsText);
  return tokenizer.encode(data::render_chat(tokenizer, chat_messages(line), line.required("model")),
                          data::SpecialText::Parse);
}

Report decode_model(const CommandLine& line, Backend& backend, int64_t max_tokens) {
  const std::string path = line.required("model");
  check_prompt_options(line);
  SamplerSpec sampling;
  sampling.temperature = line.real("temperature", 0, 100);
  sampling.top_p = line.real("top-p", 0, 1);
  sampling.seed = static_cast<uint64_t>(line.integer("seed", 0));

  const auto source = models::open_checkpoint(path, line.nested_bits());
  backend.check_head_size(source->config().head_dim);
  const auto tokenizer = data::load_tokenizer(path);
  std::vector<int32_t> prompt = prompt_ids(line, *tokenizer);
  const auto bos = tokenizer->bos();
  if (tokenizer->add_bos() && bos && (prompt.empty() || prompt.front() != *bos))
    prompt.insert(prompt.begin(), *bos);
  BBB_CHECK(!prompt.empty(), "the prompt is empty and this model has no BOS token to start from");

  const int64_t n = static_cast<int64_t>(prompt.size()), positions = source->config().max_position;
  BBB_CHECK(n < positions, "the prompt has ", n, " tokens, but the model knows ", positions,
            " positions");
  for (const int32_t id : prompt)
    BBB_CHECK(id < source->config().vocab, path, ": token ", id, " ('",
              data::printable(tokenizer->piece(id, true)), "') of the prompt has no row in the ",
              "embedding of ", source->config().vocab);
  source->check_finite();  // last: it reads every weight
  max_tokens = std::min(max_tokens, positions - n);
  models::Llama model(backend, *source, models::HeadRounding::None);
  {
    engine::Progress progress("loading", source->config().layers, engine::Progress::kPatience_s);
    model.load_blocks(*source, [&](int64_t done) { progress.set(done); });
  }
  Generator generator(backend, model, n + max_tokens);
  Report report;
  report.prompt_tokens = n;
  auto start = Clock::now();
  const std::vector<float>* logits = &generator.prefill(prompt);
  report.prefill_s = seconds_since(start);

  std::vector<int32_t> stops = tokenizer->end_of_turn();
  for (const int32_t id : source->stop_ids()) stops.push_back(id);
  Sampler sampler(sampling);
  TextStream out;
  while (report.generated < max_tokens) {
    const int32_t token = sampler.next(*logits);
    if (std::find(stops.begin(), stops.end(), token) != stops.end()) {
      report.stopped = "end-of-turn";
      break;
    }
    ++report.generated;
    out.put(tokenizer->piece(token, false));
    if (report.generated == max_tokens) break;
    start = Clock::now();
    logits = &generator.next(token);
    report.step_s.push_back(seconds_since(start));
  }
  out.finish();
  report.text = out.text();
  report.bytes_per_token =
      static_cast<double>(weight_bytes(model, backend) +
                          kv_bytes_per_token(model.config(), backend) * (n + report.generated / 2));
  return report;
}

}  // namespace

int decode_command(const Arguments& arguments) {
  CommandLine line("decode", "Generate text from any checkpoint, or time a synthetic one");
  line.options()                                                             //
      ("model", "directory or GGUF file", cxxopts::value<std::string>())     //
      ("bits", CommandLine::kNestedBitsHelp, cxxopts::value<std::string>())  //
      ("prompt", "text to continue; special tokens in it are plain text without --special",
       cxxopts::value<std::string>())                                                  //
      ("special", "special tokens in the text of --prompt, such as </s>, are parsed")  //
      ("chat",
       "a user's message, in the model's chat format; repeated: the turns of user, assistant, "
       "user, ...",
       cxxopts::value<std::string>())                                              //
      ("system", "with --chat: the system prompt", cxxopts::value<std::string>())  //
      ("messages", "a chat as a JSON file: [{\"role\": \"user\", \"content\": \"Hi\"}, ..]",
       cxxopts::value<std::string>())                                                          //
      ("max-tokens", "at most this many", cxxopts::value<std::string>()->default_value("64"))  //
      ("temperature", "0: always the most likely token",
       cxxopts::value<std::string>()->default_value("0"))                               //
      ("top-p", "nucleus sampling", cxxopts::value<std::string>()->default_value("1"))  //
      ("seed", "of the sampler", cxxopts::value<std::string>()->default_value("0"))     //
      ("json", "write text and timings to this file", cxxopts::value<std::string>())    //
      ("synthetic", "random 2-bit weights: smollm2-135m, llama-3.2-1b, llama-3-8b, llama-2-7b",
       cxxopts::value<std::string>())  //
      ("context", "with --synthetic: tokens already in the cache",
       cxxopts::value<std::string>()->default_value("1024"));
  if (!line.parse(arguments)) return 0;
  const int64_t max_tokens = line.integer("max-tokens", 1, 1 << 20);
  for (const char* name : {"model", "prompt", "special", "chat", "system", "messages"})
    if (line.has("synthetic") && line.has(name))
      throw UsageError(cat("--synthetic takes no --", name));
  const auto backend = line.make_backend();
  const Report report = line.has("synthetic") ? decode_synthetic(line, *backend, max_tokens)
                                              : decode_model(line, *backend, max_tokens);
  print_report(report, *backend, line);
  return 0;
}

}  // namespace bbb::tools
