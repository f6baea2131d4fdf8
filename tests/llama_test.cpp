// The whole model at a tiny size: prefill and decode against one forward, perplexity against a
// softmax written out, recomputation, saving and restoring masters.
#include "models/llama.h"

#include <catch2/catch.hpp>
#include <cmath>

#include "tests/formats.h"
#include "tests/support.h"
#include "tests/tiny_model.h"

using namespace bbb;
using namespace bbb::tests;
using autograd::Tape;
using autograd::TapeMode;
using autograd::Var;
using models::KvCache;
using models::Llama;
using models::LlamaConfig;

namespace {

struct TinyModel {
  TempDir directory;
  std::unique_ptr<models::Checkpoint> source;
  std::unique_ptr<Llama> model;

  TinyModel(Backend& device, const LlamaConfig& config) {
    write_tiny_model(directory.path(), config, 1);
    source = models::open_checkpoint(directory.path());
    model = std::make_unique<Llama>(device, *source, models::HeadRounding::None);
    model->load_blocks(*source);
  }
};

// Activations are rounded to act about ten times per layer, in an order that depends on T.
double forward_tolerance(Backend& device) {
  return device.act() == DType::BF16 ? 6 * epsilon_of(DType::BF16) : 64 * epsilon_of(DType::F32);
}

// The mean loss of a window's predicted tokens.
double window_nll(const std::vector<double>& logits, const std::vector<int32_t>& window,
                  int64_t vocab) {
  double sum = 0;
  for (size_t t = 0; t + 1 < window.size(); ++t) {
    const double* row = logits.data() + static_cast<int64_t>(t) * vocab;
    double total = 0;
    for (int64_t v = 0; v < vocab; ++v) total += std::exp(row[v]);
    sum += std::log(total) - row[window[t + 1]];
  }
  return sum / static_cast<double>(window.size() - 1);
}

}  // namespace

TEST_CASE("llama: T tokens at once equal prefill and T decode steps", "[llama]") {
  Backend& device = backend();
  std::vector<LlamaConfig> configs = other_families();
  for (const bool tied : {false, true})
    for (const int64_t window : {0, 5}) {
      LlamaConfig& config = configs.emplace_back(tiny_config());
      config.tied_head = tied;
      if (window) config.model_type = "mistral";
      config.sliding_window = window;
    }
  for (const LlamaConfig& config : configs) {
    CAPTURE(config.model_type, config.tied_head, config.sliding_window, config.mlp_bias);
    TinyModel tiny(device, config);
    REQUIRE(tiny.model->config().sliding_window == config.sliding_window);
    CHECK((tiny.model->head().raw() == tiny.model->embedding().raw()) == config.tied_head);

    const std::vector<int32_t> ids = random_tokens(2, 13, config.vocab);
    const std::vector<double> expected = logits_of(*tiny.model, ids);
    const int64_t prefill = 4;
    KvCache kv(device, config, 1, 16);
    std::vector<double> actual = logits_of(*tiny.model, {ids.begin(), ids.begin() + prefill}, &kv);
    const auto start = static_cast<int32_t>(prefill);
    device.upload(kv.start, &start);
    for (size_t t = prefill; t < ids.size(); ++t) {
      const std::vector<double> step = logits_of(*tiny.model, {ids[t]}, &kv);
      actual.insert(actual.end(), step.begin(), step.end());
      device.advance(kv.start);
    }
    CHECK(relative_error(actual, expected) < forward_tolerance(device));
  }
}

TEST_CASE("llama: with quantized keys and values, T tokens at once equal T decode steps",
          "[llama]") {
  Backend& device = backend();
  std::vector<LlamaConfig> configs = other_families();
  configs.push_back(tiny_config());
  configs.push_back(tiny_config());
  configs.back().model_type = "mistral";
  configs.back().sliding_window = 5;
  for (const LlamaConfig& config : configs) {
    CAPTURE(config.model_type, config.sliding_window, config.mlp_bias);
    TinyModel tiny(device, config);
    const std::vector<int32_t> ids = random_tokens(2, 13, config.vocab);
    const std::vector<double> exact = logits_of(*tiny.model, ids);
    double cost_at_8 = 0;
    for (const int bits : {8, 4}) {
      CAPTURE(bits);
      const quant::KvFormat format{bits};
      KvCache whole(device, config, 1, 13, format), kv(device, config, 1, 13, format);
      CHECK(whole.bytes_per_token() == 2 * config.layers * config.kv_heads * (64 * bits / 8 + 4));
      const std::vector<double> expected = logits_of(*tiny.model, ids, &whole);
      std::vector<double> actual;
      for (const int32_t id : ids) {
        const std::vector<double> step = logits_of(*tiny.model, {id}, &kv);
        actual.insert(actual.end(), step.begin(), step.end());
        device.advance(kv.start);
      }
      // Sums in another order flip codes that are near a threshold: on a CPU at most a few of
      // thousands, in bf16 a part of them. Quantizing itself moves every value.
      const double cost = relative_error(expected, exact);
      const double flips = device.act() == DType::BF16 ? 0.5 : 0.05;
      CAPTURE(cost);
      CHECK(relative_error(actual, expected) < forward_tolerance(device) + flips * cost);
      if (bits == 8) cost_at_8 = cost;
      if (device.act() != DType::BF16) CHECK(cost > 10 * forward_tolerance(device));
      if (bits == 4) CHECK(cost > 3 * cost_at_8);
    }
  }
}

