// Formats of linears for tests, with and without channel orders, and a plain tensor as the input of
// one.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "models/config.h"
#include "models/operand.h"

namespace bbb::tests {

inline quant::LinearFormat plain_format(int64_t n, int64_t k, int bits, int group = 32) {
  return {.n = n, .k = k, .weight = {.bits = bits, .group = group}};
}

// Of the linears of a block, in order: without a channel order, 16-bit activations.
inline std::vector<quant::LinearFormat> block_formats(const models::LlamaConfig& config, int bits,
                                                      int group = 32) {
  std::vector<quant::LinearFormat> formats;
  for (const models::LinearShape& linear : models::block_linears(config))
    formats.push_back(plain_format(linear.n, linear.k, bits, group));
  return formats;
}

// What an order does to an input; `outliers` in groups.
struct Layout {
  const char* name;
  int group;
  int outliers;
  double split;
  quant::SplitSide side;
  bool hadamard;
};
inline constexpr Layout kLayouts[] = {
    {"split weights", 32, 0, 0.2, quant::SplitSide::Weight, false},
    {"split activations", 32, 0, 0.2, quant::SplitSide::Activation, false},
    {"outliers", 32, 1, 0.2, quant::SplitSide::Weight, false},
    {"rotated", 32, 0, 0, quant::SplitSide::Weight, true},
    {"rotated behind outliers and pairs", 32, 1, 0.2, quant::SplitSide::Activation, true},
    {"padded", 128, 0, 0.1, quant::SplitSide::Weight, false},
    {"padded and rotated", 64, 0, 0, quant::SplitSide::Weight, true},
};

// Every third channel is an outlier, every other of the rest is split, as far as they are wanted.
inline void lay_out(quant::LinearFormat& format, const Layout& layout) {
  const auto wanted = static_cast<size_t>(layout.outliers * layout.group);
  const auto pairs = static_cast<size_t>(layout.split * static_cast<double>(format.k));
  std::vector<int32_t> outliers, split;
  for (int32_t c = 0; c < format.k; ++c) {
    if (c % 3 != 1 && outliers.size() < wanted)
      outliers.push_back(c);
    else if (c % 2 == 1 && split.size() < pairs)
      split.push_back(c);
  }
  format.weight.group = layout.group;
  format.input.hadamard = layout.hadamard;
  format.input.outliers = static_cast<int>(outliers.size());
  format.order =
      std::make_shared<quant::ChannelOrder>(format.k, layout.group, outliers, split, layout.side);
}

inline models::LinearInput input_of(autograd::Var x) {
  engine::Shape shape = x.value().shape();
  return {.x = std::move(x), .shape = std::move(shape)};
}

}  // namespace bbb::tests
