#include "models/site_statistics.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "engine/backend.h"
#include "engine/cpu/thread_pool.h"
#include "quant/host.h"

namespace bbb::models {

using data::FileDType;
using quant::LinearFormat;

namespace {

// The fourth central moment over the squared variance, from raw moments per token.
double kurtosis_of(double m1, double m2, double m3, double m4) {
  const double variance = m2 - m1 * m1;
  if (variance <= 1e-12 * m2) return 0;  // constant, but for rounding
  const double fourth = m4 - 4 * m1 * m3 + 6 * m1 * m1 * m2 - 3 * m1 * m1 * m1 * m1;
  return fourth / (variance * variance);
}

// The indices of the `count` largest values that are not excluded, ascending.
std::vector<int32_t> largest(const std::vector<double>& values, int64_t count,
                             const std::vector<int32_t>& excluded) {
  std::vector<int32_t> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  std::erase_if(order,
                [&](int32_t i) { return std::binary_search(excluded.begin(), excluded.end(), i); });
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return values[static_cast<size_t>(a)] > values[static_cast<size_t>(b)];
  });
  order.resize(std::min(order.size(), static_cast<size_t>(count)));
  std::sort(order.begin(), order.end());
  return order;
}

}  // namespace

ChannelStatistics ChannelStatistics::from_moments(const std::vector<double>& moments,
                                                  int64_t tokens) {
  const size_t k = moments.size() / engine::Backend::kMoments;
  const auto n = static_cast<double>(tokens);
  ChannelStatistics out;
  double total[4] = {};
  for (size_t c = 0; c < k; ++c) {
    double m[4];
    for (size_t i = 0; i < 4; ++i) {
      m[i] = moments[i * k + c] / n;
      total[i] += m[i] / static_cast<double>(k);
    }
    out.sum_squares.push_back(moments[k + c]);
    out.max.push_back(moments[4 * k + c]);
    out.kurtosis.push_back(kurtosis_of(m[0], m[1], m[2], m[3]));
  }
  out.site_kurtosis = kurtosis_of(total[0], total[1], total[2], total[3]);
  return out;
}

WeightStatistics weight_statistics(const LlamaConfig& config, const LayerResult& original,
                                   Site site) {
  const std::vector<LinearShape> shapes = block_linears(config);
  WeightStatistics out;
  int64_t rows = 0;
  for (size_t i = 0; i < shapes.size(); ++i) {
    if (shapes[i].site != site) continue;
    const size_t k = static_cast<size_t>(shapes[i].k);
    out.mean.resize(k);
    out.max.resize(k);
    rows += shapes[i].n;
    const std::vector<float>& weight = original.linears[i].master;
    for (size_t at = 0; at < weight.size(); ++at) {
      const double magnitude = std::abs(static_cast<double>(weight[at]));
      out.mean[at % k] += magnitude;
      out.max[at % k] = std::max(out.max[at % k], magnitude);
    }
  }
  for (double& sum : out.mean) sum /= static_cast<double>(rows);
  return out;
}

std::vector<int32_t> choose_outliers(const ChannelStatistics& inputs, int64_t count) {
  return largest(inputs.sum_squares, count, {});
}

std::vector<int32_t> choose_split(const ChannelStatistics& inputs, const WeightStatistics& weights,
                                  SplitMetric metric, int64_t count,
                                  const std::vector<int32_t>& outliers) {
  std::vector<double> values(inputs.max.size());
  for (size_t i = 0; i < values.size(); ++i) {
    const double norm = std::sqrt(inputs.sum_squares[i]);
    switch (metric) {
      case SplitMetric::L2Mean:
        values[i] = norm * weights.mean[i];
        break;
      case SplitMetric::L2Max:
        values[i] = norm * weights.max[i];
        break;
      case SplitMetric::ActivationMax:
        values[i] = inputs.max[i];
        break;
      case SplitMetric::WeightMax:
        values[i] = weights.max[i];
        break;
      case SplitMetric::Kurtosis:
        values[i] = inputs.kurtosis[i];
        break;
    }
  }
  return largest(values, count, outliers);
}