TEST_CASE("llama: the device's logits against F64", "[llama]") {
  std::vector<LlamaConfig> configs = other_families();
  configs.push_back(tiny_config());
  configs.push_back(tiny_config());
  configs.back().rope_scaling = models::RopeScaling{.factor = 8, .original_max_position = 16};
  for (const LlamaConfig& config : configs) {
    CAPTURE(config.model_type, config.mlp_bias);
    TinyModel device(backend(), config), reference(oracle_f64(), config);
    const std::vector<int32_t> ids = random_tokens(3, 33, config.vocab);
    CHECK(relative_error(logits_of(*device.model, ids), logits_of(*reference.model, ids)) <
          forward_tolerance(backend()));
  }
}

TEST_CASE("llama: a sliding window hides old tokens, no window shows them", "[llama]") {
  Backend& device = backend();
  for (const int64_t window : {0, 3}) {
    LlamaConfig config = tiny_config();
    config.layers = 1;
    if (window) config.model_type = "mistral";
    config.sliding_window = window;
    TinyModel tiny(device, config);
    std::vector<int32_t> ids = random_tokens(4, 8, config.vocab);
    const std::vector<double> before = logits_of(*tiny.model, ids);
    ids[4] = (ids[4] + 1) % static_cast<int32_t>(config.vocab);
    const std::vector<double> after = logits_of(*tiny.model, ids);
    const auto row = [&](const std::vector<double>& logits, int64_t t) {
      return std::vector<double>(logits.begin() + t * config.vocab,
                                 logits.begin() + (t + 1) * config.vocab);
    };
    CHECK(row(before, 3) == row(after, 3));  // causal
    CHECK(row(before, 6) != row(after, 6));
    CHECK((row(before, 7) == row(after, 7)) == (window == 3));
  }
}

TEST_CASE("llama: perplexity of windows, against a softmax written out", "[llama]") {
  Backend& device = backend();
  const LlamaConfig config = tiny_config();
  TinyModel tiny(device, config);
  const int64_t count = 10, seq_len = 7;
  const std::vector<int32_t> ids = random_tokens(5, count * seq_len, config.vocab);
  std::vector<double> nll;
  for (int64_t w = 0; w < count; ++w) {
    const std::vector<int32_t> window(ids.begin() + w * seq_len, ids.begin() + (w + 1) * seq_len);
    const std::vector<double> logits = logits_of(*tiny.model, window);
    nll.push_back(window_nll(logits, window, config.vocab));
  }
  double mean = 0, squares = 0;
  for (double x : nll) mean += x / count;
  for (double x : nll) squares += (x - mean) * (x - mean);

  int64_t reported = 0;
  const models::Perplexity result =
      models::perplexity(*tiny.model, ids, count, seq_len, [&](int64_t done) { reported = done; });
  CHECK(reported == count);
  CHECK(result.windows == count);
  CHECK(result.tokens == count * (seq_len - 1));
  // A batch of windows may use another GEMM algorithm: the difference is the rounding of
  // activations, averaged over 60 tokens.
  const double tolerance = device.act() == DType::BF16 ? 2e-3 : 1e-5;
  CHECK(result.nll == Approx(mean).epsilon(tolerance));
  CHECK(result.perplexity == Approx(std::exp(mean)).epsilon(5 * tolerance));
  CHECK(result.nll_stderr ==
        Approx(std::sqrt(squares / (count - 1) / count)).epsilon(20 * tolerance));
  CHECK(models::perplexity(*tiny.model, {1, 2, 3}, 1, 3, nullptr).nll_stderr == 0);
  CHECK_THROWS_AS(models::perplexity(*tiny.model, {1, 53, 3}, 1, 3, nullptr), Error);

  // Quantized keys and values: each window as it would be generated.
  const quant::KvFormat kv{4};
  const double exact_nll = result.nll;
  double quantized_nll = 0;
  for (int64_t w = 0; w < count; ++w) {
    const std::vector<int32_t> window(ids.begin() + w * seq_len, ids.begin() + (w + 1) * seq_len);
    KvCache cache(device, config, 1, seq_len, kv);
    const std::vector<double> logits = logits_of(*tiny.model, window, &cache);
    quantized_nll += window_nll(logits, window, config.vocab) / static_cast<double>(count);
  }
  CHECK(models::perplexity(*tiny.model, ids, count, seq_len, nullptr, kv).nll ==
        Approx(quantized_nll).epsilon(tolerance));
  CHECK(std::abs(quantized_nll - exact_nll) > 1e-4);

  // A NaN loss is an error: token 7's row is NaN, and the second window holds that token.
  const Tensor& table = tiny.model->embedding();
  device.copy(table.rows(7, 1), make(device, {1, config.d_model}, table.dtype(),
                                     std::vector<double>(64, std::nan(""))));
  CHECK_NOTHROW(models::perplexity(*tiny.model, {1, 2, 3}, 1, 3, nullptr));
  CHECK_THROWS_WITH(models::perplexity(*tiny.model, {1, 2, 3, 4, 7, 5}, 2, 3, nullptr),
                    Catch::Contains("the loss of window 1 (tokens 3 to 5) is "));
}

