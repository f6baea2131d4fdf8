#include "data/gguf.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <utility>

#include "data/files.h"
#include "data/half.h"

namespace bbb::data {
namespace {

constexpr const char *kSplitNumber = "split.no", *kSplitCount = "split.count",
                     *kSplitTensors = "split.tensors.count";

struct TypeRow {
  uint32_t type;
  const char* name;
  BlockType blocks;
};

float half_at(const uint8_t* p) { return half_to_float(load_as<uint16_t>(p)); }

// {d half, 32 int8}
void expand_q8_0(float* out, const uint8_t* p) {
  const float d = half_at(p);
  for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(static_cast<int8_t>(p[2 + i]));
}

// 32 codes: byte j holds code j in its low nibble and code j + 16 in its high nibble. Bit j of
// `high` is code j's fifth bit.
template <typename Value>
void expand_nibbles(float* out, const uint8_t* nibbles, uint32_t high, Value value) {
  for (int j = 0; j < 16; ++j) {
    out[j] = value(static_cast<int>((nibbles[j] & 0xf) | ((high >> j) & 1) << 4));
    out[j + 16] = value(static_cast<int>((nibbles[j] >> 4) | ((high >> (j + 16)) & 1) << 4));
  }
}

// {d half, nibbles[16]}: d (q - 8)
void expand_q4_0(float* out, const uint8_t* p) {
  const float d = half_at(p);
  expand_nibbles(out, p + 2, 0, [=](int q) { return d * static_cast<float>(q - 8); });
}

// {d half, m half, nibbles[16]}: d q + m
void expand_q4_1(float* out, const uint8_t* p) {
  const float d = half_at(p), m = half_at(p + 2);
  expand_nibbles(out, p + 4, 0, [=](int q) { return d * static_cast<float>(q) + m; });
}

// {d half, high bits[4], nibbles[16]}: d (q - 16)
void expand_q5_0(float* out, const uint8_t* p) {
  const float d = half_at(p);
  expand_nibbles(out, p + 6, load_as<uint32_t>(p + 2),
                 [=](int q) { return d * static_cast<float>(q - 16); });
}

// {d half, m half, high bits[4], nibbles[16]}: d q + m
void expand_q5_1(float* out, const uint8_t* p) {
  const float d = half_at(p), m = half_at(p + 2);
  expand_nibbles(out, p + 8, load_as<uint32_t>(p + 4),
                 [=](int q) { return d * static_cast<float>(q) + m; });
}

// Q4_K and Q5_K: eight groups of 32 codes. Their 6-bit scales and minima are packed in 12 bytes:
//
//                scale                                      minimum
//   g = 0..3     low six bits of byte g                     low six bits of byte g + 4
//   g = 4..7     low nibble of g + 4, top bits of g - 4     high nibble of g + 4, top bits of g
void k_scale_min(const uint8_t* packed, int g, int* scale, int* minimum) {
  if (g < 4) {
    *scale = packed[g] & 63;
    *minimum = packed[g + 4] & 63;
  } else {
    *scale = (packed[g + 4] & 0xf) | (packed[g - 4] >> 6) << 4;
    *minimum = (packed[g + 4] >> 4) | (packed[g] >> 6) << 4;
  }
}

// Two neighbouring groups share 32 bytes: one has the low nibbles, the other the high ones. Bit g
// of high[i] is the fifth bit of code i in group g. Value: d scale q - dmin minimum.
void expand_k_groups(float* out, const uint8_t* p, const uint8_t* high, const uint8_t* nibbles) {
  const float d = half_at(p), dmin = half_at(p + 2);
  for (int g = 0; g < 8; ++g) {
    int scale, minimum;
    k_scale_min(p + 4, g, &scale, &minimum);
    const float s = d * static_cast<float>(scale), m = dmin * static_cast<float>(minimum);
    for (int i = 0; i < 32; ++i) {
      const int low = (nibbles[g / 2 * 32 + i] >> (g % 2 * 4)) & 0xf;
      const int fifth = high ? (high[i] >> g) & 1 : 0;
      out[g * 32 + i] = s * static_cast<float>(low | fifth << 4) - m;
    }
  }
}

// {d half, dmin half, scales[12], nibbles[128]}
void expand_q4_k(float* out, const uint8_t* p) { expand_k_groups(out, p, nullptr, p + 16); }

// {d half, dmin half, scales[12], high bits[32], nibbles[128]}
void expand_q5_k(float* out, const uint8_t* p) { expand_k_groups(out, p, p + 16, p + 48); }

// {low nibbles[128], high pairs[64], int8 scales[16], d half}: d scale (q - 32), one scale per 16
// codes. In each half of 128 codes, code i of quarter r (32 codes) has a nibble of byte
// 32 (r mod 2) + i, the low one for r < 2, and bits 2r and 2r + 1 of high byte i.
void expand_q6_k(float* out, const uint8_t* p) {
  const float d = half_at(p + 208);
  for (int half = 0; half < 2; ++half) {
    const uint8_t *low = p + 64 * half, *high = p + 128 + 32 * half;
    for (int r = 0; r < 4; ++r) {
      for (int i = 0; i < 32; ++i) {
        const int nibble = (low[32 * (r % 2) + i] >> (r / 2 * 4)) & 0xf;
        const int q = (nibble | ((high[i] >> (2 * r)) & 3) << 4) - 32;
        const int at = 128 * half + 32 * r + i;
        const float scale = static_cast<float>(static_cast<int8_t>(p[192 + at / 16]));
        out[at] = d * scale * static_cast<float>(q);
      }
    }
  }
}

// Q2_K and Q3_K: 256 codes of two bits. Each half of 128 codes has 32 bytes, and its quarter r has
// bits 2r and 2r + 1 of them.
int two_bits(const uint8_t* codes, int at) {
  return (codes[at / 128 * 32 + at % 32] >> (at / 32 % 4 * 2)) & 3;
}

// {scales[16], two bits[64], d half, dmin half}: d scale q - dmin minimum. Each 16 codes have a
// byte, scale in its low nibble and minimum in its high one.
void expand_q2_k(float* out, const uint8_t* p) {
  const float d = half_at(p + 80), dmin = half_at(p + 82);
  for (int at = 0; at < 256; ++at) {
    const float s = d * static_cast<float>(p[at / 16] & 0xf);
    const float m = dmin * static_cast<float>(p[at / 16] >> 4);
    out[at] = s * static_cast<float>(two_bits(p + 16, at)) - m;
  }
}

// {third bits[32], two bits[64], scales[12], d half}: d (scale - 32) (q - 4). Bit g of third byte i
// belongs to code i of the g-th 32 codes. A scale for 16 codes has six bits: the low four of scale
// s are a nibble of byte s mod 8, the low one for s < 8, the others bits of byte 8 + s mod 4.
void expand_q3_k(float* out, const uint8_t* p) {
  const float d = half_at(p + 108);
  const uint8_t* const scales = p + 96;
  for (int at = 0; at < 256; ++at) {
    const int s = at / 16, low = (scales[s % 8] >> (s / 8 * 4)) & 0xf;
    const int scale = (low | ((scales[8 + s % 4] >> (s / 4 * 2)) & 3) << 4) - 32;
    const int third = (p[at % 32] >> (at / 32)) & 1;
    out[at] =
        d * static_cast<float>(scale) * static_cast<float>((two_bits(p + 32, at) | third << 2) - 4);
  }
}

// The levels of the non-linear 4-bit types.
constexpr int8_t kLevels[] = {-127, -104, -83, -65, -49, -35, -22, -10,
                              1,    13,   25,  38,  53,  69,  89,  113};

// {d half, nibbles[16]}: d level(q)
void expand_iq4_nl(float* out, const uint8_t* p) {
  const float d = half_at(p);
  expand_nibbles(out, p + 2, 0, [=](int q) { return d * static_cast<float>(kLevels[q]); });
}

// {d half, high bits of scales u16, low nibbles of scales[4], nibbles[128]}: d (scale - 32)
// level(q), a six-bit scale for each 32 codes.
void expand_iq4_xs(float* out, const uint8_t* p) {
  const float d = half_at(p);
  const int high = load_as<uint16_t>(p + 2);
  for (int g = 0; g < 8; ++g) {
    const int low = (p[4 + g / 2] >> (g % 2 * 4)) & 0xf;
    const float s = d * static_cast<float>((low | ((high >> (2 * g)) & 3) << 4) - 32);
    expand_nibbles(out + 32 * g, p + 8 + 16 * g, 0,
                   [=](int q) { return s * static_cast<float>(kLevels[q]); });
  }
}

// kHalves: the offsets of a block's half-precision scales. Only these are checked: codes and
// integer scales are finite, and their products with a finite half are far below FP32's limit.
template <void (*kExpand)(float*, const uint8_t*), int kElements, int kBytes, int... kHalves>
constexpr BlockType scaled_blocks() {
  return {kElements, kBytes,
          [](float* out, const uint8_t* p, int64_t blocks) {
            for (int64_t b = 0; b < blocks; ++b) kExpand(out + b * kElements, p + b * kBytes);
          },
          [](const uint8_t* p, int64_t blocks) {
            bool bad = false;
            for (int64_t b = 0; b < blocks; ++b, p += kBytes)
              ((bad |= !kF16Blocks.finite(p + kHalves, 1)), ...);
            return !bad;
          }};
}

constexpr TypeRow kTypes[] = {{0, "F32", kF32Blocks},
                              {1, "F16", kF16Blocks},
                              {2, "Q4_0", scaled_blocks<expand_q4_0, 32, 18, 0>()},
                              {3, "Q4_1", scaled_blocks<expand_q4_1, 32, 20, 0, 2>()},
                              {6, "Q5_0", scaled_blocks<expand_q5_0, 32, 22, 0>()},
                              {7, "Q5_1", scaled_blocks<expand_q5_1, 32, 24, 0, 2>()},
                              {8, "Q8_0", scaled_blocks<expand_q8_0, 32, 34, 0>()},
                              {10, "Q2_K", scaled_blocks<expand_q2_k, 256, 84, 80, 82>()},
                              {11, "Q3_K", scaled_blocks<expand_q3_k, 256, 110, 108>()},
                              {12, "Q4_K", scaled_blocks<expand_q4_k, 256, 144, 0, 2>()},
                              {13, "Q5_K", scaled_blocks<expand_q5_k, 256, 176, 0, 2>()},
                              {14, "Q6_K", scaled_blocks<expand_q6_k, 256, 210, 208>()},
                              {20, "IQ4_NL", scaled_blocks<expand_iq4_nl, 32, 18, 0>()},
                              {23, "IQ4_XS", scaled_blocks<expand_iq4_xs, 256, 136, 0>()},
                              {30, "BF16", kBf16Blocks}};

// ggml's other types, including retired ones.
constexpr std::pair<uint32_t, const char*> kUnreadTypes[] = {
    {4, "Q4_2"},    {5, "Q4_3"},        {9, "Q8_1"},        {15, "Q8_K"},       {16, "IQ2_XXS"},
    {17, "IQ2_XS"}, {18, "IQ3_XXS"},    {19, "IQ1_S"},      {21, "IQ3_S"},      {22, "IQ2_S"},
    {24, "I8"},     {25, "I16"},        {26, "I32"},        {27, "I64"},        {28, "F64"},
    {29, "IQ1_M"},  {31, "Q4_0_4_4"},   {32, "Q4_0_4_8"},   {33, "Q4_0_8_8"},   {34, "TQ1_0"},
    {35, "TQ2_0"},  {36, "IQ4_NL_4_4"}, {37, "IQ4_NL_4_8"}, {38, "IQ4_NL_8_8"}, {39, "MXFP4"},
    {40, "NVFP4"},  {41, "Q1_0"}};

const TypeRow& row_of(uint32_t type, const std::string& what) {
  std::string read;
  for (const TypeRow& row : kTypes) {
    if (row.type == type) return row;
    read += cat(read.empty() ? "" : ", ", row.name);
  }
  std::string name = cat("number ", type);
  for (const auto& [number, text] : kUnreadTypes)
    if (number == type) name = text;
  throw Error(cat(what, ": unsupported ggml type ", name, "; ", read, " are read"));
}

// A cursor over the file. Every read is checked against the bytes that remain.
class Reader {
 public:
  Reader(const uint8_t* data, int64_t bytes, const std::string& path)
      : data_(data), bytes_(bytes), path_(path) {}

