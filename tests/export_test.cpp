// Export: the files hold the trained model, and a failure leaves nothing behind.
#include <unistd.h>

#include <catch2/catch.hpp>
#include <filesystem>

#include "models/llama.h"
#include "models/packed_checkpoint.h"
#include "tests/formats.h"
#include "tests/model_files.h"
#include "tests/support.h"
#include "tests/tiny_model.h"
#include "tests/trained_model.h"

using namespace bbb;
using namespace bbb::tests;
using models::ExportFormat;
using models::LayerResult;
using models::Llama;

namespace fs = std::filesystem;

namespace {

// The same with a model directory of its own.
struct Trained {
  TempDir directory;
  models::LlamaConfig config;
  std::unique_ptr<models::Checkpoint> source;
  std::optional<TrainedModel> quantized;
  Llama* model = nullptr;

  Trained(Backend& device, bool tied, int bits) : config(tiny_config()) {
    config.tied_head = tied;
    fs::create_directory(directory / "source");
    write_tiny_model(directory / "source", config, 1);
    source = models::open_checkpoint(directory / "source");
    quantized.emplace(
        device, *source, [&](int64_t) { return block_formats(config, bits); },
        [&](int64_t layer) { return models::full_precision(*source, layer); });
    model = quantized->model.get();
  }

  LayerResult layer(int64_t i) { return quantized->layer(i); }
  std::vector<quant::LinearFormat> formats(int64_t i) { return quantized->formats(i); }

  double write(const std::string& name, ExportFormat format,
               int64_t shard_bytes = models::kMaxShardBytes) {
    return models::export_model(
               directory / name, *source, FileTokenizer(), [this](int64_t i) { return formats(i); },
               format, models::outer_of(*source), [this](int64_t i) { return layer(i); },
               "{\"seed\": 1}\n", nullptr, shard_bytes)
        .bits_per_weight;
  }

  // The number of files and directories next to the source.
  int64_t leftovers() const {
    int64_t n = 0;
    for (const auto& entry : fs::directory_iterator(directory.path()))
      n += entry.path().filename() != "source";
    return n;
  }
};

}  // namespace

TEST_CASE("export: packed logits equal those of the training forward", "[export]") {
  Backend& device = backend();
  for (const bool tied : {false, true})
    for (const int bits : {2, 3, 4}) {
      CAPTURE(tied, bits);
      Trained trained(device, tied, bits);
      const double bits_per_weight = trained.write("packed", ExportFormat::Packed);
      // Codes, scales and zero points. The margin covers zero points in whole bytes a row, and S,
      // whose share is largest in the smallest linear.
      CHECK(bits_per_weight >= bits + 8.0 / 32 + bits / 32.0);
      CHECK(bits_per_weight < bits + 8.0 / 32 + bits / 32.0 + 0.15);
      const auto checkpoint = models::open_checkpoint(trained.directory / "packed");
      CHECK(checkpoint->kind() == models::CheckpointKind::Packed);
      CHECK(checkpoint->bits_per_weight() == bits_per_weight);
      CHECK(has_tensor(*checkpoint, "lm_head.weight") == !tied);
      const auto packed = load_model(device, *checkpoint);
      const quant::LinearFormat format = trained.formats(0)[0];
      const int64_t most_rows = device.max_packed_rows(format);
      const bool in_tiles = most_rows == Backend::kAnyRows;
      // 3 rows use the packed product; 20 rows unpack the layer, unless that takes as many.
      for (const int64_t rows : {3, 20}) {
        const std::vector<int32_t> ids = random_tokens(3, rows, trained.config.vocab);
        // FP32 sums in two orders, through two layers. The packed product rounds activations to 16
        // bits: 1e-4 a linear (numerics.md section 2), most of it lost among the residuals. In bf16
        // its sums differ by about K 2^-24 or by those 16 bits. The few that are as near to a tie
        // round the other way, by an epsilon, in each of two layers; with few rows in tiles, a
        // norm's rows are rounded before their factor, not behind it: two more. An unpacked layer
        // goes through the product of training: one epsilon.
        const bool few_rows = rows <= Backend::kMaxPackedRows;
        const bool packed_product = rows <= most_rows;
        const double epsilons = few_rows && in_tiles ? 4 : packed_product ? 2 : 1;
        const double tolerance = device.act() == DType::BF16 ? epsilons * epsilon_of(DType::BF16)
                                 : packed_product            ? 2e-4
                                                             : 64 * epsilon_of(DType::F32);
        CHECK(relative_error(logits_of(*packed, ids), logits_of(*trained.model, ids)) < tolerance);
      }
    }
}

TEST_CASE("export: the Hugging Face format holds the same model", "[export]") {
  Backend& device = backend();
  Trained trained(device, true, 2);
  CHECK(trained.write("hf", ExportFormat::HuggingFace) == 16);
  const auto checkpoint = models::open_checkpoint(trained.directory / "hf");
  CHECK(checkpoint->kind() == models::CheckpointKind::HuggingFace);
  CHECK_FALSE(has_tensor(*checkpoint, "lm_head.weight"));
  const std::vector<int32_t> ids = random_tokens(3, 20, trained.config.vocab);
  const double tolerance =
      device.act() == DType::BF16 ? epsilon_of(DType::BF16) : 64 * epsilon_of(DType::F32);
  CHECK(relative_error(logits_of(*load_model(device, *checkpoint), ids),
                       logits_of(*trained.model, ids)) < tolerance);
}

