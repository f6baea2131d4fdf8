// Algorithms of matrix products, chosen by timing.
//
// A GPU's library offers several algorithms for one product. They differ in speed and in the order
// of their sums, hence in the last bits. So a product takes the same algorithm throughout a run: a
// choice is stored before the first product that uses it.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>

namespace bbb::engine {

struct GemmChoices {
  std::string made_by;                            // Backend::gemm_library(); valid only there
  std::map<std::string, std::string> algorithms;  // product -> algorithm, in the backend's format
};

struct GemmTuning {
  GemmChoices known;         // used without timing; may be empty
  std::string where;         // the file of `known`, for errors
  double least_flops = 1e9;  // smaller products keep the library's first suggestion
  int64_t memory_bytes = 0;  // limit while timing; a product that needs more is not timed
  // How often the recorded step will run, and a product outside it. Products that will take long
  // enough in total are searched beyond the library's suggestions, which takes seconds.
  int64_t step_runs = 1, product_runs = 1;
  // Called with all choices before the first product that uses a new choice; may be empty.
  std::function<void(const GemmChoices&)> keep;
  std::function<void(const std::string&)> say;  // a line of report; may be empty
};

}  // namespace bbb::engine
