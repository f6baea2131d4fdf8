// The element types of stored tensors, named as safetensors names them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bbb::quant {

enum class FileDType : uint8_t { F64, F32, F16, BF16, F8_E4M3, I64, I32, I16, I8, U8, Bool };

struct FileDTypeRow {
  FileDType dtype;
  const char* name;
  int64_t bytes;
};
inline constexpr FileDTypeRow kFileDTypes[] = {  // in the order of the enum
    {FileDType::F64, "F64", 8},   {FileDType::F32, "F32", 4},         {FileDType::F16, "F16", 2},
    {FileDType::BF16, "BF16", 2}, {FileDType::F8_E4M3, "F8_E4M3", 1}, {FileDType::I64, "I64", 8},
    {FileDType::I32, "I32", 4},   {FileDType::I16, "I16", 2},         {FileDType::I8, "I8", 1},
    {FileDType::U8, "U8", 1},     {FileDType::Bool, "BOOL", 1}};

constexpr int64_t size_bytes(FileDType dtype) {
  return kFileDTypes[static_cast<size_t>(dtype)].bytes;
}
constexpr const char* name_of(FileDType dtype) {
  return kFileDTypes[static_cast<size_t>(dtype)].name;
}

}  // namespace bbb::quant
