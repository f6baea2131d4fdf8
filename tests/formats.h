// Formats of linears for tests, and a plain tensor as the input of one.
#pragma once

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

inline models::LinearInput input_of(autograd::Var x) {
  engine::Shape shape = x.value().shape();
  return {.x = std::move(x), .codes = {}, .shape = std::move(shape)};
}

}  // namespace bbb::tests
