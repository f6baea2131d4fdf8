// Allocation, transfers, casts, the cursor on the device, and recorded steps.
#include <catch2/catch.hpp>
#include <cstdlib>
#include <limits>

#include "tests/op_test.h"

namespace bbb::tests {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

std::vector<double> cast_values(Backend& b, const std::vector<double>& values, DType from,
                                DType to) {
  const Shape shape{static_cast<int64_t>(values.size())};
  const Guarded out(b, shape, to);
  b.cast(out.tensor(), make(b, shape, from, values));
  CHECK(out.untouched());
  return values_of(b, out.tensor());
}

}  // namespace

TEST_CASE("cast to bf16 rounds to nearest even", "[cast]") {
  const double ulp = 0x1p-7;  // of bf16 between 1 and 2
  const std::vector<double> values{1.0,
                                   1 + 0.5 * ulp,            // tie: down to even
                                   1 + 1.5 * ulp,            // tie: up to even
                                   1 + 0.5 * ulp + 0x1p-20,  // just above a tie
                                   -(1 + 1.5 * ulp),
                                   0x1.fffffep127,  // overflows
                                   0x1p-133,        // the smallest subnormal
                                   kInf,
                                   -kInf};
  const std::vector<double> want{1,    1,        1 + 2 * ulp, 1 + ulp, -(1 + 2 * ulp),
                                 kInf, 0x1p-133, kInf,        -kInf};
  CHECK(cast_values(backend(), values, DType::F32, DType::BF16) == want);
  const auto odd = cast_values(backend(), {kNan, -0.0}, DType::F32, DType::BF16);
  CHECK(std::isnan(odd[0]));
  CHECK(std::signbit(odd[1]));
}

TEST_CASE("cast both ways at any length, also unaligned", "[cast]") {
  Backend& b = backend();
  for (const int64_t n : {1, 31, 33, 4099}) {
    CAPTURE(n);
    engine::Rng rng(61);
    const auto values = normal(rng, n);
    const auto rounded = cast_values(b, values, DType::F32, DType::BF16);
    CHECK(rounded == round_bf16(values));
    CHECK(cast_values(b, rounded, DType::BF16, DType::F32) == rounded);
    CHECK(cast_values(b, rounded, DType::BF16, DType::BF16) == rounded);
    const Tensor wide = make(b, {n}, DType::F32, values), narrow = b.empty({n}, DType::BF16);
    b.cast(narrow.slice(1, n - 1), wide.slice(1, n - 1));
    CHECK(values_of(b, narrow.slice(1, n - 1)) ==
          std::vector<double>(rounded.begin() + 1, rounded.end()));
  }
  CHECK(std::isnan(cast_values(b, {kNan}, DType::BF16, DType::F32)[0]));
}

TEST_CASE("upload, copy, zero and download keep every byte", "[memory]") {
  Backend& b = backend();
  for (const int64_t n : {1, 31, 100000}) {
    std::vector<uint8_t> bytes(static_cast<size_t>(n));
    for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<uint8_t>(i * 7 + 1);
    const Tensor t = make_bytes(b, {n}, bytes);
    const Guarded other(b, {n}, DType::U8);
    b.copy(other.tensor(), t);
    CHECK(bytes_of(b, other.tensor()) == bytes);
    b.zero(other.tensor());
    CHECK(bytes_of(b, other.tensor()) == std::vector<uint8_t>(static_cast<size_t>(n)));
    CHECK(other.untouched());
  }
}

TEST_CASE("gather_rows takes the cursor's batch of rows of any type and size", "[gather_rows]") {
  Backend& b = backend();
  engine::Rng rng(67);
  const int64_t n = 12, count = 3;
  const auto order = rng.permutation(n);
  struct Rows {
    DType dtype;
    Shape row;
  };
  // Rows copied in units of 16 bytes, 4 bytes and 1 byte. The last is longer than one step of a
  // block.
  for (const Rows& rows : {Rows{DType::U8, {16}}, Rows{DType::I32, {3}}, Rows{DType::U8, {5}},
                           Rows{DType::U8, {70, 1001}}}) {
    const int64_t row_bytes = engine::numel_of(rows.row) * engine::size_bytes(rows.dtype);
    CAPTURE(row_bytes);
    Shape all = rows.row, batch = rows.row;
    all.insert(all.begin(), n);
    batch.insert(batch.begin(), count);
    std::vector<uint8_t> bytes(static_cast<size_t>(n * row_bytes));
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(rng.next());
    const Tensor src = b.empty(all, rows.dtype);
    b.upload(src, bytes.data());
    const Tensor ids = make_ids(b, {n}, order), cursor = make_ids(b, {1}, {0});
    for (int64_t step = 0; step < n / count; ++step) {
      const Guarded out(b, batch, rows.dtype);
      b.gather_rows(out.tensor(), {src, ids, cursor});
      b.advance(cursor);
      std::vector<uint8_t> want, got(static_cast<size_t>(count * row_bytes));
      for (int64_t i = 0; i < count; ++i) {
        const auto row = bytes.begin() + order[static_cast<size_t>(step * count + i)] * row_bytes;
        want.insert(want.end(), row, row + row_bytes);
      }
      b.download(got.data(), out.tensor());
      CHECK(got == want);
      CHECK(out.untouched());
    }
  }
}

