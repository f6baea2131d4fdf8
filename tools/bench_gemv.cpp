// One row times a matrix, packed and dense, with cold caches: many products in one recorded graph,
// each through the next copy of the weight.
#include <algorithm>

#include "quant/pack.h"
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

// Seconds of one product; product(i) queues one through copy i.
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

// `copies` tensors (rows, row_bytes) in one allocation, each on a boundary of 256 bytes.
class ByteCopies {
 public:
  ByteCopies(Backend& backend, int64_t copies, engine::Shape shape, int first, int choices)
      : shape_(std::move(shape)),
        stride_((engine::numel_of(shape_) + 255) / 256 * 256),
        all_(random_bytes(backend, copies * stride_, first, choices, 1)) {}
  Tensor operator[](int64_t copy) const {
    return all_.slice(copy * stride_, engine::numel_of(shape_)).view(shape_);
  }

 private:
  engine::Shape shape_;
  int64_t stride_;
  Tensor all_;
};

}  // namespace

GemvResult bench_gemv(Backend& backend, GemvShape shape, int64_t rotation_bytes) {
  const auto [n, k] = shape;
  const engine::GridSpec spec;
  const int64_t groups = k / spec.group, act = engine::size_bytes(backend.act());
  const int64_t code_bytes = n * quant::code_row_bytes(k, spec.bits);
  const int64_t zero_bytes = n * quant::zero_row_bytes(k, spec.group, spec.bits);
  const int64_t packed_bytes = code_bytes + n * groups + zero_bytes, dense_bytes = n * k * act;
  const int64_t vectors = (n + k) * act;

  GemvResult result;
  result.shape = shape;
  result.packed_bytes = static_cast<double>(packed_bytes + vectors);
  result.dense_bytes = static_cast<double>(dense_bytes + vectors);
  const Tensor x = random_activations(backend, {1, k}, 1);
  const Tensor y = backend.empty({1, n}, backend.act());
  {
    const int64_t copies = copies_for(packed_bytes, rotation_bytes);
    const ByteCopies codes(backend, copies, {n, code_bytes / n}, 0, 256);
    const ByteCopies scales(backend, copies, {n, groups}, 0x30, 16);  // E4M3: 1/2 to 15/8
    const ByteCopies zeros(backend, copies, {n, zero_bytes / n}, 0, 256);
    const Tensor one = backend.empty({1}, backend.real()), unit = backend.empty({1}, DType::F32);
    const float value = 1;
    backend.upload(unit, &value);
    backend.cast(one, unit);
    result.packed_s = measure_products(backend, copies, [&](int64_t i) {
      const PackedWeight weight{codes[i], scales[i], zeros[i], one, spec, n, k};
      backend.packed_gemv(y, x, weight, Tensor());
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
