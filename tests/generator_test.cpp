// Generator: sequences together and alone, prefixes that stay in the cache, sampling by seed.
#include "models/generator.h"

#include <catch2/catch.hpp>

#include "tests/formats.h"
#include "tests/tiny_model.h"
#include "tests/trained_model.h"

namespace bbb::tests {
namespace {

using engine::SampleSpec;
using models::Generator;
using Ids = std::vector<int32_t>;

constexpr int64_t kCapacity = 64;

struct Fixture {
  TempDir directory;
  std::unique_ptr<models::Checkpoint> source;
  std::unique_ptr<models::Llama> model;

  Fixture() {
    write_tiny_model(directory.path(), tiny_config(), 1);
    source = models::open_checkpoint(directory.path());
    model = load_model(backend(), *source);
  }
};

// The tokens of every sequence after prompts of its own, `count` of each.
std::vector<Ids> generate(models::Llama& model, const std::vector<Ids>& prompts,
                          const std::vector<uint64_t>& seeds, int64_t count, const SampleSpec& spec,
                          quant::KvFormat kv = {}) {
  Generator generator(model, static_cast<int64_t>(prompts.size()), kCapacity, spec, kv);
  std::vector<Ids> out;
  for (size_t b = 0; b < prompts.size(); ++b)
    out.push_back({generator.prefill(static_cast<int64_t>(b), prompts[b], seeds[b])});
  generator.run(count - 1, [&](const Ids& tokens) {
    for (size_t b = 0; b < out.size(); ++b) out[b].push_back(tokens[b]);
    return true;
  });
  return out;
}

// One sequence, `copies` times in a batch: products of as many rows round alike.
Ids alone(models::Llama& model, const Ids& prompt, uint64_t seed, size_t copies, int64_t count,
          const SampleSpec& spec, quant::KvFormat kv = {}) {
  return generate(model, std::vector<Ids>(copies, prompt), std::vector<uint64_t>(copies, seed),
                  count, spec, kv)[0];
}

const SampleSpec kSpecs[] = {
    {}, {.temperature = 0.9, .top_p = 0.9}, {.repetition_penalty = 1.3}, {1.5, 0.8, 1.1}};

// Another order of rounding may prefer another of two logits that are almost equal.
double slack() { return 8 * epsilon_of(backend().act()); }
// On a CPU, products of few rows with packed weights round activations to 16 bits.
double packed_slack() { return on_cuda() ? slack() : 1e-3; }

// Each chosen token has the largest logit of one forward, less `slack` times the largest |logit|.
void check_largest(models::Llama& model, const Ids& prompt, const Ids& chosen, double slack) {
  Ids all = prompt;
  all.insert(all.end(), chosen.begin(), chosen.end());
  const std::vector<double> logits = logits_of(model, all);
  double spread = 0;
  for (const double x : logits) spread = std::max(spread, std::abs(x));
  for (size_t t = prompt.size(); t < all.size(); ++t) {
    const auto row = logits.begin() + static_cast<int64_t>(t - 1) * 53;
    CHECK(row[all[t]] >= *std::max_element(row, row + 53) - slack * spread);
  }
}

struct Prompts {
  std::vector<Ids> ids;
  std::vector<uint64_t> seeds;

