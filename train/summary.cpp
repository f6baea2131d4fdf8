#include "train/summary.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <exception>
#include <filesystem>

#include "data/files.h"
#include "engine/progress.h"
#include "models/llama.h"
#include "train/result_quantizer.h"

namespace bbb::train {

using models::LlamaBlock;
using models::LlamaConfig;

namespace {

// Of the full-precision model, then of the result.
std::pair<double, double> perplexities(Backend& backend, const Checkpoint& source,
                                       const data::Windows& validation, const TrainConfig& config,
                                       const Recipe& recipe, const RunDirectory& run,
                                       const Observer& observer) {
  const LlamaConfig& model = source.config();
  engine::Progress progress = observer.progress("perplexity", 2 * model.layers);
  int64_t done = 0;
  const auto measure = [&](const models::LoadOuter& outer, const auto& load) {
    models::Llama outside(backend, source, models::HeadRounding::None);
    if (outer) outside.load_outer(outer, models::HeadRounding::BFloat16);
    return models::perplexity_by_blocks(outside, validation, load,
                                        [&](int64_t) { progress.set(++done); })
        .perplexity;
  };
  const double full = measure(nullptr, [&](LlamaBlock& block) {
    block.set_float(models::full_precision(source, block.layer()));
  });
  const ResultQuantizer quantize(backend, model, config, recipe);
  const models::LoadOuter trained = run.outer(recipe);
  const double result =
      measure(trained ? trained : models::outer_of(source), [&](LlamaBlock& block) {
        block.set_packed(quantize(block.layer(), run.result(block.layer(), recipe, model)));
      });
  return {full, result};
}

// A name as one word of a command line.
std::string shell_word(const std::string& name) {
  constexpr const char* kPlain =
      "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./+=:,@%";
  if (!name.empty() && name.find_first_not_of(kPlain) == name.npos) return name;
  std::string quoted = "'";
  for (const char c : name) quoted += c == '\'' ? "'\\''" : std::string(1, c);
  return quoted + "'";
}

}  // namespace

data::Windows validation_windows(const data::Windows& windows, const TrainConfig& config) {
  constexpr int64_t kLeast = 4, kShare = 4;  // measuring takes a small part of the run's time
  const int64_t most = std::max(kLeast, config.samples / kShare);
  const int64_t count =
      std::clamp<int64_t>(windows.count - config.samples, 0, std::min(config.val_samples, most));
  return windows.rows(windows.count - count, count);
}

std::string next_commands(const TrainConfig& config) {
  const std::string run = data::without_slashes(config.out),
                    widths = to_string({Stage{config.bits, config.act_bits}});
  // Beside the run, with its name in front; inside of it if the path ends in no name.
  const std::filesystem::path path =
      data::without_slashes(std::filesystem::path(run).lexically_normal().string());
  const std::string name = path.filename().string();
  const bool named = !name.empty() && name != "." && name != "..";
  const std::string model = shell_word(named ? cat(path.string(), "-", widths)
                                             : (path / widths).lexically_normal().string());
  return cat("next: bbb export --run ", shell_word(run), " --out ", model,
             "\n      bbb ppl --model ", model, " --text FILE    or    bbb decode --model ", model,
             " --prompt TEXT\n");
}

void print_summary(Backend& backend, const Checkpoint& source, const data::Windows& windows,
                   const TrainConfig& config, const Recipe& recipe, const RunDirectory& run,
                   const PhaseTimes& times, const Observer& observer) {
  std::printf("\n%s: %.4f bits per weight\n", config.out.c_str(), recipe.bits_per_weight());
  const auto start = std::chrono::steady_clock::now();
  // The run has finished: whatever is wrong with its perplexity, it can be exported.
  try {
    const data::Windows validation = validation_windows(windows, config);
    BBB_CHECK(validation.count > 0, "there are no validation windows");
    const auto [full, result] =
        perplexities(backend, source, validation, config, recipe, run, observer);
    std::printf(
        "perplexity on %lld validation windows of %lld tokens: %.2f, in full precision %.2f\n",
        static_cast<long long>(validation.count), static_cast<long long>(config.seq_len), result,
        full);
  } catch (const std::exception& error) {
    std::printf("no perplexity: %s\n", error.what());
  }
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  std::string phases;
  for (const auto& [name, phase_s] :
       {std::pair{"statistics", times.statistics_s}, std::pair{"blocks", times.blocks_s},
        std::pair{"end to end", times.whole_s}, std::pair{"perplexity", seconds}})
    if (phase_s > 0)
      phases += cat(phases.empty() ? "" : ", ", name, " ", engine::duration_text(phase_s));
  std::printf("time%s: %s\n%s", times.resumed ? " since the run was resumed" : "", phases.c_str(),
              next_commands(config).c_str());
  std::fflush(stdout);
}

}  // namespace bbb::train