namespace {

std::string site_name(int64_t layer, int site, const char* part) {
  return layer_name(layer, cat("site.", site, ".", part));
}

// Calls visit(name, dtype, values) for every tensor that is not empty.
template <typename Visit>
void walk(const std::vector<LayerStatistics>& layers, const Visit& visit) {
  const auto shown = [&](const std::string& name, FileDType dtype, const auto& values) {
    if (!values.empty()) visit(name, dtype, values);
  };
  for (size_t layer = 0; layer < layers.size(); ++layer)
    for (int i = 0; i < kSites; ++i) {
      const SiteStatistics& site = layers[layer][static_cast<size_t>(i)];
      const auto name = [&](const char* part) {
        return site_name(static_cast<int64_t>(layer), i, part);
      };
      const std::vector<float> scalars = {static_cast<float>(site.kurtosis),
                                          site.side == quant::SplitSide::Activation ? 1.0f : 0.0f};
      shown(name("kurtosis_side"), FileDType::F32, scalars);
      shown(name("energy"), FileDType::F32, site.energy);
      shown(name("outliers"), FileDType::I32, site.outliers);
      shown(name("split"), FileDType::I32, site.split);
      shown(name("bits"), FileDType::I32, std::vector<int32_t>(site.bits > 0 ? 1 : 0, site.bits));
    }
}

}  // namespace

std::vector<data::SafeTensorsWriter::Entry> declare_statistics(
    const std::vector<LayerStatistics>& layers) {
  std::vector<data::SafeTensorsWriter::Entry> entries;
  walk(layers, [&](const std::string& name, FileDType dtype, const auto& values) {
    entries.push_back({name, dtype, {static_cast<int64_t>(values.size())}});
  });
  return entries;
}

void add_statistics(data::SafeTensorsWriter& writer, const std::vector<LayerStatistics>& layers) {
  walk(layers, [&]<typename T>(const std::string& name, FileDType, const std::vector<T>& values) {
    writer.add(name, values.data(), static_cast<int64_t>(values.size() * sizeof(T)));
  });
}

std::vector<LayerStatistics> read_statistics(const data::SafeTensors& file,
                                             const LlamaConfig& config) {
  std::vector<LayerStatistics> layers(static_cast<size_t>(config.layers));
  for (int64_t layer = 0; layer < config.layers; ++layer)
    for (int i = 0; i < kSites; ++i) {
      SiteStatistics& site = layers[static_cast<size_t>(layer)][static_cast<size_t>(i)];
      const auto read = [&]<typename T>(const char* part, std::vector<T>& values) {
        const std::string name = site_name(layer, i, part);
        if (!file.contains(name)) return;
        const data::SafeTensor& tensor = file.at(name);
        values.resize(static_cast<size_t>(tensor.bytes) / sizeof(T));
        std::memcpy(values.data(), tensor.data, static_cast<size_t>(tensor.bytes));
      };
      std::vector<float> scalars;
      read("kurtosis_side", scalars);
      BBB_CHECK(scalars.size() == 2, site_name(layer, i, "kurtosis_side"), ": is missing");
      site.kurtosis = scalars[0];
      site.side = scalars[1] == 0 ? quant::SplitSide::Weight : quant::SplitSide::Activation;
      read("energy", site.energy);
      read("outliers", site.outliers);
      read("split", site.split);
      std::vector<int32_t> bits;
      read("bits", bits);
      if (!bits.empty()) site.bits = bits[0];
    }
  return layers;
}

// Stages.

namespace {

constexpr int64_t kRows = 32;  // of one thread's work

bool same_operand(const LinearFormat& a, const LinearFormat& b) {
  return a.weight.group == b.weight.group && a.input.hadamard == b.input.hadamard &&
         a.channel_order() == b.channel_order();
}

class StageStarter {
 public:
  StageStarter(quant::RangeRule range, int lowest_bits, int threads = 0)
      : range_(range), lowest_bits_(lowest_bits), pool_(threads) {}

