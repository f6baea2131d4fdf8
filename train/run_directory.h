// RunDirectory: the files of one training run (train.h), and the rules by which a killed run
// resumes.
//
// Results and states appear by rename only, so an existing file is complete. Only log.jsonl is
// appended to, before the result or state of the same steps is written; a resumed run first cuts
// the log back to the steps that results and states hold. One run at a time trains in a directory.
// Of its ranks the first one alone writes: the functions below do nothing on the others, except
// that they read.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "data/safetensors.h"
#include "data/text.h"
#include "data/tokenizer.h"
#include "models/checkpoint.h"
#include "models/layer_result.h"
#include "models/llama.h"
#include "train/config.h"
#include "train/recipe.h"
#include "train/saved_state.h"

namespace bbb::train {

using Json = nlohmann::ordered_json;

// The parts of a model or tokenizer: name -> checksum.
using Parts = std::map<std::string, std::string>;

// What a run computes, and from what. Two runs with equal identities on equal devices give equal
// bytes, if the algorithms of their matrix products (gemm.json) are equal too.
struct RunIdentity {
  TrainConfig config;  // resolved
  std::string device;  // "cpu" or "cuda"
  std::string device_name;
  Parts model;
  Parts tokenizer;  // empty: the run was given tokens
  std::string data_checksum;
  std::string from_checksum;  // of the run that --from names; "": none

  std::string to_json() const;  // run.json: the record and, last, its checksum
  std::string summary() const;  // the record without the parts, for people
};

// Parts: every tensor as it is stored, config.json and generation_config.json.
Parts model_parts(const models::Checkpoint& source);
// Parts: the tokenizer files that an export carries.
Parts tokenizer_parts(const data::Tokenizer& tokenizer);
std::string checksum_of(const Parts& parts);
// Of all token ids, and of what the windows count and attend to.
std::string data_checksum(const data::Windows& windows);
// The name of the first part that differs or that one side lacks; "" if all are equal. A run that
// was given tokens has no tokenizer parts and matches any tokenizer.
std::string difference(const RunIdentity& a, const RunIdentity& b);

// An exclusive lock on a file, which is created if missing and never removed. The system releases
// the lock when the process ends, however it ends.
class FileLock {
 public:
  // Throws the text `holder` if another process holds the lock, and the cause if locking fails.
  FileLock(const std::string& path, const std::string& holder);
  ~FileLock();
  FileLock(const FileLock&) = delete;
  FileLock& operator=(const FileLock&) = delete;

 private:
  int fd_ = -1;
};

class RunDirectory {
 public:
  enum class Access { Write, Read };
  explicit RunDirectory(std::string path, Access access = Access::Write)
      : path_(std::move(path)), access_(access) {}

  bool writes() const { return access_ == Access::Write; }

  bool exists() const;  // has a run been created here?
  // Keeps other processes from training in the directory, which must exist, as long as this object
  // lives. Throws if another process is training there. Reading needs no lock.
  void lock();
  // Creates the run, or accepts a run of this identity, and takes the lock. Throws, saying what
  // differs, if the directory holds anything else. Without write access it only accepts.
  void create_or_resume(const RunIdentity& identity);
  // Throws, saying what differs, if the existing run has another identity. Writes nothing.
  void check_identity(const RunIdentity& identity) const;
  RunIdentity identity() const;  // of an existing run
  uint64_t checksum() const;     // of run.json; the run's tensor files carry it

