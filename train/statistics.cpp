#include "train/statistics.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "models/llama.h"
#include "quant/host.h"
#include "train/recipe.h"
#include "train/sample_order.h"

namespace bbb::train {
namespace {

using autograd::Tape;
using autograd::TapeMode;
using autograd::Var;
using engine::Backend;
using engine::DType;
using engine::Tensor;
using models::LayerStatistics;
using models::LinearShape;
using models::LlamaConfig;
using models::Site;

class Collector {
 public:
  Collector(Backend& backend, const models::Checkpoint& source, const data::Windows& windows,
            const TrainConfig& config)
      : backend_(backend),
        source_(source),
        config_(config),
        model_(source.config()),
        windows_(std::min(config.samples, kStatisticsWindows)),
        own_windows_(config.comm->share(windows_)) {
    for (const LinearShape& linear : models::block_linears(model_))
      sites_[static_cast<size_t>(linear.site)] = linear;
    const models::Llama model(backend, source, models::HeadRounding::BFloat16);
    inv_freq_ = model.inv_freq();
    const int64_t rows = own_windows_ * config.seq_len;
    const Tensor ids = backend.empty({rows}, DType::I32);
    if (backend.computes())
      backend.upload(
          ids, own_windows(windows.ids.data(), windows_, config.seq_len, *config.comm).data());
    stream_ = backend.empty({rows, model_.d_model}, backend.act());
    backend.embed(stream_, ids, model.embedding());
    if (config.pack == Packing::Stream) return;
    first_key_ = backend.empty({own_windows_, config.seq_len}, DType::I32);
    if (backend.computes())
      backend.upload(
          first_key_,
          own_windows(windows.first_key.data(), windows_, config.seq_len, *config.comm).data());
  }

  // The statistics of a layer in each of its layouts.
  std::vector<LayerStatistics> layer(int64_t layer, const models::LayerResult& original) {
    models::LlamaBlock block(backend_, model_, layer, inv_freq_);
    block.set_float(original);

    SiteTensors moments;
    for (size_t site = 0; site < sites_.size(); ++site)
      moments[site] = backend_.zeros({Backend::kMoments, sites_[site].k}, DType::F64);
    pass(block, Advance::No, [&](Site site, const Tensor& x) {
      backend_.channel_moments(moments[static_cast<size_t>(site)], x);
    });
    std::vector<LayerStatistics> layouts;
    for (size_t site = 0; site < sites_.size(); ++site) {
      const std::vector<SiteLayout> choices =
          Recipe::layouts(config_, model_, layer, sites_[site].k);
      layouts.resize(choices.size());
      const auto inputs = models::ChannelStatistics::from_moments(sums(moments[site]), tokens());
      models::WeightStatistics weights;
      if (backend_.computes() && choices.back().split > 0)
        weights = models::weight_statistics(model_, original, sites_[site].site);
      for (size_t i = 0; i < choices.size(); ++i)
        choose_channels(layouts[i][site], choices[i], inputs, weights);
    }
    moments = {};

    // The operands in 16 bits: gathered and rotated alone.
    struct Energies {
      Tensor moments;
      std::optional<engine::OperandSpec> operand;  // empty: the input itself
    };
    std::array<std::vector<Energies>, models::kSites> energies;
    for (size_t site = 0; site < sites_.size(); ++site)
      for (const LayerStatistics& layout : layouts) {
        const quant::LinearFormat format = operand_format(sites_[site], layout[site]);
        Energies& of = energies[site].emplace_back();
        of.moments = backend_.zeros({Backend::kMoments, format.stored_k()}, DType::F64);
        if (!format.exact_input()) of.operand = engine::upload_operand(backend_, format);
      }
    const bool chooses = config_.split_side == SplitSideChoice::Auto && !config_.ocs_ratio.empty();
    pass(block, chooses ? Advance::No : Advance::Yes, [&](Site site, const Tensor& x) {
      for (const Energies& of : energies[static_cast<size_t>(site)]) {
        Tensor operand = x;
        if (of.operand) {
          operand = backend_.empty({x.dim(0), of.operand->view.stored_k}, backend_.act());
          backend_.operand({.x = operand, .clipped = {}, .codes = {}, .zeros = {}, .scales = {}}, x,
                           *of.operand);
        }
        backend_.channel_moments(of.moments, operand);
      }
    });
    for (size_t i = 0; i < layouts.size(); ++i)
      for (size_t site = 0; site < sites_.size(); ++site) {
        const std::vector<double> values = sums(energies[site][i].moments);
        const size_t columns = values.size() / Backend::kMoments;
        for (size_t p = 0; p < columns; ++p)
          layouts[i][site].energy.push_back(
              static_cast<float>(values[columns + p] / static_cast<double>(tokens())));
      }
    if (chooses) choose_sides(block, original, layouts[0]);
    return layouts;
  }

