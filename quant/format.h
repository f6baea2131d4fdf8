// LinearFormat: what a quantized linear is. It alone knows the tensors that hold one in a file
// (format.md); readers, writers, byte counts, synthetic models and kernels ask it.
//
//   W[n, p] = S e[n, g] (q[n, p] - z[n, g])      p a stored position, g = p / G its group
//             symmetric (Levels::Seq): z = (2^b - 1) / 2 in every group, which is not stored
//
//   Codes            .qweight           U8 (N, K' b / 8)              q, a bit stream a row
//     nested                            U8 (8, N, K' / 8)             bit planes, highest first
//   Scales           .scales            F8_E4M3 (N, K' / G)           e
//   Zeros            .zeros             U8 (N, ceil(K' / G b / 8))    z, packed as the codes are
//     nested                            U8 (N, K' / G)
//   MasterScale      .master_scale      F32 (1)                       S, a power of two
//   SplitChannels    .split_channels    I32 (r)                       only if channels are split
//   OutlierChannels  .outlier_channels  I32 (o)                       only if there are outliers
// LC (quant/lc.h), W = diag(v) H_N W^ H_K diag(u), has these alone:
//   Codes            .qweight           U8 (N, K / 4)
//   InputScale       .u                 F16 (K)
//   OutputScale      .v                 F16 (N)
//   Map              .map               F32 (4, 5)                    A and c
// Bit streams are those of quant/pack.h.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "quant/channel_order.h"
#include "quant/file_dtype.h"
#include "quant/spec.h"

namespace bbb::quant {

enum class StoredPart {
  Codes,
  Scales,
  Zeros,
  MasterScale,
  SplitChannels,
  OutlierChannels,
  InputScale,
  OutputScale,
  Map
};
inline constexpr int kStoredParts = 9;

// The suffix of the codes, which every packed linear has.
extern const char* const kCodesSuffix;

struct StoredTensor {
  StoredPart part;
  const char* suffix;  // behind the linear's name
  FileDType dtype;
  std::vector<int64_t> shape;

  int64_t bytes() const;
};

// Bits of one row of an operand: of codes alone, and with scales, zero points and master scales. At
// 16 bits both count the values alone.
struct ActivationBits {
  double codes = 0;
  double all = 0;
};

struct LinearFormat {
  int64_t n = 0;  // output features
  int64_t k = 0;  // input features
  WeightGrid weight = {};
  InputGrid input = {};
  std::shared_ptr<const ChannelOrder> order = nullptr;  // null: ascending, padded to whole groups

  bool operator==(const LinearFormat& other) const;
  ChannelOrder channel_order() const;
  int64_t stored_k() const;  // K': the stored positions of a row
  int64_t groups() const { return stored_k() / weight.group; }
  int code_bits() const { return weight.nested ? kNestedBits : weight.bits; }
  bool is_lc() const { return weight.levels == Levels::Lc; }
  bool is_symmetric() const { return weight.levels == Levels::Seq; }
  // Is the operand of training the input itself?
  bool exact_input() const;
  // Does position k hold channel k, not transformed, for every channel?
  bool plain_positions() const;
  // Of LC: what a product reads in the codes, q itself. Scales are 1, zero points 0.
  LinearFormat codes_alone() const;
  // What products read: this format, but of a symmetric one the codes 2 q with zero points 2^b - 1
  // and the master scale S / 2, since S e (q - (2^b - 1) / 2) = S / 2 e (2 q - (2^b - 1)).
  LinearFormat multiplied() const;
  // In the order of StoredPart, which is that of the file.
  std::vector<StoredTensor> tensors() const;
  // The same of a load: of nested codes, the planes that it reads.
  std::vector<StoredTensor> loaded_tensors() const;
  int64_t bytes() const;  // of all its tensors
  // Summed over the stored positions of the operand, padding aside.
  ActivationBits activation_bits() const;
};

// How a cache holds keys or values (numerics.md section 9). At 16 bits it holds activations (B,
// Tmax, K, d). Otherwise the quantizer's groups run along a head, S = 1, and the cache is bytes (B,
// Tmax, K, head_bytes), of which each sequence is
//     codes (Tmax, K, code_bytes)     q, a bit stream a head
//     pairs (Tmax, K, pair_bytes)     e, z of each group: two bytes, a head zero-padded to 4 bytes
struct KvFormat {
  int bits = 16;  // 16, 8 or 4

  static constexpr int kGroup = 32;
  // Tmax is a multiple of this. Then both parts of every sequence start on a multiple of 16 bytes.
  static constexpr int64_t kTokenUnit = 4;

  bool operator==(const KvFormat&) const = default;
  bool quantized() const { return bits < 16; }
  int64_t code_bytes(int64_t d) const { return d * bits / 8; }
  static int64_t pair_bytes(int64_t d) { return (d / kGroup * 2 + 3) / 4 * 4; }
  int64_t head_bytes(int64_t d) const { return code_bytes(d) + pair_bytes(d); }
};

// A stored linear in memory, on the host or on a device: what kernels take. Each pointer is aligned
// to 16 bytes on a device.
struct PackedView {
  const uint8_t* qweight;
  const uint8_t* scales;
  const uint8_t* zeros;
  const float* master_scale;
  int64_t n;
  int64_t k;  // stored positions
  WeightGrid grid;
};

// The codes, scales and zeros of a load in one buffer, one after another as in the file, each from
// a multiple of 256 bytes.
struct JoinedParts {
  int64_t scales, zeros;  // offsets; the codes are at 0
  int64_t bytes;
};
JoinedParts joined_parts(const LinearFormat& format);
PackedView joined_view(const LinearFormat& format, const uint8_t* buffer,
                       const float* master_scale);

// The operand of a linear (numerics.md section 2), from rows of its input: what kernels take.
struct OperandView {
  const int32_t* channels;   // (K'): -1 for padding; null: position p holds channel p
  const int32_t* positions;  // (K): the first position of each channel; null likewise
  int64_t k;
  int64_t stored_k;
  int64_t outliers;                    // positions [0, outliers)
  int64_t pairs_end;                   // positions [outliers, pairs_end) hold pairs
  int64_t rotated_begin, rotated_end;  // positions; equal: none
  float pair_factor;                   // of a copy: 1, or 1/2 if the activation is halved
  int group;
  InputGrid grid;
};
// For host or device copies of order.channels() and order.positions(), or null for both.
OperandView operand_view(const LinearFormat& format, const int32_t* channels,
                         const int32_t* positions);

}  // namespace bbb::quant
