// Training to 2 bits and exporting the result: what the `bbb` command calls.
//
// A run lives in one directory:
//   run.json                      resolved configuration, checksums, program version, device
//   gemm.json                     algorithms of matrix products, if they were timed
//   log.jsonl                     one line a step
//   statistics.safetensors        of the input sites, if the grid needs them, and their allocation
//   start.safetensors             where the weights of LC start
//   lock                          held by the process that trains
//   blocks/block_000_stage_0.safetensors  a finished stage of a block: its masters
//   blocks/state.safetensors      the newest state of the stage that is being trained
//   e2e/state.safetensors         the newest state of the end-to-end phase, while it runs
//   e2e/stage_0.safetensors       a finished stage of the whole model, except for the last one
//   e2e/final.safetensors         its result
// Every result and state appears by a rename. So a run killed at any moment resumes from these
// files and ends with the same bytes.
#pragma once

#include <functional>
#include <limits>
#include <string>

#include "data/text.h"
#include "data/tokenizer.h"
#include "engine/backend.h"
#include "engine/progress.h"
#include "models/checkpoint.h"
#include "models/packed_checkpoint.h"
#include "train/fit.h"

namespace bbb::train {

using engine::Backend;
using engine::Tensor;
using engine::WeightGrid;
using models::Checkpoint;

// Callbacks between units of work. An exception from one ends the run there, as a kill would.
struct Observer {
  bool quiet = false;  // no output
  std::function<void(int64_t block)> after_block = nullptr;
  std::function<void(int64_t block, int64_t stage, int64_t step)> after_block_step = nullptr;
  std::function<void(int64_t step)> after_e2e_step = nullptr;

  // Shows nothing if quiet.
  engine::Progress progress(const std::string& label, int64_t total, double silent_s = 0) const {
    return {label, total, quiet ? std::numeric_limits<double>::infinity() : silent_s};
  }
};

// The tokens of config.data (data::training_tokens).
data::TokenStream training_tokens(const Checkpoint& source, const data::Tokenizer& tokenizer,
                                  const TrainConfig& config);

// Creates or resumes the run in config.out. A finished run is not changed. Throws if the directory
// holds something else, or a run with another configuration, model or data. Of the windows the
// first `samples` train, the last `val_samples` validate. An export then requires this tokenizer;
// if it is null, any. With config.dry_run it prints what the run will take, and writes nothing.
void train_windows(Backend& backend, const Checkpoint& source, const data::Windows& windows,
                   TrainConfig config, const Observer& observer,
                   const data::Tokenizer* tokenizer = nullptr);

// Exports a finished run. The model and its tokenizer are read from `model_path` or, if that is
// empty, from the path in run.json. Throws if they are not the run's, or if a file is damaged.
models::ExportSummary export_run(Backend& backend, const std::string& run_directory,
                                 const std::string& model_path, const std::string& out_directory,
                                 const models::ExportOptions& options);
models::ExportSummary export_run(Backend& backend, const Checkpoint& source,
                                 const data::Tokenizer& tokenizer, const std::string& run_directory,
                                 const std::string& out_directory,
                                 const models::ExportOptions& options);

// Exports `source` rounded to nearest, without training: config.bits and act_bits, group and the
// options of the grid. config.data is read only if they need statistics; then options that were not
// typed shrink to fit it.
models::ExportSummary export_rtn(Backend& backend, const Checkpoint& source,
                                 const data::Tokenizer& tokenizer, TrainConfig config,
                                 const std::string& out_directory,
                                 const models::ExportOptions& options, const Typed& typed = {});

}  // namespace bbb::train
