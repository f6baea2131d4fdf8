// Progress: one line on stderr with a bar, counts and ETA, at the rate since the first set();
// redrawn at most ten times a second on a terminal, one line per 10 % elsewhere. Work that is often
// over in a moment asks it to be patient: nothing is drawn before `silent_s` have passed.
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
  int64_t first_done_ = -1;  // what the first set() said: a resumed run starts high
  std::chrono::steady_clock::time_point start_, first_, last_;
  int last_tenth_ = -1;
  bool terminal_;
};

}  // namespace bbb::engine
