// bbb train: blocks, stage by stage, then the whole model end to end.
#include <fmt/format.h>

#include <algorithm>

#include "tools/cli.h"
#include "train/train.h"

namespace bbb::tools {

namespace {

// "1e-3" or "1e-4,1e-4,4e-4".
std::vector<double> parse_rates(const std::string& text) {
  std::vector<double> rates;
  for (const std::string& part : split(text, ',')) {
    char* end = nullptr;
    const double rate = std::strtod(part.c_str(), &end);
    if (part.empty() || *end != '\0' || !(rate > 0 && rate < 1))
      throw UsageError(
          cat("--lr takes rates between 0 and 1, separated by commas, not '", text, "'"));
    rates.push_back(rate);
  }
  return rates;
}

}  // namespace

int train_command(const Arguments& arguments) {
  CommandLine line("train", "Train a checkpoint down to 2-bit weights");
  const auto value = [](const char* fallback) {
    return cxxopts::value<std::string>()->default_value(fallback);
  };
  line.options()                                                          //
      ("model", "directory or GGUF file", cxxopts::value<std::string>())  //
      ("synthetic",
       "instead of --model: random weights, byte tokens: llama-2-7b, llama-3-8b, llama-3.2-1b, "
       "smollm2-135m",
       cxxopts::value<std::string>())                                                             //
      ("data", ".txt, or .jsonl with a \"text\" a line", cxxopts::value<std::string>())           //
      ("out", "directory of the run; an interrupted one goes on", cxxopts::value<std::string>())  //
      ("group-size", "input features that share a scale: 32, 64 or 128", value("32"))             //
      ("samples", "training windows", value("1024"))                                              //
      ("seq-len", "tokens a window", value("2048"))                                               //
      ("val-samples", "validation windows, from the end of the text", value("64"))                //
      ("seed", "of every shuffle", value("0"))                                                    //
      ("save-every",
       "steps between states from which a killed run goes on; default: by the clock, at most a "
       "twentieth of the time",
       value("auto"))  //
      ("doc-end", "token id after each document, instead of the vocabulary's own",
       cxxopts::value<std::string>())  //
      ("deterministic", "no algorithm of a matrix product is chosen by timing");
  line.options("Memory (results do not depend on it)")  //
      ("gpu-memory", "GB of the device to use; default: what it has left",
       cxxopts::value<std::string>())  //
      ("host-memory", "GB of host memory for the streams between blocks; default: most of it",
       cxxopts::value<std::string>())                                                          //
      ("scratch", "directory for streams that fit in neither", cxxopts::value<std::string>())  //
      ("recompute",
       "activations made again in the backward pass: none, attention, block (its halves), or auto: "
       "the first that fits",
       value("auto"));
  line.options("Block by block")  //
      ("stages", "widths of weights and activations, in order; \"\": no block phase",
       value("w2a16"))                                                                  //
      ("epochs", "passes over the samples, each stage", value("2"))                     //
      ("batch", "windows a step", value("8"))                                           //
      ("lr", "one rate, or one a stage; default: by the model's width", value("auto"))  //
      ("input-stream", "what a stage is fed: same, higher or mix", value("same"))       //
      ("extrapolate", "SAMPLESxEPOCHS: say what so long a run would take, from this one's times",
       cxxopts::value<std::string>());
  line.options("End to end")  //
      ("e2e-steps", "optimizer steps; 0: none; auto: two passes after blocks, four without",
       value("auto"))                                                                 //
      ("e2e-loss", "kl (to the full-precision model) or ce (the text)", value("kl"))  //
      ("e2e-train", "all weights, or scales", value("all"))                           //
      ("e2e-lr", "learning rate; default: by the model's width", value("auto"))       //
      ("e2e-batch", "windows a step", value("16"))                                    //
      ("e2e-micro-batch", "windows that go through the model at once; default: by device",
       value("auto"))("e2e-snap", "masters to the middle of their bins first: auto, on or off",
                      value("auto"));
  if (!line.parse(arguments)) return 0;

  train::TrainConfig config;
  if (line.has("synthetic")) {
    if (line.has("model")) throw UsageError("give one of --model and --synthetic");
    config.model = cat(data::kSyntheticPrefix, line.text("synthetic"));
  } else {
    config.model = line.required("model");
  }
  config.data = line.required("data");
  config.out = line.required("out");
  config.stages = train::parse_stages(line.text("stages"));
  const int groups[] = {32, 64, 128};
  config.group = groups[line.choice("group-size", {"32", "64", "128"})];
  config.samples = line.integer("samples", 1);
  config.seq_len = line.integer("seq-len", 2);
  config.val_samples = line.integer("val-samples", 0);
  config.epochs = line.integer("epochs", 1);
  config.batch = line.integer("batch", 1);
  if (line.text("lr") != "auto") config.lr = parse_rates(line.text("lr"));
  if (line.has("extrapolate")) config.extrapolate = train::parse_run_length(line.text("extrapolate"));
  config.input_stream = train::parse_input_stream(line.text("input-stream"));
  config.seed = static_cast<uint64_t>(line.integer("seed", 0));
  config.e2e_batch = line.integer("e2e-batch", 1);
  if (line.text("e2e-steps") == "auto")
    config.e2e_steps =
        (config.stages.empty() ? 4 : 2) * std::max<int64_t>(1, config.samples / config.e2e_batch);
  else
    config.e2e_steps = line.integer("e2e-steps", 0);
  config.e2e_loss = train::parse_e2e_loss(line.text("e2e-loss"));
  config.e2e_train = train::parse_e2e_train(line.text("e2e-train"));
  if (line.text("e2e-lr") != "auto") config.e2e_lr = line.real("e2e-lr", 1e-12, 1);
  if (line.text("e2e-micro-batch") != "auto")
    config.e2e_micro_batch = line.integer("e2e-micro-batch", 1);
  config.e2e_snap = train::parse_snap(line.text("e2e-snap"));
  if (line.text("save-every") != "auto") config.save_every = line.integer("save-every", 1);
  if (line.has("doc-end"))
    config.doc_end = static_cast<int32_t>(line.integer("doc-end", 0, INT32_MAX));
  config.threads = line.threads();
  if (line.has("deterministic")) config.gemm_algorithms = train::GemmAlgorithms::Heuristic;
  constexpr double kMostGigabytes = 1e6;
  const auto bytes = [&](const char* option) {
    return line.has(option) ? static_cast<int64_t>(line.real(option, 1e-6, kMostGigabytes) * 1e9)
                            : 0;
  };
  config.memory.device_bytes = bytes("gpu-memory");
  config.memory.host_bytes = bytes("host-memory");
  if (line.has("scratch")) config.memory.scratch = line.required("scratch");
  config.memory.recompute = train::parse_recompute(line.text("recompute"));
  if (config.stages.empty() && config.e2e_steps == 0)
    throw UsageError("nothing to train: --stages is empty and --e2e-steps is 0");

  const auto source = models::open_checkpoint(config.model);
  const auto tokenizer = data::load_tokenizer(config.model);
  train::train(*line.make_backend(), *source, *tokenizer, config);
  return 0;
}

}  // namespace bbb::tools
