// kill -9 at random moments: a run that goes on after each of them ends with the bytes of one that
// was never interrupted.
//
// The run lives in a process of its own, this binary again on the hidden test below: nothing of the
// parent's threads or GPU context is in it.
#include <sys/wait.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <thread>

#include "engine/rng.h"
#include "tests/tiny_run.h"

namespace bbb::tests {
namespace {

using Clock = std::chrono::steady_clock;
using Milliseconds = std::chrono::duration<double, std::milli>;

constexpr const char* kOutVariable = "BBB_KILL_TEST_OUT";
constexpr const char* kChildTest = "[.kill-child]";
constexpr double kPatience_ms = 60'000;

pid_t start_child(const TempDir& scratch, const std::string& out) {
  std::fflush(nullptr);
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    setenv(kOutVariable, out.c_str(), 1);
    setenv("TMPDIR", scratch.path().c_str(), 1);  // what a killed child leaves goes with the test
    const std::string console = scratch / "console";
    if (std::freopen(console.c_str(), "w", stdout) == nullptr) _exit(126);
    execl("/proc/self/exe", "bbb_tests", kChildTest, static_cast<char*>(nullptr));
    _exit(127);
  }
  return child;
}

// True: the child ended by itself, within `limit_ms`. False: it was killed then.
bool runs_to_the_end(const TempDir& scratch, const std::string& out, double limit_ms) {
  const auto start = Clock::now();
  const pid_t child = start_child(scratch, out);
  int status = 0;
  while (waitpid(child, &status, WNOHANG) == 0) {
    if (Milliseconds(Clock::now() - start).count() >= limit_ms) {
      kill(child, SIGKILL);
      REQUIRE(waitpid(child, &status, 0) == child);
      break;
    }
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
  if (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) return false;
  INFO(data::read_file(scratch / "console"));
  REQUIRE(WIFEXITED(status));
  REQUIRE(WEXITSTATUS(status) == 0);
  return true;
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
  config.save_every = 1;
  fixture.run(config);
}

TEST_CASE("a run killed at random moments ends with the same bytes", "[train][kill]") {
  const int wanted = on_cuda() ? 5 : 30;
  const TempDir dir;
  const std::string whole = dir / "whole";
  const auto start = Clock::now();
  REQUIRE(runs_to_the_end(dir, whole, kPatience_ms));
  const double duration_ms = Milliseconds(Clock::now() - start).count();
  const auto expected = results(whole);
  const auto expected_log = log_lines(whole, "");
  REQUIRE(expected.size() == 4);  // run.json, two blocks, the final file

  // A fresh run whenever one reaches its end, so that kills fall into every part of it.
  engine::Rng rng(5);
  int kills = 0;
  for (int run = 0; kills < wanted; ++run) {
    REQUIRE(run < 10 * wanted);
    const std::string out = dir / ("run_" + std::to_string(run));
    while (!runs_to_the_end(dir, out, kills < wanted ? rng.uniform() * duration_ms : kPatience_ms))
      ++kills;
    INFO("run " << run << " after " << kills << " kills");
    CHECK(results(out) == expected);
    CHECK(log_lines(out, "") == expected_log);
  }
}

}  // namespace bbb::tests
