// Times a few rows times a matrix, packed and dense. A recorded graph holds many products. Cold:
// each takes the next copy of the weight.
#include <algorithm>

#include "tools/bench.h"

namespace bbb::tools {

using engine::Backend;
using engine::DType;
using engine::PackedWeight;
using engine::Tensor;

namespace {

constexpr int64_t kMinProducts = 2048;  // of up to 16 rows in a graph: far more than its launch
constexpr int64_t kMaxCopies = 4096;

int64_t copies_for(int64_t weight_bytes, int64_t rotation_bytes) {
  return std::clamp<int64_t>((rotation_bytes + weight_bytes - 1) / weight_bytes, 1, kMaxCopies);
}

// Returns the seconds of one product. product(i) queues one with copy i of the weight.
double measure_products(Backend& backend, int64_t rows, int64_t copies,
                        const std::function<void(int64_t copy)>& product) {
  const bool gpu = backend.device() == engine::DeviceType::Cuda;
  const int64_t least = kMinProducts * 16 / std::max<int64_t>(rows, 16);
  const int64_t products = gpu ? (least + copies - 1) / copies * copies : 1;
  int64_t at = 0;  // a CPU's replay goes on where the last one ended
  const auto replay = backend.record([&] {
    for (int64_t i = 0; i < products; ++i) product(at++ % copies);
  });
  return measure_seconds(backend, Repeats(), [&] { replay->run(); }) /
         static_cast<double>(products);
}

void time_product(TimedProduct& timed, Backend& backend, int64_t rows, int64_t copies,
                  int64_t bytes, const std::function<void(int64_t copy)>& product) {
  timed.bytes = static_cast<double>(bytes);
  timed.cold_s = measure_products(backend, rows, copies, product);
  timed.warm_s = measure_products(backend, rows, 1, product);
}

// A stored matrix of random codes, with scales from 1/2 to 15/8.
PackedWeight random_weight(Backend& backend, const quant::LinearFormat& format) {
  PackedWeight file{format, {}, {}};
  const float one = 1;
  for (const quant::StoredTensor& stored : format.tensors()) {
    Tensor& tensor = file.tensors[static_cast<size_t>(stored.part)];
    const bool scales = stored.part == quant::StoredPart::Scales;
    if (stored.part != quant::StoredPart::MasterScale) {
      tensor = random_bytes(backend, engine::numel_of(stored.shape), scales ? 0x30 : 0,
                            scales ? 16 : 256, 1)
                   .view(stored.shape);
    } else {
      tensor = backend.empty(stored.shape, DType::F32);
      backend.upload(tensor, &one);
    }
  }
  return file;
}

// Rows of 2-bit codes.
engine::OperandRows random_operand(Backend& backend, int64_t rows, int64_t k, int64_t groups) {
  engine::OperandRows operand;
  operand.codes = random_bytes(backend, rows * k, 0, 4, 2).view({rows, k});
  operand.zeros = random_bytes(backend, rows * groups, 0, 4, 3).view({rows, groups});
  operand.scales = random_normal(backend, {rows, groups}, backend.real(), 4);
  return operand;
}

}  // namespace

GemvResult bench_gemv(Backend& backend, GemvShape shape, int64_t rows, int64_t rotation_bytes) {
  const auto [n, k] = shape;
  const quant::LinearFormat format{.n = n, .k = k};
  const int64_t act = engine::size_bytes(backend.act());
  const int64_t real = engine::size_bytes(backend.real());
  const int64_t packed_bytes = format.bytes(), dense_bytes = n * k * act;
  const int64_t x_bytes = rows * k * act, y_bytes = rows * n * act;
  const int64_t operand_bytes = rows * (k + format.groups() * (1 + real));

  GemvResult result;
  const Tensor x = random_activations(backend, {rows, k}, 1);
  const Tensor y = backend.empty({rows, n}, backend.act());
  {
    const PackedWeight file = random_weight(backend, format);
    const int64_t copies = copies_for(packed_bytes, rotation_bytes);
    std::vector<PackedWeight> weights;
    for (int64_t i = 0; i < copies; ++i) weights.push_back(backend.repack(file));
    const auto weight = [&](int64_t i) -> const PackedWeight& {
      return weights[static_cast<size_t>(i)];
    };
    time_product(result.packed, backend, rows, copies, packed_bytes + x_bytes + y_bytes,
                 [&](int64_t i) { backend.packed_gemv(y, x, weight(i), Tensor()); });
    if (rows <= Backend::kMaxPackedRows) {
      const engine::OperandRows operand = random_operand(backend, rows, k, format.groups());
      time_product(result.quantized, backend, rows, copies, packed_bytes + operand_bytes + y_bytes,
                   [&](int64_t i) { backend.quantized_gemv(y, operand, weight(i), Tensor()); });
    }
  }
  const int64_t copies = copies_for(dense_bytes, rotation_bytes);
  const Tensor weights = random_activations(backend, {copies * n, k}, 2);
  time_product(
      result.dense, backend, rows, copies, dense_bytes + x_bytes + y_bytes,
      [&](int64_t i) { backend.gemm_nt(y, x, weights.rows(i * n, n), Tensor(), Tensor()); });
  return result;
}

}  // namespace bbb::tools
