// bbb bench gemv, gemm, decode and prefill: products, steps and prompts, with the bandwidth and the
// GEMM peak that the same run measures beside them.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdio>
#include <memory>
#include <span>

#include "data/files.h"
#include "data/tokenizer.h"
#include "tools/bench.h"
#include "tools/bench_command.h"
#include "tools/generation.h"
#include "tools/load_model.h"
#include "train/config.h"

namespace bbb::tools {

using engine::Backend;
using nlohmann::ordered_json;

namespace {

constexpr int64_t kRotationBytes = 256 << 20;  // several times a GPU's L2, or most CPUs' L3
struct GemvShape {
  int64_t n, k;
};
constexpr GemvShape kGemvShapes[] = {{14336, 4096}, {4096, 14336}, {4096, 4096}, {8192, 2048},
                                     {2048, 8192},  {2048, 2048},  {576, 576},   {192, 576},
                                     {1536, 576},   {576, 1536}};
constexpr GemvShape kGemmShapes[] = {{14336, 4096}, {4096, 14336}, {4096, 4096}};
constexpr int64_t kGemmRows[] = {16, 64, 256, 2048};
constexpr int64_t kMostTokens = 1 << 20;

auto text_option() { return cxxopts::value<std::string>(); }
auto text_option(const char* otherwise) { return text_option()->default_value(otherwise); }

constexpr double kMostSplit = 0.9;
constexpr const char* kSplitHelp = "ratio of the input channels that are split";
const std::vector<std::string> kRotations = {"none", "group"};
const std::vector<std::string> kRanges = {"minmax", "search"};

// The products of a block of --synthetic, or `otherwise`.
std::vector<GemvShape> shapes_of(const CommandLine& line, std::span<const GemvShape> otherwise) {
  if (!line.has("synthetic")) return {otherwise.begin(), otherwise.end()};
  std::vector<GemvShape> shapes;
  for (const models::LinearShape& linear :
       models::block_linears(models::synthetic_config(line.text("synthetic")))) {
    const auto same = [&](const GemvShape& s) { return s.n == linear.n && s.k == linear.k; };
    if (std::ranges::none_of(shapes, same)) shapes.push_back({linear.n, linear.k});
  }
  return shapes;
}

// Of one of the shapes: choosing the algorithm of each takes seconds, and they differ by 1 %.
double measure_inference_peak(Backend& backend) {
  return measure_gemm_peak(backend, {peak_shapes(backend).front()});
}

void refuse_cpu(const Backend& backend, const char* what) {
  BBB_CHECK(backend.device() == engine::DeviceType::Cuda, what,
            " compares kernels of a GPU, and this is a CPU; bbb bench gemv and decode take it");
}

// A comma-separated list of numbers of tokens.
std::vector<int64_t> token_counts(const CommandLine& line, const std::string& name) {
  const std::string text = line.text(name);
  std::vector<int64_t> counts;
  for (size_t at = 0; at <= text.size();) {
    const size_t comma = std::min(text.find(',', at), text.size());
    int64_t& count = counts.emplace_back();
    const auto [end, error] = std::from_chars(text.data() + at, text.data() + comma, count);
    if (error != std::errc() || end != text.data() + comma || count < 1 || count > kMostTokens)
      throw UsageError(cat("--", name, " takes numbers of tokens, such as 512,1024, not '",
                           data::printable(text), "'"));
    at = comma + 1;
  }
  return counts;
}

void add_model_options(CommandLine& line) {
  line.options()                                                                       //
      ("synthetic", cat("random weights: ", models::kSyntheticSizes), text_option())   //
      ("widths", "with --synthetic: of weights and activations, such as w2a2",         //
       text_option("w2a16"))                                                           //
      ("head-bits", "with --synthetic: of the head and a tied embedding: 16, 8 or 4",  //
       text_option("16"))                                                              //
      ("ocs-ratio", cat("with --synthetic: ", kSplitHelp), text_option("0"))           //
      ("rotate", "with --synthetic: inputs inside of groups: none or group",           //
       text_option("none"))                                                            //
      ("act-range", "with --synthetic: of activations: minmax or search",              //
       text_option("minmax"))                                                          //
      ("model", "directory or GGUF file", text_option())                               //
      ("bits", CommandLine::kNestedBitsHelp, text_option())                            //
      ("json", "write the result to this file too", text_option());
}

// The model of --synthetic or --model.
struct BenchModel {
  std::string name;  // with its widths
  std::unique_ptr<models::Llama> model;

