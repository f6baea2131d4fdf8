// What the kernels of append_kv and attention_cached share: positions, and the layout of quantized
// caches (quant::KvFormat).
#pragma once

#include <cstdint>

#include "quant/format.h"
#include "quant/hd.h"

namespace bbb::cuda {

// Whether the cache has positions start .. start + t - 1.
BBB_HD bool in_cache(int start, int t, int t_max) { return start >= 0 && start <= t_max - t; }

// Offsets of a head's codes, and of its pairs of e and z, in a quantized cache.
struct QuantizedLayout {
  QuantizedLayout(quant::KvFormat format, int64_t positions, int64_t kv_heads, int64_t d)
      : t_max(positions),
        heads(kv_heads),
        code_bytes(static_cast<int>(format.code_bytes(d))),
        pair_bytes(static_cast<int>(format.pair_bytes(d))) {}

  BBB_HD int64_t codes(int64_t b, int64_t position, int64_t head) const {
    return b * t_max * heads * (code_bytes + pair_bytes) + (position * heads + head) * code_bytes;
  }
  BBB_HD int64_t pairs(int64_t b, int64_t position, int64_t head) const {
    return (b * (code_bytes + pair_bytes) + code_bytes) * t_max * heads +
           (position * heads + head) * pair_bytes;
  }

  int64_t t_max, heads;
  int code_bytes, pair_bytes;  // of a head
};

}  // namespace bbb::cuda
