// LinearFormat: what a quantized linear is. It alone knows the tensors that hold one in a file
// (format.md); readers, writers, byte counts, synthetic models and kernels ask it.
//
//   W[n, k] = S e[n, g] (q[n, k] - z[n, g])      g = k / G the group, K' the stored positions
//
//   Codes        .qweight       U8 (N, K' b / 8)              q, a bit stream a row (pack.h)
//   Scales       .scales        F8_E4M3 (N, K' / G)           e
//   Zeros        .zeros         U8 (N, ceil(K' / G b / 8))    z, packed as the codes are
//   MasterScale  .master_scale  F32 (1)                       S, a power of two
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "quant/file_dtype.h"
#include "quant/spec.h"

namespace bbb::quant {

// The bits of the activations that enter a linear; 16: they are not quantized.
struct InputGrid {
  int bits = 16;

  bool operator==(const InputGrid&) const = default;
};

enum class StoredPart { Codes, Scales, Zeros, MasterScale };
inline constexpr int kStoredParts = 4;

struct StoredTensor {
  StoredPart part;
  const char* suffix;  // behind the linear's name
  FileDType dtype;
  std::vector<int64_t> shape;

  int64_t bytes() const;
};

struct LinearFormat {
  int64_t n = 0;  // output features
  int64_t k = 0;  // input features
  WeightGrid weight = {};
  InputGrid input = {};

  bool operator==(const LinearFormat&) const = default;
  int64_t stored_k() const;  // K': K in whole groups
  // In the order of StoredPart, which is that of the file.
  std::vector<StoredTensor> tensors() const;
  int64_t bytes() const;  // of all its tensors
};

// A stored linear in memory, on the host or on a device: what kernels take. Each pointer is aligned
// to 16 bytes on a device.
struct PackedView {
  const uint8_t* qweight;
  const uint8_t* scales;
  const uint8_t* zeros;
  const float* master_scale;
  int64_t n;
  int64_t k;
  WeightGrid grid;
};

}  // namespace bbb::quant
