#include "engine/measure.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "engine/median.h"
#include "engine/rng.h"

namespace bbb::engine {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kStretch = 1 << 20;  // random values; the rest of a tensor repeats them
constexpr int64_t kMaxCopies = 4096;

void repeat_stretch(Backend& backend, const Tensor& flat) {
  for (int64_t done = kStretch; done < flat.numel(); done += kStretch) {
    const int64_t count = std::min(kStretch, flat.numel() - done);
    backend.copy(flat.slice(done, count), flat.slice(0, count));
  }
}

PackedWeight random_weight(Backend& backend, const quant::LinearFormat& format) {
  using quant::StoredPart;
  PackedWeight file{format, {}, {}};
  const float one = 1;
  for (const quant::StoredTensor& stored : format.tensors()) {
    Tensor& tensor = file.tensors[static_cast<size_t>(stored.part)];
    const bool scales = stored.part == StoredPart::Scales;
    const auto upload = [&](const void* values) {
      tensor = backend.empty(stored.shape, dtype_of(stored));
      backend.upload(tensor, values);
    };
    if (stored.part == StoredPart::SplitChannels)
      upload(format.order->split().data());
    else if (stored.part == StoredPart::OutlierChannels)
      upload(format.order->outliers().data());
    else if (stored.part == StoredPart::MasterScale)
      upload(&one);
    else
      tensor =
          random_bytes(backend, numel_of(stored.shape), scales ? 0x30 : 0, scales ? 16 : 256, 1)
              .view(stored.shape);
  }
  return file;
}

}  // namespace

double measure_seconds(Backend& backend, const Repeats& repeats, const std::function<void()>& run) {
  return measure_in_turns(backend, repeats, {run}).front();
}

std::vector<double> measure_in_turns(Backend& backend, const Repeats& repeats,
                                     const std::vector<std::function<void()>>& runs) {
  for (int64_t i = 0; i < repeats.warmup; ++i)
    for (const auto& run : runs) run();
  std::vector<std::vector<double>> times(runs.size());
  for (int64_t group = 0; group < repeats.groups; ++group)
    for (size_t i = 0; i < runs.size(); ++i) {
      backend.synchronize();
      const auto start = Clock::now();
      for (int64_t call = 0; call < repeats.calls; ++call) runs[i]();
      backend.synchronize();
      const std::chrono::duration<double> elapsed = Clock::now() - start;
      times[i].push_back(elapsed.count() / static_cast<double>(repeats.calls));
    }
  std::vector<double> medians;
  for (std::vector<double>& of : times) medians.push_back(median(std::move(of)));
  return medians;
}

ProductRounds::ProductRounds(Backend& backend, int64_t wanted, int64_t copies,
                             std::function<void(int64_t copy)> product)
    : product_(std::move(product)),
      copies_(copies),
      products_(backend.device() == DeviceType::Cuda ? (wanted + copies - 1) / copies * copies
                                                     : 1) {
  replay_ = backend.record([this] {
    for (int64_t i = 0; i < products_; ++i) product_(next_++ % copies_);
  });
}

int64_t copies_for(int64_t weight_bytes, int64_t rotation_bytes) {
  return std::clamp<int64_t>((rotation_bytes + weight_bytes - 1) / weight_bytes, 1, kMaxCopies);
}

Tensor random_activations(Backend& backend, Shape shape, uint64_t seed) {
  return random_normal(backend, std::move(shape), backend.act(), seed);
}

Tensor random_normal(Backend& backend, Shape shape, DType dtype, uint64_t seed) {
  const Tensor out = backend.empty(std::move(shape), dtype);
  const Tensor flat = out.view({out.numel()});
  const int64_t drawn = std::min(out.numel(), kStretch);
  Rng rng(seed);
  std::vector<float> values(static_cast<size_t>(drawn));
  for (float& value : values) value = static_cast<float>(rng.normal());
  const Tensor floats = backend.empty({drawn}, DType::F32);
  backend.upload(floats, values.data());
  backend.cast(flat.slice(0, drawn), floats);
  repeat_stretch(backend, flat);
  return out;
}

Tensor random_bytes(Backend& backend, int64_t count, int first, int choices, uint64_t seed) {
  const Tensor out = backend.empty({count}, DType::U8);
  const int64_t drawn = std::min(count, kStretch);
  Rng rng(seed);
  std::vector<uint8_t> values(static_cast<size_t>(drawn));
  for (uint8_t& value : values) value = static_cast<uint8_t>(first + rng.below(choices));
  backend.upload(out.slice(0, drawn), values.data());
  repeat_stretch(backend, out);
  return out;
}

OperandRows random_operand(Backend& backend, int64_t rows, const quant::LinearFormat& format,
                           int bits) {
  const int64_t k = format.stored_k(), groups = format.groups();
  OperandRows operand;
  operand.codes = random_bytes(backend, rows * k, 0, 1 << bits, 2).view({rows, k});
  operand.zeros = random_bytes(backend, rows * groups, 0, 1 << bits, 3).view({rows, groups});
  operand.scales = random_normal(backend, {rows, groups}, backend.real(), 4);
  return operand;
}

std::vector<PackedWeight> random_weights(Backend& backend, const quant::LinearFormat& format,
                                         int64_t count) {
  const PackedWeight file = random_weight(backend, format);
  std::vector<PackedWeight> copies;
  for (int64_t i = 0; i < count; ++i) copies.push_back(backend.repack(file));
  return copies;
}

}  // namespace bbb::engine
