#include "quant/format.h"

#include "quant/pack.h"

namespace bbb::quant {

int64_t StoredTensor::bytes() const {
  int64_t bytes = size_bytes(dtype);
  for (const int64_t d : shape) bytes *= d;
  return bytes;
}

int64_t LinearFormat::stored_k() const {
  return (k + weight.group - 1) / weight.group * weight.group;
}

std::vector<StoredTensor> LinearFormat::tensors() const {
  const int64_t groups = stored_k() / weight.group;
  return {
      {StoredPart::Codes, ".qweight", FileDType::U8, {n, code_row_bytes(stored_k(), weight.bits)}},
      {StoredPart::Scales, ".scales", FileDType::F8_E4M3, {n, groups}},
      {StoredPart::Zeros,
       ".zeros",
       FileDType::U8,
       {n, zero_row_bytes(stored_k(), weight.group, weight.bits)}},
      {StoredPart::MasterScale, ".master_scale", FileDType::F32, {1}}};
}

int64_t LinearFormat::bytes() const {
  int64_t bytes = 0;
  for (const StoredTensor& tensor : tensors()) bytes += tensor.bytes();
  return bytes;
}

}  // namespace bbb::quant
