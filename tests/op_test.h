// Shared by the tests of single ops: inputs that the device under test can hold, and its epsilons.
#pragma once

#include <algorithm>
#include <cmath>

#include "tests/support.h"

namespace bbb::tests {

// Normal values times scale that are exact in backend()'s bf16 activations, so that it and the F64
// oracle get the same values. (F32 rounds them once more, by an epsilon that the tolerances cover.)
inline std::vector<double> activations(engine::Rng& rng, int64_t n, double scale = 1.0) {
  std::vector<double> values = normal(rng, n, scale);
  return backend().act() == DType::BF16 ? round_bf16(std::move(values)) : values;
}

// The dtypes that a parameter's gradient may have, each once.
inline std::vector<DType> gradient_dtypes() {
  if (backend().act() == backend().real()) return {backend().real()};
  return {backend().act(), backend().real()};
}

// inv_freq of a head of size d: F32, for the oracle too.
inline Tensor frequencies(Backend& b, int64_t d) {
  std::vector<double> f(static_cast<size_t>(d / 2));
  for (size_t i = 0; i < f.size(); ++i)
    f[i] = std::pow(1e4, -2.0 * static_cast<double>(i) / static_cast<double>(d));
  return make(b, {d / 2}, DType::F32, f);
}

inline double act_epsilon() { return epsilon_of(backend().act()); }
inline double real_epsilon() { return epsilon_of(backend().real()); }

}  // namespace bbb::tests
