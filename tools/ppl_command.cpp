// bbb ppl: perplexity of any checkpoint, by the protocol common in the literature: one token
// stream, non-overlapping windows, the tail dropped, exp of the mean over windows.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "data/files.h"
#include "data/text.h"
#include "engine/progress.h"
#include "models/llama.h"
#include "tools/cli.h"
#include "tools/load_model.h"
#include "tools/ranks.h"
#include "train/sample_order.h"

namespace bbb::tools {

namespace {

// Of all ranks' windows. With n, m and s of a rank its windows, mean and standard error of the
// mean,
//   mean = sum n m / sum n      squares about it = sum (s^2 n (n - 1) + n (m - mean)^2)
models::Perplexity of_all_ranks(engine::Comm& comm, const models::Perplexity& own) {
  if (comm.size() == 1) return own;
  const auto windows = static_cast<double>(own.windows);
  const std::vector<double> sums =
      comm.sum({windows, static_cast<double>(own.tokens), windows * own.nll});
  models::Perplexity all = own;
  all.windows = std::llround(sums[0]);
  all.tokens = std::llround(sums[1]);
  all.nll = sums[2] / sums[0];
  all.perplexity = std::exp(all.nll);
  const double squares = comm.sum({own.nll_stderr * own.nll_stderr * windows * (windows - 1) +
                                   windows * (own.nll - all.nll) * (own.nll - all.nll)})[0];
  if (all.windows > 1) all.nll_stderr = std::sqrt(squares / (sums[0] - 1) / sums[0]);
  return all;
}

void measure(const CommandLine& line, engine::Comm& comm, int local_rank);

}  // namespace

int ppl_command(const Arguments& arguments) {
  CommandLine line("ppl", "Perplexity of a checkpoint (Hugging Face, GGUF or exported) on a text");
  line.options()                                                             //
      ("model", "directory or GGUF file", cxxopts::value<std::string>())     //
      ("bits", CommandLine::kNestedBitsHelp, cxxopts::value<std::string>())  //
      ("kv-bits", CommandLine::kKvBitsHelp,
       cxxopts::value<std::string>()->default_value("16"))                                  //
      ("text", ".txt, or .jsonl with a \"text\" a line", cxxopts::value<std::string>())     //
      ("seq-len", "tokens a window", cxxopts::value<std::string>()->default_value("2048"))  //
      ("max-windows", "stop after this many; 0: all",
       cxxopts::value<std::string>()->default_value("0"))  //
      ("json", "write the result to this file too", cxxopts::value<std::string>());
  add_rank_options(line);
  if (!line.parse(arguments)) return 0;
  return run_as_rank(ranks_asked(line), "ppl", arguments,
                     [&](const auto& comm, int local_rank) { measure(line, *comm, local_rank); });
}

namespace {

void measure(const CommandLine& line, engine::Comm& comm, int local_rank) {
  const std::string model_path = line.required("model"), text_path = line.required("text");
  int64_t seq_len = line.integer("seq-len", 2);
  const int64_t limit = line.integer("max-windows", 0);
  const quant::KvFormat kv = line.kv_format();
  if (comm.first()) check_writable(line, "json");

  // First: a missing GPU should not cost a long read.
  const auto backend = make_rank_backend(rank_device(line), line.threads(), comm, local_rank);
  const auto source = models::open_checkpoint(model_path, line.nested_bits());
  backend->check_head_size(source->config().head_dim);
  models::KvCache::check(source->config(), kv);
  const auto tokenizer = data::load_tokenizer(model_path);
  const std::vector<int32_t> tokens =
      data::evaluation_tokens(*tokenizer, data::read_texts(text_path));
  const int64_t positions = source->config().max_position;
  if (!line.has("seq-len")) {
    const int64_t asked = seq_len, count = static_cast<int64_t>(tokens.size());
    if (positions > 0) seq_len = std::min(seq_len, positions);
    seq_len = std::clamp<int64_t>(count, 2, seq_len);
    if (seq_len < asked && comm.first())
      fmt::print(stderr, "--seq-len {} instead of {}, to fit {}\n", seq_len, asked,
                 seq_len == count ? "the text" : "the model's positions");
  }
  if (positions > 0 && seq_len > positions && comm.first())
    fmt::print(stderr,
               "windows of {} tokens go beyond the model's {} positions: it was not trained for "
               "them\n",
               seq_len, positions);
  data::Windows windows = data::make_windows(tokens, seq_len, text_path);
  const int64_t count = limit > 0 ? std::min(limit, windows.count) : windows.count;
  if (count < comm.size())
    throw UsageError(cat(comm.size(), " ranks cannot share ", count, " windows"));
  windows.ids = train::own_windows(windows.ids.data(), count, seq_len, comm);
  const auto model = load_model(*backend, *source);  // last: it reads every weight
  const auto start = std::chrono::steady_clock::now();
  models::Perplexity result;
  {
    const int64_t own = comm.share(count);
    engine::Progress progress("ppl", own,
                              comm.first() ? 0 : std::numeric_limits<double>::infinity());
    result = of_all_ranks(comm, models::perplexity(
                                    *model, windows.ids, own, seq_len,
                                    [&](int64_t done) { progress.set(done); }, kv));
  }
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const quant::ActivationBits activations = source->bits_per_activation();
  fmt::print(
      "perplexity {:.3f}  nll {:.5f} +- {:.5f}  {} windows of {}  {:.4f} bits per weight  "
      "{:.3f} bits per activation ({:.3f} with scales)  {} bits of keys and values  "
      "{:.0f} tokens/s on {}\n",
      result.perplexity, result.nll, result.nll_stderr, result.windows, seq_len,
      source->bits_per_weight(), activations.codes, activations.all, kv.bits,
      static_cast<double>(result.windows * seq_len) / seconds, backend->device_name());
  if (line.has("json") && comm.first()) {
    const nlohmann::ordered_json json = {{"perplexity", result.perplexity},
                                         {"nll", result.nll},
                                         {"nll_stderr", result.nll_stderr},
                                         {"windows", result.windows},
                                         {"tokens", result.tokens},
                                         {"bits_per_weight", source->bits_per_weight()},
                                         {"bits_per_activation", activations.codes},
                                         {"bits_per_activation_with_scales", activations.all},
                                         {"kv_bits", kv.bits}};
    data::write_file_atomic(line.text("json"), json.dump(2) + "\n");
  }
}

}  // namespace

}  // namespace bbb::tools
