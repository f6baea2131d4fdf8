#include "data/gguf_writer.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "data/files.h"
#include "data/gguf.h"
#include "data/half.h"

namespace bbb::data {
namespace {

constexpr int64_t kAlignment = 32;

int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// GGUF's numbers of the value types.
template <typename T>
constexpr uint32_t type_number() {
  if constexpr (std::is_same_v<T, uint32_t>) return 4;
  if constexpr (std::is_same_v<T, int32_t>) return 5;
  if constexpr (std::is_same_v<T, float>) return 6;
  if constexpr (std::is_same_v<T, bool>) return 7;
  if constexpr (std::is_same_v<T, std::string>) return 8;
}
constexpr uint32_t kArrayNumber = 9;

// The header's bytes, little-endian.
class Header {
 public:
  template <typename T>
  void put(const T& value) {
    const auto* bytes = reinterpret_cast<const char*>(&value);
    text_.append(bytes, sizeof value);
  }
  void put(const std::string& value) {
    put(static_cast<uint64_t>(value.size()));
    text_ += value;
  }
  template <typename T>
  void put_typed(const T& value) {
    put(type_number<T>());
    put(value);
  }
  template <typename T>
  void put_typed(const std::vector<T>& values) {
    put(kArrayNumber);
    put(type_number<T>());
    put(static_cast<uint64_t>(values.size()));
    for (const T& value : values) put(value);
  }
  void align() { text_.resize(static_cast<size_t>(aligned(bytes()))); }
  int64_t bytes() const { return static_cast<int64_t>(text_.size()); }
  const std::string& text() const { return text_; }

 private:
  std::string text_;
};

void pack_nibbles(uint8_t* nibbles, const uint8_t* codes) {
  for (int j = 0; j < 16; ++j) nibbles[j] = static_cast<uint8_t>(codes[j] | codes[j + 16] << 4);
}

void put_half(uint8_t* p, float value) {
  const uint16_t half = float_to_half(value);
  std::memcpy(p, &half, sizeof half);
}

}  // namespace

struct GgufWriter::Impl {
  AtomicFile file;
  GgufMetadata metadata;
  std::vector<Entry> entries;
  struct Placed {
    GgmlType type;
    uint64_t offset;
  };
  std::vector<Placed> placed = {};  // of the entries added so far
  int64_t data_bytes = 0;

  Header header() const {
    Header out;
    for (const char c : {'G', 'G', 'U', 'F'}) out.put(c);
    out.put(uint32_t{3});
    out.put(static_cast<uint64_t>(entries.size()));
    out.put(static_cast<uint64_t>(metadata.size()));
    for (const auto& [key, value] : metadata) {
      out.put(key);
      std::visit([&](const auto& v) { out.put_typed(v); }, value);
    }
    for (size_t i = 0; i < entries.size(); ++i) {
      const Placed at = i < placed.size() ? placed[i] : Placed{};
      const engine::Shape& shape = entries[i].shape;
      out.put(entries[i].name);
      out.put(static_cast<uint32_t>(shape.size()));
      for (auto d = shape.rbegin(); d != shape.rend(); ++d) out.put(static_cast<uint64_t>(*d));
      out.put(static_cast<uint32_t>(at.type));
      out.put(at.offset);
    }
    out.align();
    return out;
  }
};

GgufWriter::GgufWriter(const std::string& path, GgufMetadata metadata, std::vector<Entry> entries)
    : impl_(new Impl{AtomicFile(path), std::move(metadata), std::move(entries)}) {
  const std::string kept = impl_->header().text();
  impl_->file.write(kept.data(), static_cast<int64_t>(kept.size()));
}

GgufWriter::~GgufWriter() = default;

void GgufWriter::add(const std::string& name, GgmlType type, const std::vector<uint8_t>& bytes) {
  Impl& to = *impl_;
  BBB_ASSERT(to.placed.size() < to.entries.size());
  const Entry& entry = to.entries[to.placed.size()];
  const auto count = static_cast<int64_t>(bytes.size());
  BBB_ASSERT(entry.name == name);
  BBB_ASSERT(count == gguf_type_bytes(static_cast<uint32_t>(type), engine::numel_of(entry.shape)));
  to.placed.push_back({type, static_cast<uint64_t>(to.data_bytes)});
  to.file.write(bytes.data(), count);
  constexpr uint8_t kPadding[kAlignment] = {};
  to.file.write(kPadding, aligned(count) - count);
  to.data_bytes += aligned(count);
}

void GgufWriter::finish() {
  BBB_ASSERT(impl_->placed.size() == impl_->entries.size());
  const Header header = impl_->header();
  impl_->file.write_at(0, header.text().data(), header.bytes());
}

const std::string& GgufWriter::temporary() const { return impl_->file.temporary(); }

void GgufWriter::commit() { impl_->file.commit(); }

void pack_q4_0(uint8_t* block, float d, const uint8_t* codes) {
  put_half(block, d);
  pack_nibbles(block + 2, codes);
}

void pack_q4_1(uint8_t* block, float d, float m, const uint8_t* codes) {
  put_half(block, d);
  put_half(block + 2, m);
  pack_nibbles(block + 4, codes);
}

std::vector<uint8_t> round_q8_0(const std::vector<float>& values) {
  const auto count = static_cast<int64_t>(values.size());
  BBB_ASSERT(count % kGgmlBlock == 0);
  std::vector<uint8_t> out(static_cast<size_t>(count / kGgmlBlock * kQ8_0Bytes));
  for (int64_t b = 0; b < count / kGgmlBlock; ++b) {
    const float* x = values.data() + b * kGgmlBlock;
    uint8_t* block = out.data() + b * kQ8_0Bytes;
    float largest = 0;
    for (int i = 0; i < kGgmlBlock; ++i) largest = std::max(largest, std::fabs(x[i]));
    put_half(block, largest / 127);
    const float d = half_to_float(load_as<uint16_t>(block));
    for (int i = 0; i < kGgmlBlock; ++i) {
      const float q = d > 0 ? std::floor(x[i] / d + 0.5f) : 0;
      block[2 + i] = static_cast<uint8_t>(static_cast<int8_t>(std::clamp(q, -127.0f, 127.0f)));
    }
  }
  return out;
}

}  // namespace bbb::data
