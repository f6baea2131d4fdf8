// Operands of linears: against the written formula, against the CPU bit for bit, and their
// gradients. Moments of channels.
#include <algorithm>
#include <bit>
#include <catch2/catch.hpp>
#include <cmath>
#include <limits>
#include <vector>

#include "quant/host.h"
#include "tests/op_test.h"
#include "tests/operand_formula.h"
#include "tests/quantizer_formula.h"

namespace bbb::tests {
namespace {

using engine::OperandRows;
using engine::OperandSpec;
using engine::Rounding;
using quant::ChannelOrder;
using quant::InputGrid;
using quant::LinearFormat;
using quant::RangeRule;
using quant::SplitSide;
using Values = std::vector<double>;
using Bytes = std::vector<uint8_t>;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

// "" if the rows are equal, NaN to NaN; else the first difference and how many there are.
std::string difference(const Values& got, const Values& want, int64_t columns) {
  if (got.size() != want.size()) return cat("sizes ", got.size(), " and ", want.size());
  std::string first;
  int64_t count = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    if (got[i] == want[i] || (std::isnan(got[i]) && std::isnan(want[i]))) continue;
    if (count++ == 0)
      first = cat("row ", static_cast<int64_t>(i) / columns, ", column ",
                  static_cast<int64_t>(i) % columns, ": got ", got[i], ", want ", want[i]);
  }
  return count == 0 ? "" : cat(first, " (", count, " of ", got.size(), " differ)");
}
std::string difference(const Bytes& got, const Bytes& want, int64_t columns) {
  return difference(Values(got.begin(), got.end()), Values(want.begin(), want.end()), columns);
}

Values as_act(Backend& b, Values values) {
  return b.act() == DType::BF16 ? round_bf16(std::move(values)) : values;
}

// Rows of bf16 values: channels of different magnitude, some of them large; among the rows one of
// zeros and a constant one.
Values rows_of(engine::Rng& rng, int64_t rows, int64_t k) {
  Values x = normal(rng, rows * k);
  for (int64_t i = 0; i < rows * k; ++i) {
    const int64_t row = i / k, channel = i % k;
    double& v = x[static_cast<size_t>(i)];
    v = std::ldexp(v, static_cast<int>(channel * 7 % 5) - 2) * (channel % 41 == 7 ? 30 : 1);
    v = std::ldexp(v, static_cast<int>(row % 9) * 4 - 16);
    if (row % 8 == 3) v = 0;
    if (row % 8 == 4) v = 0.75;
    if (row % 8 == 5) v = std::abs(v);
    if (row % 8 == 6) v = std::round(4 * v) / 4;  // ties
  }
  return round_bf16(std::move(x));
}

struct Made {
  Values x = {}, scales = {};
  Bytes clipped = {}, codes = {}, zeros = {};
};

OperandRows rows_in(const Tensor& x, const Tensor& clipped = Tensor()) {
  OperandRows out;
  out.x = x;
  out.clipped = clipped;
  return out;
}

// The outputs of an operand, guarded.
class Outputs {
 public:
  Outputs(Backend& b, const OperandSpec& spec, int64_t rows)
      : b_(b),
        quantized_(spec.view.grid.bits < 16 && spec.rounding == Rounding::Nearest),
        x_(b, {rows, spec.view.stored_k}, b.act()),
        clipped_(b, {rows, spec.view.stored_k / 8}, DType::U8),
        codes_(b, {rows, spec.view.stored_k}, DType::U8),
        zeros_(b, {rows, spec.view.stored_k / spec.view.group}, DType::U8),
        scales_(b, {rows, spec.view.stored_k / spec.view.group}, b.real()) {}

  OperandRows rows() const {
    OperandRows out = rows_in(x_.tensor(), clipped_.tensor());
    if (quantized_) {
      out.codes = codes_.tensor();
      out.zeros = zeros_.tensor();
      out.scales = scales_.tensor();
    }
    return out;
  }
  Made made() const {
    for (const Guarded* g : {&x_, &clipped_, &codes_, &zeros_, &scales_}) CHECK(g->untouched());
    Made made{.x = values_of(b_, x_.tensor()), .clipped = bytes_of(b_, clipped_.tensor())};
    if (quantized_) {
      made.codes = bytes_of(b_, codes_.tensor());
      made.zeros = bytes_of(b_, zeros_.tensor());
      made.scales = values_of(b_, scales_.tensor());
    }
    return made;
  }

