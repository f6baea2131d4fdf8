// Backend::layer_decoder against the ops one after another on the same device: hidden states, keys
// and values, over several steps.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>

#include "models/generator.h"
#include "quant/packed_tiles.h"
#include "tests/formats.h"
#include "tests/packed_matrix.h"

namespace bbb::tests {
namespace {

using engine::DecodeLayer;
using engine::DecodeStack;
using engine::OperandRows;
using engine::PackedWeight;
using quant::LinearFormat;

struct Size {
  const char* name;
  int64_t d_model, hidden, heads, kv_heads, head_dim, layers;
  int64_t capacity, position, window;
};

constexpr Size kSizes[] = {
    {"tiny", 64, 96, 2, 1, 64, 2, 40, 0, 0},
    {"three heads a group", 576, 1536, 9, 3, 64, 3, 300, 250, 0},
    {"seven heads a group", 896, 1216, 7, 1, 128, 2, 600, 511, 0},
    {"one head a group, window", 512, 1024, 8, 8, 64, 2, 300, 200, 77},
    {"wide", 4096, 4224, 32, 8, 128, 2, 1200, 1030, 0},
    {"long", 256, 512, 4, 2, 128, 2, 9000, 8700, 0},
};

// Random codes, scales near 1 and S that keeps the size of activations.
PackedWeight random_weight(engine::Rng& rng, const LinearFormat& format) {
  const int64_t k = format.stored_k();
  const Bytes codes = random_bytes(rng, format.n * quant::code_row_bytes(k, 2), 0, 256);
  const Bytes zeros =
      random_bytes(rng, format.n * quant::zero_row_bytes(k, format.weight.group, 2), 0, 256);
  const Bytes scales = random_bytes(rng, format.n * format.groups(), 0x30, 16);
  const float s = static_cast<float>(std::exp2(std::round(-0.5 * std::log2(double(k))) - 1));
  return engine::upload_packed(backend(), format, [&](const quant::StoredTensor& t) -> const void* {
    switch (t.part) {
      case quant::StoredPart::Codes:
        return codes.data();
      case quant::StoredPart::Scales:
        return scales.data();
      case quant::StoredPart::Zeros:
        return zeros.data();
      case quant::StoredPart::MasterScale:
        return &s;
      case quant::StoredPart::SplitChannels:
        return format.order->split().data();
      default:
        return format.order->outliers().data();
    }
  });
}

struct Stack {
  Size size;
  DecodeStack stack;

  Stack(const Size& size, const Layout* layout) : size(size) {
    engine::Rng rng(7);
    Backend& b = backend();
    const int64_t d = size.d_model, q = size.heads * size.head_dim,
                  kv = size.kv_heads * size.head_dim, f = size.hidden;
    const std::pair<int64_t, int64_t> shapes[] = {{q, d}, {kv, d}, {kv, d}, {d, q},
                                                  {f, d}, {f, d},  {d, f}};
    const engine::Shape cache{1, size.capacity, size.kv_heads, size.head_dim};
    for (int64_t l = 0; l < size.layers; ++l) {
      DecodeLayer& layer = stack.layers.emplace_back();
      for (size_t i = 0; i < std::size(shapes); ++i) {
        LinearFormat format = plain_format(shapes[i].first, shapes[i].second, 2);
        if (layout != nullptr) lay_out(format, *layout);
        if (layout != nullptr && format.channel_order().is_identity()) format.order = nullptr;
        layer.linears[i] = random_weight(rng, format);
        const size_t site = i < 3 ? 0 : i == 3 ? 1 : i < 6 ? 2 : 3;
        if (!format.exact_input() && !layer.operands[site])
          layer.operands[site] = engine::upload_operand(b, format);
      }
      const auto norm = [&] {
        std::vector<double> w = normal(rng, d, 0.2);
        for (double& x : w) x += 1;
        return make(b, {d}, b.real(), w);
      };
      layer.input_norm = norm();
      layer.post_norm = norm();
      layer.k_cache = make(b, cache, b.act(), normal(rng, engine::numel_of(cache)));
      layer.v_cache = make(b, cache, b.act(), normal(rng, engine::numel_of(cache)));
    }
    stack.start = make_ids(b, {1}, {static_cast<int32_t>(size.position)});
    std::vector<double> inv_freq;
    for (int64_t i = 0; i < size.head_dim / 2; ++i)
      inv_freq.push_back(std::pow(10000.0, -2.0 * double(i) / double(size.head_dim)));
    stack.inv_freq = make(b, {size.head_dim / 2}, DType::F32, inv_freq);
    stack.eps = 1e-5;
    stack.attention.window = size.window;
  }

