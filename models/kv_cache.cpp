#include "models/llama.h"

namespace bbb::models {

using engine::DType;

KvCache::KvCache(Backend& backend, const LlamaConfig& config, int64_t batch,
                 int64_t capacity_tokens, quant::KvFormat kv_format)
    : format(kv_format) {
  engine::Shape shape{batch, capacity_tokens, config.kv_heads, config.head_dim};
  if (format.quantized()) {
    constexpr int64_t kUnit = quant::KvFormat::kTokenUnit;
    shape[1] = (capacity_tokens + kUnit - 1) / kUnit * kUnit;
    shape[3] = format.head_bytes(config.head_dim);
  }
  const DType dtype = format.quantized() ? DType::U8 : backend.act();
  for (int64_t layer = 0; layer < config.layers; ++layer) {
    k.push_back(backend.zeros(shape, dtype));
    v.push_back(backend.zeros(shape, dtype));
  }
  start = backend.zeros({batch}, DType::I32);
}

void KvCache::check(const LlamaConfig& config, quant::KvFormat format) {
  BBB_CHECK(!format.quantized() || config.head_dim % quant::KvFormat::kGroup == 0,
            "a key-value cache of ", format.bits, " bits takes head sizes that are multiples of ",
            quant::KvFormat::kGroup, ", not ", config.head_dim);
}

int64_t KvCache::bytes_per_token() const {
  int64_t bytes = 0;
  for (const Tensor& layer : k) bytes += 2 * layer.bytes() / (layer.dim(0) * layer.dim(1));
  return bytes;
}

KvCache KvCache::sequence(int64_t b) const {
  KvCache one;
  one.format = format;
  for (const Tensor& layer : k) one.k.push_back(layer.rows(b, 1));
  for (const Tensor& layer : v) one.v.push_back(layer.rows(b, 1));
  one.start = start.rows(b, 1);
  return one;
}

}  // namespace bbb::models
