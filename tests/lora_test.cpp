// Low-rank adapters (method.md section 3): behind the quantizer, in blocks and in the whole model.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <set>

#include "autograd/optimizer.h"
#include "models/packed_checkpoint.h"
#include "tests/formats.h"
#include "tests/op_test.h"
#include "tests/tiny_run.h"
#include "tests/trained_model.h"
#include "train/recipe.h"

namespace bbb::tests {
namespace {

using autograd::Tape;
using autograd::TapeMode;
using autograd::Var;
using Catch::Matchers::Contains;
using models::LayerResult;
using models::LinearResult;
using train::TrainConfig;

constexpr int64_t kN = 24, kK = 96, kRank = 3, kM = 17;
constexpr double kAlpha = 0.5;

// A linear with adapters that train.
struct Adapted {
  Backend& device;
  autograd::ParameterSet set;
  autograd::Parameter &master, &a, &b;
  std::optional<autograd::WeightQuantizer> quantizer;
  models::QuantLinear linear;
  std::vector<float> weights;

  Adapted(Backend& backend, engine::Rounding rounding, autograd::GradientPasses passes)
      : device(backend),
        set(backend, passes),
        master(set.add("w", {kN, kK})),
        a(set.add("a", {kN, kRank})),
        b(set.add("b", {kRank, kK})),
        linear(backend, "model.layers.0.mlp.up_proj", kN, kK) {
    set.allocate();
    quantizer.emplace(set, 32, quant::RangeRule::MinMax, rounding);
    linear.set_trained(*quantizer, master, plain_format(kN, kK, 2));
    linear.set_adapters(a, b, kAlpha);
    engine::Rng rng(1);
    for (const double w : normal(rng, kN * kK, 0.05)) weights.push_back(static_cast<float>(w));
    linear.set_master(result_of(weights));
    quantizer->adapt(true);
    linear.start_adapters(rng);
  }

  static LinearResult result_of(const std::vector<float>& weights) {
    LinearResult result;
    result.format = plain_format(kN, kK, 2);
    result.master = weights;
    return result;
  }
  void set_a(const std::vector<double>& values) {
    device.copy(a.master, make(device, {kN, kRank}, device.real(), values));
  }

