// Progress: one line on stderr with a bar, counts and ETA. A terminal line is redrawn every 0.1 s
// and at each 10 %; elsewhere a line is printed at each 10 %. The ETA uses the rate since the first
// set(). Nothing is drawn in the first `silent_s` seconds, for work that is often over by then.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace bbb::engine {

class Progress {
 public:
  static constexpr double kPatience_s = 2;

  Progress(std::string label, int64_t total, double silent_s = 0);
  ~Progress();  // ends the line
  void set(int64_t done, const std::string& note = "");

 private:
  std::string label_;
  int64_t total_;
  double silent_s_;
  int64_t first_done_ = -1;  // `done` of the first set(); not 0 in a resumed run
  std::chrono::steady_clock::time_point start_, first_, last_;
  int last_tenth_ = -1;
  bool terminal_;
};

}  // namespace bbb::engine