  // The same layers with caches of their own.
  DecodeStack with_copied_caches() const {
    DecodeStack copy = stack;
    for (DecodeLayer& layer : copy.layers)
      for (Tensor* cache : {&layer.k_cache, &layer.v_cache}) {
        const Tensor fresh = backend().empty(cache->shape(), cache->dtype());
        backend().copy(fresh, *cache);
        *cache = fresh;
      }
    return copy;
  }
};

// What LayerDecoder::run replaces. Returns the hidden state.
Tensor run_ops(const DecodeStack& stack, Tensor x, const Size& size) {
  Backend& b = backend();
  const auto empty = [&](Shape shape) { return b.empty(std::move(shape), b.act()); };
  // The operand of a site, from what is in front of it.
  const auto rows = [&](const DecodeLayer& layer, size_t site, int64_t k) {
    return empty({1, layer.operands[site] ? layer.operands[site]->view.stored_k : k});
  };
  const auto norm = [&](const DecodeLayer& layer, size_t site, const Tensor& w) {
    const Tensor out = rows(layer, site, size.d_model), inv_rms = b.empty({1}, b.real());
    if (layer.operands[site])
      b.rms_norm_operand(OperandRows{out, {}, {}, {}, {}}, inv_rms, x, w, stack.eps,
                         *layer.operands[site]);
    else
      b.rms_norm(out, inv_rms, x, w, stack.eps);
    return out;
  };
  const auto product = [&](const DecodeLayer& layer, size_t i, const Tensor& in,
                           const Tensor& addend) {
    const Tensor y = empty({1, layer.linears[i].format.n});
    b.packed_gemv(y, in, layer.linears[i], addend);
    return y;
  };
  for (const DecodeLayer& layer : stack.layers) {
    Tensor in = norm(layer, 0, layer.input_norm);
    const auto heads = [&](const Tensor& t, int64_t count) {
      return t.view({1, 1, count, size.head_dim});
    };
    const Tensor q = heads(product(layer, 0, in, {}), size.heads);
    const Tensor k = heads(product(layer, 1, in, {}), size.kv_heads);
    const Tensor v = heads(product(layer, 2, in, {}), size.kv_heads);
    b.append_kv(layer.k_cache, layer.v_cache, k, v, stack.start, q, stack.inv_freq);
    const Tensor o = empty(q.shape());
    b.attention_cached(o, q, layer.k_cache, layer.v_cache, stack.start, stack.attention);
    in = o.view({1, size.heads * size.head_dim});
    if (layer.operands[1]) {
      const Tensor out = rows(layer, 1, in.dim(1));
      b.operand(OperandRows{out, {}, {}, {}, {}}, in, *layer.operands[1]);
      in = out;
    }
    x = product(layer, 3, in, x);
    in = norm(layer, 2, layer.post_norm);
    const Tensor gate = product(layer, 4, in, {}), up = product(layer, 5, in, {});
    const Tensor hidden = rows(layer, 3, size.hidden);
    if (layer.operands[3])
      b.swiglu_operand(OperandRows{hidden, {}, {}, {}, {}}, gate, up, *layer.operands[3]);
    else
      b.swiglu(hidden, gate, up);
    x = product(layer, 6, hidden, x);
  }
  return x;
}

// Sums are the same up to the order of FP32 additions. So most values round to the same bf16; the
// rest differ by one step, and the layers behind carry that on: a few eps a layer.
void check_close(const Tensor& got, const Tensor& wanted, int64_t layers) {
  const std::vector<double> a = values_of(backend(), got), b = values_of(backend(), wanted);
  CHECK(relative_error(a, b) < 8 * static_cast<double>(layers) * epsilon_of(DType::BF16));
  // A wrong row would vanish in a sum over all.
  double square = 0, most = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    square += b[i] * b[i];
    most = std::max(most, std::abs(a[i] - b[i]));
  }
  CHECK(most < 0.3 * std::sqrt(square / static_cast<double>(b.size())));
}

// Whether the device computes stacks in one operation: only a Hopper GPU does.
bool takes_stacks() {
  if (!needs_cuda()) return false;
  if (backend().repacked_bytes(plain_format(1, 128, 2)) == quant::tiled_bytes(1, 128)) return true;
  CHECK(backend().layer_decoder(Stack(kSizes[0], nullptr).stack) == nullptr);
  return false;
}

void check_stack(const Size& size, const Layout* layout) {
  CAPTURE(size.name, layout == nullptr ? "plain" : layout->name);
  Backend& b = backend();
  const Stack fused(size, layout);
  const DecodeStack by_op = fused.with_copied_caches();
  const auto decoder = b.layer_decoder(fused.stack);
  REQUIRE(decoder);
  engine::Rng rng(11);
  for (int64_t step = 0; step < 3; ++step) {
    CAPTURE(step);
    const std::vector<double> input = round_bf16(normal(rng, size.d_model));
    Guarded x(b, {1, size.d_model}, b.act());
    b.copy(x.tensor(), make(b, {1, size.d_model}, b.act(), input));
    const Tensor wanted = run_ops(by_op, make(b, {1, size.d_model}, b.act(), input), size);
    decoder->run(x.tensor());
    check_close(x.tensor(), wanted, size.layers);
    CHECK(x.untouched());
    b.advance(fused.stack.start);
  }
  for (size_t l = 0; l < fused.stack.layers.size(); ++l) {
    const DecodeLayer &a = fused.stack.layers[l], &c = by_op.layers[l];
    check_close(a.k_cache, c.k_cache, static_cast<int64_t>(l + 1));
    check_close(a.v_cache, c.v_cache, static_cast<int64_t>(l + 1));
  }
}

}  // namespace