  LinearResult operator()(const LinearResult& from, const LinearFormat& format,
                          const std::vector<float>& energy) {
    if (from.quantized()) return from_levels(from, format, energy);
    LinearResult to;
    to.format = format;
    if (from.master.empty()) return to;  // of a backend that does not compute
    const quant::ChannelOrder order = format.channel_order();
    const bool searched = range_ == quant::RangeRule::Search;
    if (same_operand(from.format, format) && from.format.code_bits() == format.code_bits() &&
        from.format.weight.nested == format.weight.nested &&
        from.master.size() == static_cast<size_t>(format.n * order.stored_k()) &&
        (!searched || !from.ratios.empty())) {
      to.master = from.master;
      if (searched) to.ratios = from.ratios;
      return to;
    }
    to.master.resize(static_cast<size_t>(format.n * order.stored_k()));
    std::vector<float> plain;
    if (from.format.order || from.format.input.hadamard) {
      const quant::ChannelOrder before = from.format.channel_order();
      plain.resize(static_cast<size_t>(format.n * format.k));
      over_rows(format.n, [&](quant::host::Rows rows) {
        quant::host::merge_weight(plain.data(), from.master.data(), rows, from.format, before);
      });
    }
    const std::vector<float>& weight = plain.empty() ? from.master : plain;
    over_rows(format.n, [&](quant::host::Rows rows) {
      quant::host::gather_weight(to.master.data(), weight.data(), rows, format, order);
    });
    if (searched) to.ratios.assign(static_cast<size_t>(format.n * format.groups()), 0);
    if (format.code_bits() != quant::kNoQuantizer) place(to, order, energy);
    return to;
  }

  template <typename Fn>
  void over_rows(int64_t rows, const Fn& fn) {
    pool_.parallel_for(rows, kRows, [&](int64_t begin, int64_t end) { fn({begin, end}); });
  }

  // The masters rounded to nearest, (N, K'): S e (q - z).
  std::vector<float> levels(const LinearResult& masters) {
    const LinearFormat& format = masters.format;
    const int group = format.weight.group;
    const int64_t columns = format.stored_k();
    const uint8_t* ratios = masters.ratios.empty() ? nullptr : masters.ratios.data();
    std::vector<float> levels(masters.master.size()), ranges(static_cast<size_t>(format.n));
    over_rows(format.n, [&](quant::host::Rows rows) {
      for (int64_t row = rows.begin; row < rows.end; ++row)
        ranges[static_cast<size_t>(row)] = quant::host::group_range_max(
            masters.master.data(), ratios, {row, row + 1}, columns, group);
    });
    const float s = quant::master_scale_of(
        quant::raw_scale(quant::host::largest(ranges.data(), format.n), format.weight.bits));
    std::vector<uint8_t> e(levels.size() / static_cast<size_t>(group)), z(e.size()),
        clipped(levels.size() / 8);
    over_rows(format.n, [&](quant::host::Rows rows) {
      quant::host::fake_quant(levels.data(), e.data(), z.data(), clipped.data(),
                              masters.master.data(), ratios, rows, columns, s, format.weight,
                              quant::Rounding::Nearest);
      for (int64_t i = rows.begin * columns; i < rows.end * columns; ++i)
        levels[static_cast<size_t>(i)] *= s;
    });
    return levels;
  }

 private:
  // Its levels are the masters, each in the middle of its bin: all ratios are 1.
  LinearResult from_levels(const LinearResult& from, const LinearFormat& format,
                           const std::vector<float>& energy) {
    LinearResult masters;
    masters.format = from.format;
    masters.master = from.levels();
    masters.ratios.assign(static_cast<size_t>(from.format.n * from.format.groups()), 0);
    LinearResult to = (*this)(masters, format, energy);
    if (same_operand(from.format, format) && from.format.weight == format.weight) {
      to.stored = from.stored;
      if (format.is_symmetric()) span_range(to);
    }
    return to;
  }

  // Moves the outermost levels of every group to the outer edge of their bins. There they span the
  // range that has the group's scale, if it uses an outermost code.
  static void span_range(LinearResult& to) {
    const LinearGrid grid = stored_grid(to);
    const auto group = static_cast<size_t>(to.format.weight.group);
    for (size_t g = 0; g < grid.e.size(); ++g) {
      float* const w = to.master.data() + g * group;
      const float half = grid.master_scale * quant::e4m3_decode(grid.e[g]) / 2;
      float most = 0;
      for (size_t i = 0; i < group; ++i) most = std::max(most, std::fabs(w[i]));
      for (size_t i = 0; i < group; ++i)
        if (std::fabs(w[i]) == most) w[i] += std::copysign(half, w[i]);
    }
  }

