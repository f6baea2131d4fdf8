// Algorithms of matrix products chosen by timing: what a tuned backend computes, when choices are
// stored, and how stored choices are used. On a backend with one algorithm per product (the CPU),
// tuning must change nothing and store nothing.
#include <catch2/catch.hpp>
#include <cstdlib>
#include <filesystem>
#include <iostream>

#include "tests/op_test.h"
#include "tests/tiny_run.h"
#include "tools/measure.h"
#include "train/gemm_choices.h"

namespace bbb::tests {
namespace {

using Catch::Matchers::Contains;
using engine::GemmChoices;
using engine::GemmTuning;
using engine::GemmTuningScope;
using engine::Write;

constexpr int64_t kRows = 1024, kOut = 96, kIn = 192;

bool has_choice() { return !backend().gemm_library().empty(); }

// One product of each kind.
struct Products {
  Products() {
    engine::Rng rng(3);
    Backend& b = backend();
    x = make(b, {kRows, kIn}, b.act(), activations(rng, kRows * kIn));
    w = make(b, {kOut, kIn}, b.act(), activations(rng, kOut * kIn));
    dy = make(b, {kRows, kOut}, b.act(), activations(rng, kRows * kOut));
    y = b.zeros({kRows, kOut}, b.act());
    dx = b.zeros({kRows, kIn}, b.act());
    dw = b.zeros({kOut, kIn}, b.real());
  }
  void run() const {
    backend().gemm_nt(y, x, w, Tensor(), Tensor());
    backend().gemm_nn(dx, dy, w, Tensor(), Write::Overwrite);
    backend().gemm_tn(dw, dy, x, Write::Overwrite);
  }
  std::vector<std::vector<uint8_t>> bytes() const {
    return {bytes_of(backend(), y), bytes_of(backend(), dx), bytes_of(backend(), dw)};
  }
  Tensor x, w, dy, y, dx, dw;
};

// Times every product, however small.
GemmTuning eager_tuning() {
  GemmTuning tuning;
  tuning.where = "the test";
  tuning.least_flops = 0;
  tuning.memory_bytes = 256 << 20;
  return tuning;
}

}  // namespace

TEST_CASE("a tuned product is right, and known choices repeat its bytes", "[gemm]") {
  // One run, and so many that a search beyond the library's suggestions pays.
  const int64_t runs = GENERATE(int64_t{1}, int64_t{1} << 40);
  CAPTURE(runs);
  const Products products;
  products.run();
  const auto untuned = products.bytes();

  GemmChoices chosen;
  int64_t stored = 0;
  std::vector<std::vector<uint8_t>> tuned;
  const Products fresh;
  {
    GemmTuning tuning = eager_tuning();
    tuning.product_runs = runs;
    tuning.keep = [&](const GemmChoices& choices) {
      chosen = choices;
      ++stored;
    };
    const GemmTuningScope scope(backend(), std::move(tuning));
    fresh.run();
    tuned = fresh.bytes();
    fresh.run();
    CHECK(fresh.bytes() == tuned);
  }
  const auto error = [&](const Tensor& got, const Tensor& want) {
    return relative_error(values_of(backend(), got), values_of(backend(), want));
  };
  // Two roundings of sums that differ by a few FP32 epsilons.
  CHECK(error(fresh.y, products.y) <= 2 * act_epsilon());
  CHECK(error(fresh.dx, products.dx) <= 2 * act_epsilon());
  CHECK(error(fresh.dw, products.dw) <= real_epsilon() * (16.0 + kRows / 8.0));
  CHECK(stored == (has_choice() ? 3 : 0));
  CHECK(chosen.algorithms.size() == (has_choice() ? 3 : 0));
  CHECK(chosen.made_by == backend().gemm_library());

  {
    GemmTuning tuning = eager_tuning();
    tuning.known = chosen;
    tuning.keep = [](const GemmChoices&) { FAIL("a known product was timed"); };
    const GemmTuningScope scope(backend(), std::move(tuning));
    const Products again;
    again.run();
    CHECK(again.bytes() == tuned);
  }
  // After the scope everything is as before it.
  const Products after;
  after.run();
  CHECK(after.bytes() == untuned);
}

TEST_CASE("a recorded step uses tuned products, timed before it is recorded", "[gemm]") {
  // One run is too short for a search; many are not.
  const int64_t runs = GENERATE(int64_t{1}, int64_t{1} << 40);
  CAPTURE(runs);
  const Products products;
  GemmChoices chosen;
  int64_t calls = 0;
  std::vector<std::string> lines;
  std::vector<std::vector<uint8_t>> recorded;
  {
    GemmTuning tuning = eager_tuning();
    tuning.step_runs = runs;
    tuning.keep = [&](const GemmChoices& choices) { chosen = choices; };
    tuning.say = [&](const std::string& line) { lines.push_back(line); };
    const GemmTuningScope scope(backend(), std::move(tuning));
    const auto replay = backend().record([&] {
      ++calls;
      products.run();
    });
    const bool waits = std::getenv("BBB_SYNC_LAUNCHES") != nullptr;  // then nothing is recorded
    if (has_choice() && !waits) {
      CHECK(calls == 2);
      CHECK(chosen.algorithms.size() == 3);
      REQUIRE(lines.size() == 1);
      CHECK_THAT(lines[0], Contains("algorithms of 3 timed"));
      CHECK_THAT(lines[0], Contains(runs == 1 ? "of 0 searched" : "of 3 searched"));
    }
    for (const auto& bytes : products.bytes())  // recording executes nothing
      CHECK(std::all_of(bytes.begin(), bytes.end(), [](uint8_t byte) { return byte == 0; }));
    const auto more = backend().record([&] { products.run(); });
    replay->run();
    recorded = products.bytes();
    CHECK(lines.size() <= 1);  // nothing is timed twice
  }
  GemmTuning tuning = eager_tuning();
  tuning.known = chosen;
  const GemmTuningScope scope(backend(), std::move(tuning));
  const Products eager;
  eager.run();
  CHECK(eager.bytes() == recorded);
}

TEST_CASE("a long product is searched by long runs of each candidate", "[gemm]") {
  if (!has_choice()) {
    std::cout << "SKIPPED: this device has one algorithm a product\n";
    return;
  }
  constexpr int64_t kM = 8192, kN = 4096, kK = 4096;  // about 0.4 ms
  Backend& b = backend();
  const Tensor x = tools::random_activations(b, {kM, kK}, 1);
  const Tensor w = tools::random_activations(b, {kN, kK}, 2);
  const auto product = [&] {
    const Tensor y = b.zeros({kM, kN}, b.act());
    b.gemm_nt(y, x, w, Tensor(), Tensor());
    return y;
  };
  const Tensor untuned = product();
  GemmChoices chosen;
  std::vector<std::string> lines;
  std::vector<uint8_t> searched;
  {
    GemmTuning tuning = eager_tuning();
    tuning.memory_bytes = int64_t{1} << 30;
    tuning.step_runs = int64_t{1} << 40;
    tuning.keep = [&](const GemmChoices& choices) { chosen = choices; };
    tuning.say = [&](const std::string& line) { lines.push_back(line); };
    const GemmTuningScope scope(b, std::move(tuning));
    const Tensor y = b.zeros({kM, kN}, b.act());
    const auto replay = b.record([&] { b.gemm_nt(y, x, w, Tensor(), Tensor()); });
    replay->run();
    searched = bytes_of(b, y);
    CHECK(relative_error(values_of(b, y), values_of(b, untuned)) <= 2 * act_epsilon());
  }
  CHECK(chosen.algorithms.size() == 1);
  if (std::getenv("BBB_SYNC_LAUNCHES") == nullptr) {
    REQUIRE(lines.size() == 1);
    CHECK_THAT(lines[0], Contains("of 1 searched"));
  }
  GemmTuning tuning = eager_tuning();
  tuning.known = chosen;
  tuning.keep = [](const GemmChoices&) { FAIL("a known product was timed"); };
  const GemmTuningScope scope(b, std::move(tuning));
  CHECK(bytes_of(b, product()) == searched);
}

TEST_CASE("a choice is stored before the first product that uses it", "[gemm]") {
  const Products products;
  GemmTuning tuning = eager_tuning();
  tuning.keep = [](const GemmChoices&) { throw Error("no room to store it"); };
  const GemmTuningScope scope(backend(), std::move(tuning));
  if (!has_choice()) {
    CHECK_NOTHROW(products.run());
    return;
  }
  const auto before = products.bytes();
  CHECK_THROWS_WITH(products.run(), Contains("no room to store it"));
  CHECK(products.bytes() == before);
}

TEST_CASE("timing stays within its memory, and skips small products", "[gemm]") {
  const Products products;
  products.run();
  const auto untuned = products.bytes();
  {
    GemmTuning tuning = eager_tuning();
    tuning.memory_bytes = 8 << 20;
    backend().reset_memory_peak();
    const int64_t most = backend().memory_peak_bytes() + tuning.memory_bytes;
    const GemmTuningScope scope(backend(), std::move(tuning));
    products.run();
    CHECK(backend().memory_peak_bytes() <= most);
  }

  std::vector<std::string> lines;
  GemmTuning tuning = eager_tuning();
  tuning.memory_bytes = 1 << 10;
  tuning.say = [&](const std::string& line) { lines.push_back(line); };
  int64_t stored = 0;
  tuning.keep = [&](const GemmChoices&) { ++stored; };
  {
    const GemmTuningScope scope(backend(), tuning);
    products.run();
    CHECK(products.bytes() == untuned);
    CHECK(lines.size() == (has_choice() ? 3 : 0));
    for (const std::string& line : lines) CHECK_THAT(line, Contains("is not timed"));
    CHECK(stored == (has_choice() ? 3 : 0));  // the run keeps the first suggestion
  }
  tuning.memory_bytes = 256 << 20;
  tuning.least_flops = 2.0 * kRows * kOut * kIn + 1;
  tuning.keep = [](const GemmChoices&) { FAIL("a small product was timed"); };
  const GemmTuningScope scope(backend(), tuning);
  products.run();
  CHECK(products.bytes() == untuned);
}

TEST_CASE("choices that do not belong to this backend are refused in one line", "[gemm]") {
  if (!has_choice()) {
    std::cout << "SKIPPED: this device has one algorithm a product\n";
    return;
  }
  const Products products;
  GemmChoices chosen;
  {
    GemmTuning tuning = eager_tuning();
    tuning.keep = [&](const GemmChoices& choices) { chosen = choices; };
    const GemmTuningScope scope(backend(), std::move(tuning));
    products.run();
  }
  for (const std::string& text : {std::string("fast"), std::string(128, 'x')}) {
    GemmTuning tuning = eager_tuning();
    tuning.known = chosen;
    for (auto& [product, algorithm] : tuning.known.algorithms) algorithm = text;
    const GemmTuningScope scope(backend(), std::move(tuning));
    CHECK_THROWS_WITH(products.run(), Contains("the test: the algorithm of the product TN "));
  }
  GemmTuning tuning = eager_tuning();
  tuning.known = chosen;
  tuning.known.made_by = "cuBLASLt 1 on a toaster";
  CHECK_THROWS_WITH(GemmTuningScope(backend(), tuning), Contains("on a toaster; here is cuBLASLt"));
}

TEST_CASE("stored choices come back byte for byte, and damaged ones are refused", "[train]") {
  const TempDir dir;
  const std::string path = dir / "gemm.json";
  GemmChoices choices;
  choices.made_by = "cuBLASLt 130101 on NVIDIA H200";
  choices.algorithms = {{"TN 576x16384x576 bf16 scaled aligned 16 16 16 16", std::string(128, '7')},
                        {"NT 8x8x8 f32 added aligned 16 16 4 4", std::string(128, 'a')}};
  train::save_gemm_choices(path, choices);
  const GemmChoices back = train::load_gemm_choices(path);
  CHECK(back.made_by == choices.made_by);
  CHECK(back.algorithms == choices.algorithms);
  const std::string written = data::read_file(path);
  train::save_gemm_choices(path, back);
  CHECK(data::read_file(path) == written);

  const auto refused = [&](const std::string& content) {
    data::write_file_atomic(path, content);
    try {
      train::load_gemm_choices(path);
      FAIL("accepted: " << content);
    } catch (const Error& error) {
      CHECK_THAT(error.what(), Contains(path));
      CHECK(std::string(error.what()).find('\n') == std::string::npos);
    }
  };
  refused("");
  refused("\x01\xff garbage");
  refused("[]");
  refused("{\"made_by\": 3, \"algorithms\": {}, \"checksum\": \"0\"}");
  refused(written.substr(0, written.size() / 2));
  for (const char* part : {"H200", "576x16384", "777", "\"algorithms\": {"}) {
    std::string changed = written;
    changed[changed.find(part)] ^= 1;
    refused(changed);
  }
}

TEST_CASE("choices of another library or GPU are ignored, with a message", "[train]") {
  const TempDir dir;
  const std::string path = dir / "gemm.json";
  std::vector<std::string> lines;
  const auto tuning = [&] {
    lines.clear();
    return train::stored_gemm_tuning(backend(), path, 1 << 20,
                                     [&](const std::string& line) { lines.push_back(line); });
  };
  CHECK(tuning().known.algorithms.empty());
  CHECK(lines.empty());

  GemmChoices choices;
  choices.algorithms["TN 1x1x1"] = "00";
  choices.made_by = backend().gemm_library();
  tuning().keep(choices);
  CHECK(tuning().known.algorithms == choices.algorithms);
  CHECK(lines.empty());

  choices.made_by = "cuBLASLt 1 on a toaster";
  train::save_gemm_choices(path, choices);
  CHECK(tuning().known.algorithms.empty());
  REQUIRE(lines.size() == 1);
  CHECK_THAT(lines[0], Contains("a toaster") && Contains("timed anew"));
}

namespace {

// On a GPU, the model is large enough for its products to be timed.
struct LargerRun {
  LargerRun() {
    model = tiny_config();
    if (on_cuda()) {
      model.d_model = 512;
      model.hidden = 1024;
      seq_len = 256;
    }
    model.max_position = seq_len;
    std::filesystem::create_directory(dir / "model");
    write_tiny_model(dir / "model", model, 7);
    source = models::open_checkpoint(dir / "model");
    windows.count = 20;
    windows.seq_len = seq_len;
    windows.ids = random_tokens(11, windows.count * seq_len, model.vocab);
  }

