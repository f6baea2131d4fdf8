// bbb report: the page of a tiny run is well-formed, shows every series, and escapes names; what is
// no run is refused in one line. Completion and the log's reader, too.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>

#include "data/files.h"
#include "tests/tiny_run.h"
#include "tools/chart.h"
#include "tools/cli.h"
#include "tools/report_page.h"

namespace bbb::tests {
namespace {

using tools::Report;

int64_t count(const std::string& text, const std::string& what) {
  int64_t found = 0;
  for (size_t at = text.find(what); at != std::string::npos; at = text.find(what, at + 1)) ++found;
  return found;
}

// Whether every element ends where it should, attributes are quoted, and text holds no bare < or &.
// Returns the first fault, or "".
std::string xml_fault(const std::string& page) {
  std::vector<std::string> open;
  for (size_t i = page.find("<html"); i < page.size(); ++i) {
    if (page[i] == '&') {
      const size_t end = page.find(';', i);
      if (end == std::string::npos || end - i > 6) return "a bare & at " + page.substr(i, 20);
    }
    if (page[i] != '<') continue;
    const size_t end = page.find('>', i);
    if (end == std::string::npos) return "an open tag";
    const std::string tag = page.substr(i + 1, end - i - 1);
    if (tag.find('<') != std::string::npos || count(tag, "\"") % 2 != 0) return "<" + tag;
    const size_t slash = tag[0] == '/';
    const std::string name = tag.substr(slash, tag.find_first_of(" \n/", slash) - slash);
    if (slash == 1) {
      if (open.empty() || open.back() != name) return "</" + name;
      open.pop_back();
    } else if (tag.back() != '/') {
      open.push_back(name);
    }
    i = end;
  }
  return open.empty() ? "" : open.back();
}

// A run of two blocks with two stages, then two stages of the whole model.
struct TrainedFixture : Fixture {
  explicit TrainedFixture(const std::string& name, const std::string& loss = "kl") {
    train::TrainConfig c = both_phases(name);
    set_option(c, "e2e-stages", "w2a16:1,w2a16:1");
    set_option(c, "e2e-loss", loss);
    c.e2e_lr = {1e-3};
    run(c);
    path = c.out;
  }
  std::string path;
};

std::string log_of(const std::string& run) { return data::read_file(run + "/log.jsonl"); }

}  // namespace

TEST_CASE("report: every series of a run is on a well-formed page", "[report]") {
  const TrainedFixture fixture("run");
  const Report report = tools::read_report(fixture.path);
  CHECK(report.state == "finished");
  CHECK(report.layers == 2);
  REQUIRE(report.log.blocks.size() == 4);
  REQUIRE(report.log.whole.size() == 2);
  CHECK(report.log.times.size() == 1);
  for (const train::LoggedBlockStage& stage : report.log.blocks) {
    CHECK(stage.loss.size() == 8);        // 2 epochs of 16 / 4 steps
    CHECK(stage.validation.size() == 3);  // before, and after each epoch
    CHECK(stage.result() <= stage.start());
    CHECK(stage.seconds > 0);
  }
  const std::string page = tools::report_page(report);
  CHECK(xml_fault(page) == "");
  // Block curves: 2 blocks x 2 stages. Errors: a curve a stage. End to end: steps and their mean.
  CHECK(count(page, "<path ") == 4 + 2 + 2 * 2);
  for (const char* name : {"block 0, w4a16", "block 1, w4a16", "block 0, w2a16", "block 1, w2a16"})
    CHECK(count(page, cat("<title>", name, "</title></path>")) == 1);
  // Two dots a block and stage, and two in each stage's legend.
  CHECK(count(page, "<circle ") == 2 * 2 * 2 + 2 * 2);
  for (const train::LoggedBlockStage& stage : report.log.blocks) {
    CHECK(page.find(cat("<td class=\"n\">", tools::short_number(stage.start()), "</td><td")) !=
          std::string::npos);
    CHECK(page.find(cat("<td class=\"n\">", tools::short_number(stage.result()), "</td><td")) !=
          std::string::npos);
  }
  for (const char* text : {"Where the time went", "end to end w2a16: ", "streams: ", "weights: ",
                           "does not know the perplexity", "group-size", "KL divergence"})
    CHECK(page.find(text) != std::string::npos);
  // Nothing is loaded from elsewhere.
  for (const char* text : {"http", "src=", "href=", "url(", "<script"}) {
    CAPTURE(text);
    CHECK(page.find(text) == std::string::npos);
  }
}

TEST_CASE("report: names are escaped", "[report]") {
  CHECK(tools::html_escape("a<b>&\"c'\n") == "a&lt;b&gt;&amp;&quot;c&#39; ");
  const TrainedFixture fixture("<img> & \"run\"");
  Report report = tools::read_report(fixture.path);
  report.identity.config.model = "</style><b>'model'";
  const std::string page = tools::report_page(report);
  CHECK(xml_fault(page) == "");
  CHECK(page.find("&lt;img&gt; &amp; &quot;run&quot;") != std::string::npos);
  CHECK(page.find("&lt;/style&gt;&lt;b&gt;&#39;model&#39;") != std::string::npos);
  CHECK(page.find("<img>") == std::string::npos);
}

TEST_CASE("report: perplexity from bbb ppl, and from a loss on the text", "[report]") {
  const TrainedFixture fixture("run", "ce");
  const auto write = [&](const std::string& name, double perplexity, int tokens) {
    const train::Json json = {{"perplexity", perplexity}, {"nll", 3.0},
                              {"nll_stderr", 0.1},        {"windows", 2},
                              {"tokens", tokens},         {"bits_per_weight", 2.3}};
    data::write_file_atomic(fixture.dir / name, json.dump());
  };
  write("before.json", 21.76, 4094);
  write("after.json", 34.12, 4094);
  write("other.json", 34.12, 2047);
  const std::string out = fixture.dir / "pages/report.html";
  const auto report = [&](const std::string& after) {
    return tools::report_command({"--run", fixture.path, "--out", out, "--before",
                                  fixture.dir / "before.json", "--after", after});
  };
  CHECK(report(fixture.dir / "after.json") == 0);
  const std::string page = data::read_file(out);
  CHECK(xml_fault(page) == "");
  CHECK(page.find("21.76 \u2192 34.12") != std::string::npos);
  CHECK(page.find("does not know the perplexity") == std::string::npos);
  const train::RunLog log = tools::read_report(fixture.path).log;
  CHECK(page.find(tools::short_number(std::exp(log.whole.front().loss.front()))) !=
        std::string::npos);
  CHECK_THROWS_WITH(report(fixture.dir / "other.json"), Catch::Contains("other.json 2047"));
  CHECK_THROWS_WITH(report(fixture.path + "/run.json"), Catch::Contains("not written by bbb ppl"));
}

TEST_CASE("report: what is no run, or a damaged one, is one line", "[report]") {
  const TrainedFixture fixture("run");
  const auto refuses = [](const std::string& run, const std::string& text) {
    CAPTURE(text);
    try {
      tools::read_report(run);
      FAIL("no error");
    } catch (const Error& error) {
      CHECK_THAT(error.what(), Catch::Contains(text));
      CHECK(count(error.what(), "\n") == 0);
    }
  };
  refuses(fixture.dir / "nowhere", "nowhere: no training run");
  refuses(fixture.dir / "model", "no training run");
  const std::string log = log_of(fixture.path), file = fixture.path + "/log.jsonl";
  // A line that is being written is left out; one that was damaged is named.
  data::write_file_atomic(file, log + "{\"phase\":\"e2e\",\"sta");
  CHECK(tools::read_report(fixture.path).log.whole[1].loss.size() == 4);
  data::write_file_atomic(file, "{\"phase\":\"block\"}\n" + log);
  refuses(fixture.path, "log.jsonl:1: not a line of a run's log: ");
  data::write_file_atomic(file, log.substr(0, log.find('\n') + 1) + "no json\n");
  refuses(fixture.path, "log.jsonl:2: not a line of a run's log: no JSON object");
  data::write_file_atomic(file, "");
  refuses(fixture.path, "log.jsonl: holds no step");
  std::filesystem::remove(file);
  refuses(fixture.path, "log.jsonl: holds no step");
  const std::string record = data::read_file(fixture.path + "/run.json");
  data::write_file_atomic(fixture.path + "/run.json", record.substr(0, record.size() / 2));
  refuses(fixture.path, "run.json: damaged");
}

TEST_CASE("report: an unfinished run, and losses that are not finite", "[report]") {
  const Fixture fixture;
  const train::TrainConfig c = fixture.both_phases("run");
  train::Observer observer;
  observer.after_block_step = [](int64_t block, int64_t stage, int64_t step) {
    if (block == 1 && stage == 1 && step == 3) throw Killed();
  };
  CHECK_THROWS_AS(fixture.run(c, observer), Killed);
  Report report = tools::read_report(c.out);
  CHECK(report.state == "unfinished: 1 of 2 blocks");
  // A GPU's log is read in windows; here a saved state ended the first one.
  CHECK(report.log.blocks.back().loss.size() == (on_cuda() ? 2 : 3));
  CHECK(xml_fault(tools::report_page(report)) == "");

  std::string log = log_of(c.out);
  const size_t at = log.rfind("\"loss\":") + 7;
  log.replace(at, log.find(',', at) - at, "null");
  data::write_file_atomic(c.out + "/log.jsonl", log);
  report = tools::read_report(c.out);
  CHECK(std::isnan(report.log.blocks.back().loss.back()));
  const std::string page = tools::report_page(report);
  CHECK(xml_fault(page) == "");
  for (const char* text : {">nan", " nan", "\"nan"}) CHECK(page.find(text) == std::string::npos);
}

TEST_CASE("report: stages of one name are told apart by their order", "[report]") {
  Fixture fixture;
  train::TrainConfig c = fixture.both_phases("run");
  c.stages = train::parse_stages("w2a16,w4a16,w2a16");
  c.lr = {1e-3};
  c.epochs = 1;
  c.e2e_steps = 0;
  fixture.run(c);
  const Report report = tools::read_report(c.out);
  REQUIRE(report.log.blocks.size() == 6);
  CHECK(report.log.blocks[4].block == 1);
  CHECK(report.log.blocks[4].stage == "w4a16");
  const std::string page = tools::report_page(report);
  for (const char* title :
       {"<b>Stage 1: w2a16</b>", "<b>Stage 2: w4a16</b>", "<b>Stage 3: w2a16</b>"})
    CHECK(count(page, title) == 2);  // losses and errors
}

TEST_CASE("charts: numbers have three digits", "[report]") {
  const std::map<double, std::string> texts{
      {0, "0"},         {0.00012345, "0.000123"}, {12.345, "12.3"}, {999.4, "999"},
      {999.6, "1,000"}, {-4567890, "-4,570,000"}, {1e15, "1e+15"},  {INFINITY, "-"}};
  for (const auto& [value, text] : texts) CHECK(tools::short_number(value) == text);
}

TEST_CASE("charts: ticks of a log axis, and gaps", "[report]") {
  const tools::Series series{"s", "red", tools::Mark::Line, {{1, 1e-3}, {2, 0}, {3, 10}, {4, 20}}};
  const tools::Range y = tools::log_range({series});
  CHECK(y.low < 1e-3);
  CHECK(y.high > 20);
  const std::string chart = tools::line_chart({"t", "y", "x"}, y, {series}, tools::Legend::Series);
  for (const char* tick : {"0.001", "0.01", "0.1", "1", "10"})
    CHECK(count(chart, cat("dy=\"4\">", tick, "<")) == 1);
  // The first point is alone, the last two are joined.
  CHECK(count(chart, "M0.0 ") == 1);
  CHECK(count(chart, "h0M") == 1);
  CHECK(count(chart, "L1000.0 ") == 1);
}

TEST_CASE("completion: a command's table holds each of its options once", "[completion]") {
  const auto table_of = [](int (*run)(const tools::Arguments&), tools::Arguments arguments) {
    arguments.push_back(tools::kDescribe);
    try {
      run(arguments);
    } catch (const tools::OptionTable& table) {
      return table.options;
    }
    return std::vector<tools::OptionHelp>();
  };
  const auto train = table_of(tools::train_command, {});
  const auto one = [](const auto& options, const std::string& name) {
    REQUIRE(std::ranges::count(options, name, &tools::OptionHelp::name) == 1);
    return *std::ranges::find(options, name, &tools::OptionHelp::name);
  };
  const train::TrainConfig config;
  train::visit(config, [&](const auto&, const train::Field& f) {
    if (f.group != nullptr) CHECK(one(train, f.name).takes_value);
  });
  CHECK_FALSE(one(train, "deterministic").takes_value);
  CHECK(one(train, "help").letter == "h");
  for (const tools::Command& command : tools::commands()) {
    CAPTURE(command.name);
    if (command.run == tools::completion_command) continue;
    const std::string word = command.words;
    const auto options =
        table_of(command.run, word.empty() ? tools::Arguments()
                                           : tools::Arguments{word.substr(0, word.find(' '))});
    CHECK(one(options, "device").takes_value);
    CHECK_FALSE(one(options, "version").takes_value);
  }
  CHECK_THROWS_AS(tools::completion_command({"csh"}), UsageError);
}

}  // namespace bbb::tests
