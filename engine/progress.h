// Progress: one line on stderr with a bar, counts and the time that is left. A terminal line is
// redrawn every 0.1 s and at each 10 %; elsewhere, and on a dumb terminal, a line is printed at
// each 10 %. The time left uses the rate since the first set(). Nothing is drawn in the first
// `silent_s` seconds, for work that is often over by then.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace bbb::engine {

// "0.4 s", "12 s", "3 min 20 s", "2 h 5 min", "3 d 4 h".
std::string duration_text(double seconds);

class Progress {
 public:
  static constexpr double kPatience_s = 2;
  static constexpr size_t kColumns = 79, kLongestNote = 28;

  Progress(std::string label, int64_t total, double silent_s = 0);
  ~Progress();  // ends the line
  void set(int64_t done, const std::string& note = "");

  // At most kColumns wide. A line that is too long loses, in this order: columns of the bar, the
  // time that passed, the rest of the bar, the end of the label, the time that is left. Counts and
  // note stay whole; a note has at most kLongestNote columns. left_s < 0: unknown.
  static std::string line(const std::string& label, int64_t done, int64_t total, double elapsed_s,
                          double left_s, const std::string& note);

 private:
  std::string label_;
  int64_t total_;
  double silent_s_;
  int64_t first_done_ = -1;  // `done` of the first set(); not 0 in a resumed run
  std::chrono::steady_clock::time_point start_, first_, last_;
  int last_tenth_ = -1;
  size_t drawn_ = 0;  // columns of the terminal's line
  bool terminal_;
};

}  // namespace bbb::engine
