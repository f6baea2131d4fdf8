// bbb train: blocks, stage by stage, then the whole model end to end.
#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <optional>
#include <set>

#include "cuda/nccl_comm.h"
#include "tools/config_options.h"
#include "tools/ranks.h"
#include "train/memory_plan.h"
#include "train/run_directory.h"
#include "train/train.h"

namespace bbb::tools {

namespace {

// A run that starts from another one keeps its grid and its model, and with its text the windows,
// except for what was typed.
void inherit(train::TrainConfig& config, const CommandLine& line) {
  const train::TrainConfig earlier = train::RunDirectory(config.from).identity().config;
  const bool same_text = !line.has("data");
  const auto kept = [&](const std::string& name) {
    if (name == "model") return !line.has("synthetic");
    for (const char* of_text :
         {"data", "samples", "val-samples", "seq-len", "doc-end", "pack", "e2e-batch"})
      if (name == of_text) return same_text;
    return name == "group-size";
  };
  std::map<std::string, std::string> texts;
  train::visit(earlier, [&](const auto& value, const train::Field& f) {
    texts[f.name] = train::option_text(value, f);
  });
  train::visit(config, [&]<typename T>(T& value, const train::Field& f) {
    // Ranges of activations are the last stage's own affair.
    const bool grid = f.group != nullptr && f.group == std::string(train::kGrid) &&
                      f.name != std::string("act-range");
    if ((grid || kept(f.name)) && !line.has(f.name) && !texts[f.name].empty())
      value = train::parse<T>(texts[f.name], f);
  });
}

// What nobody typed gives way to what other options exclude: defaults, and the grid of the run from
// which this one starts.
void adapt_untyped(train::TrainConfig& config, const CommandLine& line) {
  const auto other_width = [](const train::Stage& s) {
    return s.weight_bits != quant::kNestedBits;
  };
  if (!line.has("any-precision") && (std::ranges::any_of(config.stages, other_width) ||
                                     std::ranges::any_of(config.e2e_stages, other_width)))
    config.any_precision.clear();
  // A target chooses splits and widths: other options cannot fix them, and there is one target.
  if ((line.has("target-bits") && config.target_bits > 0) ||
      (line.has("target-us") && config.target_us > 0)) {
    if (!line.has("target-bits")) config.target_bits = 0;
    if (!line.has("target-us")) config.target_us = 0;
    if (!line.has("ocs-ratio")) config.ocs_ratio.clear();
    if (!line.has("any-precision")) config.any_precision.clear();
  } else if (line.has("ocs-ratio") || line.has("any-precision")) {
    config.target_bits = config.target_us = 0;
  }
  const bool nested = !config.any_precision.empty();
  const bool lc = config.quantizer == train::Quantizer::Lc;
  if ((nested || lc) && !line.has("range")) config.range = train::RangeRule::MinMax;
  if (lc && !line.has("rotate")) config.rotate = train::Rotate::None;
  if (line.has("stages") || line.has("schedule")) return;
  const bool algorithm2 = config.block_schedule != train::BlockSchedule::All;
  const bool ratios = config.grid_train == train::GridTrain::Ratios;  // end to end, too
  if (algorithm2 || config.method != train::Method::Blocks ||
      (train::finds_codes(config) && !ratios) ||
      (line.text("e2e-steps") == "0" && config.from.empty()))
    config.stages = {{.weight_bits = nested ? quant::kNestedBits : 2}};
}

int lowest_activation_bits(const train::TrainConfig& config) {
  int bits = 16;
  for (const train::Stage& s : config.stages) bits = std::min(bits, s.activation_bits);
  for (const train::ModelStage& s : config.e2e_stages) bits = std::min(bits, s.activation_bits);
  return bits;
}

// Why the run does not use an option, or "". Algorithm 2 trains the whole model with the end-to-end
// phase's options, in the block phase's stages.
std::string reason_unused(const train::TrainConfig& config, const train::Field& f) {
  const std::string name = f.name, group = f.group;
  const bool algorithm2 = config.block_schedule != train::BlockSchedule::All;
  std::set<std::string> used = {"stages", "block-schedule", "batch", "e2e-steps"};
  if (algorithm2) used.insert({"lr", "epochs", "first-ratio", "depth-bias"});
  const bool ratios = config.grid_train == train::GridTrain::Ratios;
  const bool grid = config.grid_train != train::GridTrain::None && config.stages.empty();
  if ((ratios || grid) && config.e2e_train != train::EndToEndTrain::Scales)
    used.insert({"grid-train", "grid-lr"});
  const bool of_last_stages = name == "e2e-stages" || name == "e2e-lr";
  if (group == train::kEndToEnd && config.e2e_steps == 0 && !used.count(name) &&
      (!algorithm2 || of_last_stages))
    return "there is no end-to-end phase";
  if (group == train::kBlocks && train::block_stages(config) == 0 && !used.count(name))
    return "there is no block phase";
  if (group == train::kBlocks && !algorithm2 && !train::trains_blocks(config) &&
      !used.count(name) && name != "method")
    return "--method gptq does not train";
  if (name == "grid-lr" && config.grid_train == train::GridTrain::None &&
      config.method != train::Method::BlockAp)
    return "no grid trains without --grid-train";
  if (name == "teacher" && config.e2e_steps == 0 && !algorithm2)
    return "there is no end-to-end phase";
  if (name == "teacher" && config.e2e_loss == train::EndToEndLoss::CrossEntropy)
    return "--e2e-loss ce has no teacher";
  if (name == "first-ratio" && !algorithm2)
    return "--block-schedule all switches all blocks at once";
  if (name == "depth-bias" && config.block_schedule != train::BlockSchedule::Stochastic)
    return "only --block-schedule stochastic draws blocks";
  const bool scales = config.e2e_train == train::EndToEndTrain::Scales ||
                      (config.e2e_train == train::EndToEndTrain::Auto &&
                       (config.method != train::Method::Blocks ||
                        (train::finds_codes(config) && !config.stages.empty())));
  // Stages that adapters may have in front of them, or be in.
  const size_t of_blocks = config.stages.size();
  size_t stages = of_blocks + (config.from.empty() ? 0 : 1);
  if (config.e2e_steps != 0 && !scales) stages += std::max<size_t>(1, config.e2e_stages.size());
  if (name.starts_with("lora-") && name != "lora-rank" && config.lora_rank == 0)
    return "there are no adapters without --lora-rank";
  if (name == "lora-rank" && config.lora_rank > 0 && stages < 2)
    return "adapters train from the second stage on, and there is one";
  if (name.starts_with("lora-match") && (algorithm2 || of_blocks < 2))
    return "no block has a stage with adapters";
  if (name == "e2e-embedding" && scales) return "--e2e-train scales trains scales alone";
  if (name == "e2e-jsd-beta" && config.e2e_loss != train::EndToEndLoss::JensenShannon)
    return "--e2e-loss is not jsd";
  if (name == "ste-trust" && config.ste != train::Ste::Trust) return "--ste is not trust";
  if (name == "ste" && scales && !train::trains_blocks(config))
    return "--e2e-train scales trains scales alone";
  const char* in_grid = unused_in_grid(config, name, lowest_activation_bits(config));
  return in_grid != nullptr ? in_grid : "";
}

void name_unused(const train::TrainConfig& config, const CommandLine& line) {
  train::visit(config, [&](const auto&, const train::Field& f) {
    if (f.group == nullptr || !line.has(f.name)) return;
    const std::string reason = reason_unused(config, f);
    if (!reason.empty()) fmt::print(stderr, "--{} is unused: {}\n", f.name, reason);
  });
}

// Whether the end-to-end phase fits, with as much recomputed as can be, and either teacher unless
// one is set.
bool whole_model_fits(engine::Backend& backend, const models::Checkpoint& source,
                      const train::TrainConfig& config) {
  const train::TrainConfig resolved = train::resolve(config, source.config(), backend.device());
  const auto fits = [&](train::TeacherStates teacher) {
    return train::count_end_to_end_memory(backend, source.config(), resolved,
                                          models::Recompute::Block, teacher)
               .device_bytes <= train::tensor_room(backend, resolved.memory);
  };
  if (resolved.memory.teacher) return fits(*resolved.memory.teacher);
  return fits(train::TeacherStates::Beside) || fits(train::TeacherStates::Cached);
}

void train_as_rank(const CommandLine& line, train::TrainConfig config,
                   std::shared_ptr<engine::Comm> comm, int local_rank);

}  // namespace

int train_command(const Arguments& arguments) {
  CommandLine line("train", "Train a checkpoint down to 2-bit weights");
  // The defaults are what measured best (README, "Measured"): the whole model end to end, ranges
  // searched, groups rotated.
  train::TrainConfig config;
  config.range = config.act_range = train::RangeRule::Search;
  config.rotate = train::Rotate::Group;
  const auto every = [](const train::Field&) { return true; };
  add_config_options(line, config, nullptr, every);
  line.options()  //
      ("synthetic",
       cat("instead of --model: random weights, byte tokens: ", models::kSyntheticSizes),
       cxxopts::value<std::string>())  //
      ("schedule",
       "instead of --stages, the paper's: A weights, then activations; B alternating; C cyclic",
       cxxopts::value<std::string>())  //
      ("to", "where --schedule ends: w2a16 or w2a2; B ends at w2a2",
       cxxopts::value<std::string>()->default_value("w2a16"))                    //
      ("deterministic", "no algorithm of a matrix product is chosen by timing")  //
      ("dry-run", "say what memory, disk and time the run will take, and write nothing");
  add_rank_options(line);
  if (!line.parse(arguments)) return 0;

  read_config_options(config, line, every);
  const bool starts_from = !config.from.empty();
  if (starts_from) inherit(config, line);
  if (line.has("synthetic")) {
    if (line.has("model")) throw UsageError("give one of --model and --synthetic");
    config.model = cat(data::kSyntheticPrefix, line.text("synthetic"));
  }
  if (config.model.empty()) line.required("model");
  if (config.data.empty()) line.required("data");
  line.required("out");
  if (line.text("e2e-steps") == "auto") config.e2e_steps = train::TrainConfig::kAutoSteps;
  if (line.has("schedule")) {
    if (line.has("stages")) throw UsageError("give one of --schedule and --stages");
    const char schedule = "ABC"[line.choice("schedule", {"A", "B", "C"})];
    const size_t to = line.choice("to", {"w2a16", "w2a2"});
    const bool quantizes_both = line.has("to") ? to == 1 : schedule == 'B';
    config.stages = train::scheduled_stages(schedule, {2, quantizes_both ? 2 : 16});
  } else if (line.has("to")) {
    throw UsageError("--to says where a schedule ends: it needs --schedule A, B or C");
  }
  adapt_untyped(config, line);
  config.dry_run = line.has("dry-run");
  if (line.has("deterministic")) config.gemm_algorithms = train::GemmAlgorithms::Heuristic;
  const int ranks = ranks_asked(line);
  if (config.dry_run) {  // of the first of them
    train_as_rank(line, config,
                  std::make_shared<engine::Comm>(0, std::max(1, ranks), std::max(1, ranks)), 0);
    return 0;
  }
  return run_as_rank(ranks, "train", arguments, [&](const auto& comm, int local_rank) {
    train_as_rank(line, config, comm, local_rank);
  });
}

namespace {

// The text's tokens, which the first rank makes on all cores, of a model that it finds finite.
data::TokenStream tokens_for_all(const models::Checkpoint& source, const data::Tokenizer& tokenizer,
                                 const train::TrainConfig& config) {
  engine::Comm& comm = *config.comm;
  data::TokenStream tokens;
  if (comm.first()) {
    source.check_finite();
    tokens = train::training_tokens(source, tokenizer, config);
  }
  if (comm.size() == 1 || config.dry_run) return tokens;
  return {from_first_rank(comm, tokens.ids), from_first_rank(comm, tokens.counted),
          from_first_rank(comm, tokens.starts)};
}

void train_as_rank(const CommandLine& line, train::TrainConfig config,
                   std::shared_ptr<engine::Comm> comm, int local_rank) {
  const bool starts_from = !config.from.empty();
  if (comm->first()) name_unused(config, line);
  if (config.act_outliers % config.group != 0)
    fmt::print("--act-outliers {} is rounded up to whole groups of {}\n", config.act_outliers,
               config.group);
  const auto source = models::open_checkpoint(config.model);
  // One outlier group halves the perplexity of 2-bit activations.
  const int64_t narrowest = std::min(source->config().d_model, source->config().hidden);
  if (!line.has("act-outliers") && !starts_from && lowest_activation_bits(config) < 4 &&
      config.group < narrowest)
    config.act_outliers = config.group;
  const auto tokenizer = data::load_tokenizer(config.model);
  // A run continues on the device and with the threads with which it began: it ends with the same
  // bytes on a machine with other cores.
  const train::RunDirectory run(config.out);
  std::optional<train::TrainConfig> begun;
  std::string device = rank_device(line);
  config.threads = line.threads();
  if (run.exists()) {
    const train::RunIdentity identity = run.identity();
    begun = identity.config;
    if (!line.has("device") && !line.has("gpus")) device = identity.device;
    if (!line.has("threads") && device == "cpu") config.threads = begun->threads;
  }
  const auto backend = make_rank_backend(device, config.threads, *comm, local_rank);
  if (comm->size() > 1 && !config.dry_run && backend->device() == engine::DeviceType::Cuda)
    comm = cuda::make_nccl_comm(*backend, comm);
  config.comm = comm;
  backend->check_head_size(source->config().head_dim);

  const auto typed = [&](const char* option) { return line.has(option); };
  const int64_t positions = source->config().max_position;
  // What is impossible with any text is refused before the text is read.
  train::resolve(train::fit_to_data(config, typed, positions, INT64_MAX), source->config(),
                 backend->device());
  const data::TokenStream tokens = tokens_for_all(*source, *tokenizer, config);
  const auto count = static_cast<int64_t>(tokens.ids.size());
  const bool by_default = !line.has("stages") && !line.has("method") && !line.has("grid-train") &&
                          !line.has("schedule") && !line.has("e2e-stages") &&
                          line.text("e2e-steps") == "auto" && !starts_from;
  // A run that exists has decided this already; otherwise it must fit on every rank.
  const auto fits = [&] {
    const train::TrainConfig asked = train::fit_to_data(config, typed, positions, count);
    return comm->sum({whole_model_fits(*backend, *source, asked) ? 1.0 : 0.0})[0] == comm->size();
  };
  if (by_default && (begun ? begun->e2e_steps == 0 : !fits())) {
    fmt::print("the whole model does not fit for end-to-end training: blocks alone are trained\n");
    config.stages = {train::Stage{}};
    config.e2e_steps = 0;
  }
  train::TrainConfig fitted = config;
  fitted.seq_len = train::fit_to_data(config, typed, positions, count).seq_len;
  const data::Windows windows =
      data::make_windows(tokens, fitted.seq_len, config.data, config.pack);
  // The rest is fitted to the windows: those without a token that counts were left out.
  const auto has_length = [&](const char* option) {
    return option == std::string("seq-len") || typed(option);
  };
  fitted = train::fit_to_data(fitted, has_length, positions, windows.count * fitted.seq_len);
  if (const std::string text = train::describe_fit(config, fitted, positions, count); !text.empty())
    fmt::print("{}\n", text);
  train::train_windows(*backend, *source, windows, fitted, train::Observer{.quiet = !comm->first()},
                       tokenizer.get());
}

}  // namespace

}  // namespace bbb::tools
