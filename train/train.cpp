#include "train/train.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <optional>
#include <utility>

#include "data/files.h"
#include "train/allocation.h"
#include "train/block_phase.h"
#include "train/end_to_end.h"
#include "train/estimate.h"
#include "train/gemm_choices.h"
#include "train/gptq_phase.h"
#include "train/run_directory.h"
#include "train/run_file.h"
#include "train/statistics.h"
#include "train/stream_set.h"
#include "train/summary.h"
#include "train/teacher.h"

namespace bbb::train {

using models::LayerResult;

namespace {

constexpr int64_t kStatesAtOnce = 2;  // a new one is written before the old one goes

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
    const char* kept =
        trains_blocks(config) ? describe(blocks->recompute) : "nothing is kept for gradients";
    const auto count = [&](Tier tier) {
      return static_cast<int>(std::count(streams.tiers.begin(), streams.tiers.end(), tier));
    };
    std::printf(
        "blocks: %.3f GB of tensors, at most %.2f GB of the device, %.2f GB of host memory, %.2f "
        "GB of scratch files; streams there: %d, %d, %d; %s\n",
        gigabytes(blocks->device_bytes), gigabytes(allocated_bytes(backend, blocks->device_bytes)),
        gigabytes(streams.host_bytes), gigabytes(streams.scratch_bytes), count(Tier::Device),
        count(Tier::Host), count(Tier::File), kept);
  }
  if (end_to_end != nullptr) {
    const std::vector<WholeStage> stages = Recipe(config, model).whole_stages();
    const bool cached = std::ranges::any_of(stages, [&](const WholeStage& stage) {
      return caches_teacher(config, stage.steps, end_to_end->teacher);
    });
    std::printf(
        "end to end: %.3f GB of tensors, at most %.2f GB of the device; %s%s%s\n",
        gigabytes(end_to_end->device_bytes),
        gigabytes(allocated_bytes(backend, end_to_end->device_bytes)),
        describe(end_to_end->recompute), cached ? "; the teacher's last hidden states kept" : "",
        shards_whole(config, 0) ? cat("; linears in ", config.comm->size(), " parts").c_str() : "");
  }
  const int64_t state = std::max(blocks != nullptr ? blocks->state_bytes : 0,
                                 end_to_end != nullptr ? end_to_end->state_bytes : 0);
  std::printf("results: %.2f GB in %s, and at most %.2f GB of states while it trains",
              gigabytes(result_bytes(model, config, outer)), config.out.c_str(),
              gigabytes(kStatesAtOnce * state));
  const int64_t free = data::free_disk_bytes(config.out);
  if (free != data::kUnknownBytes) std::printf("; %.2f GB are free", gigabytes(free));
  std::printf("\n");
  std::fflush(stdout);  // so that the plan is seen before training starts
}

}  // namespace

