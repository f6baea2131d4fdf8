// bbb inspect: a checkpoint's architecture and tensors, from headers alone.
#include <fmt/format.h>

#include "models/checkpoint.h"
#include "tools/cli.h"
#include "tools/load_model.h"

namespace bbb::tools {

int inspect_command(const Arguments& arguments) {
  CommandLine line("inspect", "Architecture, tensors, dtypes and bits per weight of a checkpoint");
  line.options()("model", "directory or GGUF file", cxxopts::value<std::string>());
  if (!line.parse(arguments)) return 0;
  const auto source = models::open_checkpoint(line.required("model"));
  const models::LlamaConfig& c = source->config();

  const char* kinds[] = {"Hugging Face", "GGUF", "exported by bbb"};
  fmt::print("{}  ({}, {})\n", source->path(), c.model_type,
             kinds[static_cast<int>(source->kind())]);
  fmt::print("layers {}  d_model {}  hidden {}  heads {}  kv_heads {}  head_dim {}  vocab {}\n",
             c.layers, c.d_model, c.hidden, c.heads, c.kv_heads, c.head_dim, c.vocab);
  fmt::print("rope_theta {}  rope_scaling {}  rms_eps {}  sliding_window {}  tied_head {}\n",
             c.rope_theta,
             c.rope_scaling            ? name_of(c.rope_scaling->kind)
             : !c.rope_factors.empty() ? "factors"
                                       : "none",
             c.rms_eps, c.sliding_window, c.tied_head);
  if (c.qkv_bias || c.output_bias || c.mlp_bias || c.qk_norm)
    fmt::print("qkv_bias {}  output_bias {}  mlp_bias {}  qk_norm {}\n", c.qkv_bias, c.output_bias,
               c.mlp_bias, c.qk_norm);
  int64_t bytes = 0;
  const auto tensors = source->list();
  for (const models::TensorInfo& t : tensors) {
    fmt::print("{:<52} {:<8} {:<18} {:>12}\n", t.name, t.dtype, engine::to_string(t.shape),
               t.bytes);
    bytes += t.bytes;
  }
  fmt::print("{} tensors, {:.1f} MB; linears: {} weights, {:.4f} bits per weight\n", tensors.size(),
             static_cast<double>(bytes) / 1e6, c.linear_parameters(), source->bits_per_weight());
  fmt::print("{}\n", table_sizes(*source));
  const quant::ActivationBits activations = source->bits_per_activation();
  fmt::print("activations: {:.4f} bits of codes, {:.4f} with scales\n", activations.codes,
             activations.all);
  return 0;
}

}  // namespace bbb::tools
