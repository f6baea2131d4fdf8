// Lines of progress, and durations for people.
#include "engine/progress.h"

#include <algorithm>
#include <catch2/catch.hpp>

#include "tests/printed.h"
#include "tests/support.h"

namespace bbb::tests {

using Catch::Contains;
using engine::duration_text;
using engine::Progress;

TEST_CASE("progress: durations are in seconds, minutes, hours and days", "[progress]") {
  CHECK(duration_text(0) == "0.0 s");
  CHECK(duration_text(9.94) == "9.9 s");
  CHECK(duration_text(9.96) == "10 s");
  CHECK(duration_text(59.4) == "59 s");
  CHECK(duration_text(59.6) == "1 min 0 s");
  CHECK(duration_text(3599.6) == "1 h 0 min");
  CHECK(duration_text(7500) == "2 h 5 min");
  CHECK(duration_text(3600 * 76) == "3 d 4 h");
}

TEST_CASE("progress: a line fits 80 columns, whatever it says", "[progress]") {
  CHECK(Progress::line("ppl", 6, 12, 3, 3, "loss 2") ==
        "ppl [############............] 6/12  3.0 s, 3.0 s left  loss 2");
  CHECK(Progress::line("ppl", 0, 12, 3, -1, "") == "ppl [........................] 0/12  3.0 s");
  const std::string note(60, 'n');
  for (const std::string label : {"ppl", "end to end w2a16", "arc_challenge tokens, many of them"})
    for (const int64_t total : {int64_t{1}, int64_t{96}, int64_t{123456789}})
      for (const double seconds : {0.1, 3599.0, 170000.0, 1e7}) {
        const std::string line = Progress::line(label, total / 2, total, seconds, seconds, note);
        CAPTURE(line);
        CHECK(line.size() <= 79);
        CHECK_THAT(line, Contains(cat(total / 2, "/", total)));
        CHECK_THAT(line, Contains(duration_text(seconds) + " left"));
      }
}

TEST_CASE("progress: no escape codes and no redrawing where stderr is no terminal", "[progress]") {
  const std::string text = printed_by([] {
                             Progress progress("work", 1000);
                             for (int64_t i = 0; i <= 1000; ++i) progress.set(i, "note");
                           }).err;
  CHECK(std::count(text.begin(), text.end(), '\n') == 11);  // each tenth
  CHECK(text.find('\033') == text.npos);
  CHECK(text.find('\r') == text.npos);
}

}  // namespace bbb::tests
