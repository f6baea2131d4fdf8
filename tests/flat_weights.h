// Flat buffers of a few parameters and of the quantizer's outputs, laid out like a model's, with
// poisoned guards around every output.
#pragma once

#include <catch2/catch.hpp>
#include <vector>

#include "quant/grid.h"
#include "tests/support.h"

namespace bbb::tests {

struct FlatParameter {
  int64_t count;  // elements; whole groups, except for a norm
  int bits;       // quant::kNotQuantized for a norm
  quant::SlotRule<double> rule = {};
};

struct FlatWeights {
  static int64_t padded(const std::vector<FlatParameter>& parameters) {
    int64_t total = 0;
    for (const FlatParameter& p : parameters) total += quant::padded_elements(p.count);
    return total;
  }

  FlatWeights(Backend& b, std::vector<FlatParameter> of, int group,
              engine::Rounding rounding = engine::Rounding::Nearest)
      : backend(b),
        parameters(std::move(of)),
        total(padded(parameters)),
        slots(static_cast<int64_t>(parameters.size())),
        w(b, {total}, b.real()),
        max_range(b, {slots}, b.real()),
        s(b, {slots}, b.real()),
        prequantized(b, {slots}, b.real()),
        clipped(b, {total / 8}, DType::U8),
        wq(b, {total}, b.act()),
        e(b, {total / group}, DType::U8),
        z(b, {total / group}, DType::U8) {
    for (const Guarded* out : {&w, &max_range, &s, &prequantized, &clipped, &wq, &e, &z})
      b.zero(out->tensor());
    std::vector<int64_t> counts;
    for (const FlatParameter& p : parameters) {
      begins.push_back(counts.empty() ? 0 : begins.back() + quant::padded_elements(counts.back()));
      counts.push_back(p.count);
    }
    const std::vector<quant::WeightTile> tiles = quant::make_tiles(counts);
    table.tiles = b.empty({static_cast<int64_t>(tiles.size()), 4}, DType::I32);
    b.upload(table.tiles, tiles.data());
    std::vector<double> rules;
    std::vector<int32_t> bits;
    for (const FlatParameter& p : parameters) {
      rules.insert(rules.end(), {p.rule.lr_factor, p.rule.decay, p.rule.direct});
      bits.push_back(p.bits);
    }
    table.slots = make(b, {slots, 3}, b.real(), rules);
    q = {.tiles = table.tiles,
         .bits = make_ids(b, {slots}, bits),
         .max_range = max_range.tensor(),
         .s = s.tensor(),
         .prequantized = prequantized.tensor(),
         .clipped = clipped.tensor(),
         .wq = wq.tensor(),
         .e = e.tensor(),
         .z = z.tensor(),
         .ratios = Tensor(),
         .group = group,
         .rounding = rounding};
  }

  // Writes the values of one parameter into `flat`: the masters or another buffer of their layout.
  void set(const Tensor& flat, size_t parameter, const std::vector<double>& values) const {
    backend.copy(flat.slice(begins[parameter], parameters[parameter].count),
                 make(backend, {parameters[parameter].count}, backend.real(), values));
  }

  // From now on every group has a range ratio, drawn at random.
  void draw_ratios(engine::Rng& rng) {
    std::vector<uint8_t> ratios(static_cast<size_t>(total / q.group));
    for (uint8_t& ratio : ratios) ratio = static_cast<uint8_t>(rng.below(quant::kRangeRatios));
    q.ratios = make_bytes(backend, {total / q.group}, ratios);
  }

  // Everything that max_group_range and fake_quant write for the masters w, by these names.
  static constexpr const char* kQuantized[] = {"max_range", "s", "wq", "e", "z", "clipped"};
  std::vector<std::vector<double>> quantized() const {
    backend.max_group_range(q, w.tensor());
    backend.fake_quant(q, w.tensor());
    CHECK(untouched());
    std::vector<std::vector<double>> made;
    for (const Guarded* reals : {&max_range, &s, &wq})
      made.push_back(values_of(backend, reals->tensor()));
    for (const Guarded* bytes : {&e, &z, &clipped}) {
      const std::vector<uint8_t> all = bytes_of(backend, bytes->tensor());
      made.emplace_back(all.begin(), all.end());
    }
    return made;
  }

  bool untouched() const {
    for (const Guarded* out : {&w, &max_range, &s, &prequantized, &clipped, &wq, &e, &z})
      if (!out->untouched()) return false;
    return true;
  }

  Backend& backend;
  std::vector<FlatParameter> parameters;
  std::vector<int64_t> begins;  // first element of each
  int64_t total, slots;
  Guarded w, max_range, s, prequantized, clipped, wq, e, z;
  engine::ParameterTable table;
  engine::QuantizedWeights q;
};

inline bool bit_of(const std::vector<uint8_t>& bits, size_t i) {
  return bits[i / 8] >> (i % 8) & 1;
}

}  // namespace bbb::tests
