// Algorithms of matrix products, chosen by timing.
//
// A GPU's library offers several algorithms for one product. They differ in speed and in the order
// of their sums, hence in the last bits: within a run one product always takes the same one, so a
// choice is stored before it computes anything.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>

namespace bbb::engine {

struct GemmChoices {
  std::string made_by;                            // Backend::gemm_library(): valid nowhere else
  std::map<std::string, std::string> algorithms;  // by product, both in its maker's own words
};

struct GemmTuning {
  GemmChoices known;         // taken as they are; empty: none
  std::string where;         // what holds them, for errors
  double least_flops = 1e9;  // smaller products keep the library's first suggestion
  int64_t memory_bytes = 0;  // that timing may take for a while; a larger product is not timed
  // How often a recorded step, and a place outside one that has a product, are going to run:
  // products that will take long enough in all are searched more widely than the library suggests,
  // which takes seconds.
  int64_t step_runs = 1, product_runs = 1;
  // Called with all choices before the first product that a new one computes; may be empty.
  std::function<void(const GemmChoices&)> keep;
  std::function<void(const std::string&)> say;  // a line of report; may be empty
};

}  // namespace bbb::engine