data::TokenStream training_tokens(const Checkpoint& source, const data::Tokenizer& tokenizer,
                                  const TrainConfig& config) {
  const int32_t doc_end =
      config.doc_end ? *config.doc_end : tokenizer.document_end(source.stop_ids());
  if (doc_end < 0 || doc_end >= source.config().vocab)
    throw UsageError(
        cat("--doc-end ", doc_end, " is no token of a vocabulary of ", source.config().vocab));
  return data::training_tokens(tokenizer, data::read_documents(config.data), doc_end,
                               source.stop_ids(), source.path(), config.threads);
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
// Batches through blocks, outside of steps.
int64_t target_batches(const models::LlamaConfig& model, const TrainConfig& config) {
  if (!trains_blocks(config)) return model.layers * kGptqPasses * (config.samples / config.batch);
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
         a.act_outliers == b.act_outliers && a.target_bits == b.target_bits &&
         a.target_us == b.target_us;
}

// The run's statistics: those that it has saved, those of the run that it starts from if both order
// channels alike, or new ones, which are saved. `budget`: of an allocation.
std::vector<models::LayerStatistics> statistics_of(
    Backend& backend, const Checkpoint& source, const data::Windows& windows,
    const TrainConfig& config, const RunDirectory& run, const std::optional<EarlierRun>& from,
    const std::optional<SiteBudget>& budget, const Observer& observer) {
  if (!Recipe::needs_statistics(config)) return {};
  const auto read = [&] {
    std::vector<models::LayerStatistics> layers = run.statistics(source.config());
    BBB_CHECK(!layers.empty(), run.statistics_file(), ": rank ", config.comm->rank(),
              " does not see what rank 0 has written");
    return layers;
  };
  // As the first rank sees it, which writes the file.
  std::error_code error;
  const bool saved = std::filesystem::exists(run.statistics_file(), error);
  if (config.comm->gather({saved ? 1.0 : 0.0})[0][0] != 0) return read();
  std::vector<models::LayerStatistics> layers;
  if (from && same_orders(config, from->identity().config)) layers = from->statistics();
  std::optional<Allocation> allocation;
  if (layers.empty()) {
    engine::Progress progress = observer.progress(
        "statistics", (budget ? 2 : 1) * source.config().layers, engine::Progress::kPatience_s);
    const auto done = [&](int64_t layers_done) { progress.set(layers_done); };
    if (budget)
      allocation = allocate_sites(backend, source, windows, config, *budget, done);
    else
      layers = collect_statistics(backend, source, windows, config, done);
  }
  if (allocation) {
    if (!observer.quiet) std::printf("%s", describe(*allocation, source.config(), config).c_str());
    layers = std::move(allocation->statistics);
  }
  if (run.writes()) {
    RunFileWriter writer(run.statistics_file(), run.checksum(), models::declare_statistics(layers));
    models::add_statistics(writer, layers);
    writer.finish();
  }
  config.comm->barrier();  // all take the same choices: those of the file
  return run.writes() ? layers : read();
}

// The start of every layer's weights, which the run saves; null if the configuration needs none.
LayerStart starts_of(Backend& backend, const Checkpoint& source, const data::Windows& windows,
                     const TrainConfig& config, const RunDirectory& run, const Observer& observer) {
  if (!Recipe::needs_starts(config)) return nullptr;
  const models::LlamaConfig& model = source.config();
  if (!std::filesystem::exists(run.start_file())) {
    const Recipe recipe(config, model);
    std::vector<data::SafeTensorsWriter::Entry> entries;
    const auto content = models::LinearContent::Stored;
    for (int64_t layer = 0; layer < model.layers; ++layer)
      models::declare_layer(entries, layer, model, recipe.result_formats(layer), content,
                            config.range);
    std::optional<RunFileWriter> writer;
    if (run.writes()) writer.emplace(run.start_file(), run.checksum(), entries);
    engine::Progress progress =
        observer.progress("start", model.layers, engine::Progress::kPatience_s);
    collect_lc_starts(backend, source, windows, config, recipe,
                      [&](int64_t layer, const LayerResult& start) {
                        if (writer) models::add_layer(*writer, layer, model, start, content);
                        progress.set(layer + 1);
                      });
    if (writer) writer->finish();
    config.comm->barrier();  // all read the file
  }
  return run.starts(model);
}

// A run is found again from any directory.
TrainConfig with_absolute_paths(TrainConfig config) {
  for (std::string* path : {&config.model, &config.data, &config.from})
    if (!path->empty() && !path->starts_with(data::kSyntheticPrefix))
      *path = std::filesystem::absolute(*path).lexically_normal().string();
  return config;
}

// Throws if the results and states that the run has still to write do not fit on its disk.
void check_run_disk(const RunDirectory& run, const models::LlamaConfig& model,
                    const TrainConfig& config, OuterStart outer, int64_t state_bytes) {
  const int64_t most = result_bytes(model, config, outer) + kStatesAtOnce * state_bytes;
  data::check_disk(config.out, std::max<int64_t>(0, most - run.stored_bytes()));
}

}  // namespace

