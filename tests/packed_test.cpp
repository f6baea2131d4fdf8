// Products with packed weights. unpack is exact. packed_gemv equals the product with the unpacked
// weight, up to the order of FP32 additions and to rows of x in 16-bit integers: for 2-bit weights
// in tiles on a GPU and up to four rows, for all on the CPU (its RMS error: host_panels_test.cpp).
// quantized_gemv sums each group exactly.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <deque>
#include <tuple>
#include <vector>

#include "quant/packed_tiles.h"
#include "tests/operand_formula.h"
#include "tests/packed_matrix.h"

namespace bbb::tests {
namespace {

using engine::PackedWeight;
using engine::WeightGrid;
using Values = std::vector<double>;

TEST_CASE("unpacked weights are exact", "[packed]") {
  engine::Rng rng(31);
  for (const int bits : {2, 3, 4, 8})
    for (const int group : {32, 64, 128})
      for (const int64_t n : {1, 7, 33})
        for (const int64_t k : {128, 640}) {
          CAPTURE(bits, group, n, k);
          const PackedMatrix matrix(rng, n, k, {bits, group});
          Guarded wq(backend(), {n, k}, backend().act());
          backend().unpack(wq.tensor(), matrix.on(backend()));
          const bool rounds = backend().act() == DType::BF16 && bits == 8;
          CHECK(values_of(backend(), wq.tensor()) ==
                (rounds ? round_bf16(matrix.levels) : matrix.levels));
          CHECK(wq.untouched());
        }
}

// The most rows of products with weights of this grid and K columns.
int64_t most_rows(const WeightGrid& grid, int64_t k) {
  return backend().max_packed_rows({.n = 1, .k = k, .weight = grid});
}
// Whether bf16 tensor cores multiply n x k of them by so many rows.
bool on_tensor_cores(const WeightGrid& grid, int64_t k, int64_t m, int64_t n = 1) {
  const int64_t least = grid.bits == 3 || grid.bits == 4 ? 2 : 5;
  const bool large = grid.bits != 2 && n * k >= int64_t{1} << (grid.bits == 3 ? 25 : 24);
  return on_cuda() && most_rows(grid, k) > Backend::kMaxPackedRows && (m >= least || large);
}
// Whether weights of this grid are in tiles.
bool in_tiles(const WeightGrid& grid) {
  return quant::has_tiles(grid) && most_rows(grid, 128) == Backend::kAnyRows;
}

// How far packed_gemv may move a value of x, relative to the largest one of its group of
// positions: half a unit of 16-bit integers. On the CPU the unit is that value / 32639. On a GPU
// only weights in tiles meet integers, of sub-groups of 32, with up to four rows; the unit is a
// power of two, at most 2^-14 / (1 - 2^-7) of that value.
double half_unit(const WeightGrid& grid, int64_t m) {
  if (!on_cuda()) return 1.01 / (2 * 32639);
  return in_tiles(grid) && m <= 4 ? 0x1.03p-15 : 0.0;
}

// How many roundings of a partial sum a term passes through at most, in epsilons of FP32. A lane
// adds at most K / 32 of the K products, and 16 more sums join lanes, warps and the addend. Each
// rounding is by half an epsilon. bf16 tensor cores add 16 products at a time: K / 16 roundings,
// each by up to an epsilon.
double roundings(const WeightGrid& grid, int64_t k, int64_t m, int64_t n = 1) {
  return static_cast<double>(k) / (on_tensor_cores(grid, 128, m, n * k / 128) ? 16 : 32) + 16;
}

// Whether m rows are more than products with weights of this grid and K columns take on this
// device. They then throw.
bool refused(int64_t m, const WeightGrid& grid = {2, 32}, int64_t k = 128) {
  Backend& b = backend();
  if (m <= most_rows(grid, k)) return false;
  engine::Rng rng(51);
  const Tensor x = b.zeros({m, k}, b.act()), y = b.empty({m, 1}, b.act());
  const PackedWeight weight = PackedMatrix(rng, 1, k, grid).on(b);
  CHECK_THROWS_AS(b.packed_gemv(y, x, weight, Tensor()), Error);
  return true;
}

// y = S x W^T + addend in F64, the largest sum of the terms' magnitudes, and for each output the
// bound on what half units cost.
struct Product {
  Values y, split_error;
  double magnitude = 0;
};

Product multiply(const PackedMatrix& matrix, const Values& x, const Values& addend, int64_t m) {
  Product out;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < matrix.n; ++j) {
      double sum = 0, size = 0, split_error = 0;
      const int64_t width = on_cuda() ? 32 : matrix.grid.group;
      for (int64_t begin = 0; begin < matrix.k; begin += width) {
        double largest = 0, levels = 0;
        for (int64_t k = begin; k < begin + width; ++k) {
          const double v = x[static_cast<size_t>(i * matrix.k + k)];
          const double level = matrix.levels[static_cast<size_t>(j * matrix.k + k)];
          sum += v * level;
          size += std::abs(v * level);
          largest = std::max(largest, std::abs(v));
          levels += std::abs(level);
        }
        split_error += matrix.master_scale * half_unit(matrix.grid, m) * largest * levels;
      }
      out.split_error.push_back(split_error);
      out.y.push_back(matrix.master_scale * sum +
                      (addend.empty() ? 0.0 : addend[static_cast<size_t>(i * matrix.n + j)]));
      out.magnitude = std::max(out.magnitude, matrix.master_scale * size);
    }
  return out;
}

void check_product(const Values& got, const PackedMatrix& matrix, const Product& want, int64_t m,
                   DType y_dtype) {
  // Products are exact in FP32 for b <= 4 and rounded once for b = 8. A partial sum is at most the
  // sum of the terms' magnitudes. The output is rounded once more.
  const double sum_error =
      roundings(matrix.grid, matrix.k, m, matrix.n) * epsilon_of(DType::F32) * want.magnitude;
  for (size_t i = 0; i < got.size(); ++i)
    REQUIRE(std::abs(got[i] - want.y[i]) <=
            sum_error + want.split_error[i] + epsilon_of(y_dtype) * std::abs(want.y[i]));
}

// On tensor cores, levels of 8 bits are rounded to bf16, as unpack rounds them.
void round_levels(PackedMatrix& matrix, int64_t m) {
  if (matrix.grid.bits == 8 && on_tensor_cores(matrix.grid, matrix.k, m, matrix.n))
    matrix.levels = round_bf16(matrix.levels);
}

void check_gemv(engine::Rng& rng, int64_t n, int64_t k, WeightGrid spec, int64_t m,
                bool with_addend, DType y_dtype) {
  CAPTURE(n, k, spec.bits, spec.group, m, with_addend);
  Backend& b = backend();
  PackedMatrix matrix(rng, n, k, spec);
  round_levels(matrix, m);
  const Values x = activations(rng, m * k);
  const Values addend = with_addend ? activations(rng, m * n, 4.0) : Values();
  Guarded y(b, {m, n}, y_dtype);
  b.packed_gemv(y.tensor(), make(b, {m, k}, b.act(), x), matrix.on(b),
                with_addend ? make(b, {m, n}, b.act(), addend) : Tensor());
  check_product(values_of(b, y.tensor()), matrix, multiply(matrix, x, addend, m), m, y_dtype);
  CHECK(y.untouched());
}

TEST_CASE("packed_gemv equals unpacking and then multiplying", "[packed]") {
  engine::Rng rng(32);
  for (const int bits : {2, 3, 4, 8})
    for (const int64_t m : {1, 2, 3, 4, 5, 8})
      for (const auto& [n, k] : std::vector<std::pair<int64_t, int64_t>>{
               {1, 32}, {5, 64}, {33, 576}, {192, 1536}, {65, 4096}})
        check_gemv(rng, n, k, {bits, 32}, m, m != 3, backend().act());
}

TEST_CASE("packed_gemv with other group sizes and FP32 output", "[packed]") {
  engine::Rng rng(33);
  for (const int bits : {2, 3, 4, 8})
    for (const int group : {64, 128}) {
      check_gemv(rng, 31, 640, {bits, group}, 1, true, backend().act());
      check_gemv(rng, 31, 640, {bits, group}, 8, false, backend().real());
    }
}

TEST_CASE("packed_gemv of matrices with many rows or a large K", "[packed]") {
  engine::Rng rng(34);
  // First, enough rows that a warp takes several and a block several warps' worth, with a tail.
  // Then K larger than the part of x that fits in shared memory at once, with a tail.
  for (const int bits : {2, 4}) {
    check_gemv(rng, 4231, 64, {bits, 32}, 1, true, backend().act());
    check_gemv(rng, 1059, 96, {bits, 32}, 3, true, backend().act());
    check_gemv(rng, 1059, 96, {bits, 32}, 8, true, backend().act());
    check_gemv(rng, 3, 16384 + 32, {bits, 32}, 1, false, backend().act());
    check_gemv(rng, 3, 4096 + 96, {bits, 32}, 4, false, backend().act());
    check_gemv(rng, 3, 4096 + 32, {bits, 32}, 7, false, backend().act());
  }
}

TEST_CASE("packed_gemv of many rows with 2-bit weights", "[packed][tiles][rows]") {
  engine::Rng rng(49);
  Backend& b = backend();
  // Every width of token tiles, full and with a tail; one and several tiles. Rows that leave tiles,
  // warpgroups and shares incomplete. K that ends inside a panel of x; rings that wrap.
  for (const int64_t m : {5, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 300}) {
    if (refused(m)) continue;
    for (const auto& [n, k] : std::vector<std::pair<int64_t, int64_t>>{{1, 32},
                                                                       {15, 96},
                                                                       {64, 128},
                                                                       {65, 160},
                                                                       {300, 576},
                                                                       {130, 2304},
                                                                       {33, 4224},
                                                                       {2300, 224}}) {
      if (n * k * m > 12'000'000) continue;
      check_gemv(rng, n, k, {2, 32}, m, m % 2 == 0, n % 2 == 0 ? b.real() : b.act());
    }
    for (const int group : {64, 128}) check_gemv(rng, 31, 640, {2, group}, m, true, b.act());
  }
}

TEST_CASE("packed_gemv of many rows with 3, 4 and 8 bits", "[packed][rows]") {
  engine::Rng rng(58);
  Backend& b = backend();
  for (const int bits : {3, 4, 8}) {
    for (const int64_t m : {5, 8, 9, 16, 17, 32, 33, 64, 65, 129, 300})
      for (const auto& [n, k] : std::vector<std::pair<int64_t, int64_t>>{{1, 128},
                                                                         {15, 96},
                                                                         {64, 128},
                                                                         {65, 160},
                                                                         {300, 640},
                                                                         {130, 2304},
                                                                         {33, 4224},
                                                                         {2300, 256}}) {
        if (n * k * m > 12'000'000 || refused(m, {bits, 32}, k)) continue;
        check_gemv(rng, n, k, {bits, 32}, m, m % 2 == 0, n % 2 == 0 ? b.real() : b.act());
      }
    for (const int group : {64, 128})
      for (const int64_t m : {5, 20, 70})
        if (!refused(m, {bits, group}, 640))
          check_gemv(rng, 31, 640, {bits, group}, m, true, b.act());
  }
}

// Only a GPU has another kernel for them.
TEST_CASE("packed_gemv of one row with large matrices of 3, 4 and 8 bits", "[packed][large]") {
  if (!needs_cuda()) return;
  engine::Rng rng(59);
  for (const auto& [bits, n] : {std::pair<int, int64_t>{3, 4099}, {4, 2100}, {8, 2049}})
    check_gemv(rng, n, 8192, {bits, 32}, 1, bits == 4, backend().act());
}

TEST_CASE("packed_gemv of many rows repeats bit for bit and propagates NaN", "[packed][rows]") {
  engine::Rng rng(50);
  Backend& b = backend();
  constexpr int64_t kK = 1536;
  // The larger matrix gives a warp several row tiles.
  std::vector<std::tuple<int, int64_t, int64_t>> cases = {
      {2, 150, 5},  {2, 150, 16},  {2, 150, 40}, {2, 150, 200},
      {2, 4300, 5}, {2, 4300, 16}, {2, 4300, 32}};
  for (const int bits : {3, 4, 8})
    for (const int64_t m : {5, 16, 40, 200}) cases.emplace_back(bits, 150, m);
  for (const auto& [bits, n, m] : cases) {
    if (refused(m, {bits, 32}, kK)) continue;
    CAPTURE(bits, n, m);
    PackedMatrix matrix(rng, n, kK, {bits, 32});
    Values x = activations(rng, m * kK);
    const auto run = [&] {
      const Tensor y = b.empty({m, n}, b.act());
      b.packed_gemv(y, make(b, {m, kK}, b.act(), x), matrix.on(b), Tensor());
      return values_of(b, y);
    };
    CHECK(run() == run());
    for (const int64_t bad : {5, 139}) matrix.scales[bad * 48 + 7] = quant::kE4m3Nan;
    x[3 * kK + 700] = std::nan("");
    const Values got = run();
    for (int64_t i = 0; i < m * n; ++i)
      CHECK(std::isnan(got[static_cast<size_t>(i)]) == (i % n == 5 || i % n == 139 || i / n == 3));
  }
}

// Of the tests of delayed threads: repetitions, and products in a row.
#ifdef BBB_STRESS
constexpr int kRuns = 20;
#else
constexpr int kRuns = 3;
#endif
constexpr int kInARow = 8;

// Products in a row overlap: each starts while the one in front still runs. With -DBBB_STRESS=ON,
// threads also pause at random points. Copies, warps and clusters that are in order only by luck
// then go out of order.
TEST_CASE("products give the same bytes whichever threads are delayed", "[packed][rows][stress]") {
  if (!needs_cuda()) return;
  engine::Rng rng(57);
  Backend& b = backend();
  // Of each range of rows one small matrix, and one whose K wraps all rings.
  std::vector<std::tuple<int, int64_t, int64_t>> cases;  // bits; the most rows and columns
  for (const int64_t most_k : {1024, 15000}) {
    for (const int64_t rows : {1, 4, 16, 32, 64, 128}) cases.emplace_back(2, rows, most_k);
    for (const int bits : {3, 4, 8})
      for (const int64_t rows : {18, 64, 128}) cases.emplace_back(bits, rows, most_k);
  }
  for (const auto& [bits, rows, most_k] : cases) {
    const int64_t m = rows - rng.below((rows + 1) / 2);
    const int64_t unit = bits == 3 ? 128 : 32;
    const int64_t k = unit * (most_k / unit - rng.below(most_k / (2 * unit)));
    const int64_t n = 1 + rng.below(std::min<int64_t>(3000, 30'000'000 / (m * k)));
    if (refused(m, {bits, 32}, k)) continue;
    CAPTURE(bits, n, k, m);
    PackedMatrix matrix(rng, n, k, {bits, 32});
    round_levels(matrix, m);
    const Values values = activations(rng, m * k);
    const PackedWeight weight = matrix.on(b);
    const Tensor x = make(b, {m, k}, b.act(), values);
    Values first;
    for (int run = 0; run < kRuns; ++run) {
      std::deque<Guarded> y;
      for (int i = 0; i < kInARow; ++i) y.emplace_back(b, Shape{m, n}, b.real());
      for (const Guarded& out : y) b.packed_gemv(out.tensor(), x, weight, Tensor());
      for (const Guarded& out : y) {
        const Values got = values_of(b, out.tensor());
        if (first.empty()) {
          first = got;
          check_product(first, matrix, multiply(matrix, values, {}, m), m, b.real());
        }
        REQUIRE(got == first);
        REQUIRE(out.untouched());
      }
    }
  }
}

TEST_CASE("packed_gemv of 2-bit weights is as exact as a product in bf16", "[packed][tiles]") {
  engine::Rng rng(41);
  Backend& b = backend();
  for (const auto& [n, k] : std::vector<std::pair<int64_t, int64_t>>{
           {300, 32}, {300, 96}, {310, 576}, {100, 1536}, {133, 4096}, {40, 14336}})
    for (const double outlier : {1.0, 30.0}) {
      if (outlier > 1 && k < 1000) continue;  // few terms: chance decides
      CAPTURE(n, k, outlier);
      const PackedMatrix matrix(rng, n, k, {2, 32});
      Values x = activations(rng, k);
      for (int64_t i = 0; i < k; i += 41) x[static_cast<size_t>(i)] *= outlier;
      x = b.act() == DType::BF16 ? round_bf16(std::move(x)) : x;
      const PackedWeight weight = matrix.on(b);
      const Tensor rows = make(b, {1, k}, b.act(), x);
      const Product want = multiply(matrix, x, {}, 1);
      const Guarded exact(b, {1, n}, b.real()), rounded(b, {1, n}, b.act());
      b.packed_gemv(exact.tensor(), rows, weight, Tensor());
      CHECK(relative_error(values_of(b, exact.tensor()), want.y) <= 1e-4);
      if (b.act() != DType::BF16) continue;
      b.packed_gemv(rounded.tensor(), rows, weight, Tensor());
      const Tensor levels = b.empty({n, k}, b.act()), y = b.empty({1, n}, b.act());
      b.unpack(levels, weight);
      b.gemm_nt(y, rows, levels, weight[quant::StoredPart::MasterScale], Tensor());
      // One in 50 for the rounding of other sums.
      const double dense_error = relative_error(values_of(b, y), want.y);
      CHECK(relative_error(values_of(b, rounded.tensor()), want.y) <=
            1.02 * dense_error + 16 * epsilon_of(DType::F32));
      CHECK((exact.untouched() && rounded.untouched()));
    }
}

// Products of rows that are made on the way. Most kernels round them to act: each term is then off
// by up to half an epsilon. `sizes`, if any: what the errors of the rows' values are relative to.
void check_made_rows(const Values& got, const PackedMatrix& matrix, const Values& rows,
                     const Values& addend, int64_t m, DType y_dtype, const Values& sizes = {}) {
  Product want = multiply(matrix, rows, addend, m);
  if (!sizes.empty()) want.magnitude = multiply(matrix, sizes, {}, m).magnitude;
  // The factor of a row is a sum of K squares, and a few more roundings.
  const double terms =
      2 * roundings(matrix.grid, matrix.k, m) * epsilon_of(DType::F32) + act_epsilon();
  for (size_t i = 0; i < got.size(); ++i)
    REQUIRE(std::abs(got[i] - want.y[i]) <= terms * want.magnitude + want.split_error[i] +
                                                epsilon_of(y_dtype) * std::abs(want.y[i]));
}

// Rows that products make on the way: inputs, and by the formulas in F64 what is multiplied.
struct MadeRows {
  static constexpr double kEps = 1e-5;
  Values x, up, w, normed, gated;
  Tensor in, gate_up, norm;  // x, up and w on the device

