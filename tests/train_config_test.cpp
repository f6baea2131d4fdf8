// The table of TrainConfig: run.json, the options of bbb train, and invalid values.
#include <fcntl.h>
#include <unistd.h>

#include <catch2/catch.hpp>

#include "tests/printed.h"
#include "tests/tiny_run.h"
#include "tools/cli.h"

namespace bbb::tests {
namespace {

using Catch::Matchers::Contains;
using train::Field;
using train::TrainConfig;

template <typename T>
void change(T& value) {
  if constexpr (requires { value.emplace_back(); })
    change(value.emplace_back());
  else if constexpr (requires { value.has_value(); })
    change(value.emplace());
  else if constexpr (std::is_base_of_v<train::Stage, T>)
    value.weight_bits = 4;
  else if constexpr (std::is_same_v<T, std::string>)
    value += "x";
  else if constexpr (std::is_enum_v<T>)
    value = static_cast<T>(value == T{} ? 1 : 0);
  else
    value += static_cast<T>(3.25);
}

// The texts of the stored fields, by field name.
std::map<std::string, std::string> texts(const TrainConfig& config) {
  std::map<std::string, std::string> all;
  train::visit_stored(config, [&](const auto& value, const Field& f) {
    CHECK(all.emplace(f.name, train::write(value, f.rule)).second);
  });
  return all;
}

std::string help_of(int (*command)(const tools::Arguments&)) {
  const TempDir scratch;
  std::fflush(stdout);
  const int console = dup(STDOUT_FILENO);
  const int file = open((scratch / "help").c_str(), O_WRONLY | O_CREAT, 0600);
  dup2(file, STDOUT_FILENO);
  const int code = command({"--help"});
  std::fflush(stdout);
  dup2(console, STDOUT_FILENO);
  close(console);
  close(file);
  CHECK(code == 0);
  return data::read_file(scratch / "help");
}

}  // namespace

TEST_CASE("train config: every stored field survives run.json, and a missing one is refused",
          "[config]") {
  TrainConfig config;
  train::visit_stored(config, [](auto& value, const Field&) { change(value); });
  const std::string json = train::to_json(config);
  const TrainConfig again = train::config_from_json(json, "run.json");
  const auto had = texts({}), wanted = texts(config), got = texts(again);
  CHECK(train::to_json(again) == json);
  CHECK(got == wanted);
  const train::Json record = train::Json::parse(json);
  CHECK(record.size() == wanted.size());
  for (const auto& [name, text] : wanted) {
    CAPTURE(name);
    CHECK(text != had.at(name));
  }
  for (const auto& item : record.items()) {
    train::Json lacking = record;
    lacking.erase(item.key());
    if (item.key() == "doc_end")
      CHECK_FALSE(train::config_from_json(lacking.dump(), "run.json").doc_end);
    else
      CHECK_THROWS_WITH(train::config_from_json(lacking.dump(), "run.json"),
                        Contains("run.json: not a training configuration") &&
                            Contains("'" + item.key() + "' not found"));
  }
}

TEST_CASE("train config: bbb train --help lists every option once", "[config]") {
  const std::string help = help_of(tools::train_command);
  const TrainConfig config;
  train::visit(config, [&](const auto&, const Field& f) {
    if (f.group == nullptr) return;
    const std::string option = cat("--", f.name, " arg");
    CAPTURE(option);
    const size_t at = help.find(option);
    CHECK(at != std::string::npos);
    CHECK(help.find(option, at + 1) == std::string::npos);
    if (*f.group != '\0') CHECK_THAT(help, Contains(cat(" ", f.group, " options:\n")));
  });
}

TEST_CASE("train config: bbb export --help lists the options of the grid", "[config]") {
  const std::string help = help_of(tools::export_command);
  const TrainConfig config;
  int found = 0;
  train::visit(config, [&](const auto&, const Field& f) {
    if (f.group == nullptr || f.group != std::string(train::kGrid)) return;
    CAPTURE(f.name);
    CHECK_THAT(help, Contains(cat("--", f.name, " arg")));
    ++found;
  });
  CHECK(found == 14);
  for (const char* option : {"--act-bits arg", "--data arg", "--samples arg", "--rtn"})
    CHECK_THAT(help, Contains(option));
  for (const char* option : {"--schedule arg", "--to arg", "--from arg", "--e2e-stages arg"})
    CHECK_THAT(help_of(tools::train_command), Contains(option));
}

TEST_CASE("train config: every option word selects its enumerator", "[config]") {
  using namespace train;
  TrainConfig c;
  const auto check = [&]<typename E>(const char* option, const E& field,
                                     const std::vector<std::pair<const char*, E>>& words) {
    for (const auto& [word, value] : words) {
      CAPTURE(option, word);
      set_option(c, option, word);
      CHECK(field == value);
    }
  };
  check("input-stream", c.input_stream,
        {{"same", InputStream::Same}, {"higher", InputStream::Higher}, {"mix", InputStream::Mix}});
  check("range", c.range, {{"minmax", RangeRule::MinMax}, {"search", RangeRule::Search}});
  check("act-range", c.act_range, {{"minmax", RangeRule::MinMax}, {"search", RangeRule::Search}});
  check("rotate", c.rotate, {{"none", Rotate::None}, {"group", Rotate::Group}});
  check("quantizer", c.quantizer,
        {{"minmax", Quantizer::MinMax}, {"seq", Quantizer::Seq}, {"lc", Quantizer::Lc}});
  check("ste", c.ste, {{"clip", Ste::Clip}, {"all", Ste::All}, {"trust", Ste::Trust}});
  check("grid-train", c.grid_train,
        {{"none", GridTrain::None},
         {"scales", GridTrain::Scales},
         {"scales-zeros", GridTrain::ScalesZeros},
         {"ratios", GridTrain::Ratios}});
  check("lc-map", c.lc_map,
        {{"scalar", LcMap::Scalar},
         {"orthonormal", LcMap::Orthonormal},
         {"learned", LcMap::Learned}});
  check("lc-gradient", c.lc_gradient, {{"dge", LcGradient::Dge}, {"ste", LcGradient::Straight}});
  check("ocs-metric", c.ocs_metric,
        {{"l2-mean", SplitMetric::L2Mean},
         {"l2-max", SplitMetric::L2Max},
         {"act-max", SplitMetric::ActivationMax},
         {"weight-max", SplitMetric::WeightMax},
         {"kurtosis", SplitMetric::Kurtosis}});
  check("split-side", c.split_side,
        {{"weight", SplitSideChoice::Weight},
         {"activation", SplitSideChoice::Activation},
         {"auto", SplitSideChoice::Auto}});
  check("nested-dequant", c.nested_dequant,
        {{"middle", NestedDequant::Middle}, {"floor", NestedDequant::Floor}});
  check("target", c.target, {{"full", Target::Full}, {"follow", Target::Follow}});
  check("block-schedule", c.block_schedule,
        {{"all", BlockSchedule::All},
         {"stochastic", BlockSchedule::Stochastic},
         {"prefix", BlockSchedule::Prefix}});
  check("lora-end", c.lora_end, {{"merge", LoraEnd::Merge}, {"discard", LoraEnd::Discard}});
  check("lora-match", c.lora_match,
        {{"auto", LoraMatch::Auto},
         {"none", LoraMatch::None},
         {"moments", LoraMatch::Moments},
         {"kl", LoraMatch::Kl},
         {"both", LoraMatch::Both}});
  check("e2e-loss", c.e2e_loss,
        {{"kl", EndToEndLoss::Kl},
         {"ce", EndToEndLoss::CrossEntropy},
         {"jsd", EndToEndLoss::JensenShannon}});
  check("e2e-train", c.e2e_train, {{"scales", EndToEndTrain::Scales}, {"all", EndToEndTrain::All}});
  check("e2e-embedding", c.e2e_embedding,
        {{"train", EmbeddingTrain::Train}, {"keep", EmbeddingTrain::Keep}});
  check("e2e-snap", c.e2e_snap, {{"auto", Snap::Auto}, {"on", Snap::On}, {"off", Snap::Off}});
  check("gemm-algorithms", c.gemm_algorithms,
        {{"timed", GemmAlgorithms::Timed}, {"heuristic", GemmAlgorithms::Heuristic}});
}

TEST_CASE("train config: an option's text is parsed, or refused by an error that names the option",
          "[config]") {
  TrainConfig c;
  set_option(c, "lr", "1e-4, 4e-4");
  CHECK(c.lr == std::vector<double>{1e-4, 4e-4});
  set_option(c, "lr", "auto");
  CHECK(c.lr.empty());
  set_option(c, "stages", "w4a16,w2a16");
  CHECK(c.stages == std::vector<train::Stage>{{4, 16}, {2, 16}});
  set_option(c, "stages", "");
  set_option(c, "e2e-stages", "w2a16:6,w2a2:4");
  CHECK(c.e2e_stages == std::vector<train::ModelStage>{{{2, 16}, 6}, {{2, 2}, 4}});
  set_option(c, "ocs-ratio", "0.05,0.15");
  CHECK(c.ocs_ratio == std::vector<double>{0.05, 0.15});
  set_option(c, "ocs-ratio", "none");
  CHECK(c.ocs_ratio.empty());
  set_option(c, "any-precision", "8,4,2");
  CHECK(c.any_precision == std::vector<int>{8, 4, 2});
  CHECK(c.stages.empty());
  set_option(c, "e2e-jsd-beta", "0.25");
  CHECK(c.e2e_jsd_beta == 0.25);
  set_option(c, "gpu-memory", "2.5");
  CHECK(c.memory.device_bytes == 2'500'000'000);
  set_option(c, "doc-end", "7");
  CHECK(c.doc_end == 7);
  set_option(c, "seed", "18446744073709551615");
  CHECK(c.seed == UINT64_MAX);

  const std::pair<const char*, const char*> wrong[] = {{"samples", "0"},
                                                       {"samples", "many"},
                                                       {"samples", "1.5"},
                                                       {"samples", ""},
                                                       {"samples", "auto"},
                                                       {"seq-len", "1"},
                                                       {"val-samples", "-1"},
                                                       {"seed", "-1"},
                                                       {"group-size", "33"},
                                                       {"lr", ""},
                                                       {"lr", "0"},
                                                       {"lr", "1e-3,"},
                                                       {"lr", "nan"},
                                                       {"lr", "1.5"},
                                                       {"e2e-lr", "0"},
                                                       {"e2e-lr", "inf"},
                                                       {"e2e-jsd-beta", "0"},
                                                       {"e2e-jsd-beta", "1"},
                                                       {"e2e-jsd-beta", "0.999999999"},
                                                       {"e2e-jsd-beta", "nan"},
                                                       {"doc-end", "-1"},
                                                       {"doc-end", ""},
                                                       {"doc-end", "3000000000"},
                                                       {"save-every", "0"},
                                                       {"scratch", ""},
                                                       {"gpu-memory", "0"},
                                                       {"gpu-memory", ""},
                                                       {"gpu-memory", "1e300"},
                                                       {"e2e-steps", "-1"},
                                                       {"recompute", "all"},
                                                       {"input-stream", ""},
                                                       {"e2e-micro-batch", "0"},
                                                       {"stages", "w5x"},
                                                       {"stages", ","},
                                                       {"e2e-stages", "w2a16"},
                                                       {"e2e-stages", "w2a16:0"},
                                                       {"e2e-stages", "w2a16:1,"},
                                                       {"ocs-ratio", "0"},
                                                       {"ocs-ratio", "1"},
                                                       {"ocs-ratio", "0.1,2"},
                                                       {"ocs-metric", "l1"},
                                                       {"split-side", "both"},
                                                       {"range", "mean"},
                                                       {"act-range", ""},
                                                       {"rotate", "rows"},
                                                       {"act-outliers", "-1"},
                                                       {"down-kurtosis", "-1"},
                                                       {"ste-trust", "0"},
                                                       {"any-precision", "8,5"},
                                                       {"nested-dequant", "top"},
                                                       {"target", "half"},
                                                       {"block-schedule", "random"},
                                                       {"first-ratio", "0"},
                                                       {"first-ratio", "1.5"},
                                                       {"depth-bias", "-0.5"},
                                                       {"extrapolate", ""}};
  for (const auto& [option, text] : wrong) {
    CAPTURE(option, text);
    CHECK_THROWS_AS(set_option(c, option, text), UsageError);
    CHECK_THROWS_WITH(set_option(c, option, text),
                      Contains(cat("--", option, " is '", text, "'; it takes ")));
  }
}

TEST_CASE("train config: the command refuses options that exclude each other, by name",
          "[config]") {
  const std::pair<tools::Arguments, const char*> wrong[] = {
      {{"--schedule", "D"}, "--schedule"},
      {{"--schedule", "B", "--to", "w2a16"}, "--to w2a2"},
      {{"--schedule", "A", "--stages", "w2a16"}, "--schedule and --stages"},
      {{"--schedule", "A", "--to", "w4a4"}, "--to"},
      {{"--to", "w2a2"}, "--to says where a schedule ends: it needs --schedule"},
      {{"--e2e-stages", "w2a2"}, "--e2e-stages is 'w2a2'"},
      {{"--ocs-ratio", "2"}, "--ocs-ratio is '2'"},
      {{"--split-side", "left"}, "--split-side is 'left'"},
      {{"--any-precision", "8,7"}, "--any-precision is '8,7'"},
  };
  for (const auto& [options, message] : wrong) {
    CAPTURE(message);
    tools::Arguments arguments = {"--model", "absent", "--data", "absent", "--out", "absent"};
    arguments.insert(arguments.end(), options.begin(), options.end());
    CHECK_THROWS_AS(tools::train_command(arguments), UsageError);
    CHECK_THROWS_WITH(tools::train_command(arguments), Contains(message));
  }
}

TEST_CASE("train config: typed options that decide nothing are named", "[config]") {
  const auto errors = [](const tools::Arguments& command, const tools::Arguments& options) {
    tools::Arguments arguments = command;
    arguments.insert(arguments.end(), options.begin(), options.end());
    return bbb(arguments).err;
  };
  const struct {
    tools::Arguments options;
    const char* unused;
  } cases[] = {
      {{"--e2e-steps", "0", "--e2e-loss", "ce"}, "--e2e-loss is unused: there is no end-to-end"},
      {{"--target", "follow"}, "--target is unused: there is no block phase"},
      {{"--stages", "w2a16", "--first-ratio", "0.5"}, "--first-ratio is unused: --block-schedule"},
      {{"--stages", "w2a16", "--depth-bias", "2"}, "--depth-bias is unused: only"},
      {{"--block-schedule", "prefix", "--depth-bias", "2"}, "--depth-bias is unused: only"},
      {{"--lc-map", "learned"}, "--lc-map is unused: weights are not on the grid of"},
      {{"--ocs-metric", "kurtosis"}, "--ocs-metric is unused: no channels are split without"},
      {{"--split-side", "auto"}, "--split-side is unused: no channels are split without"},
      {{"--nested-dequant", "floor"}, "--nested-dequant is unused: codes are not nested without"},
      {{"--stages", "w2a16", "--act-range", "search"},
       "--act-range is unused: activations are not"},
      {{"--e2e-stages", "w2a4:1", "--down-kurtosis", "5"}, "--down-kurtosis is unused: no activ"},
      {{"--lora-end", "discard"}, "--lora-end is unused: there are no adapters without"},
      {{"--stages", "w2a16", "--e2e-steps", "0", "--lora-rank", "4"}, "--lora-rank is unused"},
      {{"--stages", "w2a16", "--lora-rank", "4", "--lora-match", "kl"}, "--lora-match is unused"},
      {{"--e2e-jsd-beta", "0.3"}, "--e2e-jsd-beta is unused: --e2e-loss is not jsd"},
      {{"--e2e-train", "scales", "--e2e-embedding", "train"}, "--e2e-embedding is unused"},
      {{"--ste", "all", "--ste-trust", "2"}, "--ste-trust is unused: --ste is not trust"},
      {{"--e2e-train", "scales", "--ste", "all"}, "--ste is unused: --e2e-train scales"},
      {{"--e2e-loss", "ce", "--teacher", "cached"}, "--teacher is unused: --e2e-loss ce"},
  };
  const tools::Arguments train = {"train", "--model", "absent", "--data", "absent", "--out", "out"};
  for (const auto& c : cases) {
    CAPTURE(c.unused);
    CHECK_THAT(errors(train, c.options), Contains(c.unused));
  }
  CHECK_THAT(errors(train, {"--block-schedule", "stochastic", "--first-ratio",    "0.5",
                            "--depth-bias",     "2",          "--ocs-ratio",      "0.1",
                            "--ocs-metric",     "kurtosis",   "--split-side",     "auto",
                            "--any-precision",  "8,2",        "--nested-dequant", "floor",
                            "--e2e-loss",       "jsd",        "--e2e-jsd-beta",   "0.3"}),
             !Contains("is unused"));
  CHECK_THAT(errors(train, {"--schedule", "B", "--act-range", "search"}), !Contains("--schedule"));
  CHECK_THAT(errors(train, {"--e2e-stages", "w2a16:1,w2a2:1", "--act-range", "minmax",
                            "--down-kurtosis", "5"}),
             !Contains("is unused"));

  const std::string of_run =
      errors({"export", "--run", "absent", "--out", "out"},
             {"--bits", "4", "--act-bits", "2", "--group-size", "64", "--range", "search"});
  for (const char* option : {"bits", "act-bits", "group-size", "range"})
    CHECK_THAT(of_run, Contains(cat("--", option, " is unused: the run decides it\n")));
  CHECK_THAT(errors({"export", "--rtn", "--model", "absent", "--out", "out"},
                    {"--split-side", "auto", "--range", "minmax"}),
             Contains("--split-side is unused: no channels") && !Contains("--range"));
  const tools::Arguments rounded = {"export", "--rtn", "--model", "absent", "--out", "out"};
  CHECK_THAT(errors(rounded, {"--data", "absent", "--samples", "4", "--act-bits", "2"}),
             Contains("--data is unused: no option needs") && Contains("--samples is unused"));
  CHECK_THAT(errors(rounded, {"--data", "absent", "--range", "search", "--act-bits", "2",
                              "--act-range", "search", "--down-kurtosis", "5"}),
             !Contains("is unused"));
}

TEST_CASE("train config: --from refuses nothing that was not typed", "[config]") {
  const TempDir dir;
  const auto write_run = [&](const std::string& name, const auto& change) {
    train::RunIdentity identity;
    identity.device = "cpu";
    identity.config.model = "synthetic:smollm2-135m";
    identity.config.data = dir / "absent.txt";
    change(identity.config);
    std::filesystem::create_directory(dir / name);
    data::write_file_atomic(dir / (name + "/run.json"), identity.to_json());
  };
  write_run("searched", [](TrainConfig& c) { c.range = train::RangeRule::Search; });
  write_run("nested", [](TrainConfig& c) { c.any_precision = {8, 4, 2}; });
  write_run("split", [](TrainConfig& c) { c.ocs_ratio = {0.1}; });
  write_run("target", [](TrainConfig& c) { c.target_bits = 2.6; });
  const auto from = [&](const std::string& name, tools::Arguments options) {
    const tools::Arguments common = {"train",    "--device", "cpu",      "--from",
                                     dir / name, "--out",    dir / "out"};
    options.insert(options.begin(), common.begin(), common.end());
    return bbb(options);
  };
  // The text is read after the options are checked.
  const auto accepted = [&](const std::string& name, const tools::Arguments& options) {
    const Output output = from(name, options);
    CAPTURE(name, options);
    CHECK(output.code == 1);
    CHECK_THAT(output.err, Contains("absent.txt"));
  };
  accepted("searched", {});
  accepted("searched", {"--any-precision", "8,4,2"});
  accepted("nested", {});
  accepted("nested", {"--e2e-stages", "w2a16:1"});
  accepted("nested", {"--e2e-stages", "w8a16:1,w2a16:1"});
  accepted("nested", {"--block-schedule", "prefix", "--schedule", "A"});
  accepted("target", {});
  for (const tools::Arguments& options : {tools::Arguments{"--ocs-ratio", "0.1"},
                                          {"--any-precision", "8,4,2"},
                                          {"--target-bits", "none"},
                                          {"--target-us", "1"}})
    accepted("target", options);
  for (const char* name : {"split", "nested"}) accepted(name, {"--target-bits", "2.6"});
  const auto refused = [&](const std::string& name, const tools::Arguments& options,
                           const char* message) {
    const Output output = from(name, options);
    CAPTURE(message);
    CHECK(output.code == 2);
    CHECK_THAT(output.err, Contains(message));
  };
  refused("searched", {"--e2e-steps", "0"}, "--e2e-steps 0 leaves nothing to train");
  refused("searched", {"--stages", "w2a16"}, "--from starts the end-to-end phase");
  refused("searched", {"--any-precision", "8,4,2", "--range", "search"}, "no --range search");
  refused("split", {"--ocs-ratio", "0.2", "--target-bits", "2.6"}, "no --ocs-ratio");
  refused("target", {"--target-bits", "2.1"}, "--target-bits 2.1 is out of reach");
  refused("nested", {"--any-precision", "8,2", "--e2e-stages", "w2a16:1"}, "not w2a16");
}

TEST_CASE("train config: values that a program sets must obey the options' rules", "[config]") {
  const auto resolved = [](auto change) {
    TrainConfig config;
    config.seq_len = 32;
    config.e2e_steps = 1;
    change(config);
    return train::resolve(config, tiny_config(), engine::DeviceType::Cpu);
  };
  CHECK(resolved([](TrainConfig&) {}).e2e_lr.at(0) > 0);
  // There is nothing for which embedding and head would train.
  for (const auto& [train, steps, used] :
       {std::tuple{"all", 1, true}, {"scales", 1, false}, {"all", 0, false}}) {
    const TrainConfig config = resolved([&](TrainConfig& c) {
      c.e2e_steps = steps;
      c.stages = train::parse_stages("w2a16");
      set_option(c, "e2e-train", train);
      set_option(c, "e2e-embedding", "train");
    });
    CHECK((config.e2e_embedding == train::EmbeddingTrain::Train) == used);
  }
  CHECK_THROWS_WITH(resolved([](TrainConfig& c) { c.samples = 0; }), Contains("--samples is '0'"));
  CHECK_THROWS_WITH(resolved([](TrainConfig& c) { c.group = 16; }), Contains("32, 64 or 128"));
  CHECK_THROWS_WITH(resolved([](TrainConfig& c) { c.e2e_lr = {NAN}; }), Contains("--e2e-lr"));
  CHECK_THROWS_WITH(resolved([](TrainConfig& c) { c.lr = {1e-3, -1}; }), Contains("--lr"));
  CHECK_THROWS_WITH(resolved([](TrainConfig& c) { c.save_every = -1; }), Contains("--save-every"));
  CHECK_THROWS_WITH(resolved([](TrainConfig& c) { c.e2e_jsd_beta = 1; }),
                    Contains("--e2e-jsd-beta"));
}

}  // namespace bbb::tests