TEST_CASE("llama: chunks of the head stay within the budget for any rows and vocabulary",
          "[llama]") {
  const models::HeadBudget card{int64_t{512} << 20, 1024};
  const auto chunks = [&](int64_t rows, int64_t vocab, DType dtype) {
    const autograd::HeadChunks c = models::head_chunks(card, rows, vocab, dtype);
    return std::vector<int64_t>{c.rows, c.vocab};
  };
  // The whole vocabulary, and as many rows as fit.
  CHECK(chunks(1 << 20, 49152, DType::BF16) == std::vector<int64_t>{5376, 49152});
  CHECK(chunks(1 << 20, 128256, DType::BF16) == std::vector<int64_t>{2048, 128256});
  CHECK(chunks(1 << 20, 128256, DType::F32) == std::vector<int64_t>{1024, 128256});
  CHECK(chunks(1 << 20, 262144, DType::BF16) == std::vector<int64_t>{1024, 262144});
  CHECK(chunks(300, 128256, DType::BF16) == std::vector<int64_t>{300, 128256});
  CHECK(chunks(900, 262144, DType::F32) == std::vector<int64_t>{900, 131072});
  // A vocabulary that is too wide is split into equal parts.
  CHECK(chunks(1 << 20, 262208, DType::BF16) == std::vector<int64_t>{1024, 131200});
  CHECK(chunks(1 << 20, 1000000, DType::BF16) == std::vector<int64_t>{1024, 250112});
  CHECK(chunks(100, 4 << 20, DType::F32) == std::vector<int64_t>{100, 1048576});

  for (const int64_t bytes : {int64_t{64} << 10, int64_t{1} << 20, int64_t{64} << 20})
    for (const int64_t rows : {1, 7, 100, 1000, 100000})
      for (const int64_t vocab : {1, 53, 1000, 32000, 151936, 3000001})
        for (const DType dtype : {DType::BF16, DType::F32}) {
          CAPTURE(bytes, rows, vocab, engine::name_of(dtype));
          const models::HeadBudget budget{bytes, 64};
          const autograd::HeadChunks c = models::head_chunks(budget, rows, vocab, dtype);
          CHECK(c.rows * std::min(c.vocab, vocab) * engine::size_bytes(dtype) <= bytes);
          CHECK(c.rows <= rows);
          CHECK(c.rows >= std::min<int64_t>(rows, 64));
          if (c.vocab < vocab) {
            CHECK(c.vocab % 128 == 0);
            // Fewer chunks would not fit, and the last is as long as tiles allow.
            const int64_t count = (vocab + c.vocab - 1) / c.vocab;
            const int64_t fit = bytes / engine::size_bytes(dtype) / c.rows / 128 * 128;
            CHECK((count - 1) * fit < vocab);
            CHECK(c.vocab - 128 < (vocab + count - 1) / count);
          } else {
            CHECK(c.vocab == vocab);
          }
        }
}

