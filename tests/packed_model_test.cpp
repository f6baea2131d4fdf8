// Exports with channel orders, rotation and quantized activations: what is read back is what was
// trained, and what does not fit together is refused.
#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <numeric>

#include "tests/formats.h"
#include "tests/model_files.h"
#include "tests/tiny_run.h"
#include "tests/trained_model.h"
#include "train/recipe.h"

namespace bbb::tests {
namespace {

using Catch::Matchers::Contains;
using models::LayerResult;
using models::Llama;
using nlohmann::ordered_json;
using quant::ChannelOrder;
using quant::LinearFormat;
using quant::SplitSide;
using train::TrainConfig;
using Options = std::vector<std::pair<const char*, const char*>>;

// Trains and exports the fixture's model, and makes the model that training held at its end.
struct Exported {
  const Fixture& fixture;
  TrainConfig config;
  train::RunDirectory run;
  std::optional<train::Recipe> recipe;
  std::optional<TrainedModel> trained;
  std::unique_ptr<models::Checkpoint> checkpoint;
  std::unique_ptr<Llama> packed;

  Exported(const Fixture& of, const std::string& name, const Options& options)
      : fixture(of), config(of.config), run(of.dir / name) {
    config.out = run.path();
    config.lr = {1e-3};
    for (const auto& [option, text] : options) set_option(config, option, text);
    fixture.run(config);
    config = run.identity().config;
    recipe.emplace(config, fixture.source->config(), run.statistics(fixture.source->config()));
    trained.emplace(
        backend(), *fixture.source, [&](int64_t i) { return recipe->result_formats(i); },
        [&](int64_t i) { return run.result(i, *recipe, fixture.source->config()); }, config.range);
    const std::string path = run.path() + "_packed";
    train::export_run(backend(), *fixture.source, FileTokenizer(), run.path(), path,
                      models::ExportFormat::Packed);
    checkpoint = models::open_checkpoint(path);
    packed = load_model(backend(), *checkpoint);
  }

  void check_formats() const {
    for (int64_t layer = 0; layer < fixture.source->config().layers; ++layer) {
      const std::vector<LinearFormat> formats = recipe->result_formats(layer);
      const auto shapes = models::block_linears(fixture.source->config());
      for (size_t i = 0; i < shapes.size(); ++i) {
        CAPTURE(layer, shapes[i].name);
        CHECK(*checkpoint->packed_format(models::layer_name(layer, shapes[i].name), shapes[i].n,
                                         shapes[i].k) == formats[i]);
      }
    }
  }
  double nll(Llama& model) const {
    const std::vector<int32_t> text(fixture.windows.ids.begin(),
                                    fixture.windows.ids.begin() + 8 * Fixture::kSeqLen);
    return models::perplexity(model, text, 8, Fixture::kSeqLen, nullptr).nll;
  }
};

// The mean NLL of each token given those before it, from logits (T, V).
double nll_of(const std::vector<double>& logits, const std::vector<int32_t>& ids) {
  const size_t vocab = logits.size() / ids.size();
  double sum = 0;
  for (size_t t = 0; t + 1 < ids.size(); ++t) {
    double total = 0;
    for (size_t v = 0; v < vocab; ++v) total += std::exp(logits[t * vocab + v]);
    sum += std::log(total) - logits[t * vocab + static_cast<size_t>(ids[t + 1])];
  }
  return sum / static_cast<double>(ids.size() - 1);
}

// The activation codes of every site of a model, in a forward of at most kMaxPackedRows tokens:
// with so few, a packed model multiplies codes. The forward is Llama's, with the same hidden
// states.
class CodeReader {
 public:
  using Var = autograd::Var;
  using Tensor = engine::Tensor;

  CodeReader(Llama& model, bool packed) : model_(model), device_(model.backend()) {
    for (auto& block : model.blocks())
      for (const size_t linear : {0, 3, 4, 6}) {  // q, o, gate and down: the first of each site
        const LinearFormat format = block->linears()[linear]->format();
        sites_.push_back({engine::upload_operand(device_, format), {}});
        sites_.back().operand.set(device_, format, packed);
      }
  }