  // E[x x^T] of every site, times the number of tokens, (K, K).
  std::array<std::vector<float>, models::kSites> second_moments(
      int64_t layer, const models::LayerResult& original) {
    models::LlamaBlock block(backend_, model_, layer, inv_freq_);
    block.set_float(original);
    SiteTensors sums;
    for (const LinearShape& linear : models::block_linears(model_))
      sums[static_cast<size_t>(linear.site)] =
          backend_.zeros({linear.k, linear.k}, backend_.real());
    pass(block, Advance::Yes, [&](Site site, const Tensor& x) {
      backend_.gemm_tn(sums[static_cast<size_t>(site)], x, x, engine::Write::Add);
    });
    std::array<std::vector<float>, models::kSites> moments;
    if (!backend_.computes()) return moments;
    for (const LinearShape& linear : models::block_linears(model_)) {
      const auto site = static_cast<size_t>(linear.site);
      if (!moments[site].empty()) continue;  // its first linear names it
      config_.comm->all_reduce(sums[site], engine::Reduce::Sum);
      moments[site] = models::download_floats(backend_, sums[site]);
      const bool finite =
          std::ranges::all_of(moments[site], [](float x) { return std::isfinite(x); });
      BBB_CHECK(finite, models::layer_name(layer, linear.name),
                ": its inputs on the calibration text are not finite");
    }
    return moments;
  }

 private:
  using SiteTensors = std::array<Tensor, models::kSites>;
  enum class Advance { No, Yes };

  void choose_channels(models::SiteStatistics& site, const SiteLayout& layout,
                       const models::ChannelStatistics& inputs,
                       const models::WeightStatistics& weights) const {
    site.kurtosis = static_cast<float>(inputs.site_kurtosis);  // as it is stored
    site.outliers = models::choose_outliers(inputs, layout.outliers);
    if (backend_.computes() && layout.split > 0) {
      site.split =
          models::choose_split(inputs, weights, config_.ocs_metric, layout.split, site.outliers);
    } else {  // a rehearsal needs their number alone
      site.split.resize(static_cast<size_t>(layout.split));
      std::iota(site.split.begin(), site.split.end(), static_cast<int32_t>(layout.outliers));
    }
    site.side = config_.split_side == SplitSideChoice::Activation ? quant::SplitSide::Activation
                                                                  : quant::SplitSide::Weight;
  }

  quant::LinearFormat operand_format(const LinearShape& linear,
                                     const models::SiteStatistics& site) const {
    quant::LinearFormat format{.n = linear.n, .k = linear.k};
    format.weight.group = config_.group;
    format.input.hadamard = config_.rotate == Rotate::Group;
    format.order = std::make_shared<quant::ChannelOrder>(linear.k, config_.group, site.outliers,
                                                         site.split, site.side);
    return format;
  }

  // Runs this rank's windows through the block. tap(site, x) gets x as a matrix (M, K).
  // Advance::Yes: the stream becomes that behind the block.
  void pass(models::LlamaBlock& block, Advance advance,
            const std::function<void(Site, const Tensor&)>& tap) {
    block.set_tap([&](Site site, const Tensor& x) {
      tap(site, x.view({x.numel() / x.dim(-1), x.dim(-1)}));
    });
    for (int64_t begin = 0; begin < own_windows_; begin += own_batch(config_)) {
      const int64_t count = std::min(own_batch(config_), own_windows_ - begin);
      const Tensor rows = stream_.rows(begin * config_.seq_len, count * config_.seq_len);
      Tape tape(backend_, TapeMode::Inference);
      const Var x(rows.view({count, config_.seq_len, model_.d_model}));
      const Tensor first_key = first_key_.defined() ? first_key_.rows(begin, count) : Tensor();
      const Tensor y = block.forward(tape, x, nullptr, models::Recompute::None, first_key).value();
      if (advance == Advance::Yes) backend_.copy(rows, y.view(rows.shape()));
    }
    block.set_tap(nullptr);
  }

