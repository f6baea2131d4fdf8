#include "data/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <set>

#include "data/checksum.h"
#include "data/files.h"
#include "data/half.h"
#include "data/json.h"

namespace bbb::data {
namespace {

using nlohmann::json;

// The reference implementation's limit on the header.
constexpr uint64_t kLargestHeader = 100'000'000;

bool is_size(const json& value) {
  return value.is_number_unsigned() && value.get<uint64_t>() <= INT64_MAX;
}

// One header entry; `what` names file and tensor.
SafeTensor parse_entry(const json& entry, const uint8_t* data, int64_t data_bytes,
                       const std::string& what) {
  BBB_CHECK(entry.is_object(), what, ": its description is not an object");
  for (const char* key : {"dtype", "shape", "data_offsets"})
    BBB_CHECK(entry.contains(key), what, ": '", key, "' is missing");

  SafeTensor t = {};
  const json& dtype = entry["dtype"];
  BBB_CHECK(dtype.is_string(), what, ": dtype is not a string");
  const std::string& dtype_name = dtype.get_ref<const std::string&>();
  const quant::FileDTypeRow* row =
      std::find_if(std::begin(quant::kFileDTypes), std::end(quant::kFileDTypes),
                   [&](const quant::FileDTypeRow& r) { return dtype_name == r.name; });
  BBB_CHECK(row != std::end(quant::kFileDTypes), what, ": unsupported dtype '",
            printable(dtype_name), "'");
  t.dtype = row->dtype;

  const json& shape = entry["shape"];
  BBB_CHECK(shape.is_array() && shape.size() <= 8, what, ": shape is not an array of up to 8");
  int64_t needed = row->bytes;
  for (const json& d : shape) {
    BBB_CHECK(is_size(d), what, ": shape holds something other than a size");
    t.shape.push_back(d.get<int64_t>());
    BBB_CHECK(!__builtin_mul_overflow(needed, t.shape.back(), &needed), what,
              ": shape has too many elements");
  }

  const json& offsets = entry["data_offsets"];
  BBB_CHECK(offsets.is_array() && offsets.size() == 2 && is_size(offsets[0]) && is_size(offsets[1]),
            what, ": data_offsets is not a pair of sizes");
  const int64_t begin = offsets[0].get<int64_t>(), end = offsets[1].get<int64_t>();
  BBB_CHECK(begin <= end && end <= data_bytes, what, ": bytes ", begin, " to ", end,
            " lie outside the file's ", data_bytes, " bytes of data", kCutShort);
  BBB_CHECK(end - begin == needed, what, ": shape ", engine::to_string(t.shape), " of ", row->name,
            " needs ", needed, " bytes, the header gives it ", end - begin);
  t.data = data + begin;
  t.bytes = needed;
  return t;
}

// Tensors must tile the data: the format allows neither overlaps nor gaps.
void check_tiling(const std::map<std::string, SafeTensor>& tensors, const uint8_t* data,
                  int64_t data_bytes, const std::string& path) {
  std::vector<const std::pair<const std::string, SafeTensor>*> order;
  for (const auto& entry : tensors) order.push_back(&entry);
  std::sort(order.begin(), order.end(), [](const auto* a, const auto* b) {
    return std::pair(a->second.data, a->second.bytes) < std::pair(b->second.data, b->second.bytes);
  });
  int64_t cursor = 0;
  for (const auto* entry : order) {
    const int64_t begin = entry->second.data - data;
    BBB_CHECK(begin >= cursor, path, ": tensor '", printable(entry->first), "' at byte ", begin,
              " overlaps the one before it");
    BBB_CHECK(begin == cursor, path, ": a gap of ", begin - cursor, " bytes before tensor '",
              printable(entry->first), "'");
    cursor += entry->second.bytes;
  }
  BBB_CHECK(cursor == data_bytes, path, ": ", data_bytes - cursor,
            " bytes at the end belong to no tensor");
}

// Null if `dtype` is not a floating-point type.
const BlockType* block_type(FileDType dtype) {
  switch (dtype) {
    case FileDType::F64:
      return &kF64Blocks;
    case FileDType::F32:
      return &kF32Blocks;
    case FileDType::F16:
      return &kF16Blocks;
    case FileDType::BF16:
      return &kBf16Blocks;
    case FileDType::F8_E4M3:
      return &kE4m3Blocks;
    default:
      return nullptr;
  }
}

std::string join(const std::string& directory, const std::string& name) {
  return (std::filesystem::path(directory) / name).string();
}

}  // namespace

MappedFile::MappedFile(const std::string& path) : path_(path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe is refused
  BBB_CHECK(fd >= 0, "cannot open ", path, ": ", std::strerror(errno));
  struct stat info = {};
  const bool known = ::fstat(fd, &info) == 0;
  void* mapped = MAP_FAILED;
  if (known && S_ISREG(info.st_mode) && info.st_size > 0)
    mapped = ::mmap(nullptr, static_cast<size_t>(info.st_size), PROT_READ, MAP_PRIVATE, fd, 0);
  const int error = errno;
  ::close(fd);  // the mapping stays
  BBB_CHECK(known, "cannot read ", path, ": ", std::strerror(error));
  BBB_CHECK(!S_ISDIR(info.st_mode), path, " is a directory, not a file");
  BBB_CHECK(S_ISREG(info.st_mode), path, " is not a regular file");
  BBB_CHECK(info.st_size > 0, path, " is empty");
  BBB_CHECK(mapped != MAP_FAILED, "cannot map ", path, ": ", std::strerror(error));
  data_ = static_cast<const uint8_t*>(mapped);
  bytes_ = info.st_size;
}

MappedFile::~MappedFile() { ::munmap(const_cast<uint8_t*>(data_), static_cast<size_t>(bytes_)); }

std::map<std::string, SafeTensor> parse_safetensors(const uint8_t* data, int64_t bytes,
                                                    const std::string& path) {
  refuse_lfs_pointer({reinterpret_cast<const char*>(data), static_cast<size_t>(bytes)}, path);
  BBB_CHECK(bytes >= 8, path, ": ", bytes, " bytes are too few for a safetensors file", kCutShort);
  const uint64_t header_bytes = load_as<uint64_t>(data);
  BBB_CHECK(header_bytes <= kLargestHeader && header_bytes <= static_cast<uint64_t>(bytes - 8),
            path, ": header of ", header_bytes, " bytes in a file of ", bytes,
            ", or no safetensors file", kCutShort);
  const char* text = reinterpret_cast<const char*>(data + 8);
  const json header = parse_json(text, text + header_bytes, path);
  BBB_CHECK(header.is_object(), path, ": the header is not a JSON object");

  const uint8_t* tensor_data = data + 8 + header_bytes;
  const int64_t data_bytes = bytes - 8 - static_cast<int64_t>(header_bytes);
  std::map<std::string, SafeTensor> tensors;
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") {
      BBB_CHECK(entry.is_object(), path, ": __metadata__ is not an object");
      for (const json& value : entry)
        BBB_CHECK(value.is_string(), path, ": __metadata__ holds something other than strings");
      continue;
    }
    tensors[name] =
        parse_entry(entry, tensor_data, data_bytes, cat(path, ": tensor '", printable(name), "'"));
  }
  check_tiling(tensors, tensor_data, data_bytes, path);
  return tensors;
}

