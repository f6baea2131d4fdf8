// safetensors: an 8-byte little-endian header length, a JSON header, then raw tensor bytes.
//
// Reading maps the file and copies nothing until asked to. Every header is checked before use:
// lengths, overlaps, gaps, shapes against byte counts, dtypes. Errors name the file and the tensor.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "data/finite.h"
#include "engine/tensor.h"
#include "quant/file_dtype.h"

namespace bbb::data {

using quant::FileDType;
using quant::name_of;
using quant::size_bytes;

// A read-only mapping of a whole file. Throws if the file cannot be opened, is a directory, or is
// empty.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  const uint8_t* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  const uint8_t* data_ = nullptr;
  int64_t bytes_ = 0;
};

struct SafeTensor {
  FileDType dtype;
  engine::Shape shape;
  const uint8_t* data;  // into the mapping
  int64_t bytes;
  int64_t numel() const { return engine::numel_of(shape); }
};

// The header's tensors, checked. `bytes` is the whole file; `path` only names it in errors.
// Throws Error on anything malformed; never reads outside [data, data + bytes).
std::map<std::string, SafeTensor> parse_safetensors(const uint8_t* data, int64_t bytes,
                                                    const std::string& path);

// The stems of the weights' files in a directory: of an export in bbb's format, and of any other.
// transformers looks for the second alone, so it does not load an export with random weights.
inline constexpr const char *kPackedStem = "bbb", *kModelStem = "model";

// One file, or a directory with STEM.safetensors or STEM.safetensors.index.json and its shards.
class SafeTensors {
 public:
  explicit SafeTensors(const std::string& path);
  bool contains(const std::string& name) const { return tensors_.count(name) > 0; }
  const SafeTensor& at(const std::string& name) const;  // throws, naming the tensor and the file
  const std::map<std::string, SafeTensor>& tensors() const { return tensors_; }
  int64_t file_bytes() const;  // of all shards

 private:
  std::string path_;
  std::vector<std::unique_ptr<MappedFile>> files_;
  std::map<std::string, SafeTensor> tensors_;
};

// F64, F32, F16, BF16 to float; throws, naming `name`, for other dtypes.
void to_float(float* out, const SafeTensor& tensor, const std::string& name);
// For check_finite(): F64, F32, F16, BF16 and F8_E4M3, of which every code but NaN is finite.
RawWeight raw_weight(const SafeTensor& tensor, const std::string& name);

// Checksum: the file ends in a checksum (data/checksum.h) of all bytes before it. The writer adds
// it as one more tensor: "checksum", I64 (1).
enum class Trailer { None, Checksum };
bool trailer_matches(const MappedFile& file);

// Writes one file: the header first, then the tensors, which must be added in the declared order.
// The file has a temporary name next to `path`. finish() syncs and renames it; without finish() the
// destructor removes it. Throws, naming path and cause, on any I/O error (a full disk).
class SafeTensorsWriter {
 public:
  struct Entry {
    std::string name;
    FileDType dtype;
    engine::Shape shape;
  };
  SafeTensorsWriter(std::string path, std::vector<Entry> entries,
                    std::map<std::string, std::string> metadata = {},
                    Trailer trailer = Trailer::None);
  ~SafeTensorsWriter();
  // Entries in order, each whole or in consecutive pieces.
  void add(const std::string& name, const void* data, int64_t bytes);
  void finish();

 private:
  void write(const void* data, int64_t bytes);

  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace bbb::data
