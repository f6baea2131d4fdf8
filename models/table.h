// Embedding and head on a device, and how `bbb export --head-bits` quantizes them.
#pragma once

#include <memory>
#include <vector>

#include "autograd/tape.h"
#include "models/layer_result.h"

namespace bbb::models {

struct Table {
  autograd::Var dense;                                 // act or BF16 (V, D), or
  std::shared_ptr<const engine::PackedWeight> packed;  // 8 or 4 bits

  const engine::Tensor& tensor() const;  // of a dense one
  int64_t bytes() const;
};

// Of values (V, D), on all cores.
LinearResult quantize_table(const std::vector<float>& values, const quant::LinearFormat& format);

}  // namespace bbb::models
