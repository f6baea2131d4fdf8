// DryRun: a training phase that belongs to no run, to measure a step or to plan memory. It holds
// all that the phase refers to. No file of a run is read or written.
#pragma once

#include <utility>

#include "train/run_directory.h"
#include "train/train.h"

namespace bbb::train {

template <typename Phase>
struct DryRun {
  // rest: the phase's own arguments.
  template <typename... Rest>
  DryRun(Backend& backend, const Checkpoint& source, const data::Windows& windows,
         const TrainConfig& of, const Observer& observed_by, Rest&&... rest)
      : config(of),
        recipe(config, source.config()),
        run(config.out),
        observer(observed_by),
        phase(backend, source, windows, config, recipe, run, observer,
              std::forward<Rest>(rest)...) {}
  DryRun(const DryRun&) = delete;  // its members refer to each other

  const TrainConfig config;
  const Recipe recipe;
  const RunDirectory run;
  const Observer observer;
  Phase phase;
};

// As many windows as a run of this configuration has, of token 0, with all that windows can carry:
// a token that does not count and, of documents, first keys.
inline data::Windows blank_windows(const TrainConfig& config) {
  const int64_t count = config.samples + config.val_samples;
  const std::vector<int32_t> zeros(static_cast<size_t>(count * config.seq_len));
  data::Windows windows{zeros, count, config.seq_len};
  windows.counted.assign(zeros.size(), 1);
  if (config.seq_len > 2) windows.counted[1] = 0;
  if (config.pack == Packing::Documents) windows.first_key = zeros;
  return windows;
}

}  // namespace bbb::train
