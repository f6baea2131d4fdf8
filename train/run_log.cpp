#include "train/run_log.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <limits>

#include "quant/check.h"

namespace bbb::train {
namespace {

constexpr double kNotFinite = std::numeric_limits<double>::quiet_NaN();

// JSON has no word for NaN and infinity: the log has null for them.
double number(const Json& line, const char* key) {
  const Json& value = line.at(key);
  return value.is_null() ? kNotFinite : value.get<double>();
}

class LogReader {
 public:
  explicit LogReader(const TrainConfig& config) : config_(config) {}

  // Throws nlohmann's exception if the line lacks something.
  void read(const Json& line) {
    const std::string phase = line.at("phase");
    if (phase == "validation")
      validation(line);
    else if (phase == "block")
      add_step(log_.blocks.at(current(line)), line, config_.batch);
    else if (phase == "e2e")
      end_to_end(line);
    else if (phase == "time")
      time(line);
    // A phase that a later part of bbb logs is no series of this reader.
  }

  RunLog take() { return std::move(log_); }

 private:
  // The stage that the line belongs to: the newest, of its block.
  size_t current(const Json& line) const {
    BBB_CHECK(!log_.blocks.empty() && log_.blocks.back().block == line.at("block"),
              "a line of a stage that has not begun");
    return log_.blocks.size() - 1;
  }

  // A stage begins with the validation before its first step. Its name does not tell: the stages of
  // a cyclic schedule share names.
  void validation(const Json& line) {
    if (line.at("epoch") == 0) {
      LoggedBlockStage stage;
      stage.stage = line.at("stage");
      stage.block = line.at("block");
      log_.blocks.push_back(std::move(stage));
    }
    log_.blocks[current(line)].validation.push_back(number(line, "loss"));
  }

  void end_to_end(const Json& line) {
    const size_t stage = line.at("stage_number");
    BBB_CHECK(stage <= log_.whole.size(), "a line of stage ", stage, " before the one in front");
    if (stage == log_.whole.size()) log_.whole.push_back({line.at("stage"), {}, 0, 0});
    add_step(log_.whole[stage], line, config_.e2e_batch);
  }

  void add_step(LoggedSteps& steps, const Json& line, int64_t windows) {
    steps.loss.push_back(number(line, "loss"));
    if (line.at("skipped")) ++steps.skipped;
    const double tokens_per_s = number(line, "tokens_per_s");
    if (tokens_per_s > 0)
      steps.seconds += static_cast<double>(windows * config_.seq_len) / tokens_per_s;
    log_.peak_bytes = std::max<int64_t>(log_.peak_bytes, line.at("memory_bytes"));
    log_.recompute = line.at("recompute");
  }

  void time(const Json& line) {
    LoggedTime entry;
    entry.block = line.at("block");
    for (const Json& stage : line.at("stages"))
      entry.time.stages.push_back({number(stage, "train_s"), number(stage, "validation_s")});
    entry.time.streams_s = number(line, "streams_s");
    entry.time.weights_s = number(line, "weights_s");
    log_.times.push_back(std::move(entry));
  }

  const TrainConfig& config_;
  RunLog log_;
};

}  // namespace

double LoggedSteps::mean_loss(size_t begin, size_t end) const {
  double sum = 0;
  int64_t count = 0;
  for (size_t i = begin; i < std::min(end, loss.size()); ++i) {
    if (!std::isfinite(loss[i])) continue;
    sum += loss[i];
    ++count;
  }
  return count == 0 ? kNotFinite : sum / static_cast<double>(count);
}

double LoggedBlockStage::start() const {
  return validation.empty() ? kNotFinite : validation.front();
}

double LoggedBlockStage::result() const {
  double lowest = kNotFinite;
  for (double loss : validation)
    if (std::isfinite(loss) && !(lowest <= loss)) lowest = loss;
  return lowest;
}

RunLog read_log(const RunDirectory& run, const TrainConfig& config) {
  LogReader reader(config);
  std::ifstream in(run.log_file(), std::ios::binary);
  int64_t number = 0;
  for (std::string text; std::getline(in, text);) {
    ++number;
    const Json line = Json::parse(text, nullptr, false);
    if (in.eof() && !line.is_object()) break;  // cut short
    try {
      BBB_CHECK(line.is_object(), "no JSON object");
      reader.read(line);
    } catch (const std::exception& error) {
      throw Error(cat(run.log_file(), ":", number, ": not a line of a run's log: ", error.what()));
    }
  }
  return reader.take();
}

}  // namespace bbb::train
