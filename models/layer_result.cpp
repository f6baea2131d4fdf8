#include "models/layer_result.h"

#include <algorithm>
#include <cstring>

#include "data/half.h"
#include "quant/e4m3.h"
#include "quant/grid.h"
#include "quant/host.h"
#include "quant/host_lc.h"
#include "quant/pack.h"

namespace bbb::models {

using data::FileDType;
using data::SafeTensor;
using engine::Shape;
using quant::LinearFormat;
using quant::StoredPart;
using quant::StoredTensor;

static constexpr const char *kRatios = ".ratios", *kBias = ".bias";

// The suffixes and shapes of what trains beside LC's latents, in the order of LinearResult::Lc.
static std::array<std::pair<const char*, Shape>, 3> lc_tensors(const LinearFormat& format) {
  return {
      {{".u", {format.k}}, {".v", {format.n}}, {".map", {quant::kLcVector, quant::kLcVector + 1}}}};
}

float LinearResult::master_scale() const {
  float value;
  std::memcpy(&value, part(StoredPart::MasterScale).data(), sizeof value);
  return value;
}

static quant::PackedView view_of(const LinearResult& linear, const float* master_scale) {
  BBB_ASSERT(linear.quantized());
  return {.qweight = linear.part(StoredPart::Codes).data(),
          .scales = linear.part(StoredPart::Scales).data(),
          .zeros = linear.part(StoredPart::Zeros).data(),
          .master_scale = master_scale,
          .n = linear.format.n,
          .k = linear.format.stored_k(),
          .grid = linear.format.weight};
}

quant::LcRule lc_rule(const LinearFormat& format) {
  return {.spread = quant::lc_spread(format.n, format.k)};
}

void store_lc(LinearResult& result, const std::vector<uint8_t>& codes, const LinearResult::Lc& lc) {
  result.part(StoredPart::Codes) = pack_rows(codes, result.format.n, quant::kLcBits);
  const auto halves = [&](StoredPart part, const std::vector<float>& values) {
    result.part(part).resize(values.size() * sizeof(uint16_t));
    for (size_t i = 0; i < values.size(); ++i) {
      const uint16_t half = data::float_to_half(quant::lc_half(values[i]));
      std::memcpy(result.part(part).data() + i * sizeof half, &half, sizeof half);
    }
  };
  halves(StoredPart::InputScale, lc.u);
  halves(StoredPart::OutputScale, lc.v);
  result.part(StoredPart::Map).resize(lc.map.size() * sizeof(float));
  std::memcpy(result.part(StoredPart::Map).data(), lc.map.data(), lc.map.size() * sizeof(float));
}

LcCodes lc_codes(const LinearResult& result) {
  const int64_t n = result.format.n, k = result.format.k;
  LcCodes out{unpack_rows(result.part(StoredPart::Codes), n, k, quant::kLcBits), {}};
  const auto halves = [&](StoredPart part) {
    std::vector<float> values;
    const std::vector<uint8_t>& bytes = result.part(part);
    for (size_t i = 0; i < bytes.size(); i += sizeof(uint16_t))
      values.push_back(data::half_to_float(data::load_as<uint16_t>(bytes.data() + i)));
    return values;
  };
  out.lc.u = halves(StoredPart::InputScale);
  out.lc.v = halves(StoredPart::OutputScale);
  out.lc.map.resize(quant::kLcMapSize);
  std::memcpy(out.lc.map.data(), result.part(StoredPart::Map).data(),
              out.lc.map.size() * sizeof(float));
  return out;
}

void LinearResult::store(const std::vector<uint8_t>& codes, const std::vector<uint8_t>& e,
                         const std::vector<uint8_t>& zeros, float master_scale) {
  const int bits = format.weight.bits;
  const auto set = [&](StoredPart p, const void* data, size_t bytes) {
    const auto* begin = static_cast<const uint8_t*>(data);
    part(p).assign(begin, begin + bytes);
  };
  part(StoredPart::Codes) =
      format.weight.nested ? bit_planes(codes) : pack_rows(codes, format.n, bits);
  part(StoredPart::Scales) = e;
  if (!format.is_symmetric())
    part(StoredPart::Zeros) = format.weight.nested ? zeros : pack_rows(zeros, format.n, bits);
  set(StoredPart::MasterScale, &master_scale, sizeof master_scale);
  if (!format.order) return;
  const std::vector<int32_t>&split = format.order->split(), &outliers = format.order->outliers();
  set(StoredPart::SplitChannels, split.data(), split.size() * sizeof(int32_t));
  set(StoredPart::OutlierChannels, outliers.data(), outliers.size() * sizeof(int32_t));
}

std::vector<float> LinearResult::levels() const {
  const float s = master_scale();
  std::vector<float> levels(static_cast<size_t>(format.n * format.stored_k()));
  quant::host::unpack(levels.data(), view_of(*this, &s), {0, format.n});
  for (float& w : levels) w *= s;
  return levels;
}

std::vector<float> LinearResult::dequantize() const {
  if (format.is_lc()) {
    const LcCodes from = lc_codes(*this);
    std::vector<float> weight(from.codes.size());
    const quant::host::LcMatrix<float> matrix{
        nullptr,  from.codes.data(), from.lc.u.data(), from.lc.v.data(), from.lc.map.data(),
        format.n, format.k,          lc_rule(format)};
    quant::host::lc_weight(weight.data(), matrix, {0, format.n / quant::lc_block(format.n)});
    return weight;
  }
  std::vector<float> stored = levels();
  const quant::ChannelOrder order = format.channel_order();
  if (order.is_identity() && !format.input.hadamard) return stored;
  std::vector<float> weight(static_cast<size_t>(format.n * format.k));
  quant::host::merge_weight(weight.data(), stored.data(), {0, format.n}, format, order);
  return weight;
}

LinearGrid stored_grid(const LinearResult& quantized) {
  const LinearFormat& format = quantized.format;
  const std::vector<uint8_t>& e = quantized.part(StoredPart::Scales);
  if (format.is_symmetric())
    return {quantized.master_scale(), e, std::vector<uint8_t>(e.size(), 0)};
  return {quantized.master_scale(), e,
          unpack_rows(quantized.part(StoredPart::Zeros), format.n, format.groups(),
                      format.weight.bits)};
}

LinearGrid nearest_grid(const LinearResult& masters) {
  const int bits = masters.format.code_bits(), group = masters.format.weight.group;
  const quant::Levels levels = masters.format.weight.levels;
  std::vector<quant::Range<float>> ranges(masters.master.size() / static_cast<size_t>(group));
  float largest = 0;
  for (size_t g = 0; g < ranges.size(); ++g) {
    for (int i = 0; i < group; ++i)
      ranges[g].include(masters.master[g * static_cast<size_t>(group) + static_cast<size_t>(i)]);
    ranges[g] = ranges[g].of(levels);
    if (!masters.ratios.empty())
      ranges[g] = ranges[g].scaled(quant::range_ratio<float>(masters.ratios[g]));
    largest = quant::max_or_nan(largest, ranges[g].width());
  }
  LinearGrid grid{quant::master_scale_of(quant::raw_scale(largest, bits, levels)), {}, {}};
  for (const quant::Range<float>& range : ranges) {
    const quant::GroupParams params = quant::group_params(range, grid.master_scale, bits, levels);
    grid.e.push_back(params.e);
    grid.zeros.push_back(params.z);
  }
  return grid;
}

LinearCodes linear_codes(const LinearResult& linear) {
  const LinearFormat& format = linear.format;
  BBB_ASSERT(format.plain_positions());
  const float master_scale = linear.master_scale();
  const quant::PackedView view = view_of(linear, &master_scale);
  const int64_t groups = format.groups(), group = format.weight.group;
  const int64_t zero_bytes = quant::zero_row_bytes(view.k, format.weight.group, format.code_bits());
  const bool symmetric = format.is_symmetric();
  const float unit = symmetric ? master_scale / 2 : master_scale;
  LinearCodes out{format.n, format.k, group, groups, {}, {}, {}};
  std::vector<uint8_t> row(static_cast<size_t>(view.k));
  for (int64_t n = 0; n < format.n; ++n) {
    quant::host::row_codes(row.data(), view, n);
    if (symmetric)
      for (uint8_t& code : row) code = static_cast<uint8_t>(2 * code);
    for (int64_t g = 0; g < groups; ++g) {
      const uint8_t z =
          symmetric ? static_cast<uint8_t>(quant::max_code(format.weight.bits))
                    : quant::packed_code(view.zeros + n * zero_bytes, g, format.code_bits());
      const uint8_t* codes = row.data() + g * group;
      const bool is_zero = std::all_of(codes, codes + group, [z](uint8_t q) { return q == z; });
      out.zeros.push_back(z);
      out.scales.push_back(is_zero ? LinearCodes::kSmallestHalf
                                   : unit * quant::e4m3_decode(view.scales[n * groups + g]));
    }
    out.codes.insert(out.codes.end(), row.begin(), row.begin() + format.k);
  }
  return out;
}

std::vector<uint8_t> bit_planes(const std::vector<uint8_t>& codes) {
  const size_t plane_bytes = codes.size() / 8;
  std::vector<uint8_t> planes(codes.size());
  for (size_t i = 0; i < codes.size(); ++i)
    for (size_t plane = 0; plane < 8; ++plane)
      planes[plane * plane_bytes + i / 8] |=
          static_cast<uint8_t>((codes[i] >> (7 - plane) & 1) << (i % 8));
  return planes;
}

std::vector<uint8_t> pack_rows(const std::vector<uint8_t>& codes, int64_t rows, int bits) {
  const int64_t columns = static_cast<int64_t>(codes.size()) / rows;
  const int64_t row_bytes = quant::packed_bytes(columns, bits);
  std::vector<uint8_t> packed(static_cast<size_t>(rows * row_bytes));
  for (int64_t r = 0; r < rows; ++r)
    quant::pack_codes(packed.data() + r * row_bytes, codes.data() + r * columns, columns, bits);
  return packed;
}

std::vector<uint8_t> unpack_rows(const std::vector<uint8_t>& packed, int64_t rows, int64_t columns,
                                 int bits) {
  const int64_t row_bytes = quant::packed_bytes(columns, bits);
  std::vector<uint8_t> codes(static_cast<size_t>(rows * columns));
  for (int64_t r = 0; r < rows; ++r)
    quant::unpack_codes(codes.data() + r * columns, packed.data() + r * row_bytes, columns, bits);
  return codes;
}

void declare_layer(std::vector<data::SafeTensorsWriter::Entry>& entries, int64_t layer,
                   const LlamaConfig& config, const std::vector<LinearFormat>& formats,
                   LinearContent content, quant::RangeRule range) {
  const std::vector<LinearShape> shapes = block_linears(config);
  for (size_t i = 0; i < shapes.size(); ++i) {
    const std::string name = layer_name(layer, shapes[i].name);
    if (content == LinearContent::Masters) {
      const LinearFormat& format = formats[i];
      entries.push_back({name + ".weight", FileDType::F32, {format.n, format.stored_k()}});
      if (format.is_lc())
        for (const auto& [suffix, shape] : lc_tensors(format))
          entries.push_back({name + suffix, FileDType::F32, shape});
      if (range == quant::RangeRule::Search)
        entries.push_back({name + kRatios, FileDType::U8, {format.n, format.groups()}});
    } else {
      for (const StoredTensor& t : formats[i].tensors())
        entries.push_back({name + t.suffix, t.dtype, t.shape});
    }
    if (shapes[i].bias) entries.push_back({name + kBias, FileDType::F32, {shapes[i].n}});
  }
  for (const NormShape& norm : block_norms(config))
    entries.push_back({layer_name(layer, norm.name), FileDType::F32, {norm.size}});
}

void add_layer(data::SafeTensorsWriter& writer, int64_t layer, const LlamaConfig& config,
               const LayerResult& result, LinearContent content) {
  const auto add = [&]<typename T>(const std::string& name, const std::vector<T>& values) {
    writer.add(layer_name(layer, name), values.data(),
               static_cast<int64_t>(values.size() * sizeof(T)));
  };
  const std::vector<LinearShape> shapes = block_linears(config);
  BBB_ASSERT(result.linears.size() == shapes.size());
  for (size_t i = 0; i < shapes.size(); ++i) {
    const LinearResult& linear = result.linears[i];
    const std::string name = shapes[i].name;
    if (content == LinearContent::Masters) {
      add(name + ".weight", linear.master);
      if (linear.format.is_lc())
        for (size_t part = 0; part < std::size(LinearResult::Lc::kParts); ++part)
          add(name + lc_tensors(linear.format)[part].first,
              linear.lc.*LinearResult::Lc::kParts[part]);
      if (!linear.ratios.empty()) add(name + kRatios, linear.ratios);
    } else {
      for (const StoredTensor& t : linear.format.tensors())
        add(name + t.suffix, linear.part(t.part));
    }
    if (shapes[i].bias) add(name + kBias, linear.bias);
  }
  const std::vector<NormShape> norms = block_norms(config);
  for (size_t i = 0; i < norms.size(); ++i) add(norms[i].name, result.norm(i));
}

static const SafeTensor& find_tensor(const data::SafeTensors& file, const std::string& name,
                                     const Shape& shape, FileDType dtype) {
  const SafeTensor& tensor = file.at(name);
  BBB_CHECK(tensor.shape == shape && tensor.dtype == dtype, name, ": ", name_of(tensor.dtype), " ",
            engine::to_string(tensor.shape), ", but the model wants ", name_of(dtype), " ",
            engine::to_string(shape));
  return tensor;
}

static std::vector<float> read_floats(const data::SafeTensors& file, const std::string& name,
                                      const Shape& shape) {
  const SafeTensor& tensor = find_tensor(file, name, shape, FileDType::F32);
  std::vector<float> values(static_cast<size_t>(tensor.numel()));
  data::to_float(values.data(), tensor, name);
  return values;
}

LayerResult read_layer(const data::SafeTensors& file, int64_t layer, const LlamaConfig& config,
                       const std::vector<LinearFormat>& formats) {
  const auto find = [&](const std::string& name, const Shape& shape,
                        FileDType dtype) -> const SafeTensor& {
    return find_tensor(file, layer_name(layer, name), shape, dtype);
  };
  const auto floats = [&](const std::string& name, const Shape& shape) {
    return read_floats(file, layer_name(layer, name), shape);
  };
  LayerResult result;
  const std::vector<LinearShape> shapes = block_linears(config);
  for (size_t i = 0; i < shapes.size(); ++i) {
    const LinearFormat& format = formats[i];
    const std::string name = shapes[i].name;
    LinearResult& linear = result.linears.emplace_back();
    linear.format = format;
    if (shapes[i].bias) linear.bias = floats(name + kBias, {shapes[i].n});
    if (file.contains(layer_name(layer, name + ".weight"))) {
      linear.master = floats(name + ".weight", {format.n, format.stored_k()});
      if (format.is_lc())
        for (size_t part = 0; part < std::size(LinearResult::Lc::kParts); ++part) {
          const auto [suffix, shape] = lc_tensors(format)[part];
          linear.lc.*LinearResult::Lc::kParts[part] = floats(name + suffix, shape);
        }
      if (file.contains(layer_name(layer, name + kRatios))) {
        const SafeTensor& tensor = find(name + kRatios, {format.n, format.groups()}, FileDType::U8);
        linear.ratios.assign(tensor.data, tensor.data + tensor.bytes);
      }
      continue;
    }
    for (const StoredTensor& t : format.tensors()) {
      const SafeTensor& tensor = find(name + t.suffix, t.shape, t.dtype);
      linear.part(t.part).assign(tensor.data, tensor.data + tensor.bytes);
    }
  }
  const std::vector<NormShape> norms = block_norms(config);
  for (size_t i = 0; i < norms.size(); ++i) result.norm(i) = floats(norms[i].name, {norms[i].size});
  return result;
}

LayerResult norms_and_biases(const Checkpoint& source, int64_t layer) {
  LayerResult result;
  for (const LinearShape& shape : block_linears(source.config())) {
    LinearResult& linear = result.linears.emplace_back();
    if (shape.bias) linear.bias = source.load(layer_name(layer, shape.name) + kBias, {shape.n});
  }
  const std::vector<NormShape> norms = block_norms(source.config());
  for (size_t i = 0; i < norms.size(); ++i)
    result.norm(i) = source.load(layer_name(layer, norms[i].name), {norms[i].size});
  return result;
}

LayerResult full_precision(const Checkpoint& source, int64_t layer) {
  const std::vector<LinearShape> shapes = block_linears(source.config());
  LayerResult result = norms_and_biases(source, layer);
  for (size_t i = 0; i < shapes.size(); ++i) {
    const auto& [name, n, k, site, bias] = shapes[i];
    result.linears[i].format = {.n = n, .k = k, .weight = {.bits = quant::kNoQuantizer}};
    result.linears[i].master = source.load(layer_name(layer, name) + ".weight", {n, k});
  }
  return result;
}

std::vector<OuterWeight> outer_weights(const LlamaConfig& config) {
  const Shape table{config.vocab, config.d_model};
  std::vector<OuterWeight> weights = {{kEmbedding, table}, {kFinalNorm, {config.d_model}}};
  if (!config.tied_head) weights.push_back({kHead, table});
  return weights;
}

LoadOuter outer_of(const Checkpoint& source) {
  return [&source](const OuterWeight& weight) { return source.load(weight.name, weight.shape); };
}

LoadOuter outer_of(const data::SafeTensors& file) {
  if (!file.contains(kEmbedding)) return nullptr;
  return
      [&file](const OuterWeight& weight) { return read_floats(file, weight.name, weight.shape); };
}

void declare_outer(std::vector<data::SafeTensorsWriter::Entry>& entries,
                   const LlamaConfig& config) {
  for (const OuterWeight& weight : outer_weights(config))
    entries.push_back({weight.name, FileDType::F32, weight.shape});
}

void add_outer(data::SafeTensorsWriter& writer, const LlamaConfig& config, const LoadOuter& load) {
  for (const OuterWeight& weight : outer_weights(config)) {
    const std::vector<float> values = load(weight);
    writer.add(weight.name, values.data(), static_cast<int64_t>(values.size() * sizeof(float)));
  }
}

}  // namespace bbb::models