  uint64_t left() const { return static_cast<uint64_t>(bytes_ - cursor_); }
  int64_t cursor() const { return cursor_; }
  const std::string& path() const { return path_; }

  template <typename T>
  T take(const char* what) {
    BBB_CHECK(left() >= sizeof(T), path_, ": no byte left for ", what, " at byte ", cursor_,
              kCutShort);
    const T value = load_as<T>(data_ + cursor_);
    cursor_ += static_cast<int64_t>(sizeof(T));
    return value;
  }

  std::string take_string(const char* what) {
    const uint64_t length = take<uint64_t>(what);
    BBB_CHECK(length <= left(), path_, ": ", what, " of ", length, " bytes at byte ", cursor_,
              " runs past the file's end", kCutShort);
    std::string text(reinterpret_cast<const char*>(data_ + cursor_), length);
    cursor_ += static_cast<int64_t>(length);
    return text;
  }

  // A count of items of at least `least_bytes` each. The bytes that remain bound it, so that a
  // false count never leads to an allocation.
  uint64_t take_count(const char* what, uint64_t least_bytes) {
    const uint64_t count = take<uint64_t>(what);
    check_count(count, what, least_bytes);
    return count;
  }
  void check_count(uint64_t count, const char* what, uint64_t least_bytes) const {
    BBB_CHECK(count <= left() / least_bytes, path_, ": ", what, " of ", count,
              " is more than the file can hold", kCutShort);
  }

