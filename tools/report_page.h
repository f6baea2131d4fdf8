// The page of `bbb report`: what a run directory and its log tell, as one HTML file that needs
// nothing else.
#pragma once

#include <optional>
#include <string>

#include "train/run_log.h"

namespace bbb::tools {

// What `bbb ppl --json` wrote.
struct MeasuredPerplexity {
  std::string file;
  double perplexity = 0, nll_stderr = 0, bits_per_weight = 0;
  int64_t windows = 0, tokens = 0;
};
// Throws, naming the file, if it is not from `bbb ppl --json`.
MeasuredPerplexity read_perplexity(const std::string& file);

struct Report {
  std::string run;  // the directory
  train::RunIdentity identity;
  train::RunLog log;
  int64_t layers = 0;
  std::string state;  // "finished", or how far it is
  std::optional<MeasuredPerplexity> before, after;
};
// Throws if the directory holds no run of this version, a damaged one, or one without a step.
Report read_report(const std::string& run);

// Well-formed XML, too.
std::string report_page(const Report& report);

}  // namespace bbb::tools
