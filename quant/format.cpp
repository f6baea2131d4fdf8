#include "quant/format.h"

#include "quant/check.h"
#include "quant/lc.h"
#include "quant/pack.h"

namespace bbb::quant {

int64_t StoredTensor::bytes() const {
  int64_t bytes = size_bytes(dtype);
  for (const int64_t d : shape) bytes *= d;
  return bytes;
}

ChannelOrder LinearFormat::channel_order() const {
  return order ? *order : ChannelOrder(k, weight.group);
}

bool LinearFormat::operator==(const LinearFormat& other) const {
  return n == other.n && k == other.k && weight == other.weight && input == other.input &&
         (order == other.order || channel_order() == other.channel_order());
}

int64_t LinearFormat::stored_k() const {
  return order ? order->stored_k() : (k + weight.group - 1) / weight.group * weight.group;
}

bool LinearFormat::exact_input() const {
  return input.bits == 16 && !input.hadamard && stored_k() == k && (!order || order->is_identity());
}

bool LinearFormat::plain_positions() const {
  return !is_lc() && !input.hadamard &&
         (!order || (order->split().empty() && order->outliers().empty()));
}

const char* const kCodesSuffix = ".qweight";

std::vector<StoredTensor> LinearFormat::tensors() const {
  std::vector<StoredTensor> tensors;
  const int64_t columns = stored_k();
  BBB_ASSERT(!is_symmetric() || (!weight.nested && weight.bits <= 4));
  if (is_lc())
    return {{StoredPart::Codes, kCodesSuffix, FileDType::U8, {n, code_row_bytes(columns, kLcBits)}},
            {StoredPart::InputScale, ".u", FileDType::F16, {k}},
            {StoredPart::OutputScale, ".v", FileDType::F16, {n}},
            {StoredPart::Map, ".map", FileDType::F32, {kLcVector, kLcVector + 1}}};
  if (weight.nested)
    tensors = {{StoredPart::Codes, kCodesSuffix, FileDType::U8, {kNestedBits, n, columns / 8}},
               {StoredPart::Scales, ".scales", FileDType::F8_E4M3, {n, groups()}},
               {StoredPart::Zeros, ".zeros", FileDType::U8, {n, groups()}}};
  else
    tensors = {
        {StoredPart::Codes, kCodesSuffix, FileDType::U8, {n, code_row_bytes(columns, weight.bits)}},
        {StoredPart::Scales, ".scales", FileDType::F8_E4M3, {n, groups()}},
        {StoredPart::Zeros,
         ".zeros",
         FileDType::U8,
         {n, zero_row_bytes(columns, weight.group, weight.bits)}}};
  if (is_symmetric()) tensors.pop_back();
  tensors.push_back({StoredPart::MasterScale, ".master_scale", FileDType::F32, {1}});
  if (order && !order->split().empty())
    tensors.push_back({StoredPart::SplitChannels,
                       ".split_channels",
                       FileDType::I32,
                       {static_cast<int64_t>(order->split().size())}});
  if (order && !order->outliers().empty())
    tensors.push_back({StoredPart::OutlierChannels,
                       ".outlier_channels",
                       FileDType::I32,
                       {static_cast<int64_t>(order->outliers().size())}});
  return tensors;
}

LinearFormat LinearFormat::codes_alone() const {
  return {.n = n, .k = k, .weight = {.bits = kLcBits, .group = weight.group}};
}

LinearFormat LinearFormat::multiplied() const {
  LinearFormat format = *this;
  if (!is_symmetric()) return format;
  format.weight.levels = Levels::MinMax;
  format.weight.bits = weight.bits < 4 ? weight.bits + 1 : 8;
  return format;
}

std::vector<StoredTensor> LinearFormat::loaded_tensors() const {
  std::vector<StoredTensor> loaded = tensors();
  if (weight.nested) loaded[0].shape[0] = weight.bits;
  return loaded;
}

int64_t LinearFormat::bytes() const {
  int64_t bytes = 0;
  for (const StoredTensor& tensor : tensors()) bytes += tensor.bytes();
  return bytes;
}

JoinedParts joined_parts(const LinearFormat& format) {
  const auto aligned = [](int64_t bytes) { return (bytes + 255) / 256 * 256; };
  const WeightGrid& grid = format.weight;
  const int64_t codes = format.n * code_row_bytes(format.stored_k(), grid.bits);
  const int64_t scales = format.n * format.groups();
  const int64_t zeros =
      format.n * zero_row_bytes(format.stored_k(), grid.group, format.code_bits());
  return {aligned(codes), aligned(codes) + aligned(scales),
          aligned(codes) + aligned(scales) + zeros};
}

PackedView joined_view(const LinearFormat& format, const uint8_t* buffer,
                       const float* master_scale) {
  const JoinedParts parts = joined_parts(format);
  return {.qweight = buffer,
          .scales = buffer + parts.scales,
          .zeros = buffer + parts.zeros,
          .master_scale = master_scale,
          .n = format.n,
          .k = format.stored_k(),
          .grid = format.weight};
}

ActivationBits LinearFormat::activation_bits() const {
  const ChannelOrder positions = channel_order();
  const auto used = static_cast<double>(positions.used());
  if (input.bits == 16) return {16 * used, 16 * used};
  const int64_t outliers = positions.pairs_begin(), outlier_groups = outliers / weight.group;
  const double codes = input.bits * (used - static_cast<double>(outliers)) +
                       kOutlierBits * static_cast<double>(outliers);
  const double parameters =
      static_cast<double>((8 + input.bits) * (groups() - outlier_groups) + 16 * outlier_groups);
  return {codes, codes + parameters + 32 * (outliers > 0 ? 2 : 1)};
}

OperandView operand_view(const LinearFormat& format, const int32_t* channels,
                         const int32_t* positions) {
  const ChannelOrder order = format.channel_order();
  OperandView view{};
  view.channels = channels;
  view.positions = positions;
  view.k = format.k;
  view.stored_k = order.stored_k();
  view.outliers = order.pairs_begin();
  view.pairs_end = order.pairs_end();
  view.rotated_begin = format.input.hadamard ? order.rotated_begin() : 0;
  view.rotated_end = format.input.hadamard ? order.rotated_end() : 0;
  view.pair_factor = order.side() == SplitSide::Activation ? 0.5f : 1.0f;
  view.group = format.weight.group;
  view.grid = format.input;
  return view;
}

}  // namespace bbb::quant
