// GGUF v2 and v3: metadata and tensors of a llama.cpp model file, mapped and checked.
//
// Dequantized on load: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K.
// GGUF lists the fastest dimension first. `shape` here is row-major, slowest dimension first, as
// everywhere in bbb.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "data/finite.h"
#include "data/safetensors.h"
#include "engine/tensor.h"

namespace bbb::data {

// Scalars are widened: every unsigned and signed integer to int64_t, floats to double.
struct GgufNestedArray {};  // an array of arrays: checked, but not kept
using GgufArray = std::variant<std::vector<int64_t>, std::vector<double>, std::vector<std::string>,
                               std::vector<bool>, GgufNestedArray>;
using GgufValue = std::variant<int64_t, double, bool, std::string, GgufArray>;

struct GgufTensor {
  uint32_t type;  // ggml type number
  engine::Shape shape;
  const uint8_t* data;
  int64_t bytes;
  int64_t numel() const { return engine::numel_of(shape); }
};

struct GgufContents {
  uint32_t version = 0;
  std::map<std::string, GgufValue> metadata;
  std::map<std::string, GgufTensor> tensors;
};

// Throws Error on anything malformed; never reads outside [data, data + bytes).
GgufContents parse_gguf(const uint8_t* data, int64_t bytes, const std::string& path);

// The type's name, such as "Q4_K". Throws, naming the type, if bbb does not read it.
const char* gguf_type_name(uint32_t type);
int64_t gguf_type_bytes(uint32_t type, int64_t numel);  // throws where numel is not whole blocks
void gguf_dequantize(float* out, const GgufTensor& tensor, const std::string& name);
RawWeight raw_weight(const GgufTensor& tensor, const std::string& name);  // for check_finite()

// A GGUF, recognized by its first bytes. To open a model that llama.cpp split, give its first part,
// whose name holds -00001-of-0000N: metadata comes from the first part, tensors from all parts.
class Gguf {
 public:
  explicit Gguf(const std::string& path);
  const std::string& path() const { return path_; }
  const std::map<std::string, GgufValue>& metadata() const { return contents_.metadata; }
  const std::map<std::string, GgufTensor>& tensors() const { return contents_.tensors; }
  bool has(const std::string& key) const { return contents_.metadata.count(key) > 0; }
  // Typed access; throws, naming the key, where it is missing or of another type.
  int64_t integer(const std::string& key) const;
  double real(const std::string& key) const;  // integers allowed
  bool boolean(const std::string& key) const;
  const std::string& string(const std::string& key) const;
  const std::vector<std::string>& strings(const std::string& key) const;
  const std::vector<int64_t>& integers(const std::string& key) const;
  const std::vector<double>& reals(const std::string& key) const;
  const GgufTensor& tensor(const std::string& name) const;  // throws, naming it

 private:
  void read_other_parts();

  std::string path_;
  std::vector<std::unique_ptr<MappedFile>> files_;
  GgufContents contents_;
};

}  // namespace bbb::data
