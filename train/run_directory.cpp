// Files of a run: identity, lock, log, stages, states; and helpers of both phases.
#include "train/run_directory.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "data/checksum.h"
#include "data/files.h"
#include "engine/rng.h"
#include "train/run_file.h"

namespace bbb::train {
namespace {

namespace fs = std::filesystem;

// Does this key of the configuration decide what is computed? A run may resume although the other
// keys differ.
bool decides(const std::string& key) {
  return key != "model" && key != "data" && key != "from" && key != "save_every";
}

constexpr const char* kProgram = "bbb " BBB_VERSION;
constexpr const char* kLockName = "lock";
constexpr const char* kChecksum = "checksum";

void make_directory(const std::string& path) {
  std::error_code error;
  fs::create_directories(path, error);
  BBB_CHECK(!error, path, ": cannot be created: ", error.message());
}

// A kill leaves temporaries behind.
bool is_leftover(const fs::path& path) { return data::is_temporary(path.filename().string()); }

// True for what a run killed before its first file leaves behind.
bool holds_no_file(const std::string& path) {
  if (!fs::is_directory(path)) return false;
  for (const auto& entry : fs::recursive_directory_iterator(path))
    if (!entry.is_directory() && !is_leftover(entry.path()) &&
        entry.path() != fs::path(path) / kLockName)
      return false;
  return true;
}

// Only in the folders in which a run writes.
void remove_leftovers(const std::string& path) {
  std::vector<fs::path> leftovers;
  for (const char* folder : {"", "blocks", "e2e"})
    for (const auto& entry : fs::directory_iterator(fs::path(path) / folder))
      if (entry.is_regular_file() && is_leftover(entry.path())) leftovers.push_back(entry.path());
  std::error_code ignored;
  for (const fs::path& leftover : leftovers) fs::remove(leftover, ignored);
}

}  // namespace

// The record without its checksum.
static Json record_of(const RunIdentity& identity) {
  Json j;
  j["program"] = kProgram;
  j["device"] = identity.device;
  j["device_name"] = identity.device_name;
  j["model_checksum"] = checksum_of(identity.model);
  j["data_checksum"] = identity.data_checksum;
  if (!identity.from_checksum.empty()) j["from_checksum"] = identity.from_checksum;
  j["config"] = Json::parse(train::to_json(identity.config));
  j["model"] = identity.model;
  j["tokenizer"] = identity.tokenizer;
  return j;
}

static std::string with_checksum(Json record) {
  record[kChecksum] = data::hex(data::checksum64(record.dump()));
  return record.dump(2) + "\n";
}

// Parses a record. Throws unless it is byte for byte as it was written.
static Json read_record(const std::string& text, const std::string& where) {
  const Json record = Json::parse(text, nullptr, false);
  BBB_CHECK(!record.is_object() || !record.contains("config") || record.contains(kChecksum), where,
            ": holds no checksum of itself: an earlier bbb began this run; train in another --out");
  Json content = record;
  if (content.is_object()) content.erase(kChecksum);
  BBB_CHECK(content.is_object() && with_checksum(content) == text, where,
            ": damaged: its checksum does not fit; delete the run's directory to train it again");
  return record;
}

std::string RunIdentity::to_json() const { return with_checksum(record_of(*this)); }

std::string RunIdentity::summary() const {
  Json record = record_of(*this);
  record.erase("model");
  record.erase("tokenizer");
  return record.dump(2) + "\n";
}

static RunIdentity identity_of(const Json& j, const std::string& where) {
  try {
    RunIdentity identity;
    j.at("device").get_to(identity.device);
    j.at("device_name").get_to(identity.device_name);
    j.at("model").get_to(identity.model);
    j.at("tokenizer").get_to(identity.tokenizer);
    j.at("data_checksum").get_to(identity.data_checksum);
    identity.from_checksum = j.value("from_checksum", "");
    identity.config = config_from_json(j.at("config").dump(), where);
    return identity;
  } catch (const nlohmann::json::exception& error) {
    throw Error(cat(where, ": not the record of a run: ", error.what()));
  }
}

Parts model_parts(const models::Checkpoint& source) {
  const std::vector<models::TensorInfo> tensors = source.list();
  std::vector<data::Bytes> bytes;
  for (const models::TensorInfo& tensor : tensors) bytes.push_back(tensor.source);
  const std::vector<uint64_t> sums = data::checksums(bytes);
  Parts parts;
  for (size_t i = 0; i < tensors.size(); ++i)
    parts[tensors[i].name] = data::hex(data::checksum64(
        cat(tensors[i].dtype, engine::to_string(tensors[i].shape), data::hex(sums[i]))));
  parts["config.json"] = data::hex(data::checksum64(source.config_json()));
  if (const std::string generation = source.generation_config_json(); !generation.empty())
    parts["generation_config.json"] = data::hex(data::checksum64(generation));
  return parts;
}

Parts tokenizer_parts(const data::Tokenizer& tokenizer) {
  Parts parts;
  for (const auto& [name, content] : tokenizer.export_files())
    parts[name] = data::hex(data::checksum64(content));
  return parts;
}

std::string checksum_of(const Parts& parts) {
  std::string text;
  for (const auto& [name, checksum] : parts) text += cat(name, "\n", checksum, "\n");
  return data::hex(data::checksum64(text));
}

std::string data_checksum(const data::Windows& windows) {
  const auto of = []<typename T>(const std::vector<T>& values) {
    return data::hex(
        data::checksum64(values.data(), static_cast<int64_t>(values.size() * sizeof(T))));
  };
  if (windows.counted.empty() && windows.first_key.empty()) return of(windows.ids);
  return data::hex(data::checksum64(of(windows.ids) + of(windows.counted) + of(windows.first_key)));
}

static std::string difference(const Parts& a, const Parts& b) {
  for (const auto& [name, checksum] : a)
    if (b.count(name) == 0 || b.at(name) != checksum) return name;
  for (const auto& [name, checksum] : b)
    if (a.count(name) == 0) return name;
  return "";
}

std::string difference(const RunIdentity& a, const RunIdentity& b) {
  const std::string model = difference(a.model, b.model);
  if (!model.empty() || a.tokenizer.empty() || b.tokenizer.empty()) return model;
  return difference(a.tokenizer, b.tokenizer);
}

FileLock::FileLock(const std::string& path, const std::string& holder)
    : fd_(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666)) {
  BBB_CHECK(fd_ >= 0, path, ": cannot be opened: ", std::strerror(errno));
  if (::flock(fd_, LOCK_EX | LOCK_NB) == 0) return;
  const int error = errno;
  ::close(fd_);
  throw Error(error == EWOULDBLOCK ? cat(path, ": ", holder)
                                   : cat(path, ": cannot be locked: ", std::strerror(error)));
}