SafeTensors::SafeTensors(const std::string& path) : path_(path) {
  const auto read = [&](const std::string& file) {
    files_.push_back(std::make_unique<MappedFile>(file));
    return parse_safetensors(files_.back()->data(), files_.back()->bytes(), file);
  };
  namespace fs = std::filesystem;
  std::error_code error;
  if (!fs::is_directory(path, error)) {
    tensors_ = read(path);
    return;
  }
  std::string index_path;
  for (const std::string stem : {kPackedStem, kModelStem}) {
    const std::string single = join(path, stem + ".safetensors");
    if (fs::exists(single, error)) {
      tensors_ = read(single);
      return;
    }
    index_path = single + ".index.json";
    if (fs::exists(index_path, error)) break;
  }
  BBB_CHECK(fs::exists(index_path, error), path,
            ": neither model.safetensors nor bbb.safetensors is there, whole or as an index");
  const json index = parse_json(read_file(index_path), index_path);
  BBB_CHECK(index.is_object() && index.contains("weight_map") && index["weight_map"].is_object(),
            index_path, ": 'weight_map' is missing or not an object");
  std::map<std::string, std::set<std::string>> listed;  // shard: its tensors
  for (const auto& [name, shard] : index["weight_map"].items()) {
    BBB_CHECK(shard.is_string(), index_path, ": the shard of '", printable(name),
              "' is not a file name");
    const std::string& file = shard.get_ref<const std::string&>();
    BBB_CHECK(!file.empty() && file != "." && file != ".." &&
                  file.find_first_of(std::string("/\\\0", 3)) == std::string::npos,
              index_path, ": shard '", printable(file), "' is not a file of this directory");
    listed[file].insert(name);
  }
  for (const auto& [file, names] : listed) {
    const std::map<std::string, SafeTensor> shard = read(join(path, file));
    for (const std::string& name : names)
      BBB_CHECK(shard.count(name) > 0, index_path, ": tensor '", printable(name), "' is not in ",
                printable(file));
    for (const auto& [name, tensor] : shard) {
      BBB_CHECK(names.count(name) > 0, index_path, ": tensor '", printable(name), "' of ",
                printable(file), " is not listed there");
      tensors_[name] = tensor;
    }
  }
}

