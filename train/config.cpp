// Defaults of a run, its JSON form, and the checks on what a user asked for.
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <thread>

#include "train/config_table.h"

namespace bbb::train {
namespace {

using Json = nlohmann::ordered_json;

std::string key(const Field& f) {
  std::string name = f.name;
  std::ranges::replace(name, '-', '_');
  return name;
}

// Numbers, strings and lists of them keep their type in JSON. Other values are stored as the text
// of their option.
template <typename T>
constexpr bool kPlain = std::is_constructible_v<Json, T> && !std::is_enum_v<T>;

// A learning rate measured at two model widths. Between them it is interpolated in log-log; outside
// them it is constant.
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
// Block training leaves many masters on a decision threshold. At this rate or above, the first
// steps would flip them all at once and destroy the model, unless the masters are snapped first.
constexpr Anchor kSnapFrom{5e-5, 5e-6};

void want(bool condition, const std::string& message) {
  if (!condition) throw UsageError(message);
}

}  // namespace

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> words;
  std::istringstream in(text + ',');
  for (std::string word; std::getline(in >> std::ws, word, ',');) words.push_back(word);
  return words;
}

bool read(const std::string& text, Stage& s, const Rule&) {
  int used = 0;
  return std::sscanf(text.c_str(), "w%2da%2d%n", &s.weight_bits, &s.activation_bits, &used) == 2 &&
         used == static_cast<int>(text.size());
}
bool read(const std::string& text, RunLength& length, const Rule&) {
  int samples = 0, epochs = 0, used = 0;
  const bool good = std::sscanf(text.c_str(), "%9dx%9d%n", &samples, &epochs, &used) == 2 &&
                    used == static_cast<int>(text.size());
  length = {samples, epochs};
  return good && samples > 0 && epochs > 0;
}

std::vector<Stage> parse_stages(const std::string& text) {
  return parse<std::vector<Stage>>(text, kStages);
}
std::string to_string(const std::vector<Stage>& stages) { return write(stages, kStages.rule); }
std::optional<models::Recompute> parse_recompute(const std::string& text) {
  return parse<std::optional<models::Recompute>>(text, kRecompute);
}

std::string to_json(const TrainConfig& config) {
  Json j;
  visit_stored(config, [&]<typename T>(const T& value, const Field& f) {
    if constexpr (requires { value.has_value(); }) {
      if (value) j[key(f)] = *value;
    } else if constexpr (kPlain<T>) {
      j[key(f)] = value;
    } else {
      j[key(f)] = write(value, f.rule);
    }
  });
  return j.dump(2);
}

TrainConfig config_from_json(const std::string& json, const std::string& where) {
  try {
    const Json j = Json::parse(json);
    TrainConfig config;
    visit_stored(config, [&]<typename T>(T& value, const Field& f) {
      if constexpr (requires { value.has_value(); }) {
        if (j.contains(key(f))) j.at(key(f)).get_to(value.emplace());
      } else if constexpr (kPlain<T>) {
        j.at(key(f)).get_to(value);
      } else {
        value = parse<T>(j.at(key(f)).template get<std::string>(), f);
      }
    });
    return config;
  } catch (const nlohmann::json::exception& error) {
    throw Error(cat(where, ": not a training configuration: ", error.what()));
  }
}

void check_group_size(const models::LlamaConfig& model, int group) {
  for (const models::LinearShape& linear : models::block_linears(model))
    want(linear.k % group == 0, cat("--group-size ", group, " does not divide the ", linear.k,
                                    " input features of ", linear.name));
}

TrainConfig resolve(TrainConfig c, const models::LlamaConfig& model, engine::DeviceType device) {
  visit(c, []<typename T>(const T& value, const Field& f) {
    if (const std::string text = option_text(value, f); !text.empty()) parse<T>(text, f);
  });
  const auto trainable = [](int bits) {
    return bits == 2 || bits == 3 || bits == 4 || bits == 8 || bits == 16;
  };
  for (const Stage& s : c.stages) {
    want(trainable(s.weight_bits),
         cat("--stages: weights of ", s.weight_bits, " bits; 2, 3, 4, 8 and 16 can be trained"));
    want(s.activation_bits == 16, cat("--stages: ", s, ": activations of ", s.activation_bits,
                                      " bits cannot be trained; they must be 16"));
  }
  const int last = c.stages.empty() ? (c.bits == 0 ? 2 : c.bits) : c.stages.back().weight_bits;
  want(c.bits == 0 || c.bits == last,
       cat("the result has ", c.bits, " bits, but the last stage has ", last));
  want(trainable(last) && last <= 8, cat("the result cannot have ", last, " bits"));
  c.bits = last;
  check_group_size(model, c.group);

  want(!c.stages.empty() || c.e2e_steps > 0, "nothing to train: no --stages and no --e2e-steps");
  want(model.max_position == 0 || c.seq_len <= model.max_position,
       cat("--seq-len ", c.seq_len, " is longer than the model's ", model.max_position,
           " positions"));
  if (c.stages.empty()) {
    c.lr.clear();
  } else {
    want(c.val_samples > 0, "--val-samples must be at least 1");
    want(c.batch <= c.samples,
         cat("--batch is ", c.batch, ", but must be between 1 and --samples ", c.samples));
    if (c.lr.size() == 1) c.lr.resize(c.stages.size(), c.lr[0]);
    if (c.lr.empty())
      for (const Stage& s : c.stages)
        c.lr.push_back((s.weight_bits > 2 ? kStageHigh : kStageLow).at(model.d_model));
    want(c.lr.size() == c.stages.size(),
         cat("--lr has ", c.lr.size(), " values for ", c.stages.size(), " stages"));
    want(!c.extrapolate || c.extrapolate->samples >= c.batch,
         cat("--extrapolate asks for fewer samples than --batch ", c.batch));
  }

  if (c.e2e_steps > 0) {
    const bool all = c.e2e_train == EndToEndTrain::All, blocks = !c.stages.empty();
    want(c.e2e_batch <= c.samples,
         cat("--e2e-batch is ", c.e2e_batch, ", but must be between 1 and --samples ", c.samples));
    if (c.e2e_micro_batch == 0) {
      // Enough rows for efficient matrix products, few enough to fit. Narrow models need more.
      const int64_t tokens = device != engine::DeviceType::Cuda ? 1024
                             : model.d_model <= 1024            ? 16 * 2048
                                                                : 8 * 2048;
      c.e2e_micro_batch = std::clamp<int64_t>(tokens / c.seq_len, 1, c.e2e_batch);
      while (c.e2e_batch % c.e2e_micro_batch != 0) --c.e2e_micro_batch;
    }
    want(c.e2e_batch % c.e2e_micro_batch == 0, cat("--e2e-micro-batch ", c.e2e_micro_batch,
                                                   " does not divide --e2e-batch ", c.e2e_batch));
    if (c.e2e_lr == 0)
      c.e2e_lr = (!all ? kScales : blocks ? kAllAfterBlocks : kAllFromRounding).at(model.d_model);
    want(c.e2e_snap != Snap::On || all, "--e2e-snap on moves masters: it needs --e2e-train all");
    if (c.e2e_snap == Snap::Auto)
      c.e2e_snap = all && blocks && c.e2e_lr >= kSnapFrom.at(model.d_model) ? Snap::On : Snap::Off;
  }
  if (device == engine::DeviceType::Cpu) c.gemm_algorithms = GemmAlgorithms::Heuristic;
  if (c.threads <= 0)
    c.threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  return c;
}

}  // namespace bbb::train