FileLock::~FileLock() { ::close(fd_); }

bool RunDirectory::exists() const { return fs::exists(run_file()); }

void RunDirectory::lock() {
  if (!lock_ && writes())
    lock_ =
        std::make_unique<FileLock>(lock_file(), "another process is training in this directory");
}

void RunDirectory::create_or_resume(const RunIdentity& identity) {
  if (!writes()) {
    if (exists()) check_identity(identity);
    return;
  }
  BBB_CHECK(exists() || !fs::exists(path_) || holds_no_file(path_), path_,
            ": exists, but holds no training run; name another --out");
  make_directory(path_);
  lock();
  if (!exists()) {
    make_directory(path_ + "/blocks");
    make_directory(path_ + "/e2e");
    remove_leftovers(path_);
    data::write_file_atomic(run_file(), identity.to_json());
    return;
  }
  check_identity(identity);
  remove_leftovers(path_);
}

void RunDirectory::check_identity(const RunIdentity& identity) const {
  const Json there = read_record(data::read_file(run_file()), run_file());
  const Json here = record_of(identity);
  // The record of another version of bbb may have other keys, so the version is compared first.
  for (const char* key : {"program", "device", "device_name", "data_checksum", "from_checksum"})
    BBB_CHECK(
        there.value(key, "none") == here.value(key, "none"), path_, ": holds a run with another ",
        key, ": ", there.value(key, "none"), ", here ", here.value(key, "none"),
        key == std::string("device") ? cat("; give --device ", there.value(key, "none"), " or")
                                     : ";",
        " name another --out");
  const std::string part = difference(this->identity(), identity);
  BBB_CHECK(part.empty(), path_, ": holds a run of another model: ", part,
            " differs; name another --out");
  for (const auto& [key, value] : here["config"].items()) {
    if (!decides(key) || (key == "threads" && identity.device == "cuda")) continue;
    const Json other = there["config"].value(key, Json());
    BBB_CHECK(key != "threads" || other == value, path_, ": holds a run of ", other.dump(),
              " threads; give --threads ", other.dump(), " to continue it");
    BBB_CHECK(other == value, path_, ": holds a run with another configuration: ", key, " is ",
              other.dump(), " there and ", value.dump(), " here; name another --out");
  }
  for (const auto& [key, value] : there["config"].items())
    BBB_CHECK(here["config"].contains(key), path_,
              ": holds a run with another configuration: ", key, " is ", value.dump(),
              " there and not set here; name another --out");
}

