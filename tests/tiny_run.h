// A training run small enough for tests: a random two-layer Llama, random windows, and readers of
// the files that a run writes.
#pragma once

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <map>

#include "data/files.h"
#include "tests/support.h"
#include "tests/tiny_model.h"
#include "train/config_table.h"
#include "train/run_directory.h"
#include "train/train.h"

namespace bbb::tests {

// Sets an option like `bbb train --option text`.
inline void set_option(train::TrainConfig& config, const std::string& option,
                       const std::string& text) {
  int found = 0;
  train::visit(config, [&]<typename T>(T& value, const train::Field& f) {
    if (option != f.name) return;
    value = train::parse<T>(text, f);
    ++found;
  });
  REQUIRE(found == 1);
}

struct Fixture {
  static constexpr int64_t kSeqLen = 32;
  static inline const int32_t kPoisoned =
      static_cast<int32_t>(tiny_config().vocab) - 1;  // a token in no window of the fixture

  explicit Fixture(const models::LlamaConfig& model = tiny_config()) {
    std::filesystem::create_directory(dir / "model");
    write_tiny_model(dir / "model", model, 7);
    source = models::open_checkpoint(dir / "model");
    windows.count = 24;
    windows.seq_len = kSeqLen;
    windows.ids = random_tokens(11, windows.count * kSeqLen, tiny_config().vocab - 1);
    config.model = dir / "model";
    config.data = "tokens";
    config.samples = 16;
    config.val_samples = 8;
    config.seq_len = kSeqLen;
    config.batch = 4;
    config.threads = 1;
    config.e2e_batch = 4;
    config.e2e_micro_batch = 2;
    config.save_every = 2;
  }

  // A full run: two stages of blocks, then the whole model.
  train::TrainConfig both_phases(const std::string& out) const {
    train::TrainConfig c = config;
    c.out = dir / out;
    c.stages = train::parse_stages("w4a16,w2a16");
    c.lr = {1e-3, 3e-3};
    c.e2e_steps = 5;
    c.e2e_lr = {1e-3};
    return c;
  }

  void run(const train::TrainConfig& c, train::Observer observer = {}) const {
    observer.quiet = true;
    train::train_windows(backend(), *source, windows, c, observer);
  }

  // Changes the values of a tensor of the model.
  void change(const std::string& tensor, const std::function<void(float* values)>& change) {
    const std::string path = dir / "model/model.safetensors";
    std::string bytes = data::read_file(path);
    const uint8_t* begin = reinterpret_cast<const uint8_t*>(bytes.data());
    const auto tensors = data::parse_safetensors(begin, static_cast<int64_t>(bytes.size()), path);
    change(reinterpret_cast<float*>(bytes.data() + (tensors.at(tensor).data - begin)));
    data::write_file_atomic(path, bytes);
    source = models::open_checkpoint(dir / "model");
  }

  // Makes the embedding of the last token NaN.
  void poison_last_token() {
    change("model.embed_tokens.weight", [](float* table) {
      std::fill_n(table + kPoisoned * tiny_config().d_model, tiny_config().d_model,
                  std::numeric_limits<float>::quiet_NaN());
    });
  }

  TempDir dir;
  std::unique_ptr<models::Checkpoint> source;
  data::Windows windows;
  train::TrainConfig config;
};

struct Killed {};  // thrown by an observer: the run ends there

// The content of every result file, by path relative to the run's directory. Two files are left
// out: the log, which contains times, and the lock.
inline std::map<std::string, std::string> results(const std::string& run) {
  std::map<std::string, std::string> files;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(run))
    if (entry.is_regular_file() && entry.path().filename() != "log.jsonl" &&
        entry.path().filename() != "lock")
      files[std::filesystem::relative(entry.path(), run).string()] =
          data::read_file(entry.path().string());
  return files;
}

// The log lines of one phase; for "", all lines that repeat in every run. Fields that vary between
// runs are removed.
inline std::vector<train::Json> log_lines(const std::string& run, const std::string& phase) {
  std::vector<train::Json> lines;
  std::ifstream in(run + "/log.jsonl");
  for (std::string text; std::getline(in, text);) {
    train::Json line = train::Json::parse(text);
    line.erase("tokens_per_s");
    line.erase("memory_bytes");
    const bool repeats = line["phase"] != "time";
    if (phase.empty() ? repeats : line["phase"] == phase) lines.push_back(line);
  }
  return lines;
}

}  // namespace bbb::tests