TEST_CASE("decode_layers: all layers in one kernel against op by op", "[decode_layers]") {
  if (!takes_stacks()) return;
  for (const Size& size : kSizes) check_stack(size, nullptr);
}

TEST_CASE("decode_layers: rotation and channel orders", "[decode_layers]") {
  if (!takes_stacks()) return;
  for (const Layout& layout : kLayouts) {
    check_stack(kSizes[1], &layout);
    check_stack(kSizes[4], &layout);
  }
}

TEST_CASE("decode_layers: repeated runs give the same bytes", "[decode_layers]") {
  if (!takes_stacks()) return;
  Backend& b = backend();
  const Size& size = kSizes[4];
  const Stack stack(size, nullptr);
  const auto decoder = b.layer_decoder(stack.stack);
  REQUIRE(decoder);
  engine::Rng rng(3);
  const Tensor input = make(b, {1, size.d_model}, b.act(), normal(rng, size.d_model));
  const Tensor x = b.empty(input.shape(), b.act());
  const auto replay = b.record([&] {
    b.copy(x, input);
    decoder->run(x);
  });
  replay->run();
  const std::vector<uint8_t> first = bytes_of(b, x);
  for (int i = 0; i < 200; ++i) replay->run();
  CHECK(bytes_of(b, x) == first);
}

TEST_CASE("decode_layers: a position outside of the cache throws", "[decode_layers]") {
  if (!takes_stacks()) return;
  Backend& b = backend();
  Size size = kSizes[0];
  size.position = size.capacity;
  const Stack stack(size, nullptr);
  const auto decoder = b.layer_decoder(stack.stack);
  REQUIRE(decoder);
  decoder->run(b.zeros({1, size.d_model}, b.act()));
  CHECK_THROWS_AS(b.synchronize(), Error);
  // The next step works.
  b.upload(stack.stack.start, std::vector<int32_t>{0}.data());
  const Tensor x = b.zeros({1, size.d_model}, b.act());
  decoder->run(x);
  b.synchronize();
}

TEST_CASE("decode_layers: stacks whose shapes do not fit are refused", "[decode_layers]") {
  const Stack good(kSizes[0], nullptr);
  CHECK_NOTHROW(backend().layer_decoder(good.stack));
  if (!on_cuda()) CHECK(backend().layer_decoder(good.stack) == nullptr);
  DecodeStack bad = good.stack;
  std::swap(bad.layers[1].linears[3], bad.layers[1].linears[4]);
  CHECK_THROWS_WITH(backend().layer_decoder(bad), Catch::Matchers::Contains("linear 3"));
  bad = good.stack;
  bad.layers.clear();
  CHECK_THROWS_AS(backend().layer_decoder(bad), Error);
}

}  // namespace bbb::tests
