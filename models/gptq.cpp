#include "models/gptq.h"

#include <nlohmann/json.hpp>

#include "data/half.h"

namespace bbb::models {

using data::FileDType;
using engine::Shape;
using quant::LinearFormat;

static constexpr int kWordBits = 32;

static int64_t words(int64_t count, int bits) { return (count * bits + kWordBits - 1) / kWordBits; }

void check_gptq(const LinearFormat& format, const std::string& name) {
  const int bits = format.weight.bits;
  const char* obstacle = format.input.bits < 16      ? "quantizes activations"
                         : format.is_lc()            ? "is of --quantizer lc"
                         : format.is_symmetric()     ? "is of --quantizer seq"
                         : format.input.hadamard     ? "rotates its groups (--rotate none)"
                         : !format.plain_positions() ? "splits or reorders channels"
                         : bits != 2 && bits != 4 && bits != 8 ? "has no 2, 4 or 8 bits"
                                                               : nullptr;
  BBB_CHECK(obstacle == nullptr, name, ": --format gptq cannot hold this linear: it ", obstacle);
}

std::vector<data::SafeTensorsWriter::Entry> gptq_entries(const LinearFormat& format,
                                                         const std::string& name) {
  const int bits = format.weight.bits;
  const int64_t n = format.n, k = format.k, groups = format.groups();
  return {{name + ".qweight", FileDType::I32, {words(k, bits), n}},
          {name + ".qzeros", FileDType::I32, {groups, words(n, bits)}},
          {name + ".scales", FileDType::F16, {groups, n}},
          {name + ".g_idx", FileDType::I32, {k}}};
}

GptqLinear to_gptq(const LinearResult& linear, const std::string& name) {
  const int bits = linear.format.weight.bits, in_word = kWordBits / bits;
  const LinearCodes from = linear_codes(linear);
  const int64_t n = from.n, k = from.k, groups = from.groups, zero_words = words(n, bits);
  std::vector<uint32_t> codes(static_cast<size_t>(words(k, bits) * n)),
      zeros(static_cast<size_t>(groups * zero_words));
  GptqLinear out;
  out.scales.resize(static_cast<size_t>(groups * n));
  const auto put = [&](std::vector<uint32_t>& to, int64_t word, int64_t index, uint8_t value) {
    to[static_cast<size_t>(word)] |= uint32_t{value} << (bits * (index % in_word));
  };
  for (int64_t row = 0; row < n; ++row) {
    for (int64_t i = 0; i < k; ++i)
      put(codes, i / in_word * n + row, i, from.codes[static_cast<size_t>(row * k + i)]);
    for (int64_t g = 0; g < groups; ++g) {
      const auto at = static_cast<size_t>(row * groups + g);
      put(zeros, g * zero_words + row / in_word, row, from.zeros[at]);
      const uint16_t half = data::float_to_half(from.scales[at]);
      BBB_CHECK(data::half_to_float(half) == from.scales[at], name, ".scales[", row, ", ", g,
                "]: ", from.scales[at], " is not exact in F16, so --format gptq cannot hold it");
      out.scales[static_cast<size_t>(g * n + row)] = half;
    }
  }
  out.qweight.assign(codes.begin(), codes.end());
  out.qzeros.assign(zeros.begin(), zeros.end());
  for (int64_t i = 0; i < k; ++i) out.g_idx.push_back(static_cast<int32_t>(i / from.group));
  return out;
}

std::vector<float> read_gptq(const data::SafeTensors& file, const LinearFormat& format,
                             const std::string& name) {
  std::vector<const uint8_t*> data;
  for (const auto& entry : gptq_entries(format, name)) {
    const data::SafeTensor& tensor = file.at(entry.name);
    BBB_CHECK(tensor.dtype == entry.dtype && tensor.shape == entry.shape, entry.name, " is ",
              name_of(tensor.dtype), " ", engine::to_string(tensor.shape), ", not ",
              name_of(entry.dtype), " ", engine::to_string(entry.shape));
    data.push_back(tensor.data);
  }
  const int bits = format.weight.bits, in_word = kWordBits / bits;
  const int64_t n = format.n, k = format.k, zero_words = words(n, bits);
  // The value of `bits` bits at `index` of a word.
  const auto field = [&](const uint8_t* from, int64_t word, int64_t index) {
    return static_cast<int>(data::load_as<uint32_t>(from + 4 * word) >> (bits * (index % in_word)) &
                            ((1u << bits) - 1));
  };
  std::vector<float> weight(static_cast<size_t>(n * k));
  for (int64_t i = 0; i < k; ++i) {
    const int64_t g = data::load_as<int32_t>(data[3] + 4 * i);
    BBB_CHECK(g >= 0 && g < format.groups(), name, ".g_idx[", i, "] is ", g);
    for (int64_t row = 0; row < n; ++row) {
      const int q = field(data[0], i / in_word * n + row, i);
      const int z = field(data[1], g * zero_words + row / in_word, row);
      const float scale = data::half_to_float(data::load_as<uint16_t>(data[2] + 2 * (g * n + row)));
      weight[static_cast<size_t>(row * k + i)] = scale * static_cast<float>(q - z);
    }
  }
  return weight;
}

nlohmann::ordered_json gptq_config(const LinearFormat& format) {
  return {{"quant_method", "gptq"},
          {"bits", format.weight.bits},
          {"group_size", format.weight.group},
          {"sym", false},
          {"desc_act", false},
          {"checkpoint_format", "gptq_v2"},
          {"pack_dtype", "int32"},
          {"lm_head", false}};
}

}  // namespace bbb::models