RunIdentity RunDirectory::identity() const {
  BBB_CHECK(fs::exists(run_file()), path_, ": no training run (it has no run.json)");
  const Json record = read_record(data::read_file(run_file()), run_file());
  const std::string program = record.value("program", "none");
  BBB_CHECK(program == kProgram, path_, ": holds a run of ", program, ", and this is ", kProgram);
  return identity_of(record, run_file());
}

uint64_t RunDirectory::checksum() const { return data::checksum64(data::read_file(run_file())); }

std::string RunDirectory::lock_file() const { return cat(path_, "/", kLockName); }

std::string RunDirectory::stage_file(int64_t block, int64_t stage) const {
  char name[80];
  std::snprintf(name, sizeof name, "/blocks/block_%03lld_stage_%lld.safetensors",
                static_cast<long long>(block), static_cast<long long>(stage));
  return path_ + name;
}

int64_t RunDirectory::finished_stages(const TrainConfig& config, int64_t layers) const {
  const int64_t stages = block_stages(config);
  int64_t done = 0;
  while (done < layers * stages && fs::exists(stage_file(done / stages, done % stages))) ++done;
  return done;
}

bool RunDirectory::blocks_finished(const TrainConfig& config, int64_t layers) const {
  return finished_stages(config, layers) == layers * block_stages(config);
}

bool RunDirectory::finished(const TrainConfig& config, int64_t layers) const {
  return trains_whole(config) ? fs::exists(final_file()) : blocks_finished(config, layers);
}

bool RunDirectory::has_states() const {
  return fs::exists(block_state_file()) || fs::exists(e2e_state_file());
}

int64_t RunDirectory::stored_bytes() const {
  if (!exists()) return 0;
  int64_t bytes = 0;
  // A process that trains here may remove a file meanwhile: it counts nothing.
  std::error_code stopped, gone;
  for (fs::recursive_directory_iterator at(path_, stopped), end; at != end; at.increment(stopped))
    if (at->is_regular_file(gone))
      if (const auto size = at->file_size(gone); !gone) bytes += static_cast<int64_t>(size);
  return bytes;
}

models::LayerResult RunDirectory::stage_result(int64_t block, int64_t stage, const Recipe& recipe,
                                               const models::LlamaConfig& model) const {
  const data::SafeTensors file = open_run_file(stage_file(block, stage), checksum(),
                                               "delete it, and the run trains from there again");
  return models::read_layer(file, block, model, recipe.stage_formats(block, stage));
}

// Whether a result's masters have ratios.
static RangeRule result_range(const models::LayerResult& result) {
  return result.linears[0].ratios.empty() ? RangeRule::MinMax : RangeRule::Search;
}

void RunDirectory::write_stage(int64_t block, int64_t stage, const Recipe& recipe,
                               const models::LlamaConfig& model, const models::LayerResult& result,
                               const std::vector<double>& validation) const {
  if (!writes()) return;
  const auto content = result.linears[0].quantized() ? models::LinearContent::Stored
                                                     : models::LinearContent::Masters;
  std::vector<data::SafeTensorsWriter::Entry> entries;
  models::declare_layer(entries, block, model, recipe.stage_formats(block, stage), content,
                        result_range(result));
  RunFileWriter writer(
      stage_file(block, stage), checksum(), entries,
      {{"stage", recipe.stage_name(stage)}, {"validation_loss", Json(validation).dump()}});
  models::add_layer(writer, block, model, result, content);
  writer.finish();
}

