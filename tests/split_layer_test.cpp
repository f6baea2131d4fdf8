// Layers with a channel order, rotation and quantized activations: in full precision they compute
// what they did without, and packed products equal those of training.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <memory>

#include "models/llama.h"
#include "models/site_statistics.h"
#include "tests/formats.h"
#include "tests/support.h"
#include "tests/tiny_model.h"

namespace bbb::tests {
namespace {

using autograd::GradientPasses;
using autograd::Tape;
using autograd::TapeMode;
using autograd::Var;
using models::LayerResult;
using models::LinearResult;
using models::QuantLinear;
using quant::LinearFormat;

engine::PackedWeight pack(Backend& device, const LinearResult& result) {
  return engine::upload_packed(device, result.format, [&](const quant::StoredTensor& t) {
    return result.part(t.part).data();
  });
}

// A linear that trains in this format, and the same exported.
struct Pair {
  static constexpr int64_t kN = 40;
  Backend& device;
  LinearFormat format;
  autograd::ParameterSet set;
  std::optional<autograd::WeightQuantizer> quantizer;
  QuantLinear trained, packed;
  models::Operand training, packing;  // operands

  Pair(Backend& backend, const LinearFormat& of)
      : device(backend),
        format(of),
        set(backend, GradientPasses::One),
        trained(backend, "trained", of.n, of.k),
        packed(backend, "packed", of.n, of.k) {
    autograd::Parameter& master = set.add("w", {of.n, of.stored_k()});
    set.allocate();
    quantizer.emplace(set, of.weight.group);
    trained.set_trained(*quantizer, master, of);
    engine::Rng rng(21);
    LinearResult plain;
    plain.format = plain_format(of.n, of.k, quant::kNoQuantizer);
    for (const double w : normal(rng, of.n * of.k, 0.05))
      plain.master.push_back(static_cast<float>(w));
    trained.set_master(models::start_stage(plain, of, {}, quant::RangeRule::MinMax, 0));
    quantizer->prepare();
    packed.set_packed(pack(device, trained.quantized()),
                      device.empty({of.n * of.stored_k()}, device.act()));
    training.set(device, of, false);
    packing.set(device, of, true);
  }