 private:
  Backend& b_;
  bool quantized_;
  Guarded x_, clipped_, codes_, zeros_, scales_;
};

Made run_operand(Backend& b, const LinearFormat& format, const Values& x, int64_t rows,
                 Rounding rounding = Rounding::Nearest) {
  OperandSpec spec = engine::upload_operand(b, format);
  spec.rounding = rounding;
  const Outputs out(b, spec, rows);
  b.operand(out.rows(), make(b, {rows, format.k}, b.act(), x), spec);
  return out.made();
}

void check_same(Backend& b, const Made& got, const Made& want, const LinearFormat& format) {
  const int64_t columns = format.stored_k(), groups = format.groups();
  CHECK(difference(got.scales, want.scales, groups) == "");
  CHECK(difference(got.zeros, want.zeros, groups) == "");
  CHECK(difference(got.codes, want.codes, columns) == "");
  CHECK(difference(got.clipped, want.clipped, columns / 8) == "");
  CHECK(difference(got.x, as_act(b, want.x), columns) == "");
}

// --- the written formula
// --------------------------------------------------------------------------

float tree_sum(const std::vector<float>& terms, size_t begin, size_t count) {
  if (count == 1) return terms[begin];
  return tree_sum(terms, begin, count / 2) + tree_sum(terms, begin + count / 2, count / 2);
}

// Quantizes gathered rows, finite. float wherever the formula rounds.
Made quantize_rows_by_formula(const LinearFormat& format, const Values& gathered, int64_t rows) {
  const int64_t columns = format.stored_k(), group = format.weight.group;
  const bool search = format.input.range == RangeRule::Search && format.input.bits < 8;
  Made out;
  out.clipped.resize(static_cast<size_t>(rows * columns / 8));
  for (int64_t row = 0; row < rows; ++row) {
    const std::vector<float> x(gathered.begin() + row * columns,
                               gathered.begin() + (row + 1) * columns);
    const auto ends = [&](int64_t g) {
      const auto from = x.begin() + g * group;
      const auto [mn, mx] = std::minmax_element(from, from + group);
      return std::pair(std::min(*mn, 0.0f), std::max(*mx, 0.0f));
    };
    const auto raw_of = [&](float mn, float mx, int bits) {
      return (mx - mn) / static_cast<float>((1 << bits) - 1);
    };
    double most = 0, most_outlier = 0;
    for (int64_t g = 0; g < columns / group; ++g) {
      const bool outlier = g * group < format.input.outliers;
      const auto [mn, mx] = ends(g);
      double& largest = outlier ? most_outlier : most;
      largest = std::max<double>(largest, raw_of(mn, mx, outlier ? 8 : format.input.bits));
    }
    const double s = formula_master_scale(most);
    const double s8 =
        most_outlier == 0 ? 1.0 : std::exp2(std::ceil(std::log2(most_outlier / 256.0)));
    for (int64_t g = 0; g < columns / group; ++g) {
      const bool outlier = g * group < format.input.outliers;
      const int bits = outlier ? 8 : format.input.bits;
      const float top = static_cast<float>((1 << bits) - 1);
      const auto [mn, mx] = ends(g);
      float best_step = 0, best_z = 0, least = 0;
      int tried = 0;
      for (const float ratio : {1.0f, 0.9f, 0.8f, 0.7f, 0.6f, 0.5f}) {
        if (tried > 0 && (!search || outlier)) break;
        const float low = ratio * mn, high = ratio * mx;
        const double raw = raw_of(low, high, bits);
        const double e =
            outlier
                ? (raw == 0 ? 0x1p-9 : std::max(0x1p-9, std::exp2(std::ceil(std::log2(raw / s8)))))
                : quant::e4m3_decode(formula_scale(raw / s, bits));
        const float step = static_cast<float>(e * (outlier ? s8 : s));
        const float z = std::clamp(std::floor(-low / step + 0.5f), 0.0f, top);
        std::vector<float> terms;
        for (int64_t i = g * group; i < (g + 1) * group; ++i) {
          const float v = x[static_cast<size_t>(i)];
          const float q = std::clamp(std::floor(v / step + 0.5f) + z, 0.0f, top);
          const float d = (q - z) * step - v;
          terms.push_back(d * d);
        }
        const float error = tree_sum(terms, 0, terms.size());
        if (tried++ == 0 || error < least) least = error, best_step = step, best_z = z;
      }
      if (outlier) {
        int exponent = 0;
        CHECK(std::frexp(best_step, &exponent) == 0.5f);  // a power of two
      }
      out.zeros.push_back(static_cast<uint8_t>(best_z));
      out.scales.push_back(best_step);
      for (int64_t i = g * group; i < (g + 1) * group; ++i) {
        const float code = std::floor(x[static_cast<size_t>(i)] / best_step + 0.5f) + best_z;
        const float q = std::clamp(code, 0.0f, top);
        out.codes.push_back(static_cast<uint8_t>(q));
        out.x.push_back((q - best_z) * best_step);
        const auto at = static_cast<size_t>(row * columns + i);
        if (code != q) out.clipped[at / 8] |= static_cast<uint8_t>(1 << at % 8);
        if (outlier && code != q) CHECK(std::abs(code - q) <= 1);
      }
    }
  }
  return out;
}

TEST_CASE("operand: codes, zero points, scales and values equal the formula", "[operand]") {
  engine::Rng rng(81);
  Backend& b = backend();
  for (const int bits : {2, 3, 4, 8})
    for (const RangeRule range : {RangeRule::MinMax, RangeRule::Search})
      for (const int group : {32, 64, 128})
        for (const Order order : kOrders)
          for (const SplitSide side : {SplitSide::Weight, SplitSide::Activation}) {
            CAPTURE(bits, range == RangeRule::Search, group, static_cast<int>(order),
                    side == SplitSide::Activation);
            const LinearFormat format =
                site(rng, 576, group, {.bits = bits, .range = range}, order, side);
            const int64_t rows = 9;
            const Values x = rows_of(rng, rows, format.k);
            const Made got = run_operand(b, format, x, rows);
            const Made want =
                quantize_rows_by_formula(format, gather_by_formula(format, x, rows), rows);
            check_same(b, got, want, format);
            // Outlier groups too are exact in bf16; 8-bit groups of plain channels are not.
            if (bits <= 4) CHECK(round_bf16(want.x) == want.x);
          }
}

TEST_CASE("operand: an outlier group clips nothing by more than half a step", "[operand]") {
  engine::Rng rng(82);
  Backend& b = backend();
  for (const int group : {32, 64, 128}) {
    const LinearFormat format = site(rng, 1536, group, {.bits = 2}, Order::Outliers);
    const int64_t rows = 16, columns = format.stored_k();
    Values x = rows_of(rng, rows, format.k);
    const Made got = run_operand(b, format, x, rows);
    const Values gathered = gather_by_formula(format, x, rows);
    CHECK(round_bf16(got.x) == got.x);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t p = 0; p < format.input.outliers; ++p) {
        const auto at = static_cast<size_t>(row * columns + p);
        const double step = got.scales[at / static_cast<size_t>(group)];
        int exponent = 0;
        REQUIRE(std::frexp(step, &exponent) == 0.5);
        // Half a step from rounding x, or from the end of the range that z rounds.
        REQUIRE(std::abs(got.x[at] - gathered[at]) <= step * (1 + 1e-6));
      }
  }
}

