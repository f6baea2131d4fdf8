// Writes a GGUF v3 file: metadata and tensors, in the order in which they are declared.
//
//   "GGUF", version, counts | metadata | names, shapes, types, offsets | data, each from a multiple
//                                                                        of 32 bytes
// A tensor's type is chosen when it is added. Types and offsets have fixed sizes, so the header is
// written last, in the space kept for it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "engine/tensor.h"

namespace bbb::data {

// The ggml types that are written.
enum class GgmlType : uint32_t { F32 = 0, Q4_0 = 2, Q4_1 = 3, Q8_0 = 8, BF16 = 30 };

using GgufMetadataValue =
    std::variant<uint32_t, int32_t, float, bool, std::string, std::vector<int32_t>,
                 std::vector<float>, std::vector<std::string>>;
using GgufMetadata = std::vector<std::pair<std::string, GgufMetadataValue>>;

class GgufWriter {
 public:
  struct Entry {
    std::string name;
    engine::Shape shape;  // row-major, as in Gguf
  };
  // The file has a temporary name until commit(); without it the destructor removes the file.
  // Throws, naming path and cause, on any I/O error.
  GgufWriter(const std::string& path, GgufMetadata metadata, std::vector<Entry> entries);
  ~GgufWriter();
  // Entries in order, whole.
  void add(const std::string& name, GgmlType type, const std::vector<uint8_t>& bytes);
  // Writes the header. The file can then be read under its temporary name.
  void finish();
  const std::string& temporary() const;
  void commit();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// The rows of a weight as blocks of 32. Each scale is one that binary16 holds.
constexpr int64_t kGgmlBlock = 32;
constexpr int64_t kQ4_0Bytes = 18, kQ4_1Bytes = 20, kQ8_0Bytes = 34;
// 32 codes below 16; the weights are d (q - 8).
void pack_q4_0(uint8_t* block, float d, const uint8_t* codes);
// The weights are d q + m.
void pack_q4_1(uint8_t* block, float d, float m, const uint8_t* codes);
// Rounds: d = max|x| / 127 in binary16, q = round(x / d). The number of values is a multiple of 32.
std::vector<uint8_t> round_q8_0(const std::vector<float>& values);

}  // namespace bbb::data
