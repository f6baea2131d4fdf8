// Times decoding and prefill as the commands run them: models/generator.h.
#include <algorithm>
#include <chrono>

#include "engine/rng.h"
#include "models/generator.h"
#include "tools/bench.h"
#include "tools/generation.h"

namespace bbb::tools {

using engine::Backend;
using models::Generator;
using Clock = std::chrono::steady_clock;

namespace {

constexpr int64_t kWarmSteps = 8;
constexpr int64_t kContextSteps = 64;  // timed

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

std::vector<int32_t> random_prompt(int64_t tokens, int64_t vocab, uint64_t seed) {
  engine::Rng rng(seed);
  std::vector<int32_t> ids(static_cast<size_t>(tokens));
  for (int32_t& id : ids) id = static_cast<int32_t>(rng.below(vocab));
  return ids;
}

// Runs steps and returns the time between the arrivals of their tokens: a device may be ahead of
// the host.
std::vector<double> step_times(Generator& generator, int64_t steps) {
  std::vector<double> times;
  auto last = Clock::now();
  generator.run(steps, [&](const std::vector<int32_t>&) {
    times.push_back(seconds_since(last));
    last = Clock::now();
    return true;
  });
  return times;
}

}  // namespace

int64_t DecodeBench::positions() const {
  int64_t most = context + kWarmSteps + kContextSteps;
  for (const int64_t prompt : prompts) most = std::max(most, prompt + std::max(tokens, kWarmSteps));
  return most;
}

void DecodeBench::shrink(int64_t positions, bool change_prompts, bool change_context) {
  const int64_t steps = std::max(tokens, kWarmSteps);
  if (change_prompts) std::erase_if(prompts, [&](int64_t p) { return p + steps > positions; });
  if (change_context)
    context = std::clamp<int64_t>(positions - kWarmSteps - kContextSteps, 1, context);
}

DecodeResult bench_decode(models::Llama& model, const DecodeBench& bench) {
  Backend& backend = model.backend();
  DecodeResult result;
  result.head_bytes = model.head_table().bytes();
  result.weight_bytes = weight_bytes(model, backend) - result.head_bytes;
  result.kv_bytes = models::KvCache(backend, model.config(), 1, 1, bench.kv).bytes_per_token();
  const auto step_bytes = [&](int64_t first, int64_t steps) {
    return static_cast<double>(result.weight_bytes + result.head_bytes +
                               bench.batch * result.kv_bytes * (first + steps / 2));
  };

  for (const int64_t prompt : bench.prompts) {
    Generator generator(model, bench.batch, prompt + std::max(bench.tokens, kWarmSteps), {},
                        bench.kv);
    const auto prefill = [&] {
      const auto start = Clock::now();
      for (int64_t b = 0; b < bench.batch; ++b) {
        generator.clear(b);
        const auto seed = static_cast<uint64_t>(b);
        generator.prefill(b, random_prompt(prompt, model.config().vocab, seed), seed);
      }
      return seconds_since(start);
    };
    prefill();
    step_times(generator, kWarmSteps);
    DecodeTime time{.prompt = prompt, .prefill_s = prefill()};
    for (const double step : step_times(generator, bench.tokens))
      time.step_s += step / static_cast<double>(bench.tokens);
    time.bytes = step_bytes(prompt, bench.tokens);
    result.prefilled.push_back(time);
  }

  Generator generator(model, bench.batch, bench.context + kWarmSteps + kContextSteps, {}, bench.kv);
  generator.assume(bench.context);
  step_times(generator, kWarmSteps);
  result.at_context = {.prompt = bench.context,
                       .step_s = median(step_times(generator, kContextSteps)),
                       .bytes = step_bytes(bench.context + kWarmSteps, kContextSteps)};
  return result;
}

double bench_prefill(models::Llama& model, int64_t tokens) {
  Generator generator(model, 1, tokens, {});
  const std::vector<int32_t> prompt = random_prompt(tokens, model.config().vocab, 1);
  return measure_seconds(model.backend(), Repeats(), [&] {
    generator.clear(0);
    generator.prefill(0, prompt, 0);
  });
}

double prefill_flops(const models::LlamaConfig& model, int64_t tokens) {
  const auto t = static_cast<double>(tokens);
  const double attention = 2 * t * static_cast<double>(model.heads * model.head_dim);
  return t * (2 * static_cast<double>(model.linear_parameters()) +
              static_cast<double>(model.layers) * attention) +
         2 * static_cast<double>(model.vocab * model.d_model);
}

}  // namespace bbb::tools