  const std::string& path() const { return path_; }
  std::string run_file() const { return path_ + "/run.json"; }
  std::string log_file() const { return path_ + "/log.jsonl"; }
  std::string gemm_file() const { return path_ + "/gemm.json"; }
  std::string lock_file() const;
  std::string stage_file(int64_t block, int64_t stage) const;
  std::string block_state_file() const { return path_ + "/blocks/state.safetensors"; }
  std::string e2e_state_file() const { return path_ + "/e2e/state.safetensors"; }
  std::string final_file() const { return path_ + "/e2e/final.safetensors"; }
  std::string statistics_file() const { return path_ + "/statistics.safetensors"; }
  std::string start_file() const { return path_ + "/start.safetensors"; }
  // The layers of start_file(), which is opened and checked once. `model` must outlive the result.
  LayerStart starts(const models::LlamaConfig& model) const;
  // The result of a stage of the whole model; that of the last stage is final_file().
  std::string whole_stage_file(const Recipe& recipe, size_t stage) const;
  // The statistics that the run has saved; empty if it has none yet.
  std::vector<models::LayerStatistics> statistics(const models::LlamaConfig& model) const;
  // Those of a finished run: empty if its configuration needs none. Throws if they are missing.
  std::vector<models::LayerStatistics> finished_statistics(const TrainConfig& config,
                                                           const models::LlamaConfig& model) const;
  // The result of a finished run: of its last stage. Throws if a file is missing or damaged.
  models::LayerResult result(int64_t layer, const Recipe& recipe,
                             const models::LlamaConfig& model) const;
  // The weights outside of the layers of a finished run; null if they are the source's. Reads from
  // this object.
  models::LoadOuter outer(const Recipe& recipe) const;
  // The number of stages, over all blocks in order, before the first one without a file.
  int64_t finished_stages(const TrainConfig& config, int64_t layers) const;
  bool blocks_finished(const TrainConfig& config, int64_t layers) const;
  bool finished(const TrainConfig& config, int64_t layers) const;
  bool has_states() const;
  int64_t stored_bytes() const;  // of all files that are there; 0 if there is no run
  // The result of a finished stage. Throws if its file is damaged.
  models::LayerResult stage_result(int64_t block, int64_t stage, const Recipe& recipe,
                                   const models::LlamaConfig& model) const;
  // Writes that file: masters or codes (block_content), and as metadata the validation losses.
  void write_stage(int64_t block, int64_t stage, const Recipe& recipe,
                   const models::LlamaConfig& model, const models::LayerResult& result,
                   const std::vector<double>& validation) const;
  // Both return the state that a killed run saved in the phase's first unfinished stage, if any,
  // and cut the log back to what the results and that state hold. They throw if the state's
  // position is impossible in this run or ahead of the results. `steps`: of that stage.
  std::optional<SavedState> resume_blocks(const TrainConfig& config, int64_t finished_stages) const;
  std::optional<SavedState> resume_whole(size_t stage, int64_t steps) const;
  // Removes states of finished phases, which a kill between result and removal leaves behind.
  void remove_spent_states(const TrainConfig& config, int64_t layers) const;

  void append_log(const std::vector<Json>& lines) const;

 private:
  // Removes the lines for which keep() is false, and a last line that was cut short.
  void keep_log(const std::function<bool(const Json& line)>& keep) const;
  const data::SafeTensors& final_result() const;

  std::string path_;
  Access access_;
  std::unique_ptr<FileLock> lock_;
  mutable std::optional<data::SafeTensors> final_;  // opened and checked once, by final_result()
};

// The stages of the block phase; 0 if Algorithm 2 replaces it.
int64_t block_stages(const TrainConfig& config);
// Does a stage train the whole model?
bool trains_whole(const TrainConfig& config);
// Optimizer steps of one stage.
int64_t steps_per_stage(const TrainConfig& config);

// The seed of the random stream (a, b) of a run's seed.
uint64_t sub_seed(uint64_t seed, uint64_t a, uint64_t b);

int64_t block_parameters(const models::LlamaConfig& config);  // norms and linears
// What the files of finished stages of blocks, and the final file, hold of each linear.
models::LinearContent block_content(const TrainConfig& config);
models::LinearContent final_content(const TrainConfig& config);
// What holds the weights outside of the layers at the start of the end-to-end phase.
enum class OuterStart { Source, EarlierRun };
// The size of a finished run's tensors, without file headers and the log.
int64_t result_bytes(const models::LlamaConfig& model, const TrainConfig& config,
                     OuterStart start = OuterStart::Source);

}  // namespace bbb::train
