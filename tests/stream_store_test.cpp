// Streams: every kind of memory returns the same rows, and a plan fits or says what to change.
#include "train/stream_store.h"

#include <catch2/catch.hpp>
#include <filesystem>
#include <numeric>

#include "tests/tiny_run.h"
#include "train/block_phase.h"

namespace bbb::tests {
namespace {

using Catch::Matchers::Contains;
using train::Reader;
using train::Ring;
using train::Stream;
using train::StreamPlan;
using train::StreamRoom;
using train::StreamShape;
using train::Tier;
using train::Writer;

StreamShape shape_of(int64_t rows, int64_t row_numel, int64_t batch_rows) {
  StreamShape shape;
  shape.rows = rows;
  shape.row_numel = row_numel;
  shape.row_bytes = row_numel * engine::size_bytes(backend().act());
  shape.batch_rows = batch_rows;
  return shape;
}

std::vector<int32_t> counted(int64_t rows) {
  std::vector<int32_t> order(static_cast<size_t>(rows));
  std::iota(order.begin(), order.end(), 0);
  return order;
}

// Row r holds r, r + 1/2, r, r + 1/2 ...: exact in bf16.
std::vector<double> row_values(int64_t row, int64_t numel) {
  std::vector<double> values(static_cast<size_t>(numel));
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<double>(row) + 0.5 * (i % 2);
  return values;
}

void fill(Stream& stream, Ring& ring, const StreamShape& shape) {
  Writer writer(backend(), stream, &ring);
  for (int64_t row = 0; row < shape.rows; row += shape.batch_rows) {
    const int64_t count = std::min(shape.batch_rows, shape.rows - row);
    std::vector<double> values;
    for (int64_t i = 0; i < count; ++i)
      for (double v : row_values(row + i, shape.row_numel)) values.push_back(v);
    writer.write(row, make(backend(), {count, shape.row_numel}, backend().act(), values));
  }
  writer.finish();
}

std::vector<double> read_all(Stream& stream, Ring& ring, const StreamShape& shape,
                             const std::vector<int32_t>& order) {
  std::vector<double> values;
  Reader reader(backend(), stream, &ring, order);
  for (size_t done = 0; done < order.size(); done += static_cast<size_t>(shape.batch_rows)) {
    const std::vector<double> batch = values_of(backend(), reader.next());
    values.insert(values.end(), batch.begin(), batch.end());
  }
  return values;
}

// The tensors of a result file, except those that identify the run.
std::map<std::string, std::vector<uint8_t>> weights_of(const std::string& path) {
  const data::SafeTensors file(path);
  std::map<std::string, std::vector<uint8_t>> weights;
  for (const auto& [name, tensor] : file.tensors())
    if (name != "run" && name != "checksum")
      weights[name] = {tensor.data, tensor.data + tensor.bytes};
  REQUIRE(!weights.empty());
  return weights;
}

}  // namespace

TEST_CASE("a stream returns its rows in any order, from every kind of memory", "[streams]") {
  const TempDir dir;
  // Rows smaller than a page, of whole pages, and of pages plus a remainder.
  for (int64_t row_numel : {7, 4096, 5000})
    for (int64_t rows : {1, 4, 11}) {
      const StreamShape shape = shape_of(rows, row_numel, 3);
      for (Tier tier : {Tier::Device, Tier::Host, Tier::File}) {
        INFO("tier " << static_cast<int>(tier) << ", " << rows << " rows of " << row_numel);
        Ring ring(backend(), shape, true);
        Stream stream(backend(), shape, tier, dir.path());
        CHECK(std::filesystem::is_empty(dir.path()));  // a killed run leaves no file behind
        fill(stream, ring, shape);

        std::vector<double> expected;
        for (int64_t row = 0; row < rows; ++row)
          for (double v : row_values(row, row_numel)) expected.push_back(v);
        CHECK(read_all(stream, ring, shape, counted(rows)) == expected);

        if (tier == Tier::Device) continue;  // the step itself gathers its rows
        engine::Rng rng(3);
        const std::vector<int32_t> order = rng.permutation(rows);
        expected.clear();
        for (int32_t row : order)
          for (double v : row_values(row, row_numel)) expected.push_back(v);
        CHECK(read_all(stream, ring, shape, order) == expected);
        { Reader abandoned(backend(), stream, &ring, order); }
        CHECK(read_all(stream, ring, shape, order) == expected);
      }
    }
}

TEST_CASE("a stream is rewritten in place while it is read ahead", "[streams]") {
  const TempDir dir;
  const StreamShape shape = shape_of(23, 1500, 2);
  for (Tier tier : {Tier::Device, Tier::Host, Tier::File}) {
    INFO("tier " << static_cast<int>(tier));
    Ring in(backend(), shape, true), out(backend(), shape, true);
    Stream stream(backend(), shape, tier, dir.path());
    fill(stream, in, shape);
    for (int pass = 0; pass < 2; ++pass) {
      Reader reader(backend(), stream, &in, counted(shape.rows));
      Writer writer(backend(), stream, &out);
      for (int64_t row = 0; row < shape.rows; row += shape.batch_rows) {
        const Tensor batch = reader.next();
        const Tensor doubled = backend().empty(batch.shape(), backend().act());
        backend().add(doubled, batch, batch);
        writer.write(row, doubled);
      }
      writer.finish();
    }
    std::vector<double> expected;
    for (int64_t row = 0; row < shape.rows; ++row)
      for (double v : row_values(row, shape.row_numel)) expected.push_back(4 * v);
    CHECK(read_all(stream, in, shape, counted(shape.rows)) == expected);
  }
}

TEST_CASE("streams use the fastest memory that has room", "[streams]") {
  const StreamShape shape = shape_of(100, 4096, 4);
  const int64_t stream = shape.rows * shape.row_bytes;
  const int64_t ring = 3 * shape.batch_rows * shape.row_bytes;
  const int64_t staging = 2 * 2 * shape.batch_rows * shape.stride_bytes();
  const auto plan = [&](int64_t device, int64_t host, int64_t scratch) {
    StreamRoom room;
    room.device_bytes = device;
    room.host_bytes = host;
    room.scratch = scratch > 0 ? "/scratch" : "";
    room.scratch_bytes = scratch;
    return train::plan_streams(3, 2, shape, room);
  };
  using Tiers = std::vector<Tier>;
  const StreamPlan all = plan(3 * stream, 0, 0);
  CHECK(all.tiers == Tiers{Tier::Device, Tier::Device, Tier::Device});
  CHECK(all.rings == 0);
  CHECK(all.device_bytes == 3 * stream);

  const StreamPlan mixed = plan(stream + 2 * ring, 2 * stream, 0);
  CHECK(mixed.tiers == Tiers{Tier::Device, Tier::Host, Tier::Host});
  CHECK(mixed.device_bytes == stream + 2 * ring);
  CHECK(mixed.host_bytes == 2 * stream);

  const StreamPlan files = plan(stream + 2 * ring, stream + staging, stream);
  CHECK(files.tiers == Tiers{Tier::Device, Tier::Host, Tier::File});
  CHECK(files.host_bytes == stream + staging);
  CHECK(files.scratch_bytes == stream);

  // With one byte less, a stream moves to slower memory, or the plan is refused.
  CHECK(plan(stream + 2 * ring - 1, 2 * stream + staging, stream).tiers ==
        Tiers{Tier::Host, Tier::Host, Tier::File});
  CHECK_THROWS_WITH(plan(2 * ring - 1, 9 * stream, 0), Contains("raise --gpu-memory"));
  CHECK_THROWS_WITH(plan(stream + 2 * ring, 2 * stream - 1, 0), Contains("name a --scratch"));
  CHECK_THROWS_WITH(plan(2 * ring, staging - 1, 9 * stream), Contains("raise --host-memory"));
  CHECK_THROWS_WITH(plan(2 * ring, staging, 3 * stream - 1), Contains("/scratch has"));
}

TEST_CASE("no room for a scratch file is one error before any work", "[streams]") {
  const TempDir dir;
  StreamShape shape = shape_of(int64_t{1} << 40, 4096, 1);
  CHECK_THROWS_WITH(Stream(backend(), shape, Tier::File, dir.path()),
                    Contains("no room for a scratch file"));
  CHECK(std::filesystem::is_empty(dir.path()));
  CHECK_THROWS_WITH(Stream(backend(), shape, Tier::File, dir / "absent"),
                    Contains("no scratch file can be made"));
}

TEST_CASE("a run gives the same bytes with its streams in any kind of memory", "[train][streams]") {
  const Fixture fixture;
  std::filesystem::create_directory(fixture.dir / "scratch");
  const models::LlamaConfig& model = fixture.source->config();
  for (const char* input : {"same", "higher", "mix"}) {
    train::TrainConfig config = fixture.both_phases(input);
    set_option(config, "input-stream", input);
    fixture.run(config);

    // The budgets are computed from the plan: no stream fits on the device; all, one or none fit in
    // host memory.
    config.memory.scratch = fixture.dir / "scratch";
    const train::TrainConfig resolved = train::resolve(config, model, backend().device());
    const train::BlockMemory resident = train::plan_block_memory(backend(), model, resolved);
    const int64_t count = static_cast<int64_t>(resident.streams.tiers.size());
    const StreamShape shape = shape_of(fixture.windows.count, 32 * model.d_model, config.batch);
    const int64_t stream = shape.rows * shape.row_bytes;
    const int rings = std::string(input) == "mix" ? 3 : 2;
    config.memory.device_bytes = train::allocated_bytes(
        backend(), resident.device_bytes - count * stream +
                       rings * (1 + Ring::kAhead) * shape.batch_rows * shape.row_bytes);
    const int64_t staging = rings * Ring::kAhead * shape.batch_rows * shape.stride_bytes();
    const auto tiers = [&](const train::TrainConfig& c) {
      return train::plan_block_memory(backend(), model,
                                      train::resolve(c, model, backend().device()))
          .streams.tiers;
    };
    train::TrainConfig host = config, mixed = config, files = config;
    host.memory.host_bytes = count * stream;
    mixed.memory.host_bytes = stream + staging;
    files.memory.host_bytes = staging;
    REQUIRE(tiers(host) == std::vector<Tier>(static_cast<size_t>(count), Tier::Host));
    REQUIRE(tiers(files) == std::vector<Tier>(static_cast<size_t>(count), Tier::File));
    REQUIRE(tiers(mixed).front() == Tier::Host);
    REQUIRE(tiers(mixed).back() == Tier::File);
    int run = 0;
    for (train::TrainConfig* other : {&host, &mixed, &files}) {
      other->out = fixture.dir / (std::string(input) + std::to_string(run++));
      // The budget is for the block phase; the end-to-end phase would need more.
      other->e2e_steps = 0;
      fixture.run(*other);
      for (const char* stage :
           {"/blocks/block_000_stage_1.safetensors", "/blocks/block_001_stage_1.safetensors"})
        CHECK(weights_of(other->out + stage) == weights_of(config.out + stage));
    }

    // A run that starts on the device, is killed inside an epoch of the second block, and resumes
    // with files.
    train::TrainConfig resumed = files;
    resumed.out = fixture.dir / (std::string(input) + "_resumed");
    resumed.memory = {};
    train::Observer observer;
    observer.after_block_step = [](int64_t block, int64_t stage, int64_t step) {
      if (block == 1 && stage == 1 && step == 7) throw std::runtime_error("killed");
    };
    CHECK_THROWS(fixture.run(resumed, observer));
    REQUIRE(std::filesystem::exists(resumed.out + "/blocks/state.safetensors"));
    resumed.memory = files.memory;
    fixture.run(resumed);
    for (const auto& [name, bytes] : results(files.out)) {
      INFO("streams " << input << ", " << name);
      CHECK(results(resumed.out).at(name) == bytes);
    }
    CHECK(std::filesystem::is_empty(fixture.dir / "scratch"));
  }
}

TEST_CASE("a run that does not fit is refused before anything is written", "[train][streams]") {
  const Fixture fixture;
  train::TrainConfig config = fixture.both_phases("run");
  config.memory.device_bytes = 1000;
  CHECK_THROWS_WITH(fixture.run(config), Contains("raise --gpu-memory"));
  config.memory = {};
  config.memory.scratch = fixture.dir / "absent";
  CHECK_THROWS_WITH(fixture.run(config), Contains("is no directory"));
  CHECK_FALSE(std::filesystem::exists(config.out));
}

}  // namespace bbb::tests