  // y of random inputs; and, on a training tape, all gradients for random dy.
  double pass(TapeMode mode) {
    engine::Rng rng(2);
    const std::vector<double> x = round_bf16(normal(rng, kM * kK)),
                              dy = round_bf16(normal(rng, kM * kN));
    quantizer->prepare();
    Tape tape(device, mode);
    const Var y =
        linear.forward(tape, input_of(Var(make(device, {kM, kK}, device.act(), x))), Var());
    double sum = 0;
    const std::vector<double> values = values_of(device, y.value());
    for (size_t i = 0; i < values.size(); ++i) sum += values[i] * dy[i];
    if (mode == TapeMode::Training) {
      tape.backward(y, make(device, {kM, kN}, device.act(), dy));
      linear.finish_backward();
    }
    return sum;
  }
};

TrainConfig make_config(const Fixture& fixture, const std::string& name,
                        const std::vector<std::pair<const char*, const char*>>& options) {
  TrainConfig config = fixture.both_phases(name);
  config.gemm_algorithms = train::GemmAlgorithms::Heuristic;  // runs that are compared
  set_option(config, "lora-rank", "2");
  for (const auto& [option, text] : options) set_option(config, option, text);
  return config;
}

LayerResult stage_of(const Fixture& fixture, const TrainConfig& config, int64_t block,
                     int64_t stage) {
  const TrainConfig resolved = train::resolve(config, fixture.source->config(), backend().device());
  const train::Recipe recipe(resolved, fixture.source->config());
  return train::RunDirectory(config.out)
      .stage_result(block, stage, recipe, fixture.source->config());
}

// The largest element that `rank` steps of elimination with full pivoting leave of a - b (N, K).
double beyond_rank(const std::vector<float>& a, const std::vector<float>& b, int64_t n, int64_t k,
                   int64_t rank) {
  std::vector<double> d(a.begin(), a.end());
  for (size_t i = 0; i < d.size(); ++i) d[i] -= b[i];
  const auto at = [&](int64_t i, int64_t j) -> double& {
    return d[static_cast<size_t>(i * k + j)];
  };
  const auto largest = [&] {
    return std::max_element(d.begin(), d.end(),
                            [](double x, double y) { return std::abs(x) < std::abs(y); }) -
           d.begin();
  };
  for (int64_t step = 0; step < rank; ++step) {
    const int64_t pivot = largest(), row = pivot / k, column = pivot % k;
    const double value = at(row, column);
    if (value == 0) return 0;
    std::vector<double> pivots(d.begin() + row * k, d.begin() + (row + 1) * k);
    for (int64_t i = 0; i < n; ++i) {
      const double factor = at(i, column) / value;
      for (int64_t j = 0; j < k; ++j) at(i, j) -= factor * pivots[static_cast<size_t>(j)];
    }
  }
  return std::abs(d[static_cast<size_t>(largest())]);
}

}  // namespace

TEST_CASE("lora: gradients of adapters through the quantizer", "[lora]") {
  for (const auto passes : {autograd::GradientPasses::One, autograd::GradientPasses::Several}) {
    Adapted adapted(oracle_f64(), engine::Rounding::Identity, passes);
    Backend& device = adapted.device;
    engine::Rng rng(7);
    adapted.set_a(normal(rng, kN * kRank));
    adapted.pass(TapeMode::Training);
    CHECK(values_of(device, adapted.master.grad) == std::vector<double>(kN * kK, 0.0));
    for (autograd::Parameter* parameter : {&adapted.a, &adapted.b}) {
      CAPTURE(parameter->name);
      const std::vector<double> at = values_of(device, parameter->master),
                                gradient = values_of(device, parameter->grad),
                                along = normal(rng, static_cast<int64_t>(at.size()));
      constexpr double kStep = 1e-5;
      double ends[2], want = 0, norm = 0;
      for (const int side : {0, 1}) {
        std::vector<double> moved = at;
        for (size_t i = 0; i < at.size(); ++i) moved[i] += (side ? kStep : -kStep) * along[i];
        device.copy(parameter->master, make(device, parameter->master.shape(), DType::F64, moved));
        ends[side] = adapted.pass(TapeMode::Inference);
      }
      device.copy(parameter->master, make(device, parameter->master.shape(), DType::F64, at));
      for (size_t i = 0; i < at.size(); ++i) {
        want += gradient[i] * along[i];
        norm += gradient[i] * gradient[i];
      }
      CHECK(norm > 0);
      CHECK(std::abs((ends[1] - ends[0]) / (2 * kStep) - want) <= 1e-7 * std::sqrt(norm));
    }
  }
}

TEST_CASE("lora: a step moves adapters alone, and the quantizer sees W + alpha A B", "[lora]") {
  Adapted adapted(backend(), engine::Rounding::Nearest, autograd::GradientPasses::One);
  Backend& device = adapted.device;
  adapted.quantizer->prepare();
  CHECK(adapted.linear.master().master == adapted.weights);  // A is 0
  engine::Schedule schedule;
  schedule.peak_lr = 1e-2;
  schedule.total_steps = 10;
  autograd::Optimizer optimizer(adapted.set, &*adapted.quantizer, {}, schedule);
  for (int step = 0; step < 2; ++step) {
    adapted.pass(TapeMode::Training);
    optimizer.step(make(device, {1}, device.real(), {1.0}));
  }
  adapted.quantizer->prepare();
  const std::vector<double> a = values_of(device, adapted.a.master),
                            b = values_of(device, adapted.b.master);
  std::vector<double> want(adapted.weights.begin(), adapted.weights.end());
  for (int64_t n = 0; n < kN; ++n)
    for (int64_t k = 0; k < kK; ++k)
      for (int64_t r = 0; r < kRank; ++r)
        want[static_cast<size_t>(n * kK + k)] +=
            kAlpha * a[static_cast<size_t>(n * kRank + r)] * b[static_cast<size_t>(r * kK + k)];
  const std::vector<float> merged = adapted.linear.master().master;
  CHECK(merged != adapted.weights);
  CHECK(relative_error({merged.begin(), merged.end()}, want) <= 4 * real_epsilon());

  // The codes are those of the merged weight as a master of its own, and stay so when it is loaded.
  const LinearResult codes = adapted.linear.quantized();
  adapted.linear.set_master(Adapted::result_of(merged));
  adapted.quantizer->prepare();
  CHECK(adapted.linear.quantized().stored == codes.stored);
  adapted.quantizer->adapt(false);
  adapted.quantizer->prepare();
  CHECK(adapted.linear.quantized().stored == codes.stored);

  // Discarded, the start is back.
  adapted.quantizer->adapt(true);
  adapted.linear.set_master(Adapted::result_of(adapted.weights));
  adapted.set_a(a);
  adapted.quantizer->prepare();
  CHECK(adapted.linear.master().master != adapted.weights);
  adapted.linear.discard_adapters();
  adapted.quantizer->prepare();
  CHECK(adapted.linear.master().master == adapted.weights);
}

TEST_CASE("lora: later stages move weights by matrices of low rank, the first one by any",
          "[lora][train]") {
  const Fixture fixture;
  TrainConfig config = make_config(fixture, "run", {{"e2e-steps", "0"}});
  fixture.run(config);
  TrainConfig plain = config;
  plain.out = fixture.dir / "plain";
  set_option(plain, "lora-rank", "0");
  fixture.run(plain);
  const LayerResult original = models::full_precision(*fixture.source, 0);
  const LayerResult first = stage_of(fixture, config, 0, 0),
                    second = stage_of(fixture, config, 0, 1),
                    plain_first = stage_of(fixture, plain, 0, 0);
  for (size_t i = 0; i < first.linears.size(); ++i) {
    const auto& [n, k, grid, input, order] = first.linears[i].format;
    CAPTURE(i);
    // A GPU adds the gradient's norm in an order that depends on the number of parameters.
    if (!on_cuda()) CHECK(first.linears[i].master == plain_first.linears[i].master);
    CHECK(beyond_rank(first.linears[i].master, original.linears[i].master, n, k, 2) > 1e-4);
    CHECK(beyond_rank(second.linears[i].master, first.linears[i].master, n, k, 0) > 1e-4);
    // What rounding the sums to F32 leaves.
    CHECK(beyond_rank(second.linears[i].master, first.linears[i].master, n, k, 2) < 1e-5);
  }
  CHECK(second.input_norm != first.input_norm);
  for (const train::Json& line : log_lines(config.out, "block"))
    CHECK(std::isfinite(line["loss"].get<double>()));

  TrainConfig discarding = config;
  discarding.out = fixture.dir / "discarding";
  set_option(discarding, "lora-end", "discard");
  fixture.run(discarding);
  for (const int64_t block : {0, 1}) {
    const LayerResult before = stage_of(fixture, discarding, block, 0),
                      after = stage_of(fixture, discarding, block, 1);
    for (size_t i = 0; i < before.linears.size(); ++i)
      CHECK(before.linears[i].master == after.linears[i].master);
    CHECK(before.post_norm != after.post_norm);
  }
}

TEST_CASE("lora: blocks and the whole model train, and a killed run ends with the same bytes",
          "[lora][train]") {
  const Fixture fixture;
  const std::vector<std::pair<const char*, const char*>> cases[] = {
      {{"lora-match", "both"}, {"range", "search"}, {"rotate", "group"}},
      {{"optimizer", "muon"}, {"e2e-average", "0.5"}},
      {{"lora-end", "discard"}, {"ocs-ratio", "0.2"}, {"lora-alpha", "2"}}};
  std::vector<std::string> finals;
  for (const auto& options : cases) {
    CAPTURE(options[0].first);
    const TrainConfig config = make_config(fixture, cat("run", finals.size()), options);
    fixture.run(config);
    finals.push_back(results(config.out).at("e2e/final.safetensors"));
    TrainConfig killed = config;
    killed.out = config.out + "_killed";
    train::Observer first_adapters, later, whole;
    first_adapters.after_block_step = [](int64_t, int64_t stage, int64_t step) {
      if (stage == 1 && step == 3) throw Killed();
    };
    later.after_block_step = [](int64_t block, int64_t stage, int64_t step) {
      if (block == 1 && stage == 1 && step == 2) throw Killed();
    };
    whole.after_e2e_step = [](int64_t step) {
      if (step == 3) throw Killed();
    };
    for (const train::Observer& observer : {first_adapters, later, whole})
      CHECK_THROWS_AS(fixture.run(killed, observer), Killed);
    fixture.run(killed);
    CHECK(results(killed.out) == results(config.out));
    CHECK(log_lines(killed.out, "") == log_lines(config.out, ""));

    // The result holds merged masters alone, and exports as those of any other run.
    const std::string out = config.out + "_packed";
    train::export_run(backend(), *fixture.source, FileTokenizer(), config.out, out,
                      models::ExportFormat::Packed);
    CHECK(data::read_file(config.out + "/e2e/final.safetensors").find("lora") == std::string::npos);
    const auto checkpoint = models::open_checkpoint(out);
    const auto model = load_model(backend(), *checkpoint);
    const Tensor ids = make_ids(backend(), {1, 4}, {1, 2, 3, 4});
    Tape tape(backend(), TapeMode::Inference);
    const Tensor h = model->forward(tape, ids, nullptr, models::Recompute::None).value();
    for (const double value : values_of(backend(), h)) CHECK(std::isfinite(value));
  }
}

TEST_CASE("lora: what anchors the output changes the result, and its weight does",
          "[lora][train]") {
  const Fixture fixture;
  std::set<std::vector<float>> masters;
  const std::vector<std::pair<const char*, const char*>> cases[] = {
      {{"lora-match", "none"}},
      {{"lora-match", "moments"}},
      {{"lora-match", "kl"}},
      {{"lora-match", "both"}},
      {{"lora-match", "moments"}, {"lora-match-weight", "1"}}};
  for (const auto& options : cases) {
    TrainConfig config = make_config(fixture, cat("run", masters.size()), options);
    config.e2e_steps = 0;
    fixture.run(config);
    masters.insert(stage_of(fixture, config, 0, 1).linears[0].master);
  }
  CHECK(masters.size() == 5);
  TrainConfig automatic = make_config(fixture, "auto", {});
  automatic.e2e_steps = 0;
  fixture.run(automatic);
  CHECK(masters.contains(stage_of(fixture, automatic, 0, 1).linears[0].master));
}

TEST_CASE("lora: stages of Algorithm 2 and nested codes have adapters, too", "[lora][train]") {
  const Fixture fixture;
  const std::vector<std::pair<const char*, const char*>> cases[] = {
      {{"block-schedule", "prefix"}, {"first-ratio", "0.5"}},
      {{"stages", "w8a16,w8a8"}, {"any-precision", "8,2"}}};
  for (const auto& options : cases) {
    CAPTURE(options[0].first);
    TrainConfig config = make_config(fixture, options[0].first, options);
    config.lr = {1e-3};
    fixture.run(config);
    TrainConfig plain = config;
    plain.out = config.out + "_plain";
    plain.lora_rank = 0;
    fixture.run(plain);
    CHECK(log_lines(config.out, "e2e")[0]["loss"].get<double>() > 0);
    CHECK(results(config.out).at("e2e/final.safetensors") !=
          results(plain.out).at("e2e/final.safetensors"));
  }
}

TEST_CASE("lora: what has no adapters is refused by name", "[lora][config]") {
  const Fixture fixture;
  const std::pair<const char*, std::vector<std::pair<const char*, const char*>>> wrong[] = {
      {"no --quantizer lc", {{"stages", "w2a16"}, {"quantizer", "lc"}}},
      {"no --method gptq", {{"stages", "w2a16"}, {"method", "gptq"}}},
      {"no --method gptq or block-ap", {{"stages", "w2a16"}, {"method", "block-ap"}}},
      {"no --grid-train", {{"stages", "w2a16"}, {"grid-train", "scales"}}},
      {"--e2e-damping", {{"e2e-damping", "0.1"}}},
      {"--e2e-freeze", {{"e2e-freeze", "flips"}}},
      {"--lora-rank 39: such adapters of mlp.gate_proj", {{"lora-rank", "39"}}}};
  for (const auto& [message, options] : wrong) {
    CAPTURE(message);
    TrainConfig config = make_config(fixture, "run", options);
    config.lr.clear(), config.e2e_lr.clear();
    CHECK_THROWS_AS(train::resolve(config, tiny_config(), backend().device()), UsageError);
    CHECK_THROWS_WITH(train::resolve(config, tiny_config(), backend().device()), Contains(message));
  }
}

}  // namespace bbb::tests
