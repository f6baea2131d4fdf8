// Defaults of a run, its JSON form, and the checks on what a user asked for.
#include <cmath>
#include <cstdio>
#include <functional>
#include <nlohmann/json.hpp>
#include <numeric>
#include <thread>

#include "train/allocation.h"
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
constexpr Anchor kStageHigh{1e-4, 1e-5};  // 3 bits and more; of either phase
constexpr Anchor kNested{1e-3, 1e-5};     // several precisions at once, end to end
constexpr Anchor kStageLow{1e-3, 2e-5};   // 2 bits
constexpr Anchor kAllFirst{2e-3, 2e-5};   // 2 bits, from rounding or from snapped blocks
constexpr Anchor kAllLater{1e-3, 1e-5};   // behind a stage of the whole model, or another run
constexpr Anchor kScales{1e-3, 1e-5};
// Block training leaves many masters on a decision threshold. At this rate or above, the first
// steps would flip them all at once and destroy the model, unless the masters are snapped first.
constexpr Anchor kSnapFrom{5e-5, 5e-6};
// Behind blocks that are not snapped: LC's latents, which would all lie as far from a threshold.
constexpr Anchor kBehindBlocks{1e-5, 1e-6};

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
bool read(const std::string& text, ModelStage& s, const Rule&) {
  int used = 0, passes = 0;
  const bool good = std::sscanf(text.c_str(), "w%2da%2d:%6d%n", &s.weight_bits, &s.activation_bits,
                                &passes, &used) == 3 &&
                    used == static_cast<int>(text.size());
  s.passes = passes;
  return good && passes > 0;
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

std::vector<Stage> scheduled_stages(char schedule, const Stage& to) {
  const std::string weights = schedule == 'A' ? "w8a16,w4a16,w2a16"
                              : schedule == 'B'
                                  ? "w8a16,w8a8,w4a8,w4a4,w2a4,w2a2"
                                  // Warm-up, two cycles between 3 and 2 bits, final tuning.
                                  : "w8a16,w4a16,w3a16,w2a16,w3a16,w2a16,w2a16";
  std::vector<Stage> stages = parse_stages(weights);
  if (schedule == 'B') {
    if (to == Stage{2, 16})
      throw UsageError("--schedule B alternates weights and activations: it ends at --to w2a2");
  } else if (to == Stage{2, 2}) {
    for (const int bits : {8, 4, 2}) stages.push_back({2, bits});
  }
  return stages;
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

namespace {

void check_stage(const Stage& s, const char* option) {
  const auto trainable = [](int bits) {
    return bits == 2 || bits == 3 || bits == 4 || bits == 8 || bits == 16;
  };
  want(trainable(s.weight_bits),
       cat(option, ": weights of ", s.weight_bits, " bits; 2, 3, 4, 8 and 16 can be trained"));
  want(trainable(s.activation_bits), cat(option, ": activations of ", s.activation_bits,
                                         " bits; 2, 3, 4, 8 and 16 can be trained"));
}

// One rate a stage, from one for all or from the defaults.
void spread_rates(std::vector<double>& lr, size_t stages, const char* option,
                  const std::function<double(size_t stage)>& by_default) {
  if (lr.size() == 1) lr.resize(stages, lr[0]);
  if (lr.empty())
    for (size_t t = 0; t < stages; ++t) lr.push_back(by_default(t));
  want(lr.size() == stages, cat(option, " has ", lr.size(), " values for ", stages, " stages"));
}

void resolve_grid(TrainConfig& c, const models::LlamaConfig& model) {
  if (c.act_outliers % c.group != 0) c.act_outliers += c.group - c.act_outliers % c.group;
  for (const models::LinearShape& linear : models::block_linears(model))
    want(c.act_outliers < linear.k, cat("--act-outliers ", c.act_outliers, " are all of the ",
                                        linear.k, " input features of ", linear.name));
  want(c.ocs_ratio.size() <= 2, "--ocs-ratio takes a mean, or the first and the last ratio");
  if (c.ocs_ratio.size() == 1)
    want(c.ocs_ratio[0] < 2.0 / 3,
         cat("--ocs-ratio ", c.ocs_ratio[0], " would split all channels of the last block"));
  if (c.any_precision.empty()) return;
  want(
      c.any_precision[0] == quant::kNestedBits &&
          std::ranges::adjacent_find(c.any_precision, std::less_equal<>()) == c.any_precision.end(),
      "--any-precision takes 8 first, then fewer bits");
  want(c.range == RangeRule::MinMax,
       "--any-precision nests codes of 8 bits, whose ranges are not searched: no --range search");
  want(c.e2e_train == EndToEndTrain::All || c.e2e_steps == 0,
       "--any-precision trains masters: no --e2e-train scales");
  want(c.input_stream == InputStream::Same && c.target == Target::Full,
       "--any-precision gives every precision its own stream: it needs --input-stream same and "
       "--target full");
  const auto nested = [&](const Stage& s) {
    want(s.weight_bits == quant::kNestedBits, cat("--any-precision trains stages of w8, not ", s));
  };
  for (const Stage& s : c.stages) nested(s);
  for (const ModelStage& s : c.e2e_stages) nested(s);
}

// LC transforms the whole row of a weight, which has neither groups nor an order of channels.
void check_lc(const TrainConfig& c, const models::LlamaConfig& model) {
  const auto only = [](bool condition, const char* option) {
    want(condition, cat("--quantizer lc takes inputs and rows as they are: no ", option));
  };
  only(c.group == 32, "--group-size");
  only(c.range == RangeRule::MinMax, "--range search");
  only(c.rotate == Rotate::None, "--rotate group");
  only(c.ocs_ratio.empty(), "--ocs-ratio");
  only(c.act_outliers == 0, "--act-outliers");
  only(c.down_kurtosis == 0, "--down-kurtosis");
  want(c.any_precision.empty(), "--quantizer lc has codes of 2 bits: no --any-precision");
  want(c.block_schedule == BlockSchedule::All,
       "--quantizer lc trains w2a16 alone: no --block-schedule stochastic or prefix");
  want(c.e2e_train == EndToEndTrain::All || c.e2e_steps == 0,
       "--quantizer lc trains latents: no --e2e-train scales");
  want(c.e2e_damping == 0 && c.e2e_freeze == Freeze::None,
       "--e2e-damping and --e2e-freeze are for --quantizer minmax and seq");
  want(!finds_codes(c), "--method and --grid-train are for --quantizer minmax and seq");
  want(c.optimizer == autograd::UpdateRule::AdamW,
       "--optimizer muon is for --quantizer minmax and seq");
  want(c.ste == Ste::Clip, "--quantizer lc has an estimator of its own, --lc-gradient: no --ste");
  const auto width = [](const Stage& s) {
    want(s == Stage{2, 16}, cat("--quantizer lc is for w2a16, not ", s));
  };
  for (const Stage& s : c.stages) width(s);
  for (const ModelStage& s : c.e2e_stages) width(s);
  width({c.bits, c.act_bits});
  for (const models::LinearShape& linear : models::block_linears(model))
    for (const int64_t features : {linear.n, linear.k})
      want(quant::lc_block(features) > 0,
           cat("--quantizer lc transforms blocks of 32 features at least; ", linear.name, " has ",
               features));
}

// SEQ has a scale a group and no zero point.
void check_seq(const TrainConfig& c) {
  want(c.bits <= 4, cat("--quantizer seq is for results of at most 4 bits, not ", c.bits));
  want(c.any_precision.empty(), "--quantizer seq has no nested codes: no --any-precision");
  want(c.grid_train != GridTrain::ScalesZeros,
       "--quantizer seq has no zero points: no --grid-train scales-zeros and no --method block-ap");
}

// Every site's bits, split channels and outliers are chosen. `c` is resolved but for this.
void check_allocation(const TrainConfig& c, const models::LlamaConfig& model,
                      engine::DeviceType device) {
  want(c.target_bits == 0 || c.target_us == 0, "give one of --target-bits and --target-us");
  const std::string option = c.target_us > 0 ? "--target-us" : "--target-bits";
  want(c.any_precision.empty(),
       cat(option, " chooses codes of 2 to 4 bits: no --any-precision, whose codes are nested"));
  want(c.quantizer == Quantizer::MinMax,
       cat(option, " chooses bits and splits of groups: it is for --quantizer minmax"));
  want(c.ocs_ratio.empty(),
       cat(option, " chooses the split channels of every input: no --ocs-ratio"));
  want(c.split_side != SplitSideChoice::Auto,
       cat(option, " compares the errors of weights alone: no --split-side auto"));
  want(c.bits == 2,
       cat(option, " gives inputs 2 bits or more: the last stage has 2 bits, not ", c.bits));
  want(c.target_us == 0 || device != engine::DeviceType::Cuda ||
           c.gemm_algorithms == GemmAlgorithms::Timed,
       "--target-us chooses by times: no --deterministic");
  if (c.target_bits > 0) size_budget(model, c);
}

// The stages of the whole model, their steps and rates.
void resolve_end_to_end(TrainConfig& c, const models::LlamaConfig& model,
                        engine::DeviceType device) {
  const bool all = c.e2e_train == EndToEndTrain::All, blocks = !c.stages.empty();
  const bool algorithm2 = c.block_schedule != BlockSchedule::All;
  const int64_t pass_steps = steps_per_pass(c);
  if (c.e2e_steps == 0) c.e2e_stages.clear();
  if (c.e2e_steps != 0 && c.e2e_stages.empty()) {
    ModelStage stage{
        c.stages.empty() ? Stage{c.bits == 0 ? 2 : c.bits, c.act_bits} : c.stages.back(), 1};
    if (!c.any_precision.empty()) stage.weight_bits = quant::kNestedBits;
    stage.passes = c.e2e_steps == TrainConfig::kAutoSteps
                       ? (blocks ? 2 : 6)
                       : (c.e2e_steps + pass_steps - 1) / pass_steps;
    c.e2e_stages = {stage};
  }
  if (c.e2e_steps == TrainConfig::kAutoSteps) {
    int64_t passes = algorithm2 ? c.epochs : 0;
    for (const ModelStage& s : c.e2e_stages) passes = std::max(passes, s.passes);
    c.e2e_steps = passes * pass_steps;
  }
  for (const ModelStage& s : c.e2e_stages) check_stage(s, "--e2e-stages");
  const bool whole = algorithm2 || !c.e2e_stages.empty();
  if (!whole || !all) c.e2e_embedding = EmbeddingTrain::Keep;
  if (!whole) return;
  want(
      all || (c.e2e_stages.size() == 1 && !algorithm2),
      "--e2e-train scales freezes codes: it takes one end-to-end stage, behind blocks or rounding");
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
  want(c.e2e_batch % c.e2e_micro_batch == 0,
       cat("--e2e-micro-batch ", c.e2e_micro_batch, " does not divide --e2e-batch ", c.e2e_batch));
  spread_rates(c.e2e_lr, c.e2e_stages.size(), "--e2e-lr", [&](size_t t) {
    if (!all) return kScales.at(model.d_model);
    if (!c.any_precision.empty()) return kNested.at(model.d_model);
    if (c.quantizer == Quantizer::Lc) return (blocks ? kBehindBlocks : kStageLow).at(model.d_model);
    if (c.e2e_stages[t].weight_bits > 2) return kStageHigh.at(model.d_model);
    if (t > 0 || algorithm2 || !c.from.empty()) return kAllLater.at(model.d_model);
    return kAllFirst.at(model.d_model);
  });
  want(c.e2e_snap != Snap::On || all, "--e2e-snap on moves masters: it needs --e2e-train all");
  want(all || (c.e2e_average == 0 && c.e2e_damping == 0 && c.e2e_freeze == Freeze::None),
       "--e2e-average, --e2e-damping and --e2e-freeze are for masters: they need --e2e-train all");
  want(c.e2e_moments == Moments::Wide ||
           (c.e2e_freeze == Freeze::None && c.optimizer == autograd::UpdateRule::AdamW),
       "--e2e-moments 8bit is for --optimizer adamw, without --e2e-freeze");
  const auto few_bits = [&](const Stage& s) {
    want(s.weight_bits <= 4 || (c.e2e_damping == 0 && c.e2e_freeze == Freeze::None),
         cat("--e2e-damping and --e2e-freeze are for weights of at most 4 bits, not for ", s));
  };
  if (algorithm2)
    for (const Stage& s : c.stages) few_bits(s);
  for (const ModelStage& s : c.e2e_stages) few_bits(s);
  if (c.e2e_snap == Snap::Auto)
    c.e2e_snap = all && blocks && !finds_codes(c) && !algorithm2 && !c.e2e_stages.empty() &&
                         c.quantizer != Quantizer::Lc && c.lora_rank == 0 &&
                         c.e2e_lr[0] >= kSnapFrom.at(model.d_model)
                     ? Snap::On
                     : Snap::Off;
}

// Muon's steps are made of the momentum alone, and reach every weight.
void check_muon(const TrainConfig& c) {
  const bool whole = !c.e2e_stages.empty() && c.e2e_train == EndToEndTrain::All;
  want(whole || !c.stages.empty(),
       "--optimizer muon is for the weights of linears, but this run trains none");
  want(!finds_codes(c), "--optimizer muon takes no --method gptq or block-ap, and no --grid-train");
  want(c.e2e_damping == 0 && c.e2e_freeze == Freeze::None,
       "--e2e-damping and --e2e-freeze are for --optimizer adamw: a step of muon reaches every "
       "weight");
}

// Adapters train in place of masters, through the grid of groups.
void resolve_lora(TrainConfig& c, const models::LlamaConfig& model) {
  if (c.lora_rank == 0) {
    c.lora_match = LoraMatch::None;
    return;
  }
  want(c.quantizer != Quantizer::Lc, "--lora-rank adapts weights of groups: no --quantizer lc");
  want(!finds_codes(c), "--lora-rank takes no --method gptq or block-ap, and no --grid-train");
  want(c.e2e_damping == 0 && c.e2e_freeze == Freeze::None,
       "--e2e-damping and --e2e-freeze are for single weights: no --lora-rank, whose steps reach "
       "every weight");
  for (const models::LinearShape& linear : models::block_linears(model))
    want(c.lora_rank * (linear.n + linear.k) < linear.n * linear.k,
         cat("--lora-rank ", c.lora_rank, ": such adapters of ", linear.name,
             " are no smaller than its ", linear.n, " x ", linear.k, " weights"));
  if (c.lora_match == LoraMatch::Auto) c.lora_match = LoraMatch::Moments;
}

// A method that finds codes does so once.
void check_codes(const TrainConfig& c) {
  const std::string option = c.method == Method::Gptq      ? "--method gptq"
                             : c.method == Method::BlockAp ? "--method block-ap"
                                                           : "--grid-train";
  want(c.method != Method::Gptq || c.grid_train == GridTrain::None,
       "--method gptq does not train: no --grid-train");
  want(c.block_schedule == BlockSchedule::All,
       cat(option, " goes block by block: no --block-schedule stochastic or prefix"));
  want(c.any_precision.empty(),
       cat(option, " finds codes of one width: no --any-precision, whose codes are nested"));
  const bool whole = c.stages.empty() && c.method == Method::Blocks;
  if (whole || c.grid_train == GridTrain::Ratios) {
    for (const ModelStage& s : c.e2e_stages)
      want(s.weight_bits <= 8, cat("--grid-train needs codes of at most 8 bits, not ", s));
    want(c.e2e_damping == 0 && c.e2e_freeze == Freeze::None && c.e2e_snap != Snap::On,
         "--grid-train moves the grid: no --e2e-damping, --e2e-freeze or --e2e-snap");
  }
  if (whole) return;
  want(c.from.empty(), cat(option, " is for the block phase, which --from leaves out"));
  want(c.stages.size() == 1 && c.stages[0].weight_bits <= 8,
       cat(option,
           " finds codes once: it takes one stage of at most 8 bits, such as --stages "
           "w2a16"));
}

}  // namespace

bool allocates(const TrainConfig& config) { return config.target_bits > 0 || config.target_us > 0; }

bool finds_codes(const TrainConfig& config) {
  return config.method == Method::Gptq || config.grid_train != GridTrain::None;
}

bool learns_whole_grid(const TrainConfig& config) {
  return config.e2e_train == EndToEndTrain::All &&
         (config.grid_train == GridTrain::Ratios ||
          (config.grid_train != GridTrain::None && config.stages.empty()));
}

bool trains_blocks(const TrainConfig& config) {
  return !config.stages.empty() && config.block_schedule == BlockSchedule::All &&
         config.method != Method::Gptq;
}

bool adapts_blocks(const TrainConfig& config, size_t stage) {
  return config.lora_rank > 0 && stage > 0;
}

// A rank updates and quantizes its part of a matrix element by element, group by group. Muon's
// steps need whole matrices; LC, learned grids and adapters make weights and gradients from them.
bool shards_whole(const TrainConfig& config, size_t stage) {
  const bool whole_steps = config.optimizer == autograd::UpdateRule::Muon;
  const bool whole_weights =
      config.quantizer == Quantizer::Lc || learns_whole_grid(config) || adapts_whole(config, stage);
  return config.comm->size() > 1 && config.e2e_train == EndToEndTrain::All && !whole_steps &&
         !whole_weights;
}

bool adapts_whole(const TrainConfig& config, size_t stage) {
  const bool blocks = !config.stages.empty() && config.block_schedule == BlockSchedule::All;
  return config.lora_rank > 0 && config.e2e_train == EndToEndTrain::All &&
         (stage > 0 || blocks || !config.from.empty());
}

int64_t steps_per_pass(const TrainConfig& config) {
  return std::max<int64_t>(1, config.samples / config.e2e_batch);
}

int64_t own_batch(const TrainConfig& config) {
  return std::max<int64_t>(1, config.batch / config.comm->size());
}

int64_t own_e2e_batch(const TrainConfig& config) { return config.e2e_batch / config.comm->size(); }

int64_t own_micro_batch(const TrainConfig& config) {
  return std::gcd(config.e2e_micro_batch, own_e2e_batch(config));
}

TrainConfig without_comm(TrainConfig config) {
  const engine::Comm& comm = *config.comm;
  config.comm = std::make_shared<engine::Comm>(comm.rank(), comm.size(), comm.host_ranks());
  return config;
}

TrainConfig resolve(TrainConfig c, const models::LlamaConfig& model, engine::DeviceType device) {
  const bool automatic = c.e2e_steps == TrainConfig::kAutoSteps;
  if (automatic) c.e2e_steps = 0;  // not a number that an option can hold
  visit(c, []<typename T>(const T& value, const Field& f) {
    if (const std::string text = option_text(value, f); !text.empty()) parse<T>(text, f);
  });
  if (automatic) c.e2e_steps = TrainConfig::kAutoSteps;
  for (const Stage& s : c.stages) check_stage(s, "--stages");
  want(c.method != Method::BlockAp || c.grid_train == GridTrain::None ||
           c.grid_train == GridTrain::ScalesZeros,
       "--method block-ap trains scales and zero points: no --grid-train scales or ratios");
  if (c.method == Method::BlockAp) c.grid_train = GridTrain::ScalesZeros;
  if (finds_codes(c)) check_codes(c);
  want(!c.stages.empty() || c.e2e_steps != 0,
       c.from.empty()
           ? "nothing to train: no --stages and no --e2e-steps"
           : "--from starts the end-to-end phase: --e2e-steps 0 leaves nothing to train");
  want(c.from.empty() || c.stages.empty() || c.block_schedule != BlockSchedule::All,
       "--from starts the end-to-end phase: it takes --stages and --schedule only with "
       "--block-schedule stochastic or prefix");
  want(!c.stages.empty() || c.block_schedule == BlockSchedule::All,
       "--block-schedule switches blocks stage by stage: it needs --stages");
  if (c.e2e_train == EndToEndTrain::Auto)
    c.e2e_train = finds_codes(c) && !c.stages.empty() ? EndToEndTrain::Scales : EndToEndTrain::All;
  resolve_grid(c, model);
  const bool algorithm2 = c.block_schedule != BlockSchedule::All;
  const bool blocks = !c.stages.empty() && !algorithm2;
  if (c.stages.empty()) {
    c.lr.clear();
  } else {
    want(!trains_blocks(c) || c.val_samples > 0, "--val-samples must be at least 1");
    want(!blocks || c.batch <= c.samples,
         cat("--batch is ", c.batch, ", but must be between 1 and --samples ", c.samples));
    if (c.method == Method::Gptq)
      c.lr.clear();
    else
      spread_rates(c.lr, c.stages.size(), "--lr", [&](size_t t) {
        const bool low = c.stages[t].weight_bits <= 2;
        if (!blocks) return (low ? kAllFirst : kStageHigh).at(model.d_model);
        return (low ? kStageLow : kStageHigh).at(model.d_model);
      });
    want(c.target == Target::Full || c.input_stream == InputStream::Same,
         "--target follow takes the target from a block's own input: it needs --input-stream same");
    want(!c.extrapolate || trains_blocks(c), "--extrapolate is for blocks that train");
    want(!c.extrapolate || c.extrapolate->samples >= c.batch,
         cat("--extrapolate asks for fewer samples than --batch ", c.batch));
  }
  resolve_end_to_end(c, model, device);

  const Stage last = !c.e2e_stages.empty() ? c.e2e_stages.back()
                     : c.stages.empty()    ? Stage{c.bits, c.act_bits}
                                           : c.stages.back();
  want(c.bits == 0 || c.bits == last.weight_bits,
       cat("the result has ", c.bits, " bits, but the last stage has ", last.weight_bits));
  want(last.weight_bits <= 8, cat("the result cannot have ", last.weight_bits, " bits"));
  c.bits = last.weight_bits;
  c.act_bits = last.activation_bits;
  if (allocates(c)) check_allocation(c, model, device);
  if (c.quantizer == Quantizer::Lc) check_lc(c, model);
  if (c.quantizer == Quantizer::Seq) check_seq(c);
  want(c.ste == Ste::Clip || c.grid_train == GridTrain::None,
       "--grid-train has an estimator of its own, since clipped weights move the scale: no --ste");
  if (c.optimizer == autograd::UpdateRule::Muon) check_muon(c);
  resolve_lora(c, model);
  want(model.max_position == 0 || c.seq_len <= model.max_position,
       cat("--seq-len ", c.seq_len, " is longer than the model's ", model.max_position,
           " positions"));
  const int ranks = c.comm->size();
  const auto shared = [&](int64_t batch, const char* option) {
    want(batch % ranks == 0, cat(ranks, " ranks cannot share ", option, " ", batch,
                                 " evenly: give a multiple of ", ranks));
  };
  if (blocks) shared(c.batch, "--batch");
  if (algorithm2 || !c.e2e_stages.empty()) shared(c.e2e_batch, "--e2e-batch");
  c.memory.sharers = c.comm->host_ranks();
  if (device == engine::DeviceType::Cpu) c.gemm_algorithms = GemmAlgorithms::Heuristic;
  if (c.threads <= 0)
    c.threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  return c;
}

}  // namespace bbb::train
