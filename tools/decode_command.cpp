// bbb decode: reads prompts, streams text, then reports times and bandwidth.
//
// Prefill runs a prompt through the model once and fills its part of the key-value cache. After
// that, each run of one recorded step makes a token of every sequence (models/generator.h). A
// sequence that ends gives its place to the next prompt. Bytes per step: every weight of the blocks
// and the head as stored, plus the keys and values so far. The device's bandwidth is measured by
// reading, not taken from a data sheet.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <sstream>

#include "data/files.h"
#include "data/json.h"
#include "data/text.h"
#include "models/generator.h"
#include "tools/generation.h"
#include "tools/measure.h"

namespace bbb::tools {

using data::ChatMessage;
using data::SpecialText;
using engine::Backend;
using nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;

namespace {

constexpr int64_t kMaxBatch = 64;
constexpr const char* kContextFull = "context";
constexpr int64_t kDefaultBatch = Backend::kMaxPackedRows;  // of --prompts

int64_t batch_of(const CommandLine& line, int64_t otherwise) {
  return line.has("batch") ? line.integer("batch", 1, kMaxBatch) : otherwise;
}

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Bytes of a linear's weight: as in the file, or act elements.
int64_t linear_bytes(const models::QuantLinear& linear, Backend& backend) {
  if (linear.holds<models::PackedLinear>()) {
    int64_t bytes = 0;
    for (const quant::StoredTensor& t : linear.format().loaded_tensors()) bytes += t.bytes();
    return bytes;
  }
  return linear.n() * linear.k() * engine::size_bytes(backend.act());
}

}  // namespace

int64_t weight_bytes(models::Llama& model, Backend& backend) {
  const models::LlamaConfig& c = model.config();
  int64_t bytes = model.head_table().bytes();
  for (auto& block : model.blocks()) {
    for (const models::NormShape& norm : models::block_norms(c))
      bytes += norm.size * engine::size_bytes(backend.real());
    for (const models::LinearShape& linear : models::block_linears(c))
      if (linear.bias) bytes += linear.n * engine::size_bytes(backend.act());
    for (models::QuantLinear* linear : block->linears()) bytes += linear_bytes(*linear, backend);
  }
  return bytes;
}

namespace {

// A prompt's tokens, and where it is from, for errors.
struct Prompt {
  std::string where;
  std::vector<int32_t> ids;
};

struct Sequence {
  std::vector<int32_t> prompt;
  Answer answer;
};

struct Report {
  std::vector<Sequence> sequences;  // none of a synthetic model
  bool listed = false;              // the sequences are a list, even if it has one
  int64_t batch = 1;
  int64_t prompt_tokens = 0, generated = 0;
  double prefill_s = 0;
  std::vector<double> step_s;
  int64_t step_tokens = 0;                // that the steps made, without those of ended sequences
  int64_t token_kv_bytes = 0;             // that the cache takes
  double weight_bytes = 0, kv_bytes = 0;  // of a step; of a token's keys and values so far

  double step() const { return median(step_s); }
  double tokens_per_step() const {
    return step_s.empty() ? 0
                          : static_cast<double>(step_tokens) / static_cast<double>(step_s.size());
  }
};

void print_report(const Report& r, Backend& backend, const CommandLine& line) {
  const double step = r.step(), bandwidth = measure_read_bandwidth(backend);
  const double rate = step > 0 ? (r.weight_bytes + r.tokens_per_step() * r.kv_bytes) / step : 0;
  const double tokens_per_s = step > 0 ? r.tokens_per_step() / step : 0;
  if (r.prompt_tokens > 0)
    fmt::print(stderr, "prefill {} tokens in {:.2f} ms ({:.0f} tokens/s)\n", r.prompt_tokens,
               1e3 * r.prefill_s, static_cast<double>(r.prompt_tokens) / r.prefill_s);
  if (step > 0)
    fmt::print(
        stderr,
        "decode {} tokens, median {:.3f} ms a step of {}, {:.1f} tokens/s, {:.1f} GB/s of "
        "{:.0f} measured by reading ({:.1f} %), {:.1f} KB of keys and values a token, on {}\n",
        r.step_tokens, 1e3 * step, r.batch, tokens_per_s, rate / 1e9, bandwidth / 1e9,
        100 * rate / bandwidth, static_cast<double>(r.token_kv_bytes) / 1e3, backend.device_name());
  if (!line.has("json")) return;
  ordered_json json;
  for (const auto& [prompt, answer] : r.sequences) {
    ordered_json one{{"text", answer.text}, {"stopped", answer.stopped}};
    if (!r.listed) {
      json = one;
      continue;
    }
    one["prompt_tokens"] = prompt.size();
    one["generated_tokens"] = answer.generated;
    json["sequences"].push_back(one);
  }
  json["batch"] = r.batch;
  json["prompt_tokens"] = r.prompt_tokens;
  json["generated_tokens"] = r.generated;
  json["prefill_ms"] = 1e3 * r.prefill_s;
  json["decode_ms_per_step"] = 1e3 * step;
  json["decode_ms_per_token"] = tokens_per_s > 0 ? 1e3 / tokens_per_s : 0;
  json["tokens_per_s"] = tokens_per_s;
  json["kv_bits"] = line.kv_format().bits;
  json["kv_bytes_per_token"] = r.token_kv_bytes;
  json["gb_per_s"] = rate / 1e9;
  json["device_gb_per_s"] = bandwidth / 1e9;
  json["bandwidth_fraction"] = rate / bandwidth;
  json["device"] = backend.device_name();
  data::write_file_atomic(line.text("json"),
                          json.dump(2, ' ', false, ordered_json::error_handler_t::replace) + "\n");
}

// Times the steps of a run. A device may be ahead of the host, so a step's time is the time between
// the arrivals of two tokens.
class StepTimes {
 public:
  explicit StepTimes(Report& report) : report_(report) {}
  void arrived(int64_t tokens) {
    report_.step_s.push_back(seconds_since(last_));
    report_.step_tokens += tokens;
    last_ = Clock::now();
  }

