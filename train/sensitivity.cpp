#include "train/sensitivity.h"

#include <algorithm>
#include <cmath>

#include "autograd/ops.h"
#include "quant/check.h"

namespace bbb::train {

using autograd::Tape;
using autograd::TapeMode;
using autograd::Var;
using engine::DType;
using engine::Tensor;
using models::LinearShape;

Sensitivity::Sensitivity(engine::Backend& backend, const models::Checkpoint& source,
                         const data::Windows& windows, const TrainConfig& config)
    : backend_(backend),
      config_(config),
      model_(backend, source, models::HeadRounding::BFloat16),
      windows_(std::min(config.samples,
                        backend.device() == engine::DeviceType::Cuda ? kWindows : kWindowsOfCpu)),
      tokens_(windows_ * config.seq_len) {
  const int64_t streams = 1 + source.config().layers * models::kSites;
  const Tensor ids = backend.empty({tokens_}, DType::I32);
  if (backend.computes()) backend.upload(ids, windows.ids.data());
  if (config.pack == Packing::Documents) {
    first_key_ = backend.empty({windows_, config.seq_len}, DType::I32);
    if (backend.computes()) backend.upload(first_key_, windows.first_key.data());
  }
  streams_ = backend.empty({streams * tokens_, source.config().d_model}, backend.act());
  backend.embed(stream(0), ids, model_.embedding());
}

void Sensitivity::pass(models::LlamaBlock& block, const Tensor& out, const Tensor& in) {
  const int64_t width = in.dim(1), count = in.dim(0) / config_.seq_len;
  // The rows are those of the windows, once or several times; first keys are for one time.
  for (int64_t begin = 0, windows; begin < count; begin += windows) {
    const int64_t window = begin % windows_;
    windows =
        std::min(own_batch(config_), first_key_.defined() ? windows_ - window : count - begin);
    const auto rows = [&](const Tensor& stream) {
      return stream.rows(begin * config_.seq_len, windows * config_.seq_len);
    };
    Tape tape(backend_, TapeMode::Inference);
    const Var x(rows(in).view({windows, config_.seq_len, width}));
    const Tensor first_key = first_key_.defined() ? first_key_.rows(window, windows) : Tensor();
    const Tensor y = block.forward(tape, x, nullptr, models::Recompute::None, first_key).value();
    backend_.copy(rows(out), y.view({windows * config_.seq_len, width}));
  }
}

void Sensitivity::add_layer(int64_t layer, const models::LayerResult& original,
                            const std::vector<std::vector<float>>& rounded) {
  const std::vector<LinearShape> shapes = models::block_linears(model_.config());
  models::LlamaBlock block(backend_, model_.config(), layer, model_.inv_freq());
  block.set_float(original);
  const int64_t first = 1 + layer * models::kSites;  // of this layer's streams
  if (layer > 0) {
    const Tensor before = streams_.rows(tokens_, (first - 1) * tokens_);
    pass(block, before, before);
  }
  for (int64_t site = 0; site < models::kSites; ++site) {
    const auto set = [&](const auto& weight_of) {
      for (size_t i = 0; i < shapes.size(); ++i)
        if (shapes[i].site == site)
          block.linears()[i]->set_float(models::upload_as(
              backend_, weight_of(i), {shapes[i].n, shapes[i].k}, backend_.act()));
    };
    set([&](size_t i) -> const std::vector<float>& { return rounded[i]; });
    pass(block, stream(first + site), stream(0));
    set([&](size_t i) -> const std::vector<float>& { return original.linears[i].master; });
  }
  pass(block, stream(0), stream(0));
}

std::vector<double> Sensitivity::divergences() {
  Tape tape(backend_, TapeMode::Inference);
  const auto normed = [&](int64_t i) {
    return autograd::rms_norm(tape, Var(stream(i)), model_.norm().var(), model_.config().rms_eps);
  };
  const Tensor teacher = normed(0).value();
  const Tensor targets = backend_.zeros({tokens_}, DType::I32);  // every row counts
  const auto chunks = models::head_chunks(models::head_budget(backend_), tokens_,
                                          model_.config().vocab, backend_.act());
  std::vector<double> divergences;
  for (int64_t i = 1; i * tokens_ < streams_.dim(0); ++i) {
    const Var loss = autograd::head_loss(tape, autograd::LossKind::Kl, normed(i), model_.head_var(),
                                         targets, {teacher, model_.head()},
                                         1.0 / static_cast<double>(tokens_), chunks, Tensor());
    const int64_t site = i - 1;
    divergences.push_back(models::download_floats(backend_, loss.value())[0]);
    BBB_CHECK(std::isfinite(divergences.back()), "layer ", site / models::kSites,
              ": the model's outputs on the calibration text are not finite");
  }
  return divergences;
}

void rehearse_sensitivity(engine::CountingBackend& backend, const models::Checkpoint& source,
                          const TrainConfig& config) {
  Sensitivity sensitivity(backend, source, data::Windows(), config);
  // The last layer passes the most windows at once.
  const int64_t last = source.config().layers - 1;
  const models::LayerResult original = models::full_precision(source, last);
  sensitivity.add_layer(last, original, std::vector<std::vector<float>>(original.linears.size()));
  sensitivity.divergences();
}

}  // namespace bbb::train