  train::TrainConfig config(const std::string& out, train::GemmAlgorithms algorithms) const {
    train::TrainConfig c;
    c.model = dir / "model";
    c.data = "tokens";
    c.out = dir / out;
    c.samples = 16;
    c.val_samples = 4;
    c.seq_len = seq_len;
    c.batch = 8;
    c.stages = train::parse_stages("w4a16,w2a16");
    c.lr = {1e-3};
    c.e2e_steps = 3;
    c.e2e_batch = c.e2e_micro_batch = 8;
    c.e2e_lr = {1e-3};
    c.gemm_algorithms = algorithms;
    return c;
  }

  void run(const train::TrainConfig& c, train::Observer observer = {}) const {
    observer.quiet = true;
    train::train_windows(backend(), *source, windows, c, observer);
  }

  TempDir dir;
  models::LlamaConfig model;
  int64_t seq_len = 32;
  std::unique_ptr<models::Checkpoint> source;
  data::Windows windows;
};

}  // namespace

TEST_CASE("deterministic runs store no algorithms and repeat their bytes", "[train]") {
  const LargerRun larger;
  for (const char* out : {"first", "second"})
    larger.run(larger.config(out, train::GemmAlgorithms::Heuristic));
  auto first = results(larger.dir / "first"), second = results(larger.dir / "second");
  CHECK(first.count("gemm.json") == 0);
  CHECK(first == second);
}

TEST_CASE("a resumed run uses the algorithms that it started with", "[train]") {
  const LargerRun larger;
  const auto config = [&](const char* out) {
    return larger.config(out, train::GemmAlgorithms::Timed);
  };
  larger.run(config("whole"));
  const auto whole = results(larger.dir / "whole");
  REQUIRE(whole.count("gemm.json") == (has_choice() ? 1 : 0));

  // Another run starts with the same choices. It is killed after its first block, and again in the
  // end-to-end phase.
  struct Killed {};
  const std::string out = larger.dir / "killed";
  std::filesystem::create_directory(out);
  for (const char* folder : {"/blocks", "/e2e"}) std::filesystem::create_directory(out + folder);
  for (const char* name : {"run.json", "gemm.json"})
    if (whole.count(name)) data::write_file_atomic(out + "/" + name, whole.at(name));
  train::Observer observer;
  observer.after_block = [](int64_t block) {
    if (block == 0) throw Killed();
  };
  CHECK_THROWS_AS(larger.run(config("killed"), observer), Killed);
  observer = {};
  observer.after_e2e_step = [](int64_t) { throw Killed(); };
  CHECK_THROWS_AS(larger.run(config("killed"), observer), Killed);
  larger.run(config("killed"));
  CHECK(results(out) == whole);

  if (!has_choice()) return;
  // If the library changes in between, the run continues with new choices.
  const std::string path = larger.dir / "elsewhere";
  CHECK_THROWS_AS(larger.run(config("elsewhere"), observer), Killed);
  GemmChoices choices = train::load_gemm_choices(path + "/gemm.json");
  CHECK_FALSE(choices.algorithms.empty());
  choices.made_by = "cuBLASLt 1 on a toaster";
  train::save_gemm_choices(path + "/gemm.json", choices);
  larger.run(config("elsewhere"));
  CHECK(train::load_gemm_choices(path + "/gemm.json").made_by == backend().gemm_library());

  // A damaged file ends the run before any work.
  std::filesystem::remove(path + "/e2e/final.safetensors");
  data::write_file_atomic(path + "/gemm.json", "garbage");
  CHECK_THROWS_WITH(larger.run(config("elsewhere")), Contains(path + "/gemm.json"));
}

}  // namespace bbb::tests
