#include "train/train.h"

#include <algorithm>
#include <cstdio>
#include <optional>

#include "data/files.h"
#include "engine/progress.h"
#include "train/block_phase.h"
#include "train/end_to_end.h"
#include "train/gemm_choices.h"
#include "train/run_directory.h"
#include "train/run_file.h"

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
                const BlockMemory* blocks, const PhaseMemory* end_to_end) {
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
  std::printf("results: %.2f GB in %s\n", gigabytes(result_bytes(model, config)),
              config.out.c_str());
  std::fflush(stdout);  // so that the plan is seen before training starts
}

}  // namespace

void train(Backend& backend, const Checkpoint& source, const data::Tokenizer& tokenizer,
           TrainConfig config) {
  backend.check_head_size(source.config().head_dim);
  config = resolve(config, source.config(), backend.device());
  const int32_t doc_end =
      config.doc_end ? *config.doc_end : tokenizer.document_end(source.stop_ids());
  if (doc_end < 0 || doc_end >= source.config().vocab)
    throw UsageError(
        cat("--doc-end ", doc_end, " is no token of a vocabulary of ", source.config().vocab));
  source.check_finite();
  const std::vector<int32_t> tokens =
      data::training_tokens(tokenizer, data::read_documents(config.data), doc_end);
  train_windows(backend, source, data::make_windows(tokens, config.seq_len, config.data), config,
                Observer(), &tokenizer);
}

namespace {

// The length of the block phase or, with --extrapolate, of the run for which it stands.
RunLength run_length_of(const TrainConfig& config) {
  return config.extrapolate.value_or(RunLength{config.samples, config.epochs});
}
int64_t block_steps(const models::LlamaConfig& model, const TrainConfig& config) {
  return model.layers * static_cast<int64_t>(config.stages.size()) * run_length_of(config).epochs *
         (run_length_of(config).samples / config.batch);
}
// Batches through the full-precision blocks.
int64_t target_batches(const models::LlamaConfig& model, const TrainConfig& config) {
  return model.layers * ((run_length_of(config).samples + config.val_samples) / config.batch);
}

}  // namespace

void train_windows(Backend& backend, const Checkpoint& source, const data::Windows& windows,
                   TrainConfig config, const Observer& observer, const data::Tokenizer* tokenizer) {
  const models::LlamaConfig& model = source.config();
  BBB_CHECK(source.kind() != models::CheckpointKind::Packed, source.path(),
            ": is quantized already; training starts from full precision");
  config = resolve(config, model, backend.device());
  const int64_t wanted = config.samples + (config.stages.empty() ? 0 : config.val_samples);
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
                             data_checksum(windows)};
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
  // A run that cannot fit is refused before any work.
  const bool blocks = !run.blocks_finished(config, model.layers);
  BlockMemory memory;
  if (blocks) memory = plan_block_memory(backend, model, config);
  PhaseMemory whole;
  if (config.e2e_steps > 0) whole = plan_end_to_end_memory(backend, model, config);
  if (!observer.quiet)
    print_plan(backend, model, config, blocks ? &memory : nullptr,
               config.e2e_steps > 0 ? &whole : nullptr);
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
  if (blocks) {
    tune_for(block_steps(model, config), target_batches(model, config), memory.recorded_bytes);
    train_blocks(backend, source, windows, config, memory, run, observer);
  }
  if (config.e2e_steps > 0) {
    tune_for(config.e2e_steps, 1, whole.recorded_bytes);
    if (config.e2e_snap == Snap::On && !observer.quiet)
      std::printf("end to end: masters start in the middle of their bins (e2e_snap)\n");
    train_end_to_end(backend, source, windows, config, whole.recompute, run, observer);
  }
}

namespace {

// Quantizes the masters of a layer with the code that training runs. A layer that is already
// quantized is returned unchanged.
class Quantizer {
 public:
  Quantizer(Backend& backend, const models::LlamaConfig& model, WeightGrid grid)
      : parameters_(backend, autograd::GradientPasses::One),
        block_(backend, model, 0, engine::Tensor()) {
    block_.declare_parameters(parameters_);
    parameters_.allocate();
    quantizer_.emplace(parameters_, grid.group);
    block_.bind_parameters(*quantizer_, grid.bits);
  }

  LayerResult operator()(LayerResult layer) {
    if (layer.linears[0].quantized()) return layer;
    block_.set_masters(layer);
    quantizer_->prepare();
    layer.linears = block_.result(models::LinearContent::Stored).linears;
    return layer;
  }

 private:
  autograd::ParameterSet parameters_;
  std::optional<autograd::WeightQuantizer> quantizer_;
  models::LlamaBlock block_;
};

}  // namespace

double export_run(Backend& backend, const std::string& run_directory, const std::string& model_path,
                  const std::string& out_directory, models::ExportFormat format) {
  const std::string model =
      model_path.empty() ? RunDirectory(run_directory).identity().config.model : model_path;
  return export_run(backend, *models::open_checkpoint(model), *data::load_tokenizer(model),
                    run_directory, out_directory, format);
}

double export_run(Backend& backend, const Checkpoint& source, const data::Tokenizer& tokenizer,
                  const std::string& run_directory, const std::string& out_directory,
                  models::ExportFormat format) {
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

  const Recipe recipe(config, model);
  Quantizer quantizer(backend, model, {config.bits, config.group});
  std::optional<data::SafeTensors> final;
  if (config.e2e_steps > 0)
    final.emplace(open_run_file(run.final_file(), run.checksum(),
                                "delete it, and the run trains end to end again"));
  const auto formats = [&](int64_t i) { return recipe.result_formats(i); };
  const auto layer = [&](int64_t i) {
    return quantizer(final ? models::read_layer(*final, i, model, formats(i))
                           : block_result(run, recipe, config, source, i));
  };
  engine::Progress progress("export", 2 * model.layers);
  return models::export_model(out_directory, source, tokenizer, formats, format, layer,
                              data::read_file(run.run_file()),
                              [&](int64_t done) { progress.set(done); });
}

double export_rtn(Backend& backend, const Checkpoint& source, const data::Tokenizer& tokenizer,
                  WeightGrid spec, const std::string& out_directory, models::ExportFormat format) {
  BBB_CHECK(source.kind() != models::CheckpointKind::Packed, source.path(),
            ": is quantized already; rounding starts from full precision");
  source.check_finite();
  const models::LlamaConfig& model = source.config();
  check_group_size(model, spec.group);
  Json record;
  record["program"] = "bbb " BBB_VERSION;
  record["method"] = "round to nearest";
  record["bits"] = spec.bits;
  record["group_size"] = spec.group;
  record["model"] = source.path();
  record["model_checksum"] = checksum_of(model_parts(source));
  TrainConfig config;
  config.bits = spec.bits;
  config.group = spec.group;
  const Recipe recipe(config, model);
  Quantizer quantizer(backend, model, spec);
  engine::Progress progress("export", 2 * model.layers);
  return models::export_model(
      out_directory, source, tokenizer, [&](int64_t i) { return recipe.result_formats(i); }, format,
      [&](int64_t i) { return quantizer(models::full_precision(source, i)); },
      record.dump(2) + "\n", [&](int64_t done) { progress.set(done); });
}

}  // namespace bbb::train
