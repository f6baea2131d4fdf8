// Export of a run, or of a model rounded to nearest.
#include <algorithm>
#include <cstdio>

#include "data/files.h"
#include "train/allocation.h"
#include "train/fit.h"
#include "train/memory_plan.h"
#include "train/result_quantizer.h"
#include "train/run_directory.h"
#include "train/statistics.h"
#include "train/train.h"

namespace bbb::train {

using models::LayerResult;

namespace {

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
  const ResultQuantizer quantizer(backend, model, config, recipe);
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
                                 const models::ExportOptions& options, const Typed& typed) {
  BBB_CHECK(source.kind() != models::CheckpointKind::Packed, source.path(),
            ": is quantized already; rounding starts from full precision");
  source.check_finite();
  const models::LlamaConfig& model = source.config();
  const bool reads_text = Recipe::reads_text(config);
  if (reads_text && config.data.empty())
    throw UsageError(
        "--range search, --ocs-ratio, --act-outliers, --down-kurtosis, --quantizer lc, "
        "--target-bits and --target-us need --data FILE: they follow from the model's activations "
        "on a text");
  data::TokenStream tokens;
  if (reads_text) tokens = training_tokens(source, tokenizer, config);
  const auto count = reads_text ? static_cast<int64_t>(tokens.ids.size()) : INT64_MAX;
  config.val_samples = 0;  // every window counts
  const TrainConfig asked = config;
  config = fit_to_data(config, typed, model.max_position, count);
  if (const std::string line = describe_fit(asked, config, model.max_position, count);
      reads_text && !line.empty())
    std::printf("%s\n", line.c_str());
  // As a run of one stage of blocks, which is not trained.
  config.stages = {{.weight_bits = config.bits, .activation_bits = config.act_bits}};
  config.e2e_steps = 0;
  config.val_samples = 1;
  config = resolve(config, model, backend.device());
  std::vector<models::LayerStatistics> statistics;
  Allocation allocation;
  std::vector<LayerResult> starts;
  if (reads_text) {
    const data::Windows windows =
        data::make_windows(tokens, config.seq_len, config.data, config.pack);
    BBB_CHECK(config.samples <= windows.count || !typed || !typed("samples"), config.data,
              ": holds ", windows.count, " windows of ", config.seq_len,
              " tokens, but --samples asks for ", config.samples);
    config.samples = std::min(config.samples, windows.count);
    check_factor_memory(model, config);
    engine::Progress progress("statistics", (allocates(config) ? 2 : 1) * model.layers,
                              engine::Progress::kPatience_s);
    const auto done = [&](int64_t layers) { progress.set(layers); };
    if (Recipe::needs_starts(config))
      collect_lc_starts(backend, source, windows, config, Recipe(config, model),
                        [&](int64_t layer, LayerResult start) {
                          starts.push_back(std::move(start));
                          done(layer + 1);
                        });
    else if (allocates(config))
      allocation =
          allocate_sites(backend, source, windows, config, budget_of(backend, model, config), done);
    else
      statistics = collect_statistics(backend, source, windows, config, done);
  }
  if (allocates(config)) {
    std::printf("%s", describe(allocation, model, config).c_str());
    statistics = std::move(allocation.statistics);
  }
  Json record;
  record["program"] = "bbb " BBB_VERSION;
  record["method"] = "round to nearest";
  record["bits"] = config.bits;
  record["group_size"] = config.group;
  record["model"] = source.path();
  record["model_checksum"] = checksum_of(model_parts(source));
  record["config"] = Json::parse(to_json(config));
  LayerStart start_of;
  if (!starts.empty())
    start_of = [&](int64_t layer, const auto&) { return starts[static_cast<size_t>(layer)]; };
  const Recipe recipe(config, model, std::move(statistics), start_of);
  const ResultQuantizer quantizer(backend, model, config, recipe);
  engine::Progress progress("export", 2 * model.layers);
  return models::export_model(
      out_directory, source, tokenizer, [&](int64_t i) { return recipe.result_formats(i); },
      options, models::outer_of(source),
      [&](int64_t i) { return quantizer(i, models::full_precision(source, i)); },
      export_record(record, recipe, model, options), [&](int64_t done) { progress.set(done); });
}

}  // namespace bbb::train