TEST_CASE("log_control writes the cursor's row", "[log_control]") {
  Backend& b = backend();
  const Guarded log(b, {3, engine::kControlSize}, b.real());
  b.zero(log.tensor());
  const Tensor cursor = make_ids(b, {1}, {0});
  std::vector<double> want;
  for (int step = 0; step < 3; ++step) {
    std::vector<double> slots;
    for (int i = 0; i < engine::kControlSize; ++i) slots.push_back(10 * step + i);
    b.log_control(log.tensor(), make(b, {engine::kControlSize}, b.real(), slots), cursor);
    b.advance(cursor);
    want.insert(want.end(), slots.begin(), slots.end());
  }
  CHECK(values_of(b, log.tensor()) == want);
  CHECK(log.untouched());
}

TEST_CASE("a tensor that is too large is an error that names the bytes, and does no harm",
          "[memory]") {
  Backend& b = backend();
  CHECK_THROWS_WITH(b.empty({int64_t{1} << 48}, DType::F32), Catch::Contains("1125899906842624"));
  CHECK_THROWS_AS(b.empty({int64_t{1} << 58}, DType::F32), Error);
  const Tensor t = make(b, {3}, b.act(), {1, 2, 3});
  b.add(t, t, t);
  CHECK(values_of(b, t) == std::vector<double>{2, 4, 6});
}

TEST_CASE("the memory peak counts the tensors that were alive at once", "[memory]") {
  Backend& b = backend();
  const int64_t bytes = 5 << 20;
  b.reset_memory_peak();
  const int64_t before = b.memory_peak_bytes();
  {
    const Tensor first = b.empty({bytes}, DType::U8), second = b.empty({bytes}, DType::U8);
    CHECK(b.memory_peak_bytes() >= before + 2 * bytes);
    CHECK(b.memory_peak_bytes() <= before + 3 * bytes);
  }
  CHECK(b.memory_peak_bytes() >= before + 2 * bytes);
  b.reset_memory_peak();
  CHECK(b.memory_peak_bytes() == before);
  for (int i = 0; i < 100; ++i) b.zero(b.empty({bytes}, DType::U8));
  CHECK(b.memory_peak_bytes() <= before + 2 * bytes);
  CHECK(b.memory_available_bytes() > 0);
  CHECK(b.memory_available_bytes() <= b.memory_total_bytes());
}

TEST_CASE("a freed block is reused for the next tensor of its size", "[memory]") {
  Backend& b = backend();
  const void* address = b.empty({3 << 20}, DType::U8).raw();
  CHECK(b.empty({3 << 20}, DType::U8).raw() == address);
}

TEST_CASE("replaying a recorded step equals calling it", "[record]") {
  Backend& b = backend();
  const int64_t m = 16, d = 64;
  engine::Rng rng(71);
  const auto x = activations(rng, m * d), w = activations(rng, d * d, 0.1);
  // The step reads the cursor's row, updates the state through a temporary, and advances the
  // cursor.
  struct State {
    Tensor x, w, ids, cursor, picked;
  };
  const auto fresh = [&] {
    return State{make(b, {m, d}, b.act(), x), make(b, {d, d}, b.act(), w),
                 make_ids(b, {4}, {3, 1, 0, 2}), make_ids(b, {1}, {0}), b.zeros({1, d}, b.act())};
  };
  const auto step_on = [&](const State& s) {
    return [&b, s, m, d] {
      const Tensor y = b.empty({m, d}, b.act());
      b.gemm_nt(y, s.x, s.w, Tensor(), s.x);
      {
        const Tensor h = b.empty({m, d}, b.act());
        b.swiglu(h, y, s.x);
        b.add(y, y, h);
      }
      const Tensor unused = b.zeros({m, d}, b.act());  // reuses the block of h
      b.add(s.x, y, unused);
      b.gather_rows(s.picked, {s.x, s.ids, s.cursor});
      b.advance(s.cursor);
    };
  };

  const State direct = fresh(), replayed = fresh();
  const auto direct_step = step_on(direct);
  const auto replay = b.record(step_on(replayed));
  CHECK(values_of(b, replayed.x) == values_of(b, direct.x));  // nothing has run yet
  for (int i = 0; i < 3; ++i) {
    direct_step();
    replay->run();
    // Work between the runs must not share memory with the recorded temporaries.
    const Tensor between = b.empty({m, d}, b.act());
    b.copy(between, replayed.x);
    CHECK(values_of(b, replayed.x) == values_of(b, direct.x));
    CHECK(values_of(b, replayed.picked) == values_of(b, direct.picked));
  }
}

