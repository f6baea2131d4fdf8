// Windows of documents and of chats, from the model to whole runs: what attends to what, and what a
// loss counts.
#include <catch2/catch.hpp>
#include <filesystem>

#include "autograd/ops.h"
#include "tests/tiny_run.h"
#include "train/token_batches.h"

namespace bbb::tests {
namespace {

namespace fs = std::filesystem;
using autograd::Tape;
using autograd::TapeMode;
using autograd::Var;
using Catch::Matchers::Contains;
using train::Json;
using train::TrainConfig;
using Ids = std::vector<int32_t>;

// First keys of documents that begin at these positions of every window.
Ids first_keys(int64_t count, int64_t seq_len, const std::vector<int64_t>& starts) {
  Ids keys;
  for (int64_t i = 0; i < count * seq_len; ++i) {
    int64_t first = 0;
    for (const int64_t start : starts)
      if (start <= i % seq_len) first = start;
    keys.push_back(static_cast<int32_t>(first));
  }
  return keys;
}

// The fixture's windows as documents that begin at these positions.
void set_documents(data::Windows& windows, const std::vector<int64_t>& starts) {
  windows.first_key = first_keys(windows.count, windows.seq_len, starts);
  windows.counted.assign(windows.ids.size(), 1);
  for (size_t i = 0; i < windows.ids.size(); ++i)
    for (const int64_t start : starts)
      if (static_cast<int64_t>(i) % windows.seq_len == start) windows.counted[i] = 0;
}

// Lets every window count other tokens, and another number of them.
void set_mask(data::Windows& windows) {
  engine::Rng rng(5);
  windows.counted.assign(windows.ids.size(), 0);
  for (int64_t w = 0; w < windows.count; ++w)
    for (int64_t t = 1; t < windows.seq_len; ++t)
      windows.counted[static_cast<size_t>(w * windows.seq_len + t)] =
          t == 1 || static_cast<int64_t>(rng.below(25)) < w;
}

TrainConfig end_to_end(const Fixture& fixture, const std::string& out, const char* loss = "kl") {
  TrainConfig config = fixture.config;
  config.out = fixture.dir / out;
  config.e2e_steps = 5;
  config.e2e_lr = {1e-3};
  set_option(config, "e2e-loss", loss);
  return config;
}

std::vector<double> losses(const Fixture& fixture, const TrainConfig& config) {
  fixture.run(config);
  std::vector<double> values;
  for (const Json& line : log_lines(config.out, "e2e")) values.push_back(line["loss"]);
  return values;
}

double tolerance() { return on_cuda() ? 2e-2 : 1e-5; }

}  // namespace

TEST_CASE("documents: a model sees each alone, forward and backward", "[documents]") {
  Backend& b = oracle_f64();
  const Fixture fixture;
  models::Llama model(b, *fixture.source, models::HeadRounding::None);
  model.load_blocks(*fixture.source);
  const int64_t d = model.config().d_model, lengths[] = {10, 1, 21};
  constexpr int64_t kTokens = 32;
  const Ids ids(fixture.windows.ids.begin(), fixture.windows.ids.begin() + kTokens);
  const Tensor keys = make_ids(b, {1, kTokens}, first_keys(1, kTokens, {10, 11}));
  Tape inference(b, TapeMode::Inference);
  const std::vector<double> whole =
      values_of(b, model
                       .forward(inference, make_ids(b, {1, kTokens}, ids), nullptr,
                                models::Recompute::None, keys)
                       .value());
  std::vector<double> apart;
  for (int64_t begin = 0; const int64_t length : lengths) {
    const Ids own(ids.begin() + begin, ids.begin() + begin + length);
    for (const double h : values_of(b, model
                                           .forward(inference, make_ids(b, {1, length}, own),
                                                    nullptr, models::Recompute::None)
                                           .value()))
      apart.push_back(h);
    begin += length;
  }
  CHECK(relative_error(whole, apart) < 1e-12);

  engine::Rng rng(3);
  const std::vector<double> in = normal(rng, kTokens * d), target = normal(rng, kTokens * d);
  models::LlamaBlock& block = *model.blocks()[0];
  // The gradient of the input for the mean squared error of tokens [begin, begin + length).
  const auto gradient = [&](int64_t begin, int64_t length, models::Recompute recompute,
                            const Tensor& first_key) {
    const auto rows = [&](const std::vector<double>& all) {
      return make(b, {1, length, d}, DType::F64,
                  {all.begin() + begin * d, all.begin() + (begin + length) * d});
    };
    Tape tape(b, TapeMode::Training);
    const Var x = Var::input(rows(in));
    tape.backward(
        autograd::mse(tape, block.forward(tape, x, nullptr, recompute, first_key), rows(target)));
    std::vector<double> dx = values_of(b, x.grad());
    for (double& g : dx) g *= static_cast<double>(length);
    return dx;
  };
  std::vector<double> expected;
  for (int64_t begin = 0; const int64_t length : lengths) {
    for (const double g : gradient(begin, length, models::Recompute::None, {}))
      expected.push_back(g);
    begin += length;
  }
  for (const models::Recompute recompute :
       {models::Recompute::None, models::Recompute::Attention, models::Recompute::Block})
    CHECK(relative_error(gradient(0, kTokens, recompute, keys), expected) < 1e-12);
}

TEST_CASE("documents: those that fill their windows train like windows of their own",
          "[documents]") {
  for (const char* loss : {"kl", "ce"}) {
    Fixture fixture;
    constexpr int64_t kHalf = Fixture::kSeqLen / 2;
    TrainConfig halves = end_to_end(fixture, cat("halves_", loss), loss), pairs = halves;
    // All windows in every step, so that their order does not matter.
    halves.seq_len = kHalf;
    halves.samples = halves.e2e_batch = 8;
    halves.val_samples = pairs.val_samples = 0;
    pairs.out = fixture.dir / cat("pairs_", loss);
    pairs.samples = pairs.e2e_batch = 4;
    pairs.pack = train::Packing::Documents;
    data::Windows windows = fixture.windows;
    set_documents(fixture.windows, {kHalf});
    const std::vector<double> packed = losses(fixture, pairs);
    fixture.windows = {windows.ids, 2 * windows.count, kHalf};
    const std::vector<double> alone = losses(fixture, halves);
    REQUIRE(packed.size() == 5);
    const auto gradients = [](const TrainConfig& config) { return log_lines(config.out, "e2e"); };
    for (size_t i = 0; i < packed.size(); ++i) {
      CHECK(packed[i] == Approx(alone[i]).epsilon(tolerance()));
      CHECK(gradients(pairs)[i]["grad_norm"].get<double>() ==
            Approx(gradients(halves)[i]["grad_norm"].get<double>()).epsilon(10 * tolerance()));
    }
    CHECK(packed.back() != packed.front());
  }
}

TEST_CASE("documents: the loss is the mean over the tokens of a step that count", "[documents]") {
  for (const char* loss : {"kl", "ce", "jsd"}) {
    CAPTURE(loss);
    Fixture fixture;
    const double all = losses(fixture, end_to_end(fixture, "all", loss))[0];
    set_mask(fixture.windows);
    const TrainConfig config = end_to_end(fixture, "some", loss);
    const std::vector<double> some = losses(fixture, config);
    // The tokens that count, and then those that do not, of the first step.
    const auto counted = [&] {
      const TrainConfig resolved =
          train::resolve(config, fixture.source->config(), backend().device());
      return static_cast<double>(
          train::TokenBatches(backend(), fixture.windows, resolved, 0, 5).counted()[0]);
    };
    const double some_tokens = counted();
    for (int64_t w = 0; w < fixture.windows.count; ++w)
      for (int64_t t = 1; t < Fixture::kSeqLen; ++t) {
        uint8_t& counts = fixture.windows.counted[static_cast<size_t>(w * Fixture::kSeqLen + t)];
        counts = counts == 0;
      }
    const double others = losses(fixture, end_to_end(fixture, "others", loss))[0];
    const double other_tokens = counted();
    CHECK(some_tokens + other_tokens == 4 * (Fixture::kSeqLen - 1));
    CHECK(some_tokens != other_tokens);
    CHECK(some_tokens * some[0] + other_tokens * others ==
          Approx((some_tokens + other_tokens) * all).epsilon(tolerance()));
    CHECK(some[0] != all);
  }
}

TEST_CASE("documents: micro-batches share the denominator of their step", "[documents]") {
  Fixture fixture;
  set_mask(fixture.windows);
  std::vector<std::vector<double>> runs;
  for (const int64_t micro : {1, 2, 4}) {
    TrainConfig config = end_to_end(fixture, cat("micro_", micro));
    config.e2e_micro_batch = micro;
    runs.push_back(losses(fixture, config));
  }
  for (const std::vector<double>& run : runs)
    for (size_t i = 0; i < run.size(); ++i)
      CHECK(run[i] == Approx(runs[2][i]).epsilon(10 * tolerance()));
}

TEST_CASE("documents: several precisions count the same tokens", "[documents]") {
  Fixture fixture;
  const auto nested = [&](const std::string& out) {
    TrainConfig config = end_to_end(fixture, out);
    config.any_precision = {8, 2};
    return losses(fixture, config)[0];
  };
  const double all = nested("all");
  fixture.windows.counted.assign(fixture.windows.ids.size(), 1);
  for (int64_t w = 0; w < fixture.windows.count; ++w)  // every other token
    for (int64_t t = 2; t < Fixture::kSeqLen; t += 2)
      fixture.windows.counted[static_cast<size_t>(w * Fixture::kSeqLen + t)] = 0;
  const double some = nested("some");
  for (int64_t w = 0; w < fixture.windows.count; ++w)
    for (int64_t t = 1; t < Fixture::kSeqLen; ++t)
      fixture.windows.counted[static_cast<size_t>(w * Fixture::kSeqLen + t)] = t % 2 == 0;
  CHECK(16 * some + 15 * nested("others") == Approx(31 * all).epsilon(tolerance()));
}

TEST_CASE("documents: killed runs end with the same bytes, in every phase", "[documents]") {
  Fixture fixture;
  set_documents(fixture.windows, {7, 8, 20});
  fixture.windows.counted[3] = 0;
  struct Case {
    const char* name;
    std::vector<std::pair<const char*, const char*>> options;
  };
  for (const Case& c : {Case{"blocks", {{"range", "search"}, {"input-stream", "mix"}}},
                        Case{"gptq", {{"stages", "w2a16"}, {"method", "gptq"}}}}) {
    CAPTURE(c.name);
    TrainConfig config = fixture.both_phases(c.name);
    config.pack = train::Packing::Documents;
    for (const auto& [option, text] : c.options) set_option(config, option, text);
    if (config.method == train::Method::Gptq) config.lr.clear();
    fixture.run(config);
    TrainConfig killed = config;
    killed.out += "_killed";
    train::Observer observer;
    observer.after_block = [](int64_t block) {
      if (block == 0) throw Killed();
    };
    CHECK_THROWS_AS(fixture.run(killed, observer), Killed);
    train::Observer at_step;
    at_step.after_e2e_step = [](int64_t step) {
      if (step == 3) throw Killed();
    };
    CHECK_THROWS_AS(fixture.run(killed, at_step), Killed);
    fixture.run(killed);
    CHECK(results(killed.out) == results(config.out));
    CHECK(log_lines(killed.out, "") == log_lines(config.out, ""));

    // The boundaries reach the blocks: without them they end elsewhere.
    Fixture plain;
    TrainConfig stream = config;
    stream.out = plain.dir / c.name;
    stream.pack = train::Packing::Stream;
    plain.run(stream);
    const std::string block = "blocks/block_000_stage_0.safetensors";
    CHECK(results(stream.out).at(block) != results(config.out).at(block));
  }
}

TEST_CASE("documents: a run goes on only with what it counted and attended to", "[documents]") {
  Fixture fixture;
  set_documents(fixture.windows, {9});
  TrainConfig config = end_to_end(fixture, "run");
  config.pack = train::Packing::Documents;
  fixture.run(config);
  const data::Windows windows = fixture.windows;
  fixture.windows.counted[5] = 0;
  CHECK_THROWS_WITH(fixture.run(config), Contains("data"));
  fixture.windows = windows;
  fixture.windows.first_key = first_keys(windows.count, windows.seq_len, {10});
  CHECK_THROWS_WITH(fixture.run(config), Contains("data"));
  fixture.windows = windows;
  CHECK_NOTHROW(fixture.run(config));
  config.pack = train::Packing::Stream;
  CHECK_THROWS_WITH(fixture.run(config), Contains("another --pack"));
}

TEST_CASE("documents: perplexity is the mean over the tokens that count", "[documents]") {
  Backend& b = backend();
  Fixture fixture;
  data::Windows windows = fixture.windows.rows(0, 6);
  models::Llama model(b, *fixture.source, models::HeadRounding::None);
  model.load_blocks(*fixture.source);
  const auto measured = [&] {
    return models::perplexity_by_blocks(
        model, windows, [&](models::LlamaBlock& block) { block.load(*fixture.source, Tensor()); },
        nullptr);
  };
  CHECK(measured().nll ==
        Approx(models::perplexity(model, windows.ids, 6, Fixture::kSeqLen, nullptr).nll)
            .epsilon(1e-6));
  set_documents(windows, {4, 17});
  for (int64_t t = 20; t < 32; ++t) windows.counted[static_cast<size_t>(t)] = 0;
  Tape tape(b, TapeMode::Inference);
  const Tensor h =
      model
          .forward(tape, make_ids(b, {6, Fixture::kSeqLen}, windows.ids), nullptr,
                   models::Recompute::None, make_ids(b, {6, Fixture::kSeqLen}, windows.first_key))
          .value();
  const int64_t rows = 6 * Fixture::kSeqLen;
  const Tensor row_losses = b.empty({rows}, b.real());
  const Ids targets = windows.targets();
  model.token_losses(row_losses, h.view({rows, model.config().d_model}),
                     make_ids(b, {rows}, targets));
  double sum = 0;
  for (const double loss : values_of(b, row_losses)) sum += loss;
  const auto count =
      std::count_if(targets.begin(), targets.end(), [](int32_t t) { return t >= 0; });
  const models::Perplexity result = measured();
  CHECK(result.tokens == count);
  CHECK(count == 6 * 29 - 12);
  CHECK(result.nll == Approx(sum / static_cast<double>(count)).epsilon(on_cuda() ? 1e-2 : 1e-5));
}

// One cosine over all passes of a stage, and another order of the windows in each pass.
TEST_CASE("documents: a stage of several passes has one schedule and an order for each pass",
          "[documents]") {
  const Fixture fixture;
  TrainConfig config = end_to_end(fixture, "passes");
  set_option(config, "e2e-stages", "w2a16:3");
  config.e2e_steps = TrainConfig::kAutoSteps;
  config.e2e_lr = {1e-3};
  fixture.run(config);
  const std::vector<Json> lines = log_lines(config.out, "e2e");
  constexpr int64_t kPass = 4, kSteps = 3 * kPass;  // 16 windows, 4 a step
  REQUIRE(lines.size() == kSteps);
  constexpr double kPi = 3.14159265358979323846, kFloor = 0.05;
  for (int64_t step = 0; step < kSteps; ++step) {
    const double cosine = (1 + std::cos(kPi * static_cast<double>(step) / kSteps)) / 2;
    CHECK(lines[static_cast<size_t>(step)]["lr"].get<double>() ==
          Approx(1e-3 * (kFloor + (1 - kFloor) * cosine)).epsilon(1e-5));
  }
  const TrainConfig resolved = train::resolve(config, fixture.source->config(), backend().device());
  const train::TokenBatches batches(backend(), fixture.windows, resolved, 0, kSteps);
  batches.rewind(0);
  std::vector<Ids> passes(3);
  for (int64_t micro = 0; micro < 2 * kSteps; ++micro)
    for (const double id : values_of(backend(), batches.next().ids))
      passes[static_cast<size_t>(micro / (2 * kPass))].push_back(static_cast<int32_t>(id));
  for (Ids& pass : passes) CHECK(pass.size() == 16 * Fixture::kSeqLen);
  CHECK(passes[0] != passes[1]);
  CHECK(passes[1] != passes[2]);
  CHECK(passes[0] != passes[2]);
  for (Ids& pass : passes) std::sort(pass.begin(), pass.end());
  CHECK(passes[0] == passes[1]);  // each sees every window once
  CHECK(passes[0] == passes[2]);
}

}  // namespace bbb::tests
