#include "models/llama.h"

namespace bbb::models {

KvCache::KvCache(Backend& device, const LlamaConfig& config, int64_t capacity_tokens)
    : backend(device), capacity(capacity_tokens) {
  const engine::Shape shape{1, capacity, config.kv_heads, config.head_dim};
  for (int64_t layer = 0; layer < config.layers; ++layer) {
    k.push_back(backend.zeros(shape, backend.act()));
    v.push_back(backend.zeros(shape, backend.act()));
  }
  start = backend.zeros({1}, engine::DType::I32);
}

}  // namespace bbb::models