  BenchModel(const CommandLine& line, Backend& backend) {
    if (line.has("synthetic")) {
      const train::Stage widths = parsed_widths(line);
      const int head_bits[] = {models::kDenseBits, 8, 4};
      const size_t head = line.choice("head-bits", {"16", "8", "4"});
      const double split = line.real("ocs-ratio", 0, kMostSplit);
      name = fmt::format("{}, w{}a{}, head of {} bits", line.text("synthetic"), widths.weight_bits,
                         widths.activation_bits, head_bits[head]);
      if (split > 0) name += fmt::format(", {:.0f} % of the channels split", 100 * split);
      const bool rotated = line.choice("rotate", kRotations) == 1;
      if (rotated) name += ", rotated";
      const bool searched = line.choice("act-range", kRanges) == 1;
      if (searched) name += ", activations searched";
      model = models::Llama::synthetic(
          backend, models::synthetic_config(line.text("synthetic")),
          {.weight = {.bits = widths.weight_bits},
           .input = {.bits = widths.activation_bits,
                     .range = searched ? quant::RangeRule::Search : quant::RangeRule::MinMax,
                     .hadamard = rotated},
           .head_bits = head_bits[head],
           .split = split},
          1);
    } else {
      const ModelFiles files(line, backend);
      name = files.path;
      model = files.load(backend);
    }
  }
  // Checks the options before any work.
  static void check(const CommandLine& line) {
    if (line.has("synthetic") == line.has("model"))
      throw UsageError("give either --synthetic or --model");
    for (const char* option : {"widths", "head-bits", "ocs-ratio", "rotate", "act-range"})
      if (line.has(option) && line.has("model"))
        throw UsageError(cat("--", option, " needs --synthetic: a model has its own"));
    if (line.has("bits") && line.has("synthetic")) throw UsageError("--bits needs --model");
    parsed_widths(line);
    line.choice("head-bits", {"16", "8", "4"});
    line.real("ocs-ratio", 0, kMostSplit);
    line.choice("rotate", kRotations);
    line.choice("act-range", kRanges);
    if (line.has("synthetic")) models::synthetic_config(line.text("synthetic"));
  }

 private:
  static train::Stage parsed_widths(const CommandLine& line) {
    const std::vector<train::Stage> widths = train::parse_stages(line.text("widths"));
    if (widths.size() != 1) throw UsageError("--widths takes one stage, such as w2a2");
    const auto is_one_of = [](int bits, std::initializer_list<int> allowed) {
      return std::ranges::find(allowed, bits) != allowed.end();
    };
    if (!is_one_of(widths[0].weight_bits, {2, 3, 4, 8}) ||
        !is_one_of(widths[0].activation_bits, {2, 3, 4, 8, 16}))
      throw UsageError("--widths: weights have 2, 3, 4 or 8 bits, activations these or 16");
    return widths[0];
  }
};

// A time of a product, and the least that it could take at the bandwidth in bytes read a second and
// at the GEMM peak measured beside it.
struct ProductTime {
  const char* name;
  double seconds, reading_s, multiplying_s;

