#include "models/llama.h"

namespace bbb::models {

KvCache::KvCache(Backend& backend, const LlamaConfig& config, int64_t batch,
                 int64_t capacity_tokens) {
  const engine::Shape shape{batch, capacity_tokens, config.kv_heads, config.head_dim};
  for (int64_t layer = 0; layer < config.layers; ++layer) {
    k.push_back(backend.zeros(shape, backend.act()));
    v.push_back(backend.zeros(shape, backend.act()));
  }
  start = backend.zeros({batch}, engine::DType::I32);
}

KvCache KvCache::sequence(int64_t b) const {
  KvCache one;
  for (const Tensor& layer : k) one.k.push_back(layer.rows(b, 1));
  for (const Tensor& layer : v) one.v.push_back(layer.rows(b, 1));
  one.start = start.rows(b, 1);
  return one;
}

}  // namespace bbb::models
