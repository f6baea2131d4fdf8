#include "engine/progress.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>

namespace bbb::engine {

using Clock = std::chrono::steady_clock;

Progress::Progress(std::string label, int64_t total, double silent_s)
    : label_(std::move(label)),
      total_(std::max<int64_t>(total, 1)),
      silent_s_(silent_s),
      start_(Clock::now()),
      first_(start_),
      last_(start_),
      terminal_(isatty(STDERR_FILENO) != 0) {}

Progress::~Progress() {
  if (terminal_ && last_tenth_ >= 0) std::fputc('\n', stderr);
}

void Progress::set(int64_t done, const std::string& note) {
  const auto now = Clock::now();
  if (first_done_ < 0) {
    first_done_ = done;
    first_ = now;
  }
  const double elapsed = std::chrono::duration<double>(now - start_).count();
  if (elapsed < silent_s_) return;
  const int tenth = static_cast<int>(10 * std::min(done, total_) / total_);
  const bool due = terminal_ ? std::chrono::duration<double>(now - last_).count() >= 0.1 : false;
  if (!due && tenth == last_tenth_) return;
  last_tenth_ = tenth;
  last_ = now;
  const double left = static_cast<double>(std::max<int64_t>(total_ - done, 0));
  char eta[32] = "?";
  if (left == 0 || done > first_done_) {
    const double since = std::chrono::duration<double>(now - first_).count();
    const double rate = left == 0 ? 1 : since / static_cast<double>(done - first_done_);
    std::snprintf(eta, sizeof eta, "%.0f s", left * rate);
  }
  const int filled = static_cast<int>(24 * std::min(done, total_) / total_);
  char bar[25];
  for (int i = 0; i < 24; ++i) bar[i] = i < filled ? '#' : '.';
  bar[24] = 0;
  std::fprintf(stderr, "%s%s [%s] %lld/%lld  %.1f s, ETA %s  %s%s", terminal_ ? "\r" : "",
               label_.c_str(), bar, static_cast<long long>(done), static_cast<long long>(total_),
               elapsed, eta, note.c_str(), terminal_ ? "\033[K" : "\n");
  std::fflush(stderr);
}

}  // namespace bbb::engine
