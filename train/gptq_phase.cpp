#include "train/gptq_phase.h"

#include <algorithm>
#include <optional>

#include "models/ldlq.h"
#include "models/llama.h"
#include "train/block_times.h"
#include "train/dry_run.h"
#include "train/stream_set.h"

namespace bbb::train {
namespace {

using autograd::Tape;
using autograd::TapeMode;
using autograd::Var;
using models::LayerResult;
using models::LinearResult;
using models::LinearShape;
using models::LlamaBlock;
using models::LlamaConfig;
using models::Site;

class GptqPhase {
 public:
  GptqPhase(Backend& backend, const Checkpoint& source, const data::Windows& windows,
            const TrainConfig& config, const Recipe& recipe, const RunDirectory& run,
            const Observer& observer, const StreamPlan& plan)
      : backend_(backend),
        source_(source),
        config_(config),
        recipe_(recipe),
        run_(run),
        observer_(observer),
        model_(source.config()),
        shapes_(models::block_linears(model_)),
        streams_(backend, model_, config, plan) {
    const models::Llama model(backend, source, models::HeadRounding::BFloat16);
    inv_freq_ = model.inv_freq();
    streams_.embed(model.embedding(), windows);
  }

  void run(int64_t finished) {
    recompute_stream(finished);
    engine::Progress progress = observer_.progress("gptq", model_.layers * kGptqPasses);
    std::vector<BlockTime> times;
    for (int64_t layer = finished; layer < model_.layers; ++layer) {
      const BlockTime time = quantize(layer, [&](int64_t passes) {
        backend_.synchronize();  // otherwise progress would run ahead of the device
        progress.set(layer * kGptqPasses + passes,
                     cat("block ", layer + 1, "/", model_.layers, " ", recipe_.stage_name(0)));
      });
      if (layer + 1 < model_.layers) times.push_back(time);
      if (observer_.after_block) observer_.after_block(layer);
    }
    if (!observer_.quiet) report(times, config_, model_.layers);
  }

  void rehearse() {
    const int64_t layer = Recipe::widest_layer(config_, model_);
    LlamaBlock block(backend_, model_, layer, inv_freq_);
    LayerResult result = start_of(layer);
    block.set_stored(result);
    for (int site = 0; site < models::kSites; ++site)
      round_site(block, result, static_cast<Site>(site));
    advance(block);
  }

 private:
  // Writes the block's file and its lines of the log. passed(n): n passes of the block are done.
  BlockTime quantize(int64_t layer, const std::function<void(int64_t passes)>& passed) {
    BlockTime time;
    time.stages.resize(1);
    LlamaBlock block(backend_, model_, layer, inv_freq_);
    LayerResult result;
    timed(backend_, time.weights_s, [&] {
      result = start_of(layer);
      block.set_stored(result);
    });
    Json line{{"phase", "gptq"}, {"block", layer}, {"stage", recipe_.stage_name(0)}};
    for (int site = 0; site < models::kSites; ++site) {
      timed(backend_, time.stages[0].train_s,
            [&] { line["errors"].push_back(round_site(block, result, static_cast<Site>(site))); });
      passed(site + 1);
    }
    run_.append_log({line});
    timed(backend_, time.weights_s,
          [&] { run_.write_stage(layer, 0, recipe_, model_, result, {}); });
    if (layer + 1 == model_.layers) {
      passed(kGptqPasses);
      return time;
    }
    timed(backend_, time.streams_s, [&] { advance(block); });
    passed(kGptqPasses);
    run_.append_log({log_line(time, layer, config_)});
    return time;
  }

  LayerResult start_of(int64_t layer) const {
    return recipe_.start(layer, models::full_precision(source_, layer),
                         recipe_.stage_formats(layer, 0));
  }