const SafeTensor& SafeTensors::at(const std::string& name) const {
  const auto found = tensors_.find(name);
  BBB_CHECK(found != tensors_.end(), path_, ": tensor '", printable(name), "' is missing");
  return found->second;
}

int64_t SafeTensors::file_bytes() const {
  int64_t total = 0;
  for (const auto& file : files_) total += file->bytes();
  return total;
}

void to_float(float* out, const SafeTensor& tensor, const std::string& name) {
  BBB_CHECK(tensor.dtype != FileDType::F8_E4M3 && block_type(tensor.dtype), "tensor '",
            printable(name), "' is ", name_of(tensor.dtype), ", not a floating-point weight");
  block_type(tensor.dtype)->expand(out, tensor.data, tensor.numel());
}

RawWeight raw_weight(const SafeTensor& tensor, const std::string& name) {
  const BlockType* type = block_type(tensor.dtype);
  BBB_ASSERT(type != nullptr);
  return {name, tensor.shape, tensor.data, *type};
}

static constexpr const char* kTrailer = "checksum";

bool trailer_matches(const MappedFile& file) {
  const int64_t content = file.bytes() - static_cast<int64_t>(sizeof(uint64_t));
  return content > 0 &&
         load_as<uint64_t>(file.data() + content) == checksum64(file.data(), content);
}

struct SafeTensorsWriter::Impl {
  AtomicFile file;
  std::vector<Entry> entries;
  Trailer trailer;
  Checksum checksum = {};  // of everything written so far
  size_t next = 0;
  int64_t added_bytes = 0;  // of the next entry
};

SafeTensorsWriter::SafeTensorsWriter(std::string path, std::vector<Entry> entries,
                                     std::map<std::string, std::string> metadata, Trailer trailer) {
  if (trailer == Trailer::Checksum) entries.push_back({kTrailer, FileDType::I64, {1}});
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  int64_t offset = 0;
  for (const Entry& entry : entries) {
    BBB_ASSERT(!header.contains(entry.name));
    const int64_t end = offset + engine::numel_of(entry.shape) * size_bytes(entry.dtype);
    header[entry.name] = {
        {"dtype", name_of(entry.dtype)}, {"shape", entry.shape}, {"data_offsets", {offset, end}}};
    offset = end;
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');  // the data begins at a multiple of 8
  impl_ = std::unique_ptr<Impl>(new Impl{AtomicFile(std::move(path)), std::move(entries), trailer});
  const uint64_t header_bytes = text.size();
  write(&header_bytes, sizeof header_bytes);
  write(text.data(), static_cast<int64_t>(text.size()));
}

void SafeTensorsWriter::write(const void* data, int64_t bytes) {
  impl_->file.write(data, bytes);
  if (impl_->trailer == Trailer::Checksum) impl_->checksum.add(data, bytes);
}

SafeTensorsWriter::~SafeTensorsWriter() = default;

void SafeTensorsWriter::add(const std::string& name, const void* data, int64_t bytes) {
  BBB_ASSERT(impl_->next < impl_->entries.size());
  const Entry& entry = impl_->entries[impl_->next];
  const int64_t whole_bytes = engine::numel_of(entry.shape) * size_bytes(entry.dtype);
  BBB_ASSERT(entry.name == name);
  BBB_ASSERT(bytes <= whole_bytes - impl_->added_bytes);
  write(data, bytes);
  impl_->added_bytes += bytes;
  if (impl_->added_bytes < whole_bytes) return;
  impl_->added_bytes = 0;
  ++impl_->next;
}

void SafeTensorsWriter::finish() {
  if (impl_->trailer == Trailer::Checksum) {
    const uint64_t checksum = impl_->checksum.value();
    add(kTrailer, &checksum, sizeof checksum);
  }
  BBB_ASSERT(impl_->next == impl_->entries.size());
  impl_->file.commit();
}

}  // namespace bbb::data