std::optional<SavedState> RunDirectory::resume_blocks(const TrainConfig& config,
                                                      int64_t finished_stages) const {
  const int64_t stages = block_stages(config), current = finished_stages / stages;
  const std::string file = block_state_file();
  std::optional<SavedState> saved;
  if (fs::exists(file)) {
    saved.emplace(file, checksum());
    const Position& at = saved->position();
    const int64_t stage = at.block * stages + at.stage;
    const int64_t epoch = at.step / (config.samples / config.batch);
    BBB_CHECK(at.block >= 0 && at.stage >= 0 && at.stage < stages && at.step > 0 &&
                  at.step < steps_per_stage(config) &&
                  static_cast<int64_t>(at.validation.size()) == epoch + 1,
              file, ": block ", at.block, ", stage ", at.stage, ", step ", at.step,
              " is not a position of this run");
    BBB_CHECK(stage <= finished_stages, file, ": is of block ", at.block, ", stage ", at.stage,
              ", but ", stage_file(current, finished_stages % stages),
              " is missing; delete the state, too, to train from there again");
    if (stage < finished_stages) saved.reset();  // its stage has finished since
  }
  // The log of a block: lines of its finished stages, then those up to the saved state.
  const int64_t lines_per_stage = steps_per_stage(config) + config.epochs + 1;
  int64_t left = finished_stages % stages * lines_per_stage;
  if (saved)
    left += saved->position().step + static_cast<int64_t>(saved->position().validation.size());
  keep_log([&](const Json& line) {
    const int64_t block = line.value("block", current + 1);
    return block < current || (block == current && left-- > 0);
  });
  return saved;
}

std::optional<SavedState> RunDirectory::resume_whole(size_t stage, int64_t steps) const {
  const auto number = static_cast<int64_t>(stage);
  std::optional<SavedState> saved;
  if (fs::exists(e2e_state_file())) saved.emplace(e2e_state_file(), checksum());
  if (saved && saved->position().stage < number) saved.reset();  // its stage has finished since
  const Position at = saved ? saved->position() : Position();
  BBB_CHECK(!saved || (at.stage == number && at.step > 0 && at.step < steps), e2e_state_file(),
            ": stage ", at.stage, ", step ", at.step, " of ", steps);
  keep_log([&](const Json& line) {
    if (line.value("phase", "") != "e2e") return true;
    const int64_t of = line.value("stage_number", int64_t{0});
    return of < number || (of == number && line.value("step", int64_t{0}) < at.step);
  });
  return saved;
}

void RunDirectory::remove_spent_states(const TrainConfig& config, int64_t layers) const {
  if (!writes()) return;
  if (blocks_finished(config, layers)) fs::remove(block_state_file());
  if (fs::exists(final_file())) fs::remove(e2e_state_file());
}

void RunDirectory::append_log(const std::vector<Json>& lines) const {
  if (!writes()) return;
  std::ofstream out(log_file(), std::ios::app | std::ios::binary);
  for (const Json& line : lines) out << line.dump() << '\n';
  out.flush();
  BBB_CHECK(out.good(), log_file(), ": cannot be written: ", std::strerror(errno));
}

void RunDirectory::keep_log(const std::function<bool(const Json& line)>& keep) const {
  if (!writes() || !fs::exists(log_file())) return;
  std::ifstream in(log_file(), std::ios::binary);
  std::string kept, text;
  while (std::getline(in, text)) {
    const Json line = Json::parse(text, nullptr, false);  // the last one may be cut short
    if (line.is_object() && keep(line)) kept += text + "\n";
  }
  data::write_file_atomic(log_file(), kept);
}

int64_t steps_per_stage(const TrainConfig& config) {
  return config.epochs * (config.samples / config.batch);
}

uint64_t sub_seed(uint64_t seed, uint64_t a, uint64_t b) {
  const uint64_t words[] = {seed, a, b};
  return engine::seed_from(words, sizeof words);
}