TEST_CASE("export: a separate head, several end tokens and Python's JSON numbers are preserved",
          "[export]") {
  Trained trained(oracle(), false, 2);
  // The config says that the head is tied, but the file has a head that differs from the embedding.
  const std::string source = trained.directory / "source/";
  std::string config = data::read_file(source + "config.json");
  const std::string untied = "\"tie_word_embeddings\": false";
  config.replace(config.find(untied), untied.size(),
                 "\"tie_word_embeddings\": true, \"eos_token_id\": [5, 6], \"clip\": -Infinity");
  data::write_file_atomic(source + "config.json", config);
  data::write_file_atomic(source + "generation_config.json", "{\"eos_token_id\": [6, 8]}");
  trained.source = models::open_checkpoint(source);
  const engine::Shape table = {trained.config.vocab, trained.config.d_model};
  for (const auto format : {ExportFormat::Packed, ExportFormat::HuggingFace}) {
    const std::string name = format == ExportFormat::Packed ? "packed" : "hf";
    trained.write(name, format);
    const auto written = models::open_checkpoint(trained.directory / name);
    CHECK_FALSE(written->config().tied_head);
    CHECK(written->load("lm_head.weight", table) == trained.source->load("lm_head.weight", table));
    CHECK(written->stop_ids() == std::vector<int32_t>{5, 6, 8});
    CHECK_THAT(written->config_json(), Catch::Contains("\"tie_word_embeddings\": false"));
  }
}

TEST_CASE("export: the model's end token ends a document if the vocabulary names none") {
  CHECK(FileTokenizer().document_end({5, 6}) == 5);
  CHECK_THROWS_WITH(FileTokenizer().document_end(), Catch::Contains("give its id with --doc-end"));
}

TEST_CASE("export: a single file, or shards with an index", "[export]") {
  Trained trained(oracle(), false, 2);
  trained.write("sharded", ExportFormat::Packed, 30000);
  const std::string path = trained.directory / "sharded/";
  CHECK(fs::exists(path + "bbb.safetensors.index.json"));
  CHECK(fs::exists(path + "bbb-00002-of-00002.safetensors"));
  CHECK_FALSE(fs::exists(path + "bbb.safetensors"));
  CHECK(data::read_file(path + "tokenizer.json") == "{\"a\": 1}");
  CHECK(data::read_file(path + "bbb.json") == "{\"seed\": 1}\n");
  const std::vector<int32_t> ids = random_tokens(3, 5, trained.config.vocab);
  trained.write("single", ExportFormat::Packed);
  const auto sharded = models::open_checkpoint(path);
  const auto single = models::open_checkpoint(trained.directory / "single");
  CHECK(logits_of(*load_model(oracle(), *sharded), ids) ==
        logits_of(*load_model(oracle(), *single), ids));

  // Exporting the same model again gives the same bytes.
  trained.write("again", ExportFormat::Packed);
  for (const char* file : {"bbb.safetensors", "config.json"})
    CHECK(data::read_file(trained.directory / "again/" + file) ==
          data::read_file(trained.directory / "single/" + file));
}

TEST_CASE("export: a failure leaves nothing behind", "[export]") {
  Trained trained(oracle(), false, 2);
  const auto write = [&](const std::string& path,
                         const std::function<LayerResult(int64_t)>& layer) {
    models::export_model(
        path, *trained.source, FileTokenizer(), [&](int64_t i) { return trained.formats(i); },
        ExportFormat::Packed, models::outer_of(*trained.source), layer, "{}", nullptr);
  };
  SECTION("the layer throws") {
    CHECK_THROWS_WITH(write(trained.directory / "out",
                            [&](int64_t i) -> LayerResult {
                              if (i == 1) throw Error("layer 1 is not finished");
                              return trained.layer(i);
                            }),
                      "layer 1 is not finished");
  }
  SECTION("what is read back is not what was given") {
    int asked = 0;
    CHECK_THROWS_WITH(write(trained.directory / "out",
                            [&](int64_t i) {
                              LayerResult layer = trained.layer(i);
                              if (++asked == 4)
                                layer.linears[6].part(quant::StoredPart::Codes)[17] ^= 1;
                              return layer;
                            }),
                      Catch::Contains("model.layers.1.mlp.down_proj.qweight"));
  }
  SECTION("the parent is read-only, or missing") {
    // A parent that was made for the export goes with it.
    CHECK_THROWS_AS(write(trained.directory / "missing/out",
                          [](int64_t) -> models::LayerResult { throw Error("cut"); }),
                    Error);
    if (::geteuid() != 0) {  // root writes anywhere
      const std::string parent = trained.directory / "source";
      fs::permissions(parent, fs::perms::owner_read | fs::perms::owner_exec);
      CHECK_THROWS_AS(write(parent + "/out", [&](int64_t i) { return trained.layer(i); }), Error);
      fs::permissions(parent, fs::perms::owner_all);
    }
  }
  SECTION("the output exists") {
    CHECK_THROWS_AS(
        write(trained.directory / "source", [&](int64_t i) { return trained.layer(i); }), Error);
    CHECK(fs::exists(trained.directory / "source/model.safetensors"));
  }
  CHECK(trained.leftovers() == 0);
}