TEST_CASE("llama: perplexity over a vocabulary that is too wide for the budget", "[llama]") {
  Backend& device = backend();
  LlamaConfig config = tiny_config();
  config.vocab = 300001;
  config.d_model = 32;
  config.layers = 1;
  config.tied_head = true;
  TinyModel tiny(device, config);
  const int64_t count = 8, seq_len = 64, rows = count * seq_len;
  const int64_t batch_rows = on_cuda() ? rows : seq_len;
  CHECK(models::head_chunks(models::head_budget(device), batch_rows, config.vocab, device.real())
            .vocab < config.vocab);
  const std::vector<int32_t> ids = random_tokens(5, rows, config.vocab);

  std::vector<int32_t> next(ids.begin() + 1, ids.end());
  next.push_back(-1);
  for (int64_t i = seq_len - 1; i < rows; i += seq_len) next[static_cast<size_t>(i)] = -1;
  Tape tape(device, TapeMode::Inference);
  const Var h = tiny.model->forward(tape, make_ids(device, {count, seq_len}, ids), nullptr,
                                    models::Recompute::None);
  const Var whole =
      head_loss(tape, autograd::LossKind::CrossEntropy, Var(h.value().view({rows, config.d_model})),
                Var(tiny.model->head()), make_ids(device, {rows}, next), {},
                1.0 / (count * (seq_len - 1)), {32, config.vocab}, Tensor());
  const models::Perplexity result = models::perplexity(*tiny.model, ids, count, seq_len, nullptr);
  // The same products in other shapes. Losses are about 12, with the error of a long sum.
  CHECK(result.nll == Approx(values_of(device, whole.value())[0]).epsilon(1e-5));
}

TEST_CASE("llama: end to end, recomputing blocks gives the same gradients", "[llama]") {
  Backend& device = backend();
  const LlamaConfig config = tiny_config();
  TinyModel tiny(device, config);
  autograd::ParameterSet set(device, autograd::GradientPasses::One);
  for (auto& block : tiny.model->blocks()) block->declare_parameters(set, block_formats(config, 2));
  set.allocate();
  autograd::WeightQuantizer quantizer(set, 32);
  for (auto& block : tiny.model->blocks()) {
    block->bind_parameters(quantizer, block_formats(config, 2));
    block->set_masters(models::full_precision(*tiny.source, block->layer()));
  }
  quantizer.prepare();
  const int64_t t = 9;
  const Tensor ids = make_ids(device, {2, t}, random_tokens(6, 2 * t, config.vocab));
  const Tensor targets = make_ids(device, {2 * t}, random_tokens(7, 2 * t, config.vocab));
  std::vector<std::vector<double>> losses, gradients;
  for (const models::Recompute recompute :
       {models::Recompute::None, models::Recompute::Attention, models::Recompute::Block}) {
    Tape tape(device, TapeMode::Training);
    const Var h = tiny.model->forward(tape, ids, nullptr, recompute);
    const Var rows = reshape(tape, h, {2 * t, config.d_model});
    const Var loss =
        head_loss(tape, autograd::LossKind::CrossEntropy, rows, Var(tiny.model->head()), targets,
                  {}, 1.0 / (2 * t), {5, config.vocab}, Tensor());
    losses.push_back(values_of(device, loss.value()));
    tape.backward(loss);
    for (auto& block : tiny.model->blocks()) block->finish_backward();
    gradients.push_back(values_of(device, set.grads()));
  }
  for (size_t i : {1, 2}) {
    CHECK(losses[0] == losses[i]);
    CHECK(gradients[0] == gradients[i]);
  }
  double squares = 0;
  for (double g : gradients[0]) squares += g * g;
  CHECK(squares > 0);
}

TEST_CASE("llama: a block's masters are saved and restored", "[llama]") {
  Backend& device = backend();
  TinyModel tiny(device, tiny_config());
  models::LlamaBlock& block = *tiny.model->blocks()[1];
  autograd::ParameterSet set(device, autograd::GradientPasses::One);
  block.declare_parameters(set, block_formats(tiny_config(), 2));
  set.allocate();
  autograd::WeightQuantizer quantizer(set, 32);
  block.bind_parameters(quantizer, block_formats(tiny_config(), 2));
  block.set_masters(models::full_precision(*tiny.source, 1));
  const models::LayerResult saved = block.result(models::LinearContent::Masters);
  const std::vector<double> before = values_of(device, set.masters());
  device.zero(set.masters());
  block.set_masters(saved);
  CHECK(values_of(device, set.masters()) == before);
  CHECK(saved.linears[4].master ==
        tiny.source->load("model.layers.1.mlp.gate_proj.weight", {96, 64}));
}

TEST_CASE("llama: synthetic models repeat and run", "[llama]") {
  Backend& device = backend();
  LlamaConfig config = tiny_config();
  config.vocab = 300;
  std::vector<std::vector<double>> logits;
  for (const uint64_t seed : {1, 1, 2}) {
    const auto model = Llama::synthetic(device, config, {}, seed);
    logits.push_back(logits_of(*model, {5, 280, 17}));
    for (double value : logits.back()) REQUIRE(std::isfinite(value));
  }
  CHECK(logits[0] == logits[1]);
  CHECK(logits[0] != logits[2]);
}
