// Formats of input sites, and their operands by the formula of numerics.md section 2, in F64.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <memory>
#include <vector>

#include "engine/rng.h"
#include "quant/format.h"

namespace bbb::tests {

enum class Order { None, Split, Outliers, Both };
inline constexpr Order kOrders[] = {Order::None, Order::Split, Order::Outliers, Order::Both};

// A site's format: a tenth of the channels split, a group or two of outliers.
inline quant::LinearFormat site(engine::Rng& rng, int64_t k, int group, quant::InputGrid input,
                                Order order, quant::SplitSide side = quant::SplitSide::Weight) {
  quant::LinearFormat format{.n = 1, .k = k, .weight = {.bits = 2, .group = group}, .input = input};
  if (order == Order::None) return format;
  const std::vector<int32_t> drawn = rng.permutation(k);
  int64_t outliers = order == Order::Split ? 0 : k >= 4 * group ? 2 * group : group;
  if (outliers > k) outliers = 0;
  const int64_t split = order == Order::Outliers ? 0 : std::min((k + 9) / 10, k - outliers);
  const auto begin = drawn.begin();
  std::vector<int32_t> first(begin, begin + outliers);
  std::vector<int32_t> second(begin + outliers, begin + outliers + split);
  std::sort(first.begin(), first.end());
  std::sort(second.begin(), second.end());
  format.input.outliers = static_cast<int>(outliers);
  format.order = std::make_shared<quant::ChannelOrder>(k, group, first, second, side);
  return format;
}

// Gathered, in double: rotated by the definition of the Hadamard matrix. Of magnitudes, the sums of
// the terms' magnitudes.
inline std::vector<double> gather_by_formula(const quant::LinearFormat& format,
                                             const std::vector<double>& x, int64_t rows,
                                             bool magnitudes = false) {
  const quant::ChannelOrder order = format.channel_order();
  const int64_t columns = order.stored_k(), group = format.weight.group;
  std::vector<double> out(static_cast<size_t>(rows * columns), 0.0);
  for (int64_t row = 0; row < rows; ++row) {
    double* to = out.data() + row * columns;
    for (int64_t p = 0; p < columns; ++p) {
      const int32_t channel = order.channels()[static_cast<size_t>(p)];
      if (channel < 0) continue;
      const bool half = order.side() == quant::SplitSide::Activation && p >= order.pairs_begin() &&
                        p < order.pairs_end();
      to[p] = x[static_cast<size_t>(row * format.k + channel)] * (half ? 0.5 : 1.0);
      if (magnitudes) to[p] = std::abs(to[p]);
    }
    if (!format.input.hadamard) continue;
    const double scale = group == 128 ? 1.0 / 16 : 1.0 / 8;
    for (int64_t begin = order.rotated_begin(); begin < order.rotated_end(); begin += group) {
      std::vector<double> rotated;
      for (int64_t i = 0; i < group; ++i) {
        double sum = 0;
        for (int64_t j = 0; j < group; ++j)
          sum += magnitudes || std::popcount(static_cast<uint64_t>(i & j)) % 2 == 0
                     ? to[begin + j]
                     : -to[begin + j];
        rotated.push_back(scale * sum);
      }
      std::copy(rotated.begin(), rotated.end(), to + begin);
    }
  }
  return out;
}

}  // namespace bbb::tests