// --- rotation, order
// ------------------------------------------------------------------------------

// Of tensors of the same number of elements.
double dot(const Values& a, const Values& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

TEST_CASE("operand: unquantized, it is the gathered and rotated row", "[operand]") {
  engine::Rng rng(83);
  for (Backend* b : {&backend(), &oracle_f64()})
    for (const bool hadamard : {false, true})
      for (const int group : {32, 64, 128})
        for (const Order order : kOrders)
          for (const int64_t k : {96, 576, 1536}) {
            CAPTURE(hadamard, group, static_cast<int>(order), k, b == &oracle_f64());
            const LinearFormat format =
                site(rng, k, group, {.hadamard = hadamard}, order, SplitSide::Activation);
            const int64_t rows = 5;
            const Values x = round_bf16(normal(rng, rows * k));
            const Made got = run_operand(*b, format, x, rows);
            const Values want = gather_by_formula(format, x, rows);
            // A rotated value is the sum of G terms with log2 G roundings of a partial sum, and is
            // rounded to act once.
            const double tolerance =
                hadamard ? 4 * epsilon_of(b->real()) + epsilon_of(b->act()) : 0.0;
            CHECK(relative_error(got.x, want) <= tolerance);
            CHECK(std::count(got.clipped.begin(), got.clipped.end(), 0) ==
                  static_cast<std::ptrdiff_t>(got.clipped.size()));
          }
}

TEST_CASE("operand: x' w' = x w, and gathering a weight is undone exactly", "[operand]") {
  engine::Rng rng(84);
  Backend& b = oracle_f64();
  for (const bool hadamard : {false, true})
    for (const int group : {32, 64, 128})
      for (const Order order : kOrders)
        for (const SplitSide side : {SplitSide::Weight, SplitSide::Activation})
          for (const int64_t k : {64, 576}) {
            CAPTURE(hadamard, group, static_cast<int>(order), side == SplitSide::Activation, k);
            const LinearFormat format = site(rng, k, group, {.hadamard = hadamard}, order, side);
            const ChannelOrder channels = format.channel_order();
            const Values x = normal(rng, k);
            std::vector<float> w, back(static_cast<size_t>(k)),
                stored(static_cast<size_t>(format.stored_k()));
            for (int64_t i = 0; i < k; ++i) w.push_back(static_cast<float>(rng.below(64)) - 32);
            quant::host::gather_weight(stored.data(), w.data(), {0, 1}, format, channels);
            quant::host::merge_weight(back.data(), stored.data(), {0, 1}, format, channels);
            CHECK(back == w);  // sums of small integers and powers of two are exact
            const Values rotated = run_operand(b, format, x, 1).x;
            const double got = dot(rotated, Values(stored.begin(), stored.end()));
            const double want = dot(x, Values(w.begin(), w.end()));
            CHECK(std::abs(got - want) <= 1e-11 * static_cast<double>(k) * 32);
          }
}

TEST_CASE("operand: gathering and its gradient are adjoint", "[operand]") {
  engine::Rng rng(85);
  for (Backend* b : {&oracle_f64(), &backend()})
    for (const bool hadamard : {false, true})
      for (const int group : {32, 128})
        for (const Order order : kOrders)
          for (const SplitSide side : {SplitSide::Weight, SplitSide::Activation})
            for (const int64_t k : {32, 576, 1536}) {
              CAPTURE(hadamard, group, static_cast<int>(order), side == SplitSide::Activation, k,
                      b == &oracle_f64());
              const LinearFormat format = site(rng, k, group, {.hadamard = hadamard}, order, side);
              const OperandSpec spec = engine::upload_operand(*b, format);
              const int64_t rows = 3, columns = format.stored_k();
              const Values x = round_bf16(normal(rng, rows * k));
              const Values y = round_bf16(normal(rng, rows * columns));
              const Guarded dx(*b, {rows, k}, b->act());
              b->operand_backward(dx.tensor(), make(*b, {rows, columns}, b->act(), y), Tensor(),
                                  spec);
              CHECK(dx.untouched());
              const Values ax = run_operand(*b, format, x, rows).x;
              const Values aty = values_of(*b, dx.tensor());
              const double got = dot(ax, y), want = dot(x, aty);
              const double size = std::sqrt(dot(ax, ax) * dot(y, y));
              CHECK(std::abs(got - want) <=
                    (b->act() == DType::BF16 ? 2 : 64) * epsilon_of(b->act()) * size);
            }
}

// --- the device against the CPU
// -------------------------------------------------------------------

void check_parity(engine::Rng& rng, const LinearFormat& format, int64_t rows, Values x) {
  CAPTURE(rows, format.k, format.stored_k(), format.weight.group, format.input.bits,
          format.input.outliers, format.input.hadamard, format.input.range == RangeRule::Search);
  Backend& b = backend();
  const Made got = run_operand(b, format, x, rows), want = run_operand(oracle(), format, x, rows);
  check_same(b, got, want, format);

  // The gradient, through a mask.
  const int64_t columns = format.stored_k();
  const Values dout = round_bf16(normal(rng, rows * columns));
  Bytes mask = want.clipped;
  for (uint8_t& byte : mask) byte |= static_cast<uint8_t>(rng.below(256) & rng.below(256));
  const auto gradient = [&](Backend& on, bool masked) {
    const OperandSpec spec = engine::upload_operand(on, format);
    const Guarded dx(on, {rows, format.k}, on.act());
    on.operand_backward(dx.tensor(), make(on, {rows, columns}, on.act(), dout),
                        masked ? make_bytes(on, {rows, columns / 8}, mask) : Tensor(), spec);
    CHECK(dx.untouched());
    return values_of(on, dx.tensor());
  };
  for (const bool masked : {true, false}) {
    CAPTURE(masked);
    CHECK(difference(gradient(b, masked), as_act(b, gradient(oracle(), masked)), format.k) == "");
  }
}

TEST_CASE("operand: every branch equals the CPU bit for bit", "[operand][parity]") {
  engine::Rng rng(86);
  const int64_t many[] = {1, 31, 33, 300}, few[] = {1, 3, 33};
  const int groups[] = {32, 64, 128};
  int turn = 0;
  for (const int64_t k : {32, 96, 576, 1536, 4096, 11008})
    for (const Order order : kOrders)
      for (const bool hadamard : {false, true})
        for (const int bits : {2, 4, 8, 16})
          for (const RangeRule range : {RangeRule::MinMax, RangeRule::Search}) {
            if (range == RangeRule::Search && bits == 16) continue;
            // Both counters step through their values out of phase.
            const int64_t rows = k < 4096 ? many[turn % 4] : few[turn % 3];
            const int group = groups[turn / 4 % 3];
            const SplitSide side = turn % 2 == 0 ? SplitSide::Weight : SplitSide::Activation;
            ++turn;
            const InputGrid input{.bits = bits, .range = range, .hadamard = hadamard};
            check_parity(rng, site(rng, k, group, input, order, side), rows, rows_of(rng, rows, k));
          }
}

TEST_CASE("operand: many rows, and rows that hardly fit", "[operand][parity]") {
  engine::Rng rng(87);
  const struct {
    int64_t rows, k;
    Order order;
    int group;
  } cases[] = {
      // More rows than a GPU takes at once: a block takes several, one after another.
      {5000, 576, Order::None, 32},
      {5000, 576, Order::Split, 32},
      {4000, 576, Order::Both, 128},
      {1500, 4096, Order::Split, 32},
      // From 14336 on, a row leaves less and less shared memory; 28672 is the widest.
      {301, 14336, Order::Split, 32},
      {3, 28672, Order::Both, 64},
      {300, 28672, Order::None, 32},
  };
  for (const auto& [most, k, order, group] : cases) {
    const int64_t rows = on_cuda() ? most : std::min<int64_t>(most, 9);
    for (const InputGrid input :
         {InputGrid{.bits = 2, .range = RangeRule::Search}, InputGrid{.bits = 4, .hadamard = true},
          InputGrid{.bits = 16, .hadamard = true}})
      check_parity(rng, site(rng, k, group, input, order), rows, rows_of(rng, rows, k));
  }
}

TEST_CASE("operand: NaN and infinity", "[operand][parity]") {
  engine::Rng rng(88);
  for (const int bits : {2, 8, 16})
    for (const bool hadamard : {false, true})
      for (const RangeRule range : {RangeRule::MinMax, RangeRule::Search}) {
        const LinearFormat format =
            site(rng, 576, 32, {.bits = bits, .range = range, .hadamard = hadamard}, Order::Both);
        const ChannelOrder order = format.channel_order();
        const int64_t rows = 8;
        Values x = rows_of(rng, rows, format.k);
        const auto set = [&](int64_t row, int64_t position, double v) {
          x[static_cast<size_t>(row * format.k + order.channels()[static_cast<size_t>(position)])] =
              v;
        };
        const int64_t single = order.pairs_end() + 70, pair = order.pairs_begin() + 6;
        set(0, single, kNan);
        set(1, single, kInf);
        set(2, single, -kInf);
        set(5, pair, kNan);
        set(6, 3, kInf);  // an outlier
        set(7, 5, kNan);
        check_parity(rng, format, rows, x);
        if (bits == 16) continue;
        const Made got = run_operand(backend(), format, x, rows);
        for (const int64_t row : {0, 1, 2, 5})
          for (int64_t p = format.input.outliers; p < format.stored_k(); ++p)
            REQUIRE(std::isnan(got.x[static_cast<size_t>(row * format.stored_k() + p)]));
        for (const int64_t row : {6, 7})
          for (int64_t p = 0; p < format.input.outliers; ++p)
            REQUIRE(std::isnan(got.x[static_cast<size_t>(row * format.stored_k() + p)]));
      }
}

// Rows at any address, of any width: no 16-byte loads.
TEST_CASE("operand: unaligned rows", "[operand][parity]") {
  engine::Rng rng(89);
  Backend& b = backend();
  for (const int64_t k : {70, 577, 576})
    for (const Order order : {Order::None, Order::Both}) {
      const LinearFormat format = site(rng, k, 32, {.bits = 2, .hadamard = true}, order);
      const int64_t rows = 5, columns = format.stored_k();
      CAPTURE(k, static_cast<int>(order), columns);
      const Values x = rows_of(rng, rows, k);
      const auto shifted = [&](Backend& on, const Values& values) {  // begins at an odd element
        const Tensor whole = on.empty({rows * k + 1}, on.act());
        const Tensor part = whole.slice(1, rows * k).view({rows, k});
        on.copy(part, make(on, {rows, k}, on.act(), values));
        return part;
      };
      const OperandSpec spec = engine::upload_operand(b, format);
      const Outputs out(b, spec, rows);
      b.operand(out.rows(), shifted(b, x), spec);
      check_same(b, out.made(), run_operand(oracle(), format, x, rows), format);

      const Values dout = round_bf16(normal(rng, rows * columns));
      const Tensor dx = shifted(b, x), want = oracle().empty({rows, k}, oracle().act());
      b.operand_backward(dx, make(b, {rows, columns}, b.act(), dout), Tensor(), spec);
      oracle().operand_backward(want, make(oracle(), {rows, columns}, oracle().act(), dout),
                                Tensor(), engine::upload_operand(oracle(), format));
      CHECK(difference(values_of(b, dx), as_act(b, values_of(oracle(), want)), k) == "");
    }
}

TEST_CASE("operand: only what is asked for is written", "[operand]") {
  engine::Rng rng(90);
  Backend& b = backend();
  const LinearFormat format = site(rng, 576, 64, {.bits = 2}, Order::Both);
  const OperandSpec spec = engine::upload_operand(b, format);
  const int64_t rows = 7, columns = format.stored_k();
  const Values values = rows_of(rng, rows, format.k);
  const Tensor x = make(b, {rows, format.k}, b.act(), values);
  const Made want = run_operand(b, format, values, rows);
  const Outputs out(b, spec, rows), codes_only(b, spec, rows);
  const Guarded alone(b, {rows, columns}, b.act());
  b.operand(rows_in(alone.tensor()), x, spec);
  CHECK(values_of(b, alone.tensor()) == want.x);
  CHECK(alone.untouched());
  OperandRows integers = codes_only.rows();
  integers.x = integers.clipped = Tensor();
  b.operand(integers, x, spec);
  const Made got = codes_only.made();
  CHECK(got.codes == want.codes);
  CHECK(got.zeros == want.zeros);
  CHECK(got.scales == want.scales);
}

// --- fused with what is in front
// ------------------------------------------------------------------

const struct {
  int64_t rows, k;
} kFusedSizes[] = {{1, 32},    {33, 70},    {31, 96},   {300, 576},
                   {33, 1536}, {3000, 576}, {7, 11008}, {700, 4096}};

TEST_CASE("rms_norm_operand is the operand of the normed row", "[operand][fused]") {
  engine::Rng rng(91);
  Backend& b = backend();
  for (const auto& [rows, k] : kFusedSizes)
    for (const Order order : {Order::None, Order::Both}) {
      CAPTURE(rows, k, static_cast<int>(order));
      const Tensor x = make(b, {rows, k}, b.act(), rows_of(rng, rows, k));
      Values scale = normal(rng, k);
      for (double& v : scale) v = static_cast<float>(1 + 0.1 * v);
      const Tensor w = make(b, {k}, b.real(), scale);
      const double eps = 1e-5;
      const Tensor y = b.empty({rows, k}, b.act()), inv_rms = b.empty({rows}, b.real());
      b.rms_norm(y, inv_rms, x, w, eps);
      // The normed row, from the fused op itself: within one unit in the last place. Only with the
      // same number of positions are the squares added in the same order.
      const LinearFormat plain = site(rng, k, 32, {}, order);
      const std::vector<int32_t> positions = plain.channel_order().positions();
      const OperandSpec plain_spec = engine::upload_operand(b, plain);
      const Outputs unquantized(b, plain_spec, rows);
      const Guarded r(b, {rows}, b.real());
      b.rms_norm_operand(unquantized.rows(), r.tensor(), x, w, eps, plain_spec);
      const Values gathered = unquantized.made().x, want = values_of(b, y);
      Values normed;
      for (int64_t i = 0; i < rows; ++i)
        for (const int32_t position : positions)
          normed.push_back(gathered[static_cast<size_t>(i * plain.stored_k() + position)]);
      int64_t off = 0, far = 0;  // counted: an assertion for every element would fill the report
      for (size_t i = 0; i < normed.size(); ++i) {
        far += std::abs(normed[i] - want[i]) > 2 * epsilon_of(b.act()) * std::abs(want[i]);
        off += normed[i] != want[i];
      }
      CHECK(far == 0);
      CHECK(off <= static_cast<int64_t>(normed.size()) / 100 + 1);
      CHECK(relative_error(values_of(b, r.tensor()), values_of(b, inv_rms)) <=
            4 * epsilon_of(b.real()));
      CHECK(r.untouched());
      // From there on, all is the operand of that row.
      for (const InputGrid input :
           {InputGrid{.bits = 2, .range = RangeRule::Search},
            InputGrid{.bits = 4, .hadamard = true}, InputGrid{.bits = 16, .hadamard = true}}) {
        LinearFormat format = plain;
        format.input = input;
        format.input.outliers = plain.input.outliers;
        const OperandSpec spec = engine::upload_operand(b, format);
        const Outputs out(b, spec, rows);
        b.rms_norm_operand(out.rows(), r.tensor(), x, w, eps, spec);
        check_same(b, out.made(), run_operand(b, format, normed, rows), format);
      }
    }
}

TEST_CASE("swiglu_operand is the operand of swiglu, bit for bit", "[operand][fused]") {
  engine::Rng rng(92);
  Backend& b = backend();
  for (const auto& [rows, k] : kFusedSizes)
    for (const Order order : {Order::None, Order::Both})
      for (const InputGrid input : {InputGrid{.bits = 2, .range = RangeRule::Search},
                                    InputGrid{.bits = 4, .hadamard = true}, InputGrid{}}) {
        CAPTURE(rows, k, static_cast<int>(order), input.bits);
        const Tensor gate = make(b, {rows, k}, b.act(), activations(rng, rows * k, 3.0));
        const Tensor up = make(b, {rows, k}, b.act(), activations(rng, rows * k));
        const Tensor h = b.empty({rows, k}, b.act());
        b.swiglu(h, gate, up);
        const LinearFormat format = site(rng, k, 32, input, order);
        const OperandSpec spec = engine::upload_operand(b, format);
        const Outputs out(b, spec, rows), want(b, spec, rows);
        b.swiglu_operand(out.rows(), gate, up, spec);
        b.operand(want.rows(), h, spec);
        check_same(b, out.made(), want.made(), format);
      }
}

TEST_CASE("swiglu_operand_backward continues to gate and up without rounding", "[operand][fused]") {
  engine::Rng rng(93);
  for (Backend* on : {&backend(), &oracle_f64()})
    for (const auto& [rows, k] : kFusedSizes)
      for (const Order order : {Order::None, Order::Both})
        for (const bool in_place : {false, true}) {
          Backend& b = *on;
          if (&b == &oracle_f64() && rows * k > 100000) continue;
          CAPTURE(rows, k, static_cast<int>(order), in_place, &b == &oracle_f64());
          const LinearFormat format =
              site(rng, k, 32, {.bits = 2, .hadamard = order == Order::None}, order);
          const OperandSpec spec = engine::upload_operand(b, format);
          const int64_t columns = format.stored_k();
          const Values g = round_bf16(normal(rng, rows * k)), u = round_bf16(normal(rng, rows * k));
          const Values d = round_bf16(normal(rng, rows * columns));
          Bytes mask(static_cast<size_t>(rows * columns / 8));
          for (uint8_t& byte : mask) byte = static_cast<uint8_t>(rng.below(256) & rng.below(256));
          const auto run = [&](Backend& to, Values& dgate, Values& dup) {
            const Tensor gate = make(to, {rows, k}, to.act(), g),
                         up = make(to, {rows, k}, to.act(), u);
            const Guarded first(to, {rows, k}, to.act()), second(to, {rows, k}, to.act());
            const Tensor to_gate = in_place ? gate : first.tensor();
            const Tensor to_up = in_place ? up : second.tensor();
            to.swiglu_operand_backward(to_gate, to_up, make(to, {rows, columns}, to.act(), d),
                                       make_bytes(to, {rows, columns / 8}, mask), gate, up,
                                       engine::upload_operand(to, format));
            dgate = values_of(to, to_gate), dup = values_of(to, to_up);
            CHECK((first.untouched() && second.untouched()));
          };
          Values dgate, dup;
          run(b, dgate, dup);
          // dh by the CPU in F64, then the formula.
          const Tensor dh = oracle_f64().empty({rows, k}, DType::F64);
          oracle_f64().operand_backward(dh, make(oracle_f64(), {rows, columns}, DType::F64, d),
                                        make_bytes(oracle_f64(), {rows, columns / 8}, mask),
                                        engine::upload_operand(oracle_f64(), format));
          Values want_gate, want_up;
          const Values h = values_of(oracle_f64(), dh);
          for (size_t i = 0; i < h.size(); ++i) {
            const double s = 1 / (1 + std::exp(-g[i]));
            want_up.push_back(h[i] * g[i] * s);
            want_gate.push_back(h[i] * u[i] * s * (1 + g[i] * (1 - s)));
          }
          // One rounding to act, a few of FP32 before.
          const double tolerance = epsilon_of(b.act()) + 16 * epsilon_of(b.real());
          CHECK(relative_error(dgate, want_gate) <= tolerance);
          CHECK(relative_error(dup, want_up) <= tolerance);
        }
}

// --- gradients
// ------------------------------------------------------------------------------------

TEST_CASE("operand: the straight-through gradient is its formula", "[operand][gradient]") {
  engine::Rng rng(94);
  Backend& b = backend();
  for (const bool hadamard : {false, true})
    for (const SplitSide side : {SplitSide::Weight, SplitSide::Activation})
      for (const RangeRule range : {RangeRule::MinMax, RangeRule::Search}) {
        CAPTURE(hadamard, side == SplitSide::Activation, range == RangeRule::Search);
        const int group = 32;
        const LinearFormat format = site(
            rng, 576, group, {.bits = 2, .range = range, .hadamard = hadamard}, Order::Both, side);
        const ChannelOrder order = format.channel_order();
        const int64_t rows = 6, columns = format.stored_k();
        const Made made = run_operand(b, format, rows_of(rng, rows, format.k), rows);
        const auto set = std::count_if(made.clipped.begin(), made.clipped.end(),
                                       [](uint8_t byte) { return byte != 0; });
        if (range == RangeRule::Search) CHECK(set > 0);
        const Values dout = round_bf16(normal(rng, rows * columns));
        const Tensor dx = b.empty({rows, format.k}, b.act());
        b.operand_backward(dx, make(b, {rows, columns}, b.act(), dout),
                           make_bytes(b, {rows, columns / 8}, made.clipped),
                           engine::upload_operand(b, format));
        // dx[c] = sum over the positions p of c of f[p] sum_q H[p, q] m[q] dout[q].
        Values want(static_cast<size_t>(rows * format.k), 0.0);
        for (int64_t row = 0; row < rows; ++row) {
          const auto masked = [&](int64_t p) {
            const auto at = static_cast<size_t>(row * columns + p);
            return made.clipped[at / 8] >> (at % 8) & 1 ? 0.0 : dout[at];
          };
          for (int64_t p = 0; p < columns; ++p) {
            const int32_t channel = order.channels()[static_cast<size_t>(p)];
            if (channel < 0) continue;
            double d = 0;
            if (hadamard && p >= order.rotated_begin() && p < order.rotated_end()) {
              const int64_t begin = p / group * group;
              for (int64_t j = 0; j < group; ++j)
                d += (std::popcount(static_cast<uint64_t>((p - begin) & j)) % 2 == 0 ? 1 : -1) *
                     masked(begin + j) / 8;
            } else {
              d = masked(p);
            }
            const bool half =
                side == SplitSide::Activation && p >= order.pairs_begin() && p < order.pairs_end();
            want[static_cast<size_t>(row * format.k + channel)] += half ? d / 2 : d;
          }
        }
        CHECK(relative_error(values_of(b, dx), want) <=
              epsilon_of(b.act()) + 4 * epsilon_of(b.real()));
      }
}

TEST_CASE("operand: gradients by central differences, unrounded", "[operand][gradient]") {
  engine::Rng rng(95);
  Backend& b = oracle_f64();
  for (const bool hadamard : {false, true})
    for (const SplitSide side : {SplitSide::Weight, SplitSide::Activation}) {
      CAPTURE(hadamard, side == SplitSide::Activation);
      const LinearFormat format =
          site(rng, 160, 32, {.bits = 2, .hadamard = hadamard}, Order::Both, side);
      OperandSpec spec = engine::upload_operand(b, format);
      spec.rounding = Rounding::Identity;
      const int64_t rows = 2, k = format.k, columns = format.stored_k();
      Values gate = normal(rng, rows * k), up = normal(rng, rows * k);
      const Values c = normal(rng, rows * columns);
      const Tensor clipped = b.empty({rows, columns / 8}, DType::U8);
      const auto loss = [&] {
        const Tensor x = b.empty({rows, columns}, b.act());
        b.swiglu_operand(rows_in(x, clipped), make(b, {rows, k}, b.act(), gate),
                         make(b, {rows, k}, b.act(), up), spec);
        return dot(values_of(b, x), c);
      };
      loss();
      const Tensor dgate = b.empty({rows, k}, b.act()), dup = b.empty({rows, k}, b.act());
      b.swiglu_operand_backward(dgate, dup, make(b, {rows, columns}, b.act(), c), clipped,
                                make(b, {rows, k}, b.act(), gate), make(b, {rows, k}, b.act(), up),
                                spec);
      const auto differences = [&](Values& at) {
        constexpr double kStep = 1e-5;
        Values d;
        for (double& v : at) {
          const double before = v;
          v = before + kStep;
          const double above = loss();
          v = before - kStep;
          d.push_back((above - loss()) / (2 * kStep));
          v = before;
        }
        return d;
      };
      CHECK(relative_error(values_of(b, dgate), differences(gate)) <= 1e-7);
      CHECK(relative_error(values_of(b, dup), differences(up)) <= 1e-7);
    }
}

// --- moments
// --------------------------------------------------------------------------------------

TEST_CASE("channel_moments adds the moments of each channel", "[moments]") {
  engine::Rng rng(96);
  Backend& b = backend();
  const std::pair<int64_t, int64_t> sizes[] = {{1, 32}, {31, 96},   {33, 577},  {300, 576},
                                               {5, 1},  {2000, 64}, {129, 130}, {40, 11008}};
  for (const auto& [rows, k] : sizes) {
    CAPTURE(rows, k);
    const Guarded moments(b, {Backend::kMoments, k}, DType::F64);
    b.zero(moments.tensor());
    Values want(static_cast<size_t>(Backend::kMoments * k), 0.0), sizes_of = want;
    Bytes last;
    for (int call = 0; call < 3; ++call) {  // the last one repeats
      const Values x = rows_of(rng, rows, k);
      const Tensor input = make(b, {rows, k}, b.act(), x);
      const Tensor again = b.empty({Backend::kMoments, k}, DType::F64);
      b.copy(again, moments.tensor());
      b.channel_moments(moments.tensor(), input);
      b.channel_moments(again, input);
      CHECK(bytes_of(b, again) == bytes_of(b, moments.tensor()));
      for (size_t i = 0; i < x.size(); ++i) {
        const size_t c = i % static_cast<size_t>(k);
        const double v = x[i];
        for (size_t m = 0; m < 4; ++m) {
          const double term = std::pow(v, static_cast<double>(m + 1));
          want[m * static_cast<size_t>(k) + c] += term;
          sizes_of[m * static_cast<size_t>(k) + c] += std::abs(term);
        }
        double& largest = want[4 * static_cast<size_t>(k) + c];
        largest = std::max(largest, std::abs(v));
      }
    }
    const Values got = values_of(b, moments.tensor());
    for (size_t i = 0; i < got.size(); ++i) {
      INFO("moment " << i / static_cast<size_t>(k) + 1 << " of channel "
                     << i % static_cast<size_t>(k));
      REQUIRE(std::abs(got[i] - want[i]) <= 4 * static_cast<double>(rows) * 0x1p-52 * sizes_of[i]);
    }
    CHECK(moments.untouched());
  }
}

TEST_CASE("range ratios are the nearest FP32", "[operand]") {
  const float want[] = {1.0f, 0.9f, 0.8f, 0.7f, 0.6f, 0.5f};
  for (int i = 0; i < quant::kRangeRatios; ++i) {
    CHECK(quant::range_ratio<float>(i) == want[i]);
    CHECK(quant::range_ratio<double>(i) == double{want[i]});
  }
}

}  // namespace
}  // namespace bbb::tests
