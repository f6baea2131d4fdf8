#include "train/statistics.h"

#include <algorithm>

#include "models/llama.h"
#include "train/recipe.h"

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
        tokens_(windows_ * config.seq_len) {
    const models::Llama model(backend, source, models::HeadRounding::BFloat16);
    inv_freq_ = model.inv_freq();
    const Tensor ids = backend.empty({tokens_}, DType::I32);
    if (backend.computes()) backend.upload(ids, windows.ids.data());
    stream_ = backend.empty({tokens_, model_.d_model}, backend.act());
    backend.embed(stream_, ids, model.embedding());
  }

  LayerStatistics layer(int64_t layer) {
    const models::LayerResult original = models::full_precision(source_, layer);
    models::LlamaBlock block(backend_, model_, layer, inv_freq_);
    block.set_float(original);
    LayerStatistics statistics;

    for (const LinearShape& linear : models::block_linears(model_))
      moments_[static_cast<size_t>(linear.site)] =
          backend_.empty({Backend::kMoments, linear.k}, DType::F64);
    pass(block, Advance::No, [this](Site site, const Tensor& x) {
      backend_.channel_moments(moments_[static_cast<size_t>(site)], x);
    });
    for (const LinearShape& linear : models::block_linears(model_)) {
      models::SiteStatistics& site = statistics[static_cast<size_t>(linear.site)];
      const auto inputs = models::ChannelStatistics::from_moments(sums(linear.site), tokens_);
      site.kurtosis = inputs.site_kurtosis;
      site.outliers = models::choose_outliers(inputs, config_.act_outliers);
      if (!config_.ocs_ratio.empty() && backend_.computes())
        site.split = models::choose_split(
            inputs, models::weight_statistics(model_, original, linear.site), config_.ocs_metric,
            Recipe::split_count(config_, model_, layer, linear.k), site.outliers);
      site.side = config_.split_side == SplitSideChoice::Activation
                      ? quant::SplitSide::Activation
                      : quant::SplitSide::Weight;
    }

    // The operands in 16 bits: gathered and rotated alone.
    std::array<std::optional<engine::OperandSpec>, models::kSites> operands;
    for (const LinearShape& linear : models::block_linears(model_)) {
      const auto site = static_cast<size_t>(linear.site);
      const quant::LinearFormat format = operand_format(linear, statistics[site]);
      moments_[site] = backend_.empty({Backend::kMoments, format.stored_k()}, DType::F64);
      if (!format.exact_input()) operands[site] = engine::upload_operand(backend_, format);
    }
    pass(block, Advance::Yes, [&](Site site, const Tensor& x) {
      const auto at = static_cast<size_t>(site);
      Tensor operand = x;
      if (operands[at]) {
        operand = backend_.empty({x.dim(0), operands[at]->view.stored_k}, backend_.act());
        backend_.operand({.x = operand, .clipped = {}, .codes = {}, .zeros = {}, .scales = {}}, x,
                         *operands[at]);
      }
      backend_.channel_moments(moments_[at], operand);
    });
    for (size_t site = 0; site < statistics.size(); ++site) {
      const std::vector<double> moments = sums(static_cast<Site>(site));
      const size_t columns = moments.size() / Backend::kMoments;
      for (size_t p = 0; p < columns; ++p)
        statistics[site].energy.push_back(
            static_cast<float>(moments[columns + p] / static_cast<double>(tokens_)));
    }
    return statistics;
  }

 private:
  enum class Advance { No, Yes };

  quant::LinearFormat operand_format(const LinearShape& linear,
                                     const models::SiteStatistics& site) const {
    quant::LinearFormat format{.n = linear.n, .k = linear.k};
    format.weight.group = config_.group;
    format.input.hadamard = config_.rotate == Rotate::Group;
    format.order = std::make_shared<quant::ChannelOrder>(linear.k, config_.group, site.outliers,
                                                         site.split, site.side);
    return format;
  }

  // Runs all windows through the block. tap(site, x) gets x as a matrix (M, K).
  void pass(models::LlamaBlock& block, Advance advance,
            const std::function<void(Site, const Tensor&)>& tap) {
    for (const Tensor& moments : moments_) backend_.zero(moments);
    block.set_tap([&](Site site, const Tensor& x) {
      tap(site, x.view({x.numel() / x.dim(-1), x.dim(-1)}));
    });
    for (int64_t begin = 0; begin < windows_; begin += config_.batch) {
      const int64_t count = std::min(config_.batch, windows_ - begin);
      const Tensor rows = stream_.rows(begin * config_.seq_len, count * config_.seq_len);
      Tape tape(backend_, TapeMode::Inference);
      const Var x(rows.view({count, config_.seq_len, model_.d_model}));
      const Var y = block.forward(tape, x, nullptr, models::Recompute::None);
      if (advance == Advance::Yes) backend_.copy(rows, y.value().view(rows.shape()));
    }
    block.set_tap(nullptr);
  }

  std::vector<double> sums(Site site) const {
    const Tensor& moments = moments_[static_cast<size_t>(site)];
    std::vector<double> values(static_cast<size_t>(moments.numel()));
    backend_.download(values.data(), moments);
    return values;
  }

  Backend& backend_;
  const models::Checkpoint& source_;
  const TrainConfig& config_;
  const LlamaConfig& model_;
  const int64_t windows_, tokens_;
  Tensor inv_freq_, stream_;
  std::array<Tensor, models::kSites> moments_;  // of the current pass
};

}  // namespace

std::vector<LayerStatistics> collect_statistics(
    Backend& backend, const models::Checkpoint& source, const data::Windows& windows,
    const TrainConfig& config, const std::function<void(int64_t layers)>& progress) {
  Collector collector(backend, source, windows, config);
  std::vector<LayerStatistics> layers;
  for (int64_t layer = 0; layer < source.config().layers; ++layer) {
    layers.push_back(collector.layer(layer));
    progress(layer + 1);
  }
  return layers;
}

void rehearse_statistics(engine::CountingBackend& backend, const models::Checkpoint& source,
                         const TrainConfig& config) {
  Collector(backend, source, data::Windows(), config).layer(0);
}

}  // namespace bbb::train
