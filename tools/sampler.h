// Sampler: the next token from one row of logits.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/rng.h"

namespace bbb::tools {

struct SamplerSpec {
  double temperature = 0;  // 0: the largest logit, ties to the lower id
  double top_p = 1;        // nucleus: the fewest tokens whose probability reaches top_p
  uint64_t seed = 0;
};

class Sampler {
 public:
  explicit Sampler(const SamplerSpec& spec) : spec_(spec), rng_(spec.seed) {}
  // Throws where a logit is NaN or infinite.
  int32_t next(const std::vector<float>& logits);

 private:
  SamplerSpec spec_;
  engine::Rng rng_;
};

}  // namespace bbb::tools
