#include "engine/progress.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "quant/check.h"

namespace bbb::engine {

using Clock = std::chrono::steady_clock;

namespace {

constexpr size_t kBar = 24, kLeastBar = 8, kLeastLabel = 8;

// Can a line be overwritten?
bool redraws() {
  const char* terminal = std::getenv("TERM");
  return isatty(STDERR_FILENO) != 0 && terminal != nullptr && terminal != std::string("dumb");
}

double seconds_between(Clock::time_point begin, Clock::time_point end) {
  return std::chrono::duration<double>(end - begin).count();
}

}  // namespace

std::string duration_text(double seconds) {
  if (seconds < 9.95) {
    char text[16];
    std::snprintf(text, sizeof text, "%.1f s", seconds);
    return text;
  }
  const auto whole = static_cast<int64_t>(seconds + 0.5), minutes = whole / 60,
             hours = whole / 3600;
  if (minutes == 0) return cat(whole, " s");
  if (hours == 0) return cat(minutes, " min ", whole % 60, " s");
  if (hours < 48) return cat(hours, " h ", minutes % 60, " min");
  return cat(hours / 24, " d ", hours % 24, " h");
}

Progress::Progress(std::string label, int64_t total, double silent_s)
    : label_(std::move(label)),
      total_(std::max<int64_t>(total, 1)),
      silent_s_(silent_s),
      start_(Clock::now()),
      first_(start_),
      last_(start_),
      terminal_(redraws()) {
  std::fflush(stdout);  // text that was written before it comes before it in a common file, too
}

Progress::~Progress() {
  if (terminal_ && last_tenth_ >= 0) std::fputc('\n', stderr);
}

std::string Progress::line(const std::string& label, int64_t done, int64_t total, double elapsed_s,
                           double left_s, const std::string& note) {
  const auto behind = [](const std::string& text) { return text.empty() ? "" : "  " + text; };
  const std::string count = cat(done, "/", total), end = behind(note.substr(0, kLongestNote)),
                    left = left_s < 0 ? "" : cat(duration_text(left_s), " left"),
                    both = cat(duration_text(elapsed_s), left.empty() ? "" : ", ", left);
  for (const std::string& times : {both, left}) {
    const std::string right = cat("] ", count, behind(times), end);
    const size_t taken = label.size() + 2 + right.size();
    if (taken + kLeastBar > kColumns) continue;
    const size_t bar = std::min(kBar, kColumns - taken);
    const auto filled =
        static_cast<size_t>(static_cast<double>(bar) * static_cast<double>(std::min(done, total)) /
                            static_cast<double>(total));
    return cat(label, " [", std::string(filled, '#'), std::string(bar - filled, '.'), right);
  }
  std::string right = cat(" ", count, behind(left), end);
  if (right.size() + std::min(label.size(), kLeastLabel) > kColumns) right = cat(" ", count, end);
  return label.substr(0, kColumns - right.size()) + right;
}

void Progress::set(int64_t done, const std::string& note) {
  const auto now = Clock::now();
  if (first_done_ < 0) {
    first_done_ = done;
    first_ = now;
  }
  const double elapsed = seconds_between(start_, now);
  if (elapsed < silent_s_) return;
  const int tenth = static_cast<int>(10 * std::min(done, total_) / total_);
  const bool due = terminal_ && seconds_between(last_, now) >= 0.1;
  if (!due && tenth == last_tenth_) return;
  last_tenth_ = tenth;
  last_ = now;
  const auto left = static_cast<double>(std::max<int64_t>(total_ - done, 0));
  double left_s = left == 0 ? 0 : -1;
  if (left > 0 && done > first_done_)
    left_s = left * seconds_between(first_, now) / static_cast<double>(done - first_done_);
  std::string text = line(label_, done, total_, elapsed, left_s, note);
  const size_t columns = text.size();
  if (terminal_) {
    // Spaces cover the rest of a longer line: no terminal needs escape codes.
    text = "\r" + text + std::string(drawn_ > columns ? drawn_ - columns : 0, ' ');
    drawn_ = columns;
  } else {
    text += '\n';
  }
  std::fputs(text.c_str(), stderr);
  std::fflush(stderr);
}

}  // namespace bbb::engine
