// LC (numerics.md section 8): the ops against dense matrices, gradients by central differences, and
// the packed road (operand, codes, output) against the weight that training multiplies.
#include "quant/lc.h"

#include <bit>
#include <catch2/catch.hpp>
#include <cmath>

#include "data/half.h"
#include "tests/op_test.h"

namespace bbb::tests {
namespace {

using engine::LcWeight;
using engine::Write;
using quant::LcGradient;
using quant::LcRule;
using quant::Rounding;
using Values = std::vector<double>;

struct Sizes {
  int64_t n, k;
};
// Every pair of blocks of 128, 64 and 32, and several blocks a side.
const std::vector<Sizes> kSizes = {{128, 128}, {128, 64}, {128, 32},  {64, 128}, {64, 64},
                                   {64, 32},   {32, 128}, {32, 64},   {32, 32},  {192, 320},
                                   {256, 384}, {96, 160}, {384, 192}, {160, 256}};

// The matrix of `features` values: H of every block, by the signs (-1)^popcount(i & j).
Values hadamard_matrix(int64_t features) {
  const int64_t block = quant::lc_block(features);
  Values h(static_cast<size_t>(features * features));
  for (int64_t i = 0; i < features; ++i)
    for (int64_t j = i / block * block; j < (i / block + 1) * block; ++j)
      h[static_cast<size_t>(i * features + j)] =
          (std::popcount(static_cast<uint64_t>((i % block) & (j % block))) % 2 == 0 ? 1 : -1) /
          std::sqrt(static_cast<double>(block));
  return h;
}

// a (m, k) b (k, n).
Values product(const Values& a, const Values& b, int64_t m, int64_t k, int64_t n) {
  Values out(static_cast<size_t>(m * n));
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < k; ++j)
      for (int64_t c = 0; c < n; ++c)
        out[static_cast<size_t>(i * n + c)] +=
            a[static_cast<size_t>(i * k + j)] * b[static_cast<size_t>(j * n + c)];
  return out;
}

struct Host {
  int64_t n, k;
  Values latent, u, v, map;
  LcRule rule;

  Host(Sizes sizes, LcRule with, uint64_t seed = 5) : n(sizes.n), k(sizes.k), rule(with) {
    engine::Rng rng(seed);
    rule.spread = quant::lc_spread(n, k);
    const auto floats = [&](int64_t count, double scale) {
      Values values = normal(rng, count, scale);
      for (double& value : values) value = static_cast<float>(value);
      return values;
    };
    latent = floats(n * k, 1.2 / rule.spread);
    u = floats(k, 0.3);
    v = floats(n, 0.3);
    map = floats(quant::kLcMapSize, 0.7);
  }
  LcWeight on(Backend& b) const {
    return {make(b, {n, k}, b.real(), latent), make(b, {k}, b.real(), u), make(b, {n}, b.real(), v),
            make(b, {quant::kLcVector, 5}, b.real(), map), rule};
  }
  double scale(double x) const { return quant::lc_scale(x, rule.rounding); }

  // W^ (N, K).
  Values levels() const {
    Values out(latent.size());
    for (size_t i = 0; i < out.size(); i += 4)
      for (size_t row = 0; row < 4; ++row) {
        out[i + row] = map[row * 5 + 4];
        for (size_t j = 0; j < 4; ++j)
          out[i + row] += map[row * 5 + j] * quant::lc_code(position(i + j), rule);
      }
    return out;
  }
  // In F32, as every backend of real F32 computes it: a code on a threshold is the same everywhere.
  double position(size_t i) const {
    if (rule.rounding == Rounding::Identity) return quant::lc_position(latent[i], rule);
    return quant::lc_position(static_cast<float>(latent[i]), rule);
  }
  Values weight() const {
    Values w = product(product(hadamard_matrix(n), levels(), n, n, k), hadamard_matrix(k), n, k, k);
    for (size_t i = 0; i < w.size(); ++i)
      w[i] *= scale(v[i / static_cast<size_t>(k)]) * scale(u[i % static_cast<size_t>(k)]);
    return w;
  }
};

struct Gradients {
  Values latent, u, v, map;
};

Gradients backward(Backend& b, const Host& host, const Values& dw, DType dtype) {
  const LcWeight from = host.on(b);
  const Tensor w = b.empty({host.n, host.k}, b.act());
  b.lc_weight(w, from);
  const Guarded dlatent(b, {host.n, host.k}, dtype), dv(b, {host.n}, dtype);
  const Tensor du = b.empty({host.k}, b.real()), dmap = b.zeros({4, 5}, b.real());
  const Tensor gradient = make(b, {host.n, host.k}, dtype, dw);
  b.input_scale_gradient(du, from.u, w, Tensor(), gradient, Write::Overwrite);
  b.lc_weight_backward(dlatent.tensor(), dv.tensor(), dmap, gradient, w, from, Write::Add);
  CHECK(dlatent.untouched());
  CHECK(dv.untouched());
  const Gradients out{values_of(b, dlatent.tensor()), values_of(b, du), values_of(b, dv.tensor()),
                      values_of(b, dmap)};
  // In place, and the map added to twice.
  b.lc_weight_backward(gradient, dv.tensor(), dmap, gradient, w, from, Write::Add);
  CHECK(values_of(b, gradient) == out.latent);
  Values twice = out.map;
  for (double& value : twice) value *= 2;
  CHECK(relative_error(values_of(b, dmap), twice) < 4 * real_epsilon());
  return out;
}

}  // namespace

