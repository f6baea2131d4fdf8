#include "train/estimate.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <utility>

#include "engine/progress.h"
#include "train/allocation.h"
#include "train/gptq_phase.h"
#include "train/recipe.h"
#include "train/run_directory.h"
#include "train/sensitivity.h"
#include "train/statistics.h"
#include "train/step_probe.h"
#include "train/teacher.h"

namespace bbb::train {
namespace {

using Clock = std::chrono::steady_clock;

struct PhaseEstimate {
  int64_t steps = 0;  // of the optimizer, or blocks; 0: there is no such phase
  double step_s = 0;  // the mean
  double total_s = 0;
  const char* unit = "steps";
};

constexpr int64_t kSteps = 3, kBatches = 2;  // timed steps, and the batches that they take
constexpr double kLong_s = 10;

// A run of a few steps. Ranges are not searched: that needs statistics, and once they are found, a
// step takes as long.
TrainConfig few_steps(TrainConfig config) {
  config.range = RangeRule::MinMax;
  return config;
}

// Mean seconds of a step up to `last`. The first one is slower, and counts only if it is so long
// that the difference does not matter.
double step_seconds(Backend& backend, const StepProbe& probe, StepPart last) {
  probe.rewind();
  const auto replay = probe.record(last);
  const auto seconds_of = [&](int64_t steps) {
    const auto start = Clock::now();
    for (int64_t i = 0; i < steps; ++i) replay->run();
    backend.synchronize();
    return std::chrono::duration<double>(Clock::now() - start).count();
  };
  const double first = seconds_of(1);
  return first > kLong_s ? first : seconds_of(kSteps) / kSteps;
}

PhaseEstimate estimate_blocks(Backend& backend, const Checkpoint& source,
                              const data::Windows& windows, const TrainConfig& config) {
  TrainConfig few = few_steps(config);
  few.samples = std::min(config.samples, kBatches * config.batch);
  few.val_samples = 1;
  few.epochs = kSteps + 1;
  const BlockMemory memory = plan_block_memory(backend, source.config(), few);
  const StepProbe probe = probe_block_step(backend, source, windows, few, memory);
  const double step = step_seconds(backend, probe, StepPart::Optimizer),
               forward = step_seconds(backend, probe, StepPart::Forward);
  // Of a block: the steps of every stage; every stage validates before its steps and after each
  // epoch; the full-precision block and every stage pass over all windows.
  const auto stages = static_cast<double>(block_stages(config));
  const auto batches = [&](int64_t count) {
    return static_cast<double>(count) / static_cast<double>(config.batch);
  };
  const double passes =
      stages * static_cast<double>(config.epochs + 1) * batches(config.val_samples) +
      (stages + 1) * batches(config.samples + config.val_samples);
  const int64_t layers = source.config().layers;
  PhaseEstimate estimate{layers * block_stages(config) * steps_per_stage(config), step, 0};
  estimate.total_s =
      static_cast<double>(estimate.steps) * step + static_cast<double>(layers) * passes * forward;
  return estimate;
}

// From one and from two batches: what does not depend on their number counts once.
PhaseEstimate estimate_gptq(Backend& backend, const Checkpoint& source,
                            const data::Windows& windows, const TrainConfig& config) {
  const auto seconds_of = [&](int64_t samples) {
    TrainConfig few = few_steps(config);
    few.samples = samples;
    const BlockMemory memory = plan_block_memory(backend, source.config(), few);
    return time_gptq_block(backend, source, windows, few, memory.streams);
  };
  const int64_t batches = config.samples / config.batch, layers = source.config().layers;
  const double one = seconds_of(config.batch);
  const double each = batches > 1 ? std::max(0.0, seconds_of(2 * config.batch) - one) : 0;
  const double block = one + each * static_cast<double>(batches - 1);
  return {layers, block, static_cast<double>(layers) * block, "blocks"};
}

PhaseEstimate estimate_whole(Backend& backend, const Checkpoint& source,
                             const data::Windows& windows, const TrainConfig& config,
                             const PhaseMemory& memory) {
  PhaseEstimate estimate;
  double teacher_s = 0;
  const Recipe recipe(config, source.config());
  for (const WholeStage& stage : recipe.whole_stages()) {
    TrainConfig few = few_steps(config);
    few.samples = std::min(config.samples, kBatches * config.e2e_batch);
    if (!learns_whole_grid(config)) few.grid_train = GridTrain::None;  // it asks for no blocks
    few.stages.clear();
    few.block_schedule = BlockSchedule::All;
    ModelStage widths{stage.widths.back(), kSteps + 1};
    if (widths.weight_bits > 8) widths.weight_bits = 8;  // a stage that leaves the last block alone
    few.e2e_stages = {widths};
    few.e2e_steps = kSteps + 1;
    few.e2e_lr = {stage.lr};
    few.from.clear();
    few.bits = widths.weight_bits;
    few.act_bits = widths.activation_bits;
    PhaseMemory of_stage = memory;
    const bool caches = caches_teacher(config, stage.steps, memory.teacher);
    if (!caches) of_stage.teacher = TeacherStates::Beside;
    const StepProbe probe = probe_end_to_end_step(backend, source, windows, few, of_stage);
    const double step = step_seconds(backend, probe, StepPart::Optimizer);
    estimate.steps += stage.steps;
    estimate.total_s += static_cast<double>(stage.steps) * step;
    // The teacher's pass over the windows takes about as long as the student's.
    if (caches)
      teacher_s += static_cast<double>(steps_per_pass(config)) *
                   step_seconds(backend, probe, StepPart::Forward);
  }
  if (estimate.steps > 0) estimate.step_s = estimate.total_s / static_cast<double>(estimate.steps);
  estimate.total_s += teacher_s;
  return estimate;
}

// The errors and sensitivities of an allocation, on as many windows as they take.
double allocation_seconds(Backend& backend, const Checkpoint& source, const data::Windows& windows,
                          const TrainConfig& config) {
  if (!allocates(config)) return 0;
  const SiteBudget budget = budget_of(backend, source.config(), config);
  TrainConfig few = config;
  few.samples = std::min(config.samples, Sensitivity::kWindows);
  auto start = Clock::now();
  const auto taken = [&] {
    const auto now = Clock::now();
    return std::chrono::duration<double>(now - std::exchange(start, now)).count();
  };
  collect_layouts(backend, source, windows, few, [](int64_t, const auto&, const auto&) {});
  const double statistics_s = taken();
  allocate_sites(backend, source, windows, few, budget, [](int64_t) {});
  return std::max(0.0, taken() - statistics_s);
}

// From one and from three of the windows that a rank's pass would take: what does not depend on
// their number, such as reading the model, counts once. 0: no option needs the pass.
double statistics_seconds(Backend& backend, const Checkpoint& source, const data::Windows& windows,
                          const TrainConfig& config) {
  if (!Recipe::reads_text(config)) return 0;
  const int64_t count = config.comm->share(std::min(config.samples, kStatisticsWindows));
  const auto seconds_of = [&](int64_t own) {
    TrainConfig few = config;
    few.samples = std::min(config.samples, own * config.comm->size());
    const auto start = Clock::now();
    if (Recipe::needs_starts(config))
      collect_lc_starts(backend, source, windows, few, Recipe(config, source.config()),
                        [](int64_t, const models::LayerResult&) {});
    else
      collect_layouts(backend, source, windows, few, [](int64_t, const auto&, const auto&) {});
    return std::chrono::duration<double>(Clock::now() - start).count();
  };
  const double one = seconds_of(1), choice = allocation_seconds(backend, source, windows, config);
  if (count == 1) return one + choice;
  const int64_t more = std::min<int64_t>(count, 3);
  const double each = (seconds_of(more) - one) / static_cast<double>(more - 1);
  return one + choice + std::max(each, 0.0) * static_cast<double>(count - 1);
}

}  // namespace

void print_dry_run(Backend& backend, const Checkpoint& source, const data::Windows& windows,
                   const TrainConfig& config, bool blocks, const PhaseMemory& whole, bool begun) {
  PhaseEstimate of_blocks, of_whole;
  if (blocks)
    of_blocks = config.method == Method::Gptq ? estimate_gptq(backend, source, windows, config)
                                              : estimate_blocks(backend, source, windows, config);
  if (trains_whole(config)) of_whole = estimate_whole(backend, source, windows, config, whole);
  const double statistics_s = statistics_seconds(backend, source, windows, config);
  std::string phases;
  if (statistics_s > 0) phases = cat("statistics ", engine::duration_text(statistics_s));
  for (const auto& [name, phase] :
       {std::pair{"blocks", of_blocks}, std::pair{"end to end", of_whole}})
    if (phase.steps > 0)
      phases +=
          cat(phases.empty() ? "" : ", ", name, " ", engine::duration_text(phase.total_s), " (",
              phase.steps, " ", phase.unit, " of ", engine::duration_text(phase.step_s), ")");
  std::printf("time%s: about %s: %s\ndry run: nothing was written\n",
              begun ? ", each phase from its start" : "",
              engine::duration_text(statistics_s + of_blocks.total_s + of_whole.total_s).c_str(),
              phases.c_str());
}

}  // namespace bbb::train
