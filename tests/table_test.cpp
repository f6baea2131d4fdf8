// Head and embedding of 8 and 4 bits: quantized by the written formula, read back as they were
// written, and used as their dequantized values would be.
#include "models/table.h"

#include <catch2/catch.hpp>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <numeric>

#include "tests/formats.h"
#include "tests/model_files.h"
#include "tests/packed_matrix.h"
#include "tests/quantizer_formula.h"
#include "tests/tiny_model.h"
#include "tests/trained_model.h"

namespace bbb::tests {
namespace {

using Catch::Matchers::Contains;
using models::ExportFormat;
using models::ExportOptions;
using models::Llama;
using models::LlamaConfig;
using nlohmann::ordered_json;

// Losses of rows h with one target in five left out, from the model's own head.
std::vector<double> losses_of(const Llama& model, const Tensor& h,
                              const std::vector<int32_t>& targets) {
  const int64_t m = h.dim(0);
  const Guarded losses(model.backend(), {m}, model.backend().real());
  model.token_losses(losses.tensor(), h, make_ids(model.backend(), {m}, targets));
  CHECK(losses.untouched());
  return values_of(model.backend(), losses.tensor());
}

std::vector<int32_t> some_targets(int64_t m, int64_t vocab) {
  std::vector<int32_t> targets = random_tokens(8, m, vocab);
  for (size_t i = 0; i < targets.size(); i += 5) targets[i] = -1;
  targets.back() = static_cast<int32_t>(vocab - 1);
  return targets;
}

// A trained tiny model, exported with this head.
struct ExportedHead {
  TempDir dir;
  LlamaConfig config = tiny_config();
  std::unique_ptr<models::Checkpoint> source, written;
  double bits_per_weight = 0;