  // Rounds the linears of a site, in `result` and in the block. Returns their summed squared error
  // of the outputs, a token, with the damping's part.
  double round_site(LlamaBlock& block, LayerResult& result, Site site) {
    const std::vector<models::QuantLinear*> linears = block.linears();
    std::optional<models::HessianFactor> factor;
    double error = 0;
    for (size_t i = 0; i < shapes_.size(); ++i) {
      if (shapes_[i].site != site) continue;
      LinearResult& linear = result.linears[i];
      const int64_t k = linear.format.stored_k();
      if (!factor) {
        const std::vector<float> hessian = hessian_of(block, site, k);
        factor.emplace();
        if (backend_.computes())
          factor = models::factorize_hessian(hessian, k, models::kHessianDamping, pool_,
                                             linears[i]->name());
      }
      std::vector<float> levels;
      if (backend_.computes()) {
        error += models::round_with_feedback(linear, *factor, pool_);
        levels = linear.levels();
      }
      linears[i]->set_float(
          models::upload_as(backend_, levels, {linear.format.n, k}, backend_.act()), linear.format);
    }
    return error / static_cast<double>(config_.samples * config_.seq_len);
  }

  // sum x x^T over all rows of the site's operand, of all ranks, (K', K').
  std::vector<float> hessian_of(LlamaBlock& block, Site site, int64_t k) {
    const Tensor hessian = backend_.zeros({k, k}, backend_.real());
    block.set_tap([&](Site at, const Tensor& x) {
      if (at != site) return;
      const Tensor rows = x.view({x.numel() / k, k});
      backend_.gemm_tn(hessian, rows, rows, engine::Write::Add);
    });
    Reader reader = streams_.in_order(streams_.full(), 0, 0, streams_.rows());
    for (int64_t row = 0; row < streams_.rows(); row += streams_.batch())
      forward(block, streams_.as_windows(reader.next()),
              streams_.first_key(row, std::min(streams_.batch(), streams_.rows() - row)));
    block.set_tap(nullptr);
    config_.comm->all_reduce(hessian, engine::Reduce::Sum);
    return backend_.computes() ? models::download_floats(backend_, hessian) : std::vector<float>();
  }

  Tensor forward(LlamaBlock& block, const Tensor& x, const Tensor& first_key) {
    Tape tape(backend_, TapeMode::Inference);
    return block.forward(tape, Var(x), nullptr, models::Recompute::None, first_key).value();
  }

  void advance(LlamaBlock& block) {
    streams_.rewrite(
        streams_.full(), streams_.full(),
        [&](const Tensor& x, const Tensor& first_key) { return forward(block, x, first_key); });
  }

  void recompute_stream(int64_t blocks) {
    engine::Progress progress =
        observer_.progress("resuming", blocks, engine::Progress::kPatience_s);
    for (int64_t layer = 0; layer < blocks; ++layer) {
      LlamaBlock block(backend_, model_, layer, inv_freq_);
      block.set_stored(run_.stage_result(layer, 0, recipe_, model_));
      advance(block);
      backend_.synchronize();
      progress.set(layer + 1, cat("block ", layer + 1, "/", blocks));
    }
  }

  Backend& backend_;
  const Checkpoint& source_;
  const TrainConfig& config_;
  const Recipe& recipe_;
  const RunDirectory& run_;
  const Observer& observer_;
  const LlamaConfig& model_;
  const std::vector<LinearShape> shapes_;
  StreamSet streams_;
  Tensor inv_freq_;
  engine::ThreadPool pool_{0};
};

}  // namespace

Rehearsal rehearse_gptq(engine::CountingBackend& backend, const Checkpoint& source,
                        const TrainConfig& config, const StreamPlan& streams) {
  DryRun<GptqPhase> dry(backend, source, blank_windows(config), without_comm(config),
                        {.quiet = true}, streams);
  dry.phase.rehearse();
  return {};
}

double time_gptq_block(Backend& backend, const Checkpoint& source, const data::Windows& windows,
                       const TrainConfig& config, const StreamPlan& streams) {
  DryRun<GptqPhase> dry(backend, source, windows, config, {.quiet = true}, streams);
  double seconds = 0;
  timed(backend, seconds, [&] { dry.phase.rehearse(); });
  return seconds;
}

void quantize_blocks(Backend& backend, const Checkpoint& source, const data::Windows& windows,
                     const TrainConfig& config, const Recipe& recipe, const StreamPlan& streams,
                     const RunDirectory& run, const Observer& observer) {
  const int64_t finished = run.finished_stages(config, source.config().layers);
  run.resume_blocks(config, finished);  // cuts the log
  GptqPhase(backend, source, windows, config, recipe, run, observer, streams).run(finished);
}

}  // namespace bbb::train