void train_windows(Backend& backend, const Checkpoint& source, const data::Windows& windows,
                   TrainConfig config, const Observer& observer, const data::Tokenizer* tokenizer) {
  const models::LlamaConfig& model = source.config();
  BBB_CHECK(source.kind() != models::CheckpointKind::Packed, source.path(),
            ": is quantized already; training starts from full precision");
  config = resolve(config, model, backend.device());
  engine::Comm& comm = *config.comm;
  config.threads = static_cast<int>(comm.gather({1.0 * config.threads})[0][0]);  // as it is saved
  const int64_t wanted = config.samples + (trains_blocks(config) ? config.val_samples : 0);
  BBB_CHECK(windows.seq_len == config.seq_len && windows.count >= wanted, config.data, ": holds ",
            windows.count, " windows of ", windows.seq_len, " tokens, but --samples ",
            trains_blocks(config) ? "and --val-samples ask" : "asks", " for ", wanted);
  BBB_CHECK(windows.first_key.empty() == (config.pack == Packing::Stream), config.data,
            ": was cut into windows with another --pack");
  for (int32_t id : windows.ids)
    BBB_CHECK(id >= 0 && id < model.vocab, config.data, ": token ", id,
              " is not in the model's vocabulary of ", model.vocab);

  // An existing run is locked before the model is read and memory is planned. A new run is created
  // only once it is known to fit, so that a refused run leaves nothing behind.
  using Access = RunDirectory::Access;
  RunDirectory run(config.out, comm.first() ? Access::Write : Access::Read);
  // A finished run is not changed: not even the lock is written.
  const bool finished = run.exists() && run.finished(config, model.layers) && !run.has_states();
  PhaseTimes times{.resumed = run.exists()};
  if (run.exists() && !finished && !config.dry_run) run.lock();
  const RunIdentity identity{with_absolute_paths(config),
                             backend.device() == engine::DeviceType::Cuda ? "cuda" : "cpu",
                             backend.device_name(),
                             model_parts(source),
                             tokenizer != nullptr ? tokenizer_parts(*tokenizer) : Parts(),
                             data_checksum(windows),
                             from_checksum(config, run)};
  if (!observer.quiet) std::printf("%s", identity.summary().c_str());
  if (run.exists() && (finished || config.dry_run)) {
    run.check_identity(identity);
  } else if (run.exists()) {
    run.create_or_resume(identity);
    run.remove_spent_states(config, model.layers);
  }
  if (run.exists() && run.finished(config, model.layers)) {
    if (!observer.quiet)
      std::printf("%s: finished already\n%s", config.out.c_str(), next_commands(config).c_str());
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
    BBB_CHECK(from->identity().config.quantizer == config.quantizer, config.from,
              ": its weights are on another grid; give its --quantizer");
    BBB_CHECK(config.quantizer != Quantizer::Lc || config.lc_map == LcMap::Learned ||
                  from->identity().config.lc_map == config.lc_map,
              config.from, ": its codes have another map; give its --lc-map, or learned");
  }
  // A run that cannot fit is refused before any work.
  const bool blocks = !run.blocks_finished(config, model.layers);
  BlockMemory memory;
  if (blocks) memory = plan_block_memory(backend, model, config);
  PhaseMemory whole;
  if (trains_whole(config)) whole = plan_end_to_end_memory(backend, model, config);
  check_factor_memory(model, config);
  if (Recipe::reads_text(config))
    check_memory(backend, count_statistics_memory(backend, model, config), config.memory,
                 "the statistics of the input sites", "lower --batch or --seq-len");
  const bool earlier_outer =
      from ? from->outer() != nullptr
           : saved(first_stage) && data::SafeTensors(first_stage).contains(models::kEmbedding);
  const OuterStart outer = earlier_outer ? OuterStart::EarlierRun : OuterStart::Source;
  if (!observer.quiet)
    print_plan(backend, model, config, outer, blocks ? &memory : nullptr,
               trains_whole(config) ? &whole : nullptr);
  // Before the run is created: a target out of reach leaves nothing behind.
  std::optional<SiteBudget> budget;
  if (allocates(config) && !saved(run.statistics_file()) &&
      !(from && same_orders(config, from->identity().config)))
    budget = budget_of(backend, model, config);
  check_run_disk(run, model, config, outer, std::max(memory.state_bytes, whole.state_bytes));
  if (config.dry_run) {
    print_dry_run(backend, source, windows, config, blocks, whole, run.exists());
    return;
  }
  comm.barrier();                  // every rank has seen whether there is a run
  run.create_or_resume(identity);  // locks, whoever made it meanwhile
  comm.barrier();
  if (!run.writes()) run.check_identity(identity);
  std::optional<engine::GemmTuningScope> tuning;  // one at a time
  const auto tune_for = [&](int64_t step_runs, int64_t product_runs, int64_t memory_bytes) {
    tuning.reset();
    if (config.gemm_algorithms != GemmAlgorithms::Timed) return;
    // Products make Muon's steps, which must be the same on every rank.
    if (config.optimizer == autograd::UpdateRule::Muon && comm.size() > 1) return;
    const auto say = [&](const std::string& line) {
      if (!observer.quiet) std::printf("%s\n", line.c_str());
    };
    comm.barrier();  // all read the same choices; what is missing each rank times for itself
    engine::GemmTuning own = stored_gemm_tuning(backend, run.gemm_file(), memory_bytes, say);
    comm.barrier();  // before the first rank adds to them
    if (!run.writes()) own.keep = nullptr;
    own.step_runs = step_runs;
    own.product_runs = product_runs;
    tuning.emplace(backend, std::move(own));
  };
  auto since = std::chrono::steady_clock::now();
  const auto taken = [&] {
    const auto now = std::chrono::steady_clock::now();
    return std::chrono::duration<double>(now - std::exchange(since, now)).count();
  };
  const Recipe recipe(config, model,
                      statistics_of(backend, source, windows, config, run, from, budget, observer),
                      starts_of(backend, source, windows, config, run, observer));
  if (Recipe::reads_text(config)) times.statistics_s = taken();
  if (blocks) {
    tune_for(block_steps(model, config), target_batches(model, config), memory.recorded_bytes);
    if (config.method == Method::Gptq)
      quantize_blocks(backend, source, windows, config, recipe, memory.streams, run, observer);
    else
      train_blocks(backend, source, windows, config, recipe, memory, run, observer);
    comm.barrier();  // the next phase reads the files
    times.blocks_s = taken();
  }
  if (trains_whole(config)) {
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
                     {start_layer, from ? from->outer() : nullptr}, whole, run, observer);
    times.whole_s = taken();
  }
  tuning.reset();
  if (!observer.quiet)
    print_summary(backend, source, windows, config, recipe, run, times, observer);
}

}  // namespace bbb::train
