// bbb report: a run as one page for a browser.
#include <fmt/format.h>

#include <filesystem>

#include "data/files.h"
#include "quant/check.h"
#include "tools/cli.h"
#include "tools/report_page.h"

namespace bbb::tools {

int report_command(const Arguments& arguments) {
  CommandLine line("report", "A run as one HTML page: losses, block errors, times, options");
  line.options()                                                                           //
      ("run", "directory of a bbb train, finished or not", cxxopts::value<std::string>())  //
      ("before", "perplexity of the source model, from bbb ppl --json",
       cxxopts::value<std::string>())  //
      ("after", "perplexity of the export, from bbb ppl --json",
       cxxopts::value<std::string>())  //
      ("out", "HTML file to write", cxxopts::value<std::string>());
  if (!line.parse(arguments)) return 0;
  const std::string run = line.required("run"), out = line.required("out");
  data::Parents parents(out);
  check_writable(line, "out");
  const std::filesystem::path file = std::filesystem::weakly_canonical(out);
  if (std::filesystem::exists(file) && file.extension() != ".html" &&
      file.string().starts_with(std::filesystem::weakly_canonical(run).string() + "/"))
    throw UsageError(cat("--out ", out, " is a file of the run"));
  Report report = read_report(run);
  if (line.has("before")) report.before = read_perplexity(line.required("before"));
  if (line.has("after")) report.after = read_perplexity(line.required("after"));
  if (report.before && report.after)
    BBB_CHECK(report.before->tokens == report.after->tokens, report.before->file, " measured ",
              report.before->tokens, " tokens and ", report.after->file, " ", report.after->tokens,
              ": only equal windows of one text compare");
  data::write_file_atomic(out, report_page(report));
  parents.keep();
  fmt::print("{}: {}, {}\n", out, run, report.state);
  return 0;
}

}  // namespace bbb::tools