TEST_CASE("LC rounds u and v like F16, but never to 0", "[lc]") {
  for (uint32_t code = 0; code < 0x7C00; ++code) {
    const float value = data::half_to_float(static_cast<uint16_t>(code)),
                next = data::half_to_float(static_cast<uint16_t>(code + 1));
    const float middle = code == 0x7BFF ? 65520.0f : (value + next) / 2;
    for (const float x : {value, middle, std::nextafter(middle, 0.0f),
                          std::nextafter(middle, 1e30f), -value, -middle}) {
      float want = data::half_to_float(data::float_to_half(x));
      if (want == 0) want = std::copysign(0x1p-24f, x);
      if (quant::lc_half(x) != want) FAIL(x << " became " << quant::lc_half(x));
    }
  }
  CHECK(std::isnan(quant::lc_half(std::nanf(""))));
}

TEST_CASE("LC's slope is that of the smooth step, capped, or straight", "[lc]") {
  const LcRule dge;
  const auto step = [](double a) {  // the smooth step, between thresholds 1/2, 3/2 and 5/2
    const double low = std::clamp(std::floor(a), 0.0, 2.0), z = 2 * (a - low) - 1;
    return low + (1 + std::copysign(std::pow(std::abs(z), 0.2), z)) / 2;
  };
  for (const double a : {-2.3, -0.4, 0.1, 0.3, 0.9, 1.2, 1.8, 2.05, 2.9, 3.4, 3.5, 4.2}) {
    CAPTURE(a);
    const double h = 1e-6;
    const double want = (step(a + h) - step(a - h)) / (2 * h);
    CHECK(std::abs(quant::lc_slope(a, dge) - want) < 1e-7 * std::max(1.0, want));
  }
  for (const double a : {0.5, 1.5, 2.5, 0.51, 1.495}) CHECK(quant::lc_slope(a, dge) == 3);
  CHECK(quant::lc_slope(3.5, dge) < 0.2);  // nothing switches there
  const LcRule straight{.gradient = LcGradient::Straight};
  for (const double a : {-0.5, 0.0, 1.7, 3.49}) CHECK(quant::lc_slope(a, straight) == 1);
  for (const double a : {-0.51, 3.5, 7.0}) CHECK(quant::lc_slope(a, straight) == 0);
}

TEST_CASE("LC's weight equals the dense formula, on every device to the bit", "[lc]") {
  for (const Sizes& sizes : kSizes) {
    CAPTURE(sizes.n, sizes.k);
    const Host host(sizes, {});
    const auto weight_on = [&](Backend& b) {
      const Guarded w(b, {host.n, host.k}, b.act());
      b.lc_weight(w.tensor(), host.on(b));
      CHECK(w.untouched());
      return values_of(b, w.tensor());
    };
    const Values single = weight_on(oracle());
    CHECK(relative_error(single, host.weight()) < 1e-6);
    const Values got = weight_on(backend());
    CHECK(got == (backend().act() == DType::BF16 ? round_bf16(single) : single));
  }
}

TEST_CASE("LC's gradients are differences of its weight", "[lc]") {
  Backend& b = oracle_f64();
  for (const Sizes& sizes : {Sizes{32, 32}, Sizes{32, 64}, Sizes{96, 32}}) {
    CAPTURE(sizes.n, sizes.k);
    Host host(sizes, {.rounding = Rounding::Identity});
    engine::Rng rng(9);
    const Values dw = normal(rng, host.n * host.k);
    const Gradients got = backward(b, host, dw, b.real());
    const auto loss = [&] {
      const Tensor w = b.empty({host.n, host.k}, b.act());
      b.lc_weight(w, host.on(b));
      const Values values = values_of(b, w);
      double sum = 0;
      for (size_t i = 0; i < values.size(); ++i) sum += values[i] * dw[i];
      return sum;
    };
    const auto check = [&](Values& values, const Values& gradient, size_t stride) {
      Values want, found;
      for (size_t i = 0; i < values.size(); i += stride) {
        const double x = values[i], h = 1e-4;
        values[i] = x + h;
        const double above = loss();
        values[i] = x - h;
        want.push_back((above - loss()) / (2 * h));
        found.push_back(gradient[i]);
        values[i] = x;
      }
      CHECK(relative_error(found, want) < 1e-7);
    };
    check(host.latent, got.latent, 41);
    check(host.u, got.u, 1);
    check(host.v, got.v, 1);
    check(host.map, got.map, 1);
  }
}