  // Splits pairs and searches ranges, with the S that follows from the split weights.
  void place(LinearResult& to, const quant::ChannelOrder& order, const std::vector<float>& energy) {
    const int bits = to.format.code_bits();
    const quant::Levels levels = to.format.weight.levels;
    const bool splits = !order.split().empty() && order.side() == quant::SplitSide::Weight;
    const bool searched = quant::is_searched(range_, bits);
    if (!splits && !searched) return;
    BBB_ASSERT(!searched || static_cast<int64_t>(energy.size()) == order.stored_k());
    const std::vector<float> halves = to.master;
    const auto start = [&](float master_scale, quant::RangeRule range) {
      const quant::host::StageStart how{range, energy.data(), lowest_bits_};
      std::vector<float> most(static_cast<size_t>((to.format.n + kRows - 1) / kRows));
      over_rows(to.format.n, [&](quant::host::Rows rows) {
        most[static_cast<size_t>(rows.begin / kRows)] = quant::host::start_rows(
            to.master.data(), to.ratios.empty() ? nullptr : to.ratios.data(), halves.data(), rows,
            to.format, order, master_scale, how);
      });
      float largest = 0;
      for (const float m : most) largest = quant::max_or_nan(largest, m);
      return quant::master_scale_of(quant::raw_scale(largest, bits, levels));
    };
    // S depends on the offsets, and they on S.
    float s = quant::master_scale_of(quant::raw_scale(
        quant::host::group_range_max(halves.data(), nullptr, {0, to.format.n}, order.stored_k(),
                                     to.format.weight.group, levels),
        bits, levels));
    for (int round = 0; round < 8; ++round) {
      const float next = start(s, quant::RangeRule::MinMax);
      if (next == s) break;
      s = next;
    }
    if (searched) start(s, quant::RangeRule::Search);
  }

  quant::RangeRule range_;
  int lowest_bits_;
  engine::ThreadPool pool_;
};

}  // namespace

LinearResult start_stage(const LinearResult& from, const LinearFormat& format,
                         const std::vector<float>& energy, quant::RangeRule range,
                         int lowest_bits) {
  return StageStarter(range, lowest_bits)(from, format, energy);
}

LayerResult start_stage(const LlamaConfig& config, const LayerResult& from,
                        const std::vector<LinearFormat>& formats, const LayerStatistics& statistics,
                        quant::RangeRule range, int lowest_bits) {
  const std::vector<LinearShape> shapes = block_linears(config);
  BBB_ASSERT(from.linears.size() == shapes.size() && formats.size() == shapes.size());
  StageStarter start(range, lowest_bits);
  LayerResult result;
  for (size_t i = 0; i < block_norms(config).size(); ++i) result.norm(i) = from.norm(i);
  for (size_t i = 0; i < shapes.size(); ++i) {
    result.linears.push_back(
        start(from.linears[i], formats[i], statistics[static_cast<size_t>(shapes[i].site)].energy));
    result.linears.back().bias = from.linears[i].bias;
  }
  return result;
}

std::vector<float> rounded_weight(const LinearResult& original, const LinearFormat& format,
                                  const std::vector<float>& energy, quant::RangeRule range) {
  StageStarter start(range, 0);
  const std::vector<float> levels = start.levels(start(original, format, energy));
  std::vector<float> weight(static_cast<size_t>(format.n * format.k));
  const quant::ChannelOrder order = format.channel_order();
  start.over_rows(format.n, [&](quant::host::Rows rows) {
    quant::host::merge_weight(weight.data(), levels.data(), rows, format, order);
  });
  return weight;
}

double rounding_error(const LinearResult& original, const LinearFormat& format,
                      const std::vector<float>& energy, quant::RangeRule range, int64_t rows) {
  const quant::ChannelOrder order = format.channel_order();
  BBB_ASSERT(static_cast<int64_t>(energy.size()) == order.stored_k());
  const int64_t step = std::max<int64_t>(1, format.n / rows), k = format.k;
  LinearResult sample;
  sample.format = original.format;
  for (int64_t row = 0; row < format.n; row += step)
    sample.master.insert(sample.master.end(), original.master.begin() + row * k,
                         original.master.begin() + (row + 1) * k);
  LinearFormat of_sample = format;
  of_sample.n = sample.format.n = static_cast<int64_t>(sample.master.size()) / k;
  StageStarter start(range, 0, 1);
  const LinearResult masters = start(sample, of_sample, energy);
  const std::vector<float> levels = start.levels(masters);
  double error = 0;
  for (size_t at = 0; at < levels.size();) {
    const auto p = static_cast<int64_t>(at) % order.stored_k();
    double d = static_cast<double>(levels[at]) - masters.master[at];
    ++at;
    if (p >= order.pairs_begin() && p < order.pairs_end()) {
      d += static_cast<double>(levels[at]) - masters.master[at];
      ++at;
    }
    error += d * d * energy[static_cast<size_t>(p)];
  }
  return error;
}

}  // namespace bbb::models
