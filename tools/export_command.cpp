// bbb export: a trained run, or a model rounded to nearest, as a directory that other programs
// load.
#include <fmt/format.h>

#include "models/packed_checkpoint.h"
#include "tools/cli.h"
#include "train/train.h"

namespace bbb::tools {

int export_command(const Arguments& arguments) {
  CommandLine line("export", "Write a trained run, or a rounded model, as a model directory");
  line.options()                                                                   //
      ("run", "directory of a finished bbb train", cxxopts::value<std::string>())  //
      ("model", "with --rtn: directory or GGUF file; with --run: where the run's model is now",
       cxxopts::value<std::string>())                                                          //
      ("rtn", "round --model to the nearest code, without training")                           //
      ("bits", "with --rtn: 2, 3, 4 or 8", cxxopts::value<std::string>()->default_value("2"))  //
      ("group-size", "with --rtn: 32, 64 or 128",
       cxxopts::value<std::string>()->default_value("32"))         //
      ("out", "directory to make", cxxopts::value<std::string>())  //
      ("format", "bbb: packed; hf: dequantized BF16 safetensors",
       cxxopts::value<std::string>()->default_value("bbb"));
  if (!line.parse(arguments)) return 0;
  const std::string out = line.required("out");
  const auto format = line.choice("format", {"bbb", "hf"}) == 0 ? models::ExportFormat::Packed
                                                                : models::ExportFormat::HuggingFace;
  if (line.has("rtn") == line.has("run"))
    throw UsageError("give either --run RUN, or --model M with --rtn");

  double bits_per_weight = 0;
  if (line.has("run")) {
    bits_per_weight =
        train::export_run(*line.make_backend(), line.text("run"), line.text("model"), out, format);
  } else {
    const int bits[] = {2, 3, 4, 8}, groups[] = {32, 64, 128};
    engine::WeightGrid spec;
    spec.bits = bits[line.choice("bits", {"2", "3", "4", "8"})];
    spec.group = groups[line.choice("group-size", {"32", "64", "128"})];
    const std::string path = line.required("model");
    const auto source = models::open_checkpoint(path);
    const auto tokenizer = data::load_tokenizer(path);
    bits_per_weight =
        train::export_rtn(*line.make_backend(), *source, *tokenizer, spec, out, format);
  }
  fmt::print("{}: {:.4f} bits per weight, read from the file\n", out, bits_per_weight);
  return 0;
}

}  // namespace bbb::tools
