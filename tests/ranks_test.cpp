// Training by several ranks on CPUs: the result of one up to the order of sums, the same bytes in
// every repetition, and a resume by any number of ranks.
#include "tools/ranks.h"

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <csignal>
#include <cstdlib>

#ifdef BBB_HAS_CUDA
#include "cuda/cuda_backend.h"
#endif
#include "cuda/nccl_comm.h"
#include "data/half.h"
#include "tests/on_ranks.h"
#include "tests/tiny_run.h"
#include "train/memory_plan.h"

namespace bbb::tests {
namespace {

using Catch::Matchers::Contains;
using Ranks = std::shared_ptr<engine::Comm>;

// 1, 2 and 3 ranks share its batches; the validation windows are no multiple of either.
train::TrainConfig shared_run(const std::string& out) {
  train::TrainConfig c;
  c.model = "model";
  c.data = "tokens";
  c.out = out;
  c.samples = 15;
  c.val_samples = 5;
  c.seq_len = Fixture::kSeqLen;
  c.batch = 6;
  c.threads = 1;
  c.e2e_batch = 6;
  c.e2e_micro_batch = 2;
  c.save_every = 2;
  c.stages = train::parse_stages("w4a16,w2a16");
  c.lr = {1e-3, 3e-3};
  c.e2e_steps = 3;
  c.e2e_lr = {1e-3};
  return c;
}

using Options = std::vector<std::pair<const char*, const char*>>;
// What needs statistics, streams of two stages, and everything that changes gradients.
const Options kChannelOrder = {{"ocs-ratio", "0.25"},   {"range", "search"},
                               {"rotate", "group"},     {"act-outliers", "32"},
                               {"split-side", "auto"},  {"input-stream", "mix"},
                               {"e2e-damping", "1e-3"}, {"e2e-average", "0.5"}};
const Options kNested = {{"any-precision", "8,2"}, {"stages", "w8a16"},
                         {"lr", "1e-3"},           {"optimizer", "muon"},
                         {"recompute", "block"},   {"e2e-embedding", "train"}};
// Sharded weights with everything that reads or changes them; and with one backward pass a step.
const Options kWhole = {{"stages", ""},         {"e2e-stages", "w4a16:1,w2a16:2"},
                        {"e2e-lr", "1e-3"},     {"e2e-damping", "1e-3"},
                        {"e2e-average", "0.5"}, {"e2e-freeze", "flips"},
                        {"range", "search"},    {"e2e-embedding", "train"},
                        {"recompute", "block"}, {"e2e-steps", "4"}};
const Options kOnePass = {{"stages", ""},           {"e2e-batch", "6"},
                          {"e2e-micro-batch", "6"}, {"e2e-stages", "w2a16:2"},
                          {"quantizer", "seq"},     {"e2e-steps", "4"}};
const Options kPrecisions = {
    {"stages", ""}, {"e2e-stages", "w8a16:2"}, {"any-precision", "8,4,2"}, {"e2e-steps", "4"}};
const Options kPacked = {{"stages", ""}, {"e2e-moments", "8bit"}, {"e2e-steps", "4"}};
// Algorithm 2: a stage leaves some blocks at 16 bits.
const Options kSwitched = {{"stages", "w8a16,w2a16"}, {"block-schedule", "prefix"},
                           {"first-ratio", "0.5"},    {"lr", "1e-3"},
                           {"epochs", "1"},           {"e2e-steps", "0"}};
const Options kLora = {{"lora-rank", "4"}, {"lora-match", "none"}};
const Options kGptq = {{"method", "gptq"}, {"stages", "w2a16"}};
const Options kBlockAp = {{"method", "block-ap"}, {"stages", "w2a16"}, {"lr", "1e-3"}};
const Options kLc = {{"quantizer", "lc"}, {"stages", "w2a16"}, {"lr", "1e-3"}};

void apply(train::TrainConfig& config, const Options& options) {
  train::visit(config, [&]<typename T>(T& value, const train::Field& f) {
    for (const auto& [name, text] : options)
      if (f.name == std::string(name)) value = train::parse<T>(text, f);
  });
}

// Leaves too little memory for the streams between blocks: files in `scratch` hold some of them.
void spill_streams(train::TrainConfig& config, Backend& device, const std::string& scratch) {
  config.memory.recompute = models::Recompute::None;
  const models::LlamaConfig model = tiny_config();
  const train::BlockMemory memory =
      train::plan_block_memory(device, model, train::resolve(config, model, device.device()));
  config.memory.device_bytes = train::allocated_bytes(device, memory.device_bytes - 1);
  // For the batches on their way.
  config.memory.host_bytes = 37'500 * engine::size_bytes(device.act());
  config.memory.scratch = scratch;
}

// Trains in `out` with `ranks` threads, each with its own backend, from the same model and windows.
std::vector<std::string> train_on(int ranks, const std::string& out, const Options& options = {},
                                  const train::Observer& observed = {},
                                  const std::string& scratch = "",
                                  const models::LlamaConfig& model = tiny_config()) {
  return on_ranks(ranks, [&](const Ranks& comm) {
    const Fixture fixture(model);
    const auto device = engine::make_cpu_backend(1);
    train::TrainConfig config = shared_run(out);
    apply(config, options);
    config.comm = comm;
    if (!scratch.empty()) spill_streams(config, *device, scratch);
    train::Observer observer = observed;
    observer.quiet = true;
    train::train_windows(*device, *fixture.source, fixture.windows, config, observer);
  });
}

// How far a run's files are from another's.
struct Difference {
  double masters = 0;  // the largest ||a - b|| / ||b|| over the F32 tensors of a file
  double codes = 0;    // the part of the packed codes' bytes that differ
};

Difference difference_of(const std::string& run, const std::string& other) {
  Difference difference;
  int64_t bytes = 0, differing = 0;
  for (const auto& [file, content] : results(other)) {
    if (!file.ends_with(".safetensors")) continue;
    const data::SafeTensors a(run + "/" + file), b(other + "/" + file);
    std::vector<double> x, y;
    for (const auto& [name, right] : b.tensors()) {
      const data::SafeTensor& left = a.at(name);
      REQUIRE(left.shape == right.shape);
      if (name.ends_with(".qweight")) {
        bytes += right.numel();
        for (int64_t i = 0; i < right.numel(); ++i) differing += left.data[i] != right.data[i];
      }
      if (right.dtype != data::FileDType::F32) continue;
      for (int64_t i = 0; i < right.numel(); ++i) {
        x.push_back(data::load_as<float>(left.data + 4 * i));
        y.push_back(data::load_as<float>(right.data + 4 * i));
      }
    }
    if (!x.empty()) difference.masters = std::max(difference.masters, relative_error(x, y));
  }
  if (bytes > 0) difference.codes = static_cast<double>(differing) / static_cast<double>(bytes);
  return difference;
}

std::vector<double> losses_of(const std::string& run) {
  std::vector<double> losses;
  for (const train::Json& line : log_lines(run, ""))
    if (line.contains("loss")) losses.push_back(line["loss"]);
  return losses;
}

}  // namespace

// The order of sums changes a gradient by a few ulps. A step of AdamW is a gradient divided by its
// root mean square, so an element that is nearly 0 may move by another part of the rate. Measured
// below, on three kinds of CPUs: losses 6e-8 to 6e-6, masters 1e-5.
constexpr double kLosses = 2e-5, kMasters = 1e-4;

static void check_close(const std::string& run, const std::string& other, double losses = kLosses,
                        double masters = kMasters, double codes = 0) {
  CHECK(relative_error(losses_of(run), losses_of(other)) < losses);
  const Difference difference = difference_of(run, other);
  CHECK(difference.masters < masters);
  CHECK(difference.codes <= codes);
  // Nothing that is saved tells the number of ranks.
  const auto files = results(run), expected = results(other);
  CHECK(files.size() == expected.size());
  CHECK(files.at("run.json") == expected.at("run.json"));
  CHECK(log_lines(run, "").size() == log_lines(other, "").size());
}

TEST_CASE("two and three ranks train what one trains, up to the order of sums", "[train][ranks]") {
  for (const auto& [name, options] : {std::pair{"plain", Options{}},
                                      {"channel order", kChannelOrder},
                                      {"nested", kNested},
                                      {"whole", kWhole},
                                      {"one pass", kOnePass},
                                      {"precisions", kPrecisions},
                                      {"switched", kSwitched},
                                      {"lora", kLora},
                                      {"gptq", kGptq},
                                      {"block-ap", kBlockAp}}) {
    const TempDir dir;
    REQUIRE(train_on(1, dir / "1", options) == no_errors(1));
    for (const int ranks : {2, 3}) {
      INFO(name << ", " << ranks << " ranks");
      const std::string run = dir / std::to_string(ranks);
      REQUIRE(train_on(ranks, run, options) == no_errors(ranks));
      // GPTQ feeds the error of a code to those that follow: where one flips, others may.
      if (name == std::string("gptq"))
        check_close(run, dir / "1", 1e-3, kMasters, 1e-3);
      else
        check_close(run, dir / "1");
    }
  }
}

// The last gradient of a pass and the first one of the next are in the same buffer.
TEST_CASE("ranks shard an odd number of linears", "[train][ranks]") {
  models::LlamaConfig model = tiny_config();
  model.layers = 3;
  const TempDir dir;
  const Options options = {{"stages", ""}, {"e2e-steps", "3"}};
  for (const int ranks : {1, 2})
    REQUIRE(train_on(ranks, dir / std::to_string(ranks), options, {}, "", model) ==
            no_errors(ranks));
  check_close(dir / "2", dir / "1");
}

// Each of LC's first codes takes the errors of those before it, so that one flip has others follow.
TEST_CASE("ranks start LC from the moments of all windows", "[train][ranks]") {
  const TempDir dir;
  REQUIRE(train_on(1, dir / "1", kLc) == no_errors(1));
  REQUIRE(train_on(3, dir / "3", kLc) == no_errors(3));
  check_close(dir / "3", dir / "1", 0.03, 0.3, 0.15);  // measured 0.012, 0.16, 0.08
}

TEST_CASE("ranks repeat their run byte for byte, wherever streams are", "[train][ranks]") {
  const TempDir dir;
  Options blocks = kChannelOrder;
  blocks.emplace_back("e2e-steps", "0");
  REQUIRE(train_on(3, dir / "a", blocks) == no_errors(3));
  std::filesystem::create_directory(dir / "scratch");
  REQUIRE(train_on(3, dir / "b", blocks, {}, dir / "scratch") == no_errors(3));
  CHECK(results(dir / "a") == results(dir / "b"));
}

TEST_CASE("ranks with sharded weights repeat their run byte for byte", "[train][ranks]") {
  for (const Options& options : {kWhole, kPacked}) {
    const TempDir dir;
    for (const char* run : {"a", "b"}) REQUIRE(train_on(2, dir / run, options) == no_errors(2));
    CHECK(results(dir / "a") == results(dir / "b"));
  }
}

// What a rank plans is what it holds: the weights' parts, and the buffers of their gradients.
TEST_CASE("the memory of a rank with sharded weights is planned", "[train][ranks]") {
  for (const auto& [name, options] : {std::pair{"whole", kWhole},
                                      {"one pass", kOnePass},
                                      {"precisions", kPrecisions},
                                      {"8 bits", kPacked}})
    for (const int ranks : {1, 2, 3}) {
      INFO(name << ", " << ranks << " ranks");
      const TempDir dir;
      const auto errors = on_ranks(ranks, [&](const Ranks& comm) {
        const Fixture fixture;
        const auto device = engine::make_cpu_backend(1);
        const models::LlamaConfig& model = fixture.source->config();
        train::TrainConfig config = shared_run(dir / "run");
        apply(config, options);
        config.range = train::RangeRule::MinMax;  // no statistics
        config.e2e_stages.resize(1);
        config.memory.recompute = models::Recompute::Block;
        config.comm = comm;
        const int64_t planned = train::plan_end_to_end_memory(
                                    *device, model, train::resolve(config, model, device->device()))
                                    .device_bytes;
        device->reset_memory_peak();
        train::train_windows(*device, *fixture.source, fixture.windows, config, {.quiet = true});
        // A plan has room for the factors of losses that leave tokens out.
        const int64_t held = device->memory_peak_bytes();
        BBB_CHECK(held <= planned && planned < held + 512, "rank ", comm->rank(), " holds ", held,
                  ", planned ", planned);
      });
      CHECK(errors == no_errors(ranks));
    }
}

namespace {

// Ends every rank at a step of a stage of a block, or of the end-to-end phase if block is -1.
train::Observer stop_at(int64_t block, int64_t stage, int64_t step) {
  train::Observer observer;
  observer.after_block_step = [=](int64_t b, int64_t t, int64_t s) {
    if (b == block && t == stage && s == step) throw Error("stopped");
  };
  observer.after_e2e_step = [=](int64_t s) {
    if (block < 0 && s == step) throw Error("stopped");
  };
  return observer;
}

struct Leg {
  int ranks;
  int64_t block, stage, step;
};

// Trains leg by leg, each up to its stop, then to the end by `ranks`.
void train_in_legs(const std::string& out, const std::vector<Leg>& legs, int ranks,
                   const Options& options = {}) {
  for (const Leg& leg : legs) {
    const auto errors = train_on(leg.ranks, out, options, stop_at(leg.block, leg.stage, leg.step));
    for (const std::string& error : errors) CHECK_THAT(error, Contains("stopped"));
  }
  REQUIRE(train_on(ranks, out, options) == no_errors(ranks));
}

}  // namespace

TEST_CASE("a run continues with another number of ranks", "[train][ranks]") {
  const TempDir dir;
  REQUIRE(train_on(1, dir / "whole") == no_errors(1));
  train_in_legs(dir / "run", {{3, 0, 1, 3}, {1, 1, 0, 2}, {2, 1, 1, 1}, {3, -1, 0, 2}}, 2);
  check_close(dir / "run", dir / "whole");
}

// Each leg ends behind a saved state.
TEST_CASE("sharded weights continue on another number of ranks", "[train][ranks]") {
  Options options = kWhole;
  options.emplace_back("e2e-stages", "w2a16:4");
  options.emplace_back("e2e-steps", "8");
  options.emplace_back("save-every", "1");
  const TempDir dir;
  REQUIRE(train_on(1, dir / "whole", options) == no_errors(1));
  train_in_legs(dir / "run", {{1, -1, 0, 2}, {2, -1, 0, 4}, {3, -1, 0, 6}}, 1, options);
  check_close(dir / "run", dir / "whole");
  REQUIRE(train_on(2, dir / "two", options) == no_errors(2));
  train_in_legs(dir / "again", {{2, -1, 0, 3}}, 2, options);
  CHECK(results(dir / "again") == results(dir / "two"));
}

// Where a code of a moment is on a threshold, the sums' last bits decide.
TEST_CASE("ranks with moments of 8 bits train what one trains, and continue", "[train][ranks]") {
  const TempDir dir;
  REQUIRE(train_on(1, dir / "1", kPacked) == no_errors(1));
  for (const int ranks : {2, 3}) {
    const std::string run = dir / std::to_string(ranks);
    REQUIRE(train_on(ranks, run, kPacked) == no_errors(ranks));
    check_close(run, dir / "1", 1e-4, 1e-3, 1e-3);
  }
  train_in_legs(dir / "legs", {{2, -1, 0, 3}}, 1, kPacked);
  check_close(dir / "legs", dir / "1", 1e-4, 1e-3, 1e-3);
}

TEST_CASE("ranks that are stopped continue to the same bytes", "[train][ranks]") {
  const TempDir dir;
  REQUIRE(train_on(2, dir / "whole") == no_errors(2));
  train_in_legs(dir / "run", {{2, 0, 1, 3}, {2, 1, 0, 1}, {2, -1, 0, 2}}, 2);
  CHECK(results(dir / "run") == results(dir / "whole"));
  CHECK(log_lines(dir / "run", "") == log_lines(dir / "whole", ""));
}

TEST_CASE("ranks that cannot share a batch are refused", "[train][ranks]") {
  const TempDir dir;
  const auto refused = [&](const Options& options, const std::string& text) {
    const auto errors = train_on(2, dir / "run", options);
    CHECK_THAT(errors[0], Contains(text));
    CHECK_FALSE(std::filesystem::exists(dir / "run"));
  };
  refused({{"batch", "5"}}, "2 ranks cannot share --batch 5 evenly");
  refused({{"e2e-batch", "3"}, {"e2e-micro-batch", "3"}},
          "2 ranks cannot share --e2e-batch 3 evenly");
}

// From here on ranks are processes on the device under test: CPUs over sockets, or GPUs over NCCL.
namespace {

constexpr const char* kChildTest = "[.rank-child]";
constexpr const char* kOutVariable = "BBB_RANKS_TEST_OUT";
constexpr const char* kRanksVariable = "BBB_RANKS_TEST_RANKS";
constexpr const char* kTaskVariable = "BBB_RANKS_TEST_TASK";

// Train, perhaps with a fault; or only reduce.
// ..Whole: in the end-to-end phase, with sharded weights.
enum class Task : int {
  Train,
  Killed,
  NoScratch,
  FullDisk,
  Reduce,
  Whole,
  KilledWhole,
  FullDiskWhole,
  Stopped,  // by a signal
  Hangs,    // its main thread
  GpuHangs
};

bool has_two_devices() {
  if (on_cuda() && cuda::gpu_of_rank(1) == 0) {
    std::printf("SKIPPED: this takes two GPUs\n");
    return false;
  }
  return true;
}

// Runs `ranks` processes. Returns what they printed if the first one failed, else "".
std::string failure_of(const TempDir& dir, const std::string& out, int ranks, Task task) {
  std::fflush(nullptr);
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    setenv(kOutVariable, out.c_str(), 1);
    setenv(kRanksVariable, std::to_string(ranks).c_str(), 1);
    setenv(kTaskVariable, std::to_string(static_cast<int>(task)).c_str(), 1);
    setenv("TMPDIR", dir.path().c_str(), 1);  // the test removes a killed rank's leftovers
    const std::string console = dir / "console";
    if (std::freopen(console.c_str(), "w", stdout) == nullptr || dup2(1, 2) < 0) _exit(126);
    execl("/proc/self/exe", "bbb_tests", kChildTest, static_cast<char*>(nullptr));
    _exit(127);
  }
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  const std::string console = data::read_file(dir / "console");
  INFO(console);
  REQUIRE(WIFEXITED(status));
  REQUIRE(WEXITSTATUS(status) < 126);
  return WEXITSTATUS(status) == 0 ? "" : console;
}

void limit_files(rlim_t bytes) {
  std::signal(SIGXFSZ, SIG_IGN);  // the write fails, as on a full disk
  const struct rlimit limit = {bytes, bytes};
  BBB_CHECK(setrlimit(RLIMIT_FSIZE, &limit) == 0, "no limit");
}

// Sums and means, executed and recorded, of values for which they are exact in every dtype.
void check_reductions(Backend& device, engine::Comm& comm) {
  const int64_t count = 100'003;
  for (const DType dtype : {device.act(), device.real()})
    for (const engine::Reduce op : {engine::Reduce::Sum, engine::Reduce::Mean}) {
      std::vector<double> own, expected;
      for (int64_t i = 0; i < count; ++i) {
        const auto value = static_cast<double>(i % 7);
        own.push_back(value + comm.rank());
        const double sum = value * comm.size() + 0.5 * comm.size() * (comm.size() - 1);
        expected.push_back(op == engine::Reduce::Sum ? sum : sum / comm.size());
      }
      const Tensor start = make(device, {count}, dtype, own), x = device.empty({count}, dtype);
      const auto reduce = [&] {
        device.copy(x, start);
        comm.all_reduce(x, op);
      };
      reduce();
      BBB_CHECK(values_of(device, x) == expected, "a reduction is wrong");
      const auto recorded = device.record(reduce);
      for (int run = 0; run < 2; ++run) {
        device.zero(x);
        recorded->run();
        BBB_CHECK(values_of(device, x) == expected, "a recorded reduction is wrong");
      }
    }
  // Each rank's part, reduced, then gathered: what a reduction gives, or the maxima.
  const int64_t part = 1'003;
  std::vector<double> own, mean, most;
  for (int64_t i = 0; i < part * comm.size(); ++i) {
    own.push_back(static_cast<double>(i % 7 + 2 * comm.rank()));
    mean.push_back(static_cast<double>(i % 7 + comm.size() - 1));
    most.push_back(static_cast<double>(i % 7 + 2 * (comm.size() - 1)));
  }
  const Shape shape{part * comm.size()};
  const Tensor start = make(device, shape, device.real(), own),
               x = device.empty(shape, device.real()), y = device.empty(shape, device.real());
  const auto exchange = [&] {
    device.copy(x, start);
    comm.start_reduce_scatter(x, engine::Reduce::Mean);
    comm.join();
    device.copy(y, x);
    comm.start_all_gather(y);
    device.copy(x, start);  // beside it
    comm.join();
    comm.all_reduce(x, engine::Reduce::Max);
  };
  const auto recorded = device.record(exchange);
  for (int run = 0; run < 3; ++run) {
    device.zero(x);
    device.zero(y);
    run == 0 ? exchange() : recorded->run();
    BBB_CHECK(values_of(device, y) == mean, "a reduced and gathered tensor is wrong");
    BBB_CHECK(values_of(device, x) == most, "a maximum is wrong");
  }
  comm.barrier();  // no rank leaves while another one reads its memory
}

// What the GPU does from now on waits for a call that does not return.
void hang([[maybe_unused]] Backend& device) {
#ifdef BBB_HAS_CUDA
  const cudaStream_t stream = dynamic_cast<cuda::CudaBackend&>(device).stream();
  BBB_CUDA(cudaLaunchHostFunc(
      stream, [](void*) { pause(); }, nullptr));
#endif
}

void train_with_fault(Task task, const std::string& out, Backend& device, const Ranks& comm) {
  const Fixture fixture;
  train::TrainConfig config = shared_run(out);
  config.comm = comm;
  config.gemm_algorithms = train::GemmAlgorithms::Heuristic;
  train::Observer observer{.quiet = true};
  if (task == Task::Killed && comm->rank() == 1)
    observer.after_block_step = [](int64_t block, int64_t, int64_t step) {
      if (block == 1 && step == 3) raise(SIGKILL);
    };
  if (task == Task::NoScratch) {
    std::filesystem::create_directories(fixture.dir / "scratch");
    config.e2e_steps = 0;
    spill_streams(config, device, fixture.dir / "scratch");
    if (comm->rank() == 1) limit_files(10'000);
  }
  if (task == Task::FullDisk && comm->first()) limit_files(100'000);
  if (task >= Task::Stopped && comm->rank() == 1)
    observer.after_block_step = [&](int64_t block, int64_t, int64_t step) {
      if (block != 1 || step != 3) return;
      if (task == Task::Stopped) raise(SIGSTOP);
      if (task == Task::Hangs) pause();
      if (task == Task::GpuHangs) hang(device);
    };
  if (task >= Task::Whole && task <= Task::FullDiskWhole) {
    config.stages.clear();
    config.save_every = 1;
  }
  if (task == Task::KilledWhole && comm->rank() == 1)
    observer.after_e2e_step = [](int64_t step) {
      if (step == 2) raise(SIGKILL);
    };
  // The first state fits, the second one does not.
  if (task == Task::FullDiskWhole)
    observer.after_e2e_step = [&](int64_t step) {
      if (step == 1 && comm->first()) limit_files(100'000);
    };
  train::train_windows(device, *fixture.source, fixture.windows, config, observer);
}

}  // namespace

TEST_CASE("a process of ranks_test", "[.rank-child]") {
  const char* const out = std::getenv(kOutVariable);
  REQUIRE(out != nullptr);
  const auto task = static_cast<Task>(std::atoi(std::getenv(kTaskVariable)));
  const int ranks = std::atoi(std::getenv(kRanksVariable));
  const auto body = [&](const Ranks& host, int local_rank) {
    const auto device = on_cuda() ? engine::make_cuda_backend(cuda::gpu_of_rank(local_rank))
                                  : engine::make_cpu_backend(1);
    const Ranks comm = on_cuda() && host->size() > 1 ? cuda::make_nccl_comm(*device, host) : host;
    if (task == Task::Reduce) return check_reductions(*device, *comm);
    train_with_fault(task, out, *device, comm);
  };
  try {
    engine::RankPatience patience;
    if (task >= Task::Stopped) patience = {.beat_s = 0.6, .leave_s = 2};
    tools::run_as_rank(ranks, kChildTest, {}, body, patience);
  } catch (const Error& error) {
    std::printf("%s\n", error.what());  // Catch would wrap the line
    throw;
  }
}

TEST_CASE("processes reduce, in recorded steps too", "[train][ranks]") {
  const TempDir dir;
  if (has_two_devices()) CHECK(failure_of(dir, dir / "run", 2, Task::Reduce) == "");
}

// On GPUs the gradient of one rank is rounded to bf16 and that of two is not; activations are bf16.
TEST_CASE("two processes train what one trains", "[train][ranks]") {
  if (!has_two_devices()) return;
  const TempDir dir;
  REQUIRE(failure_of(dir, dir / "1", 1, Task::Train) == "");
  for (const char* name : {"2", "again"})
    REQUIRE(failure_of(dir, dir / name, 2, Task::Train) == "");
  CHECK(results(dir / "2") == results(dir / "again"));
  // In BF16: measured 0.11.
  check_close(dir / "2", dir / "1", on_cuda() ? 0.01 : kLosses, on_cuda() ? 0.2 : kMasters);
}

TEST_CASE("a failing rank ends the job with one error, and the run resumes", "[train][ranks]") {
  if (!has_two_devices()) return;
  const TempDir dir;
  const std::string whole = dir / "whole", out = dir / "run";
  REQUIRE(failure_of(dir, whole, 2, Task::Train) == "");
  CHECK_THAT(failure_of(dir, dir / "blocks", 2, Task::NoScratch),
             Contains("rank 1: ") && Contains("no room for a scratch file"));
  CHECK_THAT(failure_of(dir, out, 2, Task::FullDisk), Contains("cannot write " + out));
  CHECK_THAT(failure_of(dir, out, 2, Task::Killed),
             Contains("rank 1 was killed by signal 9 (Killed); the same command continues"));
  CHECK(results(out).size() < results(whole).size());
  REQUIRE(failure_of(dir, out, 2, Task::Train) == "");
  CHECK(results(out) == results(whole));
}

TEST_CASE("a rank that hangs ends the job with its name, and the run resumes", "[train][ranks]") {
  if (!has_two_devices()) return;
  const int ranks = on_cuda() ? 2 : 3;
  const TempDir dir;
  const std::string whole = dir / "whole", out = dir / "run";
  REQUIRE(failure_of(dir, whole, ranks, Task::Train) == "");
  std::vector<std::pair<Task, std::string>> faults = {
      {Task::Stopped, "rank 1 does not answer for 6 s; the same command continues"},
      {Task::Hangs, "rank 1 has made no progress for 6 s; the same command continues"}};
  if (on_cuda()) faults.emplace_back(Task::GpuHangs, faults.back().second);
  for (const auto& [task, says] : faults) {
    CHECK_THAT(failure_of(dir, out, ranks, task), Contains(says));
    CHECK(results(out).size() < results(whole).size());
  }
  REQUIRE(failure_of(dir, out, ranks, Task::Train) == "");
  CHECK(results(out) == results(whole));
}

// A state is gathered from all ranks: none may wait for the one that fails.
TEST_CASE("a rank that fails with a part of the weights ends the job, and the run resumes",
          "[train][ranks]") {
  if (!has_two_devices()) return;
  const TempDir dir;
  const std::string whole = dir / "whole", out = dir / "run";
  REQUIRE(failure_of(dir, whole, 2, Task::Whole) == "");
  for (const auto& [task, says] :
       {std::pair{Task::FullDiskWhole, std::string("cannot write ")},
        {Task::KilledWhole,
         "rank 1 was killed by signal 9 (Killed); the same command continues"}}) {
    CHECK_THAT(failure_of(dir, out, 2, task), Contains(says));
    CHECK(std::filesystem::exists(out + "/e2e/state.safetensors"));
  }
  REQUIRE(failure_of(dir, out, 2, Task::Whole) == "");
  CHECK(results(out) == results(whole));
}

}  // namespace bbb::tests
