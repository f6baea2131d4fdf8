#include "models/lc_start.h"

#include <algorithm>
#include <cmath>

#include "engine/rng.h"
#include "quant/host_lc.h"

namespace bbb::models {

using quant::kLcVector;
using quant::LinearFormat;

namespace {

constexpr int64_t kTileRows = 16;    // rows whose vectors are chosen together
constexpr int64_t kSampleRows = 32;  // on which factors of the RMS are compared
constexpr double kDamping = 0.01;    // of the mean diagonal, on the diagonal
constexpr float kFactors[] = {1.0f, 0.9f, 1.1f, 0.8f, 1.2f, 1.3f};

// What compensates the errors of earlier positions: for the vector at position b, rows j < b of
// C_jb C_bb^-1, each of 4 numbers. Empty: nothing does.
class Feedback {
 public:
  Feedback(std::vector<float> moments, int64_t k, engine::ThreadPool& pool) : k_(k) {
    if (moments.empty()) return;
    std::vector<double> c(moments.begin(), moments.end());
    moments = {};
    double trace = 0;
    for (int64_t i = 0; i < k; ++i) trace += at(c, i, i);
    const double mean = trace > 0 ? trace / static_cast<double>(k) : 1;
    for (int64_t i = 0; i < k; ++i) at(c, i, i) += kDamping * mean;
    factor(c, pool);
    rows_.resize(static_cast<size_t>(begin(k)));
    for (int64_t b = 0; b < k; b += kLcVector) {
      for (int i = 0; i < kLcVector; ++i)
        for (int j = 0; j < kLcVector; ++j)
          weights_.push_back(j >= i ? static_cast<float>(at(c, b + i, b + j)) : 0);
      for (int64_t j = 0; j < b; ++j) {
        // x C_bb = C_jb, by forward substitution: C_bb is upper triangular.
        double x[kLcVector];
        for (int i = 0; i < kLcVector; ++i) {
          x[i] = at(c, j, b + i);
          for (int m = 0; m < i; ++m) x[i] -= x[m] * at(c, b + m, b + i);
          x[i] /= at(c, b + i, b + i);
          rows_[static_cast<size_t>(begin(b) + j * kLcVector + i)] = static_cast<float>(x[i]);
        }
      }
    }
  }

  bool empty() const { return rows_.empty(); }
  const float* of(int64_t b) const { return rows_.data() + begin(b); }
  // |x C_bb|^2: what an error x, compensated from here on, costs.
  float cost(int64_t b, const float (&x)[kLcVector]) const {
    float sum = 0;
    for (int i = 0; i < kLcVector; ++i) {
      float y = x[i];
      if (!empty()) {
        y = 0;
        for (int j = 0; j <= i; ++j)
          y += x[j] * weights_[static_cast<size_t>(b * kLcVector + j * kLcVector + i)];
      }
      sum += y * y;
    }
    return sum;
  }

 private:
  double& at(std::vector<double>& c, int64_t row, int64_t column) const {
    return c[static_cast<size_t>(row * k_ + column)];
  }
  // Of the vectors before position b: 4 (0 + 4 + .. + (b - 4)) numbers.
  static int64_t begin(int64_t b) { return b * (b - kLcVector) / 2; }

  // C in place of the upper triangle of H. Columns from the last; each row's part of a column is a
  // sum over the columns behind it.
  void factor(std::vector<double>& c, engine::ThreadPool& pool) const {
    for (int64_t i = k_; i-- > 0;) {
      const double* const pivot = c.data() + i * k_;
      double square = pivot[i];
      for (int64_t m = i + 1; m < k_; ++m) square -= pivot[m] * pivot[m];
      const double root = std::sqrt(square);
      at(c, i, i) = root;
      pool.parallel_for(
          i, std::max<int64_t>(1, (1 << 15) / (k_ - i)), [&](int64_t first, int64_t end) {
            for (int64_t j = first; j < end; ++j) {
              double* const row = c.data() + j * k_;
              double sums[4] = {};  // of every fourth column: independent, so that they overlap
              int64_t m = i + 1;
              for (; m + 4 <= k_; m += 4)
                for (int part = 0; part < 4; ++part) sums[part] += row[m + part] * pivot[m + part];
              for (; m < k_; ++m) sums[0] += row[m] * pivot[m];
              row[i] = (row[i] - ((sums[0] + sums[1]) + (sums[2] + sums[3]))) / root;
            }
          });
    }
  }

