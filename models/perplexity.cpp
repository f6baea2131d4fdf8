// Perplexity: the device computes the losses of the tokens, the host adds them in F64.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>

#include "autograd/ops.h"
#include "models/llama.h"

namespace bbb::models {

using autograd::HeadChunks;
using engine::DType;

namespace {

constexpr int64_t kProductRows = 256, kProductWords = 128;  // whole tiles of a matrix product

}  // namespace

HeadBudget head_budget(const Backend& backend) {
  if (backend.device() == engine::DeviceType::Cpu) return {int64_t{64} << 20, 64};
  // Below 16 GB: 1/32 of the device's memory.
  return {std::min(int64_t{512} << 20, backend.memory_total_bytes() / 32), 1024};
}

HeadChunks head_chunks(const HeadBudget& budget, int64_t rows, int64_t vocab, DType logits) {
  const int64_t elements = budget.bytes / engine::size_bytes(logits);
  const int64_t least_rows = std::min(rows, budget.least_rows), whole_rows = elements / vocab;
  if (whole_rows >= least_rows) {
    const bool tiles = whole_rows >= kProductRows;
    return {std::min(rows, tiles ? whole_rows / kProductRows * kProductRows : whole_rows), vocab};
  }
  const auto tiles_of = [](int64_t words) { return (words + kProductWords - 1) / kProductWords; };
  const int64_t most_tiles = std::max<int64_t>(1, elements / least_rows / kProductWords);
  const int64_t chunks = (tiles_of(vocab) + most_tiles - 1) / most_tiles;
  return {least_rows, tiles_of((vocab + chunks - 1) / chunks) * kProductWords};
}

void Llama::token_losses(const Tensor& losses, const Tensor& h, const Tensor& targets) const {
  const HeadBudget budget = head_budget(backend_);
  const int64_t m = h.dim(0), width = config_.d_model, vocab = config_.vocab;
  if (head_.packed == nullptr) {
    Tape tape(backend_, autograd::TapeMode::Inference);
    head_loss(tape, autograd::LossKind::CrossEntropy, Var(h), head_.dense, targets, {}, 1.0,
              head_chunks(budget, m, vocab, backend_.real()), losses);
    return;
  }
  // The dequantized words of a chunk and its logits each take at most the budget. Every word is
  // dequantized once.
  const int64_t most_words = budget.bytes / (width * engine::size_bytes(backend_.act()));
  const int64_t words = std::min(vocab, std::max(kProductWords, most_words));
  const int64_t rows =
      std::clamp<int64_t>(budget.bytes / (words * engine::size_bytes(backend_.real())), 1, m);
  std::vector<int32_t> all(static_cast<size_t>(vocab));
  std::iota(all.begin(), all.end(), 0);
  const Tensor ids = backend_.empty({vocab}, DType::I32);
  backend_.upload(ids, all.data());
  const Tensor weight = backend_.empty({words, width}, backend_.act());
  const Tensor logits = backend_.empty({rows * words}, backend_.real());
  const Tensor state = backend_.empty({m, Backend::kCrossEntropyState}, backend_.real());
  for (int64_t word = 0; word < vocab; word += words) {
    const int64_t n = std::min(words, vocab - word);
    const Tensor chunk = weight.rows(0, n);
    backend_.embed_packed(chunk, ids.rows(word, n), *head_.packed);
    for (int64_t row = 0; row < m; row += rows) {
      const int64_t count = std::min(rows, m - row);
      const Tensor part = logits.slice(0, count * n).view({count, n});
      backend_.gemm_nt(part, h.rows(row, count), chunk, Tensor(), Tensor());
      backend_.cross_entropy_chunk(losses.rows(row, count), state.rows(row, count), part,
                                   targets.rows(row, count), word,
                                   word == 0 ? Write::Overwrite : Write::Add);
    }
  }
}

namespace {

void check_windows(const Llama& model, const data::Windows& windows) {
  BBB_ASSERT(static_cast<int64_t>(windows.ids.size()) == windows.count * windows.seq_len);
  BBB_CHECK(windows.count > 0 && windows.seq_len > 1,
            "perplexity needs a window of two tokens or more");
  const int64_t vocab = model.config().vocab;
  for (int32_t id : windows.ids)
    BBB_CHECK(id >= 0 && id < vocab, "token ", id, " is not in the model's vocabulary of ", vocab);
}

// Several windows at once keep a GPU busy; on a CPU they would only take memory.
int64_t windows_at_once(const Backend& backend) {
  return backend.device() == engine::DeviceType::Cuda ? 8 : 1;
}

// Of one window: the tokens that count, and their mean NLL.
struct WindowNll {
  int64_t tokens = 0;
  double nll = 0;
};

// Appends that of each of these windows, the first of which has the number `begin`. hidden: after
// the final norm, act (batch, T, D).
void add_window_nll(std::vector<WindowNll>& window_nll, const Llama& model, const Tensor& hidden,
                    const data::Windows& windows, int64_t begin) {
  Backend& backend = model.backend();
  const int64_t seq_len = windows.seq_len, rows = windows.count * seq_len;
  const std::vector<int32_t> targets = windows.targets();
  const Tensor losses = backend.empty({rows}, backend.real());
  model.token_losses(losses, hidden.view({rows, hidden.dim(2)}),
                     upload_ints(backend, targets, {rows}));
  const std::vector<float> host = download_floats(backend, losses);
  for (int64_t w = 0; w < windows.count; ++w) {
    WindowNll window;
    double sum = 0;
    for (int64_t t = 0; t + 1 < seq_len; ++t) {
      const auto at = static_cast<size_t>(w * seq_len + t);
      sum += host[at];
      window.tokens += targets[at] >= 0;
    }
    const int64_t first = (begin + w) * seq_len;
    BBB_CHECK(std::isfinite(sum), "the loss of window ", begin + w, " (tokens ", first, " to ",
              first + seq_len - 1, ") is ", sum, ": no perplexity can be given");
    BBB_ASSERT(window.tokens > 0);
    window.nll = sum / static_cast<double>(window.tokens);
    window_nll.push_back(window);
  }
}

// A window counts by its tokens: nll is their mean. The standard error is that of a mean of windows
// with these weights.
Perplexity perplexity_of(const std::vector<WindowNll>& window_nll) {
  Perplexity result;
  result.windows = static_cast<int64_t>(window_nll.size());
  for (const WindowNll& window : window_nll) result.tokens += window.tokens;
  const double n = static_cast<double>(window_nll.size());
  const auto weight = [&](const WindowNll& window) {
    return static_cast<double>(window.tokens) / static_cast<double>(result.tokens);
  };
  for (const WindowNll& window : window_nll) result.nll += weight(window) * window.nll;
  result.perplexity = std::exp(result.nll);
  BBB_CHECK(std::isfinite(result.perplexity), "the mean loss is ", result.nll,
            ": its perplexity is beyond F64");
  double squares = 0;
  for (const WindowNll& window : window_nll) {
    const double off = weight(window) * (window.nll - result.nll);
    squares += off * off;
  }
  if (result.windows > 1) result.nll_stderr = std::sqrt(squares * n / (n - 1));
  return result;
}

}  // namespace

Perplexity perplexity(Llama& model, const std::vector<int32_t>& ids, int64_t count, int64_t seq_len,
                      const std::function<void(int64_t done)>& progress, quant::KvFormat kv) {
  const data::Windows windows{ids, count, seq_len};
  check_windows(model, windows);
  Backend& backend = model.backend();
  std::vector<WindowNll> window_nll;
  for (int64_t begin = 0; begin < count; begin += windows_at_once(backend)) {
    const int64_t batch = std::min(windows_at_once(backend), count - begin);
    const data::Windows part = windows.rows(begin, batch);
    const Tensor tokens = upload_ints(backend, part.ids, {batch, seq_len});
    Tape tape(backend, autograd::TapeMode::Inference);
    std::optional<KvCache> cache;
    if (kv.quantized()) cache.emplace(backend, model.config(), batch, seq_len, kv);
    const Var hidden = model.forward(tape, tokens, cache ? &*cache : nullptr, Recompute::None);
    add_window_nll(window_nll, model, hidden.value(), part, begin);
    if (progress) progress(begin + batch);
  }
  return perplexity_of(window_nll);
}

Perplexity perplexity_by_blocks(Llama& model, const data::Windows& windows,
                                const std::function<void(LlamaBlock&)>& load,
                                const std::function<void(int64_t done)>& progress) {
  check_windows(model, windows);
  Backend& backend = model.backend();
  const LlamaConfig& config = model.config();
  // A packed weight is unpacked once a batch: many short windows share it.
  constexpr int64_t kLeastTokens = 2048;
  const int64_t seq_len = windows.seq_len;
  const int64_t at_once = std::max(windows_at_once(backend), kLeastTokens / seq_len);
  struct Batch {
    data::Windows windows;
    Tensor hidden, first_key;
  };
  std::vector<Batch> batches;
  for (int64_t begin = 0; begin < windows.count; begin += at_once) {
    const int64_t count = std::min(at_once, windows.count - begin);
    Batch& batch = batches.emplace_back();
    batch.windows = windows.rows(begin, count);
    const Tensor out = backend.empty({count * seq_len, config.d_model}, backend.act());
    backend.embed(out, upload_ints(backend, batch.windows.ids, {count * seq_len}),
                  model.embedding());
    batch.hidden = out.view({count, seq_len, config.d_model});
    if (!batch.windows.first_key.empty())
      batch.first_key = upload_ints(backend, batch.windows.first_key, {count, seq_len});
  }
  for (int64_t layer = 0; layer < config.layers; ++layer) {
    LlamaBlock block(backend, config, layer, model.inv_freq());
    load(block);
    for (Batch& batch : batches) {
      Tape tape(backend, autograd::TapeMode::Inference);
      batch.hidden =
          block.forward(tape, Var(batch.hidden), nullptr, Recompute::None, batch.first_key).value();
    }
    backend.synchronize();  // otherwise progress would run ahead of the device
    if (progress) progress(layer + 1);
  }
  std::vector<WindowNll> window_nll;
  int64_t begin = 0;
  for (const Batch& batch : batches) {
    Tape tape(backend, autograd::TapeMode::Inference);
    const Var h = autograd::rms_norm(tape, Var(batch.hidden), model.norm().var(), config.rms_eps);
    add_window_nll(window_nll, model, h.value(), batch.windows, begin);
    begin += batch.windows.count;
  }
  return perplexity_of(window_nll);
}

}  // namespace bbb::models
