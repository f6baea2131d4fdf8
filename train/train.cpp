#include "train/train.h"

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <optional>

#include "data/files.h"
#include "train/block_phase.h"
#include "train/end_to_end.h"
#include "train/gemm_choices.h"
#include "train/run_directory.h"
#include "train/run_file.h"
#include "train/statistics.h"

namespace bbb::train {

using models::LayerResult;

namespace {

const char* describe(models::Recompute recompute) {
  switch (recompute) {
    case models::Recompute::None:
      return "all activations kept";
    case models::Recompute::Attention:
      return "attention recomputed";
    default:
      return "both halves of a block recomputed";
  }
}

void print_plan(const Backend& backend, const models::LlamaConfig& model, const TrainConfig& config,
                OuterStart outer, const BlockMemory* blocks, const PhaseMemory* end_to_end) {
  const auto gigabytes = [](int64_t bytes) { return static_cast<double>(bytes) / 1e9; };
  if (blocks != nullptr) {
    const StreamPlan& streams = blocks->streams;
    const auto count = [&](Tier tier) {
      return static_cast<int>(std::count(streams.tiers.begin(), streams.tiers.end(), tier));
    };
    std::printf(
        "blocks: %.3f GB of tensors, at most %.2f GB of the device, %.2f GB of host memory, %.2f "
        "GB of "
        "scratch files; streams there: %d, %d, %d; %s\n",
        gigabytes(blocks->device_bytes), gigabytes(allocated_bytes(backend, blocks->device_bytes)),
        gigabytes(streams.host_bytes), gigabytes(streams.scratch_bytes), count(Tier::Device),
        count(Tier::Host), count(Tier::File), describe(blocks->recompute));
  }
  if (end_to_end != nullptr)
    std::printf("end to end: %.3f GB of tensors, at most %.2f GB of the device; %s\n",
                gigabytes(end_to_end->device_bytes),
                gigabytes(allocated_bytes(backend, end_to_end->device_bytes)),
                describe(end_to_end->recompute));
  std::printf("results: %.2f GB in %s\n", gigabytes(result_bytes(model, config, outer)),
              config.out.c_str());
  std::fflush(stdout);  // so that the plan is seen before training starts
}

}  // namespace

// The data's tokens, cut into windows.
static data::Windows training_windows(const Checkpoint& source, const data::Tokenizer& tokenizer,
                                      const TrainConfig& config) {
  const int32_t doc_end =
      config.doc_end ? *config.doc_end : tokenizer.document_end(source.stop_ids());
  if (doc_end < 0 || doc_end >= source.config().vocab)
    throw UsageError(
        cat("--doc-end ", doc_end, " is no token of a vocabulary of ", source.config().vocab));
  return data::make_windows(
      data::training_tokens(tokenizer, data::read_documents(config.data), doc_end), config.seq_len,
      config.data);
}

void train(Backend& backend, const Checkpoint& source, const data::Tokenizer& tokenizer,
           TrainConfig config) {
  backend.check_head_size(source.config().head_dim);
  config = resolve(config, source.config(), backend.device());
  source.check_finite();
  train_windows(backend, source, training_windows(source, tokenizer, config), config, Observer(),
                &tokenizer);
}

namespace {

// The length of the block phase or, with --extrapolate, of the run for which it stands.
RunLength run_length_of(const TrainConfig& config) {
  return config.extrapolate.value_or(RunLength{config.samples, config.epochs});
}
int64_t block_steps(const models::LlamaConfig& model, const TrainConfig& config) {
  return model.layers * block_stages(config) * run_length_of(config).epochs *
         (run_length_of(config).samples / config.batch);
}
// Batches through the full-precision blocks.
int64_t target_batches(const models::LlamaConfig& model, const TrainConfig& config) {
  return model.layers * ((run_length_of(config).samples + config.val_samples) / config.batch);
}

// A finished run that another one starts from.
class EarlierRun {
 public:
  EarlierRun(const std::string& path, const models::LlamaConfig& model)
      : run_(path),
        identity_(run_.identity()),
        model_(model),
        statistics_(run_.finished_statistics(identity_.config, model)),
        recipe_(identity_.config, model, statistics_) {
    BBB_CHECK(run_.finished(identity_.config, model.layers), path,
              ": the run is not finished; the same `bbb train` command continues it");
    BBB_CHECK(final_content(identity_.config) == models::LinearContent::Masters, path,
              ": its last stage trained scales: there are no masters to start from");
  }

