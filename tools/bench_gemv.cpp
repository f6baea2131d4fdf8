// Times one row times a matrix, packed and dense, with cold caches. A recorded graph holds many
// products, each with the next copy of the weight.
#include <algorithm>

#include "tools/bench.h"

namespace bbb::tools {

using engine::Backend;
using engine::DType;
using engine::PackedWeight;
using engine::Tensor;

namespace {

constexpr int64_t kMinProducts = 48;  // in a graph
constexpr int64_t kMaxCopies = 4096;

int64_t copies_for(int64_t weight_bytes, int64_t rotation_bytes) {
  return std::clamp<int64_t>((rotation_bytes + weight_bytes - 1) / weight_bytes, 1, kMaxCopies);
}

// Returns the seconds of one product. product(i) queues one with copy i of the weight.
double measure_products(Backend& backend, int64_t copies,
                        const std::function<void(int64_t copy)>& product) {
  const bool gpu = backend.device() == engine::DeviceType::Cuda;
  const int64_t products = gpu ? (kMinProducts + copies - 1) / copies * copies : 1;
  const auto replay = backend.record([&] {
    for (int64_t i = 0; i < products; ++i) product(i % copies);
  });
  return measure_seconds(backend, Repeats(), [&] { replay->run(); }) /
         static_cast<double>(products);
}

}  // namespace

GemvResult bench_gemv(Backend& backend, GemvShape shape, int64_t rotation_bytes) {
  const auto [n, k] = shape;
  const quant::LinearFormat format{.n = n, .k = k};
  const int64_t act = engine::size_bytes(backend.act());
  const int64_t packed_bytes = format.bytes(), dense_bytes = n * k * act;
  const int64_t vectors = (n + k) * act;

  GemvResult result;
  result.shape = shape;
  result.packed_bytes = static_cast<double>(packed_bytes + vectors);
  result.dense_bytes = static_cast<double>(dense_bytes + vectors);
  const Tensor x = random_activations(backend, {1, k}, 1);
  const Tensor y = backend.empty({1, n}, backend.act());
  {
    const int64_t copies = copies_for(packed_bytes, rotation_bytes);
    PackedWeight file{format, {}, {}};
    const float one = 1;
    for (const quant::StoredTensor& stored : format.tensors()) {
      Tensor& tensor = file.tensors[static_cast<size_t>(stored.part)];
      const bool scales = stored.part == quant::StoredPart::Scales;  // E4M3: 1/2 to 15/8
      if (stored.part != quant::StoredPart::MasterScale) {
        tensor = random_bytes(backend, engine::numel_of(stored.shape), scales ? 0x30 : 0,
                              scales ? 16 : 256, 1)
                     .view(stored.shape);
      } else {
        tensor = backend.empty(stored.shape, DType::F32);
        backend.upload(tensor, &one);
      }
    }
    std::vector<PackedWeight> weights;
    for (int64_t i = 0; i < copies; ++i) weights.push_back(backend.repack(file));
    result.packed_s = measure_products(backend, copies, [&](int64_t i) {
      backend.packed_gemv(y, x, weights[static_cast<size_t>(i)], Tensor());
    });
  }
  const int64_t copies = copies_for(dense_bytes, rotation_bytes);
  const Tensor weights = random_activations(backend, {copies * n, k}, 2);
  result.dense_s = measure_products(backend, copies, [&](int64_t i) {
    backend.gemm_nt(y, x, weights.rows(i * n, n), Tensor(), Tensor());
  });
  return result;
}

}  // namespace bbb::tools