  // A site's linears at the widths of the result, split on one side.
  struct Trial {
    engine::OperandSpec operand;
    std::vector<Tensor> weights, scales;  // act (N, K') and real (1) of each linear
    Tensor error;                         // real (1): summed squared differences of outputs
  };

  // Each site takes the side whose quantized outputs are closer to the full-precision ones.
  void choose_sides(models::LlamaBlock& block, const models::LayerResult& original,
                    LayerStatistics& statistics) {
    const std::vector<LinearShape> shapes = models::block_linears(model_);
    constexpr quant::SplitSide kSides[] = {quant::SplitSide::Weight, quant::SplitSide::Activation};
    std::array<std::array<Trial, 2>, models::kSites> trials;
    std::array<std::vector<Tensor>, models::kSites> exact;  // act (N, K) of each linear
    for (size_t i = 0; i < shapes.size(); ++i) {
      const auto site = static_cast<size_t>(shapes[i].site);
      exact[site].push_back(models::upload_as(backend_, original.linears[i].master,
                                              {shapes[i].n, shapes[i].k}, backend_.act()));
      for (size_t side = 0; side < 2; ++side)
        add_linear(trials[site][side], original.linears[i], shapes[i], statistics[site],
                   kSides[side]);
    }
    pass(block, Advance::Yes, [&](Site site, const Tensor& x) {
      const auto at = static_cast<size_t>(site);
      for (Trial& trial : trials[at]) {
        const Tensor operand =
            backend_.empty({x.dim(0), trial.operand.view.stored_k}, backend_.act());
        backend_.operand({.x = operand, .clipped = {}, .codes = {}, .zeros = {}, .scales = {}}, x,
                         trial.operand);
        for (size_t i = 0; i < exact[at].size(); ++i) {
          const engine::Shape shape{x.dim(0), exact[at][i].dim(0)};
          const Tensor y = backend_.empty(shape, backend_.act()),
                       quantized = backend_.empty(shape, backend_.act());
          backend_.gemm_nt(y, x, exact[at][i], Tensor(), Tensor());
          backend_.gemm_nt(quantized, operand, trial.weights[i], trial.scales[i], Tensor());
          const Tensor loss = backend_.empty({1}, backend_.real());
          backend_.mse(loss, Tensor(), quantized, y);
          backend_.sum(trial.error, loss, static_cast<double>(y.numel()), engine::Write::Add);
        }
      }
    });
    for (size_t site = 0; site < trials.size(); ++site) {
      std::vector<double> errors;
      for (const Trial& trial : trials[site])
        errors.push_back(models::download_floats(backend_, trial.error)[0]);
      errors = config_.comm->sum(errors);
      if (errors[1] >= errors[0]) continue;
      statistics[site].energy = energy_of(statistics[site], quant::SplitSide::Activation);
      statistics[site].side = quant::SplitSide::Activation;
    }
  }

  // The energies with splits on this side: the activation of a pair is halved or not.
  static std::vector<float> energy_of(const models::SiteStatistics& site, quant::SplitSide side) {
    std::vector<float> energy = site.energy;
    if (side == site.side) return energy;
    const float factor = side == quant::SplitSide::Activation ? 0.25f : 4.0f;
    for (size_t i = 0; i < 2 * site.split.size(); ++i) energy[site.outliers.size() + i] *= factor;
    return energy;
  }