  explicit Prompts(int64_t batch) {
    for (int64_t b = 0; b < batch; ++b) {
      ids.push_back(random_tokens(static_cast<uint64_t>(10 + b), 1 + 7 * b % 23, 53));
      seeds.push_back(static_cast<uint64_t>(100 + b));
    }
  }
};

TEST_CASE("generator: sequences of a batch equal each one alone", "[generator]") {
  const Fixture fixture;
  for (const int64_t batch : {2, 3, 11}) {
    const Prompts prompts(batch);
    const size_t copies = on_cuda() ? prompts.ids.size() : 1;
    for (const SampleSpec& spec : kSpecs) {
      CAPTURE(batch, spec.temperature, spec.repetition_penalty);
      const auto together = generate(*fixture.model, prompts.ids, prompts.seeds, 20, spec);
      CHECK(together == generate(*fixture.model, prompts.ids, prompts.seeds, 20, spec));
      for (size_t b = 0; b < prompts.ids.size(); ++b)
        CHECK(together[b] ==
              alone(*fixture.model, prompts.ids[b], prompts.seeds[b], copies, 20, spec));
    }
  }
}

TEST_CASE("generator: sequences of a batch equal each one alone with a quantized cache",
          "[generator]") {
  const Fixture fixture;
  for (const int bits : {8, 4})
    for (const int64_t batch : {2, 11}) {
      const Prompts prompts(batch);
      const size_t copies = on_cuda() ? prompts.ids.size() : 1;
      for (const SampleSpec& spec : {kSpecs[0], kSpecs[3]}) {
        CAPTURE(bits, batch, spec.temperature);
        const auto together =
            generate(*fixture.model, prompts.ids, prompts.seeds, 20, spec, {bits});
        for (size_t b = 0; b < prompts.ids.size(); ++b)
          CHECK(together[b] ==
                alone(*fixture.model, prompts.ids[b], prompts.seeds[b], copies, 20, spec, {bits}));
      }
    }
}

// An export of a tiny model, rounded to nearest, and the bits that a load reads of nested codes.
struct PackedCase {
  const char* name;
  quant::WeightGrid weight;
  quant::InputGrid input;
  int bits;
};
const PackedCase kPackedCases[] = {{"w2a16", {.bits = 2}, {}, 0},
                                   {"w2a2", {.bits = 2}, {.bits = 2}, 0},
                                   {"nested", {.bits = 8, .nested = true}, {}, 2}};

std::unique_ptr<models::Llama> packed_model(const models::Checkpoint& source,
                                            const std::string& path, const PackedCase& packed) {
  const models::LlamaConfig config = tiny_config();
  std::vector<quant::LinearFormat> formats = block_formats(config, packed.weight.bits);
  for (quant::LinearFormat& format : formats)
    format.weight = packed.weight, format.input = packed.input;
  TrainedModel(
      backend(), source, [&](int64_t) { return formats; },
      [&](int64_t layer) {
        return models::start_stage(config, models::full_precision(source, layer), formats, {},
                                   quant::RangeRule::MinMax, 0);
      })
      .write(path);
  return load_model(backend(), *models::open_checkpoint(path, packed.bits));
}

TEST_CASE("generator: sequences of a batch equal each one alone with packed weights",
          "[generator]") {
  const Fixture fixture;
  for (const PackedCase& packed : kPackedCases) {
    const auto model = packed_model(*fixture.source, fixture.directory / packed.name, packed);
    for (const int64_t batch : {2, 5, 8, 9}) {
      const Prompts prompts(batch);
      // On a CPU a row of a product has the same bits alone and among up to kMaxPackedRows.
      const size_t copies = on_cuda() || batch > Backend::kMaxPackedRows ? prompts.ids.size() : 1;
      for (const SampleSpec& spec : {kSpecs[0], kSpecs[3]}) {
        CAPTURE(packed.name, batch, spec.temperature);
        const auto together = generate(*model, prompts.ids, prompts.seeds, 20, spec);
        for (size_t b = 0; b < prompts.ids.size(); ++b) {
          CHECK(together[b] == alone(*model, prompts.ids[b], prompts.seeds[b], copies, 20, spec));
          // A quantized activation near a threshold may get another code in another product.
          if (packed.input.bits == 16 && spec.temperature == 0)
            check_largest(*model, prompts.ids[b], together[b], packed_slack());
        }
      }
    }
  }
}

TEST_CASE("generator: greedy tokens are the largest logits of one forward", "[generator]") {
  const Fixture fixture;
  const Ids prompt = random_tokens(3, 9, 53);
  check_largest(*fixture.model, prompt, generate(*fixture.model, {prompt}, {0}, 12, {})[0],
                slack());
}

TEST_CASE("generator: a sequence takes the place of another one while the rest go on",
          "[generator]") {
  const Fixture fixture;
  const SampleSpec spec{.temperature = 0.8, .repetition_penalty = 1.2};
  const std::vector<Ids> prompts = {random_tokens(1, 5, 53), random_tokens(2, 12, 53),
                                    random_tokens(3, 3, 53)};
  Generator generator(*fixture.model, 2, kCapacity, spec);
  std::vector<Ids> out = {
      {generator.prefill(0, prompts[0], 7)}, {generator.prefill(1, prompts[1], 8)}, {}};
  // A run that ends early still delivers the steps that have started.
  int64_t steps = 0;
  generator.run(20, [&](const Ids& tokens) {
    if (++steps <= 4) out[0].push_back(tokens[0]);
    out[1].push_back(tokens[1]);
    return steps < 4;
  });
  CHECK(steps >= 4);
  CHECK(steps < 20);
  CHECK(generator.steps_left() == kCapacity - 12 - steps);
  out[2].push_back(generator.prefill(0, prompts[2], 9));
  generator.run(5, [&](const Ids& tokens) {
    out[2].push_back(tokens[0]);
    out[1].push_back(tokens[1]);
    return true;
  });
  generator.clear(0);
  generator.run(6, [&](const Ids& tokens) {
    out[1].push_back(tokens[1]);
    return true;
  });
  for (size_t i = 0; i < 3; ++i) {
    CAPTURE(i);
    CHECK(out[i] == alone(*fixture.model, prompts[i], 7 + i, on_cuda() ? 2 : 1,
                          static_cast<int64_t>(out[i].size()), spec));
  }
}

TEST_CASE("generator: a prefill keeps what the cache holds", "[generator]") {
  const Fixture fixture;
  for (const SampleSpec& spec : kSpecs) {
    Generator generator(*fixture.model, 1, kCapacity, spec);
    Ids all = random_tokens(4, 6, 53);
    all.push_back(generator.prefill(0, all, 5));
    generator.run(7, [&](const Ids& tokens) {
      all.push_back(tokens[0]);
      return true;
    });
    // 6 tokens of the prompt and 7 that steps have fed; the last one is chosen only.
    CHECK(generator.kept(0, all) == 13);
    Ids next = all;
    for (const int32_t id : random_tokens(6, 4, 53)) next.push_back(id);
    CHECK(generator.kept(0, next) == 13);
    Ids other = next;
    other[3] = (other[3] + 1) % 53;
    CHECK(generator.kept(0, other) == 3);
    for (const Ids& tokens : {next, other, Ids(next.begin(), next.begin() + 5), next}) {
      Ids got = {generator.prefill(0, tokens, 5)};
      generator.run(6, [&](const Ids& chosen) {
        got.push_back(chosen[0]);
        return true;
      });
      // On a GPU a product rounds differently with other numbers of rows.
      if (!on_cuda()) CHECK(got == generate(*fixture.model, {tokens}, {5}, 7, spec)[0]);
      if (spec.temperature == 0 && spec.repetition_penalty == 1)
        check_largest(*fixture.model, tokens, got, slack());
    }
  }
}

TEST_CASE("generator: all positions of the cache, and not one more", "[generator]") {
  const Fixture fixture;
  Generator generator(*fixture.model, 2, 16, {});
  generator.prefill(1, random_tokens(1, 10, 53), 0);
  CHECK(generator.steps_left() == 6);
  int64_t steps = 0;
  const auto count = [&](const Ids&) { return ++steps, true; };
  CHECK_THROWS_WITH(generator.run(7, count), Catch::Contains("steps_left"));
  CHECK_NOTHROW(generator.run(6, count));
  CHECK(steps == 6);
  CHECK(generator.steps_left() == 0);
  CHECK_THROWS_WITH(generator.prefill(0, random_tokens(1, 17, 53), 0), Catch::Contains("capacity"));
  CHECK_NOTHROW(generator.prefill(0, random_tokens(1, 16, 53), 0));
  CHECK_NOTHROW(backend().synchronize());
}

TEST_CASE("generator: NaN logits end a run", "[generator]") {
  Fixture fixture;
  Generator generator(*fixture.model, 2, kCapacity, {});
  generator.prefill(0, {1, 2, 3}, 0);
  const Tensor& norm = fixture.model->norm().value;
  backend().copy(
      norm, make(backend(), norm.shape(), norm.dtype(), std::vector<double>(64, std::nan(""))));
  CHECK_THROWS_WITH(generator.prefill(1, {1, 2, 3}, 0),
                    Catch::Contains("the logit of token 0 is "));
  CHECK_THROWS_WITH(generator.run(5, [](const Ids&) { return true; }),
                    Catch::Contains("the logit of token 0 is "));
}

}  // namespace
}  // namespace bbb::tests
