// bbb bench train: the trainers' own recorded steps on random weights.
#include "tools/bench_command.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>

#include "cuda/nccl_comm.h"
#include "data/files.h"
#include "tools/bench.h"
#include "tools/config_options.h"
#include "tools/ranks.h"

namespace bbb::tools {

using engine::Backend;
using nlohmann::ordered_json;

namespace {

// The grid options that change a step.
bool is_grid_option(const train::Field& f) {
  for (const char* name : {"rotate", "ocs-ratio", "split-side", "act-range", "act-outliers"})
    if (f.name == std::string(name)) return true;
  return false;
}

void bench_as_rank(const CommandLine& line, TrainBench bench, std::shared_ptr<engine::Comm> comm,
                   int local_rank);

int bench_train_command(const Arguments& arguments) {
  CommandLine line("bench train", "Time a training step on random weights");
  const auto text = [] { return cxxopts::value<std::string>(); };
  line.options()                                                                                //
      ("synthetic", cat("sizes: ", models::kSyntheticSizes), text())                            //
      ("e2e", "the whole model against its full-precision original, not one block")             //
      ("batch", "windows a step; default: 8, with --e2e 16", text())                            //
      ("micro-batch", "with --e2e: windows through the model at once", text())                  //
      ("moments", "with --e2e: of the optimizer, wide or 8bit", text()->default_value("wide"))  //
      ("seq-len", "tokens a window", text()->default_value("2048"))                             //
      ("steps", "timed steps; default: 100, with --e2e 10", text())                             //
      ("layers", "with --e2e: fewer layers; default: as many as fit", text())                   //
      ("recompute", "none, attention, block, or auto: the first that fits",
       text()->default_value("auto"))                                                   //
      ("deterministic", "choose no algorithm of the step's matrix products by timing")  //
      ("gemm",
       "read the products' algorithms from this file, and add those that it lacks;"
       " those of another library or GPU are replaced",
       text())  //
      ("json", "write the result to this file too", text());
  const train::TrainConfig defaults;
  add_config_options(line, defaults, "Grid", is_grid_option);
  line.options("Grid")("widths", "of weights and activations, such as w2a2",
                       cxxopts::value<std::string>()->default_value("w2a16"));
  add_rank_options(line);
  if (!line.parse(arguments)) return 0;
  TrainBench bench;
  bench.model = models::synthetic_config(line.required("synthetic"));
  bench.end_to_end = line.has("e2e");
  bench.batch = line.has("batch") ? line.integer("batch", 1) : bench.end_to_end ? 16 : 8;
  bench.seq_len = line.integer("seq-len", 2, bench.model.max_position);
  bench.steps = line.has("steps") ? line.integer("steps", 1) : bench.end_to_end ? 10 : 100;
  bench.recompute = train::parse_recompute(line.text("recompute"));
  const std::vector<train::Stage> widths = train::parse_stages(line.text("widths"));
  if (widths.size() != 1) throw UsageError("--widths takes one stage, such as w2a2");
  bench.widths = widths[0];
  read_config_options(bench.grid, line, is_grid_option);
  if (line.has("deterministic")) bench.gemm_algorithms = train::GemmAlgorithms::Heuristic;
  if (line.has("gemm") && line.has("deterministic"))
    throw UsageError("--gemm cannot be used with --deterministic");
  if (line.has("gemm")) bench.gemm_file = line.text("gemm");
  check_writable(line, "gemm");
  check_writable(line, "json");
  bench.say = [](const std::string& report) { fmt::print("{}\n", report); };
  for (const char* option : {"layers", "micro-batch", "moments"})
    if (line.has(option) && !bench.end_to_end) throw UsageError(cat("--", option, " needs --e2e"));
  if (line.choice("moments", {"wide", "8bit"}) == 1) bench.moments = train::Moments::EightBits;
  if (line.has("micro-batch")) bench.micro_batch = line.integer("micro-batch", 1);
  Arguments all = arguments;  // of `bbb bench`
  all.insert(all.begin(), "train");
  return run_as_rank(ranks_asked(line), "bench", all, [&](const auto& comm, int local_rank) {
    bench_as_rank(line, bench, comm, local_rank);
  });
}

void bench_as_rank(const CommandLine& line, TrainBench bench, std::shared_ptr<engine::Comm> comm,
                   int local_rank) {
  const auto backend = make_rank_backend(rank_device(line), line.threads(), *comm, local_rank);
  if (comm->size() > 1 && backend->device() == engine::DeviceType::Cuda)
    comm = cuda::make_nccl_comm(*backend, comm);
  bench.comm = comm;
  const std::string name = line.text("synthetic");
  const int ranks = comm->size();
  bench.peak = peak_shapes(*backend);
  const models::LlamaConfig whole = bench.model;
  if (bench.end_to_end)
    bench.model.layers = line.has("layers") ? line.integer("layers", 1, whole.layers)
                                            : layers_that_fit(*backend, bench);
  const TrainBenchResult r = bench_train(*backend, bench);
  if (!comm->first()) return;

  const double tokens = static_cast<double>(bench.batch * bench.seq_len);
  const double rate = r.flops / r.step_s;
  const std::string trained_widths = train::to_string({bench.widths});
  fmt::print("{}, {}, {}, {} x {} tokens a step on {}{}\n", name,
             bench.end_to_end ? fmt::format("end to end, {} of {} layers, teacher included",
                                            bench.model.layers, whole.layers)
                              : std::string("one block"),
             trained_widths, bench.batch, bench.seq_len,
             ranks > 1 ? fmt::format("{} ranks, each ", ranks) : "", backend->device_name());
  fmt::print(
      "  step       {:9.3f} ms  {:.1f} ktok/s  {:.1f} TFLOP/s{}, {:.1f} % of {:.1f} by GEMM\n",
      1e3 * r.step_s, tokens / r.step_s / 1e3, rate / 1e12, ranks > 1 ? " a rank" : "",
      100 * rate / r.gemm_peak, r.gemm_peak / 1e12);
  fmt::print("  quantize   {:9.3f} ms\n  forward    {:9.3f} ms\n  backward   {:9.3f} ms\n",
             1e3 * r.quantize_s, 1e3 * r.forward_s, 1e3 * r.backward_s);
  fmt::print("  optimizer  {:9.3f} ms\n", 1e3 * r.optimizer_s);
  if (r.kernels > 0) fmt::print("  launches   {} kernels in 1 graph\n", r.kernels);
  fmt::print("  memory     {:.2f} GiB at most\n", static_cast<double>(r.peak_bytes) / (1 << 30));
  ordered_json json = {{"model", name},
                       {"device", backend->device_name()},
                       {"ranks", ranks},
                       {"end_to_end", bench.end_to_end},
                       {"layers", bench.end_to_end ? bench.model.layers : 1},
                       {"widths", trained_widths},
                       {"batch", bench.batch},
                       {"micro_batch", bench.micro_batch},  // 0: by device
                       {"moments", bench.moments == train::Moments::Wide ? "wide" : "8bit"},
                       {"seq_len", bench.seq_len},
                       {"step_ms", 1e3 * r.step_s},
                       {"quantize_ms", 1e3 * r.quantize_s},
                       {"forward_ms", 1e3 * r.forward_s},
                       {"backward_ms", 1e3 * r.backward_s},
                       {"optimizer_ms", 1e3 * r.optimizer_s},
                       {"tokens_per_s", tokens / r.step_s},
                       {"tflops", rate / 1e12},
                       {"gemm_peak_tflops", r.gemm_peak / 1e12},
                       {"gemm_peak_fraction", rate / r.gemm_peak},
                       {"kernels_per_step", r.kernels},
                       {"graph_launches_per_step", r.kernels > 0 ? 1 : 0},
                       {"memory_peak_bytes", r.peak_bytes}};
  if (bench.end_to_end && bench.model.layers < whole.layers) {
    const double scaled = r.step_s * training_flops_per_token(whole, bench.seq_len, true) /
                          training_flops_per_token(bench.model, bench.seq_len, true);
    fmt::print(
        "  scaled     {:9.3f} ms  {:.1f} ktok/s with all {} layers, by the operations' ratio\n",
        1e3 * scaled, tokens / scaled / 1e3, whole.layers);
    json["scaled_to_layers"] = whole.layers;
    json["scaled_step_ms"] = 1e3 * scaled;
    json["scaled_tokens_per_s"] = tokens / scaled;
  }
  write_json(line, json);
}

}  // namespace

void write_json(const CommandLine& line, const ordered_json& json) {
  if (line.has("json")) data::write_file_atomic(line.text("json"), json.dump(2) + "\n");
}

int bench_command(const Arguments& arguments) {
  const std::string what = arguments.empty() ? "" : arguments[0];
  if (what == "--help" || what == "-h") {
    std::puts("usage: bbb bench train|gemv|gemm|decode|prefill [options]      --help lists them");
    return 0;
  }
  const Arguments rest(arguments.begin() + (arguments.empty() ? 0 : 1), arguments.end());
  if (what == "train") return bench_train_command(rest);
  if (what == "gemv") return bench_gemv_command(rest);
  if (what == "gemm") return bench_gemm_command(rest);
  if (what == "decode") return bench_decode_command(rest);
  if (what == "prefill") return bench_prefill_command(rest);
  throw UsageError(cat("bbb bench takes train, gemv, gemm, decode or prefill, not '", what, "'"));
}

}  // namespace bbb::tools
