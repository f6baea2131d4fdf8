// Defaults of a run, its JSON form, and the checks on what a user asked for.
#include "train/config.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <thread>

#include "quant/check.h"

namespace bbb::train {
namespace {

using Json = nlohmann::ordered_json;

template <typename E>
struct Name {
  const char* text;
  E value;
};
constexpr Name<InputStream> kInputStreams[] = {
    {"same", InputStream::Same}, {"higher", InputStream::Higher}, {"mix", InputStream::Mix}};
constexpr Name<EndToEndLoss> kLosses[] = {{"kl", EndToEndLoss::Kl},
                                          {"ce", EndToEndLoss::CrossEntropy}};
constexpr Name<EndToEndTrain> kTrains[] = {{"scales", EndToEndTrain::Scales},
                                           {"all", EndToEndTrain::All}};
constexpr Name<std::optional<models::Recompute>> kRecomputes[] = {
    {"auto", std::nullopt},
    {"none", models::Recompute::None},
    {"attention", models::Recompute::Attention},
    {"block", models::Recompute::Block}};
constexpr Name<GemmAlgorithms> kGemmAlgorithms[] = {{"timed", GemmAlgorithms::Timed},
                                                    {"heuristic", GemmAlgorithms::Heuristic}};
constexpr Name<Snap> kSnaps[] = {{"auto", Snap::Auto}, {"on", Snap::On}, {"off", Snap::Off}};

template <typename E, size_t N>
E parse_name(const Name<E> (&names)[N], const std::string& text, const char* option) {
  std::string allowed;
  for (const Name<E>& name : names) {
    if (text == name.text) return name.value;
    allowed += cat(allowed.empty() ? "" : ", ", name.text);
  }
  throw UsageError(cat(option, " is '", text, "', but must be one of ", allowed));
}

template <typename E, size_t N>
const char* name_of(const Name<E> (&names)[N], E value) {
  for (const Name<E>& name : names)
    if (value == name.value) return name.text;
  BBB_ASSERT(false);
}

// A learning rate measured at two widths. Between them it is interpolated in log-log; outside, the
// nearer one holds.
struct Anchor {
  double at_576;
  double at_4096;