  ExportedHead(bool tied, const ExportOptions& options,
               int64_t shard_bytes = models::kMaxShardBytes) {
    config.tied_head = tied;
    std::filesystem::create_directory(dir / "source");
    write_tiny_model(dir / "source", config, 1);
    source = models::open_checkpoint(dir / "source");
    TrainedModel trained(
        backend(), *source, [&](int64_t) { return block_formats(config, 2); },
        [&](int64_t layer) { return models::full_precision(*source, layer); });
    bits_per_weight =
        models::export_model(
            path(), *source, FileTokenizer(), [&](int64_t i) { return trained.formats(i); },
            options, models::outer_of(*source), [&](int64_t i) { return trained.layer(i); }, "{}",
            nullptr, shard_bytes)
            .bits_per_weight;
    written = models::open_checkpoint(path());
  }
  std::string path() const { return dir / "packed"; }
  std::string name() const { return config.tied_head ? "model.embed_tokens" : "lm_head"; }
  void reopen(const std::function<void(ordered_json& quantization)>& edit) {
    const std::string file = path() + "/config.json";
    ordered_json json = ordered_json::parse(data::read_file(file));
    edit(json["quantization_config"]);
    data::write_file_atomic(file, json.dump());
    written = models::open_checkpoint(path());
  }
};

}  // namespace

TEST_CASE("embed_packed: a row is the decoded one", "[embed][table]") {
  Backend& b = backend();
  engine::Rng rng(19);
  for (const int bits : {4, 8})
    for (const int group : {32, 64})
      for (const int64_t d : {64, 576, 1088})
        for (const int64_t m : {1, 7, 300}) {
          CAPTURE(bits, group, d, m);
          const int64_t v = 41;
          const PackedMatrix matrix(rng, v, d, {bits, group});
          std::vector<int32_t> ids = random_tokens(static_cast<uint64_t>(m), m, v);
          ids.back() = static_cast<int32_t>(v - 1);
          const Guarded out(b, {m, d}, b.act());
          b.embed_packed(out.tensor(), make_ids(b, {m}, ids), matrix.on(b));
          CHECK(out.untouched());
          std::vector<double> want;
          for (const int32_t id : ids)
            for (int64_t i = 0; i < d; ++i)
              want.push_back(matrix.master_scale * matrix.levels[static_cast<size_t>(id * d + i)]);
          CHECK(values_of(b, out.tensor()) == (b.act() == DType::BF16 ? round_bf16(want) : want));
        }
  const PackedMatrix narrow(rng, 5, 64, {2, 32}), nested(rng, 5, 64, {8, 32, true});
  const Tensor out = b.empty({1, 64}, b.act()), ids = make_ids(b, {1}, {0});
  CHECK_THROWS_WITH(b.embed_packed(out, ids, narrow.on(b)), Contains("4 or 8 bits, not 2"));
  CHECK_THROWS_WITH(b.embed_packed(out, ids, nested.on(b)), Contains("not 8 nested bits"));
  const PackedMatrix table(rng, 5, 64, {8, 32});
  if (!on_cuda())
    CHECK_THROWS_WITH(b.embed_packed(out, make_ids(b, {1}, {5}), table.on(b)),
                      Contains("id 5 is not in [0, 5)"));
}

TEST_CASE("table: quantized by the formula", "[table]") {
  engine::Rng rng(20);
  LlamaConfig config = tiny_config();
  config.vocab = 700;  // more rows than one thread takes
  for (const int bits : {4, 8}) {
    CAPTURE(bits);
    std::vector<double> values(static_cast<size_t>(config.vocab * config.d_model));
    for (double& value : values) value = static_cast<float>(0.03 * rng.normal());
    std::fill_n(values.begin(), 32, 0.0);  // a dead group
    const quant::LinearFormat format = models::table_format(config, bits);
    const models::LinearResult table =
        models::quantize_table({values.begin(), values.end()}, format);
    const FormulaResult want = quantize_by_formula(values, bits, 32);
    float s;
    std::memcpy(&s, table.part(quant::StoredPart::MasterScale).data(), sizeof s);
    CHECK(s == want.s);
    CHECK(table.part(quant::StoredPart::Scales) == want.e);
    CHECK(table.part(quant::StoredPart::Zeros) == models::pack_rows(want.z, config.vocab, bits));
    CHECK(table.part(quant::StoredPart::Codes) ==
          models::pack_rows(want.codes, config.vocab, bits));
  }
  config.d_model = 80;
  CHECK_THROWS_WITH(models::table_format(config, 8), Contains("whole groups of 32, not 80"));
}

TEST_CASE("table: an export with a quantized head, read back", "[table][export]") {
  Backend& b = backend();
  for (const bool tied : {false, true}) {
    const ExportedHead plain(tied, ExportFormat::Packed);
    CHECK(plain.written->table_bytes() == 2 * plain.written->table_weights());
    for (const int bits : {8, 4})
      for (const int64_t shard_bytes : {models::kMaxShardBytes, int64_t{20000}}) {
        CAPTURE(tied, bits, shard_bytes);
        const ExportedHead exported(tied, ExportOptions(ExportFormat::Packed, bits), shard_bytes);
        const models::Checkpoint& written = *exported.written;
        const int64_t vocab = exported.config.vocab, width = exported.config.d_model;
        const engine::Shape shape{vocab, width};
        CHECK(exported.bits_per_weight == plain.bits_per_weight);
        CHECK(written.bits_per_weight() == plain.bits_per_weight);
        const int64_t zeros = (width / 32 * bits + 7) / 8;
        CHECK(written.table_bytes() ==
              vocab * (width * bits / 8 + width / 32 + zeros) + 4 + (tied ? 0 : 2 * vocab * width));
        CHECK_FALSE(has_tensor(written, exported.name() + ".weight"));
        CHECK(has_tensor(written, "model.embed_tokens.weight") == !tied);
        const ordered_json config =
            ordered_json::parse(written.config_json())["quantization_config"];
        CHECK(config["overrides"] == ordered_json{{exported.name(), {{"bits", bits}}}});
        CHECK(config["modules_to_not_convert"] ==
              ordered_json{tied ? "lm_head" : "model.embed_tokens"});
        written.check_finite();

        // The same model with dequantized tables.
        const auto model = load_model(b, written), dense = load_model(b, *plain.written);
        const std::string name = exported.name() + ".weight";
        const models::LinearResult table = models::quantize_table(
            plain.written->load(name, shape), models::table_format(exported.config, bits));
        const std::vector<float> values = table.dequantize();
        const autograd::Var dequantized(
            make(b, shape, b.act(), std::vector<double>(values.begin(), values.end())));
        dense->set_tables(tied ? dequantized : autograd::Var(dense->embedding()), dequantized);
        CHECK(model->head_table().bytes() == table.format.bytes());
        // A packed product rounds rows of x to 16 bits on the CPU: 1e-4 relative RMS. 8-bit weights
        // in bf16 are rounded, in a packed product they are not.
        const double tolerance = on_cuda() ? 2 * epsilon_of(DType::BF16) : 2e-4;
        for (const int64_t rows : {1, 3, 21}) {  // 21 rows take three packed products
          const std::vector<int32_t> ids = random_tokens(3, rows, vocab);
          CHECK(relative_error(logits_of(*model, ids), logits_of(*dense, ids)) < tolerance);
        }
        engine::Rng rng(4);
        const Tensor h = make(b, {37, width}, b.act(), activations(rng, 37 * width));
        const std::vector<int32_t> targets = some_targets(37, vocab);
        CHECK(relative_error(losses_of(*model, h, targets), losses_of(*dense, h, targets)) <
              64 * epsilon_of(DType::F32));
        const std::vector<int32_t> text = random_tokens(7, 60, vocab);
        CHECK(models::perplexity(*model, text, 3, 20, nullptr).nll ==
              Approx(models::perplexity(*dense, text, 3, 20, nullptr).nll)
                  .epsilon(on_cuda() ? 1e-3 : 1e-5));
      }
  }
}

TEST_CASE("table: losses of several chunks of words and rows", "[table]") {
  // More words and more rows than a chunk of head_budget() holds.
  Backend& b = backend();
  LlamaConfig config = tiny_config();
  config.tied_head = false;
  config.d_model = on_cuda() ? 1024 : 256;
  config.vocab = on_cuda() ? 300'000 : 70'000;
  config.layers = 1;
  const int64_t m = on_cuda() ? 600 : 300;
  const int64_t budget = models::head_budget(b).bytes;
  REQUIRE(config.vocab * config.d_model * engine::size_bytes(b.act()) > budget);
  REQUIRE(m * config.vocab * engine::size_bytes(b.real()) > budget);
  for (const int bits : {8, 4}) {
    CAPTURE(bits);
    const auto model =
        Llama::synthetic(b, config, {.weight = {}, .input = {}, .head_bits = bits}, 5);
    engine::Rng rng(4);
    const Tensor h = make(b, {m, config.d_model}, b.act(), activations(rng, m * config.d_model));
    const std::vector<int32_t> targets = some_targets(m, config.vocab);
    const std::vector<double> losses = losses_of(*model, h, targets);

    std::vector<int32_t> all(static_cast<size_t>(config.vocab));
    std::iota(all.begin(), all.end(), 0);
    const Tensor table = b.empty({config.vocab, config.d_model}, b.act());
    b.embed_packed(table, make_ids(b, {config.vocab}, all), *model->head_table().packed);
    model->set_tables(autograd::Var(model->embedding()), autograd::Var(table));
    CHECK(relative_error(losses, losses_of(*model, h, targets)) < 64 * epsilon_of(DType::F32));
  }
}

TEST_CASE("table: what a reader refuses", "[table]") {
  for (const bool tied : {false, true}) {
    CAPTURE(tied);
    ExportedHead exported(tied, ExportOptions(ExportFormat::Packed, 4));
    const std::string name = exported.name(), path = exported.path();
    const auto refuses = [&](const std::function<void(ordered_json&)>& edit,
                             const std::string& message) {
      const std::string file = path + "/config.json", text = data::read_file(file);
      CHECK_THROWS_WITH(exported.reopen(edit), Contains(path) && Contains(message));
      data::write_file_atomic(file, text);
    };
    refuses([&](ordered_json& q) { q["modules_to_not_convert"].push_back(name); },
            "'" + name + "' is quantized, but modules_to_not_convert holds it");
    refuses([&](ordered_json& q) { q["overrides"][name]["bits"] = 2; },
            "'" + name + "' has 2 bits, not 4 or 8");
    refuses([&](ordered_json& q) { q.erase("overrides"); }, "'" + name + "' has 2 bits");
    refuses([&](ordered_json& q) { q["overrides"][name]["bits"] = 8; },
            "'" + name + ".qweight' has shape");
    refuses([&](ordered_json& q) { q["overrides"][name]["activation_bits"] = 4; },
            "overrides of '" + name + "': unknown key 'activation_bits'");
    if (tied)
      refuses([&](ordered_json& q) { q["overrides"]["lm_head"]["bits"] = 4; },
              "overrides of 'lm_head': no linear of the model");
    CHECK_NOTHROW(models::open_checkpoint(path));
  }
}

}  // namespace bbb::tests
