// The sampler: the most likely token, and logits from which no token can be chosen.
#include "tools/sampler.h"

#include <catch2/catch.hpp>
#include <cmath>

using bbb::tools::Sampler;
using Catch::Matchers::Contains;

TEST_CASE("sampler: greedy takes the largest logit, and on a tie the lower id") {
  CHECK(Sampler({}).next({1, 3, -2, 3}) == 1);
}

TEST_CASE("sampler: a NaN or infinite logit is an error") {
  for (const double temperature : {0.0, 1.0})
    for (const float bad : {NAN, INFINITY, -INFINITY}) {
      bbb::tools::SamplerSpec spec;
      spec.temperature = temperature;
      CHECK_THROWS_WITH(Sampler(spec).next({1, bad, 2}), Contains("the logit of token 1 is "));
    }
}
