// Times a training step, replayed as in a run, on a synthetic model and random tokens.
#include <algorithm>
#include <optional>
#include <utility>

#include "engine/rng.h"
#include "models/synthetic_checkpoint.h"
#include "tools/bench.h"
#include "train/dry_run.h"
#include "train/gemm_choices.h"
#include "train/step_probe.h"

namespace bbb::tools {

using engine::Backend;
using train::StepPart;

namespace {

// On a GPU, short steps are queued together, as in a run.
Repeats repeats_for(const Backend& backend, const TrainBench& bench) {
  const bool gpu = backend.device() == engine::DeviceType::Cuda;
  Repeats repeats;
  repeats.warmup = !gpu ? 1 : bench.end_to_end ? 2 : 10;
  repeats.calls = gpu && !bench.end_to_end ? std::min<int64_t>(10, bench.steps) : 1;
  repeats.groups = (bench.steps + repeats.calls - 1) / repeats.calls;
  return repeats;
}

// The configuration of a run that has enough steps for all timed ones, on a few batches.
train::TrainConfig config_for(const Backend& backend, const TrainBench& bench) {
  constexpr int64_t kBatches = 4;
  const Repeats repeats = repeats_for(backend, bench);
  const int64_t steps = repeats.warmup + repeats.groups * repeats.calls;
  const int64_t ranks = bench.comm->size(), micro = bench.micro_batch;
  if (bench.batch % ranks != 0)
    throw UsageError(cat(ranks, " ranks cannot share --batch ", bench.batch));
  if (micro > 0 && bench.batch % micro != 0)
    throw UsageError(cat("--micro-batch ", micro, " does not divide --batch ", bench.batch));
  train::TrainConfig config = bench.grid;
  config.seq_len = bench.seq_len;
  config.samples = kBatches * bench.batch;
  config.memory.recompute = bench.recompute;
  config.memory.teacher = train::TeacherStates::Beside;
  config.comm = bench.comm;
  if (bench.end_to_end) {
    config.e2e_steps = steps;
    config.e2e_batch = bench.batch;
    config.e2e_micro_batch = bench.micro_batch;
    config.e2e_moments = bench.moments;
    config.bits = bench.widths.weight_bits;
    config.act_bits = bench.widths.activation_bits;
  } else {
    config.stages = {bench.widths};
    config.batch = bench.batch;
    config.epochs = (steps + kBatches - 1) / kBatches;
    config.val_samples = 1;
  }
  return train::resolve(config, bench.model, backend.device());
}

data::Windows random_windows(const train::TrainConfig& config, int64_t vocab) {
  data::Windows windows = train::blank_windows(config);
  windows.counted.clear();
  engine::Rng rng(1);
  for (int32_t& id : windows.ids) id = static_cast<int32_t>(rng.below(vocab));
  return windows;
}

}  // namespace

double training_flops_per_token(const models::LlamaConfig& model, int64_t seq_len,
                                bool end_to_end) {
  constexpr size_t kFirst = 3;  // q, k, v
  const std::vector<models::LinearShape> linears = models::block_linears(model);
  double weights = 0, first_weights = 0;
  for (size_t i = 0; i < linears.size(); ++i) {
    weights += static_cast<double>(linears[i].n * linears[i].k);
    if (i + 1 == kFirst) first_weights = weights;
  }
  const double attention = 2.0 * static_cast<double>(seq_len * model.heads * model.head_dim);
  const double block = 6 * weights + 3.5 * attention;
  if (!end_to_end) return block - 2 * first_weights;
  const double teacher = 2 * weights + attention;
  const double head = 6.0 * static_cast<double>(model.vocab * model.d_model);
  return static_cast<double>(model.layers) * (block + teacher) - 2 * first_weights + head;
}

TrainBenchResult bench_train(Backend& backend, const TrainBench& bench) {
  models::LlamaConfig model = bench.model;
  if (!bench.end_to_end) model.layers = 1;
  const auto source = models::make_synthetic_checkpoint(model, "synthetic");
  const train::TrainConfig config = config_for(backend, bench);
  const data::Windows windows = random_windows(config, model.vocab);
  const Repeats repeats = repeats_for(backend, bench);

  TrainBenchResult result;
  result.flops = training_flops_per_token(model, bench.seq_len, bench.end_to_end) *
                 static_cast<double>(bench.batch * bench.seq_len / bench.comm->size());
  train::BlockMemory memory;  // end to end: only its PhaseMemory part is set
  if (bench.end_to_end)
    static_cast<train::PhaseMemory&>(memory) =
        train::plan_end_to_end_memory(backend, model, config);
  else
    memory = train::plan_block_memory(backend, model, config);
  {
    std::optional<engine::GemmTuningScope> tuned;
    if (bench.gemm_algorithms == train::GemmAlgorithms::Timed) {
      engine::GemmTuning tuning =
          train::stored_gemm_tuning(backend, bench.gemm_file, memory.recorded_bytes, bench.say);
      tuning.step_runs = kLongRun;
      if (!bench.comm->first()) tuning.keep = nullptr;
      bench.comm->barrier();  // all have read the same choices
      tuned.emplace(backend, std::move(tuning));
    }
    backend.reset_memory_peak();
    const auto probe = bench.end_to_end
                           ? train::probe_end_to_end_step(backend, *source, windows, config, memory)
                           : train::probe_block_step(backend, *source, windows, config, memory);
    const auto measure = [&](StepPart last) {
      probe.rewind();
      const auto replay = probe.record(last);
      bench.comm->barrier();
      if (last == StepPart::Optimizer) result.kernels = replay->kernels();
      return measure_seconds(backend, repeats, [&] { replay->run(); });
    };
    // Measure the whole step first. After it the weights are prequantized, so the parts start like
    // a step of a run.
    result.step_s = measure(StepPart::Optimizer);
    const double quantize = measure(StepPart::Quantize), forward = measure(StepPart::Forward),
                 backward = measure(StepPart::Backward);
    result.quantize_s = quantize;
    result.forward_s = forward - quantize;
    result.backward_s = backward - forward;
    result.optimizer_s = result.step_s - backward;
    result.peak_bytes = backend.memory_peak_bytes();
  }
  result.gemm_peak = measure_gemm_peak(backend, bench.peak);
  return result;
}

int64_t layers_that_fit(Backend& backend, const TrainBench& bench) {
  const train::TrainConfig config = config_for(backend, bench);
  const int64_t room = train::tensor_room(backend, {});
  const models::Recompute mode = bench.recompute.value_or(models::Recompute::Block);
  const auto fits = [&](int64_t layers) {
    models::LlamaConfig model = bench.model;
    model.layers = layers;
    return train::count_end_to_end_memory(backend, model, config, mode,
                                          train::TeacherStates::Beside)
               .device_bytes <= room;
  };
  // The answer is in [most, beyond). Start by doubling: a model far larger than the device may be
  // too large to count.
  int64_t most = 1, beyond = bench.model.layers + 1;
  while (beyond - most > 1) {
    const int64_t layers = std::min(2 * most, (most + beyond) / 2);
    (fits(layers) ? most : beyond) = layers;
  }
  for (const std::vector<double>& of_rank : bench.comm->gather({static_cast<double>(most)}))
    most = std::min(most, static_cast<int64_t>(of_rank[0]));
  return most;
}

}  // namespace bbb::tools
