// bbb export: a trained run, or a model rounded to nearest, as a directory that other programs
// load.
#include <fmt/format.h>

#include "models/packed_checkpoint.h"
#include "tools/config_options.h"
#include "tools/load_model.h"
#include "train/recipe.h"
#include "train/statistics.h"
#include "train/train.h"

namespace bbb::tools {

// The options of bbb train that an export by rounding takes, too.
static bool rounds_with(const train::Field& f) {
  for (const char* name : {"data", "samples", "seq-len", "doc-end", "pack"})
    if (f.name == std::string(name)) return true;
  return f.group != nullptr && f.group == std::string(train::kGrid);
}

int export_command(const Arguments& arguments) {
  CommandLine line("export", "Write a trained run, or a rounded model, as a model directory");
  line.options()                                                                   //
      ("run", "directory of a finished bbb train", cxxopts::value<std::string>())  //
      ("model", "with --rtn: directory or GGUF file; with --run: where the run's model is now",
       cxxopts::value<std::string>())                                                          //
      ("rtn", "round --model to the nearest code, without training")                           //
      ("bits", "with --rtn: 2, 3, 4 or 8", cxxopts::value<std::string>()->default_value("2"))  //
      ("group-size", "with --rtn: 32, 64 or 128",
       cxxopts::value<std::string>()->default_value("32"))  //
      ("act-bits", "with --rtn: bits of activations, 16, 8, 4, 3 or 2",
       cxxopts::value<std::string>()->default_value("16"))  //
      ("out", "directory to make, or with --format gguf the file",
       cxxopts::value<std::string>())  //
      ("format",
       "bbb: packed; hf: dequantized BF16 safetensors; gptq: GPTQ-v2 safetensors; gguf: one file "
       "for llama.cpp",
       cxxopts::value<std::string>()->default_value("bbb"))  //
      ("head-bits",
       "with --format bbb: of the head, and of an embedding that is tied to it: 16, 8 or 4",
       cxxopts::value<std::string>()->default_value("16"))  //
      ("gguf-head", "with --format gguf: embedding and head in bf16 or q8_0",
       cxxopts::value<std::string>()->default_value("bf16"));
  train::TrainConfig config;
  config.samples = train::kStatisticsWindows;
  add_config_options(line, config, "With --rtn", rounds_with);
  if (!line.parse(arguments)) return 0;
  const std::string out = line.required("out");
  using models::ExportFormat;
  const ExportFormat formats[] = {ExportFormat::Packed, ExportFormat::HuggingFace,
                                  ExportFormat::Gptq, ExportFormat::Gguf};
  const int head_widths[] = {models::kDenseBits, 8, 4};
  const ExportFormat format = formats[line.choice("format", {"bbb", "hf", "gptq", "gguf"})];
  const int head_bits = head_widths[line.choice("head-bits", {"16", "8", "4"})];
  if (out.ends_with(".gguf") && format != ExportFormat::Gguf)
    throw UsageError(cat("--out ", out, " names a GGUF file: add --format gguf"));
  if (head_bits != models::kDenseBits && format != ExportFormat::Packed)
    throw UsageError("--head-bits needs --format bbb: no other format holds a quantized head");
  models::ExportOptions options(format, head_bits);
  if (line.has("gguf-head") && format != ExportFormat::Gguf)
    throw UsageError("--gguf-head needs --format gguf");
  options.gguf_tables = line.choice("gguf-head", {"bf16", "q8_0"}) == 0 ? models::GgufTables::BF16
                                                                        : models::GgufTables::Q8_0;
  if (line.has("rtn") == line.has("run"))
    throw UsageError("give either --run RUN, or --model M with --rtn");

  models::ExportSummary summary;
  if (line.has("run")) {
    const auto name_unused = [&](const char* option) {
      if (line.has(option)) fmt::print(stderr, "--{} is unused: the run decides it\n", option);
    };
    for (const char* option : {"bits", "group-size", "act-bits"}) name_unused(option);
    train::visit(config, [&](const auto&, const train::Field& f) {
      if (rounds_with(f)) name_unused(f.name);
    });
    summary =
        train::export_run(*line.make_backend(), line.text("run"), line.text("model"), out, options);
  } else {
    read_config_options(config, line, rounds_with);
    const int bits[] = {2, 3, 4, 8}, groups[] = {32, 64, 128}, act_bits[] = {16, 8, 4, 3, 2};
    config.bits = bits[line.choice("bits", {"2", "3", "4", "8"})];
    if (!config.any_precision.empty()) {
      if (line.has("bits") && config.bits != quant::kNestedBits)
        throw UsageError("--any-precision nests codes of 8 bits: --bits is 8, or left out");
      config.bits = quant::kNestedBits;
    }
    config.group = groups[line.choice("group-size", {"32", "64", "128"})];
    config.act_bits = act_bits[line.choice("act-bits", {"16", "8", "4", "3", "2"})];
    const bool reads_text = train::Recipe::reads_text(config);
    train::visit(config, [&](const auto&, const train::Field& f) {
      if (!rounds_with(f) || !line.has(f.name)) return;
      const char* reason = unused_in_grid(config, f.name, config.act_bits);
      if (!reads_text && f.group != std::string(train::kGrid))
        reason = "no option needs a text's statistics";
      if (reason != nullptr) fmt::print(stderr, "--{} is unused: {}\n", f.name, reason);
    });
    if (config.act_outliers % config.group != 0)
      fmt::print("--act-outliers {} is rounded up to whole groups of {}\n", config.act_outliers,
                 config.group);
    const std::string path = line.required("model");
    const auto source = models::open_checkpoint(path);
    const auto tokenizer = data::load_tokenizer(path);
    summary = train::export_rtn(*line.make_backend(), *source, *tokenizer, config, out, options,
                                [&](const char* option) { return line.has(option); });
  }
  // Only formats for other readers round; of these, some merge pairs and undo rotations first.
  if (summary.rounding.difference > 0)
    fmt::print("rounded once: the largest difference to the packed model is {:.3g}, in {}\n",
               summary.rounding.difference, summary.rounding.name);
  else
    fmt::print("read back: every weight equals the packed model's\n");
  if (summary.lost_activations)
    fmt::print("the model quantizes activations; readers of this format do not\n");
  fmt::print("{}: {:.4f} bits per weight, read from the file", out, summary.bits_per_weight);
  if (format == ExportFormat::Gptq)  // bbb does not read it
    fmt::print("\n");
  else
    fmt::print("; {}\n", table_sizes(*models::open_checkpoint(out)));
  return 0;
}

}  // namespace bbb::tools