  // The levels, code - zero, of all sites in order.
  std::vector<int> read(const std::vector<int32_t>& ids) {
    const models::LlamaConfig& config = model_.config();
    const auto t = static_cast<int64_t>(ids.size());
    const Tensor tokens = make_ids(device_, {1, t}, ids);
    levels_.clear();
    autograd::Tape tape(device_, autograd::TapeMode::Inference);
    auto site = sites_.begin();
    const auto normed = [&](const Var& x, const Var& norm) {
      add(site->spec, t, [&](const engine::OperandRows& out) {
        device_.rms_norm_operand(out, device_.empty({t}, device_.real()), rows(x), norm.value(),
                                 config.rms_eps, site->spec);
      });
      return site++->operand.rms_norm(tape, x, norm, config.rms_eps);
    };
    Var x = autograd::embed(tape, tokens, Var(model_.embedding()));
    for (auto& block : model_.blocks()) {
      const std::vector<models::QuantLinear*> linears = block->linears();
      const auto qkv = models::QuantLinear::forward(tape, {linears[0], linears[1], linears[2]},
                                                    normed(x, block->input_norm().var()));
      const auto heads = [&](size_t i, int64_t count) {
        return autograd::reshape(tape, qkv[i], {1, t, count, config.head_dim});
      };
      const Var attended = autograd::reshape(
          tape,
          autograd::attention(tape, heads(0, config.heads), heads(1, config.kv_heads),
                              heads(2, config.kv_heads), model_.inv_freq(), {}),
          {1, t, config.heads * config.head_dim});
      add(site->spec, t, [&](const engine::OperandRows& out) {
        device_.operand(out, rows(attended), site->spec);
      });
      x = linears[3]->forward(tape, site++->operand.plain(tape, attended), x);
      const auto hidden = models::QuantLinear::forward(tape, {linears[4], linears[5]},
                                                       normed(x, block->post_norm().var()));
      add(site->spec, t, [&](const engine::OperandRows& out) {
        device_.swiglu_operand(out, rows(hidden[0]), rows(hidden[1]), site->spec);
      });
      x = linears[6]->forward(tape, site++->operand.swiglu(tape, hidden[0], hidden[1]), x);
    }
    const Var h = autograd::rms_norm(tape, x, model_.norm().var(), config.rms_eps);
    const Var expected = model_.forward(tape, tokens, nullptr, models::Recompute::None);
    REQUIRE(values_of(device_, h.value()) == values_of(device_, expected.value()));
    return levels_;
  }

 private:
  struct Site {
    engine::OperandSpec spec;
    models::Operand operand;
  };

  static Tensor rows(const Var& x) {
    return x.value().view({x.value().numel() / x.value().dim(-1), x.value().dim(-1)});
  }

  template <typename Write>
  void add(const engine::OperandSpec& spec, int64_t t, const Write& write) {
    const int64_t columns = spec.view.stored_k, groups = columns / spec.view.group;
    engine::OperandRows out;
    out.codes = device_.empty({t, columns}, engine::DType::U8);
    out.zeros = device_.empty({t, groups}, engine::DType::U8);
    out.scales = device_.empty({t, groups}, device_.real());
    write(out);
    std::vector<uint8_t> codes(static_cast<size_t>(t * columns)),
        zeros(static_cast<size_t>(t * groups));
    device_.download(codes.data(), out.codes);
    device_.download(zeros.data(), out.zeros);
    for (size_t i = 0; i < codes.size(); ++i)
      levels_.push_back(codes[i] - zeros[i / static_cast<size_t>(spec.view.group)]);
  }