  const RunIdentity& identity() const { return identity_; }
  LayerResult result(int64_t layer) const { return run_.result(layer, recipe_, model_); }
  models::LoadOuter outer() const { return run_.outer(recipe_); }
  // Empty if the run needed none.
  const std::vector<models::LayerStatistics>& statistics() const { return statistics_; }

 private:
  RunDirectory run_;
  RunIdentity identity_;
  const models::LlamaConfig& model_;
  std::vector<models::LayerStatistics> statistics_;
  Recipe recipe_;
};

// The checksum of the run that this one starts from. Once that run is gone, the one that this run
// has recorded: only its first stage reads it.
std::string from_checksum(const TrainConfig& config, const RunDirectory& own) {
  if (config.from.empty()) return "";
  const RunDirectory run(config.from);
  if (!run.exists() && own.exists()) return own.identity().from_checksum;
  run.identity();  // checks the record
  return data::hex(run.checksum());
}

// Do both take the same channels, of the same groups, as outliers and for splitting?
bool same_orders(const TrainConfig& a, const TrainConfig& b) {
  return a.group == b.group && a.rotate == b.rotate && a.ocs_ratio == b.ocs_ratio &&
         a.ocs_metric == b.ocs_metric && a.split_side == b.split_side &&
         a.act_outliers == b.act_outliers;
}

// The run's statistics: those that it has saved, those of the run that it starts from if both order
// channels alike, or new ones, which are saved.
std::vector<models::LayerStatistics> statistics_of(Backend& backend, const Checkpoint& source,
                                                   const data::Windows& windows,
                                                   const TrainConfig& config,
                                                   const RunDirectory& run,
                                                   const std::optional<EarlierRun>& from,
                                                   const Observer& observer) {
  if (!Recipe::needs_statistics(config)) return {};
  std::vector<models::LayerStatistics> layers = run.statistics(source.config());
  if (!layers.empty()) return layers;
  if (from && same_orders(config, from->identity().config)) layers = from->statistics();
  if (layers.empty()) {
    engine::Progress progress =
        observer.progress("statistics", source.config().layers, engine::Progress::kPatience_s);
    layers = collect_statistics(backend, source, windows, config,
                                [&](int64_t done) { progress.set(done); });
  }
  RunFileWriter writer(run.statistics_file(), run.checksum(), models::declare_statistics(layers));
  models::add_statistics(writer, layers);
  writer.finish();
  return layers;
}

}  // namespace

void train_windows(Backend& backend, const Checkpoint& source, const data::Windows& windows,
                   TrainConfig config, const Observer& observer, const data::Tokenizer* tokenizer) {
  const models::LlamaConfig& model = source.config();
  BBB_CHECK(source.kind() != models::CheckpointKind::Packed, source.path(),
            ": is quantized already; training starts from full precision");
  config = resolve(config, model, backend.device());
  const int64_t wanted = config.samples + (block_stages(config) == 0 ? 0 : config.val_samples);
  BBB_CHECK(windows.seq_len == config.seq_len && windows.count >= wanted, config.data, ": holds ",
            windows.count, " windows of ", windows.seq_len,
            " tokens, but --samples and --val-samples ask for ", wanted);
  for (int32_t id : windows.ids)
    BBB_CHECK(id >= 0 && id < model.vocab, config.data, ": token ", id,
              " is not in the model's vocabulary of ", model.vocab);

  // An existing run is locked before the model is read and memory is planned. A new run is created
  // only once it is known to fit, so that a refused run leaves nothing behind.
  RunDirectory run(config.out);
  // A finished run is not changed: not even the lock is written.
  const bool finished = run.exists() && run.finished(config, model.layers) && !run.has_states();
  if (run.exists() && !finished) run.lock();
  const RunIdentity identity{config,
                             backend.device() == engine::DeviceType::Cuda ? "cuda" : "cpu",
                             backend.device_name(),
                             model_parts(source),
                             tokenizer != nullptr ? tokenizer_parts(*tokenizer) : Parts(),
                             data_checksum(windows),
                             from_checksum(config, run)};
  if (!observer.quiet) std::printf("%s", identity.summary().c_str());
  if (finished) {
    run.check_identity(identity);
  } else if (run.exists()) {
    run.create_or_resume(identity);
    run.remove_spent_states(config, model.layers);
  }
  if (run.exists() && run.finished(config, model.layers)) {
    if (!observer.quiet) std::printf("%s: finished already\n", config.out.c_str());
    return;
  }
  // The earlier run is read for the statistics and for the first stage, until both are saved.
  std::optional<EarlierRun> from;
  const auto saved = [](const std::string& file) { return std::filesystem::exists(file); };
  const std::string first_stage = run.whole_stage_file(Recipe(config, model), 0);
  if (!config.from.empty() && (!saved(first_stage) || (Recipe::needs_statistics(config) &&
                                                       !saved(run.statistics_file())))) {
    from.emplace(config.from, model);
    const std::string part = difference(from->identity(), identity);
    BBB_CHECK(part.empty(), config.from, ": is a run of another model: ", part, " differs");
  }
  // A run that cannot fit is refused before any work.
  const bool blocks = !run.blocks_finished(config, model.layers);
  BlockMemory memory;
  if (blocks) memory = plan_block_memory(backend, model, config);
  PhaseMemory whole;
  if (trains_whole(config)) whole = plan_end_to_end_memory(backend, model, config);
  if (Recipe::needs_statistics(config))
    check_memory(backend, count_statistics_memory(backend, model, config), config.memory,
                 "the statistics of the input sites", "lower --batch or --seq-len");
  const bool earlier_outer =
      from ? from->outer() != nullptr
           : saved(first_stage) && data::SafeTensors(first_stage).contains(models::kEmbedding);
  if (!observer.quiet)
    print_plan(backend, model, config, earlier_outer ? OuterStart::EarlierRun : OuterStart::Source,
               blocks ? &memory : nullptr, trains_whole(config) ? &whole : nullptr);
  run.create_or_resume(identity);                 // locks, whoever made it meanwhile
  std::optional<engine::GemmTuningScope> tuning;  // one at a time
  const auto tune_for = [&](int64_t step_runs, int64_t product_runs, int64_t memory_bytes) {
    tuning.reset();
    if (config.gemm_algorithms != GemmAlgorithms::Timed) return;
    const auto say = [&](const std::string& line) {
      if (!observer.quiet) std::printf("%s\n", line.c_str());
    };
    engine::GemmTuning own = stored_gemm_tuning(backend, run.gemm_file(), memory_bytes, say);
    own.step_runs = step_runs;
    own.product_runs = product_runs;
    tuning.emplace(backend, std::move(own));
  };
  const Recipe recipe(config, model,
                      statistics_of(backend, source, windows, config, run, from, observer));
  if (blocks) {
    tune_for(block_steps(model, config), target_batches(model, config), memory.recorded_bytes);
    train_blocks(backend, source, windows, config, recipe, memory, run, observer);
  }
  if (!trains_whole(config)) return;
  int64_t steps = 0;
  for (const WholeStage& stage : recipe.whole_stages()) steps += stage.steps;
  tune_for(steps, 1, whole.recorded_bytes);
  if (config.e2e_snap == Snap::On && !observer.quiet)
    std::printf("end to end: masters start in the middle of their bins (e2e_snap)\n");
  const auto start_layer = [&](int64_t layer) {
    if (from) return from->result(layer);
    return block_stages(config) > 0
               ? run.stage_result(layer, recipe.block_stages() - 1, recipe, model)
               : models::full_precision(source, layer);
  };
  train_end_to_end(backend, source, windows, config, recipe,
                   {start_layer, from ? from->outer() : nullptr}, whole.recompute, run, observer);
}

namespace {

// Quantizes the masters of a layer with the code that training runs. A layer that is already
// quantized is returned unchanged.
class Quantizer {
 public:
  Quantizer(Backend& backend, const models::LlamaConfig& model, const TrainConfig& config,
            const Recipe& recipe)
      : backend_(backend), model_(model), config_(config), recipe_(recipe) {}

