// Models behind LC: gradients of a site that shares u and its map, the start by LDLQ, training that
// survives kills, and exports that compute what training computed.
#include <algorithm>
#include <array>
#include <catch2/catch.hpp>
#include <cmath>
#include <filesystem>

#include "models/lc_start.h"
#include "models/packed_checkpoint.h"
#include "quant/host_lc.h"
#include "tests/op_test.h"
#include "tests/tiny_run.h"
#include "tests/trained_model.h"
#include "train/statistics.h"

namespace bbb::tests {
namespace {

namespace fs = std::filesystem;
using autograd::Parameter;
using autograd::Tape;
using autograd::TapeMode;
using autograd::Var;
using Catch::Matchers::Contains;
using models::LayerResult;
using models::LinearResult;
using models::QuantLinear;
using quant::LinearFormat;
using train::TrainConfig;
using Values = std::vector<double>;

LinearFormat lc_format(int64_t n, int64_t k) {
  LinearFormat format{.n = n, .k = k};
  format.weight.levels = quant::Levels::Lc;
  return format;
}

std::vector<LinearFormat> lc_formats(const models::LlamaConfig& config) {
  std::vector<LinearFormat> formats;
  for (const models::LinearShape& shape : models::block_linears(config))
    formats.push_back(lc_format(shape.n, shape.k));
  return formats;
}

std::vector<float> floats(engine::Rng& rng, int64_t count, double scale) {
  std::vector<float> values;
  for (const double x : normal(rng, count, scale)) values.push_back(static_cast<float>(x));
  return values;
}

TrainConfig lc_config(const Fixture& fixture, const std::string& out,
                      const std::vector<std::pair<const char*, const char*>>& options = {}) {
  TrainConfig config = fixture.config;
  config.out = fixture.dir / out;
  config.e2e_lr = {1e-3};
  config.e2e_steps = 12;  // three passes
  set_option(config, "quantizer", "lc");
  for (const auto& [option, text] : options) set_option(config, option, text);
  return config;
}

// tr(E H E^T), E the error of the weight in the transformed coordinates; here of W itself, whose
// H is E[x x^T]: the same number.
double output_error(const LinearResult& result, const std::vector<float>& weight,
                    const std::vector<float>& moments) {
  const std::vector<float> read = result.dequantize();
  const int64_t n = result.format.n, k = result.format.k;
  double sum = 0;
  for (int64_t row = 0; row < n; ++row)
    for (int64_t i = 0; i < k; ++i) {
      double inner = 0;
      for (int64_t j = 0; j < k; ++j)
        inner += double{moments[static_cast<size_t>(i * k + j)]} *
                 (double{read[static_cast<size_t>(row * k + j)]} -
                  double{weight[static_cast<size_t>(row * k + j)]});
      sum += inner * (double{read[static_cast<size_t>(row * k + i)]} -
                      double{weight[static_cast<size_t>(row * k + i)]});
    }
  return sum;
}

double rms_of(const std::vector<float>& values) {
  double sum = 0;
  for (const float x : values) sum += double{x} * double{x};
  return std::sqrt(sum / static_cast<double>(values.size()));
}

}  // namespace

TEST_CASE("LC: a site's linears give u and the map the sum of their gradients", "[lc]") {
  Backend& b = oracle_f64();
  constexpr int64_t kK = 64, kRows = 5;
  const std::array<int64_t, 2> n = {32, 96};
  for (const auto passes : {autograd::GradientPasses::One, autograd::GradientPasses::Several}) {
    autograd::ParameterSet set(b, passes);
    std::vector<Parameter*> latents, v;
    for (const int64_t rows : n) latents.push_back(&set.add("w", {rows, kK}));
    models::LcSite site{&set.add("u", {kK}), &set.add("map", {4, 5}), true, {}, {}};
    for (const int64_t rows : n) v.push_back(&set.add("v", {rows}));
    set.allocate();
    site.du = b.empty({kK}, b.real());
    site.dmap = b.empty({4, 5}, b.real());
    autograd::WeightQuantizer quantizer(set, 32, quant::RangeRule::MinMax,
                                        quant::Rounding::Identity);
    std::vector<std::unique_ptr<QuantLinear>> linears;
    engine::Rng rng(3);
    const std::vector<float> u = floats(rng, kK, 0.4), map = floats(rng, 20, 0.7);
    for (size_t i = 0; i < n.size(); ++i) {
      linears.push_back(std::make_unique<QuantLinear>(b, "linear", n[i], kK));
      linears[i]->set_trained_lc(quantizer, *latents[i], *v[i], site, lc_format(n[i], kK));
      LinearResult start;
      start.master = floats(rng, n[i] * kK, 0.1);
      start.lc = {u, floats(rng, n[i], 0.4), map};
      linears[i]->set_master(start);
    }
    const Tensor x = make(b, {kRows, kK}, b.act(), normal(rng, kRows * kK));
    std::vector<Tensor> targets;
    for (const int64_t rows : n)
      targets.push_back(make(b, {kRows, rows}, b.act(), normal(rng, kRows * rows)));
    const auto loss = [&](bool backward) {
      quantizer.prepare();
      double total = 0;
      for (size_t i = 0; i < n.size(); ++i) {
        Tape tape(b, backward ? TapeMode::Training : TapeMode::Inference);
        models::LinearInput input;
        input.x = Var(x);
        input.shape = x.shape();
        const Var error = autograd::mse(tape, linears[i]->forward(tape, input, Var()), targets[i]);
        total += values_of(b, error.value())[0];
        if (backward) tape.backward(error);
      }
      if (!backward) return total;
      for (auto& linear : linears) linear->finish_backward();
      site.finish_backward(b);
      return total;
    };
    loss(true);
    for (const auto& parameter : set.parameters()) {
      const Values gradient = values_of(b, parameter->grad);
      Values values = values_of(b, parameter->master), want, got;
      for (size_t i = 0; i<values.size(); i += values.size()> 100 ? 37 : 1) {
        const double at = values[i], h = 1e-4;
        const auto moved = [&](double to) {
          values[i] = to;
          b.upload(parameter->master, values.data());
          return loss(false);
        };
        const double above = moved(at + h), below = moved(at - h);
        moved(at);
        want.push_back((above - below) / (2 * h));
        got.push_back(gradient[i]);
      }
      CAPTURE(parameter->name);
      CHECK(relative_error(got, want) < 1e-7);
    }
  }
}

TEST_CASE("LC: the start takes the nearest codewords, and LDLQ lowers the error of outputs",
          "[lc]") {
  engine::Rng rng(17);
  engine::ThreadPool pool(1);
  constexpr int64_t kK = 96, kTokens = 300;
  const std::vector<LinearFormat> formats = {lc_format(64, kK), lc_format(32, kK)};
  std::vector<std::vector<float>> weights = {floats(rng, 64 * kK, 0.05), floats(rng, 32 * kK, 0.2)};
  const std::vector<const std::vector<float>*> masters = {&weights[0], &weights[1]};
  // Inputs of a few directions, so that errors can be compensated.
  const std::vector<float> mix = floats(rng, 12 * kK, 1);
  std::vector<float> moments(kK * kK);
  for (int64_t t = 0; t < kTokens; ++t) {
    const std::vector<float> factors = floats(rng, 12, 1);
    std::vector<float> x = floats(rng, kK, 0.2);
    for (size_t i = 0; i < x.size(); ++i)
      for (size_t f = 0; f < 12; ++f) x[i] += factors[f] * mix[f * kK + i];
    for (size_t i = 0; i < x.size(); ++i)
      for (size_t j = 0; j < x.size(); ++j) moments[i * kK + j] += x[i] * x[j];
  }
  for (const bool scalar : {true, false}) {
    CAPTURE(scalar);
    const models::LcStart how{scalar, 5};
    const auto nearest = models::lc_site_start(masters, formats, {}, how, pool);
    const auto ldlq = models::lc_site_start(masters, formats, moments, how, pool);
    const auto again = models::lc_site_start(masters, formats, moments, how, pool);
    double u_square = 0, v_square = 0;
    for (size_t i = 0; i < formats.size(); ++i) {
      CHECK(ldlq[i].stored == again[i].stored);
      const models::LcCodes codes = models::lc_codes(nearest[i]);
      const std::vector<float> read = nearest[i].dequantize();
      std::vector<float> error = read;
      for (size_t j = 0; j < error.size(); ++j) error[j] -= weights[i][j];
      // Four levels of a normal value leave 12 % of its variance.
      CHECK(rms_of(error) < 0.37 * rms_of(weights[i]));
      CHECK(output_error(ldlq[i], weights[i], moments) <
            0.6 * output_error(nearest[i], weights[i], moments));
      // Changing any one vector's codes makes the weight's error no smaller.
      std::vector<uint8_t> changed = codes.codes;
      for (size_t at : {size_t{0}, changed.size() / 2 / 4 * 4})
        for (int word = 0; word < 256; ++word) {
          for (int j = 0; j < 4; ++j) changed[at + j] = static_cast<uint8_t>(word >> (2 * j) & 3);
          LinearResult other;
          other.format = formats[i];
          models::store_lc(other, changed, codes.lc);
          std::vector<float> difference = other.dequantize();
          for (size_t j = 0; j < difference.size(); ++j) difference[j] -= weights[i][j];
          if (rms_of(difference) < rms_of(error) * (1 - 1e-6)) FAIL("codeword " << word);
          std::copy_n(codes.codes.begin() + static_cast<std::ptrdiff_t>(at), 4,
                      changed.begin() + static_cast<std::ptrdiff_t>(at));
        }
      const models::LcCodes stored = models::lc_codes(ldlq[i]);
      if (i == 0)
        for (const float u : stored.lc.u) u_square += double{u} * double{u};
      for (const float v : stored.lc.v) v_square += double{v} * double{v};
    }
    CHECK(std::abs(u_square / v_square - 1) < 0.01);  // F16
    CHECK(models::lc_codes(ldlq[0]).lc.u == models::lc_codes(ldlq[1]).lc.u);
    CHECK(models::lc_codes(ldlq[0]).lc.map == models::lc_codes(ldlq[1]).lc.map);
  }
  // The fixed map is orthonormal over sigma, without zeros.
  const std::vector<float> map = models::lc_first_map(false);
  for (size_t i = 0; i < 4; ++i)
    for (size_t j = 0; j < 4; ++j) {
      double dot = 0;
      for (size_t m = 0; m < 4; ++m) dot += double{map[i * 5 + m]} * double{map[j * 5 + m]};
      CHECK(std::abs(dot - (i == j ? 0.8 : 0)) < 1e-6);
      CHECK(map[i * 5 + j] != 0);
    }
}

TEST_CASE("LC: latents start where the weights lie in the bins of their codes", "[lc]") {
  const Fixture fixture;
  const models::LlamaConfig config = tiny_config();
  const LayerResult original = models::full_precision(*fixture.source, 0);
  const models::LcStart how{false, 3};
  const LayerResult stored = models::lc_layer_start(config, original, lc_formats(config), {}, how);
  const LayerResult middle = models::lc_latents(config, stored, lc_formats(config), how);
  const LayerResult start = models::lc_latents(config, stored, lc_formats(config), how, &original);
  for (size_t i = 0; i < start.linears.size(); ++i) {
    const LinearResult& linear = start.linears[i];
    const quant::LcRule rule = models::lc_rule(linear.format);
    const models::LcCodes codes = models::lc_codes(stored.linears[i]);
    int64_t off_middle = 0;
    for (size_t j = 0; j < codes.codes.size(); ++j) {
      const float position = quant::lc_position(linear.master[j], rule);
      if (quant::lc_code(position, rule) != static_cast<float>(codes.codes[j])) FAIL("code " << j);
      off_middle += linear.master[j] != middle.linears[i].master[j];
    }
    // Codes are the nearest ones here, so nearly every weight lies in its code's bin.
    CHECK(off_middle > 0.95 * static_cast<double>(codes.codes.size()));
    // With the positions in place of the codes, W is the original weight, but for what lies beyond
    // the outermost bins and the rounding of u and v.
    std::vector<float> w(linear.master.size());
    const quant::host::LcMatrix<float> positions{
        linear.master.data(), nullptr,
        linear.lc.u.data(),   linear.lc.v.data(),
        linear.lc.map.data(), linear.format.n,
        linear.format.k,      {rule.spread, rule.gradient, quant::Rounding::Identity}};
    quant::host::lc_weight(w.data(), positions,
                           {0, linear.format.n / quant::lc_block(linear.format.n)});
    double error = 0, size = 0;
    const std::vector<float>& want = original.linears[i].master;
    for (size_t j = 0; j < w.size(); ++j) {
      error += std::pow(double{w[j]} - double{want[j]}, 2);
      size += std::pow(double{want[j]}, 2);
    }
    CHECK(std::sqrt(error / size) < 0.2);  // a normal weight is beyond by 0.14 of its RMS
  }
}

TEST_CASE("LC: what is exported computes what training computed", "[lc]") {
  Backend& device = backend();
  for (const models::LlamaConfig& config : {tiny_config(), other_families()[0]}) {
    const TempDir dir;
    fs::create_directory(dir / "model");
    write_tiny_model(dir / "model", config, 7);
    const auto source = models::open_checkpoint(dir / "model");
    const models::LcStart how{false, 3};
    const auto start = [&](int64_t layer) {
      LayerResult result = models::lc_latents(config, models::full_precision(*source, layer),
                                              lc_formats(config), how);
      engine::Rng rng(static_cast<uint64_t>(layer));  // off the middle of the bins
      for (LinearResult& linear : result.linears)
        for (float& latent : linear.master)
          latent += static_cast<float>(0.2 * rng.normal()) / models::lc_rule(linear.format).spread;
      return result;
    };
    TrainedModel trained(
        device, *source, [&](int64_t) { return lc_formats(config); }, start);
    const double bits = trained.write(dir / "packed");
    double stored = 0, weights = 0;
    for (const models::LinearShape& shape : models::block_linears(config)) {
      const auto n = static_cast<double>(shape.n), k = static_cast<double>(shape.k);
      stored += 2 * n * k + 16 * (n + k) + 32 * 20;
      weights += n * k;
    }
    CHECK(std::abs(bits - stored / weights) < 1e-9);

    const auto checkpoint = models::open_checkpoint(dir / "packed");
    checkpoint->check_finite();
    const auto packed = load_model(device, *checkpoint);
    trained.write(dir / "hf", models::ExportFormat::HuggingFace);
    const auto plain = load_model(device, *models::open_checkpoint(dir / "hf"));
    for (const int64_t tokens : {1, 3, 40}) {
      CAPTURE(tokens);
      const std::vector<int32_t> ids = random_tokens(5, tokens, config.vocab);
      const Values want = logits_of(*trained.model, ids);
      // Each linear rounds its operand, whose products with codes of mean 3/2 partly cancel; the
      // weight of training is rounded in its stead. On a CPU 16-bit integers hold the operand.
      const double tolerance = std::max(30 * act_epsilon(), 3e-3);
      CHECK(relative_error(logits_of(*packed, ids), want) < tolerance);
      CHECK(relative_error(logits_of(*plain, ids), want) < 30 * epsilon_of(DType::BF16));
      // Token by token, through the cache.
      models::KvCache kv(device, config, 1, 64);
      Values last;
      for (const int32_t id : ids) {
        last = logits_of(*packed, {id}, &kv);
        device.advance(kv.start);
      }
      const auto row = static_cast<std::ptrdiff_t>((tokens - 1) * config.vocab);
      CHECK(relative_error(last, {want.begin() + row, want.end()}) < 2 * tolerance);
    }
    CHECK_THROWS_WITH(trained.write(dir / "gptq", models::ExportFormat::Gptq),
                      Contains("is of --quantizer lc"));
  }
}

TEST_CASE("LC: what a damaged export says", "[lc]") {
  const Fixture fixture;
  const models::LlamaConfig config = tiny_config();
  TrainedModel trained(
      backend(), *fixture.source, [&](int64_t) { return lc_formats(config); },
      [&](int64_t layer) {
        return models::lc_latents(config, models::full_precision(*fixture.source, layer),
                                  lc_formats(config), {false, 3});
      });
  const std::string path = fixture.dir / "packed", file = path + "/config.json";
  trained.write(path);
  const std::string text = data::read_file(file);
  const auto damaged = [&](const std::string& from, const std::string& to) {
    std::string changed = text;
    changed.replace(changed.find(from), from.size(), to);
    data::write_file_atomic(file, changed);
    return models::open_checkpoint(path);
  };
  CHECK_THROWS_WITH(damaged("\"bits\": 2", "\"bits\": 4"), Contains("unsupported bits 4"));
  CHECK_THROWS_WITH(damaged("\"bits\": 2", "\"bits\": 2, \"group_size\": 32"),
                    Contains("unknown key 'group_size' of bbb-lc"));
  CHECK_THROWS_WITH(damaged("bbb-lc", "bbb-lq"), Contains("unsupported quant_method"));
  data::write_file_atomic(file, text);
  const std::string tensors = path + "/bbb.safetensors";
  std::string bytes = data::read_file(tensors);
  const auto parsed = data::parse_safetensors(reinterpret_cast<const uint8_t*>(bytes.data()),
                                              static_cast<int64_t>(bytes.size()), tensors);
  const auto offset = parsed.at("model.layers.1.self_attn.k_proj.u").data -
                      reinterpret_cast<const uint8_t*>(bytes.data());
  bytes[static_cast<size_t>(offset)] ^= 1;
  data::write_file_atomic(tensors, bytes);
  CHECK_THROWS_WITH(models::open_checkpoint(path), Contains("read one input, but their u differs"));
}

TEST_CASE("LC: runs of either phase repeat, and killed ones end alike", "[lc][train]") {
  const Fixture fixture;
  const std::pair<const char*, std::vector<std::pair<const char*, const char*>>> runs[] = {
      {"whole", {{"lc-map", "learned"}}},
      {"ste", {{"lc-gradient", "ste"}, {"lc-map", "scalar"}, {"e2e-average", "0.5"}}},
      {"both", {{"stages", "w2a16"}, {"lr", "1e-3"}, {"e2e-snap", "on"}}}};
  for (const auto& [name, options] : runs) {
    CAPTURE(name);
    const TrainConfig config = lc_config(fixture, name, options);
    fixture.run(config);
    const auto expected = results(config.out);
    CHECK(expected.count("start.safetensors") == 1);
    TrainConfig killed = config;
    killed.out = fixture.dir / "killed" + std::string(name);
    train::Observer observer;
    if (!config.stages.empty()) {
      observer.after_block_step = [&](int64_t block, int64_t, int64_t step) {
        if (block == 1 && step == 5) throw Killed();
      };
      CHECK_THROWS_AS(fixture.run(killed, observer), Killed);
      observer.after_block_step = nullptr;
    }
    observer.after_e2e_step = [](int64_t step) {
      if (step == 3) throw Killed();
    };
    CHECK_THROWS_AS(fixture.run(killed, observer), Killed);
    fixture.run(killed);
    auto got = results(killed.out);
    CHECK(got.size() == expected.size());
    for (const auto& [file, bytes] : expected) {
      INFO(file);
      if (file != "run.json") CHECK((got[file] == bytes));
    }
    const std::vector<train::Json> lines = log_lines(config.out, "e2e");
    REQUIRE(lines.size() == 12);
    const auto pass_loss = [&](size_t first) {
      double sum = 0;
      for (size_t i = first; i < first + 4; ++i) sum += lines[i]["loss"].get<double>();
      return sum;
    };
    CHECK(pass_loss(8) < pass_loss(0));
    int64_t bytes = 0;
    for (const auto& [file, content] : expected)
      if (file.ends_with(".safetensors")) {
        const auto tensors = data::SafeTensors(config.out + "/" + file);
        for (const auto& [tensor, stored] : tensors.tensors())
          if (tensor != "run" && tensor != "checksum") bytes += stored.bytes;
      }
    CHECK(train::result_bytes(
              fixture.source->config(),
              train::resolve(config, fixture.source->config(), backend().device())) == bytes);
    train::export_run(backend(), *fixture.source, FileTokenizer(), config.out,
                      fixture.dir / "exported" + std::string(name), {});
  }
  // From a finished run, on its grid alone.
  TrainConfig next = lc_config(fixture, "next",
                               {{"from", (fixture.dir / "whole").c_str()}, {"lc-map", "learned"}});
  fixture.run(next);
  CHECK_FALSE(fs::exists(next.out + "/start.safetensors"));
  next.out = fixture.dir / "other";
  set_option(next, "lc-map", "scalar");
  CHECK_THROWS_WITH(fixture.run(next), Contains("its codes have another map"));
  set_option(next, "quantizer", "minmax");
  CHECK_THROWS_WITH(fixture.run(next), Contains("its weights are on another grid"));
}

TEST_CASE("LC: inputs that are not finite have no start", "[lc][train]") {
  Fixture fixture;
  fixture.poison_last_token();
  fixture.windows.ids[3] = Fixture::kPoisoned;
  CHECK_THROWS_WITH(
      fixture.run(lc_config(fixture, "run")),
      Contains("model.layers.0.self_attn.q_proj: its inputs on the calibration text"));
}

TEST_CASE("LC: options that make no sense with it are refused by name", "[lc][config]") {
  const Fixture fixture;
  const std::pair<const char*, std::vector<std::pair<const char*, const char*>>> wrong[] = {
      {"--group-size", {{"group-size", "64"}}},
      {"--range search", {{"range", "search"}}},
      {"--rotate group", {{"rotate", "group"}}},
      {"--ocs-ratio", {{"ocs-ratio", "0.1"}}},
      {"--act-outliers", {{"act-outliers", "32"}}},
      {"--any-precision",
       {{"any-precision", "8,2"}, {"stages", "w8a16"}, {"e2e-stages", "w8a16:1"}}},
      {"--block-schedule", {{"block-schedule", "prefix"}, {"stages", "w2a16"}}},
      {"--e2e-train scales", {{"e2e-train", "scales"}}},
      {"--e2e-damping", {{"e2e-damping", "0.1"}}},
      {"--down-kurtosis", {{"down-kurtosis", "5"}}},
      {"--method and --grid-train",
       {{"stages", "w2a16"}, {"method", "gptq"}, {"e2e-train", "all"}}},
      {"--method and --grid-train",
       {{"stages", "w2a16"}, {"grid-train", "scales"}, {"e2e-train", "all"}}},
      {"--optimizer muon", {{"optimizer", "muon"}}},
      {"not w4a16", {{"stages", "w4a16,w2a16"}}},
      {"not w2a4", {{"e2e-stages", "w2a4:1"}}},
      {"not w3a16", {{"e2e-stages", "w3a16:1"}}}};
  for (const auto& [message, options] : wrong) {
    CAPTURE(message);
    const TrainConfig config = lc_config(fixture, "run", options);
    CHECK_THROWS_AS(train::resolve(config, tiny_config(), backend().device()), UsageError);
    CHECK_THROWS_WITH(train::resolve(config, tiny_config(), backend().device()), Contains(message));
  }
  models::LlamaConfig odd = tiny_config();
  odd.hidden = 100;
  CHECK_THROWS_WITH(train::resolve(lc_config(fixture, "run"), odd, backend().device()),
                    Contains("mlp.gate_proj has 100"));
}

}  // namespace bbb::tests