  Llama& model_;
  Backend& device_;
  std::vector<Site> sites_;
  std::vector<int> levels_;
};

const Options kEverything = {{"stages", "w4a16,w2a2"}, {"ocs-ratio", "0.2"},
                             {"act-outliers", "32"},   {"rotate", "group"},
                             {"range", "search"},      {"act-range", "search"}};
const Options kCases[] = {
    kEverything,
    {{"stages", "w2a16"}, {"ocs-ratio", "0.1,0.3"}},
    {{"stages", "w2a4"}, {"ocs-ratio", "0.25"}, {"split-side", "activation"}},
    {{"stages", "w2a16"}, {"rotate", "group"}, {"group-size", "64"}},
    {{"stages", "w3a8"}, {"group-size", "128"}, {"range", "search"}},
    {{"stages", "w2a4"},
     {"quantizer", "seq"},
     {"ocs-ratio", "0.2"},
     {"act-outliers", "32"},
     {"range", "search"},
     {"rotate", "group"}},
    {{"stages", "w4a16"}, {"quantizer", "seq"}, {"group-size", "128"}},
};

}  // namespace

TEST_CASE("packed model: formats and logits are those of training", "[packed_model]") {
  const Fixture fixture;
  for (size_t i = 0; i < std::size(kCases); ++i) {
    CAPTURE(i);
    const Exported exported(fixture, cat("run_", i), kCases[i]);
    exported.check_formats();
    const std::vector<int32_t> ids = random_tokens(5, 21, tiny_config().vocab);
    // Many rows: both multiply the same values.
    const std::vector<double> packed = logits_of(*exported.packed, ids),
                              trained = logits_of(*exported.trained->model, ids);
    CHECK(relative_error(packed, trained) <
          (on_cuda() ? epsilon_of(DType::BF16) : 64 * epsilon_of(DType::F32)));
    CHECK(exported.nll(*exported.packed) ==
          Approx(exported.nll(*exported.trained->model)).epsilon(2e-3));
    // Few rows: products read packed codes. With quantized activations a code near a threshold may
    // differ, which weighs more in seven tokens, and happens more often where act is bf16.
    const std::vector<int32_t> few(ids.begin(), ids.begin() + 7);
    CHECK(nll_of(logits_of(*exported.packed, few), few) ==
          Approx(nll_of(logits_of(*exported.trained->model, few), few))
              .epsilon(on_cuda() ? 2e-2 : 2e-3));
  }
}

TEST_CASE("packed model: few of the activation codes are not those of training", "[packed_model]") {
  models::LlamaConfig model = tiny_config();
  model.layers = 4;
  const Fixture fixture(model);
  const Options cases[] = {{{"stages", "w2a2"}},
                           {{"stages", "w2a2"}, {"ocs-ratio", "0.2"}, {"act-range", "search"}},
                           {{"stages", "w2a2"}, {"act-outliers", "32"}, {"rotate", "group"}}};
  for (size_t i = 0; i < std::size(cases); ++i) {
    const Exported exported(fixture, cat("run_", i), cases[i]);
    CodeReader packed(*exported.packed, true), trained(*exported.trained->model, false);
    int64_t codes = 0, flips = 0;
    for (uint64_t sequence = 0; sequence < 64; ++sequence) {
      const std::vector<int32_t> ids =
          random_tokens(sequence, Backend::kMaxPackedRows, tiny_config().vocab);
      const std::vector<int> got = packed.read(ids), wanted = trained.read(ids);
      REQUIRE(got.size() == wanted.size());
      codes += static_cast<int64_t>(got.size());
      for (size_t j = 0; j < got.size(); ++j) flips += got[j] != wanted[j];
    }
    const double share = static_cast<double>(flips) / static_cast<double>(codes);
    CAPTURE(i, codes, flips, share);
    CHECK(codes > 900000);
    // A product of levels has so few significant bits that FP32 sums of these sizes are exact in
    // any order: on the CPU no code flips. Tensor cores align terms to fewer bits. There a sum may
    // round to the other neighbour in bf16: up to K 2^-16 = 1 / 256 of the outputs. The chance that
    // this moves a code is about 2^-8. So one code in 2^16 flips by itself, and a quarter of the
    // sequences have such a code. It changes the sums behind it by a tenth, which flips about one
    // code in twenty of the layers that follow, half of them all: 1 / 160 of the codes.
    CHECK(share <= (on_cuda() ? 0.02 : 0));
  }
}

TEST_CASE("packed model: the Hugging Face format sums pairs and undoes rotations",
          "[packed_model]") {
  const Fixture fixture;
  for (const size_t i : {1, 3}) {
    CAPTURE(i);
    const Exported exported(fixture, cat("run_", i), kCases[i]);
    const std::string path = exported.run.path() + "_plain";
    train::export_run(backend(), *fixture.source, FileTokenizer(), exported.run.path(), path,
                      models::ExportFormat::HuggingFace);
    const auto plain = load_model(backend(), *models::open_checkpoint(path));
    const std::vector<int32_t> ids = random_tokens(5, 21, tiny_config().vocab);
    const double error = relative_error(logits_of(*plain, ids), logits_of(*exported.packed, ids));
    // Sums of pairs have few bits; rotated weights are rounded to bf16, in seven linears a block.
    if (exported.config.rotate == train::Rotate::None && !on_cuda())
      CHECK(error < 64 * epsilon_of(DType::F32));
    else
      CHECK(error < 4 * epsilon_of(DType::BF16));
  }
}

TEST_CASE("packed model: a forward of T tokens equals T steps of decoding", "[packed_model]") {
  const Fixture fixture;
  for (size_t i = 0; i < std::size(kCases); ++i) {
    CAPTURE(i);
    const Exported exported(fixture, cat("run_", i), kCases[i]);
    Backend& device = backend();
    const int32_t tokens = 24;
    const std::vector<int32_t> ids = random_tokens(6, tokens, tiny_config().vocab);
    const std::vector<double> whole = logits_of(*exported.packed, ids);
    models::KvCache cache(device, exported.packed->config(), 1, tokens);
    std::vector<double> steps;
    for (int32_t t = 0; t < tokens; ++t) {
      device.upload(cache.start, &t);
      const std::vector<double> step =
          logits_of(*exported.packed, {ids[static_cast<size_t>(t)]}, &cache);
      steps.insert(steps.end(), step.begin(), step.end());
    }
    const bool exact = exported.config.act_bits == 16;
    if (exact) CHECK(relative_error(steps, whole) < (on_cuda() ? 0.02 : 1e-4));
    // Codes of quantized activations that differ, as above: in 24 tokens each weighs less than in
    // seven.
    const double off = exact ? (on_cuda() ? 2e-3 : 1e-5) : on_cuda() ? 2e-2 * 7 / tokens : 2e-3;
    CHECK(nll_of(steps, ids) == Approx(nll_of(whole, ids)).epsilon(off));
  }
}

TEST_CASE("packed model: biases stay, norms of heads train, and a killed run ends with the same",
          "[packed_model]") {
  for (const models::LlamaConfig& config : other_families()) {
    CAPTURE(config.model_type, config.mlp_bias);
    const Fixture fixture(config);
    TrainConfig killed = fixture.config;
    const Options options = {{"stages", "w2a16"},
                             {"lr", "1e-3"},
                             {"e2e-steps", "3"},
                             {"ocs-ratio", "0.1"},
                             {"rotate", "group"}};
    const Exported exported(fixture, "run", options);
    for (const auto& [option, text] : options) set_option(killed, option, text);
    killed.out = fixture.dir / "killed";
    train::Observer observer;
    observer.after_block = [](int64_t) { throw Killed(); };
    CHECK_THROWS_AS(fixture.run(killed, observer), Killed);
    fixture.run(killed);
    CHECK(results(killed.out) == results(exported.run.path()));

    for (const models::LinearShape& linear : models::block_linears(config)) {
      const std::string name = models::layer_name(1, linear.name) + ".bias";
      CHECK(has_tensor(*exported.checkpoint, name) == linear.bias);
      if (linear.bias)
        CHECK(exported.checkpoint->load(name, {linear.n}) ==
              fixture.source->load(name, {linear.n}));
    }
    for (const models::NormShape& norm : models::block_norms(config)) {
      const std::string name = models::layer_name(1, norm.name);
      CHECK(exported.checkpoint->load(name, {norm.size}) !=
            fixture.source->load(name, {norm.size}));
    }
    // Packed products of few rows take biases as addends. On a GPU, both sides round to bf16 at
    // every op, at other places.
    for (const int64_t rows : {1, 7, 21}) {
      const std::vector<int32_t> ids = random_tokens(5, rows, config.vocab);
      CHECK(relative_error(logits_of(*exported.packed, ids),
                           logits_of(*exported.trained->model, ids)) <
            (on_cuda() ? 4 * epsilon_of(DType::BF16) : 2e-4));
    }
    const std::string path = exported.run.path() + "_plain";
    train::export_run(backend(), *fixture.source, FileTokenizer(), exported.run.path(), path,
                      models::ExportFormat::HuggingFace);
    const std::vector<int32_t> ids = random_tokens(5, 21, config.vocab);
    CHECK(relative_error(logits_of(*load_model(backend(), *models::open_checkpoint(path)), ids),
                         logits_of(*exported.packed, ids)) < 4 * epsilon_of(DType::BF16));
  }
}

namespace {

// Formats of both layers with every kind of override, and a model in them.
std::vector<LinearFormat> mixed_formats(const models::LlamaConfig& config, int64_t layer) {
  std::vector<LinearFormat> formats = block_formats(config, 2);
  const auto shapes = models::block_linears(config);
  for (size_t i = 0; i < formats.size(); ++i) {
    formats[i].input = {.bits = 2, .range = quant::RangeRule::Search};
    std::vector<int32_t> outliers;
    SplitSide side = SplitSide::Weight;
    switch (shapes[i].site) {
      case models::kAttentionSite:
        break;
      case models::kOutputSite:
        if (layer == 1) formats[i].input = {};  // 16 bits, among searched ranges
        outliers.resize(32);
        std::iota(outliers.begin(), outliers.end(), 7);
        break;
      case models::kMlpSite:
        side = SplitSide::Activation;
        break;
      case models::kDownSite:
        if (layer == 1) formats[i].input.bits = 4;
        if (layer == 0) formats[i].weight.bits = 4;
        break;
    }
    formats[i].input.outliers = static_cast<int>(outliers.size());
    formats[i].order = std::make_shared<ChannelOrder>(formats[i].k, 32, outliers,
                                                      std::vector<int32_t>{2, 5, 50}, side);
  }
  return formats;
}

struct MixedExport {
  TempDir dir;
  std::unique_ptr<models::Checkpoint> source;
  std::optional<TrainedModel> trained;
  std::string path;