 private:
  const uint8_t* data_;
  int64_t bytes_;
  const std::string& path_;
  int64_t cursor_ = 0;
};

enum ValueType : uint32_t {
  kU8,
  kI8,
  kU16,
  kI16,
  kU32,
  kI32,
  kF32,
  kBool,
  kString,
  kArray,
  kU64,
  kI64,
  kF64
};

int64_t take_integer(Reader& in, uint32_t type, const std::string& key) {
  switch (type) {
    case kU8:
      return in.take<uint8_t>("a value");
    case kI8:
      return in.take<int8_t>("a value");
    case kU16:
      return in.take<uint16_t>("a value");
    case kI16:
      return in.take<int16_t>("a value");
    case kU32:
      return in.take<uint32_t>("a value");
    case kI32:
      return in.take<int32_t>("a value");
    case kI64:
      return in.take<int64_t>("a value");
    default: {
      const uint64_t value = in.take<uint64_t>("a value");
      BBB_CHECK(value <= INT64_MAX, in.path(), ": '", printable(key), "' holds ", value,
                ", which is too large");
      return static_cast<int64_t>(value);
    }
  }
}

double take_real(Reader& in, uint32_t type) {
  return type == kF32 ? in.take<float>("a value") : in.take<double>("a value");
}

bool take_bool(Reader& in, const std::string& key) {
  const uint8_t value = in.take<uint8_t>("a value");
  BBB_CHECK(value <= 1, in.path(), ": '", printable(key), "' holds ", int{value},
            " where a boolean belongs");
  return value == 1;
}

template <typename Take>
auto take_elements(uint64_t count, Take take) {
  std::vector<decltype(take())> out;
  out.reserve(count);
  for (uint64_t i = 0; i < count; ++i) out.push_back(take());
  return out;
}

// `depth`: the number of arrays around this one.
GgufArray take_array(Reader& in, const std::string& key, int depth = 0) {
  constexpr int kDeepest = 8;
  const uint32_t type = in.take<uint32_t>("an array's type");
  constexpr uint64_t kLeast[] = {1, 1, 2, 2, 4, 4, 4, 1, 8, 12, 8, 8, 8};
  BBB_CHECK(type <= kF64, in.path(), ": '", printable(key), "' has unknown value type ", type);
  const uint64_t count = in.take_count("array length", kLeast[type]);
  switch (type) {
    case kArray:
      BBB_CHECK(depth < kDeepest, in.path(), ": '", printable(key), "' nests arrays too deeply");
      for (uint64_t i = 0; i < count; ++i) take_array(in, key, depth + 1);
      return GgufNestedArray{};
    case kString:
      return take_elements(count, [&] { return in.take_string("a string"); });
    case kBool:
      return take_elements(count, [&] { return take_bool(in, key); });
    case kF32:
    case kF64:
      return take_elements(count, [&] { return take_real(in, type); });
    default:
      return take_elements(count, [&] { return take_integer(in, type, key); });
  }
}

GgufValue take_value(Reader& in, const std::string& key) {
  const uint32_t type = in.take<uint32_t>("a value's type");
  BBB_CHECK(type <= kF64, in.path(), ": '", printable(key), "' has unknown value type ", type);
  switch (type) {
    case kString:
      return in.take_string("a string");
    case kArray:
      return take_array(in, key);
    case kBool:
      return take_bool(in, key);
    case kF32:
    case kF64:
      return take_real(in, type);
    default:
      return take_integer(in, type, key);
  }
}

struct Placed {
  std::string name;
  uint64_t offset;
  GgufTensor tensor;
};

Placed take_tensor(Reader& in, uint64_t alignment) {
  Placed placed;
  placed.name = in.take_string("a tensor's name");
  const std::string what = cat(in.path(), ": tensor '", printable(placed.name), "'");
  const uint32_t rank = in.take<uint32_t>("a tensor's rank");
  BBB_CHECK(rank >= 1 && rank <= 4, what, " has ", rank, " dimensions, not 1 to 4");
  GgufTensor& t = placed.tensor;
  t.shape.resize(rank);
  int64_t numel = 1;
  for (uint32_t i = 0; i < rank; ++i) {
    const uint64_t dim = in.take<uint64_t>("a tensor's dimensions");
    BBB_CHECK(dim >= 1 && dim <= INT64_MAX / 16 &&
                  !__builtin_mul_overflow(numel, static_cast<int64_t>(dim), &numel) &&
                  numel <= INT64_MAX / 16,
              what, " has a dimension of ", dim, ": empty, or too many elements");
    t.shape[rank - 1 - i] = static_cast<int64_t>(dim);
  }
  t.type = in.take<uint32_t>("a tensor's type");
  const TypeRow& row = row_of(t.type, what);
  BBB_CHECK(t.shape.back() % row.blocks.elements == 0, what, " has rows of ", t.shape.back(),
            ", not a multiple of ", row.name, "'s ", row.blocks.elements);
  t.bytes = numel / row.blocks.elements * row.blocks.bytes;
  placed.offset = in.take<uint64_t>("a tensor's offset");
  BBB_CHECK(placed.offset % alignment == 0, what, " at offset ", placed.offset,
            " is not aligned to ", alignment);
  return placed;
}

uint64_t padded(uint64_t n, uint64_t alignment) {
  return (n + alignment - 1) / alignment * alignment;
}

template <typename T>
const T& typed(const std::map<std::string, GgufValue>& metadata, const std::string& path,
               const std::string& key, const char* type) {
  const auto found = metadata.find(key);
  BBB_CHECK(found != metadata.end(), path, ": metadata '", key, "' is missing");
  const T* value = std::get_if<T>(&found->second);
  BBB_CHECK(value, path, ": metadata '", key, "' is not ", type);
  return *value;
}

template <typename T>
const T& typed(const Gguf& gguf, const std::string& key, const char* type) {
  return typed<T>(gguf.metadata(), gguf.path(), key, type);
}

template <typename T>
const std::vector<T>& typed_array(const Gguf& gguf, const std::string& key, const char* type) {
  const auto* value = std::get_if<std::vector<T>>(&typed<GgufArray>(gguf, key, "an array"));
  BBB_CHECK(value, gguf.path(), ": metadata '", key, "' is not an array of ", type);
  return *value;
}

}  // namespace

GgufContents parse_gguf(const uint8_t* data, int64_t bytes, const std::string& path) {
  refuse_lfs_pointer({reinterpret_cast<const char*>(data), static_cast<size_t>(bytes)}, path);
  Reader in(data, bytes, path);
  BBB_CHECK(bytes >= 4 && std::memcmp(data, "GGUF", 4) == 0, path,
            ": not a GGUF file; a model is one, or a directory with config.json");
  in.take<uint32_t>("the magic");
  GgufContents out;
  out.version = in.take<uint32_t>("the version");
  BBB_CHECK((out.version & 0xffff) != 0 || out.version == 0, path,
            ": a big-endian GGUF file; only little-endian is read");
  BBB_CHECK(out.version == 2 || out.version == 3, path, ": GGUF version ", out.version,
            "; only 2 and 3 are read");
  constexpr uint64_t kLeastTensor = 8 + 4 + 8 + 4 + 8, kLeastPair = 8 + 4 + 1;
  const uint64_t tensor_count = in.take_count("tensor count", kLeastTensor);
  const uint64_t pair_count = in.take_count("metadata count", kLeastPair);
  for (uint64_t i = 0; i < pair_count; ++i) {
    const std::string key = in.take_string("a metadata key");
    BBB_CHECK(out.metadata.emplace(key, take_value(in, key)).second, path, ": metadata '",
              printable(key), "' is given twice");
  }

  uint64_t alignment = 32;
  if (const auto found = out.metadata.find("general.alignment"); found != out.metadata.end()) {
    const int64_t* value = std::get_if<int64_t>(&found->second);
    BBB_CHECK(value && *value >= 1 && *value <= (1 << 30) && (*value & (*value - 1)) == 0, path,
              ": general.alignment is not a power of two");
    alignment = static_cast<uint64_t>(*value);
  }

  in.check_count(tensor_count, "tensor count", kLeastTensor);
  std::vector<Placed> placed;
  for (uint64_t i = 0; i < tensor_count; ++i) placed.push_back(take_tensor(in, alignment));

  // Tensors tile the data, each padded to the alignment; the last one's padding may be absent.
  const uint64_t start = padded(static_cast<uint64_t>(in.cursor()), alignment);
  const uint64_t size = static_cast<uint64_t>(bytes);
  const uint64_t data_bytes = start <= size ? size - start : 0;
  std::sort(placed.begin(), placed.end(),
            [](const Placed& a, const Placed& b) { return a.offset < b.offset; });
  uint64_t cursor = 0;
  for (Placed& p : placed) {
    const std::string what = cat(path, ": tensor '", printable(p.name), "'");
    BBB_CHECK(p.offset >= cursor, what, " at offset ", p.offset, " overlaps the one before it");
    BBB_CHECK(p.offset == cursor, what, ": a gap of ", p.offset - cursor, " bytes before it");
    const uint64_t tensor_bytes = static_cast<uint64_t>(p.tensor.bytes);
    BBB_CHECK(p.offset <= data_bytes && tensor_bytes <= data_bytes - p.offset, what, " needs ",
              tensor_bytes, " bytes at offset ", p.offset, "; the file holds ", data_bytes,
              " bytes of data", kCutShort);
    p.tensor.data = data + start + p.offset;
    cursor = padded(p.offset + tensor_bytes, alignment);
    BBB_CHECK(out.tensors.emplace(p.name, p.tensor).second, what, " is given twice");
  }
  BBB_CHECK(data_bytes <= cursor, path, ": ", data_bytes - cursor,
            " bytes at the end belong to no tensor");
  return out;
}

const char* gguf_type_name(uint32_t type) { return row_of(type, "GGUF").name; }

int64_t gguf_type_bytes(uint32_t type, int64_t numel) {
  const TypeRow& row = row_of(type, "GGUF");
  BBB_CHECK(numel >= 0 && numel % row.blocks.elements == 0, numel,
            " elements are not whole blocks of ", row.name);
  return numel / row.blocks.elements * row.blocks.bytes;
}

void gguf_dequantize(float* out, const GgufTensor& tensor, const std::string& name) {
  const TypeRow& row = row_of(tensor.type, cat("tensor '", printable(name), "'"));
  row.blocks.expand(out, tensor.data, tensor.numel() / row.blocks.elements);
}

RawWeight raw_weight(const GgufTensor& tensor, const std::string& name) {
  return {name, tensor.shape, tensor.data, row_of(tensor.type, name).blocks};
}

Gguf::Gguf(const std::string& path) : path_(path) {
  files_.push_back(std::make_unique<MappedFile>(path));
  contents_ = parse_gguf(files_[0]->data(), files_[0]->bytes(), path);
  if (has(kSplitCount) && integer(kSplitCount) > 1) read_other_parts();
}

void Gguf::read_other_parts() {
  const int64_t count = integer(kSplitCount), own_index = integer(kSplitNumber);
  BBB_CHECK(own_index >= 0 && own_index < count, path_, ": ", kSplitNumber, " is ", own_index,
            ", but the split GGUF has ", count, " parts, from 0 on");
  const int64_t number = own_index + 1;
  const std::string part = cat(path_, ": part ", number, " of ", count);
  const auto of_count = [&](int64_t i) {
    char text[64];
    std::snprintf(text, sizeof text, "-%05lld-of-%05lld", static_cast<long long>(i),
                  static_cast<long long>(count));
    return std::string(text);
  };
  const std::string own = of_count(number);
  const size_t at = path_.rfind(own);
  BBB_CHECK(at != std::string::npos && path_.find('/', at) == std::string::npos, part,
            " of a split GGUF; the other parts are found only if its name holds '", own, "'");
  const auto path_of = [&](int64_t i) {
    return std::string(path_).replace(at, own.size(), of_count(i));
  };
  BBB_CHECK(number == 1, part, " of a split GGUF; give its first part, ", path_of(1));

  for (int64_t i = 2; i <= count; ++i) {
    const std::string path = path_of(i);
    std::error_code error;
    BBB_CHECK(std::filesystem::exists(path, error), part, " of a split GGUF, but part ", i, ", ",
              path, ", is missing");
    files_.push_back(std::make_unique<MappedFile>(path));
    GgufContents other = parse_gguf(files_.back()->data(), files_.back()->bytes(), path);
    BBB_CHECK(typed<int64_t>(other.metadata, path, kSplitCount, "an integer") == count &&
                  typed<int64_t>(other.metadata, path, kSplitNumber, "an integer") == i - 1,
              path, ": is not part ", i, " of ", count, ", as its name says");
    for (auto& [name, tensor] : other.tensors)
      BBB_CHECK(contents_.tensors.emplace(name, std::move(tensor)).second, path, ": tensor '",
                printable(name), "' is in another part too");
  }
  const int64_t tensors = static_cast<int64_t>(contents_.tensors.size());
  if (has(kSplitTensors))
    BBB_CHECK(integer(kSplitTensors) == tensors, path_, ": the ", count, " parts hold ", tensors,
              " tensors, not ", integer(kSplitTensors));
}

int64_t Gguf::integer(const std::string& key) const {
  return typed<int64_t>(*this, key, "an integer");
}

double Gguf::real(const std::string& key) const {
  const auto found = metadata().find(key);
  if (found != metadata().end())
    if (const int64_t* value = std::get_if<int64_t>(&found->second))
      return static_cast<double>(*value);
  return typed<double>(*this, key, "a number");
}

bool Gguf::boolean(const std::string& key) const { return typed<bool>(*this, key, "a boolean"); }

const std::string& Gguf::string(const std::string& key) const {
  return typed<std::string>(*this, key, "a string");
}

const std::vector<std::string>& Gguf::strings(const std::string& key) const {
  return typed_array<std::string>(*this, key, "strings");
}

const std::vector<int64_t>& Gguf::integers(const std::string& key) const {
  return typed_array<int64_t>(*this, key, "integers");
}

const std::vector<double>& Gguf::reals(const std::string& key) const {
  return typed_array<double>(*this, key, "reals");
}

const GgufTensor& Gguf::tensor(const std::string& name) const {
  const auto found = tensors().find(name);
  BBB_CHECK(found != tensors().end(), path(), ": tensor '", printable(name), "' is missing");
  return found->second;
}

}  // namespace bbb::data