int64_t result_bytes(const models::LlamaConfig& model, const TrainConfig& config,
                     OuterStart start) {
  const Recipe recipe(config, model);
  std::vector<data::SafeTensorsWriter::Entry> entries;
  for (int64_t layer = 0; layer < model.layers; ++layer) {
    if (Recipe::needs_starts(config))
      models::declare_layer(entries, layer, model, recipe.result_formats(layer),
                            models::LinearContent::Stored, config.range);
    for (int64_t t = 0; t < block_stages(config); ++t)
      models::declare_layer(entries, layer, model, recipe.stage_formats(layer, t),
                            block_content(config), config.range);
    for (size_t t = 0; t < recipe.whole_stages().size(); ++t)
      models::declare_layer(entries, layer, model, recipe.whole_formats(layer, t),
                            final_content(config), config.range);
  }
  if (config.e2e_embedding == EmbeddingTrain::Train || start == OuterStart::EarlierRun)
    for (size_t t = 0; t < recipe.whole_stages().size(); ++t) models::declare_outer(entries, model);
  int64_t bytes = 0;
  for (const data::SafeTensorsWriter::Entry& entry : entries)
    bytes += engine::numel_of(entry.shape) * data::size_bytes(entry.dtype);
  return bytes;
}

int64_t block_stages(const TrainConfig& config) {
  return config.block_schedule == BlockSchedule::All ? static_cast<int64_t>(config.stages.size())
                                                     : 0;
}

bool trains_whole(const TrainConfig& config) {
  return config.e2e_steps > 0 || config.block_schedule != BlockSchedule::All;
}

std::string RunDirectory::whole_stage_file(const Recipe& recipe, size_t stage) const {
  return stage + 1 == recipe.whole_stages().size()
             ? final_file()
             : cat(path_, "/e2e/stage_", stage, ".safetensors");
}

std::vector<models::LayerStatistics> RunDirectory::statistics(
    const models::LlamaConfig& model) const {
  if (!fs::exists(statistics_file())) return {};
  return models::read_statistics(
      open_run_file(statistics_file(), checksum(), "delete the run's directory to train it again"),
      model);
}

std::vector<models::LayerStatistics> RunDirectory::finished_statistics(
    const TrainConfig& config, const models::LlamaConfig& model) const {
  std::vector<models::LayerStatistics> layers = statistics(model);
  BBB_CHECK(!layers.empty() || !Recipe::needs_statistics(config), statistics_file(),
            ": is missing; delete the run's directory to train it again");
  return layers;
}

LayerStart RunDirectory::starts(const models::LlamaConfig& model) const {
  const auto file = std::make_shared<data::SafeTensors>(
      open_run_file(start_file(), checksum(), "delete the run's directory to train it again"));
  return [file, &model](int64_t layer, const std::vector<quant::LinearFormat>& formats) {
    return models::read_layer(*file, layer, model, formats);
  };
}

models::LayerResult RunDirectory::result(int64_t layer, const Recipe& recipe,
                                         const models::LlamaConfig& model) const {
  if (recipe.whole_stages().empty())
    return stage_result(layer, recipe.block_stages() - 1, recipe, model);
  return models::read_layer(final_result(), layer, model, recipe.result_formats(layer));
}

models::LoadOuter RunDirectory::outer(const Recipe& recipe) const {
  return recipe.whole_stages().empty() ? nullptr : models::outer_of(final_result());
}

const data::SafeTensors& RunDirectory::final_result() const {
  if (!final_)
    final_.emplace(
        open_run_file(final_file(), checksum(), "delete it, and the run trains end to end again"));
  return *final_;
}

models::LinearContent block_content(const TrainConfig& config) {
  return finds_codes(config) ? models::LinearContent::Stored : models::LinearContent::Masters;
}

models::LinearContent final_content(const TrainConfig& config) {
  // Masters alone would lose a learned grid.
  const bool masters = config.e2e_train == EndToEndTrain::All && !learns_whole_grid(config);
  return masters ? models::LinearContent::Masters : models::LinearContent::Stored;
}

int64_t block_parameters(const models::LlamaConfig& config) {
  int64_t total = 0;
  for (const models::NormShape& norm : models::block_norms(config)) total += norm.size;
  for (const models::LinearShape& linear : models::block_linears(config))
    total += linear.n * (linear.k + (linear.bias ? 1 : 0));
  return total;
}

}  // namespace bbb::train
