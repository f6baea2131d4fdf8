// The benchmarks at small sizes: that they run, and counts that follow from the shapes.
#include "tools/bench.h"

#include <catch2/catch.hpp>
#include <cstdlib>

#include "data/files.h"
#include "tests/printed.h"
#include "tests/support.h"
#include "tests/tiny_model.h"

namespace bbb::tests {
namespace {

using tools::TrainBench;
using tools::TrainBenchResult;

TrainBench small_bench(bool end_to_end) {
  TrainBench bench;
  bench.model = tiny_config();
  bench.end_to_end = end_to_end;
  bench.batch = 2;
  bench.seq_len = 32;
  bench.steps = 3;
  bench.peak = {{64, 64, 64}};
  return bench;
}

TEST_CASE("bench: training steps of both phases") {
  for (const bool end_to_end : {false, true}) {
    INFO("end to end " << end_to_end);
    const TrainBench bench = small_bench(end_to_end);
    const TrainBenchResult r = tools::bench_train(backend(), bench);
    CHECK(r.step_s > 0);
    CHECK(r.quantize_s > 0);
    CHECK(r.gemm_peak > 0);
    CHECK(r.peak_bytes > 0);
    if (on_cuda() && std::getenv("BBB_SYNC_LAUNCHES") == nullptr) CHECK(r.kernels > 0);
    CHECK(r.flops == Approx(tools::training_flops_per_token(bench.model, 32, end_to_end) * 64));
  }
}

TEST_CASE("bench: the report of a training step names its widths") {
  const TempDir dir;
  const Output output = bbb({"bench", "train", "--synthetic", "smollm2-135m", "--steps", "1",
                             "--batch", "1", "--seq-len", "32", "--widths", "w2a4",
                             "--deterministic", "--json", dir / "bench.json", "--device", "cpu"});
  CHECK(output.code == 0);
  CHECK_THAT(output.out, Catch::Contains("one block, w2a4, 1 x 32 tokens a step"));
  CHECK_THAT(data::read_file(dir / "bench.json"), Catch::Contains("\"widths\": \"w2a4\""));
}

TEST_CASE("bench: a damaged file of algorithms is refused and not changed") {
  const TempDir dir;
  TrainBench bench = small_bench(false);
  bench.gemm_file = dir / "gemm.json";
  data::write_file_atomic(bench.gemm_file, "{}");
  CHECK_THROWS_WITH(tools::bench_train(backend(), bench), Catch::Contains(bench.gemm_file));
  CHECK(data::read_file(bench.gemm_file) == "{}");
}

TEST_CASE("bench: a block of Llama-2-7B takes 1.17 GFLOP a token") {
  const models::LlamaConfig model = models::synthetic_config("llama-2-7b");
  const double weights = 4.0 * 4096 * 4096 + 3.0 * 4096 * 11008;
  CHECK(tools::training_flops_per_token(model, 2048, false) ==
        Approx(6 * weights - 6.0 * 4096 * 4096 + 7.0 * 2048 * 4096));
  const double head = 6.0 * 32000 * 4096;
  CHECK(tools::training_flops_per_token(model, 2048, true) ==
        Approx(32 * (8 * weights + 9.0 * 2048 * 4096) - 6.0 * 4096 * 4096 + head));
}

TEST_CASE("bench: as many layers as the device holds, at least one") {
  TrainBench bench = small_bench(true);
  CHECK(tools::layers_that_fit(backend(), bench) == bench.model.layers);
  bench.model.hidden = 1 << 24;  // 64 GB per layer
  bench.model.layers = 1000;
  const int64_t layers = tools::layers_that_fit(backend(), bench);
  CHECK(layers >= 1);
  CHECK(layers < bench.model.layers);
}

TEST_CASE("bench: matrix-vector products, packed and dense") {
  for (const int64_t rows : {1, 3})
    for (const int64_t rotation : {int64_t{0}, int64_t{1} << 16}) {
      const tools::GemvResult r = tools::bench_gemv(backend(), {96, 64}, rows, rotation);
      const auto m = static_cast<double>(rows);
      const auto act = static_cast<double>(engine::size_bytes(backend().act()));
      const auto real = static_cast<double>(engine::size_bytes(backend().real()));
      const double weight = 96 * (64 / 4 + 2 + 1) + 4;
      CHECK(r.dense.bytes == (96 * 64 + m * (96 + 64)) * act);
      CHECK(r.packed.cold_peak == 0);
      CHECK(r.packed.bytes == weight + m * (96 + 64) * act);
      CHECK(r.quantized.bytes == weight + m * (64 + 2 * (1 + real) + 96 * act));
    }
}

TEST_CASE("bench: a packed linear of any number of rows, and a dense one") {
  const auto act = static_cast<double>(engine::size_bytes(backend().act()));
  const tools::PeakProducts peak(backend(), {{32, 32, 32}, {64, 48, 32}});
  for (const int64_t rows : {3, 20}) {
    const tools::GemvResult r =
        tools::bench_gemm(backend(), {96, 64}, rows, int64_t{1} << 16, peak);
    const double outside = static_cast<double>(rows) * (96 + 64) * act;
    for (const tools::TimedProduct* p : {&r.packed, &r.quantized, &r.dense}) {
      CHECK(p->flops == 2.0 * static_cast<double>(rows) * 96 * 64);
      CHECK((p->cold_s > 0 && p->warm_s > 0));
      CHECK((p->cold_peak > 0 && p->warm_peak > 0));
    }
    CHECK(r.packed.bytes == 96 * (64 / 4 + 2 + 1) + 4 + outside);
    CHECK(r.quantized.bytes == r.packed.bytes);
    CHECK(r.dense.bytes == 96 * 64 * act + outside);
  }
}

TEST_CASE("bench: weights of more bits, and split channels") {
  const auto act = static_cast<double>(engine::size_bytes(backend().act()));
  // 16 of 64 channels: 80 positions, padded to 96.
  quant::LinearFormat format{.n = 96, .k = 64, .order = models::evenly_split(64, 32, 0.25)};
  const tools::PeakProducts peak(backend(), {{32, 32, 32}});
  for (const int bits : {2, 3, 4, 8}) {
    CAPTURE(bits);
    format.weight.bits = bits;
    const double weight = 96 * (96 * bits / 8 + 3 + (3 * bits + 7) / 8) + 4 + 16 * 4;
    const double outside = 3 * (96 + 96) * act;
    CHECK(tools::bench_gemv(backend(), format, 3, 0).packed.bytes == weight + outside);
    const tools::GemvResult r = tools::bench_gemm(backend(), format, 3, 0, peak);
    CHECK(r.packed.bytes == weight + outside);
    CHECK(r.quantized.flops == 2.0 * 3 * 96 * 96);
    CHECK(r.dense.flops == 2.0 * 3 * 96 * 64);
  }
  CHECK(models::evenly_split(64, 32, 0) == nullptr);
}

TEST_CASE("bench: decoding and prefill of a random model") {
  const models::LlamaConfig config = tiny_config();
  const auto act = static_cast<double>(engine::size_bytes(backend().act()));
  const double weights = static_cast<double>(config.linear_parameters());
  for (const int input_bits : {16, 2})
    for (const int head_bits : {16, 8}) {
      CAPTURE(input_bits, head_bits);
      const auto model = models::Llama::synthetic(
          backend(), config, {.weight = {}, .input = {.bits = input_bits}, .head_bits = head_bits},
          1);
      const tools::DecodeResult r =
          tools::bench_decode(*model, {.batch = 2, .prompts = {5, 9}, .tokens = 12, .context = 7});
      CHECK(r.head_bytes == (head_bits == 16 ? 53 * 64 * 2 : 53 * (64 + 2 + 2) + 4));
      // Codes, scales and zero points of 64 or 96 columns take 19 or 28 bytes a row.
      CHECK(static_cast<double>(r.weight_bytes) > weights / 4);
      CHECK(static_cast<double>(r.weight_bytes) < weights / 3 + 4096);
      CHECK(static_cast<double>(r.kv_bytes) == 2 * 2 * 2 * 64 * act);
      REQUIRE(r.prefilled.size() == 2);
      CHECK(r.prefilled[1].prompt == 9);
      CHECK((r.prefilled[1].prefill_s > 0 && r.prefilled[1].step_s > 0));
      CHECK(r.prefilled[1].bytes ==
            static_cast<double>(r.weight_bytes + r.head_bytes + 2 * r.kv_bytes * (9 + 6)));
      CHECK((r.at_context.prompt == 7 && r.at_context.prefill_s == 0 && r.at_context.step_s > 0));
      CHECK(tools::bench_prefill(*model, 11) > 0);
    }
  const double block = weights / 2;
  CHECK(tools::prefill_flops(config, 10) ==
        Approx(10 * 2 * (2 * block + 2 * 10 * 4 * 64) + 2 * 53 * 64));
}

TEST_CASE("bench: the bandwidth of reading") {
  const double reading = tools::measure_read_bandwidth(backend());
  CHECK((reading > 1e8 && reading < 1e14));
}

TEST_CASE("bench: a median is the middle, and random tensors fill their shape") {
  CHECK(tools::median({}) == 0);
  CHECK(tools::median({3, 1, 2}) == 2);
  const std::vector<double> values =
      values_of(backend(), tools::random_activations(backend(), {3, 1'000'000}, 1));
  double squares = 0;
  for (double v : values) squares += v * v;
  CHECK(squares / static_cast<double>(values.size()) == Approx(1).epsilon(0.02));
  for (uint8_t byte : bytes_of(backend(), tools::random_bytes(backend(), 5000, 0x30, 16, 1)))
    REQUIRE((byte >= 0x30 && byte < 0x40));
}

}  // namespace
TEST_CASE("bench: prompts and context that nobody typed give way to few positions", "[bench]") {
  tools::DecodeBench bench{
      .batch = 1, .prompts = {512, 1024, 2048}, .tokens = 256, .context = 1024};
  tools::DecodeBench kept = bench, shrunk = bench;
  const int64_t asked = bench.positions();
  CHECK(asked == 2048 + 256);
  shrunk.shrink(asked, true, true);
  CHECK(shrunk.prompts == bench.prompts);
  CHECK(shrunk.context == bench.context);
  for (const int64_t positions : {2048, 800, 300}) {
    shrunk.shrink(positions, true, true);
    CHECK(shrunk.positions() <= positions);
    kept.shrink(positions, false, false);
  }
  CHECK(shrunk.prompts.empty());
  CHECK(kept.positions() == asked);
}

}  // namespace bbb::tests