  std::vector<double> run(QuantLinear& linear, const models::Operand& operand, const Var& x) {
    Tape tape(device, TapeMode::Inference);
    return values_of(device, linear.forward(tape, operand.plain(tape, x), Var()).value());
  }
};

Var input(Backend& device, int64_t rows, int64_t k) {
  engine::Rng rng(static_cast<uint64_t>(rows));
  std::vector<double> x = normal(rng, rows * k);
  for (int64_t row = 0; row < rows; ++row) x[row * k + 1] *= 20;  // a channel of its own size
  return Var(make(device, {1, rows, k}, device.act(), round_bf16(x)));
}

// For two FP32 sums of the same K terms in other orders, each rounded to bf16 once. They differ by
// about K 2^-24 of their size. Where a tie is that near, the two are rounded to different sides: at
// K = 640 by a share of K 2^-16 = 1 / 102 of the outputs. Such a flip costs 1 to 2 epsilon, all of
// them 2 sqrt(1 / 102) = 0.2 epsilon of the norm. Activations in 16-bit integers move sums by
// 2^-15 and flip as many.
const double kFlips = epsilon_of(DType::BF16) / 4;

}  // namespace

TEST_CASE("split layer: in full precision a block computes what it did without an order",
          "[split_layer]") {
  Backend& device = backend();
  const models::LlamaConfig config = tiny_config();
  const TempDir dir;
  write_tiny_model(dir.path(), config, 3);
  const auto source = models::open_checkpoint(dir.path());
  const LayerResult original = models::full_precision(*source, 1);
  const Tensor inv_freq =
      models::upload_as(device, models::rope_inv_freq(config), {config.head_dim / 2}, DType::F32);
  const Var x = input(device, 11, config.d_model);
  const auto output = [&](models::LlamaBlock& block) {
    Tape tape(device, TapeMode::Inference);
    return values_of(device, block.forward(tape, x, nullptr, models::Recompute::None).value());
  };
  models::LlamaBlock exact(device, config, 1, inv_freq);
  exact.set_float(original);
  const std::vector<double> expected = output(exact);

  for (const Layout& layout : kLayouts) {
    CAPTURE(layout.name);
    std::vector<LinearFormat> formats = block_formats(config, quant::kNoQuantizer);
    for (LinearFormat& format : formats) lay_out(format, layout);
    autograd::ParameterSet set(device, GradientPasses::One);
    models::LlamaBlock block(device, config, 1, inv_freq);
    block.declare_parameters(set, formats);
    set.allocate();
    autograd::WeightQuantizer quantizer(set, layout.group);
    block.bind_parameters(quantizer, formats);
    block.set_masters(
        models::start_stage(config, original, formats, {}, quant::RangeRule::MinMax, 0));
    quantizer.prepare();
    // The products are summed in another order, through four sites. In bf16 operands and halves
    // are exact, but for rotated values, which are rounded once.
    const double tolerance = device.act() == DType::BF16
                                 ? (layout.hadamard ? 2 : 1) * epsilon_of(DType::BF16)
                                 : 32 * epsilon_of(DType::F32);
    CHECK(relative_error(output(block), expected) < tolerance);
  }
}

TEST_CASE("split layer: packed products equal those of training, with every order",
          "[split_layer]") {
  Backend& device = backend();
  const auto check = [&](const Layout& layout, int64_t k) {
    for (const int bits : {2, 3, 4}) {
      CAPTURE(layout.name, k, bits);
      LinearFormat format = plain_format(Pair::kN, k, bits);
      lay_out(format, layout);
      Pair pair(device, format);
      for (const int64_t rows : {int64_t{1}, int64_t{5}, Backend::kMaxPackedRows + 9}) {
        CAPTURE(rows);
        const Var x = input(device, rows, format.k);
        const auto actual = pair.run(pair.packed, pair.packing, x),
                   expected = pair.run(pair.trained, pair.training, x);
        if (rows > device.max_packed_rows(format))
          CHECK(actual == expected);  // the unpacked weight goes through the same product
        else  // on the CPU activations are rounded to 16 bits (numerics.md section 2)
          CHECK(relative_error(actual, expected) < (device.act() == DType::BF16 ? kFlips : 1e-4));
      }
    }
  };
  for (const Layout& layout : kLayouts) {
    check(layout, 160);
    // SmolLM2's width, which is no multiple of 128.
    if (layout.group == 128) check(layout, 576);
  }
}

TEST_CASE("split layer: products of quantized activations are exact but for their sums",
          "[split_layer]") {
  Backend& device = backend();
  for (const Layout& layout : kLayouts)
    for (const int bits : {2, 4, 8})
      for (const auto range : {quant::RangeRule::MinMax, quant::RangeRule::Search}) {
        CAPTURE(layout.name, bits, range == quant::RangeRule::Search);
        LinearFormat format = plain_format(Pair::kN, 160, 2);
        lay_out(format, layout);
        format.input.bits = bits;
        format.input.range = range;
        Pair pair(device, format);
        const int64_t columns = format.stored_k(), groups = format.groups();

        for (const int64_t rows : {int64_t{1}, int64_t{5}, Backend::kMaxPackedRows + 9}) {
          CAPTURE(rows);
          const Var x = input(device, rows, format.k);
          Tape tape(device, TapeMode::Inference);
          const auto operand = values_of(device, pair.training.plain(tape, x).x.value());
          const auto actual = pair.run(pair.packed, pair.packing, x),
                     training = pair.run(pair.trained, pair.training, x);
          if (rows > Backend::kMaxPackedRows) {  // bf16 operands: only the order of sums differs
            if (device.max_packed_rows(format) == Backend::kAnyRows)
              CHECK(relative_error(actual, training) < kFlips);
            else
              CHECK(actual == training);
            continue;
          }
          // The weight in stored positions: an identity times it.
          std::vector<double> identity(static_cast<size_t>(columns * columns), 0.0);
          for (int64_t i = 0; i < columns; ++i) identity[i * columns + i] = 1;
          const auto transposed = values_of(
              device,
              pair.trained
                  .forward(tape,
                           input_of(Var(make(device, {columns, columns}, device.act(), identity))),
                           Var())
                  .value());
          int64_t packed_worse = 0, training_worse = 0;
          for (int64_t m = 0; m < rows; ++m)
            for (int64_t n = 0; n < format.n; ++n) {
              double sum = 0, magnitudes = 0;
              for (int64_t p = 0; p < columns; ++p) {
                const double term = operand[m * columns + p] * transposed[p * format.n + n];
                sum += term;
                magnitudes += std::abs(term);
              }
              // Sums of groups are exact integers; those, and S at the end, round. A product of
              // values rounds every sum. The output is then rounded to act. The values themselves
              // are rounded to act, too, which changes those of 8 bits.
              const auto off = [&](double y, int64_t roundings, double rounded) {
                const double output = (std::abs(sum) + rounded) * epsilon_of(device.act());
                return std::abs(y - sum) >
                       std::exp2(-24) * static_cast<double>(roundings) * magnitudes + output;
              };
              const size_t at = static_cast<size_t>(m * format.n + n);
              packed_worse += off(actual[at], groups + 1, bits == 8 ? magnitudes : 0.0);
              training_worse += off(training[at], columns + 1, 0.0);
            }
          CHECK(packed_worse == 0);
          CHECK(training_worse == 0);
        }
      }
}

}  // namespace bbb::tests
