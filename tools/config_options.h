// Fields of TrainConfig as options of a command, and back.
#pragma once

#include <string>

#include "tools/cli.h"
#include "train/config_table.h"

namespace bbb::tools {

// Adds an option for each field for which wanted(field), with the value in `defaults` as its
// default, under `heading` or, if that is null, under the field's own.
template <typename Wanted>
void add_config_options(CommandLine& line, const train::TrainConfig& defaults, const char* heading,
                        const Wanted& wanted) {
  train::visit(defaults, [&](const auto& value, const train::Field& f) {
    if (f.group == nullptr || !wanted(f)) return;
    const std::string text = train::option_text(value, f);
    const auto option = cxxopts::value<std::string>();
    line.options(heading != nullptr ? heading : f.group)(
        f.name, f.help, text.empty() ? option : option->default_value(text));
  });
}

// Sets these fields to what was typed; the others stay.
template <typename Wanted>
void read_config_options(train::TrainConfig& config, const CommandLine& line,
                         const Wanted& wanted) {
  train::visit(config, [&]<typename T>(T& value, const train::Field& f) {
    if (f.group != nullptr && wanted(f) && line.has(f.name))
      value = train::parse<T>(line.text(f.name), f);
  });
}

// Why this option of the grid decides nothing; null: it decides something. `activation_bits`: the
// fewest of any stage.
inline const char* unused_in_grid(const train::TrainConfig& config, const std::string& option,
                                  int activation_bits) {
  if (config.quantizer != train::Quantizer::Lc && option.starts_with("lc-"))
    return "weights are not on the grid of --quantizer lc";
  if (config.ocs_ratio.empty() && !train::allocates(config) &&
      (option == "ocs-metric" || option == "split-side"))
    return "no channels are split without --ocs-ratio";
  if (config.any_precision.empty() && option == "nested-dequant")
    return "codes are not nested without --any-precision";
  if (activation_bits == 16 && option == "act-range") return "activations are not quantized";
  if (activation_bits >= 4 && option == "down-kurtosis")
    return "no activations have fewer than 4 bits";
  return nullptr;
}

}  // namespace bbb::tools