  MixedExport() {
    const models::LlamaConfig config = tiny_config();
    std::filesystem::create_directory(dir / "source");
    write_tiny_model(dir / "source", config, 1);
    source = models::open_checkpoint(dir / "source");
    const auto formats = [&](int64_t layer) { return mixed_formats(config, layer); };
    trained.emplace(backend(), *source, formats, [&](int64_t layer) {
      return models::start_stage(config, models::full_precision(*source, layer), formats(layer), {},
                                 quant::RangeRule::MinMax, 0);
    });
    path = dir / "packed";
    trained->write(path);
  }

  // Opens the export with another quantization_config.
  void open_with(const std::function<void(ordered_json& quantization)>& change) const {
    const std::string file = path + "/config.json", before = data::read_file(file);
    ordered_json config = ordered_json::parse(before);
    change(config["quantization_config"]);
    data::write_file_atomic(file, config.dump());
    const auto restore = [&] { data::write_file_atomic(file, before); };
    try {
      models::open_checkpoint(path);
    } catch (...) {
      restore();
      throw;
    }
    restore();
  }
};

}  // namespace

TEST_CASE("packed model: what a linear has of its own is an override, and is read back",
          "[packed_model]") {
  const MixedExport mixed;
  const auto checkpoint = models::open_checkpoint(mixed.path);
  const auto shapes = models::block_linears(tiny_config());
  for (int64_t layer = 0; layer < tiny_config().layers; ++layer)
    for (size_t i = 0; i < shapes.size(); ++i) {
      CAPTURE(layer, shapes[i].name);
      CHECK(*checkpoint->packed_format(models::layer_name(layer, shapes[i].name), shapes[i].n,
                                       shapes[i].k) == mixed_formats(tiny_config(), layer)[i]);
    }
  const ordered_json overrides =
      ordered_json::parse(checkpoint->config_json())["quantization_config"]["overrides"];
  CHECK(overrides.size() == 7);  // gate, up and down of each layer, o_proj of one
  CHECK(overrides["model.layers.1.self_attn.o_proj"] == ordered_json{{"activation_bits", 16}});
  CHECK(overrides["model.layers.1.mlp.down_proj"] == ordered_json{{"activation_bits", 4}});
  CHECK(overrides["model.layers.0.mlp.down_proj"] == ordered_json{{"bits", 4}});
  CHECK(overrides["model.layers.0.mlp.up_proj"] == ordered_json{{"split_side", "activation"}});

  const std::vector<int32_t> ids = random_tokens(3, 20, tiny_config().vocab);
  CHECK(relative_error(logits_of(*load_model(backend(), *checkpoint), ids),
                       logits_of(*mixed.trained->model, ids)) <
        (on_cuda() ? epsilon_of(DType::BF16) : 64 * epsilon_of(DType::F32)));

  // Bits per activation: each site once. All split 3 channels; o_proj has 32 outliers.
  double codes = 0, channels = 0;
  for (const bool last : {false, true}) {
    codes += 2 * (64 + 3) + (last ? 16 * (256 + 3) : 2 * (256 + 3 - 32) + 8 * 32) + 2 * (64 + 3) +
             (last ? 4 : 2) * (96 + 3);
    channels += 64 + 256 + 64 + 96;
  }
  CHECK(checkpoint->bits_per_activation().codes == Approx(codes / channels));
}

TEST_CASE("packed model: formats that do not fit together are refused", "[packed_model]") {
  const MixedExport mixed;
  const auto overrides = [&](const char* linear, const ordered_json& own) {
    mixed.open_with([&](ordered_json& q) { q["overrides"][linear] = own; });
  };
  CHECK_NOTHROW(mixed.open_with([](ordered_json&) {}));
  const std::string k_proj = "model.layers.0.self_attn.k_proj";
  for (const ordered_json& own :
       {ordered_json{{"activation_bits", 4}}, ordered_json{{"split_side", "activation"}},
        ordered_json{{"rotate", "group"}}, ordered_json{{"activation_range", "minmax"}}})
    CHECK_THROWS_WITH(overrides(k_proj.c_str(), own),
                      Contains("read one input, but their channel orders or activations differ") &&
                          Contains(k_proj));
  CHECK_THROWS_WITH(overrides(k_proj.c_str(), {{"group_size", 64}}),
                    Contains("overrides of '" + k_proj + "': unknown key 'group_size'"));
  CHECK_THROWS_WITH(overrides(k_proj.c_str(), {{"split_side", "both"}}),
                    Contains("unsupported split_side \"both\""));
  CHECK_THROWS_WITH(overrides("model.layers.2.mlp.up_proj", ordered_json::object()),
                    Contains("no linear of the model"));
  CHECK_THROWS_WITH(overrides("model.layers.0.mlp.down_proj", {{"bits", 2}}),
                    Contains("down_proj.qweight' has shape"));
  CHECK_THROWS_WITH(models::open_checkpoint(mixed.path, 2), Contains("--bits reads fewer bits"));

  // Lists of channels: another type, and channels that cannot be. The header's length stays.
  const std::string file = mixed.path + "/bbb.safetensors", before = data::read_file(file);
  const std::string name = "model.layers.0.self_attn.q_proj.split_channels";
  const auto broken = [&](const char* from, const char* to, const char* message) {
    std::string bytes = before;
    const size_t at = bytes.find(from, bytes.find('"' + name + '"'));
    bytes.replace(at, std::strlen(from), to);
    data::write_file_atomic(file, bytes);
    CHECK_THROWS_WITH(models::open_checkpoint(mixed.path), Contains(message));
    data::write_file_atomic(file, before);
  };
  broken("I32", "F32", "split_channels' is F32 (3), not a list of I32 channels");
  const uint8_t* begin = reinterpret_cast<const uint8_t*>(before.data());
  const int64_t at =
      data::parse_safetensors(begin, static_cast<int64_t>(before.size()), file).at(name).data -
      begin;
  const auto with_channel = [&](int64_t i, int32_t channel, const char* message) {
    std::string bytes = before;
    std::memcpy(bytes.data() + at + 4 * i, &channel, sizeof channel);
    data::write_file_atomic(file, bytes);
    CHECK_THROWS_WITH(models::open_checkpoint(mixed.path), Contains(message));
    data::write_file_atomic(file, before);
  };
  with_channel(2, 64, "split channels are not ascending within [0, 64): 64 after 5");
  with_channel(1, 2, "split channels are not ascending");
  with_channel(0, -1, "split channels are not ascending");
  with_channel(2, 51, "read one input, but their channel orders or activations differ");
  CHECK_NOTHROW(models::open_checkpoint(mixed.path));
}

}  // namespace bbb::tests