  void add_linear(Trial& trial, const models::LinearResult& original, const LinearShape& shape,
                  const models::SiteStatistics& site, quant::SplitSide side) {
    quant::LinearFormat format = operand_format(shape, site);
    format.order = std::make_shared<quant::ChannelOrder>(shape.k, config_.group, site.outliers,
                                                         site.split, side);
    // Of several precisions, the lowest: at 8 bits both sides are nearly exact.
    const int bits = config_.any_precision.empty() ? config_.bits : config_.any_precision.back();
    const quant::WeightRule rule = Recipe::weight_rule(config_);
    format.weight.bits = bits;
    format.weight.levels = rule.levels;
    format.input.bits =
        Recipe::activation_bits(config_, shape.site, site.kurtosis, config_.act_bits);
    format.input.outliers = static_cast<int>(site.outliers.size());
    format.input.range = config_.act_range;
    const models::LinearResult start =
        models::start_stage(original, format, energy_of(site, side), config_.range, 0);
    if (trial.weights.empty()) {
      trial.operand = engine::upload_operand(backend_, format);
      trial.error = backend_.zeros({1}, backend_.real());
    }
    std::vector<float> wq;
    float s = 1;
    if (backend_.computes()) {
      const auto count = static_cast<size_t>(format.n * format.stored_k());
      std::vector<uint8_t> e(count / static_cast<size_t>(config_.group)), z(e.size()),
          clipped(count / 8);
      wq.resize(count);
      const uint8_t* ratios = start.ratios.empty() ? nullptr : start.ratios.data();
      const quant::host::Rows rows{0, format.n};
      s = quant::master_scale_of(quant::raw_scale(
          quant::host::group_range_max(start.master.data(), ratios, rows, format.stored_k(),
                                       config_.group, rule.levels),
          bits, rule.levels));
      quant::host::fake_quant(wq.data(), e.data(), z.data(), clipped.data(), start.master.data(),
                              ratios, rows, format.stored_k(), s, {bits, config_.group},
                              engine::Rounding::Nearest, rule);
    }
    trial.weights.push_back(
        models::upload_as(backend_, wq, {format.n, format.stored_k()}, backend_.act()));
    trial.scales.push_back(models::upload_as(backend_, {s}, {1}, backend_.real()));
  }

  // Moments over all ranks: sums and, in the last row, maxima.
  std::vector<double> sums(const Tensor& moments) const {
    std::vector<double> values(static_cast<size_t>(moments.numel()));
    backend_.download(values.data(), moments);
    const size_t maxima = values.size() / Backend::kMoments * (Backend::kMoments - 1);
    std::vector<double> all(values.size());
    for (const std::vector<double>& part : config_.comm->gather(values))
      for (size_t i = 0; i < all.size(); ++i)
        all[i] = i < maxima ? all[i] + part[i] : std::max(all[i], part[i]);
    return all;
  }

  int64_t tokens() const { return windows_ * config_.seq_len; }

  Backend& backend_;
  const models::Checkpoint& source_;
  const TrainConfig& config_;
  const LlamaConfig& model_;
  const int64_t windows_, own_windows_;            // of all ranks, and of this one
  std::array<LinearShape, models::kSites> sites_;  // one linear of each
  Tensor inv_freq_, stream_;
  Tensor first_key_;  // of the windows, if they hold documents apart
};

}  // namespace

void collect_layouts(Backend& backend, const models::Checkpoint& source,
                     const data::Windows& windows, const TrainConfig& config,
                     const AddLayouts& add) {
  Collector collector(backend, source, windows, config);
  for (int64_t layer = 0; layer < source.config().layers; ++layer) {
    const models::LayerResult original = models::full_precision(source, layer);
    add(layer, original, collector.layer(layer, original));
  }
}

std::vector<LayerStatistics> collect_statistics(
    Backend& backend, const models::Checkpoint& source, const data::Windows& windows,
    const TrainConfig& config, const std::function<void(int64_t layers)>& progress) {
  BBB_ASSERT(!allocates(config));
  std::vector<LayerStatistics> layers;
  collect_layouts(backend, source, windows, config,
                  [&](int64_t layer, const models::LayerResult&, const auto& layouts) {
                    layers.push_back(layouts[0]);
                    progress(layer + 1);
                  });
  return layers;
}

void collect_lc_starts(Backend& backend, const models::Checkpoint& source,
                       const data::Windows& windows, const TrainConfig& config,
                       const Recipe& recipe,
                       const std::function<void(int64_t layer, models::LayerResult start)>& add) {
  Collector collector(backend, source, windows, config);
  for (int64_t layer = 0; layer < source.config().layers; ++layer) {
    const models::LayerResult original = models::full_precision(source, layer);
    const auto moments = collector.second_moments(layer, original);
    if (config.comm->first())
      add(layer, models::lc_layer_start(source.config(), original, recipe.result_formats(layer),
                                        moments, recipe.lc_start(layer)));
  }
}

void rehearse_statistics(engine::CountingBackend& backend, const models::Checkpoint& source,
                         const TrainConfig& config) {
  Collector collector(backend, source, data::Windows(), config);
  if (Recipe::needs_starts(config)) {
    collector.second_moments(0, models::full_precision(source, 0));
    return;
  }
  const int64_t widest = Recipe::widest_layer(config, source.config());
  collector.layer(widest, models::full_precision(source, widest));
}

}  // namespace bbb::train
