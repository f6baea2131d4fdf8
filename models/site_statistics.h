// SiteStatistics: what the calibration text says of the input sites of a layer (numerics.md
// sections 2 and 5). It decides which channels are outliers or split, and weighs the search of
// ranges. Taken once, from the full-precision model; a run saves it, so that a resume repeats every
// decision.
#pragma once

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "models/checkpoint.h"
#include "models/layer_result.h"

namespace bbb::models {

// Of the channels of a site's input X, over all tokens.
struct ChannelStatistics {
  std::vector<double> sum_squares;  // ||X_i||^2
  std::vector<double> max;          // max |X_i|
  std::vector<double> kurtosis;     // of X_i; 0 for a constant channel
  double site_kurtosis = 0;         // of all values of the site

  // From moments F64 (kMoments, K) (Backend::channel_moments) over `tokens` rows.
  static ChannelStatistics from_moments(const std::vector<double>& moments, int64_t tokens);
};

struct SiteStatistics {
  double kurtosis = 0;
  std::vector<int32_t> outliers, split;  // ascending
  quant::SplitSide side = quant::SplitSide::Weight;
  int bits = 0;  // the fewest of its linears' weights that any stage takes; 0: the stage's own
  std::vector<float> energy;  // (K'): E[x^2] of the gathered and rotated input, by stored position
};

using LayerStatistics = std::array<SiteStatistics, kSites>;

enum class SplitMetric { L2Mean, L2Max, ActivationMax, WeightMax, Kurtosis };

// A site's weight factors of the metrics: over the rows of all of its linears.
struct WeightStatistics {
  std::vector<double> mean;  // mean_j |W_ji|
  std::vector<double> max;   // max_j |W_ji|
};
WeightStatistics weight_statistics(const LlamaConfig& config, const LayerResult& original,
                                   Site site);

// The `count` channels of largest RMS, ascending; ties go to the lower index.
std::vector<int32_t> choose_outliers(const ChannelStatistics& inputs, int64_t count);
// The `count` channels of largest metric among those that are no outliers, ascending.
//   L2Mean ||X_i|| mean_j |W_ji|    L2Max ||X_i|| max_j |W_ji|    ActivationMax max |X_i|
//   WeightMax max_j |W_ji|          Kurtosis that of X_i
std::vector<int32_t> choose_split(const ChannelStatistics& inputs, const WeightStatistics& weights,
                                  SplitMetric metric, int64_t count,
                                  const std::vector<int32_t>& outliers);

// All layers in one file: F32 energies and kurtosis, I32 channels and bits. The entries in the
// order in which add_statistics() adds them.
std::vector<data::SafeTensorsWriter::Entry> declare_statistics(
    const std::vector<LayerStatistics>& layers);
void add_statistics(data::SafeTensorsWriter& writer, const std::vector<LayerStatistics>& layers);
std::vector<LayerStatistics> read_statistics(const data::SafeTensors& file,
                                             const LlamaConfig& config);

// The masters of a linear or of a layer, in new formats, from which a stage starts. Where an
// operand or the width of weights changes, weights are merged, gathered, rotated and split again,
// and ranges are searched again; else masters and ratios continue unchanged. `lowest_bits`: of
// precisions that train at once, or 0.
LinearResult start_stage(const LinearResult& from, const quant::LinearFormat& format,
                         const std::vector<float>& energy, quant::RangeRule range, int lowest_bits);
LayerResult start_stage(const LlamaConfig& config, const LayerResult& from,
                        const std::vector<quant::LinearFormat>& formats,
                        const LayerStatistics& statistics, quant::RangeRule range, int lowest_bits);

// A full-precision linear, rounded to nearest in a format, (N, K): S e (q - z), pairs summed and
// rotations undone. Ranges are searched, and pairs split, as at the start of a stage.
std::vector<float> rounded_weight(const LinearResult& original, const quant::LinearFormat& format,
                                  const std::vector<float>& energy, quant::RangeRule range);
// What this rounding loses: sum (w^ - w)^2 E[x_p^2] over stored positions p, a pair being one term
// (numerics.md section 2), and over about `rows` rows, evenly spread. `energy` (K') is needed in
// any case. Runs on the calling thread.
double rounding_error(const LinearResult& original, const quant::LinearFormat& format,
                      const std::vector<float>& energy, quant::RangeRule range, int64_t rows);

}  // namespace bbb::models