  double at(int64_t width) const {
    const double w = std::clamp<double>(static_cast<double>(width), 576, 4096);
    const double position = std::log(w / 576) / std::log(4096.0 / 576);
    return at_576 * std::pow(at_4096 / at_576, position);
  }
};
constexpr Anchor kStageHigh{1e-4, 1e-5};  // 3 bits and more
constexpr Anchor kStageLow{1e-3, 2e-5};   // 2 bits
constexpr Anchor kAllAfterBlocks{1e-5, 1e-6};
constexpr Anchor kAllFromRounding{1e-3, 2e-5};
constexpr Anchor kScales{1e-4, 1e-5};
// Block training leaves many masters on a decision threshold. Above this rate the first steps would
// flip them together and destroy the model, unless they are moved off it first.
constexpr Anchor kSnapFrom{5e-5, 5e-6};

void want(bool condition, const std::string& message) {
  if (!condition) throw UsageError(message);
}

double default_stage_lr(const Stage& stage, int64_t width) {
  return (stage.weight_bits > 2 ? kStageHigh : kStageLow).at(width);
}

}  // namespace

std::vector<Stage> parse_stages(const std::string& text) {
  std::vector<Stage> stages;
  size_t begin = 0;
  while (begin <= text.size() && !text.empty()) {
    const size_t end = std::min(text.find(',', begin), text.size());
    const std::string word = text.substr(begin, end - begin);
    Stage stage;
    int used = 0;
    const bool good = std::sscanf(word.c_str(), "w%2da%2d%n", &stage.weight_bits,
                                  &stage.activation_bits, &used) == 2 &&
                      used == static_cast<int>(word.size());
    want(good, cat("--stages: '", word, "' is no stage; one looks like w2a16"));
    stages.push_back(stage);
    begin = end + 1;
  }
  return stages;
}

std::string to_string(const std::vector<Stage>& stages) {
  std::string text;
  for (const Stage& s : stages)
    text += cat(text.empty() ? "" : ",", "w", s.weight_bits, "a", s.activation_bits);
  return text;
}

InputStream parse_input_stream(const std::string& text) {
  return parse_name(kInputStreams, text, "--input-stream");
}
EndToEndLoss parse_e2e_loss(const std::string& text) {
  return parse_name(kLosses, text, "--e2e-loss");
}
EndToEndTrain parse_e2e_train(const std::string& text) {
  return parse_name(kTrains, text, "--e2e-train");
}
Snap parse_snap(const std::string& text) { return parse_name(kSnaps, text, "--e2e-snap"); }
std::optional<models::Recompute> parse_recompute(const std::string& text) {
  return parse_name(kRecomputes, text, "--recompute");
}

RunLength parse_run_length(const std::string& text) {
  long long samples = 0, epochs = 0;
  int used = 0;
  const bool good = std::sscanf(text.c_str(), "%9lldx%9lld%n", &samples, &epochs, &used) == 2 &&
                    used == static_cast<int>(text.size()) && samples > 0 && epochs > 0;
  want(good, cat("--extrapolate is '", text, "'; samples and epochs look like 4096x6"));
  return {samples, epochs};
}

std::string to_json(const TrainConfig& c) {
  Json j;
  j["model"] = c.model;
  j["data"] = c.data;
  j["stages"] = to_string(c.stages);
  j["bits"] = c.bits;
  j["group_size"] = c.group;
  j["samples"] = c.samples;
  j["seq_len"] = c.seq_len;
  j["val_samples"] = c.val_samples;
  j["epochs"] = c.epochs;
  j["batch"] = c.batch;
  j["lr"] = c.lr;
  j["input_stream"] = name_of(kInputStreams, c.input_stream);
  j["seed"] = c.seed;
  j["e2e_steps"] = c.e2e_steps;
  j["e2e_batch"] = c.e2e_batch;
  j["e2e_micro_batch"] = c.e2e_micro_batch;
  j["e2e_loss"] = name_of(kLosses, c.e2e_loss);
  j["e2e_train"] = name_of(kTrains, c.e2e_train);
  j["e2e_lr"] = c.e2e_lr;
  j["e2e_snap"] = name_of(kSnaps, c.e2e_snap);
  j["save_every"] = c.save_every;
  if (c.doc_end) j["doc_end"] = *c.doc_end;
  j["threads"] = c.threads;
  j["gemm_algorithms"] = name_of(kGemmAlgorithms, c.gemm_algorithms);
  return j.dump(2);
}

TrainConfig config_from_json(const std::string& json, const std::string& where) {
  try {
    const Json j = Json::parse(json);
    TrainConfig c;
    j.at("model").get_to(c.model);
    j.at("data").get_to(c.data);
    c.stages = parse_stages(j.at("stages").get<std::string>());
    j.at("bits").get_to(c.bits);
    j.at("group_size").get_to(c.group);
    j.at("samples").get_to(c.samples);
    j.at("seq_len").get_to(c.seq_len);
    j.at("val_samples").get_to(c.val_samples);
    j.at("epochs").get_to(c.epochs);
    j.at("batch").get_to(c.batch);
    j.at("lr").get_to(c.lr);
    c.input_stream = parse_input_stream(j.at("input_stream").get<std::string>());
    j.at("seed").get_to(c.seed);
    j.at("e2e_steps").get_to(c.e2e_steps);
    j.at("e2e_batch").get_to(c.e2e_batch);
    j.at("e2e_micro_batch").get_to(c.e2e_micro_batch);
    c.e2e_loss = parse_e2e_loss(j.at("e2e_loss").get<std::string>());
    c.e2e_train = parse_e2e_train(j.at("e2e_train").get<std::string>());
    j.at("e2e_lr").get_to(c.e2e_lr);
    c.e2e_snap = parse_snap(j.at("e2e_snap").get<std::string>());
    j.at("save_every").get_to(c.save_every);
    if (j.contains("doc_end")) c.doc_end = j.at("doc_end").get<int32_t>();
    j.at("threads").get_to(c.threads);
    c.gemm_algorithms =
        parse_name(kGemmAlgorithms, j.at("gemm_algorithms").get<std::string>(), "gemm_algorithms");
    return c;
  } catch (const nlohmann::json::exception& error) {
    throw Error(cat(where, ": not a training configuration: ", error.what()));
  }
}

TrainConfig resolve(TrainConfig c, const models::LlamaConfig& model, engine::DeviceType device) {
  const auto trainable = [](int bits) {
    return bits == 2 || bits == 3 || bits == 4 || bits == 8 || bits == 16;
  };
  for (const Stage& s : c.stages) {
    want(trainable(s.weight_bits),
         cat("--stages: weights of ", s.weight_bits, " bits; 2, 3, 4, 8 and 16 can be trained"));
    want(s.activation_bits == 16,
         cat("--stages: w", s.weight_bits, "a", s.activation_bits, ": activations of ",
             s.activation_bits, " bits cannot be trained; they must be 16"));
  }
  const int last = c.stages.empty() ? (c.bits == 0 ? 2 : c.bits) : c.stages.back().weight_bits;
  want(c.bits == 0 || c.bits == last,
       cat("the result has ", c.bits, " bits, but the last stage has ", last));
  want(trainable(last) && last <= 8, cat("the result cannot have ", last, " bits"));
  c.bits = last;
  want(c.group == 32 || c.group == 64 || c.group == 128,
       cat("--group-size is ", c.group, ", but must be 32, 64 or 128"));
  for (const models::LinearShape& linear : models::block_linears(model))
    want(linear.k % c.group == 0, cat("--group-size ", c.group, " does not divide the ", linear.k,
                                      " input features of ", linear.name));

  want(!c.stages.empty() || c.e2e_steps > 0, "nothing to train: no --stages and no --e2e-steps");
  want(c.samples > 0, "--samples must be at least 1");
  want(c.seq_len > 1, "--seq-len must be at least 2");
  want(model.max_position == 0 || c.seq_len <= model.max_position,
       cat("--seq-len ", c.seq_len, " is longer than the model's ", model.max_position,
           " positions"));
  if (c.stages.empty()) {
    c.lr.clear();
  } else {
    want(c.val_samples > 0, "--val-samples must be at least 1");
    want(c.epochs > 0, "--epochs must be at least 1");
    want(c.batch > 0 && c.batch <= c.samples,
         cat("--batch is ", c.batch, ", but must lie between 1 and --samples ", c.samples));
    if (c.lr.size() == 1) c.lr.resize(c.stages.size(), c.lr[0]);
    if (c.lr.empty())
      for (size_t t = 0; t < c.stages.size(); ++t)
        c.lr.push_back(default_stage_lr(c.stages[t], model.d_model));
    want(c.lr.size() == c.stages.size(),
         cat("--lr has ", c.lr.size(), " values for ", c.stages.size(), " stages"));
    want(!c.extrapolate || c.extrapolate->samples >= c.batch,
         cat("--extrapolate asks for fewer samples than --batch ", c.batch));
    for (double lr : c.lr) want(lr > 0 && std::isfinite(lr), cat("--lr ", lr, " is not positive"));
  }

  want(c.e2e_steps >= 0, "--e2e-steps must not be negative");
  if (c.e2e_steps > 0) {
    const bool all = c.e2e_train == EndToEndTrain::All, blocks = !c.stages.empty();
    want(c.e2e_batch > 0 && c.e2e_batch <= c.samples,
         cat("--e2e-batch is ", c.e2e_batch, ", but must lie between 1 and --samples ", c.samples));
    if (c.e2e_micro_batch == 0) {
      // Enough rows to keep the device's matrix products efficient, few enough to fit: narrow
      // models need more.
      const int64_t tokens = device != engine::DeviceType::Cuda ? 1024
                             : model.d_model <= 1024            ? 16 * 2048
                                                                : 8 * 2048;
      c.e2e_micro_batch = std::clamp<int64_t>(tokens / c.seq_len, 1, c.e2e_batch);
      while (c.e2e_batch % c.e2e_micro_batch != 0) --c.e2e_micro_batch;
    }
    want(
        c.e2e_micro_batch > 0 && c.e2e_batch % c.e2e_micro_batch == 0,
        cat("--e2e-micro-batch ", c.e2e_micro_batch, " does not divide --e2e-batch ", c.e2e_batch));
    want(c.e2e_lr >= 0 && std::isfinite(c.e2e_lr), cat("--e2e-lr ", c.e2e_lr, " is not positive"));
    if (c.e2e_lr == 0)
      c.e2e_lr = (!all ? kScales : blocks ? kAllAfterBlocks : kAllFromRounding).at(model.d_model);
    want(c.e2e_snap != Snap::On || all, "--e2e-snap on moves masters: it needs --e2e-train all");
    if (c.e2e_snap == Snap::Auto)
      c.e2e_snap = all && blocks && c.e2e_lr >= kSnapFrom.at(model.d_model) ? Snap::On : Snap::Off;
  }
  want(c.save_every >= 0, "--save-every must not be negative");
  if (device == engine::DeviceType::Cpu) c.gemm_algorithms = GemmAlgorithms::Heuristic;
  if (c.threads <= 0)
    c.threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  return c;
}

}  // namespace bbb::train