  static std::array<ProductTime, 2> both(const TimedProduct& p, double bandwidth) {
    const double reading_s = p.bytes / bandwidth;
    const auto multiplying_s = [&](double peak) { return peak > 0 ? p.flops / peak : 0; };
    return {{{"cold", p.cold_s, reading_s, multiplying_s(p.cold_peak)},
             {"warm", p.warm_s, reading_s, multiplying_s(p.warm_peak)}}};
  }
  double floor_s() const { return std::max(reading_s, multiplying_s); }
  std::string text() const {
    return fmt::format(" {:8.2f} {:3.0f}%{}", 1e6 * seconds, 100 * floor_s() / seconds,
                       reading_s >= multiplying_s ? 'r' : 'g');
  }
};

// The options of gemv and gemm, and their table.
class ProductTable {
 public:
  static void add_options(CommandLine& line, const char* otherwise) {
    line.options()  //
        ("synthetic",
         cat("the products of a block of ", models::kSyntheticSizes, "; default: ", otherwise),
         text_option())                                                                 //
        ("bits", "of weights, and of the quantized x: 2, 3, 4 or 8", text_option("2"))  //
        ("ocs-ratio", kSplitHelp, text_option("0"))                                     //
        ("json", "write the result to this file too", text_option());
  }
  // Checks the options before any work.
  explicit ProductTable(const CommandLine& line)
      : bits_(std::array{2, 3, 4, 8}[line.choice("bits", {"2", "3", "4", "8"})]),
        split_(line.real("ocs-ratio", 0, kMostSplit)) {
    check_writable(line, "json");
  }

  void print_head() const {
    fmt::print("{:>14} {:>5} {:>8}", "N x K", "rows", "floor");
    for (const std::string& name : names()) fmt::print("  {:>13} {:>13}", name + " cold", "warm");
    fmt::print("\n");
  }
  quant::LinearFormat format(GemvShape shape) const {
    const quant::WeightGrid grid{.bits = bits_};
    return {.n = shape.n,
            .k = shape.k,
            .weight = grid,
            .order = models::evenly_split(shape.k, grid.group, split_)};
  }
  // A line, and its JSON: each product cold and warm, with percent of the floor.
  ordered_json print(GemvShape shape, int64_t rows, const GemvResult& r, double bandwidth) const {
    ordered_json json = {{"n", shape.n}, {"k", shape.k}, {"rows", rows}};
    std::string text;
    const TimedProduct* const products[] = {&r.packed, &r.quantized, &r.dense};
    for (size_t i = 0; i < std::size(products); ++i) {
      const TimedProduct& p = *products[i];
      ordered_json& of = json[names()[i]] = {{"bytes", p.bytes}};
      text += ' ';
      for (const ProductTime& time : ProductTime::both(p, bandwidth)) {
        text += time.text();
        of[cat(time.name, "_us")] = 1e6 * time.seconds;
        of[cat(time.name, "_bandwidth_fraction")] = time.reading_s / time.seconds;
        if (time.multiplying_s == 0) continue;
        of[cat(time.name, "_gemm_peak_tflops")] = p.flops / time.multiplying_s / 1e12;
        of[cat(time.name, "_gemm_peak_fraction")] = time.multiplying_s / time.seconds;
      }
    }
    const double floor_s = ProductTime::both(r.packed, bandwidth).front().floor_s();
    json["floor_us"] = 1e6 * floor_s;
    fmt::print("{:>14} {:>5} {:8.2f}{}\n", fmt::format("{} x {}", shape.n, shape.k), rows,
               1e6 * floor_s, text);
    std::fflush(stdout);  // products of many rows take a while
    return json;
  }

