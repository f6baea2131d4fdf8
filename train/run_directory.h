// RunDirectory: the files of one training run, and the rules by which a killed run goes on.
//
// Results and states appear by rename only, so whatever exists is whole. log.jsonl alone is
// appended to, ahead of the result or state that it leads to; a resumed run first cuts it back to
// the work that exists. One process at a time trains in a directory.
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

// What a model is made of: names and checksums.
using Parts = std::map<std::string, std::string>;

// What a run computes and from what. Two runs with equal identities give equal bytes on equal
// devices, where the algorithms of their matrix products (gemm.json) are equal too.
struct RunIdentity {
  TrainConfig config;  // resolved
  std::string device;  // "cpu" or "cuda"
  std::string device_name;
  Parts model;
  Parts tokenizer;  // empty: the run was given tokens
  std::string data_checksum;

  std::string to_json() const;  // the whole record, its own checksum last
  std::string summary() const;  // without the parts, to be read
  static RunIdentity from_json(const std::string& json, const std::string& where);
};

// Every tensor as it is stored, config.json and generation_config.json.
Parts model_parts(const models::Checkpoint& source);
// The files that an export carries.
Parts tokenizer_parts(const data::Tokenizer& tokenizer);
std::string checksum_of(const Parts& parts);
std::string data_checksum(const data::Windows& windows);  // of all token ids
// The first part that differs or that one side lacks; "" where all are equal. A run that was given
// tokens takes any tokenizer.
std::string difference(const RunIdentity& a, const RunIdentity& b);

// An exclusive lock on a file, made if it is not there and never removed. The system gives it back
// when the process ends, however it ends.
class FileLock {
 public:
  // Throws `holder`, which says who, where another process holds it, the cause where it cannot be
  // had.
  FileLock(const std::string& path, const std::string& holder);
  ~FileLock();
  FileLock(const FileLock&) = delete;
  FileLock& operator=(const FileLock&) = delete;

 private:
  int fd_ = -1;
};

class RunDirectory {
 public:
  explicit RunDirectory(std::string path) : path_(std::move(path)) {}

  bool exists() const;  // has a run been created here?
  // Keeps other processes from training in the directory, which must exist, as long as this object
  // lives. Throws where one is at it already. Reading needs no lock.
  void lock();
  // Creates the directory, or accepts one that holds a run of this identity; takes the lock.
  // Throws, saying what differs, otherwise.
  void create_or_resume(const RunIdentity& identity);
  // Throws, saying what differs, where the run that is here has another identity. Reads only.
  void check_identity(const RunIdentity& identity) const;
  RunIdentity identity() const;  // of an existing run
  uint64_t checksum() const;     // of its record, which the run's files carry

  const std::string& path() const { return path_; }
  std::string run_file() const { return path_ + "/run.json"; }
  std::string log_file() const { return path_ + "/log.jsonl"; }
  std::string gemm_file() const { return path_ + "/gemm.json"; }
  std::string lock_file() const;
  std::string stage_file(int64_t block, int64_t stage) const;
  std::string block_state_file() const { return path_ + "/blocks/state.safetensors"; }
  std::string e2e_state_file() const { return path_ + "/e2e/state.safetensors"; }
  std::string final_file() const { return path_ + "/e2e/final.safetensors"; }
  // Stages of all blocks in order, up to the first one without a file.
  int64_t finished_stages(const TrainConfig& config, int64_t layers) const;
  bool blocks_finished(const TrainConfig& config, int64_t layers) const;
  bool finished(const TrainConfig& config, int64_t layers) const;
  bool has_states() const;
  // What a finished stage left; throws where its file is damaged.
  models::LayerResult stage_result(int64_t block, int64_t stage, const Recipe& recipe,
                                   const models::LlamaConfig& model) const;
  // Writes that file, with the validation losses of the stage.
  void write_stage(int64_t block, int64_t stage, const Recipe& recipe,
                   const models::LlamaConfig& model, const models::LayerResult& result,
                   const std::vector<double>& validation) const;
  // The state that a killed run left in its first unfinished stage, if it got that far. Throws
  // where it is no place in this run or ahead of the results.
  std::optional<SavedState> block_state(const TrainConfig& config, int64_t finished_stages) const;
  // Removes states of phases that are finished: a kill can come between a result and that.
  void remove_spent_states(const TrainConfig& config, int64_t layers) const;

  void append_log(const std::vector<Json>& lines) const;
  void keep_log(const std::function<bool(const Json& line)>& keep) const;

 private:
  std::string path_;
  std::unique_ptr<FileLock> lock_;
};

// Optimizer steps of one stage.
int64_t steps_per_stage(const TrainConfig& config);

// Independent random streams from one seed.
uint64_t sub_seed(uint64_t seed, uint64_t a, uint64_t b);

int64_t block_parameters(const models::LlamaConfig& config);  // linears and norms
// What the final file holds of a linear.
models::LinearContent final_content(const TrainConfig& config);
// Of the files that a finished run holds, their headers and the log aside.
int64_t result_bytes(const models::LlamaConfig& model, const TrainConfig& config);

}  // namespace bbb::train