  MadeRows(engine::Rng& rng, Backend& b, int64_t m, int64_t k)
      : x(activations(rng, m * k)), up(activations(rng, m * k)), w(normal(rng, k, 1.0)) {
    // A few features are large, as in real models; so is the middle of a row, where a cluster
    // divides it.
    for (int64_t i = 0; i < m * k; i += 97) x[static_cast<size_t>(i)] *= 32;
    for (int64_t i = 0; i < m * k; ++i)
      if (i % k / 32 == k / 64) x[static_cast<size_t>(i)] *= 16;
    for (double& value : w) value = static_cast<float>(value);
    in = make(b, {m, k}, b.act(), x);
    gate_up = make(b, {m, k}, b.act(), up);
    norm = make(b, {k}, b.real(), w);
    for (int64_t i = 0; i < m; ++i) {
      double squares = 0;
      for (int64_t j = 0; j < k; ++j) squares += std::pow(x[static_cast<size_t>(i * k + j)], 2);
      const double r = 1 / std::sqrt(squares / static_cast<double>(k) + kEps);
      for (int64_t j = 0; j < k; ++j) {
        const auto at = static_cast<size_t>(i * k + j);
        normed.push_back(x[at] * r * w[static_cast<size_t>(j)]);
        gated.push_back(x[at] / (1 + std::exp(-x[at])) * up[at]);
      }
    }
  }
};

TEST_CASE("packed_gemv_normed and packed_gemv_gated make their rows", "[packed][made_rows]") {
  engine::Rng rng(57);
  Backend& b = backend();
  for (const WeightGrid grid : {WeightGrid{2, 32}, WeightGrid{2, 128}, WeightGrid{4, 32}})
    for (int64_t m = 1; m <= Backend::kMaxPackedRows; ++m)
      for (const auto& [n, k] : std::vector<std::pair<int64_t, int64_t>>{
               {1, 128}, {33, 640}, {192, 1536}, {65, 4096}, {2200, 256}, {200, 4224}}) {
        if (m > 2 && n * k > 200'000) continue;
        CAPTURE(grid.bits, grid.group, m, n, k);
        const PackedMatrix first(rng, n, k, grid), second(rng, 17, k, grid);
        const PackedWeight weight = first.on(b), other = second.on(b);
        const MadeRows rows(rng, b, m, k);
        const Values addend = activations(rng, m * n, 4.0);
        const Tensor given = make(b, {m, n}, b.act(), addend);
        const Guarded y(b, {m, n}, b.act()), y2(b, {m, 17}, b.real());
        const engine::PackedProducts products = {{y.tensor(), weight, given},
                                                 {y2.tensor(), other, {}}};
        const auto check = [&](const Values& want) {
          check_made_rows(values_of(b, y.tensor()), first, want, addend, m, b.act());
          check_made_rows(values_of(b, y2.tensor()), second, want, {}, m, b.real());
        };
        b.packed_gemv_normed(products, rows.in, rows.norm, MadeRows::kEps), check(rows.normed);
        b.packed_gemv_gated(products, rows.in, rows.gate_up), check(rows.gated);
        CHECK((y.untouched() && y2.untouched()));
      }
}

// Weights (n, k) of a grid, and numbers of rows.
struct OperandCase {
  WeightGrid grid;
  int64_t k, n;
  std::vector<int64_t> rows;
};

TEST_CASE("products of few rows make the operand of their rows", "[packed][made_operands]") {
  engine::Rng rng(59);
  Backend& b = backend();
  // On a GPU: weights in tiles, and as in the file; K' within a slice of positions; blocks alone
  // and in clusters; rows of several pieces a thread; K that is no multiple of 8; two rounds of
  // slices; a row that is not staged.
  const std::vector<OperandCase> cases = {
      {{2, 32}, 96, 17, {1, 2, 8}}, {{2, 32}, 576, 33, {1, 2, 3, 4, 5}},
      {{2, 64}, 576, 65, {1, 3}},   {{2, 128}, 576, 65, {1, 4}},
      {{2, 32}, 1536, 576, {1}},    {{2, 128}, 1536, 40, {1}},
      {{2, 64}, 4096, 200, {1, 2}}, {{2, 32}, 4096, 65, {1}},
      {{2, 32}, 100, 20, {1, 2}},   {{2, 32}, 14336, 65, {1}},
      {{2, 64}, 256, 2200, {1}},    {{2, 32}, 32800, 17, {1}},
      {{2, 32}, 8192, 17, {1, 2}},  {{4, 32}, 576, 33, {1, 3}},
      {{8, 64}, 320, 20, {1}}};
  for (const OperandCase& c : cases)
    for (const Order order : kOrders)
      for (const bool hadamard : {false, true})
        for (const auto side : {quant::SplitSide::Weight, quant::SplitSide::Activation}) {
          if (side == quant::SplitSide::Activation && order != Order::Split && order != Order::Both)
            continue;
          const quant::LinearFormat format =
              site(rng, c.k, c.grid.group, {.hadamard = hadamard}, order, side);
          const engine::OperandSpec spec = engine::upload_operand(b, format);
          const int64_t k = c.k, stored_k = format.stored_k(), n = c.n;
          const PackedMatrix first(rng, n, stored_k, c.grid), second(rng, 17, stored_k, c.grid),
              third(rng, 5, stored_k, c.grid);
          const PackedWeight weight = first.on(b), other = second.on(b), last = third.on(b);
          for (const int64_t m : c.rows) {
            CAPTURE(c.grid.bits, c.grid.group, m, n, k, static_cast<int>(order), hadamard,
                    side == quant::SplitSide::Activation);
            const MadeRows made(rng, b, m, k);
            const Values addend = activations(rng, m * n, 4.0);
            const Tensor given = make(b, {m, n}, b.act(), addend);
            const Guarded y(b, {m, n}, b.act()), y2(b, {m, 17}, b.real()), y3(b, {m, 5}, b.real());
            const engine::PackedProducts products = {
                {y.tensor(), weight, given}, {y2.tensor(), other, {}}, {y3.tensor(), last, {}}};
            const auto check = [&](const Values& rows) {
              const Values want = gather_by_formula(format, rows, m),
                           sizes = gather_by_formula(format, rows, m, true);
              check_made_rows(values_of(b, y.tensor()), first, want, addend, m, b.act(), sizes);
              check_made_rows(values_of(b, y2.tensor()), second, want, {}, m, b.real(), sizes);
              check_made_rows(values_of(b, y3.tensor()), third, want, {}, m, b.real(), sizes);
              for (const Guarded* out : {&y, &y2, &y3}) {
                CHECK(out->untouched());
                b.zero(out->tensor());
              }
            };
            b.packed_gemv(products, made.in, &spec), check(made.x);
            b.packed_gemv_normed(products, made.in, made.norm, MadeRows::kEps, &spec);
            check(made.normed);
            b.packed_gemv_gated(products, made.in, made.gate_up, &spec), check(made.gated);
          }
        }
}

// What an op of operands makes of m rows, (codes - zeros) scales.
template <typename Make>
Values quantized_values(Backend& b, const engine::OperandSpec& spec, int64_t m, const Make& make) {
  const int64_t k = spec.view.stored_k, groups = k / spec.view.group;
  engine::OperandRows rows;
  rows.codes = b.empty({m, k}, DType::U8);
  rows.zeros = b.empty({m, groups}, DType::U8);
  rows.scales = b.empty({m, groups}, b.real());
  make(rows);
  const Bytes codes = bytes_of(b, rows.codes), zeros = bytes_of(b, rows.zeros);
  const Values scales = values_of(b, rows.scales);
  Values values;
  for (size_t i = 0; i < codes.size(); ++i) {
    const size_t group = i / static_cast<size_t>(spec.view.group);
    values.push_back((double(codes[i]) - zeros[group]) * scales[group]);
  }
  return values;
}

TEST_CASE("products of few rows quantize their rows", "[packed][made_operands][quantized_rows]") {
  engine::Rng rng(61);
  Backend& b = backend();
  // As above; an odd number of slices in a cluster; a row that does not fit beside a ring of
  // weights.
  const std::vector<OperandCase> cases = {
      {{2, 32}, 96, 17, {1, 2, 8}}, {{2, 32}, 576, 33, {1, 3}}, {{2, 64}, 576, 65, {1, 4}},
      {{2, 128}, 640, 65, {1}},     {{2, 32}, 1536, 576, {1}},  {{2, 32}, 4096, 2200, {1}},
      {{2, 64}, 4096, 65, {1}},     {{2, 32}, 4224, 65, {1}},   {{2, 32}, 100, 20, {1, 2}},
      {{2, 32}, 7168, 65, {1}},     {{2, 32}, 14336, 65, {1}},  {{2, 32}, 28672, 17, {1}},
      {{4, 32}, 576, 33, {1, 3}},   {{8, 64}, 320, 20, {1}}};
  int turn = 0;
  for (const OperandCase& c : cases)
    for (const Order order : kOrders)
      for (const bool hadamard : {false, true})
        for (const auto range : {quant::RangeRule::MinMax, quant::RangeRule::Search}) {
          constexpr int kBits[] = {2, 4, 2, 3, 8};
          const int bits = kBits[turn++ % 5];
          const quant::LinearFormat format =
              site(rng, c.k, c.grid.group, {.bits = bits, .range = range, .hadamard = hadamard},
                   order, turn % 3 == 0 ? quant::SplitSide::Activation : quant::SplitSide::Weight);
          const engine::OperandSpec spec = engine::upload_operand(b, format);
          const int64_t k = c.k, n = c.n;
          const PackedMatrix first(rng, n, format.stored_k(), c.grid),
              second(rng, 17, format.stored_k(), c.grid), third(rng, 5, format.stored_k(), c.grid);
          const PackedWeight weight = first.on(b), other = second.on(b), last = third.on(b);
          for (const int64_t m : c.rows) {
            CAPTURE(c.grid.bits, c.grid.group, m, n, k, static_cast<int>(order), hadamard, bits,
                    range == quant::RangeRule::Search);
            const MadeRows made(rng, b, m, k);
            const Values addend = turn % 2 == 0 ? activations(rng, m * n, 4.0) : Values();
            const Tensor given = addend.empty() ? Tensor() : make(b, {m, n}, b.act(), addend);
            const Guarded y(b, {m, n}, b.act()), y2(b, {m, 17}, b.real()), y3(b, {m, 5}, b.real()),
                y4(b, {m, 17}, b.act());  // of another launch
            const engine::PackedProducts products = {{y.tensor(), weight, given},
                                                     {y2.tensor(), other, {}},
                                                     {y3.tensor(), last, {}},
                                                     {y4.tensor(), other, {}}};
            const auto check = [&](const Guarded& out, const PackedMatrix& matrix,
                                   const Values& rows, const Values& added, DType dtype) {
              const Product want = multiply(matrix, rows, added, m);
              const double sums = roundings(matrix.grid, matrix.k, m) * epsilon_of(DType::F32);
              const Values got = values_of(b, out.tensor());
              for (size_t i = 0; i < got.size(); ++i)
                REQUIRE(std::abs(got[i] - want.y[i]) <=
                        sums * want.magnitude + epsilon_of(dtype) * std::abs(want.y[i]));
              CHECK(out.untouched());
              b.zero(out.tensor());
            };
            const auto check_all = [&](const auto& make_operand) {
              const Values rows = quantized_values(b, spec, m, make_operand);
              check(y, first, rows, addend, b.act());
              check(y2, second, rows, {}, b.real());
              check(y3, third, rows, {}, b.real());
              check(y4, second, rows, {}, b.act());
            };
            b.packed_gemv(products, made.in, &spec);
            check_all([&](const engine::OperandRows& out) { b.operand(out, made.in, spec); });
            b.packed_gemv_normed(products, made.in, made.norm, MadeRows::kEps, &spec);
            check_all([&](const engine::OperandRows& out) {
              b.rms_norm_operand(out, b.empty({m}, b.real()), made.in, made.norm, MadeRows::kEps,
                                 spec);
            });
            b.packed_gemv_gated(products, made.in, made.gate_up, &spec);
            check_all([&](const engine::OperandRows& out) {
              b.swiglu_operand(out, made.in, made.gate_up, spec);
            });
          }
        }
}

TEST_CASE("products that quantize give the same bytes whichever threads are delayed",
          "[packed][quantized_rows][stress]") {
  if (!needs_cuda()) return;
  engine::Rng rng(62);
  Backend& b = backend();
  // One block and clusters, rings that wrap, and an odd number of slices.
  for (const auto& [n, k] : std::vector<std::pair<int64_t, int64_t>>{
           {3000, 576}, {300, 4224}, {70, 14336}, {9000, 4096}})
    for (const Order order : {Order::None, Order::Both}) {
      CAPTURE(n, k, static_cast<int>(order));
      const quant::LinearFormat format =
          site(rng, k, 32, {.bits = 2, .range = quant::RangeRule::Search, .hadamard = true}, order);
      const engine::OperandSpec spec = engine::upload_operand(b, format);
      const PackedWeight weight = PackedMatrix(rng, n, format.stored_k(), {2, 32}).on(b);
      const MadeRows made(rng, b, 1, k);
      std::vector<Values> first;
      for (int run = 0; run < kRuns; ++run) {
        std::deque<Guarded> y;
        for (int i = 0; i < 3 * kInARow; ++i) y.emplace_back(b, Shape{1, n}, b.real());
        for (int i = 0; i < 3 * kInARow; i += 3) {
          const auto out = [&](int of) {
            return engine::PackedProducts{{y[static_cast<size_t>(i + of)].tensor(), weight, {}}};
          };
          b.packed_gemv(out(0), made.in, &spec);
          b.packed_gemv_normed(out(1), made.in, made.norm, MadeRows::kEps, &spec);
          b.packed_gemv_gated(out(2), made.in, made.gate_up, &spec);
        }
        for (size_t i = 0; i < y.size(); ++i) {
          const Values got = values_of(b, y[i].tensor());
          if (first.size() < 3) first.push_back(got);
          REQUIRE(got == first[i % 3]);
          REQUIRE(y[i].untouched());
        }
      }
    }
}

TEST_CASE("products that make an operand: NaN, repeated, and refused", "[packed][made_operands]") {
  engine::Rng rng(60);
  Backend& b = backend();
  constexpr int64_t kN = 40;
  const auto check = [&](int64_t k, const Order order, const quant::InputGrid& grid) {
    const quant::LinearFormat format = site(rng, k, 32, grid, order);
    const engine::OperandSpec spec = engine::upload_operand(b, format);
    const PackedWeight weight = PackedMatrix(rng, kN, format.stored_k(), {2, 32}).on(b);
    const Tensor y = b.empty({1, kN}, b.act()),
                 w = make(b, {k}, b.real(), Values(static_cast<size_t>(k), 1.0));
    const Values values = activations(rng, k);
    const Tensor x = make(b, {1, k}, b.act(), values);
    const auto products = [&](const Tensor& in) {
      std::vector<Values> all;
      b.packed_gemv({{y, weight, {}}}, in, &spec), all.push_back(values_of(b, y));
      b.packed_gemv_normed({{y, weight, {}}}, in, w, 1e-5, &spec), all.push_back(values_of(b, y));
      b.packed_gemv_gated({{y, weight, {}}}, in, in, &spec), all.push_back(values_of(b, y));
      return all;
    };
    const std::vector<Values> first = products(x);
    for (int run = 0; run < 3; ++run) CHECK(products(x) == first);
    const auto all = [&](const Values& in, const auto& is) {
      for (const Values& y_values : products(make(b, {1, k}, b.act(), in)))
        CHECK(std::ranges::all_of(y_values, is));
    };
    // Of the places one is an outlier's, if there are outliers; one is in each half of a row.
    const int64_t outlier = format.channel_order().channels()[0];
    for (const int64_t at : {int64_t{0}, int64_t{77}, k - 1, outlier})
      for (const double value :
           {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
        if (std::isinf(value) && !spec.quantizes()) continue;  // in F64 it stays one
        Values bad = values;
        bad[static_cast<size_t>(at)] = value;
        all(bad, [](double v) { return std::isnan(v); });
      }
    all(Values(static_cast<size_t>(k)), [](double v) { return v == 0; });
    const int64_t m = Backend::kMaxPackedRows + 1;
    CHECK_THROWS_AS(
        b.packed_gemv({{b.empty({m, kN}, b.act()), weight, {}}}, b.zeros({m, k}, b.act()), &spec),
        Error);
    CHECK_THROWS_AS(products(b.zeros({1, k - 32}, b.act())), Error);
    const PackedWeight wider = PackedMatrix(rng, kN, format.stored_k() + 32, {2, 32}).on(b);
    CHECK_THROWS_AS(b.packed_gemv({{y, wider, {}}}, x, &spec), Error);
  };
  for (const int64_t k : {576, 4224})
    for (const Order order : {Order::None, Order::Both}) {
      CAPTURE(k, static_cast<int>(order));
      check(k, order, {.hadamard = true});
      check(k, order, {.bits = 2, .range = quant::RangeRule::Search, .hadamard = true});
    }
  const quant::LinearFormat format = site(rng, 64, 32, {.bits = 2}, Order::None);
  engine::OperandSpec unrounded = engine::upload_operand(b, format);
  unrounded.rounding = engine::Rounding::Identity;
  const PackedWeight weight = PackedMatrix(rng, kN, 64, {2, 32}).on(b);
  CHECK_THROWS_AS(b.packed_gemv({{b.empty({1, kN}, b.act()), weight, {}}},
                                b.zeros({1, 64}, b.act()), &unrounded),
                  Error);
}

TEST_CASE("packed_gemv_normed and packed_gemv_gated of NaN and of too many rows",
          "[packed][made_rows]") {
  engine::Rng rng(58);
  Backend& b = backend();
  constexpr int64_t kN = 20, kK = 256;
  const PackedWeight weight = PackedMatrix(rng, kN, kK, {2, 32}).on(b);
  const Tensor w = make(b, {kK}, b.real(), Values(kK, 1.0));
  for (const int64_t m : {1, 3}) {
    Values bad = activations(rng, m * kK);
    bad[static_cast<size_t>((m - 1) * kK + 77)] = std::numeric_limits<double>::quiet_NaN();
    const Tensor x = make(b, {m, kK}, b.act(), bad);
    const Tensor fine = make(b, {m, kK}, b.act(), activations(rng, m * kK));
    const Tensor y = b.empty({m, kN}, b.act());
    const auto check = [&] {
      const Values got = values_of(b, y);
      for (int64_t i = 0; i < m * kN; ++i)
        CHECK(std::isnan(got[static_cast<size_t>(i)]) == (i / kN == m - 1));
    };
    b.packed_gemv_normed({{y, weight, {}}}, x, w, 1e-5), check();
    b.packed_gemv_gated({{y, weight, {}}}, x, fine), check();
    b.packed_gemv_gated({{y, weight, {}}}, fine, x), check();
  }
  const int64_t m = Backend::kMaxPackedRows + 1;
  const Tensor x = b.zeros({m, kK}, b.act()), y = b.empty({m, kN}, b.act());
  CHECK_THROWS_AS(b.packed_gemv_normed({{y, weight, {}}}, x, w, 1e-5), Error);
  CHECK_THROWS_AS(b.packed_gemv_gated({{y, weight, {}}}, x, x), Error);
}

TEST_CASE("packed_gemv and quantized_gemv of 2-bit weights at the ends of tiles",
          "[packed][tiles]") {
  engine::Rng rng(42);
  Backend& b = backend();
  for (const int64_t n : {1, 15, 16, 17, 31, 33})
    for (const int64_t k : {32, 64, 96, 128, 160, 576, 2048, 2080, 4224})
      for (int64_t m = 1; m <= 8; ++m) {
        if (n * k * m > 300'000) continue;
        check_gemv(rng, n, k, {2, 32}, m, m % 2 == 0, m % 3 == 0 ? b.real() : b.act());
      }
}

// Matrices as large as a model's: random bytes, of whose products some rows are checked.
TEST_CASE("products with large 2-bit matrices", "[packed][tiles][large]") {
  engine::Rng rng(43);
  Backend& b = backend();
  // On 132 multiprocessors every number of row tiles a block, rings that wrap, several rounds, more
  // positions of x than a block holds.
  std::vector<std::pair<int64_t, int64_t>> shapes = {{14336, 4096}, {4096, 14336}, {8500, 4224},
                                                     {12680, 2176}, {70000, 160},  {200, 32000}};
  for (int64_t tiles = 1; tiles <= 9; ++tiles) shapes.push_back({132 * 16 * tiles - 20, 96});
  for (const auto& [n, k] : shapes)
    for (const int64_t m : {1, 3, 16, 32, 64, 200}) {
      if (m == 3 && n * k > 20'000'000) continue;
      if (m > 16 && k < 1000) continue;
      if (m > b.max_packed_rows({.n = n, .k = k})) continue;
      CAPTURE(n, k, m);
      const int64_t groups = k / 32;
      const int64_t zero_bytes = quant::zero_row_bytes(k, 32, 2);
      const Bytes qweight = random_bytes(rng, n * k / 4, 0, 256);
      const Bytes scales = random_bytes(rng, n * groups, 0x30, 16);
      const Bytes zeros = random_bytes(rng, n * zero_bytes, 0, 256);
      const float master_scale = 0x1p-3f;
      const void* const parts[] = {qweight.data(), scales.data(), zeros.data(), &master_scale};
      const PackedWeight weight = engine::upload_packed(
          b, {.n = n, .k = k},
          [&](const quant::StoredTensor& t) { return parts[static_cast<size_t>(t.part)]; });
      const Values x = activations(rng, m * k);
      const Bytes codes = random_bytes(rng, m * k, 0, 4),
                  code_zeros = random_bytes(rng, m * groups, 0, 4);
      engine::OperandRows operand;
      operand.codes = make_bytes(b, {m, k}, codes);
      operand.zeros = make_bytes(b, {m, groups}, code_zeros);
      operand.scales =
          make(b, {m, groups}, b.real(), Values(static_cast<size_t>(m * groups), 0.375));
      const bool coded_rows = m <= Backend::kMaxPackedRows;
      const Guarded y(b, {m, n}, b.real()), quantized(b, {m, n}, b.real());
      b.packed_gemv(y.tensor(), make(b, {m, k}, b.act(), x), weight, Tensor());
      if (coded_rows) b.quantized_gemv(quantized.tensor(), operand, weight, Tensor());
      CHECK((y.untouched() && quantized.untouched()));
      const Values got = values_of(b, y.tensor());
      const Values got_quantized = coded_rows ? values_of(b, quantized.tensor()) : Values();
      std::vector<int64_t> checked = {n - 1};
      for (int64_t row = 0; row < n; row += 97) checked.push_back(row);
      for (int64_t i = 0; i < m; ++i)
        for (const int64_t row : checked) {
          double sum = 0, size = 0, coded = 0, coded_size = 0;
          for (int64_t j = 0; j < k; ++j) {
            const int q = quant::packed_code(qweight.data() + row * k / 4, j, 2);
            const int z = quant::packed_code(zeros.data() + row * zero_bytes, j / 32, 2);
            const double level =
                (q - z) * master_scale *
                quant::e4m3_decode(scales[static_cast<size_t>(row * groups + j / 32)]);
            const double term = level * x[static_cast<size_t>(i * k + j)];
            const double coded_term = level * 0.375 *
                                      (codes[static_cast<size_t>(i * k + j)] -
                                       code_zeros[static_cast<size_t>(i * groups + j / 32)]);
            sum += term, size += std::abs(term);
            coded += coded_term, coded_size += std::abs(coded_term);
          }
          // Half units are at most 2^-15 / (1 - 2^-7) of about three standard deviations, an
          // average term is 0.8 of one: 2^-13 of the size. quantized_gemv sums in lanes.
          const WeightGrid& grid = weight.format.weight;
          const double split = half_unit(grid, m) > 0 ? 0x1p-13 : 0.0;
          const double order = roundings(grid, k, m) * epsilon_of(DType::F32);
          const double coded_order = roundings(grid, k, 1) * epsilon_of(DType::F32);
          const auto at = static_cast<size_t>(i * n + row);
          INFO("row " << row << " of x " << i);
          REQUIRE(std::abs(got[at] - sum) <= (order + split) * size);
          if (coded_rows) REQUIRE(std::abs(got_quantized[at] - coded) <= coded_order * coded_size);
        }
      // The others are written, none far outside of what such products are. NaN counts.
      for (const Values* values : {&got, &got_quantized})
        CHECK(std::count_if(values->begin(), values->end(),
                            [](double v) { return !(std::abs(v) < 1e4); }) == 0);
    }
}

// A random weight of a format.
PackedWeight random_weight(engine::Rng& rng, Backend& b, int64_t n, int64_t k, WeightGrid grid) {
  const float master_scale = 0x1p-5f;
  std::vector<Bytes> parts;
  return engine::upload_packed(
      b, {.n = n, .k = k, .weight = grid}, [&](const quant::StoredTensor& t) -> const void* {
        if (t.part == quant::StoredPart::MasterScale) return &master_scale;
        Bytes& bytes = parts.emplace_back();
        for (int64_t i = 0; i < t.bytes(); ++i)
          bytes.push_back(static_cast<uint8_t>(
              t.part == quant::StoredPart::Scales ? 0x30 + rng.below(16) : rng.below(256)));
        return bytes.data();
      });
}

// Several products in one op against one op each.
void check_products(engine::Rng& rng, const std::vector<WeightGrid>& grids,
                    const std::vector<int64_t>& rows, int64_t k, int64_t m, DType y_dtype) {
  Backend& b = backend();
  const int group = grids[0].group;
  CAPTURE(rows, k, m, grids[0].bits, grids.back().bits, group, y_dtype == DType::BF16);
  std::vector<PackedWeight> weights;
  std::vector<Tensor> addends;
  std::deque<Guarded> together, coded_together;
  engine::PackedProducts products, coded_products;
  for (size_t i = 0; i < rows.size(); ++i) {
    weights.push_back(random_weight(rng, b, rows[i], k, grids[i % grids.size()]));
    addends.push_back(
        i % 2 == 0 ? Tensor() : make(b, {m, rows[i]}, b.act(), activations(rng, m * rows[i], 4.0)));
    together.emplace_back(b, engine::Shape{m, rows[i]}, y_dtype);
    coded_together.emplace_back(b, engine::Shape{m, rows[i]}, y_dtype);
  }
  for (size_t i = 0; i < rows.size(); ++i) {
    products.push_back({together[i].tensor(), weights[i], addends[i]});
    coded_products.push_back({coded_together[i].tensor(), weights[i], addends[i]});
  }
  const Tensor x = make(b, {m, k}, b.act(), activations(rng, m * k));
  Bytes codes(static_cast<size_t>(m * k)), zeros(static_cast<size_t>(m * k / group));
  for (Bytes* bytes : {&codes, &zeros})
    for (uint8_t& code : *bytes) code = static_cast<uint8_t>(rng.below(4));
  engine::OperandRows coded;
  coded.codes = make_bytes(b, {m, k}, codes);
  coded.zeros = make_bytes(b, {m, k / group}, zeros);
  coded.scales = make(b, {m, k / group}, b.real(), Values(zeros.size(), 0.375));
  b.packed_gemv(products, x);
  const bool coded_rows = m <= Backend::kMaxPackedRows;
  if (coded_rows) b.quantized_gemv(coded_products, coded);
  // On a GPU the blocks take other parts of the sums. The error of all outputs is far below the
  // bound of one, so the bound of lanes holds for tensor cores, too.
  const double order = roundings(grids[0], k, 1);
  const double bound = on_cuda() ? order * epsilon_of(DType::F32) +
                                       2 * (y_dtype == DType::BF16) * epsilon_of(y_dtype)
                                 : 0.0;
  for (size_t i = 0; i < rows.size(); ++i) {
    CAPTURE(i);
    const Tensor alone = b.empty({m, rows[i]}, y_dtype),
                 coded_alone = b.empty({m, rows[i]}, y_dtype);
    b.packed_gemv(alone, x, weights[i], addends[i]);
    CHECK((together[i].untouched() && coded_together[i].untouched()));
    CHECK(relative_error(values_of(b, together[i].tensor()), values_of(b, alone)) <= bound);
    if (!coded_rows) continue;
    b.quantized_gemv(coded_alone, coded, weights[i], addends[i]);
    CHECK(relative_error(values_of(b, coded_together[i].tensor()), values_of(b, coded_alone)) <=
          bound);
  }
}

TEST_CASE("products of the same rows in one op equal one op each",
          "[packed][quantized_gemv][products]") {
  engine::Rng rng(46);
  Backend& b = backend();
  for (const auto& rows : std::vector<std::vector<int64_t>>{
           {1}, {33, 5}, {64, 16, 16}, {5, 300, 90}, {40, 7, 130, 17}, {2300, 576, 576}})
    for (const int64_t k : {32, 96, 640, 2080})
      for (const int64_t m : {1, 2, 4, 5, 8, 16, 40, 130}) {
        if (rows[0] * k * m > (m > 8 ? 50'000'000 : 2'000'000)) continue;
        if (refused(m)) continue;
        check_products(rng, {{2, 32}}, rows, k, m, m % 2 == 0 ? b.real() : b.act());
      }
  for (const int64_t m : {1, 6}) {
    check_products(rng, {{2, 64}}, {48, 33, 16}, 640, m, b.real());
    check_products(rng, {{4, 32}, {2, 32}}, {33, 65, 48, 17}, 576, m, b.real());
    check_products(rng, {{3, 128}}, {33, 65}, 640, m, b.act());
  }
  // Many rows, and weights of every number of bits in one op.
  const std::vector<WeightGrid> grids = {{8, 32}, {2, 32}, {3, 32}, {4, 32}};
  for (const int64_t m : {5, 9, 70})
    if (std::ranges::all_of(grids, [&](const WeightGrid& g) { return m <= most_rows(g, 640); }))
      check_products(rng, grids, {33, 65, 48, 17, 90, 20, 7, 300, 16, 5}, 640, m, b.real());
}

TEST_CASE("products of the same rows in one op: matrices of models",
          "[packed][quantized_gemv][products][large]") {
  engine::Rng rng(47);
  check_products(rng, {{2, 32}}, {4096, 1024, 1024}, 4096, 1, backend().real());
  check_products(rng, {{2, 32}}, {8192, 8192}, 2048, 1, backend().act());
  if (on_cuda()) check_products(rng, {{2, 32}}, {14336, 14336}, 4096, 1, backend().act());
}

TEST_CASE("products in one op have weights of one width and group", "[packed][products]") {
  engine::Rng rng(48);
  Backend& b = backend();
  const PackedWeight first = random_weight(rng, b, 16, 128, {2, 32});
  const Tensor x = b.zeros({1, 128}, b.act()), y = b.empty({1, 16}, b.act());
  for (const auto& [k, group] : std::vector<std::pair<int64_t, int>>{{64, 32}, {128, 64}}) {
    const PackedWeight other = random_weight(rng, b, 16, k, {2, group});
    const Tensor second = b.empty({1, 16}, b.act());
    CHECK_THROWS_AS(b.packed_gemv({{y, first, {}}, {second, other, {}}}, x), Error);
  }
  CHECK_THROWS_AS(b.packed_gemv({}, x), Error);
}

// Kernels of products may start before those in front of them have ended.
TEST_CASE("products in a row see each other's results", "[packed][tiles]") {
  engine::Rng rng(45);
  Backend& b = backend();
  constexpr int64_t kSize = 384;
  std::vector<PackedWeight> weights;
  for (int i = 0; i < 4; ++i) {
    PackedMatrix matrix(rng, kSize, kSize, {2, 32});
    for (uint8_t& scale : matrix.scales) scale = 0x38;  // 1
    matrix.master_scale = 0x1p-5f;                      // so that a product keeps the size of x
    weights.push_back(matrix.on(b));
  }
  const int64_t m = GENERATE(1, 8, 20, 70);
  if (refused(m)) return;
  const Values first = activations(rng, m * kSize);
  const Tensor start = make(b, {m, kSize}, b.act(), first);
  const Tensor x[] = {b.empty({m, kSize}, b.act()), b.empty({m, kSize}, b.act())};
  const auto chain = [&](bool wait) {
    b.copy(x[0], start);
    for (size_t i = 0; i < 64; ++i) {
      b.packed_gemv(x[(i + 1) % 2], x[i % 2], weights[i % 4], i % 8 == 0 ? start : Tensor());
      if (i % 16 == 15) b.add(x[(i + 1) % 2], x[(i + 1) % 2], start);
      if (wait) b.synchronize();
    }
  };
  chain(true);
  const Values want = values_of(b, x[0]);
  const double size = *std::max_element(want.begin(), want.end());
  CHECK((size > 1e-3 && size < 1e6));
  chain(false);
  CHECK(values_of(b, x[0]) == want);
  const auto replay = b.record([&] { chain(false); });
  for (int run = 0; run < 3; ++run) {
    replay->run();
    CHECK(values_of(b, x[0]) == want);
  }
}

// The ops of decode steps, which reuse the same few buffers in every layer.
TEST_CASE("the ops of a decode step see each other's results", "[packed][products][early]") {
  engine::Rng rng(49);
  Backend& b = backend();
  constexpr int64_t kHeads = 4, kKvHeads = 2, kHeadDim = 64, kHidden = 640, kCapacity = 300;
  constexpr int64_t kModel = kHeads * kHeadDim, kKeys = kKvHeads * kHeadDim, kLayers = 6;
  for (const auto& [m, together] :
       std::vector<std::pair<int64_t, bool>>{{1, false}, {3, false}, {1, true}, {3, true}}) {
    CAPTURE(m, together);
    std::vector<PackedWeight> w;  // of a layer: q, k, v, o, gate, up, down
    for (int64_t layer = 0; layer < kLayers; ++layer) {
      for (const int64_t n : {kModel, kKeys, kKeys, kModel, kHidden, kHidden})
        w.push_back(random_weight(rng, b, n, kModel, {2, 32}));
      w.push_back(random_weight(rng, b, kModel, kHidden, {2, 32}));
    }
    const auto act = [&](engine::Shape shape) { return b.empty(std::move(shape), b.act()); };
    const Tensor x = act({m, kModel}), attended = act({m, kModel}), normed = act({m, kModel}),
                 o = act({m, kModel});
    const Tensor q = act({m, kModel}), k = act({m, kKeys}), v = act({m, kKeys});
    const Tensor gate = act({m, kHidden}), up = act({m, kHidden}), h = act({m, kHidden});
    const Tensor table = make(b, {50, kModel}, b.act(), activations(rng, 50 * kModel));
    const Tensor norm = make(b, {kModel}, b.real(), Values(kModel, 0.5));
    const Tensor inv_rms = b.empty({m}, b.real()), inv_freq = frequencies(b, kHeadDim);
    const Tensor ids = make_ids(b, {m}, m == 1 ? std::vector{7} : std::vector{7, 30, 41}),
                 start = b.zeros({m}, DType::I32);
    std::vector<Tensor> caches;
    for (int64_t i = 0; i < 2 * kLayers; ++i)
      caches.push_back(act({m, kCapacity, kKvHeads, kHeadDim}));
    const auto heads = [&](const Tensor& rows) {
      return rows.view({m, 1, rows.dim(1) / kHeadDim, kHeadDim});
    };
    const auto step = [&](bool wait) {
      const auto done = [&] {
        if (wait) b.synchronize();
      };
      b.embed(x, ids, table), done();
      for (size_t layer = 0; layer < kLayers; ++layer) {
        const PackedWeight* const own = w.data() + 7 * layer;
        const Tensor &k_cache = caches[2 * layer], &v_cache = caches[2 * layer + 1];
        if (together) {
          b.packed_gemv_normed({{q, own[0], {}}, {k, own[1], {}}, {v, own[2], {}}}, x, norm, 1e-5),
              done();
          b.attention_step(heads(o), heads(q), heads(k), heads(v), k_cache, v_cache, start,
                           inv_freq, {}),
              done();
          b.packed_gemv(attended, o, own[3], x), done();
          b.packed_gemv_normed({{gate, own[4], {}}, {up, own[5], {}}}, attended, norm, 1e-5),
              done();
          b.packed_gemv_gated({{x, own[6], attended}}, gate, up), done();
          continue;
        }
        b.rms_norm(normed, inv_rms, x, norm, 1e-5), done();
        b.packed_gemv({{q, own[0], {}}, {k, own[1], {}}, {v, own[2], {}}}, normed), done();
        b.append_kv(k_cache, v_cache, heads(k), heads(v), start, heads(q), inv_freq), done();
        b.attention_cached(heads(o), heads(q), k_cache, v_cache, start, {}), done();
        b.packed_gemv(attended, o, own[3], x), done();
        b.rms_norm(normed, inv_rms, attended, norm, 1e-5), done();
        b.packed_gemv({{gate, own[4], {}}, {up, own[5], {}}}, normed), done();
        b.swiglu(h, gate, up), done();
        b.packed_gemv(x, h, own[6], attended), done();
      }
      b.advance(start), done();
    };
    // The tokens before the first step differ, so that every step's attention does.
    const Tensor past = make(b, {m, kCapacity, kKvHeads, kHeadDim}, b.act(),
                             activations(rng, m * kCapacity * kKvHeads * kHeadDim));
    const Tensor tokens_before = make_ids(b, {m}, std::vector<int>(static_cast<size_t>(m), 40));
    const auto restart = [&] {
      b.copy(start, tokens_before);
      for (const Tensor& cache : caches) b.copy(cache, past);
    };
    std::vector<Values> want;
    restart();
    for (int i = 0; i < 5; ++i) {
      step(true);
      want.push_back(values_of(b, x));
      REQUIRE(std::ranges::all_of(want.back(), [](double value) { return std::isfinite(value); }));
      CHECK((i == 0 || want[static_cast<size_t>(i)] != want[static_cast<size_t>(i - 1)]));
    }
    restart();
    for (const Values& values : want) {
      step(false);
      CHECK(values_of(b, x) == values);
    }
    const auto replay = b.record([&] { step(false); });
    for (int run = 0; run < 4; ++run) {
      restart();
      for (const Values& values : want) {
        replay->run();
        CHECK(values_of(b, x) == values);
      }
    }
  }
}

TEST_CASE("tiles of 2-bit codes hold a stored matrix", "[packed][tiles]") {
  engine::Rng rng(44);
  for (const int group : {32, 64, 128})
    for (const int64_t n : {1, 16, 33})
      for (const int64_t k : {128, 640, 32, 96}) {
        if (k % group != 0) continue;
        const PackedMatrix matrix(rng, n, k, {2, group});
        Bytes tiles(static_cast<size_t>(quant::tiled_bytes(n, k)));
        const int64_t rows = quant::row_tiles(n);
        for (size_t i = 0; i < tiles.size(); ++i) {
          const auto tile = static_cast<int64_t>(i) / quant::kTileBytes;
          tiles[i] = quant::tile_byte(matrix.view(), tile / rows, tile % rows,
                                      static_cast<int>(i % quant::kTileBytes));
        }
        for (int64_t row = 0; row < rows * quant::kTileRows; ++row)
          for (int64_t column = 0; column < quant::column_slices(k) * quant::kTileColumns;
               ++column) {
            const uint8_t q = quant::tiled_code(tiles.data(), n, row, column);
            const uint8_t z = quant::tiled_zero(tiles.data(), n, row, column);
            const uint8_t e = quant::tiled_scale(tiles.data(), n, row, column);
            if (row >= n || column >= k) {
              REQUIRE((q == 0 && z == 0 && e == 0));
              continue;
            }
            REQUIRE((double(q) - z) * quant::e4m3_decode(e) ==
                    matrix.levels[static_cast<size_t>(row * k + column)]);
          }
      }
}

TEST_CASE("packed_gemv repeats bit for bit and propagates NaN", "[packed]") {
  engine::Rng rng(35);
  Backend& b = backend();
  PackedMatrix matrix(rng, 40, 1536, {2, 32});
  Values x = activations(rng, 1536);
  const auto run = [&] {
    const Tensor y = b.empty({1, 40}, b.act());
    b.packed_gemv(y, make(b, {1, 1536}, b.act(), x), matrix.on(b), Tensor());
    return values_of(b, y);
  };
  CHECK(run() == run());
  matrix.scales[5 * 48 + 7] = quant::kE4m3Nan;
  const Values one_bad_row = run();
  for (size_t i = 0; i < one_bad_row.size(); ++i) CHECK(std::isnan(one_bad_row[i]) == (i == 5));
  x[700] = std::nan("");
  for (const double v : run()) CHECK(std::isnan(v));
}

constexpr quant::NestedDequant kDequants[] = {quant::NestedDequant::Middle,
                                              quant::NestedDequant::Floor};

TEST_CASE("nested codes: unpack is exact, and packed_gemv multiplies by it", "[packed][nested]") {
  engine::Rng rng(37);
  Backend& b = backend();
  for (const int bits : {8, 4, 3, 2})
    for (const quant::NestedDequant dequant : kDequants)
      for (const int group : {32, 64, 128})
        for (const auto& [n, k, m] : std::vector<std::tuple<int64_t, int64_t, int64_t>>{
                 {1, 128, 1}, {9, 640, 8}, {33, 1152, 3}}) {
          CAPTURE(bits, dequant == quant::NestedDequant::Middle, group, n, k, m);
          const PackedMatrix matrix(rng, n, k, {bits, group, true, dequant});
          const PackedWeight weight = matrix.on(b);
          const Guarded wq(b, {n, k}, b.act()), y(b, {m, n}, b.real());
          b.unpack(wq.tensor(), weight);
          CHECK(values_of(b, wq.tensor()) ==
                (b.act() == DType::BF16 ? round_bf16(matrix.levels) : matrix.levels));
          const Values x = activations(rng, m * k);
          const Values addend = activations(rng, m * n, 4.0);
          b.packed_gemv(y.tensor(), make(b, {m, k}, b.act(), x), weight,
                        make(b, {m, n}, b.act(), addend));
          CHECK((wq.untouched() && y.untouched()));
          const Values got = values_of(b, y.tensor());
          for (int64_t i = 0; i < m * n; ++i) {
            double sum = 0, size = 0, split = 0, step = 0;
            for (int64_t j = 0; j < k; ++j) {
              if (j % group == 0) {
                const auto begin = x.begin() + i / n * k + j;
                const auto larger = [](double a, double b) { return std::abs(a) < std::abs(b); };
                step = half_unit(weight.format.weight, m) *
                       std::abs(*std::max_element(begin, begin + group, larger));
              }
              const double level =
                  matrix.master_scale * matrix.levels[static_cast<size_t>(i % n * k + j)];
              const double term = x[static_cast<size_t>(i / n * k + j)] * level;
              sum += term;
              size += std::abs(term);
              split += std::abs(level) * step;
            }
            const double want = sum + addend[static_cast<size_t>(i)];
            const double order = roundings(weight.format.weight, k, m);
            REQUIRE(std::abs(got[static_cast<size_t>(i)] - want) <=
                    split + epsilon_of(DType::F32) * (order * size + std::abs(want)));
          }
        }
}

// Codes of an operand: the first groups have 8 bits, like outliers. Scales have 4 significant bits.
struct Codes {
  Bytes codes, zeros;
  Values scales;

  Codes(engine::Rng& rng, int64_t m, int64_t k, int group, int bits) {
    const int64_t groups = k / group;
    for (int64_t i = 0; i < m * groups; ++i) {
      const int64_t top = int64_t{1} << (i % groups < 2 ? 8 : bits);
      zeros.push_back(static_cast<uint8_t>(rng.below(top)));
      scales.push_back(
          std::ldexp(static_cast<double>(8 + rng.below(8)), static_cast<int>(rng.below(12)) - 12));
      for (int j = 0; j < group; ++j) codes.push_back(static_cast<uint8_t>(rng.below(top)));
    }
  }

  engine::OperandRows on(Backend& b, int64_t m) const {
    const auto k = static_cast<int64_t>(codes.size()) / m;
    const auto groups = static_cast<int64_t>(zeros.size()) / m;
    engine::OperandRows rows;
    rows.codes = make_bytes(b, {m, k}, codes);
    rows.zeros = make_bytes(b, {m, groups}, zeros);
    rows.scales = make(b, {m, groups}, b.real(), scales);
    return rows;
  }
};

// `levels` of the weight (N, K) with its scale in each group, S apart.
void check_quantized_gemv(engine::Rng& rng, const PackedWeight& weight, const Values& levels,
                          double master_scale, int64_t m, int bits, bool with_addend,
                          DType y_dtype) {
  Backend& b = backend();
  const int64_t n = weight.format.n, k = weight.format.k;
  const int group = weight.format.weight.group;
  CAPTURE(n, k, weight.format.weight.bits, weight.format.weight.nested, group, m, bits, with_addend,
          y_dtype == DType::BF16);
  const Codes x(rng, m, k, group, bits);
  const Values addend = with_addend ? round_bf16(normal(rng, m * n, 4.0)) : Values();
  const Guarded y(b, {m, n}, y_dtype);
  b.quantized_gemv(y.tensor(), x.on(b, m), weight,
                   with_addend ? make(b, {m, n}, b.act(), addend) : Tensor());
  CHECK(y.untouched());
  const Values got = values_of(b, y.tensor());
  for (int64_t i = 0; i < m * n; ++i) {
    double sum = 0, size = 0;
    for (int64_t from = 0; from < k; from += 32) {
      const int64_t g = i / n * (k / group) + from / group;  // of the operand's zeros and scales
      double part = 0;
      for (int64_t j = from; j < from + 32; ++j)
        part +=
            levels[static_cast<size_t>(i % n * k + j)] *
            (double(x.codes[static_cast<size_t>(i / n * k + j)]) - x.zeros[static_cast<size_t>(g)]);
      part *= master_scale * x.scales[static_cast<size_t>(g)];
      sum += part;
      size += std::abs(part);
    }
    // The sums over 32 positions are exact. Each takes one rounding of its product and one of each
    // addition: at most k / 32, or of a few sums two to add four lanes.
    const double roundings = std::max(static_cast<double>(k / 32), 3.0);
    double want = sum, error = 0x1p-24 * roundings * size * (1 + 1e-5);
    if (with_addend) {
      want += addend[static_cast<size_t>(i)];
      error += 0x1p-24 * std::abs(want) * 1.01;
    }
    if (y_dtype == DType::BF16) error += epsilon_of(y_dtype) * (std::abs(want) + error);
    INFO("row " << i / n << ", output " << i % n << ": got " << got[static_cast<size_t>(i)]
                << ", want " << want << " within " << error);
    REQUIRE(std::abs(got[static_cast<size_t>(i)] - want) <= error);
    if (k == group && !with_addend && y_dtype == DType::F32)  // one group: rounded once
      REQUIRE(got[static_cast<size_t>(i)] == double{static_cast<float>(sum)});
  }
}

TEST_CASE("quantized_gemv sums each group exactly", "[packed][quantized_gemv]") {
  engine::Rng rng(38);
  Backend& b = backend();
  int turn = 0;
  for (const int bits : {2, 3, 4, 8})
    for (const int group : {32, 64, 128})
      for (const int64_t m : {1, 2, 4, 5, 8})
        for (const auto& [n, groups] : std::vector<std::pair<int64_t, int64_t>>{
                 {1, 1}, {7, 3}, {33, 18}, {2300, 2}, {5, 129}}) {
          if (n > 1000 && m > 2) continue;
          const PackedMatrix matrix(rng, n, groups * group, {bits, group});
          const int activation_bits[] = {2, 4, 8};
          ++turn;
          check_quantized_gemv(rng, matrix.on(b), matrix.levels, matrix.master_scale, m,
                               activation_bits[turn % 3], turn % 2 == 0,
                               turn % 5 == 0 ? b.act() : b.real());
        }
}

TEST_CASE("quantized_gemv of nested codes at every width", "[packed][quantized_gemv][nested]") {
  engine::Rng rng(39);
  Backend& b = backend();
  for (const int bits : {8, 4, 3, 2})
    for (const quant::NestedDequant dequant : kDequants)
      for (const int group : {32, 64, 128})
        for (const int64_t m : {1, 3, 8})
          for (const auto& [n, groups] :
               std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {33, 18}, {5, 130}}) {
            const PackedMatrix matrix(rng, n, groups * group, {bits, group, true, dequant});
            check_quantized_gemv(rng, matrix.on(b), matrix.levels, matrix.master_scale, m, 2,
                                 m == 3, m == 8 ? b.act() : b.real());
          }
}

TEST_CASE("quantized_gemv repeats bit for bit and propagates NaN", "[packed][quantized_gemv]") {
  engine::Rng rng(40);
  Backend& b = backend();
  PackedMatrix matrix(rng, 40, 1536, {2, 32});
  Codes x(rng, 1, 1536, 32, 2);
  const auto run = [&] {
    const Tensor y = b.empty({1, 40}, b.real());
    b.quantized_gemv(y, x.on(b, 1), matrix.on(b), Tensor());
    return values_of(b, y);
  };
  CHECK(run() == run());
  matrix.scales[5 * 48 + 7] = quant::kE4m3Nan;
  const Values one_bad_row = run();
  for (size_t i = 0; i < one_bad_row.size(); ++i) CHECK(std::isnan(one_bad_row[i]) == (i == 5));
  x.scales[9] = std::nan("");
  for (const double v : run()) CHECK(std::isnan(v));
}

TEST_CASE("packed_gemv refuses more rows than it supports", "[packed]") {
  engine::Rng rng(36);
  Backend& b = backend();
  const Tensor x = b.zeros({9, 32}, b.act()), y = b.empty({9, 4}, b.act());
  for (const int bits : {2, 3, 4, 8}) {
    const PackedMatrix matrix(rng, 4, 32, {bits, 32});
    if (most_rows(matrix.grid, 32) >= 9)
      b.packed_gemv(y, x, matrix.on(b), Tensor());
    else
      CHECK_THROWS_AS(b.packed_gemv(y, x, matrix.on(b), Tensor()), Error);
    engine::OperandRows operand;
    operand.codes = b.zeros({9, 32}, DType::U8);
    operand.zeros = b.zeros({9, 1}, DType::U8);
    operand.scales = b.zeros({9, 1}, b.real());
    CHECK_THROWS_AS(b.quantized_gemv(y, operand, matrix.on(b), Tensor()), Error);
  }
}

TEST_CASE("products take repacked weights only", "[packed]") {
  engine::Rng rng(41);
  Backend& b = backend();
  const PackedMatrix matrix(rng, 4, 32, {2, 32});
  const PackedWeight repacked = matrix.on(b);
  PackedWeight file{repacked.format, {}, {}};
  for (const quant::StoredTensor& t : file.format.loaded_tensors())
    file.tensors[static_cast<size_t>(t.part)] = b.zeros(t.shape, engine::dtype_of(t));
  const Tensor x = b.zeros({1, 32}, b.act()), y = b.empty({1, 4}, b.act());
  CHECK_THROWS_AS(b.repack(repacked), Error);
  CHECK_THROWS_AS(b.packed_gemv(y, x, file, Tensor()), Error);
  CHECK_THROWS_AS(b.unpack(b.empty({4, 32}, b.act()), file), Error);
  b.packed_gemv(y, x, b.repack(file), Tensor());
  CHECK(values_of(b, y) == Values(4, 0.0));
}

}  // namespace
}  // namespace bbb::tests