 private:
  std::array<std::string, 3> names() const {
    return {fmt::format("w{}a16", bits_), fmt::format("w{0}a{0}", bits_), "dense"};
  }
  int bits_;
  double split_;
};

}  // namespace

int bench_gemv_command(const Arguments& arguments) {
  CommandLine line("bench gemv", "Time a few rows times a packed matrix, and times a dense one");
  line.options()("rows", "of x", text_option("1"));
  ProductTable::add_options(line, "a table of shapes");
  if (!line.parse(arguments)) return 0;
  const ProductTable table(line);
  const int64_t rows = line.integer("rows", 1, Backend::kMaxPackedRows);
  const std::vector<GemvShape> shapes = shapes_of(line, kGemvShapes);
  const auto backend = line.make_backend();
  const double bandwidth = measure_read_bandwidth(*backend);
  fmt::print("{}: reads {:.0f} GB/s; us, and percent of that bandwidth\n", backend->device_name(),
             bandwidth / 1e9);
  table.print_head();
  ordered_json json = {
      {"device", backend->device_name()}, {"read_gb_per_s", bandwidth / 1e9}, {"rows", rows}};
  for (const GemvShape& shape : shapes)
    json["shapes"].push_back(table.print(
        shape, rows, bench_gemv(*backend, table.format(shape), rows, kRotationBytes), bandwidth));
  write_json(line, json);
  return 0;
}

int bench_gemm_command(const Arguments& arguments) {
  CommandLine line("bench gemm",
                   "Time 16, 64, 256 and 2048 rows times a packed matrix, and times a dense one");
  ProductTable::add_options(line, "those of an 8B's");
  if (!line.parse(arguments)) return 0;
  const ProductTable table(line);
  const std::vector<GemvShape> shapes = shapes_of(line, kGemmShapes);
  const auto backend = line.make_backend();
  refuse_cpu(*backend, "bench gemm");
  const double bandwidth = measure_read_bandwidth(*backend);
  const PeakProducts peak(*backend);
  fmt::print(
      "{}: reads {:.0f} GB/s; us, and percent of what limits the product: r reading, g the GEMM "
      "peak, measured in turns with it\n",
      backend->device_name(), bandwidth / 1e9);
  table.print_head();
  ordered_json json = {{"device", backend->device_name()}, {"read_gb_per_s", bandwidth / 1e9}};
  for (const GemvShape& shape : shapes)
    for (const int64_t rows : kGemmRows)
      json["products"].push_back(table.print(
          shape, rows, bench_gemm(*backend, table.format(shape), rows, kRotationBytes, peak),
          bandwidth));
  write_json(line, json);
  return 0;
}

int bench_decode_command(const Arguments& arguments) {
  CommandLine line("bench decode", "Time greedy decoding after prompts of several lengths");
  add_model_options(line);
  line.options()                                                                                //
      ("batch", "sequences, 1 to 64", text_option("1"))                                         //
      ("prefill", "tokens of each prompt", text_option("512,1024,2048,4096"))                   //
      ("tokens", "generated after each prompt", text_option("256"))                             //
      ("context", "and the median step with so many tokens in the cache", text_option("1024"))  //
      ("kv-bits", CommandLine::kKvBitsHelp, text_option("16"));
  if (!line.parse(arguments)) return 0;
  BenchModel::check(line);
  check_writable(line, "json");
  DecodeBench bench{.batch = line.integer("batch", 1, 64),
                    .prompts = token_counts(line, "prefill"),
                    .tokens = line.integer("tokens", 1, kMostTokens),
                    .context = line.integer("context", 1, kMostTokens),
                    .kv = line.kv_format()};
  const auto backend = line.make_backend();
  const double bandwidth_before = measure_read_bandwidth(*backend);
  const BenchModel loaded(line, *backend);
  const int64_t positions = loaded.model->config().max_position;
  const int64_t asked = bench.positions();
  bench.shrink(positions, !line.has("prefill"), !line.has("context"));
  if (bench.positions() < asked)
    fmt::print("the model has {} positions: no longer prompts, and {} tokens in the cache\n",
               positions, bench.context);
  BBB_CHECK(bench.positions() <= positions, loaded.name, " has ", positions,
            " positions, and the longest of --prefill and --context needs ", bench.positions());
  const DecodeResult r = bench_decode(*loaded.model, bench);
  // A shared machine's bandwidth changes: the larger of two makes the smaller share.
  const double bandwidth = std::max(bandwidth_before, measure_read_bandwidth(*backend));

  const auto gb = [](int64_t bytes) { return static_cast<double>(bytes) / 1e9; };
  fmt::print("{}, {} sequences, on {}, which reads {:.0f} GB/s\n", loaded.name, bench.batch,
             backend->device_name(), bandwidth / 1e9);
  fmt::print(
      "a step reads {:.3f} GB of blocks, {:.3f} GB of head, and {:.3f} MB a token of a sequence\n",
      gb(r.weight_bytes), gb(r.head_bytes), 1e3 * gb(r.kv_bytes));
  fmt::print("{:>8} {:>12} {:>12} {:>10} {:>12} {:>8}\n", "context", "prefill ms", "tokens/s",
             "step ms", "tokens/s", "of read");
  ordered_json json = {{"model", loaded.name},
                       {"device", backend->device_name()},
                       {"read_gb_per_s", bandwidth / 1e9},
                       {"batch", bench.batch},
                       {"tokens", bench.tokens},
                       {"block_bytes", r.weight_bytes},
                       {"head_bytes", r.head_bytes},
                       {"kv_bits", bench.kv.bits},
                       {"kv_bytes_per_token", r.kv_bytes}};
  const auto report = [&](const DecodeTime& t) {
    const double fraction = t.bytes / t.step_s / bandwidth;
    const auto batch = static_cast<double>(bench.batch);
    const double prompt_tokens = batch * static_cast<double>(t.prompt);
    ordered_json row = {{"context", t.prompt}};
    std::string prefill = fmt::format("{:>12} {:>12}", "", "");
    if (t.prefill_s > 0) {
      prefill = fmt::format("{:12.2f} {:12.0f}", 1e3 * t.prefill_s, prompt_tokens / t.prefill_s);
      row["prefill_ms"] = 1e3 * t.prefill_s;
      row["prefill_tokens_per_s"] = prompt_tokens / t.prefill_s;
    }
    row["step_bytes"] = t.bytes;
    row["step_ms"] = 1e3 * t.step_s;
    row["tokens_per_s"] = batch / t.step_s;
    row["bandwidth_fraction"] = fraction;
    fmt::print("{:>8} {} {:10.3f} {:12.1f} {:6.1f} %\n", t.prompt, prefill, 1e3 * t.step_s,
               batch / t.step_s, 100 * fraction);
    return row;
  };
  for (const DecodeTime& t : r.prefilled) json["after_prefill"].push_back(report(t));
  fmt::print("median of steps, no prefill:\n");
  json["at_context"] = report(r.at_context);
  write_json(line, json);
  return 0;
}

int bench_prefill_command(const Arguments& arguments) {
  CommandLine line("bench prefill", "Time a prompt through packed weights, and through dense ones");
  add_model_options(line);
  line.options()("tokens", "of the prompt", text_option("2048"));
  if (!line.parse(arguments)) return 0;
  BenchModel::check(line);
  check_writable(line, "json");
  int64_t tokens = line.integer("tokens", 1, kMostTokens);
  const auto backend = line.make_backend();
  refuse_cpu(*backend, "bench prefill");

  struct Timed {
    std::string name;
    double seconds, flops;
  };
  std::vector<Timed> timed;
  const auto time = [&](const std::string& name, models::Llama& model) {
    timed.push_back({name, bench_prefill(model, tokens), prefill_flops(model.config(), tokens)});
  };
  {
    const BenchModel loaded(line, *backend);
    const int64_t positions = loaded.model->config().max_position;
    if (!line.has("tokens")) tokens = std::min(tokens, positions);
    BBB_CHECK(tokens <= positions, loaded.name, " has ", positions, " positions, not ", tokens);
    time(loaded.name, *loaded.model);
  }
  if (line.has("synthetic")) {
    const std::string name = line.text("synthetic");
    const auto source = models::open_checkpoint(cat(data::kSyntheticPrefix, name));
    const auto model = load_model(*backend, *source);
    time(name + ", bf16", *model);
  }
  const double peak = measure_inference_peak(*backend);
  fmt::print("a prompt of {} tokens on {}, GEMM peak {:.1f} TFLOP/s\n", tokens,
             backend->device_name(), peak / 1e12);
  ordered_json json = {
      {"device", backend->device_name()}, {"tokens", tokens}, {"gemm_peak_tflops", peak / 1e12}};
  for (const Timed& t : timed) {
    const double per_s = static_cast<double>(tokens) / t.seconds;
    const double fraction = t.flops / t.seconds / peak;
    fmt::print("  {}: {:.2f} ms, {:.0f} tokens/s, {:.1f} TFLOP/s, {:.1f} % of the peak\n", t.name,
               1e3 * t.seconds, per_s, t.flops / t.seconds / 1e12, 100 * fraction);
    json["models"].push_back({{"model", t.name},
                              {"ms", 1e3 * t.seconds},
                              {"tokens_per_s", per_s},
                              {"tflops", t.flops / t.seconds / 1e12},
                              {"gemm_peak_fraction", fraction}});
  }
  write_json(line, json);
  return 0;
}

}  // namespace bbb::tools