  LayerResult operator()(int64_t layer, LayerResult result) const {
    if (result.linears[0].quantized()) return result;
    const std::vector<quant::LinearFormat> formats = recipe_.result_formats(layer);
    result = recipe_.start(layer, result, formats);
    autograd::ParameterSet parameters(backend_, autograd::GradientPasses::One);
    models::LlamaBlock block(backend_, model_, 0, engine::Tensor());
    block.declare_parameters(parameters, formats);
    parameters.allocate();
    autograd::WeightQuantizer quantizer(parameters, config_.group, config_.range);
    block.bind_parameters(quantizer, formats);
    block.set_masters(result);
    quantizer.prepare();
    result.linears = block.result(models::LinearContent::Stored).linears;
    return result;
  }

 private:
  Backend& backend_;
  const models::LlamaConfig& model_;
  const TrainConfig& config_;
  const Recipe& recipe_;
};

// The record of an export: how the weights were made, and the bits of their activations.
std::string export_record(Json record, const Recipe& recipe, const models::LlamaConfig& model,
                          const models::ExportOptions& options) {
  const quant::ActivationBits bits = models::bits_per_activation(
      model, [&](int64_t layer) { return recipe.result_formats(layer); });
  record["bits_per_activation"] = bits.codes;
  record["bits_per_activation_with_scales"] = bits.all;
  record["head_bits"] = options.head_bits;
  return record.dump(2) + "\n";
}

}  // namespace

models::ExportSummary export_run(Backend& backend, const std::string& run_directory,
                                 const std::string& model_path, const std::string& out_directory,
                                 const models::ExportOptions& options) {
  const std::string model =
      model_path.empty() ? RunDirectory(run_directory).identity().config.model : model_path;
  return export_run(backend, *models::open_checkpoint(model), *data::load_tokenizer(model),
                    run_directory, out_directory, options);
}

models::ExportSummary export_run(Backend& backend, const Checkpoint& source,
                                 const data::Tokenizer& tokenizer, const std::string& run_directory,
                                 const std::string& out_directory,
                                 const models::ExportOptions& options) {
  const RunDirectory run(run_directory);
  const RunIdentity identity = run.identity();
  const TrainConfig& config = identity.config;
  const models::LlamaConfig& model = source.config();
  BBB_CHECK(run.finished(config, model.layers), run_directory,
            ": the run is not finished; the same `bbb train` command continues it");
  RunIdentity here;
  here.model = model_parts(source);
  here.tokenizer = tokenizer_parts(tokenizer);
  const std::string part = difference(identity, here);
  BBB_CHECK(part.empty(), source.path(), ": is not the model that ", run_directory,
            " was trained from: ", part, " differs");

  const Recipe recipe(config, model, run.finished_statistics(config, model));
  const Quantizer quantizer(backend, model, config, recipe);
  const auto formats = [&](int64_t i) { return recipe.result_formats(i); };
  const auto layer = [&](int64_t i) { return quantizer(i, run.result(i, recipe, model)); };
  const models::LoadOuter trained = run.outer(recipe);
  engine::Progress progress("export", 2 * model.layers);
  return models::export_model(
      out_directory, source, tokenizer, formats, options,
      trained ? trained : models::outer_of(source), layer,
      export_record(Json::parse(data::read_file(run.run_file())), recipe, model, options),
      [&](int64_t done) { progress.set(done); });
}

models::ExportSummary export_rtn(Backend& backend, const Checkpoint& source,
                                 const data::Tokenizer& tokenizer, TrainConfig config,
                                 const std::string& out_directory,
                                 const models::ExportOptions& options) {
  BBB_CHECK(source.kind() != models::CheckpointKind::Packed, source.path(),
            ": is quantized already; rounding starts from full precision");
  source.check_finite();
  const models::LlamaConfig& model = source.config();
  config.stages = {{.weight_bits = config.bits, .activation_bits = config.act_bits}};
  config.e2e_steps = 0;
  config.val_samples = std::max<int64_t>(1, config.val_samples);
  if (config.samples < config.batch) config.batch = config.samples;
  if (config.data.empty() && model.max_position > 0)  // no window is read
    config.seq_len = std::min(config.seq_len, model.max_position);
  config = resolve(config, model, backend.device());
  std::vector<models::LayerStatistics> statistics;
  if (Recipe::needs_statistics(config)) {
    if (config.data.empty())
      throw UsageError(
          "--range search, --ocs-ratio, --act-outliers and --down-kurtosis need --data FILE: they "
          "follow from the model's activations on a text");
    const data::Windows windows = training_windows(source, tokenizer, config);
    config.samples = std::min(config.samples, windows.count);
    engine::Progress progress("statistics", model.layers, engine::Progress::kPatience_s);
    statistics = collect_statistics(backend, source, windows, config,
                                    [&](int64_t done) { progress.set(done); });
  }
  Json record;
  record["program"] = "bbb " BBB_VERSION;
  record["method"] = "round to nearest";
  record["bits"] = config.bits;
  record["group_size"] = config.group;
  record["model"] = source.path();
  record["model_checksum"] = checksum_of(model_parts(source));
  record["config"] = Json::parse(to_json(config));
  const Recipe recipe(config, model, std::move(statistics));
  const Quantizer quantizer(backend, model, config, recipe);
  engine::Progress progress("export", 2 * model.layers);
  return models::export_model(
      out_directory, source, tokenizer, [&](int64_t i) { return recipe.result_formats(i); },
      options, models::outer_of(source),
      [&](int64_t i) { return quantizer(i, models::full_precision(source, i)); },
      export_record(record, recipe, model, options), [&](int64_t done) { progress.set(done); });
}

}  // namespace bbb::train
