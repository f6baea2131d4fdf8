// Lines of progress, and durations for people.
#include "engine/progress.h"

#include <algorithm>
#include <catch2/catch.hpp>

#include "tests/printed.h"
#include "tests/support.h"

namespace bbb::tests {

using Catch::Contains;
using Catch::EndsWith;
using Catch::StartsWith;
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
  // What is too much goes step by step; counts and note stay.
  const auto line = [](const std::string& label, int64_t done, int64_t total, double seconds) {
    return Progress::line(label, done, total, seconds, seconds, "loss 3.977");
  };
  CHECK(line("end to end w2a16", 24, 60, 161) ==
        "end to end w2a16 [#####........] 24/60  2 min 41 s, 2 min 41 s left  loss 3.977");
  CHECK(line("end to end w2a16", 2400, 6000, 7500) ==
        "end to end w2a16 [####.......] 2400/6000  2 h 5 min, 2 h 5 min left  loss 3.977");
  CHECK(line("end to end w2a16", 400000, 1000000, 7500) ==
        "end to end w2a16 [######...........] 400000/1000000  2 h 5 min left  loss 3.977");
  CHECK(line("arc_challenge_tokens_many_of_them", 400000, 1000000, 7500) ==
        "arc_challenge_tokens_many_of_them 400000/1000000  2 h 5 min left  loss 3.977");
  CHECK(line("arc_challenge_tokens_many_of_them", 400000000, 1000000000, 7500) ==
        "arc_challenge_tokens_many_of_t 400000000/1000000000  2 h 5 min left  loss 3.977");

  const std::string labels[] = {"ppl", "blocks", "end to end w2a16", std::string(200, 'l')};
  const std::string notes[] = {"loss 3.977",          "loss -3.403e+38",
                               "loss 1.175e-38",      "loss nan",
                               "block 128/128 w2a16", std::string(Progress::kLongestNote, 'n')};
  for (const std::string& label : labels)
    for (const std::string& note : notes)
      for (const int64_t total : {int64_t{1}, int64_t{96}, int64_t{123456789}, INT64_MAX})
        for (const double seconds : {0.0, 59.0, 3599.0, 170000.0, 1e7, 1e12}) {
          const std::string text = Progress::line(label, total / 2, total, seconds, seconds, note);
          CAPTURE(text);
          CHECK(text.size() <= 79);
          CHECK_THAT(text, EndsWith("  " + note));
          CHECK_THAT(text, Contains(cat(total / 2, "/", total)));
          CHECK_THAT(text, StartsWith(label.substr(0, 8)));
          if (total < INT64_MAX) CHECK_THAT(text, Contains(duration_text(seconds) + " left"));
        }
  CHECK(Progress::line("ppl", 1, 2, 1, 1, std::string(99, 'n')).size() <= 79);  // the note is cut
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
