// The checks of the backend's contract: on every device, a wrong call throws one line that names
// the op, the tensor and both shapes. Also plain data movement.
#include <bit>
#include <catch2/catch.hpp>
#include <cmath>
#include <functional>
#include <limits>

#include "engine/bf16.h"
#include "tests/support.h"

namespace bbb::tests {
namespace {

using engine::kControlSize;
using engine::Rotation;
using engine::Rounding;
using engine::WeightGrid;
using engine::Write;

std::string error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

struct BadCall {
  std::string op;
  std::string says;  // a part of the message
  std::function<void()> call;
};

}  // namespace

TEST_CASE("a wrong call names its op and the shapes") {
  Backend& b = backend();
  const DType act = b.act(), real = b.real();
  const auto a = [&](Shape shape) { return b.zeros(std::move(shape), act); };
  const auto r = [&](Shape shape) { return b.zeros(std::move(shape), real); };
  const auto i = [&](Shape shape) { return b.zeros(std::move(shape), DType::I32); };
  const auto u = [&](Shape shape) { return b.zeros(std::move(shape), DType::U8); };
  const Tensor none;
  const engine::QuantizedWeights weights{.tiles = i({1, 4}),
                                         .bits = i({1}),
                                         .max_range = r({1}),
                                         .s = r({1}),
                                         .prequantized = r({1}),
                                         .clipped = u({16}),
                                         .wq = a({128}),
                                         .e = u({4}),
                                         .z = u({3}),
                                         .ratios = Tensor(),
                                         .group = 32,
                                         .rounding = Rounding::Nearest};
  const engine::ParameterTable table{.tiles = i({1, 4}), .slots = r({1, 3})};
  std::vector<BadCall> calls = {
      {"copy", "(2, 3)",
       [&] {
         b.copy(a({2, 3}), a({5}));
       }},
      {"copy", "I32 (3)", [&] { b.copy(a({3}), i({3})); }},
      {"cast", "U8 (4)", [&] { b.cast(a({4}), u({4})); }},
      {"zero", "undefined", [&] { b.zero(none); }},
      {"embed", "ids must be I32 (4)",
       [&] {
         b.embed(a({4, 8}), i({5}), a({9, 8}));
       }},
      {"embed", "(9, 8)",
       [&] {
         b.embed(a({4, 7}), i({4}), a({9, 8}));
       }},
      {"embed_backward", "ids must be I32 (4)",
       [&] {
         b.embed_backward(r({9, 8}), a({4, 8}), i({5}), Write::Add);
       }},
      {"embed_backward", "(9, 8)",
       [&] {
         b.embed_backward(r({9, 7}), a({4, 8}), i({4}), Write::Add);
       }},
      {"lora_weight", "b must be",
       [&] {
         b.lora_weight(r({4, 8}), r({4, 8}), r({4, 2}), r({3, 8}), 1);
       }},
      {"lora_weight_backward", "clipped must be U8 (4)",
       [&] {
         b.lora_weight_backward(r({4, 2}), r({2, 8}), r({4, 8}), u({3}), r({4, 2}), r({2, 8}), 1);
       }},
      {"match_moments", "target must be F64 (5, 8)",
       [&] {
         b.match_moments(r({1}), none, a({4, 8}), b.zeros({5, 8}, DType::F64),
                         b.zeros({5, 7}, DType::F64), 1);
       }},
      {"gather_rows", "(4, 3)",
       [&] {
         b.gather_rows(a({2, 2}), {a({4, 3}), i({4}), i({1})});
       }},
      {"advance", "cursor must have 1 dimensions",
       [&] {
         b.advance(i({2, 1}));
       }},
      {"log_control", "control",
       [&] {
         b.log_control(r({4, kControlSize}), r({3}), i({1}));
       }},
      {"gemm_nt", "(5, 4)",
       [&] {
         b.gemm_nt(a({2, 5}), a({2, 3}), a({5, 4}), none, none);
       }},
      {"gemm_nt", "got I32 (2, 5)",
       [&] {
         b.gemm_nt(i({2, 5}), a({2, 3}), a({5, 3}), none, none);
       }},
      {"gemm_nt", "addend",
       [&] {
         b.gemm_nt(a({2, 5}), a({2, 3}), a({5, 3}), none, a({5}));
       }},
      {"gemm_nt", "2 dimensions",
       [&] {
         b.gemm_nt(a({2, 5}), a({1, 2, 3}), a({5, 3}), none, none);
       }},
      {"gemm_nn", "(2, 3)",
       [&] {
         b.gemm_nn(a({2, 4}), a({2, 5}), a({5, 3}), none, Write::Add);
       }},
      {"gemm_tn", "(5, 3)",
       [&] {
         b.gemm_tn(r({3, 5}), a({2, 5}), a({2, 3}), Write::Add);
       }},
      {"rms_norm", "inv_rms",
       [&] {
         b.rms_norm(a({2, 4}), r({3}), a({2, 4}), r({4}), 1e-5);
       }},
      {"rms_norm_backward", "dw must be",
       [&] {
         b.rms_norm_backward(a({2, 4}), r({2}), a({2, 4}), a({2, 4}), r({2}), r({4}),
                             Write::Overwrite, Write::Add);
       }},
      {"swiglu", "(2, 5)",
       [&] {
         b.swiglu(a({2, 4}), a({2, 4}), a({2, 5}));
       }},
      {"swiglu_backward", "dup",
       [&] { b.swiglu_backward(a({4}), a({3}), a({4}), a({4}), a({4})); }},
      {"rope", "odd",
       [&] {
         b.rope(a({1, 2, 1, 3}), b.zeros({1}, DType::F32), none, Rotation::Forward);
       }},
      {"add", "(4, 2)",
       [&] {
         b.add(a({2, 4}), a({2, 4}), a({4, 2}));
       }},
      {"sample", "ids must be I32 (2)",
       [&] {
         b.sample(i({3}), r({2, 9}), {}, {});
       }},
      {"sample", "seeds is undefined",
       [&] {
         b.sample(i({2}), r({2, 9}), {}, {.temperature = 1});
       }},
      {"sample", "seen is undefined",
       [&] {
         b.sample(i({2}), r({2, 9}), {}, {.repetition_penalty = 1.1});
       }},
      {"sample", "seen must be U8 (2, 2)",
       [&] {
         b.sample(i({2}), r({2, 9}), {.seen = u({2, 1})}, {.repetition_penalty = 1.1});
       }},
      {"sample", "cursor is undefined",
       [&] {
         b.sample(i({2}), r({2, 9}), {.log = i({4, 2})}, {});
       }},
      {"sample", "top-p 1.5",
       [&] {
         b.sample(i({2}), r({2, 9}), {}, {.top_p = 1.5});
       }},
      {"attention", "3 query heads are not a multiple of 2",
       [&] {
         b.attention(a({1, 4, 3, 8}), r({1, 3, 4}), a({1, 4, 3, 8}), a({1, 4, 2, 8}),
                     a({1, 4, 2, 8}), {});
       }},
      {"attention", "first_key must be I32 (1, 4)",
       [&] {
         const Tensor x = a({1, 4, 2, 8});
         b.attention(x, r({1, 2, 4}), x, x, x, {.first_key = i({4})});
       }},
      {"attention", "lse",
       [&] {
         b.attention(a({1, 4, 2, 8}), r({1, 4, 2}), a({1, 4, 2, 8}), a({1, 4, 2, 8}),
                     a({1, 4, 2, 8}), {});
       }},
      {"attention_cached", "takes no first_key",
       [&] {
         const Tensor x = a({1, 4, 2, 8});
         b.attention_cached(x, x, x, x, i({1}), {.first_key = i({1, 4})});
       }},
      {"attention_backward", "inv_freq must be F32 (4)",
       [&] {
         const Tensor x = a({1, 4, 2, 8});
         b.attention_backward(x, x, x, x, x, x, x, x, r({1, 2, 4}), r({8}), {});
       }},
      {"append_kv", "(1, 9, 2, 4)",
       [&] {
         b.append_kv(a({1, 9, 2, 4}), a({1, 9, 2, 4}), a({1, 1, 2, 8}), a({1, 1, 2, 8}), i({1}));
       }},
      {"mse", "(2, 3)",
       [&] {
         b.mse(r({1}), none, a({2, 3}), a({3, 2}));
       }},
      {"mse", "rows of x",
       [&] {
         b.mse(r({1}), none, a({2, 3}), {a({4, 2}), i({4}), i({1})});
       }},
      {"mse", "cursor must be I32 (1)",
       [&] {
         b.mse(r({1}), none, a({2, 3}), {a({4, 3}), i({4}), i({2})});
       }},
      {"cross_entropy", "targets must be I32 (2)",
       [&] {
         b.cross_entropy(r({2}), none, a({2, 9}), i({3}), 1.0);
       }},
      {"kl_divergence", "teacher",
       [&] {
         b.kl_divergence(r({2}), none, a({2, 9}), a({2, 8}), i({2}), 1.0);
       }},
      {"cross_entropy_chunk", "state must be",
       [&] {
         b.cross_entropy_chunk(r({2}), r({2, Backend::kKlState}), a({2, 9}), i({2}), 0,
                               Write::Overwrite);
       }},
      {"cross_entropy_chunk", "first_word is -1",
       [&] {
         b.cross_entropy_chunk(r({2}), r({2, Backend::kCrossEntropyState}), a({2, 9}), i({2}), -1,
                               Write::Overwrite);
       }},
      {"cross_entropy_chunk_backward", "dlogits must be",
       [&] {
         b.cross_entropy_chunk_backward(a({2, 8}), a({2, 9}), r({2, Backend::kCrossEntropyState}),
                                        i({2}), 0, 1.0);
       }},
      {"kl_divergence_chunk", "loss must be",
       [&] {
         b.kl_divergence_chunk(r({3}), r({2, Backend::kKlState}), a({2, 9}), a({2, 9}), i({2}),
                               Write::Add);
       }},
      {"kl_divergence_chunk_backward", "teacher must be",
       [&] {
         b.kl_divergence_chunk_backward(a({2, 9}), a({2, 9}), a({2, 8}), r({2, Backend::kKlState}),
                                        i({2}), 1.0);
       }},
      {"jensen_shannon", "beta must be between 0 and 1, got 1",
       [&] {
         b.jensen_shannon(r({2}), none, a({2, 9}), a({2, 9}), i({2}), 1.0, 1.0);
       }},
      {"jensen_shannon", "teacher must be",
       [&] {
         b.jensen_shannon(r({2}), none, a({2, 9}), a({2, 8}), i({2}), 0.5, 1.0);
       }},
      {"jensen_shannon_chunk", "student_kl must be",
       [&] {
         b.jensen_shannon_chunk(r({2}), r({3}), a({2, 9}), a({2, 9}), r({2, Backend::kKlState}),
                                i({2}), 0.5, Write::Add);
       }},
      {"jensen_shannon_chunk_backward", "state must be",
       [&] {
         b.jensen_shannon_chunk_backward(a({2, 9}), a({2, 9}), a({2, 9}), r({2, 3}), r({2}), i({2}),
                                         0.5, 1.0);
       }},
      {"sum", "out must be", [&] { b.sum(r({2}), r({4}), 1.0, Write::Overwrite); }},
      {"max_group_range", "130 elements, no multiple of 128",
       [&] { b.max_group_range(weights, r({130})); }},
      {"max_group_range", "clipped must be U8 (32)", [&] { b.max_group_range(weights, r({256})); }},
      {"fake_quant", "z must be U8 (4)", [&] { b.fake_quant(weights, r({128})); }},
      {"quantize_codes", "bits must be 2, 3, 4 or 8, got 5",
       [&] {
         b.quantize_codes(u({2, 64}), r({2, 64}), u({2, 2}), u({2, 2}), r({1}), WeightGrid{5, 32});
       }},
      {"adamw", "v must be",
       [&] {
         b.adamw(r({128}), a({128}), r({256}), r({128}), r({kControlSize}), table, weights, {});
       }},
      {"adamw", "m must be",
       [&] {
         b.adamw(r({128}), a({256}), r({128}), r({128}), r({kControlSize}), table, weights, {});
       }},
      {"adamw", "z must be U8 (4)",
       [&] {
         b.adamw(r({128}), a({128}), r({128}), r({128}), r({kControlSize}), table, weights, {});
       }},
      {"step_control", "control", [&] { b.step_control(r({3}), r({1}), r({128}), u({16}), {}); }},
      {"step_control", "clipped must be U8 (16)",
       [&] { b.step_control(r({kControlSize}), r({1}), r({128}), u({128}), {}); }},
  };
  if (act != real) {
    const BadCall added[] = {
        {"adamw", "m must be BF16 (128), got F32 (128)",
         [&] {
           b.adamw(r({128}), r({128}), r({128}), r({128}), r({kControlSize}), table, weights, {});
         }},
        {"gemm_tn", "dw must be F32 to be added to",
         [&] {
           b.gemm_tn(a({5, 3}), a({2, 5}), a({2, 3}), Write::Add);
         }},
        {"rms_norm_backward", "dw must be F32 to be added to",
         [&] {
           b.rms_norm_backward(a({2, 4}), a({4}), a({2, 4}), a({2, 4}), r({2}), r({4}),
                               Write::Overwrite, Write::Add);
         }},
        {"scale_codes_backward", "dw must be F32 to be added to",
         [&] {
           b.scale_codes_backward(a({2, 1}), a({2, 32}), u({2, 32}), u({2, 1}), WeightGrid{2, 32},
                                  Write::Add);
         }},
        {"scale_codes_backward", "dsigma must be BF16 (2, 1)",
         [&] {
           b.scale_codes_backward(r({2, 1}), a({2, 32}), u({2, 32}), u({2, 1}), WeightGrid{2, 32},
                                  Write::Overwrite);
         }},
    };
    calls.insert(calls.end(), std::begin(added), std::end(added));
  }
  for (const BadCall& bad : calls) {
    const std::string error = error_of(bad.call);
    INFO(bad.op << " said: " << error);
    CHECK(error.rfind(bad.op + ": ", 0) == 0);
    CHECK(error.find(bad.says) != std::string::npos);
    CHECK(error.find('\n') == std::string::npos);
  }
}

TEST_CASE("copy, cast and zero write exactly their output") {
  Backend& b = backend();
  for (const int64_t n : {1, 31, 33, 100003}) {
    engine::Rng rng(7);
    const std::vector<double> values = normal(rng, n);
    const Tensor source = make(b, {n}, DType::F32, values);
    Guarded narrow(b, {n}, DType::BF16), wide(b, {n}, DType::F32), zero(b, {n}, DType::U8);
    b.cast(narrow.tensor(), source);
    b.cast(wide.tensor(), narrow.tensor());
    b.zero(zero.tensor());
    CHECK(values_of(b, wide.tensor()) == round_bf16(values_of(b, source)));
    b.copy(wide.tensor(), source);
    CHECK(bytes_of(b, wide.tensor()) == bytes_of(b, source));
    CHECK(values_of(b, zero.tensor()) == std::vector<double>(static_cast<size_t>(n), 0.0));
    CHECK(narrow.untouched());
    CHECK(wide.untouched());
    CHECK(zero.untouched());
  }
}

TEST_CASE("bf16 rounds to nearest even, and keeps NaN and infinity") {
  const float infinity = std::numeric_limits<float>::infinity();
  CHECK(engine::to_bf16(1.0f) == 0x3f80);
  CHECK(engine::to_bf16(1.0f + 0x1p-8f) == 0x3f80);              // a tie: to even, down
  CHECK(engine::to_bf16(1.0f + 3 * 0x1p-8f) == 0x3f82);          // a tie: to even, up
  CHECK(engine::to_bf16(1.0f + 0x1p-8f + 0x1p-23f) == 0x3f81);   // past the tie
  CHECK(engine::to_bf16(1.0 + 0x1p-8 + 0x1p-40) == 0x3f81);      // just past the tie, lost in F32
  CHECK(engine::to_bf16(1.0 + 3 * 0x1p-8 - 0x1p-40) == 0x3f81);  // below the tie
  CHECK(engine::to_bf16(infinity) == 0x7f80);
  CHECK(engine::to_bf16(-infinity) == 0xff80);
  CHECK(engine::to_bf16(1e300) == 0x7f80);
  CHECK(std::isnan(engine::from_bf16(engine::to_bf16(std::bit_cast<float>(0x7f800001u)))));
}

TEST_CASE("memory is counted, and running out of it throws one line that names the bytes") {
  Backend& b = backend();
  b.reset_memory_peak();
  const int64_t before = b.memory_peak_bytes();
  {
    const Tensor t = b.empty({int64_t{1} << 20}, DType::F32);
    CHECK(b.memory_peak_bytes() >= before + t.bytes());
  }
  b.reset_memory_peak();
  CHECK(b.memory_peak_bytes() == before);
  CHECK(b.memory_available_bytes() > 0);
  CHECK(b.memory_total_bytes() > 0);
  const std::string error = error_of([&] { b.empty({int64_t{1} << 50}, DType::U8); });
  INFO(error);
  CHECK(error.find("1125899906842624 bytes") != std::string::npos);
  CHECK(error.find('\n') == std::string::npos);
}

TEST_CASE("a recorded step can run several times") {
  Backend& b = backend();
  const Tensor cursor = b.zeros({1}, DType::I32);
  const auto step = b.record([&] { b.advance(cursor); });
  CHECK(values_of(b, cursor) == std::vector<double>{0});
  for (int i = 0; i < 3; ++i) step->run();
  CHECK(values_of(b, cursor) == std::vector<double>{3});
}

}  // namespace bbb::tests