// With rounding: dq = A^T (H diag(v) dW diag(u) H), dl = t slope dq, and the map's gradient sees q.
TEST_CASE("LC's rounded gradients equal their formula", "[lc]") {
  for (const LcGradient gradient : {LcGradient::Dge, LcGradient::Straight})
    for (const Sizes& sizes : kSizes)
      for (const DType dtype : gradient_dtypes()) {
        CAPTURE(sizes.n, sizes.k, name_of(dtype));
        const Host host(sizes, {.gradient = gradient});
        engine::Rng rng(11);
        const Values dw = activations(rng, host.n * host.k);
        Values scaled = dw, dlatent(dw.size()), dmap(20), dv(static_cast<size_t>(host.n)),
               du(static_cast<size_t>(host.k));
        const Values weight = host.weight();
        for (size_t i = 0; i < dw.size(); ++i) {
          const size_t row = i / static_cast<size_t>(host.k),
                       column = i % static_cast<size_t>(host.k);
          const double u = host.scale(host.u[column]), v = host.scale(host.v[row]);
          scaled[i] *= u * v;
          dv[row] += dw[i] * weight[i] / v;
          du[column] += dw[i] * weight[i] / u;
        }
        const Values dlevels =
            product(product(hadamard_matrix(host.n), scaled, host.n, host.n, host.k),
                    hadamard_matrix(host.k), host.n, host.k, host.k);
        for (size_t i = 0; i < dw.size(); i += 4)
          for (size_t j = 0; j < 4; ++j) {
            const double a = host.position(i + j), q = quant::lc_code(a, host.rule);
            for (size_t row = 0; row < 4; ++row) {
              dlatent[i + j] += host.map[row * 5 + j] * dlevels[i + row];
              dmap[row * 5 + j] += dlevels[i + row] * q;
            }
            dlatent[i + j] *= double{host.rule.spread} * quant::lc_slope(a, host.rule);
            dmap[j * 5 + 4] += dlevels[i + j];
          }
        const Gradients got = backward(backend(), host, dw, dtype);
        // dw and w are rounded to act; sums of many terms of either sign.
        CHECK(relative_error(got.latent, dlatent) < 4 * epsilon_of(dtype) + 1e-5);
        CHECK(relative_error(got.v, dv) < 4 * act_epsilon() + 1e-5);
        CHECK(relative_error(got.u, du) < 4 * act_epsilon() + 1e-3);  // by u, not its rounding
        CHECK(relative_error(got.map, dmap) < 1e-4);
      }
}

TEST_CASE("LC's operand and output around the codes multiply by its weight", "[lc]") {
  Backend& b = backend();
  for (const Sizes& sizes : kSizes)
    for (const int64_t m : {1, 3, 33}) {
      CAPTURE(sizes.n, sizes.k, m);
      Host host(sizes, {});
      for (Values* scales : {&host.u, &host.v})
        for (double& x : *scales) x = host.scale(x);
      engine::Rng rng(13);
      const Values x = activations(rng, m * host.k), addend = activations(rng, m * host.n);
      const LcWeight from = host.on(b);
      const Guarded out(b, {m, host.k}, b.act()), constant(b, {m}, b.real()),
          y(b, {m, host.n}, b.act()), plain(b, {m, host.n}, b.act());
      b.lc_operand(out.tensor(), constant.tensor(), make(b, {m, host.k}, b.act(), x), from.u,
                   from.map);
      const Values rows = values_of(b, out.tensor());
      Values codes(host.latent.size()), sums;
      for (size_t i = 0; i < codes.size(); ++i)
        codes[i] = quant::lc_code(host.position(i), host.rule);
      for (int64_t row = 0; row < m; ++row)
        for (int64_t n = 0; n < host.n; ++n) {
          double sum = 0;
          for (int64_t k = 0; k < host.k; ++k)
            sum += rows[static_cast<size_t>(row * host.k + k)] *
                   codes[static_cast<size_t>(n * host.k + k)];
          sums.push_back(sum);
        }
      const Tensor products = make(b, {m, host.n}, b.real(), sums);
      b.lc_output(y.tensor(), products, constant.tensor(), from.v,
                  make(b, {m, host.n}, b.act(), addend));
      b.lc_output(plain.tensor(), products, constant.tensor(), from.v, Tensor());
      for (const Guarded* guarded : {&out, &constant, &y, &plain}) CHECK(guarded->untouched());
      Values transposed(host.latent.size());
      const Values weight = host.weight();
      for (int64_t n = 0; n < host.n; ++n)
        for (int64_t k = 0; k < host.k; ++k)
          transposed[static_cast<size_t>(k * host.n + n)] =
              weight[static_cast<size_t>(n * host.k + k)];
      Values want = product(x, transposed, m, host.k, host.n);
      // One rounding of the operand, whose products with codes of mean 3/2 partly cancel, and one
      // of the output.
      CHECK(relative_error(values_of(b, plain.tensor()), want) < 4 * act_epsilon());
      for (size_t i = 0; i < want.size(); ++i) want[i] += addend[i];
      CHECK(relative_error(values_of(b, y.tensor()), want) < 4 * act_epsilon());
    }
}

}  // namespace bbb::tests
