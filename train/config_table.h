// The table of TrainConfig's fields, and the conversion between an option's text and a field's
// value. The command line, run.json and the checks visit the table. To add an option, add a field
// to TrainConfig and an entry here.
#pragma once

#include <algorithm>
#include <charconv>

#include "quant/check.h"
#include "train/config.h"

namespace bbb::train {

struct Rule {
  const char* expected = "a text";    // for error messages; of an enumeration: its words, in order
  bool (*accepts)(double) = nullptr;  // a number, or each one of a list; null: accepts all
  double unit = 1;                    // the field's value = unit x the number in the text
};
// Sums and products of two of them do not overflow.
inline constexpr double kMostCounted = 2147483647;
inline constexpr Rule kNatural{"a whole number from 0 to 2147483647",
                               [](double x) { return x >= 0 && x <= kMostCounted; }};
inline constexpr Rule kPositive{"a whole number from 1 to 2147483647",
                                [](double x) { return x >= 1 && x <= kMostCounted; }};
inline constexpr Rule kTwoOrMore{"a whole number from 2 to 2147483647",
                                 [](double x) { return x >= 2 && x <= kMostCounted; }};
inline constexpr Rule kSeed{"a whole number of at least 0", [](double x) { return x >= 0; }};
inline constexpr Rule kTokenId{"a token id from 0 to 2147483647", kNatural.accepts};
inline constexpr Rule kGroupSize{"32, 64 or 128",
                                 [](double x) { return x == 32 || x == 64 || x == 128; }};
inline constexpr Rule kRate{"a rate above 0, at most 1", [](double x) { return x > 0 && x <= 1; }};
inline constexpr Rule kRates{"rates above 0, at most 1, with commas between them", kRate.accepts};
inline constexpr Rule kShare{
    "a number between 0 and 1, neither of them",  // the device takes a float
    [](double x) { return float(x) > 0 && float(x) < 1; }};
inline constexpr Rule kGigabytes{"a number of GB from 1e-6 to 1e6",
                                 [](double x) { return x >= 1e-6 && x <= 1e6; }, 1e9};
inline constexpr Rule kStageList{"stages such as w2a16, with commas between them"};
inline constexpr Rule kRunLength{"samples and epochs such as 4096x6"};
inline constexpr Rule kSnapWords{"auto, on, off"};
inline constexpr Rule kRecomputeWords{"none, attention, block"};

struct Field {
  const char* name;             // of the option; the JSON key has _ for -
  const char* group = nullptr;  // heading in the help; null: no option
  const char* help = "";
  Rule rule = {};
  const char* unset = nullptr;  // the option's text for T{}; null: write(T{})
};

inline constexpr Rule kModelStageList{
    "stages and passes such as w2a16:6, with commas between them"};
inline constexpr Rule kRatios{"a ratio above 0 and below 1, or two with a comma between them",
                              [](double x) { return x > 0 && x < 1; }};
inline constexpr Rule kFraction{"a number of at least 0, below 1",
                                [](double x) { return x >= 0 && x < 1; }};
inline constexpr Rule kNotNegative{"a number of at least 0", [](double x) { return x >= 0; }};
inline constexpr Rule kAboveZero{"a number above 0", [](double x) { return float(x) > 0; }};
inline constexpr Rule kRatio{"a ratio above 0, at most 1",
                             [](double x) { return x > 0 && x <= 1; }};
inline constexpr Rule kPrecisions{
    "8 and fewer of 4, 3 and 2 bits, in this order, with commas between them",
    [](double x) { return x == 8 || x == 4 || x == 3 || x == 2; }};
inline constexpr Rule kRangeWords{"minmax, search"};

inline constexpr const char* kRun = "";
inline constexpr const char* kGrid = "Grid of weights and activations";
inline constexpr const char* kMemory = "Memory (results do not depend on it)";
inline constexpr const char* kBlocks = "Block by block";
inline constexpr const char* kEndToEnd = "End to end";

// The fields that parse_stages() and parse_recompute() also use.
inline constexpr Field kStages{"stages", kBlocks,
                               "widths of weights and activations, in order; \"\": no block phase",
                               kStageList, ""};
inline constexpr Field kRecompute{
    "recompute", kMemory,
    "activations made again in the backward pass: none, attention, block (its halves), or auto: "
    "the first that fits",
    kRecomputeWords, "auto"};

// Calls visitor(value, field) for every field that run.json stores, in the order of the file.
template <typename Config, typename Visitor>
void visit_stored(Config& c, const Visitor& v) {
  v(c.model, {"model", kRun, "directory or GGUF file"});
  v(c.data, {"data", kRun, ".txt, or .jsonl with a \"text\" or a chat's \"messages\" a line"});
  v(c.stages, kStages);
  v(c.bits, {"bits"});
  v(c.act_bits, {"act-bits"});
  v(c.group, {"group-size", kRun, "input features that share a scale: 32, 64 or 128", kGroupSize});
  v(c.quantizer,
    {"quantizer",
     kGrid,
     "of weights: minmax (groups with a scale and a zero point), seq (a scale alone, levels on "
     "both sides of 0; at most 4 bits), or lc (an affine map of codes in vectors of four, between "
     "Hadamard transforms; w2a16)",
     {"minmax, seq, lc"}});
  v(c.lc_map,
    {"lc-map", kGrid, "of lc: scalar, orthonormal, or learned", {"scalar, orthonormal, learned"}});
  v(c.lc_gradient, {"lc-gradient",
                    kRun,
                    "of lc, through the rounding: dge (a smooth step's), or ste (straight)",
                    {"dge, ste"}});
  v(c.lc_scale_rate,
    {"lc-scale-rate", kRun, "of lc: learning rate of its scales and map, as a part of the weights'",
     kRatio});
  v(c.ste,
    {"ste",
     kRun,
     "weights without gradient: clip (more than half a step outside of the range), all (none "
     "is left out), or trust (farther than a distance from their level)",
     {"clip, all, trust"}});
  v(c.ste_trust, {"ste-trust", kRun, "of trust: the distance, in half steps", kAboveZero});
  v(c.range, {"range", kGrid, "of weights: minmax, or search (weighted by the input's energy)",
              kRangeWords});
  v(c.rotate,
    {"rotate", kGrid, "none, or group: a Hadamard transform inside every group", {"none, group"}});
  v(c.ocs_ratio,
    {"ocs-ratio", kGrid,
     "channels to split: the mean ratio (half of it in the first block, one and a half in the "
     "last), or FIRST,LAST",
     kRatios, "none"});
  v(c.ocs_metric, {"ocs-metric",
                   kGrid,
                   "of the channels to split: l2-mean, l2-max, act-max, weight-max or kurtosis",
                   {"l2-mean, l2-max, act-max, weight-max, kurtosis"}});
  v(c.split_side, {"split-side",
                   kGrid,
                   "what a split halves: weight, activation or auto",
                   {"weight, activation, auto"}});
  v(c.target_bits, {"target-bits", kGrid,
                    "bits a weight of all linears: gives each of a layer's four inputs the bits "
                    "(2, 3 or 4), split channels and outliers that lose least",
                    kAboveZero, "none"});
  v(c.target_us, {"target-us", kGrid,
                  "the same for microseconds a token: of all products of one row on this device",
                  kAboveZero, "none"});
  v(c.act_range, {"act-range", kGrid, "of activations: minmax or search", kRangeWords});
  v(c.act_outliers, {"act-outliers", kGrid,
                     "channels of every input that keep 8 bits; rounded up to groups", kNatural});
  v(c.down_kurtosis,
    {"down-kurtosis", kGrid,
     "down-projections whose input's kurtosis is above it take 4-bit activations; 0: none",
     kNotNegative});
  v(c.any_precision,
    {"any-precision", kGrid, "bits of weights to train at once, as one nested code: 8,4,2",
     kPrecisions, "none"});
  v(c.nested_dequant,
    {"nested-dequant", kGrid, "middle or floor of a nested code's bin", {"middle, floor"}});
  v(c.from, {"from", kRun, "a finished run whose result is the start"});
  v(c.samples, {"samples", kRun, "training windows", kPositive});
  v(c.seq_len, {"seq-len", kRun, "tokens a window", kTwoOrMore});
  v(c.val_samples, {"val-samples", kRun, "validation windows, from the end of the text", kNatural});
  v(c.epochs, {"epochs", kBlocks, "passes over the samples, each stage", kPositive});
  v(c.batch, {"batch", kBlocks, "windows a step", kPositive});
  v(c.optimizer, {"optimizer",
                  kRun,
                  "of the linears' weights: adamw, or muon; all else takes adamw",
                  {"adamw, muon"}});
  v(c.lora_rank,
    {"lora-rank", kRun,
     "of low-rank adapters: the first stage of the run trains the weights, every later one freezes "
     "them and trains adapters A and B; 0: none",
     kNatural});
  v(c.lora_alpha, {"lora-alpha", kRun, "a weight with adapters is W + X A B", kAboveZero});
  v(c.lora_end, {"lora-end",
                 kRun,
                 "when their stage ends: merge adapters into the weights, or discard them",
                 {"merge, discard"}});
  v(c.lora_match,
    {"lora-match",
     kRun,
     "what of a block's output is held to the full-precision one while its adapters train: none, "
     "moments (means and deviations of channels), kl or both; auto: moments",
     {"auto, none, moments, kl, both"}});
  v(c.lora_match_weight,
    {"lora-match-weight", kRun, "of that, beside the mean squared error", kNotNegative});
  v(c.lr,
    {"lr", kBlocks, "one rate, or one a stage; default: by the model's width", kRates, "auto"});
  v(c.input_stream,
    {"input-stream", kBlocks, "what a stage is fed: same, higher or mix", {"same, higher, mix"}});
  v(c.target, {"target",
               kBlocks,
               "the full-precision output on the full-precision stream (full: corrects the error "
               "of earlier blocks) or on the block's own input (follow)",
               {"full, follow"}});
  v(c.method, {"method",
               kBlocks,
               "blocks: trains them; gptq: rounds their weights one by one and feeds the error of "
               "each to those that follow; block-ap: EfficientQAT's, scales and zero points train "
               "with the weights",
               {"blocks, gptq, block-ap"}});
  v(c.grid_train,
    {"grid-train",
     kBlocks,
     "what of the grid trains with the weights, in blocks or end to end: none, scales, "
     "scales-zeros or ratios (of ranges)",
     {"none, scales, scales-zeros, ratios"}});
  v(c.grid_lr, {"grid-lr", kBlocks, "rate of learned scales, zero points and ratios", kRate});
  v(c.block_schedule,
    {"block-schedule",
     kBlocks,
     "all: block by block; stochastic, prefix: the whole model end to end, a stage switches some "
     "blocks, drawn or the first ones",
     {"all, stochastic, prefix"}});
  v(c.first_ratio,
    {"first-ratio", kBlocks,
     "stochastic, prefix: the part of the blocks that the first stage switches", kRatio});
  v(c.depth_bias, {"depth-bias", kBlocks,
                   "stochastic: block j of B is drawn with weight (B + 1 - j)^X", kNotNegative});
  v(c.seed, {"seed", kRun, "of every shuffle", kSeed});
  v(c.e2e_stages,
    {"e2e-stages", kEndToEnd,
     "widths and passes over the samples: w2a16:6,w2a2:4; default: one stage at the blocks' widths",
     kModelStageList, ""});
  v(c.e2e_steps,
    {"e2e-steps", kEndToEnd,
     "most optimizer steps of a stage; 0: none; auto: its passes, or without --e2e-stages two "
     "passes after blocks, six without",
     kNatural, "auto"});
  v(c.e2e_batch, {"e2e-batch", kEndToEnd, "windows a step", kPositive});
  v(c.e2e_micro_batch,
    {"e2e-micro-batch", kEndToEnd, "windows that go through the model at once; default: by device",
     kPositive, "auto"});
  v(c.e2e_loss, {"e2e-loss",
                 kEndToEnd,
                 "kl or jsd (Jensen-Shannon, to the full-precision model), or ce (the text)",
                 {"kl, ce, jsd"}});
  v(c.e2e_jsd_beta,
    {"e2e-jsd-beta", kEndToEnd, "of jsd: the full-precision model's share of the mixture", kShare});
  v(c.e2e_train,
    {"e2e-train",
     kEndToEnd,
     "all weights, or scales; auto: all, but scales behind gptq, block-ap and learned grids",
     {"auto, scales, all"}});
  v(c.e2e_embedding, {"e2e-embedding",
                      kEndToEnd,
                      "of --e2e-train all: keep embedding, head and final norm, or train them too",
                      {"keep, train"}});
  v(c.e2e_moments, {"e2e-moments",
                    kEndToEnd,
                    "moments of the optimizer: wide (6 bytes a weight), or 8bit (2 bytes)",
                    {"wide, 8bit"}});
  v(c.e2e_lr, {"e2e-lr", kEndToEnd, "one rate, or one a stage; default: by the model's width",
               kRates, "auto"});
  v(c.e2e_snap, {"e2e-snap", kEndToEnd,
                 "masters to the middle of their bins first: auto, on or off", kSnapWords});
  v(c.e2e_average,
    {"e2e-average", kEndToEnd,
     "decay of a running average of the weights, which is the result; 0: none", kFraction});
  v(c.e2e_damping,
    {"e2e-damping", kEndToEnd, "rate of a gradient that pulls weights to the middle of their bins",
     kNotNegative});
  v(c.e2e_freeze, {"e2e-freeze",
                   kEndToEnd,
                   "none, or flips: weights whose code keeps changing stop",
                   {"none, flips"}});
  v(c.save_every,
    {"save-every", kRun,
     "steps between states from which a killed run continues; default: by the clock, at most a "
     "twentieth of the time",
     kPositive, "auto"});
  v(c.pack,
    {"pack",
     kRun,
     "stream: a token attends to all before it in its window; documents: to those of its own "
     "document",
     {"stream, documents"}});
  v(c.doc_end,
    {"doc-end", kRun, "token id after each document, instead of the vocabulary's own", kTokenId});
  v(c.threads, {"threads"});  // an option of every command
  v(c.gemm_algorithms, {"gemm-algorithms", nullptr, "", {"timed, heuristic"}});
}

// Calls visitor(value, field) for every field.
template <typename Config, typename Visitor>
void visit(Config& c, const Visitor& v) {
  visit_stored(c, v);
  v(c.out, {"out", kRun, "directory of the run; an interrupted one continues"});
  v(c.memory.device_bytes,
    {"gpu-memory", kMemory, "GB of the device to use; default: what it has left", kGigabytes});
  v(c.memory.host_bytes,
    {"host-memory", kMemory,
     "GB of host memory for the streams between blocks; default: most of it", kGigabytes});
  v(c.memory.scratch, {"scratch", kMemory, "directory for streams that fit in neither"});
  v(c.memory.recompute, kRecompute);
  v(c.memory.teacher,
    {"teacher",
     kMemory,
     "the full-precision model of end-to-end training: beside (a part of every step), cached (its "
     "last hidden states, from one pass), or auto: cached if it fits",
     {"beside, cached"},
     "auto"});
  v(c.extrapolate,
    {"extrapolate", kBlocks,
     "SAMPLESxEPOCHS: say what so long a run would take, from this one's times", kRunLength});
}

// "a, b,c" -> {"a", "b", "c"}.
std::vector<std::string> split(const std::string& text);

// Parses `text` into `value`. Returns false if the text is not a T or the rule does not accept it.
bool read(const std::string& text, Stage& value, const Rule&);
bool read(const std::string& text, ModelStage& value, const Rule&);
bool read(const std::string& text, RunLength& value, const Rule&);
template <typename T>
bool read(const std::string& text, T& value, const Rule& rule) {
  if constexpr (std::is_same_v<T, std::string>) {
    value = text;
    return !text.empty();
  } else if constexpr (requires { value.has_value(); }) {
    return read(text, value.emplace(), rule);
  } else if constexpr (requires { value.emplace_back(); }) {
    value.clear();
    return std::ranges::all_of(split(text), [&](const std::string& word) {
      return read(word, value.emplace_back(), rule);
    });
  } else if constexpr (std::is_enum_v<T>) {
    const std::vector<std::string> words = split(rule.expected);
    value = static_cast<T>(std::ranges::find(words, text) - words.begin());
    return static_cast<size_t>(value) < words.size();
  } else if (rule.unit != 1) {
    double number = 0;
    if (!read(text, number, {rule.expected, rule.accepts})) return false;
    value = static_cast<T>(number * rule.unit);
    return true;
  } else {
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    return error == std::errc() && end == text.data() + text.size() &&
           (rule.accepts == nullptr || rule.accepts(static_cast<double>(value)));
  }
}

// The inverse of read(). Returns "" for an option that is not set.
template <typename T>
std::string write(const T& value, const Rule& rule) {
  if constexpr (requires { value.has_value(); }) {
    return value ? write(*value, rule) : "";
  } else if constexpr (requires(T list) { list.emplace_back(); }) {
    std::string text;
    for (const auto& element : value) text += (text.empty() ? "" : ",") + write(element, rule);
    return text;
  } else if constexpr (std::is_enum_v<T>) {
    return split(rule.expected).at(static_cast<size_t>(value));
  } else {
    if constexpr (std::is_arithmetic_v<T>)
      if (rule.unit != 1) return value == 0 ? "" : cat(static_cast<double>(value) / rule.unit);
    return cat(value);
  }
}

// Converts a field's value to the text of its option, and back. parse() throws UsageError that
// names the option and what it expects.
template <typename T>
std::string option_text(const T& value, const Field& f) {
  return f.unset != nullptr && value == T{} ? f.unset : write(value, f.rule);
}
template <typename T>
T parse(const std::string& text, const Field& f) {
  T value{};
  if (f.unset != nullptr && text == f.unset) return value;
  if (!read(text, value, f.rule))
    throw UsageError(cat("--", f.name, " is '", text, "'; it takes ", f.rule.expected,
                         f.unset != nullptr ? cat(" or '", f.unset, "'") : ""));
  return value;
}

}  // namespace bbb::train