  int64_t k_;
  std::vector<float> rows_;
  std::vector<float> weights_;  // C_bb of each vector, (4, 4)
};

// The nearest codeword of vectors: A = U / sigma with U orthonormal, so it is found coordinate by
// coordinate, at the nearest code to A^-1 (w - c), A^-1 = sigma^2 A^T.
class Codewords {
 public:
  explicit Codewords(const std::vector<float>& map) : map_(map.data()) {}

  // x = A^-1 (x - c): where targets lie between the codes.
  void positions(float (&x)[kLcVector]) const {
    for (int i = 0; i < kLcVector; ++i) x[i] -= map_.c[i];
    map_.transpose(x);
    for (float& value : x) value *= quant::kLcVariance;
  }
  // Of targets x; x becomes the codeword.
  void nearest(uint8_t* codes, float (&x)[kLcVector]) const {
    positions(x);
    for (int i = 0; i < kLcVector; ++i) {
      x[i] = quant::lc_code(x[i], {});
      codes[i] = static_cast<uint8_t>(x[i]);
    }
    map_.apply(x);
  }

 private:
  quant::LcMap<float> map_;
};

// Codes of rows [begin, end) of the targets T (N, K) / scale. Returns the error that they leave in
// the outputs, sum_b |e_b C_bb|^2, in units of T.
double choose_codes(uint8_t* codes, const float* targets, float scale, int64_t begin, int64_t end,
                    int64_t k, const Feedback& feedback, const Codewords& codewords) {
  std::vector<float> errors(static_cast<size_t>(k * kTileRows));  // (K, rows)
  double total = 0;
  const int64_t rows = end - begin;
  for (int64_t b = 0; b < k; b += kLcVector) {
    float wanted[kLcVector][kTileRows] = {};
    if (!feedback.empty()) {
      const float* weights = feedback.of(b);
      for (int64_t j = 0; j < b; ++j, weights += kLcVector) {
        const float* const error = errors.data() + j * kTileRows;
        for (int i = 0; i < kLcVector; ++i)
          for (int64_t r = 0; r < kTileRows; ++r) wanted[i][r] += error[r] * weights[i];
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const float* const target = targets + (begin + r) * k + b;
      float x[kLcVector], left[kLcVector];
      for (int i = 0; i < kLcVector; ++i) x[i] = left[i] = target[i] / scale + wanted[i][r];
      codewords.nearest(codes + (begin + r) * k + b, x);
      for (int i = 0; i < kLcVector; ++i) {
        errors[static_cast<size_t>((b + i) * kTileRows + r)] = target[i] / scale - x[i];
        left[i] -= x[i];
      }
      total += feedback.cost(b, left);
    }
  }
  return total * double{scale} * double{scale};
}

// The signs of a vector: +-1.
std::vector<float> random_signs(engine::Rng& rng, int64_t count) {
  std::vector<float> signs(static_cast<size_t>(count));
  for (float& sign : signs) sign = rng.next() >> 63 ? 1.0f : -1.0f;
  return signs;
}

// Multiplies rows and columns of x (N, K) and transforms both sides.
void transform(std::vector<float>& x, const std::vector<float>& rows,
               const std::vector<float>& columns) {
  const auto n = static_cast<int64_t>(rows.size()), k = static_cast<int64_t>(columns.size());
  for (size_t i = 0; i < x.size(); ++i)
    x[i] *= rows[i / columns.size()] * columns[i % columns.size()];
  quant::host::lc_hadamard_rows(x.data(), n, k);
  quant::host::lc_hadamard_columns(x.data(), n, k);
}

double sum_of_squares(const std::vector<float>& values) {
  double sum = 0;
  for (const float value : values) sum += double{value} * double{value};
  return sum;
}

LinearResult::Lc scaled(std::vector<float> u, std::vector<float> v, float of_u, float of_v,
                        const std::vector<float>& map) {
  for (float& value : u) value *= of_u;
  for (float& value : v) value *= of_v;
  return {std::move(u), std::move(v), map};
}

}  // namespace

std::vector<float> lc_first_map(bool scalar) {
  // Left multiplication by the unit quaternion (2, 4, 5, 6) / 9.
  static constexpr float kQuaternion[4][4] = {
      {2, -4, -5, -6}, {4, 2, -6, 5}, {5, 6, 2, -4}, {6, -5, 4, 2}};
  const float inverse_sigma = 1 / std::sqrt(quant::kLcVariance);
  std::vector<float> map;
  for (int i = 0; i < kLcVector; ++i) {
    float sum = 0;
    for (int j = 0; j < kLcVector; ++j) {
      map.push_back(inverse_sigma * (scalar ? float(i == j) : kQuaternion[i][j] / 9));
      sum += map.back();
    }
    map.push_back(-quant::kLcCenter * sum);
  }
  return map;
}

std::vector<LinearResult> lc_site_start(const std::vector<const std::vector<float>*>& masters,
                                        const std::vector<LinearFormat>& formats,
                                        std::vector<float> moments, const LcStart& how,
                                        engine::ThreadPool& pool) {
  const int64_t k = formats[0].k;
  engine::Rng rng(how.seed);
  const std::vector<float> u = random_signs(rng, k), map = lc_first_map(how.scalar_map);
  if (!moments.empty()) transform(moments, u, u);
  const Feedback feedback(std::move(moments), k, pool);
  const Codewords codewords(map);
  std::vector<std::vector<float>> v;
  std::vector<std::vector<uint8_t>> codes;
  std::vector<float> scales;
  double squares = 0;  // of all v o scale
  for (size_t i = 0; i < masters.size(); ++i) {
    const int64_t n = formats[i].n;
    v.push_back(random_signs(rng, n));
    std::vector<float> targets = *masters[i];
    transform(targets, v[i], u);
    const double rms = std::sqrt(sum_of_squares(targets) / static_cast<double>(n * k));
    std::vector<uint8_t>& chosen = codes.emplace_back(targets.size());
    const auto choose = [&](float scale, int64_t rows) {
      std::vector<double> parts(static_cast<size_t>((rows + kTileRows - 1) / kTileRows));
      pool.parallel_for(rows, kTileRows, [&](int64_t begin, int64_t end) {
        parts[static_cast<size_t>(begin / kTileRows)] =
            choose_codes(chosen.data(), targets.data(), scale, begin, end, k, feedback, codewords);
      });
      double error = 0;
      for (const double part : parts) error += part;
      return error;
    };
    float best = rms > 0 ? static_cast<float>(rms) : 1.0f;
    double least = HUGE_VAL;
    for (const float factor : kFactors) {
      const float scale = factor * static_cast<float>(rms > 0 ? rms : 1);
      const double error = choose(scale, std::min(n, kSampleRows));
      if (error < least) {
        least = error;
        best = scale;
      }
    }
    choose(best, n);
    scales.push_back(best);
    squares += double{best} * double{best} * static_cast<double>(n);
  }
  // |u|^2 = a^2 K = |v|^2 = squares / a^2.
  const double a = std::pow(squares / static_cast<double>(k), 0.25);
  std::vector<LinearResult> results;
  for (size_t i = 0; i < masters.size(); ++i) {
    LinearResult& result = results.emplace_back();
    result.format = formats[i];
    store_lc(result, codes[i],
             scaled(u, v[i], static_cast<float>(a), static_cast<float>(scales[i] / a), map));
  }
  return results;
}

namespace {

// Replaces the linears of `to` by stored ones.
void start_sites(LayerResult& to, const LlamaConfig& config, const LayerResult& original,
                 const std::vector<LinearFormat>& formats,
                 std::array<std::vector<float>, kSites> moments, const LcStart& how) {
  const std::vector<LinearShape> shapes = block_linears(config);
  engine::ThreadPool pool(0);
  for (int site = 0; site < kSites; ++site) {
    std::vector<const std::vector<float>*> masters;
    std::vector<LinearFormat> of_site;
    std::vector<size_t> places;
    for (size_t i = 0; i < shapes.size(); ++i) {
      if (shapes[i].site != site) continue;
      masters.push_back(&original.linears[i].master);
      of_site.push_back(formats[i]);
      places.push_back(i);
    }
    const LcStart own{how.scalar_map, how.seed + static_cast<uint64_t>(site)};
    std::vector<LinearResult> stored =
        lc_site_start(masters, of_site, std::move(moments[static_cast<size_t>(site)]), own, pool);
    for (size_t i = 0; i < places.size(); ++i) {
      stored[i].bias = original.linears[places[i]].bias;
      to.linears[places[i]] = std::move(stored[i]);
    }
  }
}

// The latents (N, K) of codes: where the weights (N, K) that they stand for lie between the
// thresholds, if they lie in the code's bin; else, and without weights, the middle of the bin.
std::vector<float> latents_of(const LcCodes& codes, const LinearFormat& format,
                              const std::vector<float>* weights) {
  const quant::LcRule rule = lc_rule(format);
  std::vector<float> latents;
  for (const uint8_t code : codes.codes)
    latents.push_back(quant::lc_latent(static_cast<float>(code), rule));
  if (weights == nullptr) return latents;
  const auto inverse = [](std::vector<float> values) {
    for (float& value : values) value = 1 / value;  // never 0: lc_half
    return values;
  };
  std::vector<float> targets = *weights;
  transform(targets, inverse(codes.lc.v), inverse(codes.lc.u));
  const Codewords codewords(codes.lc.map);
  for (size_t at = 0; at < targets.size(); at += kLcVector) {
    float x[kLcVector];
    std::copy_n(targets.data() + at, kLcVector, x);
    codewords.positions(x);
    for (size_t i = 0; i < kLcVector; ++i) {
      const float latent = quant::lc_latent(std::clamp(x[i], -0.5f, 3.5f), rule);
      const float code = quant::lc_code(quant::lc_position(latent, rule), rule);
      if (code == static_cast<float>(codes.codes[at + i])) latents[at + i] = latent;
    }
  }
  return latents;
}

}  // namespace

LayerResult lc_layer_start(const LlamaConfig& config, const LayerResult& original,
                           const std::vector<LinearFormat>& formats,
                           std::array<std::vector<float>, kSites> moments, const LcStart& how) {
  LayerResult result;
  for (size_t i = 0; i < block_norms(config).size(); ++i) result.norm(i) = original.norm(i);
  result.linears.resize(formats.size());
  start_sites(result, config, original, formats, std::move(moments), how);
  return result;
}

LayerResult lc_latents(const LlamaConfig& config, const LayerResult& from,
                       const std::vector<LinearFormat>& formats, const LcStart& how,
                       const LayerResult* original) {
  const LinearResult& first = from.linears[0];
  if (first.format.is_lc() && !first.quantized()) return from;  // latents already
  LayerResult result = from;
  if (!first.quantized()) {
    if (first.master.empty()) {  // of a backend that does not compute
      for (size_t i = 0; i < formats.size(); ++i) result.linears[i].format = formats[i];
      return result;
    }
    result = lc_layer_start(config, from, formats, {}, how);
    original = &from;
  }
  for (size_t i = 0; i < formats.size(); ++i) {
    LinearResult stored = std::move(result.linears[i]);
    LcCodes codes = lc_codes(stored);
    LinearResult& to = result.linears[i] = {};
    to.format = formats[i];
    to.bias = std::move(stored.bias);
    to.master = latents_of(codes, formats[i], original ? &original->linears[i].master : nullptr);
    to.lc = std::move(codes.lc);
  }
  return result;
}

}  // namespace bbb::models
