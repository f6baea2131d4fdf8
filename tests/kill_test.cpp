// kill -9 at random moments, a disk that fills up, two processes at once: a run that is resumed
// after each of them ends with the bytes of an uninterrupted run.
//
// The run is a process of its own: this binary with the hidden test below. It has none of the
// parent's threads, and not its GPU context.
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <thread>
#include <utility>

#include "engine/rng.h"
#include "tests/tiny_run.h"

namespace bbb::tests {
namespace {

using Clock = std::chrono::steady_clock;
using Milliseconds = std::chrono::duration<double, std::milli>;

constexpr const char* kOutVariable = "BBB_KILL_TEST_OUT";
constexpr const char* kSaveVariable = "BBB_KILL_TEST_SAVE_EVERY";
constexpr const char* kFileLimitVariable = "BBB_KILL_TEST_FILE_BYTES";
constexpr const char* kGridVariable = "BBB_KILL_TEST_GRID";  // set: a grid with a channel order
constexpr const char* kChildTest = "[.kill-child]";
constexpr double kPatience_ms = 60'000;
constexpr int64_t kNoLimit = 0;
constexpr int64_t kNever = 1000;  // more steps than any phase has

struct ChildOptions {
  int64_t save_every = 1;
  int64_t file_bytes = kNoLimit;  // the largest file that it may write
};

pid_t start_child(const TempDir& scratch, const std::string& out, const ChildOptions& options) {
  std::fflush(nullptr);
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    setenv(kOutVariable, out.c_str(), 1);
    setenv(kSaveVariable, std::to_string(options.save_every).c_str(), 1);
    setenv(kFileLimitVariable, std::to_string(options.file_bytes).c_str(), 1);
    setenv("TMPDIR", scratch.path().c_str(), 1);  // the test removes a killed child's leftovers
    const std::string console = scratch / "console";
    if (std::freopen(console.c_str(), "w", stdout) == nullptr) _exit(126);
    execl("/proc/self/exe", "bbb_tests", kChildTest, static_cast<char*>(nullptr));
    _exit(127);
  }
  return child;
}

// When to kill the child. in_block: only the time during which a block's state file exists counts.
struct Moment {
  double after_ms;
  bool in_block = false;
};

// Whether the child ended by itself before `kill_at`; otherwise it is killed then. in_block_ms: how
// long a block's state file existed.
bool runs_to_the_end(const TempDir& scratch, const std::string& out, const Moment& kill_at,
                     double* in_block_ms = nullptr) {
  const std::string state = train::RunDirectory(out).block_state_file();
  const auto start = Clock::now();
  const pid_t child = start_child(scratch, out, {});
  int status = 0;
  double now_ms = 0, saved_ms = 0;
  while (waitpid(child, &status, WNOHANG) == 0) {
    const double before_ms = std::exchange(now_ms, Milliseconds(Clock::now() - start).count());
    if (std::filesystem::exists(state)) saved_ms += now_ms - before_ms;
    if ((kill_at.in_block ? saved_ms : now_ms) >= kill_at.after_ms) {
      kill(child, SIGKILL);
      REQUIRE(waitpid(child, &status, 0) == child);
      break;
    }
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
  if (in_block_ms) *in_block_ms = saved_ms;
  if (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) return false;
  INFO(data::read_file(scratch / "console"));
  REQUIRE(WIFEXITED(status));
  REQUIRE(WEXITSTATUS(status) == 0);
  return true;
}

// Runs the child until it fails by itself; returns its output.
std::string failure_of(const TempDir& scratch, const std::string& out,
                       const ChildOptions& options) {
  int status = 0;
  const pid_t child = start_child(scratch, out, options);
  REQUIRE(waitpid(child, &status, 0) == child);
  const std::string console = data::read_file(scratch / "console");
  INFO(console);
  REQUIRE(WIFEXITED(status));
  REQUIRE(WEXITSTATUS(status) != 0);
  return console;
}

// How many kills came at each point of a run.
struct KillCounts {
  int nothing = 0;       // no run yet
  int block_state = 0;   // a state inside a stage of a block
  int between = 0;       // results of blocks, and no newer state
  int end_to_end = 0;    // a state of the whole model
  int half_written = 0;  // a file under its temporary name
};

void count(KillCounts& counts, const std::string& out) {
  const train::RunDirectory run(out);
  if (!run.exists()) {
    ++counts.nothing;
    return;
  }
  for (const auto& [name, bytes] : results(out))
    if (name.find(".tmp-") != std::string::npos) ++counts.half_written;
  if (std::filesystem::exists(run.block_state_file()))
    ++counts.block_state;
  else if (std::filesystem::exists(run.e2e_state_file()))
    ++counts.end_to_end;
  else
    ++counts.between;
}

}  // namespace

TEST_CASE("the run that is killed", "[.kill-child]") {
  const char* const out = std::getenv(kOutVariable);
  REQUIRE(out != nullptr);
  const Fixture fixture;
  train::TrainConfig config = fixture.both_phases("");
  config.out = out;
  config.model = "model";
  config.e2e_steps = 12;
  if (std::getenv(kGridVariable) != nullptr) {
    for (const auto& [option, text] : {std::pair{"ocs-ratio", "0.25"},
                                       {"range", "search"},
                                       {"rotate", "group"},
                                       {"act-outliers", "32"},
                                       {"e2e-stages", "w2a16:1,w2a2:2"}})
      set_option(config, option, text);
  }
  config.lr.back() = 1;  // training gets worse: the best weights are not the newest ones
  config.save_every = std::atoll(std::getenv(kSaveVariable));
  const int64_t file_bytes = std::atoll(std::getenv(kFileLimitVariable));
  if (file_bytes != kNoLimit) {
    std::signal(SIGXFSZ, SIG_IGN);  // the write fails, as on a full disk
    const rlim_t bytes = static_cast<rlim_t>(file_bytes);
    const struct rlimit limit = {bytes, bytes};
    REQUIRE(setrlimit(RLIMIT_FSIZE, &limit) == 0);
  }
  try {
    fixture.run(config);
  } catch (const Error& error) {
    std::printf("%s\n", error.what());  // Catch would wrap the line
    throw;
  }
}

static void kill_at_random(int wanted, int wanted_inside, size_t files) {
  const TempDir dir;
  const std::string whole = dir / "whole";
  const auto start = Clock::now();
  double in_block_ms = 0;
  REQUIRE(runs_to_the_end(dir, whole, {kPatience_ms}, &in_block_ms));
  const double duration_ms = Milliseconds(Clock::now() - start).count();
  REQUIRE(in_block_ms > 0);
  const auto expected = results(whole);
  const auto expected_log = log_lines(whole, "");
  REQUIRE(expected.size() == files);

  // When a run reaches its end, a new one starts, so that kills fall into every part of a run.
  // Every second run gets its first kill inside a stage of a block: on a GPU that part is short.
  constexpr uint64_t kSeed = 5;
  engine::Rng rng(kSeed);
  KillCounts counts;
  int kills = 0;
  const auto enough = [&] { return kills >= wanted && counts.block_state >= wanted_inside; };
  for (int run = 0; !enough(); ++run) {
    REQUIRE(run < 10 * wanted);
    const std::string out = dir / ("run_" + std::to_string(run));
    Moment kill_at{rng.uniform() * in_block_ms, true};
    if (run % 2 == 0) kill_at = {rng.uniform() * duration_ms};
    while (!runs_to_the_end(dir, out, kill_at)) {
      ++kills;
      count(counts, out);
      kill_at = {enough() ? kPatience_ms : rng.uniform() * duration_ms};
    }
    INFO("run " << run << " after " << kills << " kills, seed " << kSeed);
    CHECK(results(out) == expected);
    CHECK(log_lines(out, "") == expected_log);
  }
  std::printf(
      "%d kills, seed %d, of a run of %.0f ms: %d before it began, %d at results of blocks, %d "
      "inside a stage of a block, %d end to end; %d while a file was written\n",
      kills, static_cast<int>(kSeed), duration_ms, counts.nothing, counts.between,
      counts.block_state, counts.end_to_end, counts.half_written);
}

TEST_CASE("a run killed at random moments ends with the same bytes", "[train][kill]") {
  // run.json, two stages of two blocks, the final file
  kill_at_random(on_cuda() ? 5 : 30, on_cuda() ? 1 : 5, 6);
}

TEST_CASE("a run with a channel order and stages of the whole model, killed at random moments",
          "[train][kill]") {
  setenv(kGridVariable, "1", 1);
  kill_at_random(on_cuda() ? 5 : 20, on_cuda() ? 1 : 3, 8);  // statistics and a stage more
  unsetenv(kGridVariable);
}

TEST_CASE("a full disk is one error, and the run resumes when there is room", "[train][kill]") {
  const TempDir dir;
  const std::string whole = dir / "whole", out = dir / "run";
  REQUIRE(runs_to_the_end(dir, whole, {kPatience_ms}));
  const auto expected = results(whole);

  const int64_t stage_bytes =
      static_cast<int64_t>(expected.at("blocks/block_000_stage_0.safetensors").size());
  const auto stopped = [&](const ChildOptions& options, const std::string& at, size_t files) {
    const std::string said = failure_of(dir, out, options);
    CHECK_THAT(said, Catch::Matchers::Contains("cannot write " + out + at + ": File too large"));
    const auto left = results(out);
    CHECK(left.size() == files);
    for (const auto& [name, bytes] : left) {
      INFO(name);
      CHECK(name.find(".tmp-") == std::string::npos);
      if (name.find("state") == std::string::npos) CHECK(bytes == expected.at(name));
    }
  };
  // In sizes of a stage's result: a block's state (masters, two moments, best weights) takes 4, or
  // 3.5 if the first moment has half the bytes; the end-to-end state of both blocks takes 6 or 5.
  stopped({1, stage_bytes * 2}, "/blocks/state.safetensors", 1);
  stopped({kNever, stage_bytes / 2}, "/blocks/block_000_stage_0.safetensors", 1);
  stopped({1, stage_bytes * 9 / 2}, "/e2e/state.safetensors", 5);
  CHECK(runs_to_the_end(dir, out, {kPatience_ms}));
  CHECK(results(out) == expected);
  CHECK(log_lines(out, "") == log_lines(whole, ""));
}

TEST_CASE("a second process in the same directory is refused", "[train][kill]") {
  const TempDir dir;
  const std::string out = dir / "run";
  std::filesystem::create_directory(out);
  train::RunDirectory held(out);
  held.lock();
  CHECK_THAT(failure_of(dir, out, {}),
             Catch::Matchers::Contains("another process is training in this directory"));
  CHECK(results(out).empty());
}

}  // namespace bbb::tests