 private:
  Report& report_;
  Clock::time_point last_ = Clock::now();
};

std::string full_context(int64_t positions) {
  return fmt::format("the context of {} tokens is full", positions);
}

Report decode_synthetic(const CommandLine& line, Backend& backend, int64_t max_tokens) {
  const models::LlamaConfig config = models::synthetic_config(line.text("synthetic"));
  const int64_t context = line.integer("context", 1, config.max_position - 1);
  const int64_t steps = std::min(max_tokens, config.max_position - context);
  const auto model = models::Llama::synthetic(backend, config, {}, sample_seed(line));
  Report report;
  report.batch = batch_of(line, 1);
  models::Generator generator(*model, report.batch, context + steps, sample_spec(line),
                              line.kv_format());
  generator.assume(context);
  StepTimes times(report);
  generator.run(steps, [&](const std::vector<int32_t>&) {
    times.arrived(report.batch);
    return true;
  });
  if (steps < max_tokens) fmt::print(stderr, "{}\n", full_context(config.max_position));
  report.generated = report.batch * steps;
  report.weight_bytes = static_cast<double>(weight_bytes(*model, backend));
  report.token_kv_bytes = generator.kv_bytes_per_token();
  report.kv_bytes = static_cast<double>(report.token_kv_bytes * (context + steps / 2));
  return report;
}

// Checks that there is exactly one source of prompts, and the options of each.
void check_prompt_options(const CommandLine& line) {
  if (line.has("prompt") + line.has("chat") + line.has("messages") + line.has("prompts") != 1)
    throw UsageError("give one of --prompt, --prompts, --chat, --messages and --synthetic");
  if (line.has("special") && !line.has("prompt") && !line.has("prompts"))
    throw UsageError("--special needs --prompt or --prompts");
  if (line.has("system") && !line.has("chat")) throw UsageError("--system needs --chat");
  if (line.texts("chat").size() % 2 == 0 && line.has("chat"))
    throw UsageError("the last --chat is an assistant's; give the user's next message too");
  if (!line.has("prompts") && batch_of(line, 1) > 1 && sample_spec(line).temperature == 0)
    throw UsageError(
        "--batch of one prompt needs a --temperature above 0: without it all texts are the same");
}

// A JSON list of messages that ends with the user's.
std::vector<ChatMessage> user_messages(const std::string& text, const std::string& where) {
  std::vector<ChatMessage> messages = data::parse_messages(text, where);
  BBB_CHECK(messages.back().role == "user", where, ": the last message must be the user's");
  return messages;
}

// The messages of --messages, or of --system and all --chat.
std::vector<ChatMessage> chat_messages(const CommandLine& line) {
  if (line.has("messages")) {
    const std::string path = line.required("messages");
    return user_messages(data::read_file(path), path);
  }
  std::vector<ChatMessage> messages;
  if (line.has("system")) messages.push_back({"system", line.text("system")});
  bool user = false;
  for (const std::string& text : line.texts("chat"))
    messages.push_back({(user = !user) ? "user" : "assistant", text});
  return messages;
}

// encode() makes the tokens of the prompt; its errors get `where` in front.
template <typename Encode>
Prompt prompt_of(std::string where, const Encode& encode) {
  try {
    return {where, encode()};
  } catch (const Error& error) {
    throw Error(cat(where, ": ", error.what()));
  }
}

// The prompts of a file, one a line: {"prompt": ..} or {"messages": [..]} in a .jsonl, else plain
// text. Empty lines are skipped.
std::vector<Prompt> file_prompts(const std::string& path, const ModelFiles& files,
                                 SpecialText special) {
  std::vector<Prompt> prompts;
  std::istringstream lines(data::read_text(path));
  int64_t number = 0;
  for (std::string line; std::getline(lines, line);) {
    const std::string where = cat(path, ":", ++number);
    if (line.ends_with('\r')) line.pop_back();
    if (line.find_first_not_of(" \t") == std::string::npos) continue;
    if (!data::is_jsonl(path)) {
      prompts.push_back(prompt_of(where, [&] { return files.text_ids(line, special); }));
      continue;
    }
    const nlohmann::json object = data::parse_json(line, where);
    const auto has = [&](const char* key) { return object.is_object() && object.contains(key); };
    BBB_CHECK(
        has("prompt") != has("messages") && (!has("prompt") || object.at("prompt").is_string()),
        where, ": not {\"prompt\": \"text\"} or {\"messages\": [..]}");
    prompts.push_back(
        has("prompt")
            ? prompt_of(
                  where,
                  [&] { return files.text_ids(object.at("prompt").get<std::string>(), special); })
            : prompt_of(where, [&, messages = user_messages(object.at("messages").dump(), where)] {
                return files.chat_ids(messages);
              }));
  }
  BBB_CHECK(!prompts.empty(), path, ": no prompt");
  return prompts;
}

std::vector<Prompt> prompts_of(const CommandLine& line, const ModelFiles& files) {
  const SpecialText special = line.has("special") ? SpecialText::Parse : SpecialText::AsText;
  if (line.has("prompts")) return file_prompts(line.required("prompts"), files, special);
  const Prompt prompt =
      line.has("prompt")
          ? prompt_of("--prompt", [&] { return files.text_ids(line.text("prompt"), special); })
          : prompt_of(line.has("chat") ? "--chat" : line.text("messages"),
                      [&, messages = chat_messages(line)] { return files.chat_ids(messages); });
  // --batch of one prompt: so many continuations.
  return std::vector<Prompt>(static_cast<size_t>(batch_of(line, 1)), prompt);
}

// Generates text after every prompt of the report. A single text appears as it is made, one of a
// list as soon as it and all before it have ended.
void generate(Report& report, models::Generator& generator, const ModelFiles& files,
              uint64_t seed) {
  std::vector<Sequence>& sequences = report.sequences;
  TextStream stream(stdout);
  size_t printed = 0;
  const auto append = [&](Answer& to, int32_t token) {
    const std::string piece = to.append(token, files);
    if (!report.listed) return stream.put(piece);
    for (; printed < sequences.size() && !sequences[printed].answer.running(); ++printed) {
      fmt::print("[{}] {}\n", printed, whole_characters(sequences[printed].answer.text));
      std::fflush(stdout);
    }
  };

  std::vector<Answer*> places(static_cast<size_t>(report.batch), nullptr);
  size_t next = 0;
  for (;;) {
    int64_t steps = INT64_MAX, running = 0;
    for (size_t b = 0; b < places.size(); ++b) {
      while (places[b] == nullptr && next < sequences.size()) {
        Sequence& fresh = sequences[next];
        const auto start = Clock::now();
        const int32_t token =
            generator.prefill(static_cast<int64_t>(b), fresh.prompt, seed + next++);
        report.prefill_s += seconds_since(start);
        append(fresh.answer, token);
        if (fresh.answer.running()) places[b] = &fresh.answer;
      }
      if (places[b] == nullptr) {
        generator.clear(static_cast<int64_t>(b));
        continue;
      }
      ++running;
      steps = std::min(steps, places[b]->limit - places[b]->generated);
    }
    if (running == 0) break;
    StepTimes times(report);
    generator.run(steps, [&](const std::vector<int32_t>& tokens) {
      const auto waiting = std::ranges::count_if(places, [](Answer* a) { return a != nullptr; });
      if (waiting > 0) times.arrived(waiting);  // else: begun before the last sequence ended
      bool all = true;
      for (size_t b = 0; b < places.size(); ++b) {
        if (places[b] == nullptr) continue;
        append(*places[b], tokens[b]);
        if (!places[b]->running()) places[b] = nullptr, all = false;
      }
      return all;
    });
  }
  if (!report.listed) stream.finish();
}

Report decode_model(const CommandLine& line, Backend& backend, int64_t max_tokens) {
  check_prompt_options(line);
  const engine::SampleSpec sampling = sample_spec(line);
  const ModelFiles files(line, backend);
  const int64_t positions = files.source->config().max_position;
  Report report;
  int64_t capacity = 0;
  for (Prompt& prompt : prompts_of(line, files)) {
    const int64_t n = static_cast<int64_t>(prompt.ids.size());
    BBB_CHECK(n < positions, prompt.where, ": the prompt has ", n, " tokens, but the model knows ",
              positions, " positions");
    const int64_t limit = std::min(max_tokens, positions - n);
    report.prompt_tokens += n;
    capacity = std::max(capacity, n + limit);
    report.sequences.push_back(
        {std::move(prompt.ids),
         {.limit = limit, .at_limit = limit < max_tokens ? kContextFull : "max-tokens"}});
  }
  const int64_t count = static_cast<int64_t>(report.sequences.size());
  report.batch = std::min(count, batch_of(line, kDefaultBatch));
  report.listed = line.has("prompts") || report.batch > 1;

  models::KvCache::check(files.source->config(), line.kv_format());
  const auto model = files.load(backend);  // last: it reads every weight
  models::Generator generator(*model, report.batch, capacity, sampling, line.kv_format());
  generate(report, generator, files, sample_seed(line));
  int64_t full = 0;
  for (const Sequence& one : report.sequences) {
    report.generated += one.answer.generated;
    full += one.answer.stopped == kContextFull;
  }
  if (full > 0)
    fmt::print(stderr, "{}{}\n",
               report.listed ? fmt::format("texts that end early: {}; ", full) : "",
               full_context(positions));
  report.weight_bytes = static_cast<double>(weight_bytes(*model, backend));
  report.token_kv_bytes = generator.kv_bytes_per_token();
  report.kv_bytes = static_cast<double>(report.token_kv_bytes *
                                        (report.prompt_tokens + report.generated / 2) / count);
  return report;
}

}  // namespace

int decode_command(const Arguments& arguments) {
  CommandLine line("decode", "Generate text from any checkpoint, or time a synthetic one");
  line.options()                                                             //
      ("model", "directory or GGUF file", cxxopts::value<std::string>())     //
      ("bits", CommandLine::kNestedBitsHelp, cxxopts::value<std::string>())  //
      ("kv-bits", CommandLine::kKvBitsHelp,
       cxxopts::value<std::string>()->default_value("16"))  //
      ("prompt", "text to continue; special tokens in it are plain text without --special",
       cxxopts::value<std::string>())  //
      ("prompts",
       "a file of prompts, one a line; of a .jsonl file {\"prompt\": ..} or {\"messages\": [..]}",
       cxxopts::value<std::string>())                                                  //
      ("special", "special tokens in the text of a prompt, such as </s>, are parsed")  //
      ("chat",
       "a user's message, in the model's chat format; repeated: the turns of user, assistant, "
       "user, ...",
       cxxopts::value<std::string>())                                              //
      ("system", "with --chat: the system prompt", cxxopts::value<std::string>())  //
      ("messages", "a chat as a JSON file: [{\"role\": \"user\", \"content\": \"Hi\"}, ..]",
       cxxopts::value<std::string>())  //
      ("batch",
       "sequences at a time, 1 to 64: of --prompts (8 if not given), else so many continuations "
       "of the prompt",
       cxxopts::value<std::string>())                                                          //
      ("max-tokens", "at most this many", cxxopts::value<std::string>()->default_value("64"))  //
      ("json", "write text and timings to this file", cxxopts::value<std::string>())           //
      ("synthetic", cat("random 2-bit weights: ", models::kSyntheticSizes),
       cxxopts::value<std::string>())  //
      ("context", "with --synthetic: tokens already in the cache",
       cxxopts::value<std::string>()->default_value("1024"));
  add_sampling_options(line);
  if (!line.parse(arguments)) return 0;
  const int64_t max_tokens = line.integer("max-tokens", 1, 1 << 20);
  check_writable(line, "json");
  for (const char* name :
       {"model", "bits", "prompt", "prompts", "special", "chat", "system", "messages"})
    if (line.has("synthetic") && line.has(name))
      throw UsageError(cat("--synthetic takes no --", name));
  if (line.has("context") && !line.has("synthetic"))
    throw UsageError("--context needs --synthetic");
  const auto backend = line.make_backend();
  const Report report = line.has("synthetic") ? decode_synthetic(line, *backend, max_tokens)
                                              : decode_model(line, *backend, max_tokens);
  print_report(report, *backend, line);
  return 0;
}

}  // namespace bbb::tools
