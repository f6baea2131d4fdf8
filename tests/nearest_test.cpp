// Mistyped commands and options.
#include "tools/nearest.h"

#include <catch2/catch.hpp>

#include "tests/printed.h"
#include "tests/support.h"
#include "tools/cli.h"

namespace bbb::tests {

using Catch::Contains;
using tools::did_you_mean;

TEST_CASE("nearest: typing errors find their word, others none", "[nearest]") {
  const std::vector<std::string> words = {"samples", "val-samples", "seq-len", "bits",
                                          "temperature"};
  const auto meant = [&](const std::string& typed) { return did_you_mean(typed, words, "--"); };
  CHECK(meant("sampels") == "; did you mean --samples?");
  CHECK(meant("sample") == "; did you mean --samples?");
  CHECK(meant("seqlen") == "; did you mean --seq-len?");
  CHECK(meant("seq_len") == "; did you mean --seq-len?");
  CHECK(meant("bit") == "; did you mean --bits?");
  CHECK(meant("temp") == "; did you mean --temperature?");
  for (const char* typed : {"", "x", "wings", "model"}) CHECK(meant(typed).empty());
  CHECK(did_you_mean("x", {}).empty());
}

TEST_CASE("nearest: the command line says what was meant", "[nearest]") {
  const auto refused = [](const tools::Arguments& arguments, const std::string& message) {
    const Output printed = bbb(arguments);
    CHECK(printed.code == 2);
    CHECK(printed.err == "bbb: " + message + "\n");
  };
  refused({"trian"}, "unknown command 'trian'; did you mean train?");
  refused({"fly"}, "unknown command 'fly'; bbb --help lists them");
  refused({"--verison"}, "unknown command '--verison'; did you mean --version?");
  refused({"train", "-samples", "3"}, "there is no option -samples; did you mean --samples?");
  refused({"train", "-x"}, "there is no option -x");
  refused({"train", "--sampels", "3"}, "there is no option --sampels; did you mean --samples?");
  refused({"train", "--sampels=3"}, "there is no option --sampels; did you mean --samples?");
  refused({"ppl", "--wings"}, "there is no option --wings");
  // The text of an option may begin with dashes.
  refused({"decode", "--prompt", "--x", "--modle", "m"},
          "there is no option --modle; did you mean --model?");
  CHECK(bbb({"help"}).out == bbb({"--help"}).out);
  refused({"ppl", "model"}, "unexpected argument 'model'; options begin with --");
}

}  // namespace bbb::tests