TEST_CASE("recordings share the memory of their temporaries, and run in any order", "[record]") {
  Backend& b = backend();
  const int64_t n = 4 << 20;
  std::vector<double> ones(static_cast<size_t>(n), 1);
  const Tensor x = make(b, {n}, b.act(), ones), total = b.zeros({n}, b.act());
  // total += 3 x (2 parts) or 4 x (4 parts). The temporaries have different sizes.
  const auto step = [&](int64_t parts) {
    return [&b, x, total, n, parts] {
      const Tensor sum = b.empty({n}, b.act());
      b.add(sum, x, x);
      for (int64_t part = 0; part < parts; ++part) {
        const Tensor piece = b.empty({n / parts}, b.act());
        b.copy(piece, x.slice(part * (n / parts), n / parts));
        const Tensor target = sum.slice(part * (n / parts), n / parts);
        b.add(target, target, piece);
      }
      if (parts == 4) b.add(sum, sum, x);
      b.add(total, total, sum);
    };
  };
  const auto two = b.record(step(2));
  const int64_t peak = b.memory_peak_bytes();
  const auto four = b.record(step(4));
  CHECK(b.memory_peak_bytes() == peak);
  for (const auto& replay : {&two, &four, &two}) (*replay)->run();
  CHECK(values_of(b, total) == std::vector<double>(static_cast<size_t>(n), 3 + 4 + 3));
}

TEST_CASE("a step that throws leaves the backend as it was", "[record]") {
  Backend& b = backend();
  const Tensor t = make(b, {3}, b.act(), {1, 2, 3});
  const auto broken = [&] {
    b.add(t, t, t);
    const Tensor temporary = b.empty({1000}, b.act());
    b.zero(temporary);
    throw Error("the step is broken");
  };
  // A GPU throws the error while it records. Where nothing is recorded, run() throws it.
  CHECK_THROWS_WITH(b.record(broken)->run(), Catch::Contains("the step is broken"));
  if (on_cuda() && std::getenv("BBB_SYNC_LAUNCHES") == nullptr)
    CHECK(values_of(b, t) == std::vector<double>{1, 2, 3});
  const auto replay = b.record([&] { b.add(t, t, t); });
  const double before = values_of(b, t)[2];
  replay->run();
  CHECK(values_of(b, t)[2] == 2 * before);
}

TEST_CASE("overlapping work sees the results of earlier work, and later work sees its results",
          "[record]") {
  Backend& b = backend();
  // Each side computes a chain of products through large temporaries and frees each at once. If one
  // side reused memory that the other still needs, the result would differ.
  const int64_t m = 256, d = 256;
  engine::Rng rng(72);
  const auto w = activations(rng, d * d, 0.06), x0 = activations(rng, m * d);
  const auto run = [&](bool recorded) {
    const Tensor x = make(b, {m, d}, b.act(), x0), weight = make(b, {d, d}, b.act(), w);
    const Tensor out = b.zeros({m, d}, b.act());
    const auto chain = [&](int length) {
      Tensor h = x;
      for (int i = 0; i < length; ++i) {
        const Tensor y = b.empty({m, d}, b.act());
        b.gemm_nt(y, h, weight, Tensor(), x);
        h = y;
      }
      return h;
    };
    const auto step = [&] {
      for (int round = 0; round < 2; ++round) {
        b.add(x, x, out);
        Tensor side, main;
        b.overlap([&] { side = chain(12); }, [&] { main = chain(9); });
        b.add(out, side, main);
      }
    };
    if (recorded) {
      const auto replay = b.record(step);
      for (int i = 0; i < 3; ++i) replay->run();
      b.synchronize();
    } else {
      for (int i = 0; i < 3; ++i) step();
    }
    return values_of(b, out);
  };
  CHECK(run(true) == run(false));
  // An error on either side leaves the backend as it was.
  const auto nothing = [] {};
  const auto broken = [] { throw Error("one side is broken"); };
  CHECK_THROWS_WITH(b.record([&] { b.overlap(broken, nothing); })->run(),
                    Catch::Contains("one side is broken"));
  CHECK_THROWS_WITH(b.record([&] { b.overlap(nothing, broken); })->run(),
                    Catch::Contains("one side is broken"));
  CHECK(run(true) == run(false));
}

TEST_CASE("a destroyed recording frees its memory", "[record]") {
  Backend& b = backend();
  b.reset_memory_peak();
  const int64_t before = b.memory_peak_bytes();
  for (int i = 0; i < 3; ++i) {
    const Tensor out = b.zeros({1000}, b.act());
    const auto replay = b.record([&b, out] {
      const Tensor t = b.zeros({1000}, b.act());
      b.add(out, out, t);
    });
    replay->run();
    b.synchronize();
  }
  b.reset_memory_peak();
  CHECK(b.memory_peak_bytes() == before);
}

}  // namespace bbb::tests
