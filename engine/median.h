// The median of measurements.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace bbb::engine {

// For an even count the upper of the two middle values; 0 for no values.
template <typename T>
T median(std::vector<T> values) {
  if (values.empty()) return T{0};
  const auto middle = values.begin() + static_cast<int64_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

}  // namespace bbb::engine
